"""`maskmill demo`: the main job on scans that are at hand on every machine, and how good the answers are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.job import make_job

if TYPE_CHECKING:
    from pipeline.summary import Summary

CLASSES = 4
PHANTOM_MODEL = "phantom-resunet"
PHANTOM_SEEDS = range(1000, 1003)  # the network learned from seeds 0 to 59
PHANTOM_SHAPE, PHANTOM_MM = (216, 168, 216), 2.0  # the whole torso is in the field of view
PHANTOM_TILT = (5.0, 4.0, 3.0)  # degrees: no plane of a body lies along the lattice, as with patients


def demo_command(out: str, engine: str) -> int:
    """Segment a real brain and three simulated bodies. OUT holds the brain's results, OUT/phantoms the others'."""
    print("A real MR brain (volume 0 of nibabel's example4d.nii.gz) into 4 classes of intensity, by k-means.")
    brain = _segment_brain(out, engine)
    print(f"\nThree simulated CT scans, whose volumes are known exactly, by the trained network {PHANTOM_MODEL}.")
    phantoms = _segment_phantoms(Path(out) / "phantoms", engine)
    _print_trained()
    seconds, blocks = brain.seconds + phantoms.seconds, brain.blocks_computed + phantoms.blocks_computed
    again = "nothing was left to do" if brain.reused and phantoms.reused == len(PHANTOM_SEEDS) else f"{blocks} blocks"
    print(f"{again}, {seconds:.1f} s; run it again: it computes nothing twice", file=sys.stderr)
    return max(brain.exit_code, phantoms.exit_code)


def _segment_brain(out: str, engine: str) -> Summary:
    from nibabel.testing import data_path

    brain = Path(data_path) / "example4d.nii.gz"
    summary = _segment(brain, "kmeans", out, engine, classes=CLASSES, volume=0)
    for entry in summary.studies:
        for row in entry["structures"]:
            print(f"  {row['structure']:10} {row['volume_ml']:8.1f} mL   mean intensity {row['mean'] or 0:7.1f}")
        print(f"mask:   {entry['mask']}")
    print(f"report: {summary.report}")
    return summary


def _segment_phantoms(folder: Path, engine: str) -> Summary:
    """Make the phantoms, segment them, print volumes against the truth."""
    from pipeline import store
    from pipeline.phantoms import make_phantoms
    from pipeline.phantoms.series import TRUTH

    scans = folder / "scans"
    make_phantoms(str(scans), PHANTOM_SEEDS, PHANTOM_SHAPE, spacing_mm=PHANTOM_MM, tilt_degrees=PHANTOM_TILT)
    truth = (store.read_json(str(scans / TRUTH)) or {})["phantoms"]
    summary = _segment(scans / "images", PHANTOM_MODEL, str(folder), engine, reference=str(scans / "labels"))
    print(f"  {'':14}{'structure':10} {'volume':>11} {'truth':>11} {'error':>8} {'Dice':>7}")
    for entry in summary.studies:
        true = {row["structure"]: row["volume_ml"] for row in truth[entry["study"]]["structures"]}
        for at, row in enumerate(entry["structures"]):
            name, found = row["structure"], row["volume_ml"]
            error = found / true[name] - 1
            print(
                f"  {'' if at else entry['study']:14}{name:10} {found:8.1f} mL {true[name]:8.1f} mL {error:+8.2%} "
                f"{row['dice'] or 0:7.3f}"
            )
    print(f"report: {summary.report}")
    return summary


def _segment(source: Path, model: str, out: str, engine: str, **settings: Any) -> Summary:
    from .main_job import report_failures, segment_job

    given = {"inputs": [str(source)], "model": model, "out": out, "engine": engine}
    summary = segment_job(make_job(given | settings))
    report_failures(summary)
    return summary


def _print_trained() -> None:
    """The networks that come with maskmill, and what was measured of them."""
    import segmodels
    from segmodels.registry import trained

    print("\nTrained networks that come with maskmill, as measured on cases that chose nothing:")
    for name in trained():
        card = segmodels.load(name).card
        quality: dict[str, Any] = dict(card.quality or {})
        print(f"  {name:20} mean Dice {quality['mean_dice']:.3f} on {quality['cases']} cases ({card.licence})")
    print("`maskmill models show NAME` tells more; `maskmill segment SCANS -m NAME -o OUT` runs one.")
