"""Where a private Ray cluster lives: a folder of its own, and the watchdog that empties it however the driver ends."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from pipeline.errors import UsageError

from . import watchdog

PREFIX = "mm-"
LONGEST_PARENT = 28  # characters: we add 14 and Ray about 62, and a Unix socket's path ends at 107
OWNER = "owner"  # names the machine, and is locked while driver or watchdog lives
YOUNG_SECONDS = 60.0  # so long a folder may be without that lock, because it is just being made
LEAVE = b"."  # says to the watchdog that all was ended in order
LOOK_SECONDS = 0.1


class Home:
    """The folder, how the cluster's processes are told from others (`mark`), and the watchdog.

    Raises UsageError where there is no place for a folder.
    """

    def __init__(self) -> None:
        self.folder, self.mark = _short_folder(), secrets.token_hex(8)
        try:
            self._owner = _own(self.folder)
            self.guard = self._start_guard()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="ray-watchdog", daemon=True)
        self._watcher.start()

    def _start_guard(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", watchdog.__file__, self.mark, str(self.folder), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # a Ctrl-C goes to the whole process group
            pass_fds=[self._owner],
        )

    def _watch(self) -> None:
        """Start the watchdog again, should somebody have killed it: two of Ray's agents outlive a killed driver."""
        while not self._over.wait(LOOK_SECONDS):
            self._have_guard()

    def _have_guard(self) -> None:
        if self.guard.poll() is not None:
            self.guard.communicate()
            self.guard = self._start_guard()

    def close(self) -> None:
        """Have the watchdog sweep and remove the folder."""
        self._over.set()
        self._watcher.join()
        self._have_guard()
        self.guard.communicate(LEAVE)  # and closes the pipe
        os.close(self._owner)


def _short_folder() -> Path:
    for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if len(parent) <= LONGEST_PARENT:
            with suppress(OSError):
                sweep_abandoned(Path(parent))
                return Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    raise UsageError(f"Ray needs a writable folder: set TMPDIR to one of at most {LONGEST_PARENT} characters")


def _own(folder: Path) -> int:
    handle = os.open(folder / OWNER, os.O_RDWR | os.O_CREAT, 0o600)
    os.write(handle, socket.gethostname().encode())
    with suppress(OSError):  # no locks here: then nobody can take it for abandoned either
        fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def sweep_abandoned(parent: Path) -> None:
    """Remove the folders in `parent`, and end the agents in them, whose driver and watchdog were both killed."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # somebody else's, or in use
            handle = os.open(folder / OWNER, os.O_RDWR | os.O_NOFOLLOW)
            try:
                status = os.fstat(handle)
                ours = status.st_uid == os.getuid() and os.read(handle, 256) == socket.gethostname().encode()
                if ours and time.time() - status.st_mtime > YOUNG_SECONDS:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    watchdog.sweep("", str(folder), calm=0.0)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)
