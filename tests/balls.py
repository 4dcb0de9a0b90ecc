"""A folder of images and masks that a tiny network learns in seconds, and the job that teaches it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scans import OBLIQUE, save_nifti

LABELS = {1: "lower half", 2: "upper half"}


def save_ball(folder: Path, name: str, seed: int, affine: np.ndarray = OBLIQUE) -> None:
    """images/<name>.nii.gz and masks/<name>.nii.gz: a ball in noise whose halves along z differ in brightness."""
    random = np.random.default_rng(seed)
    shape = (15, 16, 14)
    grid = np.indices(shape).astype(np.float64)
    centre = [random.uniform(n * 0.4, n * 0.6) for n in shape]
    inside = sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) < (min(shape) / 3.2) ** 2
    mask = inside.astype(np.uint8)
    mask[inside & (grid[2] > centre[2])] = 2
    image = random.normal(0, 30, shape) + np.array([100.0, 250.0, 400.0])[mask]
    save_nifti(folder / f"images/{name}.nii.gz", image.astype(np.float32), affine)
    save_nifti(folder / f"masks/{name}.nii.gz", mask, affine)


def ball_folder(folder: Path, count: int) -> Path:
    for i in range(count):
        save_ball(folder, f"ball-{i}", i)
    return folder


def ball_job(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a training on such a folder; a change of None takes a setting away."""
    settings: dict[str, Any] = {
        "name": "balls",
        "data": {"images": str(folder / "images"), "masks": str(folder / "masks"), "licence": "CC0-1.0"},
        "labels": LABELS,
        "channels": ["MR"],
        "tile": [16, 16, 16],
        "network": {"name": "resunet", "config": {"dims": 3, "in_channels": 1, "classes": 3, "widths": [4, 8]}},
        "recipe": {"steps": 100, "batch": 2, "learning_rate": 5e-3, "averaging": 0.9, "precision": "fp32"},
        "split": {"validation": 0.25},
        "threads": 1,
    }
    return {name: value for name, value in (settings | changes).items() if value is not None}


def write_job(path: Path, settings: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path
