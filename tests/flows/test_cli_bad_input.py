"""Bad studies among good ones: one clear line each, the typed cause, exit 1, and the good ones published."""

from __future__ import annotations

import gzip
import re
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scans import Ended, brain, label_array, leftovers, maskmill, random_model, save_nifti, scan

PATIENT = "Ernst_Beispiel"  # no message may repeat it: messages go into logs and the ledger


def _header(path: Path, **fields: int) -> None:
    """Overwrite 16-bit fields of a NIfTI header by their offset: what no writer would write."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    for offset, value in fields.items():
        struct.pack_into("<h", raw, int(offset[1:]), value)
    path.write_bytes(gzip.compress(bytes(raw)))


def _make_bad(folder: Path) -> None:
    good = brain()
    whole = scan(folder / "truncated.nii.gz").read_bytes()
    (folder / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "cut_nii.nii").write_bytes(gzip.decompress(whole)[:-100])
    (folder / "garbage.nii.gz").write_bytes(np.random.default_rng(1).bytes(5000))
    (folder / "empty.nii.gz").write_bytes(b"")
    (folder / "bomb.nii.gz").write_bytes(gzip.compress(gzip.decompress(whole) + bytes(64 << 20)))
    for name, value in (("nan", np.nan), ("inf", -np.inf)):
        holed = good.copy()
        holed[3, 2, 1] = value
        save_nifti(folder / f"{name}.nii.gz", holed)
    save_nifti(folder / "four_d.nii.gz", np.stack([good] * 3, axis=-1))
    nib.save(nib.Nifti1Image(good[:, :, 0], np.eye(4)), folder / "two_d.nii.gz")
    scan(folder / "zero_size.nii.gz")
    _header(folder / "zero_size.nii.gz", b44=0)
    flat = save_nifti(folder / "singular.nii.gz", good, qform=0)
    raw = bytearray(gzip.decompress(flat.read_bytes()))
    raw[312:328] = raw[296:312]  # srow_z = srow_y
    flat.write_bytes(gzip.compress(bytes(raw)))
    save_nifti(folder / "nowhere.nii.gz", good, qform=0, sform=0)
    save_nifti(folder / "two_channels.nii.gz", np.stack([good, good], axis=-1)[:, :, :, np.newaxis])
    (folder / "gone.nii.gz").symlink_to(folder / "nothing")
    (folder / "half.ome.zarr").mkdir()
    (folder / "half.ome.zarr/zarr.json").write_text(
        '{"zarr_format": 3, "node_type": "group", "attributes": {"ome": {}}}'
    )


# The cause of each, and words that its line has.
EXPECTED = {
    "truncated": ("input", "cut off"),
    "cut_nii": ("input", "cut off"),
    "garbage": ("input", "no NIfTI file"),
    "empty": ("input", "empty"),
    "bomb": ("input", "unpacks to more than the header says"),
    "nan": ("input", "NaN or infinite, the first is voxel z=1, y=2, x=3"),
    "inf": ("input", "NaN or infinite, the first is voxel z=1, y=2, x=3"),
    "four_d": ("input", "4-D with 3 volumes"),
    "two_d": ("input", "2-D"),
    "zero_size": ("input", "no voxels"),
    "singular": ("geometry", "singular"),
    "nowhere": ("geometry", "affine is missing"),
    "two_channels": ("input", "has 2 channel(s), the model tiny-resunet takes 1"),
    "half": ("input", "multiscales"),
    "gone": ("input", "not a file that can be read"),
    "missing": ("input", "No such file"),
    "none": ("input", "No such file"),
}


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("bad")
    folder = top / "in" / PATIENT
    scan(folder / "good.nii.gz", 1)
    scan(folder / "zz_good.nii.gz", 2)
    _make_bad(folder)
    random_model(top / "model")
    return top


@pytest.fixture(scope="module")
def ended(top: Path) -> Ended:
    return maskmill(
        *("segment", top / "in" / PATIENT, top / "missing.nii.gz", top / "none", "-m", top / "model"),
        *("-o", top / "out", "--engine", "serial", "--threads", 1, "--json"),
    )


def test_the_good_ones_are_published(top: Path, ended: Ended) -> None:
    assert ended.code == 1
    published = {e["study"] for e in ended.json["studies"] if e["state"] == "published"}
    assert published == {"good", "zz_good"}
    for study in published:
        assert label_array(top / "out", study, "tiny-resunet").shape == (10, 14, 12)
        assert (top / "out/masks" / f"{study}.nii.gz").is_file()
    assert ended.json["failed"] == len(EXPECTED)


@pytest.mark.parametrize("study", EXPECTED)
def test_each_bad_study_has_one_line_and_its_cause(study: str, ended: Ended) -> None:
    cause, says = EXPECTED[study]
    (entry,) = [e for e in ended.json["studies"] if e["study"] == study]
    assert (entry["state"], entry["cause"]) == ("failed", cause)
    (line,) = ended.lines(f"failed: {entry['source']}: ")
    assert line == f"failed: {entry['source']}: {cause}: {entry['message']}"
    assert says in entry["message"]
    assert PATIENT not in entry["message"]


def test_no_line_is_said_twice_and_none_is_a_traceback(ended: Ended) -> None:
    *lines, closing = ended.err.splitlines()
    # A machine that is slow enough also sees progress now and then.
    failures = [line for line in lines if not re.match(r"\d+ of \d+ studies, .*% of the tiles, ", line)]
    assert len(failures) == len(EXPECTED)
    assert all(line.startswith("failed: ") for line in failures)
    assert closing.startswith("2 of 19 studies published, 17 failed; 2 blocks; ")
    assert ended.out.count("\n") == 1


def test_nothing_of_them_stays_in_out_but_the_reason(top: Path, ended: Ended) -> None:
    out = top / "out"
    assert leftovers(out) == []
    assert sorted(p.name for p in (out / "images").glob("*.ome.zarr")) == ["good.ome.zarr", "zz_good.ome.zarr"]
    assert sorted(p.name for p in (out / "masks").iterdir()) == ["good.nii.gz", "zz_good.nii.gz"]
    reasons = list(out.glob("ledger/*/failed.json"))
    assert len(reasons) == len(EXPECTED)


def test_status_repeats_the_reasons(top: Path, ended: Ended) -> None:
    said = maskmill("status", top / "out", "--json")
    assert said.code == 0
    studies = {e["study"]: e for e in said.json["studies"]}
    assert {name for name, e in studies.items() if e["state"] == "published"} == {"good", "zz_good"}
    for name, (cause, says) in EXPECTED.items():
        assert studies[name]["state"] == "failed"
        assert studies[name]["cause"] == cause
        assert says in studies[name]["message"]


def test_mended_files_are_taken_up_by_the_next_run_and_forgotten_as_failures(top: Path, ended: Ended) -> None:
    """`--retry-failed` tries those that failed and no other; a study that is good now is no failure any more."""
    scan(top / "in" / PATIENT / "garbage.nii.gz", 3)
    scan(top / "in" / PATIENT / "new.nii.gz", 4)
    scan(top / "none/good.nii.gz", 1)
    again = maskmill(
        *("segment", top / "in" / PATIENT, top / "none", "-m", top / "model", "-o", top / "out"),
        *("--engine", "serial", "--threads", 1, "--retry-failed", "--json"),
    )
    assert again.code == 1
    assert {e["study"] for e in again.json["studies"]} == (set(EXPECTED) - {"missing", "none"})
    assert [e["study"] for e in again.json["studies"] if e["state"] == "published"] == ["garbage"]
    said = maskmill("status", top / "out")
    assert "garbage" not in said.out
    assert " none " not in said.out
    assert said.out.splitlines()[0] == "model tiny-resunet: 3 published, 15 failed, 0 interrupted"
