"""The two tables, as Parquet and CSV: the contract's columns, types and nulls."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from pipeline.metrics.tables import write_tables

STUDIES = [
    "study", "key", "state", "cause", "seconds_ingest", "seconds_plan", "seconds_segment", "seconds_publish",
    "seconds_measure", "seconds_export", "seconds_surface", "peak_rss_bytes",
]  # fmt: skip
STRUCTURES = [
    "study", "model", "label", "structure", "voxels", "volume_ml", "mean", "std",
    "centroid_x_mm", "centroid_y_mm", "centroid_z_mm",
    "bbox_x_min", "bbox_x_max", "bbox_y_min", "bbox_y_max", "bbox_z_min", "bbox_z_max", "touches_border",
    "mean_entropy", "disagreement",
    "components", "largest_component_ml", "holes",
    "dice", "iou", "sensitivity", "precision", "hd95_mm", "asd_mm", "surface_dice_1mm",
]  # fmt: skip


@pytest.fixture
def written(tmp_path: Path) -> Path:
    studies: list[dict[str, Any]] = [
        {"study": "b", "key": "k1", "state": "published", "cause": None, "seconds_plan": 0.5, "peak_rss_bytes": 2**40},
        {"study": None, "key": "u2", "state": "failed", "cause": "input"},
    ]
    structures = [
        {"study": "b", "model": "m", "label": 1, "structure": 'left, "big"', "voxels": 2**40, "volume_ml": 0.1,
         "touches_border": True, "dice": 0.25},
        {"study": "b", "model": "m", "label": 2, "structure": "ünder", "voxels": 0, "touches_border": False},
    ]  # fmt: skip
    write_tables(str(tmp_path), studies, structures)
    return tmp_path / "metrics"


def test_columns_are_the_contracts(written: Path) -> None:
    for name, columns in (("studies", STUDIES), ("structures", STRUCTURES)):
        table = pyarrow.parquet.read_table(written / f"{name}.parquet")
        assert sorted(table.column_names) == sorted(columns)
        with (written / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            assert next(csv.reader(file)) == table.column_names
    assert pyarrow.parquet.read_schema(written / "studies.parquet").field("peak_rss_bytes").type == pa.int64()
    assert pyarrow.parquet.read_schema(written / "structures.parquet").field("touches_border").type == pa.bool_()


def test_what_a_row_lacks_is_null(written: Path) -> None:
    first, second = pyarrow.parquet.read_table(written / "studies.parquet").to_pylist()
    assert (first["peak_rss_bytes"], first["seconds_plan"], first["seconds_ingest"]) == (2**40, 0.5, None)
    assert (second["study"], second["cause"], second["peak_rss_bytes"]) == (None, "input", None)
    first, second = pyarrow.parquet.read_table(written / "structures.parquet").to_pylist()
    assert (first["voxels"], first["dice"], first["hd95_mm"]) == (2**40, 0.25, None)
    assert (second["mean"], second["bbox_x_min"], second["touches_border"]) == (None, None, False)


def test_csv_holds_the_same(written: Path) -> None:
    with (written / "structures.csv").open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert (first["structure"], first["voxels"], first["dice"]) == ('left, "big"', str(2**40), "0.25")
    assert (second["structure"], second["dice"], second["touches_border"]) == ("ünder", "", "false")


def test_empty_tables_have_their_columns(tmp_path: Path) -> None:
    write_tables(str(tmp_path), [], [])
    table = pyarrow.parquet.read_table(tmp_path / "metrics" / "structures.parquet")
    assert table.num_rows == 0
    assert len(table.column_names) == len(STRUCTURES)
