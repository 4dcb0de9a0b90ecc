"""How unsure a model is of each structure: sums per label shard, taken where a row of sums becomes labels.

entropy: of the probabilities that the stitched logits stand for, in [0, 1]. Softmax: Shannon entropy over the K classes
divided by ln K. Sigmoid: binary entropy of the probability of the voxel's own label divided by ln 2. disagreement: of
the members and flips of a predictor, in [0, 1] (see `segmodels.predictor.disagreement`), stitched as logits are.

A model without a network (kmeans) has no probabilities, one without members and flips no disagreement.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .grid import Box, Shards, Triple

if TYPE_CHECKING:
    import torch

    from segmodels import Card, Model
    from segmodels.predictor import Predictor

MEASURES = ("entropy", "disagreement")
CHUNK = 1 << 17  # logits looked at together, or one line of them: two arrays of 512 KiB

# Sums of each measure over the voxels of a label: {"entropy": {1: 12.5, 2: 0.75}}.
LabelSums = Mapping[str, Mapping[int, float]]


def measures_of(model: Model, predictor: Predictor) -> tuple[str, ...]:
    """The measures that this predictor has."""
    return () if model.network is None else MEASURES[: 1 + predictor.disagreement]


class UncertaintySums:
    """Sums over the shards of a block, added up row by row. A voxel's share depends on its logits alone, and a
    shard's sums on its rows in their order: they are the same whatever the block is.
    """

    def __init__(
        self, measures: Sequence[str], card: Card, shards: Shards, missing: Sequence[Triple], box: Box
    ) -> None:
        self.measures, self.card, self.box = measures, card, box
        self.depth = shards.shard[0]
        self.places: dict[int, list[tuple[Triple, slice, slice]]] = defaultdict(list)  # by row of shards
        for index in missing:
            _, y, x = shards.box(index).shift((0, -box.start[1], -box.start[2])).slices
            self.places[index[0]].append((index, y, x))
        self.sums: dict[Triple, dict[str, dict[int, float]]] = {}

    def add_row(self, z: int, fields: torch.Tensor, labels: torch.Tensor) -> None:
        """Add row `z` of the block: what `RollingAccumulator` yields (classes, [disagreement,] weights; y, x) and the
        labels (y, x) that were made of it."""
        if not self.measures or not bool(labels.any()):
            return
        weights = fields[-1]
        logits = fields[: -len(self.measures)]
        entropy = softmax_entropy if self.card.activation == "softmax" else self._own_entropy
        rows = {"entropy": entropy(logits, weights, labels).cpu().numpy()}
        if "disagreement" in self.measures:
            rows["disagreement"] = (fields[-2] / weights).cpu().numpy()
        found = labels.cpu().numpy()
        for index, y, x in self.places[z // self.depth]:
            into = self.sums.setdefault(index, {name: defaultdict(float) for name in self.measures})
            for name, row in rows.items():
                # In float64 and in raster order. Where no tile reaches there is no label either: bin 0 is left out.
                totals = np.bincount(found[y, x].ravel(), row[y, x].ravel())
                for label in np.flatnonzero(totals[1:]) + 1:
                    into[name][int(label)] += float(totals[label])

    def take(self, index: Triple) -> LabelSums:
        """The sums of a whole shard, which are then forgotten."""
        return self.sums.pop(index, {name: {} for name in self.measures})

    def _own_entropy(self, logits: torch.Tensor, weights: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Binary entropy (y, x), in units of ln 2, of the probability of each voxel's label."""
        entropy = weights.new_zeros(weights.shape)
        for channel, label in enumerate(self.card.labels):
            where = labels == int(label)
            entropy[where] = binary_entropy(logits[channel][where] / weights[where])
        return entropy


def softmax_entropy(logits: torch.Tensor, weights: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Entropy (y, x) in units of ln K where `labels` (y, x) are not 0; elsewhere it may be anything.

    logits: (K, y, x), each the sum over tiles of logit times weight; weights: (y, x), the sum of those weights.
    """
    classes, height, width = logits.shape
    entropy = weights.new_zeros(height, width)
    lines = max(1, CHUNK // (classes * width))
    for top in range(0, height, lines):
        y = slice(top, top + lines)
        columns = labels[y].any(0).nonzero()
        if not len(columns):
            continue
        # A box around what is labelled: gathering single voxels takes longer than all the rest.
        x = slice(int(columns[0]), int(columns[-1]) + 1)
        shifted = logits[:, y, x] / weights[y, x]
        shifted.sub_(shifted.amax(0))
        odds = shifted.exp()
        total = odds.sum(0)
        entropy[y, x] = total.log() - odds.mul_(shifted).sum(0) / total  # -sum p ln p with p = odds / total
    return entropy.div_(math.log(classes)).clamp_(0, 1)


def binary_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy, in units of ln 2, of probabilities given as logits of any shape."""
    size = logits.abs()  # p and 1 - p have one entropy; exp(-size) never overflows
    # exp and log1p give a value the same bits wherever it stands in a tensor; softplus and sigmoid do not at its end.
    odds = (-size).exp()
    return (odds.log1p() + size * odds / (1 + odds)) / math.log(2)
