"""How far the surfaces of a mask and of its reference lie apart, in mm, from surface points gathered slab by slab.

The surface of a structure is its voxels that have a face neighbour outside it; what lies outside the image is outside.
An axis of one voxel has no neighbours: a slice alone has a contour. Distances go from each surface voxel of one mask to
the nearest surface voxel of the other, in patient millimetres (the whole affine, so sheared axes are right too). With
D the distances from the mask to the reference and E those from the reference to the mask:

    hd95_mm        max(95th percentile of D, 95th percentile of E), percentiles interpolated linearly
    asd_mm         mean of D and E together: average symmetric surface distance
    surface_dice   (number of D and of E that are at most the tolerance) / (number of D and E)

Sources: Taha and Hanbury 2015 (quantile of the Hausdorff distance, average distance); Nikolov et al. 2021 (surface Dice
at a tolerance). These are MONAI's `compute_hausdorff_distance(percentile=95)`, `compute_average_surface_distance(
symmetric=True)` and `compute_surface_dice(use_subvoxels=False)`. Nikolov's own code weighs surface elements between
voxels by their area instead (`use_subvoxels=True`), and some pool D and E before they take the percentile: both differ.
Empty in one mask: no distance, surface Dice 0. Empty in both: no score.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..grid import Triple
from .masks import Mask, scored_pairs

SURFACE = ("hd95_mm", "asd_mm", "surface_dice")
TOLERANCE_MM = 1.0
HELD_BYTES = 10  # per surface point that waits: its index, and the lists
WORK_BYTES = 110  # per surface point of the structure that is being measured: coordinates, tree, distances
SLACK = 1e-5  # affines are stored as float32: a distance that is the tolerance but for rounding is within it

Scores = dict[str, float | None]


@dataclass(frozen=True)
class Points:
    """Surface voxels of one structure as flat indices into the image, ascending: of the mask and of the reference."""

    ours: np.ndarray
    theirs: np.ndarray


def surface_scores(
    mask: Mask,
    reference: Mask,
    labels: Collection[int],
    *,
    binary_255: bool,
    room: int,
    tolerance_mm: float = TOLERANCE_MM,
) -> tuple[dict[int, Scores], dict[int, int]]:
    """Surface scores per label, and for labels that do not fit into `room` bytes the bytes that they take at least.

    Both masks are read once; where the surface points of all structures together do not fit, the largest ones wait for
    another reading. Memory: `room`, and about 10 bytes a voxel of one slab of each mask.
    """
    scores: dict[int, Scores] = {}
    too_large: dict[int, int] = {}
    waiting = set(labels)
    while waiting:
        gathered, waiting, given_up = _gather(scored_pairs(mask, reference, binary_255=binary_255), waiting, room)
        too_large |= given_up
        for label in sorted(gathered):
            ours, theirs = (_joined(parts) for parts in gathered.pop(label))
            scores[label] = score_points(Points(ours, theirs), mask.shape, mask.affine, tolerance_mm)
    return scores, too_large


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


Parts = tuple[list[np.ndarray], list[np.ndarray]]


def _gather(
    slabs: Iterator[np.ndarray], labels: Collection[int], room: int
) -> tuple[dict[int, Parts], set[int], dict[int, int]]:
    """Surface points of as many labels as fit; those that must wait; those that do not fit alone, with bytes.

    slabs: (2, rows, y, x), mask and reference. One reading settles at least one label.
    """
    gathered: dict[int, Parts] = {label: ([], []) for label in labels}
    points = dict.fromkeys(labels, 0)
    waiting: set[int] = set()
    given_up: dict[int, int] = {}
    start = 0
    for window in _with_neighbours(slabs):
        for side in (0, 1):
            for label, at in _surface(window[side]):
                if label in gathered:
                    gathered[label][side].append(at + start)
                    points[label] += len(at)
        start += window[0, 1:-1].size
        while gathered and _bytes(points) > room:
            largest = max(points, key=lambda label: points[label])
            alone = _bytes({largest: points[largest]})
            del gathered[largest], points[largest]
            if alone > room:
                given_up[largest] = alone
            else:
                waiting.add(largest)
    return gathered, waiting, given_up


def _bytes(points: Mapping[int, int]) -> int:
    return HELD_BYTES * sum(points.values()) + WORK_BYTES * max(points.values(), default=0)


def _with_neighbours(slabs: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Each slab (2, rows, y, x) between the row before and the row after it; an only row between itself."""
    slab = next(slabs)
    before, outside = np.zeros_like(slab[:, :1]), np.zeros_like(slab[:, :1])
    seen = 0
    for following in slabs:
        yield np.concatenate([before, slab, following[:, :1]], axis=1)
        before, slab, seen = slab[:, -1:].copy(), following, seen + slab.shape[1]
    is_slice = seen == 0 and slab.shape[1] == 1
    yield np.concatenate([slab] * 3 if is_slice else [before, slab, outside], axis=1)


