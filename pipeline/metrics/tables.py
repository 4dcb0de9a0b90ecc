"""The studies and structures tables of OUT, as Parquet and CSV."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from .. import store
from .overlap import OVERLAP
from .surface import TOLERANCE_MM

STAGES = ("ingest", "plan", "segment", "publish", "measure", "export", "surface")


def surface_dice_column(tolerance_mm: float) -> str:
    """The column of the surface Dice at a tolerance: surface_dice_1mm, surface_dice_0.5mm."""
    return f"surface_dice_{tolerance_mm:g}mm"


def score_names(tolerance_mm: float = TOLERANCE_MM) -> tuple[str, ...]:
    """The columns of scores against a reference."""
    return (*OVERLAP, "hd95_mm", "asd_mm", surface_dice_column(tolerance_mm))


SCORES = score_names()
HIGHEST_STRUCTURE = 65_535  # the highest label that a structure may have
COMPONENTS = {"components": "int64", "largest_component_ml": "float64", "holes": "int64"}

STUDY_COLUMNS = {
    "study": "string",
    "key": "string",
    "state": "string",
    "cause": "string",
    **{f"seconds_{stage}": "float64" for stage in STAGES},
    "peak_rss_bytes": "int64",
}
STRUCTURE_COLUMNS = {
    "study": "string",
    "model": "string",
    "label": "int64",
    "structure": "string",
    "voxels": "int64",
    "volume_ml": "float64",
    "mean": "float64",
    "std": "float64",
    **{f"centroid_{a}_mm": "float64" for a in "xyz"},
    **{f"bbox_{a}_{end}": "int64" for a in "xyz" for end in ("min", "max")},
    "touches_border": "bool",
    "mean_entropy": "float64",
    "disagreement": "float64",
    **COMPONENTS,
    **dict.fromkeys(SCORES, "float64"),
}


def write_tables(out: str, studies: Sequence[Mapping[str, Any]], structures: Sequence[Mapping[str, Any]]) -> None:
    """Write both tables to OUT/metrics; a column that a row lacks is null. Rows keep the order they are given in."""
    write_table(out, "studies", STUDY_COLUMNS, studies)
    write_table(out, "structures", STRUCTURE_COLUMNS, structures)


def write_table(out: str, name: str, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write OUT/metrics/<name>.parquet and .csv. columns: the type of each, string, float64, int64 or bool."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    types = {"string": pa.string(), "float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_()}
    schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
    table = pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows], schema)
    parquet, text = io.BytesIO(), io.BytesIO()
    pyarrow.parquet.write_table(table, parquet)
    pyarrow.csv.write_csv(table, text)
    url = store.join(out, "metrics", name)
    store.write(url + ".parquet", parquet.getvalue())
    store.write(url + ".csv", text.getvalue())
