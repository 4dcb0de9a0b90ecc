"""Masks of anyone against references: the numbers by an independent computation, and what cannot be scored."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scans import OBLIQUE, save_nifti, table
from scipy import ndimage
from scipy.spatial.distance import cdist

import pipeline
from pipeline import evaluation
from pipeline.errors import UsageError
from pipeline.evaluation import Evaluation
from pipeline.metrics.intervals import bootstrap_interval

AFFINE = np.diag([1.0, 0.5, 2.0, 1.0])  # over x, y, z
NAMES = {1: "one", 2: "two"}
SHAPE = (13, 12, 9)  # x, y, z


def blobs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A mask and its reference over (x, y, z), of two labels that mostly agree."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.normal(size=SHAPE), 1.5)
    other = field + 0.3 * field.std() * rng.normal(size=SHAPE)
    cuts = np.quantile(field, [0.5, 0.85])
    return np.digitize(other, cuts).astype(np.uint8), np.digitize(field, cuts).astype(np.uint8)


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """Six masks, some in a folder below, and their references."""
    for seed in range(6):
        mask, reference = blobs(seed)
        place = ("site/" if seed % 2 else "") + f"s{seed}.nii.gz"
        save_nifti(tmp_path / "masks" / place, mask, AFFINE)
        save_nifti(tmp_path / "truth" / place.replace("/", "__"), reference, AFFINE)
    return tmp_path


def evaluate(top: Path, **settings: Any) -> Evaluation:
    return pipeline.evaluate(top / "masks", top / "truth", top / "out", **{"names": NAMES} | settings)


def surface_mm(where: np.ndarray) -> np.ndarray:
    """Positions in mm of the voxels with a face neighbour outside, one by one."""
    inside = {tuple(at) for at in np.argwhere(where)}
    steps = [tuple(s * (a == axis) for a in range(3)) for axis in range(3) for s in (-1, 1)]
    shell = [at for at in inside if any(tuple(np.add(at, step)) not in inside for step in steps)]
    return np.array(sorted(shell), float) * np.diag(AFFINE)[:3]


def expected(mask: np.ndarray, reference: np.ndarray, label: int, tolerance: float) -> dict[str, float]:
    """Every score from its definition, all distances at once."""
    ours, theirs = mask == label, reference == label
    both = (ours & theirs).sum()
    apart = cdist(surface_mm(ours), surface_mm(theirs))
    there, back = apart.min(1), apart.min(0)
    every = np.concatenate([there, back])
    return {
        "voxels": ours.sum(),
        "volume_ml": ours.sum() / 1000,
        "reference_voxels": theirs.sum(),
        "components": ndimage.label(ours, np.ones((3, 3, 3)))[1],
        "dice": 2 * both / (ours.sum() + theirs.sum()),
        "iou": both / (ours | theirs).sum(),
        "sensitivity": both / theirs.sum(),
        "precision": both / ours.sum(),
        "hd95_mm": max(np.percentile(there, 95), np.percentile(back, 95)),
        "asd_mm": every.mean(),
        f"surface_dice_{tolerance:g}mm": (every <= tolerance).mean(),
    }


@pytest.mark.parametrize("tolerance", [1.0, 0.5, 2.0])
def test_every_number_is_what_its_definition_says(top: Path, tolerance: float) -> None:
    found = evaluate(top, tolerance_mm=tolerance)
    assert found.exit_code == 0
    assert [row["study"] for row in found.studies] == ["s0", "s2", "s4", "site__s1", "site__s3", "site__s5"]
    rows = {(row["study"], row["label"]): row for row in table(top / "out", "structures")}
    assert len(rows) == 12
    for seed in range(6):
        for label in NAMES:
            row = rows[f"site__s{seed}" if seed % 2 else f"s{seed}", label]
            assert row["structure"] == NAMES[label]
            for name, value in expected(*blobs(seed), label, tolerance).items():
                assert row[name] == pytest.approx(value), name


def test_the_summary_is_of_the_studies(top: Path) -> None:
    found = evaluate(top)
    dice = [expected(*blobs(seed), 1, 1.0)["dice"] for seed in range(6)]
    summary = {(row["structure"], row["score"]): row for row in found.summary}
    row = summary["one", "dice"]
    assert (row["label"], row["n"]) == (1, 6)
    assert (row["mean"], row["median"]) == (pytest.approx(np.mean(dice)), pytest.approx(np.median(dice)))
    order = [row["dice"] for row in found.structures if row["label"] == 1]
    assert (row["low"], row["high"]) == bootstrap_interval(order)
    means = [np.mean([expected(*blobs(seed), k, 1.0)["hd95_mm"] for k in NAMES]) for seed in range(6)]
    assert summary["mean of structures", "hd95_mm"]["mean"] == pytest.approx(np.mean(means))
    assert table(top / "out", "summary") == found.summary
    assert [row["mean_dice"] for row in table(top / "out", "studies")] == [row["mean_dice"] for row in found.studies]
    written = json.loads((top / "out/metrics/summary.json").read_text())
    assert written["summary"] == found.summary
    assert (written["scored"], written["level"], written["resamples"]) == (6, 0.95, 10_000)
    with (top / "out/metrics/summary.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3 * 7
    again = pipeline.evaluate(top / "masks", top / "truth", top / "again", names=NAMES)
    assert (top / "again/metrics/summary.csv").read_bytes() == (top / "out/metrics/summary.csv").read_bytes()
    assert again.summary == found.summary


def test_where_nothing_is_named_every_label_is_scored(top: Path) -> None:
    found = evaluate(top, names=None)
    assert {row["structure"] for row in found.structures} == {"label 1", "label 2"}
    assert found.unnamed == ()
    some = pipeline.evaluate(top / "masks", top / "truth", top / "some", names={2: "two", 7: "seven"})
    assert some.unnamed == (1,)
    seven = [row for row in some.structures if row["label"] == 7]
    assert len(seven) == 6
    assert {row["dice"] for row in seven} == {row["hd95_mm"] for row in seven} == {None}
    (row,) = [row for row in some.summary if (row["label"], row["score"]) == (7, "dice")]
    assert (row["n"], row["mean"], row["median"], row["low"], row["high"]) == (0, None, None, None, None)


def test_one_file_against_one_file_whatever_they_are_called(top: Path) -> None:
    (top / "truth/s0.nii.gz").rename(top / "expert.nii.gz")
    found = pipeline.evaluate(top / "masks/s0.nii.gz", top / "expert.nii.gz", top / "out", names=NAMES)
    assert found.exit_code == 0
    assert [row["study"] for row in found.studies] == ["s0"]
    for label, row in zip(NAMES, found.structures, strict=True):
        assert row["hd95_mm"] == pytest.approx(expected(*blobs(0), label, 1.0)["hd95_mm"])


def test_void_and_binary_references(top: Path) -> None:
    mask, reference = blobs(0)
    for folder in ("masks", "truth"):
        for path in (top / folder).rglob("*.nii.gz"):
            path.unlink()
    save_nifti(top / "masks/x.nii.gz", (mask == 1).astype(np.uint8), AFFINE)
    save_nifti(top / "truth/x.nii.gz", (reference == 1).astype(np.uint8) * 255, AFFINE)
    (row,) = evaluate(top, names={1: "one"}).structures
    assert row["hd95_mm"] == pytest.approx(expected(mask, reference, 1, 1.0)["hd95_mm"])
    assert row["reference_voxels"] == (reference == 1).sum()
    same = row
    save_nifti(top / "masks/x.nii.gz", (mask == 1).astype(np.uint8) * 255, AFFINE)  # some write masks so too
    assert evaluate(top, names=None).structures == [same | {"structure": "label 1"}]
    save_nifti(top / "masks/x.nii.gz", (mask == 1).astype(np.uint8), AFFINE)
    save_nifti(top / "truth/x.nii.gz", np.where(reference == 2, 255, reference).astype(np.uint8), AFFINE)
    (row,) = evaluate(top, names={1: "one"}).structures
    clear = np.where(reference == 2, 0, mask)
    assert row["dice"] == pytest.approx(expected(clear, reference, 1, 1.0)["dice"])
    assert row["asd_mm"] == pytest.approx(expected(clear, reference, 1, 1.0)["asd_mm"])
    assert row["voxels"] == (mask == 1).sum()


# ------------------------------------------------------------------------------------------------------ bad input


def break_one(top: Path, name: str) -> None:
    """Make the pair of s0 unfit in one way."""
    mask, reference = blobs(0)
    truth, masks = top / "truth/s0.nii.gz", top / "masks/s0.nii.gz"
    if name == "missing reference":
        truth.unlink()
    elif name == "missing mask":
        masks.unlink()
    elif name == "shape":
        save_nifti(truth, reference[:-1], AFFINE)
    elif name == "affine":
        save_nifti(truth, reference, OBLIQUE)
    elif name == "fractions":
        save_nifti(masks, mask.astype(np.float32) / 2, AFFINE)
    elif name == "negative":
        save_nifti(truth, reference.astype(np.int16) - 1, AFFINE)
    elif name == "truncated":
        truth.write_bytes(truth.read_bytes()[:-40])
    elif name == "empty file":
        masks.write_bytes(b"")
    elif name == "4-D":
        save_nifti(masks, np.stack([mask, mask], -1), AFFINE)
    elif name == "wide labels":
        save_nifti(masks, mask.astype(np.int32) * 70_000, AFFINE)


@pytest.mark.parametrize(
    ("name", "cause", "says"),
    [
        ("missing reference", "input", "no reference of this name"),
        ("missing mask", "input", "no mask of this name"),
        ("shape", "input", "[12, 12, 9]"),
        ("affine", "geometry", "mm away from the mask"),
        ("fractions", "input", "the mask holds fractions"),
        ("negative", "input", "the reference holds labels from -1"),
        ("truncated", "input", ""),
        ("empty file", "input", ""),
        ("4-D", "input", "4-D"),
        ("wide labels", "input", "140000"),
    ],
)
def test_one_bad_pair_costs_no_other(top: Path, name: str, cause: str, says: str) -> None:
    whole = evaluate(top)
    break_one(top, name)
    found = evaluate(top)
    assert found.exit_code == 1
    (bad,) = [row for row in found.studies if row["state"] == "failed"]
    assert (bad["study"], bad["cause"]) == ("s0", cause)
    assert says in bad["message"]
    assert str(top) not in bad["message"]
    assert found.structures == [row for row in whole.structures if row["study"] != "s0"]
    assert {row["n"] for row in found.summary} == {5}
    assert [row["state"] for row in table(top / "out", "studies")].count("failed") == 1


def test_a_surface_that_does_not_fit_leaves_the_rest(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "surface_room", lambda memory: 1)
    found = evaluate(top)
    assert (found.failed, found.exit_code) == (0, 1)
    for row in found.studies:
        assert (row["state"], row["cause"]) == ("scored", "memory")
        assert "one (over " in row["message"]
    assert all(row["dice"] is not None and row["hd95_mm"] is None for row in found.structures)


def test_what_cannot_start_says_why(top: Path) -> None:
    masks, truth, out = top / "masks", top / "truth", top / "out"
    (top / "empty").mkdir()
    (top / "other/x").mkdir(parents=True)
    (truth / "s0.nii.gz").rename(top / "other/x.nii.gz")
    (top / "other/y.nii.gz").write_bytes((top / "other/x.nii.gz").read_bytes())
    with pytest.raises(UsageError, match="MASKS yields no mask"):
        pipeline.evaluate(top / "nowhere", truth, out)
    with pytest.raises(UsageError, match="REFERENCES yields no mask"):
        pipeline.evaluate(masks, top / "empty", out)
    with pytest.raises(UsageError, match=r"masks are called s0, s2, s4 and 3 more, references x, y"):
        pipeline.evaluate(masks, top / "other", out)
    for tolerance in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="tolerance"):
            pipeline.evaluate(masks, truth, out, tolerance_mm=tolerance)
    (top / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="cannot be written"):
        pipeline.evaluate(masks, truth, top / "file/out")


def test_results_of_segment_are_not_overwritten_nor_their_images_taken_for_masks(top: Path) -> None:
    save_nifti(top / "in/s0.nii.gz", blobs(0)[1].astype(np.float32) * 100, AFFINE)
    pipeline.segment(top / "in", "kmeans", top / "done", classes=3, threads=1)
    with pytest.raises(UsageError, match="results of `segment`"):
        pipeline.evaluate(top / "masks", top / "truth", top / "done")
    with pytest.raises(UsageError, match="give the masks folder"):
        pipeline.evaluate(top / "done", top / "truth", top / "out")
    found = pipeline.evaluate(top / "done/masks", top / "truth/s0.nii.gz", top / "out", names=NAMES)
    assert [row["dice"] for row in found.structures] == [1.0, 1.0]
    labels = top / "done/images/s0.ome.zarr/labels/kmeans"
    found = pipeline.evaluate(labels, top / "truth/s0.nii.gz", top / "out", names=NAMES)
    assert [row["hd95_mm"] for row in found.structures] == [0.0, 0.0]


def test_numbered_masks_are_masks_and_no_channels(tmp_path: Path) -> None:
    for number in range(3):
        mask, reference = blobs(number)
        save_nifti(tmp_path / f"masks/case_000{number}.nii.gz", mask, AFFINE)
        save_nifti(tmp_path / f"truth/case_000{number}.nii.gz", reference, AFFINE)
    found = evaluate(tmp_path)
    assert [row["study"] for row in found.studies] == ["case_0000", "case_0001", "case_0002"]
    assert found.exit_code == 0


def test_the_only_files_of_two_folders_are_not_one_pair_by_that(tmp_path: Path) -> None:
    mask, reference = blobs(0)
    save_nifti(tmp_path / "masks/alice.nii.gz", mask, AFFINE)
    save_nifti(tmp_path / "truth/bob.nii.gz", reference, AFFINE)
    with pytest.raises(UsageError, match="masks are called alice, references bob"):
        evaluate(tmp_path)
    assert not (tmp_path / "out").exists()  # what cannot start leaves nothing


def test_a_place_for_tables_that_cannot_be_written(top: Path) -> None:
    (top / "out").mkdir()
    (top / "out/metrics").write_text("a file")
    with pytest.raises(UsageError, match="metrics cannot be written"):
        evaluate(top)


def test_many_labels_take_time_in_proportion(tmp_path: Path) -> None:
    """Counted, not timed: each count of the confusion is looked at once for all labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(300, 2300, (20, 20, 20)).astype(np.uint16)  # 255 would be void
    save_nifti(tmp_path / "masks/a.nii.gz", labels, AFFINE)
    save_nifti(tmp_path / "truth/a.nii.gz", labels, AFFINE)
    looked = 0
    real = evaluation.overlaps

    def overlaps(counts: dict[str, int], **settings: Any) -> Any:
        nonlocal looked
        looked += len(counts)
        return real(counts, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "overlaps", overlaps)
        found = evaluate(tmp_path, names=None)
    present = len(np.unique(labels))
    assert len(found.structures) == present
    assert all(row["dice"] == 1.0 for row in found.structures)
    assert looked == present
