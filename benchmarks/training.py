"""A MONAI DynUNet trained as long, on the same split, with the same samples, loss and schedule as a training job's.

    python benchmarks/training.py segmodels/store/hippocampus-resunet/train.yaml -o FOLDER [--model M] [--member 0]

The network is nnU-Net's: DynUNet with 32 to 256 channels, instance normalisation and leaky ReLU. It is trained by our
loop under the job's recipe (one member, deep supervision off), and both networks answer through MONAI's sliding window
with the job's tile, overlap and mirroring. Printed: Dice per structure, and the paired difference (ours - DynUNet) of
the mean Dice over the validation cases with its 95 % bootstrap interval; FOLDER/curve.csv is its learning curve. A
killed run goes on from its checkpoint. By default it has the minutes of all the job's members; with --member it has
those of one, and that one is compared. --steps N in place of minutes is for a machine that does other work: N is then
the minutes over the seconds of a step on a quiet one.
"""

from __future__ import annotations

import argparse
import json
import threading
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from monai.inferers.utils import sliding_window_inference
from monai.networks.nets.dynunet import DynUNet

import segmodels
from pipeline.metrics.intervals import bootstrap_interval
from pipeline.training.curve import write_curve
from pipeline.training.gather import prepare_cases
from pipeline.training.job import TrainJob, make_train_job
from pipeline.training.quality import curve_scorer
from segmodels.network import Network
from segmodels.train.cases import Case
from segmodels.train.loop import Task, Training, train


class Peer(Network):
    """DynUNet behind the face of our networks."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__(dims=3, in_channels=in_channels, classes=classes, divisor=8)
        self.inner = DynUNet(
            spatial_dims=3, in_channels=in_channels, out_channels=classes, kernel_size=[3] * 4, strides=[1, 2, 2, 2],
            upsample_kernel_size=[2] * 3, filters=[32, 64, 128, 256],
        )  # fmt: skip

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        return y


def dice(network: torch.nn.Module, job: TrainJob, cases: list[Case], mirror: tuple[int, ...]) -> np.ndarray:
    """Dice of each case (rows) and structure (columns); NaN where both masks are empty.

    A window is never larger than the image: in a tile that is mostly padding, instance normalisation sees other
    statistics than in the samples it learned from, which would cost the DynUNet 0.03.
    """
    flips = list(chain.from_iterable(combinations([a + 2 for a in mirror], n) for n in range(len(mirror) + 1)))

    def answer(tiles: torch.Tensor) -> torch.Tensor:
        return sum(network(tiles.flip(axes)).flip(axes) for axes in flips) / len(flips)  # type: ignore[return-value]

    rows = []
    for case in cases:
        image, true = torch.from_numpy(np.array(case.image()))[None], case.labels()
        window = [min(t, n) for t, n in zip(job.tile, true.shape, strict=True)]
        with torch.inference_mode():
            logits: Any = sliding_window_inference(image, window, 1, answer, overlap=job.overlap, mode="gaussian")
        found = logits.argmax(1)[0].numpy()
        pairs = [(found == int(k), true == int(k)) for k in job.labels]
        rows.append([2 * (a & b).sum() / n if (n := a.sum() + b.sum()) else np.nan for a, b in pairs])
    return np.array(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--model", help="the model to compare with; default: the job's name")
    parser.add_argument("--member", type=int, help="compare with this network of an ensemble alone")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, help="default: the minutes of all the job's members, or of one")
    budget.add_argument("--steps", type=int, help="train for so many steps instead")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    job = make_train_job(yaml.safe_load(given.job.read_text("utf-8")))
    members = job.members if given.member is None else 1
    minutes = given.minutes or (job.recipe.minutes or 0) * members * (job.threads or 1) / given.threads
    recipe = job.recipe.model_copy(
        update={"minutes": None if given.steps else minutes, "steps": given.steps, "deep_supervision": False}
    )
    cases = prepare_cases(job, given.out, threading.Event())
    torch.manual_seed(recipe.seed)
    peer = Peer(len(job.channels), len(job.labels) + 1)

    def show(training: Training, progress: float) -> None:
        if training.step % 50 == 0:
            print(f"step {training.step}, {progress:.0%}, loss {training.losses[-1]:.4f}", flush=True)

    task = Task(
        peer, tuple(cases.training), recipe, job.patch, job.mirror_axes, given.out / "peer", threads=given.threads
    )
    trained = train(task, observe=show, validate=curve_scorer(job, cases.validation))
    write_curve(given.out, trained.rows)
    ours = segmodels.load(given.model or job.name).network
    assert ours is not None
    if given.member is not None:
        ours = ours.parts[given.member]
    mirror = job.mirror_axes
    theirs, mine = (dice(network, job, cases.validation, mirror) for network in (trained.kept, ours))
    difference = np.nanmean(mine, axis=1) - np.nanmean(theirs, axis=1)
    low, high = bootstrap_interval(difference.tolist())
    print(json.dumps({
        "minutes": round(trained.seconds / 60, 1), "threads": given.threads, "peer_steps": trained.step,
        "peer_parameters": sum(p.numel() for p in trained.kept.parameters()), "cases": len(difference),
        "structures": list(job.labels.values()),
        "peer_dice": np.nanmean(theirs, axis=0).round(4).tolist(), "peer_mean": round(float(np.nanmean(theirs)), 4),
        "dice": np.nanmean(mine, axis=0).round(4).tolist(), "mean": round(float(np.nanmean(mine)), 4),
        "difference": round(float(difference.mean()), 4), "interval_95": [round(low, 4), round(high, 4)],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
