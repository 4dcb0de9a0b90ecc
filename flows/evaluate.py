"""`maskmill evaluate`: masks that anyone made against references, with confidence intervals."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.job import parse_bytes
from pipeline.metrics.tables import HIGHEST_STRUCTURE
from pipeline.sources.names import shown

from .progress import SECONDS_BETWEEN_LINES

MOST_LISTED = 20


def evaluate_command(
    masks: str,
    references: str,
    out: str,
    *,
    labels: str | None,
    model: str | None,
    tolerance: float,
    memory: str | None,
    as_json: bool,
) -> int:
    """Score, write OUT/metrics, print a table on stderr and, with `as_json`, one line of JSON to stdout."""
    from pipeline.evaluation import evaluate

    told = time.monotonic()

    def observe(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            print(f"{done} of {total} studies", file=sys.stderr, flush=True)

    evaluation = evaluate(
        masks,
        references,
        out,
        names=structure_names(labels, model),
        tolerance_mm=tolerance,
        memory=_bytes(memory),
        observe=observe,
    )
    for row in evaluation.studies:
        if row["state"] == "failed":
            print(f"failed: {shown(row['source'])}: {row['cause']}: {row['message']}", file=sys.stderr)
        elif row["message"]:
            print(f"note: {row['study']}: {row['message']}", file=sys.stderr)
    if evaluation.unnamed:
        listed = ", ".join(map(str, evaluation.unnamed[:MOST_LISTED]))
        print(f"note: labels without a name are not scored: {listed}", file=sys.stderr)
    for line in summary_lines(evaluation.summary):
        print(line, file=sys.stderr)
    scored, total = len(evaluation.studies) - evaluation.failed, len(evaluation.studies)
    print(f"{scored} of {total} studies scored; tables: {out.rstrip('/')}/metrics", file=sys.stderr)
    if as_json:
        print(json.dumps(evaluation.to_json()))
    return evaluation.exit_code


def structure_names(labels: str | None, model: str | None) -> dict[int, str] | None:
    """The structures by label: of a JSON file {"1": "name"}, of a model's card, or None. Raises UsageError."""
    if labels is not None and model is not None:
        raise UsageError("give --labels or -m, not both: each says what the structures are called")
    if model is not None:
        import segmodels

        return {int(label): facts.name for label, facts in segmodels.load(model).card.labels.items()}
    return None if labels is None else _read_names(labels)


def _read_names(path: str) -> dict[int, str]:
    try:
        document = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the labels {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UsageError(f'the labels {path} are no JSON; expected {{"1": "liver", "2": "spleen"}}') from None
    names: dict[int, str] = {}
    for label, name in document.items() if isinstance(document, dict) else [("", None)]:
        name = name.get("name") if isinstance(name, dict) else name  # as in a card
        if not (_is_label(label) and _is_text(name)) or int(label) in names or name in names.values():
            raise UsageError(
                f"the labels {path} must be whole numbers up to {HIGHEST_STRUCTURE} with a name of its own each, "
                'such as {"1": "liver", "2": "spleen"}'
            )
        names[int(label)] = name
    names.pop(0, None)
    if not names:
        raise UsageError(f"the labels {path} name no structure")
    return names


def _is_label(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= HIGHEST_STRUCTURE


def _is_text(name: Any) -> bool:
    """Whether it is text that can be written to a table; JSON may hold half a character."""
    try:
        return isinstance(name, str) and bool(name.encode())
    except UnicodeEncodeError:
        return False


def _bytes(memory: str | None) -> int | None:
    try:
        return None if memory is None else parse_bytes(memory)
    except ValueError as error:
        raise UsageError(f"memory: {error}") from None


def summary_lines(summary: list[dict[str, Any]]) -> list[str]:
    """The summary as a table: a line per structure with n, mean Dice, HD95 and surface Dice and their intervals."""
    columns = [s for s in dict.fromkeys(row["score"] for row in summary) if s in ("dice", "hd95_mm") or "surface" in s]
    lines = [f"{'structure':28} {'n':>5} " + " ".join(f"{score:>24}" for score in columns)]
    by_structure: dict[tuple[int | None, str], dict[str, dict[str, Any]]] = {}
    for row in summary:
        by_structure.setdefault((row["label"], row["structure"]), {})[row["score"]] = row
    for (_, structure), scores in by_structure.items():
        cells = " ".join(f"{_cell(scores[score]):>24}" for score in columns)
        lines.append(f"{structure[:28]:28} {scores['dice']['n']:5} {cells}")
    return lines


def _cell(row: dict[str, Any]) -> str:
    if row["mean"] is None:
        return "-"
    digits = 2 if row["score"].endswith("_mm") else 3
    if row["low"] is None:
        return f"{row['mean']:.{digits}f}"
    return f"{row['mean']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
