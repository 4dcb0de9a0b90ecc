"""A source into the study's image on disk: slabs in stored order, digest and statistics on the way."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import ledger, objects, ome, statistics, store
from .errors import Interrupted, StudyError
from .geometry import ome_scale
from .pyramid import build_pyramid
from .sources import Header, Source, Study, digest_of, open_source, version_of

# Statistics are summed over chunks of about this many voxels, whole rows, fixed by the image's shape.
STATISTICS_VOXELS = 1 << 20
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Image:
    """A study on disk. `group`: its OME-Zarr; `level0`: the path of its finest array in there; `statistics`: URL of
    its sums; `content`: digest of the source.
    """

    group: str
    statistics: str
    content: str
    header: Header
    path: str = "0"

    @property
    def level0(self) -> str:
        return store.join(self.group, self.path)


def image_url(out: str, name: str) -> str:
    return store.join(out, "images", name + ".ome.zarr")


def _statistics_url(out: str, content: str) -> str:
    return store.join(out, "images", ".statistics", content + ".npz")


def known_content(out: str, study: Study) -> str | None:
    """The content that the image already in OUT under this study's name was made of, None if there is none whole."""
    url = image_url(out, study.name)
    if store.is_link(url):
        return None  # the pixels are the user's and may have changed: they are read again
    facts = (ome.read_attributes(url) or {}).get("maskmill", {})
    content = facts.get("content")
    if not content or not store.exists(_statistics_url(out, content)):
        return None
    # A chunk that is not there would be read as zeros. Older images do not say how much there was.
    return content if facts.get("stored") in (None, store.footprint(store.join(url, "0"))) else None


def stage_image(
    out: str, study: Study, *, volume: int | None, link: bool, stop: threading.Event
) -> tuple[Image, str | None]:
    """Read the study. Gives its image and, where one had to be made, the hidden folder it waits in.

    An image made of the same content is taken as it stands after the source's bytes were hashed, or where an object
    store vouches for them. Raises StudyError, and Interrupted when `stop` is set meanwhile.
    """
    target = image_url(out, study.name)
    link = link or store.is_link(target)  # once linked, a study stays linked
    known, version = known_content(out, study), version_of(study, volume=volume)
    with open_source(study, volume=volume) as source:
        header = source.header
        if known is not None and (_is_of_version(target, version) or digest_of(study, volume=volume) == known):
            return Image(target, _statistics_url(out, known), known, header), None
        if link and study.kind == "ome-zarr":
            path = _link(study, target)
            content = _scan(out, source, stop)
            return Image(target, _statistics_url(out, content), content, header, path), None
        # A name of its own: another command may be reading the same study into the same OUT.
        staged = store.join(out, "images", f".{ledger.location_key(study.source)}-{secrets.token_hex(4)}.ome.zarr")
        try:
            content = _write(out, source, staged, study.name, version, stop)
        except BaseException:
            store.delete(staged)  # half an image is of no use, and may be large
            raise
    return Image(target, _statistics_url(out, content), content, header), staged


def _is_of_version(image: str, version: str | None) -> bool:
    """Whether an image was made of the objects as they are now."""
    facts = (ome.read_attributes(image) or {}).get("maskmill", {})
    return version is not None and facts.get("source_version") == version


def _write(out: str, source: Source, group: str, name: str, version: str | None, stop: threading.Event) -> str:
    """Stream the source into an OME-Zarr at `group`; its own metadata is written last, so it is whole or not there."""
    header = source.header
    names = ome.axis_names(header.has_channel_axis)
    shards = ome.image_shard_shape(header.shape, header.channels, header.dtype.itemsize)
    shape = (header.channels, *header.shape) if header.has_channel_axis else header.shape
    array = ome.create_array(store.join(group, "0"), shape, shards, header.dtype, names)
    sums = _channel_sums(header)
    row = 0
    for slab in source.slabs(shards[0]):
        _heed(stop)
        rows = slice(row, row + slab.shape[1])
        array[(..., rows, slice(None), slice(None))] = slab if header.has_channel_axis else slab[0]
        _add(sums, slab)
        row += slab.shape[1]
    content = source.digest()
    channels = _keep_statistics(out, content, sums)
    build_pyramid(group, labels=False, names=names)
    store.sync_tree(group)
    stored = store.footprint(store.join(group, "0"))
    ome.write_group(
        group, _attributes(header, name, {"content": content, "source_version": version, "stored": stored}, channels)
    )
    return content


