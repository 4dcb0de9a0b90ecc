"""The teacher of a training: a model whose answers are learned from as well. It must answer the same question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from segmodels.errors import ModelError

from ..errors import UsageError
from .job import TrainJob

SAME = ("axes", "channels", "orientation", "spacing_mm", "normalize", "activation", "labels")


@dataclass(frozen=True)
class Teacher:
    """What is kept of it. learned: the images it learned from, as far as its card says: digest to name."""

    name: str
    hash: str
    learned: Mapping[str, str]

    @property
    def described(self) -> dict[str, str]:
        return {"name": self.name, "hash": self.hash}


def load_teacher(job: TrainJob) -> Teacher:
    """The teacher of a job that names one. Raises UsageError where it cannot teach this job's network."""
    import segmodels

    assert job.teacher is not None
    try:
        model = segmodels.load(job.teacher)
    except ModelError as error:
        raise UsageError(f"teacher: {error}") from None
    if model.network is None:
        raise UsageError(f"teacher: {model.card.name} has no network to learn from")
    theirs, ours = model.card.model_dump(mode="json"), job.card().model_dump(mode="json")
    for fact in SAME:
        if theirs[fact] != ours[fact]:
            raise UsageError(f"teacher: its {fact} {theirs[fact]} must be the job's, {ours[fact]}")
    if model.network.margin:
        raise UsageError("teacher: a network with padding 'valid' cannot teach in this version")
    return Teacher(model.card.name, model.hash, _learned(model.card.training))


def _learned(training: object) -> dict[str, str]:
    """Images that a card of ours says were learned from; none where it says nothing."""
    try:
        digests = training["data"]["sha256_of_image_and_mask"]  # type: ignore[index]
        return {str(digests[name][0]): str(name) for name in training["split"]["training"]}  # type: ignore[index]
    except (TypeError, KeyError, IndexError):
        return {}
