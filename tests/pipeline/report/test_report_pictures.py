"""The three planes: what is left in the patient is left in the picture's convention, whatever the storage."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import zarr
from PIL import Image

from pipeline import ome
from pipeline.metrics.masks import Mask
from pipeline.report.pictures import GAP, PLANES, Level, _sampled, three_planes

SIZE = 240
MARK = (0, 158, 115)
SHAPE = np.array([40, 60, 30])  # voxels towards R, A, S
SPACING = np.array([2.0, 0.8, 3.0])  # mm: 80 x 48 x 90
BOX = ((6, 12), (40, 54), (20, 26))  # left, anterior, superior: index 0 is the patient's far left


def phantom(code: str, turn: float) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Image, mask (both x,y,z) and affine of a box left, in front and on top, stored as `code`."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[tuple(slice(*edges) for edges in BOX)] = 1
    image = np.where(mask, 900, 100).astype(np.int16)
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = [-31.0, 17.5, 400.0]
    affine[:3, :3] = _rotation(turn) @ affine[:3, :3]
    change = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(code))
    stored = affine @ nib.orientations.inv_ornt_aff(change, SHAPE)
    return (*(nib.apply_orientation(data, change) for data in (image, mask)), stored)


def _rotation(degrees: float) -> npt.NDArray[Any]:
    """About the third and then, by two thirds of it, about the first axis."""
    (c, s), (d, t) = ((np.cos(a), np.sin(a)) for a in np.radians([degrees, degrees * 2 / 3]))
    return np.array([[1, 0, 0], [0, d, -t], [0, t, d]]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def write_group(url: Path, levels: list[npt.NDArray[Any]], affine: npt.NDArray[Any]) -> None:
    """An OME-Zarr group of (c,)z,y,x arrays, finest first, that lies as `affine` (RAS mm over x,y,z) says."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[::-1].tolist()
    z, y, x = levels[0].shape[-3:]
    channels = levels[0].ndim == 4
    entry = ome.multiscales("volume", (z, y, x), spacing, channels, "test")
    attributes = {"ome": {"multiscales": entry}, "maskmill": {"affine": affine.tolist()}}
    ome.write_group(str(url), attributes)
    for i, level in enumerate(levels):
        z, y, x = level.shape[-3:]
        names, shards = ome.axis_names(channels), ome.shard_shape((z, y, x))
        ome.create_array(str(url / str(i)), level.shape, shards, level.dtype, names)[...] = level


def stored(folder: Path, image: npt.NDArray[Any], mask: npt.NDArray[Any], affine: npt.NDArray[Any]) -> Path:
    """Image and mask (x,y,z) as an OME-Zarr study with labels/m."""
    write_group(folder, [np.ascontiguousarray(image.T)], affine)
    write_group(folder / "labels" / "m", [np.ascontiguousarray(mask.T)], affine)
    return folder


def panes(png: bytes) -> list[npt.NDArray[Any]]:
    """The three panes, y,x,rgb."""
    strip = np.asarray(Image.open(io.BytesIO(png)))
    assert strip.shape == (SIZE, 3 * SIZE + 2 * GAP, 3)
    return [strip[:, i * (SIZE + GAP) : i * (SIZE + GAP) + SIZE].astype(int) for i in range(3)]


def extent(where: npt.NDArray[Any]) -> tuple[float, float, float, float]:
    """left, right, top, bottom (exclusive) of what is true."""
    rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
    return columns[0], columns[-1] + 1, rows[0], rows[-1] + 1


def expected(left: str, top: str) -> list[float]:
    """left, right, top, bottom of the box in a pane, in pixels, worked out in the patient's millimetres."""
    axes = ["RAS".index(left), "RAS".index(top)]
    unit = SIZE / max(SHAPE[axes] * SPACING[axes])
    edges = []
    for axis in axes:  # indices grow towards R, A, S, and these letters are on the left and top edges: mirrored
        margin = (SIZE - SHAPE[axis] * SPACING[axis] * unit) / 2
        edges += [margin + (SHAPE[axis] - index) * SPACING[axis] * unit for index in reversed(BOX[axis])]
    return edges


def drawn(folder: Path, **options: Any) -> list[npt.NDArray[Any]]:
    return panes(three_planes(folder, folder / "labels" / "m", {1: MARK}, size=SIZE, **options))


@pytest.mark.parametrize("turn", [0.0, 21.0], ids=["straight", "oblique"])
@pytest.mark.parametrize("code", ["RAS", "LPS", "PIR", "SLA"])
def test_a_marker_lies_where_the_patient_has_it(tmp_path: Path, code: str, turn: float) -> None:
    folder = stored(tmp_path / "s.ome.zarr", *phantom(code, turn))
    for (name, left, top), pane in zip(PLANES, drawn(folder), strict=True):
        outline = (pane == MARK).all(axis=-1)
        assert outline.any(), f"the {name} plane misses the marker"
        place = extent(outline)
        np.testing.assert_allclose(place, expected(left, top), atol=1.5, err_msg=f"{name} of {code}")
        on_the_left = (place[0] + place[1]) / 2 < SIZE / 2  # in the patient it is left, in front, on top
        assert on_the_left == (name == "sagittal"), name
        assert (place[2] + place[3]) / 2 < SIZE / 2, name


