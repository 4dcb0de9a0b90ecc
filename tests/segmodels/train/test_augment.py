"""Spatial changes against SciPy's interpolation, geometry against what it must keep, intensities against statistics."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from segmodels.train.augment import change_intensities, displaced, resample
from segmodels.train.recipe import UNCHANGED, Augment


def only(**changes: object) -> Augment:
    return UNCHANGED.model_copy(update=changes)


def offsets_of(augment: Augment, patch=(8, 10, 12), spacing=(1.0, 1.0, 1.0), flips=(), seed=0) -> np.ndarray | None:
    return displaced(patch, spacing, augment, flips, np.random.default_rng(seed))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 12)] * 3),
    patch=st.tuples(*[st.integers(1, 9)] * 3),
    seed=st.integers(0, 1 << 32),
    reach=st.floats(0.1, 20),
)
def test_resampling_equals_scipy(shape: tuple, patch: tuple, seed: int, reach: float) -> None:
    random = np.random.default_rng(seed)
    image = random.normal(size=(2, *shape)).astype(np.float32)
    labels = random.integers(0, 4, shape).astype(np.uint8)
    centre = [random.uniform(-2, n + 2) for n in shape]
    offsets = random.uniform(-reach, reach, (3, *patch)).astype(np.float32)
    voxels, chosen = resample(image, labels, centre, offsets)
    where = offsets.astype(np.float64) + np.array(centre).reshape(3, 1, 1, 1)
    for channel in range(2):
        expected = map_coordinates(image[channel].astype(np.float64), where, order=1, mode="grid-constant")
        np.testing.assert_allclose(voxels[channel], expected, atol=2e-4)
    nearest = map_coordinates(labels, where, order=0, mode="grid-constant")
    clear = (np.abs(where - np.floor(where) - 0.5) > 1e-3).all(axis=0)  # not half way between two voxels
    np.testing.assert_array_equal(chosen[clear], nearest[clear])


def test_what_is_turned_keeps_its_volume() -> None:
    """Linearly resampled indicators of a ball of radius 5 voxels lose 1.5 % of its volume."""
    near = np.stack(np.meshgrid(*[np.arange(24) - 11.5] * 3, indexing="ij"))
    ball = ((near**2).sum(axis=0) <= 25).astype(np.uint8)
    turning = UNCHANGED.model_copy(update={"rotate": 1.0, "rotate_degrees": 180.0})
    image, centres = ball[None].astype(np.float32), np.random.default_rng(0).uniform(11, 12, (200, 3))
    voxels = [
        resample(image, ball, centre, offsets)[1].sum()
        for seed, centre in enumerate(centres)
        if (offsets := offsets_of(turning, ball.shape, seed=seed)) is not None
    ]
    assert len(voxels) == 200
    assert np.mean(voxels) == pytest.approx(ball.sum(), rel=3e-3)


def test_mirroring_is_numpys_flip() -> None:
    image = np.random.default_rng(0).normal(size=(1, 6, 8, 10)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 3, (6, 8, 10)).astype(np.uint8)
    seen = set()
    for seed in range(20):
        offsets = offsets_of(UNCHANGED, (6, 8, 10), flips=(0, 2), seed=seed)
        if offsets is None:
            continue
        voxels, chosen = resample(image, labels, (2.5, 3.5, 4.5), offsets)
        matches = [
            axes
            for axes in ((0,), (2,), (0, 2))
            if np.allclose(voxels[0], np.flip(image[0], axes), atol=1e-5) and (chosen == np.flip(labels, axes)).all()
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert seen == {(0,), (2,), (0, 2)}


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.5, 1.0)])
def test_a_rotation_keeps_distances_in_millimetres(spacing: tuple) -> None:
    patch = (6, 10, 8)
    offsets = offsets_of(only(rotate=1.0, rotate_degrees=90.0), patch, spacing, seed=3)
    assert offsets is not None
    plain = np.stack(
        np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * s for n, s in zip(patch, spacing, strict=True)], indexing="ij")
    )
    moved = offsets * np.array(spacing).reshape(3, 1, 1, 1)
    np.testing.assert_allclose((moved**2).sum(0), (plain**2).sum(0), rtol=1e-4, atol=1e-4)
    assert np.abs(moved - plain).max() > 0.5


def test_sizes_stay_in_their_range_and_shrink_or_grow_evenly() -> None:
    factors = []
    for seed in range(50):
        offsets = offsets_of(only(scale=1.0, scale_range=(0.5, 2.0)), seed=seed)
        assert offsets is not None
        factors.append(3.5 / offsets[0].max())
        np.testing.assert_allclose(4.5 / offsets[1].max(), factors[-1], rtol=1e-5)
    assert 0.5 <= min(factors) < 0.7
    assert 1.4 < max(factors) <= 2.0


def test_a_plane_stays_in_its_plane() -> None:
    everything = Augment(rotate=1.0, scale=1.0, elastic=1.0)
    for seed in range(5):
        offsets = offsets_of(everything, (1, 16, 16), seed=seed)
        assert offsets is not None
        assert (offsets[0] == 0).all()


def test_deformations_are_smooth_and_of_the_size_that_was_asked() -> None:
    sizes = []
    for seed in range(30):
        offsets = offsets_of(only(elastic=1.0, elastic_mm=4.0), (32, 32, 32), (1.0, 1.0, 2.0), seed=seed)
        assert offsets is not None
        grid = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in (32, 32, 32)], indexing="ij"))
        field = (offsets - grid) * np.array([1, 1, 2]).reshape(3, 1, 1, 1)
        sizes.append(field.std())
        assert np.abs(np.diff(field, axis=1)).max() < 2.0
    assert 0.5 < np.mean(sizes) < 3.0


def test_intensities() -> None:
    random = np.random.default_rng(0)
    image = random.normal(2, 3, (2, 20, 20, 20)).astype(np.float32)
    same = change_intensities(image, UNCHANGED, random)
    np.testing.assert_array_equal(same, image)
    noisy = change_intensities(image, only(noise=1.0, noise_std=(0.5, 0.5)), random)
    assert abs((noisy - image).std() - 0.5) < 0.02
    bright = change_intensities(image, only(brightness=1.0, brightness_range=(1.2, 1.2)), random)
    np.testing.assert_allclose(bright, image * 1.2, rtol=1e-5)
    spread = change_intensities(image, only(contrast=1.0, contrast_range=(0.5, 0.5)), random)
    np.testing.assert_allclose(spread.mean(axis=(1, 2, 3)), image.mean(axis=(1, 2, 3)), atol=1e-3)
    np.testing.assert_allclose(spread.std(axis=(1, 2, 3)), image.std(axis=(1, 2, 3)) / 2, rtol=1e-3)
    for inverted in (0.0, 1.0):
        curved = change_intensities(image, only(gamma=1.0, gamma_range=(1.5, 1.5), gamma_invert=inverted), random)
        np.testing.assert_allclose(curved.mean(axis=(1, 2, 3)), image.mean(axis=(1, 2, 3)), atol=1e-3)
        np.testing.assert_allclose(curved.std(axis=(1, 2, 3)), image.std(axis=(1, 2, 3)), rtol=1e-3)
        order = np.argsort(image[0].ravel())
        assert (np.diff(curved[0].ravel()[order]) >= -1e-4).all()
    assert change_intensities(image, only(blur=1.0, blur_sigma=(1.0, 1.0)), random).std() < image.std() / 2
    low = change_intensities(image, only(low_resolution=1.0, low_resolution_range=(0.5, 0.5)), random)
    assert low.shape == image.shape
    assert low.std() < image.std()
