"""NIfTI files, streamed: a published label image on the input's grid, or any slabs that come one after the other."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import nibabel as nib
import numpy as np

from .. import ome, store
from ..geometry import spacing_of
from ..sources.nifti_header import QUATERNION

MILLIMETRES = 2  # NIfTI's code for the unit of space
LONGEST_AXIS = 32_767  # of NIfTI-1; a longer one takes NIfTI-2


def write_nifti(labels: str, url: str, affine: np.ndarray, facts: dict[str, Any] | None) -> None:
    """Stream the labels (z,y,x or 1,z,y,x; level 0 at `labels`) to `url` as .nii.gz. Memory: one row of shards.

    The file has the input's shape, both its transforms with their codes and its units where the input was a NIfTI
    (`facts`, see `pipeline.sources.Header.nifti`), else one transform, the sform (code 1, scanner).
    """
    array = ome.open_array(labels)
    lead, shape = array.shape[:-3], array.shape[-3:]
    rows = (array.shards or array.chunks)[-3]
    with nifti_file(url, shape, array.dtype, affine, facts) as append:
        for z in range(0, shape[0], rows):
            append(ome.read(array, (0,) * len(lead) + (slice(z, z + rows),)))


@contextmanager
def nifti_file(
    url: str, shape: tuple[int, ...], dtype: np.dtype[Any], affine: np.ndarray, facts: dict[str, Any] | None = None
) -> Iterator[Callable[[np.ndarray], None]]:
    """A NIfTI of `shape` (z,y,x) to be appended to, slab by slab along z; gzip where `url` ends in .gz.

    It appears whole, when all was appended, or not at all. Slope 1. The same voxels give the same bytes. NIfTI-1, or
    NIfTI-2 where an axis is too long for that.
    """
    little = np.dtype(dtype).newbyteorder("<")
    with store.writing(url) as raw:
        packed = gzip.GzipFile("", "wb", compresslevel=4, fileobj=raw, mtime=0) if url.endswith(".gz") else None
        with packed or nullcontext(raw) as file:
            file.write(_header(shape, dtype, affine, facts).binaryblock + bytes(4))

            def append(slab: np.ndarray) -> None:
                file.write(np.ascontiguousarray(slab, little).data)  # x fastest, as rows of z,y,x are

            yield append


def _header(
    shape: tuple[int, ...], dtype: np.dtype[Any], affine: np.ndarray, facts: dict[str, Any] | None
) -> nib.Nifti1Header:
    if max(shape) <= LONGEST_AXIS:
        header = nib.Nifti1Header(endianness="<")
        header["magic"], header["vox_offset"] = b"n+1", 352
    else:
        header = nib.Nifti2Header(endianness="<")
        header["magic"], header["vox_offset"] = b"n+2", 544
    header.set_data_dtype(dtype)
    header["scl_slope"], header["scl_inter"] = 1, 0
    if facts is None:
        header.set_data_shape(shape[::-1])
        header.set_zooms(list(spacing_of(affine)))
        header.set_sform(affine, 1)
        header["xyzt_units"] = MILLIMETRES
        return header
    stored = tuple(facts["shape"])
    same = stored[:3] == shape[::-1] and all(n == 1 for n in stored[3:])
    header.set_data_shape(stored if same else shape[::-1])
    header.set_zooms(list(spacing_of(affine)) + [1.0] * (len(header.get_data_shape()) - 3))
    header["xyzt_units"] = facts["xyzt_units"]
    # A broken transform beside a good one is not handed on: its code then goes with the good one.
    for name, put in (("qform", header.set_qform), ("sform", header.set_sform)):
        if facts[f"{name}_code"] > 0:
            put(affine if facts[name] is None else np.array(facts[name]), facts[f"{name}_code"])
    if facts["qform"] is not None:
        header["pixdim"][:4] = facts["quaternion"][:4]
        for name, number in zip(QUATERNION, facts["quaternion"][4:], strict=True):
            header[name] = number
    return header
