"""Masks as nibabel reads them: on the input's grid, in the input's place, with the input's codes and units."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from pipeline import ome, store
from pipeline.errors import StudyError
from pipeline.exports.nifti import write_nifti
from pipeline.sources import Header, Study, open_source

SHAPE = (7, 5, 9)  # x, y, z
SPACING = (0.7, 1.3, 2.9)


def oriented(order: tuple[int, ...], signs: tuple[int, ...]) -> np.ndarray:
    """Voxel axes laid on patient axes in this order and direction."""
    affine = np.zeros((4, 4))
    for voxel_axis, (axis, sign, size) in enumerate(zip(order, signs, SPACING, strict=True)):
        affine[axis, voxel_axis] = sign * size
    affine[:, 3] = (-35.5, 20.25, 7.125, 1)
    return affine


def turned(angles: tuple[float, float, float], *, mirrored: bool = False) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * SPACING
    affine[:3, 0] *= -1 if mirrored else 1
    affine[:3, 3] = (101.7, -33.3, 12.1)
    return affine


ORIENTATIONS = [
    oriented(order, signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((-1, 1), repeat=3)
]
OBLIQUE = [
    turned((10, 20, 30)),
    turned((-80, 3, 140)),
    turned((0.1, 0, 180), mirrored=True),
    turned((33, -21, 7), mirrored=True),
]
SHEARED = turned((5, 6, 7)) @ np.array([[1, 0.2, 0, 0], [0, 1, 0.1, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])


def label_image(folder: Path, shape: tuple[int, ...] = SHAPE, dtype: Any = np.uint8, highest: int = 4) -> np.ndarray:
    """Random labels, written as blocks write them; returned as (x, y, z)."""
    labels = np.random.default_rng(5).integers(0, highest + 1, shape).astype(dtype)
    stored = np.ascontiguousarray(labels[..., :1].squeeze(-1).T if len(shape) == 4 else labels.T)
    array = ome.create_array(str(folder / "labels"), stored.shape, (8, 8, 8), stored.dtype, list("zyx"))
    array[...] = stored
    return labels


def exported(folder: Path, source: Path) -> tuple[nib.Nifti1Image, Header]:
    """The mask of `source` that holds the labels of `folder`, as nibabel opens it, and the source's header."""
    with open_source(Study("s", str(source), (str(source),), "nifti")) as opened:
        header = opened.header
    write_nifti(str(folder / "labels"), str(folder / "mask.nii.gz"), header.affine, header.nifti)
    return nib.load(folder / "mask.nii.gz"), header


def save(
    path: Path, *, qform: tuple[Any, int], sform: tuple[Any, int], shape: tuple[int, ...] = SHAPE, **fields: Any
) -> Path:
    """An input whose two transforms are set one by one; `fields` go into the header."""
    image = nib.Nifti1Image(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), None)
    image.set_qform(*qform)
    image.set_sform(*sform)
    for name, value in fields.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def check(mask: nib.Nifti1Image, source: Path, labels: np.ndarray) -> None:
    """The mask lies on the input to the last bit, says so in the same words, and holds the labels."""
    there = nib.load(source)
    assert mask.shape == there.shape
    assert np.array_equal(np.asarray(mask.dataobj), labels.reshape(mask.shape))
    assert np.array_equal(mask.affine, there.affine)
    for form in ("qform", "sform"):
        assert int(mask.header[f"{form}_code"]) == int(there.header[f"{form}_code"])
        ours, theirs = (getattr(image, f"get_{form}")(coded=True)[0] for image in (mask, there))
        assert (ours is None) == (theirs is None)
        assert ours is None or np.array_equal(ours, theirs)
    assert mask.header["xyzt_units"] == there.header["xyzt_units"]
    # nibabel hides these two once it has opened a file.
    stored = nib.Nifti1Header(gzip.decompress(Path(mask.get_filename()).read_bytes())[:348])
    assert (float(stored["scl_slope"]), float(stored["scl_inter"])) == (1.0, 0.0)
    assert mask.header.get_zooms()[:3] == pytest.approx(nib.affines.voxel_sizes(there.affine)[:3], rel=1e-5)


@pytest.mark.parametrize("affine", ORIENTATIONS, ids=lambda a: "".join(nib.aff2axcodes(a)))
def test_every_orientation(tmp_path: Path, affine: np.ndarray) -> None:
    labels = label_image(tmp_path)
    source = save(tmp_path / "scan.nii.gz", qform=(affine, 1), sform=(affine, 1))
    mask, _ = exported(tmp_path, source)
    check(mask, source, labels)
    assert nib.aff2axcodes(mask.affine) == nib.aff2axcodes(affine)


