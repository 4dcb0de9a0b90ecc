"""The way a machine trains: device, precision, memory layout, samples per pass."""

from __future__ import annotations

import logging
import platform
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from segmodels.nd import GroupNorm
from segmodels.train.loss import TrainingError
from segmodels.train.recipe import Recipe

logger = logging.getLogger("maskmill")

COMPILE_MINUTES = 10.0  # below this budget compiling does not pay: it takes one to three itself


@dataclass(frozen=True)
class Way:
    """What the bits of a step depend on beside the recipe; settled once per training and kept in its checkpoint.

    device: "cpu" or "cuda". precision: "fp32" or "bf16" (autocast). batch: samples per forward pass; smaller than the
    recipe's where memory was short, gradients then add up.
    """

    device: str
    precision: str
    channels_last: bool
    compiled: bool
    batch: int
    threads: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def place(self, module: nn.Module) -> nn.Module:
        """The module on the device, in the memory layout of this way."""
        module.to(self.device)
        if self.channels_last:
            for parameter in module.parameters():
                if parameter.ndim in (4, 5):
                    parameter.data = parameter.data.contiguous(memory_format=_layout(parameter.ndim))
        return module

    def give(self, images: Tensor) -> Tensor:
        """A batch (n, c, *S) float32 on the device, in the memory layout of this way."""
        on_device = images.to(self.device, non_blocking=True)
        return on_device.contiguous(memory_format=_layout(images.ndim)) if self.channels_last else on_device

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")


def _layout(ndim: int) -> torch.memory_format:
    return torch.channels_last if ndim == 4 else torch.channels_last_3d


def has_bf16(device: str) -> bool:
    """Whether bfloat16 is more than emulated here."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if platform.machine() in ("x86_64", "AMD64"):  # oneDNN says yes to any AVX-512 and emulates it there
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_batch_norm(network: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d) for module in network.modules())


def has_sample_norm(network: nn.Module) -> bool:
    """Whether a layer normalises each sample by its own statistics."""
    return any(isinstance(module, GroupNorm) for module in network.modules())


def choose_way(recipe: Recipe, threads: int, network: nn.Module) -> Way:
    """The way on this machine: a rule and no measurement, so that the same training has the same weights again.

    On a CPU that has bf16 a step takes about half of one in fp32, and channels last pays there unless samples are
    normalised one by one (docs/decisions.md); on a GPU it is what tensor cores want.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = recipe.precision if recipe.precision != "auto" else ("bf16" if has_bf16(device) else "fp32")
    pays = device == "cuda" and (recipe.minutes or 0) >= COMPILE_MINUTES
    compiled = recipe.compile == "yes" or (recipe.compile == "auto" and pays)
    channels_last = device == "cuda" or not has_sample_norm(network)
    way = Way(device, precision, channels_last, compiled, recipe.batch, threads)
    logger.info("way of training", extra=way.to_json())
    return way


def halved(way: Way) -> Way:
    """The way with half as many samples per pass. Raises TrainingError where there is one already."""
    if way.batch == 1:
        raise TrainingError("not even one sample fits into memory: give a smaller patch, or a smaller network")
    logger.warning("out of memory: gradients add up over smaller batches", extra={"samples": way.batch // 2})
    return replace(way, batch=way.batch // 2)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python says that memory is short."""
    said = str(error).lower()
    words = ("not enough memory", "out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(part in said for part in words)
