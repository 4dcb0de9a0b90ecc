"""The reference masks of a run: each published mask is compared with its own once, and the ledger keeps the result.

    OUT/ledger/<key>/overlap/<study>.json   reference (its digest), run (that made the mask), confusion, binary (whether
                                            255 is label 1), surface (scores per label), seconds

First every pair is counted, because only the whole set of references says what 255 means; then surfaces are measured.
"""

from __future__ import annotations

import posixpath
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from . import ledger, store
from .engine import resident_bytes
from .errors import StudyError
from .metrics.masks import Mask, binary_mask, stored_mask, study_mask, without_void
from .metrics.overlap import confusion, is_binary_255, overlaps
from .metrics.surface import TOLERANCE_MM, surface_scores
from .metrics.tables import surface_dice_column
from .progress import Progress
from .run import Run
from .sources import Found, Study, digest_of, find_studies
from .sources.names import study_name
from .start import memory_budget

LEAST_ROOM = 64 << 20  # half a million surface points: what is small is measured however little is left


class References:
    """The reference masks of a run, by study."""

    def __init__(self, folder: str | None, run: Run) -> None:
        self.run = run
        self.studies: dict[str, Study] = {}
        self.held: dict[str, dict[str, Any]] = {}
        self.compared: set[str] = set()  # anew, in this run
        self.failed: list[Progress] = []  # could not be compared
        self.troubles: list[str] = []
        self.unusable: dict[str, StudyError] = {}  # by the name that the reference has
        self.stopped = False
        if folder is None:
            return
        found = find_studies([folder], exclude=run.out, channels=False)
        self.studies = {study.name: study for study in found.studies}
        self.unusable = {study_name(posixpath.basename(source)): error for source, error in found.failures}
        scans = Found([progress.study for progress in run.studies], run.inputs_failed)
        if len(run.job.inputs) == 1 and is_itself(scans, run.job.inputs[0]) and is_itself(found, folder):
            self.studies = {scans.studies[0].name: found.studies[0]}

    def score(self) -> None:
        """Compare what is published with its references. What goes wrong stands in `troubles` and in messages."""
        pairs = [
            (progress, self.studies[progress.study.name])
            for progress in self.run.studies
            if progress.state == "published" and progress.image is not None and progress.study.name in self.studies
        ]
        for progress, reference in pairs:
            with self._noted(progress, "scores"):
                self._count(progress, reference)
        for progress in self.run.studies:
            error = self._why_none(progress.study.name)
            if error is not None and progress.state == "published":
                with self._noted(progress, "scores"):
                    raise error
        for progress in self.failed:
            self._forget(progress)
        self._settle_255()
        for progress, reference in pairs:
            if progress.study.name in self.held:
                with self._noted(progress, "surface scores"):
                    self._measure(progress, reference)

    @contextmanager
    def _noted(self, progress: Progress, what: str) -> Iterator[None]:
        try:
            yield
        except (StudyError, OSError) as error:
            progress.message = f"published without {what}: {error}"
            if progress.study.name not in self.held:
                self.failed.append(progress)
            self.troubles.append(f"the reference of {progress.key}: no {what}")

    def _why_none(self, study: str) -> StudyError | None:
        """What is wrong where a study has no reference: its file cannot be read, or all are called otherwise."""
        if study in self.unusable and study not in self.studies:
            return self.unusable[study]
        if self.studies and not any(progress.study.name in self.studies for progress in self.run.studies):
            called = ", ".join(sorted(self.studies)[:3])
            return StudyError("input", f"no reference has the name of a study; they are called {called}")
        return None

    def _count(self, progress: Progress, reference: Study) -> None:
        digest, run = digest_of(reference), (progress.record or {}).get("run")
        held = held_scores(self.run.out, progress.key, progress.study.name)
        if held is None or (held["reference"], held.get("run")) != (digest, run):
            counts = confusion(self._mask(progress), study_mask(reference))
            held = {"reference": digest, "run": run, "confusion": counts, "binary": False}
            self._keep(progress, held)
            self.compared.add(progress.study.name)
        self.held[progress.study.name] = held

    def _forget(self, progress: Progress) -> None:
        """Scores against an earlier reference are no scores against this one: tables and page must not show them."""
        with suppress(OSError):
            store.delete(_url(self.run.out, progress.key, progress.study.name))
        self.compared.add(progress.study.name)

    def mask(self, study: str) -> Mask | None:
        """The reference of a study that fits it, as it was scored: 255 is label 1 or nothing."""
        held = self.held.get(study)
        if held is None:
            return None
        found = study_mask(self.studies[study])
        return binary_mask(found) if held["binary"] else without_void(found)

    def _settle_255(self) -> None:
        """Whether 255 is label 1 in these references: the whole set decides. What later runs show goes by it too."""
        binary = is_binary_255(held["confusion"] for held in self.held.values())
        for progress in self.run.studies:
            held = self.held.get(progress.study.name)
            if held is not None and held["binary"] != binary:
                held["binary"] = binary
                held.pop("surface", None)
                with suppress(OSError):
                    self._keep(progress, held)

    def _measure(self, progress: Progress, reference: Study) -> None:
        held = self.held[progress.study.name]
        left = [label for label in self.run.method.structures if str(label) not in held.get("surface", {})]
        if not left:
            return
        if self.run.stop.is_set():
            self.stopped = True
            raise StudyError("timeout", "the command was interrupted; run it again to go on")
        began = time.perf_counter()
        found, too_large = surface_scores(
            self._mask(progress), study_mask(reference), left, binary_255=held["binary"], room=self._room()
        )
        held["surface"] = held.get("surface", {}) | {str(label): values for label, values in found.items()}
        held["seconds"] = time.perf_counter() - began
        self._keep(progress, held)
        if too_large:
            raise too_large_error({self.run.method.structures[n]: size for n, size in too_large.items()})

    def _room(self) -> int:
        return surface_room(memory_budget(self.run.job, self.run.workers))

    def _mask(self, progress: Progress) -> Mask:
        labels = self.run.labels_of(progress)
        return stored_mask(store.join(labels.group, "0"), labels.affine)

    def _keep(self, progress: Progress, held: Mapping[str, Any]) -> None:
        store.write_json(_url(self.run.out, progress.key, progress.study.name), held)


