"""How this machine trains a network fastest, found by trying."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from segmodels.train.loss import Loss, Supervised, TrainingError
from segmodels.train.recipe import Recipe

logger = logging.getLogger("maskmill")

TRIED = 3  # steps per way, of which the fastest counts
COMPILE_MINUTES = 10.0  # below this budget compiling is not tried: it takes one to three itself


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
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def find_way(supervised: Supervised, loss: Loss, images: Tensor, labels: Tensor, recipe: Recipe, threads: int) -> Way:
    """The fastest way of those that the recipe leaves open, measured with one batch on a copy of the network."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = Way(device, "fp32", False, False, recipe.batch, threads)
    found: dict[Way, float] = {}
    while not found:
        try:
            found = {way: _seconds(way, supervised, loss, images, labels) for way in _ways(plain, recipe)}
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        if not found:
            plain = halved(plain)
    best = min(found, key=lambda way: found[way])
    if recipe.compile != "no" and (recipe.compile == "yes" or (recipe.minutes or 0) >= COMPILE_MINUTES):
        compiled = replace(best, compiled=True)
        seconds = _seconds(compiled, supervised, loss, images, labels)
        if recipe.compile == "yes" or seconds < 0.95 * found[best]:
            found[compiled], best = seconds, compiled
    logger.info("way of training", extra={**best.to_json(), "seconds_per_step": found[best]})
    return best


def _ways(plain: Way, recipe: Recipe) -> Iterator[Way]:
    given = [recipe.precision] if recipe.precision != "auto" else ["fp32", *["bf16"] * has_bf16(plain.device)]
    for precision in given:
        for channels_last in (False, True):
            yield replace(plain, precision=precision, channels_last=channels_last)


def _seconds(way: Way, supervised: Supervised, loss: Loss, images: Tensor, labels: Tensor) -> float:
    trial: Any = way.place(copy.deepcopy(supervised).train())
    if way.compiled:
        trial = torch.compile(trial)
    times = []
    for _ in range(TRIED):
        began = time.perf_counter()
        with way.autocast():
            levels = trial(way.give(images[: way.batch]))
        torch.autograd.backward(loss([level.float() for level in levels], labels[: way.batch].to(way.device)))
        if way.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def halved(way: Way) -> Way:
    """The way with half as many samples per pass. Raises TrainingError where there is one already."""
    if way.batch == 1:
        raise TrainingError("not even one sample fits into memory: give a smaller patch, or a smaller network")
    logger.warning("out of memory: gradients add up over smaller batches", extra={"samples": way.batch // 2})
    return replace(way, batch=way.batch // 2)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python says that memory is short."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in ("not enough memory", "can't allocate memory", "Cannot allocate memory")
    )
