"""`maskmill evaluate` as people and scripts see it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scans import Ended, maskmill, random_model, save_nifti

FIELDS = ["scored", "failed", "tolerance_mm", "level", "resamples", "tables", "unnamed_labels", "summary", "studies"]


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three masks of two boxes, each a voxel of 1 mm off its reference; one reference is missing."""
    top = tmp_path_factory.mktemp("evaluate")
    for number in range(3):
        boxes = np.zeros((14, 12, 10), np.uint8)
        boxes[2:6, 2:9, 2 : 7 + number] = 1
        boxes[7:11, 3:9, 2:8] = 2
        save_nifti(top / f"masks/s{number}.nii.gz", np.roll(boxes, 1, 0))
        if number:
            save_nifti(top / f"truth/s{number}.nii.gz", boxes)
    (top / "names.json").write_text(json.dumps({"0": "background", "1": "front", "2": {"name": "back"}}))
    return top


@pytest.fixture(scope="module")
def ended(top: Path) -> Ended:
    names = ("--labels", top / "names.json", "--tolerance", 0.5)
    return maskmill("evaluate", top / "masks", top / "truth", "-o", top / "out", *names, "--json")


def test_one_line_of_json(top: Path, ended: Ended) -> None:
    assert ended.code == 1
    assert ended.out.count("\n") == 1
    document = ended.json
    assert list(document) == FIELDS
    assert (document["scored"], document["failed"], document["tolerance_mm"]) == (2, 1, 0.5)
    first, *others = document["studies"]
    assert (first["study"], first["state"], first["cause"]) == ("s0", "failed", "input")
    assert first["source"] == str(top / "masks/s0.nii.gz")
    assert [row["state"] for row in others] == ["scored", "scored"]
    rows = {(row["structure"], row["score"]): row for row in document["summary"]}
    assert rows["front", "hd95_mm"]["mean"] == rows["back", "hd95_mm"]["mean"] == 1.0
    assert (rows["back", "hd95_mm"]["low"], rows["back", "hd95_mm"]["high"]) == (1.0, 1.0)
    assert rows["front", "dice"]["mean"] == pytest.approx(0.75)
    assert 0 < rows["front", "surface_dice_0.5mm"]["mean"] < 1
    for name in ("studies", "structures", "summary"):
        assert (top / f"out/metrics/{name}.csv").is_file()
        assert (top / f"out/metrics/{name}.parquet").is_file()


def test_a_table_for_people_on_stderr(top: Path, ended: Ended) -> None:
    first, header, *rows, last = ended.err.splitlines()
    assert first == (
        f"failed: {top}/masks/s0.nii.gz: input: there is no reference of this name; expected s0.nii.gz or the like"
    )
    assert header.split() == ["structure", "n", "dice", "hd95_mm", "surface_dice_0.5mm"]
    assert [row.split()[0] for row in rows] == ["front", "back", "mean"]
    assert rows[0].split()[1:5] == ["2", "0.750", "[0.750,", "0.750]"]
    assert last == f"2 of 3 studies scored; tables: {top}/out/metrics"


def test_nothing_failed_is_zero_and_a_model_names_the_structures(top: Path) -> None:
    model = random_model(top / "model")
    ended = maskmill("evaluate", top / "masks/s1.nii.gz", top / "truth/s1.nii.gz", "-o", top / "two", "-m", model)
    assert (ended.code, ended.out) == (0, "")
    assert "front" in ended.err
    only = top / "only.json"
    only.write_text('{"1": "front"}')
    ended = maskmill("evaluate", top / "masks/s1.nii.gz", top / "truth/s1.nii.gz", "-o", top / "two", "--labels", only)
    assert ended.code == 0
    assert "note: labels without a name are not scored: 2" in ended.err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--labels", "missing.json"], "cannot read the labels"),
        (["--labels", "broken.json"], "are no JSON"),
        (["--labels", "list.json"], "whole numbers up to 65535 with a name of its own each"),
        (["--labels", "twice.json"], "whole numbers up to 65535 with a name of its own each"),
        (["--labels", "large.json"], "whole numbers up to 65535 with a name of its own each"),
        (["--labels", "half.json"], "whole numbers up to 65535 with a name of its own each"),
        (["--labels", "words.json"], "whole numbers up to 65535 with a name of its own each"),
        (["--labels", "background.json"], "name no structure"),
        (["--labels", "names.json", "-m", "kmeans"], "not both"),
        (["-m", "no-such-model"], "no-such-model"),
        (["--tolerance", "-1"], "expected 0 or more"),
        (["--memory", "much"], "expected a size such as 4GiB"),
    ],
)
def test_what_is_wrong_is_one_line_and_two(
    top: Path, flags: list[str], says: str, capfd: pytest.CaptureFixture
) -> None:
    """In this process: starting one for each would take most of the time."""
    from flows.cli import app, guarded

    (top / "broken.json").write_text('{"1": "front"')
    (top / "list.json").write_text("[1, 2]")
    (top / "words.json").write_text('{"one": "front"}')
    (top / "twice.json").write_text('{"1": "kidney", "2": "kidney"}')
    (top / "large.json").write_text('{"100000000000000000000": "front"}')
    (top / "half.json").write_text('{"1": "\\ud800"}')
    (top / "background.json").write_text('{"0": "background"}')
    flags = [str(top / flag) if flag.endswith(".json") else flag for flag in flags]
    command = ["evaluate", str(top / "masks"), str(top / "truth"), "-o", str(top / "bad"), *flags]
    assert guarded(lambda: app(command, standalone_mode=False)) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("maskmill: ")
    assert said.err.count("\n") == 1
    assert says in said.err
    assert not (top / "bad/metrics").exists()
