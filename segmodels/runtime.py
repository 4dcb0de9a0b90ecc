"""The runtime: what, beside the model and the voxels, decides the bits of an answer."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

from segmodels.errors import ModelError, nearest, shorten

if TYPE_CHECKING:
    from segmodels.folder import Model

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Runtime:
    """Under one runtime labels are bit-identical for any blocks, workers, engine, order, crash or resume.

    device: "cpu" or "cuda". backend: "torch". precision: "fp32", "bf16" or "fp16", never "auto". threads: per
    worker. batch: tiles per call; a short batch is padded to it, because the sums of a convolution change
    with the batch. versions: (name, version) pairs, sorted, of what computes.
    """

    device: str
    backend: str
    precision: str
    threads: int
    batch: int
    versions: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` is the inverse."""
        return asdict(self) | {"versions": dict(self.versions)}

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Runtime:
        """The Runtime that `to_json` wrote. Raises ModelError for anything else."""
        try:
            versions = tuple(sorted((str(k), str(v)) for k, v in facts["versions"].items()))
            return cls(**(facts | {"versions": versions}))
        except (TypeError, KeyError, AttributeError):
            raise ModelError(f"not a runtime as maskmill records it: {shorten(facts)}") from None

    def __str__(self) -> str:
        """In a few words, for messages: "cpu AVX2, fp32, 4 threads, torch 2.13.0"."""
        versions = dict(self.versions)
        chip = versions.get("gpu") or " ".join([self.device, *filter(None, [versions.get("cpu")])])
        return f"{chip}, {self.precision}, {self.threads} threads, {self.backend} {versions.get('torch', '')}".rstrip()

    @property
    def hash(self) -> str:
        """16 hex digits: equal for equal runtimes, in any process."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def resolve_precision(precision: str, device: str) -> str:
    """What `precision` means on `device` ("cpu" or "cuda"), and nothing else enters.

    Auto is fp32 on both for now: the precision that models are trained and judged in.
    """
    if precision not in PRECISIONS:
        raise ModelError(
            f"precision {shorten(precision)} is unknown.{nearest(precision, PRECISIONS)} "
            f"There are: {', '.join(PRECISIONS)}"
        )
    return "fp32" if precision == "auto" else precision


def resolve_runtime(
    model: Model, *, precision: str = "auto", threads: int | None = None, batch: int | None = None
) -> Runtime:
    """The runtime on this machine: cuda if there is one, else cpu.

    threads: default all cores this process may use. batch: default 1 on the CPU, 4 on a GPU. A model
    without a network compares and never rounds, so its precision is always fp32. Raises ModelError for a
    value out of range.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = resolve_precision(precision, device)
    for name, value in (("threads", threads), ("batch", batch)):
        if value is not None and (type(value) is not int or not 1 <= value <= 4096):
            raise ModelError(f"{name} must be a whole number from 1 to 4096, got {shorten(value)}")
    return Runtime(
        device=device,
        backend="torch",
        precision=resolved if model.network is not None else "fp32",
        threads=threads or usable_cores(),
        batch=batch or (4 if device == "cuda" else 1),
        versions=versions_of(device),
    )


def frugal(runtime: Runtime, *, cpu: bool) -> Runtime | None:
    """The runtime that needs less device memory: half the batch, then, where `cpu` allows it, this machine's CPU.

    None where there is none left. Precision stays, but fp16, which CPUs do not compute in, becomes fp32.
    """
    if runtime.batch > 1:
        return replace(runtime, batch=runtime.batch // 2)
    if runtime.device == "cpu" or not cpu:
        return None
    precision = "fp32" if runtime.precision == "fp16" else runtime.precision
    return replace(runtime, device="cpu", precision=precision, versions=versions_of("cpu"))


def runtime_here(wanted: Runtime, model: Model) -> Runtime:
    """`wanted`, which may be of another machine, as this machine would compute it.

    Precision and threads stay; device, instruction set and versions are this machine's. The batch stays on the same
    kind of device and is the default of another.
    """
    device = resolve_runtime(model).device
    batch = wanted.batch if device == wanted.device else None
    return resolve_runtime(model, precision=wanted.precision, threads=wanted.threads, batch=batch)


def usable_cores() -> int:
    """Cores this process may run on: its affinity where the system tells, else all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions_of(device: str) -> tuple[tuple[str, str], ...]:
    """The versions in a runtime of this machine on `device`."""
    import torch

    found = {"torch": torch.__version__, "maskmill": _maskmill_version()}
    if device == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
        found["gpu"] = torch.cuda.get_device_name()
    else:
        # The kernels are chosen by the instruction set, and their sums differ.
        found["cpu"] = torch.backends.cpu.get_cpu_capability()
    return tuple(sorted(found.items()))


def _maskmill_version() -> str:
    try:
        return metadata.version("maskmill")
    except metadata.PackageNotFoundError:
        return "0+uninstalled"
