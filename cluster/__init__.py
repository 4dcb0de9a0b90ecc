"""WHERE blocks run: the Ray engine and its sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.engine import WorkerSpec

    from .engine import RayEngine


def ray_engine(spec: WorkerSpec, *, workers: int | None = None, address: str | None = None) -> RayEngine:
    """An engine on Ray for the model and runtime of `spec`; use it as a context manager, or close it.

    workers: None is one per GPU where the runtime's device is cuda, else one. address: None starts a
    private cluster on this machine that ends with the engine; "host:port" or "auto" joins one. Raises
    UsageError where that fails.
    """
    from .engine import RayEngine

    gpu = spec.runtime.device.startswith("cuda")
    return RayEngine(spec, workers=workers, threads=spec.runtime.threads, gpu=gpu, address=address)
