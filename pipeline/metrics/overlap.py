"""Overlap of masks with reference masks, from counts of pairs of labels that add up over slabs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .masks import VOID, Mask, check_fit, pairs

# Counts of voxels by "predicted label,reference label"; pairs that never occur are left out.
Confusion = dict[str, int]

OVERLAP = ("dice", "iou", "sensitivity", "precision")


def confusion(mask: Mask, reference: Mask) -> Confusion:
    """Count the pairs of labels of a mask and its reference, slab by slab.

    Raises StudyError when the reference does not fit (see `check_fit`) or one of them cannot be read.
    """
    check_fit(reference, mask)
    counts: Confusion = {}
    for predicted, labels in pairs(mask, reference):
        for pair, count in _count_pairs(predicted, labels).items():
            counts[pair] = counts.get(pair, 0) + count
    return counts


def _count_pairs(predicted: np.ndarray, reference: np.ndarray) -> Confusion:
    if predicted.dtype == reference.dtype == np.uint8:
        table = np.bincount((predicted.astype(np.uint16) << 8 | reference).ravel())
        (present,) = np.nonzero(table)
        return {f"{pair >> 8},{pair & 255}": int(table[pair]) for pair in present}
    joined = (predicted.astype(np.uint64) << np.uint64(32)) | reference.astype(np.uint64)
    found, counts = np.unique(joined, return_counts=True)
    return {
        f"{int(pair) >> 32},{int(pair) & 0xFFFFFFFF}": int(count) for pair, count in zip(found, counts, strict=True)
    }


def is_binary_255(confusions: Iterable[Confusion], *, side: int = 1) -> bool:
    """Whether a whole set of references (of masks, with `side` 0) holds only 0 and 255: then 255 is label 1.

    Else it is void in references, and a label like any other in masks.
    """
    values = {pair.split(",")[side] for counts in confusions for pair in counts}
    return str(VOID) in values and values <= {"0", str(VOID)}


def with_label_1(counts: Confusion) -> Confusion:
    """The counts of a binary mask whose label 255 is called 1."""
    return {pair.replace(f"{VOID},", "1,", 1) if pair.startswith(f"{VOID},") else pair: n for pair, n in counts.items()}


@dataclass
class Overlap:
    """Voxels of one label in a mask and its reference: in both, and in each where the reference is not void; `anywhere`
    also counts those of the mask that lie on void."""

    both: int = 0
    predicted: int = 0
    reference: int = 0
    anywhere: int = 0

    def scores(self) -> dict[str, float | None]:
        """Dice, IoU, sensitivity and precision; None where the measure has no meaning (0 / 0).

        With P the predicted and R the reference voxels: dice 2|PR| / (|P| + |R|), iou |PR| / |P or R|, sensitivity
        |PR| / |R|, precision |PR| / |P|. Void voxels of the reference count for nothing.
        """
        return {
            "dice": _ratio(2 * self.both, self.predicted + self.reference),
            "iou": _ratio(self.both, self.predicted + self.reference - self.both),
            "sensitivity": _ratio(self.both, self.reference),
            "precision": _ratio(self.both, self.predicted),
        }


def overlaps(counts: Mapping[str, int], *, binary_255: bool) -> defaultdict[int, Overlap]:
    """The overlap of every label, from one look at each count; a label that occurs nowhere has an empty one.

    255 in the reference is label 1 where `binary_255`, else void.
    """
    found: defaultdict[int, Overlap] = defaultdict(Overlap)
    for pair, count in counts.items():
        p, r = map(int, pair.split(","))
        found[p].anywhere += count
        if r == VOID:
            if not binary_255:
                continue
            r = 1
        found[p].predicted += count
        found[r].reference += count
        if p == r:
            found[p].both += count
    return found


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
