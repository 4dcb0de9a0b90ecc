"""Where tiles lie and which of them a block needs. Pure integers, computed once from a study's whole shape.

All boxes are in voxels of the study, axes z,y,x. A tile may begin below 0 or end past the shape: when the study is
smaller than the tile, or when the network needs context past the border.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from .errors import StudyError

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


STITCHES = ("gaussian", "constant", "nnunet", "nnunet-fp16", "exact")


@dataclass(frozen=True)
class Tiling:
    """How a method lays its tiles over any study.

    window: the voxels that the network is given. overlap: share of a tile that the next one repeats, where tiles are
    blended. margin: by how much the network's answer is smaller per side. For `exact` also the step of the network's
    down-sampling grid (`divisor`) and how far it looks (`halo`, a multiple of that), per axis.
    """

    window: Triple
    overlap: float = 0.5
    margin: Triple = (0, 0, 0)
    stitch: str = "gaussian"
    divisor: Triple = (1, 1, 1)
    halo: Triple = (0, 0, 0)

    @property
    def fill(self) -> str:
        """What a tile sees outside the image: zeros after normalisation, its mirror image, or its border voxels."""
        if any(self.margin):
            return "reflect"
        return "edge" if self.stitch == "exact" else "zero"


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


def nnunet_starts(length: int, tile: int, overlap: float) -> tuple[int, ...]:
    """Origins of the tiles along one axis, as nnU-Net's predictor places them (`tile_step_size` is 1 - overlap).

    As many tiles as strides of at most `tile * (1 - overlap)` voxels need, spread evenly from border to border and
    rounded to whole voxels, halves to the even one. An axis shorter than the tile is centred as above.
    """
    if tile >= length:
        return (-((tile - length) // 2),)
    share = round(1 - overlap, 9)  # of 0.8 it is 0.19999999999999996, and then a tile more
    count = math.ceil((length - tile) / max(tile * share, 1.0)) + 1
    step = (length - tile) / (count - 1)
    return tuple(round(step * i) for i in range(count))


def exact_axis(length: int, window: int, margin: int, divisor: int, halo: int) -> tuple[int, Starts, Spans]:
    """Tile length, origins and cores of the tiles along one axis, so that they answer what one pass over all would.

    The axis grows at its high end to a multiple of `divisor`, as the network itself would grow it. All tiles lie inside
    and begin on that grid, so their down-sampling falls as that of the whole. A tile answers for its core, `halo` away
    from its ends unless the axis ends there, too. A network that gives up a `margin` sees all that it needs: its tiles
    lie side by side, the last one reaching past the border. Raises StudyError for a window with no core.
    """
    if margin:
        tile = window - 2 * margin
        step = tile // divisor * divisor
        if step < 1:
            raise _no_core(window, 2 * margin + divisor)
        starts = tuple(range(0, length, step))
        return tile, starts, tuple(itertools.pairwise((*starts, length)))
    whole = -(-length // divisor) * divisor
    tile = min(window // divisor * divisor, whole)
    step = tile - 2 * halo
    if tile < whole and step < 1:
        raise _no_core(window, 2 * halo + divisor)
    starts = (*range(0, whole - tile, step), whole - tile) if tile < whole else (0,)
    return tile, starts, tuple(itertools.pairwise((0, *(start + halo for start in starts[1:]), length)))


def _no_core(window: int, least: int) -> StudyError:
    return StudyError(
        "model",
        f"--stitch exact needs tiles of {least} voxels or more along an axis that is longer than one, got {window}: "
        "on so many around it depends what this network answers for a voxel; well above that less is computed twice",
    )


@dataclass(frozen=True)
class Grid:
    """All tile origins of a study. `tile` is the window a tile answers for; the network sees `margin` more a side.

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
        """How many voxels of an axis all tiles together cover: more than the study has where they pass its ends."""
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
        z, y, x = (
            tuple(
                start
                for start, (begin, end) in zip(self.starts[axis], self.spans(axis), strict=True)
                if begin < box.stop[axis] and end > box.start[axis]
            )
            for axis in range(3)
        )
        return z, y, x

    def count(self, box: Box) -> int:
        return math.prod(len(axis) for axis in self.touching(box))

    def tiles_over(self, box: Box) -> Iterator[Box]:
        """The tiles that answer for voxels of `box`, in raster order: the order in which every voxel adds its shares
        up."""
        tz, ty, tx = self.tile
        for z, y, x in itertools.product(*self.touching(box)):
            yield Box((z, y, x), (z + tz, y + ty, x + tx))


def make_grid(shape: Triple, tiling: Tiling) -> Grid:
    """The grid of a study of `shape`."""
    if tiling.stitch == "exact":
        axes = zip(shape, tiling.window, tiling.margin, tiling.divisor, tiling.halo, strict=True)
        (tz, z, cz), (ty, y, cy), (tx, x, cx) = (exact_axis(*axis) for axis in axes)
        return Grid(shape, (tz, ty, tx), tiling.margin, (z, y, x), (cz, cy, cx))
    tile = tuple(w - 2 * m for w, m in zip(tiling.window, tiling.margin, strict=True))
    place = nnunet_starts if tiling.stitch.startswith("nnunet") else tile_starts
    z, y, x = (place(n, t, tiling.overlap if t > 1 else 0.0) for n, t in zip(shape, tile, strict=True))
    return Grid(shape, tile, tiling.margin, (z, y, x))  # type: ignore[arg-type]


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
