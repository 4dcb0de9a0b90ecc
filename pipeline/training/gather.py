"""The cases of a training: read, split, and checked as a whole."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segmodels.train.cases import Case

from .. import store
from ..errors import StudyError, UsageError
from .claim import WORK, has_learned
from .job import TrainJob
from .pairs import Pair, Split, draw_split, find_pairs
from .prepare import prepare
from .teacher import Teacher, load_teacher

Observe = Callable[[str, float, Mapping[str, float]], None]
"""Told of what goes on: the stage, the share of it that is done (0 to 1), facts to show."""


def unseen(stage: str, share: float, facts: Mapping[str, float]) -> None:
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


def prepare_cases(job: TrainJob, out: Path, stop: threading.Event, observe: Observe = unseen) -> Preparation:
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
    wanted, split = split, Split(*(tuple(n for n in p if n in cases) for p in (split.training, split.validation)))
    for part, left, purpose in (
        (wanted.training, split.training, "learn from"),
        (wanted.validation, split.validation, "measure the model with"),
    ):
        if part and not left:
            where, why = failures[0]
            raise UsageError(f"no case is left to {purpose}; the first that was set aside: {where}: {why}")
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
    now: dict[str, Any] = {"sha256_of_image_and_mask": preparation.digests, "split": preparation.split.lists}
    now |= {"teacher": preparation.teacher.hash} if preparation.teacher is not None else {}
    begun = store.read_json(path)
    if begun is None or not has_learned(out):
        store.write_json(path, now)  # nothing is learned yet
        return
    if begun == now:
        return
    before, after = begun["sha256_of_image_and_mask"], preparation.digests
    found = [
        *(f"{name} is gone or was set aside" for name in sorted(before.keys() - after.keys())),
        *(f"{name} is new" for name in sorted(after.keys() - before.keys())),
        *(f"{name} has changed" for name in sorted(before.keys() & after.keys()) if before[name] != after[name]),
        *(f"the {what} is another one" for what in ("split", "teacher") if begun.get(what) != now.get(what)),
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
