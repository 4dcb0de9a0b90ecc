"""By whom a study is made, and what is tried when that does not do: its kind of worker went away, or lacks memory.

No study mixes runtimes: under another one it begins anew.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from . import ledger
from .engine import Kind
from .errors import StudyError
from .progress import Progress
from .study_plan import measure

if TYPE_CHECKING:
    from segmodels.runtime import Runtime

    from .run import Run

logger = logging.getLogger("maskmill")

BEGINNINGS = 3  # how often a study begins under another runtime because its kind of worker is gone


def begun_under(run: Run, progress: Progress) -> str | None:
    """The hash of the runtime under which a study was begun. Raises OSError where the ledger cannot be read."""
    return (ledger.read_plan(ledger.folder(run.out, progress.key)) or {}).get("runtime_hash")


def choose_kind(run: Run, progress: Progress, held: str | None) -> Kind:
    """Who is to make a study: the kind that began it (`held`) if there is such a worker, else that with least to do.

    What a worker of the kind takes before any block is measured the first time: plans stand on it.
    """
    engine = run.engine()
    kinds = engine.kinds()
    begun = [(kind, _begun_under(run, kind, held)) for kind in kinds]
    kind, runtime = next((found for found in begun if found[1] is not None), (kinds[0], None))
    if runtime not in (None, kind.runtime) and progress.under is None:
        progress.under = runtime
    measure(engine, run.method, kind, run.baselines)
    return kind


def _begun_under(run: Run, kind: Kind, held: str | None) -> Runtime | None:
    """The runtime with the hash `held`, where it is one of this kind: its own, or a more frugal one."""
    runtime: Runtime | None = kind.runtime
    while runtime is not None and runtime.hash != held:
        runtime = _frugal(run, runtime)
    return runtime


def _frugal(run: Run, runtime: Runtime) -> Runtime | None:
    from segmodels.runtime import frugal

    return frugal(runtime, cpu=run.job.fallback == "cpu")


def save_memory(run: Run, progress: Progress) -> bool:
    """What projected memory did not do: the smallest blocks, then the whole study under a more frugal runtime.

    Says whether there is a way left; once per plan, however many of its blocks fail.
    """
    if progress.state == "saving":
        return True
    if progress.state != "segmenting" or progress.kind is None:
        return False
    if not progress.in_smallest:
        progress.saving = True
        logger.warning("out of memory: again in the smallest blocks", extra={"key": progress.key})
        return True
    under = _frugal(run, progress.under or progress.kind.runtime)
    if under is None:
        return False
    progress.under = under
    told = {"key": progress.key, "batch": under.batch, "device": under.device}
    logger.warning("out of memory: the whole study again under another runtime", extra=told)
    return True


def begin_again(run: Run, progress: Progress, runtime: str) -> None:
    """The kind of worker that was making this study is gone: any kind may make it, from the beginning."""
    kind = progress.kind
    if progress.state not in ("segmenting", "saving") or kind is None or kind.runtime.hash != runtime:
        return  # another block said so before
    progress.stranded += 1
    if progress.stranded == BEGINNINGS:
        message = f"its kind of worker went away {BEGINNINGS} times, the last time {kind.runtime}; run it again"
        run.fail(progress, StudyError("timeout", message))
        return
    logger.warning("its kind of worker is gone: it begins again", extra={"key": progress.key, "runtime": runtime})
    progress.state, progress.tiles_done, progress.pending = "waiting", 0, set()
    progress.under = None
    run.queue.append(progress)
