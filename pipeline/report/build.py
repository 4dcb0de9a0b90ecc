"""The report of OUT from what the ledger and the tables hold: pictures, then the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import ledger, ome, store
from ..colors import Color, label_colors
from ..errors import StudyError
from ..ingest import image_url
from ..metrics.masks import Mask
from ..metrics.tables import STAGES
from .page import StudyView, write_report
from .pictures import three_planes


def build_report(
    out: str,
    facts: Mapping[str, Any],
    studies: Sequence[Mapping[str, Any]],
    structures: Sequence[Mapping[str, Any]],
    messages: Mapping[tuple[str, str], str | None],
    redraw: set[str],
    reference: Callable[[str], Mask | None] = lambda study: None,
) -> str:
    """Write OUT/report/index.html and its pictures.

    `facts`: what the page says of the run (see `write_report`). `studies`, `structures`: rows of the tables.
    `messages`: remarks by key and name, since two studies may have the same content. `redraw`:
    studies whose picture is made anew; others keep theirs. `reference`: a study's reference mask, whose outlines are
    drawn.
    """
    folder = store.join(out, "report")
    drawn = set(store.names(store.join(folder, "pictures"))) - {f"{name}.png" for name in redraw}
    by_study: dict[str, list[Mapping[str, Any]]] = {}
    for row in structures:
        by_study.setdefault(row["study"], []).append(row)
    views = []
    for row in studies:
        name = row["study"]
        rows = by_study.get(name, []) if row["state"] == "published" else []
        picture = _picture(folder, out, row, rows, drawn, reference) if row["state"] == "published" else None
        views.append(
            StudyView(
                study=name,
                key=row["key"],
                state=row["state"],
                cause=row["cause"],
                message=messages.get((row["key"], name)),
                picture=picture,
                seconds={s: row[f"seconds_{s}"] for s in STAGES if row.get(f"seconds_{s}") is not None},
                structures=rows,
                peak_rss_bytes=row.get("peak_rss_bytes"),
                warnings=(ledger.published(ledger.folder(out, row["key"]), name) or {}).get("warnings", ()),
            )
        )
    return write_report(folder, facts, views)


def _picture(
    folder: str,
    out: str,
    row: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    drawn: set[str],
    reference: Callable[[str], Mask | None],
) -> str | None:
    """The name of the study's picture relative to the page, drawn if need be; None where it cannot be."""
    name = f"{row['study']}.png"
    if name in drawn:
        return f"pictures/{name}"
    group = image_url(out, row["study"])
    model = rows[0]["model"] if rows else None
    if model is None or ome.read_attributes(group) is None:
        return None
    try:
        labels = store.join(group, "labels", model)
        png = three_planes(group, labels, _colors(rows), reference=reference(row["study"]))
    except (ValueError, OSError, StudyError):
        return None  # a picture is not worth a report
    store.write(store.join(folder, "pictures", name), png)
    return f"pictures/{name}"


def _colors(rows: Sequence[Mapping[str, Any]]) -> dict[int, Color]:
    colors = label_colors(max(row["label"] for row in rows))
    return {row["label"]: colors[row["label"] - 1] for row in rows}