def is_itself(found: Found, given: str) -> bool:
    """Whether what was given is one study itself and no folder of studies: such two go together by being given."""
    return len(found.studies) == 1 and not found.failures and found.studies[0].source == given


def surface_room(budget: int) -> int:
    """Bytes that surface points may take in this process, which is to stay within `budget`."""
    return max(LEAST_ROOM, budget - resident_bytes())


def too_large_error(structures: Mapping[str, int]) -> StudyError:
    """What is to be said of structures whose surface points take at least so many bytes."""
    names = ", ".join(f"{name} (over {size / 2**20:.0f} MiB)" for name, size in structures.items())
    return StudyError("memory", f"the surface points of {names} do not fit into --memory; give more")


def _url(out: str, key: str, study: str) -> str:
    return store.join(ledger.folder(out, key), "overlap", study + ".json")


def held_scores(out: str, key: str, study: str) -> dict[str, Any] | None:
    """What the ledger keeps of the comparison of a published mask with its reference."""
    return store.read_json(_url(out, key, study))


def score_columns(held: Mapping[str, Any] | None, label: int) -> dict[str, float | None]:
    """The scores of one structure, as columns of the structures table."""
    if held is None:
        return {}
    surface = dict(held.get("surface", {}).get(str(label), {}))
    if surface:
        surface[surface_dice_column(TOLERANCE_MM)] = surface.pop("surface_dice")
    return overlaps(held["confusion"], binary_255=held["binary"])[label].scores() | surface
