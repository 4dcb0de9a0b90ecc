"""Voxels to the lattice's cells and logits back to voxels, row by row: no array of a whole study ever exists.

Into cells: every axis by itself is a sparse matrix of the whole axis, fixed by the study. A cell is the sum of the
same products in the same order whatever part of it a block asks for, so that its bits never change. Cubic: the cardinal
B-spline (Unser 1999, "Splines: a perfect fit for signal and image processing"), whose weights fall by 2 - sqrt(3) a
voxel without end; cut off after `SPLINE_REACH` voxels it is off by less than 1e-6. Past its border an image goes on as
its last voxel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import ome
from .grid import Box
from .lattice import SPLINE_REACH, Lattice, positions
from .normalize import Affine
from .uncertainty import CHUNK

if TYPE_CHECKING:
    import torch


class StoredRows:
    """Rows of an image as stored, within `y` and `x`, normalised."""

    def __init__(self, image: Any, normalizers: Sequence[Affine], y: slice, x: slice) -> None:
        self.image, self.normalizers, self.y, self.x = image, normalizers, y, x
        self.chunk_rows = int(image.chunks[-3])
        self.chunk_row, self.raw = -1, np.zeros((0,))

    def row(self, z: int) -> np.ndarray:
        """Row `z`: float32 (channels, y, x). A row of chunks is decoded once while rows come in order."""
        chunk_row = z // self.chunk_rows
        if chunk_row != self.chunk_row:
            self.raw = np.zeros((0,))  # give the old rows back before the new ones come
            rows = slice(chunk_row * self.chunk_rows, (chunk_row + 1) * self.chunk_rows)
            raw = ome.read(self.image, (..., rows, self.y, self.x))
            self.raw = raw if raw.ndim == 4 else raw[None]
            self.chunk_row = chunk_row
        raw = self.raw[:, z - chunk_row * self.chunk_rows]
        out = np.empty(raw.shape, np.float32)
        for normalize, voxels, values in zip(self.normalizers, raw, out, strict=True):
            normalize(voxels, values)
        return out


class ResampledRows:
    """Rows of the lattice, within `y` and `x`: what `StoredRows` is where nothing is resampled."""

    def __init__(self, image: Any, normalizers: Sequence[Affine], lattice: Lattice, y: slice, x: slice) -> None:
        self.z, whole_y, whole_x = (
            axis_matrix(n, m, order) for n, m, order in zip(lattice.voxels, lattice.cells, lattice.orders, strict=True)
        )
        (self.y, rows), (self.x, columns) = _part(whole_y, y), _part(whole_x, x)
        self.stored = StoredRows(image, normalizers, rows, columns)
        self.planes: dict[int, np.ndarray] = {}  # rows of the image, resampled in their plane

    def row(self, z: int) -> np.ndarray:
        """Row `z` of the lattice: float32 (channels, y, x)."""
        taps = slice(self.z.indptr[z], self.z.indptr[z + 1])
        voxels, weights = self.z.indices[taps].tolist(), self.z.data[taps]
        wanted = set(voxels)
        self.planes = {k: plane for k, plane in self.planes.items() if k in wanted}
        total = np.zeros(())
        for k, weight in zip(voxels, weights, strict=True):
            if k not in self.planes:
                self.planes[k] = self._plane(k)
            total = total + self.planes[k] * weight
        return total.astype(np.float32)

    def _plane(self, k: int) -> np.ndarray:
        planes = [self.x @ np.ascontiguousarray((self.y @ plane).T) for plane in self.stored.row(k)]
        return np.stack(planes).transpose(0, 2, 1).astype(np.float32, order="C")


def axis_matrix(source: int, target: int, order: int) -> Any:
    """scipy CSR array (target, source), float64: an axis of `source` voxels to `target` cells over the same extent.

    order 0: the nearest voxel, the upper one of two; 1: linear; 3: the cubic B-spline through all voxels.
    """
    from scipy.sparse import coo_array

    index = np.arange(target)
    below, share = positions(source, target, index)
    if source == target:
        offsets, weights = np.zeros(1, int), np.ones((target, 1))
    elif order == 0:
        below = below + (share >= 0.5)
        offsets, weights = np.zeros(1, int), np.ones((target, 1))
    elif order == 1:
        offsets, weights = np.arange(2), np.stack([1 - share, share], 1)
    else:
        offsets = np.arange(1 - SPLINE_REACH, SPLINE_REACH + 1)
        weights = _cardinal(offsets - share[:, None])
    at = (below[:, None] + offsets).clip(0, source - 1)
    rows = np.broadcast_to(index[:, None], at.shape)
    matrix = coo_array((weights.ravel(), (rows.ravel(), at.ravel())), (target, source)).tocsr()
    matrix.sum_duplicates()
    return matrix


def _cardinal(x: np.ndarray) -> np.ndarray:
    """The cubic spline that is 1 at 0 and 0 at every other whole number; rows are scaled to a sum of 1."""
    pole = np.sqrt(3) - 2
    total: np.ndarray = np.zeros(x.shape)
    for shift in range(-3, 4):  # the coefficients that a B-spline of 4 voxels' width can see from x
        k = np.floor(x) + shift
        total += np.sqrt(3) * pole ** np.abs(k) * _b_spline(x - k)
    total /= total.sum(1, keepdims=True)
    return total


def _b_spline(x: np.ndarray) -> np.ndarray:
    """The cubic B-spline: 2/3 at 0, 0 from 2 on."""
    size = np.abs(x)
    value: np.ndarray = np.where(size < 1, 2 / 3 - size**2 + size**3 / 2, (2 - size).clip(0) ** 3 / 6)
    return value


def _part(matrix: Any, part: slice) -> tuple[Any, slice]:
    """The rows `part` of an axis's matrix, over the voxels that they need, and these voxels."""
    rows = matrix[part]
    first, last = int(rows.indices.min()), int(rows.indices.max()) + 1
    return rows[:, first:last], slice(first, last)


