"""Masks in memory, cut into slabs of any height."""

from __future__ import annotations

import numpy as np

from pipeline.metrics.masks import Mask


def mask_of(labels: np.ndarray, affine: np.ndarray | None = None, rows: int | None = None) -> Mask:
    """A mask of this array (z, y, x), read in slabs of `rows` rows."""
    height = rows or len(labels)
    return Mask(
        labels.shape,
        np.eye(4) if affine is None else affine,
        lambda _: (labels[z : z + height] for z in range(0, len(labels), height)),
    )
