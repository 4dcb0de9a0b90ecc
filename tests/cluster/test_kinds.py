"""A mixed fleet: each study is made by one kind of worker, and its labels are that kind's, bit by bit.

The kinds are real: torch chooses other kernels where ATEN_CPU_CAPABILITY says so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kind_workers import GATES, WORKER
from nodes import Nodes, wait_until
from scans import save_nifti

import pipeline
import segmodels
from cluster import pool
from cluster.engine import RayEngine
from pipeline import ome
from pipeline.summary import Summary

pytestmark = pytest.mark.timeout(900)

HERE = "AVX2" if torch.backends.cpu.get_cpu_capability() == "AVX2" else "AVX512"
OTHER = "DEFAULT"
ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {"threads": 1, "memory": "2GiB", "tile": "16,32,32", "overlap": 0.25}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    network = segmodels.create("resunet", dims=3, in_channels=1, classes=3, widths=[4, 8])
    card = {
        "name": "tiny", "version": "1", "axes": "zyx", "channels": ["MR"], "normalize": [{"kind": "zscore"}],
        "tile": [16, 32, 32], "activation": "softmax", "labels": {"1": {"name": "a"}, "2": {"name": "b"}},
        "network": {"name": "resunet", "config": {"dims": 3, "in_channels": 1, "classes": 3, "widths": [4, 8]}},
    }  # fmt: skip
    segmodels.save(network, card, folder)
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four scans of a few label shards each."""
    folder = tmp_path_factory.mktemp("scans")
    for seed in range(4):
        image = np.random.default_rng(seed).normal(0, 1, (140, 40, 40)).astype(np.float32)
        save_nifti(folder / f"s{seed}.nii.gz", image, np.diag([1.0, 1.0, 1.0, 1.0]))
    return folder