class VoxelRows:
    """Rows of mean logits at cells in, rows at voxels out. Linear: products and sums of two, never fused, so that a
    voxel's bits do not depend on how blocks are cut."""

    def __init__(self, lattice: Lattice, voxels: Box, device: str) -> None:
        import torch

        cells = lattice.box(voxels)
        z, y, x = (lattice.neighbours(i, voxels.start[i], voxels.stop[i]) for i in range(3))
        self.z = list(zip(range(voxels.start[0], voxels.stop[0]), *(part.tolist() for part in z), strict=True))
        self.y, self.x = (
            tuple(
                torch.from_numpy(np.asarray(part, dtype)).to(device)
                for part, dtype in ((below - first, np.int64), (above - first, np.int64), (share, np.float32))
            )
            for (below, above, share), first in ((y, cells.start[1]), (x, cells.start[2]))
        )
        self.rows: dict[int, torch.Tensor] = {}
        self.next = 0

    def add(self, cell_row: int, means: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Take row `cell_row` of the lattice (fields, y, x); yields (z, fields (fields, y, x)) of the voxels' rows
        that it completes. What it took is kept until the next row but one."""
        self.rows = {k: row for k, row in self.rows.items() if k == cell_row - 1} | {cell_row: means}
        while self.next < len(self.z) and self.z[self.next][2] <= cell_row:
            z, below, above, share = self.z[self.next]
            self.next += 1
            yield z, self._in_plane(_between(self.rows[below], self.rows[above], share))

    def _in_plane(self, row: torch.Tensor) -> torch.Tensor:
        fields, _, cells = row.shape
        (below, above, share), (left, right, part) = self.y, self.x
        out = row.new_empty(fields, len(below), len(left))
        lines = max(1, CHUNK // (fields * max(cells, len(left))))
        for top in range(0, len(below), lines):  # so that what lies between two steps stays small
            y = slice(top, top + lines)
            strip = _between(row[:, below[y]], row[:, above[y]], share[y, None])
            out[:, y] = _between(strip[:, :, left], strip[:, :, right], part)
        return out


def _between(low: torch.Tensor, high: torch.Tensor, share: torch.Tensor | float) -> torch.Tensor:
    if isinstance(share, float) and share == 0:
        return low
    mixed: torch.Tensor = low * (1 - share)
    mixed += high * share  # in place: one row less at a time, and the same two roundings
    return mixed
