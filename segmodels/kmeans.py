"""k-means on the intensities of one study: a model without weights that fits itself to what it sees.

k-means++ (Arthur and Vassilvitskii 2007) and Lloyd (1982) on the study's histogram, in float64, from a
fixed seed. In one dimension a cluster is an interval, so a fit is K-1 thresholds and a prediction K-1
comparisons: exact under any tiling and stitching.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from segmodels.card import Card, Label, NetworkRef
from segmodels.errors import ModelError, shorten
from segmodels.kinds import Raw

if TYPE_CHECKING:
    from torch import Tensor

    from segmodels.predictor import Statistics

DEFAULT_CLASSES = 4
SEED = 20_070_107
RESTARTS = 16
LARGEST = float(np.finfo(np.float32).max)
ITERATIONS = 300  # Lloyd needs far fewer on real histograms; this bounds the worst case

DESCRIPTION = f"""\
kmeans: clusters of intensity, fitted to each study; no weights, no training
  paper       Arthur, Vassilvitskii 2007 (k-means++); Lloyd 1982
  dims        3 (axes zyx), one channel of any kind, as stored
  options     classes={DEFAULT_CLASSES}  (2 to 255; labels 0..K-1 by rising mean)
  divisor     1
  margin      0
  halo        0  (every voxel is judged alone)
  parameters  0"""

Floats = NDArray[np.float64]


def card(classes: int = DEFAULT_CLASSES) -> Card:
    """The card of the built-in model with `classes` clusters, 2 to 255. Raises ModelError otherwise."""
    if type(classes) is not int or not 2 <= classes <= 255:
        raise ModelError(f"kmeans takes classes from 2 to 255, got {shorten(classes)}")
    return Card(
        name="kmeans",
        version="1",
        network=NetworkRef(name="kmeans", config={"classes": classes}),
        axes="zyx",
        channels=("any",),
        normalize=(Raw(),),
        tile=(64, 128, 128),
        overlap=0.0,
        stitch=("constant", "gaussian", "exact"),
        activation="softmax",
        labels={str(k): Label(name=f"class {k}") for k in range(1, classes)},
    )


@dataclass(frozen=True)
class Fit:
    """centroids ascending, at most K; thresholds between neighbours; inertia: sum of squared distances."""

    centroids: Floats
    thresholds: Floats
    inertia: float


def fit(values: ArrayLike, counts: ArrayLike, classes: int, *, seed: int = SEED) -> Fit:
    """k-means of a histogram: `values` (n,) ascending and finite, `counts` (n,) whole numbers >= 0.

    The best of several seeded starts. Fewer distinct values than `classes` give one cluster per value. A
    threshold is the middle between two centroids, and a value exactly on it belongs to the lower cluster.
    The same histogram gives the same bits in any process. Raises ModelError for a histogram that is none.
    """
    v, w = _checked(values, counts)
    if len(v) <= classes:
        bounds = np.arange(len(v) + 1)
    else:
        chance = random.Random(seed)
        starts = [_plus_plus(v, w, classes, chance) for _ in range(_restarts(classes))]
        bounds = min((_lloyd(v, w, start) for start in starts), key=lambda b: _inertia(v, w, b))
    centroids = _means(v, w, bounds, exact=True)
    thresholds = centroids[:-1] / 2 + centroids[1:] / 2
    return Fit(centroids, thresholds, _inertia(v, w, bounds))


class KMeans:
    """The predictor: `fit` gives a copy with thresholds, `predict` logits of 1.0 for the cluster, else 0.0.

    Classes beyond the clusters that a study has are 0.0 everywhere and never win.
    """

    channels = 1
    margin = (0, 0, 0)
    disagreement = False

    def __init__(self, classes: int, device: str, threads: int, thresholds: Floats | None = None) -> None:
        self.classes, self.device, self.threads = classes, device, threads
        self.thresholds = thresholds

    def fit(self, statistics: Statistics) -> KMeans:
        values, counts = statistics.histogram()
        return KMeans(self.classes, self.device, self.threads, fit(values, counts, self.classes).thresholds)

    def predict(self, tiles: Tensor) -> Tensor:
        import torch

        from segmodels.predictor import check_tiles, set_threads

        if self.thresholds is None:
            raise ModelError("kmeans fits itself to each study: call fit(statistics) before predict")
        check_tiles(tiles, self.channels, flat=False)
        set_threads(self.threads)
        with torch.inference_mode():
            x = tiles[:, 0].to(self.device, torch.float32).contiguous()
            borders = torch.from_numpy(floor32(self.thresholds)).to(x.device)
            labels = torch.bucketize(x, borders, out_int32=True)
            logits = x.new_empty(x.shape[0], self.classes, *x.shape[1:])
            for k in range(self.classes):
                torch.eq(labels, k, out=logits[:, k])
            return logits


def floor32(thresholds: Floats) -> NDArray[np.float32]:
    """The largest float32 not above each threshold: a float32 is above the one if it is above the other."""
    with np.errstate(over="ignore"):
        near = thresholds.astype(np.float32)
    return np.where(near > thresholds, np.nextafter(near, np.float32(-np.inf)), near)


def _checked(values: ArrayLike, counts: ArrayLike) -> tuple[Floats, Floats]:
    v, n = np.asarray(values, np.float64), np.asarray(counts)
    if v.ndim != 1 or v.shape != n.shape or not (np.abs(v) <= LARGEST).all() or (np.diff(v) <= 0).any():
        raise ModelError(
            f"kmeans got a histogram of shapes {v.shape} and {n.shape}; expected as many counts as "
            "values, the values ascending and within float32"
        )
    if (n < 0).any() or not (n > 0).any():
        raise ModelError("kmeans got a histogram without voxels or with negative counts")
    return v[n > 0], n[n > 0].astype(np.float64)


def _restarts(classes: int) -> int:
    return max(4, min(RESTARTS, 256 // classes))


def _plus_plus(v: Floats, w: Floats, classes: int, chance: random.Random) -> Floats:
    """`classes` distinct values, each drawn by its weighted squared distance from those before it."""
    weights = w
    nearest = np.full(len(v), np.inf)
    chosen: list[float] = []
    for _ in range(classes):
        total = np.cumsum(weights)
        at = int(np.searchsorted(total, chance.random() * total[-1], side="right"))
        if at >= len(v) or weights[at] == 0:  # rounding at the very end of the sum, or all distances underflow
            at = int(np.argmax(np.where(np.isin(v, chosen), -1.0, w)))
        chosen.append(float(v[at]))
        nearest = np.minimum(nearest, (v - v[at]) ** 2)
        weights = w * nearest
    return np.sort(np.array(chosen))


def _lloyd(v: Floats, w: Floats, centroids: Floats) -> NDArray[np.int64]:
    """Bounds of the clusters, v[bounds[k]:bounds[k+1]], once they no longer move; none is empty."""
    bounds = _assign(v, centroids)
    for _ in range(ITERATIONS):
        moved = _assign(v, _means(v, w, bounds))
        if np.array_equal(moved, bounds):
            break
        bounds = moved
    return bounds


def _assign(v: Floats, centroids: Floats) -> NDArray[np.int64]:
    k, n = len(centroids), len(v)
    inner = np.searchsorted(v, centroids[:-1] / 2 + centroids[1:] / 2, side="right")
    bounds = np.concatenate([[0], inner, [n]]).astype(np.int64)
    # An empty cluster takes the value beside it: alone in its cluster a value costs nothing, so this never
    # hurts.
    rank = np.arange(k + 1)
    bounds = np.maximum.accumulate(bounds - rank) + rank
    return np.minimum(bounds, n - (k - rank))


def _means(v: Floats, w: Floats, bounds: NDArray[np.int64], *, exact: bool = False) -> Floats:
    if exact:  # correctly rounded sums: the same bits on any processor
        slices = [slice(a, b) for a, b in pairwise(bounds)]
        return np.array([math.fsum(v[s] * w[s]) / math.fsum(w[s]) for s in slices])
    starts = bounds[:-1]
    return np.add.reduceat(v * w, starts) / np.add.reduceat(w, starts)


def _inertia(v: Floats, w: Floats, bounds: NDArray[np.int64]) -> float:
    distances = v - np.repeat(_means(v, w, bounds), np.diff(bounds))
    return float(np.sum(w * distances**2))
