"""Solids: exact volumes, reaches that bound them, and the share of a voxel that they fill."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import dblquad, quad
from scipy.spatial.transform import Rotation
from solids import AXES, SOLIDS, centers, holds

from pipeline.phantoms import Phantom, Scanner
from pipeline.phantoms.body import Body, Part
from pipeline.phantoms.clearance import DIRECTIONS, depth, separation
from pipeline.phantoms.scanner import Artefacts
from pipeline.phantoms.shapes import Barrel, Capsule, Drum, Ellipsoid, RibPair


def lattice(spacing: float, shift: float = 0.0) -> tuple[np.ndarray, tuple[int, int, int]]:
    """An affine, along no flat face, and a shape that cover 45 mm around the origin."""
    n = math.ceil(100 / spacing)
    affine = np.eye(4)
    affine[:3, :3] = spacing * Rotation.from_euler("xyz", [20, 35, 50], degrees=True).as_matrix()
    affine[:3, 3] = affine[:3, :3] @ np.full(3, -(n - 1) / 2) + shift
    return affine, (n, n, n)


@pytest.mark.parametrize("kind", SOLIDS)
def test_rasterised_volumes_approach_the_exact_one(kind: str) -> None:
    shape = SOLIDS[kind]
    errors = []
    for spacing in (6.0, 0.75):
        counts = [holds(shape, centers(*lattice(spacing, s * spacing))).sum() for s in (0.13, 0.61)]
        errors.append(max(abs(n * spacing**3 / shape.volume_mm3 - 1) for n in counts))
    assert errors[1] < 0.004
    assert errors[1] < max(errors[0] / 2, 0.001)


def test_volumes_are_those_of_closed_formulas() -> None:
    ball = 4 / 3 * math.pi * 10**3
    whole = Ellipsoid((1.0, 2.0, 3.0), (10.0, 20.0, 5.0), AXES)
    assert whole.volume_mm3 == pytest.approx(ball)
    half = Ellipsoid((1.0, 2.0, 3.0), (10.0, 20.0, 5.0), AXES, ((0.0, 0.0, 1.0), 3.0))
    assert half.volume_mm3 == pytest.approx(ball / 2)
    untouched = Ellipsoid((0.0, 0.0, 0.0), (10.0, 10.0, 10.0), AXES, ((0.0, 0.0, 1.0), 10.5))
    assert untouched.volume_mm3 == pytest.approx(ball)
    cap = Ellipsoid((0.0, 0.0, 0.0), (10.0, 10.0, 10.0), AXES, ((0.0, 0.0, 1.0), -7.0))
    assert cap.volume_mm3 == pytest.approx(math.pi * 3**2 * (3 * 10 - 3) / 3)  # of height 3
    assert Capsule((0.0, 0.0, 0.0), (3.0, 4.0, 0.0), 2.0).volume_mm3 == pytest.approx(math.pi * (4 * 5 + 32 / 3))
    assert Drum((0.0, 0.0, 0.0), (3.0, 4.0), 5.0).volume_mm3 == pytest.approx(120 * math.pi)


def test_volumes_are_those_of_integrals() -> None:
    barrel = Barrel((0.0, 0.0, 0.0), (150.0, 110.0, 170.0))
    slices, _ = quad(lambda t: math.pi * 150 * 110 * 170 * (1 - abs(t) ** 8) ** 0.25, -1, 1)
    assert barrel.volume_mm3 == pytest.approx(slices, rel=1e-6)
    ribs = RibPair((0.0, 0.0, 0.0), (120.0, 80.0), (129.0, 88.0), 6.0, 0.3, 26.0)

    def quarter(a: float, b: float) -> float:
        area, _ = dblquad(lambda y, x: 1.0, ribs.gap, a, 0, lambda x: b * math.sqrt(max(0.0, 1 - (x / a) ** 2)))
        return float(area)

    assert ribs.volume_mm3 == pytest.approx(12 * 4 * (quarter(129, 88) - quarter(120, 80)), rel=1e-6)


@pytest.mark.parametrize("kind", SOLIDS)
def test_a_solid_reaches_as_far_as_it_says(kind: str) -> None:
    """Exactly, but for ribs: theirs is the reach of the whole disc that they are cut from."""
    shape = SOLIDS[kind]
    points = centers(*lattice(1.5))
    inside = points[holds(shape, points)]
    reach = shape.support(DIRECTIONS)
    assert (inside @ DIRECTIONS.T).max(0) == pytest.approx(reach, abs=np.inf if kind == "ribs" else 3)
    assert ((inside @ DIRECTIONS.T).max(0) <= reach + 1e-9).all()


def test_separation_and_depth_are_distances() -> None:
    near, far = Capsule((0.0, 0.0, 0.0), (0.0, 0.0, 30.0), 5.0), Capsule((20.0, 9.0, -10.0), (20.0, 9.0, 40.0), 6.0)
    assert 0.9 * (math.hypot(20, 9) - 11) < separation(near, far) <= math.hypot(20, 9) - 11 + 1e-9
    assert separation(near, far) == pytest.approx(separation(far, near))
    assert separation(near, Capsule((8.0, 0.0, 0.0), (8.0, 0.0, 30.0), 5.0)) < 0
    ball = Ellipsoid((10.0, 0.0, 0.0), (4.0, 4.0, 4.0))
    hull = Ellipsoid((0.0, 0.0, 0.0), (20.0, 20.0, 20.0))
    assert depth(ball, hull) == pytest.approx(6, abs=0.05)
    assert depth(hull, ball) < 0


# --------------------------------------------------------------------------------------- the share of a voxel


OBLIQUE = np.array([[4.2, 1.1, -0.9, -48.13], [-0.8, 3.1, 1.8, -46.29], [0.7, -0.9, 5.6, -47.31], [0, 0, 0, 1]])


def alone(kind: str, affine: np.ndarray, shape: tuple[int, int, int]) -> Phantom:
    """One solid of 1000 HU above the air's, without noise."""
    plain = Artefacts((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), ())
    return Phantom(0, shape, affine, Scanner(0, 0, 0), Body((Part("liver", "", 0.0, SOLIDS[kind]),), plain))


