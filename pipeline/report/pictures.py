"""Three planes of a study with its mask, as one small PNG.

Radiological convention: the patient's right is on the picture's left, anterior is up in the axial plane,
superior is up in the coronal and sagittal planes; the sagittal plane is seen from the patient's left, with
anterior on the left.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import zarr
from PIL import Image, ImageDraw, ImageFont

from .. import store
from ..colors import Color
from ..metrics.masks import Mask
from ..ome import TOP_LEVEL

# name, the letter on the left edge, the letter on the top edge
PLANES = (("axial", "R", "A"), ("coronal", "R", "S"), ("sagittal", "A", "S"))
OPPOSITE = dict(zip("RLAPSI", "LRPAIS", strict=True))
GAP = 8  # pixels between two planes
ROWS = 64  # of a mask read at a time
OPACITY = 0.4  # of the mask's area; its outline is opaque
NO_COLOR: Color = (208, 208, 208)  # of a label that `colors` does not list
REFERENCE_COLOR: Color = (255, 255, 255)
INK, HALO = (236, 240, 243), (0, 0, 0)

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Level:
    """One level of a pyramid: a 3-D view z,y,x of a Zarr array, read plane by plane."""

    array: Any  # zarr.Array
    spacing: tuple[float, float, float]  # mm over z,y,x

    @property
    def shape(self) -> tuple[int, int, int]:
        z, y, x = self.array.shape[-3:]
        return z, y, x

    def read(self, *region: slice | int) -> Array:
        """The region over z,y,x; of several channels the first."""
        lead = (0,) * (self.array.ndim - 3)
        return np.asarray(self.array[lead + region])


def three_planes(
    image: Path | str,
    labels: Path | str | None,
    colors: Mapping[int, Color],
    *,
    reference: Mask | None = None,
    size: int = 220,
) -> bytes:
    """A PNG of the axial, coronal and sagittal plane side by side, each fitted into size x size pixels.

    `image` is an OME-Zarr group (axes z,y,x or c,z,y,x: channel 0 is shown), `labels` the group of its mask,
    with the same levels, or None. Read are three planes of the finest level whose axes are all <= 256 (else
    of the coarsest) and, slab by slab, the mask of that level. The planes pass through the centre of the
    mask's bounding box, or, where that plane misses the mask, through the plane with most of it; without a
    mask, through the volume's middle. Names, edges and letters come from the nearest axes of
    `attributes.maskmill.affine` (RAS mm over x,y,z; absent: the axes themselves are taken as RAS).
    Proportions are physical. Grey values run from the 1st to the 99th percentile of what is shown. Labels
    that `colors` does not list are light grey. Of a `reference` (on the voxels of the image's level 0) the
    outlines are drawn in white.

    Raises ValueError for a group that is no volume, and for labels of another shape.
    """
    group = zarr.open_group(store.zarr_store(str(image), read_only=True), mode="r")
    index, level = _pick(group)
    mask = _level(zarr.open_group(store.zarr_store(str(labels), read_only=True), mode="r"), index) if labels else None
    if mask is not None and mask.shape != level.shape:
        raise ValueError(
            f"level {index}: the image is {level.shape} and the labels are {mask.shape} (z,y,x); "
            "give the labels of this image"
        )
    truth = _sampled(reference, level) if reference is not None else None
    centre = _centre(level.shape, mask)
    cuts = [_Cut.of(_codes(group), left, top) for _, left, top in PLANES]
    greys = [cut.take(level, centre) for cut in cuts]
    low, high = _window(greys)
    strip = Image.new("RGB", (3 * size + 2 * GAP, size))
    for i, ((name, left, top), cut, grey) in enumerate(zip(PLANES, cuts, greys, strict=True)):
        box = cut.fit(level, size)
        pane = _grey(grey, low, high).resize(box, Image.Resampling.BICUBIC).convert("RGB")
        if mask is not None:
            pane = _paint(pane, cut.take(mask, centre), colors)
        if truth is not None:
            pane = _outline(pane, cut.take(truth, centre))
        corner = (i * (size + GAP), 0)
        strip.paste(pane, (corner[0] + (size - box[0]) // 2, (size - box[1]) // 2))
        _write(strip, corner, size, name, left, top)
    file = io.BytesIO()
    strip.save(file, "PNG", compress_level=3)
    return file.getvalue()


@dataclass(frozen=True)
class _Cut:
    """How to take one plane out of an array z,y,x: its axes (0..2), and whether each runs backwards."""

    normal: int
    row: int
    column: int
    flip_rows: bool
    flip_columns: bool

    @staticmethod
    def of(codes: tuple[str, ...], left: str, top: str) -> _Cut:
        """The cut with `left` on the left edge and `top` on the top edge of a volume whose axes x,y,z grow
        towards `codes`."""
        column, flip_columns = _axis(codes, left)
        row, flip_rows = _axis(codes, top)
        return _Cut(3 - row - column, row, column, flip_rows, flip_columns)

    def take(self, level: Level, centre: tuple[int, int, int]) -> Array:
        region: list[slice | int] = [slice(None)] * 3
        region[self.normal] = centre[self.normal]
        plane = level.read(*region)
        if self.row > self.column:
            plane = plane.T
        rows, columns = (slice(None, None, -1 if flip else 1) for flip in (self.flip_rows, self.flip_columns))
        return np.ascontiguousarray(plane[rows, columns])

    def fit(self, level: Level, size: int) -> tuple[int, int]:
        """Width and height in pixels of this plane, in physical proportion, the longer one `size`."""
        width, height = (level.shape[a] * level.spacing[a] for a in (self.column, self.row))
        unit = size / max(width, height)
        return max(1, round(width * unit)), max(1, round(height * unit))


def _axis(codes: tuple[str, ...], letter: str) -> tuple[int, bool]:
    """The array axis (of z,y,x) along which `letter` lies, and whether the array grows towards it."""
    for i, code in enumerate(codes):
        if code in (letter, OPPOSITE[letter]):
            return 2 - i, code == letter
    raise ValueError(f"the affine's axes {codes} have no {letter}-{OPPOSITE[letter]} direction")


def _multiscale(group: Any) -> dict[str, Any]:
    attributes = group.attrs.asdict()
    entries = attributes.get("ome", attributes).get("multiscales")  # OME-Zarr 0.5, and 0.4
    if not entries:
        raise ValueError("expected an OME-Zarr image group (with `multiscales`), found none")
    axes = [axis["name"] for axis in entries[0]["axes"]]
    if axes not in (["z", "y", "x"], ["c", "z", "y", "x"]):
        raise ValueError(f"three planes need axes z,y,x or c,z,y,x, got {','.join(axes)}")
    return dict(entries[0])


def _level(group: Any, index: int) -> Level:
    datasets = _multiscale(group)["datasets"]
    if index >= len(datasets):
        raise ValueError(f"the labels have {len(datasets)} levels, expected level {index} as in the image")
    dataset = datasets[index]
    scale = next(t["scale"] for t in dataset["coordinateTransformations"] if t["type"] == "scale")
    z, y, x = (float(s) for s in scale[-3:])
    return Level(group[dataset["path"]], (z, y, x))


def _pick(group: Any) -> tuple[int, Level]:
    """The finest level whose axes are all at most 256 long; the coarsest where none is."""
    levels = [_level(group, i) for i in range(len(_multiscale(group)["datasets"]))]
    fitting = (i for i, level in enumerate(levels) if max(level.shape) <= TOP_LEVEL)
    index = next(fitting, len(levels) - 1)
    return index, levels[index]


def _codes(group: Any) -> tuple[str, ...]:
    affine = group.attrs.asdict().get("maskmill", {}).get("affine")
    return tuple(nib.aff2axcodes(np.asarray(affine, np.float64))) if affine is not None else ("R", "A", "S")


def _centre(shape: tuple[int, int, int], mask: Level | None) -> tuple[int, int, int]:
    counts = [np.zeros(n, np.int64) for n in shape]
    if mask is not None:
        for start in range(0, shape[0], ROWS):
            slab = mask.read(slice(start, start + ROWS), slice(None), slice(None)) != 0
            counts[0][start : start + ROWS] = slab.sum(axis=(1, 2))
            counts[1] += slab.sum(axis=(0, 2))
            counts[2] += slab.sum(axis=(0, 1))
    z, y, x = (_middle(count) for count in counts)
    return z, y, x


def _middle(count: npt.NDArray[np.int64]) -> int:
    """The mask's middle plane, or its fullest where there is a gap; of no mask the middle of the axis."""
    filled = np.flatnonzero(count)
    if filled.size == 0:
        return len(count) // 2
    middle = int(filled[0] + filled[-1]) // 2
    return middle if count[middle] else int(count.argmax())


def _window(planes: list[Array]) -> tuple[float, float]:
    values = np.concatenate([plane.ravel() for plane in planes]).astype(np.float64)
    values = values[np.isfinite(values)]
    if values.size == 0:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(values, [1, 99]))
    if low == high:  # nearly everything is one value: show what is not
        low, high = float(values.min()), float(values.max())
    return low, high if high > low else low + 1.0


