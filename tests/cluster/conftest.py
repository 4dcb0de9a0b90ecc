"""One Ray engine for most of these tests: starting a cluster takes seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from engine_workers import Spec

from cluster.engine import RayEngine

HERE = str(Path(__file__).parent)
WORKER = "engine_workers:Worker"


@pytest.fixture(scope="package", autouse=True)
def _workers_importable() -> Iterator[None]:
    """Actors import `engine_workers` too: Ray's workers inherit the environment of the driver."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = HERE if before is None else f"{HERE}{os.pathsep}{before}"
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def engine() -> Iterator[RayEngine]:
    with RayEngine(Spec(), worker=WORKER, workers=2) as engine:
        yield engine


def alive(tag: str) -> list[str]:
    """The other processes of this machine that name `tag` in their command or their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if process.pid != os.getpid() and any(tag in word for word in (*words, *process.environ().values())):
                found.append(f"{process.pid} {' '.join(words)[:80]}")
        except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
            continue
    return found
