"""How sure a mean over studies is: bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
AT_ONCE = 1 << 22  # values drawn at once


def bootstrap_interval(values: Sequence[float], level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean (Efron 1979), from RESAMPLES seeded resamples.

    One value has the interval of itself. Raises ValueError for no value.
    """
    given = np.asarray(values, np.float64)
    if given.size == 0:
        raise ValueError("an interval needs at least one value")
    random = np.random.default_rng(seed)
    rows = max(1, AT_ONCE // given.size)
    means = np.concatenate(
        [
            given[random.integers(given.size, size=(min(rows, RESAMPLES - start), given.size))].mean(axis=1)
            for start in range(0, RESAMPLES, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_bootstrap_interval(
    first: Sequence[float | None], second: Sequence[float | None], level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The interval of the mean of first - second: two methods on the same studies, in the same order.

    Studies that lack one of the two are left out. Raises ValueError where the lengths differ or no pair is left.
    """
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    return bootstrap_interval([a - b for a, b in both], level, seed)