@pytest.mark.parametrize("affine", [*OBLIQUE, SHEARED], ids=["near", "far", "half turn", "mirrored", "sheared"])
@pytest.mark.parametrize(("q", "s"), [(0, 2), (1, 0), (1, 1), (3, 4)])
def test_oblique_with_either_transform_or_both(tmp_path: Path, affine: np.ndarray, q: int, s: int) -> None:
    labels = label_image(tmp_path)
    source = save(tmp_path / "scan.nii", qform=(affine, q), sform=(affine if s else None, s))
    mask, _ = exported(tmp_path, source)
    check(mask, source, labels)


def test_quaternions_near_half_turns_are_handed_on_as_they_are(tmp_path: Path) -> None:
    """Most scans lie near one: there a matrix made of a quaternion does not give the same quaternion back."""
    labels, rng = label_image(tmp_path), np.random.default_rng(0)
    source = save(tmp_path / "scan.nii", qform=(OBLIQUE[0], 1), sform=(None, 0))
    plain = bytearray(source.read_bytes())
    for largest in np.repeat([0, 1e-5, 1e-4, 1e-3, 1e-2], 8):
        axis, a = rng.normal(size=3), largest * rng.random()
        axis *= np.sqrt(1 - a * a) / np.linalg.norm(axis)
        pixdim = [rng.choice([-1, 1]), *rng.uniform(0.3, 4, 3)]  # the first: left- or right-handed
        plain[76:92] = np.array(pixdim, np.float32).tobytes()
        plain[256:268] = axis.astype(np.float32).tobytes()
        source.write_bytes(plain)
        mask, _ = exported(tmp_path, source)
        check(mask, source, labels)


def test_two_transforms_that_differ_are_both_kept(tmp_path: Path) -> None:
    labels = label_image(tmp_path)
    source = save(tmp_path / "scan.nii", qform=(OBLIQUE[1], 1), sform=(OBLIQUE[3], 4))
    mask, header = exported(tmp_path, source)
    assert np.allclose(header.affine, OBLIQUE[3], atol=1e-5)
    there = nib.load(source)
    assert np.array_equal(mask.get_qform(), there.get_qform())
    assert np.array_equal(mask.get_sform(), there.get_sform())
    assert np.array_equal(np.asarray(mask.dataobj), labels)


def test_the_same_label_lies_at_the_same_millimetre(tmp_path: Path) -> None:
    """Voxels of the input found by brightness and of the mask found by label, in world coordinates."""
    for i, affine in enumerate([*ORIENTATIONS[::5], *OBLIQUE]):
        folder = tmp_path / str(i)
        labels = label_image(folder)
        image = nib.Nifti1Image((labels * 10).astype(np.int16), affine)
        nib.save(image, folder / "scan.nii.gz")
        mask, _ = exported(folder, folder / "scan.nii.gz")
        for label in range(1, 5):
            bright = np.argwhere(np.asarray(nib.load(folder / "scan.nii.gz").dataobj) == 10 * label)
            marked = np.argwhere(np.asarray(mask.dataobj) == label)
            there = nib.affines.apply_affine(affine, bright)
            assert np.allclose(nib.affines.apply_affine(mask.affine, marked), there, atol=1e-4)


@pytest.mark.parametrize(("units", "expected"), [(2, 2), (2 | 8, 10), (0, 0), (3, 3), (1 | 16, 17)])
def test_units_are_the_inputs(tmp_path: Path, units: int, expected: int) -> None:
    labels = label_image(tmp_path)
    affine = ORIENTATIONS[3]
    source = save(tmp_path / "scan.nii", qform=(affine, 1), sform=(affine, 1), xyzt_units=units)
    mask, _ = exported(tmp_path, source)
    check(mask, source, labels)
    assert mask.header["xyzt_units"] == expected


@pytest.mark.parametrize("shape", [(7, 5, 9, 1), (7, 5, 9, 1, 1)])
def test_axes_of_one_voxel_are_kept(tmp_path: Path, shape: tuple[int, ...]) -> None:
    labels = label_image(tmp_path)
    source = save(tmp_path / "scan.nii", qform=(OBLIQUE[0], 1), sform=(OBLIQUE[0], 1), shape=shape)
    mask, _ = exported(tmp_path, source)
    assert mask.shape == shape
    check(mask, source, labels)


def test_a_mask_of_one_volume_of_many_is_3d(tmp_path: Path) -> None:
    labels = label_image(tmp_path)
    source = save(tmp_path / "scan.nii", qform=(OBLIQUE[0], 1), sform=(OBLIQUE[0], 1), shape=(*SHAPE, 3))
    with open_source(Study("s", str(source), (str(source),), "nifti"), volume=1) as opened:
        header = opened.header
    write_nifti(str(tmp_path / "labels"), str(tmp_path / "mask.nii.gz"), header.affine, header.nifti)
    mask = nib.load(tmp_path / "mask.nii.gz")
    assert mask.shape == SHAPE
    assert np.array_equal(mask.affine, nib.load(source).affine)
    assert np.array_equal(np.asarray(mask.dataobj), labels)


