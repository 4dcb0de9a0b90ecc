"""The soak of kills in its short form; `benchmarks/soak_kills.py` has the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks/soak_kills.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_is_lost_whoever_is_killed() -> None:
    command = [sys.executable, str(SOAK), "--kills", "12", "--minutes", "3", "--studies", "3", "--seed", "3"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "labels that differ: 0" in ended.stdout
