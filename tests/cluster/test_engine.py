"""The Ray engine on a real Ray: every block ends once, whatever happens to workers, iterators and callers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from engine_runs import failures, indices, on_the_same_ray, outcomes, works
from engine_workers import ONE_KIND, Spec, Task, begun

from cluster.engine import RayEngine
from cluster.member import Job, Member
from pipeline.engine import Receipt
from pipeline.errors import StudyError, UsageError


def test_every_block_is_done_exactly_once_and_by_all_workers(engine: RayEngine, tmp_path: Path) -> None:
    found = outcomes(engine, works(40, folder=tmp_path, act="sleep"))
    assert indices(found) == list(range(40))
    assert not failures(found)
    assert all(begun(tmp_path, f"study-{index}") == 1 for index in range(40))
    pids = {receipt.peak_rss_bytes for receipt in found}  # our workers put their pid there
    for _ in range(60):  # on a busy machine the second worker is ready long after the first
        if len(pids) < 2:
            pids |= {receipt.peak_rss_bytes for receipt in outcomes(engine, works(40, act="sleep"))}
    assert len(pids) == 2


def test_no_work_is_no_outcome(engine: RayEngine) -> None:
    assert outcomes(engine, []) == []
    assert outcomes(engine, [()]) == []


def test_a_work_of_several_blocks_gives_one_receipt_each(engine: RayEngine) -> None:
    work = tuple(Task(key, index) for key in "ab" for index in range(3))
    found = outcomes(engine, [work, (Task("c", 0),)])
    assert sorted((receipt.key, receipt.index) for receipt in found) == [
        *((key, index) for key in "ab" for index in range(3)),
        ("c", 0),
    ]


def test_workers_stay_warm_and_measure_warms_one(engine: RayEngine) -> None:
    measured = engine.measure((7, 8, 9), 3, ONE_KIND.hash)
    assert (measured.seconds_per_tile, measured.device_bytes) == (7.0, 3)
    found = outcomes(engine, works(20, act="sleep"))
    assert measured.host_bytes in {receipt.peak_rss_bytes for receipt in found}


def test_workers_run_with_the_threads_that_were_asked_for(engine: RayEngine) -> None:
    engine.measure((1, 1, 1), 1, ONE_KIND.hash)
    (member, *_) = engine._pool.members
    pid = ray.get(member.actor.born.remote()).pid
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert b"OMP_NUM_THREADS=1" in variables
    assert b"OPENBLAS_NUM_THREADS=1" in variables


def test_a_block_that_kills_its_worker_fails_alone(
    engine: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give, given = engine._pool.give, list[tuple[int, list[int]]]()

    def watched(member: Member, job: Job) -> bool:
        given.append((job.tasks[0].index, [other.tasks[0].index for _, other in member.flying]))
        return give(member, job)

    monkeypatch.setattr(engine._pool, "give", watched)
    found = outcomes(engine, works(30, folder=tmp_path, at=3, do="die"))
    assert indices(found) == list(range(30))
    (failure,) = failures(found)
    assert (failure.index, failure.cause, failure.attempts) == (3, "crash", 3)
    assert "the worker died" in failure.message
    assert begun(tmp_path, "study-3") in (3, 4)  # a death may first look like that of the block before
    again = [place for place, (index, _) in enumerate(given) if index == 3][1]
    assert all(not before for index, before in given[again:] if index == 3), "tried again behind another block"
    assert all(3 not in before for _, before in given[again:]), "another block was put behind it"


def test_a_worker_that_ends_itself_says_why(engine: RayEngine) -> None:
    (failure,) = failures(outcomes(engine, works(3, at=1, do="cuda")))
    assert (failure.cause, failure.attempts) == ("crash", 3)
    assert "illegal memory access" in failure.message


def test_a_block_whose_worker_died_once_is_done(engine: RayEngine, tmp_path: Path) -> None:
    found = outcomes(engine, works(10, folder=tmp_path, at=5, do="die once"))
    assert indices(found) == list(range(10))
    assert not failures(found)


def test_several_studies_in_one_work_are_told_apart(engine: RayEngine, tmp_path: Path) -> None:
    place = str(tmp_path)
    deadly = (
        Task("good", 0, folder=place),
        Task("bad", 0, "die", None, place),
        Task("fine", 0, folder=place),
    )
    refused = (Task("good", 1), Task("odd", 1, "refuse", "geometry"), Task("fine", 1))
    found = outcomes(engine, [deadly, refused])
    assert {(f.key, f.cause, f.attempts) for f in failures(found)} == {
        ("bad", "crash", 3),
        ("odd", "geometry", 1),
    }
    assert sorted((f.key, f.index) for f in found if isinstance(f, Receipt)) == [
        ("fine", 0),
        ("fine", 1),
        ("good", 0),
        ("good", 1),
    ]


@pytest.mark.parametrize(
    ("do", "argument", "cause", "tries"),
    [
        ("refuse", "input", "input", 1),
        ("refuse", "storage", "storage", 3),
        ("memory", None, "memory", 1),
        ("bug", None, "crash", 1),
    ],
)
def test_refusals_are_typed_and_only_storage_is_retried(
    engine: RayEngine, tmp_path: Path, do: str, argument: str | None, cause: str, tries: int
) -> None:
    found = outcomes(engine, works(4, folder=tmp_path, at=2, do=do, argument=argument))
    (failure,) = failures(found)
    assert (failure.index, failure.cause, failure.attempts) == (2, cause, tries)
    assert begun(tmp_path, "study-2") == tries
    assert "/home" not in failure.message
    assert "somebody" not in failure.message
    assert indices(found) == [0, 1, 2, 3]


def test_a_disk_that_was_full_for_a_moment_costs_nothing(engine: RayEngine, tmp_path: Path) -> None:
    found = outcomes(engine, works(4, folder=tmp_path, at=2, do="no disk once"))
    assert not failures(found)
    assert begun(tmp_path, "study-2") == 2


def test_a_run_survives_the_death_of_workers_from_outside(engine: RayEngine, tmp_path: Path) -> None:
    killed: list[int] = []
    found = []
    for receipt in engine.run(works(60, folder=tmp_path, act="sleep"), threading.Event()):
        found.append(receipt)
        if len(found) in (10, 25):
            killed.append(receipt.peak_rss_bytes)
            os.kill(receipt.peak_rss_bytes, signal.SIGKILL)
    assert indices(found) == list(range(60))
    assert not failures(found)
    assert len(set(killed)) == 2


def test_an_idle_worker_that_died_is_replaced(engine: RayEngine) -> None:
    pids = {receipt.peak_rss_bytes for receipt in outcomes(engine, works(20, act="sleep"))}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    found = outcomes(engine, works(10))
    assert not failures(found)
    assert indices(found) == list(range(10))


def test_works_are_pulled_lazily(engine: RayEngine) -> None:
    pulled = 0

    def count() -> Iterator[tuple[Task, ...]]:
        nonlocal pulled
        for index in range(100):
            pulled += 1
            yield (Task("study", index),)

    ahead = []
    for done, _ in enumerate(engine.run(count(), threading.Event())):
        ahead.append(pulled - done)
    assert len(ahead) == 100
    assert max(ahead) <= 2 * engine.workers + 1


def test_an_iterator_that_raises_is_heard(engine: RayEngine) -> None:
    def broken() -> Iterator[tuple[Task, ...]]:
        yield from works(3)
        raise RuntimeError("ingest is broken")

    with pytest.raises(RuntimeError, match="ingest is broken"):
        outcomes(engine, broken())
    assert len(outcomes(engine, works(3))) == 3


def test_receipts_come_while_the_iterator_blocks(engine: RayEngine) -> None:
    gate = threading.Event()
    ended = threading.Event()

    def slow() -> Iterator[tuple[Task, ...]]:
        try:
            yield from works(2)
            gate.wait(20)
            yield (Task("study", 2),)
        finally:
            ended.set()

    run = engine.run(slow(), threading.Event())
    assert indices([next(run), next(run)]) == [0, 1]
    assert not gate.is_set()
    gate.set()
    assert indices(list(run)) == [2]
    assert ended.wait(5)


def test_measure_works_while_a_run_is_on(engine: RayEngine) -> None:
    def planning() -> Iterator[tuple[Task, ...]]:
        for index in range(3):
            assert engine.measure((index, 1, 1), 1, ONE_KIND.hash).seconds_per_tile == index
            yield (Task("study", index),)

    assert indices(outcomes(engine, planning())) == [0, 1, 2]


def test_stop_ends_a_run_within_two_seconds(engine: RayEngine, tmp_path: Path) -> None:
    stop = threading.Event()
    tasks = [(Task("study", index, "sleep", 60, str(tmp_path)),) for index in range(8)]
    tasks[0] = (Task("study", 0),)
    found = []
    for receipt in engine.run(tasks, stop):
        found.append(receipt)
        while begun(tmp_path, "study-1") == 0:
            time.sleep(0.01)
        stop.set()
        asked = time.monotonic()
    assert time.monotonic() - asked < 2
    assert indices(found) == [0]
    begun_before = len(list(tmp_path.iterdir()))
    assert len(outcomes(engine, works(4))) == 4  # the engine goes on with new workers
    assert len(list(tmp_path.iterdir())) == begun_before


def test_a_run_that_nobody_wants_any_more_is_cancelled(engine: RayEngine, tmp_path: Path) -> None:
    tasks = [(Task("study", 0),), *((Task("study", i, "sleep", 60, str(tmp_path)),) for i in range(1, 6))]
    run = engine.run(tasks, threading.Event())
    assert next(run).index == 0
    while not list(tmp_path.iterdir()):
        time.sleep(0.01)
    busy = {int(path.suffix[1:]) for path in tmp_path.iterdir()}
    begin = time.monotonic()
    run.close()
    assert time.monotonic() - begin < 2
    while any(Path(f"/proc/{pid}").exists() for pid in busy):
        assert time.monotonic() - begin < 10
        time.sleep(0.05)


def test_nothing_but_receipts_passes_through_ray(engine: RayEngine) -> None:
    def free() -> float:
        time.sleep(1.5)  # nodes tell of themselves once a second
        return ray.available_resources()["object_store_memory"]

    total = ray.cluster_resources()["object_store_memory"]
    run = engine.run(works(100, act="sleep"), threading.Event())
    found = [next(run) for _ in range(20)]
    assert free() == total
    array = ray.put(b"x" * 5_000_000)
    assert free() <= total - 5_000_000  # what is measured does see objects
    del array
    assert len(found) + len(list(run)) == 100


def test_thousands_of_small_blocks_are_no_burden(engine: RayEngine) -> None:
    outcomes(engine, works(4))
    begin = time.process_time()
    found = outcomes(engine, works(1000))
    assert Counter(type(outcome) for outcome in found) == {Receipt: 1000}
    assert time.process_time() - begin < 5  # of the driver; measured: 0.8 s


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        (Spec("refuse"), StudyError, "refused as asked"),
        (Spec("bug"), StudyError, "KeyError"),
        (Spec("die"), UsageError, "no worker could start: 2 in a row died"),
    ],
)
def test_workers_that_cannot_start_are_an_error(
    engine: RayEngine, spec: Spec, error: type[Exception], words: str
) -> None:
    with on_the_same_ray(engine, spec) as other:
        with pytest.raises(error, match=words):
            outcomes(other, works(2))
        with pytest.raises(error, match=words):
            other.measure((1, 1, 1), 1, ONE_KIND.hash)


def test_a_worker_of_another_version_is_refused(engine: RayEngine) -> None:
    with on_the_same_ray(engine, Spec()) as other:
        worker, spec, (*same, (name, _)) = other._pool._args
        other._pool._args = (worker, spec, (*same, (name, "0.1")))
        with pytest.raises(UsageError, match=rf"a node of the Ray cluster has {name} .* \(driver: 0.1\)"):
            outcomes(other, works(2))


def test_workers_for_which_there_is_no_room_are_an_error(engine: RayEngine) -> None:
    with on_the_same_ray(engine, Spec(), num_gpus=1, patience=1.0) as other:
        begin = time.monotonic()
        with pytest.raises(UsageError, match=r"0 of 1 workers started within 1 s .*: each needs 1 GPU, .* 0 GPU free"):
            outcomes(other, works(2))
        assert time.monotonic() - begin < 5
