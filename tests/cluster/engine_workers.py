"""Small workers that the actors of these tests import by name: what a block does stands in its task."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.engine import Baseline, Receipt
from pipeline.errors import StudyError
from segmodels.runtime import Runtime

HERE = str(Path(__file__).parent)
WORKER = "engine_workers:Worker"


def runtime_of(kind: str) -> Runtime:
    return Runtime("cpu", "torch", "fp32", 1, 1, (("cpu", kind),))


ONE_KIND = runtime_of("one")
HANGING = 99  # so many channels are never measured


@dataclass(frozen=True)
class Task:
    """A block that does `act` with `argument`; `folder` receives a file for every time it was begun."""

    key: str
    index: int
    act: str = "nothing"
    argument: Any = None
    folder: str | None = None
    runtime: str = ONE_KIND.hash


@dataclass(frozen=True)
class Spec:
    """What the worker's constructor does."""

    act: str = "nothing"
    folder: str | None = None
    argument: Any = None


class Worker:
    runtime = runtime_of(os.environ.get("TEST_KIND", "one"))  # a variable of its node

    def __init__(self, spec: Spec) -> None:
        self.steps = 0
        if spec.folder is not None:
            note(Path(spec.folder), "boot")
        act(spec.act, spec.argument, 0)

    def measure(self, window: tuple[int, int, int], channels: int) -> Baseline:
        if channels == HANGING:
            time.sleep(600)
        return Baseline(os.getpid(), channels, float(window[0]))

    def run(self, tasks: tuple[Task, ...]) -> list[Receipt]:
        receipts = []
        for task in tasks:
            times = note(Path(task.folder), f"{task.key}-{task.index}") if task.folder else 1
            act(task.act, task.argument, times, self.step)
            receipts.append(Receipt(task.key, task.index, 1, 1, 0.0, peak_rss_bytes=os.getpid()))
        return receipts

    def step(self) -> None:
        self.steps += 1


def note(folder: Path, name: str) -> int:
    """Leave a file that says that `name` was begun in this process; how often it was by now."""
    (folder / f"{name}.{time.time_ns()}.{os.getpid()}").touch()
    return begun(folder, name)


def begun(folder: Path, name: str) -> int:
    return len(list(folder.glob(f"{name}.*")))


def act(name: str, argument: Any, times: int, step: Callable[[], None] = lambda: None) -> None:
    if name == "sleep" or (name == "sleep once" and times == 1):
        time.sleep(argument)
    elif name == "slow":  # but getting on
        for _ in range(argument):
            time.sleep(1)
            step()
    elif name == "hold once" and times == 1:  # the interpreter's lock, in native code: no other thread can say a word
        ctypes.PyDLL(None).sleep(argument)
    elif name == "end node" or (name == "end node once" and times == 1):
        os.kill(int(os.environ["RAY_RAYLET_PID"]), signal.SIGKILL)
        time.sleep(600)
    elif name == "busy":  # with a child process, without ever giving Ray or a signal a chance
        subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({argument})"])
        end = time.monotonic() + argument
        while time.monotonic() < end:
            pass
    elif name == "die" or (name == "die once" and times == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "exit":
        raise SystemExit(3)
    elif name == "refuse":
        raise StudyError(argument or "geometry", "refused as asked")
    elif name == "no disk once" and times == 1:
        raise OSError(28, "No space left on device", "/home/somebody/scan.nii")
    elif name == "bug":
        raise KeyError("/home/somebody/scan.nii is not there")
    elif name == "cuda":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    elif name == "memory":
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
