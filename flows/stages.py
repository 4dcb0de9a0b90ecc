"""What the flows have in common: stages as Prefect tasks, and signals that end a run cleanly."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import Failed


class State(Protocol):
    """What a flow keeps of one run in this process; `error` is what a stage raised."""

    error: BaseException | None


def stage(
    states: Mapping[str, State], name: str, label: str | None = None
) -> Callable[[Callable[..., Any]], Any]:  # fmt: skip
    """A Prefect task around a function of a run id; its error stays in this process, in `states`.

    It reaches Prefect as the name of its class alone, because messages may hold paths.
    """

    def wrap(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def guarded(run_id: str, *rest: Any) -> Any:
            try:
                return function(run_id, *rest)
            except BaseException as error:
                states[run_id].error = error
                return Failed(message=type(error).__name__)

        return task(name=name, task_run_name=label or name, cache_policy=NO_CACHE, persist_result=False)(guarded)

    return wrap


@contextmanager
def stopping(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop`, so that the run ends cleanly; a second SIGINT ends it now."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    listen(stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def listen(stop: threading.Event) -> None:
    """Take the signals over, again if need be: what starts processes may have taken them."""

    def heed(number: int, _: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, heed)
