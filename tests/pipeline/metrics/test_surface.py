"""Surface scores against MONAI, against answers that can be worked out, and within the memory they were given."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_helpers import mask_of
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage

from pipeline.metrics.surface import HELD_BYTES, WORK_BYTES, Scores, surface_scores

ROOM = 1 << 30
SHAPE = (20, 22, 24)
NONE = {"hd95_mm": None, "asd_mm": None, "surface_dice": None}


def scored(ours: np.ndarray, theirs: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.0, 1.0), **facts: Any) -> Scores:
    """Scores of label 1 of two masks (z, y, x); spacing along z, y, x."""
    affine, rows = facts.pop("affine", np.diag([*spacing[::-1], 1.0])), facts.pop("rows", 4)
    settings = {"binary_255": False, "room": ROOM} | facts
    found, too_large = surface_scores(
        mask_of(ours.astype(np.uint8), affine, rows), mask_of(theirs.astype(np.uint8), affine, rows), [1], **settings
    )
    assert not too_large
    return found[1]


def monais(ours: np.ndarray, theirs: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> list[float]:
    """MONAI's three scores of every label above 0, in one list."""
    classes = range(int(max(ours.max(), theirs.max())) + 1)
    hot = [torch.from_numpy(np.stack([m == k for k in classes])[None].astype(np.float32)) for m in (ours, theirs)]
    facts: dict[str, Any] = {"spacing": list(spacing)}
    with warnings.catch_warnings(action="ignore"):  # of what is empty
        hd95 = compute_hausdorff_distance(*hot, percentile=95, **facts)[0]
        asd = compute_average_surface_distance(*hot, symmetric=True, **facts)[0]
        dice = compute_surface_dice(*hot, [tolerance] * (len(classes) - 1), use_subvoxels=False, **facts)[0]
    return [float(v) for label in zip(hd95, asd, dice, strict=True) for v in label]


def ball(radius: float, centre: tuple[float, ...], spacing: tuple[float, ...], shape: Any = SHAPE) -> np.ndarray:
    at = np.indices(shape, float) - np.reshape(centre, (3, 1, 1, 1))
    inside: np.ndarray = ((at * np.reshape(spacing, (3, 1, 1, 1))) ** 2).sum(0) <= radius**2
    return inside


def box(*corners: tuple[int, int], shape: Any = SHAPE) -> np.ndarray:
    inside = np.zeros(shape, bool)
    inside[tuple(slice(a, b) for a, b in corners)] = True
    return inside


@settings(max_examples=60)
@given(
    shape=st.tuples(*[st.integers(2, 14)] * 3),
    spacing=st.tuples(*[st.sampled_from([0.4, 0.75, 1.0, 1.3, 3.0])] * 3),
    tolerance=st.sampled_from([0.0, 0.5, 1.0, 2.6]),
    rows=st.integers(1, 15),
    blur=st.sampled_from([0.0, 0.7, 1.5]),
    seed=st.integers(0, 10_000),
)
def test_scores_are_monais(
    shape: tuple[int, ...], spacing: tuple[float, ...], tolerance: float, rows: int, blur: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    first = ndimage.gaussian_filter(rng.normal(size=shape), blur)
    second = first + rng.choice([0.1, 1.0]) * first.std() * rng.normal(size=shape)
    cuts = np.quantile(first, [0.6, 0.85])
    ours, theirs = (np.digitize(field, cuts).astype(np.uint8) for field in (first, second))
    affine = np.diag([*spacing[::-1], 1.0])
    found, too_large = surface_scores(
        mask_of(ours, affine, rows), mask_of(theirs, affine, rows), [1, 2],
        binary_255=False, room=ROOM, tolerance_mm=tolerance,
    )  # fmt: skip
    assert not too_large
    flat = [found[label][name] for label in (1, 2) for name in NONE]
    expected = monais(ours, theirs, spacing, tolerance)
    for mine, its in zip(flat, expected, strict=False):  # a label that occurs in neither is not among MONAI's
        # MONAI says inf for what is empty in one mask, and NaN in both. Its percentile is float32: between distances of
        # 0 and 0.4 it was 4e-6 off.
        assert mine == pytest.approx(its, rel=1e-5, abs=1e-4) if math.isfinite(its) else mine is None


@pytest.mark.parametrize("shift", [(3, 0, 0), (0, 2, 0), (0, 0, 5)])
def test_a_box_beside_itself(shift: tuple[int, int, int]) -> None:
    """Every voxel of the face that moved away is one step off, the other way round too."""
    spacing = (2.0, 0.5, 1.5)
    ours = box((4, 10), (5, 12), (6, 14))
    theirs = np.roll(ours, shift, (0, 1, 2))
    step = math.sqrt(sum((n * s) ** 2 for n, s in zip(shift, spacing, strict=True)))
    found = scored(ours, theirs, spacing, tolerance_mm=step)
    assert found["hd95_mm"] == pytest.approx(step)
    assert found["surface_dice"] == 1.0, "the tolerance itself is within"
    assert 0 < (found["asd_mm"] or 0) < step
    assert scored(ours, theirs, spacing, tolerance_mm=step * 0.999)["surface_dice"] < 1.0  # type: ignore[operator]


def test_two_voxels() -> None:
    found = scored(box((2, 3), (3, 4), (4, 5)), box((5, 6), (7, 8), (4, 5)), (1.0, 1.0, 2.0))
    assert found == {"hd95_mm": 5.0, "asd_mm": 5.0, "surface_dice": 0.0}


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.5, 0.6)])
def test_spheres_one_in_another(spacing: tuple[float, ...]) -> None:
    """Radii 8 and 5 mm: every distance is 3 mm but for the width of a voxel."""
    shape, centre = (44, 44, 44), (21.5, 21.5, 21.5)
    inner, outer = (ball(radius, centre, spacing, shape) for radius in (5.0, 8.0))
    found = scored(inner, outer, spacing, tolerance_mm=3 - max(spacing))
    assert found["hd95_mm"] == pytest.approx(3, abs=max(spacing))
    assert found["asd_mm"] == pytest.approx(3, abs=max(spacing) / 2)
    assert found["surface_dice"] == pytest.approx(0, abs=0.05)
    assert scored(inner, outer, spacing, tolerance_mm=3 + max(spacing))["surface_dice"] == 1.0


