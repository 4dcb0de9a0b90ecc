"""The report: one static page that opens from disk and asks nothing of the network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal, get_args
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from .. import store
from ..colors import label_colors
from ..errors import Cause
from ..metrics.tables import STAGES
from . import numbers
from .plots import WIDTH, spreads
from .tables import largest, mean_dice, structures_table

OPEN = 24  # with more published studies than this they start folded
WORST = 3  # but for so many with the lowest Dice
LEGEND = 10  # structures named beside the picture; the table has all

REMEDY: dict[Cause, str] = {
    "input": "The file could not be used as it is. Open it in a viewer, have it sent or converted again, put "
    "the good file in its place and run the same command.",
    "geometry": "Its place in the patient is not certain, so nothing was written. Export the whole series "
    "again from the archive, or correct the header, and run the same command.",
    "model": "The study and the model do not fit each other. Compare channels and kind of scan with "
    "maskmill models show, then run again with --retry-failed.",
    "memory": "It does not fit into the memory allowed. Give each worker more with --memory, or take a "
    "smaller --tile, and run again with --retry-failed.",
    "storage": "Reading or writing failed. Free some space or restore access to the folder, and run again "
    "with --retry-failed.",
    "timeout": "It took longer than allowed. See whether the machine was busy with other work, and run again "
    "with --retry-failed.",
    "crash": "A worker ended without a word, often because the machine ran out of memory. Look into "
    "log.jsonl of this run, and run again with --retry-failed.",
}
RESUME = "Run the same command again: finished work is kept, and these go on where they stopped."


@dataclass(frozen=True)
class StudyView:
    """What the page shows of one study; plain data.

    `structures`: rows of the structures table (label, structure, voxels, volume_ml, ...; fields that are None
    or absent are not shown). `seconds`: time per stage, see STAGES. `picture`: the name of a PNG relative to
    the page's folder. `message`: why it failed, or a remark on a published study.
    """

    study: str
    key: str
    state: Literal["published", "failed", "interrupted"]
    cause: Cause | None = None
    message: str | None = None
    source: str | None = None
    picture: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    structures: Sequence[Mapping[str, Any]] = ()
    peak_rss_bytes: int | None = None
    warnings: Sequence[str] = ()

    @property
    def anchor(self) -> str:
        """Its place on the page. Studies of the same content have one key."""
        return f"study-{self.key}-{self.study}"

    @property
    def remarks(self) -> list[str]:
        """What should be read before the result is used."""
        return [*([self.message] if self.message else []), *self.warnings]


def write_report(folder: str, summary: Mapping[str, Any], studies: Sequence[StudyView]) -> str:
    """Write `folder`/index.html, in one atomic step, and return its URL.

    `summary` has run, published, failed, interrupted, reused, blocks_computed, seconds, and, where known,
    dice ({structure: mean}), mean_dice, and the mappings model, settings, runtime, versions. Failed studies
    come first, by cause, then interrupted ones, then the published ones: the lowest mean Dice first, those
    without one in the given order. Every text is taken as hostile and shown as text. Raises KeyError for a
    summary that lacks a count.
    """
    url = store.join(folder, "index.html")
    html = render(summary, studies)
    # a file name may hold bytes that are no UTF-8: they are shown as \udcxx
    store.write(url, html.encode("utf-8", "backslashreplace"))
    return url


def render(summary: Mapping[str, Any], studies: Sequence[StudyView]) -> str:
    """The page as text."""
    names = ("published", "failed", "interrupted", "reused", "blocks_computed")
    counts = {name: int(summary[name]) for name in names}
    published = _worst_first([view for view in studies if view.state == "published"])
    measures, spread = spreads((view.anchor, view.study, view.structures) for view in published)
    style = _asset("page.css") + _swatches(studies)
    script = _asset("page.js")
    return _template().render(
        summary=summary,
        counts=counts,
        headline=_headline(counts["published"], counts["failed"], counts["interrupted"]),
        failures=_by_cause(studies),
        interrupted=[view for view in studies if view.state == "interrupted"],
        published=published,
        unfolded=len(published) <= OPEN,
        worst=WORST,
        remarked=sum(bool(view.remarks) for view in published),
        totals=_totals(studies),
        width=WIDTH,
        dice=[(name, numbers.fixed(value, 3)) for name, value in (summary.get("dice") or {}).items()],
        measures=measures,
        spreads=spread if measures else [],
        scored=any(mean_dice(view.structures) is not None for view in published),
        sections=[
            (title, numbers.facts(summary.get(title.lower()) or {}))
            for title in ("Model", "Settings", "Runtime", "Versions")
        ],
        resume=RESUME,
        style=style,
        script=script,
        # by hash, not 'unsafe-inline': even markup that slipped through could run nothing
        policy=f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "img-src 'self' file:; base-uri 'none'; form-action 'none'",
    )


def _worst_first(views: Sequence[StudyView]) -> list[StudyView]:
    """The lowest mean Dice first; studies without a reference keep their order, after them."""
    scored = [(score, view) for view in views if (score := mean_dice(view.structures)) is not None]
    others = [view for view in views if mean_dice(view.structures) is None]
    return [view for _, view in sorted(scored, key=lambda pair: pair[0])] + others


def _headline(published: int, failed: int, interrupted: int) -> str:
    total = published + failed + interrupted
    if total == 0:
        return "There was no study to segment."
    if published == total:
        return "The one study has its mask." if total == 1 else f"All {total:,} studies have their masks."
    rest = [f"{n:,} {what}" for n, what in ((failed, "failed"), (interrupted, "interrupted")) if n]
    have = "has its mask" if published == 1 else "have their masks"
    done = f"{published:,} of {total:,} studies {have}" if published else "No study has a mask"
    return f"{done}, {' and '.join(rest)}."


def _by_cause(studies: Sequence[StudyView]) -> list[tuple[str, str, list[StudyView]]]:
    """(cause, what to do, its studies), for the causes that occurred."""
    failed = [view for view in studies if view.state == "failed"]
    groups = [(cause, REMEDY[cause], [v for v in failed if v.cause == cause]) for cause in get_args(Cause)]
    known = {id(view) for _, _, views in groups for view in views}
    unknown = [view for view in failed if id(view) not in known]
    log = "No cause was recorded. Look into log.jsonl of this run."
    return [group for group in (*groups, ("unknown", log, unknown)) if group[2]]


def _totals(studies: Sequence[StudyView]) -> dict[str, float]:
    """Seconds per stage over all studies, in the order of the stages."""
    names = [*STAGES, *sorted({name for view in studies for name in view.seconds} - set(STAGES))]
    sums = {name: sum(view.seconds.get(name) or 0.0 for view in studies) for name in names}
    return {name: value for name, value in sums.items() if value}


def _bar(seconds: Mapping[str, float]) -> list[tuple[str, str, float, float]]:
    """(stage, its CSS class, start, width) in percent, for the stages that took time."""
    total = sum(value or 0.0 for value in seconds.values())
    parts, start = [], 0.0
    for name, value in sorted(seconds.items(), key=lambda item: _order(item[0])):
        if value:
            width = 100 * value / total
            parts.append((name, f"s{_order(name)}", round(start, 2), round(width, 2)))
            start += width
    return parts


def _order(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def _swatches(studies: Sequence[StudyView]) -> str:
    """A CSS class per label: colours without style attributes, which the page's policy forbids."""
    used = sorted({int(row["label"]) for view in studies for row in view.structures} - {0})
    colors = label_colors(max(used, default=0))
    return "".join(f".c{n}{{background:#{bytes(colors[n - 1]).hex()}}}" for n in used)


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("pipeline.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "seconds": numbers.seconds,
        "size": numbers.size,
        "fixed": numbers.fixed,
        "bar": _bar,
        "table": structures_table,
        "largest": lambda structures: largest(structures, LEGEND),
        "mean_dice": mean_dice,
        # ./ keeps a name that starts with // from becoming a host, quoting one with a colon a scheme
        "address": lambda name: "./" + quote(name, errors="surrogateescape"),
    }
    return environment.get_template("page.html.j2")
