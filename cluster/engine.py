"""The Ray engine: the engine protocol of `pipeline.engine` on warm actors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Self

from pipeline.errors import StudyError, UsageError

from .actor import Refusal
from .dispatch import Dispatch
from .pool import THREADS, Pool, refused
from .session import Session

if TYPE_CHECKING:
    from pipeline.engine import Baseline, Failure, Receipt, Work


class RayEngine:
    """Runs blocks on `workers` actors, each a process with one loaded worker, `threads` threads and maybe a
    GPU.

    Every block handed out ends as exactly one Receipt or Failure: a dead worker is replaced and its block
    tried up to `attempts` times, each time alone; a block that a worker refuses (StudyError) is not tried
    again unless the cause is storage. No array ever passes through Ray. When `close` returns nothing of it
    is left running; when this process is killed, nothing of it outlives that by more than seconds.

    worker: "module:Class" that takes `spec` and has `measure` and `run` as `pipeline.engine.Worker` has.
    workers: None is one per GPU of the cluster where `gpu`, else one.
    address: None starts a private cluster on this machine; else the one to join ("host:port" or "auto").
    start_timeout: seconds without a single ready actor after which to give up (120 here, 900 on a joined
    cluster). Raises UsageError where nothing could start.
    """

    def __init__(
        self,
        spec: Any,
        *,
        worker: str = "pipeline.engine:Worker",
        workers: int | None = None,
        threads: int = 1,
        gpu: bool = False,
        address: str | None = None,
        attempts: int = 3,
        boots: int = 3,
        start_timeout: float | None = None,
    ) -> None:
        if (workers is not None and workers < 1) or threads < 1:
            raise UsageError(f"workers ({workers}) and threads ({threads}) must be at least 1")
        self._session = Session(address, gpu=gpu)
        try:
            self.workers = _workers(workers, gpu=gpu, private=address is None)
            options = {
                # A private cluster schedules any number of actors; on a shared one each claims what it uses.
                "num_cpus": 0 if address is None or gpu else threads,
                "num_gpus": 1 if gpu else 0,
                "scheduling_strategy": "SPREAD",
                "runtime_env": {"env_vars": dict.fromkeys(THREADS, str(threads))},
                "enable_task_events": False,
            }
            patience = start_timeout or (120.0 if address is None else 900.0)
            self._pool = Pool(spec, worker, workers=self.workers, options=options, boots=boots, patience=patience)
        except BaseException:
            self._session.close()
            raise
        self._attempts = attempts

    def measure(self, window: tuple[int, int, int], channels: int) -> Baseline:
        """What one worker takes for tiles of `window` (z,y,x) voxels, in an actor that stays in the pool.

        May be called while a run is on, from any thread. Raises StudyError where the worker refuses or
        dies, and what `run` raises where there is none.
        """
        import ray

        for _ in range(self._attempts):
            member = self._pool.any_ready()
            try:
                answer = ray.get(member.actor.measure.remote(window, channels))
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError):
                self._pool.lost(member)
                time.sleep(0.1)  # let the run that may share it see its death first
                continue
            if isinstance(answer, Refusal) and answer.fatal:
                self._pool.lost(member)
                continue
            if isinstance(answer, Refusal):
                raise refused(answer)
            baseline: Baseline = answer
            return baseline
        raise StudyError("crash", f"the worker died {self._attempts} times while it measured one batch of tiles")

    def run(self, works: Iterable[Work], stop: threading.Event) -> Iterator[Receipt | Failure]:
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


def _workers(asked: int | None, *, gpu: bool, private: bool) -> int:
    if not gpu:
        return asked or 1
    import ray

    there = int(ray.cluster_resources().get("GPU", 0))
    if private and there < (asked or 1):
        raise UsageError(f"{asked or 1} workers need a GPU each, and this machine has {there}: set --workers")
    return asked or max(there, 1)
