"""`maskmill segment` as scripts see it: one line of JSON, exit codes, what is said where."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scans import Ended, brain, mask_bytes, maskmill, save_nifti, scan, table

FIELDS = {
    "run": str,
    "published": int,
    "failed": int,
    "interrupted": int,
    "reused": int,
    "blocks_computed": int,
    "seconds": float,
    "report": str,
    "dice": dict,
    "mean_dice": (float, type(None)),
    "hd95_mm": dict,
    "studies": list,
}
STUDY_FIELDS = ("study", "source", "key", "state", "cause", "message", "mask", "image", "structures", "warnings")
STRUCTURE_FIELDS = {
    *("study", "model", "label", "structure", "voxels", "volume_ml", "mean", "std"),
    *("centroid_x_mm", "centroid_y_mm", "centroid_z_mm"),
    *("bbox_x_min", "bbox_x_max", "bbox_y_min", "bbox_y_max", "bbox_z_min", "bbox_z_max", "touches_border"),
    *("mean_entropy", "disagreement"),
    *("components", "largest_component_ml", "holes"),
    *("dice", "iou", "sensitivity", "precision", "hd95_mm", "asd_mm", "surface_dice_1mm"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scans, one file that is none, and a reference for one scan."""
    top = tmp_path_factory.mktemp("segment")
    scan(top / "in/a.nii.gz", 1)
    scan(top / "in/ward 7/b.nii", 2)
    (top / "in/broken.nii.gz").write_bytes(b"no scan at all")
    (top / "in/readme.txt").write_text("not searched for")
    truth = (brain(seed=1) > 200).astype(np.uint8)
    save_nifti(top / "reference/a.nii.gz", truth)
    return top


@pytest.fixture(scope="module")
def first(folder: Path) -> Ended:
    return maskmill(
        *("segment", folder / "in", "-m", "kmeans", "--classes", 2, "-o", folder / "out", "--engine", "serial"),
        *("--reference", folder / "reference", "--json"),
    )


def test_the_line_of_json_has_the_fields_of_the_contract(folder: Path, first: Ended) -> None:
    summary = first.json
    assert list(summary) == list(FIELDS)
    for name, kind in FIELDS.items():
        assert isinstance(summary[name], kind), name
        assert not isinstance(summary[name], bool), name
    for entry in summary["studies"]:
        assert tuple(entry) == STUDY_FIELDS
        for row in entry["structures"]:
            assert set(row) == STRUCTURE_FIELDS


def test_counts_states_and_exit_code_agree(folder: Path, first: Ended) -> None:
    summary = first.json
    assert first.code == 1
    assert [summary[n] for n in ("published", "failed", "interrupted", "reused")] == [2, 1, 0, 0]
    assert summary["blocks_computed"] == 2
    states = {e["study"]: (e["state"], e["cause"]) for e in summary["studies"]}
    assert states == {"a": ("published", None), "ward_7__b": ("published", None), "broken": ("failed", "input")}
    for entry in summary["studies"]:
        assert Path(entry["source"]).is_file()
        if entry["state"] == "published":
            assert re.fullmatch(r"[0-9a-f]{24}", entry["key"])
            assert entry["mask"] == str(folder / "out/masks" / f"{entry['study']}.nii.gz")
            assert Path(entry["mask"]).is_file()
            assert (Path(entry["image"]) / "zarr.json").is_file()
            assert [row["structure"] for row in entry["structures"]] == ["class 1"]
        else:
            assert re.fullmatch(r"u[0-9a-f]{15}", entry["key"])
            assert (entry["mask"], entry["image"], entry["structures"]) == (None, None, [])
            assert "no NIfTI file" in entry["message"]
    assert Path(summary["report"]).is_file()


