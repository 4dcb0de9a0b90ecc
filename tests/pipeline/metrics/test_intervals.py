"""Bootstrap intervals: against scipy's other methods and the normal law, and what must always hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap

from pipeline.metrics.intervals import bootstrap_interval, paired_bootstrap_interval

FLOATS = st.floats(-1e6, 1e6, allow_nan=False)


def test_it_is_the_normal_interval_of_a_normal_mean() -> None:
    values = np.random.default_rng(0).normal(10, 2, 400)
    half = 1.959964 * values.std() / math.sqrt(400)
    low, high = bootstrap_interval(values.tolist())
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    narrow = bootstrap_interval(values.tolist(), level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_it_is_scipys_percentile_bootstrap() -> None:
    """Of values that lean, with other random numbers."""
    values = np.append(np.linspace(0.9, 0.99, 30), [0.2, 0.5])
    found = bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(1))
    assert bootstrap_interval(values.tolist()) == pytest.approx(tuple(found.confidence_interval), abs=0.004)


@pytest.mark.slow
def test_it_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    truth = 8 / 9
    hits = 0
    for _ in range(600):
        low, high = bootstrap_interval(rng.beta(8, 1, 100).tolist())
        hits += low <= truth <= high
    assert hits / 600 == pytest.approx(0.94, abs=0.03)


@settings(max_examples=40)
@given(values=st.lists(FLOATS, min_size=2, max_size=30), seed=st.integers(0, 5))
def test_it_lies_among_the_values_and_is_the_same_again(values: list[float], seed: int) -> None:
    low, high = bootstrap_interval(values, seed=seed)
    rounding = 1e-9 * max(map(abs, values))  # of the means
    assert min(values) - rounding <= low <= high <= max(values) + rounding
    assert bootstrap_interval(values, seed=seed) == (low, high)


@pytest.mark.parametrize(("offset", "scale"), [(7, 0.1), (-1000, 10), (0, 1e-9)])
def test_units_do_not_matter(offset: float, scale: float) -> None:
    values = np.random.default_rng(2).gamma(2, 1, 25)
    low, high = bootstrap_interval(values.tolist())
    moved = bootstrap_interval((offset + scale * values).tolist())
    assert moved == pytest.approx((offset + scale * low, offset + scale * high), rel=1e-9, abs=0)


def test_few_values() -> None:
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])
    assert bootstrap_interval([0.7]) == (0.7, 0.7)
    assert bootstrap_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


def test_pairs_are_kept_together() -> None:
    """Two methods that differ by little on cases that differ by much."""
    rng = np.random.default_rng(0)
    cases = rng.uniform(0.3, 0.95, 50)
    first, second = cases + 0.02 + rng.normal(0, 0.01, 50), cases
    low, high = paired_bootstrap_interval(first.tolist(), second.tolist())
    assert 0.01 < low < 0.02 < high < 0.03
    assert (low, high) == bootstrap_interval((first - second).tolist())
    with_gaps = paired_bootstrap_interval([*first, None, 0.5], [*second, 0.1, None])
    assert with_gaps == (low, high)
    with pytest.raises(ValueError, match="shorter"):
        paired_bootstrap_interval([0.1, 0.2], [0.1])
