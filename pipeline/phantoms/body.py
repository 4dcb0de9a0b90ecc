"""A torso drawn from a seed: which solids it is made of, painted one on the other, and their exact volumes.

Volumes are exact because of how solids may lie: each lies wholly inside the one that it is painted on, and those that
are painted on the same one are disjoint. Both are proved as they are drawn (by planes that part two convex solids, and
by how far solids reach in any direction); what cannot be placed so is drawn again.

The layout, in mm about the middle of the torso (x to the right, y forwards, z up): lungs and heart above, below them
the liver right, stomach and spleen left, kidneys behind, bowel in front; the spine behind the cavity, ribs in its wall.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .clearance import depth, separation
from .lattice import Vector, dot, turned, unit
from .scanner import Artefacts, draw_artefacts
from .shapes import Barrel, Capsule, Drum, Ellipsoid, RibPair, Shape

LABELS: Mapping[int, str] = {
    1: "liver",
    2: "lesions",
    3: "spleen",
    4: "kidneys",
    5: "lungs",
    6: "vessels",
    7: "bones",
    8: "body",
}
"""Label values and the structures they stand for; "body" is all of the torso that is none of the others."""

OUTSIDE = ""
AIR_HU = -1000.0
FIELD_MM: Vector = (384.0, 288.0, 384.0)
"""Over x,y,z about the origin: a box that holds any torso with its table."""

GAP_MM = 4.0  # between solids: more than a voxel at 3 mm
_TRIES = 200


@dataclass(frozen=True)
class Part:
    """One solid: the structure it belongs to, the structure that it is painted on, its density."""

    structure: str
    within: str
    hu: float
    shape: Shape


@dataclass(frozen=True)
class Body:
    """The solids in the order in which they are painted, and what its scan suffers from."""

    parts: tuple[Part, ...]
    artefacts: Artefacts

    def volumes_ml(self) -> dict[str, float]:
        """What of each structure is not painted over, in mL."""
        volumes = dict.fromkeys([OUTSIDE, *LABELS.values()], 0.0)
        for part in self.parts:
            volumes[part.structure] += part.shape.volume_mm3 / 1000
            volumes[part.within] -= part.shape.volume_mm3 / 1000
        del volumes[OUTSIDE]
        return volumes


class _NoRoomError(Exception):
    """A solid found no place: the torso is drawn anew."""


@dataclass
class _Torso:
    """A torso while it is drawn. `size`: how much larger than the layout it is along x,y,z; `solids`: what others must
    keep clear of.
    """

    draw: random.Random
    size: Vector
    skin: Barrel
    cavity: Barrel
    parts: list[Part] = field(default_factory=list)
    solids: list[Shape] = field(default_factory=list)

    def paint(self, structure: str, within: str, hu: float, shape: Shape) -> None:
        self.parts.append(Part(structure, within, hu, shape))

    def bone(self, hu: float, shape: Shape) -> None:
        """A bone whose place is fixed: clear of the other bones by the layout, and inside the skin."""
        if depth(shape, self.skin) < GAP_MM:
            raise _NoRoomError
        self.paint("bones", "body", hu, shape)
        if not isinstance(shape, RibPair):  # which all else keeps clear of by lying in the cavity, or by the ribs' gap
            self.solids.append(shape)

    def place(self, make: Callable[[], Shape]) -> Shape:
        """The first of some solids that lies in the cavity and clear of all others."""
        for _ in range(_TRIES):
            shape = make()
            if depth(shape, self.cavity) >= GAP_MM and all(separation(shape, s) >= GAP_MM for s in self.solids):
                self.solids.append(shape)
                return shape
        raise _NoRoomError

    def at(self, x: float, y: float, z: float, jitter: float) -> Vector:
        """A point of the layout in this torso, moved by up to `jitter` mm along each axis."""
        u, v, w = (n * s + self.draw.uniform(-jitter, jitter) for n, s in zip((x, y, z), self.size, strict=True))
        return u, v, w

    def radii(self, x: float, y: float, z: float, spread: float = 0.1) -> Vector:
        """Semi-axes of the layout in this torso, each larger or smaller by up to the share `spread`."""
        u, v, w = (n * s * self.draw.uniform(1 - spread, 1 + spread) for n, s in zip((x, y, z), self.size, strict=True))
        return u, v, w

    def tilt(self, degrees: float) -> tuple[Vector, Vector, Vector]:
        """Axes turned by up to `degrees` about z, y and x."""
        return turned(*(math.radians(self.draw.uniform(-degrees, degrees)) for _ in range(3)))


def draw_body(seed: int) -> Body:
    """The torso of a seed (0 or more): the same one in every process. Raises no error: it draws until all have room."""
    for attempt in range(1000):
        draw = random.Random(f"maskmill phantom {seed} {attempt}")
        try:
            return _draw(draw)
        except _NoRoomError:
            continue
    raise AssertionError(f"no torso for seed {seed}: the layout leaves no room")


def _draw(draw: random.Random) -> Body:
    a, b, c = draw.uniform(152, 172), draw.uniform(110, 124), draw.uniform(170, 184)
    fat, wall = draw.uniform(8, 15), draw.uniform(15, 18)
    hollow = fat + wall
    cavity = Barrel((0.0, 0.0, 0.0), (a - hollow, b - hollow, c - hollow))
    skin = Barrel((0.0, 0.0, 0.0), (a, b, c))
    torso = _Torso(draw, (cavity.radii[0] / 135, cavity.radii[1] / 90, cavity.radii[2] / 150), skin, cavity)
    _paint_wall(torso, fat)
    bones = _paint_bones(torso, (a - fat, b - fat, c - fat))
    _paint_vessels(torso)
    _paint_chest(torso)
    _paint_liver(torso)
    _paint_abdomen(torso)
    return Body(tuple(torso.parts), draw_artefacts(draw, bones))


def _paint_wall(torso: _Torso, fat: float) -> None:
    """Table, fat under the skin, muscle, and the fat that organs lie in: each inside the one before."""
    a, b, c = torso.skin.radii
    draw = torso.draw
    table = Barrel((0.0, -b - 8, 0.0), (draw.uniform(100, 130), 5.0, 190.0))
    torso.paint(OUTSIDE, OUTSIDE, draw.uniform(-140, -60), table)
    torso.paint("body", OUTSIDE, draw.uniform(-110, -90), torso.skin)
    torso.paint("body", "body", draw.uniform(45, 65), Barrel((0.0, 0.0, 0.0), (a - fat, b - fat, c - fat)))
    torso.paint("body", "body", draw.uniform(-105, -80), torso.cavity)


def _paint_bones(torso: _Torso, muscle: Vector) -> list[Vector]:
    """Spine, ribs and sternum; gives their middles. All bone of the spine has |x| below the ribs' gap."""
    draw, middles = torso.draw, []
    front, back = torso.cavity.radii[1], -muscle[1]
    hu, core = draw.uniform(450, 650), draw.uniform(180, 260)
    width, pitch, bend = draw.uniform(17, 20), draw.uniform(27, 30), draw.uniform(-4, 4)
    half, thick = pitch / 2 - draw.uniform(2.5, 3.5), draw.uniform(12.5, 14)
    count = int((torso.cavity.radii[2] - half - GAP_MM) / pitch)
    for level in range(-count, count + 1):
        z = level * pitch
        y = back + 37 + bend * (z / 150) ** 2
        vertebra = Drum((0.0, y, z), (width, thick), half)
        process = Ellipsoid((0.0, y - thick - 12.5, z - 3), (4.5, 7.0, 9.0))
        torso.bone(hu, vertebra)
        torso.bone(hu, process)
        torso.paint("bones", "bones", core, Drum((0.0, y, z), (width - 3.5, thick - 3.5), half - 3))
        if level < count:
            disc = Drum((0.0, y, z + pitch / 2), (width - 1, thick - 1), pitch / 2 - half)
            torso.paint("body", "body", 90.0, disc)
            torso.solids.append(disc)
        middles.append(vertebra.center)
    inner = torso.cavity.radii[0] + 2, torso.cavity.radii[1] + 2
    outer = inner[0] + draw.uniform(7.5, 9), inner[1] + draw.uniform(7.5, 9)
    slope, tall, apart = draw.uniform(0.25, 0.4), draw.uniform(5, 6.5), draw.uniform(24, 28)
    top = draw.uniform(82, 90) * torso.size[2]
    for number in range(7):
        ribs = RibPair((0.0, 0.0, top - number * apart), inner, outer, tall, slope, gap=26.0)
        torso.bone(hu, ribs)
        middles += [(sign * inner[0], 0.0, ribs.center[2]) for sign in (-1.0, 1.0)]
    y = front + 8
    torso.bone(hu - 100, Capsule((0.0, y, top - 20), (0.0, y, top - 100), draw.uniform(5.5, 6.5)))
    return middles


