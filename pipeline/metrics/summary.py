"""What scores come to over a set of studies: mean, median and how sure the mean is."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from .intervals import bootstrap_interval

LEVEL = 0.95
ALL = "mean of structures"
SUMMARY_COLUMNS = {
    "label": "int64",
    "structure": "string",
    "score": "string",
    "n": "int64",
    **dict.fromkeys(("mean", "median", "low", "high"), "float64"),
}
Row = dict[str, Any]


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are there."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def summarise(rows: Collection[Row], names: Mapping[int, str], score_columns: Sequence[str]) -> list[Row]:
    """Per structure and score: n, mean, median, and the 95 % bootstrap interval of the mean over studies.

    The last rows are of each study's mean over its structures. Studies without the score are left out; an interval
    takes two.
    """
    summary = []
    for label, name in names.items():
        of_label = [row for row in rows if row["label"] == label]
        summary += [_summary_row(label, name, score, [row[score] for row in of_label]) for score in score_columns]
    if len(names) > 1:
        of_study = [list(same) for _, same in itertools.groupby(rows, key=lambda row: row["study"])]
        for score in score_columns:
            summary.append(_summary_row(None, ALL, score, [mean(r[score] for r in same) for same in of_study]))
    return summary


def _summary_row(label: int | None, structure: str, score: str, values: Sequence[float | None]) -> Row:
    known = [value for value in values if value is not None]
    # One study says nothing of how studies differ.
    low, high = bootstrap_interval(known, LEVEL) if len(known) > 1 else (None, None)
    return {
        "label": label,
        "structure": structure,
        "score": score,
        "n": len(known),
        "mean": statistics.fmean(known) if known else None,
        "median": statistics.median(known) if known else None,
        "low": low,
        "high": high,
    }
