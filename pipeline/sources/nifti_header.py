"""The header of a NIfTI file, read without trusting it.

nibabel parses the fields and builds the affine; every number that sizes something is checked here first. The
format: https://nifti.nimh.nih.gov/nifti-1 and https://www.nitrc.org/forum/message.php?msg_id=3738 (NIfTI-2).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from pipeline.errors import StudyError
from pipeline.geometry import Affine, check_affine
from pipeline.sources.base import MOST_VOXELS
from pipeline.sources.stream import ByteStream
from pipeline.sources.voxels import check_volume_size

# sizeof_hdr -> the class that parses it, its magic, and the first byte that voxels can have
_KINDS = {
    348: (nib.Nifti1Header, b"n+1\0", 352),
    540: (nib.Nifti2Header, b"n+2\0\r\n\x1a\n", 544),
}
# The NIfTI data type codes that hold one real number per voxel.
_DTYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
_REFUSED = {
    1: "1-bit",
    32: "complex",
    128: "RGB",
    1536: "128-bit float",
    1792: "complex",
    2048: "complex",
    2304: "RGBA",
}
_LARGEST_EXTENSIONS = 64 << 20
MOST_CHANNELS = 64
QUATERNION = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
_LENGTH_UNITS = {1: "metres", 3: "micrometres"}

# nibabel reports its repairs to a logger; they can quote the header, which must not be logged.
_silent = logging.Logger("pipeline.sources.nifti_header.silent")
_silent.addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Facts:
    """What reading one NIfTI file's voxels takes."""

    raw: bytes
    dtype: np.dtype[Any]
    """As stored, with the file's byte order."""
    slope: float
    inter: float
    shape_zyx: tuple[int, int, int]
    volumes: int
    channels: int
    """Length of the fifth axis; its stride in the file is `volumes` volumes."""
    data_offset: int
    affine: Affine
    nifti: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def volume_bytes(self) -> int:
        return math.prod(self.shape_zyx) * self.dtype.itemsize

    @property
    def data_bytes(self) -> int:
        return self.volume_bytes * self.volumes * self.channels


def read_facts(stream: ByteStream) -> Facts:
    """Parse and check the header at the start of a file.

    Raises StudyError: "input" where the file cannot be one volume of real numbers, "geometry" where nothing
    (or nonsense) says where its voxels lie.
    """
    raw, header, data_offset = _parse(stream)
    dtype = _dtype(header)
    x, y, z, volumes, channels = _shape(header)
    slope, inter = _scaling(header)
    facts = Facts(
        raw=raw,
        dtype=dtype,
        slope=slope,
        inter=inter,
        shape_zyx=(z, y, x),
        volumes=volumes,
        channels=channels,
        data_offset=data_offset,
        affine=check_affine(_affine(header)),
        nifti=_nifti(header),
        warnings=_warnings(header),
    )
    needed = facts.data_offset + facts.data_bytes
    if needed > stream.size_limit:
        raise StudyError(
            "input",
            f"its header claims {needed:,} bytes, but a file of this size can hold at most "
            f"{stream.size_limit:,}; it is cut off or its header is damaged, copy it again",
        )
    return facts


def _parse(stream: ByteStream) -> tuple[bytes, Any, int]:
    raw = stream.read(4)
    if not raw:
        raise StudyError("input", "it is empty; copy it again")
    sizes = {"<": int.from_bytes(raw, "little"), ">": int.from_bytes(raw, "big")}
    endianness = next((symbol for symbol, size in sizes.items() if size in _KINDS), None)
    if endianness is None:
        raise StudyError("input", "it is no NIfTI file (its first bytes are not those of a NIfTI header)")
    size = sizes[endianness]
    parser, magic, least_offset = _KINDS[size]
    raw += stream.read(size - 4)
    if len(raw) < size:
        raise StudyError("input", f"its header is cut off after {len(raw)} of {size} bytes; copy it again")
    found = raw[344:348] if size == 348 else raw[4:12]
    if found[:3] in (b"ni1", b"ni2"):
        raise StudyError("input", "it is half of a two-file NIfTI (.hdr and .img); convert it to one .nii file")
    if found != magic:
        raise StudyError("input", "it is no NIfTI file (the magic bytes of the header are wrong)")
    header = parser(raw, endianness=endianness, check=False)
    data_offset = _data_offset(float(header["vox_offset"]), least_offset)
    spacing = np.array(header["pixdim"][1:4])
    # The repairs that nibabel makes when it loads a file, so that the affine is the one nibabel gives.
    header.check_fix(logger=_silent, error_level=1000)
    # One of them makes a voxel size up where there is none; only the qform uses it.
    if header["sform_code"] == 0 and header["qform_code"] > 0 and not (np.abs(spacing) > 0).all():
        raise StudyError("geometry", "the affine is singular: the header gives a voxel size of zero")
    return raw, header, data_offset