def shares(kind: str, affine: np.ndarray, shape: tuple[int, int, int], cuts: int = 8) -> np.ndarray:
    """The share of each voxel's `cuts`^3 points that a solid holds."""
    total = np.zeros(shape)
    for k in np.ndindex(cuts, cuts, cuts):
        offset = affine.copy()
        offset[:3, 3] += affine[:3, :3] @ ((np.array(k) + 0.5) / cuts - 0.5)
        total += holds(SOLIDS[kind], centers(offset, shape))
    return total / cuts**3


@pytest.mark.parametrize("kind", SOLIDS)
def test_a_voxel_shows_the_share_that_a_solid_fills(kind: str) -> None:
    """Against 512 points a voxel. The worst voxels are at edges; ribs are no two voxels thick here."""
    shape = (17, 25, 23)
    image, mask = alone(kind, OBLIQUE, shape).region()
    share = shares(kind, OBLIQUE, shape, 8)
    error = (image.astype(float) + 1000) / 1000 - share
    cut = (share > 0) & (share < 1)
    assert cut.sum() > 200
    assert np.abs(error[~cut]).max() < 0.25
    assert np.abs(error[cut]).mean() < 0.05
    edges = {"mostly cut away": 0.04, "drum": 0.02, "ribs": 0.1}
    assert abs(error.sum() / share.sum()) < edges.get(kind, 0.006)
    np.testing.assert_array_equal(mask, holds(SOLIDS[kind], centers(OBLIQUE, shape)))


@pytest.mark.parametrize("kind", SOLIDS)
@pytest.mark.parametrize("affine", [OBLIQUE, np.diag([3.0, 3.0, 3.0, 1.0]), np.diag([-30.0, 25.0, 40.0, 1.0])])
def test_no_voxel_is_touched_outside_the_box_that_a_solid_is_looked_for_in(kind: str, affine: np.ndarray) -> None:
    shape = (24, 20, 28)
    affine = affine.copy()
    affine[:3, 3] = -affine[:3, :3] @ [13.2, 9.6, 11.9]
    one = alone(kind, affine, shape)
    image, mask = one.region()
    everywhere = one.__dict__["_bounded"][0][0], type(one._bounded[0][1])((0, 0, 0), shape)
    one.__dict__["_bounded"] = [everywhere]  # as if nothing were left out
    slow_image, slow_mask = one.region()
    np.testing.assert_array_equal(image, slow_image)
    np.testing.assert_array_equal(mask, slow_mask)
