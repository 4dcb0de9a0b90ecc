"""WHERE blocks run: the Ray engine and its sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.engine import WorkerSpec

    from .engine import RayEngine


def ray_engine(workers: int | None = None, address: str | None = None) -> Callable[[WorkerSpec], RayEngine]:
    """How to start an engine on Ray: pass it to `pipeline.segment(..., engine=ray_engine(workers=2))`.

    workers: None is one per GPU where the runtime's device is cuda, else one. address: None starts a
    private cluster on this machine that ends with the engine; "host:port" or "auto" joins one. Starting it
    raises UsageError where that fails.
    """

    def start(spec: WorkerSpec) -> RayEngine:
        from .engine import RayEngine

        gpu = spec.runtime.device.startswith("cuda")
        return RayEngine(spec, workers=workers, threads=spec.runtime.threads, gpu=gpu, address=address)

    return start
