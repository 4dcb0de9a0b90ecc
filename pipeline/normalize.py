"""Raw voxels to what the network was trained on. One function, the card's words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .statistics import ChannelStatistics

STD_FLOOR = 1e-8
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Affine:
    """y = (clip(x) - shift) / divisor + offset in float64, then float32. `keep_zero`: raw voxels of 0 stay 0."""

    shift: float = 0.0
    divisor: float = 1.0
    offset: float = 0.0
    lower: float | None = None
    upper: float | None = None
    keep_zero: bool = False

    def __call__(self, raw: np.ndarray, out: np.ndarray) -> None:
        """Normalise `raw` (any numeric dtype) into `out` (float32, same shape)."""
        if self == IDENTITY:
            out[...] = raw
            return
        values = raw.astype(np.float64)
        if self.lower is not None or self.upper is not None:
            np.clip(values, self.lower, self.upper, out=values)
        values -= self.shift
        values /= self.divisor
        values += self.offset
        if self.keep_zero:
            values[raw == 0] = 0
        out[...] = values


IDENTITY = Affine()


def normalizers(entries: Sequence[Any], statistics: Sequence[ChannelStatistics]) -> tuple[Affine, ...]:
    """One `Affine` per channel from the card's `normalize` entries (one per channel, or one for all).

    zscore: mean and standard deviation (ddof 0) of the whole channel in its stored spacing, the deviation at least
    1e-8. zscore_nonzero: the same over voxels that are not 0, which stay 0. ct: clip to [lower, upper], then
    (x - mean) / std. scale: the line through (from[0], to[0]) and (from[1], to[1]), clipped to `from` if asked.
    imagenet: x / 255, then ImageNet's mean and deviation of the channel (r, g, b).
    """
    if len(entries) == 1:
        entries = [*entries] * len(statistics)
    return tuple(_affine(entry, channel, i) for i, (entry, channel) in enumerate(zip(entries, statistics, strict=True)))


def _affine(entry: Any, statistics: ChannelStatistics, channel: int) -> Affine:
    match entry.kind:
        case "none":
            return IDENTITY
        case "zscore":
            return Affine(statistics.mean, max(statistics.std, STD_FLOOR))
        case "zscore_nonzero":
            return Affine(statistics.nonzero_mean, max(statistics.nonzero_std, STD_FLOOR), keep_zero=True)
        case "ct":
            return Affine(entry.mean, max(entry.std, STD_FLOOR), 0.0, entry.lower, entry.upper)
        case "scale":
            (a, b), (c, d) = entry.from_, entry.to
            divisor = (b - a) / (d - c) if c != d else math.inf
            low, high = (min(a, b), max(a, b)) if entry.clip else (None, None)
            return Affine(a, divisor, c, low, high)
        case "imagenet":
            return Affine(255 * IMAGENET_MEAN[channel % 3], 255 * IMAGENET_STD[channel % 3])
    raise ValueError(f"unknown normalize kind {entry.kind!r}")
