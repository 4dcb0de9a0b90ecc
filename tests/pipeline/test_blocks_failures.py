"""What goes wrong in one block ends that block, typed, and no other; the disk's damage is not computed with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from block_helpers import Analytic, Stored, model_of, noise, random_network, run, store_image

from pipeline.engine import Failure, Receipt
from pipeline.grid import Box, Triple
from segmodels import Model

WINDOW = (8, 16, 12)


@pytest.fixture(scope="module")
def model() -> Model:
    return model_of(random_network("resunet", dims=3, classes=3, widths=[4, 8]), tile=list(WINDOW))


def poisoned(at: Triple, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Logits that are `value` at one voxel of the tile that begins at `at`; the image holds its own coordinates."""

    def predict(tiles: torch.Tensor) -> torch.Tensor:
        logits = torch.cat([tiles[:, :1] * 0, tiles[:, :1], -tiles[:, :1]], 1)
        for tile, answer in zip(tiles, logits, strict=True):
            if tuple(tile[:, 0, 0, 0].tolist()) == tuple(float(n + 1) for n in at):
                answer[1, 3, 2, 1] = value
        return logits

    return predict


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_network_that_answers_nan_or_inf_fails_that_block_alone(tmp_path: Path, value: float, batch: int) -> None:
    shape = (24, 16, 32)
    where = np.stack(np.meshgrid(*[np.arange(1, n + 1) for n in shape], indexing="ij")).astype(np.float32)
    stored = store_image(tmp_path / "a", where, (8, 16, 16), overlap=0.0)
    other = store_image(tmp_path / "b", where[:, :8, :, :16], (8, 16, 16), overlap=0.0)
    left, right = stored.tasks([Box((0, 0, 0), (3, 2, 2)), Box((0, 0, 2), (3, 2, 4))])
    model = model_of(classes=3, channels=3)
    predictor = Analytic(poisoned((16, 0, 0), value), 3, 3)
    outcomes = run([left, right, other.whole(key="other")], model, batch, predictor)
    (failure,) = [o for o in outcomes if isinstance(o, Failure)]
    assert (failure.key, failure.index, failure.cause) == ("k", 0, "model")
    assert "z,y,x = (16, 0, 0)" in failure.message
    assert [(o.key, o.index) for o in outcomes if isinstance(o, Receipt)] == [("k", 1), ("other", 0)]
    # Of the left block only what earlier tiles had finished is written.
    assert stored.marked(batch) == {i for i in stored.shards.indices() if i[2] >= 2 or i[0] == 0}
    assert not stored.labels[8:, :, :16].any()
    assert (stored.labels[..., 16:] == 1).all()
    assert (other.labels == 1).all()


def test_a_network_that_raises_fails_every_block_of_its_batch(tmp_path: Path) -> None:
    def refuse(tiles: torch.Tensor) -> torch.Tensor:
        if float(tiles.max()) > 50:
            raise RuntimeError("the weights do not fit the moon\nsecond line")
        return torch.cat([tiles, -tiles], 1)

    voxels = np.ones((8, 8, 8), np.float32)
    good = store_image(tmp_path / "a", voxels, (8, 8, 8))
    bad = store_image(tmp_path / "b", voxels * 100, (8, 8, 8))
    tasks = [good.whole(key="first"), bad.whole(key="second"), good.emptied(tmp_path / "c").whole(key="third")]
    outcomes = run(tasks, model_of(classes=2), predictor=Analytic(refuse, 2))
    assert [type(o) for o in outcomes] == [Receipt, Failure, Receipt]
    failure = outcomes[1]
    assert isinstance(failure, Failure)
    assert (failure.cause, failure.key) == ("model", "second")
    assert "do not fit the moon" in failure.message
    assert "second line" not in failure.message


