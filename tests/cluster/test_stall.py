"""A worker that hangs raises nothing: it is found because it does not get on, and replaced."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_runs import failures, indices, on_the_same_ray, outcomes, works
from engine_workers import HANGING, ONE_KIND, Spec, Task, begun

from cluster import member
from cluster.engine import STALL_BATCHES, STALL_SECONDS, RayEngine
from cluster.pool import WATCH
from pipeline.errors import StudyError, UsageError

STALL = 4.0


@pytest.fixture(scope="module")
def impatient(engine: RayEngine) -> Iterator[RayEngine]:
    """Two workers that hang after seconds, not minutes."""
    with on_the_same_ray(engine, Spec(), workers=2, stall=STALL) as other:
        yield other


@pytest.mark.parametrize("do", ["sleep once", "hold once"])
def test_a_worker_that_hangs_is_replaced_and_its_block_done(impatient: RayEngine, tmp_path: Path, do: str) -> None:
    """In native sleep, and holding the interpreter's lock so that nothing in its process can answer."""
    found = outcomes(impatient, works(12, folder=tmp_path, at=5, do=do, argument=600))
    assert indices(found) == list(range(12))
    assert not failures(found)
    assert begun(tmp_path, "study-5") == 2
    hung, _ = (path.suffix.removeprefix(".") for path in sorted(tmp_path.glob("study-5.*")))
    end = time.monotonic() + 60
    while Path(f"/proc/{hung}").exists():  # it is gone, and its GPU free
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_block_that_always_hangs_fails_alone_with_cause_timeout(impatient: RayEngine, tmp_path: Path) -> None:
    found = outcomes(impatient, works(8, folder=tmp_path, at=2, do="sleep", argument=600))
    assert indices(found) == list(range(8))
    (failure,) = failures(found)
    assert (failure.index, failure.cause, failure.attempts) == (2, "timeout", 3)
    assert "made no progress for 4 s (--stall-minutes)" in failure.message
    assert begun(tmp_path, "study-2") == 3


def test_a_block_that_is_slow_but_gets_on_is_left_alone(impatient: RayEngine, tmp_path: Path) -> None:
    found = outcomes(impatient, works(3, folder=tmp_path, at=1, do="slow", argument=int(3 * STALL)))
    assert not failures(found)
    assert begun(tmp_path, "study-1") == 1


def test_loading_is_bounded(engine: RayEngine) -> None:
    with on_the_same_ray(engine, Spec("sleep", argument=600), stall=1.0) as other:
        with pytest.raises(UsageError, match=r"no worker could start: .* loading the model took longer than 1 s"):
            outcomes(other, works(2))
        with pytest.raises(UsageError, match="loading the model took longer than 1 s"):
            other.kinds()


def test_measuring_is_bounded(engine: RayEngine) -> None:
    with on_the_same_ray(engine, Spec(), stall=1.0, boots=3) as other:
        with pytest.raises(
            StudyError, match=r"3 workers were lost while they measured .*: the worker made no"
        ) as error:
            other.measure((1, 1, 1), HANGING, ONE_KIND.hash)
        assert error.value.cause == "timeout"
        assert not failures(outcomes(other, works(2)))


def test_a_slow_model_is_given_more_time_unless_the_user_says_how_much(engine: RayEngine) -> None:
    with on_the_same_ray(engine, Spec(), stall=STALL_SECONDS) as other:
        other.measure((1, 1, 1), 1, ONE_KIND.hash)  # this worker says that a tile takes as many seconds as z voxels
        assert other._pool.stall == STALL_SECONDS
        other.measure((100, 1, 1), 1, ONE_KIND.hash)
        assert other._pool.stall == STALL_BATCHES * 100
        other._stall_given = True
        other.measure((200, 1, 1), 1, ONE_KIND.hash)
        assert other._pool.stall == STALL_BATCHES * 100


def test_a_worker_that_gets_on_is_never_asked(engine: RayEngine, tmp_path: Path) -> None:
    """So watching costs nothing: one comparison of times per worker and second."""
    with on_the_same_ray(engine, Spec(), stall=STALL_SECONDS) as other:
        for outcome in other.run(works(60, act="sleep"), threading.Event()):
            assert outcome.key == "study"
            assert all(m.glance is None and m.glanced == 0 for m in other._pool.members)


def test_a_worker_answers_while_it_works(engine: RayEngine) -> None:
    import ray

    with on_the_same_ray(engine, Spec()) as other:
        worker = other._pool.any_ready().actor
        running = worker.run.remote((Task("study", 0, "slow", 3),))
        seen = set()
        while not ray.wait([running], timeout=0)[0]:
            seen.add(ray.get(worker.steps.options(concurrency_group=WATCH).remote()))
            time.sleep(0.05)
        assert {1, 2} <= seen


def test_a_driver_that_looks_away_has_not_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(member.time, "monotonic", lambda: now)
    clock = member.Clock()
    for _ in range(4):
        now += 1.0
        clock.look()
    now += 3600.0  # it published a large study, or its laptop slept
    assert clock.look() == 4.0 + member.LONGEST_LOOK
    clock.reset()
    assert clock.look() == 0.0
