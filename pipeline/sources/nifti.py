"""NIfTI-1 and NIfTI-2, .nii and .nii.gz, as a source.

NIfTI stores x fastest, so a run of its bytes is rows of z, each y by x, in C order: a slab is a plain read.
Channels lie far apart (one file each, or one after another in a 5-D file), so each is a stream of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np

from pipeline.errors import StudyError
from pipeline.geometry import furthest_corner_mm
from pipeline.sources.base import Header, Slab, Study
from pipeline.sources.nifti_header import Facts, read_facts
from pipeline.sources.stream import ByteStream, hash_file
from pipeline.sources.voxels import check_finite, convert, slab_dtype

# Writers round files up to whole blocks; more than this after the voxels means that the header is wrong.
TOLERATED_PADDING = 1 << 16
CHANNELS_APART_MM = 1e-3


@contextmanager
def open_nifti(study: Study, *, volume: int | None = None) -> Iterator[NiftiSource]:
    """Open a study of NIfTI files; raises StudyError ("input" or "geometry") as `open_source` says."""
    yield NiftiSource(study.parts, volume)


def digest_nifti(study: Study, *, volume: int | None = None) -> str:
    """The digest of the stored bytes, without unpacking them."""
    return _joined([hash_file(part) for part in study.parts], volume)


def _joined(digests: list[str], volume: int | None) -> str:
    """One file: its sha256; several: the sha256 of theirs in a row. A picked volume counts as content."""
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return digest if volume is None else hashlib.sha256(f"{digest} volume {volume}".encode()).hexdigest()


class NiftiSource:
    """The volumes of one file, or of one file per channel, side by side as channels."""

    def __init__(self, parts: tuple[str, ...], volume: int | None) -> None:
        self._parts = parts
        self._volume = volume
        self._facts = [_facts_of(part) for part in parts]
        self._digest: str | None = None
        self._streams = [
            (part, offset)
            for part, facts in enumerate(self._facts)
            for offset in _volume_offsets(facts, volume, alone=len(parts) == 1)
        ]
        self.header = self._header()

    def _header(self) -> Header:
        first = self._facts[0]
        for facts in self._facts[1:]:
            _check_same_place(first, facts)
        channels = len(self._streams)
        dtypes = {slab_dtype(f.dtype, f.slope, f.inter) for f in self._facts}
        return Header(
            shape=first.shape_zyx,
            channels=channels,
            has_channel_axis=channels > 1,
            dtype=np.result_type(*dtypes),
            affine=first.affine,
            nifti=first.nifti,
            warnings=tuple(dict.fromkeys(w for facts in self._facts for w in facts.warnings)),
        )

    def slabs(self, rows: int) -> Iterator[Slab]:
        """Slabs (c, at most `rows`, y, x) in z order; see `Source.slabs`."""
        if rows < 1:
            raise ValueError(f"rows is {rows}; expected 1 or more")
        z, y, x = self.header.shape
        with ExitStack() as stack:
            streams = [stack.enter_context(self._start(part, offset)) for part, offset in self._streams]
            for start in range(0, z, rows):
                count = min(rows, z - start)
                slab = self._slab(streams, (count, y, x))
                check_finite(slab, start)
                yield slab
                del slab  # the caller's alone, so that two are never held
            self._digest = self._finish(streams)

    def digest(self) -> str:
        """sha256 hex; see `Source.digest`."""
        if self._digest is None:
            raise RuntimeError("the digest is known once slabs() is exhausted")
        return self._digest

    def _start(self, part: int, offset: int) -> ByteStream:
        stream, facts = ByteStream(self._parts[part]), self._facts[part]
        try:
            if stream.read(len(facts.raw)) != facts.raw:
                raise StudyError("input", "it changed while it was being read; run again when it is complete")
            stream.skip(facts.data_offset - len(facts.raw) + offset)
        except BaseException:
            stream.close()
            raise
        return stream

    def _slab(self, streams: list[ByteStream], shape: tuple[int, int, int]) -> Slab:
        if len(streams) == 1:
            return self._rows(streams[0], self._facts[0], shape)[np.newaxis]
        slab = np.empty((len(streams), *shape), self.header.dtype)
        for channel, (stream, (part, _)) in enumerate(zip(streams, self._streams, strict=True)):
            slab[channel] = self._rows(stream, self._facts[part], shape)
        return slab

    def _rows(self, stream: ByteStream, facts: Facts, shape: tuple[int, int, int]) -> Slab:
        raw = np.empty(shape, facts.dtype)
        stream.read_into(raw.reshape(-1).view(np.uint8).data)
        return convert(raw, facts.slope, facts.inter)

    def _finish(self, streams: list[ByteStream]) -> str:
        """Check and hash the rest of every file, each by the stream that is furthest in it."""
        last = {part: (stream, offset) for stream, (part, offset) in zip(streams, self._streams, strict=True)}
        digests = []
        for part, (stream, offset) in sorted(last.items()):
            facts = self._facts[part]
            stream.skip(facts.data_bytes - offset - facts.volume_bytes)
            digests.append(stream.finish(TOLERATED_PADDING))
        return _joined(digests, self._volume)


def _facts_of(path: str) -> Facts:
    with ByteStream(path) as stream:
        return read_facts(stream)


def _volume_offsets(facts: Facts, volume: int | None, *, alone: bool) -> list[int]:
    """Where in the file's voxels each channel of the wanted volume starts, in bytes."""
    volumes, channels = facts.volumes, facts.channels
    if volume is None and volumes > 1:
        raise StudyError(
            "input",
            f"it is 4-D with {volumes} volumes, one was expected; name one for `segment --volume N` "
            f"(0 to {volumes - 1})",
        )
    if volume is not None and not 0 <= volume < volumes:
        raise StudyError(
            "input", f"--volume {volume} is not in it: it has {volumes}, counted from 0; name one of these"
        )
    if channels > 1 and not alone:
        raise StudyError("input", "one file of a folder of channels holds several channels itself; expected one")
    return [(c * volumes + (volume or 0)) * facts.volume_bytes for c in range(channels)]


def _check_same_place(first: Facts, other: Facts) -> None:
    if first.shape_zyx != other.shape_zyx:
        raise StudyError(
            "geometry",
            f"its channels differ in size (z, y, x): {first.shape_zyx} and {other.shape_zyx}; "
            "resample them to one grid",
        )
    apart = furthest_corner_mm(first.affine, other.affine, first.shape_zyx)
    if apart > CHANNELS_APART_MM:
        raise StudyError(
            "geometry",
            f"its channels lie up to {apart:.3g} mm apart; at most {CHANNELS_APART_MM:g} mm is expected, "
            "resample them to one grid",
        )
