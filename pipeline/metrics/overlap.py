"""Overlap of masks with reference masks, from counts of pairs of labels that add up over slabs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import ome
from ..errors import StudyError
from ..geometry import furthest_corner_mm, spacing_of
from ..sources import Study, open_source

VOID = 255

# Counts of voxels by "predicted label,reference label"; pairs that never occur are left out.
Confusion = dict[str, int]


def confusion(labels: str, affine: np.ndarray, reference: Study) -> tuple[Confusion, str]:
    """Compare a label image (level 0 at `labels`) with a reference mask, slab by slab; also the reference's digest.

    Raises StudyError when the reference's shape differs, when its corners lie more than a tenth of a voxel from the
    study's, or when it does not hold whole numbers from 0 up.
    """
    array = ome.open_array(labels)
    shape = tuple(int(n) for n in array.shape[-3:])
    rows = (array.shards or array.chunks)[-3]
    lead = (0,) * (array.ndim - 3)
    counts: Confusion = {}
    with open_source(reference) as source:
        check_fit(source.header, shape, affine)
        z = 0
        for slab in source.slabs(rows):
            predicted = ome.read(array, (*lead, slice(z, z + slab.shape[1])))
            for pair, count in _count_pairs(predicted, slab[0]).items():
                counts[pair] = counts.get(pair, 0) + count
            z += slab.shape[1]
        return counts, source.digest()


def check_fit(header: Any, shape: tuple[int, ...], affine: np.ndarray) -> None:
    if header.channels != 1:
        raise StudyError("input", f"the reference has {header.channels} channels; a mask has one")
    if tuple(header.shape) != shape:
        raise StudyError(
            "input",
            f"the reference has {list(header.shape[::-1])} voxels (x,y,z) but the study {list(shape[::-1])}",
        )
    off = furthest_corner_mm(header.affine, affine, shape)
    step = min(spacing_of(affine))
    if off > step / 10:
        raise StudyError("geometry", f"the reference lies up to {off:.3g} mm away from the study")


def _count_pairs(predicted: np.ndarray, reference: np.ndarray) -> Confusion:
    if reference.dtype.kind == "f":
        if not np.array_equal(reference, np.rint(reference)):
            raise StudyError("input", "the reference holds fractions; a mask holds whole numbers")
        reference = reference.astype(np.int64)
    if int(reference.min()) < 0 or int(reference.max()) >= 1 << 32:
        raise StudyError("input", f"the reference holds labels from {reference.min()} to {reference.max()}")
    if predicted.dtype == np.uint8 and int(reference.max()) < 256:
        table = np.bincount((predicted.astype(np.int32) << 8 | reference.astype(np.int32)).ravel())
        (present,) = np.nonzero(table)
        return {f"{pair >> 8},{pair & 255}": int(table[pair]) for pair in present}
    joined = (predicted.astype(np.uint64) << np.uint64(32)) | reference.astype(np.uint64)
    pairs, counts = np.unique(joined, return_counts=True)
    return {
        f"{int(pair) >> 32},{int(pair) & 0xFFFFFFFF}": int(count) for pair, count in zip(pairs, counts, strict=True)
    }


def is_binary_255(confusions: list[Confusion]) -> bool:
    """Whether a whole set of references holds only 0 and 255 (then 255 is label 1, else it is void)."""
    values = {pair.split(",")[1] for counts in confusions for pair in counts}
    return str(VOID) in values and values <= {"0", str(VOID)}


def scores(counts: Mapping[str, int], label: int, *, binary_255: bool) -> dict[str, float | None]:
    """Dice, IoU, sensitivity and precision of one label; None where the measure has no meaning (0 / 0).

    With P the predicted and R the reference voxels: dice 2|PR| / (|P| + |R|), iou |PR| / |P or R|, sensitivity
    |PR| / |R|, precision |PR| / |P|. Void voxels of the reference count for nothing.
    """
    both = predicted = reference = 0
    for pair, count in counts.items():
        p, r = map(int, pair.split(","))
        if r == VOID:
            if not binary_255:
                continue
            r = 1
        both += count if p == label and r == label else 0
        predicted += count if p == label else 0
        reference += count if r == label else 0
    return {
        "dice": _ratio(2 * both, predicted + reference),
        "iou": _ratio(both, predicted + reference - both),
        "sensitivity": _ratio(both, reference),
        "precision": _ratio(both, predicted),
    }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
