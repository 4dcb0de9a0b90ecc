"""Where blocks run: what an engine promises, what travels, and the engine that runs them in this process."""

from __future__ import annotations

import copy
import ctypes
import os
import resource
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from .errors import Cause, StudyError
from .grid import Box, Grid, Shards, Triple
from .lattice import Lattice

if TYPE_CHECKING:
    from segmodels.predictor import Predictor
    from segmodels.runtime import Runtime


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker needs to become ready: the model, by name or folder and hash, and how it is run.

    `runtime` is what the driver resolved on its own machine; a worker computes under `runtime_here` of it.
    """

    model: str
    model_hash: str
    classes: int | None
    runtime: Runtime
    mirroring: bool = False


@dataclass(frozen=True)
class Kind:
    """The workers of an engine that compute under one runtime. A study is made by one kind, from first to last.

    `memory`: bytes one of them may use where the job does not say.
    """

    runtime: Runtime
    workers: int
    memory: int


@dataclass(frozen=True)
class Baseline:
    """What one worker takes before any block: measured after the model was loaded and one batch of tiles had run."""

    host_bytes: int
    device_bytes: int
    seconds_per_tile: float


@dataclass(frozen=True)
class BlockTask:
    """One block of one study: where to read, what to compute, where to write. A few hundred bytes, no arrays.

    `image`, `labels`: URLs of the level-0 arrays. `statistics`: URL of the image's statistics. `range`: the block, as
    a box of shard indices; `missing`: the shards in it that are not done yet. `fill`: what lies outside the image,
    "zero" (after normalisation), "reflect" or "edge". `runtime`: hash of that of the workers it was planned for; no
    other may compute it. `under`: the more frugal runtime that they are to take for it, where memory was short.
    """

    key: str
    index: int
    image: str
    labels: str
    ledger: str
    statistics: str
    lattice: Lattice
    grid: Grid
    shards: Shards
    range: Box
    missing: tuple[Triple, ...]
    stitch: str
    fill: str
    runtime: str
    under: Runtime | None = None

    @property
    def tiles(self) -> int:
        """How many tiles the whole block takes."""
        return self.grid.count(self.lattice.box(self.shards.box_of(self.range)))


@dataclass(frozen=True)
class Receipt:
    """What a finished block says of itself. Its statistics stand in its shards' markers."""

    key: str
    index: int
    shards: int
    tiles: int
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class Failure:
    """A block that was given up, with the typed cause."""

    key: str
    index: int
    cause: Cause
    message: str
    attempts: int = 1


@dataclass(frozen=True)
class Stranded:
    """A block that nobody will compute, because its kind of worker is gone: its study has to begin again."""

    key: str
    index: int
    runtime: str


Work = tuple[BlockTask, ...]
Outcome = Receipt | Failure | Stranded
_M_ARENA_MAX = -8  # malloc.h of glibc


