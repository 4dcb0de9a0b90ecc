"""Grid, blocks and projected memory of one study: everything that is decided before a block runs.

Memory of a worker (guarantee 2):

    projected = 1.1 x (baseline + arrays)

baseline: the process after the model was loaded and one batch of tiles had run. arrays, for a block of H x W voxels in
y,x over P x Q cells of the lattice, whose tiles reach over p x q cells (made of h x w voxels), tiles of D rows, network
windows of d rows, C channels and K classes (P = H, p = h, ... where nothing is resampled):

    input window   4 C d p q           float32, rolling
    raw rows       s C r h w           one row of chunks as stored (s bytes a voxel, r rows), and its decoding
    sums           4 (K + U) D P Q     float32, rolling; on the device
    into cells     4 C (26 p q + ...)  where resampled: the rows that one row of cells is made of, and one on its way
    back to voxels 4 (K + U + 1) (4 P Q + 2 H W) ...  four rows of means and two of voxels; on the device
    half sums      6 (K + 1) P Q       one row of sums in half precision, divided and in full
    uncertainty    U (32 H W + ...)    U measures of one row; a few lines of logits, 8 K W + 1 MiB
    labels         l S H W             one row of shards (S rows, l bytes a voxel)
    one shard      128 S H' W'         writing and measuring one shard, and what threads and heaps keep of it
    weights        14 T                of a tile of T voxels, while they are made
    fitting        96 v                of a model that fits itself to a histogram of v values
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import product
from typing import Any

from .engine import Baseline
from .errors import StudyError
from .grid import Box, Grid, Shards, Triple, split, split_shards
from .lattice import SPLINE_REACH, Lattice
from .tiling import Tiling, make_grid
from .uncertainty import CHUNK

HEADROOM = 1.1
TAPS = {0: 1, 1: 2, 3: 2 * SPLINE_REACH}  # rows of voxels that a row of cells is made of, by the spline's order
SECONDS_PER_BLOCK = 0.2  # opening arrays, writing shards and markers; measured, small beside the network


@dataclass(frozen=True)
class Plan:
    """How one study will be segmented. `blocks` are boxes of shard indices in raster order."""

    lattice: Lattice
    grid: Grid
    shards: Shards
    blocks: tuple[Box, ...]
    tile_runs: int
    host_bytes: int
    device_bytes: int
    seconds: float
    smallest: bool  # no other blocks take less memory

    @property
    def waste(self) -> float:
        """Tiles computed more than once at block borders, as a share of all tiles."""
        return self.tile_runs / self.grid.tiles - 1

    def describe(self, study: str) -> dict[str, Any]:
        """The study's entry in `plan --json`."""
        return {
            "study": study,
            "shape": list(self.shards.shape),
            "lattice": list(self.grid.shape),
            "tiles": self.grid.tiles,
            "tile_runs": self.tile_runs,
            "blocks": len(self.blocks),
            "waste": self.waste,
            "host_bytes": self.host_bytes,
            "device_bytes": self.device_bytes,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Needs:
    """What the memory formula needs to know beside the block."""

    channels: int
    classes: int
    image_itemsize: int
    image_chunk: Triple
    label_itemsize: int
    on_device: bool
    fitted_values: int = 0
    uncertainty_fields: int = 0
    half: bool = False


@dataclass(frozen=True)
class Extent:
    """The size of a block along y and x, or along z: in voxels, and in the cells that their labels are made of."""

    voxels: int
    cells: int


def arrays_bytes(
    z: Extent, y: Extent, x: Extent, lattice: Lattice, grid: Grid, shards: Shards, needs: Needs
) -> tuple[int, int]:
    """(host, device) bytes of the arrays of a block of this extent."""
    pixels, cells = y.voxels * x.voxels, y.cells * x.cells
    depth = grid.tile[0] + 2 * grid.margin[0]
    # Tiles that touch the block reach at most a tile less one cell past each side, and the margin more.
    p, q = (
        min(n + 2 * (grid.tile[axis] - 1), grid.reach(axis)) + 2 * grid.margin[axis]
        for n, axis in ((y.cells, 1), (x.cells, 2))
    )
    h, w = lattice.reach(1, p), lattice.reach(2, q)
    chunk = needs.image_chunk
    chunk_bytes = math.prod(chunk) * needs.image_itemsize
    raw = needs.channels * chunk[0] * h * w * needs.image_itemsize
    shard = math.prod(shards.shard)
    host = (
        4 * needs.channels * depth * p * q
        + raw
        + 20 * chunk_bytes  # zarr decodes up to ten chunks at once
        + (24 + 4 * needs.channels) * h * w  # one row on its way through float64
        + needs.label_itemsize * min(shards.shard[0], z.voxels) * pixels
        + 128 * shard
        + 16 * pixels
        + 14 * math.prod(grid.tile)
        + 96 * needs.fitted_values
    )
    fields = needs.uncertainty_fields
    host += fields * (32 * pixels + 8 * needs.classes * x.voxels + 8 * CHUNK)
    sums = 4 * (needs.classes + fields) * min(grid.tile[0], z.cells) * cells
    if needs.half:
        sums += 6 * (needs.classes + 1) * cells
    if lattice.resampled:
        host += needs.channels * (4 * TAPS[lattice.orders[0]] * p * q + 24 * p * q + 16 * p * w)
        rows = needs.classes + fields + 1
        sums += 4 * (min(grid.tile[0], z.cells) + 4 * rows) * cells + 8 * rows * (pixels + x.voxels) + 16 * CHUNK
    return (host, sums) if needs.on_device else (host + sums, 0)


def make_plan(
    lattice: Lattice,
    shard: Triple,
    tiling: Tiling,
    *,
    needs: Needs,
    baseline: Baseline,
    budget: int,
    workers: int,
    smallest: bool = False,
) -> Plan:
    """The plan of one study for `workers` workers that may share it.

    Chooses how many parts each axis of the shard grid is cut into: the least time to the last block among the cuts
    that fit `budget` bytes per worker, then the least waste, then the fewest blocks. One worker gets the whole study
    where it fits. With `smallest` only the cuts that take the least memory count: what was projected did not do. Raises
    StudyError("memory") when not even single shards fit.
    """
    grid, shards = make_grid(lattice, tiling), Shards(lattice.voxels, shard)
    fitting = []
    least: tuple[int, int] | None = None
    for z, y, x in product(*(_cuts(lattice, grid, shards, axis, workers) for axis in range(3))):
        arrays = arrays_bytes(z.extent, y.extent, x.extent, lattice, grid, shards, needs)
        host = math.ceil(HEADROOM * (baseline.host_bytes + arrays[0]))
        device = math.ceil(HEADROOM * (baseline.device_bytes + arrays[1]))
        least = min(least or (host, device), (host, device))
        if host <= budget:
            parts = (z.parts, y.parts, x.parts)
            count, total = math.prod(parts), z.tiles * y.tiles * x.tiles
            longest = z.fullest * y.fullest * x.fullest
            makespan = max(longest * math.ceil(count / workers), total / workers)
            fitting.append((makespan, total, count, parts, host, device))
    assert least is not None
    if not fitting:
        raise StudyError(
            "memory",
            f"needs {_gib(least[0])} per worker in its smallest blocks (process and model "
            f"{_gib(baseline.host_bytes)}, the rest arrays; tile {list(tiling.window)}, {needs.classes} classes), but "
            f"--memory allows {_gib(budget)}: raise --memory, use fewer workers, or a smaller --tile",
        )
    if smallest:
        room = min(host + device for *_, host, device in fitting)
        fitting = [cut for cut in fitting if cut[-2] + cut[-1] == room]
    _, total, _, parts, host, device = min(fitting)
    blocks = tuple(split_shards(shards, parts))
    seconds = total * baseline.seconds_per_tile / min(workers, len(blocks)) + SECONDS_PER_BLOCK * len(blocks)
    return Plan(lattice, grid, shards, blocks, total, host, device, seconds, (host, device) == least)


@dataclass(frozen=True)
class _Cut:
    """One axis of the shard grid in `parts` runs: extent of the longest run, tiles of all runs and of the fullest."""

    parts: int
    extent: Extent
    tiles: int
    fullest: int


def _cuts(lattice: Lattice, grid: Grid, shards: Shards, axis: int, workers: int) -> list[_Cut]:
    """Ways to cut an axis worth looking at: in 1, 2, 3, 4, 6, 8, 12, 16, ... parts, or wholly."""
    count, size, full = shards.counts[axis], shards.shard[axis], shards.shape[axis]
    begins, ends = zip(*grid.spans(axis), strict=True)
    steps = {1, 2, 3, 4, workers, 2 * workers, count} | {2**i for i in range(32)} | {3 * 2**i for i in range(31)}
    cuts = []
    for parts in sorted(step for step in steps if step <= count):
        runs = [(a * size, min(b * size, full)) for a, b in split(count, parts)]
        cells = [lattice.span(axis, a, b) for a, b in runs]
        # A tile answers for cells of a run if it begins before the run's end and ends after its begin.
        tiles = [bisect_left(begins, b) - bisect_right(ends, a) for a, b in cells]
        extent = Extent(max(b - a for a, b in runs), max(b - a for a, b in cells))
        cuts.append(_Cut(parts, extent, sum(tiles), max(tiles)))
    return cuts


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
