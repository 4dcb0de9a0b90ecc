"""Predictors: tiles in, logits out. The one place where a network runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from segmodels.errors import ModelError

if TYPE_CHECKING:
    from segmodels.folder import Model
    from segmodels.network import Network
    from segmodels.runtime import Runtime

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Statistics(Protocol):
    """What ingest knows of a whole study; predictors that fit themselves read its histogram."""

    def histogram(self) -> Any:
        """(values float64 ascending, counts int64) of channel 0."""


class Predictor(Protocol):
    """Logits of tiles, always of three spatial axes: a 2-D network sees one plane each.

    channels, classes: of the input and of the logits. margin: voxels per side (z, y, x) by which the logits
    are smaller than the tile.
    """

    channels: int
    classes: int
    margin: tuple[int, int, int]

    def fit(self, statistics: Statistics) -> Predictor:
        """This predictor for one study: itself, or a copy fitted to the study's statistics."""

    def predict(self, tiles: Tensor) -> Tensor:
        """(N, channels, Z, Y, X) float32 -> (N, classes, Z-2m, Y-2m, X-2m) float32 on the device."""


def make_predictor(model: Model, runtime: Runtime) -> Predictor:
    """The predictor of `model` under `runtime`; ModelError if this machine cannot give that runtime."""
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("the runtime was resolved for a GPU (cuda) and this process sees none")
    if runtime.backend != "torch":
        raise ModelError(f"the backend {runtime.backend!r} is not built in; there is: torch")
    if model.network is None:
        from segmodels.kmeans import KMeans

        return KMeans(classes=len(model.card.labels) + 1, device=runtime.device, threads=runtime.threads)
    return NetworkPredictor(model.network, runtime)


class NetworkPredictor:
    """A network in eval mode on the runtime's device.

    With a fixed batch and thread count the logits of a tile are the same bits whatever its place in the
    batch and whatever the other tiles are (tests/segmodels/test_predictor.py tries it for every network and
    normalisation). They do change with the batch, so tiles always run in batches of exactly runtime.batch,
    the last one filled up with zeros.
    """

    def __init__(self, network: Network, runtime: Runtime) -> None:
        self.runtime = runtime
        self.device = torch.device(runtime.device)
        self.network = network.to(self.device).eval()
        self.channels, self.classes, self.dims = network.in_channels, network.classes, network.dims
        m = network.margin
        self.margin = (0, m, m) if self.dims == 2 else (m, m, m)
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
        # One memory layout whatever view came in: kernels are chosen by it.
        full = (full.squeeze(2) if self.dims == 2 else full).contiguous()
        dtype = _AUTOCAST.get(self.runtime.precision)
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False),
            torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None),
        ):
            logits: Tensor = self.network(full)
            logits = logits[:n].float()
            return logits.unsqueeze(2) if self.dims == 2 else logits


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
