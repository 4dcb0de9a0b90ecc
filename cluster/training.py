"""Training on Ray: one actor, with the GPU where the cluster has one.

One network fits one device here, and Ray Train's worker groups, data shards and collective set-up would only stand
between it and its checkpoint, which already makes a training survive its process (docs/decisions.md).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import Interrupted, StudyError

from .actor import Refusal, Versions, mismatch, refusal_of, versions
from .pool import THREADS, refused
from .session import Session

if TYPE_CHECKING:
    from pipeline.training.job import TrainJob
    from pipeline.training.run import Observe, Preparation

ATTEMPTS = 3
LOOK_SECONDS = 0.5

Seen = tuple[str, float, dict[str, float]]


class Trainer:
    """Trains in its own process; says how far it is and stops when it is asked to, from other threads."""

    def __init__(self, driver: Versions) -> None:
        self._mismatch = mismatch(driver, versions())
        self._stop = threading.Event()
        self._seen: Seen | None = None

    def train(self, job: TrainJob, out: Path, preparation: Preparation, threads: int) -> Refusal | bool:
        """Whether all members are trained (False: stopped before), or why they cannot be."""
        from pipeline.training.run import train_members, training_errors

        if self._mismatch is not None:
            return Refusal("usage", self._mismatch)
        try:
            with training_errors():
                train_members(job, out, preparation, threads, self._stop, self._see)
        except Interrupted:
            return False
        except BaseException as error:
            return refusal_of(error)
        return True

    def _see(self, stage: str, share: float, facts: Mapping[str, float]) -> None:
        self._seen = stage, share, dict(facts)

    def seen(self) -> Seen | None:
        """What training last said of itself."""
        return self._seen

    def stop(self) -> None:
        """End after the current step, with a checkpoint."""
        self._stop.set()


def train_on_ray(
    job: TrainJob, out: Path, preparation: Preparation, threads: int, stop: threading.Event, observe: Observe
) -> None:
    """`pipeline.training.run.train_members` on an actor; every node must see the files under the same paths.

    An actor that dies is replaced up to twice and goes on from its checkpoint. Raises UsageError, StudyError and, when
    `stop` was set, Interrupted.
    """
    import ray
    import torch

    gpu = torch.cuda.is_available()
    with Session(job.address, gpu=gpu):
        if job.address is not None:
            gpu = ray.cluster_resources().get("GPU", 0) > 0
        make = ray.remote(Trainer).options(
            num_gpus=1 if gpu else 0,
            num_cpus=threads if job.address is not None and not gpu else 0,
            max_concurrency=3,
            max_restarts=0,
            runtime_env={"env_vars": dict.fromkeys(THREADS, str(threads))},
            enable_task_events=False,
        )
        for _ in range(ATTEMPTS):
            actor = make.remote(versions())
            try:
                answer = _watch(actor, actor.train.remote(job, out, preparation, threads), stop, observe)
            except ray.exceptions.RayActorError:
                if stop.is_set():
                    raise Interrupted from None
                continue
            if isinstance(answer, Refusal):
                raise refused(answer)
            if not answer:
                raise Interrupted
            return
    raise StudyError("crash", f"the training process died {ATTEMPTS} times; run it again to go on from its checkpoint")


def _watch(actor: Any, running: Any, stop: threading.Event, observe: Observe) -> Any:
    """Wait for the answer, showing what the actor says, handing on the wish to stop."""
    import ray

    asked = False
    while True:
        done, _ = ray.wait([running], timeout=LOOK_SECONDS)
        if done:
            return ray.get(running)
        if stop.is_set() and not asked:
            actor.stop.remote()
            asked = True
        seen = ray.get(actor.seen.remote())
        if seen is not None:
            observe(*seen)
