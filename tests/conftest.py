"""Fixtures that every part of the tests shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

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
