"""The actors of an engine: one warm worker each, started when there is work, replaced when they die."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

from pipeline.errors import Cause, StudyError, UsageError

from .actor import Refusal, Shell, scrub, versions

IN_FLIGHT = 2  # works per actor: the next one is there when the first is done
THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "BLOSC_NTHREADS",
)


@dataclass(eq=False)
class Job:
    """A work on its way. One that was near a death goes `alone`, so that the next death is surely its own."""

    tasks: tuple[Any, ...]
    attempts: int = 0
    alone: bool = False
    due: float = 0.0  # not before this time (monotonic seconds)


@dataclass(eq=False)
class Member:
    """One actor and what it was given, in the order in which it runs it."""

    number: int
    actor: Any
    hello: Any
    ready: bool = False
    flying: deque[tuple[Any, Job]] = field(default_factory=deque)

    @property
    def head(self) -> Any:
        """What it will answer next, if anything."""
        if not self.ready:
            return self.hello
        return self.flying[0][0] if self.flying else None

    def takes(self, job: Job) -> bool:
        if not self.ready or any(other.alone for _, other in self.flying):
            return False
        return len(self.flying) < (1 if job.alone else IN_FLIGHT)


class Pool:
    """At most `workers` actors of `Shell(worker, spec)`. Its methods may be called from any thread.

    An actor that dies before it has shown any use (while it loads, or idle) is replaced after a pause that
    doubles; `boots` such deaths more than there are workers, without a finished block in between, are an
    error.
    """

    def __init__(
        self, spec: Any, worker: str, *, workers: int, options: dict[str, Any], boots: int, patience: float
    ) -> None:
        import ray

        self.workers, self.boots, self.patience = workers, boots, patience
        self.members: list[Member] = []
        self._make = ray.remote(Shell).options(max_restarts=0, max_task_retries=0, **options)
        self._options = options
        self._args = (worker, spec, versions())
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        self._useless = 0
        self._ever_ready = False
        self._last_words = "; usually too little memory on the node, or a broken driver or library"
        self._not_before = 0.0
        self._alive_at = 0.0  # when some actor was last ready, or the first was asked for

    def grow(self, wanted: int) -> None:
        """Have `wanted` actors, `workers` at most; raise where they cannot be had."""
        with self._lock:
            now = time.monotonic()
            if not self.members or any(member.ready for member in self.members):
                self._alive_at = now
            elif now - self._alive_at > self.patience:
                raise self._starved()
            while len(self.members) < min(wanted, self.workers) and now >= self._not_before:
                actor = self._make.remote(*self._args)
                self.members.append(Member(next(self._numbers), actor, actor.hello.remote()))

    def welcome(self, member: Member) -> None:
        """Take the hello of `member`, which is there. Its refusal is raised, its death counted."""
        import ray

        with self._lock:
            if member.ready or member not in self.members:
                return
            try:
                answer = ray.get(member.hello)
            except ray.exceptions.RayActorError as error:
                if error.actor_init_failed:
                    raise _cannot_start(error) from error
                self.bury(member, useless=True)
                return
            except (ray.exceptions.RuntimeEnvSetupError, ray.exceptions.ActorUnschedulableError) as error:
                raise _cannot_start(error) from error
            except ray.exceptions.RayError:
                self.bury(member, useless=True)
                return
            if isinstance(answer, Refusal) and answer.fatal:
                self._last_words = f": {answer.message}"
                self.bury(member, useless=True)
                return
            if isinstance(answer, Refusal):
                raise refused(answer)
            member.ready = self._ever_ready = True

    def bury(self, member: Member, *, useless: bool) -> list[Job]:
        """Drop `member`, dead or to be killed; what it had been given comes back, the running one first."""
        with self._lock:
            if member not in self.members:
                return []
            self.members.remove(member)
            _kill(member)
            if useless:
                self._useless += 1
                self._not_before = time.monotonic() + min(30.0, 0.25 * 2**self._useless)
                if self._useless >= self.boots + self.workers and not any(m.ready for m in self.members):
                    raise self._dying()
            return [job for _, job in member.flying]

    def give(self, member: Member, job: Job) -> bool:
        """Send `job` to `member`, unless that is no longer here."""
        with self._lock:
            if member not in self.members:
                return False
            member.flying.append((member.actor.run.remote(job.tasks), job))
            return True

    def lost(self, member: Member) -> None:
        """`member` died in another call than `run`. If it was also given works, those will tell of it."""
        with self._lock:
            if not member.flying:
                self.bury(member, useless=True)

    def useful(self) -> None:
        """A block came out: deaths before it are forgotten."""
        self._useless = 0

    def any_ready(self) -> Member:
        """The ready actor with least to do; waits for one. Raises what `grow` and `welcome` raise."""
        import ray

        while True:
            with self._lock:
                self.grow(1)
                ready = [member for member in self.members if member.ready]
                starting = {member.hello: member for member in self.members if not member.ready}
            if ready:
                return min(ready, key=lambda member: len(member.flying))
            if not starting:
                time.sleep(0.05)  # the pause before the next start
                continue
            done, _ = ray.wait(list(starting), num_returns=1, timeout=0.25)
            for ref in done:
                self.welcome(starting[ref])

    def drop_busy(self) -> None:
        """Kill every actor that has something to do; the idle ones stay warm."""
        with self._lock:
            for member in [m for m in self.members if m.flying or not m.ready]:
                self.bury(member, useless=False)

    def close(self) -> None:
        with self._lock:
            for member in list(self.members):
                self.bury(member, useless=False)

    def _starved(self) -> Exception:
        import ray

        free = ray.available_resources()
        has = ", ".join(f"{free.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
        asks = {name: self._options.get(f"num_{name.lower()}s", 0) for name in ("CPU", "GPU")}
        needs = " and ".join(f"{count:g} {name}" for name, count in asks.items() if count) or "memory"
        return UsageError(
            f"0 of {self.workers} workers started within {self.patience:.0f} s: each needs {needs}, and the "
            f"Ray cluster has {has} free; ask for less or wait until others have finished"
        )

    def _dying(self) -> Exception:
        what = f"{self._useless} in a row died while they loaded or idled{self._last_words}"
        self._useless = 0
        if self._ever_ready:
            return StudyError("crash", f"workers keep dying: {what}")
        return UsageError(f"no worker could start: {what}")


def refused(refusal: Refusal) -> Exception:
    """`refusal` as the exception that it stands for."""
    if refusal.cause == "usage":
        return UsageError(refusal.message)
    return StudyError(cast(Cause, refusal.cause), refusal.message)


def _cannot_start(error: Exception) -> UsageError:
    lines = str(error).strip().splitlines()
    return UsageError(f"a worker could not start on its node: {scrub(lines[-1] if lines else repr(error))}")


def _kill(member: Member) -> None:
    import ray

    with suppress(Exception):  # it may be dead already, or the cluster gone
        ray.kill(member.actor, no_restart=True)
