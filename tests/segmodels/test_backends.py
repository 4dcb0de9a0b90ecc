"""Compiled networks against torch's own, and that their bits depend on nothing but the runtime."""

from __future__ import annotations

import hashlib
import logging
import stat
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CARD, small_network

import segmodels
from segmodels import backends
from segmodels.backends import BACKENDS
from segmodels.errors import ModelError
from segmodels.home import home
from segmodels.network import Network
from segmodels.predictor import NetworkPredictor
from segmodels.runtime import Runtime, frugal, resolve_runtime, runtime_here, versions_of
from segmodels.zoo.ensemble import join

COMPILED = [name for name in BACKENDS if name != "torch"]


def runtime(backend: str = "torch", precision: str = "fp32", batch: int = 1) -> Runtime:
    return Runtime("cpu", backend, precision, 2, batch, versions_of("cpu", backend))


def networks() -> dict[str, tuple[Network, tuple[int, ...]]]:
    """Networks, and a tile of each (z, y, x) that its down-sampling does not divide where padding allows it."""
    return {
        "3-D": (small_network("resunet", dims=3, classes=3, widths=[8, 16, 32]), (13, 22, 18)),
        "instance norm": (small_network("unet", dims=3, classes=3, widths=[8, 16], norm="instance"), (9, 12, 11)),
        "2-D without padding": (
            small_network("unet", dims=2, in_channels=2, classes=3, widths=[4, 8], padding="valid"), (1, 28, 44),
        ),
        "ensemble": (
            join([small_network("resunet", dims=3, classes=2, widths=[4, 8]) for _ in range(2)]).eval(), (8, 8, 8),
        ),
    }  # fmt: skip


EACH = [pytest.param("inductor", marks=pytest.mark.slow), "openvino"]  # inductor takes half a minute a network


@pytest.mark.parametrize(("name", "backend"), [
    *((name, "openvino") for name in networks()),
    *(pytest.param(name, "inductor", marks=pytest.mark.slow) for name in ("3-D", "2-D without padding")),
])  # fmt: skip
def test_answers_are_torchs_to_rounding(name: str, backend: str) -> None:
    network, size = networks()[name]
    tiles = torch.randn(2, network.in_channels, *size)
    exact = NetworkPredictor(network, runtime()).predict(tiles)
    found = NetworkPredictor(network, runtime(backend)).predict(tiles)
    assert found.dtype == torch.float32
    assert found.shape == exact.shape
    spread = exact[:, : network.classes].std()
    assert (found - exact)[:, : network.classes].abs().max() < 1e-4 * spread
    half = NetworkPredictor(network, runtime(backend, "bf16")).predict(tiles)[:, : network.classes]
    off = (half - exact[:, : network.classes]).std() / spread
    assert 0 < off < 0.03


