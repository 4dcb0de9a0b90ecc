"""Hands works to the actors of a pool and yields what comes back: one Receipt or Failure per block."""

from __future__ import annotations

import contextvars
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, cast

from pipeline.engine import Failure, Receipt
from pipeline.errors import Cause

from .actor import Refusal, scrub
from .pool import IN_FLIGHT, Job, Member, Pool

Outcome = Receipt | Failure


class Feed:
    """Pulls works from an iterable in a thread of its own, exactly as many as were asked for.

    The iterable may block for minutes, while a study is being read, without keeping receipts from coming
    out.
    """

    def __init__(self, works: Iterable[tuple[Any, ...]]) -> None:
        self.asked = 0
        self.ended = False
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        run = contextvars.copy_context().run  # the iterable keeps the caller's loggers and clients
        threading.Thread(target=run, args=(self._pull, works), name="works", daemon=True).start()

    def _pull(self, works: Iterable[tuple[Any, ...]]) -> None:
        try:
            iterator = iter(works)
            try:
                while self._wanted.get():
                    self._found.put(("work", next(iterator)))
            finally:
                if hasattr(iterator, "close"):
                    iterator.close()
        except StopIteration:
            self._found.put(("end", None))
        except BaseException as error:
            self._found.put(("error", error))

    def ask(self, count: int) -> None:
        """Want `count` works that are not here yet, those asked for before included."""
        while self.asked < count and not self.ended:
            self.asked += 1
            self._wanted.put(True)

    def take(self, timeout: float) -> list[tuple[Any, ...]]:
        """The works that have come, after waiting for the first; raises what the iterable raised."""
        works: list[tuple[Any, ...]] = []
        with suppress(queue.Empty):
            while True:
                kind, value = self._found.get(timeout=timeout) if timeout else self._found.get_nowait()
                timeout = 0.0
                if kind == "error":
                    raise value
                if kind == "end":
                    self.ended, self.asked = True, 0
                else:
                    self.asked -= 1
                    works.append(value)
        return works

    def close(self) -> None:
        """Pull no more. A blocked iterable is left to end by itself."""
        self._wanted.put(False)


