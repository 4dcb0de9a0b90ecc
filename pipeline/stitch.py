"""Overlapping tiles into one answer: importance weights and the rolling accumulator.

gaussian, constant: the weights of MONAI (`monai.inferers.sliding_window_inference`): a Gaussian centred in the tile
with a standard deviation of an eighth of it, clamped from below at 1e-3; or ones. nnunet: those of nnU-Net's predictor,
a sampled Gaussian around voxel n // 2 in half precision, its zeros raised. exact: nothing is blended, ones. Sums are
float32 (of nnunet-fp16 half precision, as nnU-Net's), added in raster order of the tiles, so that every voxel's sum is
the same whatever the blocks are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .grid import Box, Triple

if TYPE_CHECKING:
    import torch

SIGMA_SCALE = 0.125
FLOOR = 1e-3


def importance(tile: Triple, stitch: str) -> np.ndarray:
    """Weights of one tile, float32, axes z,y,x.

    gaussian: product over the axes of exp(-x^2 / (2 s^2)), x from -(n-1)/2 to (n-1)/2, s = n/8; then clamped at
    max(smallest weight, 1e-3). nnunet: see `nnunet_importance`. constant, exact: ones.
    """
    if stitch.startswith("nnunet"):
        return nnunet_importance(tile).astype(np.float32)
    if stitch in ("constant", "exact"):
        return np.ones(tile, np.float32)
    weights = np.ones((), np.float32)
    for length in tile:
        offsets = np.arange(-(length - 1) / 2, (length - 1) / 2 + 1, dtype=np.float32)
        sigma = np.float32(SIGMA_SCALE * length)
        weights = weights[..., None] * np.exp(offsets**2 / np.float32(-2 * sigma**2))
    return np.maximum(weights, np.float32(max(float(weights.min()), FLOOR))).astype(np.float32)


def nnunet_importance(tile: Triple) -> np.ndarray:
    """Weights of one tile, float16, axes z,y,x, as nnU-Net's `compute_gaussian` makes them.

    A one at voxel n // 2 of every axis, filtered with a Gaussian of s = n/8 cut off at 4 s, scaled to a highest weight
    of 10 and rounded to half precision; what becomes zero by that is raised to the smallest weight above it. An axis of
    one voxel is none of the network's.
    """
    from scipy.ndimage import gaussian_filter1d

    weights = np.ones(())
    for length in tile:
        line = np.zeros(length)
        line[length // 2] = 1
        if length > 1:
            line = gaussian_filter1d(line, length / 8, mode="constant")
        weights = weights[..., None] * line  # as filtering axis by axis would multiply
    weights /= weights.max() / 10
    half: np.ndarray = weights.astype(np.float32).astype(np.float16)  # torch rounds twice, too
    half[half == 0] = half[half > 0].min()
    return half


class RollingAccumulator:
    """Weighted sums over the rows of a block that tiles can still reach, and no more.

    Holds `depth` rows of the block's y,x extent: float32 sums (fields, depth, y, x), with `weighed` one more field for
    the sum of the weights. Tiles arrive in raster order, so rows below the newest tile's first row are final and leave
    through `roll`. The sums are not divided by the sum of the weights: that is positive and the same for all classes,
    so neither an argmax nor a sign depends on it. With `half` sums are kept in half precision.
    """

    def __init__(
        self, box: Box, fields: int, weights: torch.Tensor, *, weighed: bool = False, half: bool = False
    ) -> None:
        import torch

        _, height, width = box.shape
        depth = min(weights.shape[0], box.shape[0])
        self.box, self.weights = box, weights
        self.row = box.start[0]  # the study's z of the first row held
        self.fields, self.weighed = fields, weighed
        dtype = torch.float16 if half else torch.float32
        self.sums = torch.zeros((fields + weighed, depth, height, width), dtype=dtype, device=weights.device)

    def add(self, tile: Box, core: Box, logits: torch.Tensor) -> None:
        """Add one tile's logits (fields, z, y, x), weighted, where its core lies in the block. Overwrites `logits`.

        Product and sum are two roundings, never a fused one: a fused kernel may round the tail of a row another way,
        and then the result would depend on how blocks are cut.
        """
        inside = core.clip(self.box)
        source = inside.shift((-tile.start[0], -tile.start[1], -tile.start[2])).slices
        target = inside.shift((-self.row, -self.box.start[1], -self.box.start[2])).slices
        logits.mul_(self.weights)
        self.sums[(slice(self.fields), *target)] += logits[(slice(None), *source)]
        if self.weighed:
            self.sums[(-1, *target)] += self.weights[source]

    def roll(self, row: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Give up the rows below `row`: yields (z, sums (fields, y, x)) for each, then moves the window."""
        done = min(row, self.box.stop[0]) - self.row
        if done <= 0:
            return
        depth = self.sums.shape[1]
        held = min(done, depth)
        for i in range(held):
            yield self.row + i, self.sums[:, i]
        keep = depth - held
        for i in range(keep):  # row by row: source and target overlap in memory
            self.sums[:, i] = self.sums[:, i + held]
        self.sums[:, keep:] = 0
        self.row += done
