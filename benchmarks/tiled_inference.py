"""Ours against MONAI's `sliding_window_inference`: one phantom, one ResUNet, the same threads.

Sides: MONAI as it is (fp32), MONAI with our compiled network, ours in fp32, ours compiled. Runs alternate between them,
so that what else the machine does falls on all; ratios are taken round by round. Each one's peak memory is measured in
a process of its own, which is also the cold run: its first tile compiles, where nothing is kept yet.

    python benchmarks/tiled_inference.py [--shape 192,192,192] [--tile 64,64,64] [--classes 3] [--rounds 3] ...

Three spans are timed. `blocks`: for MONAI from the normalised volume in memory to labels in memory; for us from the
image on disk to label shards on disk, synced and marked. `all`: from NIfTI to NIfTI; for us this includes the OME-Zarr
with its pyramid, the tables and the report page. `bare`: the network alone on as many tiles, in a loop.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Bench:
    """What both sides are given."""

    folder: Path
    shape: tuple[int, int, int]
    tile: tuple[int, int, int]
    overlap: float
    classes: int
    widths: tuple[int, ...]
    threads: int

    @property
    def scan(self) -> Path:
        return self.folder / "scan.nii.gz"

    @property
    def model(self) -> Path:
        return self.folder / "model"


def prepare(bench: Bench) -> None:
    """Write a phantom (int16) and a model folder with seeded random weights."""
    import nibabel as nib
    import torch

    import segmodels
    from pipeline.phantoms import phantom

    one = phantom(0, bench.shape)
    nib.save(nib.Nifti1Image(one.region()[0].T, one.affine), bench.scan)
    torch.manual_seed(0)
    network = segmodels.create(
        "resunet", dims=3, in_channels=1, classes=bench.classes, widths=list(bench.widths), norm="instance"
    )
    card = {
        "name": "bench",
        "axes": "zyx",
        "channels": ["any"],
        "normalize": [{"kind": "zscore"}],
        "tile": list(bench.tile),
        "overlap": bench.overlap,
        "activation": "softmax",
        "labels": {str(k): {"name": f"structure {k}"} for k in range(1, bench.classes)},
    }
    segmodels.save(network, card, bench.model)


# -------------------------------------------------------------------------------------------------------- the two sides


@dataclass(frozen=True)
class Side:
    """Who stitches, and how the network runs."""

    ours: bool
    backend: str = "torch"
    precision: str = "fp32"


SIDES = {
    "MONAI": Side(ours=False),
    "MONAI, openvino bf16": Side(ours=False, backend="openvino", precision="bf16"),
    "maskmill": Side(ours=True),
    "maskmill, inductor bf16": Side(ours=True, backend="inductor", precision="bf16"),
    "maskmill, openvino bf16": Side(ours=True, backend="openvino", precision="bf16"),
}


@dataclass(frozen=True)
class Took:
    blocks: float
    all: float
    peak: int


def network_of(bench: Bench, side: Side) -> Callable[[Any], Any]:
    """The bench's network as one side runs it."""
    import torch

    import segmodels
    from segmodels.backends import runner
    from segmodels.runtime import Runtime, versions_of

    torch.set_num_threads(bench.threads)
    network = segmodels.load(bench.model).network
    assert network is not None
    versions = versions_of("cpu", side.backend)
    return runner(network, Runtime("cpu", side.backend, side.precision, bench.threads, 1, versions))


def run_monai(bench: Bench, side: Side, mask: Path) -> Took:
    """A plain script around MONAI."""
    import nibabel as nib
    import torch
    from monai.inferers import sliding_window_inference

    from pipeline.engine import peak_rss, reset_peak_rss

    began = time.perf_counter()
    network = network_of(bench, side)
    scan = nib.load(bench.scan)
    voxels = np.asanyarray(scan.dataobj).T.astype(np.float32)
    image = torch.from_numpy((voxels - voxels.mean()) / voxels.std())[None, None]
    del voxels
    reset_peak_rss()
    blocks = time.perf_counter()
    with torch.inference_mode():
        logits = sliding_window_inference(image, bench.tile, 1, network, overlap=bench.overlap, mode="gaussian")
        labels = logits[0].argmax(0).to(torch.uint8).numpy()
    blocks, peak = time.perf_counter() - blocks, peak_rss()
    nib.save(nib.Nifti1Image(labels.T, scan.affine), mask)
    return Took(blocks, time.perf_counter() - began, peak)


