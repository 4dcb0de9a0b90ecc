"""The lattice: the cells at which a model's network sees a study, and how its axes lie in the stored ones.

Both follow from the study's shape and affine and from the card alone, so no block, worker or order changes them. Boxes
of cells and of voxels have the stored axis order z,y,x; only a tile on its way into the network and its logits on their
way back are turned into the network's order.

Sizes and positions are nnU-Net's (Isensee et al. 2021, `compute_new_shape`, `resample_data_or_seg`): an axis of n
voxels of s mm becomes round(n s / t) cells of about t mm, halves to the even one, that fill the same extent: cell i
lies at voxel (i + 1/2) n / m - 1/2. If a study's largest voxel side is more than three times its smallest, its
coarse axis takes the nearest voxel; if that holds for the cells, theirs takes the nearest logits. Where it holds for
one of them only, the other follows; two axes that are equally coarse take none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import StudyError
from .geometry import Affine, ome_scale
from .grid import Box, Triple

if TYPE_CHECKING:
    import torch

    from segmodels import Card

ANISOTROPIC = 3.0
SPLINE_REACH = 13  # voxels on either side that a cubic spline looks at
FURTHEST = 64.0  # between the sides of a voxel and of a cell: beyond it a header is wrong, or the model is


@dataclass(frozen=True)
class View:
    """Where a network's axes lie. `axes[i]` is the stored axis (0 z, 1 y, 2 x) that the network has as its i-th;
    `against[i]`: they run against each other."""

    axes: Triple = (0, 1, 2)
    against: tuple[bool, bool, bool] = (False, False, False)

    def seen(self, stored: Sequence[Any]) -> tuple[Any, Any, Any]:
        """Three things in stored order as the network has them."""
        a, b, c = self.axes
        return stored[a], stored[b], stored[c]

    def stored(self, seen: Sequence[Any]) -> tuple[Any, Any, Any]:
        """Three things in the network's order as they are stored: the inverse of `seen`."""
        z, y, x = (seen[self.axes.index(axis)] for axis in range(3))
        return z, y, x

    def turned(self, voxels: np.ndarray) -> np.ndarray:
        """Voxels (..., z, y, x) as stored in the network's order (a view)."""
        lead = voxels.ndim - 3
        moved = voxels.transpose(*range(lead), *(lead + axis for axis in self.axes))
        back = tuple(slice(None, None, -1) if against else slice(None) for against in self.against)
        return moved[(..., *back)]

    def turned_back(self, logits: torch.Tensor) -> torch.Tensor:
        """What the network answered (..., three axes) in stored order."""
        lead = logits.ndim - 3
        flipped = [lead + i for i, against in enumerate(self.against) if against]
        logits = logits.flip(flipped) if flipped else logits
        return logits.permute(*range(lead), *(lead + axis for axis in self.stored((0, 1, 2))))


