"""What is written lies, in patient millimetres, where it was read."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from scans import OBLIQUE, mask_bytes, save_nifti

import pipeline

SHAPE = (20, 26, 16)
_C, _S = np.cos(0.4), np.sin(0.4)

AFFINES = {
    "plain": np.diag([1.0, 1.0, 1.0, 1.0]),
    "anisotropic": np.array([[0.7, 0, 0, -90], [0, 0.9, 0, 40], [0, 0, 4.5, -12], [0, 0, 0, 1]]),
    "rotated": np.array([[_C, -_S, 0, 10], [_S, _C, 0, -20], [0, 0, 2, 5], [0, 0, 0, 1]]),
    "left_handed": np.array([[-1.2, 0, 0, 60], [0, 1.1, 0, -70], [0, 0, 2.5, 8], [0, 0, 0, 1]]),
    "permuted": np.array([[0, 0, 3.0, -40], [-0.8, 0, 0, 55], [0, 0.8, 0, 21], [0, 0, 0, 1]]),
    "oblique_left_handed": OBLIQUE,
    "sheared": np.array([[1.0, 0.2, 0, -5], [0, 1.0, 0.3, 3], [0, 0, 1.5, 9], [0, 0, 0, 1]]),
}
PLACE = (slice(3, 7), slice(15, 24), slice(10, 14))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them in one run of k-means: two clusters, one the bright box."""
    top = tmp_path_factory.mktemp("geometry")
    data = np.random.default_rng(0).normal(50, 3, SHAPE).astype(np.float32)
    data[PLACE] += 400
    for name, affine in AFFINES.items():
        # A qform knows no shear: there only the sform is set.
        save_nifti(top / f"in/{name}.nii.gz", data, affine, qform=0 if name == "sheared" else 1, sform=2)
    summary = pipeline.segment(top / "in", "kmeans", top / "out", classes=2, threads=1)
    assert summary.exit_code == 0
    (top / "centroids.json").write_text(json.dumps({e["study"]: e["structures"][0] for e in summary.studies}))
    return top / "out"


def centroid(data: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Where the bright voxels lie, in mm."""
    place: np.ndarray = apply_affine(affine, np.argwhere(data).mean(axis=0))
    return place


@pytest.mark.parametrize("name", AFFINES)
def test_the_mask_lies_on_the_input(name: str, out: Path) -> None:
    scan, mask = nib.load(out.parent / f"in/{name}.nii.gz"), nib.load(out / f"masks/{name}.nii.gz")
    assert mask.shape == scan.shape
    expected = centroid(scan.get_fdata() > 300, scan.affine)
    np.testing.assert_allclose(centroid(np.asarray(mask.dataobj) == 1, mask.affine), expected, atol=1e-3)
    corners = [[0, 0, 0], [n - 1 for n in SHAPE]]
    np.testing.assert_allclose(apply_affine(mask.affine, corners), apply_affine(scan.affine, corners), atol=1e-3)


@pytest.mark.parametrize("name", AFFINES)
def test_the_mask_has_the_codes_and_units_of_the_input(name: str, out: Path) -> None:
    scan, mask = nib.load(out.parent / f"in/{name}.nii.gz"), nib.load(out / f"masks/{name}.nii.gz")
    for code in ("qform_code", "sform_code", "xyzt_units"):
        assert int(mask.header[code]) == int(scan.header[code]), code
    assert mask.get_data_dtype() == np.uint8
    assert struct.unpack_from("<ff", mask_bytes(out, name), 112) == (1, 0)  # slope, intercept
    np.testing.assert_allclose(mask.header.get_zooms(), scan.header.get_zooms(), rtol=1e-6)


@pytest.mark.parametrize("name", AFFINES)
def test_image_labels_and_tables_agree_on_the_place(name: str, out: Path) -> None:
    scan = nib.load(out.parent / f"in/{name}.nii.gz")
    image = out / f"images/{name}.ome.zarr"
    for group in (image, image / "labels/kmeans"):
        attributes = json.loads((group / "zarr.json").read_text())["attributes"]
        np.testing.assert_array_equal(attributes["maskmill"]["affine"], scan.affine)
        (multiscale,) = attributes["ome"]["multiscales"]
        scale = multiscale["datasets"][0]["coordinateTransformations"][0]["scale"]
        np.testing.assert_allclose(scale, nib.affines.voxel_sizes(scan.affine)[::-1], rtol=1e-12)
    row = json.loads((out.parent / "centroids.json").read_text())[name]
    expected = centroid(scan.get_fdata() > 300, scan.affine)
    np.testing.assert_allclose([row[f"centroid_{a}_mm"] for a in "xyz"], expected, atol=1e-3)
    box = [(row[f"bbox_{a}_min"], row[f"bbox_{a}_max"]) for a in "xyz"]
    assert box == [(s.start, s.stop) for s in PLACE]
    volume = abs(np.linalg.det(scan.affine[:3, :3])) * row["voxels"] / 1000
    assert row["volume_ml"] == pytest.approx(volume, rel=1e-12)


def test_a_trailing_axis_of_one_is_three_dimensional_and_kept(tmp_path: Path) -> None:
    data = np.random.default_rng(0).normal(50, 3, (*SHAPE, 1)).astype(np.float32)
    data[PLACE] += 400
    save_nifti(tmp_path / "x.nii.gz", data, AFFINES["rotated"])
    assert pipeline.segment(tmp_path / "x.nii.gz", "kmeans", tmp_path / "out", classes=2, threads=1).exit_code == 0
    mask = nib.load(tmp_path / "out/masks/x.nii.gz")
    assert mask.shape == (*SHAPE, 1)
    np.testing.assert_array_equal(np.asarray(mask.dataobj) == 1, data > 300)
