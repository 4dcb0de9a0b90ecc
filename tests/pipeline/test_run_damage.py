"""Damaged label shards: a rerun finds them and makes them, and nothing else, anew."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scans import label_array, leftovers, markers, mask_bytes, random_model, scan, table

import pipeline
from flows.status import read_status
from pipeline.engine import Failure, Receipt, SerialEngine, Work
from pipeline.summary import Summary

MODEL = "tiny-resunet"
SHARDS = 5


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A folder of one study, a model, and OUT of an undisturbed run."""
    top = tmp_path_factory.mktemp("damage")
    scan(top / "in/a.nii.gz", 1, (8, 9, 260))
    model = random_model(top / "model", tile=(64, 16, 16))
    assert segment(top / "in", model, top / "undisturbed").exit_code == 0
    return top / "in", model, top / "undisturbed"


def segment(inputs: Path, model: Path, out: Path, engine: type[SerialEngine] = SerialEngine) -> Summary:
    return pipeline.segment(inputs, model, out, threads=1, engine=engine)


def shard(out: Path, number: int = 2) -> Path:
    return out / f"images/a.ome.zarr/labels/{MODEL}/0/c/{number}/0/0"


def flip(path: Path) -> None:
    """Where the labels themselves stand: without a checksum they would be read as others."""
    data = bytearray(path.read_bytes())
    data[len(data) // 6] ^= 0x10
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def other(path: Path) -> None:
    """Whole, but of another place."""
    shutil.copy(path.parents[2] / "1/0/0", path)


def check_finished(out: Path, undisturbed: Path) -> None:
    np.testing.assert_array_equal(label_array(out, "a", MODEL), label_array(undisturbed, "a", MODEL))
    assert mask_bytes(out, "a") == mask_bytes(undisturbed, "a")
    assert table(out, "structures") == table(undisturbed, "structures")
    assert leftovers(out) == []


def check_redone(out: Path, before: dict[str, int], damaged: int) -> None:
    """Only this shard's marker is a new one."""
    now = markers(out)
    assert {Path(name).name for name in now if now[name] != before.get(name)} == {f"{damaged}.0.0.json"}


@pytest.mark.parametrize("damage", [flip, cut, empty, remove, other], ids=lambda d: d.__name__)
def test_a_damaged_shard_of_unfinished_work_is_made_again(
    damage: Callable[[Path], None], given: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    inputs, model, undisturbed = given
    out = tmp_path / "out"
    out.mkdir()
    (out / "masks").write_text("in the way: all shards are made, nothing can be published")
    assert segment(inputs, model, out).exit_code == 1
    before = markers(out)
    assert len(before) == SHARDS
    (out / "masks").unlink()
    damage(shard(out))

    summary = segment(inputs, model, out)
    assert (summary.published, summary.exit_code, summary.blocks_computed) == (1, 0, 1)
    check_redone(out, before, 2)
    check_finished(out, undisturbed)


@pytest.mark.parametrize("damage", [cut, empty, remove], ids=lambda d: d.__name__)
def test_a_damaged_shard_of_a_published_study_is_made_again(
    damage: Callable[[Path], None], given: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    inputs, model, undisturbed = given
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    before = markers(out)
    damage(shard(out))

    summary = segment(inputs, model, out)
    assert (summary.published, summary.reused, summary.blocks_computed) == (1, 0, 1)
    check_redone(out, before, 2)
    check_finished(out, undisturbed)


def test_bytes_that_rot_in_a_published_shard_are_found_by_whoever_reads_them(
    given: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """A rerun does not read what is published; the checksum of every chunk keeps anybody from computing with it."""
    out = tmp_path / "out"
    shutil.copytree(given[2], out)
    whole, labels = shard(out).read_bytes(), label_array(out, "a", MODEL)
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        data = bytearray(whole)
        data[place] ^= 0x10
        shard(out).write_bytes(data)
        with pytest.raises((ValueError, RuntimeError)):
            assert np.array_equal(label_array(out, "a", MODEL), labels), f"byte {place} was read as it is"


class Spoils(SerialEngine):
    """A disk that damages a shard when all were written, before the study is published."""

    damage: Callable[[Path], None]
    path: Path

    def run(self, works: Iterable[Work], stop: threading.Event) -> Iterator[Receipt | Failure]:
        yield from self._spoilt(super().run(works, stop))

    def _spoilt(self, outcomes: Iterable[Receipt | Failure]) -> Iterator[Receipt | Failure]:
        for outcome in outcomes:
            type(self).damage(self.path)
            yield outcome


@pytest.mark.parametrize("harm", [flip, remove], ids=lambda d: d.__name__)
def test_a_shard_that_is_damaged_before_it_is_published_is_not_published(
    harm: Callable[[Path], None], given: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    inputs, model, undisturbed = given
    out = tmp_path / "out"

    class Spoiling(Spoils):
        damage = staticmethod(harm)
        path = shard(out)

    summary = segment(inputs, model, out, Spoiling)
    assert (summary.studies[0]["state"], summary.studies[0]["cause"]) == ("failed", "storage")
    assert not list(out.glob("masks/*"))
    assert not (out / "images/a.ome.zarr/labels/zarr.json").exists()
    before = markers(out)

    summary = segment(inputs, model, out)
    assert (summary.published, summary.blocks_computed) == (1, 1)
    check_redone(out, before, 2)
    check_finished(out, undisturbed)


@pytest.mark.parametrize("gone", ["0/c/0/0/0", "0/zarr.json"])
@pytest.mark.parametrize("settings", [{}, {"classes": 3, "overwrite": True}])
def test_an_image_that_lost_a_file_is_read_anew(gone: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Zarr reads a chunk that is not there as zeros: a mask of them would look like one."""
    scan(tmp_path / "in/a.nii.gz", 1, (40, 40, 30))
    pipeline.segment(tmp_path / "in", "kmeans", tmp_path / "whole", threads=1, **settings)
    assert pipeline.segment(tmp_path / "in", "kmeans", tmp_path / "out", threads=1).exit_code == 0
    (tmp_path / "out/images/a.ome.zarr" / gone).unlink()
    (tmp_path / "out/images/a.ome.zarr/labels/kmeans/0/c/0/0/0").unlink()
    assert pipeline.segment(tmp_path / "in", "kmeans", tmp_path / "out", threads=1, **settings).exit_code == 0
    assert (tmp_path / "out/images/a.ome.zarr" / gone).exists()
    np.testing.assert_array_equal(label_array(tmp_path / "out", "a"), label_array(tmp_path / "whole", "a"))
    assert label_array(tmp_path / "out", "a").any()
    assert mask_bytes(tmp_path / "out", "a") == mask_bytes(tmp_path / "whole", "a")


def test_a_study_that_was_published_and_cannot_be_exported_again_is_counted_once(
    given: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Bits flipped in the labels, and the mask gone: what readers are told of is a failed study."""
    inputs, model, undisturbed = given
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    flip(shard(out))
    (out / "masks/a.nii.gz").unlink()
    summary = segment(inputs, model, out)
    assert (summary.exit_code, summary.published, summary.failed, summary.reused) == (1, 0, 1, 0)
    assert [(entry["study"], entry["state"]) for entry in read_status(str(out))] == [("a", "failed")]
    assert [row["state"] for row in table(out, "studies")] == ["failed"]


@pytest.mark.parametrize("size", [0, 100])
def test_a_mask_that_was_cut_off_is_written_again(size: int, tmp_path: Path) -> None:
    scan(tmp_path / "in/a.nii.gz", 1)
    pipeline.segment(tmp_path / "in", "kmeans", tmp_path / "out", threads=1)
    mask = tmp_path / "out/masks/a.nii.gz"
    whole = mask.read_bytes()
    mask.write_bytes(whole[:size])
    again = pipeline.segment(tmp_path / "in", "kmeans", tmp_path / "out", threads=1)
    assert (again.exit_code, again.reused, again.blocks_computed) == (0, 1, 0)
    assert mask.read_bytes() == whole
