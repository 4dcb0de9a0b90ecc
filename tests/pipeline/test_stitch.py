"""Weights against MONAI's map and the golden numbers; the rolling sums against dense ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from block_helpers import grid_over, nnunet_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.utils import compute_importance_map

from pipeline.grid import Box
from pipeline.stitch import RollingAccumulator, importance
from pipeline.tiling import Tiling


@pytest.mark.parametrize(
    ("length", "half"),
    [
        (8, [0.00218749, 0.04393693, 0.32465243, 0.88249689]),
        (7, [0.00280164, 0.07336965, 0.52045012, 1.0]),
    ],
)
def test_golden_gaussian(length: int, half: list[float]) -> None:
    weights = importance((length, 1, 1), "gaussian").ravel()
    mirrored = half + half[::-1][length % 2 :]
    assert weights == pytest.approx(mirrored, rel=1e-5)


def test_most_of_a_window_sits_at_the_floor() -> None:
    weights = importance((96, 96, 96), "gaussian")
    assert (weights == np.float32(1e-3)).mean() == pytest.approx(0.5797, abs=2e-4)


@pytest.mark.parametrize("mode", ["gaussian", "constant"])
@pytest.mark.parametrize("tile", [(96, 96, 96), (48, 64, 48), (7, 8, 9), (1, 32, 33), (1, 1, 1), (2, 3, 160)])
def test_weights_are_monais(tile: tuple[int, int, int], mode: str) -> None:
    ours = importance(tile, mode)
    theirs = compute_importance_map(tile, mode=mode, sigma_scale=0.125).numpy()
    assert ours.dtype == np.float32
    assert ours.shape == tile
    assert np.allclose(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (8, [0.00335503, 0.11108398, 1.35351562, 6.06640625, 10, 6.06640625, 1.35351562, 0.11108398]),
        (7, [0.0280164, 0.7336965, 5.2045012, 10, 5.2045012, 0.7336965, 0.0280164]),
    ],
)
def test_golden_weights_of_nnunet(length: int, expected: list[float]) -> None:
    weights = importance((1, length, 1), "nnunet").ravel()
    assert weights == pytest.approx(expected, rel=5e-4)  # rounded to half precision
    if length == 8:
        assert weights[:4] == pytest.approx(expected[:4], rel=2e-6)


def test_weights_of_nnunet_are_raised_where_half_precision_has_none() -> None:
    weights = importance((128, 128, 128), "nnunet")
    assert weights[64, 64, 64] == 10
    assert weights[0, 64, 64] == pytest.approx(0.003355, rel=1e-3)
    assert weights[0, 0, 0] == 2.0**-24
    assert weights[0, 0, 64] == pytest.approx(1.1325e-6, rel=1e-3)
    assert ((weights == 2.0**-24).sum() / weights.size) > 0.0043
    assert np.array_equal(importance((1, 32, 32), "nnunet")[0], importance((2, 32, 32), "nnunet")[1])


@pytest.mark.parametrize(
    "tile", [(96, 160, 160), (28, 256, 256), (1, 512, 512), (1, 320, 256), (48, 64, 48), (7, 8, 9)]
)
def test_weights_of_nnunet_are_its_own_to_the_bit(tile: tuple[int, int, int]) -> None:
    axes = tuple(n for n in tile if n > 1)
    assert np.array_equal(importance(tile, "nnunet").reshape(axes), nnunet_weights(axes).float().numpy())


@settings(max_examples=60)
@given(
    shape=st.tuples(*[st.integers(1, 20)] * 3),
    tile=st.tuples(*[st.integers(1, 9)] * 3),
    box=st.tuples(*[st.tuples(st.integers(0, 19), st.integers(1, 20))] * 3),
    overlap=st.sampled_from([0.0, 0.5, 0.75]),
    seed=st.integers(0, 9),
)
def test_rolling_sums_equal_dense_sums(
    shape: tuple[int, int, int], tile: tuple[int, int, int], box: tuple[tuple[int, int], ...], overlap: float, seed: int
) -> None:
    start = tuple(min(a, n - 1) for (a, _), n in zip(box, shape, strict=True))
    stop = tuple(min(a + length, n) for a, (_, length), n in zip(start, box, shape, strict=True))
    block, grid = Box(start, stop), grid_over(shape, Tiling(tile, overlap))
    weights = torch.from_numpy(importance(tile, "gaussian"))
    generator = torch.Generator().manual_seed(seed)
    rolling = RollingAccumulator(block, 2, weights)
    assert rolling.sums.shape == (2, min(tile[0], block.shape[0]), *block.shape[1:])
    dense = np.zeros((2, *block.shape))
    rows: dict[int, np.ndarray] = {}
    for box_of_tile in grid.tiles_over(block):
        logits = torch.randn((2, *tile), generator=generator)
        inside = box_of_tile.clip(block)
        weighted = (logits * weights).double().numpy()
        source = inside.shift(tuple(-a for a in box_of_tile.start)).slices
        target = inside.shift(tuple(-a for a in block.start)).slices
        dense[(slice(None), *target)] += weighted[(slice(None), *source)]
        rows |= {z: sums.numpy().copy() for z, sums in rolling.roll(box_of_tile.start[0])}
        rolling.add(box_of_tile, box_of_tile, logits)
    rows |= {z: sums.numpy().copy() for z, sums in rolling.roll(block.stop[0])}
    assert sorted(rows) == list(range(block.start[0], block.stop[0]))
    assert np.allclose(np.stack([rows[z] for z in sorted(rows)], axis=1), dense, rtol=1e-5, atol=1e-5)


def test_rows_that_no_tile_reaches_are_given_up_empty_or_not_at_all() -> None:
    """A resumed block skips tiles: rows may be passed over, what stays must be right."""
    weights = torch.ones((4, 2, 2))
    rolling = RollingAccumulator(Box((0, 0, 0), (20, 2, 2)), 1, weights)
    first_tile = Box((0, 0, 0), (4, 2, 2))
    rolling.add(first_tile, first_tile, torch.full((1, 4, 2, 2), 3.0))
    first = {z: float(sums.sum()) for z, sums in rolling.roll(12)}
    assert first == dict.fromkeys(range(4), 12.0)
    later = Box((12, 0, 0), (16, 2, 2))
    rolling.add(later, later, torch.full((1, 4, 2, 2), 5.0))
    second = {z: float(sums.sum()) for z, sums in rolling.roll(20)}
    assert second == dict.fromkeys(range(12, 16), 20.0)
    assert float(rolling.sums.abs().sum()) == 0.0