def _grey(plane: Array, low: float, high: float) -> Image.Image:
    unit = (np.nan_to_num(plane.astype(np.float64), nan=low) - low) / (high - low)
    return Image.fromarray((np.clip(unit, 0, 1) * 255).round().astype(np.uint8))


def _paint(pane: Image.Image, labels: Array, colors: Mapping[int, Color]) -> Image.Image:
    """The mask over a plane: areas half transparent, one opaque pixel along their edges."""
    seen, drawn = _drawn(labels, pane.size)
    table = np.array([colors.get(int(value), NO_COLOR) for value in seen], np.float64)
    paint = table[drawn]
    alpha = np.where(_edges(drawn), 1.0, OPACITY) * (seen != 0)[drawn]
    mixed = np.asarray(pane, np.float64) * (1 - alpha[..., None]) + paint * alpha[..., None]
    return Image.fromarray(mixed.round().astype(np.uint8))


def _outline(pane: Image.Image, labels: Array) -> Image.Image:
    """One white pixel along the edges of the reference's structures, inside of them."""
    seen, drawn = _drawn(labels, pane.size)
    pixels = np.array(pane)
    pixels[_edges(drawn) & (seen != 0)[drawn]] = REFERENCE_COLOR
    return Image.fromarray(pixels)


def _drawn(labels: Array, size: tuple[int, int]) -> tuple[Array, Array]:
    """The labels that occur, and for every pixel which of them it shows."""
    seen, codes = np.unique(labels, return_inverse=True)
    small = Image.fromarray(codes.reshape(labels.shape).astype(np.uint16))
    return seen, np.asarray(small.resize(size, Image.Resampling.NEAREST))


