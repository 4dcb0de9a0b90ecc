"""A training goes on with the cases that it began with, or not at all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from balls import ball_folder, ball_job, save_ball

from pipeline.errors import UsageError
from pipeline.training.gather import prepare_cases
from pipeline.training.job import TrainJob, make_train_job
from pipeline.training.run import train_members

NEVER = threading.Event()


@pytest.fixture
def begun(tmp_path: Path) -> TrainJob:
    """A job on four balls, trained for two steps in `model`."""
    settings = ball_job(ball_folder(tmp_path, 4))
    settings["recipe"]["steps"] = 2
    job = make_train_job(settings)
    train_members(job, tmp_path / "model", prepare_cases(job, tmp_path / "model", NEVER), 1, NEVER)
    return job


def test_nothing_changed(begun: TrainJob, tmp_path: Path) -> None:
    again = prepare_cases(begun, tmp_path / "model", NEVER)
    assert again.digests.keys() == {f"ball-{i}" for i in range(4)}


def _edit(folder: Path) -> None:
    save_ball(folder, "ball-2", 77)


def _add(folder: Path) -> None:
    save_ball(folder, "another", 77)


def _remove(folder: Path) -> None:
    (folder / "images/ball-1.nii.gz").unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [(_edit, "ball-2 has changed"), (_add, "another is new"), (_remove, "ball-1 is gone or was set aside")],
)
def test_other_cases_are_refused_and_named(
    begun: TrainJob, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    change(tmp_path)
    with pytest.raises(UsageError, match=f"began with other cases: {said}.*or give another folder") as refused:
        prepare_cases(begun, tmp_path / "model", NEVER)
    assert "teacher" not in str(refused.value)
    assert ("the split is another one" in str(refused.value)) == (change is not _edit)


def test_before_anything_is_learned_cases_may_change(tmp_path: Path) -> None:
    job = make_train_job(ball_job(ball_folder(tmp_path, 4)))
    (tmp_path / "masks/ball-3.nii.gz").rename(tmp_path / "kept")
    assert len(prepare_cases(job, tmp_path / "model", NEVER).cases) == 3
    (tmp_path / "kept").rename(tmp_path / "masks/ball-3.nii.gz")
    assert len(prepare_cases(job, tmp_path / "model", NEVER).cases) == 4
