"""OUT/runs/<run id>/log.jsonl: one JSON line per event, with study keys, never a path or header text."""

from __future__ import annotations

import io
import json
import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import objects, store

PUT_SECONDS = 60.0
KEPT_LINES = 10
_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **{
                name: value
                for name, value in vars(record).items()
                if name not in _STANDARD and not name.startswith("_")
            },
        }
        if record.exc_info and record.exc_info[0] is not None:
            # The kind and the places in our code; the text of a foreign error may quote a path.
            entry["error"] = record.exc_info[0].__name__
            entry["where"] = _places(record.exc_info[2])
        return json.dumps(entry, default=str)


def _places(traceback: object) -> list[str]:
    places = []
    while traceback is not None:
        code = traceback.tb_frame.f_code  # type: ignore[attr-defined]
        places.append(f"{code.co_name}:{traceback.tb_lineno}")  # type: ignore[attr-defined]
        traceback = traceback.tb_next  # type: ignore[attr-defined]
    return places[-8:]


class LastLines(logging.Handler):
    """The last lines that the log has of each study, for the record of one that fails."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_JsonLines())
        self._kept: dict[str, deque[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        key = getattr(record, "key", None)
        if isinstance(key, str):
            self._kept.setdefault(key, deque(maxlen=KEPT_LINES)).append(self.format(record))

    def of(self, key: str) -> list[str]:
        return list(self._kept.get(key, ()))

    def forget(self, key: str) -> None:
        self._kept.pop(key, None)


def _file_handler(path: Path) -> logging.Handler:
    path.parent.mkdir(parents=True, exist_ok=True)
    return logging.FileHandler(path, encoding="utf-8")


class _ObjectHandler(logging.Handler):
    """A log in an object store, which knows no appending: all of it is put again, once a minute and at the end."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url, self._lines, self._put_at = url, io.StringIO(), time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.write(self.format(record) + "\n")
        if time.monotonic() - self._put_at > PUT_SECONDS:
            self._put()

    def _put(self) -> None:
        self._put_at = time.monotonic()
        with suppress(OSError):  # a store that is away for a while must not end the night
            store.write(self._url, self._lines.getvalue().encode())

    def close(self) -> None:
        self._put()
        super().close()


@contextmanager
def run_log(out: str, run_id: str, *others: logging.Handler) -> Iterator[None]:
    """Send what the logger "maskmill" is told to this run's log, and to `others`."""
    url = store.join(out, "runs", run_id, "log.jsonl")
    logger = logging.getLogger("maskmill")
    handler = _ObjectHandler(url) if objects.is_remote(url) else _file_handler(store.local(url))
    handler.setFormatter(_JsonLines())
    level, propagate = logger.level, logger.propagate
    for each in (handler, *others):
        logger.addHandler(each)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        for each in (handler, *others):
            logger.removeHandler(each)
        logger.setLevel(level)
        logger.propagate = propagate
        handler.close()
