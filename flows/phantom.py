"""`maskmill phantom`: a folder of simulated scans with exact masks and volumes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

from pipeline import store
from pipeline.errors import StudyError, UsageError

from .progress import ProgressLine


def phantom_command(settings: dict[str, Any], *, as_json: bool) -> int:
    """Make what is missing of a series of phantoms; `settings` are the flags that were given."""
    from pipeline.phantoms import DEFAULT_SHAPE, make_phantoms

    out, count, seed = settings["out"], settings["count"], settings["seed"]
    shape = _numbers("--shape", settings["shape"], int) if "shape" in settings else DEFAULT_SHAPE
    spacing = _numbers("--spacing", settings["spacing"], float) if "spacing" in settings else None
    tilt = _numbers("--tilt", settings["tilt"], float) if "tilt" in settings else (0.0, 0.0, 0.0)
    try:
        store.local(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"-o {out}: cannot be made ({error.strerror}); give a folder to write to") from None
    try:
        with ProgressLine() as line:
            made = make_phantoms(
                out,
                range(seed, seed + count),
                shape,
                spacing_mm=spacing[0] if spacing is not None and len(spacing) == 1 else spacing,
                orientation=settings["orientation"],
                tilt_degrees=tilt,
                format=settings["format"],
                progress=lambda done: line.tell(f"{done} of {count} phantoms", done / count, "of them"),
            )
    except OSError as error:
        raise StudyError("storage", f"{out} cannot be written: {error.strerror or error}") from None
    print(f"{len(made)} phantoms made, {count - len(made)} were there; volumes: {out}/truth.csv", file=sys.stderr)
    if as_json:
        print(json.dumps({"out": out, "made": made, "kept": count - len(made), "truth": f"{out}/truth.json"}))
    return 0


def _numbers(flag: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(n) for n in re.split(r"[,x ]+", text.strip())]
    except ValueError:
        example = {"--shape": "128,96,128", "--spacing": "3,3,3"}.get(flag, "5,4,3")
        raise UsageError(f"{flag} takes numbers such as {example}, not {text!r}") from None
