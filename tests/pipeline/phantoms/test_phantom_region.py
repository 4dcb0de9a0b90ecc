"""Regions: the same bits whatever is asked for, in bounded memory, in the right place, of the stated intensities."""

from __future__ import annotations

import itertools
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation
from solids import centers

from pipeline.errors import StudyError, UsageError
from pipeline.grid import Box
from pipeline.phantoms import LABELS, Phantom, Scanner, phantom
from pipeline.phantoms import scanner as scanning

CLEAN = Scanner(0, 0, 0)
CODES = ["".join(code) for axes in itertools.permutations(["RL", "AP", "SI"]) for code in itertools.product(*axes)]


def oblique(shape: tuple[int, int, int] = (41, 47, 139), seed: int = 9) -> Phantom:
    turn = np.array([[2.2, 1.5, 0.8], [-1.0, 5.2, -1.4], [-0.7, 1.0, 7.1]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn, -turn @ [(n - 1) / 2 for n in reversed(shape)]
    return phantom(seed, shape, affine=affine)


@pytest.fixture(scope="module")
def whole() -> dict[str, tuple[Phantom, np.ndarray, np.ndarray]]:
    phantoms = {"straight": phantom(4, (41, 47, 139), spacing_mm=(9, 6, 2.7)), "oblique": oblique()}
    return {name: (one, *one.region()) for name, one in phantoms.items()}


# ---------------------------------------------------------------------------------------------------------- any region


@pytest.mark.parametrize("kind", ["straight", "oblique"])
@settings(max_examples=15)
@given(data=st.data())
def test_a_voxel_has_the_same_bits_in_any_box(kind: str, whole: dict[str, tuple], data: st.DataObject) -> None:
    one, image, mask = whole[kind]
    ends = [sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2))) for n in one.shape]
    box = Box(*zip(*ends, strict=True))  # type: ignore[arg-type]
    part_image, part_mask = one.region(box)
    assert (part_image.dtype, part_mask.dtype) == (np.int16, np.uint8)
    np.testing.assert_array_equal(part_image, image[box.slices])
    np.testing.assert_array_equal(part_mask, mask[box.slices])


@pytest.mark.parametrize("kind", ["straight", "oblique"])
def test_slabs_and_single_voxels_make_up_the_whole(kind: str, whole: dict[str, tuple]) -> None:
    one, image, mask = whole[kind]
    rows = [one.region(Box((z, 0, 0), (z + 1, *one.shape[1:]))) for z in range(one.shape[0])]
    np.testing.assert_array_equal(np.concatenate([r[0] for r in rows]), image)
    np.testing.assert_array_equal(np.concatenate([r[1] for r in rows]), mask)
    for z, y, x in np.random.default_rng(0).integers(0, one.shape, (40, 3)).tolist():
        hu, label = one.region(Box((z, y, x), (z + 1, y + 1, x + 1)))
        assert (hu.item(), label.item()) == (image[z, y, x], mask[z, y, x])


def test_a_region_of_a_huge_phantom_is_made_without_the_rest() -> None:
    one = phantom(6, (2048, 2048, 2048))
    assert one.whole == frozenset(LABELS.values())
    box = Box((900, 1000, 0), (903, 1200, 2048))
    phantom(0, (4, 4, 4)).region()  # what is loaded once
    tracemalloc.start()
    image, mask = one.region(box)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < image.nbytes + mask.nbytes + 20 * 2**20
    assert len(np.unique(mask)) > 3
    inner = Box((901, 1100, 777), (902, 1101, 1300))
    np.testing.assert_array_equal(one.region(inner)[0], image[1:2, 100:101, 777:1300])


def test_a_box_outside_is_refused() -> None:
    one = phantom(0, (8, 8, 8))
    for start, stop in [((0, 0, 0), (9, 8, 8)), ((-1, 0, 0), (8, 8, 8)), ((4, 0, 0), (2, 8, 8))]:
        with pytest.raises(UsageError, match="not inside"):
            one.region(Box(start, stop))
    assert one.region(Box((3, 3, 3), (3, 8, 8)))[0].shape == (0, 5, 5)


