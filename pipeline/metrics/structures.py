"""Measurements of each structure from sums per label shard, which merge: a rerun never counts twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..geometry import to_world, voxel_volume_mm3
from ..grid import Triple
from ..statistics import Moments
from ..uncertainty import MEASURES, LabelSums
from .components import Components

UNCERTAINTY_COLUMNS = {"entropy": "mean_entropy", "disagreement": "disagreement"}


def shard_statistics(
    labels: np.ndarray, intensity: np.ndarray | None, origin: Triple, uncertainty: LabelSums | None = None
) -> dict[str, Any]:
    """Sums over one shard, per label above 0, as JSON.

    labels: (z, y, x) integers; intensity: raw voxels of the same shape (channel 0), None when all is background;
    origin: the shard's first voxel in the study; uncertainty: sums by measure and label. Per label: n, mean and m2 of
    the intensity (float64), the sums of z, y, x over its voxels, its box, and its sum of each measure.
    """
    if intensity is None:
        return {}
    flat = labels.ravel().astype(np.intp)
    voxels = intensity.ravel()
    present = np.nonzero(np.bincount(flat))[0]
    sums: dict[str, Any] = {}
    for label in present[present > 0]:
        where = labels == label
        moments = Moments.of(voxels[where.ravel()])
        entry: dict[str, Any] = {"n": moments.count, "mean": moments.mean, "m2": moments.m2}
        for axis, name in enumerate("zyx"):
            profile = where.sum(axis=tuple(a for a in range(3) if a != axis), dtype=np.int64)
            (at,) = np.nonzero(profile)
            positions = np.arange(len(profile), dtype=np.int64) + origin[axis]
            entry[name] = [int(profile @ positions), int(positions[at[0]]), int(positions[at[-1]]) + 1]
        for name, by_label in (uncertainty or {}).items():
            entry[name] = by_label.get(int(label), 0.0)
        sums[str(label)] = entry
    return sums


@dataclass(frozen=True)
class StructureSums:
    """Sums of one structure over a study: moments of its intensity, sums and bounds of its voxel indices (z,y,x),
    and of each measure of uncertainty, None where a shard has none."""

    moments: Moments = field(default_factory=Moments)
    index_sums: Triple = (0, 0, 0)
    low: Triple = (1 << 62, 1 << 62, 1 << 62)
    high: Triple = (0, 0, 0)
    uncertainty: Mapping[str, float | None] = field(default_factory=lambda: dict.fromkeys(MEASURES, 0.0))

    def add(self, entry: Mapping[str, Any]) -> StructureSums:
        per_axis = [entry[name] for name in "zyx"]
        z, y, x = (a + b[0] for a, b in zip(self.index_sums, per_axis, strict=True))
        return StructureSums(
            self.moments.merge(Moments(entry["n"], entry["mean"], entry["m2"])),
            (z, y, x),
            tuple(min(a, b[1]) for a, b in zip(self.low, per_axis, strict=True)),
            tuple(max(a, b[2]) for a, b in zip(self.high, per_axis, strict=True)),
            {name: _plus(total, entry.get(name)) for name, total in self.uncertainty.items()},
        )


def _plus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def merge_shards(markers: Iterable[Mapping[str, Any]]) -> dict[int, StructureSums]:
    """Sums per label from the statistics of all shards, given in raster order."""
    merged: dict[int, StructureSums] = {}
    for statistics in markers:
        for label, entry in statistics.items():
            merged[int(label)] = merged.get(int(label), StructureSums()).add(entry)
    return merged


def structure_rows(
    merged: Mapping[int, StructureSums],
    components: Mapping[int, Components],
    names: Mapping[int, str],
    shape: Triple,
    affine: np.ndarray,
) -> list[dict[str, Any]]:
    """One row per structure of the card, found or not, in the columns of the structures table.

    shape: (z,y,x); affine: RAS mm over voxel indices (x,y,z). volume_ml is |det| of the affine's 3x3 part times the
    voxels, in mL; the centroid is the mean of voxel centres in mm; boxes are stored voxel indices, max exclusive;
    mean_entropy and disagreement are means over the structure's voxels (see `pipeline.uncertainty`).
    """
    voxel_ml = voxel_volume_mm3(affine) / 1000
    rows = []
    for label, name in names.items():
        sums = merged.get(label)
        row: dict[str, Any] = {"label": label, "structure": name}
        if sums is None:
            row |= {"voxels": 0, "volume_ml": 0.0, "mean": None, "std": None}
            row |= {f"centroid_{a}_mm": None for a in "xyz"}
            row |= {f"bbox_{a}_{end}": None for a in "xyz" for end in ("min", "max")}
            row |= {"touches_border": False, **dict.fromkeys(UNCERTAINTY_COLUMNS.values())}
        else:
            row |= _measured(sums, shape, affine, voxel_ml)
        rows.append(row | component_columns(components.get(label, Components()), voxel_ml))
    return rows


def component_columns(components: Components, voxel_ml: float) -> dict[str, Any]:
    """The columns that say how many pieces and holes a structure has."""
    return {
        "components": components.count,
        "largest_component_ml": components.largest * voxel_ml,
        "holes": components.holes,
    }


def _measured(sums: StructureSums, shape: Sequence[int], affine: np.ndarray, voxel_ml: float) -> dict[str, Any]:
    count = sums.moments.count
    centroid = to_world(affine, [total / count for total in sums.index_sums])
    row: dict[str, Any] = {
        "voxels": count,
        "volume_ml": count * voxel_ml,
        "mean": sums.moments.mean,
        "std": sums.moments.std,
    }
    row |= {f"centroid_{a}_mm": float(c) for a, c in zip("xyz", centroid, strict=True)}
    for axis, name in enumerate("zyx"):
        row[f"bbox_{name}_min"], row[f"bbox_{name}_max"] = sums.low[axis], sums.high[axis]
    row["touches_border"] = any(  # an axis of one voxel has no border
        n > 1 and (low == 0 or high == n) for low, high, n in zip(sums.low, sums.high, shape, strict=True)
    )
    for name, column in UNCERTAINTY_COLUMNS.items():
        total = sums.uncertainty[name]
        row[column] = None if total is None else total / count
    return row