def test_scores_stand_where_there_is_a_reference(folder: Path, first: Ended) -> None:
    summary = first.json
    rows = {e["study"]: e["structures"][0] for e in summary["studies"] if e["structures"]}
    for name in ("dice", "iou", "sensitivity", "precision"):
        assert rows["a"][name] == 1.0  # the box is so bright that two clusters find it voxel by voxel
        assert rows["ward_7__b"][name] is None
    assert [rows["a"][name] for name in ("hd95_mm", "asd_mm", "surface_dice_1mm")] == [0.0, 0.0, 1.0]
    assert [rows["ward_7__b"][name] for name in ("hd95_mm", "asd_mm", "surface_dice_1mm")] == [None] * 3
    for row in rows.values():
        assert (row["components"], row["holes"]) == (1, 0)
        assert row["largest_component_ml"] == row["volume_ml"]
    assert summary["dice"] == {"class 1": 1.0}
    assert summary["mean_dice"] == 1.0
    assert summary["hd95_mm"] == {"class 1": 0.0}


def test_stdout_holds_the_json_alone_and_stderr_a_line_per_bad_study(first: Ended) -> None:
    assert first.out.count("\n") == 1
    assert first.out.endswith("}\n")
    broken = first.json["studies"][1]
    assert first.lines("failed: ") == [f"failed: {broken['source']}: input: {broken['message']}"]
    *_, last = first.err.splitlines()
    assert last.startswith("2 of 3 studies published, 1 failed; 2 blocks; mean Dice 1.0000; ")
    assert last.endswith(f"report: {first.json['report']}")
    assert "Traceback" not in first.err
    assert "Warning" not in first.err


def test_the_run_is_kept_beside_its_results(folder: Path, first: Ended) -> None:
    (run,) = (folder / "out/runs").iterdir()
    assert run.name == first.json["run"]
    kept = json.loads((run / "summary.json").read_text())
    expected = first.json
    for entry in expected["studies"]:
        del entry["source"]
    assert kept == expected
    job = json.loads((run / "run.json").read_text())
    assert {s["source"] for s in job["studies"].values()} == {e["source"] for e in first.json["studies"]}
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {e["key"] for e in events if e["event"] == "published"} == {
        e["key"] for e in first.json["studies"] if e["state"] == "published"
    }


def test_the_tables_say_what_the_json_says(folder: Path, first: Ended) -> None:
    out = folder / "out"
    studies = {row["study"]: row for row in table(out, "studies")}
    for entry in first.json["studies"]:
        row = studies[entry["study"]]
        assert (row["key"], row["state"], row["cause"]) == (entry["key"], entry["state"], entry["cause"])
        if entry["state"] == "published":
            stages = ("ingest", "plan", "segment", "publish", "measure", "export")
            assert all(row[f"seconds_{stage}"] >= 0 for stage in stages)
            assert row["peak_rss_bytes"] > 10_000_000
            assert (row["seconds_surface"] is not None) == (entry["study"] == "a")
    rows = [row for entry in first.json["studies"] for row in entry["structures"]]
    assert table(out, "structures") == sorted(rows, key=lambda row: row["study"])
    assert (out / "metrics/studies.csv").read_text().count("\n") == 4


def test_again_computes_nothing_and_says_so(folder: Path, first: Ended) -> None:
    """Without the bad file the same command has nothing left to do: 0."""
    masks = {study: mask_bytes(folder / "out", study) for study in ("a", "ward_7__b")}
    (folder / "in/broken.nii.gz").unlink()
    again = maskmill(
        *("segment", folder / "in", "-m", "kmeans", "--classes", 2, "-o", folder / "out", "--engine", "serial"),
        *("--reference", folder / "reference", "--json"),
    )
    assert again.code == 0
    summary = again.json
    assert summary["published"] == summary["reused"] == 2
    assert summary["blocks_computed"] == summary["failed"] == 0
    assert again.err.startswith("nothing to do: all 2 studies are published already; mean Dice 1.0000; ")
    assert again.err.count("\n") == 1
    expected = [e for e in first.json["studies"] if e["state"] == "published"]
    assert summary["studies"] == expected
    assert masks == {study: mask_bytes(folder / "out", study) for study in masks}