def _heed(stop: threading.Event) -> None:
    if stop.is_set():
        raise Interrupted


def _scan(out: str, source: Source, stop: threading.Event) -> str:
    """Digest and statistics of a source whose pixels stay where they are."""
    header = source.header
    sums = _channel_sums(header)
    for slab in source.slabs(_chunk_rows(header)):
        _heed(stop)
        _add(sums, slab)
    content = source.digest()
    _keep_statistics(out, content, sums)
    return content


def _chunk_rows(header: Header) -> int:
    """Rows a statistics chunk has: a power of two, so that shards hold whole ones."""
    rows = max(1, STATISTICS_VOXELS // (header.shape[1] * header.shape[2]))
    return min(8, 1 << (rows.bit_length() - 1))


def _channel_sums(header: Header) -> list[statistics.ChannelSums]:
    return [statistics.ChannelSums(header.dtype, _chunk_rows(header)) for _ in range(header.channels)]


def _add(sums: list[statistics.ChannelSums], slab: np.ndarray) -> None:
    if slab.dtype == np.float64 and max(-float(slab.min()), float(slab.max())) > LARGEST:
        raise StudyError(
            "input",
            f"it holds numbers from {slab.min():.3g} to {slab.max():.3g}, but networks compute in float32, which "
            "ends at 3.4e38; rescale it",
        )
    for channel, voxels in zip(sums, slab, strict=True):
        channel.add(voxels)


def _keep_statistics(out: str, content: str, sums: list[statistics.ChannelSums]) -> list[statistics.ChannelStatistics]:
    channels = [channel.finish() for channel in sums]
    store.write(_statistics_url(out, content), statistics.to_bytes(channels))
    return channels


def _attributes(
    header: Header, name: str, facts: dict[str, Any], channels: list[statistics.ChannelStatistics]
) -> dict[str, Any]:
    window = [{"min": c.minimum, "max": c.maximum, "start": c.minimum, "end": c.maximum} for c in channels]
    return {
        "ome": {
            "version": ome.VERSION,
            "multiscales": ome.multiscales(
                name, header.shape, ome_scale(header.affine), header.has_channel_axis, "mean"
            ),
            "omero": {
                "channels": [{"color": "FFFFFF", "active": True, "window": w} for w in window],
                "rdefs": {"model": "greyscale"},
            },
        },
        "maskmill": {
            "affine": header.affine.tolist(),
            **facts,
            "nifti": header.nifti,
            "warnings": list(header.warnings),
        },
    }


def _link(study: Study, target: str) -> str:
    """Let OUT's name for the study stand for the user's OME-Zarr itself; gives the path of its finest array."""
    if objects.is_remote(target) or objects.is_remote(study.parts[0]):
        raise StudyError("input", "--images link needs the image and OUT on local disks: run without it")
    path = store.local(target)
    source = store.local(study.parts[0]).resolve()
    if path.exists() and not path.is_symlink():
        raise StudyError(
            "storage",
            "--images link: OUT already holds a copy of this image; run without --images link, or into another OUT",
        )
    if not (source / "zarr.json").is_file():
        raise StudyError(
            "input", "--images link needs an OME-Zarr 0.5 (Zarr v3) image; this one is older: run without it"
        )
    attributes = ome.read_attributes(str(source)) or {}
    multiscale = attributes["ome"]["multiscales"][0]
    finest = str(multiscale["datasets"][0]["path"])
    if "t" in [str(axis["name"]).lower() for axis in multiscale["axes"]]:
        raise StudyError(
            "input", "--images link needs axes z,y,x or c,z,y,x; this image has a time axis: run without it"
        )
    if path.resolve() != source:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(source, target_is_directory=True)
    return finest
