"""The rows that the tiles of a block need now, read once each in z order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from .grid import Box, Triple


class Rows(Protocol):
    """Normalised rows of a part of an image or of its lattice: `row(z)` is float32 (channels, y, x)."""

    def row(self, z: int) -> np.ndarray: ...


class InputWindow:
    """A rolling window of normalised rows over a region of a lattice.

    `region` (z,y,x) may reach past the lattice's `shape`: there, by `fill`, it is 0 after normalisation ("zero"), the
    image mirrored at its border, whose cell is not repeated ("reflect"), or the border cell ("edge"). `open_rows` gives
    the rows of a slice of y and one of x. Holds `depth` rows as float32 (channels, depth, y, x).
    """

    def __init__(
        self,
        shape: Triple,
        channels: int,
        region: Box,
        depth: int,
        fill: str,
        open_rows: Callable[[slice, slice], Rows],
    ) -> None:
        self.region, self.depth = region, depth
        mapped = [source_index(a, b, n, fill) for a, b, n in zip(region.start, region.stop, shape, strict=True)]
        self.z, y, x = mapped
        y_span, x_span = _span(y), _span(x)
        self.rows = open_rows(y_span, x_span)
        self.columns = np.ix_(y[y >= 0] - y_span.start, x[x >= 0] - x_span.start)
        self.placed = (slice(*_extent(y >= 0)), slice(*_extent(x >= 0)))
        self.plain = fill == "zero" or bool(np.all(np.diff(y) == 1) and np.all(np.diff(x) == 1))
        self.first = region.start[0]  # z of the first row held
        self.held = 0
        self.data = np.zeros((channels, depth, *region.shape[1:]), np.float32)

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
        source = int(self.z[at]) if at < len(self.z) else -1
        self.data[:, i] = 0
        if source < 0:
            return
        for c, row in enumerate(self.rows.row(source)):
            self.data[(c, i, *self.placed)] = row if self.plain else row[self.columns]


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
