"""The type of a slab: the smallest that loses nothing."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.sources.voxels import convert, slab_dtype


@pytest.mark.parametrize(
    ("stored", "slope", "inter", "expected"),
    [
        ("<i2", 1, 0, "i2"),
        (">i2", 1, 0, "i2"),
        (">f8", 1, 0, "f8"),
        ("<i8", 1, 0, "i8"),
        ("<u2", 1, -1024, "i4"),
        ("<i2", 1, -1024, "i4"),
        ("<u1", 1, -128, "i1"),
        ("<u1", 1, 1, "u2"),
        ("<u1", -1, 255, "u1"),
        ("<u1", 257, 0, "u2"),
        ("<u1", 0.0, 7, "u1"),
        ("<u4", 1, -(2.0**31), "i4"),
        ("<i4", 2, 0, "f8"),
        ("<i2", 2.0**20, 0, "f4"),
        ("<i2", 0.5, 0, "f4"),
        ("<u2", 2.0**-10, 1, "f4"),  # (v + 1024) / 1024: 17 bits, of float32's 24
        ("<u2", 2.0**-10, 2.0**20, "f8"),  # 31 bits
        ("<u1", 0.25, -3, "f4"),
        ("<i2", 0.1, 0, "f8"),
        ("<i2", 1, 1e300, "f8"),
        ("<u1", 2.0**200, 0, "f8"),
        ("<i4", 0.5, 0, "f8"),
        ("<f4", 2, 0, "f8"),
        ("<f4", 1, 1, "f8"),
    ],
)
def test_slab_dtype(stored: str, slope: float, inter: float, expected: str) -> None:
    assert slab_dtype(np.dtype(stored), float(slope), float(inter)) == np.dtype(expected)


@pytest.mark.parametrize("stored", ["<u1", ">i1", "<i2", ">u2"])
@pytest.mark.parametrize(
    ("slope", "inter"),
    [(1, 0), (3, -7), (-2, 0), (0.5, 0.25), (0.1, 0), (1, 0.1), (1e-3, -1e5), (2.0**-149, 0)],
)
def test_every_value_of_a_type_is_exact(stored: str, slope: float, inter: float) -> None:
    info = np.iinfo(stored)
    values = np.arange(info.min, info.max + 1).astype(stored).reshape(-1, 16, 4)
    expected = values.astype(np.float64) * slope + inter
    out = convert(values.copy(), float(slope), float(inter))
    assert out.dtype == slab_dtype(np.dtype(stored), float(slope), float(inter))
    assert np.array_equal(out.astype(np.float64), expected)


def test_whole_factors_beyond_float32_stay_exact() -> None:
    values = np.array([[[0, 65535]]], np.uint16)
    assert convert(values, 32768.0, -1073741824.0).tolist() == [[[-1073741824, 1073709056]]]
    assert convert(values, 32768.0, -1073741824.0).dtype == np.int32
