"""How a measurement of a structure spreads over all studies, as small box plots that the page draws."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .numbers import fixed, measure_decimals, volume_decimals

WIDTH = 200.0  # of a plot's drawing, in its own units
ALL_DOTS = 60  # up to so many studies each has its dot; of more only those far from the others have
REACH = 1.5  # interquartile ranges beyond the quartiles: Tukey's fence


@dataclass(frozen=True)
class Dot:
    """A study in a plot: where it lies, and what it says."""

    x: float
    anchor: str
    text: str


@dataclass(frozen=True)
class Plot:
    """A box plot over 0 to WIDTH: quartiles, the ends of all values, dots. low, high: the ends of the axis, as text."""

    box: tuple[float, float, float]
    ends: tuple[float, float]
    dots: list[Dot]
    low: str
    high: str
    text: str


@dataclass(frozen=True)
class Spread:
    """One structure over all studies; a plot per measure, None where fewer than two studies have it."""

    label: int
    structure: str
    plots: list[Plot | None]


MEASURES = (("volume, mL", "volume_ml"), ("Dice", "dice"), ("HD95, mm", "hd95_mm"))


def spreads(studies: Iterable[tuple[str, str, Sequence[Mapping[str, Any]]]]) -> tuple[list[str], list[Spread]]:
    """Titles of the measures that can be plotted, and their plots per structure, in label order.

    studies: (anchor, name, rows of the structures table). Scores of empty structures are none and are left out.
    """
    found: dict[tuple[int, str], dict[str, list[tuple[float, str, str]]]] = {}
    for anchor, name, rows in studies:
        for row in rows:
            held = found.setdefault((int(row["label"]), str(row["structure"])), {})
            for _, field in MEASURES:
                if row.get(field) is not None:
                    held.setdefault(field, []).append((float(row[field]), anchor, name))
    shown = [m for m in MEASURES if any(len(held.get(m[1], ())) > 1 for held in found.values())]
    return [title for title, _ in shown], [
        Spread(label, structure, [_plot(field, held.get(field, [])) for _, field in shown])
        for (label, structure), held in sorted(found.items(), key=lambda item: item[0])
    ]


def _plot(field: str, points: Sequence[tuple[float, str, str]]) -> Plot | None:
    if len(points) < 2:
        return None
    values = np.array([value for value, _, _ in points])
    low, high = _axis(field, values)
    decimals = (
        3 if field == "dice" else (volume_decimals if field == "volume_ml" else measure_decimals)(values.tolist())
    )
    q1, median, q3 = (float(q) for q in np.quantile(values, [0.25, 0.5, 0.75]))
    fence = REACH * (q3 - q1)

    def place(value: float) -> float:
        return round(WIDTH * (value - low) / (high - low), 2)

    dots = [
        Dot(place(value), anchor, f"{name}: {fixed(value, decimals)}")
        for value, anchor, name in points
        if len(points) <= ALL_DOTS or not q1 - fence <= value <= q3 + fence
    ]
    least, most = (fixed(float(v), decimals) for v in (values.min(), values.max()))
    return Plot(
        box=(place(q1), place(median), place(q3)),
        ends=(place(float(values.min())), place(float(values.max()))),
        dots=dots,
        low=fixed(low, 1),
        high=fixed(high, 1),
        text=f"median {fixed(median, decimals)}, {least} to {most}, {len(points)} studies",
    )


def _axis(field: str, values: np.ndarray) -> tuple[float, float]:
    """The ends of the axis: of Dice the tenth below the lowest and 1, of all else 0 and the highest."""
    if field == "dice":
        return min(0.9, float(np.floor(values.min() * 10) / 10)), 1.0
    return 0.0, float(values.max()) or 1.0
