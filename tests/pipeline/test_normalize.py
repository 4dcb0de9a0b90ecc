"""Every kind of normalisation against numpy's formula, and against MONAI where it has the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from block_helpers import model_of
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.transforms import NormalizeIntensity, ScaleIntensityRange

from pipeline.normalize import IDENTITY, Affine, normalizers
from pipeline.statistics import ChannelSums

DTYPES = [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.float32, np.float64]


def normalized(voxels: np.ndarray, entries: list[dict[str, Any]]) -> np.ndarray:
    """`voxels` (c, z, y, x) as a card with these `normalize` entries makes them."""
    card = model_of(channels=len(voxels), normalize=entries).card
    channels = []
    for channel in voxels:
        sums = ChannelSums(channel.dtype, 4)
        sums.add(channel)
        channels.append(sums.finish())
    out = np.full(voxels.shape, np.nan, np.float32)
    for c, normalize in enumerate(normalizers(card.normalize, channels)):
        normalize(voxels[c], out[c])
    return out


def sample(dtype: Any, seed: int = 0, channels: int = 1) -> np.ndarray:
    """Voxels over much of a type's range, a third of them 0."""
    rng = np.random.default_rng(seed)
    values = rng.normal(60, 30, (channels, 9, 10, 11))
    values[rng.random(values.shape) < 1 / 3] = 0
    return np.clip(values, -128, 127).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zscore(dtype: Any) -> None:
    voxels = sample(dtype)
    out = normalized(voxels, [{"kind": "zscore"}])
    wide = voxels.astype(np.float64)
    assert np.allclose(out, (wide - wide.mean()) / wide.std(), rtol=1e-6, atol=1e-6)
    monai = NormalizeIntensity(channel_wise=True)(voxels.astype(np.float32))
    assert np.allclose(out, np.asarray(monai), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zscore_nonzero(dtype: Any) -> None:
    voxels = sample(dtype)
    out = normalized(voxels, [{"kind": "zscore_nonzero"}])
    wide = voxels.astype(np.float64)
    inside = wide[wide != 0]
    assert np.allclose(out, np.where(wide != 0, (wide - inside.mean()) / inside.std(), 0), rtol=1e-6, atol=1e-6)
    assert (out[voxels == 0] == 0).all()
    monai = NormalizeIntensity(nonzero=True, channel_wise=True)(voxels.astype(np.float32))
    assert np.allclose(out, np.asarray(monai), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64])
def test_ct(dtype: Any) -> None:
    voxels = np.random.default_rng(1).normal(0, 800, (1, 8, 9, 10)).astype(dtype)
    out = normalized(voxels, [{"kind": "ct", "lower": -970.5, "upper": 720.0, "mean": 85.2, "std": 169.7}])
    assert np.allclose(out, (np.clip(voxels.astype(np.float64), -970.5, 720) - 85.2) / 169.7, rtol=1e-6, atol=1e-6)
    assert out.min() == pytest.approx((-970.5 - 85.2) / 169.7)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    ("given_range", "to"),
    [((-57.0, 164.0), (0.0, 1.0)), ((0.0, 255.0), (-1.0, 1.0)), ((10.0, 90.0), (1.0, 0.0)), ((0.0, 50.0), (3.0, 3.0))],
)
def test_scale_is_monais(given_range: tuple[float, float], to: tuple[float, float], clip: bool) -> None:
    voxels = np.random.default_rng(2).normal(60, 120, (1, 8, 9, 10)).astype(np.float32)
    out = normalized(voxels, [{"kind": "scale", "from": list(given_range), "to": list(to), "clip": clip}])
    line = (voxels - given_range[0]) / (given_range[1] - given_range[0]) * (to[1] - to[0]) + to[0]
    low, high = sorted(to)
    assert np.allclose(out, np.clip(line, low, high) if clip else line, rtol=1e-5, atol=1e-5)
    if to[0] < to[1]:
        monai = ScaleIntensityRange(*given_range, *to, clip=clip)(voxels)
        assert np.allclose(out, np.asarray(monai), rtol=1e-5, atol=1e-5)
    if clip:
        assert out.min() >= low
        assert out.max() <= high


def test_scale_from_high_to_low() -> None:
    voxels = np.array([-5, 0, 50, 100, 120], np.float32).reshape(1, 1, 1, 5)
    out = normalized(voxels, [{"kind": "scale", "from": [100.0, 0.0], "to": [0.0, 1.0], "clip": True}])
    assert out.ravel().tolist() == [1.0, 1.0, 0.5, 0.0, 0.0]


def test_imagenet() -> None:
    voxels = np.random.default_rng(3).integers(0, 256, (3, 4, 8, 8)).astype(np.uint8)
    out = normalized(voxels, [{"kind": "imagenet"}])
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (voxels / 255 - mean[:, None, None, None]) / std[:, None, None, None]
    assert np.allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_none_changes_nothing(dtype: Any) -> None:
    voxels = sample(dtype)
    assert np.array_equal(normalized(voxels, [{"kind": "none"}]), voxels.astype(np.float32))


def test_each_channel_has_its_own_entry_and_its_own_statistics() -> None:
    voxels = sample(np.float32, channels=3)
    voxels[1] *= 7
    shared = normalized(voxels, [{"kind": "zscore"}])
    assert np.allclose(shared.mean(axis=(1, 2, 3)), 0, atol=1e-5)
    assert np.allclose(shared.std(axis=(1, 2, 3)), 1, atol=1e-5)
    entries = [{"kind": "none"}, {"kind": "zscore"}, {"kind": "zscore_nonzero"}]
    mixed = normalized(voxels, entries)
    for c, entry in enumerate(entries):
        assert np.array_equal(mixed[c], normalized(voxels[c : c + 1], [entry])[0])


@pytest.mark.parametrize("kind", ["zscore", "zscore_nonzero"])
@given(value=st.floats(-1e6, 1e6, width=32), dtype=st.sampled_from([np.float32, np.float64, np.int16, np.int32]))
def test_an_image_of_one_value_becomes_zero(kind: str, value: float, dtype: Any) -> None:
    if np.dtype(dtype).kind == "i":
        value = float(np.clip(value, -30_000, 30_000))
    voxels = np.full((1, 5, 7, 9), value).astype(dtype)
    assert np.array_equal(normalized(voxels, [{"kind": kind}]), np.zeros(voxels.shape, np.float32))


def test_an_image_of_zeros_stays_zero() -> None:
    voxels = np.zeros((1, 4, 4, 4), np.int16)
    assert not normalized(voxels, [{"kind": "zscore_nonzero"}]).any()
    assert not normalized(voxels, [{"kind": "zscore"}]).any()


@given(
    row=hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(-1e6, 1e6)),
    cut=st.integers(0, 40),
    affine=st.builds(Affine, st.floats(-1e3, 1e3), st.floats(0.01, 1e3), st.floats(-5, 5)),
)
def test_a_voxel_is_the_same_in_whatever_row_it_is_normalised(row: np.ndarray, cut: int, affine: Affine) -> None:
    whole, parts = np.empty(row.shape, np.float32), np.empty(row.shape, np.float32)
    affine(row, whole)
    affine(row[:cut], parts[:cut])
    affine(row[cut:], parts[cut:])
    assert whole.tobytes() == parts.tobytes()


def test_identity_is_no_arithmetic() -> None:
    big = np.array([2**31 - 1, -(2**31)], np.int32)
    out = np.empty(2, np.float32)
    IDENTITY(big, out)
    assert out.tolist() == [2.0**31, -(2.0**31)]
