"""Small prepared cases: bright balls on noise, which a tiny network learns in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from segmodels.train.cases import Case, PlacesSampler
from segmodels.train.recipe import UNCHANGED, Recipe


def write_case(folder: Path, image: np.ndarray, labels: np.ndarray, spacing: tuple[float, float, float]) -> Case:
    """A prepared case of image (c, z, y, x) and labels (z, y, x)."""
    folder.mkdir(parents=True)
    np.save(folder / "image.npy", image.astype(np.float32))
    np.save(folder / "labels.npy", labels.astype(np.uint8))
    sampler = PlacesSampler()
    sampler.add(labels, 0)
    np.savez(folder / "places.npz", **{str(k): v for k, v in sampler.finish().items()})
    return Case(folder.name, folder, spacing)


def ball_case(folder: Path, seed: int, shape: tuple[int, int, int] = (14, 16, 15)) -> Case:
    """A ball of label 1 whose upper half is label 2: brighter than the noise, the halves differ."""
    random = np.random.default_rng(seed)
    grid = np.indices(shape).astype(np.float64)
    centre = [random.uniform(n * 0.4, n * 0.6) for n in shape]
    radius = min(shape) / 3.5
    inside = sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) < radius**2
    labels = inside.astype(np.uint8)
    labels[inside & (grid[0] > centre[0])] = 2
    image = random.normal(0, 0.3, shape) + np.array([0.0, 1.5, 3.0])[labels]
    return write_case(folder, image[None], labels, (1.0, 1.0, 1.0))


def ball_cases(folder: Path, count: int) -> tuple[Case, ...]:
    return tuple(ball_case(folder / f"case-{i}", i) for i in range(count))


def quick(**changes: object) -> Recipe:
    """A recipe for seconds, without augmentation."""
    settings: dict[str, object] = {
        "steps": 40,
        "batch": 2,
        "learning_rate": 5e-3,
        "averaging": 0.9,
        "precision": "fp32",
    }
    return Recipe.model_validate(settings | {"augment": UNCHANGED} | changes)
