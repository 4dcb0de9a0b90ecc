"""Open one Zarr array (format 2 or 3) that nobody vouches for.

The array's own JSON is checked before the zarr library sees it: among the codecs that the library would load
are some that run code (pickle), and a shape or chunk is only a number that somebody wrote.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from pipeline import store
from pipeline.errors import StudyError
from pipeline.objects import ObjectStoreError
from pipeline.sources.base import MOST_VOXELS
from pipeline.sources.ome_metadata import read_json
from pipeline.sources.voxels import check_volume_size

# Codecs that only compute: those of the Zarr 3 specification, and numcodecs' compressors, filters, checksums.
_COMPUTING = frozenset(
    {
        *("blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd"),
        *("bitround", "delta", "fixedscaleoffset", "packbits", "quantize", "shuffle"),
        *("adler32", "crc32", "crc32c", "fletcher32"),
    }
)
_SAFE_CODECS = _COMPUTING | {f"numcodecs.{name}" for name in _COMPUTING} | {"bytes", "transpose", "sharding_indexed"}
_DTYPES = frozenset({"bool", "float16", "float32", "float64"}) | {
    f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)
}
LARGEST_CHUNK = 1 << 31  # bytes; the most that blosc can hold
MOST_CHUNKS_AT_ONCE = 1 << 20


def open_array(folder: str, zarr_format: int) -> Any:
    """The zarr.Array in a folder, read-only; StudyError("input") for one that cannot be read safely."""
    import zarr

    document = read_json(folder, "zarr.json" if zarr_format == 3 else ".zarray")
    if document is None:
        raise StudyError("input", "the array of its full resolution is missing or its metadata is no JSON object")
    _check(document, zarr_format)
    try:
        with warnings.catch_warnings(action="ignore"):
            array = zarr.open_array(store.zarr_store(folder, read_only=True), mode="r", zarr_format=zarr_format)
    except ObjectStoreError as error:
        raise StudyError("storage", f"it could not be read: {error.strerror}") from None
    except Exception as error:  # the library reports damage by whatever it stumbled over
        raise StudyError("input", f"the metadata of its array is damaged ({type(error).__name__})") from None
    _check_chunks(array)
    return array


def _check(document: dict[str, Any], zarr_format: int) -> None:
    shape = document.get("shape")
    if not isinstance(shape, list) or not all(type(n) is int for n in shape):
        raise StudyError("input", "the metadata of its array is damaged (the shape is no list of whole numbers)")
    check_volume_size(shape, MOST_VOXELS)
    if zarr_format == 3:
        codecs, dtype = _codec_names(document.get("codecs")), document.get("data_type")
        known = dtype in _DTYPES if isinstance(dtype, str) else False
    else:
        codecs = _codec_names(document.get("compressor"), key="id") | _codec_names(document.get("filters"), key="id")
        known = _is_known_v2(document.get("dtype"))
    if not codecs <= _SAFE_CODECS:
        raise StudyError("input", "its array uses a codec that is not read (unknown, or one that could run code)")
    if not known:
        raise StudyError("input", "its voxels are not of a real integer or float type of up to 64 bits")


def _is_known_v2(dtype: Any) -> bool:
    try:
        return isinstance(dtype, str) and np.dtype(dtype).name in _DTYPES
    except TypeError:
        return False


def _codec_names(codecs: Any, key: str = "name") -> set[str]:
    """The names of all codecs, also of those inside a sharding codec."""
    names: set[str] = set()
    for codec in codecs if isinstance(codecs, list) else [codecs]:
        if codec is None:
            continue
        if isinstance(codec, str):  # Zarr 3 allows a codec without configuration to be its name
            names.add(codec)
            continue
        name = codec.get(key) if isinstance(codec, dict) else None
        names.add(name if isinstance(name, str) else "?")
        inner = codec.get("configuration") if isinstance(codec, dict) else None
        if isinstance(inner, dict):
            for nested in ("codecs", "index_codecs"):
                names |= _codec_names(inner.get(nested) or [])
    return names


def _check_chunks(array: Any) -> None:
    chunks, shards = tuple(array.chunks), tuple(array.shards or array.chunks)
    if min(chunks) < 1 or math.prod(chunks) * array.dtype.itemsize > LARGEST_CHUNK:
        raise StudyError("input", "its chunks are larger than 2 GiB (or empty); store it in smaller ones")
    in_row = math.prod(-(-n // c) for n, c in zip(array.shape[1:], chunks[1:], strict=True))
    in_shard = math.prod(-(-s // c) for s, c in zip(shards, chunks, strict=True))
    if max(in_row, in_shard) > MOST_CHUNKS_AT_ONCE:
        raise StudyError("input", "it is cut into more than a million chunks per row; store it in larger ones")


def read(array: Any, selection: tuple[Any, ...], first: int, last: int) -> Any:
    """A part of the array; StudyError("input") naming the rows where a chunk of it is damaged."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return array[selection]
    except MemoryError:
        raise
    except ObjectStoreError as error:
        raise StudyError("storage", f"it could not be read: {error.strerror}") from None
    except Exception as error:
        raise StudyError(
            "input",
            f"a chunk in rows z={first} to {last} cannot be decoded ({type(error).__name__}); copy the image again",
        ) from None
