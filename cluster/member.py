"""What a pool keeps of each of its actors, and of each work on its way."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segmodels.runtime import Runtime

IN_FLIGHT = 2  # works per actor: the next one is there when the first is done
LONGEST_LOOK = 5.0  # seconds that may lie between two looks


class Clock:
    """Seconds that passed while somebody was looking.

    A driver that published for ten minutes or slept with its laptop has not waited for anybody meanwhile.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last = time.monotonic()

    def look(self) -> float:
        now = time.monotonic()
        self.seconds += min(now - self._last, LONGEST_LOOK)
        self._last = now
        return self.seconds

    def reset(self) -> None:
        self.seconds, self._last = 0.0, time.monotonic()


@dataclass(eq=False)
class Job:
    """A work on its way. One that was near a death goes `alone`, so that the next death is surely its own."""

    tasks: tuple[Any, ...]
    attempts: int = 0
    alone: bool = False
    due: float = 0.0  # not before this time (monotonic seconds)
    died_on: tuple[str | None, ...] = ()  # the nodes of the actors that died while they ran it

    @property
    def kind(self) -> str:
        """Hash of the runtime that it was planned for."""
        kind: str = self.tasks[0].runtime
        return kind

    def split(self, *, alone: bool) -> list[Job]:
        """One job for each of its blocks."""
        return [Job((task,), self.attempts, alone, died_on=self.died_on) for task in self.tasks]


@dataclass(eq=False)
class Member:
    """One actor and what it was given, in the order in which it runs it.

    It is asked for (nothing is known), then born (its process is on a node), then ready (its model is loaded).
    """

    number: int
    actor: Any
    greeting: Any  # what it will say next of itself
    node: str | None = None
    runtime: Runtime | None = None
    memory: int = 0
    flying: deque[tuple[Any, Job]] = field(default_factory=deque)
    calls: int = 0  # that are not in `flying`
    steps: int = 0
    still: Clock = field(default_factory=Clock)  # since it last got on with what it has to do
    glance: Any = None  # the question for its steps that is on its way
    glanced: float = 0.0  # where `still` stood then

    @property
    def ready(self) -> bool:
        return self.runtime is not None

    @property
    def kind(self) -> str | None:
        return self.runtime.hash if self.runtime else None

    @property
    def busy(self) -> bool:
        return bool(self.flying or self.calls or (self.node and not self.ready))

    @property
    def head(self) -> Any:
        """What it will answer next, if anything."""
        if not self.ready:
            return self.greeting
        return self.flying[0][0] if self.flying else None

    @property
    def has_room(self) -> bool:
        return self.ready and len(self.flying) < IN_FLIGHT and not any(job.alone for _, job in self.flying)

    def takes(self, job: Job) -> bool:
        return self.has_room and self.kind == job.kind and not (job.alone and self.flying)
