"""Random changes of a sample: one resampling for all that moves voxels, then intensities.

All randomness comes from the generator that is given, so a sample is a function of its seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from segmodels.train.recipe import Augment

Random = np.random.Generator
Triple = tuple[int, int, int]


def displaced(
    patch: Triple, spacing: Sequence[float], augment: Augment, flips: Sequence[int], random: Random
) -> np.ndarray | None:
    """Where the voxels of a patch are taken from: voxel offsets (3, *patch) from its centre; None: no change.

    Offsets along z, y, x, float32. Mirroring, size, rotation and deformation are drawn in this order and act in
    millimetres, so that nothing is sheared where voxels are anisotropic. A patch of one plane stays in its plane.
    """
    flat = patch[0] == 1
    mirrored = [-1.0 if axis in flips and random.random() < 0.5 else 1.0 for axis in range(3)]
    matrix = np.diag(mirrored)
    moved = -1.0 in mirrored
    if random.random() < augment.scale:
        low, high = augment.scale_range
        factor = math.exp(random.uniform(math.log(low), math.log(high)))
        matrix = np.diag([1.0 if flat else 1 / factor, 1 / factor, 1 / factor]) @ matrix
        moved = True
    if random.random() < augment.rotate:
        angles = np.radians(random.uniform(-augment.rotate_degrees, augment.rotate_degrees, 3))
        matrix = _rotation(angles * [1, not flat, not flat]) @ matrix
        moved = True
    field = None
    if random.random() < augment.elastic:
        field = _smooth_field(patch, spacing, augment, random)
        if flat:
            field[0] = 0
    if not moved and field is None:
        return None
    millimetres = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(patch, spacing, strict=True)]
    z, y, x = np.meshgrid(*millimetres, indexing="ij", sparse=True)
    offsets = np.empty((3, *patch), np.float32)
    for axis, step in enumerate(spacing):
        a, b, c = matrix[axis]
        offsets[axis] = a * z + b * y + c * x
        if field is not None:
            offsets[axis] += field[axis]
        offsets[axis] /= step
    return offsets


def _rotation(angles: np.ndarray) -> np.ndarray:
    """The rotation about z, then y, then x, acting on (z, y, x) vectors; angles about z, y, x in radians."""
    matrix: np.ndarray = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [a for a in range(3) if a != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        matrix = turn @ matrix
    return matrix


def _smooth_field(patch: Triple, spacing: Sequence[float], augment: Augment, random: Random) -> np.ndarray:
    """Displacements in mm (3, *patch): normal at control points, linear between them."""
    extents = [n * step for n, step in zip(patch, spacing, strict=True)]
    points = [max(2, round(extent / augment.elastic_grid_mm) + 1) for extent in extents]
    coarse = random.normal(0, augment.elastic_mm * random.random(), (1, 3, *points)).astype(np.float32)
    fine = F.interpolate(torch.from_numpy(coarse), size=patch, mode="trilinear", align_corners=True)
    field: np.ndarray = fine[0].numpy()
    return field


def resample(
    image: np.ndarray, labels: np.ndarray, centre: Sequence[float], offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A patch of `image` (c, z, y, x) and `labels` (z, y, x) at `centre` + `offsets` (3, *patch), in voxels.

    Linear for the image, 0 outside of it; for the labels the nearest voxel's, the background outside: linearly
    resampled indicators would make small round structures smaller (docs/decisions.md). Only the box that the offsets
    reach is read.
    """
    where = [offsets[axis] + np.float32(centre[axis]) for axis in range(3)]
    boxes = [_reached(w, n) for w, n in zip(where, labels.shape, strict=True)]
    patch = offsets.shape[1:]
    if any(start >= stop for start, stop in boxes):
        return np.zeros((image.shape[0], *patch), np.float32), np.zeros(patch, np.int64)
    inside = tuple(slice(start, stop) for start, stop in boxes)
    # With a rim of zeros, so that nothing outside the image is like its border. grid_sample wants x, y, z, and -1 and
    # 1 at the centres of the outer voxels.
    grid = torch.from_numpy(
        np.stack([2 * (w - start + 1) / (stop - start + 1) - 1 for w, (start, stop) in zip(where, boxes, strict=True)])
    )
    grid = grid.flip(0).movedim(0, -1).float()[None]

    def sample(volumes: np.ndarray, mode: str) -> np.ndarray:
        rimmed = F.pad(torch.from_numpy(volumes.astype(np.float32))[None], (1,) * 6)
        found: np.ndarray = F.grid_sample(rimmed, grid, mode=mode, padding_mode="zeros", align_corners=True)[0].numpy()
        return found

    # Labels are below 2^24: exact as float32.
    voxels, chosen = sample(image[(slice(None), *inside)], "bilinear"), sample(labels[inside][None], "nearest")
    return voxels, chosen[0].astype(np.int64)


def _reached(where: np.ndarray, size: int) -> tuple[int, int]:
    """The voxels along one axis that interpolation at `where` touches."""
    low, high = float(where.min()), float(where.max())
    return max(0, math.floor(low)), min(size, math.floor(high) + 2)


def change_intensities(image: np.ndarray, augment: Augment, random: Random) -> np.ndarray:
    """Noise, blur, brightness, contrast, low resolution, gamma, drawn in this order; image (c, z, y, x) float32."""
    if random.random() < augment.noise:
        image = image + random.normal(0, random.uniform(*augment.noise_std), image.shape).astype(np.float32)
    if random.random() < augment.blur:
        sigma = random.uniform(*augment.blur_sigma)
        image = gaussian_filter(image, (0, 0 if image.shape[1] == 1 else sigma, sigma, sigma), truncate=3)
    if random.random() < augment.brightness:
        image = image * np.float32(random.uniform(*augment.brightness_range))
    if random.random() < augment.contrast:
        mean = _per_channel(image, np.mean)
        image = (image - mean) * np.float32(random.uniform(*augment.contrast_range)) + mean
    if random.random() < augment.low_resolution:
        image = _lower_resolution(image, random.uniform(*augment.low_resolution_range))
    if random.random() < augment.gamma:
        inverted = random.random() < augment.gamma_invert
        image = _gamma(-image if inverted else image, random.uniform(*augment.gamma_range)) * (-1 if inverted else 1)
    return np.ascontiguousarray(image, np.float32)


def _per_channel(image: np.ndarray, measure: Any) -> np.ndarray:
    found: np.ndarray = measure(image, axis=(1, 2, 3), keepdims=True, dtype=np.float32)
    return found


def _lower_resolution(image: np.ndarray, share: float) -> np.ndarray:
    size = tuple(n if n == 1 else max(1, round(n * share)) for n in image.shape[1:])
    coarse = F.interpolate(torch.from_numpy(np.ascontiguousarray(image))[None], size=size, mode="nearest-exact")
    fine: np.ndarray = F.interpolate(coarse, size=image.shape[1:], mode="trilinear")[0].numpy()
    return fine


def _gamma(image: np.ndarray, exponent: float) -> np.ndarray:
    """((x - min) / range) ^ exponent per channel, with the mean and the deviation it had."""
    low = image.min(axis=(1, 2, 3), keepdims=True)
    reach = np.maximum(image.max(axis=(1, 2, 3), keepdims=True) - low, 1e-7)
    curved = ((image - low) / reach) ** np.float32(exponent)
    mean, std = _per_channel(curved, np.mean), np.maximum(_per_channel(curved, np.std), 1e-7)
    changed: np.ndarray = (curved - mean) / std * _per_channel(image, np.std) + _per_channel(image, np.mean)
    return changed
