"""prefect_server(): real servers, real flows, real kills."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest

from flows.server import DATABASE, HOME_PREFIX, ServerError, prefect_server

RUN = """
from prefect import flow, task

@task
def double(number):
    return 2 * number

@flow(flow_run_name="run-{run_id}")
def trivial(run_id):
    return double.submit(21).result()
"""

# A driver: it says what it holds, waits for a line on stdin or a Ctrl-C, runs a flow and says its result.
DRIVER = f"""
import json, os, sys
from flows.server import prefect_server

with prefect_server() as url:
    try:
        print(json.dumps({{"url": url, "home": os.environ["PREFECT_HOME"]}}), flush=True)
        sys.stdin.readline()
    except KeyboardInterrupt:
        pass
    {RUN.replace(chr(10), chr(10) + "    ")}
    print(json.dumps(trivial("a1")), flush=True)
"""


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder for the private homes, of this process and of its children."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)  # read TMPDIR again
    return folder


def start_driver(user: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", DRIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ({"MASKMILL_HOME": str(user)} if user else {}),
        start_new_session=True,
    )


def homes(scratch: Path) -> list[Path]:
    return sorted(scratch.glob(f"{HOME_PREFIX}*"))


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def flow_run_states(run_name: str) -> list[str]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[run_name])))
    return [run.state_name or "" for run in runs]


def test_a_flow_runs_on_it_and_nothing_is_left(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PREFECT_API_URL", "http://elsewhere.invalid/api"), ("PREFECT_API_KEY", "theirs")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody listens there
    before = dict(os.environ)

    with prefect_server() as url:
        (server,) = children(os.getpid())
        assert children(server) == []
        (home,) = homes(scratch)
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        assert os.environ["PREFECT_API_URL"] == url
        assert "PREFECT_API_KEY" not in os.environ
        names: dict[str, object] = {}
        exec(RUN, names)  # noqa: S102 - prefect may be imported only here
        assert names["trivial"]("a1") == 42  # type: ignore[operator]
        assert flow_run_states("run-a1") == ["Completed"]
        with pytest.raises(urllib.error.HTTPError, match="401") as refused:  # this machine's other users
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/flow_runs/{server}")
        refused.value.close()

    assert not alive(server)
    assert homes(scratch) == []
    assert dict(os.environ) == before


def test_a_killed_command_takes_its_server_with_it_and_the_next_sweeps(scratch: Path) -> None:
    driver = start_driver()
    said = json.loads(driver.stdout.readline())  # type: ignore[union-attr]
    (server,) = children(driver.pid)
    driver.kill()
    driver.communicate()
    assert wait_until(lambda: not alive(server), 10)
    leftover = Path(said["home"])
    assert homes(scratch) == [leftover]

    with prefect_server() as url:
        assert not leftover.exists()
        assert len(homes(scratch)) == 1
        # Prefect, imported long before, uses the new server, whose database is its own.
        assert url != said["url"]
        names: dict[str, object] = {}
        exec(RUN, names)  # noqa: S102
        assert names["trivial"]("b2") == 42  # type: ignore[operator]
        assert (flow_run_states("run-a1"), flow_run_states("run-b2")) == ([], ["Completed"])


def test_two_at_once_with_no_database_yet(tmp_path: Path, scratch: Path) -> None:
    drivers = [start_driver(tmp_path) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda driver: json.loads(driver.stdout.readline()), drivers))
    assert said[0]["url"] != said[1]["url"]
    assert homes(scratch) == sorted(Path(one["home"]) for one in said)
    folder = tmp_path / "prefect" / version("prefect")
    assert [path.name for path in folder.iterdir()] == [DATABASE]
    made = (folder / DATABASE).stat()

    # One ends while the other lives on: its sweep and its end leave the other's home alone.
    for driver, other in zip(drivers, (said[1:], []), strict=True):
        out, err = driver.communicate("\n", timeout=60)
        assert (driver.returncode, out.strip(), err) == (0, "42", "")
        assert homes(scratch) == [Path(one["home"]) for one in other]

    with prefect_server(tmp_path):
        pass
    now = (folder / DATABASE).stat()
    assert (now.st_ino, now.st_mtime_ns) == (made.st_ino, made.st_mtime_ns)


def test_a_terminals_interrupt_does_not_reach_the_server(scratch: Path) -> None:
    driver = start_driver()
    driver.stdout.readline()  # type: ignore[union-attr]
    os.killpg(driver.pid, signal.SIGINT)
    out, err = driver.communicate(timeout=60)
    assert (driver.returncode, out.strip(), err) == (0, "42", "")
    assert homes(scratch) == []


def test_a_server_that_cannot_start_says_why(tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "uvicorn.py").write_text("raise RuntimeError('no uvicorn today')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reason = r"(?s)ended with exit code 1\..*no uvicorn today"
    with pytest.raises(ServerError, match=reason), prefect_server():
        pass
    assert homes(scratch) == []
    assert children(os.getpid()) == []


def test_a_damaged_database_is_named(tmp_path: Path, scratch: Path) -> None:
    folder = tmp_path / "prefect" / version("prefect")
    folder.mkdir(parents=True)
    (folder / DATABASE).write_bytes(b"not a database" * 100)
    remedy = "remove the folder 'prefect' in MASKMILL_HOME"
    with pytest.raises(ServerError, match=remedy), prefect_server(tmp_path):
        pass
    assert homes(scratch) == []


def test_only_the_main_thread_may_enter() -> None:
    caught: list[BaseException] = []

    def enter() -> None:
        try:
            with prefect_server():
                pass
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=enter, name="worker-7")
    thread.start()
    thread.join()
    assert "'worker-7'; enter it from the main thread" in str(caught[0])
