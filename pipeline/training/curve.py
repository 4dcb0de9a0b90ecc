"""The learning curve, as a table and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from .. import store

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 360, 56, 40, 28, 150
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's, for all eyes

Rows = Sequence[Mapping[str, float]]


def write_curve(folder: Path, rows: Rows) -> None:
    """Write curve.csv and curve.svg. A row holds member, step, minutes, learning_rate, loss and scores by name."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in rows)
    store.write(str(folder / "curve.csv"), text.getvalue().encode())
    store.write(str(folder / "curve.svg"), draw_curve(rows).encode())


def draw_curve(rows: Rows) -> str:
    """An SVG: loss and Dice of each structure over the minutes, both from 0 to 1 or as high as the loss goes."""
    members = sorted({row.get("member", 0.0) for row in rows})
    names = list(dict.fromkeys(n for row in rows for n in row if n == "loss" or n.startswith("dice ")))
    longest = max((row["minutes"] for row in rows), default=0) or 1.0
    highest = max([1.0, *(row[n] for row in rows for n in names if n in row)])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="system-ui, sans-serif" font-size="12">',
        "<title>Learning curve</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for i in range(6):
        value = highest * i / 5
        y = _y(value, highest)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>')
        x = _x(longest * i / 5, longest)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 20}" text-anchor="middle">{longest * i / 5:.3g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">minutes</text>')
    for i, name in enumerate(names):
        color = COLORS[i % len(COLORS)]
        for member in members:
            points = [(r["minutes"], r[name]) for r in rows if r.get("member", 0.0) == member and name in r]
            line = " ".join(f"{_x(m, longest):.1f},{_y(v, highest):.1f}" for m, v in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        y = TOP + 18 * i
        parts.append(f'<path d="M{WIDTH - RIGHT + 12} {y}h18" stroke="{color}" stroke-width="3"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 36}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _x(minutes: float, longest: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * minutes / longest


def _y(value: float, highest: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * value / highest
