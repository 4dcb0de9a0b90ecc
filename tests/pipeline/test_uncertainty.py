"""Entropy and disagreement of structures against whole volumes by MONAI and SciPy, whatever blocks are cut into."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from block_helpers import (
    Analytic,
    Stored,
    model_of,
    noise,
    random_network,
    receipts,
    run,
    runtime,
    store_image,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference
from scans import random_model, scan, table
from scipy.special import expit, softmax
from scipy.stats import entropy as shannon

import pipeline
from pipeline import ledger
from pipeline.grid import Triple, split_shards
from pipeline.metrics.structures import StructureSums, merge_shards, structure_rows
from pipeline.report.tables import structures_table
from pipeline.summary import Summary
from pipeline.uncertainty import binary_entropy, softmax_entropy
from segmodels import Model
from segmodels.network import Network
from segmodels.predictor import NetworkPredictor
from segmodels.zoo.ensemble import join

SHAPE, WINDOW = (14, 20, 18), (8, 16, 12)
CONFIG: dict[str, Any] = {"dims": 3, "classes": 3, "widths": [4, 8]}


def alike(seed: int) -> Network:
    """The network of these tests with other noise on its weights: what another fold might have learnt."""
    network = random_network("resunet", **CONFIG)
    torch.manual_seed(seed)
    for parameter in network.parameters():
        parameter.data += torch.randn_like(parameter) * 0.02
    return network


def sums_of(stored: Stored, batch: int = 1) -> dict[int, StructureSums]:
    """Merged sums per label, as publishing merges them."""
    return merge_shards(ledger.markers(str(stored.folder / "ledger"), runtime(batch).hash).values())


def rows_of(stored: Stored, labels: int = 2) -> dict[int, dict[str, Any]]:
    names = {k: f"s{k}" for k in range(1, labels + 1)}
    return {row["label"]: row for row in structure_rows(sums_of(stored), {}, names, stored.shards.shape, np.eye(4))}


def volume(voxels: np.ndarray, answer: Callable[[torch.Tensor], torch.Tensor], mode: str = "gaussian") -> np.ndarray:
    """MONAI's sliding window over a whole volume (z, y, x): (fields, z, y, x) in float64."""
    with torch.inference_mode():
        tiles = torch.from_numpy(voxels.astype(np.float32))[None, None]
        found = sliding_window_inference(tiles, WINDOW, 1, answer, overlap=0.5, mode=mode)
    return found[0].double().numpy()


def mean_over(field: np.ndarray, labels: np.ndarray, label: int) -> float:
    return float(field[labels == label].mean())


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return store_image(tmp_path_factory.mktemp("study") / "a", noise(SHAPE), WINDOW)


@pytest.fixture
def fresh(study: Stored, tmp_path: Path) -> Stored:
    return study.emptied(tmp_path / "fresh")


def segmented(stored: Stored, model: Model, parts: Triple = (2, 2, 2), batch: int = 1) -> None:
    receipts(run(stored.tasks(split_shards(stored.shards, parts)), model, batch))


# -------------------------------------------------------------------------------------------- against whole volumes


@pytest.mark.parametrize("mode", ["gaussian", "constant"])
def test_entropy_is_scipys_of_monais_volume(tmp_path: Path, mode: str) -> None:
    network = random_network("resunet", **CONFIG)
    stored = store_image(tmp_path / "a", noise(SHAPE), WINDOW, stitch=mode)
    segmented(stored, model_of(network, tile=list(WINDOW)))
    logits = volume(noise(SHAPE), network, mode)
    expected = shannon(softmax(logits, axis=0), axis=0) / np.log(3)
    for label, row in rows_of(stored).items():
        assert 0.01 < row["mean_entropy"] < 1
        assert row["mean_entropy"] == pytest.approx(mean_over(expected, stored.labels, label), rel=1e-4)
        assert row["disagreement"] is None


def test_of_sigmoid_labels_the_entropy_is_that_of_the_voxels_own(fresh: Stored) -> None:
    network = random_network("resunet", **CONFIG)
    labels = {label: {"name": label} for label in ("7", "2", "9")}
    segmented(fresh, model_of(network, tile=list(WINDOW), activation="sigmoid", labels=labels))
    p = expit(volume(noise(SHAPE), network))
    found = {label: sums.uncertainty["entropy"] for label, sums in sums_of(fresh).items()}
    assert set(found) == {2, 7, 9}
    for channel, label in enumerate((7, 2, 9)):
        expected = shannon(np.stack([p[channel], 1 - p[channel]]), axis=0) / np.log(2)
        assert found[label] == pytest.approx(float(expected[fresh.labels == label].sum()), rel=1e-4)


