"""Blocks in, whole label shards and markers out: the plain function that every engine runs.

A block is read, normalised and predicted tile by tile in raster order; sums roll along z; finished rows become labels
at once; a row of shards is written when it is whole, then marked. Memory depends on the block's y,x extent, the tile's
depth and the number of classes, never on the block's length. Where the model has a spacing of its own, tiles and sums
are of the study's lattice, and finished rows are resampled to voxels before they become labels.
"""

from __future__ import annotations

import threading
import time
import traceback
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segmodels.errors import ModelError

from . import ledger, ome, statistics, store
from .engine import BlockTask, Failure, Receipt, peak_rss, reset_peak_rss
from .errors import StudyError
from .grid import Box
from .metrics.structures import shard_statistics
from .normalize import Affine, normalizers
from .resample import ResampledRows, StoredRows, VoxelRows
from .stitch import RollingAccumulator, importance
from .uncertainty import UncertaintySums, measures_of
from .verify import shard_url
from .window import InputWindow

LEAST_WEIGHT = 2.0**-24  # no weight is smaller, not even in half precision

if TYPE_CHECKING:
    import torch

    from segmodels import Card, Model
    from segmodels.predictor import Predictor
    from segmodels.runtime import Runtime


def segment_blocks(
    tasks: Sequence[BlockTask],
    model: Model,
    predictor: Predictor,
    runtime: Runtime,
    stop: threading.Event | None = None,
    step: Callable[[], None] = lambda: None,
) -> Iterator[Receipt | Failure]:
    """Segment blocks of one study or of several; yields one Receipt or Failure per block, as each ends.

    Tiles of all blocks share batches of `runtime.batch`; the last batch is filled up with zeros, since a network's
    sums depend on the batch's size. With `stop` set it returns between two batches: what is marked stays marked.
    `step` is called after every batch and every shard, so that who watches can tell slow from stuck.
    """
    batch: list[tuple[BlockRun, Box]] = []
    for task in tasks:
        try:
            task = unmarked(task, runtime)
            if not task.missing:
                yield Receipt(task.key, task.index, 0, 0, 0.0, peak_rss())
                continue
            run = BlockRun(task, model, predictor, runtime, step)
        except Exception as error:
            known = typed(error)
            yield Failure(task.key, task.index, known.cause, known.message)
            continue
        if batch and not batch[0][0].shares_batches_with(run):
            yield from _compute(batch, runtime)
            step()
            batch = []
        for tile in run.tiles:
            if stop is not None and stop.is_set():
                return
            batch.append((run, tile))
            if len(batch) == runtime.batch:
                yield from _compute(batch, runtime)
                step()
                batch = []
    yield from _compute(batch, runtime)


def unmarked(task: BlockTask, runtime: Runtime) -> BlockTask:
    """The task without shards that are marked by now: a worker may have died over it, and what it marked is whole."""
    return replace(task, missing=tuple(i for i in task.missing if not ledger.is_marked(task.ledger, i, runtime.hash)))


def _compute(batch: list[tuple[BlockRun, Box]], runtime: Runtime) -> Iterator[Receipt | Failure]:
    """Predict one batch and hand each tile's logits to its block; yields what ends with it."""
    import torch

    live = [(run, tile) for run, tile in batch if not run.over]
    if not live:
        return
    channels, window = live[0][0].channels, live[0][0].window_shape
    tiles = torch.zeros((runtime.batch, channels, *window))
    for i, (run, tile) in enumerate(live):
        with run.failing():
            run.read(tile, tiles[i].numpy())
    try:
        logits = live[0][0].predictor.predict(tiles)
    except Exception as error:
        for run, _ in live:
            run.fail(typed(error))
    for i, (run, tile) in enumerate(live):
        if not run.over:
            with run.failing(), torch.inference_mode():
                run.add(tile, logits[i])
        if run.outcome is not None:
            yield run.take_outcome()


