"""Training as a Prefect flow: tasks prepare, train, finish. Prefect sees a run id and counts, no path and no name.

Import this inside `prefect_server()`.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.states import Completed, Failed

from pipeline.errors import Interrupted
from pipeline.training.gather import Observe, Preparation, prepare_cases
from pipeline.training.job import TrainJob
from pipeline.training.run import finish_model, train_members

from .stages import listen, stage, stopping

TRAININGS: dict[str, FlowTraining] = {}
ARTIFACT_SECONDS = 5.0


class FlowTraining:
    """One training on its way through the flow."""

    def __init__(self, job: TrainJob, out: Path, threads: int, stop: threading.Event, observe: Observe) -> None:
        self.job, self.out, self.threads, self.stop, self.observe = job, out, threads, stop, observe
        self.preparation: Preparation | None = None
        self.error: BaseException | None = None


_stage = functools.partial(stage, TRAININGS)


def run_training(state: FlowTraining, run_id: str) -> None:
    """Drive a training to its end as a flow run. What a task raised is raised here."""
    TRAININGS[run_id] = state
    try:
        train_flow(run_id, return_state=True)
    finally:
        del TRAININGS[run_id]
    if state.error is not None:
        raise state.error


@_stage("prepare")
def prepare_task(run_id: str) -> None:
    """Read images and masks, set bad pairs aside."""
    state = TRAININGS[run_id]
    state.preparation = prepare_cases(state.job, state.out, state.stop, state.observe)


@_stage("train")
def train_task(run_id: str) -> None:
    """All members, in this process or on one Ray actor."""
    state = TRAININGS[run_id]
    assert state.preparation is not None
    artifact = create_progress_artifact(0.0, key="training", description=f"run {run_id}")
    shown = time.monotonic()

    def observe(what: str, share: float, facts: Mapping[str, float]) -> None:
        nonlocal shown
        state.observe(what, share, facts)
        if time.monotonic() - shown >= ARTIFACT_SECONDS:
            shown = time.monotonic()
            update_progress_artifact(artifact, share * 100)

    arguments = (state.job, state.out, state.preparation, state.threads, state.stop)
    with stopping(state.stop):
        if state.job.engine == "serial":
            train_members(*arguments, observe)
        else:
            from cluster.training import train_on_ray

            listening = threading.Event()

            def rearmed(what: str, share: float, facts: Mapping[str, float]) -> None:
                if not listening.is_set():  # starting Ray may have taken the signals over
                    listen(state.stop)
                    listening.set()
                observe(what, share, facts)

            train_on_ray(*arguments, rearmed)
    update_progress_artifact(artifact, 100.0)


@_stage("finish")
def finish_task(run_id: str) -> None:
    """Measure on the validation cases and write the model folder."""
    state = TRAININGS[run_id]
    assert state.preparation is not None
    state.observe("measure", 0.0, {})
    finish_model(state.job, state.out, state.preparation, state.threads, state.stop)


@flow(name="train", flow_run_name="train-{run_id}", persist_result=False, validate_parameters=False)
def train_flow(run_id: str) -> Any:
    """Train the model of a job. The parameter is a run id and nothing else, since Prefect keeps it."""
    state = TRAININGS[run_id]
    with stopping(state.stop):
        for task in (prepare_task, train_task, finish_task):
            if state.error is None and not state.stop.is_set():
                task(run_id, return_state=True)
    if state.error is None and state.stop.is_set() and not (state.out / "card.json").exists():
        state.error = Interrupted()
    if state.error is not None:
        return Failed(message=type(state.error).__name__)
    return Completed(message="trained")