def affinity(answers: list[torch.Tensor]) -> torch.Tensor:
    """1 - Matusita's affinity of softmax distributions, (N, 1, *S), in float64."""
    logs = torch.stack([a.double().log_softmax(1) for a in answers]).mean(0)
    return 1 - logs.exp().sum(1, keepdim=True)


def turned(network: Network, tiles: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    return network(tiles.flip(axes)).flip(axes)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("folds", "mirror_axes", "flips"),
    [(1, [1, 2], [(), (3,), (4,), (3, 4)]), (3, [], [()]), (2, [0], [(), (2,)])],
    ids=["mirrored", "ensemble", "both"],
)
def test_disagreement_is_stitched_as_logits_are(
    fresh: Stored, folds: int, mirror_axes: list[int], flips: list[tuple[int, ...]]
) -> None:
    """MONAI stitches mean logits and their disagreement tile by tile; labels and means are those of its volume."""
    members = [alike(seed) for seed in range(folds)]
    network = join(members).eval() if folds > 1 else members[0]

    def answer(tiles: torch.Tensor) -> torch.Tensor:
        answers = [turned(m, tiles, axes) for m in members for axes in flips]
        return torch.cat([torch.stack(answers).mean(0), affinity(answers).float()], 1)

    segmented(fresh, model_of(network, tile=list(WINDOW), mirror_axes=mirror_axes))
    fields = volume(noise(SHAPE), answer)
    ordered = np.sort(fields[:3], axis=0)
    clear = ordered[2] - ordered[1] > 1e-4
    assert np.array_equal(fresh.labels[clear], fields[:3].argmax(0)[clear])
    expected = shannon(softmax(fields[:3], axis=0), axis=0) / np.log(3)
    for label, row in rows_of(fresh).items():
        assert 1e-4 < row["disagreement"] < 1
        assert row["disagreement"] == pytest.approx(mean_over(fields[3], fresh.labels, label), rel=1e-3, abs=1e-6)
        assert row["mean_entropy"] == pytest.approx(mean_over(expected, fresh.labels, label), rel=1e-3)


# ------------------------------------------------------------------------------------------------- one answer, merged


@pytest.fixture(scope="module")
def mirrored() -> Model:
    return model_of(join([alike(0), alike(1)]).eval(), tile=list(WINDOW), mirror_axes=[2])


@pytest.mark.parametrize(("parts", "batch"), [((2, 1, 1), 1), ((1, 2, 3), 3), ((2, 3, 3), 1)], ids=str)
def test_no_cut_into_blocks_changes_a_bit(
    study: Stored, tmp_path: Path, mirrored: Model, parts: Triple, batch: int
) -> None:
    one, cut = study.emptied(tmp_path / "one"), study.emptied(tmp_path / "cut")
    segmented(one, mirrored, (1, 1, 1), batch)
    segmented(cut, mirrored, parts, batch)
    assert np.array_equal(one.labels, cut.labels)
    assert sorted(np.unique(one.labels)) == [0, 1, 2]
    assert sums_of(one, batch) == sums_of(cut, batch)


def test_a_block_that_ran_twice_counts_once_and_a_resumed_one_is_whole(
    study: Stored, tmp_path: Path, mirrored: Model
) -> None:
    once, resumed = study.emptied(tmp_path / "once"), study.emptied(tmp_path / "resumed")
    segmented(once, mirrored, (1, 1, 1))
    chance = random.Random(1)
    first = [index for index in resumed.shards.indices() if chance.random() < 0.5]
    receipts(run([resumed.whole(missing=first)], mirrored))
    receipts(run([resumed.whole()], mirrored))
    for index in first[:3]:
        (resumed.folder / "ledger" / "done" / ledger.marker_name(index)).unlink()
    receipts(run([resumed.whole(missing=first)], mirrored))
    assert sums_of(resumed) == sums_of(once)