def _edges(drawn: Array) -> Array:
    around = np.pad(drawn, 1, mode="edge")
    neighbours = (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:])
    found: Array = np.any([n != drawn for n in neighbours], axis=0)
    return found


def _sampled(mask: Mask, level: Level) -> Level:
    """The mask at the voxels of a level: of each the value at its centre. Read once, slab by slab."""
    at = [((np.arange(n) + 0.5) * full / n).astype(np.intp) for n, full in zip(level.shape, mask.shape, strict=True)]
    found, z = np.zeros(level.shape, np.uint32), 0
    for slab in mask.slabs():
        rows = np.flatnonzero((at[0] >= z) & (at[0] < z + len(slab)))
        found[rows] = slab[np.ix_(at[0][rows] - z, at[1], at[2])]
        z += len(slab)
    return Level(found, level.spacing)


def _write(strip: Image.Image, corner: tuple[int, int], size: int, name: str, left: str, top: str) -> None:
    """The plane's name in its corner and the four directions at its edges."""
    x, y = corner
    pad, half = max(2, size // 55), size // 2
    draw = ImageDraw.Draw(strip)
    places = (
        (left, (x + pad, y + half), "lm"),
        (OPPOSITE[left], (x + size - pad, y + half), "rm"),
        (top, (x + half, y + pad), "mt"),
        (OPPOSITE[top], (x + half, y + size - pad), "mb"),
        (name, (x + pad, y + size - 2 * pad), "ls"),
    )
    for text, place, anchor in places:
        font = ImageFont.load_default(size / (16 if text == name else 13))
        draw.text(place, text, INK, font, anchor, stroke_width=2, stroke_fill=HALO)
