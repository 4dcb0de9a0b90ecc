"""When the machine fails and not the scan: workers that are lost, files that cannot be written."""

from __future__ import annotations

import json
import resource
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from scans import label_array, leftovers, save_nifti, scan

import pipeline
from pipeline.engine import Failure, Receipt, SerialEngine, Work
from pipeline.errors import StudyError, UsageError


class LosesItsWorkers(SerialEngine):
    """An engine that has no workers any more after the first block."""

    error: Exception = StudyError("crash", "workers keep dying: 4 in a row died while they loaded")

    def run(self, works: Iterable[Work], stop: threading.Event) -> Iterator[Receipt | Failure]:
        yield next(super().run(works, stop))
        raise self.error


class FindsNoRoom(LosesItsWorkers):
    error = UsageError("0 of 2 workers started within 120 s")


@pytest.mark.parametrize("engine", [LosesItsWorkers, FindsNoRoom])
def test_lost_workers_fail_what_is_left_and_the_summary_says_so(engine: type[SerialEngine], tmp_path: Path) -> None:
    for seed, study in enumerate("abc"):
        scan(tmp_path / f"in/{study}.nii.gz", seed)
    summary = pipeline.segment(tmp_path / "in", "kmeans", tmp_path / "out", engine=engine)
    assert (summary.published, summary.failed, summary.interrupted, summary.exit_code) == (1, 2, 0, 1)
    assert [e["state"] for e in summary.studies] == ["published", "failed", "failed"]
    for entry in summary.studies[1:]:
        assert entry["cause"] == "crash"
        assert entry["message"].startswith("the workers were lost: ")
    assert (tmp_path / "out/report/index.html").is_file()
    again = pipeline.segment(tmp_path / "in", "kmeans", tmp_path / "out")
    assert (again.published, again.reused, again.exit_code) == (3, 1, 0)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing more than `size` bytes to one file fails in this process, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_study_that_finds_no_room_fails_alone_and_leaves_nothing(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 30000, (100, 100, 60)).astype(np.int16)
    save_nifti(tmp_path / "in/large.nii.gz", noise)
    scan(tmp_path / "in/small.nii.gz", 1)
    with largest_file(300_000):
        summary = pipeline.segment(tmp_path / "in", "kmeans", tmp_path / "out", threads=1)
    large, small = summary.studies
    assert (large["state"], large["cause"]) == ("failed", "storage")
    assert "too large" in large["message"].lower()
    assert small["state"] == "published"
    assert summary.exit_code == 1
    assert leftovers(tmp_path / "out") == []
    again = pipeline.segment(tmp_path / "in", "kmeans", tmp_path / "out", threads=1)
    assert (again.published, again.reused, again.exit_code) == (2, 1, 0)
    assert label_array(tmp_path / "out", "large").any()


def test_a_mask_that_finds_no_room_is_not_half_there(tmp_path: Path) -> None:
    """Labels of noise in 64 classes: the label shards fit, the one file of all of them does not."""
    noise = np.random.default_rng(0).integers(0, 30000, (40, 40, 200)).astype(np.int16)
    save_nifti(tmp_path / "in/x.nii.gz", noise)
    assert pipeline.segment(tmp_path / "in", "kmeans", tmp_path / "apart", threads=1, classes=64).exit_code == 0
    shard = max(p.stat().st_size for p in (tmp_path / "apart/images").rglob("c/*/*/*"))
    mask = (tmp_path / "apart/masks/x.nii.gz").stat().st_size
    assert shard < mask * 0.9
    with largest_file((shard + mask) // 2):
        summary = pipeline.segment(tmp_path / "in", "kmeans", tmp_path / "out", threads=1, classes=64)
    (entry,) = summary.studies
    assert (entry["state"], entry["cause"], entry["mask"]) == ("failed", "storage", None)
    assert list((tmp_path / "out/masks").iterdir()) == []
    again = pipeline.segment(tmp_path / "in", "kmeans", tmp_path / "out", threads=1, classes=64)
    assert (again.published, again.blocks_computed, again.exit_code) == (1, 0, 0)
    whole = (tmp_path / "apart/masks/x.nii.gz").read_bytes()
    assert (tmp_path / "out/masks/x.nii.gz").read_bytes() == whole


def test_the_record_of_a_failure_has_its_last_log_lines(tmp_path: Path) -> None:
    """And those of no other study; what it says names no path."""
    scan(tmp_path / "in/good.nii.gz", 1, (12, 14, 140))
    scan(tmp_path / "in/secret-name.nii.gz", 2)
    raw = bytearray((tmp_path / "in/secret-name.nii.gz").read_bytes())
    (tmp_path / "in/secret-name.nii.gz").write_bytes(raw[:-40])
    summary = pipeline.segment(tmp_path / "in", "kmeans", tmp_path / "out")
    assert (summary.published, summary.failed) == (1, 1)
    (failed,) = (tmp_path / "out").glob("ledger/*/failed.json")
    record = json.loads(failed.read_text())
    lines = [json.loads(line) for line in record["log"]]
    assert 1 <= len(lines) <= 10
    assert {line["key"] for line in lines} == {failed.parent.name}
    assert lines[-1]["level"] == "error"
    assert lines[-1]["event"] == record["message"]
    assert "secret-name" not in "".join(record["log"])
    assert (record["cause"], record["attempts"], record["run"]) == ("input", 1, summary.run)