def test_labels_are_those_of_the_plain_sums(study: Stored, tmp_path: Path) -> None:
    """What is added for uncertainty changes no bit of what the argmax sees."""
    network = random_network("resunet", **CONFIG)
    with_sums, without = study.emptied(tmp_path / "with"), study.emptied(tmp_path / "without")
    segmented(with_sums, model_of(network, tile=list(WINDOW)))
    inner = NetworkPredictor(network, runtime())
    plain = Analytic(inner.predict, 3)
    receipts(run([without.whole()], model_of(classes=3, tile=list(WINDOW)), predictor=plain))
    assert np.array_equal(with_sums.labels, without.labels)
    # A model without a network has no probabilities: its markers say nothing of them.
    assert all(sums.uncertainty == {"entropy": None, "disagreement": None} for sums in sums_of(without).values())
    assert all(row["mean_entropy"] is row["disagreement"] is None for row in rows_of(without).values())


# ------------------------------------------------------------------------------------------------------- the formulas


@settings(max_examples=25)
@given(
    classes=st.integers(2, 40), height=st.integers(1, 30), width=st.integers(1, 3000), seed=st.integers(0, 99),
    scale=st.sampled_from([0.01, 1.0, 30.0, 1e4]),
)  # fmt: skip
def test_rows_of_any_size(classes: int, height: int, width: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((classes, height, width), generator=generator) * scale
    weights = torch.rand((height, width), generator=generator) * 5 + 1e-3
    labels = logits.argmax(0)
    found = softmax_entropy(logits * weights, weights, labels).double().numpy()
    expected = shannon(softmax(logits.double().numpy(), axis=0), axis=0) / np.log(classes)
    inside = labels.numpy() > 0
    # Beside rounding of 1e-7 of the largest logit, which is what the stitched sums are known to.
    assert np.allclose(found[inside], expected[inside], atol=1e-5 * max(1, scale))
    assert (found[inside] > -1e-6).all()
    assert (found[inside] < 1 + 1e-6).all()


def test_certain_and_undecided() -> None:
    ones = torch.ones(1, 2)
    labels = torch.ones(1, 2).long()
    logits = torch.tensor([[[0.0, 0.0]], [[0.0, 1e6]], [[0.0, 0.0]]])
    assert softmax_entropy(logits, ones, labels).tolist() == [pytest.approx([1.0, 0.0])]
    assert binary_entropy(torch.tensor([0.0, 1e6, -1e6])).tolist() == pytest.approx([1.0, 0.0, 0.0])


@settings(max_examples=50)
@given(logit=st.floats(-50, 50))
def test_binary_entropy(logit: float) -> None:
    p = expit(logit)
    expected = shannon([p, 1 - p]) / np.log(2)
    assert float(binary_entropy(torch.tensor(logit, dtype=torch.float64))) == pytest.approx(expected, abs=1e-9)


# -------------------------------------------------------------------------------------------------------- whole runs


def test_structures_tell_of_it_and_older_results_say_null(tmp_path: Path) -> None:
    scan(tmp_path / "in/a.nii.gz", 1)
    model = random_model(tmp_path / "model", mirror_axes=[2])

    def segment(out: str, **job: Any) -> Summary:
        return pipeline.segment(tmp_path / "in", model, tmp_path / out, threads=1, **job)

    (entry,) = segment("out").studies
    assert entry["structures"] == table(tmp_path / "out", "structures")
    for row in entry["structures"]:
        assert 0 < row["mean_entropy"] <= 1
        assert 0 < row["disagreement"] <= 1
    (plain,) = segment("plain", mirroring=False).studies
    assert all(row["disagreement"] is None for row in plain["structures"])

    (record,) = (tmp_path / "out/ledger").glob("*/published/a.json")
    older = json.loads(record.read_text())
    for row in older["structures"]:
        del row["mean_entropy"], row["disagreement"]
    record.write_text(json.dumps(older))
    summary = segment("out")
    assert summary.reused == 1
    rows = [*summary.studies[0]["structures"], *table(tmp_path / "out", "structures")]
    assert len(rows) == 4
    assert all(row["mean_entropy"] is row["disagreement"] is None for row in rows)


def test_a_page_shows_what_is_there() -> None:
    rows = [{"label": k, "structure": "s", "mean_entropy": e} for k, e in ((1, 0.12345), (2, None))]
    shown = structures_table([row | {"disagreement": None} for row in rows])
    assert (shown.groups, shown.titles) == ([("uncertainty, 0 to 1", 1)], ["entropy"])
    assert [cells for _, _, cells in shown.rows] == [["0.123"], ["–"]]
