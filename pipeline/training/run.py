"""A training from its cases to the model folder, in stages that a rerun goes on from."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import store
from ..errors import Interrupted, StudyError
from ..sources.names import study_name
from ..summary import versions
from .claim import WORK
from .curve import write_curve
from .gather import Observe, Preparation, member_cases, unseen
from .job import TrainJob
from .quality import curve_scorer, measure_calibration, measure_quality

SET_ASIDE = "training/set_aside.json"  # in the model folder: the cases that were not used, and why


def train_member(
    job: TrainJob,
    out: Path,
    preparation: Preparation,
    member: int,
    threads: int,
    stop: threading.Event,
    observe: Observe = unseen,
) -> None:
    """Train one network to its end, from its checkpoint if it has one; its state stays in the work folder.

    Raises Interrupted when `stop` is set before that, StudyError where it cannot go on.
    """
    import segmodels
    from segmodels.train.loop import Task, Training, train
    from segmodels.train.loss import TrainingError

    recipe = job.recipe.model_copy(update={"seed": job.recipe.seed + member})
    task = Task(
        network=_fresh(job, recipe.seed),
        cases=tuple(member_cases(job, preparation, member)),
        recipe=recipe,
        patch=job.patch,
        flips=tuple(axis + 3 - len(job.tile) for axis in job.mirror_axes),
        folder=out / WORK / f"member-{member}",
        threads=threads,
        teacher=segmodels.load(job.teacher).network if job.teacher is not None else None,
    )
    score = curve_scorer(job, preparation.validation) if preparation.validation else None

    def show(training: Training, progress: float) -> None:
        observe("train", progress, _shown(training, recipe))

    try:
        training = train(task, validate=score, stop=stop, observe=show)
    except TrainingError as error:
        raise StudyError("model", str(error)) from None
    except OSError as error:
        raise StudyError("storage", f"training stopped: {error.strerror or error}; run it again to go on") from None
    if training.progress(recipe) < 1:
        raise Interrupted


def train_members(
    job: TrainJob, out: Path, preparation: Preparation, threads: int, stop: threading.Event, observe: Observe = unseen
) -> None:
    """Train every network in this process, one after the other."""
    for member in range(job.members):

        def show(stage: str, share: float, facts: Mapping[str, float], member: int = member) -> None:
            observe(stage, (member + share) / job.members, facts)

        train_member(job, out, preparation, member, threads, stop, show)


def _shown(training: Any, recipe: Any) -> dict[str, float]:
    facts = {"step": float(training.step), "loss": training.losses[-1] if training.losses else float("nan")}
    if training.way.batch < recipe.batch:  # memory was short
        facts["samples at once"] = float(training.way.batch)
    if training.rows:
        facts |= {n: v for n, v in training.rows[-1].items() if n.startswith("dice ")}
    return facts


def _fresh(job: TrainJob, seed: int) -> Any:
    """The network with its first weights, which the seed decides."""
    import torch

    import segmodels

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return segmodels.create(job.network.name, **job.network.config)


def finish_model(job: TrainJob, out: Path, preparation: Preparation, threads: int, stop: threading.Event) -> None:
    """Put the members together, measure them on the validation cases, write the model folder.

    Raises Interrupted when `stop` is set before the model is measured, StudyError where that cannot be done,
    ModelError where the weights cannot be stored as the job says; what is learned stays, and another call goes on.
    """
    import segmodels
    from segmodels.train import checkpoint

    states = [checkpoint.read(out / WORK / f"member-{i}") for i in range(job.members)]
    assert all(state is not None for state in states)
    network = _assemble(job, [state["kept"] for state in states if state is not None])
    ref = {"network": {"name": network.architecture, "config": network.config}}
    draft = out / WORK / "model"
    segmodels.save(network, job.card(**ref), draft, dtype=job.weights)
    quality = None
    if preparation.split.validation:
        pairs = [preparation.pairs[name] for name in preparation.split.validation]
        quality = measure_quality(job, draft, pairs, out / WORK / "validation", threads, stop)
        quality["calibration"] = measure_calibration(job, draft, preparation.validation, threads, stop)
    rows = [{"member": float(i), **row} for i, state in enumerate(states) if state for row in state["rows"]]
    write_curve(out / "training", rows)
    store.write_json(str(out / "training" / "split.json"), preparation.split.lists)
    store.write_json(str(out / SET_ASIDE), {"cases": [_reason(*failure) for failure in preparation.failures]})
    facts = _facts(job, preparation, [state for state in states if state is not None])
    segmodels.save(network, job.card(**ref, training=facts, quality=quality), out, dtype=job.weights)
    shutil.rmtree(out / WORK)


def _reason(source: str, why: StudyError) -> dict[str, str]:
    return {"case": study_name(source.rstrip("/").rpartition("/")[2]), "cause": why.cause, "message": why.message}


def _assemble(job: TrainJob, kept: list[dict[str, Any]]) -> Any:
    """One network with the averaged weights of its members."""
    import segmodels
    from segmodels.zoo.ensemble import join

    networks = []
    for state in kept:
        network = segmodels.create(job.network.name, **job.network.config)
        network.load_state_dict(state)
        networks.append(network.eval())
    return networks[0] if len(networks) == 1 else join(networks)


def _facts(job: TrainJob, preparation: Preparation, states: list[dict[str, Any]]) -> dict[str, Any]:
    """What the card says of the training."""
    return {
        "job": job.fingerprint,
        "data": {
            "licence": job.data.licence,
            "source": job.data.source,
            "sha256_of_image_and_mask": preparation.digests,
        },
        "split": preparation.split.lists,
        "set_aside": len(preparation.failures),
        "recipe": job.recipe.model_dump(mode="json"),
        "members": [
            {"steps": s["step"], "minutes": round(s["seconds"] / 60, 3), **s["way"]} for s in states
        ],
        "members_by": job.members_by,
        "teacher": None if preparation.teacher is None else preparation.teacher.described,
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
