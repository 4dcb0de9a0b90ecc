"""OME-Zarr as INPUT: never written into, unless linked, and then labels only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from scans import OBLIQUE, brain, fingerprint, label_array, mask_bytes, random_model, scan

import pipeline
from pipeline.errors import UsageError
from pipeline.summary import Summary


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("link") / "model")


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """The OUT of a run of k-means over two scans, one of them oblique."""
    scan(tmp_path / "in/a.nii.gz", 1, affine=OBLIQUE)
    scan(tmp_path / "in/b.nii.gz", 2)
    assert segment(tmp_path / "in", "kmeans", tmp_path / "first").exit_code == 0
    return tmp_path / "first"


def segment(inputs: Path, model: str | Path, out: Path, **settings: Any) -> Summary:
    return pipeline.segment(inputs, model, out, threads=1, **settings)


def arrays(images: Path) -> dict[str, tuple[int, str]]:
    """Every file of the images but for their labels."""
    return {n: f for n, f in fingerprint(images).items() if "labels" not in n and f[1] != "folder"}


def labels_of(image: Path) -> list[str]:
    listed: list[str] = json.loads((image / "labels/zarr.json").read_text())["attributes"]["ome"]["labels"]
    return listed


def test_an_input_is_never_written_into(first: Path, model: Path, tmp_path: Path) -> None:
    before = fingerprint(first / "images")
    summary = segment(first / "images", model, tmp_path / "second")
    assert (summary.published, summary.exit_code) == (2, 0)
    assert fingerprint(first / "images") == before
    for study in ("a", "b"):
        image = tmp_path / f"second/images/{study}.ome.zarr"
        assert not image.is_symlink()
        assert labels_of(image) == ["tiny-resunet"]
        theirs = zarr.open_array(first / f"images/{study}.ome.zarr/0", mode="r")[...]
        np.testing.assert_array_equal(zarr.open_array(image / "0", mode="r")[...], theirs)


def test_the_same_scan_gives_the_same_labels_as_nifti_and_as_ome_zarr(first: Path, model: Path, tmp_path: Path) -> None:
    segment(tmp_path / "in", model, tmp_path / "from-nifti")
    segment(first / "images", model, tmp_path / "from-zarr")
    for study in ("a", "b"):
        expected = label_array(tmp_path / "from-nifti", study, "tiny-resunet")
        np.testing.assert_array_equal(label_array(tmp_path / "from-zarr", study, "tiny-resunet"), expected)
        assert len(np.unique(expected)) > 1


def test_linked_labels_stand_beside_those_of_the_first_model(first: Path, model: Path, tmp_path: Path) -> None:
    before, kmeans = arrays(first / "images"), label_array(first, "a")
    summary = segment(first / "images", model, tmp_path / "second", images="link")
    assert (summary.published, summary.exit_code) == (2, 0)
    assert arrays(first / "images") == before
    np.testing.assert_array_equal(label_array(first, "a"), kmeans)
    for study in ("a", "b"):
        link, image = tmp_path / f"second/images/{study}.ome.zarr", first / f"images/{study}.ome.zarr"
        assert link.is_symlink()
        assert link.resolve() == image
        assert labels_of(image) == ["kmeans", "tiny-resunet"]
        group = json.loads((image / "labels/tiny-resunet/zarr.json").read_text())["attributes"]
        assert (image / "labels/tiny-resunet" / group["ome"]["image-label"]["source"]["image"]).resolve() == image
        assert (tmp_path / f"second/masks/{study}.nii.gz").is_file()
    segment(tmp_path / "in", model, tmp_path / "copied")
    np.testing.assert_array_equal(
        label_array(tmp_path / "second", "a", "tiny-resunet"), label_array(tmp_path / "copied", "a", "tiny-resunet")
    )

    # Neither run has anything left to do.
    again = segment(first / "images", model, tmp_path / "second", images="link")
    assert (again.published, again.reused, again.blocks_computed) == (2, 2, 0)
    again = segment(tmp_path / "in", "kmeans", first)
    assert (again.published, again.reused, again.blocks_computed) == (2, 2, 0)
    assert labels_of(first / "images/a.ome.zarr") == ["kmeans", "tiny-resunet"]


def test_overwriting_linked_labels_leaves_the_first_models_alone(first: Path, model: Path, tmp_path: Path) -> None:
    before, kmeans = arrays(first / "images"), fingerprint(first / "images/a.ome.zarr/labels/kmeans")
    segment(first / "images", model, tmp_path / "second", images="link")
    with pytest.raises(UsageError, match="overlap"):
        segment(first / "images", model, tmp_path / "second", images="link", overlap=0.25)
    summary = segment(first / "images", model, tmp_path / "second", images="link", overlap=0.25, overwrite=True)
    assert (summary.published, summary.blocks_computed) == (2, 2)
    assert arrays(first / "images") == before
    assert fingerprint(first / "images/a.ome.zarr/labels/kmeans") == kmeans
    assert labels_of(first / "images/a.ome.zarr") == ["kmeans", "tiny-resunet"]


def test_a_linked_image_that_changes_is_computed_again(first: Path, model: Path, tmp_path: Path) -> None:
    """Its owner may change the pixels at any time; labels of other pixels are never taken for its own."""
    segment(first / "images", model, tmp_path / "second", images="link")
    before = label_array(tmp_path / "second", "a", "tiny-resunet")
    array = zarr.open_array(first / "images/a.ome.zarr/0", mode="r+")
    pixels = array[...]
    array[...] = brain(seed=9).T
    summary = segment(first / "images", model, tmp_path / "second", images="link")
    assert (summary.published, summary.reused, summary.blocks_computed) == (2, 1, 1)
    assert (label_array(tmp_path / "second", "a", "tiny-resunet") != before).any()
    array[...] = pixels
    summary = segment(first / "images", model, tmp_path / "second", images="link")
    assert (summary.published, summary.failed) == (2, 0)
    np.testing.assert_array_equal(label_array(tmp_path / "second", "a", "tiny-resunet"), before)


def test_what_cannot_be_linked_is_refused_and_the_rest_goes_on(first: Path, model: Path, tmp_path: Path) -> None:
    """An image of the older format cannot carry labels of the new one."""
    images = first / "images"
    old = images / "old.ome.zarr"
    group = zarr.open_group(old, mode="w", zarr_format=2)
    group.create_array("0", data=brain(seed=4).T.copy(), chunks=(10, 14, 12))
    axes = [{"name": n, "type": "space", "unit": "millimeter"} for n in "zyx"]
    scale = {"type": "scale", "scale": [2.0, 1.5, 1.0]}
    datasets = [{"path": "0", "coordinateTransformations": [scale]}]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    before = fingerprint(old)
    summary = segment(images, model, tmp_path / "second", images="link")
    assert (summary.published, summary.failed) == (2, 1)
    (entry,) = [e for e in summary.studies if e["state"] == "failed"]
    assert (entry["study"], entry["cause"]) == ("old", "input")
    assert "run without it" in entry["message"]
    assert fingerprint(old) == before
    summary = segment(old, model, tmp_path / "third")
    assert summary.published == 1
    assert fingerprint(old) == before


def test_the_oblique_place_goes_all_the_way(first: Path, model: Path, tmp_path: Path) -> None:
    """NIfTI to OME-Zarr to a second OUT to a NIfTI mask: the affine stays."""
    import io

    import nibabel as nib

    segment(first / "images", model, tmp_path / "second", images="link")
    mask = nib.Nifti1Image.from_stream(io.BytesIO(mask_bytes(tmp_path / "second", "a")))
    np.testing.assert_allclose(mask.affine, OBLIQUE, atol=1e-5)
    kept = json.loads((tmp_path / "second/images/a.ome.zarr/labels/tiny-resunet/zarr.json").read_text())
    np.testing.assert_allclose(kept["attributes"]["maskmill"]["affine"], OBLIQUE, atol=1e-5)