def test_a_sphere_moved_by_four() -> None:
    """In units of the shift the distance at angle t is |cos t| for small shifts: its mean is 1/2, its 95 % 0.95."""
    shape = (70, 70, 74)
    ours, theirs = (ball(30, (34.5, 34.5, x), (1, 1, 1), shape) for x in (34.5, 38.5))
    found = scored(ours, theirs)
    assert found["asd_mm"] == pytest.approx(2.0, abs=0.25)
    assert found["hd95_mm"] == pytest.approx(3.8, abs=0.25)


def test_the_border_of_the_image_is_surface() -> None:
    full = np.ones((5, 6, 7), bool)
    core = box((1, 4), (1, 5), (1, 6), shape=(5, 6, 7))
    found = scored(full, core, rows=2)
    assert found["asd_mm"] == pytest.approx(monais(full, core, (1, 1, 1), 1.0)[1], rel=1e-5)
    assert found["asd_mm"] > 1.0  # type: ignore[operator]


def test_a_slice_alone_is_measured_in_its_plane() -> None:
    """As MONAI does with two axes: a contour, not a plate that is all surface."""
    rng = np.random.default_rng(3)
    ours, theirs = (ndimage.gaussian_filter(rng.normal(size=(30, 40)), 3) > 0 for _ in range(2))
    expected = monais(ours.astype(int), theirs.astype(int), (0.7, 1.2), 1.0)
    for axis in range(3):
        spacing = [0.7, 1.2]
        spacing.insert(axis, 5.0)
        found = scored(np.expand_dims(ours, axis), np.expand_dims(theirs, axis), tuple(spacing), rows=7)
        assert list(found.values()) == pytest.approx(expected, rel=1e-5), axis


def test_empty_masks() -> None:
    nothing, something = np.zeros(SHAPE, bool), box((1, 3), (1, 3), (1, 3))
    assert scored(nothing, nothing) == NONE
    for pair in ((nothing, something), (something, nothing)):
        assert scored(*pair) == NONE | {"surface_dice": 0.0}
    assert scored(something, something) == {"hd95_mm": 0.0, "asd_mm": 0.0, "surface_dice": 1.0}


def test_distances_are_of_the_patient_whatever_the_axes() -> None:
    """Turned axes change nothing; along sheared ones it is the way in space that counts, not the steps."""
    ours, theirs = box((4, 9), (5, 12), (6, 14)), box((5, 12), (5, 11), (9, 15))
    spacing = (2.0, 0.5, 1.5)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ np.diag(spacing[::-1]), (100.0, -20.0, 7.0)
    assert list(scored(ours, theirs, affine=affine).values()) == pytest.approx(
        list(scored(ours, theirs, spacing).values())
    )
    sheared = np.eye(4)
    sheared[0, 2] = 0.75  # a step along z goes 0.75 mm along x too
    found = scored(box((2, 3), (3, 4), (4, 5)), box((6, 7), (3, 4), (4, 5)), affine=sheared)
    assert found["hd95_mm"] == pytest.approx(5.0)


