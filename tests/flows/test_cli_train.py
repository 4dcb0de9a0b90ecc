"""`maskmill train` as users run it: a model folder comes out, also after kills; what is wrong is named."""

from __future__ import annotations

import csv
import json
import signal
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from balls import LABELS, ball_folder, ball_job, save_ball, write_job
from safetensors.numpy import load_file
from scans import Ended, kill, maskmill, start, until, wait

import pipeline
import segmodels

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ball_folder(tmp_path_factory.mktemp("balls"), 8)


@pytest.fixture
def temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mmt-") as folder:  # short: Ray's sockets lie in it
        yield Path(folder)


def train(job: Path, out: Path, *flags: object) -> Ended:
    return maskmill("train", job, "-o", out, "--json", *flags)


@pytest.mark.parametrize("engine", ["serial", "ray"])
def test_a_model_folder_comes_out(balls: Path, tmp_path: Path, engine: str) -> None:
    job = write_job(tmp_path / "job.yaml", ball_job(balls, engine=engine))
    ended = train(job, tmp_path / "model")
    assert ended.code == 0, ended.err
    said = json.loads(ended.out.splitlines()[-1])
    assert (said["name"], said["steps"], said["training"], said["validation"]) == ("balls", [100], 6, 2)
    model = segmodels.load(tmp_path / "model")
    assert {k: v.name for k, v in model.card.labels.items()} == {str(k): v for k, v in LABELS.items()}
    quality = model.card.quality
    assert isinstance(quality, dict)
    assert quality == said["quality"]
    assert set(quality["structures"]) == set(LABELS.values())
    for facts in quality["structures"].values():
        low, high = facts["interval_95"]
        assert facts["n"] == 2
        assert 0.7 < low <= facts["mean"] <= high <= 1
    # The card's figures are what anybody finds who segments the same cases.
    names = json.loads((tmp_path / "model/training/split.json").read_text())["validation"]
    inputs = [balls / f"images/{name}.nii.gz" for name in names]
    summary = pipeline.segment(inputs, tmp_path / "model", tmp_path / "out", reference=str(balls / "masks"), threads=1)
    assert summary.mean_dice == pytest.approx(quality["mean_dice"])
    rows = list(csv.DictReader((tmp_path / "model/training/curve.csv").read_text().splitlines()))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert rows[-1]["dice upper half"]
    assert ET.parse(tmp_path / "model/training/curve.svg").getroot().tag.endswith("svg")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["card.json", "training", "weights.safetensors"]
    again = train(job, tmp_path / "model")
    assert again.code == 0
    assert "nothing to do" in again.err
    other = train(write_job(tmp_path / "job.yaml", ball_job(balls, version="2")), tmp_path / "model")
    assert other.code == 2
    assert "another job" in other.err


@pytest.mark.slow
def test_killed_and_interrupted_trainings_go_on_and_end_with_the_same_weights(
    balls: Path, tmp_path: Path, temporary: Path
) -> None:
    settings = ball_job(balls)
    settings["recipe"] |= {"checkpoint_minutes": 1e-4, "steps": 150}
    job = write_job(tmp_path / "job.yaml", settings)
    assert train(job, tmp_path / "whole", "--engine", "serial").code == 0
    out = tmp_path / "model"
    checkpoint = out / ".training/member-0/checkpoint.pt"

    def begin(engine: str):  # type: ignore[no-untyped-def]
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        driver = start("train", job, "-o", out, "--json", "--engine", engine, TMPDIR=str(temporary))
        until(lambda: checkpoint.exists() and checkpoint.stat().st_mtime_ns > before)
        return driver

    kill(begin("ray"))
    for engine in ("serial", "ray"):
        driver = begin(engine)
        driver.send_signal(signal.SIGINT)
        ended = wait(driver)
        assert ended.code == 130, ended.err
        assert "run it again to go on" in ended.err
        assert "Traceback" not in ended.err
    assert not (out / "card.json").exists()
    ended = train(job, out)
    assert ended.code == 0, ended.err
    whole, killed = load_file(tmp_path / "whole/weights.safetensors"), load_file(out / "weights.safetensors")
    assert whole.keys() == killed.keys()
    assert all(np.array_equal(whole[name], killed[name]) for name in whole)


def test_bad_cases_are_set_aside_and_named(tmp_path: Path) -> None:
    folder = ball_folder(tmp_path, 4)
    save_ball(tmp_path / "more", "extra", 9)
    (tmp_path / "more/images/extra.nii.gz").rename(folder / "images/extra.nii.gz")
    (folder / "masks/ball-1.nii.gz").write_bytes(b"not a mask")
    settings = ball_job(folder, engine="serial")
    settings["recipe"]["steps"] = 3
    ended = train(write_job(tmp_path / "job.yaml", settings), tmp_path / "model")
    assert ended.code == 1
    assert (tmp_path / "model/card.json").exists()
    said = {Path(e["source"]).name: e["cause"] for e in json.loads(ended.out)["set_aside"]}
    assert said == {"ball-1.nii.gz": "input", "extra.nii.gz": "input"}
    assert "extra.nii.gz: input: this image has no mask of the same name" in ended.err
    again = train(tmp_path / "job.yaml", tmp_path / "model")
    assert again.code == 1
    assert {e["source"]: e["cause"] for e in json.loads(again.out)["set_aside"]} == dict.fromkeys(
        ("ball-1", "extra"), "input"
    )
    assert "set aside: extra: input: this image has no mask of the same name" in again.err


def test_a_loss_that_is_no_number(balls: Path, tmp_path: Path) -> None:
    settings = ball_job(balls, engine="serial")
    settings["recipe"] |= {"learning_rate": 1e30, "optimizer": "sgd", "clip": None, "warmup": 0.0}
    ended = train(write_job(tmp_path / "job.yaml", settings), tmp_path / "model")
    assert ended.code == 1
    assert "at step" in ended.err
    assert "ball-" in ended.err
    assert "Traceback" not in ended.err
    said = json.loads(ended.out)
    assert (said["model"], said["state"], said["cause"]) == (None, "failed", "model")
    assert said["message"] in ended.err
    assert not (tmp_path / "model/card.json").exists()
    # Nothing was learned yet, so the same folder takes the mended job.
    settings["recipe"] |= {"learning_rate": 1e-3, "steps": 2}
    mended = train(write_job(tmp_path / "job.yaml", settings), tmp_path / "model")
    assert mended.code == 0, mended.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "not proper YAML"),
        ("name: x", "data: Field required"),
        ("- 1", "must hold settings"),
    ],
)
def test_job_files_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    ended = train(tmp_path / "job.yaml", tmp_path / "model")
    assert ended.code == 2
    assert message in ended.err
    assert not (tmp_path / "model").exists()


def test_a_folder_that_holds_something_else(balls: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/thesis.txt").write_text("mine")
    ended = train(write_job(tmp_path / "job.yaml", ball_job(balls)), tmp_path / "model")
    assert ended.code == 2
    assert "thesis.txt" in ended.err
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["thesis.txt"]
