"""How far convex solids lie apart or one inside the other, proved by planes."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from .lattice import Array
from .shapes import Shape


def _half_sphere(count: int) -> Array:
    """Directions spread evenly over half the sphere (a Fibonacci lattice), (count, 3)."""
    k = np.arange(count) + 0.5
    z, turn = 1 - k / count, math.pi * (1 + math.sqrt(5)) * k
    r = np.sqrt(1 - z * z)
    return np.stack([r * np.cos(turn), r * np.sin(turn), z], 1)


_HALF = np.concatenate([_half_sphere(400), np.eye(3)])
DIRECTIONS = np.concatenate([_HALF, -_HALF])


@lru_cache(maxsize=256)
def _reach(shape: Shape) -> tuple[Array, Array]:
    """How far a solid reaches in all directions, and in their opposites."""
    forth = shape.support(DIRECTIONS)
    return forth, np.roll(forth, len(_HALF))


def separation(a: Shape, b: Shape) -> float:
    """A distance in mm that at least lies between two convex solids: that of two parallel planes which part them.

    Negative where none of 806 directions parts them.
    """
    return float((-_reach(a)[0] - _reach(b)[1]).max())


def depth(inner: Shape, outer: Shape) -> float:
    """How deep in mm a solid lies inside a convex one, over 806 directions; negative if it sticks out."""
    return float((_reach(outer)[0] - _reach(inner)[0]).min())