def _surface(window: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Per label above 0, where its surface is in a slab: ascending flat indices. window: one row more on both ends."""
    slab = window[1:-1]
    edge = (slab != window[:-2]) | (slab != window[2:])
    for axis in (1, 2):
        if slab.shape[axis] > 1:
            here, there = np.moveaxis(edge, axis, 0), np.moveaxis(slab, axis, 0)
            differs = there[1:] != there[:-1]
            here[1:] |= differs
            here[:-1] |= differs
            here[[0, -1]] = True
    at = np.flatnonzero(edge & (slab > 0))
    labels = slab.ravel()[at]
    order = np.argsort(labels, kind="stable")
    present, first, many = np.unique(labels[order], return_index=True, return_counts=True)
    for label, begin, count in zip(present, first, many, strict=True):
        yield int(label), at[order[begin : begin + count]]


def score_points(points: Points, shape: Triple, affine: np.ndarray, tolerance_mm: float) -> Scores:
    """The scores of one structure from its surface points in an image of `shape` (z,y,x)."""
    if not len(points.ours) and not len(points.theirs):
        return dict.fromkeys(SURFACE)
    if not len(points.ours) or not len(points.theirs):
        return {**dict.fromkeys(SURFACE), "surface_dice": 0.0}
    ways = [
        distances_mm(points.ours, points.theirs, shape, affine),
        distances_mm(points.theirs, points.ours, shape, affine),
    ]
    total = sum(len(way) for way in ways)
    within = sum(int(np.count_nonzero(way <= tolerance_mm * (1 + SLACK))) for way in ways)
    return {
        "hd95_mm": max(float(np.percentile(way, 95)) for way in ways),
        "asd_mm": math.fsum(float(way.sum()) for way in ways) / total,
        "surface_dice": within / total,
    }


def distances_mm(points: np.ndarray, others: np.ndarray, shape: Triple, affine: np.ndarray) -> np.ndarray:
    """From each of `points` to the nearest of `others`, in mm; both ascending flat indices into `shape` (z,y,x)."""
    from scipy.spatial import KDTree

    nearest = others[np.minimum(np.searchsorted(others, points), len(others) - 1)]
    apart = nearest != points  # good masks share most of their surface with the reference
    found = np.zeros(len(points))
    if apart.any():
        tree = KDTree(_positions_mm(others, shape, affine), leafsize=32)
        found[apart] = tree.query(_positions_mm(points[apart], shape, affine))[0]
    return found


def _positions_mm(points: np.ndarray, shape: Triple, affine: np.ndarray) -> np.ndarray:
    """(n, 3) positions but for where the image begins, which no distance depends on."""
    zyx = np.stack(np.unravel_index(points, shape), 1).astype(np.float64)
    positions: np.ndarray = np.einsum("ij,kj->ik", zyx, affine[:3, 2::-1])
    return positions
