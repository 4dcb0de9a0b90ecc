"""A teacher answers the job's own question, and has not seen what measures the pupil."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from balls import LABELS, ball_folder, ball_job

import segmodels
from pipeline.errors import UsageError
from pipeline.training.gather import prepare_cases
from pipeline.training.job import make_train_job
from pipeline.training.run import train_members

NEVER = threading.Event()


def save_teacher(folder: Path, **changes: Any) -> str:
    card: dict[str, Any] = {
        "name": "teacher",
        "version": "1.0.0",
        "axes": "zyx",
        "channels": ["MR"],
        "normalize": [{"kind": "zscore"}],
        "tile": [16, 16, 16],
        "activation": "softmax",
        "labels": {str(value): {"name": name} for value, name in LABELS.items()},
    }
    torch.manual_seed(0)
    classes = len((card | changes)["labels"]) + 1
    network = segmodels.create("resunet", dims=3, in_channels=1, classes=classes, widths=[4, 8])
    segmodels.save(network, card | changes, folder)
    return str(folder)


def prepared(folder: Path, teacher: str) -> Any:
    job = make_train_job(ball_job(ball_folder(folder, 4), teacher=teacher))
    return job, prepare_cases(job, folder / "model", NEVER)


def test_a_teacher_that_fits_is_remembered(tmp_path: Path) -> None:
    _, preparation = prepared(tmp_path, save_teacher(tmp_path / "teacher"))
    loaded = segmodels.load(tmp_path / "teacher")
    assert preparation.teacher.described == {"name": "teacher", "hash": loaded.hash}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": {"1": {"name": "ball"}}}, "its labels"),
        ({"normalize": [{"kind": "none"}]}, "its normalize"),
        ({"channels": ["CT"]}, "its channels"),
    ],
)
def test_a_teacher_of_another_question_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=f"^teacher: {said}.* must be the job's"):
        prepared(tmp_path, save_teacher(tmp_path / "teacher", **changes))
    assert not (tmp_path / "model/.training/cases").exists()  # said before anything is prepared


@pytest.mark.parametrize(("teacher", "said"), [("nowhere", "teacher: "), ("kmeans", "no network to learn from")])
def test_no_teacher(tmp_path: Path, teacher: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        prepared(tmp_path, teacher)


def test_a_teacher_that_knows_the_validation_cases_is_refused(tmp_path: Path) -> None:
    _, preparation = prepared(tmp_path, save_teacher(tmp_path / "teacher"))
    (known,) = preparation.split.validation
    training = {
        "data": {"sha256_of_image_and_mask": {"its-own-name": preparation.digests[known]}},
        "split": {"training": ["its-own-name"]},
    }
    with pytest.raises(UsageError, match=f"{known} is to measure, but its image is that of its-own-name"):
        prepared(tmp_path, save_teacher(tmp_path / "knowing", training=training))


def test_another_teacher_halfway_is_refused(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    settings = ball_job(ball_folder(tmp_path, 4), teacher=teacher)
    settings["recipe"]["steps"] = 2
    job = make_train_job(settings)
    train_members(job, tmp_path / "model", prepare_cases(job, tmp_path / "model", NEVER), 1, NEVER)
    save_teacher(tmp_path / "teacher", tile=[8, 8, 8], stitch=["constant"])
    network = segmodels.create("resunet", dims=3, in_channels=1, classes=3, widths=[8, 8])
    card = segmodels.load(tmp_path / "teacher").card.model_dump(mode="json", exclude={"network", "weights", "format"})
    segmodels.save(network, card, tmp_path / "teacher")
    with pytest.raises(UsageError, match="the teacher is another one"):
        prepare_cases(job, tmp_path / "model", NEVER)
