"""When a worker has less memory than was projected: smaller blocks, half the batch, and, if asked for, the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scans import label_array, markers, mask_bytes, random_model, scan

import pipeline
import pipeline.blocks
import segmodels.runtime
from pipeline.stitch import RollingAccumulator
from pipeline.summary import Summary
from segmodels.predictor import NetworkPredictor

SHAPE = (150, 150, 80)  # x, y, z: two by two by two label shards
SHARDS = 8
SMALL = (20, 20, 12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model"), tile=(32, 64, 64), overlap=0.25)


@pytest.fixture(autouse=True)
def four_at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Runtimes have a batch of 4, as on a GPU; the call sets another."""
    resolve = segmodels.runtime.resolve_runtime
    default = 4

    def resolved(*args: Any, batch: int | None = None, **options: Any) -> segmodels.runtime.Runtime:
        return resolve(*args, **options, batch=batch or default)

    def choose(batch: int) -> None:
        nonlocal default
        default = batch

    monkeypatch.setattr(segmodels.runtime, "resolve_runtime", resolved)
    return choose


def run(top: Path, model: Path, out: str = "out", **settings: Any) -> Summary:
    return pipeline.segment(top / "in", model, top / out, threads=1, **settings)


def plan_of(out: Path) -> dict[str, Any]:
    (path,) = out.glob("ledger/*/plan.json")
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def largest_block(monkeypatch: pytest.MonkeyPatch, voxels: int) -> list[int]:
    """Sums of more than `voxels` in y,x find no memory; gives the extents that were asked for."""
    asked: list[int] = []

    class Limited(RollingAccumulator):
        def __init__(self, box: Any, *args: Any, **options: Any) -> None:
            asked.append(box.shape[1] * box.shape[2])
            if asked[-1] > voxels:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
            super().__init__(box, *args, **options)

    monkeypatch.setattr(pipeline.blocks, "RollingAccumulator", Limited)
    return asked


def largest_batch(monkeypatch: pytest.MonkeyPatch, tiles: int) -> list[int]:
    """More than `tiles` at once find no memory, but for the measurement of the baseline (of zeros)."""
    asked: list[int] = []
    predict = NetworkPredictor.predict

    def limited(self: NetworkPredictor, given: torch.Tensor) -> torch.Tensor:
        if given.any():
            asked.append(self.runtime.batch)
            if self.runtime.batch > tiles:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return predict(self, given)

    monkeypatch.setattr(NetworkPredictor, "predict", limited)
    return asked