def _paint_vessels(torso: _Torso) -> None:
    """Aorta and vena cava in front of the spine."""
    hu = torso.draw.uniform(200, 260)
    for x, top, radius in ((-15.0, 105.0, 11.5), (15.0, 8.0, 9.5)):
        r = radius * torso.draw.uniform(0.9, 1.1)

        def vessel(x: float = x, top: float = top, r: float = r) -> Shape:
            return Capsule(torso.at(x, -33, -112, 3), torso.at(x, -33, top, 3), r)

        torso.paint("vessels", "body", hu, torso.place(vessel))


def _paint_chest(torso: _Torso) -> None:
    """Lungs that end below on the diaphragm, a heart between them."""
    hu = torso.draw.uniform(-860, -780)
    for side, floor in ((1, 28.0), (-1, 18.0)):

        def lung(side: int = side, floor: float = floor) -> Shape:
            center = torso.at(side * 81, 0, 55, 3)
            low = torso.at(side * 81, 0, floor, 4)
            normal = unit((torso.draw.uniform(-0.15, 0.15), torso.draw.uniform(0.1, 0.35), -1.0))
            return Ellipsoid(center, torso.radii(44, 67, 84, 0.07), torso.tilt(4), (normal, dot(normal, low)))

        torso.paint("lungs", "body", hu, torso.place(lung))
    hu = torso.draw.uniform(120, 160)
    heart = torso.place(lambda: Ellipsoid(torso.at(-4, 28, 55, 5), torso.radii(28, 32, 40), torso.tilt(12)))
    torso.paint("body", "body", hu, heart)


