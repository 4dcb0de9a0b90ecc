"""`maskmill demo`: the main job on data that is at hand on every machine, with models that come with the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.job import make_job

if TYPE_CHECKING:
    from pipeline.summary import Summary

CLASSES = 4
MODEL = "phantom-resunet"
SEEDS = (1000, 1001, 1002)  # the model was trained on others
SHAPE, SPACING_MM = (192, 144, 192), 2.0


def demo_command(out: str, engine: str) -> int:
    """Segment a real MR brain by k-means and three simulated CTs by a trained network, and print what was found."""
    codes = [_brain(out, engine), _phantoms(Path(out), engine)]
    print("run it again: it computes nothing twice", file=sys.stderr)
    return max(codes)


def _brain(out: str, engine: str) -> int:
    """Volume 0 of the real MR brain that nibabel carries, into classes of intensity."""
    from nibabel.testing import data_path

    brain = Path(data_path) / "example4d.nii.gz"
    print(f"A real MR brain (volume 0 of nibabel's example4d.nii.gz) into {CLASSES} classes of intensity, by k-means.")
    summary = _segment({"inputs": [str(brain)], "model": "kmeans", "classes": CLASSES, "volume": 0}, out, engine)
    for entry in summary.studies:
        for row in entry["structures"]:
            print(f"  {row['structure']:10} {row['volume_ml']:8.1f} mL   mean intensity {row['mean'] or 0:7.1f}")
        print(f"mask:   {entry['mask']}")
    _close(summary)
    return summary.exit_code


def _phantoms(out: Path, engine: str) -> int:
    """Three phantoms that the shipped network has not seen, against their true masks and volumes."""
    from pipeline.phantoms import make_phantoms, phantom

    made = out / "phantoms"
    print(f"\nThree simulated CTs into organs, by the trained network {MODEL}.")
    make_phantoms(str(made), SEEDS, SHAPE, spacing_mm=SPACING_MM)
    job = {"inputs": [str(made / "images")], "model": MODEL, "reference": str(made / "labels")}
    summary = _segment(job, str(out / "organs"), engine)
    truth = {f"phantom-{seed:04d}": phantom(seed, SHAPE, spacing_mm=SPACING_MM).volumes_ml for seed in SEEDS}
    for entry in summary.studies:
        print(f"{entry['study']}     found      truth   difference   Dice")
        for row in entry["structures"]:
            true = list(truth[entry["study"]].values())[row["label"] - 1]
            found = row["volume_ml"]
            print(f"  {row['structure']:8} {found:9.1f}  {true:9.1f} mL   {found / true - 1:+8.2%}   {row['dice']:.3f}")
    _close(summary)
    return summary.exit_code


def _segment(settings: dict[str, Any], out: str, engine: str) -> Summary:
    from .main_job import report_failures, segment_job

    summary = segment_job(make_job(settings | {"out": out, "engine": engine}))
    report_failures(summary)
    return summary


def _close(summary: Summary) -> None:
    again = "nothing was left to do" if summary.reused else f"{summary.blocks_computed} block(s) computed"
    print(f"report: {summary.report}")
    print(f"{again}, {summary.seconds:.1f} s", file=sys.stderr)
