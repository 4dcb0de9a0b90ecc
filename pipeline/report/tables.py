"""The structures of a study as a table that is ready to print."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from .numbers import NOTHING, fixed, measure_decimals, volume_decimals

Row = Mapping[str, Any]
Values = list[Any]


@dataclass(frozen=True)
class Column:
    """A column of the page: its group, its title, the fields it reads (the first is it) and how it prints."""

    group: str
    title: str
    fields: tuple[str, ...]
    show: Callable[[list[Values]], list[str]]


@dataclass(frozen=True)
class Table:
    """groups: (title, columns under it); rows: (label, structure, one text per column)."""

    groups: list[tuple[str, int]]
    titles: list[str]
    rows: list[tuple[int, str, list[str]]]


def _decimals(choose: Callable[[Iterable[float | None]], int]) -> Callable[[list[Values]], list[str]]:
    """Prints the first field, with one number of decimals, chosen from all fields, for the whole column."""

    def show(rows: list[Values]) -> list[str]:
        decimals = choose(value for row in rows for value in row)
        return [fixed(row[0], decimals) for row in rows]

    return show


def _range(rows: list[Values]) -> list[str]:
    return [NOTHING if None in row else f"{row[0]:,}–{row[1]:,}" for row in rows]


def _yes(rows: list[Values]) -> list[str]:
    return [NOTHING if value is None else "yes" if value else "no" for (value,) in rows]


_whole, _tenths = _decimals(lambda _: 0), _decimals(lambda _: 1)
_hundredths, _score = _decimals(lambda _: 2), _decimals(lambda _: 3)
_volume, _measure = _decimals(volume_decimals), _decimals(measure_decimals)

COLUMNS = (
    Column("size", "mL", ("volume_ml",), _volume),
    Column("size", "voxels", ("voxels",), _whole),
    Column("against the reference", "Dice", ("dice",), _score),
    Column("against the reference", "IoU", ("iou",), _score),
    Column("against the reference", "sensitivity", ("sensitivity",), _score),
    Column("against the reference", "precision", ("precision",), _score),
    Column("against the reference", "HD95, mm", ("hd95_mm",), _hundredths),
    Column("against the reference", "mean distance, mm", ("asd_mm",), _hundredths),
    Column("against the reference", "surface Dice 1 mm", ("surface_dice_1mm",), _score),
    Column("pieces", "count", ("components",), _whole),
    Column("pieces", "largest, mL", ("largest_component_ml",), _volume),
    Column("pieces", "holes", ("holes",), _whole),
    Column("intensity", "mean", ("mean", "std"), _measure),
    Column("intensity", "std", ("std", "mean"), _measure),
    Column("centroid, mm", "x", ("centroid_x_mm",), _tenths),
    Column("centroid, mm", "y", ("centroid_y_mm",), _tenths),
    Column("centroid, mm", "z", ("centroid_z_mm",), _tenths),
    Column("bounding box, voxels", "x", ("bbox_x_min", "bbox_x_max"), _range),
    Column("bounding box, voxels", "y", ("bbox_y_min", "bbox_y_max"), _range),
    Column("bounding box, voxels", "z", ("bbox_z_min", "bbox_z_max"), _range),
    Column("touches", "border", ("touches_border",), _yes),
    Column("uncertainty, 0 to 1", "entropy", ("mean_entropy",), _score),
    Column("uncertainty, 0 to 1", "disagreement", ("disagreement",), _score),
)


def structures_table(structures: Sequence[Row]) -> Table:
    """The table of one study; columns without any value are left out."""
    columns = [c for c in COLUMNS if any(row.get(c.fields[0]) is not None for row in structures)]
    texts = [c.show([[row.get(field) for field in c.fields] for row in structures]) for c in columns]
    return Table(
        groups=[(title, len(list(same))) for title, same in groupby(c.group for c in columns)],
        titles=[c.title for c in columns],
        rows=[
            (int(row["label"]), str(row["structure"]), [text[i] for text in texts]) for i, row in enumerate(structures)
        ],
    )


def largest(structures: Sequence[Row], count: int) -> list[tuple[int, str, str]]:
    """(label, structure, volume in mL) of the `count` largest structures that are there, in label order."""
    present = [row for row in structures if row.get("volume_ml")]
    chosen = sorted(present, key=lambda row: -row["volume_ml"])[:count]
    decimals = volume_decimals(row["volume_ml"] for row in chosen)
    ordered = sorted(chosen, key=lambda row: int(row["label"]))
    return [(int(row["label"]), str(row["structure"]), fixed(row["volume_ml"], decimals)) for row in ordered]


def mean_dice(structures: Sequence[Row]) -> float | None:
    """The mean Dice of the structures that have one."""
    scores = [row["dice"] for row in structures if row.get("dice") is not None]
    return sum(scores) / len(scores) if scores else None
