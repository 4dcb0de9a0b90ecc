"""`maskmill tune` on this machine, and that the fast path it finds gives the same masks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scans import brain, maskmill, random_model, save_nifti, table

from pipeline.phantoms import make_phantoms

HALF_A_THOUSANDTH = 5e-4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_auto_is_what_tune_measured(tmp_path: Path) -> None:
    home = {"MASKMILL_HOME": str(tmp_path / "home")}
    tuned = maskmill("tune", "--json", timeout=800, **home)
    assert tuned.code == 0
    rows = tuned.json["rows"]
    assert {row["dims"] for row in rows} == {2, 3}
    assert {row["backend"] for row in rows} == {"torch", "inductor", "openvino"}
    assert "about 0 s left" in tuned.err
    best = min((row for row in rows if row["dims"] == 3 and row["seconds"]), key=lambda row: row["seconds"])

    save_nifti(tmp_path / "in/a.nii.gz", brain((20, 24, 18)))
    model = random_model(tmp_path / "model")
    ended = maskmill("segment", tmp_path / "in", "-m", model, "-o", tmp_path / "out", "--engine", "serial", **home)
    assert ended.code == 0, ended.err
    (facts,) = (json.loads(path.read_text())["runtime"] for path in (tmp_path / "out").glob("runs/*/run.json"))
    assert {name: facts[name] for name in ("backend", "precision", "threads")} == {
        name: best[name] for name in ("backend", "precision", "threads")
    }


def test_a_table_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "home/tune.json").mkdir(parents=True)
    ended = maskmill("tune", MASKMILL_HOME=str(tmp_path / "home"))
    assert ended.code == 2
    assert ended.err.splitlines()[-1].startswith("maskmill: the table cannot be written to MASKMILL_HOME")


def test_a_backend_that_is_lacking_is_told_before_anything_runs(tmp_path: Path) -> None:
    save_nifti(tmp_path / "in/a.nii.gz", brain())
    model = random_model(tmp_path / "model")
    ended = maskmill(
        "segment", tmp_path / "in", "-m", model, "-o", tmp_path / "out", "--backend", "inductor", CXX="no-such-compiler"
    )
    assert ended.code == 2
    assert "the backend inductor lacks a C++ compiler, no-such-compiler" in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.timeout(600)
def test_a_fast_path_gives_the_same_masks_of_real_scans(shared: Path, tmp_path: Path) -> None:
    """Wanted: mean Dice within 0.001. On forty scans it was within 0.0002 (docs/benchmarks.md); here are five."""
    images = sorted((shared / "hippocampus/images").glob("[!.]*.nii.gz"))[::40]
    (tmp_path / "in").mkdir()
    for image in images:
        shutil.copy(image, tmp_path / "in")
    means = {}
    for backend, precision in (("torch", "fp32"), ("openvino", "bf16")):
        out = tmp_path / f"{backend}-{precision}"
        ended = maskmill(
            "segment", tmp_path / "in", "-m", "hippocampus-resunet", "-o", out, "--engine", "serial",
            "--backend", backend, "--precision", precision, "--reference", shared / "hippocampus/labels", timeout=500,
        )  # fmt: skip
        assert ended.code == 0, ended.err
        means[backend] = np.mean([row["dice"] for row in table(out, "structures")])
    assert means["torch"] > 0.85
    assert abs(means["openvino"] - means["torch"]) < HALF_A_THOUSANDTH


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_fast_path_gives_the_same_masks_of_a_phantom(tmp_path: Path) -> None:
    make_phantoms(str(tmp_path / "in"), [1000], (96, 96, 128), spacing_mm=3.0)
    masks, means = {}, {}
    for backend, precision in (("torch", "fp32"), ("openvino", "bf16")):
        out = tmp_path / backend
        ended = maskmill(
            "segment", tmp_path / "in/images", "-m", "phantom-resunet", "-o", out, "--engine", "serial", "--backend",
            backend, "--precision", precision, "--reference", tmp_path / "in/labels", timeout=500,
        )  # fmt: skip
        assert ended.code == 0, ended.err
        means[backend] = np.mean([row["dice"] for row in table(out, "structures")])
        (mask,) = out.glob("masks/*.nii.gz")
        masks[backend] = np.asarray(nib.load(mask).dataobj)
    assert means["torch"] > 0.95
    assert abs(means["openvino"] - means["torch"]) < HALF_A_THOUSANDTH
    assert (masks["openvino"] != masks["torch"]).mean() < 1e-3