@pytest.fixture(scope="module")
def undisturbed(model: Path, scans: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each kind makes of the scans alone, in one process."""
    outs = {}
    for kind in (HERE, OTHER):
        outs[kind] = tmp_path_factory.mktemp("alone") / kind
        code = "import sys, pipeline; pipeline.segment(*sys.argv[1:4], **eval(sys.argv[4]))"
        subprocess.run(
            [sys.executable, "-c", code, str(scans), str(model), str(outs[kind]), repr(SETTINGS)],
            env=os.environ | {"ATEN_CPU_CAPABILITY": kind.lower(), "PYTHONPATH": str(ROOT)},
            check=True,
        )
    return outs


class Fleet:
    """Nodes of two kinds, whose workers wait at gates, and runs on them."""

    def __init__(self, nodes: Nodes, gates: Path, scans: Path, model: Path, out: Path) -> None:
        self.nodes, self.gates, self.scans, self.model, self.out = nodes, gates, scans, model, out

    def add(self, kind: str) -> Any:
        return self.nodes.add(ATEN_CPU_CAPABILITY=kind.lower(), **{GATES: str(self.gates)})

    def shut(self, kind: str) -> None:
        (self.gates / f"shut-{kind}").touch()

    def open(self, kind: str) -> None:
        (self.gates / f"shut-{kind}").unlink(missing_ok=True)

    def begun(self, kind: str) -> bool:
        return (self.gates / f"begun-{kind}").exists()

    def segment(self, workers: int, started: Callable[[RayEngine], None] = lambda engine: None) -> Summary:
        def engine(spec: Any) -> RayEngine:
            made = RayEngine(spec, worker=WORKER, workers=workers, threads=1, address=self.nodes.address)
            started(made)
            return made

        return pipeline.segment(str(self.scans), str(self.model), str(self.out), engine=engine, **SETTINGS)

    def kinds(self) -> dict[str, str]:
        """The kind that each study was made by, after a look at all its markers."""
        found = {}
        for path in self.out.glob("ledger/*/plan.json"):
            plan = json.loads(path.read_text())
            found[plan["study"]] = plan["runtime"]["versions"]["cpu"]
            runtimes = [runtime for (key, _), (runtime, _) in self.markers().items() if key == path.parent.name]
            assert runtimes == [plan["runtime_hash"]] * plan["shards"]
        return found

    def markers(self) -> dict[tuple[str, str], tuple[str, int]]:
        """(runtime, time) of the markers of published studies, by key and shard."""
        return {
            (done.parents[1].name, shard): (marker["runtime"], marker["at"])
            for done in self.out.glob("ledger/*/done/all.json")
            for shard, marker in json.loads(done.read_text()).items()
        }


@pytest.fixture
def fleet(nodes: Nodes, tmp_path: Path, scans: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    (tmp_path / "gates").mkdir()
    monkeypatch.setattr(pool, "GATHER_SECONDS", 300.0)  # on a busy machine the second may be late; both come in the end
    return Fleet(nodes, tmp_path / "gates", scans, model, tmp_path / "out")


def labels(out: Path, study: str) -> np.ndarray:
    return np.asarray(ome.open_array(str(out / f"images/{study}.ome.zarr/labels/tiny/0"))[...])


def assert_as_undisturbed(fleet: Fleet, undisturbed: dict[str, Path]) -> None:
    for study, kind in fleet.kinds().items():
        np.testing.assert_array_equal(labels(fleet.out, study), labels(undisturbed[kind], study))


def test_each_study_is_made_by_one_kind_and_is_what_that_kind_makes(fleet: Fleet, undisturbed: dict[str, Path]) -> None:
    for kind in (HERE, OTHER):
        fleet.add(kind)
        fleet.shut(kind)

    def opened() -> None:  # only when both have something to do: else one could make all of it
        wait_until(lambda: fleet.begun(HERE) and fleet.begun(OTHER), 400)
        fleet.open(HERE)
        fleet.open(OTHER)

    opener = threading.Thread(target=opened)
    opener.start()
    summary = fleet.segment(workers=2)
    opener.join()
    assert (summary.published, summary.failed) == (4, 0)
    assert set(fleet.kinds()) == {f"s{i}" for i in range(4)}
    assert set(fleet.kinds().values()) == {HERE, OTHER}
    assert_as_undisturbed(fleet, undisturbed)


def test_a_study_goes_on_under_the_kind_that_began_it(fleet: Fleet, undisturbed: dict[str, Path]) -> None:
    """Also where that kind has more to do than the other."""
    shutil.copytree(undisturbed[OTHER], fleet.out, symlinks=True)
    # Nothing is published, and of each study one shard is missing.
    for done in fleet.out.glob("ledger/*/done/all.json"):
        markers = json.loads(done.read_text())
        markers.pop(min(markers))
        done.write_text(json.dumps(markers))
        shutil.rmtree(done.parents[1] / "published")
    before = fleet.markers()
    assert len(before) >= 4
    for kind in (HERE, OTHER):
        fleet.add(kind)
    summary = fleet.segment(workers=2)
    assert (summary.published, summary.failed) == (4, 0)
    assert set(fleet.kinds().values()) == {OTHER}
    assert before.items() < fleet.markers().items()  # no shard was made twice
    assert_as_undisturbed(fleet, undisturbed)


def test_a_study_whose_kind_is_gone_begins_again_under_another(fleet: Fleet, undisturbed: dict[str, Path]) -> None:
    fleet.add(HERE)
    goes = fleet.add(OTHER)
    fleet.shut(HERE)
    fleet.shut(OTHER)
    engines: list[RayEngine] = []

    def lose() -> None:
        wait_until(lambda: fleet.begun(HERE) and fleet.begun(OTHER), 400)
        engines[0]._pool.patience = 4.0
        fleet.nodes.kill(goes)
        fleet.open(HERE)

    loser = threading.Thread(target=lose)
    loser.start()
    summary = fleet.segment(2, engines.append)
    loser.join()
    assert (summary.published, summary.failed) == (4, 0)
    assert set(fleet.kinds().values()) == {HERE}
    assert_as_undisturbed(fleet, undisturbed)
