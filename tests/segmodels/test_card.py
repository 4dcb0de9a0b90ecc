"""The card: what is accepted, and what each refusal says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from small_models import CARD, small_network

from segmodels import Card, ModelError
from segmodels.card import agree, parse, read
from segmodels.folder import answer_hash

# As it stands in the contract, but for the hash, which is elided there.
CONTRACT = """
{"format": "maskmill-card-1", "name": "hippocampus-resunet", "version": "1.0.0",
 "network": {"name": "resunet",
             "config": {"dims": 3, "in_channels": 1, "classes": 3, "widths": [16, 32, 64, 128]}},
 "weights": {"file": "weights.safetensors", "sha256": "%s"},
 "axes": "zyx", "channels": ["MR"], "orientation": null, "spacing_mm": null,
 "normalize": [{"kind": "zscore"}], "tile": [48, 64, 48], "overlap": 0.5, "activation": "softmax",
 "labels": {"1": {"name": "anterior hippocampus"}, "2": {"name": "posterior hippocampus"}}}
""" % ("ab" * 32)

NETWORK = {"name": "resunet", "config": {"dims": 3, "classes": 3, "widths": [4, 8, 16]}}


def card(**changes: Any) -> Card:
    return parse(CARD | {"network": NETWORK} | changes)


def refusal(**changes: Any) -> str:
    with pytest.raises(ModelError) as raised:
        card(**changes)
    message = str(raised.value)
    assert message.startswith("card.json: ")
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_the_card_of_the_contract(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(CONTRACT)
    found = read(tmp_path / "card.json")
    assert found.name == "hippocampus-resunet"
    assert found.tile == (48, 64, 48)
    assert found.labels["2"].name == "posterior hippocampus"
    assert found.stitch[0] == "gaussian"
    (tmp_path / "again.json").write_text(found.to_json())
    assert read(tmp_path / "again.json") == found
    with pytest.raises(ValidationError):
        found.name = "other"


@pytest.mark.parametrize(
    "changes",
    [
        {"orientation": "RAS", "spacing_mm": [1.5, 1, 1.0]},
        {"orientation": "PSL"},
        {"normalize": [{"kind": "none"}]},
        {"normalize": [{"kind": "zscore_nonzero"}]},
        {"normalize": [{"kind": "ct", "lower": -160, "upper": 240, "mean": 50.5, "std": 33}]},
        {"normalize": [{"kind": "scale", "from": [0, 255], "to": [0.0, 1], "clip": True}]},
        {"normalize": [{"kind": "imagenet"}], "channels": ["red", "green", "blue"]},
        {"normalize": [{"kind": "zscore"}, {"kind": "none"}], "channels": ["T1", "T2"]},
        {"stitch": ["exact"], "mirror_axes": [0, 2], "background": -1000},
        {"activation": "sigmoid", "labels": {"7": {"name": "seven"}, "3": {"name": "three"}}},
        {"regions": {"whole": [1, 2]}, "locator": "body-finder"},
        {
            "licence": "CC BY-SA 4.0",
            "intended_use": "research",
            "quality": {"dice": 0.9},
            "training": ["x", 1],
        },
        {"axes": "yx", "tile": [64, 64]},
        {"axes": "tyx", "tile": [4, 64, 64]},
        {"overlap": 0},
    ],
    ids=lambda c: "-".join(c),
)
def test_accepted(changes: dict[str, Any]) -> None:
    found = card(**changes)
    dumped = json.loads(found.to_json())
    assert parse(dumped) == found
    for field, value in changes.items():
        assert dumped[field] == value


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalise": []}, ["unknown field 'normalise'", "Did you mean 'normalize'", "Known: format, name"]),
        ({"license": "MIT"}, ["unknown field 'license'", "Did you mean 'licence'"]),
        (
            {"network": {"name": "unet", "confg": {}}},
            ["unknown field 'network.confg'", "Did you mean 'config'"],
        ),
        ({"labels": {"1": {"nam": "a"}, "2": {"name": "b"}}}, ["'labels.1.nam'", "Did you mean 'name'"]),
        ({"normalize": [{"kind": "zscor"}]}, ["unknown kind 'zscor'", "Did you mean 'zscore'", "imagenet"]),
        (
            {"normalize": [{"kind": "ct", "lower": 0, "uper": 1, "mean": 0, "std": 1}]},
            ["unknown field 'normalize.0.ct.uper'", "Did you mean 'upper'", "and 1 more"],
        ),
        ({"normalize": [{"kind": "scale", "from_": [0, 1], "to": [0, 1]}]}, ["from_", "Did you mean 'from'"]),
        ({"normalize": [{"kind": "zscore", "mean": 3}]}, ["'normalize.0.zscore.mean'", "Known: kind"]),
        ({"normalize": [{}]}, ["normalize.0", "kind"]),
        (
            {"normalize": [{"kind": "ct", "lower": 0, "upper": 1, "mean": 0}]},
            ["'normalize.0.ct.std' is missing"],
        ),
        (
            {"normalize": [{"kind": "ct", "lower": 2, "upper": 1, "mean": 0, "std": 1}]},
            ["below upper", "2.0"],
        ),
        (
            {"normalize": [{"kind": "ct", "lower": 0, "upper": 1, "mean": 0, "std": 0}]},
            ["std", "greater than 0"],
        ),
        ({"normalize": [{"kind": "scale", "from": [3, 3], "to": [0, 1]}]}, ["two different values", "3.0"]),
        ({"normalize": [{"kind": "imagenet"}]}, ["three channels", "1 channels"]),
        ({"normalize": [{"kind": "none"}] * 2}, ["one entry for all or one per channel (1)", "got 2"]),
        ({"normalize": []}, ["normalize", "at least 1"]),
        ({"name": "a/b"}, ["name", "pattern", "'a/b'"]),
        ({"name": "../up"}, ["name", "pattern"]),
        ({"name": ".."}, ["only dots"]),
        ({"name": "a\n"}, ["name", "pattern"]),
        ({"name": ""}, ["name"]),
        ({"weights": {"file": "../w.safetensors", "sha256": "0" * 64}}, ["weights.file", "plain file name"]),
        ({"weights": {"file": "/etc/passwd", "sha256": "0" * 64}}, ["weights.file", "plain file name"]),
        ({"weights": {"file": "a\\b", "sha256": "0" * 64}}, ["weights.file", "plain file name"]),
        ({"weights": {"file": "w", "sha256": "xyz"}}, ["weights.sha256", "'xyz'"]),
        ({"format": "maskmill-card-2"}, ["format", "'maskmill-card-1'", "'maskmill-card-2'"]),
        ({"axes": "xyz"}, ["axes", "'zyx'", "'xyz'"]),
        ({"tile": [48, 64]}, ["tile must have one number per axis of 'zyx'", "[48, 64]"]),
        ({"tile": [0, 64, 64]}, ["tile.0", "greater than or equal to 1"]),
        ({"tile": [16.0, 64, 64]}, ["tile.0", "integer"]),
        ({"tile": [8192, 8192, 8192]}, ["549,755,813,888 voxels"]),
        ({"spacing_mm": [1, 1]}, ["spacing_mm must have one number per axis"]),
        ({"spacing_mm": [1, 0, 1]}, ["spacing_mm.1", "greater than 0"]),
        ({"overlap": 1}, ["overlap", "less than 1"]),
        ({"overlap": -0.1}, ["overlap"]),
        ({"overlap": float("nan")}, ["overlap"]),
        ({"overlap": "0.5"}, ["overlap", "'0.5'"]),
        ({"orientation": "RAX"}, ["orientation", "'RAX'", "LPS"]),
        ({"orientation": "RAL"}, ["orientation", "'RAL'"]),
        ({"orientation": "RA", "axes": "yx", "tile": [8, 8]}, ["orientation", "'RA'", "x, y, z"]),
        ({"orientation": "RAS", "axes": "tyx", "tile": [8, 8, 8]}, ["orientation", "clips"]),
        ({"stitch": ["gauss"]}, ["stitch.0", "'gaussian'", "'gauss'"]),
        ({"stitch": []}, ["stitch"]),
        ({"mirror_axes": [3]}, ["mirror_axes", "[3]"]),
        ({"mirror_axes": [1, 1]}, ["mirror_axes", "[1, 1]"]),
        ({"activation": "relu"}, ["activation", "'softmax'"]),
        ({"labels": {}}, ["labels"]),
        (
            {"labels": {"0": {"name": "background"}, "1": {"name": "a"}}},
            ["labels", "'0'", "0 is the background"],
        ),
        ({"labels": {"01": {"name": "a"}}}, ["labels", "'01'"]),
        ({"labels": {"65536": {"name": "a"}}, "activation": "sigmoid"}, ["'65536'"]),
        ({"labels": {"1": {"name": "a"}, "3": {"name": "b"}}}, ["channel k is label k", "['1', '3']"]),
        ({"labels": {"1": {"name": ""}}}, ["labels.1.name"]),
        ({"labels": {"1": "a", "2": "b"}}, ["labels.1"]),
        ({"regions": {"whole": [1, 9]}}, ["region 'whole'", "[9]"]),
        ({"channels": []}, ["channels"]),
        ({"background": True}, ["background"]),
        ({"network": None}, ["network"]),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_refused(changes: dict[str, Any], words: list[str]) -> None:
    message = refusal(**changes)
    for word in words:
        assert word in message


def test_a_missing_field_is_named() -> None:
    for field in ("name", "axes", "channels", "normalize", "tile", "activation", "labels"):
        with pytest.raises(ModelError, match=f"the field '{field}' is missing"):
            parse({k: v for k, v in (CARD | {"network": NETWORK}).items() if k != field})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "expected an object with fields, got list"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"a": 1, "a": 2}', "the field 'a' stands twice"),
        (b"[" * 200_000, "not JSON"),
        (b"{}", "the field 'format' is missing"),
        (b'{"format": "maskmill-card-1"}', "the field 'weights' is missing"),
        (b" " * (16 * 2**20 + 1), "larger than 16 MiB"),
    ],
    ids=range(9),
)
def test_files_that_are_no_card(tmp_path: Path, text: bytes, words: str) -> None:
    (tmp_path / "card.json").write_bytes(text)
    with pytest.raises(ModelError, match=words):
        read(tmp_path / "card.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axes": "yx", "tile": [8, 8]}, "axes 'yx' do not fit a 3-D network"),
        ({"channels": ["a", "b"]}, "2 channels are listed, the network takes 1"),
        ({"labels": {"1": {"name": "a"}}}, "1 labels are listed, but a softmax network of 3 classes has 2"),
        ({"activation": "sigmoid"}, "2 labels are listed, but a sigmoid network of 3 classes has 3"),
    ],
    ids=range(4),
)
def test_a_card_must_agree_with_its_network(changes: dict[str, Any], words: str) -> None:
    network = small_network(**NETWORK["config"])  # type: ignore[arg-type]
    agree(card(), network)
    with pytest.raises(ModelError, match=words):
        agree(card(**changes), network)


def test_the_tile_of_a_valid_network_is_a_legal_input() -> None:
    network = small_network("unet", dims=3, classes=3, widths=[2, 2, 2], padding="valid")
    agree(card(tile=[44, 48, 64]), network)
    with pytest.raises(ModelError, match=r"tile \[44, 46, 64\].*the next legal one is \[44, 48, 64\]"):
        agree(card(tile=[44, 46, 64]), network)


def test_the_hash_is_of_what_decides_the_answer() -> None:
    same = answer_hash(card())
    assert len(same) == 64
    for changes in (
        {"version": "9"},
        {"licence": "MIT"},
        {"quality": {"dice": 1}},
        {"training": "x"},
        {"intended_use": "y"},
        {"stitch": ["gaussian"]},
        {"labels": dict(reversed(CARD["labels"].items()))},
        {"network": {"name": "resunet", "config": NETWORK["config"] | {"norm": "batch", "in_channels": 1}}},
        {"normalize": ({"kind": "zscore"},)},
        {"mirror_axes": []},
    ):
        assert answer_hash(card(**changes)) == same, changes
    for changes in (
        {"name": "b"},
        {"normalize": [{"kind": "none"}]},
        {"stitch": ["constant", "gaussian"]},
        {"overlap": 0.25},
        {"tile": [16, 24, 24]},
        {"labels": {"1": {"name": "anterior"}, "2": {"name": "other"}}},
        {"network": {"name": "resunet", "config": NETWORK["config"] | {"norm": "group"}}},
        {"weights": {"file": "w", "sha256": "0" * 64}},
        {"background": 0},
        {"orientation": "RAS"},
        {"spacing_mm": [1, 1, 1]},
        {"channels": ["CT"]},
        {"activation": "sigmoid"},
    ):
        assert answer_hash(card(**changes)) != same, changes
    labels = {"1": {"name": "a"}, "2": {"name": "b"}}
    ordered, turned = (
        card(activation="sigmoid", labels=dict(pairs)) for pairs in (labels.items(), reversed(labels.items()))
    )
    assert answer_hash(ordered) != answer_hash(turned)  # channel i paints the i-th key


def test_the_hash_does_not_move() -> None:
    # A published result goes by this hash: an edit that changes it makes every user compute everything again.
    assert answer_hash(card()) == "dbb30e116fe56b1bec4f941c522ce10a7981b8533a5d0f931f175dbb37468d14"
