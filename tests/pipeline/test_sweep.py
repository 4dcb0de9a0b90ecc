"""What killed commands left is removed by whoever is alone with OUT, and by nobody else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.sweep import sweep

ALONE = """
import sys
from pipeline.sweep import sweep
sweep(sys.argv[1])
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out/ledger").mkdir(parents=True)
    (tmp_path / "out/masks").mkdir()
    return tmp_path / "out"


def leave(out: Path) -> Path:
    left = out / "masks/.a.nii.gz.1234.partial"
    left.write_bytes(b"half")
    return left


def swept_by_another(out: Path) -> bool:
    left = leave(out)
    subprocess.run([sys.executable, "-c", ALONE, str(out)], check=True, cwd=Path(__file__).parents[2])
    return not left.exists()


def test_who_is_alone_sweeps(out: Path) -> None:
    left = leave(out)
    sweep(str(out))
    assert not left.exists()


def test_while_one_command_lives_another_sweeps_nothing(out: Path) -> None:
    assert swept_by_another(out)
    sweep(str(out))
    assert not swept_by_another(out)


def test_an_out_that_was_removed_and_made_again_is_held_again(out: Path) -> None:
    sweep(str(out))
    shutil.rmtree(out)
    (out / "ledger").mkdir(parents=True)
    (out / "masks").mkdir()
    sweep(str(out))
    assert not swept_by_another(out)
