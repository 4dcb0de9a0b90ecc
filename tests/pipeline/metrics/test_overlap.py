"""Scores against MONAI and against their formulas; void, empty and binary references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.metrics import compute_dice, compute_iou
from monai.metrics.confusion_matrix import compute_confusion_matrix_metric, get_confusion_matrix

from pipeline import ome
from pipeline.errors import StudyError
from pipeline.metrics import masks
from pipeline.metrics.masks import stored_mask, study_mask
from pipeline.metrics.overlap import confusion, is_binary_255, overlaps
from pipeline.sources import Study

AFFINE = np.array([[-0.9, 0.1, 0.3, 12.0], [0.2, 1.1, -0.2, -7.5], [0.1, -0.3, 2.9, 40.25], [0, 0, 0, 1.0]])
SHAPE = (13, 9, 11)  # z, y, x


def scores(counts: dict[str, int], label: int, *, binary_255: bool) -> dict[str, float | None]:
    return overlaps(counts, binary_255=binary_255)[label].scores()


def pair(seed: int = 0, labels: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """A prediction and a reference that mostly agree, (z, y, x)."""
    rng = np.random.default_rng(seed)
    reference = rng.integers(0, labels, SHAPE).astype(np.uint8)
    predicted = np.where(rng.random(SHAPE) < 0.7, reference, rng.integers(0, labels, SHAPE)).astype(np.uint8)
    return predicted, reference


def compared(folder: Path, predicted: np.ndarray, reference: np.ndarray, affine: np.ndarray = AFFINE) -> dict[str, int]:
    """Counts of a stored label image (z, y, x) against a NIfTI mask of these numbers."""
    array = ome.create_array(str(folder / "labels"), predicted.shape, (8, 8, 8), predicted.dtype, list("zyx"))
    array[...] = predicted
    nib.save(nib.Nifti1Image(reference.T, affine, dtype=reference.dtype), folder / "reference.nii.gz")
    study = Study("r", "r", (str(folder / "reference.nii.gz"),), "nifti")
    return confusion(stored_mask(str(folder / "labels"), AFFINE), study_mask(study))


def one_hot(labels: np.ndarray, classes: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([labels == k for k in range(classes)])[None].astype(np.float32))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_scores_are_monais(tmp_path: Path, dtype: Any) -> None:
    predicted, reference = pair()
    counts = compared(tmp_path, predicted, reference.astype(dtype))
    ours = [scores(counts, k, binary_255=False) for k in range(1, 4)]
    hot = one_hot(predicted, 4), one_hot(reference, 4)
    assert [s["dice"] for s in ours] == pytest.approx(compute_dice(*hot, include_background=False)[0].tolist())
    assert [s["iou"] for s in ours] == pytest.approx(compute_iou(*hot, include_background=False)[0].tolist())
    matrix = get_confusion_matrix(*hot, include_background=False)
    for name in ("sensitivity", "precision"):
        theirs = compute_confusion_matrix_metric(name, matrix)[0].tolist()
        assert [s[name] for s in ours] == pytest.approx(theirs)


@given(seed=st.integers(0, 1000), labels=st.integers(1, 5), label=st.integers(1, 6))
def test_scores_are_their_formulas(seed: int, labels: int, label: int) -> None:
    predicted, reference = pair(seed, labels)
    values, numbers = np.unique(np.stack([predicted.ravel(), reference.ravel()]), axis=1, return_counts=True)
    counts = {f"{p},{r}": int(n) for (p, r), n in zip(values.T, numbers, strict=True)}
    found = scores(counts, label, binary_255=False)
    ours, theirs = predicted == label, reference == label
    both, either = (ours & theirs).sum(), (ours | theirs).sum()
    expected = {
        "dice": 2 * both / (ours.sum() + theirs.sum()) if either else None,
        "iou": both / either if either else None,
        "sensitivity": both / theirs.sum() if theirs.any() else None,
        "precision": both / ours.sum() if ours.any() else None,
    }
    assert found == pytest.approx(expected)


def test_counts_are_of_every_pair(tmp_path: Path) -> None:
    predicted, reference = pair()
    counts = compared(tmp_path, predicted, reference)
    assert sum(counts.values()) == predicted.size
    for p in range(4):
        for r in range(4):
            assert counts.get(f"{p},{r}", 0) == int(((predicted == p) & (reference == r)).sum())


def test_wide_labels_are_counted_too(tmp_path: Path) -> None:
    predicted = np.zeros(SHAPE, np.uint16)
    predicted[2:5] = 60_000
    reference = np.zeros(SHAPE, np.int32)
    reference[3:6] = 60_000
    reference[0, 0, 0] = 100_000
    counts = compared(tmp_path, predicted, reference)
    plane = 9 * 11
    assert counts == {
        "0,0": 9 * plane - 1, "0,60000": plane, "60000,0": plane, "60000,60000": 2 * plane, "0,100000": 1,
    }  # fmt: skip
    assert scores(counts, 60_000, binary_255=False)["dice"] == pytest.approx(2 / 3)


def test_empty_in_both_has_no_score() -> None:
    assert set(scores({"0,0": 10}, 1, binary_255=False).values()) == {None}
    assert set(scores({}, 1, binary_255=False).values()) == {None}


def test_empty_in_one_scores_zero() -> None:
    missed = scores({"0,0": 8, "0,1": 2}, 1, binary_255=False)
    assert missed == {"dice": 0.0, "iou": 0.0, "sensitivity": 0.0, "precision": None}
    invented = scores({"0,0": 8, "1,0": 2}, 1, binary_255=False)
    assert invented == {"dice": 0.0, "iou": 0.0, "sensitivity": None, "precision": 0.0}


def test_void_voxels_count_for_nothing() -> None:
    counts = {"0,0": 50, "1,1": 6, "1,0": 2, "0,1": 2, "1,255": 100, "0,255": 40, "1,2": 0}
    found = scores(counts, 1, binary_255=False)
    assert found["dice"] == pytest.approx(12 / 16)
    assert found["iou"] == pytest.approx(6 / 10)
    assert found["sensitivity"] == found["precision"] == pytest.approx(6 / 8)


def test_voxels_are_counted_wherever_they_lie() -> None:
    counts = {"0,0": 50, "1,1": 6, "1,0": 2, "0,1": 3, "1,255": 100, "0,255": 40, "255,0": 7}
    void, binary = overlaps(counts, binary_255=False), overlaps(counts, binary_255=True)
    assert (void[1].anywhere, void[1].reference) == (108, 9)
    assert (binary[1].anywhere, binary[1].reference) == (108, 149)
    assert (void[255].anywhere, void[255].reference) == (7, 0)


def test_where_all_references_hold_only_0_and_255_it_is_label_1() -> None:
    binary = [{"0,0": 5, "1,255": 3}, {"0,0": 9}, {"0,255": 2, "1,0": 1}]
    assert is_binary_255(binary)
    assert scores(binary[0], 1, binary_255=True)["dice"] == 1.0
    assert scores(binary[2], 1, binary_255=True) == {"dice": 0.0, "iou": 0.0, "sensitivity": 0.0, "precision": 0.0}
    assert not is_binary_255([*binary, {"0,1": 1}]), "one label more, and 255 is void in all of them"
    assert not is_binary_255([{"0,0": 5}, {"255,0": 5}]), "no reference holds 255"
    assert not is_binary_255([])


@pytest.mark.parametrize(
    ("change", "cause", "says"),
    [
        (lambda r: r[:-1], "input", "voxels"),
        (lambda r: r + 0.5, "input", "fractions"),
        (lambda r: r.astype(np.int16) - 5, "input", "from -5"),
        (lambda r: np.stack([r, r]), "input", "4-D"),
    ],
)
def test_references_that_do_not_fit_are_refused(tmp_path: Path, change: Any, cause: str, says: str) -> None:
    predicted, reference = pair()
    with pytest.raises(StudyError, match=says) as refused:
        compared(tmp_path, predicted, change(reference))
    assert refused.value.cause == cause


@pytest.mark.parametrize(("shift", "fits"), [(0.02, True), (0.5, False)])
def test_a_reference_lies_within_a_tenth_of_a_voxel(tmp_path: Path, shift: float, fits: bool) -> None:
    predicted, reference = pair()
    moved = AFFINE.copy()
    moved[0, 3] += shift
    if fits:
        assert compared(tmp_path, predicted, reference, moved)
    else:
        with pytest.raises(StudyError, match=r"up to 0\.5 mm away") as refused:
            compared(tmp_path, predicted, reference, moved)
        assert refused.value.cause == "geometry"


def test_a_reference_that_is_turned_is_refused(tmp_path: Path) -> None:
    predicted, reference = pair()
    with pytest.raises(StudyError) as refused:
        compared(tmp_path, predicted, reference, AFFINE @ np.diag([-1, 1, 1, 1]))
    assert refused.value.cause == "geometry"


def test_labels_with_a_channel_axis(tmp_path: Path) -> None:
    predicted, reference = pair()
    array = ome.create_array(str(tmp_path / "labels"), (1, *SHAPE), (8, 8, 8), predicted.dtype, list("czyx"))
    array[0] = predicted
    nib.save(nib.Nifti1Image(reference.T, AFFINE), tmp_path / "r.nii")
    study = Study("r", "r", (str(tmp_path / "r.nii"),), "nifti")
    counts = confusion(stored_mask(str(tmp_path / "labels"), AFFINE), study_mask(study))
    (tmp_path / "flat").mkdir()
    assert counts == compared(tmp_path / "flat", predicted, reference)


@pytest.mark.parametrize("voxels", [1, 200, 9 * 11 * 4, 1 << 22])
def test_slabs_may_be_cut_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, voxels: int) -> None:
    """The reference's slabs and the label image's chunks of 8 rows need not end at the same rows."""
    predicted, reference = pair()
    monkeypatch.setattr("pipeline.metrics.masks.SLAB_VOXELS", voxels)
    counts = compared(tmp_path, predicted, reference)
    assert counts["2,2"] == ((predicted == 2) & (reference == 2)).sum()
    mask = stored_mask(str(tmp_path / "labels"), AFFINE)
    np.testing.assert_array_equal(np.concatenate(list(mask.slabs())), predicted)
    assert all(slab.size <= max(voxels, 99) for slab in mask.slabs())


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_labels_that_nibabel_stored_with_a_slope(tmp_path: Path, dtype: Any) -> None:
    """A float array under an integer header: nibabel writes a slope, and 2 comes back as 2.0000001."""
    _, labels = pair(labels=8)
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    nib.save(nib.Nifti1Image(labels.T.astype(float), AFFINE, header), tmp_path / "m.nii.gz")
    stored = nib.load(tmp_path / "m.nii.gz")
    assert not np.array_equal(np.unique(stored.get_fdata()), np.arange(8))  # else this tests nothing
    mask = study_mask(Study("m", "m", (str(tmp_path / "m.nii.gz"),), "nifti"))
    assert np.array_equal(np.concatenate(list(mask.slabs())), labels)


@pytest.mark.parametrize("value", [0.5, 1.03, np.nan, np.inf])
def test_fractions_are_no_labels(tmp_path: Path, value: float) -> None:
    data = np.zeros(SHAPE, np.float32)
    data[3, 4, 5] = value
    nib.save(nib.Nifti1Image(data.T, AFFINE), tmp_path / "m.nii.gz")
    with pytest.raises(StudyError):
        list(study_mask(Study("m", "m", (str(tmp_path / "m.nii.gz"),), "nifti")).slabs())


def test_a_stored_mask_of_large_planes_is_read_in_small_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.arange(32 * 8 * 8, dtype=np.uint8).reshape(32, 8, 8)
    array = ome.create_array(str(tmp_path / "labels"), labels.shape, (32, 8, 8), labels.dtype, list("zyx"))
    array[...] = labels
    monkeypatch.setattr(masks, "SLAB_VOXELS", 4 * 8 * 8)
    for largest, parts in ((32 * 64, 1), (8 * 64, 4), (1, 8)):
        taken: list[int] = []
        monkeypatch.setattr(masks, "LARGEST_READ", largest)

        def read(array: Any, selection: Any, taken: list[int] = taken, real: Any = ome.read) -> np.ndarray:
            part: np.ndarray = real(array, selection)
            taken.append(len(part))
            return part

        with monkeypatch.context() as patched:
            patched.setattr(masks.ome, "read", read)
            found = np.concatenate(list(stored_mask(str(tmp_path / "labels"), AFFINE).slabs()))
        assert np.array_equal(found, labels)
        assert len(taken) == parts
