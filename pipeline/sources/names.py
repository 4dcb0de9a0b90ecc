"""From paths to study names: what OUT's files are called."""

from __future__ import annotations

import hashlib
import re

NIFTI_ENDINGS = (".nii.gz", ".nii")
VIDEO_ENDINGS = (".mp4", ".mov", ".mkv", ".avi", ".webm")
ENDINGS = (*NIFTI_ENDINGS, ".ome.zarr", ".zarr", *VIDEO_ENDINGS)

# File systems end names at 255 bytes; this leaves room for the endings of masks and for clash suffixes.
LONGEST = 200


def stem(path: str) -> str:
    """The path without its known ending, if it has one; the case of the ending does not matter."""
    for ending in ENDINGS:
        if path.lower().endswith(ending):
            return path[: -len(ending)]
    return path


def study_name(path: str, *, whole: bool = False) -> str:
    """The name of the study at `path` inside its INPUT (or of INPUT itself: its last part).

    `/` becomes `__`, other characters outside [A-Za-z0-9._-] become `_`, the known ending goes, unless
    `whole` (a folder, whose name has none). One too long for a file is cut and gets 6 hex digits.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", (path if whole else stem(path)).replace("/", "__"))
    if len(name) > LONGEST:
        name = f"{name[: LONGEST - 7]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    return "_" if name in ("", ".", "..") else name


def channel_number(file: str) -> int | None:
    """The n of a NIfTI file that is called `..._000n`; None where it is not."""
    numbered = re.search(r"_([0-9]{4})$", stem(file))
    return int(numbered[1]) if numbered else None


def shown(path: str) -> str:
    """A path as one line for the user, whatever is in it."""
    return path if path.isprintable() else repr(path)
