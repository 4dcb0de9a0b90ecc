"""The main job as a Prefect flow: tasks plan, segment (owns the workers), publish per study, report.

Import this inside `prefect_server()`. Prefect sees run ids and study keys; what a run knows stays in this
process.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.states import Completed, Failed

from pipeline.api import EngineFactory, run_blocks
from pipeline.progress import Progress
from pipeline.references import References
from pipeline.run import Run
from pipeline.summary import Summary, finish

from .stages import listen, stage, stopping

RUNS: dict[str, FlowRun] = {}
ARTIFACT_SECONDS = 2.0
TABLE_ROWS = 500


class FlowRun:
    """One run on its way through the flow."""

    def __init__(self, run: Run, engine: EngineFactory, observe: Callable[[Run], None]) -> None:
        self.run, self.engine, self.observe = run, engine, observe
        self.summary: Summary | None = None
        self.error: BaseException | None = None
        self.publishing: Progress | None = None


def run_flow(run: Run, engine: EngineFactory, observe: Callable[[Run], None] = lambda run: None) -> Summary:
    """Drive a run to its end as a flow run. What a task raised is raised here."""
    state = RUNS[run.id] = FlowRun(run, engine, observe)
    try:
        segment_flow(run.id, return_state=True)
    finally:
        del RUNS[run.id]
    if state.error is not None:
        raise state.error
    assert state.summary is not None
    return state.summary


_stage = functools.partial(stage, RUNS)


@_stage("plan")
def plan_task(run_id: str) -> dict[str, int]:
    """Project every study from its header, so that progress has a whole to be a part of."""
    run = RUNS[run_id].run
    run.estimate()
    return {"studies": len(run.studies), "tiles": run.tiles_expected}


@_stage("segment")
def segment_task(run_id: str) -> None:
    """All blocks of all studies on one set of warm workers."""
    state = RUNS[run_id]
    run = state.run
    artifact = create_progress_artifact(0.0, key="blocks", description=f"run {run_id}")
    shown = time.monotonic()

    def observe(run: Run) -> None:
        nonlocal shown
        state.observe(run)
        if time.monotonic() - shown >= ARTIFACT_SECONDS:
            shown = time.monotonic()
            update_progress_artifact(artifact, run.fraction_done() * 100)

    def publish(progress: Progress) -> None:
        state.publishing = progress
        publish_task(run_id, progress.key, return_state=True)

    # Starting an engine may take the signals over: they are taken back before blocks run.
    with stopping(run.stop):
        run_blocks(run, _rearmed(state.engine, run), publish, observe)
    update_progress_artifact(artifact, run.fraction_done() * 100)


def _rearmed(engine: EngineFactory, run: Run) -> EngineFactory:
    def start(spec: Any) -> Any:
        started = engine(spec)
        listen(run.stop)
        return started

    return start


@_stage("publish", "publish-{key}")
def publish_task(run_id: str, key: str) -> None:
    """Publish the study that is whole; a study that cannot be published is an outcome, not an error."""
    state = RUNS[run_id]
    assert state.publishing is not None
    state.run.publish(state.publishing)


@_stage("report")
def report_task(run_id: str) -> None:
    """Scores, tables, report page, summary."""
    state = RUNS[run_id]
    run = state.run
    state.summary = summary = finish(run, References(run.job.reference, run))
    create_markdown_artifact(_markdown(summary), key="summary", description=f"run {run_id}")


@flow(name="segment", flow_run_name="segment-{run_id}", persist_result=False, validate_parameters=False)
def segment_flow(run_id: str) -> Any:
    """Segment the studies of a run. The parameter is a run id and nothing else, since Prefect keeps it."""
    state = RUNS[run_id]
    with stopping(state.run.stop):
        plan_task(run_id, return_state=True)
        if state.error is None:
            segment_task(run_id, return_state=True)
        if state.error is None:
            report_task(run_id, return_state=True)
    if state.error is not None:
        return Failed(message=type(state.error).__name__)
    summary = state.summary
    assert summary is not None
    counts = f"{summary.published} published, {summary.failed} failed, {summary.interrupted} interrupted"
    return Failed(message=counts) if summary.exit_code else Completed(message=counts)


def _markdown(summary: Summary) -> str:
    parts = [
        f"**{summary.published} published** ({summary.reused} of them before), **{summary.failed} failed**, "
        f"**{summary.interrupted} interrupted**; {summary.blocks_computed} blocks in {summary.seconds:.1f} s",
    ]
    if summary.mean_dice is not None:
        parts.append(f"mean Dice {summary.mean_dice:.3f}")
    unfinished = [entry for entry in summary.studies if entry["state"] != "published"]
    if unfinished:
        rows = [f"| {e['key']} | {e['state']} | {e['cause'] or ''} |" for e in unfinished[:TABLE_ROWS]]
        parts.append("\n".join(["| key | state | cause |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)
