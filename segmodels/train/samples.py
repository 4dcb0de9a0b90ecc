"""Samples: patches of cases, each a function of the seed and its number alone.

That is what makes a resumed training exact: sample i is the same whoever makes it, whenever, in whatever order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from segmodels.train.augment import Random, Triple, change_intensities, displaced, resample
from segmodels.train.cases import Case
from segmodels.train.recipe import Recipe

Sample = tuple[Tensor, Tensor, int]


class Samples(Dataset[Sample]):
    """Sample i: image (c, *patch) float32, labels (*patch) int64, index of its case.

    Every case is used once per epoch, in an order drawn anew for each.
    """

    def __init__(self, cases: Sequence[Case], recipe: Recipe, patch: Triple, flips: Sequence[int]) -> None:
        self.cases, self.recipe, self.patch = tuple(cases), recipe, patch
        self.flips = tuple(recipe.augment.flip_axes if recipe.augment.flip_axes is not None else flips)

    @cached_property
    def _places(self) -> list[dict[int, np.ndarray]]:
        return [case.places() for case in self.cases]

    def case_of(self, i: int) -> int:
        epoch, within = divmod(i, len(self.cases))
        return int(np.random.default_rng([self.recipe.seed, 1, epoch]).permutation(len(self.cases))[within])

    def __getitem__(self, i: int) -> Sample:
        at = self.case_of(i)
        case, random = self.cases[at], np.random.default_rng([self.recipe.seed, 2, i])
        image, labels = case.image(), case.labels()
        centre = self._centre(labels.shape, self._places[at], random)
        offsets = displaced(self.patch, case.spacing, self.recipe.augment, self.flips, random)
        if offsets is None:
            voxels, chosen = cut(image, labels, centre, self.patch)
        else:
            voxels, chosen = resample(image, labels, centre, offsets)
        voxels = change_intensities(voxels, self.recipe.augment, random)
        return torch.from_numpy(voxels), torch.from_numpy(chosen), at

    def _centre(self, shape: Sequence[int], places: dict[int, np.ndarray], random: Random) -> list[float]:
        """The voxel position of the patch's centre: about a voxel of a random structure, or anywhere."""
        about = None
        if places and random.random() < self.recipe.foreground:
            voxels = places[list(places)[random.integers(len(places))]]
            about = voxels[random.integers(len(voxels))]
        centre = []
        for axis, (size, length) in enumerate(zip(shape, self.patch, strict=True)):
            low, high = sorted((0, size - length))
            if about is None:
                start = int(random.integers(low, high + 1))
            else:  # the voxel lies in the middle half of the patch
                jitter = random.integers(-(length // 4), length // 4 + 1)
                start = int(np.clip(about[axis] - length // 2 + jitter, low, high))
            centre.append(start + (length - 1) / 2)
        return centre


def cut(image: np.ndarray, labels: np.ndarray, centre: Sequence[float], patch: Triple) -> tuple[np.ndarray, np.ndarray]:
    """The patch about `centre` without any change, 0 outside the image."""
    voxels, chosen = np.zeros((image.shape[0], *patch), np.float32), np.zeros(patch, np.int64)
    source, target = [], []
    for c, length, size in zip(centre, patch, labels.shape, strict=True):
        start = round(c - (length - 1) / 2)
        source.append(slice(max(0, start), max(0, min(size, start + length))))
        target.append(slice(max(0, -start), max(0, -start) + max(0, source[-1].stop - source[-1].start)))
    voxels[(slice(None), *target)] = image[(slice(None), *source)]
    chosen[tuple(target)] = labels[tuple(source)]
    return voxels, chosen


def batches(samples: Samples, first: int, last: int, readers: int) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """The batches of steps `first` to `last` - 1: images (n, c, *patch), labels (n, *patch), names of the cases."""
    size = samples.recipe.batch
    loader = DataLoader(
        samples,
        batch_size=size,
        sampler=range(first * size, last * size),
        num_workers=readers,
        multiprocessing_context="spawn" if readers else None,
        persistent_workers=False,
        pin_memory=torch.cuda.is_available(),
    )
    for images, labels, at in loader:
        yield images, labels, [samples.cases[int(i)].name for i in at]