@pytest.mark.parametrize(
    "text", ["CUDA out of memory. Tried to allocate 2 GiB", "DefaultCPUAllocator: can't allocate memory: you tried"]
)
def test_a_network_without_memory_says_so(tmp_path: Path, text: str) -> None:
    def refuse(tiles: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(text)

    stored = store_image(tmp_path, np.ones((8, 8, 8), np.float32), (8, 8, 8))
    (failure,) = run([stored.whole()], model_of(classes=2), predictor=Analytic(refuse, 2))
    assert isinstance(failure, Failure)
    assert failure.cause == "memory"


def _rotten_image(study: Stored) -> None:
    path = study.folder / "image" / "c" / "1" / "0" / "0"
    path.write_bytes(bytes(len(path.read_bytes())))


def _no_image(study: Stored) -> None:
    shutil.rmtree(study.folder / "image")


def _image_without_metadata(study: Stored) -> None:
    (study.folder / "image" / "zarr.json").write_text("{")


def _no_statistics(study: Stored) -> None:
    (study.folder / "statistics.npz").unlink()


def _rotten_statistics(study: Stored) -> None:
    (study.folder / "statistics.npz").write_bytes(b"PK\x03\x04 and nothing more")


def _cut_statistics(study: Stored) -> None:
    data = (study.folder / "statistics.npz").read_bytes()
    (study.folder / "statistics.npz").write_bytes(data[: len(data) // 2])


def _no_labels(study: Stored) -> None:
    shutil.rmtree(study.folder / "labels")


def _labels_are_a_file(study: Stored) -> None:
    (study.folder / "labels" / "c").write_text("in the way")


def _ledger_is_a_file(study: Stored) -> None:
    (study.folder / "ledger").write_text("in the way")


DAMAGES = [
    _rotten_image, _no_image, _image_without_metadata, _no_statistics, _rotten_statistics, _cut_statistics, _no_labels,
    _labels_are_a_file, _ledger_is_a_file,
]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__.strip("_"))
def test_damage_on_the_disk_fails_that_study_alone(
    tmp_path: Path, model: Model, damage: Callable[[Stored], None], batch: int
) -> None:
    good, bad, last = (
        store_image(tmp_path / name, noise((20, 16, 16)) * 3, WINDOW) for name in ("good", "bad", "last")
    )
    damage(bad)
    outcomes = run([study.whole(key=study.folder.name) for study in (good, bad, last)], model, batch)
    ends = {o.key: o for o in outcomes}
    assert len(outcomes) == 3
    assert isinstance(ends["good"], Receipt)
    assert isinstance(ends["last"], Receipt)
    failure = ends["bad"]
    assert isinstance(failure, Failure)
    assert failure.cause == "storage"
    assert str(tmp_path) not in failure.message
    assert np.array_equal(good.labels, last.labels)


def test_a_rotten_chunk_in_the_second_block_leaves_the_first_one_whole(tmp_path: Path, model: Model) -> None:
    stored = store_image(tmp_path, noise((40, 16, 16)), WINDOW)
    path = tmp_path / "image" / "c" / "4" / "0" / "0"
    path.write_bytes(path.read_bytes()[::-1])
    first, second = stored.tasks([Box((0, 0, 0), (2, 2, 2)), Box((2, 0, 0), (5, 2, 2))])
    outcomes = run([first, second], model)
    assert [type(o) for o in outcomes] == [Receipt, Failure]
    assert stored.marked() >= {index for index in stored.shards.indices() if index[0] < 2}
    assert not {index for index in stored.marked() if index[0] == 4}


def test_a_fault_of_ours_is_told_by_kind_and_place_without_its_text(tmp_path: Path) -> None:
    def fault(tiles: torch.Tensor) -> torch.Tensor:
        raise KeyError("/home/somebody/scan.nii")

    stored = store_image(tmp_path, np.ones((8, 8, 8), np.float32), (8, 8, 8))
    (failure,) = run([stored.whole()], model_of(classes=2), predictor=Analytic(fault, 2))
    assert isinstance(failure, Failure)
    assert failure.cause == "crash"
    assert failure.message.startswith("KeyError in test_blocks_failures.py, line ")


def test_after_a_cuda_error_the_process_is_given_up(tmp_path: Path) -> None:
    def fault(tiles: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    stored = store_image(tmp_path, np.ones((8, 8, 8), np.float32), (8, 8, 8))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run([stored.whole()], model_of(classes=2), predictor=Analytic(fault, 2))
