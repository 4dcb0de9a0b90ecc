"""Two commands on one OUT at once: one right result, whoever is killed, stopped or late."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import MODEL, Work, check_results, check_study, prepare, short_folder
from scans import kill, label_array, markers, until, wait

pytestmark = pytest.mark.timeout(600)

STUDIES = ("a", "b")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[object, ...], Path]:
    return prepare(tmp_path_factory.mktemp("two"), STUDIES)


@pytest.fixture
def work(prepared: tuple[tuple[object, ...], Path], tmp_path: Path) -> Iterator[Work]:
    with short_folder() as temporary:
        yield Work(*prepared, STUDIES, tmp_path / "out", temporary)


def test_two_drivers_that_start_at_once_give_one_right_result(work: Work) -> None:
    other = work.again()
    drivers = [work.start("--engine", "serial"), other.start("--engine", "serial")]
    ends = [wait(driver) for driver in drivers]
    assert [(end.code, end.json["published"], end.json["failed"]) for end in ends] == [(0, 2, 0)] * 2, ends
    assert "Traceback" not in ends[0].err + ends[1].err
    logs = [path.read_text() for path in work.out.glob("runs/*/log.jsonl")]
    assert "".join(logs).count('"event": "published"') == len(STUDIES), "a study was published by both"
    check_results(work)
    check_results(other)


@pytest.mark.slow
def test_one_of_two_drivers_is_killed_and_the_other_finishes(work: Work) -> None:
    other = work.again()
    killed, finishes = work.start("--engine", "serial"), other.start("--engine", "serial")
    until(lambda: work.marked(2))
    kill(killed)
    done = markers(work.out)
    ended = wait(finishes)
    assert (ended.code, ended.json["published"]) == (0, 2), ended.err
    assert done.keys() <= markers(work.out).keys()  # both may have had the same block in flight: the later mark stays
    work.gone()
    ended = work.run("--engine", "serial")  # what the killed one left is swept by who is alone
    assert (ended.code, ended.json["reused"], ended.json["blocks_computed"]) == (0, 2, 0)
    check_results(work)


@pytest.mark.slow
def test_a_driver_that_was_stopped_finds_its_work_done_by_another(work: Work) -> None:
    """A machine that froze, a laptop that slept: it wakes up with blocks in flight that were published meanwhile."""
    sleeper = work.start("--workers", 2)
    until(lambda: work.marked(1))
    frozen = [sleeper.pid, *work.pids("ray::Shell")]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        other = work.again()
        ended = other.run("--engine", "serial")
        assert (ended.code, ended.json["published"]) == (0, 2), ended.err
        done = shown(work)
    finally:
        for pid in reversed(frozen):
            os.kill(pid, signal.SIGCONT)
    while sleeper.poll() is None:  # readers never see less than all of it
        assert shown(work) == done
    ended = wait(sleeper)
    assert (ended.code, ended.json["published"]) == (0, 2), ended.err
    check_results(work)


def shown(work: Work) -> dict[str, bytes]:
    """All labels that readers are told of."""
    found = {}
    for study in STUDIES:
        listing = work.out / f"images/{study}.ome.zarr/labels/zarr.json"
        if listing.exists() and MODEL in json.loads(listing.read_text())["attributes"]["ome"]["labels"]:
            found[study] = np.ascontiguousarray(label_array(work.out, study, MODEL)).tobytes()
    return found


@pytest.mark.slow
def test_no_study_is_made_under_two_runtimes(work: Work) -> None:
    """Who comes second is refused the study that the first has begun, and told why; the next one it may have."""
    first = work.start("--engine", "serial")
    until(lambda: work.marked(1))
    first.send_signal(signal.SIGSTOP)
    try:
        second = work.again().run("--engine", "serial", "--precision", "bf16")
    finally:
        first.send_signal(signal.SIGCONT)
    states = {e["study"]: (e["state"], e["cause"]) for e in second.json["studies"]}
    assert states == {"a": ("failed", "storage"), "b": ("published", None)}, second.err
    assert "another command is at work on this study under another runtime" in second.err
    ended = wait(first)
    assert (ended.code, ended.json["published"], ended.json["reused"]) == (0, 2, 1), ended.err
    check_study(work, "a")
