"""Coarser levels against loops over every window: means for images, votes for labels, edges included."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import ome
from pipeline.pyramid import build_pyramid, reduce_labels, reduce_mean


def windows(block: np.ndarray, steps: tuple[int, ...]) -> tuple[tuple[int, ...], dict[tuple[int, ...], np.ndarray]]:
    """The voxels that each coarser voxel spans; at an odd end the last voxel is its own neighbour."""
    shape = tuple(-(-n // k) for n, k in zip(block.shape, steps, strict=True))
    found = {}
    for at in itertools.product(*map(range, shape)):
        ranges = [
            [min(i * k + j, n - 1) for j in range(k)] for i, k, n in zip(at, steps, block.shape, strict=True)
        ]  # fmt: skip
        found[at] = block[np.ix_(*ranges)].ravel()
    return shape, found


def brute_mean(block: np.ndarray, steps: tuple[int, ...]) -> np.ndarray:
    shape, spans = windows(block, steps)
    out = np.zeros(shape, block.dtype)
    for at, voxels in spans.items():
        mean = sum(voxels.tolist()) / len(voxels)
        out[at] = round(mean) if block.dtype.kind in "iu" else mean
    return out


def brute_vote(block: np.ndarray, steps: tuple[int, ...]) -> np.ndarray:
    shape, spans = windows(block, steps)
    out = np.zeros(shape, block.dtype)
    for at, voxels in spans.items():
        values, counts = np.unique(voxels, return_counts=True)  # ascending: the first of the fullest is the smallest
        out[at] = values[counts.argmax()]
    return out


shapes = st.tuples(*[st.integers(1, 7)] * 3)
all_steps = st.tuples(*[st.integers(1, 2)] * 3)


@settings(max_examples=60)
@given(shape=shapes, steps=all_steps, labels=st.integers(1, 6), seed=st.integers(0, 99), wide=st.booleans())
def test_votes(shape: tuple[int, int, int], steps: tuple[int, ...], labels: int, seed: int, wide: bool) -> None:
    block = np.random.default_rng(seed).integers(0, labels + 1, shape).astype(np.uint16 if wide else np.uint8)
    block[block == labels] = 60_000 if wide else 255
    found = reduce_labels(block, steps)
    assert found.dtype == block.dtype
    assert np.array_equal(found, brute_vote(block, steps))


@settings(max_examples=60)
@given(
    shape=shapes,
    steps=all_steps,
    dtype=st.sampled_from([np.uint8, np.int8, np.int16, np.uint16, np.int32]),
    seed=st.integers(0, 99),
)
def test_means_of_integers(shape: tuple[int, int, int], steps: tuple[int, ...], dtype: Any, seed: int) -> None:
    info = np.iinfo(dtype)
    block = np.random.default_rng(seed).integers(info.min, info.max, shape, dtype=dtype, endpoint=True)
    found = reduce_mean(block, steps)
    assert found.dtype == block.dtype
    assert np.array_equal(found, brute_mean(block, steps))


@given(shape=shapes, steps=all_steps, dtype=st.sampled_from([np.float32, np.float64]), seed=st.integers(0, 99))
def test_means_of_floats(shape: tuple[int, int, int], steps: tuple[int, ...], dtype: Any, seed: int) -> None:
    block = np.random.default_rng(seed).normal(0, 1e3, shape).astype(dtype)
    assert np.allclose(reduce_mean(block, steps), brute_mean(block, steps), rtol=1e-6)


@pytest.mark.parametrize("lead", [0, 2])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("shape", [(2, 517, 19), (66, 258, 5), (1, 65, 257)])
def test_levels_of_a_whole_image(tmp_path: Path, shape: tuple[int, int, int], labels: bool, lead: int) -> None:
    rng = np.random.default_rng(1)
    whole = (lead,) * (lead > 0) + shape
    voxels = rng.integers(0, 4 if labels else 3000, whole).astype(np.uint8 if labels else np.int16)
    names = ome.axis_names(lead > 0)
    base = ome.create_array(str(tmp_path / "0"), whole, ome.shard_shape(shape), voxels.dtype, names)
    base[...] = voxels
    build_pyramid(str(tmp_path), labels=labels, names=names)
    expected, reduce = voxels, brute_vote if labels else brute_mean
    for level, size in enumerate(expected_levels(shape)):
        if level:
            steps = tuple(2 if a > b else 1 for a, b in zip(expected.shape[-3:], size, strict=True))
            channels = expected.reshape(-1, *expected.shape[-3:])
            expected = np.stack([reduce(c, steps) for c in channels]).reshape(whole[:-3] + size)
        found = ome.open_array(str(tmp_path / str(level)))
        assert found.shape == expected.shape
        assert found.dtype == voxels.dtype
        assert np.array_equal(found[...], expected)
    assert not (tmp_path / str(level + 1)).exists()


def expected_levels(shape: tuple[int, int, int]) -> list[tuple[int, ...]]:
    """The contract's rule: halve axes longer than 64 until all are <= 256."""
    levels: list[tuple[int, ...]] = [shape]
    while any(n > 256 for n in levels[-1]):
        levels.append(tuple((n + 1) // 2 if n > 64 else n for n in levels[-1]))
    return levels


@given(shape=st.tuples(*[st.integers(1, 5000)] * 3))
def test_levels_follow_the_contracts_rule(shape: tuple[int, int, int]) -> None:
    assert ome.level_shapes(shape) == expected_levels(shape)


def test_building_again_writes_over(tmp_path: Path) -> None:
    base = ome.create_array(str(tmp_path / "0"), (2, 300, 8), (8, 128, 8), np.dtype(np.uint8), list("zyx"))
    for value in (3, 0, 7):
        base[...] = value
        build_pyramid(str(tmp_path), labels=True, names=list("zyx"))
        assert (ome.open_array(str(tmp_path / "1"))[...] == value).all()
