"""Predictors: tiles in, logits out. The one place where a network runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from segmodels.backends import runner
from segmodels.errors import ModelError

if TYPE_CHECKING:
    from segmodels.folder import Model
    from segmodels.network import Network
    from segmodels.runtime import Runtime


class Statistics(Protocol):
    """What ingest knows of a whole study; predictors that fit themselves read its histogram."""

    def histogram(self) -> Any:
        """(values float64 ascending, counts int64) of channel 0."""


class Predictor(Protocol):
    """Logits of tiles, always of three spatial axes: a 2-D network sees one plane each.

    channels, classes: of the input and of the logits. margin: voxels per side (z, y, x) by which the logits
    are smaller than the tile. disagreement: whether a channel of that follows the logits (see `disagreement`).
    """

    channels: int
    classes: int
    margin: tuple[int, int, int]
    disagreement: bool

    def fit(self, statistics: Statistics) -> Predictor:
        """This predictor for one study: itself, or a copy fitted to the study's statistics."""

    def predict(self, tiles: Tensor) -> Tensor:
        """(N, channels, Z, Y, X) float32 -> (N, classes + disagreement, Z-2m, Y-2m, X-2m) float32 on the device."""


def make_predictor(model: Model, runtime: Runtime, *, mirroring: bool = True) -> Predictor:
    """The predictor of `model` under `runtime`, mirrored over the card's mirror_axes unless `mirroring` is False.

    Raises ModelError if this machine cannot give that runtime.
    """
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("the runtime was resolved for a GPU (cuda) and this process sees none")
    if model.network is None:
        from segmodels.kmeans import KMeans

        return KMeans(classes=len(model.card.labels) + 1, device=runtime.device, threads=runtime.threads)
    card = model.card
    # The card's axes are the last ones of a tile (N, C, Z, Y, X).
    mirrored = [5 - len(card.axes) + axis for axis in card.mirror_axes] if mirroring else []
    return NetworkPredictor(model.network, runtime, mirrored, card.activation)


class NetworkPredictor:
    """A network in eval mode on the runtime's device: the mean of the logits over its members and over flips.

    mirrored: axes of a tile (N, C, Z, Y, X) over which it is flipped, in all 2^n combinations: flipped, predicted,
    flipped back. Every flip of every member runs by itself and is added in one order: flips as `flips` lists them, in
    each the members in theirs. Logits and not probabilities are averaged, as nnU-Net does (Isensee et al. 2021).

    With a fixed batch and thread count the logits of a tile are the same bits whatever its place in the
    batch and whatever the other tiles are (tests/segmodels/test_predictor.py tries it for every network and
    normalisation). They do change with the batch, so tiles always run in batches of exactly runtime.batch,
    the last one filled up with zeros. A flip changes neither the batch nor the layout of a tile.
    """

    def __init__(
        self, network: Network, runtime: Runtime, mirrored: Sequence[int] = (), activation: str = "softmax"
    ) -> None:
        self.runtime = runtime
        self.flips, self.activation = flips(mirrored), activation
        self.device = torch.device(runtime.device)
        network = network.to(self.device).eval()
        self.members = [runner(member, runtime) for member in network.parts]
        self.channels, self.classes, self.dims = network.in_channels, network.classes, network.dims
        m = network.margin
        self.margin = (0, m, m) if self.dims == 2 else (m, m, m)
        self.disagreement = len(self.flips) * len(self.members) > 1
        set_threads(runtime.threads)

    def fit(self, statistics: Statistics) -> NetworkPredictor:
        return self

    def predict(self, tiles: Tensor) -> Tensor:
        check_tiles(tiles, self.channels, flat=self.dims == 2)
        set_threads(self.runtime.threads)
        batches = [self._batch(part) for part in torch.split(tiles, self.runtime.batch)]
        return batches[0] if len(batches) == 1 else torch.cat(batches)

    def _batch(self, tiles: Tensor) -> Tensor:
        n = tiles.shape[0]
        full = tiles.to(self.device, torch.float32)
        if n < self.runtime.batch:
            full = torch.cat([full, full.new_zeros(self.runtime.batch - n, *full.shape[1:])])
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False),
        ):
            answers = self._answers(full)
            return (self._consensus(answers) if self.disagreement else next(answers))[:n]

    def _answers(self, tiles: Tensor) -> Iterator[Tensor]:
        """The logits (N, classes, Z, Y, X) of every flip and member; what is yielded may be written over."""
        for flip in self.flips:
            seen = tiles.flip(flip) if flip else tiles
            # One memory layout whatever view came in: kernels are chosen by it.
            seen = (seen.squeeze(2) if self.dims == 2 else seen).contiguous()
            for member in self.members:
                logits = member(seen)
                logits = logits.unsqueeze(2) if self.dims == 2 else logits
                yield logits.flip(flip) if flip else logits

    def _consensus(self, answers: Iterator[Tensor]) -> Tensor:
        """Mean logits, and after them their disagreement."""
        first = next(answers)
        n, _, *space = first.shape
        both = first.new_empty(n, self.classes + 1, *space)
        mean, mean_partition = both[:, :-1], both[:, -1]
        mean.copy_(first)
        mean_partition.copy_(log_partition(first, self.activation))
        count = 1
        for logits in answers:
            mean.add_(logits)
            mean_partition.add_(log_partition(logits, self.activation))
            count += 1
        mean.div_(count)
        mean_partition.div_(count)
        both[:, -1] = disagreement(log_partition(mean, self.activation), mean_partition)
        return both


