"""What a solid of a phantom holds, by its definition and not by the code that renders it; and one of each kind."""

from __future__ import annotations

import math

import numpy as np
from nibabel.affines import apply_affine

from pipeline.phantoms.shapes import Barrel, Capsule, Drum, Ellipsoid, RibPair, Shape


def holds(shape: Shape, points: np.ndarray) -> np.ndarray:
    """Which of the points (..., 3), in mm, lie in a solid."""
    if isinstance(shape, Ellipsoid):
        turned = (points - np.array(shape.center)) @ np.array(shape.axes).T
        inside = np.linalg.norm(turned / np.array(shape.radii), axis=-1) <= 1
        return inside if shape.cut is None else inside & (points @ np.array(shape.cut[0]) <= shape.cut[1])
    if isinstance(shape, Capsule):
        a, b = np.array(shape.start), np.array(shape.end)
        share = np.clip((points - a) @ (b - a) / ((b - a) @ (b - a)), 0, 1)
        return np.linalg.norm(points - a - share[..., None] * (b - a), axis=-1) <= shape.radius
    p = points - np.array(shape.center)
    if isinstance(shape, Barrel):
        q = np.abs(p / np.array(shape.radii))
        return np.hypot(q[..., 0], q[..., 1]) ** 8 + q[..., 2] ** 8 <= 1
    if isinstance(shape, Drum):
        flat = np.hypot(p[..., 0] / shape.radii[0], p[..., 1] / shape.radii[1]) <= 1
        return flat & (np.abs(p[..., 2]) <= shape.half)
    assert isinstance(shape, RibPair)
    outer, inner = (np.hypot(p[..., 0] / a, p[..., 1] / b) for a, b in (shape.outer, shape.inner))
    level = np.abs(p[..., 2] + shape.slope * p[..., 1]) <= shape.half
    return (outer <= 1) & (inner >= 1) & level & (np.abs(p[..., 0]) >= shape.gap)


def centers(affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Where nibabel says that voxels lie: (z, y, x, 3), mm."""
    index = np.moveaxis(np.indices(shape), 0, -1)[..., ::-1]
    return apply_affine(affine, index)


AXES = (
    (math.cos(0.5), math.sin(0.5), 0.0),
    (-math.sin(0.5) * math.cos(0.3), math.cos(0.5) * math.cos(0.3), math.sin(0.3)),
    (math.sin(0.5) * math.sin(0.3), -math.cos(0.5) * math.sin(0.3), math.cos(0.3)),
)
SOLIDS: dict[str, Shape] = {
    "ellipsoid": Ellipsoid((3.0, -5.0, 4.0), (30.0, 18.0, 24.0), AXES),
    "cut ellipsoid": Ellipsoid((3.0, -5.0, 4.0), (30.0, 18.0, 24.0), AXES, ((0.6, 0.0, -0.8), 7.0)),
    "mostly cut away": Ellipsoid((0.0, 0.0, 0.0), (30.0, 18.0, 24.0), AXES, ((0.0, 1.0, 0.0), -9.0)),
    "capsule": Capsule((-12.0, 4.0, -20.0), (10.0, -6.0, 21.0), 9.0),
    "barrel": Barrel((2.0, 1.0, -3.0), (33.0, 22.0, 30.0)),
    "drum": Drum((1.0, 2.0, -4.0), (25.0, 17.0), 11.0),
    "ribs": RibPair((0.0, 2.0, 5.0), (26.0, 18.0), (34.0, 25.0), 7.0, 0.4, 9.0),
}
