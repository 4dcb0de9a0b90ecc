"""Masks to be measured, as slabs of labels: ours in OUT or anyone's, alone or beside a reference.

What is measured here never holds more than a few slabs, so that the size of a mask does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from .. import ome
from ..errors import StudyError
from ..geometry import furthest_corner_mm, spacing_of
from ..grid import Triple
from ..sources import Header, Study, open_source

SLAB_VOXELS = 1 << 22
LARGEST_READ = 128 << 20  # bytes that are decoded at once, so that no chunk is decoded twice
HIGHEST_LABEL = (1 << 32) - 1
VOID = 255
WHOLE = 0.02  # how far from a whole number a label may be: half a step of uint8 with labels up to 10


@dataclass(frozen=True)
class Mask:
    """A label image, read slab by slab as often as it takes.

    shape: (z,y,x); affine: RAS mm over voxel indices (x,y,z); read: gives slabs (at most that many rows, y, x) of
    unsigned integers in z order, all but the last full.
    """

    shape: Triple
    affine: np.ndarray
    read: Callable[[int], Iterator[np.ndarray]]

    def slabs(self) -> Iterator[np.ndarray]:
        """All of it; masks of one shape are cut at the same rows. Raises StudyError where it cannot be read."""
        rows = max(1, SLAB_VOXELS // (self.shape[1] * self.shape[2]))
        return self.read(1 << rows.bit_length() - 1)  # a power of two, as chunks mostly are


def stored_mask(labels: str, affine: np.ndarray) -> Mask:
    """The label image whose level 0 is at `labels`, axes z,y,x or 1,z,y,x."""
    array = ome.open_array(labels)
    z, y, x = (int(n) for n in array.shape[-3:])
    lead, chunk = (0,) * (array.ndim - 3), int(array.chunks[-3])
    affordable = LARGEST_READ // (y * x * array.dtype.itemsize)

    def read(rows: int) -> Iterator[np.ndarray]:
        at_once = max(rows, min(chunk, affordable) // rows * rows)
        for start in range(0, z, at_once):
            part = ome.read(array, (*lead, slice(start, start + at_once)))
            for row in range(0, len(part), rows):
                yield part[row : row + rows]
            del part  # before the next is read beside it

    return Mask((z, y, x), affine, read)


def study_mask(study: Study, what: str = "reference") -> Mask:
    """A mask that anyone made; `what` is what messages call it.

    Raises StudyError, here or while it is read: it cannot be read as one volume, or holds other than whole numbers from
    0 to 2^32 - 1.
    """
    with open_source(study) as source:
        header = source.header
    check_channels(header, what)

    def read(rows: int) -> Iterator[np.ndarray]:
        with open_source(study) as source:
            for slab in source.slabs(rows):
                yield _as_labels(slab[0], what)

    return Mask(header.shape, header.affine, read)


def _as_labels(slab: np.ndarray, what: str) -> np.ndarray:
    """The slab as uint8, or uint32 where that does not do."""
    slab = whole_numbers(slab, what)
    low, high = slab.min(), slab.max()
    if low < 0 or high > HIGHEST_LABEL:
        raise StudyError("input", f"the {what} holds labels from {low} to {high}; expected 0 to {HIGHEST_LABEL}")
    return slab.astype(np.uint8 if high < 256 else np.uint32, copy=False)


def whole_numbers(slab: np.ndarray, what: str) -> np.ndarray:
    """Labels that are stored as floats, or as integers with a slope, without what the slope's rounding left.

    nibabel stores a float array under an integer header with a slope: 2 is then read back as 2.0000001, and as 2.008
    where the header says uint8 and the highest label is 3. Raises StudyError for fractions, NaN and inf.
    """
    if slab.dtype.kind != "f":
        return slab
    whole: np.ndarray = np.rint(slab)
    with np.errstate(invalid="ignore"):
        if not np.all(np.abs(slab - whole) <= WHOLE):
            raise StudyError("input", f"the {what} holds fractions; a mask holds whole numbers")
    return whole


def binary_mask(mask: Mask) -> Mask:
    """A mask of 0 and 255 as one of 0 and 1."""
    return replace(mask, read=lambda rows: ((slab == VOID).astype(np.uint8) for slab in mask.read(rows)))


def without_void(mask: Mask) -> Mask:
    """A mask in which 255 is background."""
    return replace(mask, read=lambda rows: (np.where(slab == VOID, 0, slab) for slab in mask.read(rows)))


def check_channels(header: Header, what: str) -> None:
    if header.channels != 1:
        raise StudyError("input", f"the {what} has {header.channels} channels; a mask has one")


def check_fit(one: Mask | Header, other: Mask | Header, names: tuple[str, str] = ("reference", "mask")) -> None:
    """Raises StudyError where two have not the same shape, or corners more than a tenth of a voxel apart."""
    if one.shape != other.shape:
        shapes = list(one.shape[::-1]), list(other.shape[::-1])
        raise StudyError("input", f"the {names[0]} has {shapes[0]} voxels (x,y,z) but the {names[1]} {shapes[1]}")
    off = furthest_corner_mm(one.affine, other.affine, other.shape)
    if off > min(spacing_of(other.affine)) / 10:
        raise StudyError("geometry", f"the {names[0]} lies up to {off:.3g} mm away from the {names[1]}")


def pairs(mask: Mask, reference: Mask) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Slabs of both, side by side, as they are stored."""
    return zip(mask.slabs(), reference.slabs(), strict=True)


def scored_pairs(mask: Mask, reference: Mask, *, binary_255: bool) -> Iterator[np.ndarray]:
    """Slabs (2, rows, y, x) of mask and reference with the meaning of 255 in the reference settled.

    It is label 1 where `binary_255`, else void: such voxels are background in both, as with MONAI's `ignore_index`.
    """
    for ours, theirs in pairs(mask, reference):
        both = np.stack([ours, theirs])
        is_255 = theirs == VOID
        if binary_255:
            both[1][is_255] = 1
        else:
            both[:, is_255] = 0
        yield both
