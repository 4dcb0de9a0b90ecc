"""Training on Ray: one actor per network, with a GPU each where the cluster has them.

One network fits one device here, and Ray Train's worker groups, data shards and collective set-up would only stand
between it and its checkpoint, which already makes a training survive its process (docs/decisions.md).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
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

Seen = tuple[float, dict[str, float]]


class Trainer:
    """Trains one network in its own process; says how far it is and stops when asked to, from other threads."""

    def __init__(self, driver: Versions) -> None:
        self._mismatch = mismatch(driver, versions())
        self._stop = threading.Event()
        self._seen: Seen = (0.0, {})

    def train(
        self, job: TrainJob, out: Path, preparation: Preparation, member: int, threads: int
    ) -> Refusal | bool:  # fmt: skip
        """Whether the network is trained (False: stopped before), or why it cannot be."""
        from pipeline.training.run import train_member

        if self._mismatch is not None:
            return Refusal("usage", self._mismatch)
        try:
            train_member(job, out, preparation, member, threads, self._stop, self._see)
        except Interrupted:
            return False
        except BaseException as error:
            return refusal_of(error)
        return True

    def _see(self, stage: str, share: float, facts: Mapping[str, float]) -> None:
        self._seen = share, dict(facts)

    def seen(self) -> Seen:
        """The share that is done, and what training last said of itself."""
        return self._seen

    def stop(self) -> None:
        """End after the current step, with a checkpoint."""
        self._stop.set()


@dataclass(eq=False)
class Member:
    """A network on its way."""

    number: int
    actor: Any = None
    running: Any = None
    attempts: int = 0
    seen: Seen = (0.0, {})
    done: bool = False


def train_on_ray(
    job: TrainJob, out: Path, preparation: Preparation, threads: int, stop: threading.Event, observe: Observe
) -> None:
    """`pipeline.training.run.train_members` on actors; every node must see the files under the same paths.

    An actor that dies is replaced up to twice and goes on from its checkpoint. Raises UsageError, StudyError and, when
    `stop` was set, Interrupted.
    """
    import ray
    import torch

    with Session(job.address, gpu=torch.cuda.is_available()):
        gpus = int(ray.cluster_resources().get("GPU", 0))
        make = ray.remote(Trainer).options(
            num_gpus=1 if gpus else 0,
            num_cpus=threads if job.address is not None and not gpus else 0,
            max_concurrency=3,
            max_restarts=0,
            runtime_env={"env_vars": dict.fromkeys(THREADS, str(threads))},
            enable_task_events=False,
        )
        members = [Member(number) for number in range(job.members)]
        at_once = job.workers or max(1, gpus)
        while unfinished := [member for member in members if not member.done]:
            for member in unfinished[:at_once]:
                if member.actor is None and not stop.is_set():
                    member.actor = make.remote(versions())
                    member.running = member.actor.train.remote(job, out, preparation, member.number, threads)
            flying = [member for member in members if member.actor is not None]
            if not flying:
                raise Interrupted
            ended, _ = ray.wait([member.running for member in flying], timeout=LOOK_SECONDS)
            for member in flying:
                if stop.is_set():
                    member.actor.stop.remote()
                if member.running in ended:
                    _settle(member, stop)
                else:
                    _look(member)
            told = max(flying, key=lambda member: member.seen[0])
            observe("train", fmean(member.seen[0] for member in members), told.seen[1])


def _settle(member: Member, stop: threading.Event) -> None:
    """Take a member's answer. One whose process died is begun again, from its checkpoint."""
    import ray

    try:
        answer = ray.get(member.running)
    except ray.exceptions.RayActorError:
        member.actor, member.attempts = None, member.attempts + 1
        if member.attempts == ATTEMPTS:
            raise StudyError(
                "crash", f"a training process died {ATTEMPTS} times; run it again to go on from its checkpoint"
            ) from None
        return
    if isinstance(answer, Refusal):
        raise refused(answer)
    member.done = answer
    member.seen = (1.0 if answer else member.seen[0], member.seen[1])
    ray.kill(member.actor)
    member.actor = None


def _look(member: Member) -> None:
    """Ask how far it is; a process that just died says so when its answer is taken."""
    import ray

    try:
        member.seen = ray.get(member.actor.seen.remote())
    except ray.exceptions.RayActorError:
        return
