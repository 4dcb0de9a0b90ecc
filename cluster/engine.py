"""The Ray engine: the engine protocol of `pipeline.engine` on warm actors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Self

from pipeline.errors import UsageError

from .actor import Refusal
from .dispatch import Dispatch
from .pool import THREADS, Pool
from .session import Session
from .trouble import refused

if TYPE_CHECKING:
    from pipeline.engine import Baseline, Kind, Outcome, Work

STALL_SECONDS = 600.0
STALL_BATCHES = 20


class RayEngine:
    """Runs blocks on `workers` actors, each a process with one loaded worker, `threads` threads and maybe a
    GPU.

    Every block handed out ends as exactly one Receipt or Failure: a dead worker is replaced and its block
    tried up to `attempts` times, each time alone; a block that a worker refuses (StudyError) is not tried
    again unless the cause is storage. A worker that hangs is ended and counts as dead. That a node goes away
    is not counted. No array ever passes through Ray. When `close` returns nothing of it
    is left running; when this process is killed, nothing of it outlives that by more than seconds.

    worker: "module:Class" that takes `spec` and has `runtime`, `steps`, `measure` and `run` as
    `pipeline.engine.Worker` has.
    workers: None is as many as the GPUs of the cluster have room for where `gpus_per_worker`, else one.
    gpus_per_worker: 0 is workers that ask for cores. None is 1 where `gpu`, or on a joined cluster with GPUs.
    address: None starts a private cluster on this machine; else the one to join ("host:port" or "auto").
    wait: seconds without a single ready actor after which to give up, and without one of a kind after which
    the blocks of that kind are stranded (120 here, 900 on a joined cluster).
    stall: seconds without a batch or shard more after which a worker hangs; None is `STALL_SECONDS` or
    `STALL_BATCHES` times the time that a batch was measured to take, whatever is more.
    Raises UsageError where nothing could start.
    """

    def __init__(
        self,
        spec: Any,
        *,
        worker: str = "pipeline.engine:Worker",
        workers: int | None = None,
        threads: int = 1,
        gpu: bool = False,
        gpus_per_worker: float | None = None,
        address: str | None = None,
        attempts: int = 3,
        boots: int = 3,
        wait: float | None = None,
        stall: float | None = None,
    ) -> None:
        if (workers is not None and workers < 1) or threads < 1:
            raise UsageError(f"workers ({workers}) and threads ({threads}) must be at least 1")
        if gpus_per_worker is not None and not 0 <= gpus_per_worker <= 1:
            raise UsageError(
                f"a worker uses one GPU or a share of it: gpus_per_worker is 0 to 1, not {gpus_per_worker}"
            )
        self._session = Session(address, gpu=gpu if gpus_per_worker is None else gpus_per_worker > 0)
        try:
            share = _share_of_gpu(gpus_per_worker, gpu=gpu)
            self.workers = _workers(workers, share, private=address is None)
            options = {
                # A private cluster schedules any number of actors; on a shared one each claims what it uses.
                "num_cpus": 0 if address is None or share else threads,
                "num_gpus": share,
                "scheduling_strategy": "SPREAD",
                "runtime_env": {"env_vars": dict.fromkeys(THREADS, str(threads))},
                "enable_task_events": False,
            }
            self._pool = Pool(
                spec,
                worker,
                workers=self.workers,
                options=options,
                boots=boots,
                patience=wait or (120.0 if address is None else 900.0),
                stall=stall or STALL_SECONDS,
                shared=address is not None,
            )
        except BaseException:
            self._session.close()
            raise
        self._attempts = attempts
        self._stall_given = stall is not None

    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of the workers that are ready, the one with least to do first; waits for one.

        May be called while a run is on, from any thread. Raises what `run` raises where there is none.
        """
        return self._pool.kinds()

    def measure(self, window: tuple[int, int, int], channels: int, runtime: str) -> Baseline:
        """What one worker of a kind takes for tiles of `window` (z,y,x) voxels, in an actor that stays in the pool.

        May be called while a run is on, from any thread. Raises StudyError where the worker refuses, dies or
        hangs, and what `run` raises where there is none.
        """
        import ray

        died = Refusal("crash", "the worker died")
        for _ in range(self._attempts):
            member = self._pool.any_ready(runtime)
            try:
                answer = self._pool.measure(member, window, channels)
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
                self._pool.lost(member, error)
                time.sleep(0.1)  # let the run that may share it see its death first
                continue
            if isinstance(answer, Refusal) and answer.fatal:
                self._pool.lost(member)
                died = answer
                continue
            if isinstance(answer, Refusal):
                raise refused(answer)
            baseline: Baseline = answer
            if not self._stall_given and member.runtime is not None:
                patience = STALL_BATCHES * baseline.seconds_per_tile * member.runtime.batch
                self._pool.stall = max(self._pool.stall, patience)
            return baseline
        words = f"{self._attempts} workers were lost while they measured one batch of tiles: {died.message}"
        raise refused(Refusal(died.cause, words))

    def run(self, works: Iterable[Work], stop: threading.Event) -> Iterator[Outcome]:
        """One outcome for every block of `works`, in the order in which they end.

        `works` is pulled in a thread of its own, two works ahead per worker; what it raises is raised here.
        After `stop` is set, or when the iterator is closed, running blocks are killed and nothing more is
        yielded. Raises UsageError or StudyError where workers cannot be had.
        """
        yield from Dispatch(self._pool, works, stop, self._attempts).outcomes()

    def close(self) -> None:
        """End every actor, and the cluster if it is a private one."""
        self._pool.close()
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _share_of_gpu(asked: float | None, *, gpu: bool) -> float:
    """What each worker claims: of a private cluster as the driver's runtime says, of a joined one as it has them."""
    import ray

    if asked is not None:
        return asked
    return 1 if gpu or ray.cluster_resources().get("GPU", 0) else 0


def _workers(asked: int | None, share: float, *, private: bool) -> int:
    if not share:
        return asked or 1
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    places = gpus * int(1 / share + 1e-6)  # no worker lies across two GPUs
    if private and places < (asked or 1):
        need = "a GPU each" if share == 1 else f"{share:g} of a GPU each"
        raise UsageError(f"{asked or 1} workers need {need}, and this machine has {gpus}: set --workers")
    return asked or max(places, 1)
