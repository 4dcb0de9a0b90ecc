"""The runtime: what, beside the model and the voxels, decides the bits of an answer."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segmodels import tuning
from segmodels.errors import ModelError, nearest, shorten

if TYPE_CHECKING:
    from segmodels.folder import Model

logger = logging.getLogger("maskmill")

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Runtime:
    """Under one runtime labels are bit-identical for any blocks, workers, engine, order, crash or resume.

    device: "cpu" or "cuda". backend: one of `segmodels.backends`. precision: "fp32", "bf16" or "fp16", never "auto".
    threads: per worker. batch: tiles per call; a short batch is padded to it, because the sums of a convolution change
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

    @cached_property
    def hash(self) -> str:
        """16 hex digits: equal for equal runtimes, in any process. Asked for several times a block."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def resolve_runtime(
    model: Model,
    *,
    backend: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    batch: int | None = None,
) -> Runtime:
    """The runtime on this machine: cuda if there is one, else cpu.

    What is left open (backend and precision "auto", threads None) is the fastest that `maskmill tune` measured on this
    machine for networks of these dimensions and for what is given (for threads that it did not try, with any). Without
    a table it is plain torch, fp32, all cores this process may use. batch: default 1 on the CPU, 4 on a GPU. A model
    without a network compares and never rounds: its backend is torch, its precision fp32. Raises ModelError for a value
    out of range, and for a backend that this machine lacks.
    """
    import torch

    from segmodels.backends import BACKENDS, missing

    device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_choice("precision", precision, PRECISIONS)
    _check_choice("backend", backend, ("auto", *BACKENDS))
    for name, value in (("threads", threads), ("batch", batch)):
        if value is not None and (type(value) is not int or not 1 <= value <= 4096):
            raise ModelError(f"{name} must be a whole number from 1 to 4096, got {shorten(value)}")
    if backend != "auto" and (lack := missing(backend, device)):
        raise ModelError(f"the backend {backend} lacks {lack}")
    if model.network is None:
        backend, precision = "torch", "fp32"
    else:
        rows = [row for row in tuning.read(machine(device)) if missing(row.backend, device) is None]
        asked = (rows, model.network.dims, _given(backend), _given(precision))
        # Threads that nobody measured: what is fastest with others is likely the fastest with these.
        found = tuning.choose(*asked, threads) or tuning.choose(*asked, None)
        if found is not None:
            backend, precision, threads = found.backend, found.precision, threads or found.threads
    backend, precision = _given(backend) or "torch", _given(precision) or "fp32"
    return Runtime(
        device=device,
        backend=backend,
        precision=precision,
        threads=threads or usable_cores(),
        batch=batch or (4 if device == "cuda" else 1),
        versions=versions_of(device, backend),
    )


def _given(choice: str) -> str | None:
    return None if choice == "auto" else choice


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ModelError(
            f"{name} {shorten(value)} is unknown.{nearest(value, choices)} There are: {', '.join(choices)}"
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
    return replace(runtime, device="cpu", backend="torch", precision=precision, versions=versions_of("cpu"))


def runtime_here(wanted: Runtime, model: Model) -> Runtime:
    """`wanted`, which may be of another machine, as this machine would compute it.

    Precision and threads stay; device, instruction set and versions are this machine's. So is the backend where this
    machine has what it takes; else it is torch, and a warning says so. The batch stays on the same kind of device and
    is the default of another.
    """
    from segmodels.backends import missing

    device = resolve_runtime(model, backend="torch").device
    batch = wanted.batch if device == wanted.device else None
    backend = wanted.backend
    if lack := missing(backend, device):
        logger.warning("this machine lacks %s, so torch runs the network here, which is slower", lack)
        backend = "torch"
    return resolve_runtime(model, backend=backend, precision=wanted.precision, threads=wanted.threads, batch=batch)


def usable_cores() -> int:
    """Cores this process may run on: its affinity where the system tells, else all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine(device: str) -> dict[str, str]:
    """What a table of `maskmill tune` is good for: this machine's device and the versions that are installed."""
    import torch

    found = {"torch": torch.__version__, "cores": str(usable_cores())}
    if device == "cuda":
        return found | {"gpu": torch.cuda.get_device_name()}
    return found | {"cpu": torch.backends.cpu.get_cpu_capability(), "model": cpu_model()}


def cpu_model() -> str:
    """The CPU's name as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def versions_of(device: str, backend: str = "torch") -> tuple[tuple[str, str], ...]:
    """The versions in a runtime of this machine on `device`."""
    import torch

    from segmodels.backends import versions

    found = {"torch": torch.__version__, "maskmill": _maskmill_version(), **versions(backend, device)}
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
