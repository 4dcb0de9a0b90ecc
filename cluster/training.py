"""Training on Ray: one actor per network, with a GPU each where the cluster has them.

One network fits one device here, and Ray Train's worker groups, data shards and collective set-up would only stand
between it and its checkpoint, which already makes a training survive its process (docs/decisions.md).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pipeline.errors import Interrupted, StudyError, UsageError

from .actor import Refusal, Versions, mismatch, refusal_of, versions
from .pool import THREADS
from .session import Session
from .trouble import refused

if TYPE_CHECKING:
    from pipeline.training.gather import Observe, Preparation
    from pipeline.training.job import TrainJob

logger = logging.getLogger("maskmill")

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
    started: bool = False  # the actor's process answers
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
        at_once = min(job.workers or gpus, gpus) if gpus else job.workers or 1
        if job.address is not None and not gpus:
            _refuse_threads(threads)
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
                if stop.is_set() and not member.started:  # it waits for a place in the cluster
                    _drop(member)
                    continue
                if stop.is_set():
                    member.actor.stop.remote()
                if member.running in ended:
                    _settle(member)
                else:
                    _look(member)
            told = max(flying, key=lambda member: member.seen[0])
            observe("train", fmean(member.seen[0] for member in members), told.seen[1])


def _refuse_threads(threads: int) -> None:
    """An actor that no machine of the cluster has the cores for would wait for ever."""
    import ray

    most = max((int(n["Resources"].get("CPU", 0)) for n in ray.nodes() if n["Alive"]), default=0)
    if threads > most:
        raise UsageError(f"threads is {threads}, but no machine of the cluster has more than {most} cores for Ray")


def _drop(member: Member) -> None:
    import ray

    ray.kill(member.actor)
    member.actor, member.running, member.started = None, None, False


def _settle(member: Member) -> None:
    """Take a member's answer. One whose process died is begun again, from its checkpoint."""
    import ray

    try:
        answer = ray.get(member.running)
    except ray.exceptions.RayActorError:
        member.actor, member.started, member.attempts = None, False, member.attempts + 1
        if member.attempts == ATTEMPTS:
            raise StudyError(
                "crash", f"a training process died {ATTEMPTS} times; run it again to go on from its checkpoint"
            ) from None
        return
    if isinstance(answer, Refusal):
        raise refused(answer)
    member.done = answer
    member.seen = (1.0 if answer else member.seen[0], member.seen[1])
    _drop(member)


def _look(member: Member) -> None:
    """Ask how far it is, but never wait for one that has no process yet; one that died says so when it is settled."""
    import ray

    asked = member.actor.seen.remote()
    ready, _ = ray.wait([asked], timeout=LOOK_SECONDS)
    if not ready:
        return
    try:
        before, member.seen = member.seen, ray.get(asked)
    except ray.exceptions.RayActorError:
        return
    member.started = True
    if (samples := member.seen[1].get("samples at once")) != before[1].get("samples at once"):
        logger.warning("out of memory: gradients add up over smaller batches", extra={"samples": samples})
