"""Markers, keys and records: what counts as done, what a study goes by, what is secret."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import ledger

SETTINGS = {"stitch": "gaussian", "overlap": 0.5, "tile": [96, 96, 96], "mirroring": False}
ROOT = Path(__file__).parents[2]


def test_markers_count_under_their_own_runtime_only(tmp_path: Path) -> None:
    folder = str(tmp_path / "key")
    ledger.write_marker(folder, (0, 0, 1), "r1", {"1": {"n": 4}})
    ledger.write_marker(folder, (0, 0, 0), "r1", {})
    ledger.write_marker(folder, (0, 1, 0), "r2", {})
    assert ledger.markers(folder, "r1") == {(0, 0, 0): {}, (0, 0, 1): {"1": {"n": 4}}}
    assert ledger.markers(folder, "r2") == {(0, 1, 0): {}}
    assert ledger.markers(folder, "r3") == {}
    assert ledger.is_marked(folder, (0, 0, 1), "r1")
    assert not ledger.is_marked(folder, (0, 0, 1), "r2")
    assert not ledger.is_marked(folder, (9, 9, 9), "r1")
    ledger.write_marker(folder, (0, 0, 1), "r2", {})
    assert list(ledger.markers(folder, "r1")) == [(0, 0, 0)]


def test_markers_come_in_raster_order(tmp_path: Path) -> None:
    folder = str(tmp_path / "key")
    shards = [(10, 0, 2), (2, 11, 0), (2, 2, 10), (2, 2, 9), (0, 0, 0), (10, 0, 10)]
    for shard in shards:
        ledger.write_marker(folder, shard, "r", {})
    assert list(ledger.markers(folder, "r")) == sorted(shards)


def test_folded_markers_say_the_same(tmp_path: Path) -> None:
    folder, done = str(tmp_path / "key"), tmp_path / "key/done"
    for i in range(3):
        ledger.write_marker(folder, (0, 0, i), "r", {"i": i})
    before = ledger.markers(folder, "r")
    ledger.fold(folder)
    assert [path.name for path in done.iterdir()] == ["all.json"]
    assert ledger.markers(folder, "r") == before == {(0, 0, i): {"i": i} for i in range(3)}
    assert ledger.markers(folder, "other") == {}
    ledger.fold(folder)
    ledger.write_marker(folder, (0, 0, 1), "r2", {"i": 9})  # made anew: the younger one counts
    ledger.write_marker(folder, (0, 1, 0), "r2", {"i": 10})
    assert ledger.markers(folder, "r2") == {(0, 0, 1): {"i": 9}, (0, 1, 0): {"i": 10}}
    ledger.fold(folder)
    assert [path.name for path in done.iterdir()] == ["all.json"]
    assert ledger.markers(folder, "r") == {(0, 0, i): {"i": i} for i in (0, 2)}


def test_a_reader_sees_all_markers_while_they_are_folded(tmp_path: Path) -> None:
    folder = str(tmp_path / "key")
    for round_ in range(20):
        for i in range(20):
            ledger.write_marker(folder, (round_, 0, i), "r", {})
        folding = threading.Thread(target=ledger.fold, args=(folder,))
        folding.start()
        while folding.is_alive():
            assert len(ledger.markers(folder, "r")) == 20 * (round_ + 1)
        folding.join()


@pytest.mark.parametrize("data", [b"", b'{"runtime": "r", "stat', b"\x00" * 60, b"[]", b'"r"', b"null", b"7"])
def test_a_marker_that_was_cut_off_does_not_count(tmp_path: Path, data: bytes) -> None:
    folder = str(tmp_path / "key")
    ledger.write_marker(folder, (0, 0, 0), "r", {})
    (tmp_path / "key" / "done" / ledger.marker_name((0, 0, 1))).write_bytes(data)
    (tmp_path / "key" / "done" / ".0.0.2.json.1234.partial").write_bytes(b'{"runtime": "r", "statistics": {}}')
    assert ledger.markers(folder, "r") == {(0, 0, 0): {}}
    assert not ledger.is_marked(folder, (0, 0, 1), "r")


def test_a_study_key_is_short_hex_and_the_same_in_every_process() -> None:
    key = ledger.study_key("c" * 64, "m" * 64, SETTINGS)
    assert re.fullmatch(r"[0-9a-f]{24}", key)
    code = "import json, sys; from pipeline import ledger; print(ledger.study_key(*json.loads(sys.argv[1])))"
    arguments = json.dumps(["c" * 64, "m" * 64, SETTINGS])
    again = subprocess.run(
        [sys.executable, "-c", code, arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert again.stdout.strip() == key


def test_a_study_key_names_content_model_and_settings_and_nothing_else() -> None:
    key = ledger.study_key("content", "model", SETTINGS)
    assert ledger.study_key("content", "model", dict(reversed(SETTINGS.items()))) == key
    others = [
        ledger.study_key("content2", "model", SETTINGS),
        ledger.study_key("content", "model2", SETTINGS),
        ledger.study_key("contentm", "odel", SETTINGS),
        *(ledger.study_key("content", "model", SETTINGS | change) for change in CHANGES),
    ]
    assert len({key, *others}) == 1 + len(others)


CHANGES: list[dict[str, Any]] = [
    {"stitch": "constant"},
    {"overlap": 0.25},
    {"tile": [96, 96, 64]},
    {"mirroring": True},
    {"classes": 3},
    {"volume": 0},
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MASKMILL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_location_key_is_stable_and_tells_no_location(home: Path) -> None:
    key = ledger.location_key("/home/jane doe/scan.nii.gz")
    assert re.fullmatch(r"u[0-9a-f]{15}", key)
    assert ledger.location_key("/home/jane doe/scan.nii.gz") == key
    assert ledger.location_key("/home/jane doe/scan2.nii.gz") != key


def test_another_user_has_other_location_keys(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = ledger.location_key("/data/scan.nii")
    monkeypatch.setenv("MASKMILL_HOME", str(tmp_path / "other"))
    assert ledger.location_key("/data/scan.nii") != first


def test_the_secret_is_nobody_elses(home: Path) -> None:
    ledger.location_key("/x")
    secret = home / "key"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert len(secret.read_bytes()) == 32
    before = secret.read_bytes()
    ledger.location_key("/y")
    assert secret.read_bytes() == before
    assert [p.name for p in home.iterdir()] == ["key"]


def test_two_commands_that_start_at_once_share_one_secret(home: Path) -> None:
    code = "from pipeline import ledger; print(ledger.location_key('/x'))"
    started = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    assert len({process.communicate()[0] for process in started}) == 1


@given(st.text(max_size=40))
def test_any_location_has_a_key(location: str) -> None:
    assert len(ledger.location_key(location)) == 16


def test_a_location_that_is_no_unicode_has_a_key() -> None:
    assert len(ledger.location_key(b"/data/\xff\xe9.nii".decode(errors="surrogateescape"))) == 16


def test_records_of_what_is_published_and_what_failed(tmp_path: Path) -> None:
    out = str(tmp_path)
    assert list(ledger.all_published(out)) == []
    good, bad = ledger.folder(out, "0123abcd"), ledger.folder(out, "u0123")
    record = dict.fromkeys(ledger.RECORD, "x")
    ledger.write_published(good, "b", record)
    ledger.write_published(good, "a", record)
    ledger.write_published(good, "damaged", {"content": "x"})  # not all that a record has: as if it were not there
    ledger.write_failed(bad, {"study": "c", "cause": "input", "message": "why", "attempts": 1})
    (tmp_path / "ledger" / "out.json").write_text("{}")
    assert sorted(ledger.keys(out)) == ["0123abcd", "u0123"]
    assert [(key, study) for key, study, _ in ledger.all_published(out)] == [("0123abcd", "a"), ("0123abcd", "b")]
    assert ledger.published(good, "a") == record
    assert ledger.published(good, "damaged") is None
    assert ledger.published(good, "c") is None
    assert ledger.all_failed(out) == {"c": ["u0123"]}
    ledger.forget_published(good, "a")
    assert ledger.published_names(good) == ["b", "damaged"]


def test_what_is_good_now_is_no_failure(tmp_path: Path) -> None:
    out = str(tmp_path)
    for key in ("u0123", "0123abcd"):
        ledger.write_failed(ledger.folder(out, key), {"study": "c", "cause": "memory"})
        ledger.write_marker(ledger.folder(out, key), (0, 0, 0), "r", {})
        ledger.clear_failed(ledger.folder(out, key))
    assert ledger.all_failed(out) == {}
    assert list(ledger.keys(out)) == ["0123abcd"], "a location has nothing else to be remembered by"
    assert ledger.markers(ledger.folder(out, "0123abcd"), "r") == {(0, 0, 0): {}}


def test_a_plan_there_and_back(tmp_path: Path) -> None:
    folder = ledger.folder(str(tmp_path), "k")
    assert ledger.read_plan(folder) is None
    plan = {"study": "a", "content": "c", "runtime": {}, "runtime_hash": "r", "shards": 3}
    ledger.write_plan(folder, plan)
    assert ledger.read_plan(folder) == plan
    ledger.write_plan(folder, {"study": "a", "shards": 3})  # damaged: as if it were not there
    assert ledger.read_plan(folder) is None


def test_a_shard_is_taken_back_whether_its_marker_is_folded_or_not(tmp_path: Path) -> None:
    folder = ledger.folder(str(tmp_path), "k")
    for x in range(3):
        ledger.write_marker(folder, (0, 0, x), "r", {})
    ledger.fold(folder)
    ledger.write_marker(folder, (0, 0, 3), "r", {})
    for x in (1, 3):
        ledger.unmark(folder, (0, 0, x))
    assert ledger.markers(folder, "r") == {(0, 0, 0): {}, (0, 0, 2): {}}
