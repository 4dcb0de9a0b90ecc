"""Full disks: the study that finds no room fails alone, and when there is room the same command finishes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from scans import label_array, leftovers, mask_bytes, save_nifti, scan

import pipeline
from pipeline import store
from pipeline.errors import UsageError
from pipeline.summary import Summary

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")

CLASSES = 64  # of noise: labels that do not shrink
ROOM = "64m"


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own at `folder`, of `size`."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def enlarge(folder: Path) -> None:
    subprocess.run(["mount", "-o", f"remount,size={ROOM}", str(folder)], check=True)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A large study of noise and a small one; what becomes of them where there is room."""
    top = tmp_path_factory.mktemp("full")
    noise = np.random.default_rng(0).integers(0, 30000, (64, 64, 140)).astype(np.int16)
    save_nifti(top / "in/large.nii.gz", noise)
    scan(top / "in/small.nii.gz", 1)
    assert segment(top / "in", top / "undisturbed").exit_code == 0
    return top / "in", top / "undisturbed"


def segment(inputs: Path, out: Path) -> Summary:
    return pipeline.segment(inputs, "kmeans", out, threads=1, classes=CLASSES)


def stored(folder: Path) -> int:
    return sum(store.sizes(str(folder)).values())


def check_finished(out: Path, undisturbed: Path) -> None:
    for study in ("large", "small"):
        np.testing.assert_array_equal(label_array(out, study), label_array(undisturbed, study))
        assert mask_bytes(out, study) == mask_bytes(undisturbed, study)
    assert leftovers(out) == []


@pytest.mark.parametrize("place", ["the image", "the labels", "the mask"])
def test_a_study_that_does_not_fit_fails_alone_and_goes_on_with_room(
    place: str, given: tuple[Path, Path], tmp_path: Path
) -> None:
    inputs, undisturbed = given
    image = undisturbed / "images/large.ome.zarr"
    labels = stored(image / "labels")
    kilobytes = {
        "the image": (stored(image) - labels) // 2 // 1024,
        "the labels": (stored(image) - labels * 2 // 3) // 1024 + 64,
        "the mask": stored(undisturbed / "masks") // 2 // 1024,
    }[place]
    out = tmp_path / "out"
    disk = out / ("masks" if place == "the mask" else "images")
    with small_disk(disk, f"{kilobytes}k"):
        summary = segment(inputs, out)
        large, small = summary.studies
        assert (large["state"], large["cause"], large["mask"]) == ("failed", "storage", None)
        assert "space" in large["message"].lower()
        assert small["state"] == "published"
        assert summary.exit_code == 1
        assert leftovers(out) == []
        enlarge(disk)
        again = segment(inputs, out)
        assert (again.published, again.reused, again.exit_code) == (2, 1, 0)
        assert again.blocks_computed == (0 if place == "the mask" else 1)
        check_finished(out, undisturbed)


def test_a_full_ledger_marks_nothing_that_it_cannot_keep(given: tuple[Path, Path], tmp_path: Path) -> None:
    inputs, undisturbed = given
    out = tmp_path / "out"
    with small_disk(out / "ledger", "24k"):  # a file takes at least a page of 4 KiB
        summary = segment(inputs, out)
        assert summary.exit_code == 1
        assert {e["cause"] for e in summary.studies if e["state"] == "failed"} == {"storage"}
        assert leftovers(out) == []
        assert not [p for p in (out / "ledger").rglob("*.json") if not p.stat().st_size]
        enlarge(out / "ledger")
        assert segment(inputs, out).exit_code == 0
        check_finished(out, undisturbed)


def test_a_disk_that_is_full_from_the_start_is_said_in_one_line(given: tuple[Path, Path], tmp_path: Path) -> None:
    inputs, undisturbed = given
    out = tmp_path / "out"
    with small_disk(out, "1m"):
        (out / "ballast").write_bytes(bytes(1 << 20))
        with pytest.raises(UsageError, match="cannot be written: No space left on device"):
            segment(inputs, out)
        assert leftovers(out) == []
        (out / "ballast").unlink()
        enlarge(out)
        assert segment(inputs, out).exit_code == 0
        check_finished(out, undisturbed)