def _dtype(header: Any) -> np.dtype[Any]:
    code = int(header["datatype"])
    if code not in _DTYPES:
        raise StudyError(
            "input",
            f"its voxels are {_REFUSED.get(code, 'of an unknown type')}; expected one real number per voxel",
        )
    order: str = header.endianness
    return np.dtype(order + _DTYPES[code])


def _shape(header: Any) -> tuple[int, int, int, int, int]:
    """x, y, z, volumes, channels from the dim field."""
    dim = [int(n) for n in header["dim"]]
    if not 1 <= dim[0] <= 7:
        raise StudyError("input", f"its header says it has {dim[0]} axes; expected 3; the header is damaged")
    shape = dim[1 : 1 + dim[0]]
    if len(shape) < 3:
        raise StudyError("input", f"it is {len(shape)}-D; expected a volume (x, y, z)")
    check_volume_size(shape, MOST_VOXELS)
    shape += [1] * (7 - len(shape))
    if shape[5] * shape[6] > 1:
        raise StudyError("input", f"it is {dim[0]}-D; expected a volume (x, y, z) or its channels (x, y, z, 1, c)")
    if shape[4] > MOST_CHANNELS:
        raise StudyError("input", f"it has {shape[4]} channels; at most {MOST_CHANNELS} are read")
    x, y, z, volumes, channels = shape[:5]
    return x, y, z, volumes, channels


def _scaling(header: Any) -> tuple[float, float]:
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return 1.0, 0.0
    if not math.isfinite(inter):
        raise StudyError("input", "its scl_slope is a number and its scl_inter is not; the header is damaged")
    return slope, inter


def _data_offset(offset: float, least: int) -> int:
    if not least <= offset <= _LARGEST_EXTENSIONS or not offset.is_integer():
        raise StudyError(
            "input",
            f"its header says that the voxels start at byte {offset:g}; expected a whole number from {least} "
            f"to {_LARGEST_EXTENSIONS}; the header is damaged",
        )
    return int(offset)


def _affine(header: Any) -> Any:
    """nibabel's best affine: the sform, else the qform; None where neither is set."""
    if header["sform_code"] == 0 and header["qform_code"] == 0:
        return None
    try:
        with np.errstate(all="ignore"):
            return header.get_best_affine()
    except (ValueError, HeaderDataError):
        raise StudyError(
            "geometry", "its qform is no rotation (the quaternion or the voxel sizes are impossible)"
        ) from None


def _nifti(header: Any) -> dict[str, Any]:
    return {
        "qform_code": int(header["qform_code"]),
        "sform_code": int(header["sform_code"]),
        "xyzt_units": int(header["xyzt_units"]),
        "shape": [int(n) for n in header["dim"][1 : 1 + int(header["dim"][0])]],
        "qform": _qform(header),
        # What the qform is kept in, since a matrix made of it does not always give it back: pixdim[0..3], then these.
        "quaternion": [*map(float, header["pixdim"][:4]), *(float(header[name]) for name in QUATERNION)],
        "sform": header.get_sform().tolist() if header["sform_code"] > 0 else None,
    }


def _qform(header: Any) -> list[list[float]] | None:
    if header["qform_code"] == 0:
        return None
    try:
        with np.errstate(all="ignore"):
            matrix = header.get_qform()
    except (ValueError, HeaderDataError):
        return None
    return matrix.tolist() if np.isfinite(matrix).all() else None


def _warnings(header: Any) -> tuple[str, ...]:
    unit = _LENGTH_UNITS.get(int(header["xyzt_units"]) & 7)
    said = [] if unit is None else [f"the header gives lengths in {unit}; they are taken as millimetres"]
    if header["qform_code"] > 0 and _qform(header) is None:
        said.append("the qform is no rotation and was left out; the sform was used")
    return tuple(said)
