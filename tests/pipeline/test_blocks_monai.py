"""Blocks against MONAI's sliding window, against formulas, and against networks without padding."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from block_helpers import (
    Analytic,
    grid_over,
    margin_of,
    model_of,
    noise,
    random_network,
    receipts,
    runtime,
    store_image,
)
from monai.inferers import sliding_window_inference

from pipeline.blocks import segment_blocks
from pipeline.grid import Box, Triple, split_shards
from pipeline.stitch import importance
from pipeline.tiling import Tiling
from segmodels.network import Network
from segmodels.predictor import make_predictor

CLOSE = 1e-4  # where the best two classes are nearer than this, rounding may decide


def monai_logits(voxels: np.ndarray, network: Network, tile: tuple[int, ...], overlap: float, mode: str) -> np.ndarray:
    """(K, z, y, x) by MONAI, of voxels (c, z, y, x); a 2-D network sees one plane at a time."""

    def plane(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = network(x.squeeze(2))
        return y.unsqueeze(2)

    with torch.inference_mode():
        logits = sliding_window_inference(
            torch.from_numpy(voxels.astype(np.float32))[None], tile, 1, plane if network.dims == 2 else network,
            overlap=overlap, mode=mode, padding_mode="constant", cval=0.0,
        )  # fmt: skip
    return logits[0].numpy()


def check_labels(found: np.ndarray, logits: np.ndarray, activation: str = "softmax") -> None:
    """Labels are those of the logits wherever rounding cannot decide, which is nearly everywhere."""
    if activation == "softmax":
        expected, clear = logits.argmax(axis=0), margin_of(logits) > CLOSE
    else:  # later labels over earlier ones
        expected = np.zeros(logits.shape[1:], np.int64)
        for i, channel in enumerate(logits):
            expected[channel > 0] = i + 1
        clear = (np.abs(logits) > CLOSE).all(axis=0)
    assert clear.mean() > 0.99
    assert len(np.unique(expected)) > 1
    assert np.array_equal(found[clear], expected[clear])


def segmented(folder: Path, voxels: np.ndarray, network: Network, window: Triple, **facts: Any) -> np.ndarray:
    """Labels (z, y, x) by blocks, of voxels (c, z, y, x) or (z, y, x), in 2 x 2 x 2 blocks where there are as many."""
    stitching = {name: facts.pop(name) for name in ("overlap", "stitch", "divisor", "halo") if name in facts}
    model = model_of(network, tile=list(window[-network.dims :]), **facts)
    predictor = make_predictor(model, runtime())
    stored = store_image(folder, voxels, window, margin=predictor.margin, **stitching)
    parts = tuple(min(2, n) for n in stored.shards.counts)
    tasks = stored.tasks(split_shards(stored.shards, parts))
    for task in tasks:
        receipts(list(segment_blocks([task], model, predictor, runtime())))
    assert stored.marked() == set(stored.shards.indices())
    return stored.labels


NETWORKS: dict[str, dict[str, Any]] = {
    "resunet": {"name": "resunet", "dims": 3, "classes": 3, "widths": [4, 8]},
    "unet": {"name": "unet", "dims": 3, "classes": 4, "widths": [4, 8]},
    "instance": {"name": "unet", "dims": 3, "classes": 3, "widths": [4, 8], "norm": "instance"},
}


@pytest.mark.parametrize("mode", ["gaussian", "constant"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("shape", "overlap"), [((21, 27, 30), 0.5), ((13, 33, 18), 0.25)])
def test_labels_are_monais(tmp_path: Path, shape: Triple, overlap: float, network: str, mode: str) -> None:
    net, voxels, tile = random_network(**NETWORKS[network]), noise(shape), (8, 16, 12)
    found = segmented(tmp_path, voxels, net, tile, overlap=overlap, stitch=mode)
    check_labels(found, monai_logits(voxels[None], net, tile, overlap, mode))


ONE_AXIS, TWO_AXES, ALL_AXES = (
    [(5, 20, 20), (20, 9, 20), (20, 20, 11)],
    [(6, 7, 20), (5, 20, 7), (20, 5, 6)],
    [(3, 4, 5), (1, 15, 16), (1, 1, 1)],
)


@pytest.mark.parametrize("shape", ONE_AXIS + TWO_AXES + ALL_AXES)
def test_a_volume_smaller_than_the_tile_is_centred_as_monai_does(tmp_path: Path, shape: Triple) -> None:
    net, voxels, tile = random_network(**NETWORKS["resunet"]), noise(shape, seed=8), (8, 16, 16)
    found = segmented(tmp_path, voxels, net, tile)
    logits = monai_logits(voxels[None], net, tile, 0.5, "gaussian")
    clear = margin_of(logits) > CLOSE
    assert np.array_equal(found[clear], logits.argmax(axis=0)[clear])


@pytest.mark.parametrize("shape", [(3, 37, 29), (1, 17, 40), (9, 12, 33)])
def test_a_2d_model_goes_over_a_volume_plane_by_plane(tmp_path: Path, shape: Triple) -> None:
    net = random_network("unet", dims=2, classes=3, widths=[4, 8])
    voxels = noise(shape)
    found = segmented(tmp_path, voxels, net, (1, 16, 16))
    check_labels(found, monai_logits(voxels[None], net, (1, 16, 16), 0.5, "gaussian"))


def test_channels_are_normalised_each_for_itself(tmp_path: Path) -> None:
    net = random_network("resunet", dims=3, in_channels=2, classes=3, widths=[4, 8])
    voxels = np.stack([noise((15, 21, 18), 1) * 50 + 1000, noise((15, 21, 18), 2) * 3]).astype(np.int16)
    entries = [{"kind": "zscore"}, {"kind": "scale", "from": [-20.0, 20.0], "to": [-1.0, 1.0]}]
    found = segmented(tmp_path, voxels, net, (8, 16, 16), normalize=entries)
    wide = voxels.astype(np.float64)
    seen = np.stack([(wide[0] - wide[0].mean()) / wide[0].std(), wide[1] / 20])
    check_labels(found, monai_logits(seen, net, (8, 16, 16), 0.5, "gaussian"))


def test_sigmoid_channels_paint_labels_in_order(tmp_path: Path) -> None:
    net, voxels = random_network("unet", dims=3, classes=3, widths=[4, 8], seed=11), noise((17, 19, 23))
    found = segmented(tmp_path, voxels, net, (8, 16, 16), activation="sigmoid")
    check_labels(found, monai_logits(voxels[None], net, (8, 16, 16), 0.5, "gaussian"), "sigmoid")


def test_sigmoid_labels_may_have_any_value(tmp_path: Path) -> None:
    net, voxels = random_network("unet", dims=3, classes=3, widths=[4, 8], seed=11), noise((9, 16, 16))
    names = {"7": {"name": "a"}, "2": {"name": "b"}, "200": {"name": "c"}}
    found = segmented(tmp_path / "any", voxels, net, (8, 16, 16), activation="sigmoid", labels=names)
    plain = segmented(tmp_path / "plain", voxels, net, (8, 16, 16), activation="sigmoid")
    assert np.array_equal(found, np.array([0, 7, 2, 200])[plain])


def test_each_logit_stands_where_its_tile_was(tmp_path: Path) -> None:
    """Logits of the place in the study and of the place in the tile: a wrong axis, weight or origin shows."""
    shape, tile, classes = (22, 19, 26), (8, 10, 12), 5
    where = np.stack(np.meshgrid(*[np.arange(1, n + 1) for n in shape], indexing="ij")).astype(np.float32)
    rng = np.random.default_rng(4)
    of_place, of_tile = rng.uniform(-0.7, 0.7, (2, classes, 3))
    inside = np.stack(np.meshgrid(*[np.arange(n) for n in tile], indexing="ij")).astype(np.float64)

    def answer(position: np.ndarray) -> np.ndarray:
        """(3, z, y, x) positions of a tile's voxels -> (K, z, y, x)."""
        phase = np.tensordot(of_place, position, 1) + np.tensordot(of_tile, inside, 1)
        return np.cos(phase) + 0.3 * np.cos(3 * phase)

    def predict(tiles: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.stack([answer(t.double().numpy()) for t in tiles]).astype(np.float32))

    stored = store_image(tmp_path, where, tile)
    model = model_of(classes=classes, channels=3)
    tasks = stored.tasks(split_shards(stored.shards, (3, 2, 2)))
    receipts(list(segment_blocks(tasks, model, Analytic(predict, classes, 3), runtime())))
    logits, total = np.zeros((classes, *shape)), np.zeros(shape)
    weights = importance(tile, "gaussian").astype(np.float64)
    for corner in itertools.product(*grid_over(shape, Tiling(tile, 0.5)).starts):
        part = (slice(None), *(slice(a, a + n) for a, n in zip(corner, tile, strict=True)))
        logits[part] += answer(where[part].astype(np.float64)) * weights
        total[part[1:]] += weights
    check_labels(stored.labels, logits / total)