def _paint_liver(torso: _Torso) -> None:
    """The liver, its lower left end cut off, with two to four lesions wholly inside."""
    draw = torso.draw

    def make() -> Shape:
        center = torso.at(66, 14, -29, 4)
        normal = unit((draw.uniform(-0.7, -0.3), draw.uniform(-0.4, 0.0), -1.0))
        cut = normal, dot(normal, center) + draw.uniform(24, 34) * torso.size[2]
        return Ellipsoid(center, torso.radii(54, 50, 48, 0.08), torso.tilt(8), cut)

    liver, hu = torso.place(make), draw.uniform(100, 125)
    torso.paint("liver", "body", hu, liver)
    lesions: list[Shape] = []
    hu -= draw.uniform(60, 85)
    for _ in range(draw.randint(2, 4)):
        for _ in range(_TRIES):
            r, center = draw.uniform(11, 17), torso.at(66, 14, -22, 45)
            lesion = Ellipsoid(center, (r, r * draw.uniform(0.85, 1.15), r * draw.uniform(0.85, 1.15)), torso.tilt(90))
            if depth(lesion, liver) >= GAP_MM and all(separation(lesion, other) >= GAP_MM for other in lesions):
                torso.paint("lesions", "liver", hu, lesion)
                lesions.append(lesion)
                break
    if len(lesions) < 2:
        raise _NoRoomError


def _paint_abdomen(torso: _Torso) -> None:
    """Psoas muscles, kidneys with their pelvis, spleen, stomach and bowel with gas. Muscle, stomach and bowel are body:
    what must be told from the others.
    """
    draw = torso.draw
    hu = draw.uniform(45, 65)
    for side in (1, -1):

        def psoas(side: int = side) -> Shape:
            return Capsule(torso.at(side * 37, -60, -122, 3), torso.at(side * 31, -60, -50, 3), draw.uniform(8, 10))

        torso.paint("body", "body", hu, torso.place(psoas))
    hu = draw.uniform(170, 210)
    for side, z in ((1, -92.0), (-1, -84.0)):

        def kidney(side: int = side, z: float = z) -> Shape:
            return Ellipsoid(torso.at(side * 57, -35, z, 6), torso.radii(22, 22, 42), torso.tilt(12))

        shape = torso.place(kidney)
        assert isinstance(shape, Ellipsoid)
        torso.paint("kidneys", "body", hu, shape)
        torso.paint("kidneys", "kidneys", hu - 110, _shrunk(shape, draw.uniform(0.35, 0.5)))
    hu = draw.uniform(110, 140)
    spleen = torso.place(lambda: Ellipsoid(torso.at(-100, -12, -40, 6), torso.radii(18, 36, 36), torso.tilt(12)))
    torso.paint("spleen", "body", hu, spleen)
    stomach = torso.place(lambda: Ellipsoid(torso.at(-48, 42, -30, 8), torso.radii(30, 26, 32), torso.tilt(20)))
    assert isinstance(stomach, Ellipsoid)
    torso.paint("body", "body", draw.uniform(10, 30), stomach)
    torso.paint("body", "body", AIR_HU + 20, _gas(stomach, draw.uniform(0.3, 0.6)))
    for _ in range(draw.randint(4, 7)):
        hu, gas = draw.uniform(20, 70), draw.random() < 0.5

        def loop() -> Shape:
            r = draw.uniform(12, 20)
            return Ellipsoid(torso.at(0, 30, -98, 60), (r * 1.6, r, r), torso.tilt(45))

        bowel = torso.place(loop)
        assert isinstance(bowel, Ellipsoid)
        torso.paint("body", "body", hu, bowel)
        if gas:
            torso.paint("body", "body", AIR_HU + 50, _shrunk(bowel, 0.6))


def _shrunk(shape: Ellipsoid, share: float) -> Ellipsoid:
    x, y, z = shape.radii
    return Ellipsoid(shape.center, (share * x, share * y, share * z), shape.axes)


def _gas(shape: Ellipsoid, height: float) -> Ellipsoid:
    """What gathers at the top of one who lies on the back: inside a thin wall, above a level."""
    inner, level = _shrunk(shape, 0.9), shape.center[1] + height * shape.radii[1] * 0.6
    return Ellipsoid(inner.center, inner.radii, inner.axes, ((0.0, -1.0, 0.0), -level))
