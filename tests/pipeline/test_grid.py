"""Tiles and shards against MONAI's own placing and against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from block_helpers import grid_over
from hypothesis import given
from hypothesis import strategies as st
from monai.data.utils import dense_patch_slices
from monai.inferers.utils import _get_scan_interval

from pipeline.errors import StudyError
from pipeline.grid import (
    Box,
    Grid,
    Shards,
    split,
    split_shards,
)
from pipeline.tiling import Tiling, exact_axis, nnunet_starts, tile_starts


@pytest.mark.parametrize(
    ("length", "tile", "overlap", "starts"),
    [
        (110, 64, 0.5, (0, 32, 46)),
        (110, 64, 0.25, (0, 46)),
        (65, 64, 0.25, (0, 1)),
        (280, 128, 0.5, (0, 64, 128, 152)),
        (287, 96, 0.25, (0, 72, 144, 191)),
        (397, 96, 0.5, (0, 48, 96, 144, 192, 240, 288, 301)),
        (128, 96, 0.7, (0, 28, 32)),
        (20, 10, 0.9, tuple(range(11))),
        (64, 64, 0.5, (0,)),
        (128, 64, 0.0, (0, 64)),
    ],
)
def test_golden_starts(length: int, tile: int, overlap: float, starts: tuple[int, ...]) -> None:
    assert tile_starts(length, tile, overlap) == starts


@given(
    sizes=st.tuples(*[st.tuples(st.integers(1, 200), st.integers(1, 96))] * 3),
    overlap=st.sampled_from([0.0, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.625, 0.7, 0.75, 0.8, 0.9, 0.99]) | st.floats(0, 0.999),
)
def test_a_grid_is_where_monai_puts_its_windows(sizes: tuple[tuple[int, int], ...], overlap: float) -> None:
    shape, tile = (tuple(pair[i] for pair in sizes) for i in (0, 1))
    padded = tuple(max(n, t) for n, t in sizes)
    interval = _get_scan_interval(padded, tile, 3, (overlap,) * 3)
    per_axis = [dense_patch_slices((n,), (t,), (step,)) for n, t, step in zip(padded, tile, interval, strict=True)]
    low = [max(t - n, 0) // 2 for n, t in sizes]  # MONAI pads this much below, and crops it off again
    expected = tuple(tuple(s.start - a for (s,) in axis) for axis, a in zip(per_axis, low, strict=True))
    grid = grid_over(shape, Tiling(tile, overlap))
    assert grid.starts == expected
    assert grid.tiles == np.prod([len(axis) for axis in expected])


@pytest.mark.parametrize(
    ("length", "tile", "step", "starts"),
    [
        (110, 64, 0.5, (0, 23, 46)),
        (64, 64, 0.5, (0,)),
        (65, 64, 0.5, (0, 1)),
        (128, 64, 0.5, (0, 32, 64)),
        (280, 128, 0.5, (0, 51, 101, 152)),
        (287, 128, 0.5, (0, 53, 106, 159)),
        (397, 128, 0.8, (0, 90, 179, 269)),
        (155, 128, 0.5, (0, 27)),
        (512, 160, 0.5, (0, 70, 141, 211, 282, 352)),
        (49, 32, 0.5, (0, 8, 17)),
        (53, 32, 0.5, (0, 10, 21)),
        (99, 64, 0.5, (0, 18, 35)),
    ],
)
def test_golden_starts_of_nnunet(length: int, tile: int, step: float, starts: tuple[int, ...]) -> None:
    assert nnunet_starts(length, tile, 1 - step) == starts


@pytest.mark.parametrize(("length", "tile", "step", "tiles"), [(18, 12, 0.1, 6), (16, 8, 0.2, 6), (30, 12, 0.3, 7)])
def test_a_step_of_nnunet_is_not_what_is_left_of_one_in_binary(length: int, tile: int, step: float, tiles: int) -> None:
    assert (
        len(nnunet_starts(length, tile, 1 - step))
        == len(nnunet_starts(length, tile, float(f"{1 - step:.1f}")))
        == tiles
    )
    assert int(np.ceil((length - tile) / (tile * step))) + 1 == tiles


@given(length=st.integers(1, 700), tile=st.integers(1, 200), overlap=st.sampled_from([0.0, 0.25, 0.5, 0.75]))
def test_starts_of_nnunet_follow_its_formula(length: int, tile: int, overlap: float) -> None:
    found = nnunet_starts(length, tile, overlap)
    if tile >= length:
        assert found == (-((tile - length) // 2),)
        return
    count = int(np.ceil((length - tile) / max(tile * (1 - overlap), 1))) + 1
    even = (length - tile) / (count - 1)
    assert found == tuple(int(np.round(even * i)) for i in range(count))


@given(
    length=st.integers(1, 400),
    window=st.integers(1, 200),
    depth=st.integers(0, 4),
    reach=st.integers(0, 6),
)
def test_cores_share_an_axis_out_and_see_all_that_they_need(length: int, window: int, depth: int, reach: int) -> None:
    divisor = 2**depth
    halo, whole = reach * divisor, -(-length // divisor) * divisor
    if window < divisor or (whole > window // divisor * divisor and window // divisor * divisor <= 2 * halo):
        with pytest.raises(StudyError, match="needs tiles of"):
            exact_axis(length, window, 0, divisor, halo)
        return
    tile, starts, cores = exact_axis(length, window, 0, divisor, halo)
    assert [core for begin, end in cores for core in range(begin, end)] == list(range(length))
    for start, (begin, end) in zip(starts, cores, strict=True):
        assert start % divisor == 0 == tile % divisor
        assert 0 <= start <= begin < end <= start + tile <= whole
        assert start == 0 or begin - start >= halo
        assert start + tile == whole or start + tile - end >= halo


@given(length=st.integers(1, 300), window=st.integers(41, 200), divisor=st.sampled_from([1, 2, 4, 8]))
def test_cores_of_a_network_without_padding(length: int, window: int, divisor: int) -> None:
    margin = 16
    tile, starts, cores = exact_axis(length, window, margin, divisor, 0)
    assert tile == window - 2 * margin
    assert [core for begin, end in cores for core in range(begin, end)] == list(range(length))
    for start, (begin, end) in zip(starts, cores, strict=True):
        assert start % divisor == 0
        assert start == begin < end <= start + tile


def test_tiles_come_in_monais_order() -> None:
    shape, tile = (20, 17, 23), (8, 8, 16)
    slices = dense_patch_slices(shape, tile, _get_scan_interval(shape, tile, 3, (0.5,) * 3))
    whole = Box((0, 0, 0), shape)
    assert [box.slices for box in grid_over(shape, Tiling(tile, 0.5)).tiles_over(whole)] == slices


@pytest.mark.parametrize(("length", "tile"), [(5, 16), (6, 16), (1, 16), (15, 16), (1, 2)])
def test_an_axis_shorter_than_its_tile_is_centred_in_one(length: int, tile: int) -> None:
    (start,) = tile_starts(length, tile, 0.5)
    below, above = -start, start + tile - length
    assert above - below in (0, 1)


@given(length=st.integers(1, 400), tile=st.integers(1, 130), overlap=st.floats(0, 0.95))
def test_every_voxel_has_a_tile_and_none_lies_past_a_long_axis(length: int, tile: int, overlap: float) -> None:
    starts = tile_starts(length, tile, overlap)
    covered = np.zeros(length, int)
    for s in starts:
        covered[max(s, 0) : s + tile] += 1
    assert covered.min() >= 1
    assert list(starts) == sorted(set(starts))
    if length >= tile:
        assert starts[0] == 0
        assert starts[-1] == length - tile


def test_a_margin_makes_tiles_smaller_than_windows() -> None:
    grid = grid_over((50, 60, 70), Tiling((28, 44, 44), 0.5, (8, 8, 8)))
    assert grid.tile == (12, 28, 28)
    assert grid.starts == grid_over((50, 60, 70), Tiling((12, 28, 28))).starts


boxes = st.builds(
    lambda starts, sizes: Box(starts, tuple(a + n for a, n in zip(starts, sizes, strict=True))),
    st.tuples(*[st.integers(0, 30)] * 3),
    st.tuples(*[st.integers(1, 20)] * 3),
)


def brute_tiles(grid: Grid, box: Box) -> list[Box]:
    """All tiles of the grid whose core has at least one voxel in the box, in raster order."""
    found = []
    for start in itertools.product(*grid.starts):
        tile = Box(start, tuple(a + t for a, t in zip(start, grid.tile, strict=True)))
        core = grid.core(tile)
        bounds = zip(core.start, core.stop, box.start, box.stop, strict=True)
        if all(set(range(a, b)) & set(range(c, d)) for a, b, c, d in bounds):
            found.append(tile)
    return found


@given(
    box=boxes,
    shape=st.tuples(*[st.integers(1, 50)] * 3),
    tile=st.tuples(*[st.integers(3, 24)] * 3),
    overlap=st.sampled_from([0.0, 0.25, 0.5]),
)
def test_touching_count_and_tiles_over_against_brute_force(
    box: Box, shape: tuple[int, int, int], tile: tuple[int, int, int], overlap: float
) -> None:
    box = box.clip(Box((0, 0, 0), shape))
    if box.size == 0:
        return
    check_touching(grid_over(shape, Tiling(tile, overlap)), box)
    check_touching(grid_over(shape, Tiling(tile, overlap, stitch="nnunet")), box)
    check_touching(grid_over(shape, Tiling(tile, stitch="exact", halo=(1, 1, 1))), box)


def check_touching(grid: Grid, box: Box) -> None:
    tiles = brute_tiles(grid, box)
    assert list(grid.tiles_over(box)) == tiles
    assert grid.count(box) == len(tiles)
    assert list(itertools.product(*grid.touching(box))) == [t.start for t in tiles]


@given(first=boxes, second=boxes)
def test_boxes_meet_where_they_share_voxels(first: Box, second: Box) -> None:
    painted = np.zeros((60, 60, 60), np.int8)
    painted[first.slices] += 1
    painted[second.slices] += 1
    shared = int((painted == 2).sum())
    assert first.meets(second) == second.meets(first) == (shared > 0)
    assert first.clip(second).size == shared
    assert int(painted[first.clip(second).slices].sum()) == 2 * shared


def test_moving_and_growing_a_box() -> None:
    box = Box((1, 2, 3), (4, 6, 8))
    assert box.shape == (3, 4, 5)
    assert box.size == 60
    assert box.shift((1, 0, -2)) == Box((2, 2, 1), (5, 6, 6))
    assert box.grow((1, 2, 3)) == Box((0, 0, 0), (5, 8, 11))


@given(shape=st.tuples(*[st.integers(1, 40)] * 3), shard=st.tuples(*[st.integers(1, 16)] * 3))
def test_shards_cover_every_voxel_once(shape: tuple[int, int, int], shard: tuple[int, int, int]) -> None:
    shards = Shards(shape, shard)
    painted = np.zeros(shape, int)
    indices = list(shards.indices())
    for index in indices:
        box = shards.box(index)
        assert all(n >= 1 for n in box.shape)
        painted[box.slices] += 1
    assert (painted == 1).all()
    assert indices == sorted(indices)
    assert len(indices) == shards.total


@given(count=st.integers(1, 500), parts=st.integers(1, 500))
def test_split_gives_runs_as_equal_as_they_get(count: int, parts: int) -> None:
    parts = min(count, parts)
    runs = split(count, parts)
    lengths = [b - a for a, b in runs]
    assert [i for a, b in runs for i in range(a, b)] == list(range(count))
    assert len(runs) == parts
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1


@given(
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    shard=st.tuples(*[st.integers(4, 16)] * 3),
    parts=st.tuples(*[st.integers(1, 10)] * 3),
)
def test_blocks_of_shards_hold_every_shard_once(
    shape: tuple[int, int, int], shard: tuple[int, int, int], parts: tuple[int, int, int]
) -> None:
    shards = Shards(shape, shard)
    parts = tuple(min(n, p) for n, p in zip(shards.counts, parts, strict=True))
    ranges = split_shards(shards, parts)
    assert sorted(index for r in ranges for index in shards.indices(r)) == list(shards.indices())
    for r in ranges:
        assert shards.box_of(r).size == sum(shards.box(index).size for index in shards.indices(r))
