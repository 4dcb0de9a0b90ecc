"""Who is at work on what in OUT, so that two commands that share it never take anything from under each other.

Locks are on folders that are there anyway (flock): they leave no file, and the kernel gives them back however their
holder ends. Where a file system has none, and in an object store, they do nothing: there it is up to the user to start
one command at a time, or each with studies of its own.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from . import objects, store
from .errors import Interrupted, StudyError

PATIENCE_SECONDS = 600.0  # with another command; the longest it holds a lock for itself is one study's publishing
LOOK_SECONDS = 0.05
BUSY = (errno.EAGAIN, errno.EACCES)


@contextmanager
def alone(folder: str, stop: threading.Event, patience: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Have `folder` for oneself; waits for others. Raises StudyError("storage") where one of them does not go on."""
    handle = _open(folder)
    try:
        if handle is not None:
            _wait(handle, fcntl.LOCK_EX, stop, patience)
        yield
    finally:
        if handle is not None:
            os.close(handle)


class Claim:
    """A study that this command works on. Others may join under the same runtime; only who is alone may begin anew.

    `first`: nobody else has claimed it. Call `share` when what others rely on is there. It ends with this object.
    """

    def __init__(self, folder: str, stop: threading.Event) -> None:
        self._handle: int | None = None
        self._handle = _open(folder)
        self.first = self._handle is None or _take(self._handle, fcntl.LOCK_EX)
        if self._handle is not None and not self.first:
            _wait(self._handle, fcntl.LOCK_SH, stop, PATIENCE_SECONDS)

    def share(self) -> None:
        if self._handle is not None:
            _take(self._handle, fcntl.LOCK_SH)

    def __del__(self) -> None:
        if self._handle is not None:
            os.close(self._handle)


def _open(folder: str) -> int | None:
    if objects.is_remote(folder):
        return None
    path = store.local(folder)
    path.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _take(handle, fcntl.LOCK_SH)
    except OSError:  # no locks here
        os.close(handle)
        return None
    fcntl.flock(handle, fcntl.LOCK_UN)
    return handle


def _take(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in BUSY:
            raise
        return False
    return True


def _wait(handle: int, kind: int, stop: threading.Event, patience: float) -> None:
    end = time.monotonic() + patience
    while not _take(handle, kind):
        if stop.is_set():
            raise Interrupted
        if time.monotonic() > end:
            raise StudyError(
                "storage", "another command on this OUT holds it and does not go on: end that one, and run this again"
            )
        stop.wait(LOOK_SECONDS)
