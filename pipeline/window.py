"""The rows of an image that the tiles of a block need now, normalised, read once each in z order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import ome
from .grid import Box, Triple
from .normalize import Affine


class InputWindow:
    """A rolling window of normalised rows over a region of an image.

    `region` (z,y,x) may reach past the image: there, by `fill`, it is 0 after normalisation ("zero"), the image
    mirrored at its border, whose voxel is not repeated ("reflect"), or the border voxel ("edge"). Holds `depth` rows as
    float32 (channels, depth, y, x), and the raw rows of one row of chunks.
    """

    def __init__(self, image: Any, region: Box, depth: int, normalizers: Sequence[Affine], fill: str) -> None:
        self.image, self.region, self.depth, self.normalizers = image, region, depth, normalizers
        self.shape: Triple = tuple(int(n) for n in image.shape[-3:])  # type: ignore[assignment]
        mapped = [source_index(a, b, n, fill) for a, b, n in zip(region.start, region.stop, self.shape, strict=True)]
        self.rows, y, x = mapped
        self.y, self.x = _span(y), _span(x)
        self.columns = np.ix_(y[y >= 0] - self.y.start, x[x >= 0] - self.x.start)
        self.placed = (slice(*_extent(y >= 0)), slice(*_extent(x >= 0)))
        self.plain = fill == "zero" or bool(np.all(np.diff(y) == 1) and np.all(np.diff(x) == 1))
        self.first = region.start[0]  # z of the first row held
        self.held = 0
        self.data = np.zeros((len(normalizers), depth, *region.shape[1:]), np.float32)
        self.chunk_rows = int(image.chunks[-3])
        self.chunk_row, self.raw = -1, np.zeros((0,))

    def tile(self, window: Box) -> np.ndarray:
        """The voxels of `window` (float32 view, (channels, z, y, x)). Windows come in rising z order."""
        self._advance(window.start[0])
        _, y0, x0 = self.region.start
        (_, a, b), (_, c, d) = window.start, window.stop
        return self.data[:, : window.shape[0], a - y0 : c - y0, b - x0 : d - x0]

    def _advance(self, first: int) -> None:
        """Make `first` the first row held."""
        step = first - self.first
        if step == 0 and self.held:
            return
        keep = max(0, self.held - step) if step >= 0 else 0
        for i in range(keep):  # row by row: source and target overlap
            self.data[:, i] = self.data[:, i + step]
        self.first = first
        for i in range(keep, self.depth):
            self._fill_row(i)
        self.held = self.depth

    def _fill_row(self, i: int) -> None:
        at = self.first + i - self.region.start[0]
        source = int(self.rows[at]) if at < len(self.rows) else -1
        self.data[:, i] = 0
        if source < 0:
            return
        row = self._raw_row(source)
        for c, normalize in enumerate(self.normalizers):
            raw = row[c] if self.plain else row[c][self.columns]
            normalize(raw, self.data[(c, i, *self.placed)])

    def _raw_row(self, z: int) -> np.ndarray:
        """One raw row (channels, y, x) of the image; a row of chunks is decoded once."""
        chunk_row = z // self.chunk_rows
        if chunk_row != self.chunk_row:
            self.raw = np.zeros((0,))  # give the old rows back before the new ones come
            rows = slice(chunk_row * self.chunk_rows, (chunk_row + 1) * self.chunk_rows)
            raw = ome.read(self.image, (..., rows, self.y, self.x))
            self.raw = raw if raw.ndim == 4 else raw[None]
            self.chunk_row = chunk_row
        return self.raw[:, z - chunk_row * self.chunk_rows]


def source_index(start: int, stop: int, length: int, fill: str) -> np.ndarray:
    """For each position in [start, stop): the voxel of an axis of `length` that stands there, -1 for none."""
    index = np.arange(start, stop)
    if fill == "zero":
        return np.where((index >= 0) & (index < length), index, -1)
    if fill == "edge":
        return index.clip(0, length - 1)
    period = max(2 * (length - 1), 1)
    index = index % period
    return np.where(index >= length, period - index, index)


def _span(index: np.ndarray) -> slice:
    present = index[index >= 0]
    return slice(int(present.min()), int(present.max()) + 1)


def _extent(present: np.ndarray) -> tuple[int, int]:
    (at,) = np.nonzero(present)
    return int(at[0]), int(at[-1]) + 1
