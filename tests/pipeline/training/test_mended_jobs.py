"""Mistakes cost no work: a job that taught nothing may be changed, a training is kept where only its end failed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from balls import ball_folder, ball_job, save_ball

import segmodels
from pipeline.errors import Interrupted, StudyError, UsageError
from pipeline.training.claim import claim, is_done
from pipeline.training.gather import prepare_cases
from pipeline.training.job import TrainJob, make_train_job
from pipeline.training.run import finish_model, train_members

NEVER = threading.Event()


def train(job: TrainJob, out: Path, stop: threading.Event = NEVER) -> None:
    assert not is_done(job, out)
    with claim(job, out):
        preparation = prepare_cases(job, out, NEVER)
        train_members(job, out, preparation, 1, NEVER)
        finish_model(job, out, preparation, 1, stop)


def short(folder: Path, **changes: Any) -> TrainJob:
    settings = ball_job(folder, **changes)
    settings["recipe"]["steps"] = 3
    return make_train_job(settings)


def test_a_job_that_taught_nothing_may_be_mended(tmp_path: Path) -> None:
    ball_folder(tmp_path, 4)
    network = {"name": "resunet", "config": {"dims": 3, "in_channels": 1, "classes": 4, "widths": [4, 8]}}
    wrong = short(tmp_path, labels={1: "lower half", 2: "upper half", 3: "nothing"}, network=network)
    with pytest.raises(UsageError, match=r"label 3 .* occurs in no training case: take it out"):
        train(wrong, tmp_path / "model")
    train(short(tmp_path), tmp_path / "model")
    assert is_done(short(tmp_path), tmp_path / "model")
    # What has learned is kept to its job, but for what only the card says.
    with pytest.raises(UsageError, match="holds a model of another job"):
        is_done(short(tmp_path, version="2"), tmp_path / "model")


def test_a_case_that_was_prepared_for_one_channel_does_not_serve_two(tmp_path: Path) -> None:
    ball_folder(tmp_path, 4)
    prepare_cases(short(tmp_path), tmp_path / "model", NEVER)
    network = {"name": "resunet", "config": {"dims": 3, "in_channels": 2, "classes": 3, "widths": [4, 8]}}
    job = short(tmp_path, channels=["T1", "T2"], network=network)
    with pytest.raises(UsageError, match="the image has 1 channel"):
        prepare_cases(job, tmp_path / "model", NEVER)


def test_weights_too_large_for_fp16_are_stored_as_the_mended_job_says(tmp_path: Path) -> None:
    ball_folder(tmp_path, 4)
    for path in (tmp_path / "images").iterdir():  # variances above 65504
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj) * 100, image.affine), path)
    half = short(tmp_path, normalize=[{"kind": "none"}], weights="fp16")
    with pytest.raises(segmodels.ModelError, match=r"too large for fp16 .* store it as bf16 or fp32"):
        train(half, tmp_path / "model")
    whole = short(tmp_path, normalize=[{"kind": "none"}], weights="fp32")
    state = (tmp_path / "model/.training/member-0/checkpoint.pt").read_bytes()
    assert not is_done(whole, tmp_path / "model")
    preparation = prepare_cases(whole, tmp_path / "model", NEVER)
    assert (tmp_path / "model/.training/member-0/checkpoint.pt").read_bytes() == state
    finish_model(whole, tmp_path / "model", preparation, 1, NEVER)
    assert is_done(whole, tmp_path / "model")


def test_a_validation_case_that_cannot_be_measured_ends_it_and_is_named(tmp_path: Path) -> None:
    job = short(ball_folder(tmp_path, 4))
    preparation = prepare_cases(job, tmp_path / "model", NEVER)
    train_members(job, tmp_path / "model", preparation, 1, NEVER)
    (name,) = preparation.split.validation
    mask = tmp_path / f"masks/{name}.nii.gz"
    good = mask.read_bytes()
    mask.write_bytes(good[:40])
    with pytest.raises(StudyError, match=f"the validation case {name} cannot be measured"):
        finish_model(job, tmp_path / "model", preparation, 1, NEVER)
    assert not (tmp_path / "model/card.json").exists()
    mask.write_bytes(good)
    finish_model(job, tmp_path / "model", preparation, 1, NEVER)
    assert segmodels.load(tmp_path / "model").card.quality["cases"] == 1


def test_a_stop_while_the_model_is_measured(tmp_path: Path) -> None:
    job, stop = short(ball_folder(tmp_path, 4)), threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        train(job, tmp_path / "model", stop)
    train(job, tmp_path / "model")
    assert is_done(job, tmp_path / "model")


def test_what_a_command_killed_at_its_very_end_left_is_removed(tmp_path: Path) -> None:
    job = short(ball_folder(tmp_path, 4))
    train(job, tmp_path / "model")
    (tmp_path / "model/.training/cases").mkdir(parents=True)
    assert is_done(job, tmp_path / "model")
    assert not (tmp_path / "model/.training").exists()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:1000])])
def test_a_model_whose_weights_are_damaged_is_not_done(tmp_path: Path, damage: Any) -> None:
    job = short(ball_folder(tmp_path, 4))
    train(job, tmp_path / "model")
    damage(tmp_path / "model/weights.safetensors")
    with pytest.raises(UsageError, match=r"holds the model of this job, damaged: .*weights\.safetensors"):
        is_done(job, tmp_path / "model")


def test_one_validation_case_gives_no_interval(tmp_path: Path) -> None:
    train(short(ball_folder(tmp_path, 4)), tmp_path / "model")
    quality: Any = segmodels.load(tmp_path / "model").card.quality
    assert {facts["n"] for facts in quality["structures"].values()} == {1}
    assert {facts["interval_95"] for facts in quality["structures"].values()} == {None}


def test_two_commands_do_not_train_in_one_folder(tmp_path: Path) -> None:
    job = short(ball_folder(tmp_path, 4))
    with claim(job, tmp_path / "model"), pytest.raises(UsageError, match="another command trains in"):  # noqa: SIM117
        with claim(job, tmp_path / "model"):
            pass
    with claim(job, tmp_path / "model"):
        pass


# ------------------------------------------------------------------------------------------------ cases as a whole


def binary(folder: Path, values: dict[str, int]) -> TrainJob:
    """Balls of one label, stored as these values."""
    for seed, (name, value) in enumerate(values.items()):
        save_ball(folder, name, seed)
        path = folder / f"masks/{name}.nii.gz"
        mask = nib.load(path)
        data = (np.asarray(mask.dataobj) > 0).astype(np.uint8) * value
        nib.save(nib.Nifti1Image(data, mask.affine), path)
    network = {"name": "resunet", "config": {"dims": 3, "in_channels": 1, "classes": 2, "widths": [4, 8]}}
    return short(folder, labels={1: "ball"}, network=network)


def test_masks_of_255_are_label_1_and_scored_so(tmp_path: Path) -> None:
    job = binary(tmp_path, {"a": 255, "b": 255, "c": 255, "d": 255})
    train(job, tmp_path / "model")
    quality: Any = segmodels.load(tmp_path / "model").card.quality
    assert quality["structures"]["ball"]["n"] == 1


def test_masks_of_1_and_of_255_are_not_mixed(tmp_path: Path) -> None:
    job = binary(tmp_path, {"a": 255, "b": 1, "c": 255, "d": 1})
    with pytest.raises(UsageError, match="label 1 is 255 in the mask of a and 1 in that of b"):
        prepare_cases(job, tmp_path / "model", NEVER)


@pytest.mark.parametrize(("first", "second"), [(1, 255), (255, 1)])
def test_a_mask_of_1_and_255_is_set_aside(tmp_path: Path, first: int, second: int) -> None:
    job = binary(tmp_path, {"a": 1, "b": 1, "c": 1, "d": 1})
    data = np.zeros((15, 16, 80), np.uint8)  # rows of z are read 32 at a time
    data[5, 5, 3], data[5, 5, 70] = first, second
    affine = nib.load(tmp_path / "images/d.nii.gz").affine
    nib.save(nib.Nifti1Image(data, affine), tmp_path / "masks/d.nii.gz")
    nib.save(nib.Nifti1Image(data.astype(np.float32), affine), tmp_path / "images/d.nii.gz")
    ((where, error),) = prepare_cases(job, tmp_path / "model", NEVER).failures
    assert where.endswith("d.nii.gz")
    assert "the mask holds label 255, which is none of the job's labels [1]" in str(error)


def test_one_image_does_not_learn_and_measure(tmp_path: Path) -> None:
    ball_folder(tmp_path, 4)
    job = short(tmp_path)
    (name,) = prepare_cases(job, tmp_path / "model", NEVER).split.validation
    other = next(f"ball-{i}" for i in range(4) if f"ball-{i}" != name)
    for part in ("images", "masks"):
        (tmp_path / f"{part}/{name}.nii.gz").write_bytes((tmp_path / f"{part}/{other}.nii.gz").read_bytes())
    with pytest.raises(UsageError, match=f"{name} is to measure, but its image is that of {other}"):
        prepare_cases(job, tmp_path / "model", NEVER)


def test_folds_need_cases(tmp_path: Path) -> None:
    ball_folder(tmp_path, 4)
    with pytest.raises(UsageError, match="3 training cases do not make 4 folds"):
        prepare_cases(short(tmp_path, members=4, members_by="folds"), tmp_path / "model", NEVER)
