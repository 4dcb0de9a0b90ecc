"""The Ray actor: a thin shell around a worker. What can go wrong in it comes back as a value, typed."""

from __future__ import annotations

import os
import re
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from pipeline.engine import share_of_machine
from pipeline.errors import StudyError, UsageError

if TYPE_CHECKING:
    from segmodels.runtime import Runtime

Versions = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Refusal:
    """Why a call gave no result: a cause of `StudyError`, or "usage" where no run at all can be."""

    cause: str
    message: str
    fatal: bool = False  # the process that says so is about to end


@dataclass(frozen=True)
class Born:
    """An actor's first word: its process is there, on this node of the cluster, with the driver's versions."""

    pid: int
    node: str


@dataclass(frozen=True)
class Ready:
    """An actor's hello: its model is loaded. `memory`: bytes that a worker alone on its machine may use."""

    runtime: Runtime
    memory: int


def versions() -> Versions:
    """What must be the same in the driver and in every actor, so that their labels are.

    What reads, normalises, predicts and writes voxels; the instruction set and the device may differ, see `Ready`.
    """
    named = [("python", ".".join(map(str, sys.version_info[:2])))]
    for package in ("maskmill", "ray", "torch", "numpy", "zarr", "numcodecs"):
        try:
            named.append((package, version(package)))
        except PackageNotFoundError:
            named.append((package, "none"))
    return tuple(named)


def mismatch(our_versions: Versions, theirs: Versions) -> str | None:
    """One line that names every difference, or None."""
    ours = dict(our_versions)
    odd = [(name, value) for name, value in theirs if ours.get(name) != value]
    unlike = [f"{name} {value} (driver: {ours.get(name)})" for name, value in odd]
    if not unlike:
        return None
    return f"a node of the Ray cluster has {', '.join(unlike)}; install the same versions on every node"


def load(name: str) -> Any:
    """The object that "package.module:name" says."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def scrub(text: str, limit: int = 200) -> str:
    """`text` on one line without anything that looks like a path: it goes into logs and the ledger."""
    text = re.sub(r"'[^'\n]*[/\\][^'\n]*'|\"[^\"\n]*[/\\][^\"\n]*\"", "<path>", text)
    text = re.sub(r"\S*[/\\]\S*", "<path>", text)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""


def _is_memory(error: BaseException) -> bool:
    words = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
    if isinstance(error, RuntimeError):
        return any(word in str(error) for word in words)
    return isinstance(error, MemoryError)


def refusal_of(error: BaseException) -> Refusal:
    """The typed value for `error`."""
    if isinstance(error, StudyError):
        return Refusal(error.cause, error.message)
    if isinstance(error, UsageError):
        return Refusal("usage", str(error))
    if type(error).__name__ == "ModelError":
        return Refusal("model", str(error))
    if _is_memory(error):
        return Refusal("memory", f"the worker ran out of memory: {scrub(str(error)) or 'MemoryError'}")
    if isinstance(error, OSError):
        return Refusal("storage", f"{type(error).__name__}: {error.strerror or 'reading or writing failed'}")
    return Refusal("crash", f"{type(error).__name__}{_place(error)}: {scrub(str(error))}")


def _is_poison(error: BaseException) -> bool:
    """Whether this process is of no more use, as after any CUDA error but out-of-memory."""
    if not isinstance(error, Exception):  # SystemExit and its like: who wants this process to end gets it
        return True
    return isinstance(error, RuntimeError) and "CUDA error" in str(error) and not _is_memory(error)


class Shell:
    """One warm worker in one process. It never raises: results and refusals are small values.

    Its calls run one after another in one thread, but for `steps`, which answers in another: so the driver can tell
    a worker that is slow from one that hangs.
    """

    def __init__(self, worker: str, spec: Any, driver: Versions) -> None:
        self.worker: Any = None
        self.refusal: Refusal | None = None
        if (line := mismatch(driver, versions())) is not None:
            self.refusal = Refusal("usage", line)
        self._load = lambda: load(worker)(spec)

    def born(self) -> Born | Refusal:
        """Where this process is. The model is loaded later: that may hang, and then it should be known where."""
        import ray

        return self.refusal or Born(os.getpid(), ray.get_runtime_context().get_node_id())

    def hello(self) -> Ready | Refusal:
        """Load the worker."""
        self.worker = self.worker or self._guarded(self._load)
        if isinstance(self.worker, Refusal):
            self.refusal = self.worker
        return self.refusal or Ready(self.worker.runtime, share_of_machine(1))

    def steps(self) -> int:
        """How much the worker has done since it began: what matters is that it grows."""
        return int(getattr(self.worker, "steps", 0))  # it may be loading

    def measure(self, window: tuple[int, int, int], channels: int) -> Any:
        """The worker's baseline, or why there is none."""
        return self._guarded(lambda: self.worker.measure(window, channels))

    def run(self, tasks: tuple[Any, ...]) -> Any:
        """The outcomes of the blocks of one work, or why there are none."""
        return self._guarded(lambda: list(self.worker.run(tasks)))

    def _guarded(self, call: Callable[[], Any]) -> Any:
        if self.refusal is not None:
            return self.refusal
        try:
            return call()
        except BaseException as error:
            refusal = refusal_of(error)
            if _is_poison(error):
                self.refusal = refusal = replace(refusal, fatal=True)
                # `sys.exit` would be an intended exit to Ray; the second is for the answer to get out.
                threading.Timer(1.0, os._exit, [1]).start()
            return refusal
