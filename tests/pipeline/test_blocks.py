"""What blocks promise whatever they are cut into: one answer, whole shards with markers, failures of their own."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from block_helpers import Analytic, Stored, model_of, noise, random_network, receipts, run, runtime, store_image

from pipeline import ledger
from pipeline.blocks import segment_blocks
from pipeline.grid import Triple, split_shards
from segmodels import Model
from segmodels.predictor import Predictor, make_predictor

SHAPE, WINDOW = (21, 27, 30), (8, 16, 12)


@pytest.fixture(scope="module")
def model() -> Model:
    return model_of(random_network("resunet", dims=3, classes=3, widths=[4, 8]), tile=list(WINDOW))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return store_image(tmp_path_factory.mktemp("study") / "a", noise(SHAPE), WINDOW)


@pytest.fixture(scope="module", params=[1, 3])
def whole(
    request: pytest.FixtureRequest, stored: Stored, model: Model, tmp_path_factory: Any
) -> tuple[int, np.ndarray]:
    """A tile batch and the labels that one single block gives under it."""
    one = stored.emptied(tmp_path_factory.mktemp("whole") / "a")
    (receipt,) = receipts(run([one.whole()], model, request.param))
    assert receipt.tiles == one.grid.tiles
    assert receipt.shards == one.shards.total
    assert sorted(np.unique(one.labels)) == [0, 1, 2]
    return request.param, one.labels


PARTITIONS: list[Triple] = [
    (1, 1, 4), (1, 4, 1), (3, 1, 1), (1, 2, 2), (2, 1, 3), (2, 2, 1), (2, 2, 2), (1, 4, 4), (3, 2, 1), (3, 3, 2),
    (3, 4, 4),
]  # fmt: skip


@pytest.mark.parametrize("parts", PARTITIONS, ids=str)
def test_labels_do_not_depend_on_how_blocks_are_cut(
    tmp_path: Path, stored: Stored, model: Model, whole: tuple[int, np.ndarray], parts: Triple
) -> None:
    batch, expected = whole
    cut = stored.emptied(tmp_path / "a")
    tasks = cut.tasks(split_shards(cut.shards, parts))
    random.Random(0).shuffle(tasks)
    found = receipts(run(tasks, model, batch))
    assert [(r.key, r.index) for r in found] == [(t.key, t.index) for t in tasks]
    assert [r.tiles for r in found] == [cut.grid.count(cut.shards.box_of(t.range)) for t in tasks]
    assert np.array_equal(cut.labels, expected)


@pytest.mark.parametrize("seed", range(4))
def test_a_resumed_block_computes_what_is_missing_and_no_other_voxel(
    tmp_path: Path, stored: Stored, model: Model, whole: tuple[int, np.ndarray], seed: int
) -> None:
    """Any shards of any block may be done: only the others are computed, and the whole is the same."""
    batch, expected = whole
    chance = random.Random(seed)
    resumed = stored.emptied(tmp_path / "a")
    everything = list(resumed.shards.indices())
    first = [index for index in everything if chance.random() < 0.6]
    for parts, todo in (((1, 1, 1), first), ((2, 1, 2), [i for i in everything if i not in first])):
        before = resumed.labels.copy()
        tasks = []
        for index, range_ in enumerate(split_shards(resumed.shards, parts)):
            missing = [i for i in resumed.shards.indices(range_) if i in todo]
            if missing:
                tasks.append(resumed.task(range_, index=index, missing=missing))
        found = receipts(run(tasks, model, batch))
        for task, receipt in zip(tasks, found, strict=True):
            boxes = [resumed.shards.box(i) for i in task.missing]
            needed = [t for t in resumed.grid.tiles_over(resumed.shards.box_of(task.range)) if any(map(t.meets, boxes))]
            assert (receipt.shards, receipt.tiles) == (len(boxes), len(needed))
        for index in set(everything) - set(todo):
            there = resumed.shards.box(index).slices
            assert np.array_equal(resumed.labels[there], before[there])
    assert np.array_equal(resumed.labels, expected)
    assert resumed.marked(batch) == set(everything)


def test_rows_between_two_missing_shards_may_be_skipped(tmp_path: Path, model: Model) -> None:
    """A column of shards of which the first and the last are missing: tiles jump over what lies between."""
    stored = store_image(tmp_path / "a", noise((64, 10, 9)), WINDOW)
    receipts(run([stored.whole()], model))
    expected, emptied = stored.labels, stored.emptied(tmp_path / "b")
    ends = [index for index in emptied.shards.indices() if index[0] in (0, 7)]
    (receipt,) = receipts(run([emptied.whole(missing=ends)], model))
    assert receipt.tiles < emptied.grid.tiles / 2
    assert np.array_equal(emptied.labels[:8], expected[:8])
    assert np.array_equal(emptied.labels[56:], expected[56:])
    assert not emptied.labels[8:56].any()


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_several_studies_in_one_call_share_batches_and_nothing_else(tmp_path: Path, model: Model, batch: int) -> None:
    shapes = [(5, 9, 7), (8, 16, 12), (9, 20, 14), (3, 3, 3)]
    studies = [store_image(tmp_path / str(i), noise(shape, i) * 4, WINDOW) for i, shape in enumerate(shapes)]
    counting = Counting(make_predictor(model, runtime(batch)))
    tasks = [study.whole(key=f"study{i}") for i, study in enumerate(studies)]
    found = receipts(run(tasks, model, batch, counting))
    assert [r.key for r in found] == [t.key for t in tasks]
    tiles = sum(study.grid.tiles for study in studies)
    assert counting.sizes == [batch] * -(-tiles // batch)
    for i, study in enumerate(studies):
        alone = study.emptied(tmp_path / f"alone{i}")
        receipts(run([alone.whole()], model, batch))
        assert np.array_equal(study.labels, alone.labels)


class Counting:
    """A predictor that notes how many tiles it was given at a time."""

    def __init__(self, inner: Predictor) -> None:
        self.inner, self.sizes = inner, []
        self.channels, self.classes, self.margin = inner.channels, inner.classes, inner.margin
        self.disagreement = inner.disagreement

    def fit(self, statistics: Any) -> Counting:
        return self

    def predict(self, tiles: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(tiles))
        return self.inner.predict(tiles)


# ------------------------------------------------------------------------------------------------ shards and markers


def test_background_is_marked_but_not_stored(tmp_path: Path) -> None:
    voxels = np.zeros((16, 16, 32), np.float32)
    voxels[:, :, 20:24] = 9
    stored = store_image(tmp_path, voxels, (8, 16, 16))
    above = Analytic(lambda t: torch.cat([torch.full_like(t, 1.0), t], 1), classes=2)
    run([stored.whole()], model_of(classes=2), predictor=above)
    assert np.array_equal(stored.labels, voxels > 1)
    assert stored.marked() == set(stored.shards.indices())
    files = {
        p.relative_to(tmp_path / "labels" / "c").parts for p in (tmp_path / "labels" / "c").rglob("*") if p.is_file()
    }
    assert files == {(z, y, "2") for z in "01" for y in "01"}


def test_a_shard_that_was_cut_off_is_written_over(tmp_path: Path, model: Model) -> None:
    stored = store_image(tmp_path, noise((16, 16, 16)), WINDOW)
    receipts(run([stored.whole()], model))
    expected = stored.labels
    shard = tmp_path / "labels" / "c" / "1" / "0" / "1"
    shard.write_bytes(shard.read_bytes()[:20])
    (tmp_path / "ledger" / "done" / "1.0.1.json").unlink()
    receipts(run([stored.whole(missing=[(1, 0, 1)])], model))
    assert np.array_equal(stored.labels, expected)


def test_markers_say_the_runtime_and_the_sums_of_their_shard(tmp_path: Path, model: Model) -> None:
    voxels = (noise((12, 17, 20)) * 20).astype(np.int16)
    stored = store_image(tmp_path, voxels, WINDOW)
    receipts(run([stored.whole()], model))
    labels = stored.labels
    markers = ledger.markers(str(tmp_path / "ledger"), runtime().hash)
    assert not ledger.markers(str(tmp_path / "ledger"), runtime(batch=2).hash)
    for index, sums in markers.items():
        there = stored.shards.box(index).slices
        present = set(np.unique(labels[there])) - {0}
        assert set(sums) == {str(k) for k in present}
        for k in present:
            inside = voxels[there][labels[there] == k]
            assert sums[str(k)]["n"] == inside.size
            assert sums[str(k)]["mean"] == pytest.approx(inside.mean())


def test_a_stop_leaves_whole_shards_marked_and_the_rest_for_later(tmp_path: Path, model: Model) -> None:
    stored = store_image(tmp_path / "a", noise((40, 16, 12)), WINDOW)
    expected = stored.emptied(tmp_path / "b")
    receipts(run([expected.whole()], model))
    stop, calls = threading.Event(), []
    inner = make_predictor(model, runtime())

    def predict(tiles: torch.Tensor) -> torch.Tensor:
        calls.append(len(tiles))
        if len(calls) == 5:
            stop.set()
        return inner.predict(tiles)

    stopped = Analytic(predict, 3)
    assert list(segment_blocks([stored.whole()], model, stopped, runtime(), stop)) == []
    assert len(calls) == 5
    done = stored.marked()
    assert {index[0] for index in done} == {0, 1}
    rest = [index for index in stored.shards.indices() if index not in done]
    receipts(run([stored.whole(missing=rest)], model))
    assert np.array_equal(stored.labels, expected.labels)


def test_tasks_are_hashable_by_what_they_say(stored: Stored) -> None:
    task = stored.whole()
    assert len({task, replace(task, index=1), stored.whole()}) == 2
