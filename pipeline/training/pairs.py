"""Which image goes with which mask, and which pairs only measure."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import StudyError, UsageError
from ..sources import Study, find_studies
from ..sources.names import shown
from .job import Data
from .job import Split as SplitSettings


@dataclass(frozen=True)
class Pair:
    """An image and its mask; `name` is the study's."""

    image: Study
    mask: Study

    @property
    def name(self) -> str:
        return self.image.name


@dataclass(frozen=True)
class Split:
    """Names of the cases to learn from and of those that only measure."""

    training: tuple[str, ...]
    validation: tuple[str, ...]

    @property
    def lists(self) -> dict[str, list[str]]:
        """As split.json holds it."""
        return {"training": list(self.training), "validation": list(self.validation)}


def find_pairs(data: Data) -> tuple[list[Pair], list[tuple[str, StudyError]]]:
    """All pairs, in order of their names, and what could not become one: (where, why). Raises UsageError for none."""
    if data.masks is not None and Path(data.masks).resolve() in {Path(i).resolve() for i in data.images}:
        raise UsageError(f"{shown(data.masks)} is both images and masks: give a folder of each")
    found = find_studies(data.images, exclude=data.masks)
    failures = list(found.failures)
    if data.masks is not None:
        if not data.masks.startswith("file:") and not os.path.exists(data.masks):
            raise UsageError(f"the folder of masks {data.masks} does not exist")
        given = find_studies([data.masks], exclude=None, channels=False)
        masks = {study.name: study for study in given.studies}
        failures += given.failures
        images = {study.name for study in found.studies}
        failures += [
            (study.source, StudyError("input", "this mask has no image of the same name"))
            for name, study in masks.items()
            if name not in images
        ]
    else:
        assert data.label_image is not None
        masks = {s.name: inner for s in found.studies if (inner := _inside(s, data.label_image)) is not None}
    pairs = []
    for study in found.studies:
        if study.name in masks:
            pairs.append(Pair(study, masks[study.name]))
        else:
            missing = "mask of the same name" if data.masks is not None else f"label image {data.label_image!r}"
            failures.append((study.source, StudyError("input", f"this image has no {missing}")))
    if not pairs:
        reasons = "; ".join(f"{shown(where)}: {error}" for where, error in failures[:3])
        raise UsageError(f"no image has a mask ({reasons or 'there is no image'})")
    return pairs, failures


def _inside(image: Study, label_image: str) -> Study | None:
    """The label image that an OME-Zarr image carries."""
    if image.kind != "ome-zarr" or "/" in label_image or label_image in ("", ".", ".."):
        return None
    path = Path(image.parts[0]) / "labels" / label_image
    return Study(image.name, str(path), (str(path),), "ome-zarr") if path.is_dir() else None


def draw_split(settings: SplitSettings, names: Sequence[str]) -> Split:
    """The split of the cases: from its file, or drawn by the seed from the sorted names alone. Raises UsageError."""
    if settings.file is not None:
        return _read_split(settings.file, names)
    ordered = sorted(names)
    count = round(settings.validation * len(ordered))
    if settings.validation and len(ordered) > 1:
        count = min(max(count, 1), len(ordered) - 1)
    if settings.validation and len(ordered) == 1:
        raise UsageError(
            "there is one case only: nothing is left to measure the model with; give more cases, or set "
            "split.validation to 0 to go without a measured quality"
        )
    chosen = set(np.random.default_rng(settings.seed).permutation(len(ordered))[:count].tolist())
    return Split(
        tuple(n for i, n in enumerate(ordered) if i not in chosen),
        tuple(n for i, n in enumerate(ordered) if i in chosen),
    )


def _read_split(path: str, names: Sequence[str]) -> Split:
    try:
        held = json.loads(Path(path).read_text("utf-8"))
        training, validation = ([str(n) for n in held[part]] for part in ("training", "validation"))
    except OSError as error:
        raise UsageError(f"split.file {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"split.file {path} must be JSON with the lists 'training' and 'validation'") from None
    known = set(names)
    for part, listed in (("training", training), ("validation", validation)):
        if unknown := sorted(set(listed) - known):
            raise UsageError(f"split.file: no case is called {unknown[0]!r} ({part}, {len(unknown)} such)")
    if both := sorted(set(training) & set(validation)):
        raise UsageError(f"split.file: {both[0]!r} is in both lists: a case learns or measures")
    if not training:
        raise UsageError("split.file: the list 'training' is empty")
    return Split(tuple(sorted(set(training))), tuple(sorted(set(validation))))