@dataclass(frozen=True)
class Lattice:
    """`voxels` and `cells`: the study's shape and the lattice's, z,y,x as stored. `orders`: per axis, how voxels become
    cells: 0 nearest, 1 linear, 3 cubic B-spline. `nearest`: per axis, whether logits are the nearest cell's, not
    interpolated linearly."""

    voxels: Triple
    cells: Triple
    view: View = View()
    orders: Triple = (1, 1, 1)
    nearest: tuple[bool, bool, bool] = (False, False, False)

    @property
    def resampled(self) -> bool:
        return self.voxels != self.cells

    def neighbours(self, axis: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For the voxels [begin, end) of an axis: the cell below, the cell above, and the share of the one above."""
        voxels, cells = self.voxels[axis], self.cells[axis]
        index = np.arange(begin, end)
        if voxels == cells:
            return index, index, np.zeros(len(index))
        below, share = positions(cells, voxels, index)
        if self.nearest[axis]:
            below, share = below + (share >= 0.5), np.zeros(len(index))
        share[(below < 0) | (below >= cells - 1)] = 0
        below = below.clip(0, cells - 1)
        return below, np.where(share > 0, below + 1, below), share

    def span(self, axis: int, begin: int, end: int) -> tuple[int, int]:
        """The cells [first, last) whose logits the labels of the voxels [begin, end) are made of."""
        if self.voxels[axis] == self.cells[axis]:
            return begin, end
        below, _, _ = self.neighbours(axis, begin, begin + 1)
        _, above, _ = self.neighbours(axis, end - 1, end)
        return int(below[0]), int(above[0]) + 1

    def reach(self, axis: int, cells: int) -> int:
        """How many voxels, at most, so many cells of an axis are made of."""
        ratio = self.voxels[axis] / self.cells[axis]
        return min(self.voxels[axis], cells if ratio == 1 else int(cells * ratio) + 2 * SPLINE_REACH + 2)

    def box(self, voxels: Box) -> Box:
        """The box of cells whose logits a box of voxels needs."""
        (a, d), (b, e), (c, f) = (self.span(i, voxels.start[i], voxels.stop[i]) for i in range(3))
        return Box((a, b, c), (d, e, f))


def positions(source: int, target: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where point `index` of `target` points lies among `source` points over one extent: the point below (from -1 to
    source - 1) and the share of the next. Whole-number arithmetic: the same on every machine."""
    below, rest = np.divmod((2 * index + 1) * source - target, 2 * target)
    return below, rest / (2 * target)


def lattice_of(shape: Triple, affine: Affine, card: Card) -> Lattice:
    """The lattice of a study of `shape` voxels at `affine` (over x,y,z, in mm RAS) under a card.

    Raises StudyError("geometry") where the sides of voxels and cells are more than 64-fold apart.
    """
    view = _view(affine, card)
    spacing = ome_scale(affine)
    if card.spacing_mm is None:
        return Lattice(shape, shape, view)
    # A 2-D network sees slices as they are: only their plane has a spacing.
    across = (None,) * (3 - len(card.spacing_mm))
    wanted = [t or s for s, t in zip(spacing, view.stored(across + card.spacing_mm), strict=True)]
    _check_ratio(spacing, wanted, card.name)
    z, y, x = (max(1, round(n * s / t)) for n, s, t in zip(shape, spacing, wanted, strict=True))
    into, back = _coarse_axis(spacing, wanted), _coarse_axis(wanted, spacing)
    order = card.resampling_order
    return Lattice(
        shape, (z, y, x), view,
        (0 if into == 0 else order, 0 if into == 1 else order, 0 if into == 2 else order),
        (back == 0, back == 1, back == 2),
    )  # fmt: skip


def _view(affine: Affine, card: Card) -> View:
    if card.orientation is None:
        return View()
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    # Per stored axis x,y,z: the axis of the card's order that it is, and whether it runs with it.
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(card.orientation))
    axes, against = [0, 0, 0], [False, False, False]
    for stored, (seen, sign) in enumerate(turn):
        axes[2 - int(seen)], against[2 - int(seen)] = 2 - stored, sign < 0
    return View((axes[0], axes[1], axes[2]), (against[0], against[1], against[2]))


def _check_ratio(spacing: Sequence[float], wanted: Sequence[float], name: str) -> None:
    if any(not 1 / FURTHEST <= s / t <= FURTHEST for s, t in zip(spacing, wanted, strict=True)):
        voxels, cells = (", ".join(f"{s:g}" for s in sides) for sides in (spacing, wanted))
        raise StudyError(
            "geometry",
            f"voxels of {voxels} mm (z,y,x) are more than {FURTHEST:g}-fold off the {cells} mm at which the model "
            f"{name} looks: check the header's spacing and its unit, or the model",
        )


def _coarse_axis(*spacings: Sequence[float]) -> int | None:
    """The axis of the largest side in the first of these whose largest is more than `ANISOTROPIC` times its smallest;
    None where there is none, or where two axes share that side: then the others are not asked."""
    for spacing in spacings:
        largest = max(spacing)
        if largest > ANISOTROPIC * min(spacing):
            coarse = [axis for axis, s in enumerate(spacing) if s > largest * (1 - 1e-4)]  # headers round
            return coarse[0] if len(coarse) == 1 else None
    return None
