"""Faults of the machine under real commands: Ray's daemons, poison, a stop while Ray starts, full disks."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Work, check_kept, check_results, check_study, prepare, short_folder
from scans import kill, markers, maskmill, until, wait

pytestmark = pytest.mark.timeout(600)

STUDIES = ("a", "b", "c", "d")
SHAPE = (24, 24, 130)
SHARDS = 3  # of each study

# As a bug in native code would: the worker that opens this image is gone.
POISON = """
import os, signal, sys

def die(event, arguments):
    if event == "open" and "/c.ome.zarr/0/" in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)

if "RAY_RAYLET_PID" in os.environ:
    sys.addaudithook(die)
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[object, ...], Path]:
    return prepare(tmp_path_factory.mktemp("faults"), STUDIES, SHAPE)


@pytest.fixture
def work(prepared: tuple[tuple[object, ...], Path], tmp_path: Path) -> Iterator[Work]:
    with short_folder() as temporary:
        yield Work(*prepared, STUDIES, tmp_path / "out", temporary)


def check_rerun(work: Work, done: dict[str, int]) -> None:
    """The same command finishes and redoes nothing that was marked."""
    work.gone()
    ended = work.run("--engine", "serial")
    assert (ended.code, ended.json["published"]) == (0, len(STUDIES)), ended.err
    check_kept(work, done)
    check_results(work)


@pytest.mark.slow
@pytest.mark.parametrize("daemon", ["raylet/raylet", "gcs_server"])
def test_a_private_cluster_that_loses_a_daemon_ends_and_the_next_run_goes_on(daemon: str, work: Work) -> None:
    """What is marked by then is kept; the command says what is missing, and does not hang."""
    driver = work.start("--workers", 2)
    until(lambda: work.marked(2))
    assert work.kill(daemon) == 1
    ended = wait(driver, 240)
    assert ended.code in (0, 1), ended.err
    if ended.code == 1:
        failed = [e for e in ended.json["studies"] if e["state"] != "published"]
        assert {e["cause"] for e in failed} == {"crash"}
    check_rerun(work, markers(work.out))


@pytest.mark.slow
def test_a_killed_watchdog_is_started_again_and_does_its_work(work: Work) -> None:
    """Without one, agents of Ray outlive a killed driver by a minute and more."""
    driver = work.start("--workers", 2)
    until(lambda: work.marked(1))
    (first,) = work.pids("watchdog.py")
    os.kill(first, signal.SIGKILL)
    until(lambda: [pid for pid in work.pids("watchdog.py") if pid != first], 30)
    kill(driver)
    check_rerun(work, markers(work.out))


def test_a_study_that_kills_its_worker_every_time_fails_alone(work: Work, tmp_path: Path) -> None:
    (tmp_path / "poison").mkdir()
    (tmp_path / "poison/sitecustomize.py").write_text(POISON)
    root = Path(__file__).parents[2]
    arguments = ("segment", *work.arguments, "-o", work.out, "--json", "--workers", 2)
    ended = maskmill(*arguments, **work.environment, PYTHONPATH=f"{tmp_path / 'poison'}:{root}")
    assert (ended.code, ended.json["published"], ended.json["failed"]) == (1, 3, 1), ended.err
    (failed,) = [e for e in ended.json["studies"] if e["state"] == "failed"]
    assert (failed["study"], failed["cause"]) == ("c", "crash")
    (said,) = [e for e in maskmill("status", work.out, "--json").json["studies"] if e["state"] == "failed"]
    assert (said["study"], said["cause"], said["attempts"]) == ("c", "crash", 3)
    assert "the worker died" in said["message"]
    for study in ("a", "b", "d"):
        check_study(work, study)
    assert len(markers(work.out)) == 3 * SHARDS
    check_rerun(work, markers(work.out))  # without the poison


def test_a_sigterm_as_ray_starts(work: Work) -> None:
    """When its own handlers have just replaced ours, or for a moment that is too short to be seen.

    They set an alarm that aborts the process 3 s later: on a busy machine, or one that freezes, it still lives then.
    """
    driver = work.start("--workers", 2)
    late = until(lambda: catches_aborts(driver.pid) or work.pids("ray::Shell"), pause=0.0005) is not True
    driver.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    driver.send_signal(signal.SIGSTOP)
    time.sleep(3)
    driver.send_signal(signal.SIGCONT)
    until(lambda: driver.poll() is not None or (not late and work.pids("ray::Shell")), 60, 0.02)
    assert driver.poll() is not None, "a worker was started, to load a model, after the command was asked to end"
    check_ended(work, driver)


def catches_aborts(pid: int) -> bool:
    """Whether a process has a handler for SIGABRT: Ray's core has, we have not."""
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGABRT - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 1.0, 2.5, 4.0, 6.0])
def test_a_sigterm_while_ray_starts(delay: float, work: Work) -> None:
    driver = work.start("--workers", 2)
    until(lambda: work.pids("watchdog.py"))
    time.sleep(delay)
    check_ends_soon(work, driver)


def check_ends_soon(work: Work, driver: subprocess.Popen[str]) -> None:
    driver.send_signal(signal.SIGTERM)
    check_ended(work, driver)


def check_ended(work: Work, driver: subprocess.Popen[str]) -> None:
    """With 130, leaving nothing; a loaded machine may need a while to start and end Ray."""
    ended = wait(driver, 60)
    assert ended.code == 130, ended.err
    assert "run it again to go on" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err
    work.gone(10)
    assert list(work.temporary.iterdir()) == []
