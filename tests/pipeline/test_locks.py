"""Locks between commands on one OUT: given back however their holder ends, and never waited for without an end."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import Interrupted, StudyError
from pipeline.locks import Claim, alone

HOLD = "import sys, fcntl, os; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), {}); print('held', flush=True); input()"


@contextmanager
def held(folder: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    """The folder, locked by another process."""
    code = HOLD.format(f"fcntl.{kind}")
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_who_waits_goes_on_when_the_holder_was_killed(tmp_path: Path) -> None:
    with held(tmp_path, "LOCK_EX") as other:
        threading.Timer(0.3, other.kill).start()
        with alone(str(tmp_path), threading.Event()):
            assert other.wait(10) != 0


def test_a_holder_that_does_not_go_on_is_an_error_in_the_end(tmp_path: Path) -> None:
    with (
        held(tmp_path, "LOCK_EX"),
        pytest.raises(StudyError, match="another command on this OUT"),
        alone(str(tmp_path), threading.Event(), patience=0.2),
    ):
        pass


def test_who_waits_can_be_interrupted(tmp_path: Path) -> None:
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    with held(tmp_path, "LOCK_EX"), pytest.raises(Interrupted), alone(str(tmp_path), stop):
        pass


def test_the_first_claim_begins_and_others_join(tmp_path: Path) -> None:
    folder, stop = str(tmp_path / "key"), threading.Event()
    first = Claim(folder, stop)
    assert first.first
    first.share()
    assert not Claim(folder, stop).first
    del first
    assert Claim(folder, stop).first
    with held(tmp_path / "key", "LOCK_SH"):
        assert not Claim(folder, stop).first
