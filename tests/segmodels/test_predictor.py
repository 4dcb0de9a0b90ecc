"""The runtime and the predictors: the same bits under one runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import ARCHITECTURES, small_network

import segmodels
from segmodels import ModelError
from segmodels.predictor import NetworkPredictor, Predictor, make_predictor
from segmodels.runtime import Runtime, resolve_runtime, usable_cores


def runtime(precision: str = "fp32", threads: int = 1, batch: int = 1) -> Runtime:
    return Runtime("cpu", "torch", precision, threads, batch, (("torch", torch.__version__),))


def test_resolving(folder: Path) -> None:
    model = segmodels.load(folder)
    found = resolve_runtime(model)
    cuda = torch.cuda.is_available()
    assert found.device == ("cuda" if cuda else "cpu")
    assert found.batch == (4 if cuda else 1)
    assert (found.backend, found.precision, found.threads) == ("torch", "fp32", usable_cores())
    assert dict(found.versions)["torch"] == torch.__version__
    assert "maskmill" in dict(found.versions)
    other = resolve_runtime(model, precision="bf16", threads=3, batch=5)
    assert (other.precision, other.threads, other.batch) == ("bf16", 3, 5)
    assert found.hash != other.hash
    assert len(found.hash) == 16
    assert resolve_runtime(segmodels.load("kmeans"), precision="bf16").precision == "fp32"


def test_a_runtime_survives_json() -> None:
    first = runtime()
    again = Runtime.from_json(json.loads(json.dumps(first.to_json())))
    assert again == first
    assert again.hash == first.hash
    for broken in ({}, {"device": "cpu"}, first.to_json() | {"colour": 1}):
        with pytest.raises(ModelError, match="not a runtime"):
            Runtime.from_json(broken)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp23"}, "precision 'fp23' is unknown. Did you mean 'fp32'"),
        ({"threads": 0}, "threads must be a whole number from 1"),
        ({"threads": 1.5}, "threads"),
        ({"batch": -1}, "batch must be a whole number from 1"),
        ({"batch": True}, "batch"),
    ],
    ids=range(5),
)
def test_settings_out_of_range(folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        resolve_runtime(segmodels.load(folder), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_runtime_of_another_machine(folder: Path) -> None:
    with pytest.raises(ModelError, match="resolved for a GPU"):
        make_predictor(segmodels.load(folder), Runtime("cuda", "torch", "fp32", 1, 1, ()))
    with pytest.raises(ModelError, match="backend 'tensorrt'"):
        make_predictor(segmodels.load(folder), Runtime("cpu", "tensorrt", "fp32", 1, 1, ()))


def test_logits_of_a_folder(folder: Path) -> None:
    model = segmodels.load(folder)
    predictor: Predictor = make_predictor(model, runtime(threads=2))
    assert (predictor.channels, predictor.classes, predictor.margin) == (1, 3, (0, 0, 0))
    assert predictor.fit(None) is predictor  # type: ignore[arg-type]
    x = torch.randn(1, 1, 9, 10, 11)
    y = predictor.predict(x)
    assert torch.get_num_threads() == 2
    assert (y.shape, y.dtype, y.requires_grad) == ((1, 3, 9, 10, 11), torch.float32, False)
    assert model.network is not None
    with torch.no_grad():
        assert torch.equal(y, model.network(x))
    assert torch.equal(y, predictor.predict(x.double()))
    assert torch.equal(y, predictor.predict(x.transpose(2, 4).contiguous().transpose(2, 4)))


def test_a_2d_network_sees_planes() -> None:
    network = small_network("unet", dims=2, in_channels=2, classes=3, widths=[2, 2, 2], padding="valid", norm="none")
    predictor = NetworkPredictor(network, runtime(batch=2))
    assert predictor.margin == (0, 20, 20)
    x = torch.randn(2, 2, 1, 44, 48)
    y = predictor.predict(x)
    assert y.shape == (2, 3, 1, 4, 8)
    with torch.no_grad():
        assert torch.equal(y[:, :, 0], network(x[:, :, 0]))
    for wrong in (torch.zeros(1, 2, 3, 44, 44), torch.zeros(1, 1, 1, 44, 44), torch.zeros(1, 2, 44, 44)):
        with pytest.raises(ModelError, match=r"expected \(N, 2, 1, Y, X\)"):
            predictor.predict(wrong)


@pytest.mark.parametrize("norm", ["batch", "instance", "group", "none"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_tile_has_the_same_bits_wherever_it_stands(name: str, dims: int, norm: str) -> None:
    # The experiment behind guarantee 1. Done once at length (widths to 128, fp32 and bf16, 1 and 2 threads,
    # even and odd tiles) and kept here in small: with the batch and the threads fixed, nothing else enters.
    network = small_network(name, dims=dims, classes=3, widths=[8, 16, 32], norm=norm)
    size = (1, 37, 24) if dims == 2 else (9, 12, 11)
    for precision in ("fp32", "bf16"):
        for threads in (1, 2):
            predictor = NetworkPredictor(network, runtime(precision, threads, batch=4))
            tile = torch.randn(1, 1, *size)
            alone = predictor.predict(tile)
            assert alone.shape[0] == 1
            assert torch.isfinite(alone).all()
            others = torch.randn(7, 1, *size) * 10
            for place in (0, 3, 5):
                batch = others.clone()
                batch[place] = tile[0]
                assert torch.equal(predictor.predict(batch)[place], alone[0])


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.1), ("fp16", 0.02)])
def test_low_precision_is_near_and_comes_back_as_float32(precision: str, tolerance: float) -> None:
    network = small_network("resunet", dims=3, classes=3, widths=[4, 8])
    x = torch.randn(1, 1, 8, 8, 8)
    exact = NetworkPredictor(network, runtime()).predict(x)
    rough = NetworkPredictor(network, runtime(precision)).predict(x)
    assert rough.dtype == torch.float32
    difference = (rough - exact).abs().max()
    assert 0 < difference < tolerance * exact.abs().max()


def test_batches_are_filled_up_and_long_ones_split() -> None:
    network = small_network("resunet", dims=3, classes=2, widths=[4, 8])
    seen: list[int] = []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    predictor = NetworkPredictor(network, runtime(batch=3))
    y = predictor.predict(torch.randn(7, 1, 4, 4, 4))
    assert y.shape == (7, 2, 4, 4, 4)
    assert seen == [3, 3, 3]
