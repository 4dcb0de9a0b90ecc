"""The plan of one study from its header: its lattice, its tiles, its blocks, and what they take on a worker."""

from __future__ import annotations

import math

import numpy as np

from . import ome
from .engine import Baseline, Engine, Kind
from .errors import StudyError, UsageError
from .grid import Triple
from .lattice import lattice_of
from .method import Method
from .planning import Needs, Plan, make_plan
from .sources import Header, Study, open_source
from .statistics import most_values
from .tiling import make_grid

Baselines = dict[tuple[str, Triple], Baseline]  # by runtime hash and window


def measure(engine: Engine, method: Method, kind: Kind, known: Baselines) -> None:
    """Add to `known` what a worker of this kind takes before any block, where all studies have tiles of one size.

    Raises UsageError where the model cannot run one tile.
    """
    if method.tiling.stitch != "exact":
        try:
            baseline_of(method.tiling.window, engine, method, kind, known)
        except StudyError as error:
            raise UsageError(f"model: {error}") from error


def baseline_of(window: Triple, engine: Engine, method: Method, kind: Kind, known: Baselines) -> Baseline:
    """What a worker takes before any block whose network sees tiles of this window (the network's axes)."""
    if (kind.runtime.hash, window) not in known:
        try:
            known[kind.runtime.hash, window] = engine.measure(window, len(method.card.channels), kind.runtime.hash)
        except (StudyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            cause = error.cause if isinstance(error, StudyError) else "model"
            raise StudyError(cause, f"one batch of tiles of {list(window)} does not run: {reason}") from error
    return known[kind.runtime.hash, window]


def label_dtype(method: Method) -> np.dtype[np.uint8] | np.dtype[np.uint16]:
    """uint8 where the model's highest label is at most 255, else uint16."""
    return np.dtype(np.uint8) if max(method.structures, default=0) <= 255 else np.dtype(np.uint16)


def plan_shape(
    header: Header,
    chunk: Triple,
    method: Method,
    engine: Engine,
    kind: Kind,
    known: Baselines,
    *,
    budget: int,
    workers: int,
    on_device: bool,
    smallest: bool = False,
) -> Plan:
    """The plan of a study with these facts, stored in chunks of `chunk` voxels (z,y,x). Raises StudyError."""
    lattice = lattice_of(header.shape, header.affine, method.card)
    window = lattice.view.seen(make_grid(lattice, method.tiling).window)
    return make_plan(
        lattice,
        ome.shard_shape(header.shape),
        method.tiling,
        needs=Needs(
            channels=header.channels,
            classes=method.classes,
            image_itemsize=header.dtype.itemsize,
            image_chunk=chunk,
            label_itemsize=label_dtype(method).itemsize,
            on_device=on_device,
            uncertainty_fields=len(method.uncertainty),
            half=method.tiling.stitch == "nnunet-fp16",
            fitted_values=most_values(header.dtype, math.prod(header.shape)) if method.fits_itself else 0,
        ),
        baseline=baseline_of(window, engine, method, kind, known),
        budget=budget,
        workers=workers,
        smallest=smallest,
    )


def plan_only(
    study: Study, method: Method, engine: Engine, kind: Kind, known: Baselines, *, budget: int, workers: int
) -> Plan:
    """The plan of a study from its header alone: no voxel is read, nothing is written."""
    header = read_header(study, method)
    chunk = ome.chunk_shape(ome.image_shard_shape(header.shape, header.channels, header.dtype.itemsize))
    return plan_shape(
        header, chunk, method, engine, kind, known,
        budget=budget, workers=workers, on_device=kind.runtime.device != "cpu",
    )  # fmt: skip


def tiles_of(study: Study, method: Method) -> int:
    """How many tiles a study has, from its header. Raises StudyError."""
    header = read_header(study, method)
    return make_grid(lattice_of(header.shape, header.affine, method.card), method.tiling).tiles


def read_header(study: Study, method: Method) -> Header:
    with open_source(study, volume=method.volume) as source:
        return source.header
