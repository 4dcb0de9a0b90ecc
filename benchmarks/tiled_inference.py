"""Ours against MONAI's `sliding_window_inference`: one phantom, one ResUNet, fp32, the same threads.

Runs alternate between the two, so that what else the machine does falls on both; the ratio is taken pair by pair.
Each one's peak memory is measured in a process of its own.

    python benchmarks/tiled_inference.py [--shape 160,160,160] [--tile 64,64,64] [--classes 3] [--rounds 5] ...

Two spans are timed. `blocks`: for MONAI from the normalised volume in memory to labels in memory; for us from the
image on disk to label shards on disk, synced and marked. `all`: from NIfTI to NIfTI; for us this includes the OME-Zarr
with its pyramid, the tables and the report page.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

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


def run_monai(bench: Bench) -> tuple[float, float, int]:
    """(seconds of the blocks span, seconds of all, peak bytes) of a plain script around MONAI."""
    import nibabel as nib
    import torch
    from monai.inferers import sliding_window_inference

    import segmodels
    from pipeline.engine import peak_rss, reset_peak_rss

    torch.set_num_threads(bench.threads)
    began = time.perf_counter()
    network = segmodels.load(bench.model).network
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
    nib.save(nib.Nifti1Image(labels.T, scan.affine), bench.folder / "monai.nii.gz")
    return blocks, time.perf_counter() - began, peak


def run_ours(bench: Bench) -> tuple[float, float, int]:
    """The same of `pipeline.segment` with the serial engine, into an empty OUT."""
    import csv

    import pipeline

    with tempfile.TemporaryDirectory(dir=bench.folder) as out:
        began = time.perf_counter()
        summary = pipeline.segment(bench.scan, bench.model, out, threads=bench.threads, precision="fp32")
        everything = time.perf_counter() - began
        assert summary.published == 1, summary.studies
        with (Path(out) / "metrics" / "studies.csv").open() as file:
            (row,) = csv.DictReader(file)
        (Path(out) / "masks" / "scan.nii.gz").rename(bench.folder / "ours.nii.gz")
    return float(row["seconds_segment"]), everything, int(float(row["peak_rss_bytes"]))


SIDES: dict[str, Callable[[Bench], tuple[float, float, int]]] = {"MONAI": run_monai, "maskmill": run_ours}


# ----------------------------------------------------------------------------------------------------------- measuring


def measure_memory(bench: Bench, side: str) -> int:
    """Peak resident bytes of one side's blocks span, in a process of its own."""
    command = [sys.executable, __file__, "--only", side, *_arguments(bench)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def measure_time(bench: Bench, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(blocks, all) seconds of each side, per round; the side that goes first changes from round to round."""
    for run in SIDES.values():  # warm: imports, caches, thread pools
        run(bench)
    seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in list(SIDES)[:: 1 if number % 2 == 0 else -1]:
            blocks, everything, _ = SIDES[side](bench)
            seconds[side].append((blocks, everything))
            print(f"  round {number + 1}: {side:8} blocks {blocks:7.2f} s   all {everything:7.2f} s", file=sys.stderr)
    return seconds


def difference(bench: Bench) -> float:
    """Share of the voxels whose label differs between the two masks."""
    import nibabel as nib

    ours, monai = (np.asanyarray(nib.load(bench.folder / f"{name}.nii.gz").dataobj) for name in ("ours", "monai"))
    return float(np.mean(ours != monai))


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
    parser.add_argument("--shape", type=numbers, default=(160, 160, 160), help="z,y,x")
    parser.add_argument("--tile", type=numbers, default=(64, 64, 64), help="z,y,x")
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--widths", type=numbers, default=(16, 32, 64, 128))
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=list(SIDES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    facts = (given.shape, given.tile, given.overlap, given.classes, given.widths, given.threads)
    if given.only:
        print(json.dumps({"peak": SIDES[given.only](Bench(given.folder, *facts))[2]}))
        return
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), *facts)
        prepare(bench)
        print(f"volume {bench.shape}, tile {bench.tile}, overlap {bench.overlap}, {bench.classes} classes, "
              f"ResUNet {bench.widths}, fp32, {bench.threads} threads, {given.rounds} rounds")  # fmt: skip
        peaks = {side: measure_memory(bench, side) for side in SIDES}
        seconds = measure_time(bench, given.rounds)
        for side, times in seconds.items():
            blocks, everything = ([t[i] for t in times] for i in (0, 1))
            print(f"{side:8}  blocks {_spread(blocks)} s   all {_spread(everything)} s   "
                  f"peak {peaks[side] / 2**30:.2f} GiB")  # fmt: skip
        for i, span in enumerate(("blocks", "all")):
            pairs = zip(seconds["maskmill"], seconds["MONAI"], strict=True)
            print(f"maskmill / MONAI, {span}: {_spread([ours[i] / theirs[i] for ours, theirs in pairs])}")
        print(f"labels that differ: {difference(bench):.2e} of the voxels")


if __name__ == "__main__":
    main()
