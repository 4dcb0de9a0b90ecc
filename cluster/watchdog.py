"""Ends what a private Ray cluster leaves behind, also when its driver was killed with SIGKILL.

Run as a script, by path, with the standard library alone: `watchdog.py MARK FOLDER PARENT`. Its standard
input is a pipe whose other end only the driver holds, so that the end of the driver, however it came, is
the end of the pipe. Then every process of the cluster is killed and the cluster's folder removed.

Why not Ray's own means: its daemons do die with the driver (parent-death signal), but two agents of the
raylet were seen alive 40 s later, and a worker busy in native code may be. Why no parent-death signal for
all: it follows the parent's *thread*, and the parent of a worker is the raylet. The mark is an environment
variable, which everything that a process of the cluster ever starts inherits. But a process that gives itself a
title, as those agents do, may write it over what the kernel shows of its environment: such a one is known by the
log files that it holds open in the cluster's folder.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import time
from contextlib import suppress

MARK = "MASKMILL_CLUSTER"
TITLE = b"ray::"  # how processes of Ray begin the title that they give themselves
HALF_STARTED = 5.0  # seconds in which a process between fork and exec shows its name
WORKERS = (b"RAY_RAYLET_PID=", b"RAY_JOB_ID=")  # a raylet's gift to its workers, and theirs to their children


def marked(mark: str, folder: str) -> list[int]:
    """Process ids of the cluster `mark` that lives in `folder`.

    The mark alone is not enough: what another thread of the driver started while the cluster was coming up
    has it too, and is not Ray's.
    """
    found, real = [], os.path.realpath(folder)
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:  # elsewhere Ray's own means must do
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with suppress(OSError):
            command, variables = _read(name, "cmdline"), _read(name, "environ").split(b"\0")
            if f"{MARK}={mark}".encode() in variables:
                if _is_ray(command, variables, folder):
                    found.append(int(name))
            elif command.startswith(TITLE) and _has_open(name, real):
                found.append(int(name))
    return found


def _is_ray(command: bytes, variables: list[bytes], folder: str) -> bool:
    named = command.startswith(TITLE) or folder.encode() in command
    return named or any(variable.startswith(WORKERS) for variable in variables)


def _has_open(pid: str, folder: str) -> bool:
    """Whether the process has a file in `folder`, which is no symbolic link, open."""
    for number in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):  # closed meanwhile
            if os.readlink(f"/proc/{pid}/fd/{number}").startswith(f"{folder}/"):
                return True
    return False


def _read(pid: str, name: str) -> bytes:
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()


def sweep(mark: str, folder: str, calm: float, patience: float = 20.0) -> None:
    """Kill the processes of the cluster `mark` until nobody was found for `calm` seconds."""
    begun = found = time.monotonic()
    while True:
        now = time.monotonic()
        if pids := marked(mark, folder):
            found = now
        if (not pids and now - found >= calm) or now - begun > patience:
            return
        for pid in pids:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def wait_for_end(parent: int) -> bool:
    """Return when the driver is gone or has let go of the pipe; says whether it took its leave.

    A child that the driver forked holds the pipe too, hence the look at who our parent is.
    """
    leave = b""
    while os.getppid() == parent:
        if select.select([0], [], [], 1.0)[0]:
            said = os.read(0, 1)
            if not said:
                break
            leave = said
    return bool(leave)


def main() -> None:
    mark, folder, parent = sys.argv[1], sys.argv[2], int(sys.argv[3])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the driver, whose end is ours
    took_leave = wait_for_end(parent)
    # A driver that was killed may have had daemons half started, which nobody would know for ours at this moment.
    sweep(mark, folder, calm=0.0 if took_leave else HALF_STARTED)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
