"""`maskmill phantom`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scans import Ended, start, until, wait

from pipeline.phantoms import phantom

Command = Callable[..., Ended]


def test_it_makes_what_is_missing_and_says_so(tmp_path: Path, command: Command) -> None:
    flags = ["--seed", 3, "--shape", "20,16,24", "--orientation", "LPS", "--tilt", "9,0,-4"]
    said = command("phantom", "-o", tmp_path / "p", "--count", 2, *flags, "--json")
    assert said.code == 0
    assert said.json["made"] == ["phantom-0003", "phantom-0004"]
    assert said.lines("2 phantoms made, 0 were there")
    image = nib.load(tmp_path / "p/images/phantom-0004.nii.gz")
    expected = phantom(4, (20, 16, 24), orientation="LPS", tilt_degrees=(9, 0, -4))
    np.testing.assert_allclose(image.affine, expected.affine, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), expected.region()[0])
    again = command("phantom", "-o", tmp_path / "p", "--count", 3, *flags, "--json")
    assert (again.json["made"], again.json["kept"]) == (["phantom-0005"], 2)


def test_spacing_is_one_number_or_three(tmp_path: Path, command: Command) -> None:
    for spacing, zooms in (("7.5", (7.5, 7.5, 7.5)), ("9,8,7", (7, 8, 9))):
        out = tmp_path / spacing
        assert command("phantom", "-o", out, "--shape", "12,10,14", "--spacing", spacing).code == 0
        assert nib.load(out / "labels/phantom-0000.nii.gz").header.get_zooms() == pytest.approx(zooms)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--shape", "10,10"], "shape"),
        (["--shape", "ten"], "--shape"),
        (["--spacing", "a"], "--spacing"),
        (["--spacing", "-1"], "spacing"),
        (["--orientation", "XYZ"], "orientation"),
        (["--tilt", "5,4"], "three angles"),
        (["--tilt", "5,4,nan"], "three angles"),
        (["--tilt", "a"], "--tilt"),
        (["--format", "dicom"], "nifti, omezarr"),
        (["--count", "0"], "--count"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_what_makes_no_phantom_is_exit_2(flags: list[str], said: str, tmp_path: Path, command: Command) -> None:
    ended = command("phantom", "-o", tmp_path / "p", *flags)
    assert ended.code == 2
    assert said in ended.err
    assert "Traceback" not in ended.err


def test_a_folder_that_cannot_be_made_is_exit_2(tmp_path: Path, command: Command) -> None:
    (tmp_path / "file").touch()
    ended = command("phantom", "-o", tmp_path / "file" / "p")
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)


def test_interrupted_it_goes_on_where_it_stopped(tmp_path: Path, command: Command) -> None:
    flags = ["-o", tmp_path / "p", "--count", 4000, "--shape", "16,12,16"]
    running = start("phantom", *flags)
    until(lambda: len(list((tmp_path / "p").glob("images/*.nii.gz"))) > 1)
    running.terminate()
    ended = wait(running)
    assert ended.code == 130
    assert "run it again to go on" in ended.err
    assert [p for p in (tmp_path / "p").rglob("*") if p.name.endswith(".partial")] == []
    flags[3] = 2
    said = command("phantom", *flags, "--json")
    assert said.code == 0
    assert said.json["kept"] >= 1
