"""A real Chromium for the report's tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = [
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
]

Chromium = Callable[..., str]


@pytest.fixture
def chromium(tmp_path: Path) -> Chromium:
    """A function that runs a fresh Chromium on a page with the given options and returns what it printed."""
    binary = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if binary is None:
        pytest.skip(f"no Chromium is installed (looked for {', '.join(CHROMIUMS)})")
    rights = ["--no-sandbox"] if os.geteuid() == 0 else []

    def run(page: Path, *options: str) -> str:
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [binary, *QUIET, *rights, profile, *options, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout

    return run
