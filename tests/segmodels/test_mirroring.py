"""Predictors that flip their tiles, against flips written out by hand, and what flips and members disagree about."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.transforms import Flip
from scipy.special import expit, softmax
from small_models import small_network

import segmodels
from segmodels.card import parse
from segmodels.network import Network
from segmodels.predictor import NetworkPredictor, flips, make_predictor
from segmodels.runtime import Runtime


def runtime(batch: int = 1, precision: str = "fp32", threads: int = 1) -> Runtime:
    return Runtime("cpu", "torch", precision, threads, batch, (("torch", torch.__version__),))


def by_hand(network: Network, tile: np.ndarray, axes: tuple[int, ...]) -> list[np.ndarray]:
    """Logits (K, *S) of one tile (C, *S) for every subset of its spatial `axes`, flipped by MONAI, flipped back."""
    answers = []
    for keep in itertools.product([False, True], repeat=len(axes)):
        flip = Flip([axis for axis, wanted in zip(axes, keep, strict=True) if wanted])
        with torch.no_grad():
            seen = torch.as_tensor(np.ascontiguousarray(flip(tile)))
            answers.append(np.asarray(flip(network(seen[None])[0])))
    return answers


def affinity(probabilities: list[np.ndarray]) -> np.ndarray:
    """Matusita's, of M distributions over axis 0: sum of the M-th root of their product."""
    return np.prod([p ** (1 / len(probabilities)) for p in probabilities], axis=0).sum(0)


def spatial(network: Network, size: tuple[int, ...]) -> tuple[int, ...]:
    return (1, *size) if network.dims == 2 else size


@pytest.mark.parametrize(
    ("config", "size", "axes"),
    [
        ({"dims": 2}, (9, 14), (0,)),
        ({"dims": 2, "in_channels": 2}, (9, 14), (0, 1)),
        ({"dims": 3}, (7, 10, 9), (2,)),
        ({"dims": 3, "norm": "instance"}, (8, 5, 9), (0, 2)),
        ({"dims": 3}, (6, 10, 9), (0, 1, 2)),
        ({"name": "unet", "dims": 3, "padding": "valid"}, (18, 20, 22), (1, 2)),
    ],
    ids=str,
)
def test_the_mean_over_all_flips(tmp_path: Path, config: dict[str, Any], size: tuple[int, ...], axes: Any) -> None:
    network = small_network(**({"classes": 3, "widths": [4, 6]} | config))
    card = {
        "name": "m", "axes": "zyx"[-len(size) :], "channels": ["a"] * network.in_channels, "tile": list(size),
        "normalize": [{"kind": "none"}], "activation": "softmax", "labels": {"1": {"name": "a"}, "2": {"name": "b"}},
        "mirror_axes": list(reversed(axes)),
    }  # fmt: skip
    segmodels.save(network, card, tmp_path / "m")
    model = segmodels.load(tmp_path / "m")
    predictor = make_predictor(model, runtime())
    tile = torch.randn(1, network.in_channels, *spatial(network, size))
    found = predictor.predict(tile)
    answers = by_hand(network, tile[0].reshape(-1, *size).numpy(), axes)
    assert len(answers) == 2 ** len(axes)
    assert predictor.disagreement
    assert found.shape[1] == 4
    expected = np.mean(answers, axis=0)
    assert np.allclose(found[0, :3].numpy().reshape(expected.shape), expected, atol=1e-5)
    apart = 1 - affinity([softmax(a.astype(np.float64), axis=0) for a in answers])
    assert apart.max() > 1e-3
    assert np.allclose(found[0, 3].numpy().reshape(apart.shape), apart, atol=3e-6)

    plain = make_predictor(model, runtime(), mirroring=False)
    assert not plain.disagreement
    with torch.no_grad():
        single = network(tile.reshape(1, -1, *size))
    assert torch.equal(plain.predict(tile).reshape(single.shape), single)


def test_every_subset_once_the_fewest_first() -> None:
    assert flips([]) == [()]
    assert flips([4, 2]) == [(), (2,), (4,), (2, 4)]
    assert len(set(flips([2, 3, 4]))) == 8


def test_without_a_list_of_axes_nothing_is_flipped(folder: Path) -> None:
    model = segmodels.load(folder)
    assert not make_predictor(model, runtime(), mirroring=True).disagreement


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_mirrored_tile_has_the_same_bits_wherever_it_stands(precision: str, threads: int) -> None:
    network = small_network("resunet", dims=3, classes=3, widths=[8, 16, 32])
    predictor = NetworkPredictor(network, runtime(4, precision, threads), [2, 4])
    tile = torch.randn(1, 1, 9, 12, 11)
    alone = predictor.predict(tile)
    for place in (0, 3, 5):
        batch = torch.randn(7, 1, 9, 12, 11) * 10
        batch[place] = tile[0]
        assert torch.equal(predictor.predict(batch)[place], alone[0])


def test_every_flip_runs_in_whole_batches() -> None:
    network = small_network("resunet", dims=3, classes=2, widths=[4, 8])
    seen: list[tuple[int, ...]] = []
    network.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].shape[0], *inputs[0].stride())))
    NetworkPredictor(network, runtime(3), [2, 3]).predict(torch.randn(4, 1, 4, 6, 8))
    assert seen == [(3, *torch.empty(3, 1, 4, 6, 8).stride())] * 8


@pytest.mark.parametrize("scale", [0.1, 3.0, 300.0])
def test_two_predictions_lie_hellinger_apart(scale: float) -> None:
    from segmodels.predictor import disagreement, log_partition

    a, b = (torch.randn(5, 4, 3, 3) * scale for _ in range(2))
    of_mean = log_partition((a + b) / 2, "softmax")
    apart = disagreement(of_mean, (log_partition(a, "softmax") + log_partition(b, "softmax")) / 2).numpy()
    p, q = (softmax(x.double().numpy(), axis=1) for x in (a, b))
    hellinger = ((np.sqrt(p) - np.sqrt(q)) ** 2).sum(1) / 2
    assert np.allclose(apart, hellinger, atol=1e-6 * max(1, scale))
    assert ((apart >= 0) & (apart <= 1)).all()


def test_of_sigmoid_labels_each_is_a_coin() -> None:
    network = small_network("resunet", dims=3, classes=3, widths=[4, 6])
    predictor = NetworkPredictor(network, runtime(), [3], "sigmoid")
    tile = torch.randn(1, 1, 6, 8, 7)
    coins = [expit(a.astype(np.float64)) for a in by_hand(network, tile[0].numpy(), (1,))]
    together = np.prod([affinity([np.stack([p[k], 1 - p[k]]) for p in coins]) for k in range(3)], axis=0)
    found = predictor.predict(tile)[0, 3].numpy()
    assert found.max() > 1e-3
    assert np.allclose(found, 1 - together, atol=3e-6)


def test_the_cards_axes_are_the_last_of_a_tile() -> None:
    network = small_network("resunet", dims=2, classes=3, widths=[4, 6])
    card = parse({
        "name": "m", "network": {"name": "resunet"}, "axes": "yx", "channels": ["a"], "tile": [8, 8],
        "normalize": [{"kind": "none"}], "activation": "softmax", "labels": {"1": {"name": "a"}, "2": {"name": "b"}},
        "mirror_axes": [1],
    })  # fmt: skip
    predictor = make_predictor(segmodels.Model(network, card, "0", "test"), runtime())
    assert isinstance(predictor, NetworkPredictor)
    assert predictor.flips == [(), (4,)]
