"""What stored numbers become: the type of a slab, slope and intercept, and the refusal of NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StudyError

INTEGERS = tuple(np.dtype(name) for name in ("uint8", "int8", "uint16", "int16", "int32"))


def slab_dtype(stored: np.dtype[Any], slope: float, inter: float) -> np.dtype[Any]:
    """The smallest type that holds every value `stored * slope + inter` exactly as float64 gives it.

    The stored type itself when nothing is scaled; an integer type up to int32 when the factors are whole and
    the whole range of the stored type fits; float32 for integers of up to 16 bits when every single value
    fits; float64 otherwise. It depends on the types and factors alone, never on the voxels.
    """
    if (slope, inter) == (1.0, 0.0):
        return stored.newbyteorder("=")
    if stored.kind in "iu":
        info = np.iinfo(stored)
        if slope.is_integer() and inter.is_integer() and abs(inter) < 2**52:  # float64 is exact all the way
            ends = sorted(int(v) * int(slope) + int(inter) for v in (info.min, info.max))
            for candidate in INTEGERS:
                limits = np.iinfo(candidate)
                if limits.min <= ends[0] and ends[1] <= limits.max:
                    return candidate
        if stored.itemsize <= 2:
            values = _scaled(np.arange(info.min, info.max + 1), slope, inter)
            with np.errstate(over="ignore"):
                if np.array_equal(values.astype(np.float32).astype(np.float64), values):
                    return np.dtype(np.float32)
    return np.dtype(np.float64)


def _scaled(values: NDArray[Any], slope: float, inter: float) -> NDArray[np.float64]:
    """nibabel's arithmetic: float64, two roundings, and no adding of a zero (which would lose -0.0)."""
    out = values.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        if slope != 1.0:
            out *= slope
        if inter != 0.0:
            out += inter
    return out


def convert(raw: NDArray[Any], slope: float, inter: float) -> NDArray[Any]:
    """Stored numbers (z, y, x) of either byte order as slab numbers; works in place where it can."""
    target = slab_dtype(raw.dtype, slope, inter)
    if (slope, inter) == (1.0, 0.0):
        return raw if raw.dtype.isnative else raw.byteswap(inplace=True).view(target)
    out = np.empty(raw.shape, target)
    for z in range(len(raw)):  # one plane of float64 at a time, not a slab of them
        out[z] = _scaled(raw[z], slope, inter)
    return out


def check_finite(slab: NDArray[Any], first_row: int) -> None:
    """Refuse NaN and infinite voxels of a slab (c, z, y, x) whose z starts at `first_row`."""
    if slab.dtype.kind != "f":
        return
    bad, first = 0, ""
    for z in range(slab.shape[1]):
        for c in range(slab.shape[0]):
            finite = np.isfinite(slab[c, z])
            count = finite.size - int(np.count_nonzero(finite))
            if count and not bad:
                y, x = np.argwhere(~finite)[0]
                channel = f" of channel {c}" if slab.shape[0] > 1 else ""
                first = f"voxel z={first_row + z}, y={y}, x={x}{channel}"
            bad += count
    if bad:
        last = first_row + slab.shape[1] - 1
        raise StudyError(
            "input",
            f"{bad:,} voxels of rows {first_row} to {last} are NaN or infinite, the first is {first}; "
            "replace them with a finite value",
        )


def check_volume_size(shape: Sequence[int], most: int) -> None:
    """Refuse shapes with an axis of no voxels, or more voxels than any scan has."""
    shown = " x ".join(str(n) for n in shape)
    if any(n < 1 for n in shape):
        raise StudyError("input", f"its size is {shown}: it has no voxels")
    if math.prod(shape) > most:
        raise StudyError("input", f"the header claims {shown} voxels, more than any scan has; the header is damaged")
