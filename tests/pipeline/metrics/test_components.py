"""Pieces and holes counted slab by slab, against scipy.ndimage on the whole volume."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.metrics.components import Components, count_components

SHAPE = (9, 10, 11)


def counted(labels: np.ndarray, rows: int) -> dict[int, Components]:
    slabs = (labels[z : z + rows] for z in range(0, len(labels), rows))
    return count_components(slabs, labels.shape)


def whole(labels: np.ndarray) -> dict[int, Components]:
    """What scipy finds in the whole volume at once."""
    found = {}
    for label in np.unique(labels[labels > 0]):
        where = labels == label
        pieces, count = ndimage.label(where, np.ones((3, 3, 3)))
        gaps, n_gaps = ndimage.label(~where)
        sides = [gaps.take(end, axis) for axis in range(3) if labels.shape[axis] > 1 for end in (0, -1)]
        at_border = {int(gap) for side in sides for gap in np.unique(side)} - {0}
        largest = int(np.bincount(pieces.ravel())[1:].max())
        found[int(label)] = Components(count, largest, n_gaps - len(at_border))
    return found


@settings(max_examples=150)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3).filter(lambda shape: sum(n > 1 for n in shape) >= 2),
    rows=st.integers(1, 6),
    dense=st.sampled_from([0.05, 0.3, 0.6, 0.9]),
    dtype=st.sampled_from([np.uint8, np.uint16, np.uint32]),
    seed=st.integers(0, 10_000),
)
def test_any_labels_any_slabs(shape: tuple[int, ...], rows: int, dense: float, dtype: type, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random(shape) < dense, rng.choice([1, 1, 1, 2, 200], shape), 0).astype(dtype)
    assert counted(labels, rows) == whole(labels)


@settings(max_examples=25)
@given(rows=st.integers(1, 16), seed=st.integers(0, 1000))
def test_winding_structures_that_meet_again_in_later_slabs(rows: int, seed: int) -> None:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(24, 20, 22)), 1.2)
    labels = np.digitize(noise, np.quantile(noise, [0.35, 0.7])).astype(np.uint8)
    assert counted(labels, rows) == whole(labels)


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_shells_one_in_another(rows: int) -> None:
    """A hole is what the structure encloses, whatever label lies in it; a shell with a gap encloses nothing."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:8, 1:8, 1:8] = 1
    labels[2:7, 2:7, 2:7] = 2
    labels[4, 4, 4] = 0
    assert counted(labels, rows) == {1: Components(1, 7**3 - 5**3, 1), 2: Components(1, 5**3 - 1, 1)}
    labels[1, 4, 4] = 0
    assert counted(labels, rows) == {1: Components(1, 7**3 - 5**3 - 1, 0), 2: Components(1, 5**3 - 1, 1)}
    labels[2, 4, 4] = labels[3, 4, 4] = 0
    assert counted(labels, rows)[2] == Components(1, 5**3 - 3, 0)


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_touching_by_a_corner_is_one_piece_and_no_way_out(rows: int) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[2, 2, 2] = labels[3, 3, 3] = labels[4, 2, 4] = 1
    labels[8, 8, 8] = 1
    assert counted(labels, rows)[1] == Components(2, 3, 0)
    box = np.zeros(SHAPE, np.uint8)
    box[2:7, 2:7, 2:7] = 1
    box[3:6, 3:6, 3:6] = 0
    box[2, 2, 2] = 0
    assert counted(box, rows)[1].holes == 1, "its corner is gone, but a hole leaks over faces only"


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("end", [0, -1])
def test_what_reaches_the_border_of_the_image_is_no_hole(axis: int, end: int) -> None:
    labels = np.ones(SHAPE, np.uint8)
    labels[4, 4, 4] = 0
    assert counted(labels, 2)[1].holes == 1
    along = [4, 4, 4]
    along[axis] = slice(None, 5) if end == 0 else slice(4, None)  # type: ignore[call-overload]
    labels[tuple(along)] = 0
    assert counted(labels, 2)[1].holes == 0


def test_a_slice_alone_is_measured_in_its_plane() -> None:
    ring = np.zeros((7, 8), np.uint8)
    ring[1:6, 1:6] = 1
    ring[2:5, 2:5] = 0
    for shape in ((1, 7, 8), (7, 1, 8), (7, 8, 1)):
        assert counted(ring.reshape(shape), 2) == {1: Components(1, 16, 1)}, shape


def test_one_voxel_and_nothing() -> None:
    labels = np.zeros(SHAPE, np.uint8)
    assert counted(labels, 2) == {}
    labels[0, 0, 0] = 3
    assert counted(labels, 2) == {3: Components(1, 1, 0)}
    assert counted(np.ones((1, 1, 1), np.uint8), 1) == {1: Components(1, 1, 0)}


def test_memory_does_not_grow_with_the_length() -> None:
    def taken(length: int) -> int:
        rng = np.random.default_rng(0)
        slabs: Iterator[np.ndarray] = (rng.integers(0, 2, (8, 64, 64)).astype(np.uint8) for _ in range(length // 8))
        tracemalloc.start()
        try:
            count_components(slabs, (length, 64, 64))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    taken(16)  # what is imported and cached at first
    assert taken(256) < 1.2 * taken(64)
