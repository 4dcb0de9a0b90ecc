"""Blocks stitched as nnU-Net's predictor does it, against its formulas over the whole volume."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from block_helpers import grid_over, model_of, nnunet_weights, noise, random_network, receipts, runtime, store_image
from test_blocks_monai import check_labels, segmented

from pipeline.blocks import segment_blocks
from pipeline.grid import Box, Triple, split_shards
from pipeline.stitch import RollingAccumulator, importance
from pipeline.tiling import Tiling
from segmodels.network import Network
from segmodels.predictor import flips, make_predictor

SHAPES: list[Triple] = [(21, 27, 30), (13, 33, 18), (5, 20, 41), (6, 7, 20), (3, 4, 5)]
TILE = (8, 16, 12)


def starts_of(length: int, tile: int) -> list[int]:
    count = int(np.ceil((length - tile) / (tile * 0.5))) + 1
    step = (length - tile) / (count - 1) if count > 1 else 0.0
    return [int(np.round(step * i)) for i in range(count)]


def nnunet_logits(
    voxels: np.ndarray, network: Network, dtype: torch.dtype, mirrored: tuple[int, ...] = (), tile: Triple = TILE
) -> np.ndarray:
    """(K, z, y, x): the whole volume at once, sums and weights in `dtype`. `mirrored`: axes of the volume."""
    grow = [max(t - n, 0) for n, t in zip(voxels.shape, tile, strict=True)]
    low = [g // 2 for g in grow]
    padded = np.pad(voxels, [(a, g - a) for a, g in zip(low, grow, strict=True)])
    image, weights = torch.from_numpy(padded.astype(np.float32))[None, None], nnunet_weights(tile)
    sums = torch.zeros((network.classes, *padded.shape), dtype=dtype)
    counts = torch.zeros(padded.shape, dtype=dtype)
    with torch.inference_mode():
        for corner in itertools.product(*(starts_of(n, t) for n, t in zip(padded.shape, tile, strict=True))):
            part = tuple(slice(a, a + n) for a, n in zip(corner, tile, strict=True))
            seen = image[(slice(None), slice(None), *part)].contiguous()
            answer = network(seen)[0]
            for axes in flips([axis + 1 for axis in mirrored])[1:]:
                answer += network(seen.flip([axis + 1 for axis in axes]).contiguous())[0].flip(axes)
            answer /= 2 ** len(mirrored)
            answer *= weights
            sums[(slice(None), *part)] += answer
            counts[part] += weights
        sums = torch.div(sums, counts, out=sums)
    return sums[(slice(None), *(slice(a, a + n) for a, n in zip(low, voxels.shape, strict=True)))].float().numpy()


@pytest.mark.parametrize("shape", SHAPES)
def test_labels_are_nnunets(tmp_path: Path, shape: Triple) -> None:
    net, voxels = random_network("resunet", dims=3, classes=3, widths=[4, 8]), noise(shape, seed=8)
    found = segmented(tmp_path, voxels, net, TILE, stitch="nnunet")
    logits = nnunet_logits(voxels, net, torch.float32)
    if min(shape) > 5:
        check_labels(found, logits)
    assert (found == logits.argmax(axis=0)).mean() > 0.999


@pytest.mark.parametrize("shape", SHAPES)
def test_in_half_precision_they_are_nnunets_to_the_bit(tmp_path: Path, shape: Triple) -> None:
    """Ties and all: single tiles' corners, where weights of 2^-24 leave whole numbers, are in these shapes."""
    net, voxels = random_network("unet", dims=3, classes=4, widths=[4, 8]), noise(shape, seed=5)
    found = segmented(tmp_path, voxels, net, TILE, stitch="nnunet-fp16")
    assert np.array_equal(found, nnunet_logits(voxels, net, torch.float16).argmax(axis=0))


def test_mirrored_in_half_precision(tmp_path: Path) -> None:
    net, voxels, tile = random_network("resunet", dims=3, classes=3, widths=[4, 8]), noise((17, 20, 19)), (8, 16, 16)
    model = model_of(net, tile=list(tile), mirror_axes=[0, 2])
    stored = store_image(tmp_path, voxels, tile, stitch="nnunet-fp16")
    predictor = make_predictor(model, runtime())
    receipts(list(segment_blocks([stored.whole()], model, predictor, runtime())))
    # Ours takes the mean of mirrored answers by one sum too, and divides it once: the same roundings.
    assert np.array_equal(stored.labels, nnunet_logits(voxels, net, torch.float16, (0, 2), tile).argmax(axis=0))


def test_sums_in_half_precision_are_nnunets_to_the_bit() -> None:
    shape, tile = (20, 18, 30), (8, 10, 12)
    grid, weights = grid_over(shape, Tiling(tile, stitch="nnunet-fp16")), torch.from_numpy(importance(tile, "nnunet"))
    generator = torch.Generator().manual_seed(2)
    rolling = RollingAccumulator(Box((0, 0, 0), shape), 2, weights, weighed=True, half=True)
    sums, counts = torch.zeros((2, *shape), dtype=torch.float16), torch.zeros(shape, dtype=torch.float16)
    rows: list[torch.Tensor] = []
    for box in grid.tiles_over(Box((0, 0, 0), shape)):
        logits = torch.randn((2, *tile), generator=generator) * 20
        answer = logits * nnunet_weights(tile)
        sums[(slice(None), *box.slices)] += answer
        counts[box.slices] += nnunet_weights(tile)
        rows += [row.clone() for _, row in rolling.roll(box.start[0])]
        rolling.add(box, box, logits)
    rows += [row.clone() for _, row in rolling.roll(shape[0])]
    assert torch.equal(torch.stack(rows, dim=1), torch.cat([sums, counts[None]]))


def test_the_answer_is_one_whatever_the_blocks_are(tmp_path: Path) -> None:
    net, voxels = random_network("resunet", dims=3, classes=3, widths=[4, 8]), noise((21, 27, 30))
    model = model_of(net, tile=list(TILE))
    predictor = make_predictor(model, runtime())
    for stitch in ("nnunet", "nnunet-fp16"):
        whole = store_image(tmp_path / stitch, voxels, TILE, stitch=stitch)
        receipts(list(segment_blocks([whole.whole()], model, predictor, runtime())))
        for parts in ((3, 1, 1), (1, 4, 1), (2, 2, 4)):
            cut = whole.emptied(tmp_path / f"{stitch}-{parts}")
            tasks = cut.tasks(split_shards(cut.shards, parts))
            receipts(list(segment_blocks(tasks, model, predictor, runtime())))
            assert np.array_equal(cut.labels, whole.labels)


def test_sums_too_large_for_half_precision_make_no_mask(tmp_path: Path) -> None:
    net, voxels = random_network("resunet", dims=3, classes=3, widths=[4, 8]), noise((9, 16, 12))
    with torch.no_grad():
        net.head.weight *= 1e5  # type: ignore[operator, union-attr]
    stored = store_image(tmp_path, voxels, TILE, stitch="nnunet-fp16")
    model = model_of(net, tile=list(TILE))
    (outcome,) = segment_blocks([stored.whole()], model, make_predictor(model, runtime()), runtime())
    assert outcome.cause == "model"  # type: ignore[union-attr]
    assert "too large for half precision" in outcome.message  # type: ignore[union-attr]
    assert stored.marked() == set()
