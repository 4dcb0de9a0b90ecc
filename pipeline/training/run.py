"""A training from its job to the model folder, in stages that a rerun goes on from."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segmodels.train.cases import Case

from .. import store
from ..errors import Interrupted, StudyError, UsageError
from ..summary import versions
from .curve import write_curve
from .job import TrainJob
from .pairs import Pair, Split, draw_split, find_pairs
from .prepare import prepare
from .quality import curve_scorer, measure_calibration, measure_quality
from .teacher import Teacher, load_teacher

logger = logging.getLogger("maskmill")

WORK = ".training"  # in the model folder, until the model is whole

Observe = Callable[[str, float, Mapping[str, float]], None]
"""Told of what goes on: the stage, the share of it that is done (0 to 1), facts to show."""


def _unseen(stage: str, share: float, facts: Mapping[str, float]) -> None:
    pass


@dataclass
class Preparation:
    """The cases of a job, ready to learn from. facts: what prepare said of each, by name."""

    cases: dict[str, Case]
    facts: dict[str, dict[str, Any]]
    pairs: dict[str, Pair]
    split: Split
    failures: list[tuple[str, StudyError]] = field(default_factory=list)
    teacher: Teacher | None = None

    @property
    def digests(self) -> dict[str, list[str]]:
        """The sha256 of image and mask of each case."""
        return {name: [self.facts[name]["image"], self.facts[name]["mask"]] for name in sorted(self.cases)}

    @property
    def training(self) -> list[Case]:
        return [self.cases[name] for name in self.split.training]

    @property
    def validation(self) -> list[Case]:
        return [self.cases[name] for name in self.split.validation]


def is_done(job: TrainJob, out: Path) -> bool:
    """Whether the model folder is whole and of this job. Raises UsageError where it holds something else."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give a folder for the model")
    card = store.read_json(str(out / "card.json"))
    begun = store.read_json(str(out / WORK / "job.json"))
    if card is not None:
        is_same, what = (card.get("training") or {}).get("job") == job.fingerprint, "a model"
    elif begun is not None:
        # What was begun and taught nothing, such as a job with a mistake, keeps nobody from mending the job.
        is_same, what = begun.get("lesson") == job.lesson or not _has_learned(out), "a training that is not finished"
    else:
        if out.exists() and (strange := sorted(out.iterdir())):
            raise UsageError(f"{out} holds {strange[0].name}, which is no part of a model: give an empty or new folder")
        return False
    if not is_same:
        raise UsageError(f"{out} holds {what} of another job (or of other settings): give another folder")
    if card is not None:
        shutil.rmtree(out / WORK, ignore_errors=True)  # of a command that was killed at its very end
    return card is not None


def _has_learned(out: Path) -> bool:
    from segmodels.train import checkpoint

    return any((out / WORK).glob(f"member-*/{checkpoint.FILE}"))


