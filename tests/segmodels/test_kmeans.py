"""k-means: optimal enough, deterministic, exact when predicted."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2

import segmodels
from segmodels import ModelError
from segmodels.kmeans import KMeans, fit, floor32
from segmodels.predictor import make_predictor
from segmodels.runtime import resolve_runtime

Floats = NDArray[np.float64]
histograms = st.dictionaries(st.integers(-1000, 1000), st.integers(1, 10**6), min_size=1, max_size=40)


class Statistics:
    def __init__(self, values: Floats, counts: NDArray[np.int64]) -> None:
        self.values, self.counts = values, counts

    def histogram(self) -> tuple[Floats, NDArray[np.int64]]:
        return self.values, self.counts


def arrays(histogram: dict[int, int]) -> tuple[Floats, NDArray[np.int64]]:
    values = np.array(sorted(histogram), np.float64)
    return values, np.array([histogram[int(v)] for v in values], np.int64)


def optimum(v: Floats, w: NDArray[np.int64], k: int) -> float:
    """The least inertia of any k clusters, by dynamic programming over where the last cluster starts."""
    n = len(v)

    def cost(a: int, b: int) -> float:
        mean = np.average(v[a:b], weights=w[a:b])
        return float(np.sum(w[a:b] * (v[a:b] - mean) ** 2))

    best = [cost(0, b) if b else 0.0 for b in range(n + 1)]
    for _ in range(1, min(k, n)):
        best = [0.0] + [min(best[a] + cost(a, b) for a in range(b)) for b in range(1, n + 1)]
    return best[n]


@settings(deadline=None, max_examples=60)
@given(histograms, st.integers(2, 6))
def test_a_fit_is_a_fixed_point_of_lloyd(histogram: dict[int, int], classes: int) -> None:
    v, w = arrays(histogram)
    found = fit(v, w, classes)
    k = min(classes, len(v))
    assert len(found.centroids) == k
    assert (np.diff(found.centroids) > 0).all()
    assert len(found.thresholds) == k - 1
    labels = np.searchsorted(found.thresholds, v, side="left")  # on the threshold: the lower cluster
    assert set(labels) == set(range(k))
    means = [np.average(v[labels == i], weights=w[labels == i]) for i in range(k)]
    np.testing.assert_allclose(found.centroids, means, rtol=1e-12, atol=1e-12)
    inertia = float(np.sum(w * (v - found.centroids[labels]) ** 2))
    assert found.inertia == pytest.approx(inertia, rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.integers(-50, 50), st.integers(1, 1000), min_size=1, max_size=14), st.integers(2, 4))
def test_never_better_than_the_optimum_and_seldom_far(histogram: dict[int, int], classes: int) -> None:
    v, w = arrays(histogram)
    best, found = optimum(v, w, classes), fit(v, w, classes).inertia
    assert best - 1e-6 * (1 + best) <= found <= 1.5 * best + 1e-6


def test_nearly_always_the_optimum() -> None:
    chance = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        v = np.unique(chance.integers(0, 200, 24)).astype(np.float64)
        w = chance.integers(1, 100, len(v))
        hits += fit(v, w, 4).inertia <= optimum(v, w, 4) * (1 + 1e-9)
    assert hits >= 57


def test_at_least_as_good_as_scipys() -> None:
    chance = np.random.default_rng(1)
    samples = np.concatenate([chance.normal(m, s, 500) for m, s in ((0, 5), (40, 8), (90, 4), (200, 30))]).round()
    v, w = np.unique(samples, return_counts=True)
    for k in (2, 3, 4, 8):
        centroids, labels = kmeans2(samples, k, minit="++", rng=np.random.default_rng(k), iter=100)
        theirs = float(np.sum((samples - centroids[labels]) ** 2))
        assert fit(v, w, k).inertia <= theirs * (1 + 1e-9)


def test_clear_clusters_are_found() -> None:
    found = fit([0, 1, 2, 100, 101, 500], [10, 20, 10, 5, 5, 1], 3)
    assert found.centroids.tolist() == [1.0, 100.5, 500.0]
    assert found.thresholds.tolist() == [50.75, 300.25]


@settings(deadline=None, max_examples=25)
@given(histograms, st.integers(2, 5), st.integers(-8, 8), st.integers(-4096, 4096))
def test_scaling_and_shifting_intensities_changes_no_label(
    histogram: dict[int, int], classes: int, power: int, shift: int
) -> None:
    # Both are exact in float64 here, so the same starts are drawn and every comparison has the same outcome.
    v, w = arrays(histogram)
    one, two = fit(v, w, classes), fit(v * 2.0**power, w, classes)
    np.testing.assert_array_equal(two.centroids, one.centroids * 2.0**power)
    moved = fit(v + shift, w, classes)
    np.testing.assert_allclose(moved.centroids, one.centroids + shift, rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(histograms, st.integers(2, 5))
def test_zero_counts_change_nothing(histogram: dict[int, int], classes: int) -> None:
    v, w = arrays(histogram)
    gaps = np.arange(-1001.5, 1001.5)
    v2 = np.concatenate([v, gaps])
    order = np.argsort(v2)
    padded = fit(v2[order], np.concatenate([w, np.zeros(len(gaps), np.int64)])[order], classes)
    np.testing.assert_array_equal(padded.centroids, fit(v, w, classes).centroids)


def test_the_same_bits_in_another_process() -> None:
    code = (
        "import numpy as np; from segmodels.kmeans import fit; r = np.random.default_rng(3);"
        "print(fit(np.arange(5000.) ** 1.5, r.integers(0, 9, 5000), 6).thresholds.tobytes().hex())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    here = fit(np.arange(5000.0) ** 1.5, np.random.default_rng(3).integers(0, 9, 5000), 6).thresholds
    assert runs[0] == runs[1] == here.tobytes().hex() + "\n"


@pytest.mark.parametrize("classes", [2, 16, 255])
def test_fast_at_full_size(classes: int) -> None:
    v = np.arange(65_536, dtype=np.float64)
    w = np.random.default_rng(0).integers(0, 10_000, 65_536)
    start = time.process_time()
    found = fit(v, w, classes)
    assert time.process_time() - start < 5  # a quarter of a second on an idle core
    assert len(found.centroids) == classes


@pytest.mark.parametrize("span", [1e-30, 1.0, 3e38])
def test_extreme_ranges(span: float) -> None:
    v = np.linspace(-span, span, 1000)
    found = fit(v, np.full(1000, 10**9), 4)
    np.testing.assert_allclose(found.centroids / span, [-0.75, -0.25, 0.25, 0.75], atol=0.01)


@pytest.mark.parametrize(
    ("values", "counts", "words"),
    [
        ([1, 2], [1], "as many counts as values"),
        ([2, 1], [1, 1], "ascending"),
        ([1, np.nan], [1, 1], "within float32"),
        ([1, np.inf], [1, 1], "within float32"),
        ([1, 1e39], [1, 1], "within float32"),
        ([], [], "without voxels"),
        ([1, 2], [0, 0], "without voxels"),
        ([1, 2], [1, -1], "negative counts"),
    ],
    ids=range(8),
)
def test_what_is_no_histogram(values: list[float], counts: list[int], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        fit(np.array(values, np.float64), np.array(counts, np.int64), 3)


def fitted(values: Floats, counts: NDArray[np.int64], classes: int) -> KMeans:
    return KMeans(classes, "cpu", 1).fit(Statistics(values, counts))


@settings(deadline=None, max_examples=40)
@given(histograms, st.integers(2, 6))
def test_prediction_is_one_hot_and_absent_classes_never_win(histogram: dict[int, int], classes: int) -> None:
    v, w = arrays(histogram)
    predictor = fitted(v, w, classes)
    x = torch.from_numpy(np.resize(v, (2, 1, 3, 4, 5)).astype(np.float32))
    logits = predictor.predict(x)
    assert (logits.shape, logits.dtype) == ((2, classes, 3, 4, 5), torch.float32)
    assert torch.equal(logits.sum(1), torch.ones(2, 3, 4, 5))
    assert set(logits.unique().tolist()) <= {0.0, 1.0}
    expected = np.searchsorted(fit(v, w, classes).thresholds, x[:, 0].numpy().astype(np.float64), side="left")
    np.testing.assert_array_equal(logits.argmax(1).numpy(), expected)
    assert int(logits.argmax(1).max()) < len(v)


def test_a_value_on_the_threshold_belongs_to_the_lower_cluster() -> None:
    predictor = fitted(np.array([0.0, 2.0]), np.array([1, 1]), 2)
    x = torch.tensor([0.0, 1.0, np.nextafter(np.float32(1), np.float32(2)), 2.0]).reshape(1, 1, 1, 1, 4)
    assert predictor.predict(x).argmax(1).flatten().tolist() == [0, 0, 1, 1]


@given(st.floats(-3.4e38, 3.4e38), st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_rounding_a_threshold_down_changes_no_comparison(threshold: float, voxel: float) -> None:
    rounded = floor32(np.array([threshold]))[0]
    assert (np.float64(voxel) > threshold) == (np.float32(voxel) > rounded)


def test_the_built_in_model() -> None:
    model = segmodels.load("kmeans")
    assert model.network is None
    assert model.source == "kmeans"
    card = model.card
    assert (card.name, card.axes, card.channels, card.tile, card.overlap) == (
        "kmeans", "zyx", ("any",), (64, 128, 128), 0.0,
    )  # fmt: skip
    assert card.stitch == ("constant", "gaussian", "exact")
    assert [n.kind for n in card.normalize] == ["none"]
    assert {k: v.name for k, v in card.labels.items()} == {"1": "class 1", "2": "class 2", "3": "class 3"}
    assert len({segmodels.load("kmeans", classes=k).hash for k in (2, 3, 255)}) == 3
    assert segmodels.load("kmeans", classes=4).hash == model.hash
    for wrong in (0, 1, 256, True, "4", 4.0):
        with pytest.raises(ModelError, match="classes from 2 to 255"):
            segmodels.load("kmeans", classes=wrong)  # type: ignore[arg-type]


def test_the_predictor_must_be_fitted_and_leaves_the_original_alone() -> None:
    model = segmodels.load("kmeans", classes=3)
    predictor = make_predictor(model, resolve_runtime(model, threads=1, precision="bf16"))
    assert (predictor.channels, predictor.classes, predictor.margin) == (1, 3, (0, 0, 0))
    x = torch.arange(8.0).reshape(1, 1, 2, 2, 2)
    statistics = Statistics(np.arange(8.0), np.ones(8, np.int64))
    assert predictor.fit(statistics).predict(x).shape == (1, 3, 2, 2, 2)
    with pytest.raises(ModelError, match="call fit"):
        predictor.predict(x)
    with pytest.raises(ModelError, match=r"expected \(N, 1, Z, Y, X\)"):
        predictor.fit(statistics).predict(x[0])
