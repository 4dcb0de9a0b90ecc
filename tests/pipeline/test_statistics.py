"""Sums over an image against numpy, whatever the slabs; the bins of floats; the file they are kept in."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import statistics
from pipeline.statistics import ChannelStatistics, ChannelSums, Moments, bin_middles, float_bins

INTEGERS = [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64]
FLOATS = [np.float32, np.float64]
LARGEST = float(np.finfo(np.float32).max)


def summed(voxels: np.ndarray, cuts: list[int] | None = None, chunk_rows: int = 4) -> ChannelStatistics:
    """Statistics of (z, y, x) given in slabs that end at `cuts` (multiples of `chunk_rows`)."""
    sums = ChannelSums(voxels.dtype, chunk_rows)
    edges = [0, *(cuts or []), len(voxels)]
    for a, b in pairwise(edges):
        sums.add(voxels[a:b])
    return sums.finish()


def noise(dtype: Any, shape: tuple[int, int, int] = (21, 17, 13), seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        values = rng.normal(100, 40, shape)
        values[rng.random(shape) < 0.2] = 0
        return values.astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(max(info.min, -40_000), min(info.max, 40_000), shape, dtype=dtype, endpoint=True)


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS])
def test_moments_and_range_are_numpys(dtype: Any) -> None:
    voxels = noise(dtype)
    voxels[3, 4] = 0
    found = summed(voxels)
    wide = voxels.astype(np.float64)
    inside = wide[wide != 0]
    assert found.all.count == voxels.size
    assert found.nonzero.count == inside.size
    assert found.mean == pytest.approx(wide.mean(), rel=1e-12)
    assert found.std == pytest.approx(wide.std(), rel=1e-12)
    assert found.nonzero_mean == pytest.approx(inside.mean(), rel=1e-12)
    assert found.nonzero_std == pytest.approx(inside.std(), rel=1e-12)
    assert (found.minimum, found.maximum) == (float(voxels.min()), float(voxels.max()))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_are_counted_exactly(dtype: Any) -> None:
    voxels = noise(dtype)
    found = summed(voxels)
    values, counts = np.unique(voxels, return_counts=True)
    got_values, got_counts = found.histogram()
    assert found.exact
    assert got_values.dtype == np.float64
    assert got_counts.dtype == np.int64
    assert np.array_equal(got_values, values.astype(np.float64))
    assert np.array_equal(got_counts, counts)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_the_ends_of_a_type_are_counted(dtype: Any) -> None:
    info = np.iinfo(dtype)
    voxels = np.array([info.min, info.max, info.max], dtype).reshape(1, 1, 3)
    values, counts = summed(voxels).histogram()
    assert values.tolist() == [float(info.min), float(info.max)]
    assert counts.tolist() == [1, 2]


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_are_counted_in_bins(dtype: Any) -> None:
    voxels = noise(dtype)
    found = summed(voxels)
    values, counts = found.histogram()
    bins, expected = np.unique(float_bins(voxels), return_counts=True)
    assert not found.exact
    assert np.array_equal(counts, expected)
    assert np.array_equal(values, bin_middles()[bins])
    assert (np.diff(values) > 0).all()
    # Every voxel lies within the half width of a bin, 1/256 of its size, of the value that stands for it.
    middles = bin_middles()[float_bins(voxels)].reshape(voxels.shape)
    assert (np.abs(middles - voxels) <= np.abs(voxels) / 256 + 1e-38).all()


def test_a_large_offset_costs_no_digits() -> None:
    small = np.random.default_rng(0).normal(0, 1, (64, 32, 32))
    found = summed(small + 1e9)
    assert found.std == pytest.approx((small + 1e9).std(), rel=1e-9)
    assert found.std == pytest.approx(small.std(), rel=1e-6)
    shifted = (np.arange(32 * 16 * 16) % 7).reshape(32, 16, 16).astype(np.int32)
    assert summed(shifted + 2_000_000_000).std == pytest.approx(shifted.std(), rel=1e-9)


@settings(max_examples=40)
@given(
    dtype=st.sampled_from([np.uint8, np.int16, np.int32, np.float32, np.float64]),
    cuts=st.sets(st.integers(1, 9)),
    seed=st.integers(0, 3),
)
def test_how_slabs_are_cut_changes_no_bit(dtype: Any, cuts: set[int], seed: int) -> None:
    voxels = noise(dtype, (41, 5, 6), seed)
    whole, cut = summed(voxels), summed(voxels, [4 * c for c in sorted(cuts)])
    assert statistics.to_bytes([whole]) == statistics.to_bytes([cut])


def test_wide_integers_with_very_many_values_are_binned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MAX_DISTINCT", 500)
    voxels = np.random.default_rng(0).integers(-(10**9), 10**9, (24, 8, 8)).astype(np.int32)
    found = summed(voxels)
    values, counts = found.histogram()
    bins, expected = np.unique(float_bins(voxels), return_counts=True)
    assert not found.exact
    assert np.array_equal(counts, expected)
    assert np.array_equal(values, bin_middles()[bins])
    assert found.mean == pytest.approx(voxels.mean(), rel=1e-9)
    assert found.std == pytest.approx(voxels.std(), rel=1e-12)
    assert statistics.to_bytes([found]) == statistics.to_bytes([summed(voxels, [8, 12])])


finite32 = st.floats(-LARGEST, LARGEST, width=32)


@given(st.lists(finite32, min_size=2, max_size=50))
def test_bins_keep_the_order_of_floats(values: list[float]) -> None:
    ordered = np.sort(np.array(values, np.float32))
    bins = float_bins(ordered)
    assert (np.diff(bins) >= 0).all()
    assert bins.min() >= 0
    assert bins.max() < 1 << 16


@given(finite32)
def test_a_bin_is_the_top_sixteen_bits_and_its_middle_lies_in_it(value: float) -> None:
    number = np.float32(value)
    (at,) = float_bins(np.array([number]))
    bits = int((number + np.float32(0)).view(np.uint32))
    assert at == ((bits ^ (0xFFFFFFFF if bits >> 31 else 0x80000000)) >> 16)
    middle = bin_middles()[at]
    assert float_bins(np.array([middle]))[0] == at
    width = max(abs(float(number)) / 128, 2.0**-133)
    assert abs(middle - float(number)) <= width


def test_bins_of_special_floats() -> None:
    assert float_bins(np.array([0.0]))[0] == float_bins(np.array([-0.0]))[0] == 1 << 15
    assert float_bins(np.array([1e300, LARGEST]))[0] == float_bins(np.array([LARGEST]))[0]
    assert float_bins(np.array([-1e300]))[0] == float_bins(np.array([-LARGEST]))[0]
    middles = bin_middles()
    finite = slice(float_bins(np.array([-LARGEST]))[0], float_bins(np.array([LARGEST]))[0] + 1)
    assert (np.diff(middles[finite]) > 0).all()
    assert (middles[: finite.start] == 0).all()
    assert (middles[finite.stop :] == 0).all()


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=30), min_size=1, max_size=6).filter(lambda parts: any(parts)))
def test_merged_moments_are_those_of_all(parts: list[list[float]]) -> None:
    merged = Moments()
    for part in parts:
        merged = merged.merge(Moments.of(np.array(part)))
    everything = np.array([v for part in parts for v in part])
    assert merged.count == everything.size
    assert merged.mean == pytest.approx(everything.mean(), rel=1e-9, abs=1e-6)
    assert merged.std == pytest.approx(everything.std(), rel=1e-6, abs=1e-6)


def test_nothing_has_no_deviation() -> None:
    assert Moments.of(np.zeros(0)) == Moments()
    assert Moments().merge(Moments()) == Moments()
    assert Moments().std == 0.0
    only_zeros = summed(np.zeros((4, 3, 2), np.float32))
    assert (only_zeros.nonzero.count, only_zeros.nonzero_mean, only_zeros.nonzero_std) == (0, 0.0, 0.0)


def test_there_and_back_through_bytes() -> None:
    channels = [summed(noise(dtype, seed=i)) for i, dtype in enumerate([np.int16, np.float32, np.uint8, np.int64])]
    again = statistics.from_bytes(statistics.to_bytes(channels))
    assert len(again) == 4
    for first, second in zip(channels, again, strict=True):
        for name in ("all", "nonzero", "minimum", "maximum", "exact"):
            assert getattr(first, name) == getattr(second, name)
        assert all(np.array_equal(a, b) for a, b in zip(first.histogram(), second.histogram(), strict=True))