def test_every_storage_order_gives_the_same_picture(tmp_path: Path) -> None:
    pictures = []
    for code in ("RAS", "LPS", "PIR", "SLA"):
        folder = stored(tmp_path / code, *phantom(code, 0.0))
        pictures.append(drawn(folder))
    for others in pictures[1:]:
        for pane, other in zip(pictures[0], others, strict=True):
            assert np.abs(pane - other).max() <= 2


def test_the_letters_are_drawn(tmp_path: Path) -> None:
    image, _, affine = phantom("RAS", 0.0)
    folder = tmp_path / "s.ome.zarr"
    write_group(folder, [np.zeros_like(image.T)], affine)
    for pane in panes(three_planes(folder, None, {}, size=SIZE)):
        ink = pane.max(axis=-1) > 128
        middle = slice(SIZE // 2 - 12, SIZE // 2 + 12)
        edges = (ink[middle, :20], ink[middle, -20:], ink[:20, middle], ink[-20:, middle], ink[-20:, :20])
        assert all(edge.any() for edge in edges)
        assert not ink[40:100, 40:100].any(), "a flat image without a mask is black"


def test_area_is_half_transparent_and_unlisted_labels_are_grey(tmp_path: Path) -> None:
    image, mask, affine = phantom("RAS", 0.0)
    folder = stored(tmp_path / "s.ome.zarr", image, mask, affine)
    left, right, top, bottom = (round(edge) for edge in expected("R", "A"))
    inside = np.s_[(top + bottom) // 2, (left + right) // 2]
    green = drawn(folder)[0][inside]
    assert not np.array_equal(green, MARK)
    assert green[1] > green[0] + 40
    grey = panes(three_planes(folder, folder / "labels" / "m", {}, size=SIZE))[0][inside]
    assert grey.max() - grey.min() <= 2


def test_a_gap_in_the_middle_of_the_mask_is_avoided(tmp_path: Path) -> None:
    """Two kidneys: the plane between them would show neither."""
    image, mask, affine = phantom("RAS", 0.0)
    mask[:] = 0
    mask[2:6, 20:30, 10:20] = 1
    mask[34:36, 20:30, 10:20] = 1
    folder = stored(tmp_path / "s.ome.zarr", image, mask, affine)
    sagittal = drawn(folder)[2]
    assert (sagittal == MARK).all(axis=-1).any()


def test_only_the_level_that_fits_is_read(tmp_path: Path) -> None:
    """A study of 300 rows has two levels; whoever touches the finest finds it damaged."""
    fine, coarse = np.ones((300, 20, 20), np.int16), np.zeros((150, 20, 20), np.int16)
    coarse[:, 5:15, 5:15] = 500
    folder = tmp_path / "s.ome.zarr"
    write_group(folder, [fine, coarse], np.eye(4))
    shards = [path for path in (folder / "0" / "c").rglob("*") if path.is_file()]
    assert shards
    for shard in shards:
        shard.write_bytes(b"garbage")
    axial, coronal, _ = panes(three_planes(folder, None, {}, size=SIZE))
    assert axial[SIZE // 2, SIZE // 2].min() > 200
    bright = coronal[60:-60, 60:-60].min(axis=-1) > 200
    assert extent(bright)[:2] == pytest.approx((56, 64), abs=2), "10 of 300 mm are 8 of 240 pixels"


def test_the_first_channel_is_shown(tmp_path: Path) -> None:
    image, mask, affine = phantom("LPS", 0.0)
    single, double = tmp_path / "one", stored(tmp_path / "two", image, mask, affine)
    stored(single, image, mask, affine)
    volume = np.ascontiguousarray(image.T)
    noise = np.random.default_rng(0).integers(0, 9000, volume.shape, np.int16)
    write_group(double, [np.stack([volume, noise])], affine)
    write_group(double / "labels" / "m", [np.ascontiguousarray(mask.T)[None]], affine)
    for pane, other in zip(drawn(single), drawn(double), strict=True):
        np.testing.assert_array_equal(pane, other)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "uint64", "float32", "float64"])
def test_any_type_gives_the_same_picture(tmp_path: Path, dtype: str) -> None:
    image, mask, affine = phantom("RAS", 0.0)
    image = image // 10
    reference = drawn(stored(tmp_path / "a", image, mask, affine))
    for pane, other in zip(reference, drawn(stored(tmp_path / "b", image.astype(dtype), mask, affine)), strict=True):
        np.testing.assert_array_equal(pane, other)


def test_nan_and_infinity_do_not_spoil_the_window(tmp_path: Path) -> None:
    image, mask, affine = phantom("RAS", 0.0)
    odd = image.astype(np.float32)
    odd[20, 30, 10:14] = [np.nan, np.inf, -np.inf, np.nan]
    reference = drawn(stored(tmp_path / "a", image, mask, affine))
    spoiled = drawn(stored(tmp_path / "b", odd, mask, affine))
    for pane, other in zip(reference, spoiled, strict=True):
        assert (np.abs(pane - other).max(axis=-1) > 3).mean() < 0.02


def test_an_image_of_another_maker_is_drawn_as_ras(tmp_path: Path) -> None:
    """OME-Zarr 0.4 (Zarr v2) without an affine, as it is linked into OUT."""
    image, _, affine = phantom("RAS", 0.0)
    write_group(tmp_path / "ours", [np.ascontiguousarray(image.T)], affine)
    axes = [{"name": name, "type": "space", "unit": "millimeter"} for name in "zyx"]
    transforms = [{"type": "scale", "scale": SPACING[::-1].tolist()}]
    dataset = {"path": "full", "coordinateTransformations": transforms}
    group = zarr.create_group(tmp_path / "theirs", zarr_format=2)
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": [dataset]}]
    group.create_array("full", data=np.ascontiguousarray(image.T))
    ours, theirs = (three_planes(tmp_path / name, None, {}, size=SIZE) for name in ("ours", "theirs"))
    assert ours == theirs


def test_labels_of_another_shape_are_refused(tmp_path: Path) -> None:
    image, mask, affine = phantom("RAS", 0.0)
    folder = stored(tmp_path / "s.ome.zarr", image, mask[:-1], affine)
    with pytest.raises(ValueError, match=r"image is \(30, 60, 40\) and the labels are \(30, 60, 39\)"):
        drawn(folder)


def test_a_clip_is_refused(tmp_path: Path) -> None:
    axes = [{"name": name} for name in "tcyx"]
    ome.write_group(str(tmp_path / "c"), {"ome": {"multiscales": [{"axes": axes, "datasets": []}]}})
    with pytest.raises(ValueError, match="need axes z,y,x or c,z,y,x, got t,c,y,x"):
        three_planes(tmp_path / "c", None, {})


def test_a_group_without_multiscales_is_refused(tmp_path: Path) -> None:
    ome.write_group(str(tmp_path / "g"), {})
    with pytest.raises(ValueError, match="expected an OME-Zarr image"):
        three_planes(tmp_path / "g", None, {})


def as_mask(voxels: npt.NDArray[Any], affine: npt.NDArray[Any]) -> Mask:
    """A reference in memory; voxels z,y,x."""
    z, y, x = voxels.shape

    def read(rows: int) -> Iterator[npt.NDArray[Any]]:
        return (voxels[row : row + rows] for row in range(0, z, rows))

    return Mask((z, y, x), affine, read)


@pytest.mark.parametrize("code", ["RAS", "LPS", "PIR"])
def test_a_reference_is_a_white_line_where_it_ends(tmp_path: Path, code: str) -> None:
    image, mask, affine = phantom(code, 0.0)
    empty = np.zeros_like(mask)
    folder = stored(tmp_path / "s", np.full_like(image, 100), empty, affine)
    plain = drawn(folder)
    larger = np.ones_like(mask.T)
    larger[:2] = larger[-2:] = larger[:, :2] = larger[:, -2:] = larger[..., :2] = larger[..., -2:] = 0
    outlined = drawn(folder, reference=as_mask(larger, affine))
    for before, after in zip(plain, outlined, strict=True):
        white = (after == 255).all(axis=-1) & ~(before == 255).all(axis=-1)
        left, right, top, bottom = extent(white)
        rim = white.copy()
        rim[int(top) + 1 : int(bottom) - 1, int(left) + 1 : int(right) - 1] = False
        assert white.sum() == rim.sum(), "one pixel wide, along the edge"
        around = 2 * (right - left + bottom - top) - 4
        assert 0.9 * around < rim.sum() <= around, "closed, but for the letters that are written over it"


def test_a_reference_is_sampled_at_the_centres_of_a_coarser_level(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    voxels = rng.integers(0, 5, (11, 8, 6)).astype(np.uint32)
    level = Level(np.zeros((5, 4, 3), np.uint8), (1.0, 1.0, 1.0))
    found = _sampled(as_mask(voxels, np.eye(4)), level).array
    at = [[int((i + 0.5) * full / n) for i in range(n)] for n, full in zip((5, 4, 3), voxels.shape, strict=True)]
    np.testing.assert_array_equal(found, voxels[np.ix_(*at)])
