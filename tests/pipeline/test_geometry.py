"""Affines: what is refused, and where voxels lie."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest

from pipeline import geometry
from pipeline.errors import StudyError

OBLIQUE = np.array([[-0.9, 0.1, 0.3, 12.0], [0.2, 1.1, -0.2, -7.5], [0.1, -0.3, 2.9, 40.25], [0, 0, 0, 1.0]])


def orientations() -> list[np.ndarray]:
    """All 48 ways to lay voxel axes on patient axes, with three different spacings."""
    affines = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((-1, 1), repeat=3):
            affine = np.eye(4)
            affine[:3, :3] = 0
            for voxel_axis, (axis, sign, size) in enumerate(zip(order, signs, (0.7, 1.3, 2.9), strict=True)):
                affine[axis, voxel_axis] = sign * size
            affine[:3, 3] = (-3.5, 20.0, 7.25)
            affines.append(affine)
    return affines


def test_there_are_48_orientations_and_all_pass() -> None:
    codes = {nib.aff2axcodes(geometry.check_affine(affine)) for affine in orientations()}
    assert len(codes) == 48


@pytest.mark.parametrize("affine", [OBLIQUE, *orientations()[::7]])
def test_spacing_and_world_equal_nibabel(affine: np.ndarray) -> None:
    assert np.allclose(geometry.spacing_of(affine), nib.affines.voxel_sizes(affine), rtol=1e-12)
    zyx = np.array([[0, 0, 0], [3, 1, 2], [4.5, 0.25, 11]])
    assert np.allclose(geometry.to_world(affine, zyx), nib.affines.apply_affine(affine, zyx[:, ::-1]))
    assert np.allclose(geometry.to_world(affine, (3, 1, 2)), nib.affines.apply_affine(affine, (2, 1, 3)))


def test_voxel_volume_of_sheared_axes() -> None:
    sheared = np.array([[1, 0.5, 0, 0], [0, 2, 0.5, 0], [0, 0, 3, 0], [0, 0, 0, 1.0]])
    assert geometry.voxel_volume_mm3(sheared) == pytest.approx(6.0)


def test_corners_are_the_corner_voxels() -> None:
    found = geometry.corners(OBLIQUE, (2, 3, 4))
    expected = [nib.affines.apply_affine(OBLIQUE, p) for p in itertools.product((0, 3), (0, 2), (0, 1))]
    assert found.shape == (8, 3)
    assert {tuple(np.round(p, 9)) for p in found} == {tuple(np.round(p, 9)) for p in expected}


def test_furthest_corner_sees_a_turn_that_the_origin_does_not() -> None:
    turned = OBLIQUE.copy()
    turned[:3, 0] += (0.01, 0, 0)
    assert geometry.furthest_corner_mm(OBLIQUE, turned, (1, 1, 101)) == pytest.approx(1.0)
    assert geometry.furthest_corner_mm(OBLIQUE, turned, (9, 9, 1)) == pytest.approx(0.0)


def test_ome_scale_and_translation_there_and_back() -> None:
    affine = geometry.affine_from_ome((3.0, 2.0, 1.0), (30.0, 20.0, 10.0))
    assert np.array_equal(affine @ (1, 1, 1, 1), (11, 22, 33, 1))
    assert geometry.ome_scale(affine) == (3.0, 2.0, 1.0)
    assert geometry.ome_translation(affine) == (30.0, 20.0, 10.0)


def _with(row: int, column: int, value: float) -> np.ndarray:
    affine = OBLIQUE.copy()
    affine[row, column] = value
    return affine


FLAT = OBLIQUE.copy()
FLAT[:3, 2] = FLAT[:3, 0] + 2 * FLAT[:3, 1]
NEARLY_FLAT = FLAT + np.diag([0, 0, 1e-5, 0])
NO_LENGTH = OBLIQUE.copy()
NO_LENGTH[:3, 1] = 0


@pytest.mark.parametrize(
    ("affine", "says"),
    [
        (None, "missing"),
        (np.eye(3), "shape"),
        (_with(0, 0, np.nan), "NaN"),
        (_with(1, 3, np.inf), "infinite"),
        (_with(3, 0, 1.0), "last row"),
        (FLAT, "one plane"),
        (NEARLY_FLAT, "one plane"),
        (NO_LENGTH, "singular"),
        (np.zeros((4, 4)), "last row"),
        (np.diag([1e-9, 1, 1, 1]), "singular"),
        (np.diag([1e300, 1, 1, 1]), "singular"),
    ],
)
def test_what_places_no_voxels_is_refused(affine: np.ndarray | None, says: str) -> None:
    with pytest.raises(StudyError, match=says) as refused:
        geometry.check_affine(affine)
    assert refused.value.cause == "geometry"
