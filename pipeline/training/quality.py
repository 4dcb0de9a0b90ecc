"""How good a model is: scores for the learning curve, and the figures of the card, measured as users measure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segmodels.train.cases import Case

from ..api import run_blocks, start_run
from ..engine import SerialEngine
from ..job import make_job
from ..metrics.intervals import bootstrap_interval
from ..references import References
from ..summary import Summary, finish
from .job import TrainJob
from .pairs import Pair

CURVE_CASES = 10  # of the validation cases, for the learning curve: the card is measured on all of them


def curve_scorer(job: TrainJob, cases: Sequence[Case]) -> Callable[[Any], dict[str, float]]:
    """A function of a network that gives the mean Dice of each structure over the first validation cases."""
    chosen = cases[:CURVE_CASES]

    def score(network: Any) -> dict[str, float]:
        import torch
        from monai.inferers.utils import sliding_window_inference

        device = next(network.parameters()).device
        found: dict[str, list[float]] = {name: [] for name in job.labels.values()}
        flat = len(job.tile) == 2
        for case in chosen:
            image = torch.from_numpy(np.array(case.image()))
            with torch.inference_mode():
                # A 2-D network sees the planes as a batch.
                batch = (image.movedim(1, 0) if flat else image[None]).to(device)
                logits: Any = sliding_window_inference(
                    batch, job.tile, 4 if flat else 1, network, overlap=job.overlap, mode="gaussian"
                )
                chosen_labels = logits.argmax(1).cpu().numpy().reshape(case.labels().shape)
            for value, name in job.labels.items():
                predicted, true = chosen_labels == int(value), case.labels() == int(value)
                if (both := int(predicted.sum()) + int(true.sum())) > 0:
                    found[name].append(2 * int((predicted & true).sum()) / both)
        return {f"dice {name}": statistics.fmean(values) for name, values in found.items() if values}

    return score


def measure_quality(job: TrainJob, model: Path, pairs: Sequence[Pair], out: Path, threads: int) -> dict[str, Any]:
    """Segment the pairs with the model folder as any user would; gives the card's figures.

    Per structure: n, mean, median, lowest Dice and the 95 % bootstrap interval of the mean over the cases.
    """
    masks = {pair.name: pair.mask for pair in pairs}
    settings = {"model": str(model), "out": str(out), "engine": "serial", "threads": threads, "overwrite": True}
    run = start_run(make_job(settings | {"inputs": list(job.data.images)}), only=masks)
    run_blocks(run, SerialEngine)
    references = References(None, run)
    references.studies = dict(masks)
    return figures(finish(run, references))


def figures(summary: Summary) -> dict[str, Any]:
    """The quality part of a card, from a run with references."""
    scores: dict[str, list[float]] = {}
    for entry in summary.studies:
        for row in entry["structures"]:
            if row.get("dice") is not None:
                scores.setdefault(row["structure"], []).append(row["dice"])
    structures = {name: _distribution(values) for name, values in scores.items()}
    means = [facts["mean"] for facts in structures.values()]
    return {
        "measure": "Dice",
        "cases": summary.published,
        "mean_dice": statistics.fmean(means) if means else None,
        "structures": structures,
    }


def _distribution(values: Sequence[float]) -> Mapping[str, Any]:
    low, high = bootstrap_interval(values)
    return {
        "n": len(values),
        "mean": statistics.fmean(values),
        "interval_95": [low, high],
        "median": statistics.median(values),
        "lowest": min(values),
    }
