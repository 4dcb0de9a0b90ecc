"""Boxes of voxels, the tiles that reach into them, and the label shards. Pure integers; axes z,y,x as stored."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

Triple = tuple[int, int, int]
Starts = tuple[int, ...]  # origins along one axis
Spans = tuple[tuple[int, int], ...]  # (begin, end) along one axis


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


@dataclass(frozen=True)
class Grid:
    """All tile origins of a study, in cells of its lattice (voxels, where nothing is resampled). `tile` is the window a
    tile answers for; the network sees `margin` more a side. A tile may begin below 0 or end past the shape: when the
    study is smaller than the tile, or when the network needs context past the border.

    cores: per axis what each tile's answer is taken for, where that is less than all of it (`exact`); else None, and
    tiles are blended where they overlap.
    """

    shape: Triple
    tile: Triple
    margin: Triple
    starts: tuple[Starts, Starts, Starts]
    cores: tuple[Spans, Spans, Spans] | None = None

    @property
    def tiles(self) -> int:
        return math.prod(len(axis) for axis in self.starts)

    @property
    def window(self) -> Triple:
        """What the network is given."""
        z, y, x = (tile + 2 * margin for tile, margin in zip(self.tile, self.margin, strict=True))
        return z, y, x

    def reach(self, axis: int) -> int:
        """How many cells of an axis all tiles together cover: more than the study has where they pass its ends."""
        return self.starts[axis][-1] + self.tile[axis] - self.starts[axis][0]

    def spans(self, axis: int) -> Spans:
        """What the tiles along an axis answer for, as (begin, end), in rising order."""
        if self.cores is not None:
            return self.cores[axis]
        return tuple((start, start + self.tile[axis]) for start in self.starts[axis])

    def core(self, tile: Box) -> Box:
        """What a tile's answer is taken for."""
        if self.cores is None:
            return tile
        found = [
            spans[bisect_left(starts, start)]
            for spans, starts, start in zip(self.cores, self.starts, tile.start, strict=True)
        ]
        (a, d), (b, e), (c, f) = found
        return Box((a, b, c), (d, e, f))

    def touching(self, box: Box) -> tuple[Starts, Starts, Starts]:
        """Per axis, the origins of the tiles that answer for voxels of `box`."""
        z, y, x = (self._along(axis, box.start[axis], box.stop[axis]) for axis in range(3))
        return z, y, x

    def _along(self, axis: int, begin: int, end: int) -> Starts:
        """The origins of the tiles along an axis that begin before `end` and end after `begin`: both rise with them."""
        starts = self.starts[axis]
        if self.cores is None:
            return starts[bisect_right(starts, begin - self.tile[axis]) : bisect_left(starts, end)]
        spans = self.cores[axis]
        first, last = bisect_right(spans, begin, key=lambda span: span[1]), bisect_left(spans, end, key=lambda s: s[0])
        return starts[first:last]

    def count(self, box: Box) -> int:
        return math.prod(len(axis) for axis in self.touching(box))

    def tiles_over(self, box: Box) -> Iterator[Box]:
        """The tiles that answer for voxels of `box`, in raster order: the order in which every voxel adds its shares
        up."""
        tz, ty, tx = self.tile
        for z, y, x in itertools.product(*self.touching(box)):
            yield Box((z, y, x), (z + tz, y + ty, x + tx))


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

    def runs(self, axis: int) -> list[tuple[int, int]]:
        """The voxels (begin, end) of the shards along an axis."""
        size, length = self.shard[axis], self.shape[axis]
        return [(i * size, min((i + 1) * size, length)) for i in range(self.counts[axis])]

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
