"""The command line with scans, results and ledger in an object store: killed, interrupted, run again."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from object_server import BadProxy, ObjectServer
from scans import kill, label_array, maskmill, processes_of, random_model, scan, start, until, wait

import pipeline
from pipeline import objects, ome, store

pytestmark = pytest.mark.timeout(600)
STUDIES = ("a", "b")
SHARDS = 5  # of each study


@dataclass(frozen=True)
class Work:
    """A command on an object store, and what tells its processes from others."""

    arguments: tuple[object, ...]
    out: str
    environment: dict[str, str]

    def start(self, *flags: object) -> subprocess.Popen[str]:
        return start("segment", *self.arguments, "-o", self.out, "--json", *flags, **self.environment)

    def markers(self) -> dict[str, object]:
        """When each marker of a shard was written."""
        found = {}
        for name in objects.keys(store.join(self.out, "ledger")):
            if "/done/" in name and (held := store.read_json(store.join(self.out, "ledger", name))):
                folder, _, file = name.rpartition("/")
                held = held if file == "all.json" else {file: held}
                found |= {f"{folder}/{n}": marker["at"] for n, marker in held.items()}
        return found

    def processes(self) -> list[str]:
        return processes_of(self.environment["MASKMILL_TEST_TAG"], self.environment["TMPDIR"])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Scans that take some seconds each, a model, and an undisturbed run on a disk."""
    top = tmp_path_factory.mktemp("objects")
    for seed, study in enumerate(STUDIES, 1):
        scan(top / f"in/{study}.nii.gz", seed, (24, 24, 260))
    model = random_model(top / "model")
    assert pipeline.segment(top / "in", model, top / "undisturbed", threads=1).exit_code == 0
    return top / "in", model, top / "undisturbed"


@pytest.fixture
def work(prepared: tuple[Path, Path, Path], s3: str, s3_server: ObjectServer) -> Iterator[Work]:
    scans, model, _ = prepared
    for path in scans.iterdir():
        store.write(store.join(s3, "in", path.name), path.read_bytes())
    temporary = tempfile.mkdtemp(prefix="mmt-", dir="/tmp")  # Ray's sockets need a short path
    environment = s3_server.environment | {"TMPDIR": temporary, "MASKMILL_TEST_TAG": uuid.uuid4().hex}
    yield Work((store.join(s3, "in"), "-m", model, "--threads", 1), store.join(s3, "out"), environment)
    shutil.rmtree(temporary, ignore_errors=True)


def check_results(work: Work, undisturbed: Path) -> None:
    for study in STUDIES:
        labels = store.join(work.out, "images", f"{study}.ome.zarr", "labels", "tiny-resunet", "0")
        np.testing.assert_array_equal(ome.open_array(labels)[...], label_array(undisturbed, study, "tiny-resunet"))
    assert (
        store.read(store.join(work.out, "metrics", "structures.csv"))
        == (undisturbed / "metrics/structures.csv").read_bytes()
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_is_stopped_goes_on(
    number: signal.Signals, work: Work, prepared: tuple[Path, Path, Path]
) -> None:
    driver = work.start("--workers", 2)
    until(lambda: len(work.markers()) >= 2, pause=0.05)
    if number == signal.SIGKILL:
        kill(driver)
        until(lambda: not work.processes(), 30, 0.1)
    else:
        driver.send_signal(number)
        ended = wait(driver)
        assert (ended.code, ended.json["interrupted"] > 0) == (130, True)
    done = work.markers()
    assert 2 <= len(done) < SHARDS * len(STUDIES)

    ended = wait(work.start("--workers", 2))
    assert (ended.code, ended.json["published"]) == (0, 2), ended.err
    now = work.markers()
    assert {name: now[name] for name in done} == done, "marked shards were done again"
    assert ended.json["blocks_computed"] >= 1
    check_results(work, prepared[2])
    said = maskmill("status", work.out, **work.environment)
    assert "2 published, 0 failed, 0 interrupted" in said.out


@pytest.mark.slow
def test_workers_on_a_store_that_fails_every_twentieth_request(
    work: Work, prepared: tuple[Path, Path, Path], s3_server: ObjectServer
) -> None:
    with BadProxy(s3_server, "503", 20) as proxy:
        work.environment["AWS_ENDPOINT_URL"] = proxy.server.environment["AWS_ENDPOINT_URL"]
        ended = wait(work.start("--workers", 2))
        assert (ended.code, ended.json["published"]) == (0, 2), ended.err
        assert proxy.faults >= 10
    check_results(work, prepared[2])


def test_no_credentials_are_one_line_and_two(prepared: tuple[Path, Path, Path], tmp_path: Path) -> None:
    nothing = str(tmp_path / "none")
    environment = {
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": nothing,
        "AWS_CONFIG_FILE": nothing,
    }
    ended = maskmill("segment", "s3://bucket/in", "-m", "kmeans", "-o", tmp_path / "out", **environment)
    assert ended.code == 2
    assert "AWS_ACCESS_KEY_ID" in ended.err
    assert "Traceback" not in ended.err
    assert ended.err.count("\n") == 1
