"""Hands works to the actors of a pool and yields what comes back: one outcome per block."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import Any, cast

from pipeline.engine import Failure, Outcome, Stranded
from pipeline.errors import Cause

from .actor import Refusal, scrub
from .feed import Feed
from .member import IN_FLIGHT, Clock, Job, Member
from .pool import Pool
from .trouble import epitaph, living_nodes, node_went

WATCH_SECONDS = 1.0  # between two looks at who hangs
NODES_LOST = 20  # of one block, before it is given up: a cluster must not eat nodes for ever


class Dispatch:
    """One run over a pool.

    An actor runs its calls in order, so a death is charged to the block at the head of its queue and to no
    other. The answer of the block before may be lost in that death, which would charge an innocent one:
    hence whatever was on a dead actor is run alone from then on, and only what dies alone reaches the last
    attempt. An actor that hangs is killed, and its block treated likewise.

    A death is not charged where the node of the actor is gone. That may become known later than the death, so
    what is kept is where a block's actors died; which of these nodes live is asked when attempts are counted.

    Blocks of one kind go to actors of that kind only. Where there has been none for the pool's patience, they
    are stranded.
    """

    def __init__(self, pool: Pool, works: Iterable[tuple[Any, ...]], stop: threading.Event, attempts: int) -> None:
        self.pool, self.stop, self.attempts = pool, stop, attempts
        self.works = works
        self.todo: deque[Job] = deque()
        self._absent: dict[str, Clock] = {}  # how long kinds that are wanted have had no actor
        self._watched = time.monotonic()

    def outcomes(self) -> Iterator[Outcome]:
        """Yield until all is done, or soon after `stop` is set; on leaving, whatever still runs is killed."""
        feed = Feed(self.works)
        try:
            while not self.stop.is_set():
                heads = {m.head: m for m in self.pool.members if m.head is not None}
                flying = sum(len(member.flying) for member in self.pool.members)
                feed.ask(self._hunger(flying))
                self.todo.extend(Job(work) for work in feed.take(0.0 if heads or self.todo else 0.1) if work)
                outstanding = len(self.todo) + flying
                if feed.ended and not outstanding:
                    return
                if outstanding:
                    self._staff(outstanding, ended=feed.ended)
                self._hand_out()
                yield from self._answers(hungry=feed.asked > 0)
                yield from self._hanging()
                yield from self._stranded()
        finally:
            feed.close()
            self.pool.drop_busy()

    def _hunger(self, flying: int) -> int:
        """How many works to want beyond those that are here.

        In a private cluster workers start as works come, so enough for all of them. In a joined one enough for
        the kind that has least, whatever waits for others: who plans the next study gives it to that kind.
        """
        self.pool.waiting = waiting = Counter(job.kind for job in self.todo)
        if not self.pool.shared:
            return self.pool.workers * IN_FLIGHT - flying - len(self.todo)
        room: Counter[str] = Counter()
        for member in self.pool.members:
            if member.kind is not None:
                room[member.kind] += IN_FLIGHT - len(member.flying)
        if not room:
            return 1 - len(self.todo)  # is there anything to do at all?
        return sum(max(0, room[kind] - waiting[kind]) for kind in room)

    def _staff(self, outstanding: int, *, ended: bool) -> None:
        """Have actors for what there is to do, and stop asking for more than that."""
        if self.pool.shared and not ended:
            self.pool.grow(self.pool.workers)
            return
        wanted = {job.kind for job in self.todo}
        # Who idles because his kind is done is of no use to the others.
        idle = sum(m.ready and not m.flying and m.kind not in wanted for m in self.pool.members)
        self.pool.grow(outstanding + idle)
        if ended:
            self.pool.withdraw(outstanding + idle)

    def _hand_out(self) -> None:
        """Give every job that may go now to the member with least to do, those that go alone first.

        Nothing waits behind a running block while it could be the first of an actor that is starting.
        """
        now = time.monotonic()
        free = [member for member in self.pool.members if member.has_room]
        if not free:
            return
        starting = sum(not member.ready for member in self.pool.members)
        for job in sorted(self.todo, key=lambda job: not job.alone):
            if job.due > now:
                continue
            takers = [member for member in free if member.takes(job)]
            if not self.pool.shared and len(self.todo) <= starting:
                takers = [member for member in takers if not member.flying]
            if takers:
                member = min(takers, key=lambda member: len(member.flying))
                if self.pool.give(member, job):
                    self.todo.remove(job)
            elif job.alone and (fellows := [member for member in free if member.kind == job.kind]):
                # Let one of its kind run empty for it.
                free.remove(min(fellows, key=lambda member: (len(member.flying), member.number)))

    def _answers(self, *, hungry: bool) -> Iterator[Outcome]:
        """Wait a little for answers of members, and settle each."""
        import ray

        heads = {member.head: member for member in self.pool.members if member.head is not None}
        if not heads:
            if self.todo:
                self.stop.wait(0.05)  # all of it waits for an actor or for its time
            return
        pause = 0.02 if hungry or self.todo else 0.25
        if not ray.wait(list(heads), num_returns=1, timeout=pause)[0]:
            return
        done, _ = ray.wait(list(heads), num_returns=len(heads), timeout=0)
        for ref in done:
            member = heads[ref]
            if member.flying and member.flying[0][0] == ref:
                yield from self._settle(member)
            else:
                self.pool.welcome(member, ref)

    def _hanging(self) -> Iterator[Outcome]:
        """End the actors that do not get on with what they have to do."""
        now = time.monotonic()
        if now - self._watched < WATCH_SECONDS:
            return
        self._watched = now
        for member in list(self.pool.members):
            if self.pool.hangs(member):
                if member.flying:
                    yield from self._mourn(member, Refusal("timeout", self.pool.stall_words()))
                else:
                    self.pool.let_go(member)

    def _stranded(self) -> Iterator[Outcome]:
        """Give up blocks whose kind of actor has been away for too long while others were there."""
        present = {member.kind for member in self.pool.members if member.kind is not None}
        if not present:
            return  # the pool itself says when there is no more hope
        for kind in present & self._absent.keys():
            del self._absent[kind]
        for kind in {job.kind for job in self.todo} - present:
            if self._absent.setdefault(kind, Clock()).look() > self.pool.patience:
                gone = [job for job in self.todo if job.kind == kind]
                self.todo = deque(job for job in self.todo if job.kind != kind)
                for task in (task for job in gone for task in job.tasks):
                    yield Stranded(task.key, task.index, kind)

    def _settle(self, member: Member) -> Iterator[Outcome]:
        """What the head of `member` came to."""
        import ray

        ref, job = member.flying[0]
        try:
            answer = ray.get(ref)
        except ray.exceptions.RayActorError as error:
            if node_went(member, error):
                yield from self._evacuate(member)
            else:
                yield from self._mourn(member, _died(epitaph(error)))
            return
        except ray.exceptions.OutOfMemoryError:
            yield from self._mourn(member, _died("Ray ended it because its node was out of memory"))
            return
        except ray.exceptions.RayError as error:  # what it was sent or wanted to answer cannot be pickled
            answer = Refusal("crash", scrub(str(error).strip().splitlines()[-1]))
        if isinstance(answer, Refusal) and answer.fatal:
            yield from self._mourn(member, _died(answer.message))
            return
        member.flying.popleft()
        self.pool.useful(member)
        if isinstance(answer, Refusal):
            yield from self._again(job, answer)
        else:
            yield from self._deliver(job, answer)

    def _deliver(self, job: Job, answer: list[Any]) -> Iterator[Outcome]:
        """One outcome for every task that was sent, whatever the worker answered."""
        found = {(outcome.key, outcome.index): outcome for outcome in answer}
        for task in job.tasks:
            outcome = found.get((task.key, task.index))
            single = Job((task,), job.attempts, died_on=job.died_on)
            if outcome is None:
                yield from self._again(single, Refusal("crash", "the worker gave no answer"))
            elif isinstance(outcome, Failure):
                yield from self._again(single, Refusal(outcome.cause, outcome.message))
            else:
                yield outcome

    def _again(self, job: Job, refusal: Refusal) -> Iterator[Outcome]:
        """Split a refused work to see whose fault it was; retry storage after a pause; give up the rest."""
        if len(job.tasks) > 1:
            self._put_first(job.split(alone=False))
            return
        job.attempts += 1
        if refusal.cause == "storage" and job.attempts < self.attempts:
            job.due = time.monotonic() + 0.5 * 2**job.attempts
            self._put_first([job])
            return
        yield _failure(job, refusal, job.attempts)

    def _mourn(self, member: Member, how: Refusal) -> Iterator[Outcome]:
        """A member died or hung: charge the block that it ran, and have all that it was given run alone."""
        job, *behind = self.pool.bury(member, useless=False)
        for other in behind:
            other.alone = True
        self._put_first(behind)
        job.alone, job.died_on = True, (*job.died_on, member.node)
        if len(job.tasks) > 1:
            self._put_first(job.split(alone=True))
            return
        living = living_nodes()
        attempts = job.attempts + sum(node in living for node in job.died_on)
        if attempts < self.attempts:
            self._put_first([job])
        else:
            yield _failure(job, how, attempts)

    def _evacuate(self, member: Member) -> Iterator[Outcome]:
        """The node of a member went: what it was given is done elsewhere, as if it had never been given."""
        job, *behind = self.pool.bury(member, useless=False)
        self._put_first(behind)
        job.died_on = (*job.died_on, member.node)
        if len(job.died_on) < NODES_LOST:
            self._put_first([job])
            return
        words = f"{len(job.died_on)} nodes went away while they ran this block; run it again on steadier machines"
        for task in job.tasks:
            yield _failure(Job((task,)), Refusal("crash", words), len(job.died_on))

    def _put_first(self, jobs: list[Job]) -> None:
        self.todo.extendleft(reversed(jobs))


def _failure(job: Job, refusal: Refusal, attempts: int) -> Failure:
    task = job.tasks[0]
    return Failure(task.key, task.index, cast(Cause, refusal.cause), refusal.message, attempts)


def _died(how: str) -> Refusal:
    return Refusal("crash", f"the worker died while running this block: {how}")
