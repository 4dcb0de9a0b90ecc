"""What a run says of itself: run.json, summary.json, the tables, the report and the line of JSON."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from . import ledger, store
from .errors import StudyError
from .metrics.overlap import Confusion, confusion, is_binary_255, scores
from .metrics.tables import SCORES, STAGES, STRUCTURE_COLUMNS, write_tables
from .report.build import build_report
from .results import mask_url
from .run import Progress, Run
from .sources import Study, digest_of, find_studies
from .sources.names import study_name

logger = logging.getLogger("maskmill")

PACKAGES = ("maskmill", "torch", "monai", "zarr", "numpy", "nibabel", "ray", "prefect")


@dataclass(frozen=True)
class Summary:
    """The end of a run: the fields of `segment --json`."""

    run: str
    published: int
    failed: int
    interrupted: int
    reused: int
    blocks_computed: int
    seconds: float
    report: str | None
    dice: dict[str, float | None]
    mean_dice: float | None
    studies: list[dict[str, Any]] = field(default_factory=list)
    troubles: tuple[str, ...] = ()  # what went wrong beside the studies themselves

    def to_json(self) -> dict[str, Any]:
        document = asdict(self)
        del document["troubles"]
        return document

    @property
    def exit_code(self) -> int:
        """0 all published, 1 something failed, 130 interrupted."""
        if self.interrupted:
            return 130
        return 1 if self.failed or self.troubles else 0


def write_run(run: Run) -> None:
    """OUT/runs/<run id>/run.json: the work this run has. The one file that names the sources."""
    method = run.method
    store.write_json(
        store.join(run.out, "runs", run.id, "run.json"),
        {
            "run": run.id,
            "began": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(run.began)),
            "job": run.job.model_dump(mode="json"),
            "model": method.model_facts,
            "settings": method.settings,
            "runtime": method.spec.runtime.to_json(),
            "versions": versions(),
            "studies": {p.key: {"study": p.study.name, "source": p.study.source} for p in run.studies},
        },
    )


def versions() -> dict[str, str]:
    """Versions of what computed, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class References:
    """The reference masks of a run, by study; each pair of mask and reference is compared once."""

    def __init__(self, folder: str | None, run: Run) -> None:
        self.studies: dict[str, Study] = {}
        self.confusions: dict[str, Confusion] = {}
        self._held: dict[str, dict[str, Any]] = {}  # by URL
        if folder is None:
            return
        found = find_studies([folder], exclude=run.out)
        self.studies = {study.name: study for study in found.studies}
        if len(run.studies) == len(found.studies) == 1:  # one file against one file: names do not matter
            self.studies = {run.studies[0].study.name: found.studies[0]}

    def compare(self, run: Run, progress: Progress) -> None:
        """Count this study's mask against its reference. Raises StudyError when the reference does not fit."""
        reference = self.studies.get(progress.study.name)
        if reference is None or progress.image is None:
            return
        labels = run.labels_of(progress)
        url = _overlap_url(run.out, progress.key, progress.study.name)
        held = store.read_json(url)
        if held is None or held["reference"] != digest_of(reference):
            counts, digest = confusion(store.join(labels.group, "0"), labels.affine, reference)
            held = {"reference": digest, "confusion": counts, "binary": False}
            store.write_json(url, held)
        self.confusions[progress.study.name] = held["confusion"]
        self._held[url] = held

    def settle(self) -> bool:
        """Whether 255 is label 1 in these references: the whole set decides. What later runs show goes by it too."""
        binary = is_binary_255(list(self.confusions.values()))
        for url, held in self._held.items():
            if held.get("binary") != binary:
                with suppress(OSError):
                    store.write_json(url, {**held, "binary": binary})
        return binary


def finish(run: Run, references: References) -> Summary:
    """Close the run: scores, tables, report, summary. Needs nothing that a crash could have taken."""
    run.close()
    troubles = []
    for progress in run.studies:
        if progress.state == "published":
            try:
                references.compare(run, progress)
            except (StudyError, OSError) as error:
                progress.message = f"published without scores: {error}"
                troubles.append(f"the reference of {progress.key} does not fit")
    binary = references.settle()
    entries = [_entry(run, p, references.confusions.get(p.study.name), binary) for p in run.studies]
    entries += [_input_entry(source, error) for source, error in run.inputs_failed]
    dice = _mean_dice(run, entries)
    known = [value for value in dice.values() if value is not None]
    summary = Summary(
        run=run.id,
        published=sum(p.state == "published" for p in run.studies),
        failed=sum(e["state"] == "failed" for e in entries),
        interrupted=sum(e["state"] == "interrupted" for e in entries),
        reused=sum(p.reused for p in run.studies),
        blocks_computed=sum(p.blocks for p in run.studies),
        seconds=round(time.time() - run.began, 3),
        report=store.join(run.out, "report", "index.html"),
        dice=dice,
        mean_dice=sum(known) / len(known) if known else None,
        studies=entries,
    )
    try:
        _write_all(run, summary)
    except Exception as error:  # the masks stand, whatever becomes of the page about them
        logger.exception("the tables and the report could not be written")
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        troubles.append(f"the tables and the report could not be written: {reason}")
        summary = replace(summary, report=None)
    return replace(summary, troubles=tuple(troubles))


