"""Settings: what they may be, and one clear line for what they may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.job import Job, make_job, parse_bytes, read_job_file

MINIMAL: dict[str, Any] = {"inputs": ["scan.nii"], "model": "kmeans"}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("123456", 123_456),
        ("1", 1),
        ("800MB", 800_000_000),
        ("800M", 800_000_000),
        ("4GiB", 4 << 30),
        ("4gib", 4 << 30),
        ("4Gi", 4 << 30),
        (" 4 GiB ", 4 << 30),
        ("1.5KiB", 1536),
        ("0.5 TiB", 1 << 39),
        ("2k", 2000),
        ("3TB", 3 * 10**12),
        ("7b", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "4 GiB 2", "-4GiB", "4 parsecs", "4PiB", "1e9", "0", "0.0001k", "1,5GiB", "0x10", "٤GiB!"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_bytes(text)


@given(number=st.integers(1, 10**6), unit=st.sampled_from(["", "k", "M", "GiB", "Ki", "tb"]))
def test_sizes_grow_with_their_number(number: int, unit: str) -> None:
    assert parse_bytes(f"{number}{unit}") == number * parse_bytes(f"1{unit}")


def test_defaults() -> None:
    job = make_job(MINIMAL)
    assert (job.engine, job.formats, job.images, job.precision) == ("ray", ("nifti",), "copy", "auto")
    assert (job.workers, job.threads, job.memory, job.tile, job.overlap, job.stitch) == (None,) * 6
    assert not job.overwrite
    assert not job.retry_failed


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        ({"memory": "4GiB"}, "memory", 4 << 30),
        ({"memory": 5_000_000}, "memory", 5_000_000),
        ({"tile": "96,96,64"}, "tile", (96, 96, 64)),
        ({"tile": "96x96x64"}, "tile", (96, 96, 64)),
        ({"tile": [96, 96]}, "tile", (96, 96)),
        ({"formats": "nifti"}, "formats", ("nifti",)),
        ({"formats": "nifti,nifti"}, "formats", ("nifti",)),
        ({"inputs": "a.nii,b.nii"}, "inputs", ("a.nii", "b.nii")),
        ({"overlap": 0}, "overlap", 0.0),
        ({"stitch": "constant"}, "stitch", "constant"),
    ],
)
def test_forms_a_setting_may_have(settings: dict[str, Any], name: str, value: Any) -> None:
    assert getattr(make_job(MINIMAL | settings), name) == value


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"overlap": 1}, "overlap: .*less than 1"),
        ({"overlap": -0.1}, "overlap: .*greater than or equal to 0"),
        ({"overlap": float("nan")}, "overlap"),
        ({"workers": 0}, "workers: .*greater than or equal to 1"),
        ({"threads": "many"}, "threads: .*valid integer"),
        ({"memory": "4 parsecs"}, "memory: expected a size such as 4GiB, got '4 parsecs'"),
        ({"memory": 0}, "memory"),
        ({"memory": -5}, "memory"),
        ({"tile": "96,abc,1"}, "tile: expected whole numbers such as 96,96,96, got '96,abc,1'"),
        ({"tile": "0,96,96"}, "tile: a tile has at least one voxel"),
        ({"tile": 96}, "tile"),
        ({"tile": ["a", 1, 1]}, "tile"),
        (
            {"stitch": "gausian"},
            "stitch: unknown: 'gausian'; choose from gaussian, constant, nnunet",
        ),
        ({"formats": "nifti,tiff"}, "formats: unknown: 'tiff'"),
        ({"formats": [5]}, "formats"),
        ({"engine": "spark"}, "engine: .*'ray' or 'serial'"),
        ({"images": "move"}, "images: .*'copy' or 'link'"),
        ({"precision": "fp8"}, "precision"),
        ({"classes": 1}, "classes"),
        ({"classes": 256}, "classes"),
        ({"limit": 0}, "limit"),
        ({"volume": -1}, "volume"),
        ({"inputs": []}, "inputs: give at least one"),
        ({"inputs": 5}, "inputs"),
        ({"model": None}, "model"),
        ({"overwrite": "perhaps"}, "overwrite"),
    ],
)
def test_what_a_setting_may_not_be(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make_job(MINIMAL | settings)


def test_each_wrong_setting_is_named() -> None:
    with pytest.raises(UsageError) as refused:
        make_job(MINIMAL | {"overlap": 2, "workers": -1})
    assert "overlap:" in str(refused.value)
    assert "workers:" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "near"), [("overlapp", "overlap"), ("work", "workers"), ("ouput", "out"), ("retry-failed", "retry_failed")]
)
def test_an_unknown_setting_is_told_its_nearest_name(name: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"unknown setting '{name}'; did you mean '{near}'"):
        make_job(MINIMAL | {name: 1})


def test_a_setting_like_no_other_is_told_all_names() -> None:
    with pytest.raises(UsageError, match="unknown setting 'qqqq'; there are inputs, model, out, "):
        make_job(MINIMAL | {"qqqq": 1})


def test_a_job_cannot_change() -> None:
    job = make_job(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        job.overlap = 0.1  # type: ignore[misc]


def written(folder: Path, text: str | bytes) -> str:
    path = folder / "job.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_a_job_file_says_what_flags_say(tmp_path: Path) -> None:
    text = "inputs: [scans/]\nmodel: kmeans\nmemory: 4GiB\ntile: [64, 96, 96]\nretry-failed: true\noverlap: 0.25\n"
    job = make_job(read_job_file(written(tmp_path, text)))
    assert job == Job(
        inputs=("scans/",), model="kmeans", memory=4 << 30, tile=(64, 96, 96), retry_failed=True, overlap=0.25
    )


def test_a_key_that_is_set_twice_is_a_contradiction(tmp_path: Path) -> None:
    for text in ("classes: 3\nmodel: kmeans\nclasses: 2\n", "data: {masks: a,\n\n masks: b}\n"):
        with pytest.raises(UsageError, match=r"job.yaml: (classes|masks) is set twice, again at line 3"):
            read_job_file(written(tmp_path, text))


def test_numbers_with_an_exponent_need_no_point(tmp_path: Path) -> None:
    text = "a: 1e-3\nb: -2E+4\nc: .5e1\nd: 1.e2\ne: e3\nf: 1e\ng: 0x1e3\nh: 12\n"
    assert read_job_file(written(tmp_path, text)) == {
        "a": 1e-3, "b": -2e4, "c": 5.0, "d": 100.0, "e": "e3", "f": "1e", "g": 0x1E3, "h": 12,
    }  # fmt: skip


@pytest.mark.parametrize("settings", [{"out": ""}, {"inputs": ["a", ""]}, {"inputs": ""}, {"reference": " "}])
def test_an_empty_address_is_no_folder(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(settings))} is empty: give a file"):
        make_job(MINIMAL | settings)


def test_a_job_file_may_be_empty_or_not_english(tmp_path: Path) -> None:
    assert read_job_file(written(tmp_path, "")) == {}
    assert read_job_file(written(tmp_path, "# nothing yet\n")) == {}
    assert read_job_file(written(tmp_path, "out: /data/Größe")) == {"out": "/data/Größe"}


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("model: kmeans\nout: [a, b\n", 3, 1),
        ("model: kmeans\n\tout: x\n", 2, 1),
        ("model: kmeans\nout: a: b\n", 2, 7),
        ("a: 1\nb: 'no end", 2, 11),
        ("x: !!python/object/apply:os.system [id]", 1, 4),
    ],
)
def test_a_broken_job_file_is_told_where(tmp_path: Path, text: str, line: int, column: int) -> None:
    with pytest.raises(UsageError, match=rf"job\.yaml is not proper YAML at line {line}, column {column}"):
        read_job_file(written(tmp_path, text))


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "5", "1: a", "true: x", "null: x"])
def test_a_job_file_holds_settings(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="must hold settings as 'name: value' lines"):
        read_job_file(written(tmp_path, text))


@pytest.mark.parametrize("text", ["out: 2026-13-45", "x: " + "[" * 5000])
def test_what_yaml_itself_stumbles_over_is_no_traceback(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="not proper YAML"):
        read_job_file(written(tmp_path, text))


def test_a_job_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the job file .*: No such file"):
        read_job_file(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(UsageError, match=r"cannot read the job file .*: Is a directory"):
        read_job_file(str(tmp_path))
    with pytest.raises(UsageError, match=r"cannot read the job file .*: not a text file"):
        read_job_file(written(tmp_path, b"\xff\xfe\x00\x80"))
