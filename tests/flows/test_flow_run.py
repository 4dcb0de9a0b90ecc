"""One run with everything real: Ray workers, a Prefect server, a patient's name where names can be.

What the run leaves behind, and what it kept in its temporary folder while it lived (hard links outlast what is
deleted), is compared with the serial engine, read, and searched for the name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scans import Ended, brain, label_array, mask_bytes, maskmill, random_model, save_nifti, table

import pipeline

FOLDER = "Erika_Mustermann_1961-04-12"
HEADER = "MUSTERFRAU^LIESL"
SECRETS = (FOLDER, HEADER, "Mustermann", "LIESL")
SHAPE = (20, 150, 70)  # x, y, z: 4 label shards


@contextmanager
def keeping(folder: Path, kept: Path) -> Iterator[None]:
    """Hard-link whatever appears in `folder` into `kept`, under its inode and its path."""
    end = threading.Event()

    def keep() -> None:
        while not end.wait(0.02):
            for at, _, files in os.walk(folder):
                for name in files:
                    path = Path(at) / name
                    with suppress(OSError):
                        target = kept / str(path.stat().st_ino) / path.relative_to(folder)
                        if not target.exists() and path.is_file():
                            target.parent.mkdir(parents=True, exist_ok=True)
                            os.link(path, target)

    thread = threading.Thread(target=keep)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


@dataclass(frozen=True)
class Night:
    top: Path
    kept: Path
    home: Path
    ended: Ended

    @property
    def out(self) -> Path:
        return self.top / "out"


def planted(path: Path, seed: int) -> Path:
    """A scan whose header names the patient wherever a header has room for text."""
    texts = dict.fromkeys(("descrip", "intent_name", "aux_file", "db_name"), HEADER.encode())
    save_nifti(path, brain(SHAPE, seed), comment=f"patient {HEADER} {FOLDER}", **texts)
    raw = path.read_bytes()
    assert HEADER.encode() in raw
    assert b"LIESL" in raw[148:228]  # descrip
    return path


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Night]:
    top = tmp_path_factory.mktemp("night")
    planted(top / FOLDER / "t1.nii", 1)
    random_model(top / "model", mirror_axes=[0, 2])
    # Ray's sockets need a short path, and hard links the same file system.
    temporary = Path(tempfile.mkdtemp(prefix="mmt-", dir="/tmp"))
    kept = Path(tempfile.mkdtemp(prefix="mmk-", dir="/tmp"))
    home = top / "home"
    shutil.copytree(os.environ["MASKMILL_HOME"], home)
    try:
        with keeping(temporary, kept):
            ended = maskmill(
                *("segment", top / FOLDER, top / FOLDER / "gone.nii", "-m", top / "model", "-o", top / "out"),
                *("--engine", "ray", "--workers", 2, "--threads", 1, "--json"),
                TMPDIR=str(temporary),
                MASKMILL_HOME=str(home),
            )
        assert list(temporary.iterdir()) == []
        yield Night(top, kept, home, ended)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(kept, ignore_errors=True)


def test_it_ran_and_left_its_temporary_folder_empty(night: Night) -> None:
    assert night.ended.code == 1  # for the file that is not there
    summary = night.ended.json
    assert (summary["published"], summary["failed"]) == (1, 1)
    assert summary["blocks_computed"] >= 2  # both workers had some
    assert "Traceback" not in night.ended.err
    assert night.ended.out.count("\n") == 1


# ---------------------------------------------------------------------------------------------------- serial equals ray


@pytest.fixture(scope="module")
def serial(night: Night) -> Path:
    summary = pipeline.segment(night.top / FOLDER, night.top / "model", night.top / "serial", threads=1)
    assert summary.exit_code == 0
    return night.top / "serial"


def test_serial_and_ray_give_the_same_labels_and_masks(night: Night, serial: Path) -> None:
    labels = label_array(serial, "t1", "tiny-resunet")
    assert len(np.unique(labels)) == 3
    np.testing.assert_array_equal(label_array(night.out, "t1", "tiny-resunet"), labels)
    assert mask_bytes(night.out, "t1") == mask_bytes(serial, "t1")


def test_serial_and_ray_give_the_same_tables_and_sums(night: Night, serial: Path) -> None:
    assert table(night.out, "structures") == table(serial, "structures")

    def studies(out: Path) -> list[dict[str, Any]]:
        rows = [row for row in table(out, "studies") if row["state"] == "published"]
        return [{n: v for n, v in row.items() if not n.startswith(("seconds_", "peak_"))} for row in rows]

    assert studies(night.out) == studies(serial)

    def sums(out: Path) -> dict[str, Any]:
        folded = {p.parts[-3]: json.loads(p.read_text()) for p in out.glob("ledger/*/done/all.json")}
        return {f"{key} {name}": m["statistics"] for key, held in folded.items() for name, m in held.items()}

    assert sums(night.out) == sums(serial)
    assert len(sums(night.out)) == 4


# ------------------------------------------------------------------------------------------------- what Prefect has


@pytest.fixture(scope="module")
def database(night: Night) -> Iterator[sqlite3.Connection]:
    """The database as the server left it: its file, and the last of its write-ahead logs."""
    (path,) = night.kept.glob("*/maskmill-prefect-*/prefect.db")
    logs = sorted(night.kept.glob("*/maskmill-prefect-*/prefect.db-wal"), key=lambda log: log.stat().st_mtime_ns)
    shutil.copy(path, night.top / "prefect.db")
    shutil.copy(logs[-1], night.top / "prefect.db-wal")
    with closing(sqlite3.connect(night.top / "prefect.db")) as connection:
        yield connection


def test_the_flow_run_has_a_run_id_for_parameter_and_nothing_else(night: Night, database: sqlite3.Connection) -> None:
    run = night.ended.json["run"]
    (row,) = database.execute("select name, parameters, state_type, tags, deployment_id from flow_run").fetchall()
    assert row[0] == f"segment-{run}"
    assert json.loads(row[1]) == {"run_id": run}
    assert row[2] == "FAILED"  # one INPUT did
    assert (json.loads(row[3]), row[4]) == ([], None)


def test_the_tasks_are_stages_and_never_blocks(night: Night, database: sqlite3.Connection) -> None:
    (key,) = [e["key"] for e in night.ended.json["studies"] if e["state"] == "published"]
    rows = database.execute("select name, state_type from task_run").fetchall()
    assert sorted(rows) == sorted([(n, "COMPLETED") for n in ("plan", "segment", f"publish-{key}", "report")])


def test_progress_and_summary_are_artifacts(night: Night, database: sqlite3.Connection) -> None:
    artifacts = {k: (t, d) for k, t, d in database.execute("select key, type, data from artifact") if k}
    kind, data = artifacts["blocks"]
    assert (kind, int(data)) == ("progress", 100)
    kind, data = artifacts["summary"]
    assert kind == "markdown"
    assert "**1 published**" in data
    assert "| input |" in data


# ----------------------------------------------------------------------------------------------------------- privacy


def tell(files: Iterator[Path], allowed: re.Pattern[str] | None = None) -> list[str]:
    """The files whose bytes or whose name hold a secret, in any of the ways in which text may be written."""
    found = []
    for path in files:
        if path.is_file() and not (allowed and allowed.search(str(path))):
            data = path.read_bytes()
            for secret in SECRETS:
                if any(secret.encode(code) in data for code in ("utf-8", "utf-16-le")) or secret in path.name:
                    found.append(f"{path}: {secret}")
    return found


def test_the_name_is_in_run_json_and_nowhere_else_in_out(night: Night) -> None:
    run = night.ended.json["run"]
    assert tell(night.out.rglob("*"), re.compile(rf"/runs/{run}/run\.json$")) == []
    assert FOLDER in (night.out / "runs" / run / "run.json").read_text()
    assert HEADER not in (night.out / "runs" / run / "run.json").read_text()


def test_no_array_or_mask_holds_header_text_when_it_is_unpacked(night: Night) -> None:
    assert not [secret for secret in SECRETS if secret.encode() in mask_bytes(night.out, "t1")]


def test_the_name_is_not_in_prefects_database_nor_in_its_log(night: Night) -> None:
    files = list(night.kept.glob("*/maskmill-prefect-*/**/*"))
    assert {"prefect.db", "server.log"} <= {path.name for path in files}
    assert tell(iter(files)) == []


def test_the_name_is_not_in_rays_logs(night: Night) -> None:
    files = list(night.kept.glob("*/mm-*/**/*"))
    assert len([path for path in files if path.suffix in (".log", ".out", ".err")]) > 3
    assert tell(iter(files)) == []


def test_the_name_is_not_in_the_users_home(night: Night) -> None:
    files = [path for path in night.home.rglob("*") if path.is_file()]
    assert files
    assert tell(iter(files)) == []


def test_the_search_would_find_it(night: Night) -> None:
    (night.kept / "probe").write_bytes(b"\0\0" + FOLDER.encode("utf-16-le"))
    assert tell(iter([night.kept / "probe", night.top / FOLDER / "t1.nii"]))[0].startswith(str(night.kept / "probe"))


def test_messages_about_bad_studies_do_not_name_them(tmp_path: Path) -> None:
    """Whatever is wrong with a file: its log, its ledger and its report hold its key and its own file name."""
    folder = tmp_path / FOLDER
    data = brain()
    data[0, 0, 0] = np.nan
    texts = {"descrip": HEADER.encode(), "intent_name": HEADER[:15].encode()}
    save_nifti(folder / "nan.nii.gz", data, **texts)
    save_nifti(folder / "nowhere.nii.gz", brain(), qform=0, sform=0, **texts)
    save_nifti(folder / "four.nii.gz", np.stack([brain()] * 2, axis=-1), **texts)
    save_nifti(folder / "good.nii", brain(), **texts)
    (folder / "cut.nii").write_bytes((folder / "good.nii").read_bytes()[:2000])
    (folder / "gone.nii").symlink_to(folder / "not-here")
    (folder / "gz.nii.gz").write_bytes(b"\x1f\x8b" + HEADER.encode() * 20)
    (folder / "x.ome.zarr").mkdir()
    (folder / "x.ome.zarr/zarr.json").write_text(
        json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"ome": {"multiscales": [HEADER]}}})
    )
    summary = pipeline.segment(folder, "kmeans", tmp_path / "out", threads=1)
    assert (summary.published, summary.failed) == (1, 7)
    allowed = re.compile(rf"/runs/{summary.run}/run\.json$")
    assert tell((tmp_path / "out").rglob("*"), allowed) == []
    assert not [e["message"] for e in summary.studies if any(s in (e["message"] or "") for s in SECRETS)]