@contextmanager
def claim(job: TrainJob, out: Path) -> Iterator[None]:
    """Make the model folder this job's, and this process's while it lasts.

    Raises UsageError where it cannot be written, or while another command trains there.
    """
    try:
        (out / WORK).mkdir(parents=True, exist_ok=True)
        handle = os.open(out / WORK, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UsageError(f"another command trains in {out}: wait for it, or give another folder") from None
    except OSError:
        pass  # a file system without locks
    try:
        try:
            store.write_json(str(out / WORK / "job.json"), {"lesson": job.lesson})
        except OSError as error:
            raise UsageError(f"{out} cannot be written: {error.strerror}") from None
        yield
    finally:
        os.close(handle)


def prepare_cases(job: TrainJob, out: Path, stop: threading.Event, observe: Observe = _unseen) -> Preparation:
    """Read all pairs; bad ones are set aside. Raises UsageError where what is left cannot teach the labels."""
    teacher = None if job.teacher is None else load_teacher(job)
    pairs, failures = find_pairs(job.data)
    split = draw_split(job.split, [pair.name for pair in pairs])
    used = {*split.training, *split.validation}
    cases: dict[str, Case] = {}
    facts: dict[str, dict[str, Any]] = {}
    for i, pair in enumerate(pairs):
        if pair.name not in used:
            continue
        try:
            cases[pair.name], facts[pair.name] = prepare(job, pair, out / WORK / "cases" / pair.name, stop)
        except StudyError as error:
            failures.append((pair.image.source, error))
        except OSError as error:
            failures.append(
                (pair.image.source, StudyError("storage", error.strerror or "it cannot be read or written"))
            )
        observe("prepare", (i + 1) / len(pairs), {"cases": i + 1})
    split = Split(*(tuple(n for n in part if n in cases) for part in (split.training, split.validation)))
    if not split.training:
        where, why = failures[0]
        raise UsageError(f"no case is left to learn from; the first that was set aside: {where}: {why}")
    preparation = Preparation(cases, facts, {pair.name: pair for pair in pairs}, split, failures, teacher)
    _check_cases(job, preparation)
    _hold_to(out, preparation)
    return preparation


def _check_cases(job: TrainJob, preparation: Preparation) -> None:
    """Raises UsageError where the cases as a whole cannot teach, or where what measures was learned from."""
    facts, split = preparation.facts, preparation.split
    if job.members_by == "folds" and job.members > len(split.training):
        raise UsageError(f"{len(split.training)} training cases do not make {job.members} folds: give fewer members")
    for member in range(job.members if job.members_by == "folds" else 1):
        names = [case.name for case in member_cases(job, preparation, member)]
        where = f"training case of fold {member}" if job.members_by == "folds" else "training case"
        for value, name in job.labels.items():
            if not any(facts[case]["voxels"][value] for case in names):
                raise UsageError(f"label {value} ({name}) occurs in no {where}: take it out of labels, or add cases")
    with_255 = [name for name, fact in facts.items() if fact["is_255"]]
    with_1 = [name for name, fact in facts.items() if not fact["is_255"] and any(fact["voxels"].values())]
    if with_255 and with_1:
        raise UsageError(
            f"label 1 is 255 in the mask of {with_255[0]} and 1 in that of {with_1[0]}: 255 means label 1 only where "
            "a whole set of masks has it; store them one way"
        )
    learned = {facts[name]["image"]: name for name in split.training}
    learned |= preparation.teacher.learned if preparation.teacher is not None else {}
    for name in split.validation:
        if (twin := learned.get(facts[name]["image"])) is not None:
            raise UsageError(
                f"{name} is to measure, but its image is that of {twin}, which is learned from: remove one of them, or "
                "put both on one side with split.file"
            )


def _hold_to(out: Path, preparation: Preparation) -> None:
    """Remember the cases of a training that begins; one that goes on keeps to them. Raises UsageError.

    The split is drawn from the names, so another file would move cases from one side of it to the other, and a mask
    that was edited meanwhile would be half in the weights and not at all in the card.
    """
    path = str(out / WORK / "cases.json")
    now: dict[str, Any] = {"sha256_of_image_and_mask": preparation.digests, "split": _lists(preparation.split)}
    now |= {"teacher": preparation.teacher.hash} if preparation.teacher is not None else {}
    begun = store.read_json(path)
    if begun is None or not _has_learned(out):
        store.write_json(path, now)  # nothing is learned yet
        return
    if begun == now:
        return
    before, after = begun["sha256_of_image_and_mask"], preparation.digests
    found = [
        *(f"{name} is gone or was set aside" for name in sorted(before.keys() - after.keys())),
        *(f"{name} is new" for name in sorted(after.keys() - before.keys())),
        *(f"{name} has changed" for name in sorted(before.keys() & after.keys()) if before[name] != after[name]),
        "the split or the teacher is another one",
    ]
    raise UsageError(
        f"{out} holds a training that began with other cases: {', '.join(found[:3])}; bring them back to go on with "
        "it, or give another folder to begin anew"
    )


def member_cases(job: TrainJob, preparation: Preparation, member: int) -> list[Case]:
    """What one network of the ensemble learns from: everything, or all folds but its own."""
    training = preparation.training
    if job.members_by == "folds":
        return [case for i, case in enumerate(training) if i % job.members != member]
    return training


def train_member(
    job: TrainJob,
    out: Path,
    preparation: Preparation,
    member: int,
    threads: int,
    stop: threading.Event,
    observe: Observe = _unseen,
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
    job: TrainJob, out: Path, preparation: Preparation, threads: int, stop: threading.Event, observe: Observe = _unseen
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
    store.write_json(str(out / "training" / "split.json"), _lists(preparation.split))
    facts = _facts(job, preparation, [state for state in states if state is not None])
    segmodels.save(network, job.card(**ref, training=facts, quality=quality), out, dtype=job.weights)
    shutil.rmtree(out / WORK)


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


def _lists(split: Split) -> dict[str, list[str]]:
    return {"training": list(split.training), "validation": list(split.validation)}


def _facts(job: TrainJob, preparation: Preparation, states: list[dict[str, Any]]) -> dict[str, Any]:
    """What the card says of the training."""
    return {
        "job": job.fingerprint,
        "data": {
            "licence": job.data.licence,
            "source": job.data.source,
            "sha256_of_image_and_mask": preparation.digests,
        },
        "split": _lists(preparation.split),
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
