"""Several commands that share the studies of one OUT by parts, as the tasks of a job array do."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from scans import label_array, leftovers, mask_bytes, scan, table

import pipeline
from pipeline.errors import UsageError
from pipeline.job import make_job
from pipeline.ledger import failures
from pipeline.start import find

PARTS = 3
STUDIES = [f"s{i}" for i in range(8)]


@pytest.fixture
def top(tmp_path: Path) -> Path:
    for seed, study in enumerate(STUDIES):
        scan(tmp_path / f"in/{study}.nii.gz", seed)
    (tmp_path / "in/bad.nii").write_bytes(b"no scan")
    return tmp_path


def studies_of(top: Path, part: int, parts: int = PARTS) -> list[str]:
    job = make_job({"inputs": [str(top / "in")], "model": "kmeans", "part": f"{part}/{parts}"})
    return [study.name for study in find(job).studies]


def test_each_study_falls_to_one_part_and_stays_there(top: Path) -> None:
    shares = [studies_of(top, part) for part in range(1, PARTS + 1)]
    assert sorted(chain(*shares)) == sorted([*STUDIES, "bad"])
    assert sum(map(bool, shares)) >= 2
    scan(top / "in/a-new-one.nii.gz", 9)
    later = [studies_of(top, part) for part in range(1, PARTS + 1)]
    assert [[name for name in share if name != "a-new-one"] for share in later] == shares
    assert studies_of(top, 1, 1) == sorted([*STUDIES, "bad", "a-new-one"])


COMMAND = """
import sys, json, pipeline
print(json.dumps(pipeline.segment(*sys.argv[1:4], part=sys.argv[4], threads=1).to_json()))
"""


def test_parts_at_once_fill_one_out(top: Path) -> None:
    command = [sys.executable, "-c", COMMAND, str(top / "in"), "kmeans", str(top / "out")]
    running = [
        subprocess.Popen(
            [*command, f"{part}/{PARTS}"], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        for part in range(1, PARTS + 1)
    ]
    ended: list[dict[str, Any]] = [json.loads(process.communicate()[0]) for process in running]
    assert sum(one["published"] for one in ended) == len(STUDIES)
    assert sum(one["failed"] for one in ended) == 1
    assert sum(one["blocks_computed"] for one in ended) == len(STUDIES)
    whole = pipeline.segment(top / "in", "kmeans", top / "whole", threads=1)
    assert (whole.published, whole.failed) == (len(STUDIES), 1)
    for study in STUDIES:
        assert (label_array(top / "out", study) == label_array(top / "whole", study)).all()
        assert mask_bytes(top / "out", study) == mask_bytes(top / "whole", study)
    assert leftovers(top / "out") == []
    # What the last one wrote tells of all of them.
    again = pipeline.segment(top / "in", "kmeans", top / "out", part="1/3", threads=1)
    assert again.blocks_computed == 0
    assert {(row["study"], row["state"]) for row in table(top / "out", "studies")} == {
        *((study, "published") for study in STUDIES),
        ("bad", "failed"),
    }
    assert table(top / "out", "structures") == table(top / "whole", "structures")


def test_a_part_without_a_study_is_no_error(top: Path) -> None:
    empty = next(part for part in range(1, 100) if not studies_of(top, part, 99))
    ended = pipeline.segment(top / "in", "kmeans", top / "out", part=f"{empty}/99", threads=1)
    assert (ended.exit_code, ended.studies) == (0, [])


def test_an_input_that_is_no_study_stands_as_failed_whoever_ends_last(top: Path) -> None:
    """It falls to one part; the other must not take its failure for one that was mended."""
    inputs = [top / "in/s0.nii.gz", top / "in/s1.nii.gz", top / "nothing.nii.gz"]
    for parts in (("1/2", "2/2"), ("1/2",)):
        for part in parts:
            pipeline.segment(inputs, "kmeans", top / "out", part=part, threads=1)
        assert [record["study"] for record in failures(str(top / "out")).values()] == ["nothing"]


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "1/0", "a/b", "-1/3", "1/3/5", ""])
def test_parts_that_cannot_be(part: str) -> None:
    with pytest.raises(UsageError, match=r"part: .*I/N"):
        make_job({"inputs": ["x"], "model": "kmeans", "part": part})
