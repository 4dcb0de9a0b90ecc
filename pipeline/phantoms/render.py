"""A phantom: a body on a lattice of voxels, any box of which is made without the rest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..geometry import check_affine, spacing_of
from ..grid import Box, Triple
from .body import AIR_HU, FIELD_MM, LABELS, OUTSIDE, Body, Part, draw_body
from .lattice import Array, Lattice, turned
from .scanner import Scanner, noise
from .shapes import Shape

DEFAULT_SHAPE: Triple = (128, 96, 128)  # 3 mm
LONGEST_AXIS = 32_768
TILE: Triple = (8, 32, 128)  # voxels at a time: their float64 stays in a core's cache
_VALUES = {name: value for value, name in LABELS.items()} | {OUTSIDE: 0}
_ENDS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}


@dataclass(frozen=True, eq=False)
class Phantom:
    """A simulated CT of a torso, as a function: `shape` is z,y,x; `affine` takes voxel indices x,y,z to RAS mm."""

    seed: int
    shape: Triple
    affine: Array
    scanner: Scanner
    body: Body

    @property
    def labels(self) -> Mapping[int, str]:
        """Structures by their value in the mask; 0 is outside."""
        return LABELS

    @property
    def volumes_ml(self) -> dict[str, float]:
        """Exact volumes in mL of what each label stands for, also of what lies outside the field of view (see `whole`).

        What is painted over does not count: "liver" is the liver without "lesions", "body" the torso without all
        others.
        """
        return self.body.volumes_ml()

    @cached_property
    def whole(self) -> frozenset[str]:
        """The structures that lie wholly in the field of view: those whose masks have the volumes of `volumes_ml`."""
        cut = set()
        for part in self.body.parts:
            low, high = self._extent(part.shape)
            if (low < -0.5).any() or (high > np.array(self.shape) - 0.5).any():
                cut.add(part.structure)
        return frozenset(LABELS.values()) - cut

    def region(self, box: Box | None = None) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        """Image in HU (int16) and mask (uint8) of a box, or of all; axes z,y,x.

        A voxel's label is that of the structure painted last where its centre lies; its density mixes what it holds. A
        voxel has the same bits whatever box is asked for. Memory: the two arrays and about 20 MB. Raises UsageError for
        a box that is not inside the phantom.
        """
        box = box or Box((0, 0, 0), self.shape)
        if any(not 0 <= a <= b <= n for a, b, n in zip(box.start, box.stop, self.shape, strict=True)):
            raise UsageError(f"the box {box.start} to {box.stop} is not inside a phantom of shape {self.shape} (z,y,x)")
        image, mask = np.empty(box.shape, np.int16), np.zeros(box.shape, np.uint8)
        steps = [range(a, b, t) for a, b, t in zip(box.start, box.stop, TILE, strict=True)]
        for z, y, x in itertools.product(*steps):
            tile = Box((z, y, x), (z + TILE[0], y + TILE[1], x + TILE[2])).clip(box)
            there = tile.shift((-box.start[0], -box.start[1], -box.start[2])).slices
            image[there] = self._tile(tile, mask[there])
        return image, mask

    def _tile(self, tile: Box, mask: NDArray[np.uint8]) -> Array:
        hu = np.full(tile.shape, AIR_HU)
        for part, bounds in self._bounded:
            inside = tile.clip(bounds)
            if inside.size:
                there = inside.shift((-tile.start[0], -tile.start[1], -tile.start[2])).slices
                _paint(part, Lattice(self.affine, inside.start, inside.stop), hu[there], mask[there])
        self.body.artefacts.add(hu, Lattice(self.affine, tile.start, tile.stop), self.scanner)
        if self.scanner.noise_hu:
            hu += self.scanner.noise_hu * noise(self.seed, tile.start, tile.stop)
        return np.clip(np.rint(hu, out=hu), -32768, 32767, out=hu)

    @cached_property
    def _bounded(self) -> list[tuple[Part, Box]]:
        """The parts that reach into the field of view, each with the box outside of which it touches no voxel."""
        reach, field = math.hypot(*spacing_of(self.affine)), Box((0, 0, 0), self.shape)
        found = []
        for part in self.body.parts:
            low, high = self._extent(part.shape.grown(reach))
            first, last = np.floor(low).astype(int).tolist(), np.ceil(high).astype(int).tolist()
            box = Box((first[0], first[1], first[2]), (last[0] + 1, last[1] + 1, last[2] + 1)).clip(field)
            if box.size:
                found.append((part, box))
        return found

    def _extent(self, shape: Shape) -> tuple[Array, Array]:
        """The lowest and highest voxel position (z,y,x) that a solid reaches."""
        inverse = np.linalg.inv(self.affine).astype(np.float64)
        rows, offset = inverse[2::-1, :3], inverse[2::-1, 3]
        return offset - shape.support(-rows), offset + shape.support(rows)


def _paint(part: Part, lattice: Lattice, hu: Array, mask: NDArray[np.uint8]) -> None:
    """Paint a part over `hu` by its share of each voxel, over `mask` where it holds the voxel's centre."""
    inside: NDArray[np.bool_] | None = None
    share: Array | None = None
    with np.errstate(divide="ignore", over="ignore"):  # in its very middle a solid is steep in no direction
        for f, steep in part.shape.faces(lattice):
            here, filled = f <= 0, 0.5 - f / steep
            inside = here if inside is None else inside & here
            share = filled if share is None else np.minimum(share, filled)
    assert inside is not None
    assert share is not None
    hu += np.clip(share, 0, 1) * (part.hu - hu)
    np.copyto(mask, np.uint8(_VALUES[part.structure]), where=inside)


