"""`maskmill tune`: measure this machine once, and keep what `auto` means on it."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from segmodels.tuning import Row


def tune_command(*, as_json: bool) -> int:
    """Measure every backend, precision and number of threads; write the table; say what `auto` now is."""
    import torch

    from segmodels import tuning
    from segmodels.backends import BACKENDS, missing
    from segmodels.runtime import usable_cores

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for backend in BACKENDS:
        if lack := missing(backend, device):
            print(f"not measured: {backend} lacks {lack}", file=sys.stderr)
    total = len(tuning.STAND_INS) * len(tuning.candidates(device, usable_cores()))
    began, rows = time.monotonic(), []
    for row in tuning.measure(device, usable_cores()):
        rows.append(row)
        _keep(device, rows)  # what is measured counts, also where this is stopped
        left = (time.monotonic() - began) / len(rows) * (total - len(rows))
        took = row.note or f"{row.seconds:.3f} s a tile (the first one {row.first_seconds:.1f} s)"
        print(
            f"{row.dims}-D {row.backend:9} {row.precision} {row.threads} threads: {took}; "
            f"{len(rows)} of {total}, about {left:.0f} s left",
            file=sys.stderr,
        )
    chosen = {dims: tuning.choose(rows, dims) for dims in tuning.STAND_INS}
    for dims, best in chosen.items():
        if best is not None:
            print(f"{dims}-D networks: {best.backend}, {best.precision}, {best.threads} threads", file=sys.stderr)
    print(f"kept in {tuning.table_path()}; run this again after an update of torch or of the machine", file=sys.stderr)
    if as_json:
        print(json.dumps({"table": str(tuning.table_path()), "rows": [asdict(row) for row in rows]}))
    return 0


def _keep(device: str, rows: list[Row]) -> None:
    from segmodels import tuning
    from segmodels.runtime import machine

    try:
        tuning.write(machine(device), rows)
    except OSError as error:
        raise UsageError(f"the table cannot be written to MASKMILL_HOME: {error.strerror}") from None
