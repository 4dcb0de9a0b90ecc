"""`maskmill demo`: the main job on real data that is at hand on every machine."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.job import make_job

CLASSES = 4


def demo_command(out: str, engine: str) -> int:
    """Segment volume 0 of the real MR brain that nibabel carries by k-means, and print what was found."""
    from nibabel.testing import data_path

    from .main_job import report_failures, segment_job

    brain = Path(data_path) / "example4d.nii.gz"
    print("A real MR brain (volume 0 of nibabel's example4d.nii.gz) into 4 classes of intensity, by k-means.")
    job = make_job(
        {
            "inputs": [str(brain)],
            "model": "kmeans",
            "classes": CLASSES,
            "volume": 0,
            "out": out,
            "engine": engine,
        }
    )
    summary = segment_job(job)
    report_failures(summary)
    for entry in summary.studies:
        for row in entry["structures"]:
            print(f"  {row['structure']:10} {row['volume_ml']:8.1f} mL   mean intensity {row['mean'] or 0:7.1f}")
        print(f"mask:   {entry['mask']}")
    print(f"report: {summary.report}")
    again = "nothing was left to do" if summary.reused else f"{summary.blocks_computed} block(s) computed"
    print(f"{again}, {summary.seconds:.1f} s; run it again: it computes nothing twice", file=sys.stderr)
    return summary.exit_code
