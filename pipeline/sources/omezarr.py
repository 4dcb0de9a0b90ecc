"""OME-Zarr images, 0.4 (Zarr v2) and 0.5 (Zarr v3), as a source: the full resolution of one image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from pipeline import store
from pipeline.errors import StudyError
from pipeline.geometry import Affine, affine_from_ome, check_affine, ome_scale, ome_translation
from pipeline.sources.base import Header, Slab, Study
from pipeline.sources.ome_metadata import Image, read_image
from pipeline.sources.voxels import check_finite
from pipeline.sources.zarr_array import open_array, read

# A row of chunks is kept until its slabs are out, so that no chunk is decoded twice, if it is not larger.
LARGEST_KEPT = 256 << 20
# How far a kept affine may be from the scale and translation beside it, which may have been rounded.
AGREEMENT = 1e-4


@contextmanager
def open_omezarr(study: Study, *, volume: int | None = None) -> Iterator[OmeZarrSource]:
    """Open an OME-Zarr image; raises StudyError ("input" or "geometry") as `open_source` says."""
    yield OmeZarrSource(study.parts[0], volume)


def digest_omezarr(study: Study, *, volume: int | None = None) -> str:
    """The digest of the decoded voxels, by reading them all."""
    with open_omezarr(study, volume=volume) as source:
        for _ in source.slabs(source.chunk_rows):
            pass
        return source.digest()


class OmeZarrSource:
    """The voxels of one image."""

    def __init__(self, folder: str, volume: int | None) -> None:
        image = read_image(folder)
        self._array = open_array(store.join(folder, image.path), image.zarr_format)
        sizes = dict(zip(image.axes, self._array.shape, strict=False))
        if len(sizes) != self._array.ndim or len(sizes) != len(image.axes):
            raise StudyError("input", f"its array has {self._array.ndim} axes, its metadata {len(image.axes)}")
        self._lead: tuple[Any, ...] = _picked_time(sizes.get("t"), volume)
        if "c" in sizes:
            self._lead = (*self._lead, slice(None))
        self._stored = self._array.dtype.newbyteorder("<")
        self.chunk_rows = int(self._array.chunks[-3])
        self._digest: str | None = None
        affine, warnings = _affine(image)
        self.header = Header(
            shape=(sizes["z"], sizes["y"], sizes["x"]),
            channels=sizes.get("c", 1),
            has_channel_axis="c" in sizes,
            dtype=_slab_dtype(self._array.dtype),
            affine=affine,
            nifti=None,
            warnings=(*image.warnings, *warnings),
        )

    def slabs(self, rows: int) -> Iterator[Slab]:
        """Slabs (c, at most `rows`, y, x) in z order; see `Source.slabs`."""
        if rows < 1:
            raise ValueError(f"rows is {rows}; expected 1 or more")
        z, y, x = self.header.shape
        kept = self.header.channels * self.chunk_rows * y * x * self.header.dtype.itemsize
        aligned = rows % self.chunk_rows == 0 or rows >= z or kept > LARGEST_KEPT
        sha256 = hashlib.sha256(self._facts())
        start = 0
        for slab in self._blocks(rows) if aligned else _regrouped(self._blocks(self.chunk_rows), rows, z):
            check_finite(slab, start)
            self._update(sha256, slab)
            start += slab.shape[1]
            yield slab
            del slab
        self._digest = sha256.hexdigest()

    def digest(self) -> str:
        """sha256 hex over type, shape, affine and voxels; see `Source.digest`."""
        if self._digest is None:
            raise RuntimeError("the digest is known once slabs() is exhausted")
        return self._digest

    def _blocks(self, rows: int) -> Iterator[Slab]:
        z, y, x = self.header.shape
        for start in range(0, z, rows):
            stop = min(start + rows, z)
            block = read(self._array, (*self._lead, slice(start, stop)), start, stop - 1)
            yield np.ascontiguousarray(block, self.header.dtype).reshape(-1, stop - start, y, x)

    def _facts(self) -> bytes:
        facts = [self._stored.str, self.header.channels, self.header.has_channel_axis, self.header.shape]
        return json.dumps([*facts, self.header.affine.tolist()]).encode()

    def _update(self, sha256: hashlib._Hash, slab: Slab) -> None:
        """Row by row and in it channel by channel, so that it does not matter how many rows a slab has."""
        for z in range(slab.shape[1]):
            for c in range(slab.shape[0]):
                sha256.update(slab[c, z].astype(slab.dtype.newbyteorder("<"), copy=False).data)


def _regrouped(blocks: Iterator[Slab], rows: int, total: int) -> Iterator[Slab]:
    """Slabs of exactly `rows` rows (the last: what is left) from blocks of another height."""
    block, used = next(blocks), 0
    for start in range(0, total, rows):
        count = min(rows, total - start)
        slab = np.empty((block.shape[0], count, *block.shape[2:]), block.dtype)
        done = 0
        while done < count:
            if used == block.shape[1]:
                block, used = next(blocks), 0
            take = min(count - done, block.shape[1] - used)
            slab[:, done : done + take] = block[:, used : used + take]
            done, used = done + take, used + take
        yield slab
        del slab


def _picked_time(times: int | None, volume: int | None) -> tuple[int, ...]:
    """The index of the one time point to read; () where there is no time axis."""
    count = 1 if times is None else times
    if volume is None and count > 1:
        raise StudyError(
            "input",
            f"it has {count} time points, one was expected; name one for `segment --volume N` (0 to {count - 1})",
        )
    if volume is not None and not 0 <= volume < count:
        raise StudyError("input", f"--volume {volume} is not in it: it has {count}, counted from 0; name one of these")
    return () if times is None else (volume or 0,)


def _slab_dtype(stored: np.dtype[Any]) -> np.dtype[Any]:
    """Native; bool as uint8 and float16 as float32, which torch and NIfTI can hold."""
    if stored.kind == "b":
        return np.dtype(np.uint8)
    return np.dtype(np.float32) if stored == np.float16 else stored.newbyteorder("=")


def _affine(image: Image) -> tuple[Affine, tuple[str, ...]]:
    """The kept affine if it agrees with scale and translation, else these two, with a warning."""
    plain = check_affine(affine_from_ome(image.scale, image.translation))
    if image.affine is None:
        return plain, ("no affine is kept: the axes are taken to lie along R, A, S (scale and translation only)",)
    kept = _agreeing(image)
    if kept is not None:
        return kept, ()
    return plain, ("the kept affine does not agree with the scale and translation, which were used instead",)


def _agreeing(image: Image) -> Affine | None:
    try:
        affine = check_affine(np.array(image.affine, dtype=np.float64))
    except (StudyError, TypeError, ValueError):
        return None
    if not np.allclose(ome_scale(affine), image.scale, rtol=AGREEMENT, atol=0):
        return None
    # Writers that know no rotation leave the translation out; one that is there must be the affine's.
    moved = any(image.translation)
    near = AGREEMENT * max(image.scale)
    if moved and not np.allclose(ome_translation(affine), image.translation, rtol=AGREEMENT, atol=near):
        return None
    return affine