def test_void_is_background_in_both_and_a_binary_reference_is_label_1() -> None:
    ours = box((2, 12), (2, 12), (2, 12)).astype(np.uint8)
    theirs = np.where(box((2, 12), (2, 12), (2, 8)), 1, 0).astype(np.uint8)
    theirs[:, :, 8:] = 255
    assert scored(ours, theirs)["hd95_mm"] == 0.0, "what lies in the void counts for nothing"
    binary = np.where(box((2, 12), (2, 12), (2, 8)), 255, 0).astype(np.uint8)
    assert scored(ours, binary, binary_255=True) == scored(ours, binary // 255)
    assert scored(ours, binary, binary_255=True)["hd95_mm"] == 4.0


def test_wide_labels_are_scored_too() -> None:
    ours, theirs = (box(*corners) for corners in (((2, 6),) * 3, ((3, 7),) * 3))
    found, _ = surface_scores(
        mask_of(ours.astype(np.uint16) * 60_000), mask_of(theirs.astype(np.uint32) * 60_000), [60_000],
        binary_255=False, room=ROOM,
    )  # fmt: skip
    assert found[60_000] == scored(ours, theirs)


def test_structures_that_do_not_fit_together_are_scored_one_after_another() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = (rng.integers(0, 4, (16, 18, 20)).astype(np.uint8) for _ in range(2))
    masks, labels = (mask_of(ours, rows=3), mask_of(theirs, rows=3)), [1, 2, 3]
    whole, _ = surface_scores(*masks, labels, binary_255=False, room=ROOM)
    points = max(int((m == k).sum()) for m in (ours, theirs) for k in labels) * 2
    tight, too_large = surface_scores(*masks, labels, binary_255=False, room=points * (HELD_BYTES + WORK_BYTES))
    assert (tight, too_large) == (whole, {})


def test_a_structure_that_fits_nowhere_costs_only_itself() -> None:
    ours = np.zeros(SHAPE, np.uint8)
    ours[2:18, 2:20, 2:22] = 1
    ours[8:10, 8:10, 8:10] = 2
    mask = mask_of(ours, rows=3)
    room = 100 * (HELD_BYTES + WORK_BYTES)
    found, too_large = surface_scores(mask, mask, [1, 2, 7], binary_255=False, room=room)
    assert found == {2: {"hd95_mm": 0.0, "asd_mm": 0.0, "surface_dice": 1.0}, 7: NONE}
    assert list(too_large) == [1]
    assert too_large[1] > room


MEASURE = """
import json, sys
import nibabel as nib
import numpy as np
from pipeline.engine import keep_few_arenas, peak_rss, reset_peak_rss, resident_bytes
from pipeline.metrics.masks import Mask
from pipeline.metrics.surface import surface_scores

keep_few_arenas()
n = 112

def noise(seed):
    return Mask((n, n, n), np.eye(4), lambda _: (
        np.random.default_rng([seed, z]).integers(0, 2, (4, n, n)).astype(np.uint8) for z in range(0, n, 4)
    ))

def taken(room):
    reset_peak_rss()
    before = resident_bytes()
    found, too_large = surface_scores(noise(0), noise(1), [1], binary_255=False, room=room)
    return peak_rss() - before, len(found)

taken(1 << 16)  # what is imported at first
print(json.dumps([taken(16 << 20), taken(1 << 40)]))
"""


@pytest.mark.slow
def test_memory_is_what_was_reckoned() -> None:
    """Noise is all surface: what the kernel saw it take, against the bytes reckoned for each point."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    (refused, none), (taken, one) = json.loads(done.stdout)
    assert (none, one) == (0, 1)
    slack, points = 4 << 20, 112**3  # half of the voxels of each mask
    assert refused < (16 << 20) + slack
    assert taken < points * (HELD_BYTES + WORK_BYTES) + slack
    assert taken > points * (HELD_BYTES + WORK_BYTES) / 4, "the reckoning is no idle one"


@pytest.mark.realdata
def test_scores_of_a_whole_body_are_monais(shared: Path) -> None:
    """Structures of a CT's mask at 3 mm, against the mask a voxel further on."""
    labels = np.asarray(nib.load(shared / "ct/example_seg.nii.gz").dataobj).T
    moved = np.roll(labels, (1, 1), (1, 2))
    present = np.unique(labels[labels > 0])[::5]  # MONAI takes a second for each
    ranks = np.zeros(256, np.uint8)  # 0 for the others
    ranks[present] = np.arange(1, len(present) + 1)
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    found, _ = surface_scores(
        mask_of(labels, affine, 8), mask_of(moved, affine, 8), present.tolist(), binary_255=False, room=ROOM
    )
    flat = [found[label][name] for label in present.tolist() for name in NONE]
    assert flat == pytest.approx(monais(ranks[labels], ranks[moved], (3, 3, 3), 1.0), rel=1e-5)
    assert len(present) == 9
