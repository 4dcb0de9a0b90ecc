"""Scores of a run: counted and measured once, kept, and made again when mask or reference is another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scans import brain, save_nifti, scan, table

import pipeline
from pipeline import references
from pipeline.summary import Summary

SURFACE = ("hd95_mm", "asd_mm", "surface_dice_1mm")


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """Two scans, and the box of each as its reference, one of them a voxel off."""
    for seed, study in ((1, "a"), (2, "b")):
        scan(tmp_path / f"in/{study}.nii.gz", seed)
        truth = brain(seed=seed) > 200
        save_nifti(tmp_path / f"truth/{study}.nii.gz", np.roll(truth, seed - 1, 0).astype(np.uint8))
    return tmp_path


def segment(top: Path, **settings: Any) -> Summary:
    settings = {"reference": str(top / "truth"), "classes": 2, "threads": 1} | settings
    return pipeline.segment(top / "in", "kmeans", top / "out", **settings)


def scores(summary: Summary) -> dict[str, tuple[float | None, ...]]:
    return {e["study"]: tuple(e["structures"][0][name] for name in SURFACE) for e in summary.studies}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The labels of each call that measured surfaces."""
    calls: list[tuple[int, ...]] = []
    real = references.surface_scores

    def counting(mask: Any, reference: Any, labels: Any, **rest: Any) -> Any:
        calls.append(tuple(labels))
        return real(mask, reference, labels, **rest)

    monkeypatch.setattr(references, "surface_scores", counting)
    return calls


def test_a_box_and_its_reference_a_voxel_off(top: Path) -> None:
    """x is 1 mm here, so all lies within the tolerance of 1 mm; 1.5 and 2 mm are the other axes."""
    summary = segment(top)
    found = scores(summary)
    assert found["a"] == (0.0, 0.0, 1.0)
    assert found["b"][0] == pytest.approx(1.0)
    assert 0 < found["b"][1] < 1  # type: ignore[operator]
    assert found["b"][2] == 1.0
    assert summary.hd95_mm == {"class 1": pytest.approx(0.5)}
    assert {row["study"]: tuple(row[name] for name in SURFACE) for row in table(top / "out", "structures")} == found
    assert all(row["seconds_surface"] > 0 for row in table(top / "out", "studies"))


def test_what_was_measured_is_kept(top: Path, measured: list[tuple[int, ...]]) -> None:
    first = segment(top)
    assert measured == [(1,), (1,)]
    again = segment(top)
    assert len(measured) == 2
    assert scores(again) == scores(first)
    # A run without a reference scores nothing, and the tables keep what earlier ones found.
    assert scores(segment(top, reference=None))["b"] == (None,) * 3
    assert [row["hd95_mm"] for row in table(top / "out", "structures")] == [scores(first)[s][0] for s in "ab"]


def test_another_reference_is_measured_anew(top: Path, measured: list[tuple[int, ...]]) -> None:
    segment(top)
    save_nifti(top / "truth/a.nii.gz", np.roll(brain(seed=1) > 200, 2, 2).astype(np.uint8))
    assert scores(segment(top))["a"][0] == pytest.approx(4.0)  # two steps of 2 mm
    assert len(measured) == 3


def test_another_mask_is_measured_anew(top: Path, measured: list[tuple[int, ...]]) -> None:
    """Labels that somebody took away are made again, perhaps under another runtime."""
    segment(top)
    listing = top / "out/images/a.ome.zarr/labels/zarr.json"
    listing.unlink()
    assert segment(top).reused == 1
    assert len(measured) == 3


def test_255_is_settled_by_the_whole_set_and_surfaces_follow(top: Path, measured: list[tuple[int, ...]]) -> None:
    for seed, study in ((1, "a"), (2, "b")):
        save_nifti(top / f"truth/{study}.nii.gz", (brain(seed=seed) > 200).astype(np.uint8) * 255)
    assert scores(segment(top)) == {"a": (0.0, 0.0, 1.0), "b": (0.0, 0.0, 1.0)}
    save_nifti(top / "truth/a.nii.gz", (brain(seed=1) > 200).astype(np.uint8))
    # Now 255 is void in b: what is not void holds the label in neither.
    assert scores(segment(top)) == {"a": (0.0, 0.0, 1.0), "b": (None, None, None)}
    assert len(measured) == 4
    segment(top)
    assert len(measured) == 4


def test_a_surface_that_does_not_fit_leaves_the_other_scores(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "LEAST_ROOM", 1)
    monkeypatch.setattr(references, "resident_bytes", lambda: 1 << 50)
    summary = segment(top)
    assert (summary.published, summary.failed, summary.exit_code) == (2, 0, 1)
    for entry in summary.studies:
        assert "published without surface scores: the surface points of class 1 (over " in entry["message"]
        assert "--memory" in entry["message"]
        (row,) = entry["structures"]
        assert row["dice"] > 0.5
        assert [row[name] for name in SURFACE] == [None] * 3
    monkeypatch.undo()
    again = segment(top)
    assert again.exit_code == 0
    assert scores(again)["a"] == (0.0, 0.0, 1.0)


def test_a_reference_that_is_damaged_costs_its_own_scores(top: Path) -> None:
    good = (top / "truth/a.nii.gz").read_bytes()
    (top / "truth/a.nii.gz").write_bytes(good[:-30])
    summary = segment(top)
    assert (summary.published, summary.exit_code) == (2, 1)
    first, second = summary.studies
    assert first["message"].startswith("published without scores: ")
    assert first["structures"][0]["dice"] is None
    assert (second["message"], second["structures"][0]["dice"]) == (None, pytest.approx(0.5, abs=0.4))
    (top / "truth/a.nii.gz").write_bytes(good)
    assert segment(top).exit_code == 0


