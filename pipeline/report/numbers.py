"""Numbers as people read them: thousands apart, a real minus, no more digits than mean something."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

NOTHING = "–"


def fixed(value: float | None, decimals: int) -> str:
    """`value` with so many decimals; what would round to a false zero is shown as below the last digit."""
    if value is None or not math.isfinite(value):
        return NOTHING
    least = 10.0**-decimals
    if 0 < abs(value) < least / 2:
        return f"<{least:.{decimals}f}" if value > 0 else f">−{least:.{decimals}f}"
    if abs(value) >= 1e9:
        return f"{value:.3e}".replace("-", "−")
    text = f"{value:,.{decimals}f}"
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text.replace("-", "−")


def volume_decimals(values: Iterable[float | None]) -> int:
    """Decimals of a column of millilitres: two figures of the smallest, at least 1, at most 3."""
    least = min((v for v in values if v), default=10.0)
    return 1 if least >= 10 else 2 if least >= 0.1 else 3


def measure_decimals(values: Iterable[float | None]) -> int:
    """Decimals of a column of measurements: four figures of the largest, at most 6."""
    most = max((abs(v) for v in values if v is not None and math.isfinite(v)), default=0.0)
    return min(6, max(0, 3 - math.floor(math.log10(most)))) if most else 1


def seconds(value: float | None) -> str:
    """A duration with its units: 0.31 s, 12.4 s, 4 min 05 s, 2 h 07 min."""
    if value is None:
        return NOTHING
    if value < 59.95:
        return f"{value:.{2 if value < 9.995 else 1}f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(value: int | None) -> str:
    """Bytes in binary units: 512 B, 1.25 GiB."""
    if value is None:
        return NOTHING
    power = min(4, max(0, (int(value).bit_length() - 1) // 10))
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{value:,} {unit}" if power == 0 else f"{value / 1024**power:,.3g} {unit}"


def facts(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as flat (name, text) pairs; inner names are joined with a dot."""
    pairs: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs += facts(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", _fact(value)))
    return pairs


def _fact(value: Any) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