def test_slope_and_type_of_the_input_do_not_carry_over(tmp_path: Path) -> None:
    labels = label_image(tmp_path)
    image = nib.Nifti1Image(np.ones(SHAPE, np.float64), OBLIQUE[0])
    image.header.set_data_dtype(np.int16)
    image.header.set_slope_inter(0.25, -1024)
    nib.save(image, tmp_path / "scan.nii")
    mask, _ = exported(tmp_path, tmp_path / "scan.nii")
    check(mask, tmp_path / "scan.nii", labels)
    assert mask.get_data_dtype() == np.uint8
    assert mask.get_fdata().max() == 4


@pytest.mark.parametrize(("dtype", "highest"), [(np.uint8, 255), (np.uint16, 65_535)])
def test_labels_of_two_sizes(tmp_path: Path, dtype: Any, highest: int) -> None:
    labels = label_image(tmp_path, dtype=dtype, highest=highest)
    source = save(tmp_path / "scan.nii", qform=(OBLIQUE[0], 1), sform=(OBLIQUE[0], 1))
    mask, _ = exported(tmp_path, source)
    assert mask.get_data_dtype() == np.dtype(dtype)
    assert np.array_equal(np.asarray(mask.dataobj), labels)


def test_a_broken_qform_is_not_handed_on_but_its_code_is(tmp_path: Path) -> None:
    labels = label_image(tmp_path)
    source = save(tmp_path / "scan.nii", qform=(OBLIQUE[0], 2), sform=(OBLIQUE[0], 1))
    data = bytearray(source.read_bytes())
    data[256:260] = np.float32(3.0).tobytes()  # quatern_b: no rotation has a sine above 1
    source.write_bytes(data)
    mask, _ = exported(tmp_path, source)
    assert np.array_equal(mask.affine, nib.load(source).affine)
    assert (int(mask.header["qform_code"]), int(mask.header["sform_code"])) == (2, 1)
    assert np.allclose(mask.get_qform(), OBLIQUE[0], atol=1e-4)
    assert np.array_equal(np.asarray(mask.dataobj), labels)


def test_a_study_that_was_no_nifti_gets_one_transform(tmp_path: Path) -> None:
    labels = label_image(tmp_path)
    write_nifti(str(tmp_path / "labels"), str(tmp_path / "mask.nii.gz"), SHEARED, None)
    mask = nib.load(tmp_path / "mask.nii.gz")
    assert mask.shape == SHAPE
    assert np.allclose(mask.affine, SHEARED, atol=1e-5)
    assert (int(mask.header["sform_code"]), int(mask.header["qform_code"])) == (1, 0)
    assert mask.header.get_xyzt_units()[0] == "mm"
    assert np.array_equal(np.asarray(mask.dataobj), labels)


def test_labels_with_a_channel_axis(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 3, (1, 9, 5, 7)).astype(np.uint8)
    array = ome.create_array(str(tmp_path / "labels"), labels.shape, (8, 8, 8), labels.dtype, list("czyx"))
    array[...] = labels
    write_nifti(str(tmp_path / "labels"), str(tmp_path / "mask.nii.gz"), SHEARED, None)
    assert np.array_equal(np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj), labels[0].T)


def test_the_same_labels_give_the_same_bytes_under_any_name(tmp_path: Path) -> None:
    label_image(tmp_path)
    for name in ("a.nii.gz", "another name.nii.gz"):
        write_nifti(str(tmp_path / "labels"), str(tmp_path / name), OBLIQUE[0], None)
    first, second = (tmp_path / name for name in ("a.nii.gz", "another name.nii.gz"))
    assert first.read_bytes() == second.read_bytes()
    assert len(gzip.decompress(first.read_bytes())) == 352 + 7 * 5 * 9
    assert sorted(store.names(str(tmp_path))) == ["a.nii.gz", "another name.nii.gz", "labels"]


def test_a_damaged_label_shard_leaves_the_old_mask(tmp_path: Path) -> None:
    label_image(tmp_path)
    url = str(tmp_path / "mask.nii.gz")
    write_nifti(str(tmp_path / "labels"), url, OBLIQUE[0], None)
    before = store.read(url)
    shard = tmp_path / "labels" / "c" / "1" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(StudyError) as caught:
        write_nifti(str(tmp_path / "labels"), url, OBLIQUE[0], None)
    assert caught.value.cause == "storage"
    assert store.read(url) == before
    assert not list(tmp_path.glob(".*"))
