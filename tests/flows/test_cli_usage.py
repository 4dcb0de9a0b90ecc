"""Exit code 2: nothing could start, one line says why, and nothing was written."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scans import Ended, fingerprint, random_model, scan

import pipeline

Command = Callable[..., Ended]


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("usage")
    scan(top / "in/a.nii.gz", 1)
    (top / "empty").mkdir()
    (top / "file").write_text("a file in the way")
    return top


def refused(ended: Ended, says: str) -> None:
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("maskmill: ")
    assert ended.err.count("\n") == 1
    assert says in ended.err


# ------------------------------------------------------------------------------------------------------------ flags

FLAGS = [
    (["--formats", "nifti,stl"], "'stl'; choose from nifti"),
    (["--engine", "spark"], "engine: "),
    (["--tile", "a,b,c"], "whole numbers such as 96,96,96"),
    (["--tile", "0,8,8"], "at least one voxel"),
    (["--tile", "8,8"], "does not follow the card's axes zyx"),
    (["--overlap", "1"], "overlap: "),
    (["--memory", "plenty"], "a size such as 4GiB"),
    (["--memory", "0"], "memory: "),
    (["--stitch", "gausian"], "'gausian'; choose from gaussian, constant"),
    (["--stitch", "exact", "--overlap", "0.5"], "every voxel is answered once"),
    (["--precision", "int8"], "precision: "),
    (["--mirroring"], "its card lists none (mirror_axes)"),
    (["--images", "move"], "images: "),
    (["--limit", "0"], "limit: "),
    (["--workers", "0"], "workers: "),
    (["--classes", "1"], "classes: "),
    (["--address", "somewhere:6379", "--engine", "serial"], "does not go with --engine serial"),
    (["--reference", "no-such-folder"], "no-such-folder does not exist"),
    (["-j", "no-such-job.yaml"], "cannot read the job file no-such-job.yaml"),
]


@pytest.mark.parametrize(("flags", "says"), FLAGS, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_flag_that_cannot_be(flags: list[str], says: str, top: Path, command: Command) -> None:
    refused(command("segment", top / "in", "-m", "kmeans", "-o", top / "out", *flags), says)
    assert not (top / "out/images").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["segment", "--nope"], "No such option"),
        (["segment", "in", "-m", "kmeans", "-o", "out", "--threads", "many"], "--threads"),
        (["segment", "in", "-m"], "-m"),
        (["segmnet"], "segmnet"),
        ([], "Commands:"),
        (["models"], "Commands:"),
    ],
)
def test_what_is_no_command_line(arguments: list[str], says: str, command: Command) -> None:
    ended = command(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert says in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["segment", "in", "-m", "kmeans", "-o", ""],
        ["segment", "", "-m", "kmeans", "-o", "out"],
        ["evaluate", "a", "b", "-o", ""],
        ["evaluate", "", "b", "-o", "out"],
        ["phantom", "-o", "", "--shape", "8,8,8"],
        ["status", ""],
    ],
)
def test_an_empty_place_is_not_the_root_of_everything(arguments: list[str], command: Command) -> None:
    refused(command(*arguments), "is empty: give a file, a folder or an address")


TRAIN = """
name: m
data: {images: i, masks: m}
labels: {1: a}
channels: [c]
normalize: [{kind: zscore}]
tile: [8, 8, 8]
network: {name: resunet, config: {dims: 3, in_channels: 1, classes: 2, widths: [2, 4]}}
recipe: {minutes: 1}
"""


@pytest.mark.parametrize(("out", "says"), [("s3://bucket/model", "has to be on a local disk"), ("", "is empty")])
def test_a_model_folder_is_on_a_disk(out: str, says: str, top: Path, command: Command) -> None:
    (top / "train.yaml").write_text(TRAIN)
    refused(command("train", top / "train.yaml", "-o", out), says)


@pytest.mark.parametrize("missing", ["INPUT", "-m MODEL", "-o OUT"])
def test_what_is_missing_is_named(missing: str, top: Path, command: Command) -> None:
    given = {"INPUT": [top / "in"], "-m MODEL": ["-m", "kmeans"], "-o OUT": ["-o", top / "out"]}
    del given[missing]
    refused(command("segment", *(word for words in given.values() for word in words)), f"give {missing}")


# ------------------------------------------------------------------------------------------------------------ inputs


@pytest.mark.parametrize("name", ["nothing.nii.gz", "empty", "file", "ftp://host/scans", "line\nbreak.nii"])
def test_no_input_yields_a_study(name: str, top: Path, command: Command) -> None:
    given = name if "://" in name else top / name
    refused(command("segment", given, "-m", "kmeans", "-o", top / "out"), "no INPUT yields a study")
    assert not (top / "out").exists()


# ---------------------------------------------------------------------------------------------------------- job files


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: [", "not proper YAML at line 1"),
        ("- a list", "'name: value' lines"),
        ("1: 2", "'name: value' lines"),
        ("modle: kmeans", "unknown setting 'modle'; did you mean 'model'?"),
        ("tile: [a, b, c]", "tile"),
        ("tile: 5", "tile"),
        ("threads: [1]", "threads"),
        ("formats: [7]", "formats"),
        ("memory: -1", "memory"),
        ("memory: .inf", "memory"),
        ("volume: 1.5", "volume"),
        ('!!python/object/apply:os.system ["true"]', "not proper YAML"),
    ],
)
def test_a_job_file_that_cannot_be(text: str, says: str, top: Path, tmp_path: Path, command: Command) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(text)
    refused(command("segment", top / "in", "-m", "kmeans", "-o", top / "out", "-j", job), says)
    assert not (top / "out/images").exists()


# ------------------------------------------------------------------------------------------------------------- models


def _weights(folder: Path) -> Path:
    return folder / "weights.safetensors"


def _flip(folder: Path) -> None:
    data = bytearray(_weights(folder).read_bytes())
    data[-5] ^= 0xFF
    _weights(folder).write_bytes(data)


def _truncate(folder: Path) -> None:
    _weights(folder).write_bytes(_weights(folder).read_bytes()[:-1000])


def _pickle(folder: Path) -> None:
    _weights(folder).write_bytes(pickle.dumps({"weight": [1.0]}))


def _pt_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "model.pt").write_bytes(pickle.dumps({}))


def _edit(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        card = json.loads((folder / "card.json").read_text())
        for name, value in changes.items():
            if isinstance(value, dict):
                card[name] |= value
            else:
                card[name] = value
        (folder / "card.json").write_text(json.dumps(card))

    return edit


def _cut_card(folder: Path) -> None:
    (folder / "card.json").write_text("{")


def _other_weights(folder: Path) -> None:
    _edit(network={"config": {"dims": 3, "in_channels": 1, "classes": 3, "widths": [8, 8]}})(folder)


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (_flip, "weights.safetensors"),
    "truncated": (_truncate, "weights.safetensors"),
    "pickled": (_pickle, "pickle"),
    "pt_file": (_pt_file, "card.json"),
    "mismatching": (_other_weights, "does not fit the card's network"),
    "unknown_field": (_edit(colour="blue"), "colour"),
    "no_labels": (_edit(labels={"1": {"name": 7}}), "labels"),
    "no_json": (_cut_card, "card.json"),
    "no_weights": (lambda folder: _weights(folder).unlink(), "weights.safetensors"),
    "for_clips": (_edit(axes="tyx"), "tyx"),
    "spacing": (_edit(spacing_mm=[1.0, 0.0, 1.0]), "spacing_mm.1"),
    "orientation": (_edit(orientation="RAR"), "orientation"),
}


@pytest.fixture(scope="module")
def model(top: Path) -> Path:
    return random_model(top / "model")


@pytest.mark.parametrize("fault", MODELS)
def test_a_model_folder_with_a_fault(fault: str, model: Path, top: Path, tmp_path: Path, command: Command) -> None:
    break_it, says = MODELS[fault]
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    break_it(folder)
    refused(command("segment", top / "in", "-m", folder, "-o", top / "out"), says)
    refused(command("models", "check", folder), says)
    refused(command("plan", top / "in", "-m", folder, "--engine", "serial"), says)
    assert not (top / "out").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("kmean", "Did you mean 'kmeans'?"),
        ("unet3d", "an architecture, without weights of its own"),
        ("no/such/folder", "there is no such folder"),
        ("file", "is a file; a model is a folder"),
    ],
)
def test_a_model_that_is_none(
    name: str, says: str, top: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(top)
    refused(command("segment", top / "in", "-m", name, "-o", top / "out"), says)


def test_classes_are_for_kmeans(model: Path, top: Path, command: Command) -> None:
    refused(command("segment", top / "in", "-m", model, "--classes", 3, "-o", top / "out"), "--classes is for kmeans")


def test_a_tile_that_the_network_does_not_take(top: Path, tmp_path: Path, command: Command) -> None:
    import segmodels

    network = segmodels.create("unet", dims=3, in_channels=1, classes=2, widths=[2, 4], padding="valid")
    card = json.loads((random_model(tmp_path / "other") / "card.json").read_text())
    card |= {"tile": [20, 20, 20], "labels": {"1": {"name": "front"}}}
    del card["network"]
    segmodels.save(network, card, tmp_path / "valid")
    ended = command("segment", top / "in", "-m", tmp_path / "valid", "--tile", "21,20,20", "-o", top / "out")
    refused(ended, "the next one is [22, 20, 20]")


# ---------------------------------------------------------------------------------------------------------------- OUT


@pytest.mark.parametrize("out", ["file", "file/out", "/proc/out", "s3://bucket/out"])
def test_out_cannot_be_written(out: str, top: Path, command: Command) -> None:
    place = out if out.startswith(("/proc", "s3:")) else top / out
    refused(command("segment", top / "in", "-m", "kmeans", "-o", place), f"OUT {place} cannot be written")


@pytest.fixture(scope="module")
def published(top: Path, model: Path) -> Path:
    """An OUT with one result of the small network."""
    summary = pipeline.segment(top / "in", model, top / "published", threads=1)
    assert summary.exit_code == 0
    return top / "published"


def test_out_of_another_model(published: Path, top: Path, command: Command) -> None:
    before = fingerprint(published / "images")
    ended = command("segment", top / "in", "-m", "kmeans", "-o", published, "--overwrite")
    refused(ended, "holds results of the model tiny-resunet")
    assert "--images link" in ended.err
    assert fingerprint(published / "images") == before


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--overlap", "0.25"], "overlap 0.5 (now 0.25)"),
        (["--tile", "8,16,16"], "tile [16, 16, 16] (now [8, 16, 16])"),
        (["--stitch", "constant"], 'stitch "gaussian" (now "constant")'),
        (["--volume", "0"], "volume null (now 0)"),
        (["--overlap", "0.25", "--stitch", "constant"], 'overlap 0.5 (now 0.25), stitch "gaussian" (now "constant")'),
    ],
)
def test_out_of_other_settings(flags: list[str], says: str, published: Path, top: Path, command: Command) -> None:
    before = fingerprint(published / "masks")
    ended = command("segment", top / "in", "-m", top / "model", "-o", published, *flags)
    refused(ended, says)
    assert "--overwrite" in ended.err
    assert fingerprint(published / "masks") == before


def test_out_of_other_weights_under_the_same_name(published: Path, top: Path, command: Command) -> None:
    random_model(top / "retrained", seed=8)
    refused(command("segment", top / "in", "-m", top / "retrained", "-o", published), "another version of the model, ")


def test_status_of_a_folder_without_results(top: Path, command: Command) -> None:
    refused(command("status", top / "in"), "holds no results")
