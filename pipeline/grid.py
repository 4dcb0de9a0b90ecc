"""Where tiles lie and which of them a block needs. Pure integers, computed once from a study's whole shape.

All boxes are in voxels of the study, axes z,y,x. A tile may begin below 0 or end past the shape: when the study is
smaller than the tile, or when the network needs context past the border.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Box:
    """A half-open box of voxels, axes z,y,x."""

    start: Triple
    stop: Triple

    @property
    def shape(self) -> Triple:
        (a, b, c), (d, e, f) = self.start, self.stop
        return d - a, e - b, f - c

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        (a, b, c), (d, e, f) = self.start, self.stop
        return slice(a, d), slice(b, e), slice(c, f)

    def clip(self, other: Box) -> Box:
        """The part of this box inside `other` (empty boxes have a stop at their start)."""
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        stop = tuple(max(s, min(a, b)) for s, a, b in zip(start, self.stop, other.stop, strict=True))
        return Box(start, stop)  # type: ignore[arg-type]

    def meets(self, other: Box) -> bool:
        return all(a < d and c < b for a, b, c, d in zip(self.start, self.stop, other.start, other.stop, strict=True))

    def shift(self, by: Triple) -> Box:
        (a, b, c), (d, e, f), (z, y, x) = self.start, self.stop, by
        return Box((a + z, b + y, c + x), (d + z, e + y, f + x))

    def grow(self, by: Triple) -> Box:
        (a, b, c), (d, e, f), (z, y, x) = self.start, self.stop, by
        return Box((a - z, b - y, c - x), (d + z, e + y, f + x))


def tile_starts(length: int, tile: int, overlap: float) -> tuple[int, ...]:
    """Origins of the tiles along one axis, as MONAI's `sliding_window_inference` places them.

    A regular stride of `int(tile * (1 - overlap))` voxels (at least 1), the last tile moved back to end at the
    border. An axis shorter than the tile is centred in one tile: its origin is `-((tile - length) // 2)`.
    """
    if tile >= length:
        return (-((tile - length) // 2),)
    step = max(int(tile * (1 - overlap)), 1)
    count = math.ceil((length - tile) / step) + 1
    return tuple(min(i * step, length - tile) for i in range(count))


@dataclass(frozen=True)
class Grid:
    """All tile origins of a study. `tile` is the window a tile answers for; the network sees `margin` more a side."""

    shape: Triple
    tile: Triple
    margin: Triple
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    @property
    def tiles(self) -> int:
        return math.prod(len(axis) for axis in self.starts)

    def touching(self, box: Box) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Per axis, the origins of the tiles that reach into `box`."""
        z, y, x = (
            tuple(s for s in axis if s < stop and s + tile > start)
            for axis, tile, start, stop in zip(self.starts, self.tile, box.start, box.stop, strict=True)
        )
        return z, y, x

    def count(self, box: Box) -> int:
        return math.prod(len(axis) for axis in self.touching(box))

    def tiles_over(self, box: Box) -> Iterator[Box]:
        """The tiles that reach into `box`, in raster order: the order in which every voxel adds its shares up."""
        tz, ty, tx = self.tile
        for z, y, x in itertools.product(*self.touching(box)):
            yield Box((z, y, x), (z + tz, y + ty, x + tx))


def make_grid(shape: Triple, window: Triple, overlap: float, margin: Triple = (0, 0, 0)) -> Grid:
    """The grid of a study of `shape` for a network that is given `window` voxels and answers `margin` less a side."""
    tile = tuple(w - 2 * m for w, m in zip(window, margin, strict=True))
    z, y, x = (tile_starts(n, t, overlap if t > 1 else 0.0) for n, t in zip(shape, tile, strict=True))
    return Grid(shape, tile, margin, (z, y, x))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Shards:
    """The label shards of a study: the unit that is written whole and marked. Fixed by the image's shape alone."""

    shape: Triple
    shard: Triple

    @cached_property
    def counts(self) -> Triple:
        z, y, x = (-(-n // s) for n, s in zip(self.shape, self.shard, strict=True))
        return z, y, x

    @property
    def total(self) -> int:
        return math.prod(self.counts)

    def box(self, index: Triple) -> Box:
        """The voxels of one shard; those at the far border are cut by the shape."""
        return self.box_of(Box(index, (index[0] + 1, index[1] + 1, index[2] + 1)))

    def box_of(self, range_: Box) -> Box:
        """The voxels of a box of shard indices."""
        start = tuple(i * s for i, s in zip(range_.start, self.shard, strict=True))
        stop = tuple(min(i * s, n) for i, s, n in zip(range_.stop, self.shard, self.shape, strict=True))
        return Box(start, stop)  # type: ignore[arg-type]

    def indices(self, range_: Box | None = None) -> Iterator[Triple]:
        """Shard indices in raster order, of all or of a box of them."""
        range_ = range_ or Box((0, 0, 0), self.counts)
        yield from itertools.product(*(range(a, b) for a, b in zip(range_.start, range_.stop, strict=True)))


def split(count: int, parts: int) -> list[tuple[int, int]]:
    """`count` things in `parts` runs as equal as they get."""
    edges = [round(i * count / parts) for i in range(parts + 1)]
    return list(itertools.pairwise(edges))


def split_shards(shards: Shards, parts: Triple) -> list[Box]:
    """Boxes of shard indices: each axis cut in `parts` runs, in raster order."""
    runs = [split(n, p) for n, p in zip(shards.counts, parts, strict=True)]
    return [Box((z[0], y[0], x[0]), (z[1], y[1], x[1])) for z, y, x in itertools.product(*runs)]
