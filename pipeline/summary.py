"""What a run says of itself: run.json, summary.json, the tables, the report and the line of JSON."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from . import ledger, store
from .errors import StudyError
from .metrics.tables import STAGES, STRUCTURE_COLUMNS, write_tables
from .progress import Progress
from .references import References, held_scores, score_columns
from .report.build import build_report
from .results import mask_url
from .run import Run
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
    hd95_mm: dict[str, float | None]
    studies: list[dict[str, Any]] = field(default_factory=list)
    troubles: tuple[str, ...] = ()  # what went wrong beside the studies themselves
    stopped: bool = False  # while scores were being made

    def to_json(self) -> dict[str, Any]:
        document = asdict(self)
        del document["troubles"], document["stopped"]
        return document

    @property
    def exit_code(self) -> int:
        """0 all published, 1 something failed, 130 interrupted."""
        if self.interrupted or self.stopped:
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


def finish(run: Run, references: References) -> Summary:
    """Close the run: scores, tables, report, summary. Needs nothing that a crash could have taken."""
    run.close()
    references.score()
    troubles = references.troubles
    entries = [_entry(run, p, references.held.get(p.study.name)) for p in run.studies]
    entries += [_input_entry(source, error) for source, error in run.inputs_failed]
    dice, hd95 = _means(run, entries, "dice"), _means(run, entries, "hd95_mm")
    known = [value for value in dice.values() if value is not None]
    summary = Summary(
        run=run.id,
        published=sum(p.state == "published" for p in run.studies),
        failed=sum(e["state"] == "failed" for e in entries),
        interrupted=sum(e["state"] == "interrupted" for e in entries),
        reused=sum(p.reused and p.state == "published" for p in run.studies),
        blocks_computed=sum(p.blocks for p in run.studies),
        seconds=round(time.time() - run.began, 3),
        report=store.join(run.out, "report", "index.html"),
        dice=dice,
        mean_dice=sum(known) / len(known) if known else None,
        hd95_mm=hd95,
        studies=entries,
        stopped=references.stopped and not run.gave_up,
    )
    try:
        _write_all(run, summary, references)
    except Exception as error:  # the masks stand, whatever becomes of the page about them
        logger.exception("the tables and the report could not be written")
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        troubles.append(f"the tables and the report could not be written: {reason}")
        summary = replace(summary, report=None)
    return replace(summary, troubles=tuple(troubles))


def _entry(run: Run, progress: Progress, held: Mapping[str, Any] | None) -> dict[str, Any]:
    published = progress.state == "published"
    structures = []
    for row in (progress.record or {}).get("structures", []) if published else []:
        structures.append(_structure_row(progress.study.name, run.method.card.name, row, held))
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


def _structure_row(study: str, model: str, row: Mapping[str, Any], held: Mapping[str, Any] | None) -> dict[str, Any]:
    """A row of the structures table: what was measured when the mask was published, and its scores."""
    known = {"study": study, "model": model, **row, **score_columns(held, row["label"])}
    return {name: known.get(name) for name in STRUCTURE_COLUMNS}


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


def _means(run: Run, entries: Iterable[Mapping[str, Any]], score: str) -> dict[str, float | None]:
    """The mean of a score per structure over the studies in which it has one."""
    if run.job.reference is None:
        return {}
    values: dict[str, list[float]] = {name: [] for name in run.method.structures.values()}
    for entry in entries:
        for row in entry["structures"]:
            if row[score] is not None:
                values[row["structure"]].append(row[score])
    return {name: sum(v) / len(v) if v else None for name, v in values.items()}


def _write_all(run: Run, summary: Summary, references: References) -> None:
    studies, structures = ledger_tables(run.out, summary)
    write_tables(run.out, studies, structures)
    document = summary.to_json()
    facts = {
        **document,
        "model": run.method.model_facts,
        "settings": run.method.settings,
        "runtime": run.runtime.to_json(),
        "versions": versions(),
    }
    messages = {(entry["key"], entry["study"]): entry["message"] for entry in summary.studies}
    redraw = {p.study.name for p in run.studies if not p.reused} | references.compared
    for entry in document["studies"]:
        del entry["source"]  # run.json alone names the sources
    store.write_json(store.join(run.out, "runs", run.id, "summary.json"), document)
    build_report(run.out, facts, studies, structures, messages, redraw, references.mask)


def ledger_tables(out: str, summary: Summary) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the studies and structures tables: all that OUT's ledger holds, and what has no end in this run."""
    studies: list[dict[str, Any]] = []
    structures: list[dict[str, Any]] = []
    failed = {(entry["key"], entry["study"]) for entry in summary.studies if entry["state"] == "failed"}
    for key, study, record in sorted(ledger.all_published(out), key=lambda found: found[1]):
        if (key, study) in failed:  # its labels stand, but what is made of them could not be made again
            continue
        held = held_scores(out, key, study)
        seconds = record["seconds"] | ({"surface": held.get("seconds")} if held else {})
        studies.append(
            {
                "study": study,
                "key": key,
                "state": "published",
                "cause": None,
                **{f"seconds_{stage}": seconds.get(stage) for stage in STAGES},
                "peak_rss_bytes": record.get("peak_rss_bytes") or None,
            }
        )
        structures += [_structure_row(study, record["model"]["name"], row, held) for row in record["structures"]]
    known = {entry["key"] for entry in summary.studies}
    others = [
        {"study": record["study"], "key": key, "state": "failed", "cause": record["cause"]}
        for key, record in ledger.failures(out).items()
        if key not in known  # of an earlier command, or of one that has another part of the studies
    ]
    for entry in [*summary.studies, *others]:
        if entry["state"] != "published":
            studies.append({name: entry[name] for name in ("study", "key", "state", "cause")})
    return studies, structures
