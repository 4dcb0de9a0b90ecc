"""Runs of the small workers, and what came of them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from engine_workers import WORKER, Spec, Task

from cluster.engine import RayEngine
from pipeline.engine import Failure, Receipt


def works(count: int, *, folder: Path | None = None, act: str = "nothing", **special: Any) -> list[tuple[Task, ...]]:
    """`count` works of one block each, all of which `act`, but the one `at` an index, which shall `do` another."""
    place = str(folder) if folder else None
    tasks = [Task("study", index, act, 0.05, place) for index in range(count)]
    if special:
        tasks[special["at"]] = Task("study", special["at"], special["do"], special.get("argument"), place)
    return [(task,) for task in tasks]


def outcomes(engine: RayEngine, given: Any, stop: threading.Event | None = None) -> list[Receipt | Failure]:
    return list(engine.run(given, stop or threading.Event()))


def indices(found: list[Receipt | Failure]) -> list[int]:
    return sorted(outcome.index for outcome in found)


def failures(found: list[Receipt | Failure]) -> list[Failure]:
    return [outcome for outcome in found if isinstance(outcome, Failure)]


class on_the_same_ray(RayEngine):  # noqa: N801
    """Another engine on the cluster of `engine`: a new cluster for each of these tests would take a minute."""

    def __init__(
        self,
        engine: RayEngine,
        spec: Spec,
        *,
        workers: int = 1,
        boots: int = 1,
        patience: float = 60.0,
        stall: float = 300.0,
        **options: Any,
    ) -> None:
        from cluster.pool import Pool

        self.workers, self._attempts, self._stall_given = workers, 3, False
        self._pool = Pool(spec, WORKER, workers=workers, options=options, boots=boots, patience=patience, stall=stall)

    def close(self) -> None:
        self._pool.close()
