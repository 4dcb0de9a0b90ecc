"""Which studies a list of INPUTs names, and what they are called."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from source_helpers import write_nifti, write_ome

from pipeline.errors import StudyError
from pipeline.sources import digest_of, find_studies


def touch(*paths: Path, content: str | None = None) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(path) if content is None else content)


def names(*inputs: object, exclude: Path | None = None) -> list[str]:
    found = find_studies([str(i) for i in inputs], exclude=None if exclude is None else str(exclude))
    assert not found.failures
    return [study.name for study in found.studies]


def failure(*inputs: object) -> tuple[str, StudyError]:
    found = find_studies([str(i) for i in inputs], exclude=None)
    assert not found.studies
    ((source, error),) = found.failures
    assert error.cause == "input"
    return source, error


def test_names_follow_the_contract(tmp_path: Path) -> None:
    touch(
        tmp_path / "a.nii.gz",
        tmp_path / "B.NII.GZ",
        tmp_path / "deep/er/c.Nii",
        tmp_path / 'sp ace/"quote\n\u00e9.nii',
        tmp_path / "dots.v1.2.nii.gz",
        tmp_path / "x.nii/inside.nii",
        tmp_path / ".hidden.nii",
        tmp_path / "._a.nii.gz",
        tmp_path / ".hidden/d.nii",
        tmp_path / "notes.txt",
        tmp_path / "clip.mp4",
        tmp_path / "scan.nii.bak",
    )
    expected = ["B", "a", "deep__er__c", "dots.v1.2", "sp_ace___quote__", "x.nii__inside"]
    assert names(tmp_path) == expected
    assert names(f"file://{tmp_path}") == expected
    assert names(tmp_path / "a.nii.gz") == ["a"]
    assert names(tmp_path / ".hidden") == ["d"]


def test_source_is_the_path_as_the_user_would_write_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "in/deep/a.nii")
    monkeypatch.chdir(tmp_path)
    (study,) = find_studies(["in"], exclude=None).studies
    assert study.source == "in/deep/a.nii"
    assert study.parts == (str(tmp_path / "in/deep/a.nii"),)
    monkeypatch.chdir(tmp_path / "in")
    assert names(".") == ["deep__a"]


def test_url_escapes_and_other_schemes(tmp_path: Path) -> None:
    touch(tmp_path / "a b%.nii")
    assert names(f"file://{tmp_path}/a%20b%25.nii") == ["a_b_"]
    assert "give a local path" in str(failure("ftp://host/scans")[1])
    assert "of this machine" in str(failure("file://elsewhere/scans")[1])
    assert "credentials" in str(failure("s3://key:secret@bucket/scans")[1])


def test_long_paths_get_names_that_a_file_can_have(tmp_path: Path) -> None:
    for last in ("one", "two"):
        touch(tmp_path / ("d" * 120) / ("e" * 120) / f"{last}.nii")
    found = names(tmp_path)
    assert len(set(found)) == 2
    assert all(len(name) == 200 for name in found)


def test_channels_of_a_folder_are_one_study(tmp_path: Path) -> None:
    touch(*(tmp_path / f"sub-1/scan_000{n}.nii.gz" for n in (1, 0, 2)))
    touch(tmp_path / "sub-2/only_0000.NII", tmp_path / "sub-3/a_0000.nii", tmp_path / "sub-3/b.nii")
    touch(tmp_path / "sub-1/more/x.nii", tmp_path / "v1.nii/t_0000.nii")
    found = find_studies([str(tmp_path)], exclude=None)
    assert [s.name for s in found.studies] == [
        "sub-1", "sub-1__more__x", "sub-2", "sub-3__a_0000", "sub-3__b", "v1.nii",
    ]  # fmt: skip
    assert [Path(p).name for p in found.studies[0].parts] == [f"scan_000{n}.nii.gz" for n in range(3)]
    assert found.studies[0].source == str(tmp_path / "sub-1")
    assert names(tmp_path / "sub-2") == ["sub-2"]
    assert names(tmp_path / "sub-1/scan_0001.nii.gz") == ["scan_0001"]


@pytest.mark.parametrize("files", [["a_0001"], ["a_0000", "a_0002"], ["a_0000", "b_0000", "a_0001"]])
def test_wrong_channel_numbers_fail_that_folder_alone(tmp_path: Path, files: list[str]) -> None:
    touch(*(tmp_path / "bad" / f"{name}.nii" for name in files), tmp_path / "good/x.nii")
    found = find_studies([str(tmp_path)], exclude=None)
    assert [s.name for s in found.studies] == ["good__x"]
    ((source, error),) = found.failures
    assert source == str(tmp_path / "bad")
    assert "_0000" in error.message
    assert error.cause == "input"


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr_is_recognised_by_its_metadata_and_not_entered(tmp_path: Path, version: str) -> None:
    voxels = np.zeros((3, 4, 5), np.uint8)
    for name in ("in/scan.ome.zarr", "in/Plain.ZARR", "in/no ending"):
        write_ome(tmp_path / name, voxels, version=version)
    write_ome(tmp_path / "in/scan.ome.zarr/labels/organ", voxels, version=version)
    touch(tmp_path / "in/scan.ome.zarr/stray.nii")
    assert names(tmp_path / "in") == ["Plain", "no_ending", "scan"]
    assert names(tmp_path / "in/scan.ome.zarr/") == ["scan"]
    assert find_studies([str(tmp_path)], exclude=None).studies[0].kind == "ome-zarr"


def test_damaged_ome_zarr_is_not_passed_over(tmp_path: Path) -> None:
    touch(tmp_path / "in/broken.ome.zarr/zarr.json", content="{not json")
    touch(tmp_path / "in/list/zarr.json", content=json.dumps({"attributes": [1]}))
    touch(tmp_path / "in/list/a.nii")
    assert names(tmp_path / "in") == ["broken", "list__a"]


def test_clashing_names_get_hex_of_their_content(tmp_path: Path) -> None:
    touch(tmp_path / "1/a.nii", tmp_path / "2/a.nii", tmp_path / "3/a b.nii", tmp_path / "3/a_b.nii.gz")
    (tmp_path / "4").mkdir()
    (tmp_path / "4/a.nii").write_bytes((tmp_path / "2/a.nii").read_bytes())
    inputs = [str(tmp_path / n) for n in "1234"]
    found = find_studies(inputs, exclude=None).studies
    by_file = {study.parts[0].removeprefix(str(tmp_path)): study for study in found}
    assert by_file["/1/a.nii"].name == "a"
    digest = digest_of(by_file["/2/a.nii"])[:6]
    assert by_file["/2/a.nii"].name == f"a-{digest}"
    assert by_file["/4/a.nii"].name == f"a-{digest}-2"  # the same bytes a second time
    assert by_file["/3/a b.nii"].name == "a_b"
    assert by_file["/3/a_b.nii.gz"].name == f"a_b-{digest_of(by_file['/3/a_b.nii.gz'])[:6]}"
    for seed in range(5):
        random.Random(seed).shuffle(inputs)
        assert find_studies(inputs, exclude=None).studies == found


def test_one_real_path_is_one_study(tmp_path: Path) -> None:
    touch(tmp_path / "in/sub/a.nii")
    (tmp_path / "link.nii").symlink_to(tmp_path / "in/sub/a.nii")
    (tmp_path / "folder").symlink_to(tmp_path / "in")
    assert names(tmp_path / "in", tmp_path / "in", tmp_path / "folder") == ["sub__a"]
    assert names(tmp_path / "link.nii", tmp_path / "in") == names(tmp_path / "in", tmp_path / "link.nii") == ["link"]


def test_loops_of_links_end(tmp_path: Path) -> None:
    touch(tmp_path / "in/a/b/x.nii")
    (tmp_path / "in/a/b/up").symlink_to(tmp_path / "in")
    (tmp_path / "in/self").symlink_to(tmp_path / "in/self")
    assert names(tmp_path / "in") == ["a__b__x"]


def test_out_inside_input_is_not_searched(tmp_path: Path) -> None:
    touch(tmp_path / "in/a.nii", tmp_path / "in/out/masks/a.nii.gz", tmp_path / "in/out/images/b.nii")
    assert names(tmp_path / "in", exclude=tmp_path / "in/out") == ["a"]
    (tmp_path / "in/alias").symlink_to(tmp_path / "in/out")
    assert names(tmp_path / "in", exclude=tmp_path / "in/out") == ["a"]
    for inside in (".", "images", "images/b.nii", "masks"):  # results are no scans of the run that writes them
        found = find_studies([str(tmp_path / "in/out" / inside)], exclude=str(tmp_path / "in/out"))
        assert not found.studies
        assert "output folder" in found.failures[0][1].message
    assert names(tmp_path / "in/out/images", exclude=tmp_path / "other") == ["b"]
    touch(tmp_path / "in/scans/c.nii")
    assert names(tmp_path / "in/scans", exclude=tmp_path / "in") == ["c"]


def test_another_runs_out_inside_input_is_not_searched(tmp_path: Path) -> None:
    touch(tmp_path / "in/a.nii", tmp_path / "in/out/masks/a.nii.gz", tmp_path / "in/out/ledger/out.json")
    assert names(tmp_path / "in") == ["a"]
    assert names(tmp_path / "in/out") == ["masks__a"]  # unless it is what was asked for


def test_failures_stand_beside_the_others(tmp_path: Path) -> None:
    touch(tmp_path / "in/a.nii")
    (tmp_path / "empty").mkdir()
    (tmp_path / "in/gone.nii").symlink_to(tmp_path / "nowhere")
    inputs = [str(tmp_path / n) for n in ("missing.nii", "in", "empty")]
    found = find_studies(inputs, exclude=None)
    assert [s.name for s in found.studies] == ["a"]
    assert [source for source, _ in found.failures] == sorted([inputs[0], inputs[2], str(tmp_path / "in/gone.nii")])
    for _, error in found.failures:
        assert error.cause == "input"
        assert str(tmp_path) not in error.message


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("clip.MP4", "", "not supported by this version yet"),
        ("slice.dcm", "", "not supported by this version yet"),
        ("IM0001", "\0" * 128 + "DICM", "not supported by this version yet"),
        ("frame.png", "", "not supported by this version yet"),
        ("notes.txt", "hello", "no known kind"),
        ("folder/clip.mp4", "", "no study in this folder"),
    ],
)
def test_named_files_of_other_kinds(tmp_path: Path, name: str, content: str, says: str) -> None:
    touch(tmp_path / name, content=content)
    assert says in failure(tmp_path / name.split("/")[0])[1].message


def test_a_pipe_or_nonsense_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.nii")
    assert "regular file" in failure(tmp_path / "pipe.nii")[1].message
    failure(f"{tmp_path}/\0.nii")
    failure(tmp_path / ("n" * 300))


@contextmanager
def as_nobody() -> Iterator[None]:
    """Give up, for a while, root's right to read everything."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_unreadable_folder_is_a_failure_beside_the_others() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        root = Path(folder)
        root.chmod(0o755)
        touch(root / "in/a.nii", root / "in/locked/b.nii")
        assert names(root / "in") == ["a", "locked__b"]
        (root / "in/locked").chmod(0)
        with as_nobody():
            found = find_studies([str(root / "in")], exclude=None)
        (root / "in/locked").chmod(0o700)
    assert [s.name for s in found.studies] == ["a"]
    assert found.failures[0][0] == str(root / "in/locked")


@pytest.mark.realdata
def test_real_folder(shared: Path) -> None:
    found = find_studies([str(shared / "hippocampus/images")], exclude=None)
    assert len(found.studies) == 200
    assert not found.failures
    assert found.studies[0].name == "hippocampus_001"


def test_written_channels_open(tmp_path: Path) -> None:
    stored = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    (tmp_path / "case").mkdir()
    for n in range(2):
        write_nifti(tmp_path / f"case/t_{n:04d}.nii.gz", stored + n)
    (study,) = find_studies([str(tmp_path)], exclude=None).studies
    assert (study.name, len(study.parts)) == ("case", 2)
