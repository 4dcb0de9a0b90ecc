"""Measurements of structures against scipy.ndimage, whatever shards they were summed over."""

from __future__ import annotations

import json
import math
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.grid import Shards, Triple
from pipeline.metrics.components import count_components
from pipeline.metrics.structures import merge_shards, shard_statistics, structure_rows

OBLIQUE = np.array([[-0.9, 0.1, 0.3, 12.0], [0.2, 1.1, -0.2, -7.5], [0.1, -0.3, 2.9, 40.25], [0, 0, 0, 1.0]])
NAMES = {1: "one", 2: "two", 7: "seven", 300: "three hundred"}


def blobs(shape: Triple = (13, 17, 19), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels (some in one piece, some scattered, one absent) and an image, (z, y, x)."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint16)
    labels[2:6, 3:9, 4:12] = 1
    labels[rng.random(shape) < 0.05] = 2
    labels[-1, -1, -1] = 300
    return labels, rng.normal(1000, 200, shape).astype(np.float32)


def measured(
    labels: np.ndarray, image: np.ndarray, shard: Triple, affine: np.ndarray = OBLIQUE
) -> dict[int, dict[str, Any]]:
    """Rows by label, from shards of this size; each shard's sums go through JSON, as markers do."""
    shards = Shards(labels.shape, shard)
    statistics = []
    for index in shards.indices():
        box = shards.box(index)
        inside = labels[box.slices]
        intensity = image[box.slices] if inside.any() else None
        statistics.append(json.loads(json.dumps(shard_statistics(inside, intensity, box.start))))
    components = count_components([labels], labels.shape)
    rows = structure_rows(merge_shards(statistics), components, NAMES, labels.shape, affine)
    assert [row["structure"] for row in rows] == list(NAMES.values())
    return {row["label"]: row for row in rows}


def check(row: dict[str, Any], labels: np.ndarray, image: np.ndarray, affine: np.ndarray) -> None:
    """One row against scipy's measures of the whole volume."""
    label, where = row["label"], labels == row["label"]
    assert row["voxels"] == int(where.sum())
    assert row["volume_ml"] == pytest.approx(where.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000)
    wide = image.astype(np.float64)
    assert row["mean"] == pytest.approx(ndimage.mean(wide, labels, label), rel=1e-9)
    assert row["std"] == pytest.approx(ndimage.standard_deviation(wide, labels, label), rel=1e-6, abs=1e-6)
    z, y, x = ndimage.center_of_mass(where)
    centroid = nib.affines.apply_affine(affine, (x, y, z))
    assert [row[f"centroid_{a}_mm"] for a in "xyz"] == pytest.approx(centroid.tolist(), abs=1e-9)
    (box,) = ndimage.find_objects(where.astype(int))
    for axis, bounds in zip("zyx", box, strict=True):
        assert (row[f"bbox_{axis}_min"], row[f"bbox_{axis}_max"]) == (bounds.start, bounds.stop)
    pieces, count = ndimage.label(where, np.ones((3, 3, 3)))
    largest = np.bincount(pieces.ravel())[1:].max() * abs(np.linalg.det(affine[:3, :3])) / 1000
    assert (row["components"], row["largest_component_ml"]) == (count, pytest.approx(largest))
    faces = [where.take(end, axis).any() for axis in range(3) if where.shape[axis] > 1 for end in (0, -1)]
    assert row["touches_border"] == any(faces)


@pytest.mark.parametrize("shard", [(13, 17, 19), (8, 8, 8), (5, 6, 7), (1, 17, 4)])
def test_measures_are_scipys(shard: Triple) -> None:
    labels, image = blobs()
    rows = measured(labels, image, shard)
    for label in (1, 2, 300):
        check(rows[label], labels, image, OBLIQUE)


@settings(max_examples=30)
@given(
    shape=st.tuples(*[st.integers(1, 12)] * 3),
    shard=st.tuples(*[st.integers(1, 9)] * 3),
    seed=st.integers(0, 50),
    dtype=st.sampled_from([np.uint8, np.int16, np.int32, np.float32, np.float64]),
)
def test_any_labels_any_shards(shape: Triple, shard: Triple, seed: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.choice(np.array([0, 0, 1, 2, 7, 300], np.uint16), shape)
    image = rng.normal(100, 30, shape).clip(0, 255).astype(dtype)
    for row in measured(labels, image, shard).values():
        if (labels == row["label"]).any():
            check(row, labels, image, OBLIQUE)
        else:
            assert row["voxels"] == 0


def test_what_is_not_there_has_no_measures() -> None:
    row = measured(*blobs(), (8, 8, 8))[7]
    assert (row["voxels"], row["volume_ml"], row["touches_border"]) == (0, 0.0, False)
    assert (row["components"], row["largest_component_ml"], row["holes"]) == (0, 0.0, 0)
    assert all(row[name] is None for name in row if name.startswith(("centroid", "bbox")) or name in ("mean", "std"))


def test_one_voxel() -> None:
    labels = np.zeros((5, 6, 7), np.uint8)
    labels[2, 3, 4] = 1
    row = measured(labels, np.full(labels.shape, 42.5), (2, 2, 2), np.diag([2.0, 3.0, 4.0, 1.0]))[1]
    assert (row["voxels"], row["mean"], row["std"]) == (1, 42.5, 0.0)
    assert row["volume_ml"] == pytest.approx(0.024)
    assert [row[f"centroid_{a}_mm"] for a in "xyz"] == [8.0, 9.0, 8.0]
    assert [row[f"bbox_{a}_min"] for a in "xyz"] == [4, 3, 2]
    assert not row["touches_border"]


@pytest.mark.parametrize("at", [(0, 3, 3), (4, 3, 3), (2, 0, 3), (2, 5, 3), (2, 3, 0), (2, 3, 6)])
def test_each_face_is_a_border(at: Triple) -> None:
    labels = np.zeros((5, 6, 7), np.uint8)
    labels[at] = 1
    assert measured(labels, np.ones(labels.shape), (4, 4, 4))[1]["touches_border"]


def test_a_sum_far_from_zero_keeps_its_deviation() -> None:
    labels, image = blobs()
    shifted = image.astype(np.float64) + 1e9
    row = measured(labels, shifted, (4, 4, 4))[1]
    assert row["std"] == pytest.approx(shifted[labels == 1].std(), rel=1e-6)


def test_background_needs_no_intensity() -> None:
    assert shard_statistics(np.zeros((2, 2, 2), np.uint8), None, (0, 0, 0)) == {}
    assert merge_shards([{}, {}]) == {}


def test_the_order_in_which_blocks_ended_does_not_matter() -> None:
    """Markers are read in raster order: the same sums to the last bit, however often a block ran."""
    labels, image = blobs()
    first, second = (measured(labels, image, (5, 6, 7)) for _ in range(2))
    assert first == second
    assert all(math.isfinite(first[1][name]) for name in ("mean", "std", "volume_ml"))