# ------------------------------------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize("tilt", [(5.0, 4.0, 3.0), (-20.0, 35.0, 80.0)])
def test_a_tilted_lattice_shows_the_same_body(tilt: tuple[float, float, float]) -> None:
    shape, spacing = (150, 120, 140), np.array([4.0, 3.5, 3.0])
    one = phantom(6, shape, spacing_mm=spacing[::-1].tolist(), tilt_degrees=tilt)
    turned = Rotation.from_euler("zyx", tilt, degrees=True).as_matrix()  # about the body's axes, one after the other
    np.testing.assert_allclose(one.affine[:3, :3], turned @ np.diag(spacing), atol=1e-12)
    middle = one.affine @ [*((n - 1) / 2 for n in shape[::-1]), 1]
    np.testing.assert_allclose(middle, [0, 0, 0, 1], atol=1e-12)
    _, mask = one.region()
    voxel_ml = float(np.prod(spacing)) / 1000
    for label, name in LABELS.items():
        if name in one.whole:
            assert (mask == label).sum() * voxel_ml == pytest.approx(one.volumes_ml[name], rel=0.03)
    assert {"liver", "lungs", "kidneys"} <= one.whole
    assert phantom(6, (96, 96, 96), tilt_degrees=tilt).whole == frozenset(LABELS.values())  # the default spacing


@pytest.mark.parametrize("code", CODES)
def test_all_orientations_show_the_same_body(code: str) -> None:
    """nibabel turns each of the 48 back to RAS."""
    counts, sizes = {"R": 37, "A": 30, "S": 33}, {"R": 10.3, "A": 9.1, "S": 11.7}
    axes = [c if c in "RAS" else {"L": "R", "P": "A", "I": "S"}[c] for c in code]
    shape, spacing = [counts[a] for a in reversed(axes)], [sizes[a] for a in reversed(axes)]
    one = phantom(2, shape, spacing_mm=spacing, orientation=code, scanner=Scanner(0, 8, 35))
    assert "".join(nib.aff2axcodes(one.affine)) == code
    straight = phantom(2, (33, 30, 37), spacing_mm=(11.7, 9.1, 10.3), scanner=Scanner(0, 8, 35))
    for got, expected in zip(one.region(), straight.region(), strict=True):
        turned = nib.as_closest_canonical(nib.Nifti1Image(got.transpose(2, 1, 0), one.affine))
        np.testing.assert_allclose(turned.affine, straight.affine, atol=1e-9)
        difference = np.asarray(turned.dataobj).astype(int) - expected.transpose(2, 1, 0)
        assert np.abs(difference).max() <= (0 if got.dtype == np.uint8 else 1)


def test_structures_stay_where_they_are_on_any_lattice() -> None:
    """Centroids in patient millimetres, through the affine, on isotropic, anisotropic and oblique lattices."""
    found = []
    anisotropic = phantom(8, (77, 96, 192), spacing_mm=(5, 3, 2), orientation="LPS")
    for one in (phantom(8), anisotropic, oblique((70, 80, 230), 8)):
        mask, points = one.region()[1], centers(one.affine, one.shape)
        found.append([points[mask == value].mean(0) for value in LABELS])
        assert one.whole == frozenset(LABELS.values())
    np.testing.assert_allclose(found[1], found[0], atol=0.6)
    np.testing.assert_allclose(found[2], found[0], atol=0.9)
    centroids = dict(zip(LABELS.values(), found[0], strict=True))
    assert centroids["liver"][0] > 30  # right
    assert centroids["spleen"][0] < -60  # left
    assert centroids["lungs"][2] > 20  # above
    assert centroids["bones"][1] < centroids["liver"][1]  # behind


