"""Ray sessions begin and end whole: environment, signal handlers, folders and processes are as before."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
from engine_workers import HERE, WORKER, Spec, Task

from cluster import watchdog
from cluster.engine import RayEngine
from cluster.session import Session
from pipeline.errors import UsageError

ROOT = Path(__file__).parents[2]
Start = Callable[..., "subprocess.Popen[str]"]


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


def wait_until(true: Callable[[], object], seconds: float) -> float:
    """How long it took until `true()`."""
    begin = time.monotonic()
    while not true():
        assert time.monotonic() - begin < seconds, f"still not so after {seconds} s"
        time.sleep(0.1)
    return time.monotonic() - begin


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder that no one else uses, with a short path."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_two_engines_after_each_other_leave_all_as_it_was(capfd: pytest.CaptureFixture[str], temporary: Path) -> None:
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    environment, others = dict(os.environ), set(psutil.Process().children(recursive=True))
    try:
        for index in range(2):
            with RayEngine(Spec(), worker=WORKER, workers=1) as engine:
                (home,) = temporary.iterdir()
                assert home.stat().st_mode & 0o777 == 0o700
                assert os.environ["RAY_AUTH_MODE"] == "token"
                assert watchdog.MARK not in os.environ  # it would be on all that the driver starts
                works = [(Task("study", i, "die" if i == 1 else "nothing"),) for i in range(3)]
                assert len(list(engine.run(works, threading.Event()))) == 3
                os.kill(os.getpid(), signal.SIGTERM)
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
            assert heard == [signal.SIGTERM] * (index + 1)
            assert not ray.is_initialized()
            assert set(psutil.Process().children(recursive=True)) == others
            assert not list(temporary.iterdir())
    finally:
        signal.signal(signal.SIGTERM, before)
    environment.setdefault("RAY_CLIENT_MODE", "0")  # importing Ray sets it
    assert dict(os.environ) == environment
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")  # also for the worker that died


@pytest.mark.parametrize(
    ("name", "marked", "inside", "ours"),
    [
        ("ray::Agent", False, True, True),  # its title was written over its environment
        ("ray::Agent", True, False, True),
        ("ray::Agent", False, False, False),  # of another cluster
        ("python", False, True, False),  # a child of the driver that inherited a file
        ("python", True, False, False),  # the driver started it while the cluster came up
    ],
)
def test_how_the_watchdog_knows_a_process(tmp_path: Path, name: str, marked: bool, inside: bool, ours: bool) -> None:
    folder = tmp_path / "mm-x"
    folder.mkdir()
    environment = {"PATH": ""} | ({watchdog.MARK: "1a2b"} if marked else {})
    with (folder if inside else tmp_path).joinpath("log").open("w") as file, subprocess.Popen(
        [name, "-c", "read line"], executable="/bin/sh", env=environment, stdin=subprocess.PIPE, stderr=file
    ) as process:  # fmt: skip
        wait_until(lambda: Path(f"/proc/{process.pid}/cmdline").read_bytes(), 10)  # empty until it is all there
        assert watchdog.marked("1a2b", str(folder)) == ([process.pid] if ours else [])
        process.kill()


def test_a_session_outlives_the_thread_that_opened_it() -> None:
    made: list[RayEngine] = []
    opener = threading.Thread(target=lambda: made.append(RayEngine(Spec(), worker=WORKER)))
    opener.start()
    opener.join()
    with made[0] as engine:
        time.sleep(1)
        assert len(list(engine.run([(Task("study", 0),)], threading.Event()))) == 1


def test_a_second_session_at_once_is_refused() -> None:
    with Session(), pytest.raises(UsageError, match="Ray is already in use here"):
        Session()


def test_more_gpu_workers_than_gpus_are_refused_and_nothing_stays(temporary: Path) -> None:
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UsageError, match="2 workers need a GPU each, and this machine has 0"):
        RayEngine(Spec(), worker=WORKER, workers=2, gpu=True)
    assert not ray.is_initialized()
    assert not list(temporary.iterdir())


def test_a_long_temporary_folder_is_avoided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with RayEngine(Spec(), worker=WORKER) as engine:
        assert len(list(engine.run([(Task("study", 0),)], threading.Event()))) == 1
    assert not list(long.iterdir())


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("local", "expected host:port"),
        ("ray://head:10001", "expected host:port"),
        ("head", "expected host:port"),
        ("127.0.0.1:1", "no Ray cluster answers there"),
        ("nowhere.invalid:6379", "no Ray cluster answers there"),
    ],
)
def test_an_address_without_a_cluster_is_refused(address: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Session(address)
    assert not ray.is_initialized()


def test_a_port_of_something_else_is_refused_in_time() -> None:
    code = (
        "import sys\nfrom cluster.session import Session\nfrom pipeline.errors import UsageError\n"
        "try: Session(sys.argv[1], patience=3)\nexcept UsageError as error: print('refused:', error)"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", code, address], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
    assert re.search(r"refused: Ray at \S+ did not answer within 3 s", done.stdout), done


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Start]:
    """Starts drivers that run endless blocks on two workers; returns when both are in one."""
    started: list[subprocess.Popen[str]] = []

    def start(*address: str) -> subprocess.Popen[str]:
        folder = tmp_path / f"driver{len(started)}"
        folder.mkdir()
        process = subprocess.Popen(
            [sys.executable, "-W", "error", f"{HERE}/driver.py", str(folder), *address],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}",
                "TEST_TAG": tmp_path.name,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        wait_until(lambda: len(list(folder.iterdir())) == 2, 60)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
    for line in alive(tmp_path.name):  # children of workers of a joined cluster, which is not ours to sweep
        with suppress(ProcessLookupError):
            os.kill(int(line.split()[0]), signal.SIGKILL)


def test_a_driver_killed_with_sigkill_leaves_nothing(temporary: Path, driver: Start, tmp_path: Path) -> None:
    process = driver()
    tag = tmp_path.name
    assert len(alive(tag)) > 8  # the driver, Ray's daemons, two workers and their children
    assert len(list(temporary.iterdir())) == 1
    process.kill()
    took = wait_until(lambda: not alive(tag) and not list(temporary.iterdir()), 30)
    print(f"all gone after {took:.1f} s")


def test_ctrl_c_ends_a_driver_and_all_of_it(temporary: Path, driver: Start, tmp_path: Path) -> None:
    process = driver()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    out, err = process.communicate(timeout=20)
    assert (out, err, process.returncode) == ("open\ninterrupted\n", "", 0)
    assert not alive(tmp_path.name)
    assert not list(temporary.iterdir())


def test_a_joined_cluster_stays_and_a_killed_driver_leaves_it(
    driver: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("TEST_TAG", tmp_path.name)  # what the cluster's workers are known by
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        with RayEngine(Spec(), worker=WORKER, workers=2, address=cluster.address) as engine:
            works = [(Task("study", i, "die" if i == 1 else "nothing"),) for i in range(6)]
            assert len(list(engine.run(works, threading.Event()))) == 6
        assert not ray.is_initialized()
        process = driver(cluster.address)
        process.kill()
        workers = lambda: [line for line in alive(tmp_path.name) if "ray::Shell" in line]  # noqa: E731
        wait_until(lambda: not workers(), 30)
        with RayEngine(Spec(), worker=WORKER, workers=2, address=cluster.address) as engine:
            assert len(list(engine.run(works[2:], threading.Event()))) == 4
    finally:
        cluster.shutdown()
