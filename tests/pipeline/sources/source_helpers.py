"""Write scans with independent tools (nibabel, plain zarr calls), and read them whole through a source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import zarr

from pipeline.sources import Header, Study, digest_of, open_source

AFFINE = np.array([[-0.9, 0.1, 0.3, 12.0], [0.2, 1.1, -0.2, -7.5], [0.1, -0.3, 2.9, 40.25], [0, 0, 0, 1.0]])


def nifti(*parts: Path) -> Study:
    return Study("study", str(parts[0]), tuple(map(str, parts)), "nifti")


def ome(folder: Path) -> Study:
    return Study("study", str(folder), (str(folder),), "ome-zarr")


def read_whole(study: Study, rows: int = 4, volume: int | None = None) -> tuple[np.ndarray, Header]:
    """All slabs joined, (c, z, y, x); checks what every source promises of its slabs and digest."""
    with open_source(study, volume=volume) as source:
        header, slabs = source.header, list(source.slabs(rows))
        digest = source.digest()
    assert all(slab.dtype == header.dtype and slab.dtype.isnative for slab in slabs)
    assert all(slab.flags.c_contiguous for slab in slabs)
    assert [slab.shape[1] for slab in slabs[:-1]] == [rows] * (len(slabs) - 1)
    assert digest == digest_of(study, volume=volume)
    assert len(digest) == 64
    whole = np.concatenate(slabs, axis=1)
    assert whole.shape == (header.channels, *header.shape)
    return whole, header


def write_nifti(
    path: Path, stored: np.ndarray, affine: np.ndarray = AFFINE, *, slope: float = 1.0, inter: float = 0.0,
    big_endian: bool = False, version: int = 1,
) -> Path:  # fmt: skip
    """A NIfTI file of exactly these stored numbers (x, y, z, ...), with slope and intercept in the header."""
    kind = nib.Nifti1Image if version == 1 else nib.Nifti2Image
    image = kind(np.zeros(stored.shape, np.uint8), affine)
    header = image.header.as_byteswapped(">" if big_endian else "<")
    header.set_data_dtype(stored.dtype)
    header["scl_slope"], header["scl_inter"] = slope, inter
    header["vox_offset"] = 352 if version == 1 else 544
    header["magic"] = b"n+1" if version == 1 else b"n+2"
    order = stored.dtype.newbyteorder(">" if big_endian else "<")
    data = header.binaryblock + b"\0\0\0\0" + stored.astype(order).tobytes(order="F")
    with nib.openers.Opener(str(path), "wb") as file:
        file.write(data)
    return path


def write_ome(
    folder: Path, voxels: np.ndarray, *, version: str = "0.5", axes: str | None = None, scale: Any = None,
    unit: str | None = "millimeter", dataset: Any = None, multiscale: Any = None, maskmill: Any = None,
    path: str = "0", **array: Any,
) -> Path:  # fmt: skip
    """An OME-Zarr image of one level; `dataset` and `multiscale` add keys to these two objects."""
    axes = axes or "tczyx"[-voxels.ndim :]
    zarr_format = 3 if version == "0.5" else 2
    folder.mkdir(parents=True)
    chunks = array.pop("chunks", tuple(min(n, 8) for n in voxels.shape))
    written = zarr.create_array(
        str(folder / "0"),
        shape=voxels.shape,
        chunks=chunks,
        dtype=voxels.dtype,
        zarr_format=zarr_format,
        **array,
    )
    written[...] = voxels
    kinds = {"t": "time", "c": "channel"}
    described: list[dict[str, str]] = [{"name": n, "type": kinds.get(n, "space")} for n in axes]
    if unit:
        described = [{**axis, "unit": unit} if axis["type"] == "space" else axis for axis in described]
    transforms = [{"type": "scale", "scale": scale or [1.0] * len(axes)}]
    first = {"path": path, "coordinateTransformations": transforms, **(dataset or {})}
    multiscales = [{"axes": described, "datasets": [first], "version": version, **(multiscale or {})}]
    ours = {} if maskmill is None else {"maskmill": maskmill}
    if zarr_format == 3:
        ome_group = {"version": "0.5", "multiscales": multiscales}
        group = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": ome_group, **ours}}
        (folder / "zarr.json").write_text(json.dumps(group))
    else:
        (folder / ".zgroup").write_text(json.dumps({"zarr_format": 2}))
        (folder / ".zattrs").write_text(json.dumps({"multiscales": multiscales, **ours}))
    return folder
