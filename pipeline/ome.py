"""OME-Zarr 0.5, written to the letter: sharded Zarr v3 arrays, multiscale and label metadata.

Spec: https://ngff.openmicroscopy.org/0.5 (axes, coordinateTransformations, labels, image-label). The affine, which
0.5 cannot express, stands in `attributes.maskmill.affine`: RAS mm over voxel indices (x, y, z), as nibabel has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from . import store
from .errors import StudyError
from .grid import Triple

VERSION = "0.5"
CHUNK = 64
SHARD = (64, 128, 128)
SLAB_BYTES = 64 << 20
TOP_LEVEL = 256  # the pyramid ends when every axis is at most this long
LEAST = 64  # an axis this short is not halved
DAMAGED = (
    "what is stored of it in OUT is damaged ({}): check the disk, remove its folder from OUT/images and run again, it "
    "is then read anew"
)


def shard_shape(shape: Triple) -> Triple:
    """The shard of a study of `shape` (z,y,x): 64x128x128, cut to the axis rounded up to whole chunks of 8."""
    z, y, x = (min(s, -(-n // 8) * 8) for s, n in zip(SHARD, shape, strict=True))
    return z, y, x


def chunk_shape(shard: Triple) -> Triple:
    """Chunks inside a shard: half a shard where that is 64 or more, so that a read takes what it needs."""
    z, y, x = (s // 2 if s > CHUNK and s % 2 == 0 else s for s in shard)
    return z, y, x


def image_shard_shape(shape: Triple, channels: int, itemsize: int) -> Triple:
    """Shards of the image itself: as the labels', with fewer rows where a slab of them would pass 64 MiB."""
    rows, y, x = shard_shape(shape)
    while rows > 8 and rows * shape[1] * shape[2] * channels * itemsize > SLAB_BYTES:
        rows = max(8, rows // 2 // 8 * 8)
    return rows, y, x


def level_shapes(shape: Triple) -> list[Triple]:
    """Shapes of the pyramid: axes longer than 64 are halved (rounding up) until all are at most 256."""
    shapes = [shape]
    while max(shapes[-1]) > TOP_LEVEL:
        z, y, x = (-(-n // 2) if n > LEAST else n for n in shapes[-1])
        shapes.append((z, y, x))
    return shapes


def level_factors(shape: Triple) -> list[Triple]:
    """Per level, how many voxels of level 0 one of its voxels spans on each axis."""
    factors: list[Triple] = [(1, 1, 1)]
    for n in level_shapes(shape)[:-1]:
        z, y, x = (f * (2 if length > LEAST else 1) for f, length in zip(factors[-1], n, strict=True))
        factors.append((z, y, x))
    return factors


def create_array(
    url: str,
    shape: Sequence[int],
    shards: Sequence[int],
    dtype: np.dtype[Any],
    names: Sequence[str],
    attributes: dict[str, Any] | None = None,
) -> zarr.Array[Any]:
    """A sharded level of a pyramid; leading axes (channel) are one to a shard.

    Every chunk carries its checksum: bytes that rot on a disk are found when they are read, not computed with.
    """
    lead = len(shape) - 3
    chunks = chunk_shape((shards[-3], shards[-2], shards[-1]))
    shuffle = "bitshuffle" if dtype.itemsize > 1 else "noshuffle"
    return zarr.create_array(
        store=store.zarr_store(url),
        shape=tuple(shape),
        dtype=dtype,
        shards=(1,) * lead + tuple(shards),
        chunks=(1,) * lead + chunks,
        compressors=[BloscCodec(cname="zstd", clevel=3, shuffle=shuffle), Crc32cCodec()],
        fill_value=0,
        dimension_names=list(names),
        attributes=attributes,
        overwrite=True,
    )


def open_array(url: str, mode: str = "r") -> zarr.Array[Any]:
    """The array at `url`. Raises StudyError("storage") where its metadata is damaged, OSError where it is not there."""
    try:
        return zarr.open_array(store.zarr_store(url, read_only=mode == "r"), mode=mode)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # by whatever zarr stumbles over
        raise StudyError("storage", DAMAGED.format(type(error).__name__)) from error


def read(array: Any, selection: tuple[Any, ...]) -> np.ndarray:
    """A part of an array. Raises StudyError("storage") where its bytes are damaged."""
    try:
        part: np.ndarray = array[selection]
    except (ValueError, RuntimeError) as error:  # what codecs raise
        raise StudyError("storage", DAMAGED.format(error)) from error
    return part


def axis_names(channel_axis: bool) -> list[str]:
    return ["c", "z", "y", "x"] if channel_axis else ["z", "y", "x"]


def multiscales(
    name: str,
    shape: Triple,
    spacing: Triple | Sequence[float],
    channel_axis: bool,
    method: str,
    origin: Sequence[float] = (0.0, 0.0, 0.0),
) -> list[dict[str, Any]]:
    """The `multiscales` entry of a pyramid whose levels average (image) or vote (labels) over 2-voxel steps.

    `spacing`, and `origin` (where the first voxel's centre lies), in mm over z,y,x. A level's first voxel lies half a
    step further in: hence its translation.
    """
    axes = [{"name": n, "type": "space", "unit": "millimeter"} for n in "zyx"]
    lead_axes: list[dict[str, str]] = [{"name": "c", "type": "channel"}] if channel_axis else []
    lead = [1.0] if channel_axis else []
    datasets = []
    for level, factors in enumerate(level_factors(shape)):
        scale = lead + [f * s for f, s in zip(factors, spacing, strict=True)]
        transforms: list[dict[str, Any]] = [{"type": "scale", "scale": scale}]
        offset = [o + (f - 1) / 2 * s for o, f, s in zip(origin, factors, spacing, strict=True)]
        if level or any(offset):
            transforms.append({"type": "translation", "translation": [0.0] * len(lead) + offset})
        datasets.append({"path": str(level), "coordinateTransformations": transforms})
    return [{"name": name, "axes": lead_axes + axes, "datasets": datasets, "type": method}]


def write_group(url: str, attributes: dict[str, Any]) -> None:
    """Write a group's zarr.json in one atomic step."""
    store.write_json(
        store.join(url, "zarr.json"),
        {"zarr_format": 3, "node_type": "group", "attributes": attributes},
    )


def read_attributes(url: str) -> dict[str, Any] | None:
    """Attributes of the Zarr v3 group at `url`, None where there is none."""
    document = store.read_json(store.join(url, "zarr.json"))
    return document.get("attributes", {}) if isinstance(document, dict) else None


def made_for(labels: str) -> str | None:
    """The study key that the label image or array at `labels` was made for, None where there is none.

    Through a linked image labels of other content may come to stand at the same place.
    """
    key = (read_attributes(labels) or {}).get("maskmill", {}).get("key")
    return key if isinstance(key, str) else None


def labels_listed(image: str) -> list[str]:
    """Names of the label images that readers of `image` are told of."""
    attributes = read_attributes(store.join(image, "labels")) or {}
    return list(attributes.get("ome", {}).get("labels", []))


def list_labels(image: str, names: Sequence[str]) -> None:
    """Tell readers of `image` of exactly these label images: the write that publishes, or withdraws, them."""
    url = store.join(image, "labels")
    if not names:  # a list of labels has at least one
        store.delete(store.join(url, "zarr.json"))
        return
    attributes = read_attributes(url) or {}
    ome = {**attributes.get("ome", {}), "version": VERSION, "labels": list(names)}
    write_group(url, {**attributes, "ome": ome})
