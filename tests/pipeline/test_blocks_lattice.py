"""Blocks of models with a spacing or an orientation of their own, against all of it turned and resampled at once."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from block_helpers import margin_of, model_of, noise, random_network, receipts, runtime, store_image
from monai.inferers import sliding_window_inference
from scipy.ndimage import zoom
from scipy.special import softmax
from scipy.stats import entropy

from pipeline import ledger
from pipeline.blocks import segment_blocks
from pipeline.grid import Triple, split_shards
from pipeline.lattice import Lattice, View, lattice_of
from pipeline.metrics.structures import merge_shards
from segmodels import Model
from segmodels.network import Network
from segmodels.predictor import make_predictor

CLOSE = 1e-4  # where the best two classes are nearer than this, rounding may decide
WINDOW: Triple = (8, 16, 12)


def resized(volume: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    """(c, z, y, x) by SciPy; an axis of order 0 is told by the caller, who resizes it by itself."""
    ratios = [m / n for n, m in zip(volume.shape[1:], shape, strict=True)]
    return np.stack([zoom(channel, ratios, order=order, mode="nearest", grid_mode=True) for channel in volume])


def oracle(voxels: np.ndarray, network: Network, lattice: Lattice, window: Triple) -> np.ndarray:
    """Logits (K, z, y, x): all voxels (c, z, y, x) resampled and turned at once, MONAI's window, all logits back."""
    cells = voxels.astype(np.float64)
    for axis, order in enumerate(lattice.orders):
        shape = list(cells.shape[1:])
        shape[axis] = lattice.cells[axis]
        cells = resized(cells, tuple(shape), order)
    seen = np.ascontiguousarray(lattice.view.turned(cells)).astype(np.float32)

    def plane(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = network(x.squeeze(2))
        return y.unsqueeze(2)

    with torch.inference_mode():
        logits = sliding_window_inference(
            torch.from_numpy(seen)[None], window, 1, plane if network.dims == 2 else network, overlap=0.5,
            mode="gaussian", padding_mode="constant", cval=0.0,
        )  # fmt: skip
    back = lattice.view.turned_back(logits[0]).numpy().astype(np.float64)
    for axis, nearest in enumerate(lattice.nearest):
        shape = list(back.shape[1:])
        shape[axis] = lattice.voxels[axis]
        back = resized(back, tuple(shape), 0 if nearest else 1)
    return back


def segmented(
    folder: Path, voxels: np.ndarray, model: Model, lattice: Lattice, parts: Triple = (2, 2, 2)
) -> np.ndarray:
    predictor = make_predictor(model, runtime())
    window = (*(1,) * (3 - len(model.card.tile)), *model.card.tile)
    stored = store_image(folder, voxels, window, lattice=lattice, margin=predictor.margin)
    parts = tuple(min(n, p) for n, p in zip(stored.shards.counts, parts, strict=True))  # type: ignore[assignment]
    for task in reversed(stored.tasks(split_shards(stored.shards, parts))):
        receipts(list(segment_blocks([task], model, predictor, runtime())))
    assert stored.marked() == set(stored.shards.indices())
    return stored.labels


def check(found: np.ndarray, logits: np.ndarray, activation: str = "softmax") -> None:
    if activation == "softmax":
        expected, clear = logits.argmax(0), margin_of(logits) > CLOSE
    else:
        expected = np.zeros(logits.shape[1:], np.int64)
        for i, channel in enumerate(logits):
            expected[channel > 0] = i + 1
        clear = (np.abs(logits) > CLOSE).all(0)
    assert clear.mean() > 0.99
    assert len(np.unique(expected)) > 1
    assert np.array_equal(found[clear], expected[clear])


CASES: dict[str, dict[str, Any]] = {
    "finer": {"spacing": (1.0, 1.0, 1.0), "wanted": [0.7, 0.6, 0.8]},
    "coarser": {"spacing": (0.5, 0.6, 0.7), "wanted": [1.1, 0.9, 1.0]},
    "linear": {"spacing": (1.0, 0.9, 1.0), "wanted": [0.8, 1.3, 0.8], "resampling_order": 1},
    "coarse study": {"spacing": (4.0, 0.8, 1.0), "wanted": [1.0, 1.0, 1.0]},
    "coarse cells": {"spacing": (1.2, 1.0, 1.0), "wanted": [4.0, 1.0, 1.0]},
    "turned": {"spacing": (1.0, 0.9, 1.1), "code": "PIR", "orientation": "LPS"},
    "turned and finer": {"spacing": (1.0, 0.9, 1.1), "code": "ILA", "orientation": "RAS", "wanted": [0.8, 0.7, 1.1]},
    "regions": {"spacing": (1.0, 1.0, 1.0), "wanted": [0.7, 0.6, 0.8], "activation": "sigmoid"},
}


def affine_of(spacing_zyx: tuple[float, ...], code: str = "RAS") -> np.ndarray:
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(code))
    straight = nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4))
    return straight.as_reoriented(turn).affine @ np.diag([*spacing_zyx[::-1], 1.0])


@pytest.mark.parametrize("case", CASES)
def test_labels_are_those_of_everything_resampled(tmp_path: Path, case: str) -> None:
    facts = dict(CASES[case])
    affine = affine_of(facts.pop("spacing"), facts.pop("code", "RAS"))
    if "wanted" in facts:
        facts["spacing_mm"] = facts.pop("wanted")
    network = random_network("resunet", dims=3, in_channels=2, classes=3, widths=[4, 8])
    voxels = np.stack([noise((17, 29, 22), seed) for seed in (3, 4)])
    model = model_of(network, tile=list(WINDOW), **facts)
    lattice = lattice_of((17, 29, 22), affine, model.card)
    assert lattice.resampled == ("spacing_mm" in facts)
    found = segmented(tmp_path, voxels, model, lattice)
    check(found, oracle(voxels, network, lattice, WINDOW), facts.get("activation", "softmax"))


