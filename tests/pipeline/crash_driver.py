"""Runs `pipeline.segment` over and over, each time in a fresh process that may be killed at one of its writes.

Reads lines of JSON from stdin: {"inputs", "model", "out", "settings", "at"}. The run's process kills itself with
SIGKILL just before its write number `at` inside `out` (a file opened for writing, a rename, a removal, a new folder or
link); with `at` null it lives. Answers each line with {"signal", "writes", "summary"}.

Python's audit events say what is about to be done, whichever library does it. The processes are forked from this one,
which has imported everything and computed nothing: seconds of imports are paid once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib import import_module
from typing import Any

import pipeline
from pipeline.report.page import _template

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink"}


class Clock:
    """Counts the writes inside a folder; the process dies just before number `at`."""

    def __init__(self, folder: str, at: int | None) -> None:
        self.folder, self.at, self.writes = folder, at, 0
        self.folders: set[str] = set()  # threads race to make the same ones: each counts once

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            try:
                path = os.fsdecode(arguments[0])
            except TypeError:  # a file descriptor
                return
            if path.startswith(self.folder) and not (event == "os.mkdir" and path in self.folders):
                if event == "os.mkdir":
                    self.folders.add(path)
                self.writes += 1
                if self.writes == self.at:
                    os.kill(os.getpid(), signal.SIGKILL)


def run(wish: dict[str, Any], answer: int) -> None:
    clock = Clock(wish["out"], wish["at"])
    sys.addaudithook(clock)
    summary = pipeline.segment(wish["inputs"], wish["model"], wish["out"], threads=1, **wish["settings"])
    os.write(answer, json.dumps({"writes": clock.writes, "summary": summary.to_json()}).encode())


def warm_up() -> None:
    for module in (
        *("dask.array", "nibabel", "PIL.Image", "pyarrow.csv", "pyarrow.parquet", "torch", "zarr"),
        *("pipeline.api", "pipeline.blocks", "pipeline.report.build", "segmodels.predictor", "segmodels.kmeans"),
        *("segmodels.zoo.resunet", "segmodels.runtime"),
    ):
        import_module(module)
    _template()


def main() -> None:
    warm_up()
    for line in sys.stdin:
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(readable)
            try:
                run(json.loads(line), writable)
            finally:
                os._exit(0)
        os.close(writable)
        with open(readable, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        ended = {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0}
        print(json.dumps(ended | (json.loads(said) if said else {})), flush=True)


if __name__ == "__main__":
    main()
