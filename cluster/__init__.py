"""WHERE blocks run: the Ray engine and its sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.engine import WorkerSpec

    from .engine import RayEngine


def ray_engine(
    workers: int | None = None,
    address: str | None = None,
    *,
    gpus_per_worker: float | None = None,
    stall_minutes: float | None = None,
    wait_minutes: float | None = None,
) -> Callable[[WorkerSpec], RayEngine]:
    """How to start an engine on Ray: pass it to `pipeline.segment(..., engine=ray_engine(workers=2))`.

    workers: None is one per GPU, or as many as `gpus_per_worker` makes of them, where there are GPUs, else one.
    address: None starts a private cluster on this machine that ends with the engine; "host:port" or "auto" joins one.
    stall_minutes: without progress after which a worker hangs; None is 10, or more where batches take long.
    wait_minutes: without any worker after which the run ends; None is 2, on a joined cluster 15.
    Starting it raises UsageError where that fails.
    """

    def start(spec: WorkerSpec) -> RayEngine:
        from .engine import RayEngine

        gpu = spec.runtime.device.startswith("cuda")
        return RayEngine(
            spec,
            workers=workers,
            threads=spec.runtime.threads,
            gpu=gpu,
            gpus_per_worker=gpus_per_worker,
            address=address,
            stall=stall_minutes and stall_minutes * 60,
            wait=wait_minutes and wait_minutes * 60,
        )

    return start
