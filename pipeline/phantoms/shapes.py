"""Solids in patient millimetres (RAS x,y,z) with exact volumes, and how much of a voxel each of them fills.

Every solid is where all of its faces `f(p)` are at most 0. A face is told with its steepness, how much f grows from one
voxel to the next where f = 0, so that f / steepness is about how many voxels a centre lies from the face. 0.5 minus
that, held within 0 and 1, stands for the voxel's share behind the face: exact for a plane across a voxel axis, for
oblique ones a ramp of the same variance. It is less right where a solid is thin or bent within a voxel, but f grows as
the volume within the surfaces f = const does (with the cube of an ellipsoid's size, the square of a tube's), so that
the shares of all voxels add up to the solid.

Only + - * / and square roots touch voxels: IEEE 754 rounds them alike whatever else is computed beside a voxel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Self

import numpy as np

from .lattice import IDENTITY, Array, Lattice, Vector, dot, slope

Face = tuple[Array, Array]
"""f and its steepness over a lattice, broadcastable to z,y,x."""
_TINY = 1e-300  # in the very middle of a solid, where f is steep in no direction

_ROUND = 8  # the exponent of a Barrel


class Shape(Protocol):
    def __hash__(self) -> int: ...

    @property
    def volume_mm3(self) -> float:
        """Exact."""

    def support(self, normals: Array) -> Array:
        """How far the solid reaches along each normal (K, 3): max of normal . p, or a bound of it where it is bent."""

    def grown(self, reach: float) -> Shape:
        """A solid outside of which no voxel is filled, voxels being `reach` mm across (root of summed squares)."""

    def faces(self, lattice: Lattice) -> Iterator[Face]:
        """What bounds it, over the voxels of a lattice."""


def _even(step: Vector) -> Array:
    """The steepness of a linear form."""
    return np.full((1, 1, 1), math.hypot(*step))


def _gauge(square: Array, forms: Sequence[Array], steps: Sequence[Vector]) -> tuple[Array, Array]:
    """k = sqrt(sum of squared linear forms), how much larger the solid would have to be to end here, and its slope."""
    k = np.sqrt(square)
    return k, slope(forms, steps) / np.maximum(k, _TINY)


def _growth(reach: float, thinnest: float) -> float:
    """How much larger a solid {k <= 1} must be made for its share to be 0 outside, where k is its gauge.

    (k^n - 1) / n >= k - 1, and k grows by at most reach / thinnest from voxel to voxel; a half is asked for.
    """
    return 1 + reach / (2 * thinnest)


@dataclass(frozen=True)
class Ellipsoid:
    """Semi-axes `radii` along the orthonormal `axes`; with `cut` = (n, d) only where n . p <= d, n of length 1."""

    center: Vector
    radii: Vector
    axes: tuple[Vector, Vector, Vector] = IDENTITY
    cut: tuple[Vector, float] | None = None

    @cached_property
    def _cut_of_ball(self) -> tuple[Array, float]:
        """The cut where the ellipsoid is the unit ball: m . q <= e, m of length 1."""
        normal, offset = self.cut or ((1.0, 0.0, 0.0), math.inf)
        scaled = np.array([r * dot(a, normal) for r, a in zip(self.radii, self.axes, strict=True)])
        length = float(np.sqrt((scaled * scaled).sum()))
        return scaled / length, (offset - dot(normal, self.center)) / length

    @property
    def volume_mm3(self) -> float:
        """4/3 pi abc, less the cap that is cut off (a ball's share below height e is (2 + 3e - e^3) / 4)."""
        e = min(1.0, self._cut_of_ball[1])
        return 4 / 3 * math.pi * math.prod(self.radii) * (2 + 3 * e - e**3) / 4

    def support(self, normals: Array) -> Array:
        scaled = normals @ (np.array(self.axes) * np.array(self.radii)[:, None]).T
        length = np.sqrt((scaled * scaled).sum(1))
        m, e = self._cut_of_ball
        if e < 1:
            along = scaled @ m
            rest = np.sqrt(np.maximum(length**2 - along**2, 0))
            length = np.where(along <= e * length, length, e * along + math.sqrt(1 - e * e) * rest)
        found: Array = normals @ np.array(self.center) + length
        return found

    def grown(self, reach: float) -> Self:
        factor = _growth(reach, min(self.radii))
        x, y, z = self.radii
        return replace(self, radii=(factor * x, factor * y, factor * z), cut=None)

    def faces(self, lattice: Lattice) -> Iterator[Face]:
        rows = [tuple(n / r for n in axis) for axis, r in zip(self.axes, self.radii, strict=True)]
        q, steps = zip(*(lattice.linear(row, -dot(row, self.center)) for row in rows), strict=True)
        square = q[0] * q[0] + q[1] * q[1] + q[2] * q[2]
        k, growth = _gauge(square, q, steps)
        yield square * k - 1, 3 * growth
        if self.cut is not None:
            beyond, step = lattice.linear(self.cut[0], -self.cut[1])
            yield beyond, _even(step)


@dataclass(frozen=True)
class Capsule:
    """All within `radius` of the line from `start` to `end`."""

    start: Vector
    end: Vector
    radius: float

    @property
    def volume_mm3(self) -> float:
        return math.pi * self.radius**2 * (math.dist(self.start, self.end) + 4 / 3 * self.radius)

    def support(self, normals: Array) -> Array:
        ends = normals @ np.array([self.start, self.end]).T
        found: Array = ends.max(1) + self.radius * np.sqrt((normals * normals).sum(1))
        return found

    def grown(self, reach: float) -> Self:
        return replace(self, radius=self.radius + reach / 2)  # (d^2 - r^2) / 2r >= d - r

    def faces(self, lattice: Lattice) -> Iterator[Face]:
        along = tuple(b - a for a, b in zip(self.start, self.end, strict=True))
        square = dot(along, along)
        row = tuple(n / square for n in along)
        share = np.clip(lattice.linear(row, -dot(row, self.start))[0], 0, 1)
        p, steps = zip(*(lattice.linear(IDENTITY[k], -self.start[k]) for k in range(3)), strict=True)
        v = [one - share * n for one, n in zip(p, along, strict=True)]
        square = v[0] * v[0] + v[1] * v[1] + v[2] * v[2]
        yield square - self.radius**2, 2 * self.radius * _gauge(square, v, steps)[1]


@dataclass(frozen=True)
class Barrel:
    """A torso with ellipses across and rounded ends: ((x/a)^2 + (y/b)^2)^4 + (z/c)^8 <= 1."""

    center: Vector
    radii: Vector

    @property
    def volume_mm3(self) -> float:
        """2 pi abc times the integral of (1 - t^8)^(1/4) over 0..1, which is Beta(1/8, 5/4) / 8."""
        beta = math.gamma(1 / _ROUND) * math.gamma(1.25) / math.gamma(1 / _ROUND + 1.25)
        return 2 * math.pi * math.prod(self.radii) * beta / _ROUND

    def support(self, normals: Array) -> Array:
        n = np.abs(normals) * np.array(self.radii)
        dual = _ROUND / (_ROUND - 1)
        across = np.sqrt(n[:, 0] ** 2 + n[:, 1] ** 2)
        found: Array = normals @ np.array(self.center) + (across**dual + n[:, 2] ** dual) ** (1 / dual)
        return found

    def grown(self, reach: float) -> Self:
        factor = _growth(reach, min(self.radii))
        x, y, z = self.radii
        return replace(self, radii=(factor * x, factor * y, factor * z))

    def faces(self, lattice: Lattice) -> Iterator[Face]:
        rows = [tuple(n / r for n in axis) for axis, r in zip(IDENTITY, self.radii, strict=True)]
        q, steps = zip(*(lattice.linear(row, -dot(row, self.center)) for row in rows), strict=True)
        s, t = q[0] * q[0] + q[1] * q[1], q[2] * q[2]
        s3, t3 = s * s * s, t * t * t
        eighth = s3 * s + t3 * t  # power of the gauge, whose derivatives are s3 q, s3 q and t3 q over its seventh
        square = np.sqrt(np.sqrt(eighth))
        growth = slope([s3 * q[0], s3 * q[1], t3 * q[2]], steps) * np.sqrt(square) / np.maximum(eighth, _TINY)
        yield square - 1, 2 * growth


@dataclass(frozen=True)
class Drum:
    """An elliptic cylinder along z with flat ends: a vertebra."""

    center: Vector
    radii: tuple[float, float]
    half: float

    @property
    def volume_mm3(self) -> float:
        return 2 * math.pi * math.prod(self.radii) * self.half

    def support(self, normals: Array) -> Array:
        n = np.abs(normals) * np.array([*self.radii, self.half])
        found: Array = normals @ np.array(self.center) + np.sqrt(n[:, 0] ** 2 + n[:, 1] ** 2) + n[:, 2]
        return found

    def grown(self, reach: float) -> Self:
        factor = _growth(reach, min(*self.radii, self.half))
        a, b = self.radii
        return replace(self, radii=(factor * a, factor * b), half=factor * self.half)

    def faces(self, lattice: Lattice) -> Iterator[Face]:
        rows = [(1 / self.radii[0], 0.0, 0.0), (0.0, 1 / self.radii[1], 0.0), (0.0, 0.0, 1 / self.half)]
        q, steps = zip(*(lattice.linear(row, -dot(row, self.center)) for row in rows), strict=True)
        square = q[0] * q[0] + q[1] * q[1]
        yield square - 1, 2 * _gauge(square, q[:2], steps[:2])[1]
        yield np.abs(q[2]) - 1, _even(steps[2])


@dataclass(frozen=True)
class RibPair:
    """A left and a right rib: the band between two ellipses with the semi-axes `inner` and `outer`, of height 2 `half`,
    dropping by `slope` mm per mm forwards, without |x| < `gap` (about the centre), where spine and sternum are.
    """

    center: Vector
    inner: tuple[float, float]
    outer: tuple[float, float]
    half: float
    slope: float
    gap: float

    @property
    def volume_mm3(self) -> float:
        """A shear changes no volume: height times area, each ellipse's less its strip |x| < gap."""

        def area(a: float, b: float) -> float:
            u = self.gap / a
            return a * b * (math.pi - 2 * (u * math.sqrt(1 - u * u) + math.asin(u)))

        return 2 * self.half * (area(*self.outer) - area(*self.inner))

    def support(self, normals: Array) -> Array:
        """Of the whole sheared disc within the outer ellipse."""
        a, b = self.outer
        x, y, z = normals.T
        across = np.sqrt((a * x) ** 2 + (b * (y - self.slope * z)) ** 2)
        found: Array = normals @ np.array(self.center) + across + self.half * np.abs(z)
        return found

    def grown(self, reach: float) -> Self:
        (a, b), factor = self.outer, _growth(reach, min(self.outer))
        half = self.half + reach / 2 * math.hypot(1, self.slope)
        return replace(self, outer=(factor * a, factor * b), half=half)

    def faces(self, lattice: Lattice) -> Iterator[Face]:
        cx, cy, cz = self.center
        x, along_x = lattice.linear((1.0, 0.0, 0.0), -cx)
        y, along_y = lattice.linear((0.0, 1.0, 0.0), -cy)
        for sign, (a, b) in ((1, self.outer), (-1, self.inner)):
            p, q = x / a, y / b
            square = p * p + q * q
            yield sign * (square - 1), 2 * _gauge(square, [p / a, q / b], [along_x, along_y])[1]
        height, along = lattice.linear((0.0, self.slope, 1.0), -cz - self.slope * cy)
        yield np.abs(height) - self.half, _even(along)
        yield self.gap - np.abs(x), _even(along_x)