def flips(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """All subsets of `axes`, the fewest first: (), (2,), (3,), (2, 3) for 2 and 3."""
    ordered = sorted(axes)
    return [subset for n in range(len(ordered) + 1) for subset in combinations(ordered, n)]


def log_partition(logits: Tensor, activation: str) -> Tensor:
    """(N, K, *S) logits -> (N, *S): log of what their probabilities are divided by to sum to one.

    softmax: log sum exp. sigmoid: every label is a coin of its own, so the sum of log(1 + exp) over the labels.
    """
    if activation == "sigmoid":
        return F.softplus(logits).sum(1)
    # In every channel a logit less its log probability; twice as fast as logsumexp.
    return logits[:, 0] - logits.log_softmax(1)[:, 0]


def disagreement(of_mean: Tensor, mean: Tensor) -> Tensor:
    """How far predictions p_1..p_M lie apart, from 0 (all alike) to 1 (no class in common), voxel by voxel.

    1 - sum over the classes of (p_1 ... p_M)^(1/M): one minus the affinity of several distributions (Matusita 1967),
    for two the squared Hellinger distance. With the log partition A of mean logits and the mean A of the single
    ones this is 1 - exp(A(mean of logits) - mean of A), whatever is added to a prediction's logits. It measures the
    predictions against their mean in logits, which is the answer; mutual information measures them against their
    mean in probabilities, and taken around this answer it can be negative.
    """
    return -torch.expm1((of_mean - mean).clamp_(max=0))


def set_threads(threads: int) -> None:
    """Settle what torch keeps per process: threads per operation, float32 products without TF32 or bf16."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if torch.get_float32_matmul_precision() != "highest":
        torch.set_float32_matmul_precision("highest")


def check_tiles(tiles: Tensor, channels: int, *, flat: bool) -> None:
    """Raise ModelError unless `tiles` is (N, channels, Z, Y, X), with Z = 1 for a 2-D network."""
    if tiles.ndim != 5 or tiles.shape[1] != channels or 0 in tiles.shape or (flat and tiles.shape[2] != 1):
        expected = f"(N, {channels}, {'1' if flat else 'Z'}, Y, X)"
        raise ModelError(f"predict got tiles of shape {tuple(tiles.shape)}; expected {expected} and no empty axis")