class Dispatch:
    """One run over a pool.

    An actor runs its calls in order, so a death is charged to the block at the head of its queue and to no
    other. The answer of the block before may be lost in that death, which would charge an innocent one:
    hence whatever was on a dead actor is run alone from then on, and only what dies alone reaches the last
    attempt.
    """

    def __init__(self, pool: Pool, works: Iterable[tuple[Any, ...]], stop: threading.Event, attempts: int) -> None:
        self.pool, self.stop, self.attempts = pool, stop, attempts
        self.works = works
        self.todo: deque[Job] = deque()

    def outcomes(self) -> Iterator[Outcome]:
        """Yield until all is done, or soon after `stop` is set; on leaving, whatever still runs is killed."""
        feed = Feed(self.works)
        try:
            while not self.stop.is_set():
                heads = {m.head: m for m in self.pool.members if m.head is not None}
                flying = sum(len(member.flying) for member in self.pool.members)
                feed.ask(self.pool.workers * IN_FLIGHT - flying - len(self.todo))
                self.todo.extend(Job(work) for work in feed.take(0.0 if heads or self.todo else 0.1) if work)
                outstanding = len(self.todo) + flying
                if feed.ended and not outstanding:
                    return
                if outstanding:
                    self.pool.grow(outstanding)
                self._hand_out()
                yield from self._answers(hungry=feed.asked > 0)
        finally:
            feed.close()
            self.pool.drop_busy()

    def _hand_out(self) -> None:
        """Give every job that may go now to the member with least to do, those that go alone first.

        Nothing waits behind a running block while it could be the first of an actor that is starting.
        """
        now = time.monotonic()
        free = [member for member in self.pool.members if member.ready]
        starting = len(self.pool.members) - len(free)
        for job in sorted(self.todo, key=lambda job: not job.alone):
            if job.due > now:
                continue
            takers = [member for member in free if member.takes(job)]
            if len(self.todo) <= starting:
                takers = [member for member in takers if not member.flying]
            if takers:
                member = min(takers, key=lambda member: len(member.flying))
                if self.pool.give(member, job):
                    self.todo.remove(job)
            elif job.alone and free:  # let one member run empty for it
                free.remove(min(free, key=lambda member: (len(member.flying), member.number)))

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
            if ref == heads[ref].hello:  # a measurement on another thread may have welcomed it by now
                self.pool.welcome(heads[ref])
            else:
                yield from self._settle(heads[ref])

    def _settle(self, member: Member) -> Iterator[Outcome]:
        """What the head of `member` came to."""
        import ray

        ref, job = member.flying[0]
        try:
            answer = ray.get(ref)
        except ray.exceptions.RayActorError as error:
            yield from self._mourn(member, _epitaph(error))
            return
        except ray.exceptions.OutOfMemoryError:
            yield from self._mourn(member, "Ray ended it because its node was out of memory")
            return
        except ray.exceptions.RayError as error:  # what it was sent or wanted to answer cannot be pickled
            answer = Refusal("crash", scrub(str(error).strip().splitlines()[-1]))
        if isinstance(answer, Refusal) and answer.fatal:
            yield from self._mourn(member, answer.message)
            return
        member.flying.popleft()
        self.pool.useful()
        if isinstance(answer, Refusal):
            yield from self._again(job, answer)
        else:
            yield from self._deliver(job, answer)

    def _deliver(self, job: Job, answer: list[Any]) -> Iterator[Outcome]:
        """One outcome for every task that was sent, whatever the worker answered."""
        found = {(outcome.key, outcome.index): outcome for outcome in answer}
        for task in job.tasks:
            outcome = found.get((task.key, task.index))
            single = Job((task,), job.attempts)
            if outcome is None:
                yield from self._again(single, Refusal("crash", "the worker gave no answer"))
            elif isinstance(outcome, Failure):
                yield from self._again(single, Refusal(outcome.cause, outcome.message))
            else:
                yield outcome

    def _again(self, job: Job, refusal: Refusal) -> Iterator[Outcome]:
        """Split a refused work to see whose fault it was; retry storage after a pause; give up the rest."""
        if len(job.tasks) > 1:
            self._split(job, alone=False)
            return
        job.attempts += 1
        if refusal.cause == "storage" and job.attempts < self.attempts:
            job.due = time.monotonic() + 0.5 * 2**job.attempts
            self.todo.appendleft(job)
            return
        yield _failure(job, refusal)

    def _mourn(self, member: Member, how: str) -> Iterator[Outcome]:
        """A member died: charge the block that it was running, and have all that it was given run alone."""
        jobs = self.pool.bury(member, useless=False)
        for job in reversed(jobs[1:]):
            job.alone = True
            self.todo.appendleft(job)
        job = jobs[0]
        if len(job.tasks) > 1:
            self._split(job, alone=True)
            return
        job.attempts += 1
        job.alone = True
        if job.attempts < self.attempts:
            self.todo.appendleft(job)
            return
        yield _failure(job, Refusal("crash", f"the worker died while running this block: {how}"))

    def _split(self, job: Job, *, alone: bool) -> None:
        for task in reversed(job.tasks):
            self.todo.appendleft(Job((task,), job.attempts, alone))


def _failure(job: Job, refusal: Refusal) -> Failure:
    task = job.tasks[0]
    return Failure(task.key, task.index, cast(Cause, refusal.cause), refusal.message, job.attempts)


def _epitaph(error: Any) -> str:
    """What Ray knows of a death, in one line without paths."""
    text = str(error)
    for sign, meaning in (
        ("memory pressure", "Ray ended it because its node was out of memory"),
        ("node was terminated", "its node is gone"),
        ("The node", "its node is gone"),
        ("SIGTERM", "it got SIGTERM"),
        ("connection error code 2", "it was killed or crashed in native code (most often: out of memory)"),
    ):
        if sign in text:
            return meaning
    return scrub(text.strip().splitlines()[-1])