VALID: dict[str, Any] = {"padding": "valid", "classes": 3, "widths": [4, 8]}


def reflected(voxels: np.ndarray, before: int, after: int, axes: tuple[int, ...] = (0, 1, 2)) -> np.ndarray:
    return np.pad(voxels, [(before, after) if axis in axes else (0, 0) for axis in range(3)], mode="reflect")


def predict_one(network: Network, voxels: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return network(torch.from_numpy(np.ascontiguousarray(voxels))[None, None])[0].numpy()


@pytest.mark.parametrize("shape", [(24, 36, 24), (20, 30, 26)])
def test_an_unpadded_network_is_given_mirrored_context(tmp_path: Path, shape: Triple) -> None:
    """Tiles without overlap at even origins: the same as the network over the whole mirrored volume."""
    net, voxels = random_network("unet", dims=3, **VALID), noise(shape)
    margin = net.margin
    found = segmented(tmp_path, voxels, net, (28, 28, 28), overlap=0.0, stitch="constant")
    grown = [net.legal_size(n + 2 * margin) - n - 2 * margin for n in shape]
    whole = np.pad(voxels, [(margin, margin + g) for g in grown], mode="reflect")
    logits = predict_one(net, whole)[(slice(None), *(slice(0, n) for n in shape))]
    aligned = tuple(slice(0, n // 12 * 12) for n in shape)  # the last tile is moved back, perhaps by an odd number
    check_labels(found[aligned], logits[(slice(None), *aligned)])


@pytest.mark.parametrize("shape", [(21, 25, 19), (7, 30, 20), (3, 2, 9), (1, 21, 5)])
@pytest.mark.parametrize("mode", ["gaussian", "constant"])
def test_unpadded_tiles_overlap_and_reach_past_any_border(tmp_path: Path, shape: Triple, mode: str) -> None:
    net, voxels, window = random_network("unet", dims=3, **VALID), noise(shape, seed=2), (28, 32, 24)
    found = segmented(tmp_path, voxels, net, window, stitch=mode)
    far = 64
    whole = reflected(voxels, far, far)
    grid = grid_over(shape, Tiling(window, 0.5, (net.margin,) * 3))
    logits, weights = np.zeros((3, *whole.shape)), importance(grid.tile, mode).astype(np.float64)
    total = np.zeros(whole.shape)
    for tile in grid.tiles_over(Box((0, 0, 0), shape)):
        there = tile.shift((far, far, far))
        logits[(slice(None), *there.slices)] += predict_one(net, whole[there.grow((net.margin,) * 3).slices]) * weights
        total[there.slices] += weights
    inside = tuple(slice(far, far + n) for n in shape)
    inner = logits[(slice(None), *inside)] / total[inside]
    clear = margin_of(inner) > CLOSE
    assert np.array_equal(found[clear], inner.argmax(axis=0)[clear])


def test_an_unpadded_2d_network(tmp_path: Path) -> None:
    net, voxels = random_network("unet", dims=2, **VALID), noise((3, 24, 36))
    found = segmented(tmp_path, voxels, net, (1, 28, 28), overlap=0.0, stitch="constant")
    whole = reflected(voxels, net.margin, net.margin, axes=(1, 2))
    with torch.inference_mode():
        logits = net(torch.from_numpy(whole)[:, None]).permute(1, 0, 2, 3).numpy()
    check_labels(found, logits)
