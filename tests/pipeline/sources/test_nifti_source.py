"""What the NIfTI source reads equals what nibabel reads, bit for bit."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_helpers import AFFINE, nifti, read_whole, write_nifti

from pipeline.errors import StudyError
from pipeline.sources import digest_of, find_studies, open_source

DTYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"]
SCALINGS = [
    (1.0, 0.0),
    (0.0, 5.0),
    (np.nan, np.nan),
    (2.0, -1024.0),
    (-1.0, 3.0),
    (1.0, 0.5),
    (0.1, 0.0),
    (3e-5, 7.7),
]


def random_stored(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Numbers over the whole range of a type."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return (rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 7, shape)).astype(kind)
    info = np.iinfo(kind)
    return rng.integers(info.min, info.max, shape, dtype=kind, endpoint=True)


def same_bits(ours: np.ndarray, reference: np.ndarray) -> bool:
    """Equal as float64, telling -0.0 from 0.0."""
    ours = np.ascontiguousarray(ours.astype(np.float64))
    return ours.shape == reference.shape and ours.tobytes() == np.ascontiguousarray(reference).tobytes()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(DTYPES),
    big_endian=st.booleans(),
    scaling=st.sampled_from(SCALINGS),
    ending=st.sampled_from([".nii", ".nii.gz"]),
    version=st.sampled_from([1, 2]),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 11)),
    rows=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_equals_nibabel(tmp_path, dtype, big_endian, scaling, ending, version, shape, rows, seed) -> None:  # type: ignore[no-untyped-def]
    stored = random_stored(dtype, shape, seed)
    affine = AFFINE + np.diag([seed / 7, 0, -seed / 200, 0])
    path = write_nifti(
        tmp_path / f"scan{ending}", stored, affine, slope=scaling[0], inter=scaling[1], big_endian=big_endian,
        version=version,
    )  # fmt: skip
    reference = nib.load(path)
    whole, header = read_whole(nifti(path), rows)
    assert same_bits(whole[0], reference.get_fdata().transpose(2, 1, 0))
    assert np.array_equal(header.affine, reference.affine)
    assert header.affine.dtype == np.float64
    assert not header.has_channel_axis


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_48_orientations_are_kept_as_stored(tmp_path: Path, order: tuple[int, int, int]) -> None:
    stored = random_stored("i2", (4, 5, 6))
    for signs in itertools.product((-1, 1), repeat=3):
        affine = np.eye(4)
        affine[:3, :3] = 0
        affine[order, range(3)] = np.array(signs) * (0.5, 1.25, 3.0)
        path = write_nifti(tmp_path / "scan.nii", stored, affine)
        whole, header = read_whole(nifti(path))
        assert np.array_equal(whole[0], stored.transpose(2, 1, 0))
        assert nib.aff2axcodes(header.affine) == nib.aff2axcodes(nib.load(path).affine)
        assert np.array_equal(header.affine, affine)


@pytest.mark.parametrize("with_qform", [False, True])
def test_facts_for_writing_a_mask_like_the_input(tmp_path: Path, with_qform: bool) -> None:
    image = nib.Nifti1Image(np.ones((3, 4, 5, 1), np.int16), None)
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(AFFINE, code="aligned" if not with_qform else 0)
    image.set_qform(np.diag([2, 3, -4, 1.0]), code="scanner" if with_qform else 0)
    nib.save(image, tmp_path / "scan.nii.gz")
    facts = read_whole(nifti(tmp_path / "scan.nii.gz"))[1].nifti
    loaded = nib.load(tmp_path / "scan.nii.gz")
    assert facts is not None
    assert facts["shape"] == [3, 4, 5, 1]
    assert facts["xyzt_units"] == 2 | 8
    assert (facts["qform_code"], facts["sform_code"]) == ((1, 0) if with_qform else (0, 2))
    assert (facts["qform"] is None, facts["sform"] is None) == (not with_qform, with_qform)
    used = facts["qform"] if with_qform else facts["sform"]
    assert np.array_equal(used, loaded.affine)


def test_sform_goes_before_qform_and_unknown_codes_count_as_nibabel_counts_them(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.ones((3, 4, 5), np.int16), None)
    image.set_sform(AFFINE, code=2)
    image.set_qform(np.diag([2, 3, 4, 1.0]), code=1)
    nib.save(image, tmp_path / "scan.nii")
    assert np.allclose(read_whole(nifti(tmp_path / "scan.nii"))[1].affine, AFFINE, atol=1e-6)
    data = bytearray((tmp_path / "scan.nii").read_bytes())
    data[254:256] = (99).to_bytes(2, "little")  # sform_code
    data[76:80] = b"\0\0\0\0"  # pixdim[0], which nibabel then takes as 1
    (tmp_path / "odd.nii").write_bytes(data)
    header = read_whole(nifti(tmp_path / "odd.nii"))[1]
    assert np.array_equal(header.affine, nib.load(tmp_path / "odd.nii").affine)
    assert np.array_equal(header.affine, np.diag([2, 3, 4, 1.0]))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("volume", [0, 1, 2])
def test_one_volume_of_4d(tmp_path: Path, ending: str, volume: int) -> None:
    stored = random_stored("i2", (5, 4, 6, 3))
    path = write_nifti(tmp_path / f"scan{ending}", stored, slope=0.5)
    whole, header = read_whole(nifti(path), volume=volume)
    assert header.shape == (6, 4, 5)
    assert same_bits(whole[0], nib.load(path).get_fdata()[..., volume].transpose(2, 1, 0))
    assert digest_of(nifti(path), volume=volume) != digest_of(nifti(path))
    with pytest.raises(StudyError, match="`segment --volume N`") as refused, open_source(nifti(path)):
        pass
    assert refused.value.cause == "input"
    with pytest.raises(StudyError, match="--volume 3 is not in it"), open_source(nifti(path), volume=3):
        pass


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_vectors_in_5d_are_channels(tmp_path: Path, ending: str) -> None:
    stored = random_stored("f4", (5, 4, 6, 1, 3))
    path = write_nifti(tmp_path / f"scan{ending}", stored)
    whole, header = read_whole(nifti(path))
    assert (header.channels, header.has_channel_axis) == (3, True)
    assert np.array_equal(whole, stored[:, :, :, 0].transpose(3, 2, 1, 0))
    assert digest_of(nifti(path)) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_volume_of_vectors_over_time(tmp_path: Path) -> None:
    stored = random_stored("i2", (5, 4, 6, 2, 3))
    path = write_nifti(tmp_path / "scan.nii.gz", stored)
    whole, _ = read_whole(nifti(path), volume=1)
    assert np.array_equal(whole, stored[:, :, :, 1].transpose(3, 2, 1, 0))


def test_channel_files_side_by_side(tmp_path: Path) -> None:
    first, second = random_stored("i2", (5, 4, 6)), random_stored("f4", (5, 4, 6))
    parts = (write_nifti(tmp_path / "a_0000.nii.gz", first), write_nifti(tmp_path / "a_0001.nii", second))
    whole, header = read_whole(nifti(*parts))
    assert (header.channels, header.has_channel_axis, header.dtype) == (2, True, np.float32)
    assert np.array_equal(whole[0], first.transpose(2, 1, 0))
    assert np.array_equal(whole[1], second.transpose(2, 1, 0))
    joined = "".join(hashlib.sha256(part.read_bytes()).hexdigest() for part in parts)
    assert digest_of(nifti(*parts)) == hashlib.sha256(joined.encode()).hexdigest()
    assert digest_of(nifti(*parts)) != digest_of(nifti(*reversed(parts)))


def test_channels_must_lie_on_one_grid(tmp_path: Path) -> None:
    stored = random_stored("i2", (5, 4, 6))
    first = write_nifti(tmp_path / "a_0000.nii", stored)
    near, far = AFFINE.copy(), AFFINE.copy()
    near[0, 3] += 5e-4
    far[0, 0] += 1e-3  # nothing at the first voxel, 0.004 mm at the last
    read_whole(nifti(first, write_nifti(tmp_path / "near.nii", stored, near)))
    for other, says in (
        (write_nifti(tmp_path / "far.nii", stored, far), "mm apart"),
        (write_nifti(tmp_path / "size.nii", stored[:-1]), "differ in size"),
    ):
        with pytest.raises(StudyError, match=says) as refused, open_source(nifti(first, other)):
            pass
        assert refused.value.cause == "geometry"


def test_extensions_and_small_padding_are_passed_over(tmp_path: Path) -> None:
    image = nib.Nifti1Image(random_stored("i2", (5, 4, 6)), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"a remark" * 100))
    nib.save(image, tmp_path / "scan.nii")
    data = (tmp_path / "scan.nii").read_bytes()
    (tmp_path / "padded.nii").write_bytes(data + bytes(65536))
    (tmp_path / "padded.nii.gz").write_bytes(gzip.compress(data + bytes(65536)) + bytes(600))
    for name in ("scan.nii", "padded.nii", "padded.nii.gz"):
        whole, _ = read_whole(nifti(tmp_path / name))
        assert np.array_equal(whole[0], np.asarray(image.dataobj).transpose(2, 1, 0))


def test_gzip_is_seen_from_the_bytes_and_may_have_members(tmp_path: Path) -> None:
    data = write_nifti(tmp_path / "plain.nii", stored := random_stored("i2", (5, 4, 6))).read_bytes()
    (tmp_path / "unpacked.nii.gz").write_bytes(data)
    (tmp_path / "packed.nii").write_bytes(gzip.compress(data[:300]) + gzip.compress(data[300:]))
    for name in ("unpacked.nii.gz", "packed.nii"):
        assert np.array_equal(read_whole(nifti(tmp_path / name))[0][0], stored.transpose(2, 1, 0))


def test_slabs_can_be_read_again_and_left_early(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "scan.nii.gz", random_stored("i2", (5, 4, 6)))
    with open_source(nifti(path)) as source:
        with pytest.raises(RuntimeError, match="exhausted"):
            source.digest()
        first = next(slabs := source.slabs(2))
        slabs.close()  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match="exhausted"):
            source.digest()
        again = list(source.slabs(2))
    assert np.array_equal(first, again[0])
    assert len(again) == 3


@pytest.mark.realdata
@pytest.mark.parametrize(
    "name",
    [
        "hippocampus/images/hippocampus_001.nii.gz",
        "hippocampus/images/hippocampus_003.nii.gz",
        "ct/example_ct.nii.gz",
    ],
)
def test_real_scans_equal_nibabel(shared: Path, name: str) -> None:
    (study,) = find_studies([str(shared / name)], exclude=None).studies
    whole, header = read_whole(study, rows=16)
    reference = nib.load(shared / name)
    assert same_bits(whole[0], reference.get_fdata().transpose(2, 1, 0))
    assert np.array_equal(header.affine, reference.affine)
    assert digest_of(study) == hashlib.sha256((shared / name).read_bytes()).hexdigest()


READ_IN_SLABS = """
import sys
from pipeline.engine import peak_rss
from pipeline.sources import Study, open_source
import pipeline.sources.nifti
study = Study("s", "s", (sys.argv[1],), "nifti")
before, voxels = peak_rss(), 0
with open_source(study) as source:
    for slab in source.slabs(16):
        voxels += slab.size
    source.digest()
print(voxels, (peak_rss() - before) >> 20)
"""


@pytest.mark.parametrize(("slope", "limit"), [(1.0, 60), (0.1, 100)])
def test_400_mb_are_read_in_few(tmp_path: Path, slope: float, limit: int) -> None:
    """Slabs of 4 MiB stored; the whole is 400 MiB (and twice that as float32, four times as float64)."""
    shape = (512, 256, 1600)
    write_nifti(tmp_path / "one.nii", np.zeros((1, 1, 1), np.int16), slope=slope)
    header = bytearray((tmp_path / "one.nii").read_bytes()[:352])
    header[40:48] = np.array([3, *shape], "<i2").tobytes()
    with gzip.open(tmp_path / "zeros.nii.gz", "wb", compresslevel=1) as file:
        file.write(header)
        for _ in range(100):
            file.write(bytes(4 << 20))
    command = [sys.executable, "-c", READ_IN_SLABS, str(tmp_path / "zeros.nii.gz")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    voxels, grown_mib = map(int, done.stdout.split())
    assert voxels == np.prod(shape)
    assert grown_mib < limit
