"""How good a model is: scores for the learning curve, and the figures of the card, measured as users measure."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from segmodels.train.cases import Case
from segmodels.train.recipe import UNCHANGED

from ..api import run_blocks, start_run
from ..engine import SerialEngine
from ..errors import Interrupted, StudyError
from ..job import make_job
from ..metrics.intervals import bootstrap_interval
from ..references import References
from ..summary import Summary, finish
from .job import TrainJob
from .pairs import Pair

CURVE_TILES = 16  # for the learning curve, scored often
CALIBRATION_TILES = 64


def validation_tiles(job: TrainJob, cases: Sequence[Case], count: int) -> Iterator[tuple[Any, Any]]:
    """Up to `count` tiles of the cases, nothing changed: image (1, c, *tile) float32 and labels (*tile) int64 tensors.

    A tile is what a network takes at once, so this is bounded for scans of any size.
    """
    from segmodels.train.samples import Samples

    recipe = job.recipe.model_copy(update={"augment": UNCHANGED, "seed": 0})
    flat = len(job.tile) == 2
    samples = Samples(cases, recipe, job.window, ())
    for i in range(count):
        image, labels, _ = samples[i]
        yield (image[:, 0], labels[0]) if flat else (image, labels)


def curve_scorer(job: TrainJob, cases: Sequence[Case]) -> Callable[[Any], dict[str, float]]:
    """A function of a network that gives the Dice of each structure over some tiles of the validation cases together.

    Over all of them at once: a tile with three voxels of a structure would weigh as much as one that is full of it.
    """

    def score(network: Any) -> dict[str, float]:
        import torch

        device = next(network.parameters()).device
        shared, sizes = dict.fromkeys(job.labels, 0), dict.fromkeys(job.labels, 0)
        for image, labels in validation_tiles(job, cases, CURVE_TILES):
            with torch.inference_mode():
                predicted = network(image[None].to(device)).argmax(1)[0].cpu()
            for value in job.labels:
                ours, true = predicted == int(value), labels == int(value)
                shared[value] += int((ours & true).sum())
                sizes[value] += int(ours.sum()) + int(true.sum())
        return {f"dice {name}": 2 * shared[v] / sizes[v] for v, name in job.labels.items() if sizes[v]}

    return score


def measure_calibration(
    job: TrainJob, model: Path, cases: Sequence[Case], threads: int, stop: threading.Event
) -> dict[str, Any]:
    """The expected calibration error of the model's probabilities over tiles of the validation cases.

    Raises Interrupted when `stop` is set meanwhile.
    """
    import segmodels
    from segmodels.calibration import BINS, CalibrationSums, calibration_sums, expected_calibration_error, merge
    from segmodels.predictor import make_predictor
    from segmodels.runtime import resolve_runtime

    loaded = segmodels.load(model)
    predictor = make_predictor(loaded, resolve_runtime(loaded, backend="torch", precision="fp32", threads=threads))

    def sums() -> Iterator[CalibrationSums]:
        for image, labels in validation_tiles(job, cases, CALIBRATION_TILES):
            if stop.is_set():
                raise Interrupted
            tile = image[None] if image.ndim == 4 else image[None, :, None]
            logits = predictor.predict(tile)[0, : predictor.classes].cpu()
            yield calibration_sums(logits, labels.reshape(logits.shape[1:]))

    return {
        "expected_calibration_error": expected_calibration_error(merge(sums())),
        "bins": BINS,
        "tiles": CALIBRATION_TILES,
        "over": "voxels that are a structure in the mask or in the reference",
    }


def measure_quality(
    job: TrainJob, model: Path, pairs: Sequence[Pair], out: Path, threads: int, stop: threading.Event
) -> dict[str, Any]:
    """Segment the pairs with the model folder as any user would; gives the card's figures.

    Per structure: n, mean, median, lowest Dice and the 95 % bootstrap interval of the mean over the cases. Raises
    StudyError where one of them cannot be measured: figures of the others would not be those of the split. Raises
    Interrupted when `stop` is set meanwhile.
    """
    masks = {pair.name: pair.mask for pair in pairs}
    settings = {"model": str(model), "out": str(out), "engine": "serial", "threads": threads, "overwrite": True}
    run = start_run(make_job(settings | {"inputs": list(job.data.images)}), only=masks)
    run.stop = stop
    run_blocks(run, SerialEngine)
    references = References(None, run)
    references.studies = dict(masks)
    summary = finish(run, references)
    if stop.is_set():
        raise Interrupted
    for entry in summary.studies:
        if entry["state"] != "published" or references.held.get(entry["study"]) is None:
            raise StudyError(
                entry["cause"] or "input",
                f"the validation case {entry['study']} cannot be measured: {entry['message']}; mend it and run again "
                "(what is learned is kept)",
            )
    return figures(summary)


def figures(summary: Summary) -> dict[str, Any]:
    """The quality part of a card, from a run with references."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for entry in summary.studies:
        for row in entry["structures"]:
            if row.get("dice") is not None:
                rows.setdefault(row["structure"], []).append(row)
    structures = {name: _distribution(found) for name, found in rows.items()}
    means = [facts["mean"] for facts in structures.values()]
    return {
        "measure": "Dice",
        "cases": summary.published,
        "mean_dice": statistics.fmean(means) if means else None,
        "structures": structures,
    }


def _distribution(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Dice over the cases of one structure, and the mean of HD95 where it is defined."""
    dice = [row["dice"] for row in rows]
    distances = [row["hd95_mm"] for row in rows if row["hd95_mm"] is not None]
    return {
        "n": len(dice),
        "mean": statistics.fmean(dice),
        "interval_95": list(bootstrap_interval(dice)) if len(dice) > 1 else None,  # one says nothing of the spread
        "median": statistics.median(dice),
        "lowest": min(dice),
        "mean_hd95_mm": statistics.fmean(distances) if distances else None,
    }