class BlockRun:
    """One block on its way: its window of input, its sums, its labels that are not written yet."""

    def __init__(
        self,
        task: BlockTask,
        model: Model,
        predictor: Predictor,
        runtime: Runtime,
        step: Callable[[], None] = lambda: None,
    ) -> None:
        import torch

        reset_peak_rss()
        self.began = time.perf_counter()
        self.task, self.runtime, self.card, self.step = task, runtime, model.card, step
        # Only a model without a network fits itself to the histogram, which may be large.
        channels = statistics.from_bytes(store.read(task.statistics), histograms=model.network is None)
        self.predictor = predictor.fit(channels[0])
        self.lattice, self.view = task.lattice, task.lattice.view
        self.box = task.shards.box_of(task.range)
        self.cells = self.lattice.box(self.box)
        self.tiles = tiles_needed(task)
        self.window_shape = self.view.seen(task.grid.window)
        self.image = ome.open_array(task.image)
        self.channels = len(channels)
        self.window = _window(task, self.image, self.tiles, normalizers(self.card.normalize, channels))
        weights = torch.from_numpy(importance(self.view.seen(task.grid.tile), task.stitch)).to(runtime.device)
        weights = self.view.turned_back(weights).contiguous()
        self.classes = self.predictor.classes
        measures = measures_of(model, self.predictor)
        self.uncertainty = UncertaintySums(measures, self.card, task.shards, task.missing, self.box)
        fields = self.classes + self.predictor.disagreement
        self.half = task.stitch == "nnunet-fp16"
        weighed = bool(measures) or self.half or self.lattice.resampled
        self.sums = RollingAccumulator(self.cells, fields, weights, weighed=weighed, half=self.half)
        self.voxel_rows = VoxelRows(self.lattice, self.box, runtime.device) if self.lattice.resampled else None
        self.labels = ome.open_array(task.labels, "r+")
        depth = min(task.shards.shard[0], self.box.shape[0])
        self.rows = np.zeros((depth, *self.box.shape[1:]), self.labels.dtype)
        self.done = 0
        self.outcome: Receipt | Failure | None = None
        self.over = False

    def shares_batches_with(self, other: BlockRun) -> bool:
        return self.predictor is other.predictor and self.window_shape == other.window_shape

    def read(self, tile: Box, out: np.ndarray) -> None:
        """Put what the network sees of a tile, its margin included, into `out` (channels, the network's axes)."""
        out[...] = self.view.turned(self.window.tile(tile.grow(self.task.grid.margin)))

    def add(self, tile: Box, logits: torch.Tensor) -> None:
        """Take one tile's logits (fields, the network's axes); write what they finish. The last tile ends the block."""
        import torch

        if not bool(torch.isfinite(logits.sum())) and not bool(torch.isfinite(logits).all()):
            raise StudyError(
                "model",
                f"the network answered NaN or inf in the tile at z,y,x = {tile.start}; no mask was made of it "
                f"(precision {self.runtime.precision}: try --precision fp32)",
            )
        core = self.task.grid.core(tile)
        # Rows above this tile's first one are final; rows before the block are not ours.
        self._finish_rows(core.start[0])
        self.sums.add(tile, core, self.view.turned_back(logits))
        self.done += 1
        if self.done == len(self.tiles):
            self._finish_rows(self.cells.stop[0])
            task = self.task
            seconds = time.perf_counter() - self.began
            self._end(Receipt(task.key, task.index, len(task.missing), self.done, seconds, peak_rss()))

    def _finish_rows(self, below: int) -> None:
        """Make labels of what the rows of the lattice above `below` complete."""
        for at, sums in self.sums.roll(below):
            if self.half or self.voxel_rows is not None:
                sums = self._means(sums)
            for z, fields in [(at, sums)] if self.voxel_rows is None else self.voxel_rows.add(at, sums):
                self._label(z, fields)

    def _label(self, z: int, fields: torch.Tensor) -> None:
        depth = self.task.shards.shard[0]
        labels = label_row(fields[: self.classes], self.card)
        self.rows[z % depth] = labels.cpu().numpy()
        self.uncertainty.add_row(z, fields, labels)
        if z % depth == depth - 1 or z == self.box.stop[0] - 1:
            self._write_shards(z // depth)

    def _means(self, sums: torch.Tensor) -> torch.Tensor:
        """A row of sums divided by their weights, float32; its weights are then ones."""
        means = sums / sums[-1].clamp_min(LEAST_WEIGHT)  # no tile that was needed may reach a voxel: its sums are 0
        if self.half and not bool((means.amax() - means.amin()).isfinite()):
            raise StudyError(
                "model",
                "sums of logits are too large for half precision, and no mask was made: use --stitch nnunet",
            )
        return means.float()

    def _write_shards(self, shard_row: int) -> None:
        """Write the missing shards of one row of shards, each whole, then its marker."""
        task = self.task
        for index in task.missing:
            if index[0] != shard_row:
                continue
            box = task.shards.box(index)
            _, y, x = box.shift((0, -self.box.start[1], -self.box.start[2])).slices
            labels = self.rows[: box.shape[0], y, x]
            write_shard(self.labels, task.labels, index, box, labels)
            channel = (0,) * (self.image.ndim - 3)
            intensity = ome.read(self.image, channel + box.slices) if labels.any() else None
            sums = shard_statistics(labels, intensity, box.start, self.uncertainty.take(index))
            ledger.write_marker(task.ledger, index, self.runtime.hash, sums)
            self.step()

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Errors of one block end that block; the others of its batch go on."""
        try:
            yield
        except Exception as error:
            self.fail(typed(error))

    def _end(self, outcome: Receipt | Failure) -> None:
        self.outcome, self.over = outcome, True

    def fail(self, error: StudyError) -> None:
        self._end(Failure(self.task.key, self.task.index, error.cause, error.message))

    def take_outcome(self) -> Receipt | Failure:
        outcome, self.outcome = self.outcome, None
        assert outcome is not None
        # What the block held is given back now, not when the caller lets go of its last tile.
        del self.window, self.sums, self.voxel_rows, self.rows, self.uncertainty
        return outcome


def tiles_needed(task: BlockTask) -> list[Box]:
    """The tiles of a block, in raster order, that answer for cells which a missing shard needs."""
    shards, lattice = task.shards, task.lattice
    missing = np.zeros(shards.counts, bool)
    missing[tuple(np.transpose(task.missing))] = True
    ends = [[lattice.span(axis, *run) for run in shards.runs(axis)] for axis in range(3)]
    begins, stops = [[[span[i] for span in axis] for axis in ends] for i in range(2)]
    needed = []
    for tile in task.grid.tiles_over(lattice.box(shards.box_of(task.range))):
        core = task.grid.core(tile)
        reached = tuple(
            slice(bisect_right(stop, a), bisect_left(begin, b))
            for begin, stop, a, b in zip(begins, stops, core.start, core.stop, strict=True)
        )
        if missing[reached].any():
            needed.append(tile)
    return needed


def _window(task: BlockTask, image: Any, tiles: Sequence[Box], normalize: Sequence[Affine]) -> InputWindow:
    lattice = task.lattice

    def open_rows(y: slice, x: slice) -> StoredRows | ResampledRows:
        if lattice.resampled:
            return ResampledRows(image, normalize, lattice, y, x)
        return StoredRows(image, normalize, y, x)

    region = _hull(tiles).grow(task.grid.margin)
    return InputWindow(lattice.cells, len(normalize), region, task.grid.window[0], task.fill, open_rows)


def typed(error: Exception) -> StudyError:
    """What ended a block, with its cause. Of errors that are not ours or torch's only the kind and place are told:
    their text may quote a path.

    Raises `error` again where this process can compute nothing any more: after any CUDA error but out of memory.
    """
    if isinstance(error, StudyError):
        return error
    if isinstance(error, ModelError):
        return StudyError("model", str(error))
    if isinstance(error, MemoryError):
        return StudyError("memory", "the worker ran out of memory: a smaller --tile, or fewer workers")
    if isinstance(error, RuntimeError):  # torch's kind
        text = str(error).splitlines()[0][:200] if str(error) else "no reason given"
        if "out of memory" in text.lower() or "can't allocate memory" in text.lower():
            return StudyError("memory", f"the network ran out of memory on a batch of tiles: {text}; a smaller --tile")
        if "CUDA error" in text:
            raise error
        return StudyError("model", f"the network failed on a batch of tiles: {text}")
    if isinstance(error, OSError):
        return StudyError("storage", f"reading or writing failed: {error.strerror or 'not found, or not readable'}")
    place = traceback.extract_tb(error.__traceback__)[-1]
    return StudyError("crash", f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}")


def label_row(sums: torch.Tensor, card: Card) -> torch.Tensor:
    """Labels (y, x) of one row of summed logits (classes, y, x).

    softmax: the largest channel wins, the first on a tie. sigmoid: channel i paints the i-th label where its logit is
    above 0 (a probability above 0.5), later channels over earlier ones.
    """
    import torch

    if card.activation == "softmax":
        return sums.argmax(dim=0)
    labels = torch.zeros(sums.shape[1:], dtype=torch.int32, device=sums.device)
    for channel, label in enumerate(card.labels):
        labels.masked_fill_(sums[channel] > 0, int(label))
    return labels


def write_shard(array: Any, url: str, index: tuple[int, int, int], box: Box, labels: np.ndarray) -> None:
    """Write one whole label shard durably. A shard of background alone is not stored.

    The new bytes take the place of the old ones in one step: another command may have marked or even published the
    same shard by now. zarr reads what is there even for a whole write, and fails on a damaged one: that goes first.
    """
    lead = (0,) * (array.ndim - 3)
    path = shard_url(url, index, len(lead))
    if not labels.any():
        store.delete(path)
        return
    try:
        array[lead + box.slices] = labels
    except (ValueError, RuntimeError):  # what codecs raise
        store.delete(path)
        array[lead + box.slices] = labels
    store.sync(path)


def _hull(tiles: Sequence[Box]) -> Box:
    start = tuple(min(t.start[i] for t in tiles) for i in range(3))
    stop = tuple(max(t.stop[i] for t in tiles) for i in range(3))
    return Box(start, stop)  # type: ignore[arg-type]
