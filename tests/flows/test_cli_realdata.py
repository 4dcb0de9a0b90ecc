"""All of the real hippocampus scans in one command, again, and some of them later."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from scans import Ended, leftovers, maskmill, random_model

import segmodels

pytestmark = [pytest.mark.realdata, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def images(shared: Path) -> Path:
    """The folder of the 200 scans."""
    return shared / "hippocampus" / "images"


def segment(inputs: Path, model: str | Path, out: Path, *flags: object) -> Ended:
    return maskmill("segment", inputs, "-m", model, "-o", out, "--threads", 1, "--json", *flags, timeout=800)


def counts(ended: Ended) -> tuple[int, ...]:
    return (ended.code, *(ended.json[n] for n in ("published", "failed", "reused", "blocks_computed")))


def names(folder: Path) -> list[str]:
    return sorted(p.name.removesuffix(".nii.gz") for p in folder.glob("[!.]*.nii.gz"))


def test_all_by_kmeans_and_a_second_call_does_nothing(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = segment(images, "kmeans", out)
    assert counts(ended) == (0, 200, 0, 0, 200)
    assert names(out / "masks") == names(images)
    assert [e["study"] for e in ended.json["studies"]] == names(images)
    for study in names(images)[::20]:
        scan, mask = nib.load(images / f"{study}.nii.gz"), nib.load(out / f"masks/{study}.nii.gz")
        assert mask.shape == scan.shape
        corner = [n - 1 for n in scan.shape]
        np.testing.assert_allclose(apply_affine(mask.affine, corner), apply_affine(scan.affine, corner), atol=1e-3)
        labels, voxels = np.asarray(mask.dataobj), np.asarray(scan.dataobj)
        means = [voxels[labels == k].mean() for k in np.unique(labels)]
        assert means == sorted(means)
    assert leftovers(out) == []
    again = segment(images, "kmeans", out)
    assert counts(again) == (0, 200, 0, 200, 0)
    assert again.err.startswith("nothing to do: all 200 studies are published already")


def test_all_through_a_network_of_random_weights_with_scores(images: Path, shared: Path, tmp_path: Path) -> None:
    model = random_model(tmp_path / "model", tile=(48, 64, 48))
    ended = segment(images, model, tmp_path / "out", "--reference", shared / "hippocampus" / "labels")
    assert counts(ended)[:3] == (0, 200, 0)
    assert set(ended.json["dice"]) == {"front", "back"}
    assert 0 <= ended.json["mean_dice"] < 0.5  # it has learned nothing
    scored = [e for e in ended.json["studies"] if e["structures"][0]["dice"] is not None]
    assert len(scored) == 200


def test_ten_files_that_come_later_are_all_that_is_computed(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for study in names(images)[:190]:
        shutil.copy(images / f"{study}.nii.gz", folder)
    assert counts(segment(folder, "kmeans", tmp_path / "out", "--engine", "serial")) == (0, 190, 0, 0, 190)
    for study in names(images)[190:]:
        shutil.copy(images / f"{study}.nii.gz", folder)
    assert counts(segment(folder, "kmeans", tmp_path / "out", "--engine", "serial")) == (0, 200, 0, 190, 10)


def test_the_shipped_network_scores_what_its_card_says(images: Path, shared: Path, tmp_path: Path) -> None:
    card = segmodels.load("hippocampus-resunet").card
    assert isinstance(card.training, dict)
    assert isinstance(card.quality, dict)
    folder = tmp_path / "in"
    folder.mkdir()
    for study in card.training["split"]["validation"]:
        shutil.copy(images / f"{study}.nii.gz", folder)
    flags = ("--reference", shared / "hippocampus" / "labels")
    ended = segment(folder, "hippocampus-resunet", tmp_path / "out", *flags)
    assert counts(ended)[:2] == (0, card.quality["cases"])
    # threads and machine may differ from those of the card
    assert ended.json["mean_dice"] == pytest.approx(card.quality["mean_dice"], abs=2e-3)
    for structure, facts in card.quality["structures"].items():
        assert ended.json["dice"][structure] == pytest.approx(facts["mean"], abs=2e-3)
