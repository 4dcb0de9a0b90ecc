"""One Ray engine for most of these tests: starting a cluster takes seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from engine_workers import HERE, WORKER, Spec
from nodes import Nodes

from cluster.engine import RayEngine


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


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    """The head of a cluster; its nodes come and go with each test, see `nodes`."""
    nodes = Nodes()
    yield nodes
    nodes.close()


@pytest.fixture
def nodes(cluster: Nodes) -> Iterator[Nodes]:
    yield cluster
    cluster.clear()
