"""Simulated CT scans of a torso with exact masks and volumes: for tests, benchmarks, training and showing around."""

from .body import LABELS
from .render import DEFAULT_SHAPE, Phantom, phantom
from .scanner import Scanner
from .series import make_phantoms
from .write import write_nifti, write_omezarr

__all__ = [
    "DEFAULT_SHAPE",
    "LABELS",
    "Phantom",
    "Scanner",
    "make_phantoms",
    "phantom",
    "write_nifti",
    "write_omezarr",
]
