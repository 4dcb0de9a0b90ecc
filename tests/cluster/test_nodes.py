"""Nodes come and go: a run on a joined cluster uses what is there, and the end of a node costs no block anything."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from engine_runs import failures, indices, outcomes, works
from engine_workers import WORKER, Spec, Task, begun, runtime_of
from nodes import Nodes, wait_until

from cluster import dispatch
from cluster.engine import RayEngine
from pipeline.engine import Receipt, Stranded
from pipeline.errors import StudyError, UsageError

pytestmark = pytest.mark.timeout(600)


def joined(nodes: Nodes, workers: int, **settings: Any) -> RayEngine:
    return RayEngine(Spec(), worker=WORKER, workers=workers, address=nodes.address, **settings)


def pids(found: list[Any]) -> set[int]:
    return {outcome.peak_rss_bytes for outcome in found if isinstance(outcome, Receipt)}


def test_a_node_that_comes_in_mid_run_gets_a_worker(nodes: Nodes) -> None:
    nodes.add()
    with joined(nodes, 2) as engine:
        run = engine.run(((Task("study", i, "sleep", 0.1),) for i in range(10_000)), threading.Event())
        found = [next(run) for _ in range(10)]
        assert len(pids(found)) == 1
        second = nodes.add()
        wait_until(lambda: found.append(next(run)) or len(pids(found)) == 2, 240)
        assert set(nodes.workers(second)) < pids(found)
        run.close()


@pytest.mark.parametrize("notice", [False, True])
def test_a_node_that_goes_in_mid_run_costs_no_block_an_attempt(nodes: Nodes, tmp_path: Path, notice: bool) -> None:
    """Without notice its power is lost, with notice the cloud drains it first. One attempt is all that blocks have."""
    stays, goes = nodes.add(), nodes.add()
    with joined(nodes, 2, attempts=1) as engine:
        tasks = [(Task("study", i, "sleep once", 15, str(tmp_path)),) for i in range(6)]
        found: list[Any] = []
        running = threading.Thread(target=lambda: found.extend(outcomes(engine, tasks)))
        running.start()
        try:
            wait_until(lambda: len(list(tmp_path.iterdir())) >= 2)  # both have begun
            (lost,) = nodes.workers(goes)
            if notice:
                nodes.drain(goes)
            nodes.kill(goes)
            running.join(400)
        finally:
            running.join(10)
        assert indices(found) == list(range(6))
        assert not failures(found)
        assert pids(found) == set(nodes.workers(stays))
        again = [i for i in range(6) if begun(tmp_path, f"study-{i}") == 2]
        assert 1 <= len(again) <= 2  # what the lost worker had
        assert list(tmp_path.glob(f"study-{again[0]}.*.{lost}")) or list(tmp_path.glob(f"study-{again[-1]}.*.{lost}"))


def test_a_block_that_ends_its_worker_is_charged_also_on_a_cluster(nodes: Nodes, tmp_path: Path) -> None:
    nodes.add()
    with joined(nodes, 1) as engine:
        (failure,) = failures(outcomes(engine, works(3, folder=tmp_path, at=1, do="die")))
        assert (failure.index, failure.cause, failure.attempts) == (1, "crash", 3)


def test_a_cluster_that_eats_nodes_for_ever_comes_to_an_end(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "NODES_LOST", 2)
    for _ in range(3):
        nodes.add()
    with joined(nodes, 1, attempts=1) as engine:
        found = outcomes(engine, works(3, folder=tmp_path, at=1, do="end node"))
    (failure,) = failures(found)
    assert (failure.index, failure.cause, failure.attempts) == (1, "crash", 2)
    assert "2 nodes went away while they ran this block" in failure.message
    assert begun(tmp_path, "study-1") == 2
    assert indices(found) == [0, 1, 2]


def test_a_cluster_that_vanishes_in_mid_run_is_a_clear_end(nodes: Nodes, tmp_path: Path) -> None:
    nodes.add()
    with joined(nodes, 2) as engine:
        engine.kinds()
        engine._pool.patience = 3.0  # so short only after the start
        words = r"no worker is left and none came within 3 s \(--wait-minutes\): each needs 1 CPU"
        with pytest.raises(StudyError, match=words) as error:
            outcomes(engine, works(3, folder=tmp_path, at=1, do="end node"))
        assert error.value.cause == "timeout"


def test_a_cluster_without_places_is_a_clear_end(nodes: Nodes) -> None:
    nodes.add(cpus=1)
    with (
        joined(nodes, 2, threads=2, wait=3.0) as engine,
        pytest.raises(UsageError, match=r"0 of 2 workers started within 3 s .*: each needs 2 CPU, .* has 1 CPU, 0 GPU"),
    ):
        outcomes(engine, works(2))


def test_workers_that_nobody_had_room_for_are_withdrawn(nodes: Nodes) -> None:
    nodes.add(cpus=1)
    with joined(nodes, 3) as engine:
        asked = []
        for _ in engine.run(works(30, act="sleep"), threading.Event()):
            asked.append(len(engine._pool.members))
        assert max(asked) == 3  # the cluster, and its autoscaler, heard of all of them
        assert asked[-1] == 1  # until there was no work for them any more
        run = engine.run(works(30, act="sleep"), threading.Event())
        next(run)
        assert len(engine._pool.members) == 3
        run.close()
        node = nodes.add(cpus=2)
        time.sleep(3)  # a place for which somebody still asked would be taken at once
        assert not nodes.workers(node)
        wait_until(lambda: ray.available_resources().get("CPU") == 3)


@pytest.mark.parametrize(("share", "workers"), [(None, 2), (0.5, 4)])
def test_one_worker_per_gpu_or_as_many_as_share_one(nodes: Nodes, share: float | None, workers: int) -> None:
    nodes.add(cpus=1, gpus=1)  # in Ray's books: what a worker does with it is its runtime's affair
    nodes.add(cpus=1, gpus=1)
    with RayEngine(Spec(), worker=WORKER, address=nodes.address, gpus_per_worker=share) as engine:
        assert engine.workers == workers
        run = engine.run(((Task("study", i, "sleep", 0.2),) for i in range(10_000)), threading.Event())
        found: list[Any] = []
        wait_until(lambda: found.append(next(run)) or len(pids(found)) == workers, 240)
        run.close()


def test_no_worker_lies_across_two_gpus(nodes: Nodes) -> None:
    nodes.add(cpus=1, gpus=2)
    for share, workers in ((0.4, 4), (1.0, 2), (0.0, 1)):
        with RayEngine(Spec(), worker=WORKER, address=nodes.address, gpus_per_worker=share) as engine:
            assert engine.workers == workers


@pytest.mark.parametrize("share", [-0.5, 1.5, 2])
def test_a_share_of_a_gpu_that_cannot_be_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match=f"gpus_per_worker is 0 to 1, not {share}"):
        RayEngine(Spec(), worker=WORKER, gpus_per_worker=share)
    assert not ray.is_initialized()


def test_a_node_with_other_versions_is_refused_by_name(nodes: Nodes, tmp_path: Path) -> None:
    package = tmp_path / "numpy-0.0.1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.0.1\n")
    nodes.add(PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    with joined(nodes, 1) as engine:
        words = r"^a node of the Ray cluster has numpy 0\.0\.1 \(driver: \d[\d.]+\); install the same versions on every"
        with pytest.raises(UsageError, match=words):
            outcomes(engine, works(2))


def test_a_kind_with_much_to_do_does_not_keep_another_waiting(nodes: Nodes) -> None:
    """Works come in one line; those of another kind are drawn past a study that waits for its own."""
    nodes.add(TEST_KIND="slow")
    nodes.add(TEST_KIND="quick")
    slow, quick = runtime_of("slow").hash, runtime_of("quick").hash
    given = [(Task("slow", i, "sleep", 2.0, runtime=slow),) for i in range(12)]
    given += [(Task("quick", i, runtime=quick),) for i in range(4)]
    with joined(nodes, 2) as engine:
        wait_until(lambda: len(engine.kinds()) == 2)
        assert {kind.runtime.hash for kind in engine.kinds()} == {slow, quick}
        found = list(engine.run(given, threading.Event()))
    order = [outcome.key for outcome in found]
    by_slow, by_quick = (pids([o for o in found if o.key == key]) for key in ("slow", "quick"))
    assert (len(by_slow), len(by_quick)) == (1, 1)  # each kind of block went to its kind of worker
    assert by_slow != by_quick
    assert sorted(order) == ["quick"] * 4 + ["slow"] * 12
    assert order.index("quick") < 4


def test_blocks_of_a_kind_that_is_gone_are_stranded(nodes: Nodes) -> None:
    nodes.add(TEST_KIND="here")
    here, gone = runtime_of("here").hash, runtime_of("gone").hash
    with joined(nodes, 2) as engine:
        engine.kinds()
        engine._pool.patience = 2.0
        tasks = [Task("study", i, "sleep", 0.2, runtime=gone if i % 2 else here) for i in range(6)]
        found = outcomes(engine, [(task,) for task in tasks])
    assert indices(found) == list(range(6))
    assert {(o.index, o.runtime) for o in found if isinstance(o, Stranded)} == {(1, gone), (3, gone), (5, gone)}


def test_memory_of_a_worker_is_its_part_of_its_node(nodes: Nodes) -> None:
    from pipeline.engine import share_of_machine

    nodes.add(cpus=5)
    with joined(nodes, 8, threads=2) as engine:
        (kind,) = engine.kinds()
        assert (kind.workers, kind.memory) == (8, share_of_machine(2))