class Engine(Protocol):
    """Runs works (blocks of one kind that share tile batches) on its workers.

    Every block handed out ends as exactly one outcome, unless `stop` is set: then `run` ends soon and what was in
    flight has none. A block is idempotent: it may be run again at any time.

    `kinds`: those that have a worker now, the one with least to do first, at least one. `measure`: the baseline of
    the kind with this runtime hash.
    """

    workers: int

    def kinds(self) -> tuple[Kind, ...]: ...

    def measure(self, window: Triple, channels: int, runtime: str) -> Baseline: ...

    def run(self, works: Iterable[Work], stop: threading.Event) -> Iterator[Outcome]: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class Worker:
    """A loaded model under the runtime of its machine: the same object in this process and inside an actor.

    `steps` counts the batches it has computed and the shards it has written; who watches it may read that from another
    thread.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        import segmodels
        from segmodels.predictor import make_predictor
        from segmodels.runtime import runtime_here

        keep_few_arenas()
        reset_peak_rss()
        model = segmodels.load(spec.model, classes=spec.classes)
        if model.hash != spec.model_hash:
            raise StudyError(
                "model",
                f"the model changed while the run was on: planned {spec.model_hash[:12]}, "
                f"found {model.hash[:12]}; start the command again",
            )
        self.model, self.runtime, self.steps = model, runtime_here(spec.runtime, model), 0
        self.predictor = make_predictor(model, self.runtime, mirroring=spec.mirroring)
        self.loading_bytes = peak_rss()  # reading weights may take more than running them
        self._frugal: dict[Runtime, Predictor] = {}
        self._mirroring = spec.mirroring

    def measure(self, window: Triple, channels: int) -> Baseline:
        """Run one batch of tiles of `window` (z,y,x) voxels and say what the process took."""
        import torch

        import pipeline.blocks  # noqa: F401  what a block imports belongs to the baseline

        batch = self.runtime.batch
        tiles = torch.zeros((batch, channels, *window))
        reset_peak_rss()  # what the process did before, such as reading a study, is no part of it
        predictor = self.predictor.fit(FLAT)
        predictor.predict(tiles)
        self.step()
        start = time.perf_counter()
        predictor.predict(tiles)
        if self.runtime.device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        device = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
        return Baseline(max(self.loading_bytes, peak_rss()), device, seconds / batch)

    def run(self, tasks: Work, stop: threading.Event | None = None) -> Iterator[Receipt | Failure]:
        """Segment the blocks of one work, which must have been planned for this worker's runtime."""
        from .blocks import segment_blocks

        if odd := {task.runtime for task in tasks} - {self.runtime.hash}:
            raise ValueError(f"a block planned for the runtime {odd.pop()} came to a worker of {self.runtime.hash}")
        (under,) = {task.under for task in tasks}
        if under is None:
            yield from segment_blocks(tasks, self.model, self.predictor, self.runtime, stop, self.step)
        else:
            yield from segment_blocks(tasks, self.model, self._frugal_predictor(under), under, stop, self.step)

    def _frugal_predictor(self, under: Runtime) -> Predictor:
        """The model under a runtime that needs less memory, on a copy where that is on another device."""
        from segmodels.predictor import make_predictor
        from segmodels.runtime import versions_of

        if under not in self._frugal:
            model = self.model
            if under.device != self.runtime.device:
                if (here := versions_of(under.device)) != under.versions:  # planned on the driver's machine
                    raise StudyError("memory", f"the {under.device} of its node is of another kind: {dict(here)}")
                model = replace(model, network=copy.deepcopy(model.network))
            self._frugal[under] = make_predictor(model, under, mirroring=self._mirroring)
        return self._frugal[under]

    def step(self) -> None:
        self.steps += 1


class _Flat:
    """A histogram to fit a model with when all that matters is what running it takes."""

    def histogram(self):  # type: ignore[no-untyped-def]
        import numpy as np

        return np.arange(256.0), np.ones(256, np.int64)


FLAT = _Flat()


class SerialEngine:
    """Runs blocks one after another in this process."""

    workers = 1

    def __init__(self, spec: WorkerSpec) -> None:
        self.worker = Worker(spec)

    def kinds(self) -> tuple[Kind, ...]:
        return (Kind(self.worker.runtime, self.workers, share_of_machine(self.workers)),)

    def measure(self, window: Triple, channels: int, runtime: str) -> Baseline:
        return self.worker.measure(window, channels)

    def run(self, works: Iterable[Work], stop: threading.Event) -> Iterator[Outcome]:
        for work in works:
            if stop.is_set():
                return
            yield from self.worker.run(work, stop)

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def peak_rss() -> int:
    """Highest resident memory of this process in bytes, since it began or since `reset_peak_rss`."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def share_of_machine(workers: int) -> int:
    """What one of so many workers may use where nobody says: its part of 80 % of the machine's memory, in bytes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(0.8 * total / workers)


def resident_bytes() -> int:
    """Resident memory of this process now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def reset_peak_rss() -> None:
    """Let `peak_rss` count from now on, where the kernel allows it.

    What was freed but is still kept by the C library goes back to the system first: it may be much after a study was
    read in this process, and would stand in the way of the next block's arrays.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def keep_few_arenas() -> None:
    """Let this process's threads share two heaps, where the C library is glibc: call it before threads start.

    Each thread that decodes chunks would otherwise get a heap of its own, of which glibc gives nothing back: after a
    study was read in this process 100 MB and more stayed with it, which no plan could know.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)
