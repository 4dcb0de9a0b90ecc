"""`maskmill train`: from a job file to a model folder and an exit code."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import store
from pipeline.errors import Interrupted, StudyError, UsageError
from pipeline.objects import check_address
from pipeline.sources.names import shown

from .progress import ProgressLine


def train_command(settings: dict[str, Any], out: str, *, as_json: bool) -> int:
    """Train; messages to stderr, with `as_json` one line of JSON to stdout. 1 where cases had to be set aside."""
    from pipeline.logs import run_log
    from pipeline.start import new_run_id
    from pipeline.training.claim import claim, is_done
    from pipeline.training.job import make_train_job
    from segmodels.runtime import usable_cores

    from .server import ServerError, prefect_server

    check_address(out, "the model folder")
    job, folder, began = make_train_job(settings), store.local(out), time.monotonic()
    if job.engine == "serial" and job.address is not None:
        raise UsageError("address names a Ray cluster; it does not go with engine serial")
    if is_done(job, folder):
        print(f"nothing to do: {folder} holds the model of this job already", file=sys.stderr)
        return _close(folder, _set_aside_before(folder), began, as_json=as_json)
    stop, run_id = threading.Event(), new_run_id()
    try:
        with claim(job, folder), run_log(str(folder / "training"), run_id), ProgressLine() as line, prefect_server():
            from .train import FlowTraining, run_training

            state = FlowTraining(job, folder, job.threads or usable_cores(), stop, _teller(line))
            run_training(state, run_id)
    except Interrupted:
        if as_json:
            print(json.dumps({"model": None, "state": "interrupted"}))
        return 130
    except StudyError as error:
        if as_json:
            print(json.dumps({"model": None, "state": "failed", "cause": error.cause, "message": error.message}))
        raise
    except ServerError as error:
        raise UsageError(f"the Prefect server of this command did not start: {error}") from None
    assert state.preparation is not None
    aside = [{"source": w, "cause": e.cause, "message": e.message} for w, e in state.preparation.failures]
    return _close(folder, aside, began, as_json=as_json)


def _set_aside_before(folder: Path) -> list[dict[str, str]]:
    """What was set aside when the model was made, by the names of the cases."""
    from pipeline.training.run import SET_ASIDE

    held = store.read_json(str(folder / SET_ASIDE)) or {"cases": []}
    return [{"source": entry["case"], "cause": entry["cause"], "message": entry["message"]} for entry in held["cases"]]


def _teller(line: ProgressLine) -> Any:
    def tell(stage: str, share: float, facts: Mapping[str, float]) -> None:
        shown_facts = ", ".join(
            f"{name} {value:.0f}" if value == int(value) else f"{name} {value:.4f}"
            for name, value in facts.items()
            if value == value  # not NaN: there is no loss yet
        )
        line.tell(f"{stage}: {shown_facts}" if shown_facts else stage, share, "done", stage=stage)

    return tell


def _close(folder: Path, aside: list[dict[str, str]], began: float, *, as_json: bool) -> int:
    """Say what came out, and what was set aside on the way."""
    card = json.loads((folder / "card.json").read_text("utf-8"))
    training, quality = card["training"], card["quality"]
    for entry in aside:
        print(f"set aside: {shown(entry['source'])}: {entry['cause']}: {entry['message']}", file=sys.stderr)
    for name, facts in (quality or {}).get("structures", {}).items():
        interval = "({:.4f} to {:.4f})".format(*facts["interval_95"]) if facts["interval_95"] else "(no interval)"
        print(f"  {name}: Dice {facts['mean']:.4f} {interval} on {facts['n']} cases", file=sys.stderr)
    print(f"model: {folder}", file=sys.stderr)
    if as_json:
        document = {
            "model": str(folder),
            "state": "trained",
            "name": card["name"],
            "steps": [member["steps"] for member in training["members"]],
            "minutes": [member["minutes"] for member in training["members"]],
            "training": len(training["split"]["training"]),
            "validation": len(training["split"]["validation"]),
            "set_aside": aside,
            "quality": quality,
            "seconds": time.monotonic() - began,
        }
        print(json.dumps(document))
    return 1 if training["set_aside"] else 0
