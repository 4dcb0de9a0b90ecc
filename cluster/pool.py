"""The actors of an engine: one warm worker each, started when there is work, replaced when they die or hang."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import Any

from pipeline.engine import Kind
from pipeline.errors import StudyError, UsageError

from .actor import Born, Refusal, Shell, versions
from .member import Clock, Job, Member
from .trouble import cannot_start, duration, node_went, refused, starved

WATCH = "watch"  # the concurrency group in which an actor answers while it works
GATHER_SECONDS = 5.0  # the least time that the workers of a joined cluster are given to come together
THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "BLOSC_NTHREADS",
)


class Pool:
    """At most `workers` actors of `Shell(worker, spec)`. Its methods may be called from any thread.

    An actor that dies before it has shown any use (while it loads, or idle) is replaced after a pause that
    doubles; `boots` such deaths more than there are workers, without a finished block in between, are an
    error. That its node went is not held against it.

    shared: the cluster is not ours alone. Then all workers are asked for at once, so that an autoscaler hears of
    them, and they may be of several kinds; else there is one kind, and they start as there is work.
    patience: seconds without any ready actor after which there is no more hope. stall: seconds after which an
    actor that does not get on with its work hangs.
    """

    def __init__(
        self,
        spec: Any,
        worker: str,
        *,
        workers: int,
        options: dict[str, Any],
        boots: int,
        patience: float,
        stall: float,
        shared: bool = False,
    ) -> None:
        import ray

        self.workers, self.boots, self.patience, self.stall, self.shared = workers, boots, patience, stall, shared
        self.members: list[Member] = []
        self.waiting: Counter[str] = Counter()  # jobs of each kind that nobody was given yet
        self._make = ray.remote(concurrency_groups={WATCH: 1})(Shell).options(
            max_restarts=0, max_task_retries=0, **options
        )
        self._options = options
        self._args = (worker, spec, versions())
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        self._useless = 0
        self._ever_ready = self._gathered = False
        self._last_words = "; usually too little memory on the node, or a broken driver or library"
        self._not_before = 0.0
        self._starving = Clock()  # since some actor was last ready
        self._first_took = 0.0  # seconds, until the first was

    # -- asking for actors -----------------------------------------------------------------------------------------

    def grow(self, wanted: int) -> None:
        """Have `wanted` actors, `workers` at most; raise where they cannot be had."""
        with self._lock:
            if any(member.ready for member in self.members):
                self._starving.reset()
            elif self._starving.look() > self.patience:
                self._starving.reset()
                raise self._starved()
            while len(self.members) < min(wanted, self.workers) and time.monotonic() >= self._not_before:
                actor = self._make.remote(*self._args)
                self.members.append(Member(next(self._numbers), actor, actor.born.remote()))

    def withdraw(self, wanted: int) -> None:
        """Ask no longer for actors beyond `wanted` that no node had room for yet."""
        with self._lock:
            asked = [member for member in self.members if member.node is None]
            for member in asked[: max(0, len(self.members) - wanted)]:
                self.bury(member, useless=False)

    def welcome(self, member: Member, said: Any) -> None:
        """Take what `member` said of itself. Its refusal is raised, its death counted."""
        import ray

        with self._lock:
            if member not in self.members or member.greeting != said:  # another thread has heard it
                return
            try:
                answer = ray.get(said)
            except ray.exceptions.RayActorError as error:
                if error.actor_init_failed:
                    raise cannot_start(error) from error
                self.bury(member, useless=not node_went(member, error))
                return
            except (ray.exceptions.RuntimeEnvSetupError, ray.exceptions.ActorUnschedulableError) as error:
                raise cannot_start(error) from error
            except ray.exceptions.RayError:
                self.bury(member, useless=True)
                return
            if isinstance(answer, Refusal) and answer.fatal:
                self._last_words = f": {answer.message}"
                self.bury(member, useless=True)
            elif isinstance(answer, Refusal):
                raise refused(answer)
            elif isinstance(answer, Born):
                member.node, member.greeting = answer.node, member.actor.hello.remote()
                member.still.reset()
            else:
                member.runtime, member.greeting = answer.runtime, None
                member.memory = answer.memory // self._places(member.node)
                if not self._ever_ready:
                    self._ever_ready, self._first_took = True, self._starving.look()

    def any_ready(self, kind: str | None = None) -> Member:
        """The ready actor, of this kind, with least to do; waits for one. Raises what `grow` and `welcome` raise."""
        while True:
            with self._lock:
                self.grow(self.workers if self.shared or kind else 1)
                ready = [member for member in self.members if member.ready and kind in (None, member.kind)]
            if ready:
                return min(ready, key=lambda member: len(member.flying))
            self._hear_greetings()

    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of the actors that are ready, the one with least to do per actor first; waits for one."""
        while True:
            self.any_ready()
            if self.shared and not self._gathered:
                self._gather()
            with self._lock:
                teams: dict[str, list[Member]] = {}
                for member in self.members:
                    if member.kind is not None:
                        teams.setdefault(member.kind, []).append(member)
                if not teams:
                    continue
                load = {
                    kind: (self.waiting[kind] + sum(len(member.flying) for member in team)) / len(team)
                    for kind, team in teams.items()
                }
                order = sorted(teams, key=lambda kind: (load[kind], -len(teams[kind]), kind))
                return tuple(self._kind(teams[kind], alone=len(teams) == 1) for kind in order)

    def _kind(self, team: list[Member], *, alone: bool) -> Kind:
        assert team[0].runtime is not None
        workers = self.workers if alone else len(team)
        return Kind(team[0].runtime, workers, min(member.memory for member in team))

    def _gather(self) -> None:
        """Once: give the others as long again as the first actor took.

        Else all first studies would go to the kind of worker that happened to be the first.
        """
        self._gathered = True
        end = time.monotonic() + max(GATHER_SECONDS, self._first_took)
        while time.monotonic() < end and not all(member.ready for member in self.members):
            self._hear_greetings()

    def _hear_greetings(self) -> None:
        """Wait a moment for actors that are starting."""
        import ray

        with self._lock:
            starting = {member.greeting: member for member in self.members if not member.ready}
        if not starting:
            time.sleep(0.05)  # the pause before the next start
            return
        done, _ = ray.wait(list(starting), num_returns=1, timeout=0.25)
        for said in done:
            self.welcome(starting[said], said)
        for member in starting.values():
            if self.hangs(member):
                self.let_go(member)

    def _places(self, node: str | None) -> int:
        """How many of our workers a node may have at once."""
        import ray

        if not self.shared:
            return self.workers
        has: dict[str, float] = next((n["Resources"] for n in ray.nodes() if n["NodeID"] == node), {})
        asks = {name: self._options.get(f"num_{name.lower()}s", 0) for name in ("CPU", "GPU")}
        places = [int(has.get(name, 0) / count + 1e-6) for name, count in asks.items() if count]
        return max(1, min([self.workers, *places]))

    # -- giving them work and losing them --------------------------------------------------------------------------

    def give(self, member: Member, job: Job) -> bool:
        """Send `job` to `member`, unless that is no longer here."""
        with self._lock:
            if member not in self.members:
                return False
            if not member.busy:
                member.still.reset()
            member.flying.append((member.actor.run.remote(job.tasks), job))
            return True

    def measure(self, member: Member, window: tuple[int, int, int], channels: int) -> Any:
        """The answer of `member` to `measure`; a fatal Refusal where it hangs. Raises Ray's errors."""
        import ray

        with self._lock:
            if not member.busy:
                member.still.reset()
            member.calls += 1
            answer = member.actor.measure.remote(window, channels)
        try:
            while not ray.wait([answer], timeout=0.25)[0]:
                if self.hangs(member):
                    return Refusal("timeout", self.stall_words(), fatal=True)
            return ray.get(answer)
        finally:
            member.calls -= 1

    def hangs(self, member: Member) -> bool:
        """Whether `member` has something to do and has not got on with it for too long.

        It is asked for its steps only when it has been still for some time: who works as planned is never asked.
        """
        import ray

        with self._lock:
            if not member.busy:
                member.still.reset()
                member.glanced = 0.0
                return False
            if member.glance is not None and ray.wait([member.glance], timeout=0)[0]:
                glance, member.glance = member.glance, None
                with suppress(ray.exceptions.RayError):  # its death will be heard of in another way
                    before, member.steps = member.steps, ray.get(glance)
                    if before != member.steps:
                        member.still.reset()
            still = member.still.look()
            member.glanced = min(member.glanced, still)
            if member.glance is None and still - member.glanced > self.stall / 8:
                member.glance = member.actor.steps.options(concurrency_group=WATCH).remote()
                member.glanced = still
            return still > self.stall

    def stall_words(self) -> str:
        return f"the worker made no progress for {duration(self.stall)} (--stall-minutes) and was ended"

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

    def let_go(self, member: Member) -> None:
        """End `member`, which hangs while it loads."""
        with self._lock:
            if not member.ready:
                self._last_words = f": loading the model took longer than {duration(self.stall)} (--stall-minutes)"
                self.bury(member, useless=True)

    def lost(self, member: Member, error: Exception | None = None) -> None:
        """`member` died in another call than `run`. If it was also given works, those will tell of it."""
        with self._lock:
            if not member.flying:
                self.bury(member, useless=error is None or not node_went(member, error))

    def useful(self, member: Member) -> None:
        """A block came out: deaths before it are forgotten."""
        self._useless = 0
        member.still.reset()

    def drop_busy(self) -> None:
        """Kill every actor that has something to do or is still starting; the idle ones stay warm."""
        with self._lock:
            self.waiting.clear()
            for member in [m for m in self.members if m.flying or not m.ready]:
                self.bury(member, useless=False)

    def close(self) -> None:
        with self._lock:
            for member in list(self.members):
                self.bury(member, useless=False)

    # -- what went wrong -------------------------------------------------------------------------------------------

    def _starved(self) -> Exception:
        asks = {name: self._options.get(f"num_{name.lower()}s", 0) for name in ("CPU", "GPU")}
        return starved(asks, self.workers, self.patience, mid_run=self._ever_ready)

    def _dying(self) -> Exception:
        what = f"{self._useless} in a row died while they loaded or idled{self._last_words}"
        self._useless = 0
        if self._ever_ready:
            return StudyError("crash", f"workers keep dying: {what}")
        return UsageError(f"no worker could start: {what}")


def _kill(member: Member) -> None:
    import ray

    with suppress(Exception):  # it may be dead already, or the cluster gone
        ray.kill(member.actor, no_restart=True)
