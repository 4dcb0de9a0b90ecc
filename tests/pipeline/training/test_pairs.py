"""Pairs, splits and prepared cases: what goes together, what is set aside, and what samples are cut from."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from balls import ball_folder, ball_job, save_ball
from scans import save_nifti

import pipeline
from pipeline.errors import Interrupted, StudyError, UsageError
from pipeline.training.gather import prepare_cases
from pipeline.training.job import Data, Split, make_train_job
from pipeline.training.pairs import draw_split, find_pairs
from pipeline.training.prepare import prepare

NEVER = threading.Event()


def test_pairs_go_by_name_and_the_odd_ones_are_named(tmp_path: Path) -> None:
    ball_folder(tmp_path, 3)
    (tmp_path / "masks/ball-1.nii.gz").rename(tmp_path / "masks/other.nii.gz")
    pairs, failures = find_pairs(Data(images=(str(tmp_path / "images"),), masks=str(tmp_path / "masks")))
    assert [pair.name for pair in pairs] == ["ball-0", "ball-2"]
    said = {Path(where).name: str(why) for where, why in failures}
    assert said == {
        "ball-1.nii.gz": "this image has no mask of the same name",
        "other.nii.gz": "this mask has no image of the same name",
    }


def test_no_pair_at_all(tmp_path: Path) -> None:
    save_ball(tmp_path / "a", "x", 0)
    save_ball(tmp_path / "b", "y", 0)
    with pytest.raises(UsageError, match="no image has a mask"):
        find_pairs(Data(images=(str(tmp_path / "a/images"),), masks=str(tmp_path / "b/masks")))
    with pytest.raises(UsageError, match="does not exist"):
        find_pairs(Data(images=(str(tmp_path / "a/images"),), masks=str(tmp_path / "none")))


def test_a_split_is_a_function_of_seed_and_names() -> None:
    names = [f"case-{i}" for i in range(200)]
    split = draw_split(Split(seed=3, validation=0.2), names)
    assert len(split.validation) == 40
    assert sorted([*split.training, *split.validation]) == sorted(names)
    assert draw_split(Split(seed=3, validation=0.2), names[::-1]) == split
    assert draw_split(Split(seed=4, validation=0.2), names) != split
    assert draw_split(Split(validation=0.0), names).validation == ()
    assert len(draw_split(Split(validation=0.01), names[:3]).validation) == 1
    with pytest.raises(UsageError, match="one case only"):
        draw_split(Split(), ["alone"])


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"training": ["a"], "validation": ["b"]}, None),
        ({"training": ["a"], "validation": ["x"]}, "no case is called 'x'"),
        ({"training": ["a", "b"], "validation": ["b"]}, "in both lists"),
        ({"training": [], "validation": ["b"]}, "is empty"),
        ({"training": ["a"]}, "must be JSON"),
        ([1], "must be JSON"),
    ],
)
def test_a_split_from_a_file(tmp_path: Path, held: object, message: str | None) -> None:
    (tmp_path / "split.json").write_text(json.dumps(held))
    settings = Split(file=str(tmp_path / "split.json"))
    if message is None:
        split = draw_split(settings, ["a", "b", "c"])
        assert (split.training, split.validation) == (("a",), ("b",))
    else:
        with pytest.raises(UsageError, match=message):
            draw_split(settings, ["a", "b", "c"])


def test_a_case_is_the_image_as_segment_normalises_it(tmp_path: Path) -> None:
    ball_folder(tmp_path, 1)
    job = make_train_job(ball_job(tmp_path))
    (pair,), _ = find_pairs(job.data)
    case, facts = prepare(job, pair, tmp_path / "case", NEVER)
    voxels = np.asarray(nib.load(tmp_path / "images/ball-0.nii.gz").dataobj).T.astype(np.float64)
    np.testing.assert_allclose(case.image()[0], (voxels - voxels.mean()) / voxels.std(), rtol=1e-5, atol=1e-6)
    mask = np.asarray(nib.load(tmp_path / "masks/ball-0.nii.gz").dataobj).T
    np.testing.assert_array_equal(case.labels(), mask)
    assert facts["voxels"] == {"1": int((mask == 1).sum()), "2": int((mask == 2).sum())}
    affine = nib.load(tmp_path / "images/ball-0.nii.gz").affine
    np.testing.assert_allclose(case.spacing, nib.affines.voxel_sizes(affine)[::-1], rtol=1e-6)
    places = case.places()
    assert all((mask[tuple(voxels.T)] == label).all() for label, voxels in places.items())


def test_a_case_is_read_once_unless_it_changes(tmp_path: Path) -> None:
    ball_folder(tmp_path, 1)
    job = make_train_job(ball_job(tmp_path))
    (pair,), _ = find_pairs(job.data)
    prepare(job, pair, tmp_path / "case", NEVER)
    before = (tmp_path / "case/image.npy").stat().st_mtime_ns
    prepare(job, pair, tmp_path / "case", NEVER)
    assert (tmp_path / "case/image.npy").stat().st_mtime_ns == before
    save_ball(tmp_path, "ball-0", 5)
    _, facts = prepare(job, pair, tmp_path / "case", NEVER)
    assert (tmp_path / "case/image.npy").stat().st_mtime_ns != before
    stop = threading.Event()
    stop.set()
    save_ball(tmp_path, "ball-0", 6)
    with pytest.raises(Interrupted):
        prepare(job, pair, tmp_path / "case", stop)
    _, again = prepare(job, pair, tmp_path / "case", NEVER)
    assert again["image"] != facts["image"]


def test_masks_of_0_and_255_are_label_1(tmp_path: Path) -> None:
    save_ball(tmp_path, "x", 0)
    mask = np.asarray(nib.load(tmp_path / "masks/x.nii.gz").dataobj)
    affine = nib.load(tmp_path / "masks/x.nii.gz").affine
    save_nifti(tmp_path / "masks/x.nii.gz", np.where(mask > 0, 255, 0).astype(np.uint8), affine)
    network = {"name": "resunet", "config": {"dims": 3, "in_channels": 1, "classes": 2, "widths": [4, 8]}}
    job = make_train_job(ball_job(tmp_path, labels={1: "ball"}, network=network))
    (pair,), _ = find_pairs(job.data)
    case, facts = prepare(job, pair, tmp_path / "case", NEVER)
    np.testing.assert_array_equal(case.labels(), (mask > 0).T)
    assert facts["voxels"] == {"1": int((mask > 0).sum())}


def test_masks_inside_ome_zarr_images(tmp_path: Path) -> None:
    ball_folder(tmp_path, 2)
    out = tmp_path / "out"
    assert pipeline.segment(tmp_path / "images", "kmeans", out, classes=3).exit_code == 0
    data = {"images": str(out / "images"), "label_image": "kmeans"}
    job = make_train_job(ball_job(tmp_path, data=data))
    pairs, failures = find_pairs(job.data)
    assert [p.name for p in pairs] == ["ball-0", "ball-1"]
    assert failures == []
    case, _ = prepare(job, pairs[0], tmp_path / "case", NEVER)
    mask = np.asarray(nib.load(out / "masks/ball-0.nii.gz").dataobj)
    np.testing.assert_array_equal(case.labels(), mask.T)


def spoil(folder: Path, how: str) -> None:
    image, mask = folder / "images/ball-1.nii.gz", folder / "masks/ball-1.nii.gz"
    labels = np.asarray(nib.load(mask).dataobj).copy()
    affine = nib.load(mask).affine
    if how == "shape":
        save_nifti(mask, labels[:-1], affine)
    elif how == "affine":
        affine = affine.copy()
        affine[0, 3] += 5
        save_nifti(mask, labels, affine)
    elif how == "label":
        labels[0, 0, 0] = 9
        save_nifti(mask, labels, affine)
    elif how == "fractions":
        save_nifti(mask, labels.astype(np.float32) + 0.5, affine)
    elif how == "truncated":
        image.write_bytes(image.read_bytes()[:-300])
    elif how == "nan":
        voxels = np.asarray(nib.load(image).dataobj).copy()
        voxels[3, 3, 3] = np.nan
        save_nifti(image, voxels, nib.load(image).affine)
    elif how == "channels":
        save_nifti(image, np.zeros((15, 16, 14, 2), np.float32), affine)


@pytest.mark.parametrize(
    ("how", "cause", "message"),
    [
        ("shape", "input", "voxels"),
        ("affine", "geometry", "mm away"),
        ("label", "input", "label 9, which is none of the job's labels"),
        ("fractions", "input", "fractions"),
        ("truncated", "input", ""),
        ("nan", "input", ""),
        ("channels", "input", ""),
    ],
)
def test_a_bad_pair_is_set_aside_and_the_others_are_used(tmp_path: Path, how: str, cause: str, message: str) -> None:
    ball_folder(tmp_path, 4)
    spoil(tmp_path, how)
    prepared = prepare_cases(make_train_job(ball_job(tmp_path)), tmp_path / "out", NEVER)
    ((where, why),) = prepared.failures
    assert where.endswith("ball-1.nii.gz")
    assert isinstance(why, StudyError)
    assert why.cause == cause
    assert message in str(why)
    assert sorted(prepared.cases) == ["ball-0", "ball-2", "ball-3"]


def test_a_label_that_never_occurs(tmp_path: Path) -> None:
    ball_folder(tmp_path, 3)
    network = {"name": "resunet", "config": {"dims": 3, "in_channels": 1, "classes": 4, "widths": [4, 8]}}
    labels = {1: "lower half", 2: "upper half", 3: "unicorn"}
    job = make_train_job(ball_job(tmp_path, labels=labels, network=network))
    with pytest.raises(UsageError, match=r"label 3 \(unicorn\) occurs in no training case"):
        prepare_cases(job, tmp_path / "out", NEVER)


def test_nothing_left_to_measure_with(tmp_path: Path) -> None:
    job = make_train_job(ball_job(ball_folder(tmp_path, 4)))
    (validation,) = prepare_cases(job, tmp_path / "out", NEVER).split.validation
    (tmp_path / f"masks/{validation}.nii.gz").write_bytes(b"no NIfTI")
    with pytest.raises(UsageError, match="no case is left to measure the model with; the first that was set aside"):
        prepare_cases(job, tmp_path / "other", NEVER)


def test_images_that_are_their_own_masks(tmp_path: Path) -> None:
    ball_folder(tmp_path, 2)
    both = {"images": f"{tmp_path}/masks/", "masks": f"{tmp_path}/masks"}
    with pytest.raises(UsageError, match="masks is both images and masks"):
        prepare_cases(make_train_job(ball_job(tmp_path, data=both)), tmp_path / "out", NEVER)


def test_nothing_left_to_learn_from(tmp_path: Path) -> None:
    ball_folder(tmp_path, 2)
    for mask in (tmp_path / "masks").iterdir():
        mask.write_bytes(b"no NIfTI")
    with pytest.raises(UsageError, match="no case is left to learn from"):
        prepare_cases(make_train_job(ball_job(tmp_path)), tmp_path / "out", NEVER)
