"""Pieces of a structure and holes in it, slab by slab: only what reaches the last plane seen is carried on.

A piece (component) is a set of the structure's voxels connected over faces, edges and corners (26 neighbours). A hole
is a set of voxels outside the structure, of whatever label, connected over faces (6 neighbours) that does not reach the
border of the image: what `scipy.ndimage.binary_fill_holes` would fill. The two connectivities are dual, as digital
topology wants it (Kong and Rosenfeld 1989). An axis of one voxel has no border: a slice alone is measured in its plane.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ..grid import Triple

NOTHING, OUTSIDE = -1, 0  # what a plane of numbers holds beside the numbers of regions, 1 and up


@dataclass(frozen=True)
class Components:
    """How many pieces a structure has, the voxels of the largest, and how many holes."""

    count: int = 0
    largest: int = 0
    holes: int = 0

    def add(self, voxels: np.ndarray, holes: int) -> Components:
        """With pieces of so many voxels each, and holes, that are whole now."""
        return Components(self.count + len(voxels), max(self.largest, int(voxels.max(initial=0))), self.holes + holes)


@dataclass(frozen=True)
class _Plane:
    """Numbers of the regions in a part of a plane; `origin` (y, x) is where the part begins."""

    origin: tuple[int, int] = (0, 0)
    numbers: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int32))

    @property
    def regions(self) -> int:
        return max(0, int(self.numbers.max(initial=0)))


@dataclass(frozen=True)
class _Face:
    """What of one structure reaches the last plane seen, and the voxels of each of these pieces so far."""

    pieces: _Plane = _Plane()
    voxels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    gaps: _Plane = _Plane()


def count_components(slabs: Iterable[np.ndarray], shape: Triple) -> dict[int, Components]:
    """Pieces and holes of every label above 0. slabs: (rows, y, x) integers, in z order, of a mask of `shape`.

    Memory: about 20 bytes a voxel of one slab, and the pieces that reach its end.
    """
    from scipy import ndimage

    found: dict[int, Components] = {}
    faces: dict[int, _Face] = {}
    z = 0
    for slab in slabs:
        ahead: dict[int, _Face] = {}
        boxes = ndimage.find_objects(slab if slab.dtype.itemsize < 4 else slab.astype(np.int64))
        for label, box in enumerate(boxes, 1):
            if box is not None:
                known, face = found.get(label, Components()), faces.pop(label, _Face())
                found[label], face = _extend(known, face, slab[box] == label, box, (z, z + len(slab)), shape)
                ahead[label] = face
        for label, face in faces.items():  # ended with the plane before: its gaps are open to this one
            found[label] = found[label].add(face.voxels, 0)
        faces, z = ahead, z + len(slab)
    for label, face in faces.items():
        found[label] = found[label].add(face.voxels, 0)
    return found


def _extend(
    known: Components, before: _Face, inside: np.ndarray, box: tuple[slice, ...], rows: tuple[int, int], shape: Triple
) -> tuple[Components, _Face]:
    """One slab more of one structure. inside: its voxels in its box of the slab; rows: of the slab in the image."""
    from scipy import ndimage

    begins = box[0].start == 0 and rows[0] > 0  # with a slab before it that it may be connected to
    continues = box[0].stop == rows[1] - rows[0] and rows[1] < shape[0]
    # Beside its box nothing of the structure is in the way to the border: what reaches the rim is open.
    rim = [(1, 1) if n > 1 else (0, 0) for n in shape]
    rim[0] = (rim[0][0] * (not begins), rim[0][1] * (not continues))
    is_rim = np.pad(np.zeros_like(inside), rim, constant_values=True)
    inside = np.pad(inside, rim)
    origin = (box[1].start - rim[1][0], box[2].start - rim[2][0])

    gaps, _ = ndimage.label(~inside)
    is_open = np.unique(gaps[is_rim])
    gaps[inside] = NOTHING
    pieces, count = ndimage.label(inside, np.ones((3, 3, 3)))
    voxels = np.concatenate([[0], before.voxels, np.bincount(pieces.ravel(), minlength=count + 1)[1:]])
    pieces[~inside] = NOTHING
    span = (origin, begins, continues)
    group, carried, ended, ahead = _roll(before.pieces, pieces, *span, around=NOTHING, reach=1, is_open=is_open[:0])
    sizes = np.bincount(group, voxels).astype(np.int64)
    *_, holes, gaps_ahead = _roll(before.gaps, gaps, *span, around=OUTSIDE, reach=0, is_open=is_open)
    return known.add(sizes[ended], len(holes)), _Face(ahead, sizes[carried], gaps_ahead)


def _roll(
    before: _Plane,
    numbers: np.ndarray,
    origin: tuple[int, int],
    begins: bool,
    continues: bool,
    *,
    around: int,
    reach: int,
    is_open: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, _Plane]:
    """Join the regions of a slab to those that reached it, and those that are open to what is outside.

    Nodes are what is outside (0), the regions before, then the slab's own. Gives the group of each node, the groups
    that reach the slab's end, those that are whole (neither, nor outside), and the plane to go on with.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    old, new = before.regions, max(0, int(numbers.max(initial=0)))
    first = _Plane(origin, numbers[0]) if begins else _Plane()
    outward = np.stack([np.full_like(is_open, OUTSIDE), is_open], 1)
    links = np.concatenate([_facing(before, first, around, reach), outward])
    links[:, 1] += np.where(links[:, 1] > 0, old, 0)
    graph = coo_array((np.ones(len(links), bool), tuple(links.T)), shape=(1 + old + new,) * 2)
    groups, group = connected_components(graph, directed=False)

    last = numbers[-1] if continues else np.zeros((0, 0), np.int32)
    reached = group[np.where(last > 0, last + old, OUTSIDE)]
    carried = np.setdiff1d(reached, group[OUTSIDE])
    ended = np.setdiff1d(np.arange(groups), [*carried, group[OUTSIDE]])
    ahead = np.where(reached == group[OUTSIDE], OUTSIDE, 1 + np.searchsorted(carried, reached))
    return group, carried, ended, _Plane(origin, np.where(last == NOTHING, NOTHING, ahead))


def _facing(before: _Plane, after: _Plane, around: int, reach: int) -> np.ndarray:
    """(n, 2): the numbers that face each other in two planes, up to `reach` voxels aside; `around` them is that."""
    planes = (before, after)
    there = [p for p in planes if p.numbers.size]
    if not there:
        return np.zeros((0, 2), np.int64)
    low = [min(p.origin[axis] for p in there) - reach for axis in (0, 1)]
    high = [max(p.origin[axis] + p.numbers.shape[axis] for p in there) + reach for axis in (0, 1)]
    canvas = np.full((2, high[0] - low[0], high[1] - low[1]), around, np.int64)
    for side, plane in enumerate(planes):
        y, x = plane.origin[0] - low[0], plane.origin[1] - low[1]
        height, width = plane.numbers.shape
        if plane.numbers.size:
            canvas[side, y : y + height, x : x + width] = plane.numbers
    many = int(canvas[1].max()) + 1
    found = [np.zeros(0, np.int64)]
    for aside in itertools.product(range(-reach, reach + 1), repeat=2):
        there_too = np.roll(canvas[1], aside, (0, 1))  # what goes round the edge is `around`
        both = (canvas[0] != NOTHING) & (there_too != NOTHING)
        found.append(np.unique(canvas[0][both] * many + there_too[both]))
    return np.stack(np.divmod(np.unique(np.concatenate(found)), max(1, many)), 1)