def test_structures_that_leave_the_field_of_view_are_named() -> None:
    assert phantom(1, (10, 10, 10), spacing_mm=10).whole < frozenset(LABELS.values())
    upper = phantom(1, affine=np.array([[3, 0, 0, -190], [0, 3, 0, -142], [0, 0, 3, 20], [0, 0, 0, 1.0]]))
    assert "kidneys" not in upper.whole
    assert "body" not in upper.whole
    mask = phantom(1).region()[1]
    assert not mask[[0, -1]].any()
    assert not mask[:, [0, -1]].any()
    assert not mask[..., [0, -1]].any()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"shape": (4, 4)}, "shape"),
        ({"shape": (4, 4, 0)}, "shape"),
        ({"shape": (4, 4, 10**6)}, "shape"),
        ({"spacing_mm": 0}, "spacing"),
        ({"spacing_mm": (1, 1)}, "spacing"),
        ({"spacing_mm": (1, 1, float("nan"))}, "spacing"),
        ({"orientation": "RAR"}, "orientation"),
        ({"orientation": "RA"}, "orientation"),
        ({"tilt_degrees": (1, 2)}, "three angles"),
        ({"affine": np.eye(4), "spacing_mm": 2}, "affine"),
        ({"affine": np.eye(4), "tilt_degrees": (1, 2, 3)}, "affine"),
    ],
)
def test_what_makes_no_phantom_is_refused(bad: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        phantom(**{"seed": 0, **bad})


def test_an_affine_that_places_no_voxels_is_refused() -> None:
    with pytest.raises(StudyError, match="singular"):
        phantom(0, affine=np.diag([1.0, 0.0, 1.0, 1.0]))


# --------------------------------------------------------------------------------------------------------- intensities


def test_a_structure_has_its_density_inside() -> None:
    one = phantom(12, scanner=CLEAN)
    image, mask = one.region()
    for value, name in LABELS.items():
        if name in ("liver", "spleen", "lungs", "vessels", "lesions"):
            inside = ndimage.binary_erosion(mask == value, iterations=1 if name == "lesions" else 2)
            hu = {round(p.hu) for p in one.body.parts if p.structure == name}
            assert set(np.unique(image[inside])) == hu, name
    assert image[0, 0, 0] == -1000


def test_mixed_voxels_keep_the_whole_mass() -> None:
    """The sum of the image over air, times the voxel, hardly changes with its size."""
    mass = {}
    for spacing in (6, 3, 1.5):
        size = [round(n / spacing) for n in (384, 288, 384)]
        image, _ = phantom(12, size, spacing_mm=spacing, scanner=CLEAN).region()
        mass[spacing] = (image.astype(float) + 1000).sum() * spacing**3
    assert mass[3] == pytest.approx(mass[1.5], rel=0.002)
    assert mass[6] == pytest.approx(mass[1.5], rel=0.006)


def test_noise_is_white_and_as_strong_as_stated() -> None:
    noisy, clean = (phantom(3, scanner=s).region()[0].astype(float) for s in (Scanner(15, 0, 0), CLEAN))
    noise = noisy - clean
    assert noise.mean() == pytest.approx(0, abs=0.05)
    assert noise.std() == pytest.approx(15, rel=0.005)
    assert (noise**4).mean() / noise.var() ** 2 == pytest.approx(3, abs=0.05)
    for axis in range(3):
        for step in (1, 2, 8, 32):
            moved = np.roll(noise, step, axis)
            assert abs((noise * moved).mean()) / noise.var() < 0.005
    other = phantom(4, scanner=Scanner(15, 0, 0)).region()[0] - phantom(4, scanner=CLEAN).region()[0]
    assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.005


def test_noise_is_splitmix64() -> None:
    """The first numbers of the sequence from 1234567, as its authors' C code gives them."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    got = scanning._splitmix(np.array(1234567, np.uint64), np.arange(4, dtype=np.uint64))
    assert got.tolist() == expected


def test_drift_and_streaks_are_as_strong_as_stated_and_smooth() -> None:
    clean = phantom(3, scanner=CLEAN).region()[0].astype(float)
    drift = phantom(3, scanner=Scanner(0, 20, 0)).region()[0] - clean
    assert 1 < np.abs(drift).max() <= 20.5
    assert max(np.abs(np.diff(drift, axis=a)).max() for a in range(3)) <= 2
    streaks = phantom(3, scanner=Scanner(0, 0, 40)).region()[0] - clean
    assert streaks.min() < -15
    assert streaks.max() > 15
    assert np.median(np.abs(streaks)) <= 1
