"""Killed at every write: the next run finishes, redoes nothing that was marked, and nobody ever sees half a result."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from scans import fingerprint, leftovers, markers, random_model, scan, table

Run = Callable[..., dict[str, Any]]
LONG = (8, 9, 260)  # x, y, z: 5 label shards and a pyramid of two levels
SHORT = (9, 8, 12)
POINTS = 6  # of each story, spread evenly, in the quick tests


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """pipeline.segment in a process of its own that dies at its write number `at`."""
    driver = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("crash_driver.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdin is not None
    assert driver.stdout is not None

    def ask(inputs: Path, model: str | Path, out: Path, at: int | None = None, **settings: Any) -> dict[str, Any]:
        wish = {"inputs": str(inputs), "model": str(model), "out": str(out), "settings": settings, "at": at}
        print(json.dumps(wish), file=driver.stdin, flush=True)
        answer: dict[str, Any] = json.loads(driver.stdout.readline())
        return answer

    yield ask
    driver.stdin.close()
    assert driver.wait(30) == 0
    driver.stdout.close()


@dataclass(frozen=True)
class Story:
    """A command that is killed: its input, its settings, and what OUT held before."""

    inputs: Path
    model: str | Path
    settings: dict[str, Any] = field(default_factory=dict)
    before: Path | None = None
    linked: Path | None = None  # images of another OUT, as they are before


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory, run: Run) -> dict[str, Story]:
    top = tmp_path_factory.mktemp("crash")
    scan(top / "in/a.nii.gz", 1, LONG)
    scan(top / "in/b.nii.gz", 2, SHORT)
    model = random_model(top / "model", tile=(64, 16, 16))
    assert run(top / "in", model, top / "done")["summary"]["published"] == 2
    shutil.copytree(top / "in", top / "changed")
    scan(top / "changed/a.nii.gz", 3, LONG)
    shutil.copytree(top / "in", top / "twins")
    shutil.copy(top / "in/a.nii.gz", top / "twins/z.nii.gz")
    return {
        "first": Story(top / "in", model),
        "changed content": Story(top / "changed", model, before=top / "done"),
        "overwrite": Story(top / "in", model, {"overlap": 0.25, "overwrite": True}, before=top / "done"),
        "twins": Story(top / "twins", model),
        "linked": Story(top / "done/images", "kmeans", {"images": "link"}, linked=top / "done/images"),
    }


NAMES = ("first", "changed content", "overwrite", "twins", "linked")


def begin(story: Story, out: Path) -> Story:
    """A fresh copy of what was there before the command; the story as it goes on there."""
    if story.before is not None:
        shutil.copytree(story.before, out, symlinks=True)
    if story.linked is None:
        return story
    images = out.with_name(out.name + "-images")
    shutil.copytree(story.linked, images)
    return Story(images, story.model, story.settings, linked=images)


def results(out: Path) -> dict[str, Any]:
    """All that readers of OUT are shown: images, label images as listed, masks, records of what is published."""
    shown: dict[str, Any] = {path.name: b"image" for path in out.glob("images/[!.]*")}
    for image in sorted(out.glob("images/*.ome.zarr")):
        listing = image / "labels/zarr.json"
        if not image.name.startswith(".") and listing.exists():
            for name in json.loads(listing.read_text())["attributes"]["ome"]["labels"]:
                group = zarr.open_group(image / "labels" / name, mode="r")
                levels = group.attrs["ome"]["multiscales"][0]["datasets"]  # type: ignore[index,call-overload]
                for level in levels:
                    shown[f"{image.name}/{name}/{level['path']}"] = np.asarray(group[level["path"]][...]).tobytes()
    for mask in sorted(out.glob("masks/[!.]*")):
        shown[mask.name] = gzip.decompress(mask.read_bytes())
    for record in sorted(out.glob("ledger/*/published/[!.]*")):
        shown[f"{record.parts[-3]}/{record.name}"] = b"record"
    return shown


def check_crash(story: Story, at: int, out: Path, expected: dict[str, Any], old: dict[str, Any], run: Run) -> None:
    story = begin(story, out)
    assert run(story.inputs, story.model, out, at, **story.settings)["signal"] == signal.SIGKILL

    # What is shown is whole: of the finished run, or as it was before this command.
    for name, content in results(out).items():
        assert content in (expected.get(name), old.get(name)), f"{name} is neither old nor new"
    done, pixels = markers(out), pixels_of(story)

    ended = run(story.inputs, story.model, out, **story.settings)
    assert ended["signal"] == 0
    assert [e["state"] for e in ended["summary"]["studies"]] == ["published"] * len(ended["summary"]["studies"])
    assert results(out) == expected
    assert leftovers(out) == []
    assert pixels_of(story) == pixels
    if not story.before:
        now = markers(out)
        assert {name: now[name] for name in done} == done, "marked shards were done again"

    again = run(story.inputs, story.model, out, **story.settings)["summary"]
    assert again["published"] == again["reused"]
    assert again["blocks_computed"] == 0


def pixels_of(story: Story) -> dict[str, tuple[int, str]]:
    """The files of linked images that are not labels."""
    if story.linked is None:
        return {}
    return {n: f for n, f in fingerprint(story.linked).items() if "labels" not in n and f[1] != "folder"}


def tell(
    name: str, stories: dict[str, Story], tmp_path: Path, run: Run
) -> tuple[Story, dict[str, Any], dict[str, Any], int]:
    """The undisturbed run: the story, what it shows in the end, what was shown before, how many writes it takes."""
    story = begin(stories[name], tmp_path / "whole")
    old = results(tmp_path / "whole")
    ended = run(story.inputs, story.model, tmp_path / "whole", **story.settings)
    assert all(e["state"] == "published" for e in ended["summary"]["studies"])
    expected = results(tmp_path / "whole")
    assert any(len(set(shown)) > 1 for name, shown in expected.items() if name.endswith("/0")), "labels of one value"
    assert len(table(tmp_path / "whole", "studies")) >= 2
    return stories[name], expected, old, ended["writes"]


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_some_writes(name: str, stories: dict[str, Story], tmp_path: Path, run: Run) -> None:
    story, expected, old, writes = tell(name, stories, tmp_path, run)
    assert writes > 50
    for at in sorted({round(at) for at in np.linspace(1, writes, POINTS)}):
        check_crash(story, at, tmp_path / f"at-{at}", expected, old, run)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_killed_at_every_write(name: str, stories: dict[str, Story], tmp_path: Path, run: Run) -> None:
    """Every write of a first run, every eighth of the others: the writes that they share are most of them."""
    story, expected, old, writes = tell(name, stories, tmp_path, run)
    for at in range(1, writes + 1, 1 if name == "first" else 8):
        check_crash(story, at, tmp_path / "out", expected, old, run)
        for used in tmp_path.glob("out*"):
            shutil.rmtree(used)