def test_a_command_that_is_stopped_while_it_measures_goes_on_later(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = references.References._measure

    def measure_and_stop(self: references.References, progress: Any, reference: Any) -> None:
        measure(self, progress, reference)
        self.run.stop.set()

    monkeypatch.setattr(references.References, "_measure", measure_and_stop)
    summary = segment(top)
    assert (summary.published, summary.interrupted, summary.exit_code) == (2, 0, 130)
    assert scores(summary)["a"] == (0.0, 0.0, 1.0)
    assert scores(summary)["b"] == (None,) * 3
    assert "run it again" in summary.studies[1]["message"]
    monkeypatch.undo()
    again = segment(top)
    assert again.exit_code == 0
    assert scores(again)["b"][2] == 1.0


def test_records_of_an_older_version_are_read(top: Path) -> None:
    """Before components were counted and surfaces measured; scores then had no run beside them."""
    first = segment(top)
    for record in (top / "out/ledger").glob("*/published/*.json"):
        document = json.loads(record.read_text())
        for row in document["structures"]:
            for name in ("components", "largest_component_ml", "holes"):
                del row[name]
        record.write_text(json.dumps(document))
    for held in (top / "out/ledger").glob("*/overlap/*.json"):
        document = json.loads(held.read_text())
        held.write_text(json.dumps({name: document[name] for name in ("reference", "confusion", "binary")}))
    again = segment(top)
    assert (again.reused, again.exit_code) == (2, 0)
    assert scores(again) == scores(first)
    assert again.studies[0]["structures"][0]["components"] is None
    assert again.studies[0]["structures"][0]["dice"] == first.studies[0]["structures"][0]["dice"]


def test_scores_of_an_earlier_reference_are_withdrawn_where_the_new_one_does_not_fit(top: Path) -> None:
    assert scores(segment(top))["a"] == (0.0, 0.0, 1.0)
    save_nifti(top / "truth/a.nii.gz", np.zeros((3, 4, 5), np.uint8))
    summary = segment(top)
    assert summary.exit_code == 1
    assert "voxels (x,y,z)" in summary.studies[0]["message"]
    rows = {row["study"]: row for row in table(top / "out", "structures")}
    assert [rows["a"][name] for name in ("dice", *SURFACE)] == [None] * 4
    assert rows["b"]["dice"] is not None


def test_a_reference_that_is_no_file_is_named(top: Path) -> None:
    (top / "truth/a.nii.gz").unlink()
    (top / "truth/a.nii.gz").symlink_to(top / "nowhere")
    summary = segment(top)
    assert summary.exit_code == 1
    first, second = summary.studies
    assert first["message"] == "published without scores: it is not a file that can be read"
    assert (second["message"], second["structures"][0]["dice"]) == (None, pytest.approx(0.5, abs=0.4))


def test_references_of_other_names_are_said_to_be(top: Path) -> None:
    """Also where there is one scan and one reference: the only file of a folder is not whoever's turn it is."""
    for name in "ab":
        (top / f"truth/{name}.nii.gz").rename(top / f"truth/other-{name}.nii.gz")
    summary = segment(top)
    assert (summary.published, summary.exit_code) == (2, 1)
    assert "no reference has the name of a study; they are called other-a" in summary.studies[0]["message"]
    (top / "in/b.nii.gz").unlink()
    (top / "truth/other-b.nii.gz").unlink()
    summary = segment(top)
    assert (summary.studies[0]["study"], summary.studies[0]["structures"][0]["dice"]) == ("a", None)


def test_a_scan_and_a_reference_that_are_given_themselves_go_together(top: Path) -> None:
    (top / "truth/a.nii.gz").rename(top / "truth/other.nii.gz")
    given = {"reference": str(top / "truth/other.nii.gz"), "classes": 2, "threads": 1}
    summary = pipeline.segment(top / "in/a.nii.gz", "kmeans", top / "out", **given)
    assert scores(summary) == {"a": (0.0, 0.0, 1.0)}


def test_numbered_references_are_references_and_no_channels(tmp_path: Path) -> None:
    for number in (1, 2):
        scan(tmp_path / f"in/p{number}/scan_000{number}.nii.gz", number)  # a folder each: else they are channels
    inputs = [tmp_path / f"in/p{number}/scan_000{number}.nii.gz" for number in (1, 2)]
    for number in (1, 2):
        save_nifti(tmp_path / f"truth/scan_000{number}.nii.gz", (brain(seed=number) > 200).astype(np.uint8))
    summary = pipeline.segment(
        inputs, "kmeans", tmp_path / "out", classes=2, threads=1, reference=str(tmp_path / "truth")
    )
    assert summary.exit_code == 0
    assert scores(summary) == {"scan_0001": (0.0, 0.0, 1.0), "scan_0002": (0.0, 0.0, 1.0)}


def test_twins_keep_their_own_remarks(top: Path) -> None:
    (top / "in/b.nii.gz").write_bytes((top / "in/a.nii.gz").read_bytes())
    save_nifti(top / "truth/a.nii.gz", np.zeros((3, 4, 5), np.uint8))
    summary = segment(top)
    assert len({entry["key"] for entry in summary.studies}) == 1
    page = (top / "out/report/index.html").read_text()
    a, b = (
        page.split(f'id="study-{entry["key"]}-{entry["study"]}"')[1].split("<details")[0] for entry in summary.studies
    )
    assert "published without scores" in a
    assert "published without scores" not in b
