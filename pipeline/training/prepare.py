"""Cases made ready to be sampled: normalised image, labels and where they are, as plain arrays on disk."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from segmodels.train.cases import Case, PlacesSampler

from ..errors import Interrupted, StudyError
from ..geometry import spacing_of
from ..metrics.masks import check_channels, check_fit, whole_numbers
from ..normalize import normalizers
from ..sources import Header, Source, digest_of, open_source
from ..statistics import ChannelSums
from .job import TrainJob
from .pairs import Pair

ROWS = 32  # rows of voxels that are held at once
FACTS = "case.json"


def prepare(job: TrainJob, pair: Pair, folder: Path, stop: threading.Event) -> tuple[Case, dict[str, Any]]:
    """Write one case into `folder`, unless it stands there of the same content; gives it and its facts.

    Facts: sha256 of the content of image and mask, voxels per label, whether label 1 is stored as 255. Raises
    StudyError for a pair that does not fit together or the job, Interrupted when `stop` is set meanwhile.
    """
    wanted: dict[str, Any] = {
        "image": digest_of(pair.image),
        "mask": digest_of(pair.mask),
        "normalize": [entry.model_dump(mode="json", by_alias=True) for entry in job.normalize],
        "labels": sorted(job.labels),
        "channels": len(job.channels),
    }
    facts = _held(folder / FACTS)
    if facts is None or any(facts.get(name) != value for name, value in wanted.items()):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FACTS).unlink(missing_ok=True)
        with open_source(pair.image) as image, open_source(pair.mask) as mask:
            header = image.header
            if header.channels != len(job.channels):
                raise StudyError(
                    "input", f"the image has {header.channels} channel(s), the job names {len(job.channels)}"
                )
            check_channels(mask.header, "mask")
            check_fit(mask.header, header, ("mask", "image"))
            voxels, is_binary = _write_labels(job, mask, folder, stop)
            _write_image(job, image, folder, stop)
        facts = wanted | {"voxels": voxels, "is_255": is_binary, "spacing": _spacing(header)}
        (folder / FACTS).write_text(json.dumps(facts))  # last: what has it is whole
    z, y, x = facts["spacing"]
    return Case(pair.name, folder, (z, y, x)), facts


def _held(path: Path) -> dict[str, Any] | None:
    try:
        facts: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return facts if {"voxels", "is_255", "spacing"} <= facts.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _spacing(header: Header) -> list[float]:
    """Millimetres along z, y, x."""
    return [float(step) for step in spacing_of(header.affine)][::-1]


def _heed(stop: threading.Event) -> None:
    if stop.is_set():
        raise Interrupted


def _array(path: Path, dtype: Any, shape: tuple[int, ...]) -> Any:
    """A new .npy file as an array, its room on the disk taken: a full disk is an error here, no signal later."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _write_labels(job: TrainJob, mask: Source, folder: Path, stop: threading.Event) -> tuple[dict[str, int], bool]:
    """labels.npy and places.npz; gives the voxels of each label, and whether label 1 is stored as 255."""
    header = mask.header
    known = {int(value) for value in job.labels}
    array = _array(folder / "labels.npy", np.uint8 if max(known) <= 255 else np.uint16, header.shape)
    sampler, counts, z = PlacesSampler(), dict.fromkeys(sorted(known), 0), 0
    stored: set[int] = set()
    for slab in mask.slabs(ROWS):
        _heed(stop)
        labels = _as_labels(slab[0], known, stored)
        array[z : z + len(labels)] = labels
        sampler.add(labels, z)
        values, found = np.unique(labels, return_counts=True)
        for value, count in zip(values.tolist(), found.tolist(), strict=True):
            if value:
                counts[value] += count
        z += len(labels)
    array.flush()
    arrays: Mapping[str, Any] = {str(label): voxels for label, voxels in sampler.finish().items()}
    np.savez(folder / "places.npz", **arrays)
    return {str(label): count for label, count in counts.items()}, stored == {255}


def _as_labels(slab: np.ndarray, known: set[int], stored: set[int]) -> np.ndarray:
    """A slab of labels that the job knows; `stored` gathers the values above 0 that the mask has."""
    slab = whole_numbers(slab, "mask")
    stored |= {int(value) for value in np.unique(slab).tolist()} - {0}
    dtype = np.uint8 if max(known) <= 255 else np.uint16
    if known == {1} and stored == {255}:  # a mask of 0 and 255, as image editors write them
        binary: np.ndarray = (slab == 255).astype(dtype)
        return binary
    if unknown := sorted(stored - known):
        raise StudyError(
            "input", f"the mask holds label {unknown[0]}, which is none of the job's labels {sorted(known)}"
        )
    labels: np.ndarray = slab.astype(dtype)
    return labels


def _write_image(job: TrainJob, image: Source, folder: Path, stop: threading.Event) -> None:
    """image.npy: float32, normalised with the statistics of the whole image as `segment` does it."""
    header = image.header
    shape = (header.channels, *header.shape)
    array = _array(folder / "image.npy", np.float32, shape)
    sums = [ChannelSums(header.dtype, ROWS) for _ in range(header.channels)]
    z = 0
    for slab in image.slabs(ROWS):
        _heed(stop)
        for channel, voxels in zip(sums, slab, strict=True):
            channel.add(voxels)
        array[:, z : z + slab.shape[1]] = slab
        z += slab.shape[1]
    for at, normalise in enumerate(normalizers(job.normalize, [s.finish() for s in sums])):
        for z in range(0, header.shape[0], ROWS):
            rows = array[at, z : z + ROWS]
            normalise(np.array(rows), rows)
    array.flush()
