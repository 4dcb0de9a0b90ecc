"""`maskmill segment` and `maskmill plan`: from settings to an exit code."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from pipeline.errors import StudyError, UsageError
from pipeline.job import Job, make_job
from pipeline.sources.names import shown

from .progress import ProgressLine

if TYPE_CHECKING:
    from pipeline.api import EngineFactory
    from pipeline.summary import Summary


def segment_command(settings: dict[str, Any], *, as_json: bool) -> int:
    """Run the main job; messages to stderr, with `as_json` one line of JSON to stdout."""
    job = make_job(settings)
    summary = segment_job(job)
    report_failures(summary)
    print(_closing_line(summary), file=sys.stderr)
    if as_json:
        print(json.dumps(summary.to_json()))
    return summary.exit_code


def segment_job(job: Job) -> Summary:
    """Segment as a Prefect flow on a server of its own, on the engine that the job names."""
    from pipeline.api import start_run
    from pipeline.logs import run_log

    from .server import ServerError, prefect_server

    engine = engine_of(job)
    run = start_run(job)
    _warn_of_threads(job, run.method.spec.runtime.threads)
    try:
        with run_log(run.out, run.id, run.last_lines), ProgressLine() as line, prefect_server():
            from .segment import run_flow
            from .stages import stopping

            with stopping(run.stop):
                return run_flow(run, engine, line.show)
    except ServerError as error:
        raise UsageError(f"the Prefect server of this command did not start: {error}") from None


def _warn_of_threads(job: Job, threads: int) -> None:
    """Too many threads together only cost time; the number is never changed, because labels depend on it."""
    from segmodels.runtime import usable_cores

    workers = job.workers or 1
    if job.engine == "ray" and job.address is None and workers * threads > usable_cores():
        print(
            f"maskmill: {workers} workers of {threads} threads each share {usable_cores()} cores; "
            f"--threads {max(1, usable_cores() // workers)} may be faster (unfinished work then starts anew)",
            file=sys.stderr,
        )


def engine_of(job: Job) -> EngineFactory:
    """How to start the engine that a job names."""
    if job.engine == "serial":
        from pipeline.engine import SerialEngine

        if job.address is not None:
            raise UsageError("--address names a Ray cluster; it does not go with --engine serial")
        return SerialEngine
    from cluster import ray_engine

    return ray_engine(
        job.workers,
        job.address,
        gpus_per_worker=job.gpus_per_worker,
        stall_minutes=job.stall_minutes,
        wait_minutes=job.wait_minutes,
    )


def plan_command(settings: dict[str, Any], *, as_json: bool) -> int:
    """Plan each study from its header, after one tile has run on the engine. 1 if one cannot be planned."""
    from pipeline.method import resolve_method
    from pipeline.start import find
    from pipeline.study_plan import measure, plan_only

    job = make_job(settings)
    method, found = resolve_method(job), find(job)
    with engine_of(job)(method.spec) as engine:
        kind = engine.kinds()[0]
        measure(engine, method, kind, known := {})
        workers, budget = engine.workers, job.memory or kind.memory
        share = max(1, -(-workers // len(found.studies)))
        entries, failures = [], [(source, error) for source, error in found.failures]
        for study in found.studies:
            try:
                plan = plan_only(study, method, engine, kind, known, budget=budget, workers=share)
                entries.append(plan.describe(study.name))
            except StudyError as error:
                failures.append((study.source, error))
    for source, error in failures:
        print(f"failed: {shown(source)}: {error.cause}: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps({"studies": entries}))
    else:
        _print_plans(entries, workers, budget)
    return 1 if failures else 0


def _print_plans(entries: list[dict[str, Any]], workers: int, budget: int) -> None:
    print(
        f"{'study':32} {'shape z,y,x':>17} {'tiles':>7} {'runs':>7} {'blocks':>6} {'waste':>6} "
        f"{'memory':>9} {'time':>8}"
    )
    for e in entries:
        shape = ",".join(map(str, e["shape"]))
        print(
            f"{e['study'][:32]:32} {shape:>17} {e['tiles']:7} {e['tile_runs']:7} {e['blocks']:6} "
            f"{e['waste']:6.1%} {e['host_bytes'] / 2**30:5.2f} GiB {_duration(e['seconds']):>8}"
        )
    total = sum(e["seconds"] for e in entries)
    at_once = max(1, min(workers, len(entries)))
    print(
        f"{len(entries)} studies, {sum(e['tile_runs'] for e in entries)} tile runs on {workers} worker(s), "
        f"about {_duration(total / at_once)}; each worker may use {budget / 2**30:.2f} GiB"
    )


def report_failures(summary: Summary) -> None:
    """One line per study that has no mask, and per mask that has a remark."""
    for entry in summary.studies:
        # What gave no study is known to the user by its path.
        name = entry["study"] if entry["image"] or entry["state"] == "interrupted" else shown(entry["source"])
        if entry["state"] == "failed":
            print(f"failed: {name}: {entry['cause']}: {entry['message']}", file=sys.stderr)
        for remark in [entry["message"], *entry["warnings"]] if entry["state"] == "published" else []:
            if remark:
                print(f"note: {name}: {remark}", file=sys.stderr)
    if summary.report is None:
        print(f"maskmill: {summary.troubles[-1]}", file=sys.stderr)


def _closing_line(summary: Summary) -> str:
    total = len(summary.studies)
    if summary.interrupted:
        done = f"interrupted: {summary.published} of {total} studies are published"
    elif not total:
        done = "nothing to do: no study is to be taken up (by --part, --retry-failed)"
    elif summary.published == summary.reused == total:
        done = f"nothing to do: all {total} studies are published already"
    else:
        done = f"{summary.published} of {total} studies published"
        done += f" ({summary.reused} of them before)" if summary.reused else ""
        done += f", {summary.failed} failed" if summary.failed else ""
        done += f"; {summary.blocks_computed} blocks"
    dice = f"; mean Dice {summary.mean_dice:.4f}" if summary.mean_dice is not None else ""
    return f"{done}{dice}; {_duration(summary.seconds)}; report: {summary.report}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
