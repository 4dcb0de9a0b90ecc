"""Guarantee 2, measured from outside: what the kernel says a process took, against --memory and the plan."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

import segmodels

MIB = 1 << 20
CLASSES = 48  # the sums of the whole study would take 4 bytes for each class and voxel of 48 rows: 576 MiB

# VmHWM is this process's own; ru_maxrss would also count what the process that started it held. Every block has the
# kernel count anew: here it must not, so that reading and publishing are seen as well.
RUN = """
import ctypes, json, sys
import pipeline, pipeline.blocks
from pipeline.engine import peak_rss
pipeline.blocks.reset_peak_rss = lambda: ctypes.CDLL(None).malloc_trim(0)
arguments = json.loads(sys.argv[1])
plan = arguments.pop("plan")
if plan:
    arguments.pop("out")
    answer = [p.describe("") for p in pipeline.plan(**arguments)]
else:
    answer = pipeline.segment(**arguments).to_json()
print(json.dumps([answer, peak_rss()]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """big.nii.gz, 256 x 256 x 96 voxels, and a model of many classes and little arithmetic."""
    folder = tmp_path_factory.mktemp("memory")
    voxels = np.random.default_rng(0).normal(0, 100, (256, 256, 96)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / "big.nii.gz")
    network = segmodels.create("resunet", dims=3, in_channels=1, classes=CLASSES, widths=[2, 2], norm="none")
    card = {
        "name": "many",
        "axes": "zyx",
        "channels": ["any"],
        "normalize": [{"kind": "zscore"}],
        "tile": [48, 64, 64],
        "overlap": 0.0,
        "activation": "softmax",
        "labels": {str(k): {"name": f"structure {k}"} for k in range(1, CLASSES)},
    }
    segmodels.save(network, card, folder / "model")
    return folder


def measured(folder: Path, **settings: Any) -> tuple[Any, int]:
    """What a process of its own answers, and the most memory (bytes) that the kernel ever saw it hold."""
    arguments = {"inputs": str(folder / "big.nii.gz"), "model": str(folder / "model"), "threads": 1, **settings}
    command = [sys.executable, "-c", RUN, json.dumps(arguments)]
    answer, peak = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return answer, peak


def test_a_worker_stays_below_what_it_was_allowed(folder: Path) -> None:
    (whole,), _ = measured(folder, plan=True, out="")
    assert whole["blocks"] == 1
    allowed = 900 * MIB
    assert whole["host_bytes"] > allowed + 100 * MIB

    (cut,), _ = measured(folder, plan=True, out="", memory=allowed)
    assert cut["host_bytes"] <= allowed
    assert cut["blocks"] >= 2

    # One process does it all here: ingest, blocks, publishing, report.
    summary, peak = measured(folder, plan=False, out=str(folder / "out"), memory=allowed)
    assert summary["published"] == 1
    assert summary["blocks_computed"] >= 2
    assert peak <= allowed


def test_the_whole_study_at_once_stays_below_what_was_projected(folder: Path) -> None:
    (whole,), _ = measured(folder, plan=True, out="")
    summary, peak = measured(folder, plan=False, out=str(folder / "whole"))
    assert (summary["published"], summary["blocks_computed"]) == (1, 1)
    assert peak <= whole["host_bytes"]
    assert peak >= whole["host_bytes"] / 2  # the projection is no idle one
