"""Real kills of real commands: drivers, workers, Ctrl-C. The next run goes on, and the labels are bit-equal."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import SHARDS, Work, check_kept, check_results, check_shown, prepare, short_folder
from scans import kill, leftovers, markers, maskmill, scan, start, until, wait

pytestmark = pytest.mark.timeout(600)

STUDIES = ("a", "b")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[object, ...], Path]:
    arguments, undisturbed = prepare(tmp_path_factory.mktemp("kill"), STUDIES)
    assert len(markers(undisturbed)) == SHARDS * len(STUDIES)
    return arguments, undisturbed


@pytest.fixture
def work(prepared: tuple[tuple[object, ...], Path], tmp_path: Path) -> Iterator[Work]:
    with short_folder() as temporary:
        yield Work(*prepared, STUDIES, tmp_path / "out", temporary)


# ----------------------------------------------------------------------------------------------------------- kill -9


def test_a_killed_driver_takes_its_workers_along_and_the_next_run_goes_on(work: Work) -> None:
    driver = work.start("--workers", 2)
    until(lambda: work.marked(2))
    assert len(work.processes()) > 4  # Ray's daemons, workers and the Prefect server among them
    kill(driver)
    work.gone()
    done = markers(work.out)
    assert 2 <= len(done) < SHARDS * len(STUDIES)

    ended = work.run("--workers", 2)
    assert (ended.code, ended.json["published"]) == (0, 2)
    assert "Traceback" not in ended.err
    check_kept(work, done)
    check_results(work)


def test_a_killed_prefect_server_is_started_again(work: Work) -> None:
    driver = work.start("--engine", "serial")
    until(lambda: work.marked(1))
    (server,) = [int(line.split()[0]) for line in work.processes() if "server_process.py" in line]
    os.kill(server, signal.SIGKILL)
    ended = wait(driver)
    assert ended.code == 0, ended.err
    assert "the Prefect server ended with exit code -9; it is started again" in ended.err
    assert "Traceback" not in ended.err
    check_results(work)


def test_a_killed_worker_is_replaced_and_the_run_ends_well(work: Work) -> None:
    driver = work.start("--workers", 2)
    until(lambda: work.marked(2))
    worker = next(int(line.split()[0]) for line in work.processes() if "ray::Shell.run" in line)
    os.kill(worker, signal.SIGKILL)
    done = markers(work.out)
    ended = wait(driver)
    assert ended.code == 0, ended.err
    assert [e["state"] for e in ended.json["studies"]] == ["published"] * 2
    assert ended.out.count("\n") == 1
    check_kept(work, done)
    check_results(work)


# --------------------------------------------------------------------------------------------------------- please stop


def check_interrupted(work: Work, driver: subprocess.Popen[str], number: signal.Signals) -> None:
    """It ends within ten seconds with 130 and its line of JSON, leaving nothing behind, and can go on."""
    driver.send_signal(number)
    asked = time.monotonic()
    ended = wait(driver, 60)
    assert time.monotonic() - asked < 10
    assert ended.code == 130, ended.err
    assert ended.json["interrupted"] >= 1
    assert "interrupted" in {e["state"] for e in ended.json["studies"]}
    assert "run it again to go on" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err
    assert work.processes() == []
    assert list(work.temporary.iterdir()) == []
    assert leftovers(work.out) == []


def test_ctrl_c_on_ray_and_the_next_run_goes_on(work: Work) -> None:
    driver = work.start("--workers", 2)
    until(lambda: work.marked(2))
    check_interrupted(work, driver, signal.SIGINT)
    done = markers(work.out)
    said = maskmill("status", work.out, "--json")
    progress = {e["study"]: e["shards_done"] for e in said.json["studies"] if e["state"] == "interrupted"}
    assert sum(progress.values()) == len(done) - SHARDS * (len(STUDIES) - len(progress))

    ended = work.run("--engine", "serial")  # on another engine, too
    assert (ended.code, ended.json["published"]) == (0, 2)
    check_kept(work, done)
    check_results(work)


def test_sigterm_and_the_next_run_goes_on(work: Work) -> None:
    driver = work.start("--engine", "serial")
    until(lambda: work.marked(1))
    check_interrupted(work, driver, signal.SIGTERM)
    done = markers(work.out)
    assert 1 <= len(done) < SHARDS * len(STUDIES)
    ended = work.run("--engine", "serial")
    assert (ended.code, ended.json["published"]) == (0, 2)
    check_kept(work, done)
    check_results(work)


def test_ctrl_c_while_a_large_file_is_read(work: Work, tmp_path: Path) -> None:
    large = scan(tmp_path / "large/x.nii", shape=(4, 4, 4))
    raw = bytearray(large.read_bytes()[:352])
    raw[40:48] = np.array([3, 2000, 2000, 1500], "<i2").tobytes()  # 24 GB of float32, all of it a hole
    with large.open("wb") as file:
        file.write(raw)
        file.truncate(352 + 4 * 2000 * 2000 * 1500)
    arguments = ("segment", large, "-m", "kmeans", "--engine", "serial", "-o", work.out, "--json")
    driver = start(*arguments, **work.environment)
    until(lambda: list(work.out.glob("images/.u*.ome.zarr/0/zarr.json")))
    check_interrupted(work, driver, signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_before_anything_began(number: signal.Signals, work: Work) -> None:
    """While torch is being imported."""
    driver = work.start("--engine", "serial")
    until(lambda: "libtorch_cpu" in Path(f"/proc/{driver.pid}/maps").read_text())
    driver.send_signal(number)
    ended = wait(driver, 10)
    assert (ended.code, ended.out) == (130, "")
    assert ended.err.splitlines()[-1] == "maskmill: interrupted; run it again to go on"
    assert "Traceback" not in ended.err


# -------------------------------------------------------------------------------------------------------------- soaks


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("engine", ["serial", "ray"])
def test_a_driver_that_is_killed_again_and_again_gets_there(engine: str, work: Work) -> None:
    """At any moment, imports and starts and ends included."""
    chance = random.Random(4)
    flags = ("--engine", engine, *(("--workers", 2) if engine == "ray" else ()))
    for _ in range(12):
        done = markers(work.out)
        driver = work.start(*flags)
        try:
            driver.wait(chance.uniform(0.5, 12 if engine == "serial" else 20))
        except subprocess.TimeoutExpired:
            kill(driver)
        else:
            assert driver.returncode == 0
            driver.communicate()
        work.gone()
        check_kept(work, done)
    ended = work.run(*flags)
    assert (ended.code, ended.json["published"]) == (0, 2)
    check_results(work)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_that_are_killed_again_and_again(work: Work) -> None:
    """As often as three tries of each block allow."""
    driver = work.start("--workers", 2)
    for shards in (1, 4):
        until(lambda shards=shards: work.marked(shards))
        busy = [int(line.split()[0]) for line in work.processes() if "ray::Shell.run" in line]
        for worker in busy:
            os.kill(worker, signal.SIGKILL)
    ended = wait(driver)
    assert ended.code == 0, ended.err
    check_results(work)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("moment", ["images/.u*.ome.zarr", "images/*/labels/*/1", "masks/.*.partial", "masks/a.nii.gz"])
def test_a_driver_killed_at_a_moment(moment: str, work: Work) -> None:
    """In ingest, in the label pyramid, in the export, and before the record of what was exported."""
    driver = work.start("--engine", "serial")
    until(lambda: list(work.out.glob(moment)), pause=0.0005)
    kill(driver)
    check_shown(work)
    done = markers(work.out)
    ended = work.run("--engine", "serial")
    assert (ended.code, ended.json["published"]) == (0, 2)
    check_kept(work, done)
    check_results(work)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kill_while_the_first_database_is_made(work: Work, tmp_path: Path) -> None:
    """Nothing half made is kept in the user's home."""
    home = tmp_path / "home"
    environment = work.environment | {"MASKMILL_HOME": str(home)}
    driver = start("segment", *work.arguments, "-o", work.out, "--engine", "serial", **environment)
    until(lambda: list(work.temporary.glob("maskmill-prefect-*/prefect.db*")))
    kill(driver)
    work.gone()
    ended = maskmill("segment", *work.arguments, "-o", work.out, "--engine", "serial", "--json", **environment)
    assert json.loads(ended.out)["published"] == 2
    check_results(work)
