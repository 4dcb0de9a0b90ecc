"""Ways to run a network: as torch does it, compiled by inductor, or by OpenVINO. One function of a tile each.

torch: eager. inductor: `torch.compile` with frozen weights; on a CPU it needs a C++ compiler (g++). openvino: an extra,
on CPUs only. What is compiled is kept in the user's own folder (see `segmodels.home`), so that the next process starts
faster; never in a model folder or beside results, since caches hold code that will be run.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from segmodels.errors import ModelError
from segmodels.home import home

if TYPE_CHECKING:
    from segmodels.network import Network
    from segmodels.runtime import Runtime

BACKENDS = ("torch", "inductor", "openvino")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES_KEPT = 256  # shapes, times members, for which one process keeps what inductor compiled; one more fails

Run = Callable[[Tensor], Tensor]


def missing(backend: str, device: str) -> str | None:
    """What a process lacks to run a backend on "cpu" or "cuda"; None if nothing."""
    if backend == "torch":
        return None
    if backend == "openvino":
        if device != "cpu":
            return "OpenVINO runs on CPUs here, and this machine's device is a GPU"
        found = importlib.util.find_spec("openvino")
        return None if found else "the package openvino (pip install 'maskmill[openvino]')"
    if device == "cpu":
        return None if shutil.which(_compiler()) else f"a C++ compiler, {_compiler()} (Debian: apt-get install g++)"
    return None if importlib.util.find_spec("triton") else "the package triton, which torch for CUDA brings along"


def versions(backend: str, device: str) -> dict[str, str]:
    """What, beside torch, decides the bits of a backend's answers."""
    if backend == "openvino":
        from importlib.metadata import version

        return {"openvino": version("openvino")}
    if backend == "inductor" and device == "cpu":
        return {"cxx": _compiler_version(_compiler())}
    return {}


def runner(network: Network, runtime: Runtime) -> Run:
    """`network` as a function of a batch of tiles (N, C, *S) float32 -> logits float32, under `runtime`.

    To be called in inference mode. Compiling happens at the first tile of a shape. Raises ModelError where this machine
    lacks what it takes.
    """
    if runtime.backend not in BACKENDS:
        raise ModelError(f"the backend {runtime.backend!r} is not built in; there are: {', '.join(BACKENDS)}")
    if lack := missing(runtime.backend, runtime.device):
        raise ModelError(f"the backend {runtime.backend} lacks {lack}")
    return {"torch": _torch, "inductor": _inductor, "openvino": _openvino}[runtime.backend](network, runtime)


def _layout(network: Network) -> torch.memory_format:
    return torch.channels_last if network.dims == 2 else torch.channels_last_3d


def _laid_out(network: Network, layout: torch.memory_format) -> Network:
    laid: Network = network.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stubs leave it out
    return laid


def _torch(network: Network, runtime: Runtime) -> Run:
    if runtime.precision == "fp32":
        return network
    # Half precision is twice as fast with the channels together; float32 stays as it is trained.
    dtype, layout = DTYPES[runtime.precision], _layout(network)
    network = _laid_out(network, layout)

    def run(tiles: Tensor) -> Tensor:
        with torch.autocast(runtime.device, dtype=dtype):
            logits: Tensor = network(tiles.contiguous(memory_format=layout))
        return logits.float().contiguous()

    return run


def _inductor(network: Network, runtime: Runtime) -> Run:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_kept("inductor"))  # before the imports, which set it to one in /tmp
    import torch._dynamo
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # no pool of processes beside a worker
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = SHAPES_KEPT
    dtype, layout = DTYPES[runtime.precision], _layout(network)
    frozen = _laid_out(copy.deepcopy(network).to(dtype), layout)
    compiled: Run = torch.compile(frozen, fullgraph=True, dynamic=False, options={"freezing": True})

    shapes: set[torch.Size] = set()

    def run(tiles: Tensor) -> Tensor:
        if tiles.shape not in shapes:
            shapes.add(tiles.shape)
            with _compiling():  # the first run; those after it give no warnings
                compiled(tiles.to(dtype).contiguous(memory_format=layout))
        logits = compiled(tiles.to(dtype).contiguous(memory_format=layout))
        return logits.float().contiguous()

    return run


def _openvino(network: Network, runtime: Runtime) -> Run:
    from openvino import Core

    core = Core()
    kind = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[runtime.precision]
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if runtime.precision != "fp32" and runtime.precision.upper() not in able:
        raise ModelError(f"OpenVINO cannot compute in {runtime.precision} on this CPU: use fp32, or another backend")
    settings = {
        "INFERENCE_PRECISION_HINT": kind,
        "INFERENCE_NUM_THREADS": runtime.threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # workers of one machine would all take the same cores
        "CACHE_DIR": str(_kept("openvino")),
    }
    request, shape = None, None

    def run(tiles: Tensor) -> Tensor:
        nonlocal request, shape
        if tiles.shape != shape:
            request, shape = None, None  # what another shape took is given back first: a plan knows of one
            compiled = core.compile_model(_converted(network, tuple(tiles.shape)), "CPU", settings)
            request, shape = compiled.create_infer_request(), tiles.shape
        answer = request.infer([tiles.contiguous().numpy()], share_inputs=True)
        return torch.from_numpy(answer[0].copy())  # the request writes its next answer over it

    return run


def _converted(network: Network, shape: tuple[int, ...]) -> Any:
    """The network as OpenVINO has it. By the front end itself: `convert_model` would report its use to the maker."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    front = FrontEndManager().load_by_framework("pytorch")
    with _compiling(), torch.inference_mode(mode=False), torch.no_grad():
        exported = torch.export.export(network, (torch.zeros(shape),))
        decoder = TorchFXPythonDecoder.from_exported_program(exported)  # must live until it was read
        return front.convert(front.load(decoder))


@contextmanager
def _compiling() -> Iterator[None]:
    """Without the warnings that torch and OpenVINO give about what they themselves use, in warnings and in the log."""

    def of_others(record: logging.LogRecord) -> bool:
        return record.module != "fx_decoder"  # OpenVINO's: a traceback for every operation that it does without

    root = logging.getLogger()
    root.addFilter(of_others)
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        root.removeFilter(of_others)


def _kept(name: str) -> Path:
    try:
        path = home() / "compiled"
        for folder in (path, path / name):  # not by `parents`, whose mode is the umask's
            folder.mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise ModelError(f"compiled networks cannot be kept in MASKMILL_HOME/compiled ({error.strerror})") from None
    return path / name


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


@cache
def _compiler_version(compiler: str) -> str:
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    return said.splitlines()[0] if said else "unknown"
