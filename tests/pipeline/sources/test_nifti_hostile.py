"""Damaged and hostile NIfTI files: one clear line each, in little memory, and never the path in it."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_helpers import AFFINE, nifti, read_whole, write_nifti

from pipeline.errors import StudyError
from pipeline.sources import open_source

SECRET = "Jane_Doe_19700101"
SCAN = np.arange(5 * 4 * 6, dtype=np.int16).reshape(5, 4, 6)


def refusal(path: Path, cause: str = "input") -> str:
    """The message with which reading this file ends."""
    with pytest.raises(StudyError) as refused:
        read_whole(nifti(path))
    assert refused.value.cause == cause
    assert SECRET not in refused.value.message
    assert "/" not in refused.value.message.replace("input/output", "")
    assert "\n" not in refused.value.message
    return refused.value.message


def scan_bytes(tmp_path: Path, stored: np.ndarray = SCAN, **options: object) -> bytes:
    path = write_nifti(tmp_path / "template.nii", stored, **options)  # type: ignore[arg-type]
    data = bytearray(path.read_bytes())
    data[148 : 148 + len(SECRET)] = SECRET.encode()  # descrip
    return bytes(data)


def put(data: bytes, offset: int, kind: str, *values: float) -> bytes:
    patch = np.array(values, kind).tobytes()
    return data[:offset] + patch + data[offset + len(patch) :]


DIM, DATATYPE, PIXDIM, VOX_OFFSET, SCL_INTER, QFORM, SFORM, QUATERN, SROW = (
    40,
    70,
    76,
    108,
    116,
    252,
    254,
    256,
    280,
)

HEADERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda d: b"", "empty"),
    "three bytes": (lambda d: d[:3], "cut off after 3 of 348"),
    "cut header": (lambda d: d[:200], "cut off after 200 of 348"),
    "one byte": (lambda d: b"n", "no NIfTI"),
    "garbage": (lambda d: bytes(range(256)) * 9, "no NIfTI"),
    "wrong magic": (lambda d: d[:344] + b"n+9\0" + d[348:], "magic"),
    "analyze": (lambda d: d[:344] + bytes(4) + d[348:], "magic"),
    "pair": (lambda d: d[:344] + b"ni1\0" + d[348:], "two-file"),
    "no voxels": (lambda d: d[:352], "claims"),
    "one byte short": (lambda d: d[:-1], "cut off"),
    "far too long": (lambda d: d + bytes(70000), "more than the header says"),
    "0-D": (lambda d: put(d, DIM, "<i2", 0), "axes"),
    "9-D": (lambda d: put(d, DIM, "<i2", 9), "axes"),
    "2-D": (lambda d: put(d, DIM, "<i2", 2), "2-D"),
    "zero size": (lambda d: put(d, DIM + 4, "<i2", 0), "no voxels"),
    "negative size": (lambda d: put(d, DIM + 2, "<i2", -1), "no voxels"),
    "absurd size": (lambda d: put(d, DIM + 2, "<i2", 32767, 32767, 32767), "more than any scan"),
    "larger than the file": (lambda d: put(d, DIM + 2, "<i2", 5, 4, 32000), "can hold at most"),
    "6-D": (lambda d: put(d, DIM, "<i2", 6, 1, 1, 1, 1, 1, 120), "6-D"),
    "many channels": (lambda d: put(d, DIM, "<i2", 5, 1, 1, 1, 1, 120), "channels"),
    "complex": (lambda d: put(d, DATATYPE, "<i2", 32), "complex"),
    "RGB": (lambda d: put(d, DATATYPE, "<i2", 128), "RGB"),
    "float128": (lambda d: put(d, DATATYPE, "<i2", 1536), "128-bit"),
    "unknown type": (lambda d: put(d, DATATYPE, "<i2", 777), "unknown type"),
    "offset in header": (lambda d: put(d, VOX_OFFSET, "<f4", 0), "start at byte"),
    "offset far away": (lambda d: put(d, VOX_OFFSET, "<f4", 1e30), "start at byte"),
    "offset negative": (lambda d: put(d, VOX_OFFSET, "<f4", -352), "start at byte"),
    "offset NaN": (lambda d: put(d, VOX_OFFSET, "<f4", np.nan), "start at byte"),
    "offset fraction": (lambda d: put(d, VOX_OFFSET, "<f4", 352.5), "start at byte"),
    "intercept NaN": (lambda d: put(d, SCL_INTER - 4, "<f4", 2, np.nan), "scl_inter"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["nii", "nii.gz"])
@pytest.mark.parametrize("name", HEADERS)
def test_damaged_files_are_refused(tmp_path: Path, name: str, packed: bool) -> None:
    damage, says = HEADERS[name]
    data = damage(scan_bytes(tmp_path))
    path = tmp_path / f"{SECRET}.nii"
    path.write_bytes(gzip.compress(data) if packed else data)
    message = refusal(path)
    # What a gzip can hold is not known exactly beforehand, so some are only found out while reading.
    later = {
        "claims": "can hold|before the header says",
        "cut off": "cut off",
        "can hold at most": "end|claims",
    }
    assert says in message or any(word in message for word in later.get(says, "-").split("|")), message


GEOMETRY: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "no codes": (lambda d: put(d, QFORM, "<i2", 0, 0), "missing"),
    "unknown codes only": (lambda d: put(d, QFORM, "<i2", 0, -7), "missing"),
    "NaN": (lambda d: put(d, SROW, "<f4", np.nan), "NaN"),
    "infinite": (lambda d: put(d, SROW + 12, "<f4", np.inf), "infinite"),
    "zeros": (lambda d: put(d, SROW, "<f4", *[0] * 12), "singular"),
    "flat": (lambda d: put(d, SROW, "<f4", 1, 0, 1, 0, 0, 1, 1, 0, 1, 1, 2, 0), "singular"),
    "qform without voxel size": (
        lambda d: put(put(d, QFORM, "<i2", 1, 0), PIXDIM, "<f4", 1, 1, 0, 1),
        "zero",
    ),
    "qform with NaN size": (lambda d: put(put(d, QFORM, "<i2", 1, 0), PIXDIM, "<f4", 1, 1, np.nan, 1), ""),
    "impossible quaternion": (
        lambda d: put(put(d, QFORM, "<i2", 1, 0), QUATERN, "<f4", 5, 5, 5),
        "no rotation",
    ),
    "NaN quaternion": (lambda d: put(put(d, QFORM, "<i2", 1, 0), QUATERN, "<f4", np.nan), ""),
}


@pytest.mark.parametrize("name", GEOMETRY)
def test_affines_that_place_nothing_are_refused(tmp_path: Path, name: str) -> None:
    damage, says = GEOMETRY[name]
    path = tmp_path / f"{SECRET}.nii"
    path.write_bytes(damage(scan_bytes(tmp_path)))
    assert says in refusal(path, "geometry")


def test_a_broken_qform_beside_a_good_sform_only_warns(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii"
    path.write_bytes(put(put(scan_bytes(tmp_path), QFORM, "<i2", 1, 2), QUATERN, "<f4", 5, 5, 5))
    _, header = read_whole(nifti(path))
    assert header.nifti is not None
    assert header.nifti["qform"] is None
    assert any("qform" in warning for warning in header.warnings)
    assert np.allclose(header.affine, AFFINE, atol=1e-6)


def test_units_other_than_mm_warn(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii"
    path.write_bytes(put(scan_bytes(tmp_path), 123, "u1", 3))
    assert "micrometres" in read_whole(nifti(path))[1].warnings[0]


@pytest.mark.parametrize("keep", [5, 30, 200, -9, -1])
def test_truncated_gzip(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(gzip.compress(scan_bytes(tmp_path))[:keep])
    assert "cut off" in refusal(path)


def test_gzip_with_wrong_checksum_or_bytes(tmp_path: Path) -> None:
    good = gzip.compress(scan_bytes(tmp_path))
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(good[:-8] + bytes(4) + good[-4:])
    assert "checksum" in refusal(path)
    path.write_bytes(good[:-4] + bytes(4))
    assert "length" in refusal(path)
    path.write_bytes(good[:60] + bytes(40) + good[100:])
    assert "damaged" in refusal(path)
    path.write_bytes(good + b"and something else")
    assert "damaged" in refusal(path)


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """16 GiB of zeros after the voxels, as many members of one: found out after 64 KiB of them."""
    member = zlib.compressobj(9, wbits=31)
    mebibytes = b"".join(member.compress(bytes(1 << 20)) for _ in range(64)) + member.flush()
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(gzip.compress(scan_bytes(tmp_path)) + mebibytes * 256)
    assert "unpacks to more than the header says" in refusal(path)


def test_rest_of_a_4d_gzip_is_checked(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(-999, 999, (5, 4, 6, 3)).astype(np.int16)
    data = gzip.compress(scan_bytes(tmp_path, stored))
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(data[:-200])
    with pytest.raises(StudyError, match="cut off"):
        read_whole(nifti(path), volume=0)


@pytest.mark.parametrize(("bad", "value"), [("NaN", np.nan), ("inf", -np.inf)])
def test_nan_and_infinite_voxels_are_counted_and_placed(tmp_path: Path, bad: str, value: float) -> None:
    stored = np.zeros((5, 4, 6), np.float32)
    stored[1, 2, 5] = stored[3, 2, 5] = value
    message = refusal(write_nifti(tmp_path / "scan.nii.gz", stored))
    assert "2 voxels of rows 4 to 5" in message
    assert "z=5, y=2, x=1" in message


def test_scaling_that_overflows_is_refused(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "scan.nii", np.full((2, 2, 2), 1e308), slope=1e30)
    assert "8 voxels" in refusal(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / f"{SECRET}.nii")
    (tmp_path / "folder.nii").mkdir()
    assert refusal(tmp_path / "folder.nii")
    os.mkfifo(tmp_path / "pipe.nii")
    assert "not a regular file" in refusal(tmp_path / "pipe.nii")


def test_a_file_that_changes_between_opening_and_reading(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "scan.nii", SCAN)
    with open_source(nifti(path)) as source:
        write_nifti(path, SCAN, np.diag([2, 2, 2, 1.0]))
        with pytest.raises(StudyError, match="changed while"):
            list(source.slabs(2))


@pytest.mark.parametrize("packed", [False, True])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
def test_any_header_reads_or_is_refused(tmp_path: Path, packed: bool, edits: list[tuple[int, bytes]]) -> None:
    """Random bytes in the header: the answer is a volume, or a StudyError; nothing else gets out."""
    data = bytearray(scan_bytes(tmp_path))
    for offset, patch in edits:
        data[offset : offset + len(patch)] = patch
    path = tmp_path / "scan.nii"
    path.write_bytes(gzip.compress(data) if packed else data)
    with suppress(StudyError):
        whole, header = read_whole(nifti(path))
        assert np.isfinite(whole).all()
        assert np.isfinite(header.affine).all()


def test_nothing_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "scan.nii"
    path.write_bytes(put(scan_bytes(tmp_path), PIXDIM, "<f4", 0, -1, -1, -1))
    read_whole(nifti(path))
    assert not caplog.records
    nib.load(path)
    assert caplog.records  # nibabel itself does log such a header