def run_ours(bench: Bench, side: Side, mask: Path) -> Took:
    """The same by `pipeline.segment` with the serial engine, into an empty OUT."""
    import csv

    import pipeline

    with tempfile.TemporaryDirectory(dir=bench.folder) as out:
        began = time.perf_counter()
        summary = pipeline.segment(
            bench.scan, bench.model, out, threads=bench.threads, precision=side.precision, backend=side.backend
        )
        everything = time.perf_counter() - began
        assert summary.published == 1, summary.studies
        with (Path(out) / "metrics" / "studies.csv").open() as file:
            (row,) = csv.DictReader(file)
        (Path(out) / "masks" / "scan.nii.gz").rename(mask)
    return Took(float(row["seconds_segment"]), everything, int(float(row["peak_rss_bytes"])))


def run(bench: Bench, name: str) -> Took:
    side, mask = SIDES[name], bench.folder / f"{name.replace(' ', '_')}.nii.gz"
    return (run_ours if side.ours else run_monai)(bench, side, mask)


def run_bare(bench: Bench, name: str) -> float:
    """Seconds that the network alone takes for as many tiles as the volume has, from the median of ten."""
    import torch
    from monai.inferers.utils import dense_patch_slices

    steps = [max(1, int(t * (1 - bench.overlap))) for t in bench.tile]
    tiles = len(dense_patch_slices(bench.shape, bench.tile, steps))
    network, tile, seconds = network_of(bench, SIDES[name]), torch.randn(1, 1, *bench.tile), []
    with torch.inference_mode():
        network(tile)
        for _ in range(10):
            began = time.perf_counter()
            network(tile)
            seconds.append(time.perf_counter() - began)
    return tiles * median(seconds)


# ----------------------------------------------------------------------------------------------------------- measuring


def run_alone(bench: Bench, name: str) -> Took:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--only", name, *_arguments(bench)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Took(**json.loads(done.stdout.splitlines()[-1]))


def measure_time(bench: Bench, names: list[str], rounds: int) -> dict[str, list[Took]]:
    """What every side took, per round; the order turns round from round to round."""
    took: dict[str, list[Took]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[:: 1 if number % 2 == 0 else -1]:
            if number == 0:
                run_bare(bench, name)  # warm: imports, compiled code, thread pools
            took[name].append(one := run(bench, name))
            print(f"  round {number + 1}: {name:24} blocks {one.blocks:7.2f} s   all {one.all:7.2f} s", file=sys.stderr)
    return took


def difference(bench: Bench, name: str) -> float:
    """Share of the voxels whose label differs from MONAI's."""
    import nibabel as nib

    masks = [np.asanyarray(nib.load(bench.folder / f"{n.replace(' ', '_')}.nii.gz").dataobj) for n in (name, "MONAI")]
    return float(np.mean(masks[0] != masks[1]))


def _arguments(bench: Bench) -> list[str]:
    given = {
        "folder": bench.folder,
        "shape": ",".join(map(str, bench.shape)),
        "tile": ",".join(map(str, bench.tile)),
        "overlap": bench.overlap,
        "classes": bench.classes,
        "widths": ",".join(map(str, bench.widths)),
        "threads": bench.threads,
    }
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def _spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    from segmodels.runtime import usable_cores

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(n) for n in text.split(","))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=numbers, default=(192, 192, 192), help="z,y,x")
    parser.add_argument("--tile", type=numbers, default=(64, 64, 64), help="z,y,x")
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--widths", type=numbers, default=(16, 32, 64, 128))
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=list(SIDES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    facts = (given.shape, given.tile, given.overlap, given.classes, given.widths, given.threads)
    if given.only:
        print(json.dumps(asdict(run(Bench(given.folder, *facts), given.only))))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MASKMILL_HOME"] = folder  # the first run of each compiles
        bench = Bench(Path(folder), *facts)
        prepare(bench)
        print(f"volume {bench.shape}, tile {bench.tile}, overlap {bench.overlap}, {bench.classes} classes, "
              f"ResUNet {bench.widths}, {bench.threads} threads, {given.rounds} rounds")  # fmt: skip
        alone = {name: run_alone(bench, name) for name in given.sides}
        took = measure_time(bench, given.sides, given.rounds)
        for name, rounds in took.items():
            ratios = [theirs.all / ours.all for ours, theirs in zip(rounds, took[given.sides[0]], strict=True)]
            print(
                f"{name:24} blocks {_spread([t.blocks for t in rounds])} s   bare {run_bare(bench, name):.2f} s   "
                f"all {_spread([t.all for t in rounds])} s, cold {alone[name].all:.2f} s   "
                f"{_spread(ratios)} x {given.sides[0]}   peak {alone[name].peak / 2**30:.2f} GiB   "
                f"labels that differ {difference(bench, name):.1e}"
            )


if __name__ == "__main__":
    main()