@pytest.mark.parametrize(("backend", "precision"), [
    ("openvino", "fp32"), ("openvino", "bf16"), pytest.param("inductor", "bf16", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_tile_has_the_same_bits_wherever_it_stands(backend: str, precision: str) -> None:
    network = small_network("resunet", dims=3, classes=3, widths=[8, 16, 32])
    predictor = NetworkPredictor(network, runtime(backend, precision, batch=3))
    tile, others = torch.randn(1, 1, 9, 12, 11), torch.randn(7, 1, 9, 12, 11) * 10
    alone = predictor.predict(tile)
    for place in (0, 2, 4, 6):
        batch = others.clone()
        batch[place] = tile[0]
        assert torch.equal(predictor.predict(batch)[place], alone[0])


ANSWER = """
import hashlib, sys, torch
sys.path.insert(0, "tests/segmodels")
from small_models import small_network
from test_backends import runtime
from segmodels.predictor import NetworkPredictor
network = small_network("resunet", dims=3, classes=3, widths=[8, 16, 32])
tiles = torch.randn(1, 1, 9, 12, 11, generator=torch.Generator().manual_seed(1))
answer = NetworkPredictor(network, runtime(sys.argv[1], sys.argv[2])).predict(tiles)
print(hashlib.sha256(answer.numpy().tobytes()).hexdigest())
"""


@pytest.mark.parametrize("backend", EACH)
def test_every_process_gives_the_same_bits_with_and_without_a_cache(backend: str, tmp_path: Path) -> None:
    network = small_network("resunet", dims=3, classes=3, widths=[8, 16, 32])
    tiles = torch.randn(1, 1, 9, 12, 11, generator=torch.Generator().manual_seed(1))
    here = NetworkPredictor(network, runtime(backend, "bf16")).predict(tiles)
    expected = hashlib.sha256(here.numpy().tobytes()).hexdigest()
    root = Path(__file__).parents[2]
    for _ in range(2):  # an empty cache, then a full one
        ran = subprocess.run(
            [sys.executable, "-c", ANSWER, backend, "bf16"], cwd=root, capture_output=True, text=True, check=True,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root), "MASKMILL_HOME": str(tmp_path / "home")},
        )  # fmt: skip
        assert ran.stdout.strip() == expected
        assert ran.stderr == ""
    kept = tmp_path / "home/compiled" / backend
    assert any(kept.rglob("*"))
    for folder in (tmp_path / "home", tmp_path / "home/compiled", kept):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_openvino_holds_one_shape_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `exact` every small study has a shape of its own, and each would keep the weights once more."""
    import openvino

    made: list[weakref.ref[Any]] = []
    real = openvino.CompiledModel.create_infer_request

    def counted(self: Any) -> Any:
        request = real(self)
        made.append(weakref.ref(request))
        return request

    monkeypatch.setattr(openvino.CompiledModel, "create_infer_request", counted)
    network = small_network("resunet", dims=3, classes=3, widths=[4, 8])
    predictor = NetworkPredictor(network, runtime("openvino"))
    tiles = [torch.randn(1, 1, n, 8, 8) for n in (8, 12, 8)]
    answers = [predictor.predict(tile) for tile in (*tiles, tiles[-1])]
    assert len(made) == 3
    assert [request() is None for request in made] == [True, True, False]
    assert torch.equal(answers[0], predictor.predict(tiles[0]))


@pytest.mark.parametrize("backend", COMPILED)
def test_without_a_place_for_what_is_compiled_it_says_so(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MASKMILL_HOME", str(tmp_path / "file/home"))
    with pytest.raises(ModelError, match="cannot be kept in MASKMILL_HOME"):
        NetworkPredictor(small_network("resunet", dims=3, classes=2, widths=[4, 8]), runtime(backend))


def saved(folder: Path) -> segmodels.Model:
    segmodels.save(small_network("resunet", dims=3, classes=3, widths=[4, 8]), CARD, folder)
    return segmodels.load(folder)


def test_compiling_leaves_the_model_and_its_folder_alone(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert model.network is not None
    weights = {key: value.clone() for key, value in model.network.state_dict().items()}
    for backend in COMPILED:
        NetworkPredictor(model.network, runtime(backend, "bf16")).predict(torch.randn(1, 1, 8, 8, 8))
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert all(torch.equal(value, weights[key]) for key, value in model.network.state_dict().items())
    assert {path.name for path in (home() / "compiled").iterdir()} == set(COMPILED)


def test_without_a_compiler_inductor_is_refused_or_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = saved(tmp_path / "model")
    planned = resolve_runtime(model, backend="inductor", precision="bf16", threads=2)
    assert (planned.backend, dict(planned.versions)["cxx"][:3]) == ("inductor", "g++")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ModelError, match=r"a C\+\+ compiler, no-such-compiler"):
        resolve_runtime(model, backend="inductor")
    with caplog.at_level(logging.WARNING, "maskmill"):
        here = runtime_here(planned, model)
    assert (here.backend, here.precision, here.threads) == ("torch", "bf16", 2)
    assert "cxx" not in dict(here.versions)
    assert len(caplog.records) == 1
    assert "no-such-compiler" in caplog.text


def test_a_machine_that_has_the_backend_keeps_it(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    for backend in BACKENDS:
        wanted = resolve_runtime(model, backend=backend, threads=1)
        assert runtime_here(wanted, model) == wanted
    assert len({resolve_runtime(model, backend=backend).hash for backend in BACKENDS}) == len(BACKENDS)


def test_the_frugal_runtime_of_a_gpu_on_its_cpu_is_torchs() -> None:
    on_gpu = Runtime("cuda", "inductor", "fp16", 2, 1, ())
    on_cpu = frugal(on_gpu, cpu=True)
    assert on_cpu is not None
    assert (on_cpu.device, on_cpu.backend, on_cpu.precision) == ("cpu", "torch", "fp32")


@pytest.mark.parametrize(("device", "backend", "words"), [("cuda", "openvino", "CPUs"), ("cpu", "torch", None)])
def test_what_a_device_can_do(device: str, backend: str, words: str | None) -> None:
    lack = backends.missing(backend, device)
    assert lack is None if words is None else words in str(lack)


def test_a_model_without_a_network_needs_no_backend() -> None:
    for backend in BACKENDS:
        found = resolve_runtime(segmodels.load("kmeans"), backend=backend)
        assert (found.backend, found.precision) == ("torch", "fp32")


def test_a_precision_that_the_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    real = openvino.Core.get_property

    def without_half(self: Any, *names: str) -> Any:
        return ["FP32"] if "OPTIMIZATION_CAPABILITIES" in names else real(self, *names)

    monkeypatch.setattr(openvino.Core, "get_property", without_half)
    with pytest.raises(ModelError, match="cannot compute in bf16"):
        NetworkPredictor(small_network("resunet", dims=3, classes=2, widths=[4, 8]), runtime("openvino", "bf16"))
