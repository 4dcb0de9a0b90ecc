"""Folders of private clusters: what a killed driver and its killed watchdog left behind is swept, nothing else."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from cluster.home import Home, sweep_abandoned


def abandoned(parent: Path, *, owner: str = "", seconds: float = 100.0) -> Path:
    """A folder as it is left, its `owner` file so many seconds old."""
    folder = parent / "mm-abandond"
    (folder / "r").mkdir(parents=True)
    file = folder / "owner"
    file.write_text(owner or socket.gethostname())
    os.utime(file, (time.time() - seconds,) * 2)
    return folder


def test_what_nobody_holds_is_removed_and_its_agents_ended(tmp_path: Path) -> None:
    folder = abandoned(tmp_path)
    with (folder / "r/log").open("w") as file, subprocess.Popen(
        ["ray::Agent", "-c", "echo here >&2; read line"], executable="/bin/sh", stdin=subprocess.PIPE, stderr=file
    ) as agent:  # fmt: skip
        while not (folder / "r/log").stat().st_size:
            time.sleep(0.01)
        sweep_abandoned(tmp_path)
        assert not folder.exists()
        assert agent.wait(10) == -9


@pytest.mark.parametrize("why", ["young", "another machine", "no owner", "held", "another name"])
def test_what_may_be_in_use_stays(tmp_path: Path, why: str) -> None:
    folder = abandoned(
        tmp_path, owner="elsewhere" if why == "another machine" else "", seconds=5.0 if why == "young" else 100.0
    )
    if why == "no owner":
        (folder / "owner").unlink()
    if why == "another name":
        folder = folder.rename(tmp_path / "mine")
    with (folder / "r/file").open("w") if why == "no owner" else (folder / "owner").open() as file:
        if why == "held":
            fcntl.flock(file, fcntl.LOCK_EX)
        sweep_abandoned(tmp_path)
    assert folder.is_dir()


def test_a_folder_is_held_as_long_as_its_driver_or_its_watchdog_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.home.YOUNG_SECONDS", -10.0)
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as parent:
        monkeypatch.setattr("tempfile.tempdir", parent)
        home = Home()
        try:
            sweep_abandoned(Path(parent))
            assert home.folder.is_dir()
            os.close(home._owner)  # as the end of the driver would
            sweep_abandoned(Path(parent))
            assert home.folder.is_dir()
        finally:
            home._owner = os.open(os.devnull, os.O_RDONLY)
            home.close()
        assert not list(Path(parent).iterdir())