def test_smaller_blocks_under_the_same_runtime(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan(tmp_path / "in/a.nii.gz", 1, SHAPE)
    assert run(tmp_path, model, "whole").exit_code == 0
    asked = largest_block(monkeypatch, 128 * 128)
    ended = run(tmp_path, model)
    assert ended.exit_code == 0, ended.studies
    assert asked[0] == 150 * 150
    assert max(asked[1:]) == 128 * 128
    assert plan_of(tmp_path / "out")["runtime"] == plan_of(tmp_path / "whole")["runtime"]
    assert (
        label_array(tmp_path / "out", "a", model="tiny-resunet") == label_array(tmp_path / "whole", "a", "tiny-resunet")
    ).all()
    assert mask_bytes(tmp_path / "out", "a") == mask_bytes(tmp_path / "whole", "a")
    assert len(markers(tmp_path / "out")) == SHARDS


def test_half_the_batch_for_the_whole_study(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, four_at_once: Callable[[int], None]
) -> None:
    """Recorded, and the labels are those of a run with that batch; other studies keep theirs."""
    for seed, study in enumerate("ab"):
        scan(tmp_path / f"in/{study}.nii.gz", seed, SHAPE)
    four_at_once(1)
    assert run(tmp_path, model, "ones").exit_code == 0
    four_at_once(4)
    asked = largest_batch(monkeypatch, 1)
    ended = run(tmp_path, model)
    assert ended.exit_code == 0, ended.studies
    assert set(asked) == {4, 2, 1}
    for path in (tmp_path / "out").glob("ledger/*/plan.json"):
        plan = json.loads(path.read_text())
        assert plan["runtime"]["batch"] == 1
        folded = json.loads((path.parent / "done/all.json").read_text())
        assert {marker["runtime"] for marker in folded.values()} == {plan["runtime_hash"]}
        assert len(folded) == SHARDS
    for study in "ab":
        ones = label_array(tmp_path / "ones", study, "tiny-resunet")
        assert (label_array(tmp_path / "out", study, "tiny-resunet") == ones).all()
    log = next((tmp_path / "out/runs").glob("*/log.jsonl")).read_text()
    assert log.count("again in the smallest blocks") == 2
    assert log.count("under another runtime") == 4


def test_a_stopped_study_goes_on_under_the_frugal_runtime(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan(tmp_path / "in/a.nii.gz", 1, SHAPE)
    with monkeypatch.context() as patched:
        asked = largest_batch(patched, 2)
        write, written = pipeline.blocks.write_shard, []

        def full(*args: Any) -> None:
            if len(written) == 3:
                raise OSError(28, "No space left on device")
            write(*args)
            written.append(args)

        patched.setattr(pipeline.blocks, "write_shard", full)
        assert run(tmp_path, model).exit_code == 1
        assert set(asked) == {4, 2}
    done = markers(tmp_path / "out")
    assert len(done) == 3
    asked = largest_batch(monkeypatch, 2)
    assert run(tmp_path, model).exit_code == 0
    assert set(asked) == {2}, "what was begun with two tiles at once goes on so"
    assert {name: markers(tmp_path / "out")[name] for name in done} == done


def test_what_fits_in_no_way_fails_with_the_cause(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, study in enumerate("ab"):
        scan(tmp_path / f"in/{study}.nii.gz", seed, SHAPE)
    asked = largest_batch(monkeypatch, 0)
    ended = run(tmp_path, model)
    assert [(e["state"], e["cause"]) for e in ended.studies] == [("failed", "memory")] * 2
    assert "out of memory" in ended.studies[0]["message"]
    assert set(asked) == {4, 2, 1}
    monkeypatch.undo()
    assert run(tmp_path, model).exit_code == 0


def test_the_cpu_makes_what_a_gpu_has_no_memory_for_if_asked_to(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, four_at_once: Callable[[int], None]
) -> None:
    """A GPU for a while: torch takes "cpu:0" for the CPU, and we for another device."""
    scan(tmp_path / "in/a.nii.gz", 1, SMALL)
    four_at_once(1)
    assert run(tmp_path, model, "alone").exit_code == 0
    resolve, predict = segmodels.runtime.resolve_runtime, NetworkPredictor.predict

    def limited(self: NetworkPredictor, given: torch.Tensor) -> torch.Tensor:
        if given.any() and self.runtime.device != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return predict(self, given)

    monkeypatch.setattr(segmodels.runtime, "resolve_runtime", lambda *a, **o: replace(resolve(*a, **o), device="cpu:0"))
    monkeypatch.setattr(NetworkPredictor, "predict", limited)
    assert [e["cause"] for e in run(tmp_path, model).studies] == ["memory"]
    ended = run(tmp_path, model, fallback="cpu")
    assert ended.exit_code == 0, ended.studies
    assert plan_of(tmp_path / "out")["runtime"] == plan_of(tmp_path / "alone")["runtime"]
    assert mask_bytes(tmp_path / "out", "a") == mask_bytes(tmp_path / "alone", "a")


def test_the_cpu_is_taken_only_if_asked_for() -> None:
    gpu = segmodels.runtime.Runtime("cuda", "torch", "fp16", 2, 4, (("gpu", "X"), ("torch", "2")))
    steps = []
    runtime: Any = gpu
    while runtime is not None:
        steps.append((runtime.device, runtime.batch, runtime.precision))
        runtime = segmodels.runtime.frugal(runtime, cpu=True)
    assert steps == [("cuda", 4, "fp16"), ("cuda", 2, "fp16"), ("cuda", 1, "fp16"), ("cpu", 1, "fp32")]
    last = segmodels.runtime.frugal(segmodels.runtime.Runtime("cuda", "torch", "fp32", 2, 1, ()), cpu=False)
    assert last is None
    assert segmodels.runtime.frugal(segmodels.runtime.Runtime("cpu", "torch", "fp32", 2, 1, ()), cpu=True) is None
    made = segmodels.runtime.frugal(segmodels.runtime.Runtime("cuda", "torch", "fp32", 2, 1, ()), cpu=True)
    assert made is not None
    assert "cpu" in dict(made.versions)
    assert "gpu" not in dict(made.versions)
