"""The Python face: plan and segment in this process, without Prefect and, unless asked, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

from .engine import Engine, SerialEngine, WorkerSpec, keep_few_arenas
from .errors import StudyError, UsageError
from .job import Job, make_job
from .logs import run_log
from .method import resolve_method
from .planning import Plan
from .progress import Progress
from .references import References
from .run import Run
from .sources import Found
from .start import claim_out, find, memory_budget
from .study_plan import Baselines, measure, plan_only
from .summary import Summary, finish, write_run

EngineFactory = Callable[[WorkerSpec], Engine]


def start_run(job: Job, only: Container[str] | None = None) -> Run:
    """Check everything that can be checked before work begins; `only`: names of the studies to take up, default all.

    Raises UsageError.
    """
    keep_few_arenas()
    method = resolve_method(job)
    found = find(job)
    if only is not None:
        found = Found([study for study in found.studies if study.name in only], [])
    try:
        run = Run(job, method, found, claim_out(job, method, found))
        write_run(run)
    except OSError as error:  # a disk that is full already, a folder that somebody made for himself
        raise UsageError(f"OUT {job.out} cannot be written: {error.strerror or 'i/o error'}") from None
    return run


def run_blocks(
    run: Run,
    engine: EngineFactory,
    publish: Callable[[Progress], None] | None = None,
    observe: Callable[[Run], None] = lambda run: None,
) -> None:
    """Drive a run to its end on an engine: measure, prepare, compute, publish each study as it gets whole."""
    publish = publish or run.publish
    with ExitStack() as stack:
        # Workers start when the first study needs them: a run with nothing to do never loads the model.
        run.workers_on_demand(lambda: stack.enter_context(engine(run.method.spec)))
        begun = False
        try:
            # Again and again: a study whose kind of worker went away, or had too little memory, comes back.
            while (first := next(works := run.works(), None)) is not None:
                begun = True
                for outcome in run.engine().run(chain([first], works), run.stop):
                    run.take(outcome)
                    run.settle(publish)
                    observe(run)
        except (StudyError, UsageError) as error:  # the workers are gone for good
            if isinstance(error, UsageError) and not begun:
                raise  # nothing could start
            run.settle(publish)
            run.give_up(error)
    if not run.stop.is_set():
        run.settle(publish)
    observe(run)


def segment(
    inputs: str | Path | Sequence[str | Path],
    model: str | Path,
    out: str | Path,
    *,
    engine: str | EngineFactory = "serial",
    **settings: Any,
) -> Summary:
    """Segment scans; masks, metrics and report go to `out`. Settings are the flags' names.

    engine: "serial", or what `cluster.ray_engine(...)` gives. Bad studies are set aside and stand in the summary;
    raises UsageError when nothing could start.
    """
    chosen: EngineFactory = SerialEngine if engine == "serial" else _factory(engine)
    job = make_job(_settings(inputs, model) | {"out": str(out), "engine": "serial"} | settings)
    run = start_run(job)
    with run_log(run.out, run.id, run.last_lines):
        run_blocks(run, chosen)
        return finish(run, References(job.reference, run))


def plan(inputs: str | Path | Sequence[str | Path], model: str | Path, **settings: Any) -> list[Plan]:
    """What `segment` would do, study by study, in the order of their names; reads headers only.

    Raises UsageError when nothing could start, StudyError for a study that cannot be planned.
    """
    job = make_job(_settings(inputs, model) | {"engine": "serial"} | settings)
    method, found = resolve_method(job), find(job)
    with SerialEngine(method.spec) as engine:
        (kind,) = engine.kinds()
        known: Baselines = {}
        measure(engine, method, kind, known)
        workers = job.workers or 1
        share = max(1, -(-workers // max(1, len(found.studies))))
        budget = memory_budget(job, workers)
        return [plan_only(s, method, engine, kind, known, budget=budget, workers=share) for s in found.studies]


def _settings(inputs: str | Path | Sequence[str | Path], model: str | Path) -> dict[str, Any]:
    if inputs is None:
        raise UsageError("inputs: give at least one file, folder or URL")
    listed = [inputs] if isinstance(inputs, str | Path) else inputs
    return {"inputs": [str(i) for i in listed], "model": str(model)}


def _factory(engine: str | EngineFactory) -> EngineFactory:
    if isinstance(engine, str):
        from .errors import UsageError

        raise UsageError(
            f'engine {engine!r}: in Python give "serial" or an engine such as cluster.ray_engine(workers=2)'
        )
    return engine
