"""The studies and structures tables of OUT, as Parquet and CSV."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from .. import store

STAGES = ("ingest", "plan", "segment", "publish", "measure", "export")
SCORES = ("dice", "iou", "sensitivity", "precision", "hd95_mm", "surface_dice_1mm")

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
    **dict.fromkeys(SCORES, "float64"),
}


def write_tables(out: str, studies: Sequence[Mapping[str, Any]], structures: Sequence[Mapping[str, Any]]) -> None:
    """Write both tables to OUT/metrics; a column that a row lacks is null. Rows keep the order they are given in."""
    for name, columns, rows in (
        ("studies", STUDY_COLUMNS, studies),
        ("structures", STRUCTURE_COLUMNS, structures),
    ):
        _write(store.join(out, "metrics", name), columns, rows)


def _write(url: str, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    types = {"string": pa.string(), "float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_()}
    schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
    table = pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows], schema)
    parquet, text = io.BytesIO(), io.BytesIO()
    pyarrow.parquet.write_table(table, parquet)
    pyarrow.csv.write_csv(table, text)
    store.write(url + ".parquet", parquet.getvalue())
    store.write(url + ".csv", text.getvalue())
