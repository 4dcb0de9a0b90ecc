"""Points and directions in patient millimetres (RAS x,y,z), and functions of them over the voxels of a box."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Vector = tuple[float, float, float]

IDENTITY: tuple[Vector, Vector, Vector] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


class Lattice:
    """Voxel centres of a box: where an affine (RAS mm over x,y,z) puts the indices `start` to `stop` (z,y,x)."""

    def __init__(self, affine: Array, start: Sequence[int], stop: Sequence[int]) -> None:
        self.columns = [tuple(map(float, affine[:3, j])) for j in range(3)]
        self.origin = tuple(map(float, affine[:3, 3]))
        z, y, x = (np.arange(a, b, dtype=np.float64) for a, b in zip(start, stop, strict=True))
        self.index = x[None, None, :], y[None, :, None], z[:, None, None]

    def linear(self, normal: Sequence[float], offset: float) -> tuple[Array, Vector]:
        """normal . p + offset at every voxel p, and its change for a step along voxel axis x, y, z.

        An axis along which nothing changes stays of length 1: solids that lie along the axes are computed in less.
        """
        steps = dot(normal, self.columns[0]), dot(normal, self.columns[1]), dot(normal, self.columns[2])
        values = np.full((1, 1, 1), dot(normal, self.origin) + offset)
        for step, index in zip(reversed(steps), reversed(self.index), strict=True):
            if step != 0:
                values = step * index + values
        return values, steps


def slope(partials: Sequence[Array], steps: Sequence[Vector]) -> Array:
    """The length of a function's gradient over voxel indices; its derivatives by some linear forms are `partials`."""
    total = np.zeros((1, 1, 1))
    for axis in range(3):
        terms = [p * s[axis] for p, s in zip(partials, steps, strict=True) if s[axis] != 0]
        if terms:
            change = sum(terms[1:], terms[0])
            total = total + change * change
    return np.sqrt(total)


def unit(v: Vector) -> Vector:
    length = math.hypot(*v)
    return v[0] / length, v[1] / length, v[2] / length


def turned(a: float, b: float, c: float) -> tuple[Vector, Vector, Vector]:
    """Orthonormal axes: x,y,z turned by `a` about z, then `b` about y, then `c` about x."""

    def turn(axes: Sequence[Vector], i: int, j: int, angle: float) -> tuple[Vector, Vector, Vector]:
        cos, sin = math.cos(angle), math.sin(angle)
        found = [list(axis) for axis in axes]
        for axis in found:
            axis[i], axis[j] = cos * axis[i] - sin * axis[j], sin * axis[i] + cos * axis[j]
        x, y, z = ((axis[0], axis[1], axis[2]) for axis in found)
        return x, y, z

    return turn(turn(turn(IDENTITY, 0, 1, a), 2, 0, b), 1, 2, c)
