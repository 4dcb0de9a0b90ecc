"""Scores of masks that anyone made: every mask against the reference of its name, and how sure the means are."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import store
from .engine import keep_few_arenas, share_of_machine
from .errors import Cause, StudyError, UsageError
from .geometry import voxel_volume_mm3
from .metrics.components import Components, count_components
from .metrics.intervals import RESAMPLES
from .metrics.masks import VOID, binary_mask, study_mask
from .metrics.overlap import Confusion, confusion, is_binary_255, overlaps, with_label_1
from .metrics.structures import component_columns
from .metrics.summary import LEVEL, SUMMARY_COLUMNS, mean, summarise
from .metrics.surface import TOLERANCE_MM, surface_scores
from .metrics.tables import COMPONENTS, HIGHEST_STRUCTURE, score_names, surface_dice_column, write_table
from .objects import check_address
from .references import is_itself, surface_room, too_large_error
from .sources import Found, Study, find_studies
from .sources.names import shown, study_name

Row = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """What was found. studies: study, source, state (scored or failed), cause, message, seconds and the mean over its
    structures of each score; structures: the rows of the structures table; summary: per structure and score its n,
    mean, median and the interval of the mean, low to high; unnamed: labels that occur but have no name."""

    out: str
    tolerance_mm: float
    studies: list[Row]
    structures: list[Row]
    summary: list[Row]
    unnamed: tuple[int, ...]

    @property
    def failed(self) -> int:
        return sum(row["state"] == "failed" for row in self.studies)

    @property
    def exit_code(self) -> int:
        """0 all scored in full, 1 something was not."""
        return 1 if any(row["message"] for row in self.studies) else 0

    def to_json(self) -> dict[str, Any]:
        return {
            "scored": len(self.studies) - self.failed,
            "failed": self.failed,
            "tolerance_mm": self.tolerance_mm,
            "level": LEVEL,
            "resamples": RESAMPLES,
            "tables": store.join(self.out, "metrics"),
            "unnamed_labels": list(self.unnamed),
            "summary": self.summary,
            "studies": self.studies,
        }


@dataclass
class _Pair:
    """A mask and its reference on their way; `error` says what went wrong, also where one of the two is missing."""

    name: str
    source: str
    mask: Study | None = None
    reference: Study | None = None
    counts: Confusion | None = None
    is_binary: bool = False  # the mask: its 255 is label 1
    rows: list[Row] | None = None
    error: StudyError | None = None
    seconds: float = 0.0


def evaluate(
    masks: str | Path,
    references: str | Path,
    out: str | Path,
    *,
    names: Mapping[int, str] | None = None,
    tolerance_mm: float = TOLERANCE_MM,
    memory: int | None = None,
    observe: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Score masks against references (NIfTI or OME-Zarr labels, files or folders) and write OUT/metrics.

    names: the structures, label to name; None takes every label that occurs. memory: bytes this process may take, by
    default 80 % of the machine's. observe: told how many of how many studies are done. A pair that cannot be scored is
    a failed study of the result. Raises UsageError when nothing could start.
    """
    keep_few_arenas()
    if not (math.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise UsageError(f"the tolerance is {tolerance_mm} mm; expected 0 or more")
    given = str(masks), str(references)
    for url, what in zip((*given, str(out)), ("MASKS", "REFERENCES", "OUT"), strict=True):
        check_address(url, what)
    pairs = _paired(_found(given[0], "MASKS"), _found(given[1], "REFERENCES"), given)
    _claim(str(out))
    for pair in pairs:
        _try(pair, _count)
    binary, present = _settle_labels(pairs)
    names = dict(names) if names is not None else {label: f"label {label}" for label in present}
    for done, pair in enumerate(pairs):
        observe(done, len(pairs))
        if pair.counts is not None:
            _try(pair, lambda pair: _measure(pair, names, binary, tolerance_mm, memory or share_of_machine(1)))
    rows = [row for pair in pairs for row in pair.rows or []]
    summary = summarise(rows, names, score_names(tolerance_mm))
    unnamed = tuple(label for label in present if label not in names)
    studies = [_study_row(pair, score_names(tolerance_mm)) for pair in pairs]
    evaluation = Evaluation(str(out), tolerance_mm, studies, rows, summary, unnamed)
    try:
        _write(evaluation)
    except OSError as error:
        raise StudyError("storage", f"the tables cannot be written: {error.strerror or 'i/o error'}") from None
    return evaluation


def _claim(out: str) -> None:
    if store.exists(store.join(out, "ledger")):
        raise UsageError(f"OUT {out} holds results of `segment`, whose tables would be overwritten; give another OUT")
    try:
        probe = store.join(out, "metrics", f".probe-{secrets.token_hex(4)}")
        store.write(probe, b"")
        store.delete(probe)
    except OSError as error:
        raise UsageError(f"OUT {out}/metrics cannot be written: {error.strerror}") from None


def _found(given: str, what: str) -> Found:
    if store.exists(store.join(given, "ledger", "out.json")):
        raise UsageError(f"{what} {shown(given)} is the OUT of `segment`: give the masks folder in it")
    found = find_studies([given], exclude=None, channels=False)
    if not found.studies:
        reasons = "; ".join(f"{shown(source)}: {error}" for source, error in found.failures[:3])
        raise UsageError(f"{what} yields no mask ({reasons}); give a NIfTI file, an OME-Zarr or a folder of these")
    return found


def _paired(masks: Found, references: Found, given: tuple[str, str]) -> list[_Pair]:
    """Masks and references by name, in order of the names. A mask and a reference that are given themselves, not by
    folders, go together whatever they are called. Raises UsageError where no two belong together."""
    ours = {study.name: study for study in masks.studies}
    theirs = {study.name: study for study in references.studies}
    if is_itself(masks, given[0]) and is_itself(references, given[1]):
        theirs = dict(zip(ours, theirs.values(), strict=True))
    if not ours.keys() & theirs.keys():
        raise UsageError(
            f"no mask has a reference of its name: masks are called {_few(ours)}, references {_few(theirs)}"
        )
    pairs = []
    for name in sorted(ours.keys() | theirs.keys()):
        mask, reference = ours.get(name), theirs.get(name)
        source = (mask or theirs[name]).source
        error = None
        if mask is None or reference is None:
            missing = "mask" if mask is None else "reference"
            error = StudyError("input", f"there is no {missing} of this name; expected {name}.nii.gz or the like")
        pairs.append(_Pair(name, source, mask, reference, error=error))
    for source, error in [*masks.failures, *references.failures]:
        pairs.append(_Pair(study_name(source.rstrip("/").rpartition("/")[2]), source, error=error))
    return pairs


def _few(names: Iterable[str], most: int = 3) -> str:
    listed = sorted(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _try(pair: _Pair, stage: Callable[[_Pair], None]) -> None:
    """One stage of one pair; what goes wrong is this pair's failure and no other's."""
    began = time.perf_counter()
    if pair.error is None:
        try:
            stage(pair)
        except StudyError as error:
            pair.error = error
        except OSError as error:
            pair.error = StudyError("storage", f"reading failed: {error.strerror or 'i/o error'}")
        except Exception as error:
            pair.error = StudyError("crash", f"scoring failed: {type(error).__name__}")
    pair.seconds += time.perf_counter() - began


def _count(pair: _Pair) -> None:
    assert pair.mask is not None
    assert pair.reference is not None
    counts = confusion(study_mask(pair.mask, "mask"), study_mask(pair.reference))
    highest = max(int(found.partition(",")[0]) for found in counts)
    if highest > HIGHEST_STRUCTURE:
        raise StudyError("input", f"the mask holds the label {highest}; expected at most {HIGHEST_STRUCTURE}")
    pair.counts = counts


def _settle_labels(pairs: Iterable[_Pair]) -> tuple[bool, list[int]]:
    """What 255 stands for, which the whole sets decide: in masks at once, for references as the flag that is given.
    And all labels above 0 that occur."""
    counted = [pair for pair in pairs if pair.counts is not None]
    if is_binary_255((pair.counts or {} for pair in counted), side=0):
        for pair in counted:
            pair.counts, pair.is_binary = with_label_1(pair.counts or {}), True
    binary = is_binary_255(pair.counts or {} for pair in counted)
    labels = set()
    for ours, theirs in (map(int, found.split(",")) for pair in counted for found in pair.counts or {}):
        labels |= {ours, theirs if theirs != VOID else int(binary)}
    return binary, sorted(labels - {0})


def _measure(pair: _Pair, names: Mapping[int, str], binary: bool, tolerance_mm: float, memory: int) -> None:
    assert pair.mask is not None
    assert pair.reference is not None
    assert pair.counts is not None
    mask, reference = study_mask(pair.mask, "mask"), study_mask(pair.reference)
    mask = binary_mask(mask) if pair.is_binary else mask
    pieces = count_components(mask.slabs(), mask.shape)
    room = surface_room(memory)
    surface, too_large = surface_scores(
        mask, reference, list(names), binary_255=binary, room=room, tolerance_mm=tolerance_mm
    )
    voxel_ml = voxel_volume_mm3(mask.affine) / 1000
    pair.rows = []
    counted = overlaps(pair.counts, binary_255=binary)
    for label, name in names.items():
        overlap = counted[label]
        ours, theirs = overlap.anywhere, overlap.reference
        row: Row = {"study": pair.name, "label": label, "structure": name}
        row |= {"voxels": ours, "volume_ml": ours * voxel_ml}
        row |= {"reference_voxels": theirs, "reference_volume_ml": theirs * voxel_ml}
        row |= component_columns(pieces.get(label, Components()), voxel_ml)
        row |= dict.fromkeys(score_names(tolerance_mm)) | overlap.scores()
        if label in surface:
            row |= {"hd95_mm": surface[label]["hd95_mm"], "asd_mm": surface[label]["asd_mm"]}
            row[surface_dice_column(tolerance_mm)] = surface[label]["surface_dice"]
        pair.rows.append(row)
    if too_large:
        pair.error = too_large_error({names[label]: size for label, size in too_large.items()})


def _study_row(pair: _Pair, score_columns: Sequence[str]) -> Row:
    cause: Cause | None = pair.error.cause if pair.error else None
    row: Row = {
        "study": pair.name,
        "source": pair.source,
        "state": "failed" if pair.rows is None else "scored",
        "cause": cause,
        "message": pair.error.message if pair.error else None,
        "seconds": round(pair.seconds, 3),
    }
    return row | {f"mean_{score}": mean(found[score] for found in pair.rows or []) for score in score_columns}


def _write(evaluation: Evaluation) -> None:
    """OUT/metrics: studies, structures and summary as tables, the summary as JSON too. None of them names a source."""
    columns = dict.fromkeys(score_names(evaluation.tolerance_mm), "float64")
    numbers = {"voxels": "int64", "volume_ml": "float64"}
    structures = {"study": "string", "label": "int64", "structure": "string", **numbers}
    structures |= {f"reference_{name}": kind for name, kind in numbers.items()} | COMPONENTS | columns
    studies = dict.fromkeys(("study", "state", "cause", "message"), "string") | {"seconds": "float64"}
    studies |= {f"mean_{name}": kind for name, kind in columns.items()}
    write_table(evaluation.out, "studies", studies, evaluation.studies)
    write_table(evaluation.out, "structures", structures, evaluation.structures)
    write_table(evaluation.out, "summary", SUMMARY_COLUMNS, evaluation.summary)
    document = evaluation.to_json()
    document["studies"] = [{k: v for k, v in row.items() if k != "source"} for row in evaluation.studies]
    del document["tables"]
    store.write_json(store.join(evaluation.out, "metrics", "summary.json"), document)
