"""Phantoms as files: what others read is what `region` gives; a folder of them is finished by a rerun."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaozarrs
from scans import OBLIQUE, fingerprint, leftovers

from pipeline.errors import UsageError
from pipeline.phantoms import LABELS, Phantom, make_phantoms, phantom, render, series, write, write_nifti, write_omezarr
from pipeline.sources import find_studies, open_source

SHAPE = (20, 24, 28)


@pytest.fixture
def one() -> Phantom:
    affine = OBLIQUE.copy()
    affine[:3, :3] *= 8
    affine[:3, 3] = -affine[:3, :3] @ [14, 12, 10]
    return phantom(3, SHAPE, affine=affine)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_nibabel_reads_what_region_gives(
    tmp_path: Path, one: Phantom, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "SLAB_VOXELS", 3 * 24 * 28)  # several slabs, the last one short
    write_nifti(one, str(tmp_path), "p", ending=ending)
    for part, expected in zip(("images", "labels"), one.region(), strict=True):
        read = nib.load(tmp_path / part / f"p{ending}")
        assert read.get_data_dtype() == expected.dtype
        np.testing.assert_array_equal(np.asarray(read.dataobj), expected.transpose(2, 1, 0))
        np.testing.assert_allclose(read.affine, one.affine, rtol=1e-6, atol=1e-4)  # NIfTI keeps float32
        assert read.header.get_xyzt_units()[0] == "mm"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [f"p{ending}"] * 2


def test_omezarr_is_valid_and_our_source_reads_what_region_gives(tmp_path: Path, one: Phantom) -> None:
    write_omezarr(one, str(tmp_path), "p")
    write_omezarr(one, str(tmp_path), "p")  # takes the place of the first
    for part, expected in zip(("images", "labels"), one.region(), strict=True):
        group = tmp_path / part / "p.ome.zarr"
        yaozarrs.validate_zarr_store(str(group))
        (study,) = find_studies([str(group)], exclude=None).studies
        with open_source(study) as source:
            assert source.header.warnings == ()
            np.testing.assert_array_equal(source.header.affine, one.affine)
            voxels = np.concatenate(list(source.slabs(7)), axis=1)[0]
        np.testing.assert_array_equal(voxels, expected)
        assert [p.name for p in (tmp_path / part).iterdir()] == ["p.ome.zarr"]


def test_a_pyramid_is_made_of_a_large_one(tmp_path: Path) -> None:
    large = phantom(1, (20, 16, 300), spacing_mm=(18, 18, 1.2))
    write_omezarr(large, str(tmp_path), "p")
    for part in ("images", "labels"):
        yaozarrs.validate_zarr_store(str(tmp_path / part / "p.ome.zarr"))
        assert (tmp_path / part / "p.ome.zarr" / "1").is_dir()


@pytest.mark.parametrize("write_one", [write_nifti, write_omezarr])
def test_what_fails_midway_leaves_nothing(
    tmp_path: Path, one: Phantom, write_one: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Phantom, box: object) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(render.Phantom, "region", failing)
    with pytest.raises(OSError, match="no space"):
        write_one(one, str(tmp_path), "p")  # type: ignore[operator]
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


# ------------------------------------------------------------------------------------------------------------ a folder


@pytest.mark.parametrize(("format", "ending"), [("nifti", ".nii.gz"), ("omezarr", ".ome.zarr")])
def test_a_folder_holds_scans_masks_and_the_truth(tmp_path: Path, format: str, ending: str) -> None:
    made = make_phantoms(str(tmp_path), range(5, 7), SHAPE, orientation="LPS", format=format)
    assert made == ["phantom-0005", "phantom-0006"]
    for part in ("images", "labels"):
        found = find_studies([str(tmp_path / part)], exclude=None)
        assert [study.name for study in found.studies] == made
        assert sorted(p.name for p in (tmp_path / part).iterdir()) == [name + ending for name in made]
    with (tmp_path / "truth.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["study"], r["structure"]) for r in rows] == [(n, s) for n in made for s in LABELS.values()]
    truth = phantom(6, SHAPE, orientation="LPS").volumes_ml
    assert {r["structure"]: float(r["volume_ml"]) for r in rows if r["study"] == "phantom-0006"} == truth
    assert {r["whole"] for r in rows} == {"true"}
    document = json.loads((tmp_path / "truth.json").read_text())
    assert document["phantoms"]["phantom-0005"]["seed"] == 5
    assert document["labels"] == {str(v): n for v, n in LABELS.items()}


def test_a_rerun_makes_what_is_missing(tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    make_phantoms(str(whole), range(3), SHAPE)
    assert make_phantoms(str(again), [1], SHAPE) == ["phantom-0001"]
    before = fingerprint(again / "images")
    assert make_phantoms(str(again), range(3), SHAPE) == ["phantom-0000", "phantom-0002"]
    after = fingerprint(again / "images")
    assert after["phantom-0001.nii.gz"] == before["phantom-0001.nii.gz"]
    (again / "labels/phantom-0002.nii.gz").unlink()
    assert make_phantoms(str(again), range(3), SHAPE) == ["phantom-0002"]
    assert make_phantoms(str(again), range(3), SHAPE) == []
    content = {name: digest for name, (_, digest) in fingerprint(whole).items()}
    assert {name: digest for name, (_, digest) in fingerprint(again).items()} == content


def test_one_that_was_interrupted_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    make_phantoms(str(tmp_path), [0], SHAPE)
    with monkeypatch.context() as patch:
        patch.setitem(series.FORMATS, "nifti", (".nii.gz", interrupted))
        with pytest.raises(KeyboardInterrupt):
            make_phantoms(str(tmp_path), range(2), SHAPE)
    assert list(json.loads((tmp_path / "truth.json").read_text())["phantoms"]) == ["phantom-0000"]
    assert leftovers(tmp_path) == []
    assert make_phantoms(str(tmp_path), range(2), SHAPE) == ["phantom-0001"]


def test_what_a_killed_command_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/.phantom-0001.nii.gz.12ab34cd.partial").write_bytes(b"half")
    (tmp_path / "labels/.phantom-0001.12ab34cd.partial/0").mkdir(parents=True)
    (tmp_path / "labels/.phantom-12345.nii.gz.12ab34cd.partial").write_bytes(b"of a seed that is not made again")
    make_phantoms(str(tmp_path), range(2), SHAPE)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "other", [{"shape": (9, 9, 9)}, {"spacing_mm": 5.0}, {"orientation": "LPS"}, {"format": "omezarr"}]
)
def test_a_folder_made_otherwise_is_refused(tmp_path: Path, other: dict) -> None:
    make_phantoms(str(tmp_path), [0], SHAPE)
    before = fingerprint(tmp_path)
    with pytest.raises(UsageError, match="other settings"):
        make_phantoms(str(tmp_path), [1], **{"shape": SHAPE, **other})
    assert fingerprint(tmp_path) == before


def test_a_truth_that_cannot_be_read_is_not_written_over(tmp_path: Path) -> None:
    make_phantoms(str(tmp_path), [0], SHAPE)
    (tmp_path / "truth.json").write_text("{")
    before = fingerprint(tmp_path)
    with pytest.raises(UsageError, match=r"truth.json in the folder is damaged"):
        make_phantoms(str(tmp_path), [1], SHAPE)
    assert fingerprint(tmp_path) == before


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nifti, omezarr"):
        make_phantoms(str(tmp_path), [0], SHAPE, format="dicom")
