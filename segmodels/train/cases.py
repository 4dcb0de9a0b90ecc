"""Training cases: arrays on disk, read where a sample needs them and never whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segmodels.errors import ModelError

PLACES = 20_000  # voxels per structure that samples may be centred on


@dataclass(frozen=True)
class Case:
    """One prepared case: `folder` holds image.npy (c, z, y, x) float32, normalised; labels.npy (z, y, x) uint8 or
    uint16; places.npz with up to PLACES voxels (n, 3) of each label above 0, under the label's name.

    spacing: mm along z, y, x.
    """

    name: str
    folder: Path
    spacing: tuple[float, float, float]

    def image(self) -> np.ndarray:
        array: np.ndarray = np.load(self.folder / "image.npy", mmap_mode="r", allow_pickle=False)
        return array

    def labels(self) -> np.ndarray:
        array: np.ndarray = np.load(self.folder / "labels.npy", mmap_mode="r", allow_pickle=False)
        return array

    def places(self) -> dict[int, np.ndarray]:
        with np.load(self.folder / "places.npz", allow_pickle=False) as held:
            return {int(label): held[label] for label in held.files}


class PlacesSampler:
    """Up to PLACES voxels per label, chosen evenly and by the seed alone, from slabs in z order."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # label -> random ranks, voxels

    def add(self, slab: np.ndarray, z: int) -> None:
        """Take in labels (rows, y, x) that begin at row z."""
        flat = slab.ravel()
        for label in np.unique(flat):
            if label == 0:
                continue
            (at,) = np.nonzero(flat == label)
            ranks = self._random.random(at.size)
            if at.size > PLACES:
                best = np.argpartition(ranks, PLACES)[:PLACES]
                best.sort()
                at, ranks = at[best], ranks[best]
            voxels = np.stack(np.unravel_index(at, slab.shape), axis=1).astype(np.int32) + np.array([z, 0, 0], np.int32)
            held = self._kept.get(int(label))
            if held is not None:
                ranks, voxels = np.concatenate([held[0], ranks]), np.concatenate([held[1], voxels])
                if ranks.size > PLACES:
                    best = np.argpartition(ranks, PLACES)[:PLACES]
                    best.sort()
                    ranks, voxels = ranks[best], voxels[best]
            self._kept[int(label)] = ranks, voxels

    def finish(self) -> dict[int, np.ndarray]:
        """Voxels (n, 3) int32 in z, y, x per label."""
        return {label: voxels for label, (_, voxels) in sorted(self._kept.items())}


def require(cases: Iterable[Case]) -> tuple[Case, ...]:
    """The cases, at least one, whose files are all there. Raises ModelError."""
    listed = tuple(cases)
    if not listed:
        raise ModelError("there is no case to train on")
    for case in listed:
        for part in ("image.npy", "labels.npy", "places.npz"):
            if not (case.folder / part).is_file():
                raise ModelError(f"the prepared case {case.name} lacks {part}: prepare it again")
    return listed
