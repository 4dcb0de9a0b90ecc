"""Pulls works in a thread of its own, no more than are wanted."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any


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
