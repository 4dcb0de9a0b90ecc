"""The table of a machine: what `auto` makes of it, and when it does not count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_models import CARD, small_network

import segmodels
from segmodels import tuning
from segmodels.runtime import machine, resolve_runtime, usable_cores
from segmodels.tuning import Row, candidates, choose

ROWS = (
    Row(3, "torch", "fp32", 4, 4.0, 4.0),
    Row(3, "torch", "bf16", 4, 2.0, 2.0),
    Row(3, "torch", "fp32", 2, 5.0, 5.0),
    Row(3, "inductor", "bf16", 4, 0.6, 30.0),
    Row(3, "inductor", "fp32", 4, 1.9, 30.0),
    Row(3, "openvino", "bf16", 4, None, note="its answer is 50.0% off"),
    Row(2, "openvino", "bf16", 4, 0.1, 3.0),
)


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MASKMILL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model(tmp_path: Path) -> segmodels.Model:
    segmodels.save(small_network("resunet", dims=3, classes=3, widths=[4, 8]), CARD, tmp_path / "model")
    return segmodels.load(tmp_path / "model")


@pytest.mark.parametrize(("asked", "expected"), [
    ({}, ("inductor", "bf16", 4)),
    ({"precision": "fp32"}, ("inductor", "fp32", 4)),
    ({"backend": "torch"}, ("torch", "bf16", 4)),
    ({"threads": 2}, ("torch", "fp32", 2)),
    ({"backend": "openvino"}, None),
    ({"threads": 2, "precision": "bf16"}, None),
])  # fmt: skip
def test_the_fastest_of_what_was_asked_for(asked: dict[str, object], expected: tuple[str, str, int] | None) -> None:
    found = choose(ROWS, 3, **asked)  # type: ignore[arg-type]
    assert (None if found is None else (found.backend, found.precision, found.threads)) == expected
    assert choose(ROWS[::-1], 3, **asked) == found  # type: ignore[arg-type]


def test_auto_reads_the_table_and_what_is_given_stands(at_home: Path, model: segmodels.Model) -> None:
    plain = resolve_runtime(model)
    assert (plain.backend, plain.precision, plain.threads) == ("torch", "fp32", usable_cores())
    tuning.write(machine("cpu"), ROWS)
    assert tuning.read(machine("cpu")) == ROWS
    tuned = resolve_runtime(model)
    assert (tuned.backend, tuned.precision, tuned.threads) == ("inductor", "bf16", 4)
    given = resolve_runtime(model, backend="torch", precision="fp32", threads=3)
    assert (given.backend, given.precision, given.threads) == ("torch", "fp32", 3)
    not_measured = resolve_runtime(model, threads=7)
    assert (not_measured.backend, not_measured.precision, not_measured.threads) == ("inductor", "bf16", 7)
    assert resolve_runtime(segmodels.load("kmeans")).backend == "torch"


def test_a_backend_that_is_gone_is_not_chosen(
    at_home: Path, model: segmodels.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning.write(machine("cpu"), ROWS)
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = resolve_runtime(model)
    assert (found.backend, found.precision) == ("torch", "bf16")


def test_a_table_of_another_machine_does_not_count(at_home: Path, model: segmodels.Model) -> None:
    tuning.write(machine("cpu") | {"torch": "1.0"}, ROWS)
    assert resolve_runtime(model).backend == "torch"
    assert tuning.read(machine("cpu")) == ()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "maskmill-tune-1"}', '{"format": "other"}', "\x00\xff"])
def test_a_damaged_table_does_not_count(at_home: Path, text: str) -> None:
    at_home.mkdir()
    tuning.table_path().write_text(text)
    assert tuning.read(machine("cpu")) == ()


def test_a_row_with_unknown_fields_does_not_count(at_home: Path) -> None:
    tuning.write(machine("cpu"), ROWS)
    table = json.loads(tuning.table_path().read_text())
    table["rows"][0]["colour"] = "red"
    tuning.table_path().write_text(json.dumps(table))
    assert tuning.read(machine("cpu")) == ()


@pytest.mark.parametrize("wrong", [
    {"dims": 4}, {"backend": "foo"}, {"backend": None}, {"backend": ["torch"]}, {"backend": "auto"},
    {"precision": "fp7"}, {"precision": "auto"}, {"threads": "2"}, {"threads": 0}, {"threads": -3},
    {"threads": True}, {"threads": 10**6}, {"threads": 2.0}, {"seconds": "x"}, {"seconds": float("nan")},
    {"seconds": 0}, {"seconds": -1.0}, {"seconds": True}, {"dims": [3]},
])  # fmt: skip
def test_a_table_with_a_row_that_nobody_measured_does_not_count(
    at_home: Path, model: segmodels.Model, wrong: dict[str, object]
) -> None:
    tuning.write(machine("cpu"), ROWS)
    table = json.loads(tuning.table_path().read_text())
    table["rows"][0] |= wrong
    tuning.table_path().write_text(json.dumps(table))
    assert tuning.read(machine("cpu")) == ()
    assert resolve_runtime(model).backend == "torch"


def test_candidates_are_what_this_machine_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ("torch", "fp32", 8) in candidates("cpu", 8)
    assert ("torch", "fp32", 4) in candidates("cpu", 8)
    assert {threads for _, _, threads in candidates("cpu", 2)} == {2}
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "inductor" not in {backend for backend, _, _ in candidates("cpu", 8)}
