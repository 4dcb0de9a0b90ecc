"""Whether a network's probabilities can be taken at their word: expected calibration error, from sums that merge.

Guo et al. 2017 (arXiv:1706.04599): predictions are sorted by their confidence, the highest softmax probability, into 15
bins of equal width; in each the mean confidence is compared with the share of predictions that are right.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from segmodels.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

BINS = 15  # bin i holds confidences in (i / 15, (i + 1) / 15]


@dataclass(frozen=True, eq=False)
class CalibrationSums:
    """Per bin: voxels, those labelled right (both int64), and the sum of their confidences (float64)."""

    voxels: NDArray[np.int64]
    right: NDArray[np.int64]
    confidence: NDArray[np.float64]


def calibration_sums(logits: Tensor, labels: Tensor) -> CalibrationSums:
    """The sums of one case: logits (K, *S) of a softmax network, its reference labels (*S), whole numbers below K.

    Only voxels that the network or the reference calls foreground (not label 0) count: a volume is mostly background
    that no network doubts, and counting it makes every network look calibrated. Raises ModelError for shapes or labels
    that do not fit.
    """
    classes = logits.shape[0]
    if logits.shape[1:] != labels.shape or not labels.numel() or labels.is_floating_point():
        raise ModelError(
            f"calibration compares logits (K, *S) with whole labels (*S); got shapes {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}, labels of {labels.dtype}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ModelError(
            f"calibration got labels from {int(labels.min())} to {int(labels.max())}; a network of {classes} classes "
            f"knows 0 to {classes - 1}"
        )
    confidence, found = logits.double().softmax(0).max(0)
    region = (found > 0) | (labels > 0)
    sure = confidence[region].cpu().numpy()
    right = (found == labels)[region].cpu().numpy()
    bins = np.clip(np.ceil(sure * BINS).astype(np.int64) - 1, 0, BINS - 1)
    return CalibrationSums(
        np.bincount(bins, minlength=BINS),
        np.bincount(bins[right], minlength=BINS),
        np.bincount(bins, sure, minlength=BINS).astype(np.float64),
    )


def merge(sums: Iterable[CalibrationSums]) -> CalibrationSums:
    """The sums of several cases, added up in the order given."""
    total = CalibrationSums(np.zeros(BINS, np.int64), np.zeros(BINS, np.int64), np.zeros(BINS))
    for one in sums:
        total = CalibrationSums(total.voxels + one.voxels, total.right + one.right, total.confidence + one.confidence)
    return total


def expected_calibration_error(sums: CalibrationSums) -> float | None:
    """Sum over the bins of |right - confidence| / voxels of all bins, 0 (calibrated) to 1; None without voxels."""
    voxels = int(sums.voxels.sum())
    return float(np.abs(sums.right - sums.confidence).sum()) / voxels if voxels else None