def phantom(
    seed: int,
    shape: Sequence[int] = DEFAULT_SHAPE,
    *,
    spacing_mm: Sequence[float] | float | None = None,
    orientation: str = "RAS",
    tilt_degrees: Sequence[float] = (0.0, 0.0, 0.0),
    affine: Array | None = None,
    scanner: Scanner | None = None,
) -> Phantom:
    """The phantom of a seed (0 or more) on a lattice of `shape` (z,y,x) voxels.

    The same seed is the same torso in millimetres on any lattice. `spacing_mm` (z,y,x, or one for all; default: the
    smallest one at which all of the torso is in the field of view), `orientation` (nibabel's code for the voxel axes
    x,y,z) and `tilt_degrees` (the lattice is turned about the body's z, then y, then x) put the middle of the lattice
    at the torso's; `affine` (RAS mm over x,y,z), if given, takes their place.
    Nothing is computed before a region is asked for. Raises UsageError for what makes no phantom, and, for an
    affine that places no voxels, StudyError("geometry").
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise UsageError(f"the seed of a phantom is a whole number from 0 to 2^63 - 1, not {seed!r}")
    whole = [int(n) for n in shape]
    if len(whole) != 3 or not all(1 <= n <= LONGEST_AXIS for n in whole):
        raise UsageError(f"the shape of a phantom is three numbers Z,Y,X from 1 to {LONGEST_AXIS}, not {tuple(shape)}")
    size = whole[0], whole[1], whole[2]
    if affine is None:
        affine = _centered(size, spacing_mm, orientation, tilt_degrees)
    elif spacing_mm is not None or orientation != "RAS" or any(tilt_degrees):
        raise UsageError("an affine says the spacing, orientation and tilt too: give it alone")
    return Phantom(seed, size, check_affine(affine).copy(), scanner or Scanner(), draw_body(seed))


def _centered(
    shape: Triple, spacing_mm: Sequence[float] | float | None, orientation: str, tilt_degrees: Sequence[float]
) -> Array:
    """The affine that puts the middle of a lattice at the origin."""
    code = orientation.upper()
    if len(code) != 3 or not set(code) <= set(_ENDS) or len({_ENDS[c][0] for c in code}) != 3:
        raise UsageError(f"{orientation!r} is no orientation: give three letters such as RAS or LPS, one of each axis")
    counts = shape[::-1]
    if len(tilt_degrees) != 3 or not all(-360 <= degrees <= 360 for degrees in tilt_degrees):
        raise UsageError(f"a tilt is three angles about z, y and x in degrees, not {tuple(tilt_degrees)}")
    about_z, about_y, about_x = (math.radians(degrees) for degrees in tilt_degrees)
    axes = np.array(turned(about_z, about_y, about_x)).T if any(tilt_degrees) else np.eye(3)  # as columns
    if spacing_mm is None:
        reach = np.abs(axes).T @ FIELD_MM  # of the torso along each of them
        spacing_mm = max(reach[_ENDS[c][0]] / n for c, n in zip(code, counts, strict=True))
    sizes = [spacing_mm] * 3 if isinstance(spacing_mm, (int, float)) else list(spacing_mm)[::-1]
    if len(sizes) != 3 or not all(1e-3 <= s <= 1e3 for s in sizes):
        raise UsageError(f"a spacing is one number or three, Z,Y,X, each from 0.001 to 1000 mm, not {spacing_mm}")
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, (c, n, s) in enumerate(zip(code, counts, sizes, strict=True)):
        world, sign = _ENDS[c]
        affine[:3, axis] = sign * s * axes[:, world]
        affine[:3, 3] -= sign * s * axes[:, world] * (n - 1) / 2
    return affine + 0.0  # no -0.0
