"""Exact stitching: what tiles answer is what one pass over the whole volume would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from block_helpers import margin_of, model_of, noise, random_network, receipts, runtime, store_image
from test_blocks_monai import check_labels, segmented
from torch import nn

from pipeline.blocks import segment_blocks
from pipeline.grid import Triple, split_shards
from segmodels.network import Network
from segmodels.predictor import make_predictor
from segmodels.registry import reach_of

NETWORKS: dict[str, dict[str, Any]] = {
    "resunet": {"name": "resunet", "dims": 3, "classes": 3, "widths": [4, 8]},
    "unet": {"name": "unet", "dims": 3, "classes": 4, "widths": [4, 8]},
    "unet3d": {"name": "unet3d", "dims": 3, "classes": 3, "widths": [4, 8], "seed": 3},
}


def whole_logits(network: Network, voxels: np.ndarray) -> np.ndarray:
    """(K, z, y, x) of one pass over all of it; a 2-D network sees the planes as a batch."""
    seen = torch.from_numpy(voxels)
    with torch.inference_mode():
        if network.dims == 2:
            return network(seen[:, None]).permute(1, 0, 2, 3).numpy()
        return network(seen[None, None])[0].numpy()


def halo_of(network: Network) -> int:
    reach = reach_of(network)
    assert reach is not None
    return reach


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shape", [(37, 41, 53), (30, 61, 29), (9, 70, 33), (3, 4, 5)])
def test_tiles_answer_as_one_pass_over_the_volume(tmp_path: Path, name: str, shape: Triple) -> None:
    net, voxels = random_network(**NETWORKS[name]), noise(shape)
    halo = halo_of(net)
    window = (2 * halo + 4, 2 * halo + 8, 2 * halo + 2)
    exact = {"divisor": (net.divisor,) * 3, "halo": (halo,) * 3}
    found = segmented(tmp_path, voxels, net, window, stitch="exact", **exact)
    logits = whole_logits(net, voxels)
    clear = margin_of(logits) > 1e-4
    assert np.array_equal(found[clear], logits.argmax(axis=0)[clear])
    if min(shape) > 5:
        check_labels(found, logits)


def test_a_2d_network_sees_its_planes_whole(tmp_path: Path) -> None:
    net, voxels = random_network("unet", dims=2, classes=3, widths=[4, 8]), noise((3, 61, 87))
    halo = halo_of(net)
    window, exact = (1, 2 * halo + 4, 2 * halo + 8), {"divisor": (1, 2, 2), "halo": (0, halo, halo)}
    found = segmented(tmp_path, voxels, net, window, stitch="exact", **exact)
    check_labels(found, whole_logits(net, voxels))


@pytest.mark.parametrize("shape", [(24, 36, 24), (21, 31, 26), (5, 40, 33)])
def test_an_unpadded_network_sees_mirrored_context(tmp_path: Path, shape: Triple) -> None:
    net = random_network("unet", dims=3, padding="valid", classes=3, widths=[4, 8])
    voxels, margin = noise(shape), net.margin
    found = segmented(tmp_path, voxels, net, (28, 32, 28), stitch="exact", divisor=(2, 2, 2))
    grown = [net.legal_size(n + 2 * margin) - n - 2 * margin for n in shape]
    whole = np.pad(voxels, [(margin, margin + g) for g in grown], mode="reflect")
    logits = whole_logits(net, whole)[(slice(None), *(slice(0, n) for n in shape))]
    check_labels(found, logits)


def linear(network: Network) -> Network:
    """The network without activations and normalisations, all its weights alike: what a voxel can see it does see."""
    for module in list(network.modules()):
        for key, child in module.named_children():
            if isinstance(child, nn.ReLU | nn.BatchNorm3d | nn.Identity):
                setattr(module, key, nn.Identity())
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.fill_(0 if name.endswith("bias") else 1 / parameter[0].numel())
    return network


def test_a_halo_one_step_short_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = linear(random_network("resunet", dims=3, classes=2, widths=[2, 3, 4], norm="none"))
    halo, divisor = halo_of(net), net.divisor
    voxels = np.zeros((4, 4, 120), np.float32)
    voxels[..., [30, 77]] = 1  # what sees one of them is above 0

    def found(halo: int, name: str) -> np.ndarray:
        """The logits of a row of tiles."""
        stored = store_image(
            tmp_path / name, voxels, (4, 4, 2 * halo + divisor), stitch="exact", image_shard=(8, 16, 16),
            divisor=(divisor,) * 3, halo=(0, 0, halo),
        )  # fmt: skip
        seen: list[np.ndarray] = []

        def look(sums: torch.Tensor, card: Any) -> torch.Tensor:
            seen.append(sums.numpy().copy())
            return sums.argmax(dim=0)

        monkeypatch.setattr("pipeline.blocks.label_row", look)
        model = model_of(net, tile=[4, 4, 2 * halo + divisor])
        receipts(list(segment_blocks([stored.whole()], model, make_predictor(model, runtime()), runtime())))
        return np.stack(seen, axis=1)

    whole = whole_logits(net, voxels)
    np.testing.assert_allclose(found(halo, "enough"), whole, rtol=1e-5)
    missed = (found(halo - divisor, "short") == 0) & (whole > 0)
    assert missed.any()


def test_each_flip_is_one_pass_over_the_study_grown_to_the_grid(tmp_path: Path) -> None:
    net, voxels = random_network(**NETWORKS["resunet"]), noise((31, 29, 53))
    halo = halo_of(net)
    window = (2 * halo + 4,) * 3
    model = model_of(net, tile=list(window), mirror_axes=[0, 2])
    predictor = make_predictor(model, runtime())
    stored = store_image(tmp_path, voxels, window, stitch="exact", divisor=(2, 2, 2), halo=(halo,) * 3)
    receipts(list(segment_blocks([stored.whole()], model, predictor, runtime())))
    grown = np.pad(voxels, [(0, -n % 2) for n in voxels.shape], mode="edge")
    logits = predictor.predict(torch.from_numpy(grown)[None, None])[0, :-1, :31, :29, :53].numpy()
    check_labels(stored.labels, logits)


def test_the_answer_is_one_whatever_the_blocks_are(tmp_path: Path) -> None:
    net, voxels = random_network(**NETWORKS["resunet"]), noise((37, 41, 53))
    halo = halo_of(net)
    window = (2 * halo + 4,) * 3
    model = model_of(net, tile=list(window))
    predictor = make_predictor(model, runtime())
    whole = store_image(
        tmp_path / "whole", voxels, window, stitch="exact", divisor=(net.divisor,) * 3, halo=(halo,) * 3
    )
    receipts(list(segment_blocks([whole.whole()], model, predictor, runtime())))
    for parts in ((5, 1, 1), (1, 3, 2), (2, 6, 7)):
        cut = whole.emptied(tmp_path / f"{parts}")
        receipts(list(segment_blocks(cut.tasks(split_shards(cut.shards, parts)), model, predictor, runtime())))
        assert np.array_equal(cut.labels, whole.labels)


def test_studies_of_other_sizes_do_not_share_a_batch(tmp_path: Path) -> None:
    """Small studies are tiles of their own size."""
    net = random_network(**NETWORKS["resunet"])
    halo, stored = halo_of(net), []
    for i, shape in enumerate([(9, 12, 10), (20, 11, 8), (9, 12, 10)]):
        stored.append(
            store_image(
                tmp_path / str(i), noise(shape, seed=i), (44, 44, 44), stitch="exact",
                divisor=(net.divisor,) * 3, halo=(halo,) * 3,
            )
        )  # fmt: skip
    model = model_of(net, tile=[44, 44, 44])
    tasks = [s.whole(key=f"k{i}") for i, s in enumerate(stored)]
    receipts(list(segment_blocks(tasks, model, make_predictor(model, runtime(2)), runtime(2))))
    for i, shape in enumerate([(9, 12, 10), (20, 11, 8), (9, 12, 10)]):
        logits = whole_logits(net, noise(shape, seed=i))
        clear = margin_of(logits) > 1e-4
        assert np.array_equal(stored[i].labels[clear], logits.argmax(axis=0)[clear])
