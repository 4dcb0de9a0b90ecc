"""Where studies come from: find them, read them in slabs, digest them on the way.

found = find_studies(["scans/"], exclude=None)
with open_source(found.studies[0]) as source:
    for slab in source.slabs(rows=32): ...          # (c, <= 32, y, x)
    source.digest()
"""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager

from pipeline import objects
from pipeline.sources.base import Found, Header, Kind, Slab, Source, Study
from pipeline.sources.find import find_studies

__all__ = [
    "Found",
    "Header",
    "Kind",
    "Slab",
    "Source",
    "Study",
    "digest_of",
    "find_studies",
    "open_source",
    "version_of",
]


def open_source(study: Study, *, volume: int | None = None) -> AbstractContextManager[Source]:
    """Open one study; `volume` picks one of a 4-D file (counted from 0).

    Raises StudyError: "input" for what cannot be read as one volume, "geometry" for an affine that does not
    place it in space.
    """
    if study.kind == "nifti":
        from pipeline.sources.nifti import open_nifti

        return open_nifti(study, volume=volume)
    from pipeline.sources.omezarr import open_omezarr

    return open_omezarr(study, volume=volume)


def digest_of(study: Study, *, volume: int | None = None) -> str:
    """The digest that reading the study would give, without decoding more than that takes.

    For NIfTI that is a pass over the stored bytes; whether they decode is not checked. An OME-Zarr's voxels
    are decoded, because the same voxels may be stored in many ways.
    """
    if study.kind == "nifti":
        from pipeline.sources.nifti import digest_nifti

        return digest_nifti(study, volume=volume)
    from pipeline.sources.omezarr import digest_omezarr

    return digest_omezarr(study, volume=volume)


def version_of(study: Study, *, volume: int | None = None) -> str | None:
    """What an object store vouches for a study's bytes with, without reading them; None where only reading tells.

    Two studies of one version have one digest; the reverse does not hold.
    """
    if not all(map(objects.is_remote, study.parts)):
        return None
    versions = [objects.version(part) for part in study.parts]
    return hashlib.sha256("\n\n".join([*versions, f"volume {volume}"]).encode()).hexdigest()
