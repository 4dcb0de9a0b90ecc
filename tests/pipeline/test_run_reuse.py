"""Running again: what is published is not computed again, and what changed is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scans import brain, fingerprint, label_array, leftovers, markers, mask_bytes, random_model, save_nifti, scan, table

import pipeline
from pipeline.errors import UsageError
from pipeline.summary import Summary


@pytest.fixture
def top(tmp_path: Path) -> Path:
    scan(tmp_path / "in/a.nii.gz", 1)
    scan(tmp_path / "in/b.nii.gz", 2)
    return tmp_path


def segment(top: Path, *inputs: Path, out: str = "out", **settings: Any) -> Summary:
    """By k-means unless a model is named."""
    model = settings.pop("model", "kmeans")
    return pipeline.segment(list(inputs) or [top / "in"], model, top / out, **({"threads": 1} | settings))


def counts(summary: Summary) -> tuple[int, int, int, int]:
    return summary.published, summary.reused, summary.blocks_computed, summary.failed


def expected(top: Path, seed: int) -> np.ndarray:
    """The labels that this content has, computed apart."""
    scan(top / f"apart{seed}/x.nii.gz", seed)
    segment(top, top / f"apart{seed}", out=f"apart{seed}-out")
    return label_array(top / f"apart{seed}-out", "x")


# -------------------------------------------------------------------------------------------------- nothing, or little


def test_a_second_run_computes_nothing_and_touches_no_result(top: Path) -> None:
    assert counts(segment(top)) == (2, 0, 2, 0)
    before = {name: fingerprint(top / "out" / name) for name in ("images", "masks", "ledger")}
    again = segment(top)
    assert counts(again) == (2, 2, 0, 0)
    assert again.exit_code == 0
    for name, files in before.items():
        now = fingerprint(top / "out" / name)
        assert {n: f for n, f in now.items() if f[1] != "folder"} == {
            n: f for n, f in files.items() if f[1] != "folder"
        }


def test_a_new_file_computes_that_file(top: Path) -> None:
    segment(top)
    done = markers(top / "out")
    scan(top / "in/later/c.nii.gz", 3)
    assert counts(segment(top)) == (3, 2, 1, 0)
    assert {name: time for name, time in markers(top / "out").items() if name in done} == done
    assert {row["study"] for row in table(top / "out", "studies")} == {"a", "b", "later__c"}


def test_a_file_that_went_keeps_its_result(top: Path) -> None:
    segment(top)
    (top / "in/a.nii.gz").unlink()
    assert counts(segment(top)) == (1, 1, 0, 0)
    assert label_array(top / "out", "a").any()
    assert {row["study"] for row in table(top / "out", "studies")} == {"a", "b"}


def test_limit_takes_the_first_studies(top: Path) -> None:
    assert [e["study"] for e in segment(top, limit=1).studies] == ["a"]
    assert counts(segment(top)) == (2, 1, 1, 0)


def test_another_runtime_reuses_what_is_published(top: Path) -> None:
    segment(top, threads=1)
    assert counts(segment(top, threads=2)) == (2, 2, 0, 0)


# ------------------------------------------------------------------------------------------------------ changed content


def test_changed_content_supersedes_and_both_results_can_be_read(top: Path) -> None:
    first, second = expected(top, 1), expected(top, 9)
    segment(top)
    mask = mask_bytes(top / "out", "a")
    scan(top / "in/a.nii.gz", 9)
    assert counts(segment(top)) == (2, 1, 1, 0)
    (aside,) = [p.name.removesuffix(".nii.gz") for p in (top / "out/masks").glob("a-*")]
    assert len(aside) == len("a-") + 6
    np.testing.assert_array_equal(label_array(top / "out", "a"), second)
    np.testing.assert_array_equal(label_array(top / "out", aside), first)
    assert mask_bytes(top / "out", aside) == mask
    assert mask_bytes(top / "out", "a") != mask
    content = json.loads((top / f"out/images/{aside}.ome.zarr/zarr.json").read_text())["attributes"]["maskmill"]
    assert content["content"].startswith(aside.removeprefix("a-"))
    assert {row["study"] for row in table(top / "out", "structures")} == {"a", aside, "b"}
    assert counts(segment(top)) == (2, 2, 0, 0)


def test_content_that_comes_back_is_published_again(top: Path) -> None:
    first = expected(top, 1)
    segment(top)
    for seed in (9, 1):
        scan(top / "in/a.nii.gz", seed)
        summary = segment(top)
    assert counts(summary) == (2, 1, 0, 0)  # its labels stand under the name it was moved to
    np.testing.assert_array_equal(label_array(top / "out", "a"), first)
    assert counts(segment(top)) == (2, 2, 0, 0)


def test_another_study_of_superseded_content_gets_its_labels_and_not_the_newer_ones(top: Path) -> None:
    first = expected(top, 1)
    segment(top)
    scan(top / "in/a.nii.gz", 9)
    segment(top)
    scan(top / "in/c.nii.gz", 1)
    assert counts(segment(top)) == (3, 2, 0, 0)
    np.testing.assert_array_equal(label_array(top / "out", "c"), first)


# ---------------------------------------------------------------------------------------------------------------- twins


def test_the_same_content_under_two_names_is_computed_once(top: Path) -> None:
    shutil.copy(top / "in/a.nii.gz", top / "in/z.nii.gz")
    summary = segment(top)
    assert counts(summary) == (3, 0, 2, 0)
    keys = {e["study"]: e["key"] for e in summary.studies}
    assert keys["a"] == keys["z"] != keys["b"]
    np.testing.assert_array_equal(label_array(top / "out", "z"), label_array(top / "out", "a"))
    assert mask_bytes(top / "out", "z") == mask_bytes(top / "out", "a")
    shutil.copy(top / "in/a.nii.gz", top / "in/0.nii.gz")
    assert counts(segment(top)) == (4, 3, 0, 0)
    np.testing.assert_array_equal(label_array(top / "out", "0"), label_array(top / "out", "a"))


def test_a_twin_outlives_the_one_it_was_copied_from(top: Path) -> None:
    """The name that plan.json holds gets other content and other settings; the twin keeps its labels."""
    shutil.copy(top / "in/a.nii.gz", top / "in/z.nii.gz")
    segment(top)
    first = label_array(top / "out", "z")
    scan(top / "in/a.nii.gz", 9)
    segment(top, top / "in/a.nii.gz")
    (top / "out/masks/z.nii.gz").unlink()
    assert counts(segment(top)) == (3, 3, 0, 0)
    np.testing.assert_array_equal(label_array(top / "out", "z"), first)


# -------------------------------------------------------------------------------------------------- what was taken away


def test_a_deleted_mask_is_written_again(top: Path) -> None:
    segment(top)
    mask = (top / "out/masks/a.nii.gz").read_bytes()
    (top / "out/masks/a.nii.gz").unlink()
    assert counts(segment(top)) == (2, 2, 0, 0)
    assert (top / "out/masks/a.nii.gz").read_bytes() == mask


@pytest.mark.parametrize("what", ["images", "images/a.ome.zarr", "images/a.ome.zarr/labels", "images/.statistics"])
def test_deleted_images_and_labels_are_made_again(what: str, top: Path) -> None:
    segment(top)
    before = label_array(top / "out", "a")
    mask = mask_bytes(top / "out", "a")
    shutil.rmtree(top / "out" / what)
    summary = segment(top)
    assert (summary.published, summary.failed) == (2, 0)
    np.testing.assert_array_equal(label_array(top / "out", "a"), before)
    assert mask_bytes(top / "out", "a") == mask
    assert leftovers(top / "out") == []
    assert counts(segment(top)) == (2, 2, 0, 0)


def test_a_deleted_report_and_tables_are_written_again(top: Path) -> None:
    segment(top)
    rows = table(top / "out", "structures")
    for name in ("report", "metrics"):
        shutil.rmtree(top / "out" / name)
    assert counts(segment(top)) == (2, 2, 0, 0)
    assert table(top / "out", "structures") == rows
    assert sorted(p.name for p in (top / "out/report/pictures").iterdir()) == ["a.png", "b.png"]


# --------------------------------------------------------------------------------------------------------- other wishes


def test_overwrite_withdraws_what_other_settings_made(top: Path) -> None:
    segment(top, classes=3)
    three = label_array(top / "out", "a")
    assert three.max() == 2
    with pytest.raises(UsageError, match=r"classes 3 \(now 5\)"):
        segment(top, classes=5)
    assert counts(segment(top, classes=5, overwrite=True)) == (2, 0, 2, 0)
    assert label_array(top / "out", "a").max() == 4
    assert leftovers(top / "out") == []
    published = list((top / "out/ledger").glob("*/published/*.json"))
    assert sorted(p.name for p in published) == ["a.json", "b.json"]
    assert counts(segment(top, classes=5)) == (2, 2, 0, 0)
    with pytest.raises(UsageError, match=r"classes 5 \(now 3\)"):
        segment(top, classes=3)


def test_mirroring_is_the_cards_and_changes_the_answer(top: Path) -> None:
    model = random_model(top / "model", mirror_axes=[0, 2])
    assert counts(segment(top, model=model)) == (2, 0, 2, 0)
    flipped = label_array(top / "out", "a", "tiny-resunet")
    assert counts(segment(top, model=model, mirroring=True)) == (2, 2, 0, 0)
    with pytest.raises(UsageError, match=r"mirroring true \(now false\)"):
        segment(top, model=model, mirroring=False)
    assert counts(segment(top, model=model, mirroring=False, overwrite=True)) == (2, 0, 2, 0)
    assert (label_array(top / "out", "a", "tiny-resunet") != flipped).any()
    plain = random_model(top / "plain")  # the same weights
    segment(top, model=plain, out="plain-out")
    np.testing.assert_array_equal(
        label_array(top / "plain-out", "a", "tiny-resunet"), label_array(top / "out", "a", "tiny-resunet")
    )


def test_a_model_without_mirror_axes_is_never_flipped_and_its_older_results_stand(top: Path) -> None:
    model = random_model(top / "model")
    segment(top, model=model)
    (plan, *_) = (top / "out/ledger").glob("*/plan.json")
    assert json.loads(plan.read_text())["settings"]["mirroring"] is False  # as every version wrote it
    assert counts(segment(top, model=model, mirroring=False)) == (2, 2, 0, 0)
    for name in (model, "kmeans"):
        with pytest.raises(UsageError, match=r"its card lists none \(mirror_axes\)"):
            segment(top, model=name, mirroring=True)


def test_a_volume_of_a_4d_scan_is_chosen_and_counts_as_content(top: Path) -> None:
    data = np.stack([brain(seed=1), brain(seed=5)], axis=-1)
    save_nifti(top / "in4d/x.nii.gz", data)
    assert segment(top, top / "in4d").studies[0]["cause"] == "input"
    assert counts(segment(top, top / "in4d", volume=1)) == (1, 0, 1, 0)
    save_nifti(top / "one/x.nii.gz", data[..., 1])
    segment(top, top / "one", out="one-out")
    np.testing.assert_array_equal(label_array(top / "out", "x"), label_array(top / "one-out", "x"))


def test_a_reference_of_another_shape_costs_the_scores_and_nothing_else(top: Path) -> None:
    save_nifti(top / "truth/a.nii.gz", (brain(seed=1) > 200).astype(np.uint8))
    save_nifti(top / "truth/b.nii.gz", np.zeros((5, 6, 7), np.uint8))
    summary = segment(top, reference=str(top / "truth"), classes=2)
    assert counts(summary) == (2, 0, 2, 0)
    assert summary.exit_code == 1
    a, b = summary.studies
    assert (a["message"], a["structures"][0]["dice"]) == (None, 1.0)
    assert b["state"] == "published"
    assert Path(b["mask"]).is_file()
    assert "[5, 6, 7]" in b["message"]
    assert "[12, 14, 10]" in b["message"]
    assert b["structures"][0]["voxels"] > 0
    assert [b["structures"][0][n] for n in ("dice", "iou", "sensitivity", "precision")] == [None] * 4
    assert summary.dice == {"class 1": 1.0}


def test_a_budget_that_nothing_fits_is_refused_with_the_numbers(top: Path) -> None:
    summary = segment(top, memory="50MiB")
    assert counts(summary) == (0, 0, 0, 2)
    assert summary.exit_code == 1
    for entry in summary.studies:
        assert entry["cause"] == "memory"
        assert "--memory allows 0.05 GiB" in entry["message"]
        assert "needs 0." in entry["message"]
    assert not list((top / "out").glob("images/*/labels/*"))
    assert counts(segment(top)) == (2, 0, 2, 0)  # nothing stands in the way of a run that has enough


def test_two_models_may_not_share_an_out(top: Path) -> None:
    segment(top)
    with pytest.raises(UsageError, match="holds results of the model kmeans"):
        segment(top, model=random_model(top / "model"))


CLAIM = """
import sys
from pipeline.job import make_job
from pipeline.start import claim_out, find
from pipeline.method import resolve_method
job = make_job({"inputs": [sys.argv[1]], "model": "kmeans", "out": sys.argv[2], "classes": 3})
claim_out(job, resolve_method(job), find(job))
print("at work", flush=True)
sys.stdin.read()
"""


def test_an_out_that_another_command_has_just_taken_is_refused(top: Path) -> None:
    """Before anything of it is published; when that command has ended, OUT is free again."""
    command = [sys.executable, "-c", CLAIM, str(top / "in"), str(top / "out")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert other.stdout is not None
    assert other.stdout.readline() == b"at work\n"
    with pytest.raises(UsageError, match="another command may be at work"):
        segment(top)
    assert counts(segment(top, classes=3)) == (2, 0, 2, 0), "the same model and settings may join"
    shutil.rmtree(top / "out/ledger")
    shutil.rmtree(top / "out/images")
    other.communicate()
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert other.stdout is not None
    other.stdout.readline()
    other.communicate()
    assert counts(segment(top)) == (2, 0, 2, 0)


def test_credentials_in_an_address_are_refused_before_anything_is_written(top: Path) -> None:
    with pytest.raises(UsageError, match="holds credentials") as refused:
        pipeline.segment(["s3://key:topsecret@bucket/in", str(top / "in")], "kmeans", top / "out")
    assert "topsecret" not in str(refused.value)
    assert not (top / "out").exists()


def test_the_limit_counts_what_failed_before(top: Path) -> None:
    good = (top / "in/b.nii.gz").read_bytes()
    (top / "in/b.nii.gz").write_bytes(good[:-50])
    assert counts(segment(top)) == (1, 0, 1, 1)
    (top / "in/b.nii.gz").write_bytes(good)
    assert counts(segment(top, retry_failed=True, limit=1)) == (1, 0, 1, 0)
