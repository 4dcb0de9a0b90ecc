"""What a scanner adds to a body: noise, cupping and drift, streaks. Each a function of the voxel alone, never of a box.

Noise is white over voxel indices and Gaussian; drift and streaks are smooth functions of patient millimetres.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .lattice import Array, Lattice

FIELD_RADIUS_MM = 200.0
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True)
class Scanner:
    """How strong each is, in HU: the noise's standard deviation; the most that drift adds or takes within 200 mm of the
    middle; the height of one streak where it begins. Scanner(0, 0, 0) shows the body itself.
    """

    noise_hu: float = 12.0
    drift_hu: float = 8.0
    streak_hu: float = 35.0


@dataclass(frozen=True)
class Streak:
    """A bright (sign 1) or dark (-1) ray in both directions through a point, fading over `length` along it, seen over
    `half` mm up and down.
    """

    point: tuple[float, float, float]
    direction: tuple[float, float]
    sign: float
    width: float
    length: float
    half: float

    def over(self, lattice: Lattice) -> Array | None:
        """Its height, from -1 to 1, over voxels; None where no voxel is near enough in z."""
        (x, y, z), (u, v) = self.point, self.direction
        up = lattice.linear((0.0, 0.0, 1 / self.half), -z / self.half)[0]
        shown = np.maximum(1 - up * up, 0)
        if not shown.any():
            return None
        aside = lattice.linear((v / self.width, -u / self.width, 0.0), (u * y - v * x) / self.width)[0]
        along = lattice.linear((u / self.length, v / self.length, 0.0), -(u * x + v * y) / self.length)[0]
        bump = np.maximum(1 - aside * aside, 0)
        height: Array = (self.sign * bump * bump / (1 + along * along)) * shown
        return height


@dataclass(frozen=True)
class Artefacts:
    """The drift's polynomial, sum of linear and quadratic terms of p / 200 mm, and the streaks of one scan."""

    linear: tuple[float, float, float]
    quadratic: tuple[float, float, float]
    streaks: tuple[Streak, ...]

    def add(self, hu: Array, lattice: Lattice, scanner: Scanner) -> None:
        """Add drift and streaks to `hu` (z,y,x) in place."""
        if scanner.drift_hu:
            for axis in range(3):
                row = [0.0, 0.0, 0.0]
                row[axis] = 1 / FIELD_RADIUS_MM
                u = lattice.linear(row, 0.0)[0]
                hu += (scanner.drift_hu * u) * (self.linear[axis] + self.quadratic[axis] * u)
        if scanner.streak_hu:
            for streak in self.streaks:
                height = streak.over(lattice)
                if height is not None:
                    hu += scanner.streak_hu * height


def draw_artefacts(draw: random.Random, dense: Sequence[tuple[float, float, float]]) -> Artefacts:
    """Draw the artefacts of a scan; streaks go through the points `dense`, where bones are."""
    weights = [draw.uniform(-1, 1) for _ in range(6)]
    total = sum(map(abs, weights))
    a, b, c, d, e, f = (w / total for w in weights)
    streaks = []
    for number in range(12):
        angle = draw.uniform(0, math.pi)
        streaks.append(
            Streak(
                point=draw.choice(dense),
                direction=(math.cos(angle), math.sin(angle)),
                sign=(-1.0) ** number,
                width=draw.uniform(3, 8),
                length=draw.uniform(40, 90),
                half=draw.uniform(8, 30),
            )
        )
    return Artefacts((a, b, c), (d, e, f), tuple(streaks))


def noise(seed: int, start: Sequence[int], stop: Sequence[int]) -> NDArray[np.float32]:
    """Standard normal numbers of the voxels from index `start` to `stop` (z,y,x), each a hash of seed, z, y and x.

    SplitMix64 (Steele et al., OOPSLA 2014) gives every row a key and every voxel of the row its place in the sequence
    from that key; the top 16 bits of a number choose a quantile of the normal distribution.
    """
    z, y, x = (np.arange(a, b, dtype=np.uint64) for a, b in zip(start, stop, strict=True))
    key = _splitmix(np.array(seed % 2**64, np.uint64), z)[:, None]
    key = _splitmix(key, y[None, :])[:, :, None]
    numbers: NDArray[np.float32] = _quantiles()[_splitmix(key, x[None, None, :]) >> np.uint64(48)]
    return numbers


def _splitmix(key: NDArray[np.uint64], counter: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Number `counter` (from 0) of the SplitMix64 sequence that begins at `key`."""
    h = key + (counter + np.uint64(1)) * np.uint64(_GOLDEN)
    h ^= h >> np.uint64(30)
    h *= _MIX[0]
    h ^= h >> np.uint64(27)
    h *= _MIX[1]
    h ^= h >> np.uint64(31)
    return h


@cache
def _quantiles() -> NDArray[np.float32]:
    """65,536 evenly spread quantiles of the normal distribution, brought to variance 1."""
    from scipy.special import ndtri

    q = ndtri((np.arange(2**16) + 0.5) / 2**16)
    scaled: NDArray[np.float32] = (q / np.sqrt((q * q).mean())).astype(np.float32)
    return scaled
