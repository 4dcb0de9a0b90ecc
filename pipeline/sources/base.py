"""What a source is: one study's voxels as a stream of slabs, its facts, and the digest of its content."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StudyError

Kind = Literal["nifti", "ome-zarr"]
Slab = NDArray[Any]

# No scan comes near this many voxels; a header that claims more is damaged or hostile.
MOST_VOXELS = 2**40


@dataclass(frozen=True)
class Study:
    """One thing to segment, found but not yet read."""

    name: str
    """What its results are called: only characters of [A-Za-z0-9._-], unique in one search."""
    source: str
    """The path as the user would know it. Only for the user's eyes: never into a log or the ledger."""
    parts: tuple[str, ...]
    """The file or folder of each channel, in channel order; one for most studies."""
    kind: Kind


@dataclass(frozen=True)
class Found:
    """What a search gave: the studies in order of their names, and what could not become one."""

    studies: list[Study]
    failures: list[tuple[str, StudyError]]


@dataclass(frozen=True)
class Header:
    """What is known of a study before its voxels are read."""

    shape: tuple[int, int, int]
    """Voxels along z, y, x."""
    channels: int
    has_channel_axis: bool
    """Whether the image and its labels get a c axis."""
    dtype: np.dtype[Any]
    """The type of the slabs, in native byte order."""
    affine: NDArray[np.float64]
    """4x4, over (x, y, z), to mm RAS."""
    nifti: dict[str, Any] | None
    """What writing a NIfTI mask like the input takes: qform_code, sform_code, xyzt_units, shape (stored,
    x first), qform and sform (nested lists, or None where the code is 0); None for other kinds."""
    warnings: tuple[str, ...]


class Source(Protocol):
    """One open study."""

    @property
    def header(self) -> Header: ...

    def slabs(self, rows: int) -> Iterator[Slab]:
        """Slabs (c, at most `rows`, y, x), C order, native endian, scaled, in z order; all but the last full.

        Never holds more than a slab (and for OME-Zarr a row of chunks). Raises StudyError("input") where the
        bytes are damaged, missing or too many, or a voxel is NaN or infinite. The slab is the caller's.
        """
        ...

    def digest(self) -> str:
        """sha256 hex of the content; known once `slabs` is exhausted, before that RuntimeError."""
        ...
