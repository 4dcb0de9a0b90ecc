"""Plans: what they promise of memory, tiles and waste, against brute force."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
from block_helpers import grid_over
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import ome
from pipeline.engine import Baseline
from pipeline.errors import StudyError
from pipeline.grid import Box, Grid, Shards, Triple
from pipeline.lattice import Lattice
from pipeline.planning import Extent, Needs, Plan, arrays_bytes, make_plan
from pipeline.tiling import Tiling

GIB = 1 << 30
BASE = Baseline(host_bytes=400 << 20, device_bytes=0, seconds_per_tile=1.0)


def needs(classes: int = 3, channels: int = 1, on_device: bool = False, **facts: Any) -> Needs:
    given_facts = {"image_itemsize": 2, "image_chunk": (64, 64, 64), "label_itemsize": 1} | facts
    return Needs(channels=channels, classes=classes, on_device=on_device, **given_facts)


def planned(
    shape: Triple, window: Triple, *, budget: int = 1 << 50, workers: int = 1, overlap: float = 0.5,
    margin: Triple = (0, 0, 0), shard: Triple | None = None, base: Baseline = BASE, **facts: Any,
) -> Plan:  # fmt: skip
    return make_plan(
        Lattice(shape, shape), shard or ome.shard_shape(shape), Tiling(window, overlap, margin),
        needs=needs(**facts), baseline=base, budget=budget, workers=workers,
    )  # fmt: skip


def arrays_of(block: Triple, grid: Grid, shards: Shards, needs: Needs) -> tuple[int, int]:
    """(host, device) bytes of a block of so many voxels of a study that is not resampled."""
    z, y, x = (Extent(n, n) for n in block)
    return arrays_bytes(z, y, x, Lattice(shards.shape, shards.shape), grid, shards, needs)


def hull(plan: Plan, block: Box) -> Box:
    """What the tiles of a block reach over, with the margin the network sees, by looking at each tile."""
    tiles = list(plan.grid.tiles_over(plan.shards.box_of(block)))
    start = tuple(min(t.start[i] for t in tiles) for i in range(3))
    stop = tuple(max(t.stop[i] for t in tiles) for i in range(3))
    return Box(start, stop).grow(plan.grid.margin)


small_studies = {
    "shape": st.tuples(*[st.integers(1, 90)] * 3),
    "shard": st.sampled_from([(8, 8, 8), (8, 16, 16), (16, 24, 8)]),
    "tile": st.tuples(*[st.integers(1, 40)] * 3),
    "margin": st.sampled_from([(0, 0, 0), (8, 8, 8), (0, 8, 8)]),
    "workers": st.integers(1, 6),
    "overlap": st.sampled_from([0.0, 0.25, 0.5]),
    "tightness": st.floats(0.0, 1.0),
}


def tight_plan(shape: Triple, window: Triple, tightness: float, **facts: Any) -> Plan:
    """A plan under a budget between what single shards take and what the whole study takes in one block."""
    smallest = planned(shape, window, budget=10**15, **facts | {"workers": 10**6}).host_bytes
    roomy = planned(shape, window, **facts | {"workers": 1}).host_bytes
    return planned(shape, window, budget=smallest + int(tightness * max(0, roomy - smallest)), **facts)


@settings(max_examples=40)
@given(**small_studies)
def test_blocks_hold_every_shard_once_and_tiles_are_counted_right(
    shape: Triple, shard: Triple, tile: Triple, margin: Triple, workers: int, overlap: float, tightness: float
) -> None:
    window = tuple(t + 2 * m for t, m in zip(tile, margin, strict=True))
    facts = {"shard": shard, "margin": margin, "overlap": overlap, "workers": workers}
    plan = tight_plan(shape, window, tightness, **facts)
    assert sorted(i for b in plan.blocks for i in plan.shards.indices(b)) == list(plan.shards.indices())
    assert plan.shards == Shards(shape, shard)
    assert plan.grid == grid_over(shape, Tiling(window, overlap, margin))
    brute = sum(len(list(plan.grid.tiles_over(plan.shards.box_of(b)))) for b in plan.blocks)
    assert plan.tile_runs == brute
    assert plan.waste == pytest.approx(brute / plan.grid.tiles - 1)
    assert plan.waste >= 0


@settings(max_examples=40)
@given(classes=st.integers(1, 200), channels=st.integers(1, 3), **small_studies)
def test_the_projection_covers_the_arrays_of_every_block(
    shape: Triple, shard: Triple, tile: Triple, margin: Triple, workers: int, overlap: float, tightness: float,
    classes: int, channels: int,
) -> None:  # fmt: skip
    window = tuple(t + 2 * m for t, m in zip(tile, margin, strict=True))
    facts = {"shard": shard, "margin": margin, "overlap": overlap, "workers": workers}
    plan = tight_plan(shape, window, tightness, classes=classes, channels=channels, **facts)
    for block in plan.blocks:
        extent = plan.shards.box_of(block)
        _, height, width = extent.shape
        _, h, w = hull(plan, block).shape
        inputs = 4 * channels * window[0] * h * w
        rows_of_chunks = channels * 64 * min(h, shape[1]) * min(w, shape[2]) * 2
        sums = 4 * classes * min(tile[0], extent.shape[0]) * height * width
        labels = min(shard[0], extent.shape[0]) * height * width
        assert plan.host_bytes >= 1.1 * (BASE.host_bytes + inputs + rows_of_chunks + sums + labels)


def test_a_block_in_the_middle_reads_a_tile_past_each_side() -> None:
    """Tiles at every voxel reach as far as tiles can; fifty channels, so that the input window is what counts."""
    shape, tile, margin = (32, 300, 300), (32, 32, 32), (0, 8, 8)
    window = tuple(t + 2 * m for t, m in zip(tile, margin, strict=True))
    grid, shards = grid_over(shape, Tiling(window, 0.99, margin)), Shards(shape, (32, 64, 64))
    block = Box((0, 2, 2), (1, 3, 3))
    plan = Plan(Lattice(shape, shape), grid, shards, (block,), 0, 0, 0, 0.0, smallest=False)
    _, h, w = hull(plan, block).shape
    assert (h, w) == (64 + 2 * 31 + 16,) * 2
    arrays = 50 * (4 * 32 * h * w + 8 * h * w * 2)
    host, _ = arrays_of((32, 64, 64), grid, shards, needs(classes=1, channels=50, image_chunk=(8, 8, 8)))
    assert arrays <= host <= 1.2 * arrays


def test_the_formula_as_it_is_written() -> None:
    """projected = 1.1 x (baseline + arrays), each array as the module says, for a block that is the whole study."""
    shape, window, classes = (128, 100, 120), (32, 64, 64), 7
    plan = planned(
        shape, window, classes=classes, image_itemsize=4, image_chunk=(16, 32, 32), label_itemsize=2,
        uncertainty_fields=2,
    )  # fmt: skip
    (block,) = plan.blocks
    assert plan.shards.box_of(block).shape == shape
    h, w = shape[1:]  # tiles reach no further than the study
    shard = math.prod(plan.shards.shard)
    arrays = (
        4 * 32 * h * w
        + (4 * 16 * h * w + 20 * 16 * 32 * 32 * 4 + 28 * h * w)
        + 4 * (classes + 2) * 32 * h * w
        + 2 * (32 * h * w + 8 * classes * w + (1 << 20))
        + (2 * 64 * h * w + 16 * h * w)
        + 128 * shard
        + 14 * math.prod(window)
    )
    assert plan.host_bytes == math.ceil(1.1 * (BASE.host_bytes + arrays))
    assert plan.device_bytes == 0


@pytest.mark.parametrize("stitching", [
    {"stitch": "exact", "margin": (20, 20, 20), "divisor": (4, 4, 4)},
    {"stitch": "exact", "divisor": (8, 8, 8), "halo": (8, 8, 8)},
])  # fmt: skip
def test_the_input_of_exact_tiles_past_the_border_is_projected(stitching: dict[str, Any]) -> None:
    shape, window = (20, 102, 109), (140, 140, 140)
    grid, shards = grid_over(shape, Tiling(window, 0.0, **stitching)), Shards(shape, (24, 104, 112))
    plan = Plan(Lattice(shape, shape), grid, shards, (Box((0, 0, 0), (1, 1, 1)),), 0, 0, 0, 0.0, smallest=False)
    depth, h, w = (n + 2 * m for n, m in zip(hull(plan, plan.blocks[0]).shape, (0, 0, 0), strict=True))
    host, _ = arrays_of((20, *shape[1:]), grid, shards, needs(classes=1, channels=50, image_chunk=(8, 8, 8)))
    assert host >= 4 * 50 * grid.window[0] * h * w
    assert depth >= 20


def test_sums_in_half_precision_take_a_row_more() -> None:
    grid, shards = grid_over((4, 512, 512), Tiling((1, 64, 64))), Shards((4, 512, 512), (8, 128, 128))
    least, more = (
        arrays_of((4, 512, 512), grid, shards, needs(classes=200, channels=1, half=half))[0] for half in (False, True)
    )
    assert more - least == 6 * 201 * 512 * 512


def test_uncertainty_takes_fields_of_the_size_of_a_class() -> None:
    shape, window = (100, 256, 256), (64, 64, 64)
    none, one, two = (planned(shape, window, classes=3, uncertainty_fields=n).host_bytes for n in range(3))
    more = planned(shape, window, classes=4).host_bytes - none
    assert one - none == pytest.approx(two - one, abs=2)
    assert 1 < (one - none) / more < 1.4  # a class, and what looking at one row takes


def test_on_a_gpu_the_sums_are_the_devices() -> None:
    base = Baseline(1 << 30, 2 << 30, 0.1)
    there = planned((100, 256, 256), (64, 64, 64), classes=50, on_device=True, base=base)
    here = planned((100, 256, 256), (64, 64, 64), classes=50, base=base)
    sums = 4 * 50 * 64 * 256 * 256
    assert there.device_bytes == math.ceil(1.1 * ((2 << 30) + sums))
    assert here.host_bytes - there.host_bytes == pytest.approx(1.1 * sums, abs=2)


@pytest.mark.parametrize("length", [64, 300, 4000, 100_000])
def test_memory_does_not_grow_with_the_length_of_a_study(length: int) -> None:
    plan = planned((length, 256, 256), (64, 64, 64), classes=10)
    assert plan.host_bytes == planned((64, 256, 256), (64, 64, 64), classes=10).host_bytes
    assert len(plan.blocks) == 1


def test_a_budget_cuts_blocks_across_y_and_x() -> None:
    roomy = planned((128, 512, 512), (32, 64, 64), classes=30)
    assert len(roomy.blocks) == 1
    cut = planned((128, 512, 512), (32, 64, 64), classes=30, budget=roomy.host_bytes * 2 // 3)
    assert len(cut.blocks) > 1
    assert cut.host_bytes <= roomy.host_bytes * 2 // 3
    assert all(block.shape[0] == cut.shards.counts[0] for block in cut.blocks)  # cutting z saves nothing


def test_what_fits_nowhere_is_refused_with_the_numbers() -> None:
    with pytest.raises(StudyError) as refused:
        planned((128, 512, 512), (96, 96, 96), classes=100, budget=1 << 29)
    assert refused.value.cause == "memory"
    message = refused.value.message
    needed, process, allowed = map(float, re.findall(r"(\d+\.\d\d) GiB", message))
    assert "[96, 96, 96]" in message
    assert "100 classes" in message
    assert process == pytest.approx(400 / 1024, abs=0.01)
    assert allowed == 0.5
    assert needed > allowed
    fits = planned((128, 512, 512), (96, 96, 96), classes=100, budget=int((needed + 0.01) * GIB))
    assert fits.host_bytes <= (needed + 0.01) * GIB
    with pytest.raises(StudyError):
        planned((128, 512, 512), (96, 96, 96), classes=100, budget=int((needed - 0.01) * GIB))


def test_whole_studies_to_one_worker() -> None:
    for shape in [(20, 20, 20), (160, 512, 512), (500, 200, 200)]:
        plan = planned(shape, (96, 96, 96))
        assert len(plan.blocks) == 1
        assert plan.waste == 0
        assert plan.tile_runs == plan.grid.tiles


@pytest.mark.parametrize(("workers", "most"), [(2, 0.15), (4, 0.31)])
def test_sharing_one_large_study_wastes_little(workers: int, most: float) -> None:
    plan = planned((512, 512, 512), (128, 128, 128), workers=workers, classes=3)
    assert plan.waste <= most
    assert len(plan.blocks) >= workers
    per_block = [plan.grid.count(plan.shards.box_of(b)) for b in plan.blocks]
    rounds = math.ceil(len(plan.blocks) / workers)
    assert rounds * max(per_block) < 0.7 * plan.grid.tiles


@settings(max_examples=25)
@given(
    counts=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    workers=st.integers(1, 4),
    tile=st.sampled_from([(16, 16, 16), (8, 24, 24), (32, 32, 32)]),
)
def test_no_other_regular_cut_ends_sooner(counts: Triple, workers: int, tile: Triple) -> None:
    """Against all cuts there are: the plan's last block ends first, and among equals the waste is least."""
    shard = (8, 16, 16)
    shape = tuple(n * s - 3 for n, s in zip(counts, shard, strict=True))
    plan = planned(shape, tile, shard=shard, workers=workers)

    def cost(blocks: list[Box]) -> tuple[float, int]:
        tiles = [plan.grid.count(plan.shards.box_of(b)) for b in blocks]
        longest = max(max(tiles) * math.ceil(len(blocks) / workers), sum(tiles) / workers)
        return longest, sum(tiles)

    from pipeline.grid import split_shards

    every = itertools.product(*(range(1, n + 1) for n in plan.shards.counts))
    assert cost(list(plan.blocks)) <= min(cost(split_shards(plan.shards, parts)) for parts in every)


def test_more_workers_never_make_it_slower() -> None:
    seconds = [planned((256, 256, 256), (64, 64, 64), workers=n).seconds for n in (1, 2, 4)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] == pytest.approx(planned((256, 256, 256), (64, 64, 64)).grid.tiles, rel=0.01)


def test_what_a_plan_says_of_itself() -> None:
    plan = planned((70, 150, 150), (32, 64, 64), workers=2)
    said = plan.describe("brain")
    assert list(said) == [
        "study", "shape", "lattice", "tiles", "tile_runs", "blocks", "waste", "host_bytes", "device_bytes", "seconds",
    ]  # fmt: skip
    assert said["study"] == "brain"
    assert said["shape"] == [70, 150, 150]
    assert said["blocks"] == len(plan.blocks)
    assert said["tiles"] == plan.grid.tiles


@pytest.mark.parametrize("shape", [(3000, 2048, 2048), (8, 60_000, 60_000)])
def test_planning_a_huge_study_takes_no_time(shape: Triple) -> None:
    import time

    began = time.perf_counter()
    plan = planned(shape, (32, 128, 128), budget=8 * GIB, workers=8)
    assert time.perf_counter() - began < 10
    assert plan.host_bytes <= 8 * GIB