def _entry(run: Run, progress: Progress, counts: Confusion | None, binary: bool) -> dict[str, Any]:
    published = progress.state == "published"
    structures = []
    for row in (progress.record or {}).get("structures", []) if published else []:
        measured = scores(counts, row["label"], binary_255=binary) if counts is not None else {}
        whose = {"study": progress.study.name, "model": run.method.card.name}
        # What an older version published may lack a column of today.
        structures.append({**dict.fromkeys(STRUCTURE_COLUMNS), **whose, **row, **measured})
    kind = run.job.formats[0] if run.job.formats else None
    return {
        "study": progress.study.name,
        "source": progress.study.source,
        "key": progress.key,
        "state": progress.state,
        "cause": progress.cause,
        "message": progress.message,
        "mask": mask_url(run.out, progress.study.name, kind) if published and kind else None,
        "image": progress.image.group if progress.image and published else None,
        "structures": structures,
        "warnings": list((progress.record or {}).get("warnings", [])),
    }


def _input_entry(source: str, error: StudyError) -> dict[str, Any]:
    return {
        "study": study_name(source.rstrip("/").rpartition("/")[2]),
        "source": source,
        "key": ledger.location_key(source),
        "state": "failed",
        "cause": error.cause,
        "message": error.message,
        "mask": None,
        "image": None,
        "structures": [],
        "warnings": [],
    }


def _mean_dice(run: Run, entries: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """Mean Dice per structure over the studies in which it has one."""
    if run.job.reference is None:
        return {}
    values: dict[str, list[float]] = {name: [] for name in run.method.structures.values()}
    for entry in entries:
        for row in entry["structures"]:
            if row.get("dice") is not None:
                values[row["structure"]].append(row["dice"])
    return {name: sum(v) / len(v) if v else None for name, v in values.items()}


def _write_all(run: Run, summary: Summary) -> None:
    studies, structures = ledger_tables(run.out, summary)
    write_tables(run.out, studies, structures)
    document = summary.to_json()
    facts = {
        **document,
        "model": run.method.model_facts,
        "settings": run.method.settings,
        "runtime": run.method.spec.runtime.to_json(),
        "versions": versions(),
    }
    messages = {entry["key"]: entry["message"] for entry in summary.studies}
    redraw = {p.study.name for p in run.studies if not p.reused}
    for entry in document["studies"]:
        del entry["source"]  # run.json alone names the sources
    store.write_json(store.join(run.out, "runs", run.id, "summary.json"), document)
    build_report(run.out, facts, studies, structures, messages, redraw)


def _overlap_url(out: str, key: str, study: str) -> str:
    return store.join(ledger.folder(out, key), "overlap", study + ".json")


def _is_scored(row: Mapping[str, Any]) -> bool:
    return any(row[name] is not None for name in SCORES)


def _scored_before(out: str, key: str, study: str, record: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """A structure's row with the scores that an earlier run gave it, if one did."""
    held = store.read_json(_overlap_url(out, key, study))
    measured = scores(held["confusion"], row["label"], binary_255=held["binary"]) if held else {}
    return {"study": study, "model": record["model"]["name"], **row, **measured}


def ledger_tables(out: str, summary: Summary) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the studies and structures tables: all that OUT's ledger holds, with this run's scores on top."""
    fresh = {(e["study"], r["label"]): r for e in summary.studies for r in e["structures"] if _is_scored(r)}
    studies, structures = [], []
    for key, study, record in sorted(ledger.all_published(out), key=lambda found: found[1]):
        studies.append(
            {
                "study": study,
                "key": key,
                "state": "published",
                "cause": None,
                **{f"seconds_{stage}": record["seconds"].get(stage) for stage in STAGES},
                "peak_rss_bytes": record.get("peak_rss_bytes") or None,
            }
        )
        for row in record["structures"]:
            scored = fresh.get((study, row["label"])) or _scored_before(out, key, study, record, row)
            structures.append(scored)
    for entry in summary.studies:
        if entry["state"] != "published":
            studies.append({name: entry[name] for name in ("study", "key", "state", "cause")})
    return studies, structures
