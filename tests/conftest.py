"""Fixtures that every part of the tests shares."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from object_server import ObjectServer

# A shared machine is slow at times; how long an example takes says nothing about what it tests.
settings.register_profile("maskmill", deadline=None)
settings.load_profile("maskmill")

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# A shell without job control starts what it puts into the background with Ctrl-C ignored, and children inherit that:
# the tests that send one need it to arrive.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real scans beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the real scans (../shared/data) are not beside this checkout")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def _private_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keys, compile caches and server templates of a test run stay out of the user's home."""
    os.environ.setdefault("MASKMILL_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="module")
def s3_server() -> Iterator[ObjectServer]:
    """A real S3-speaking server on loopback; tests share its bucket and keep to a prefix of their own."""
    from object_server import object_server

    with object_server() as server:
        yield server


@pytest.fixture
def s3(s3_server: ObjectServer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A URL of the test's own in an object store."""
    from pipeline import objects

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    objects.forget()
    yield f"s3://bucket/{request.node.name}".translate({ord("["): "-", ord("]"): None})
    objects.forget()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--nothing-left-out",
        action="store_true",
        default=bool(os.environ.get("MASKMILL_NOTHING_LEFT_OUT")),
        help="fail when a test was skipped, but for want of a GPU; also MASKMILL_NOTHING_LEFT_OUT=1",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out and why, in few lines."""
    reasons = Counter(_reason(report) for report in terminalreporter.getreports("skipped"))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"left out: {count} test{'s' * (count > 1)}: {reason}")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--nothing-left-out") and reporter is not None and session.exitstatus == 0:
        left_out = [r for r in reporter.getreports("skipped") if "gpu" not in getattr(r, "keywords", {})]
        if left_out:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test was skipped: the last part of what pytest keeps, (file, line, "Skipped: why")."""
    where = report.longrepr
    text = str(where[2]) if isinstance(where, tuple) else str(where)
    return text.removeprefix("Skipped: ")