@pytest.mark.parametrize("code", ["RAS", "ASR", "RSA", "LIP"])
def test_a_2d_network_goes_over_a_volume_along_any_axis(tmp_path: Path, code: str) -> None:
    network = random_network("unet", dims=2, classes=3, widths=[4, 8])
    model = model_of(network, tile=[16, 12], orientation=code, spacing_mm=[0.9, 1.1])
    voxels = noise((17, 29, 22))
    lattice = lattice_of((17, 29, 22), np.eye(4), model.card)
    across = {"RAS": 0, "ASR": 2, "RSA": 1, "LIP": 1}[code]
    assert lattice.view.axes[0] == across
    assert lattice.cells[across] == lattice.voxels[across]
    check(segmented(tmp_path, voxels, model, lattice), oracle(voxels[None], network, lattice, (1, 16, 12)))


def test_a_study_stored_another_way_has_the_same_labels(tmp_path: Path) -> None:
    """Whole numbers of cells a voxel, so that turning moves no cell: what is left is the order of a few sums."""
    network = random_network("resunet", dims=3, classes=3, widths=[4, 8])
    model = model_of(network, tile=list(WINDOW), orientation="RAS", spacing_mm=[0.5, 1.0, 1.0])
    voxels = noise((13, 24, 21))
    plain = lattice_of((13, 24, 21), np.eye(4), model.card)
    expected = segmented(tmp_path / "RAS", voxels, model, plain)
    for code in ("LPI", "SAR", "PIL"):
        turn = nib.orientations.axcodes2ornt(code)
        image = nib.Nifti1Image(voxels.T, np.eye(4)).as_reoriented(
            nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), turn)
        )
        other = np.ascontiguousarray(np.asarray(image.dataobj).T)
        lattice = lattice_of(other.shape, image.affine, model.card)  # type: ignore[arg-type]
        assert lattice.view != View()
        found = segmented(tmp_path / code, other, model, lattice)
        back = nib.Nifti1Image(found.T, image.affine).as_reoriented(
            nib.orientations.ornt_transform(turn, nib.orientations.axcodes2ornt("RAS"))
        )
        assert (expected != np.asarray(back.dataobj).T).mean() < 1e-4


@pytest.mark.parametrize(("stitch", "facts"), [
    ("constant", {}), ("nnunet", {}), ("exact", {"divisor": (2, 2, 2), "halo": (10, 10, 10)}),
])  # fmt: skip
def test_every_way_to_stitch_turns_with_the_study(tmp_path: Path, stitch: str, facts: dict[str, Any]) -> None:
    """Of a study stored another way each voxel has the same label: tiles lie as they would on the turned study."""
    network = random_network("resunet", dims=3, classes=3, widths=[4, 8])
    window: Triple = (24, 24, 28) if stitch == "exact" else WINDOW
    voxels = noise((27, 30, 33))
    turn = View((1, 2, 0), (True, False, True))  # the network sees y, x, z of what is stored
    model = model_of(network, tile=list(window))
    other = turn.turned(voxels)
    labels = []
    for name, seen, lattice in (
        ("turned", voxels, Lattice(voxels.shape, (18, 40, 25), turn, (3, 3, 3))),
        ("plain", np.ascontiguousarray(other), Lattice(other.shape, turn.seen((18, 40, 25)), View(), (3, 3, 3))),
    ):
        stored = store_image(tmp_path / name, seen, window, lattice=lattice, stitch=stitch, **facts)
        receipts(list(segment_blocks([stored.whole()], model, make_predictor(model, runtime()), runtime())))
        labels.append(stored.labels)
    assert len(np.unique(labels[1])) > 1
    assert (turn.turned(labels[0]) != labels[1]).mean() < 1e-4


def test_uncertainty_is_that_of_the_voxels(tmp_path: Path) -> None:
    network = random_network("resunet", dims=3, classes=3, widths=[4, 8])
    model = model_of(network, tile=list(WINDOW), spacing_mm=[0.7, 0.6, 0.8])
    voxels = noise((17, 29, 22))
    lattice = lattice_of((17, 29, 22), np.eye(4), model.card)
    stored = store_image(tmp_path, voxels, WINDOW, lattice=lattice)
    receipts(list(segment_blocks([stored.whole()], model, make_predictor(model, runtime()), runtime())))
    sums = merge_shards(ledger.markers(str(tmp_path / "ledger"), runtime().hash).values())
    of_voxels = entropy(softmax(oracle(voxels[None], network, lattice, WINDOW), axis=0), axis=0) / np.log(3)
    assert len(sums) == 2
    for label, found in sums.items():
        assert found.uncertainty["entropy"] == pytest.approx(of_voxels[stored.labels == label].sum(), rel=1e-4)


def test_any_partition_has_the_same_bits(tmp_path: Path) -> None:
    network = random_network("resunet", dims=3, classes=4, widths=[4, 8])
    model = model_of(network, tile=list(WINDOW), orientation="LPS", spacing_mm=[1.3, 0.8, 0.9])
    voxels = noise((25, 29, 18))
    lattice = lattice_of((25, 29, 18), affine_of((1.0, 1.0, 1.0), "ARI"), model.card)
    whole = segmented(tmp_path / "whole", voxels, model, lattice, (1, 1, 1))
    assert len(np.unique(whole)) >= 3
    for parts in itertools.product((1, 2, 4), (1, 3), (1, 3)):
        found = segmented(tmp_path / "-".join(map(str, parts)), voxels, model, lattice, parts)
        assert np.array_equal(found, whole), parts
