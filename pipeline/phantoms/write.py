"""Phantoms as files: image and mask side by side, streamed slab by slab, each there whole or not at all."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import ome, store
from ..colors import label_colors
from ..exports.nifti import nifti_file
from ..geometry import ome_scale
from ..grid import Box
from ..pyramid import build_pyramid
from .render import Phantom

SLAB_VOXELS = 16 << 20
IMAGES, MASKS = "images", "labels"


def slabs(phantom: Phantom, rows: int) -> Iterator[tuple[int, NDArray[np.int16], NDArray[np.uint8]]]:
    """First row, image and mask of one slab after the other."""
    depth, height, width = phantom.shape
    for z in range(0, depth, rows):
        yield z, *phantom.region(Box((z, 0, 0), (min(z + rows, depth), height, width)))


def write_nifti(phantom: Phantom, folder: str, name: str, *, ending: str = ".nii.gz") -> None:
    """Write images/NAME.nii.gz (int16) and labels/NAME.nii.gz (uint8) into a folder; `ending` may be .nii instead.

    The mask appears just before the image. Memory: slabs of about 16 million voxels, at least one row of z.
    """
    rows = max(1, SLAB_VOXELS // (phantom.shape[1] * phantom.shape[2]))
    image, mask = (store.join(folder, part, name + ending) for part in (IMAGES, MASKS))
    with (
        nifti_file(image, phantom.shape, np.dtype(np.int16), phantom.affine) as append_image,
        nifti_file(mask, phantom.shape, np.dtype(np.uint8), phantom.affine) as append_mask,
    ):
        for _, hu, labels in slabs(phantom, rows):
            append_image(hu)
            append_mask(labels)


def write_omezarr(phantom: Phantom, folder: str, name: str) -> None:
    """Write images/NAME.ome.zarr and labels/NAME.ome.zarr into a folder, with pyramids; what stood there is replaced.

    Each is an image of its own (OME-Zarr 0.5) with its affine in attributes.maskmill. The mask appears just before the
    image. Memory: one row of shards, at most 64 MiB of image, and what building a pyramid takes.
    """
    shards = ome.image_shard_shape(phantom.shape, 1, 2)
    names, token = ome.axis_names(False), secrets.token_hex(4)
    dtypes: dict[str, np.dtype[Any]] = {MASKS: np.dtype(np.uint8), IMAGES: np.dtype(np.int16)}
    staged = {part: store.join(folder, part, f".{name}.{token}{store.PARTIAL}") for part in dtypes}
    try:
        arrays = {
            part: ome.create_array(store.join(staged[part], "0"), phantom.shape, shards, dtype, names)
            for part, dtype in dtypes.items()
        }
        for z, hu, labels in slabs(phantom, shards[0]):
            arrays[IMAGES][z : z + shards[0]] = hu
            arrays[MASKS][z : z + shards[0]] = labels
        for part, group in staged.items():
            build_pyramid(group, labels=part == MASKS, names=names)
            ome.write_group(group, _attributes(phantom, name, part))
            store.sync_tree(group)
        for part, group in staged.items():
            target = store.join(folder, part, name + ".ome.zarr")
            store.delete(target)
            store.move(group, target)
    except BaseException:
        for group in staged.values():
            store.delete(group)
        raise


def _attributes(phantom: Phantom, name: str, part: str) -> dict[str, Any]:
    mask = part == MASKS
    scales = ome.multiscales(name, phantom.shape, ome_scale(phantom.affine), False, "mode" if mask else "mean")
    described: dict[str, Any] = {"version": ome.VERSION, "multiscales": scales}
    if mask:
        colors = label_colors(max(phantom.labels))
        described["image-label"] = {
            "version": ome.VERSION,
            "colors": [{"label-value": v, "rgba": [*colors[v - 1], 255]} for v in phantom.labels],
            "properties": [{"label-value": v, "name": structure} for v, structure in phantom.labels.items()],
        }
    return {"ome": described, "maskmill": {"affine": phantom.affine.tolist(), "phantom": {"seed": phantom.seed}}}
