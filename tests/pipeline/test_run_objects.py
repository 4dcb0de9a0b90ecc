"""Whole runs whose scans, results and ledger lie in an object store: what holds on a disk holds there."""

from __future__ import annotations

import gzip
import json
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from object_server import BadProxy, ObjectServer
from scans import label_array, mask_bytes, random_model, scan, table

import pipeline
from flows.status import read_status
from pipeline import objects, ome, store, sweep
from pipeline.errors import UsageError
from pipeline.evaluation import evaluate
from pipeline.ledger import location_key
from pipeline.summary import Summary

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model"))


def upload(folder: Path, url: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.write(store.join(url, str(path.relative_to(folder))), path.read_bytes())


@pytest.fixture
def scans(tmp_path: Path, s3: str) -> str:
    """Two scans on a disk and in the store; gives the URL of the latter."""
    scan(tmp_path / "in/a.nii.gz", 1, (12, 14, 140))
    scan(tmp_path / "in/sub/b.nii", 2)
    upload(tmp_path / "in", store.join(s3, "in"))
    return store.join(s3, "in")


def run(inputs: Any, model: Any, out: Any, **settings: Any) -> Summary:
    return pipeline.segment(inputs, model, out, threads=1, **settings)


def counts(summary: Summary) -> tuple[int, int, int, int]:
    return summary.published, summary.reused, summary.blocks_computed, summary.failed


def mask(out: str, study: str) -> bytes:
    return gzip.decompress(store.read(store.join(out, "masks", f"{study}.nii.gz")))


def check_same(out: str, local: Path, *studies: str) -> None:
    """Labels, masks and tables in the store are those of a run on a disk."""
    for study in studies:
        labels = store.join(out, "images", f"{study}.ome.zarr", "labels", "tiny-resunet", "0")
        np.testing.assert_array_equal(ome.open_array(labels)[...], label_array(local, study, "tiny-resunet"))
        assert mask(out, study) == mask_bytes(local, study)
    assert store.read(store.join(out, "metrics", "structures.csv")) == (local / "metrics/structures.csv").read_bytes()


def test_all_of_it_in_a_store_is_as_on_a_disk(scans: str, model: Path, s3: str, tmp_path: Path) -> None:
    out = store.join(s3, "out")
    ended = run(scans, model, out, reference=scans)
    local = run(tmp_path / "in", model, tmp_path / "out", reference=str(tmp_path / "in"))
    assert counts(ended) == counts(local) == (2, 0, 2, 0)
    assert ended.dice == local.dice
    check_same(out, tmp_path / "out", "a", "sub__b")
    assert ended.report == store.join(out, "report", "index.html")
    assert store.size(store.join(out, "report", "pictures", "a.png")) > 1000
    assert not [name for name in objects.keys(out) if "/." in name and ".statistics" not in name]
    log = store.read(store.join(out, "runs", ended.run, "log.jsonl")).decode().splitlines()
    assert [json.loads(line)["event"] for line in log].count("published") == 2
    assert "s3://" not in "".join(log)
    entries = read_status(out)
    assert [(e["study"], e["state"]) for e in entries] == [("a", "published"), ("sub__b", "published")]


def test_results_may_go_to_a_disk_and_scans_come_from_one(scans: str, model: Path, s3: str, tmp_path: Path) -> None:
    assert counts(run(scans, model, tmp_path / "out")) == (2, 0, 2, 0)
    out = store.join(s3, "out")
    assert counts(run(tmp_path / "in", model, out)) == (2, 0, 2, 0)
    check_same(out, tmp_path / "out", "a", "sub__b")
    assert table(tmp_path / "out", "structures")


def test_a_rerun_reads_no_scan_and_writes_no_result(
    scans: str, model: Path, s3: str, s3_server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = store.join(s3, "out")
    run(scans, model, out)
    with BadProxy(s3_server, "") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.environment["AWS_ENDPOINT_URL"])
        objects.forget()
        assert counts(run(scans, model, out)) == (2, 2, 0, 0)
        heads = [path for method, path in proxy.seen if method == "GET" and path.endswith((".nii", ".nii.gz"))]
        written = {path.split("/out/")[1].split("/")[0] for method, path in proxy.seen if method == "PUT"}
    assert len(heads) <= 2 * 3, "only headers are read again"
    assert written <= {"ledger", "runs", "metrics", "report"}


def test_a_scan_that_changed_supersedes_its_result(scans: str, model: Path, s3: str, tmp_path: Path) -> None:
    out = store.join(s3, "out")
    run(scans, model, out)
    old = store.read(store.join(out, "masks", "sub__b.nii.gz"))
    store.write(store.join(scans, "sub/b.nii"), scan(tmp_path / "new/b.nii", 3).read_bytes())
    assert counts(run(scans, model, out)) == (2, 1, 1, 0)
    masks = list(store.names(store.join(out, "masks")))
    aside = next(name for name in masks if re.fullmatch(r"sub__b-[0-9a-f]{6}\.nii\.gz", name))
    assert len(masks) == 3
    assert store.read(store.join(out, "masks", aside)) == old
    assert store.exists(store.join(out, "images", aside.replace(".nii.gz", ".ome.zarr"), "zarr.json"))
    (tmp_path / "in/sub/b.nii").write_bytes((tmp_path / "new/b.nii").read_bytes())
    run(tmp_path / "in", model, tmp_path / "out")
    assert mask(out, "sub__b") == mask_bytes(tmp_path / "out", "sub__b")


def test_other_settings_are_refused_or_replace(scans: str, model: Path, s3: str, tmp_path: Path) -> None:
    out = store.join(s3, "out")
    run(scans, model, out)
    with pytest.raises(UsageError, match="overlap"):
        run(scans, model, out, overlap=0.25)
    with pytest.raises(UsageError, match="holds results of the model tiny-resunet"):
        run(scans, "kmeans", out)
    assert counts(run(scans, model, out, overlap=0.25, overwrite=True)) == (2, 0, 2, 0)
    run(tmp_path / "in", model, tmp_path / "out", overlap=0.25)
    check_same(out, tmp_path / "out", "a", "sub__b")


def test_the_same_scan_twice_is_computed_once(s3: str, model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        store.write(store.join(s3, f"in/{name}.nii.gz"), scan(tmp_path / "x.nii.gz", 1).read_bytes())
    ended = run(store.join(s3, "in"), model, store.join(s3, "out"))
    assert counts(ended) == (2, 0, 1, 0)
    masks = [store.read(store.join(s3, "out", "masks", f"{name}.nii.gz")) for name in ("a", "b")]
    assert masks[0] == masks[1]


def test_an_ome_zarr_image_is_read_from_a_store(scans: str, model: Path, s3: str, tmp_path: Path) -> None:
    out = store.join(s3, "out")
    run(scans, model, out)
    again = run(store.join(out, "images"), model, store.join(s3, "again"))
    assert counts(again) == (2, 0, 2, 0)
    labels = [store.join(o, "images/a.ome.zarr/labels/tiny-resunet/0") for o in (out, store.join(s3, "again"))]
    np.testing.assert_array_equal(*(ome.open_array(url)[...] for url in labels))
    assert counts(run(store.join(out, "images"), model, store.join(s3, "again"))) == (2, 2, 0, 0)


def test_bad_scans_in_a_store_cost_no_other(scans: str, model: Path, s3: str) -> None:
    store.write(store.join(scans, "cut.nii"), store.read(store.join(scans, "sub/b.nii"))[:600])
    store.write(store.join(scans, "notes.txt"), b"")
    store.write(store.join(scans, "broken.ome.zarr/zarr.json"), b"{")
    ended = run([scans, store.join(s3, "nothing"), "s3://bucket-that-is-not/x"], model, store.join(s3, "out"))
    assert ended.exit_code == 1
    failed = {e["source"].rpartition("/")[2]: e["cause"] for e in ended.studies if e["state"] == "failed"}
    assert failed == {"cut.nii": "input", "broken.ome.zarr": "input", "nothing": "input", "x": "storage"}
    assert "no such bucket" in next(e["message"] for e in ended.studies if e["source"].endswith("/x"))
    assert ended.published == 2


def test_what_a_disk_alone_can_do_is_refused(scans: str, model: Path, s3: str) -> None:
    ended = run(scans, model, store.join(s3, "out"), images="link")
    assert ended.published == 2  # NIfTI files are copied in any case
    image = store.join(s3, "out", "images", "a.ome.zarr")
    ended = run(image, model, store.join(s3, "other"), images="link")
    assert "local disks" in ended.studies[0]["message"]


def test_an_out_that_cannot_be_written_is_said_at_once(scans: str, model: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written: there is no such bucket"):
        run(scans, model, "s3://bucket-that-is-not/out")


def test_abandoned_images_go_after_an_hour(scans: str, model: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that was killed while it read a study leaves a hidden image, which nobody else may be writing to."""
    out = store.join(s3, "out")
    stage = store.join(out, "images", f".{location_key('x')}-0123.ome.zarr")
    store.write(store.join(stage, "0/zarr.json"), b"{}")
    run(scans, model, out)
    assert store.exists(stage)
    monkeypatch.setattr(sweep, "ABANDONED", timedelta(seconds=1))
    time.sleep(2.5)  # the store's clock has whole seconds
    run(scans, model, out)
    assert not store.exists(stage)


def test_a_stage_that_was_swept_under_its_owner_is_no_image(
    scans: str, model: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command was suspended for long: what is left of its image must not be taken in."""
    out, move = store.join(s3, "out"), store.move

    def swept(source: str, target: str) -> None:
        if source.endswith(".ome.zarr"):
            store.delete(store.join(source, "zarr.json"))
        move(source, target)

    monkeypatch.setattr(store, "move", swept)
    ended = run(scans, model, out)
    assert [e["cause"] for e in ended.studies] == ["storage"] * 2
    monkeypatch.undo()
    assert [name for name in store.names(store.join(out, "images")) if not name.startswith(".")] == []


@pytest.mark.parametrize(
    ("fault", "every"),
    [("503", 20), *(pytest.param(f, n, marks=pytest.mark.slow) for f, n in (("drop", 20), ("half", 20), ("slow", 40)))],
)
def test_a_bad_store_changes_nothing(
    fault: str, every: int, scans: str, model: Path, s3: str, s3_server: ObjectServer, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = store.join(s3, "out")
    with BadProxy(s3_server, fault, every) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.environment["AWS_ENDPOINT_URL"])
        objects.forget()
        assert counts(run(scans, model, out)) == (2, 0, 2, 0)
        assert proxy.faults >= 4
    run(tmp_path / "in", model, tmp_path / "out")
    monkeypatch.undo()
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    objects.forget()
    check_same(out, tmp_path / "out", "a", "sub__b")


def test_a_store_that_goes_away_fails_what_was_not_done_and_the_next_run_goes_on(
    scans: str, model: Path, s3: str, s3_server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(objects.RETRY, "max_retries", 1)
    out = store.join(s3, "out")
    with BadProxy(s3_server, "", 1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.environment["AWS_ENDPOINT_URL"])
        objects.forget()

        def away(*_: Any) -> bool:
            proxy.requests += 1
            return proxy.requests > 60

        monkeypatch.setattr(proxy, "meets_fault", away)
        proxy.fault = "down"
        ended = run(scans, model, out)
    assert ended.exit_code == 1
    assert {e["cause"] for e in ended.studies if e["state"] == "failed"} == {"storage"}
    monkeypatch.undo()
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    objects.forget()
    assert counts(run(scans, model, out))[0] == 2
    run(tmp_path / "in", model, tmp_path / "out")
    check_same(out, tmp_path / "out", "a", "sub__b")


def test_masks_in_a_store_are_evaluated(scans: str, model: Path, s3: str, tmp_path: Path) -> None:
    out = store.join(s3, "out")
    run(scans, model, out)
    masks = store.join(out, "masks")
    scores = evaluate(masks, masks, store.join(s3, "scores"))
    assert {row["dice"] for row in scores.structures} == {1.0}
    assert b"sub__b" in store.read(store.join(s3, "scores", "metrics", "structures.csv"))
