"""What is fast on this machine: measured once by `maskmill tune`, then only read.

The table holds seconds per tile of a stand-in network, 2-D and 3-D, for every backend, precision and number of threads
that this machine can do. `choose` is a pure function of it: no timing decides anything during a run.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from segmodels.errors import ModelError
from segmodels.home import home

FORMAT = "maskmill-tune-1"
FURTHEST_OFF = 0.03  # of an answer in half precision from that in float32, as a share of its spread
STAND_INS: dict[int, tuple[dict[str, Any], tuple[int, ...]]] = {  # by dims: network and tile
    2: ({"name": "unet", "dims": 2, "in_channels": 1, "classes": 3, "widths": [32, 64, 128, 256]}, (1, 256, 256)),
    3: ({"name": "resunet", "dims": 3, "in_channels": 1, "classes": 3, "widths": [32, 64, 128, 256]}, (64, 64, 64)),
}


@dataclass(frozen=True)
class Row:
    """One way to run a network of `dims` dimensions, and the seconds that it took per tile. seconds None: `note` says
    why it is not used."""

    dims: int
    backend: str
    precision: str
    threads: int
    seconds: float | None
    first_seconds: float | None = None
    note: str = ""


def choose(
    rows: Sequence[Row],
    dims: int,
    backend: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
) -> Row | None:
    """The fastest row for a network of `dims` dimensions among those that do what was asked for; None without any."""
    asked = {"backend": backend, "precision": precision, "threads": threads}
    fit = [
        row
        for row in rows
        if row.dims == dims
        and row.seconds is not None
        and all(value in (None, getattr(row, name)) for name, value in asked.items())
    ]
    return min(fit, key=lambda row: row.seconds or 0.0, default=None)


def table_path() -> Path:
    """Where the table of this user and machine lies."""
    return home() / "tune.json"


def read(machine: Mapping[str, str]) -> tuple[Row, ...]:
    """The rows of this machine's table: none where there is no table, or one of another machine or other versions."""
    try:
        table = json.loads(table_path().read_text())
        if table["format"] != FORMAT or table["machine"] != dict(machine):
            return ()
        rows = tuple(Row(**row) for row in table["rows"])
        return rows if all(_makes_sense(row) for row in rows) else ()
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def _makes_sense(row: Row) -> bool:
    """Whether a row could have been measured: who reads it sets threads and looks backends up by it."""
    from segmodels.backends import BACKENDS, DTYPES

    def positive(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf

    return (
        row.dims in STAND_INS
        and row.backend in BACKENDS
        and row.precision in DTYPES
        and isinstance(row.threads, int)
        and positive(row.threads)
        and row.threads <= 4096
        and (row.seconds is None or positive(row.seconds))
    )


def write(machine: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Put a new table in place of the old one."""
    path = table_path()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    table = {"format": FORMAT, "machine": dict(machine), "rows": [asdict(row) for row in rows]}
    try:
        temporary.write_text(json.dumps(table, indent=1) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def candidates(device: str, cores: int) -> list[tuple[str, str, int]]:
    """(backend, precision, threads) worth trying on this machine. Half precision only where the CPU computes in it."""
    import torch

    from segmodels.backends import BACKENDS, missing

    if device == "cuda":
        precisions, threads = ["fp32", "bf16", "fp16"], [cores]
    else:
        half = torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.backends.cpu.get_cpu_capability() != "AVX2"
        precisions = ["fp32", *(["bf16"] if half else [])]
        threads = sorted({cores, max(1, cores // 2)} if cores > 2 else {cores}, reverse=True)
    return [
        (backend, precision, n)
        for backend in BACKENDS
        if missing(backend, device) is None
        for precision in precisions
        for n in threads
    ]


def measure(device: str, cores: int) -> Iterator[Row]:
    """Try all candidates on the stand-ins, one row each as it is measured. Takes some minutes: most of it compiling."""
    import torch

    import segmodels
    from segmodels.predictor import NetworkPredictor
    from segmodels.runtime import Runtime, versions_of

    for dims, (config, tile) in STAND_INS.items():
        tiles = torch.randn(1, 1, *tile, generator=torch.Generator().manual_seed(0))
        reference = None
        for backend, precision, threads in candidates(device, cores):
            torch.manual_seed(0)  # the same weights for all
            network = segmodels.create(**config)
            runtime = Runtime(device, backend, precision, threads, 1, versions_of(device, backend))
            try:
                predictor = NetworkPredictor(network, runtime)
                first, _ = _timed(predictor, tiles)
                seconds, answer = min((_timed(predictor, tiles) for _ in range(3)), key=lambda pair: pair[0])
            except (ModelError, RuntimeError) as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                yield Row(dims, backend, precision, threads, None, note=reason[:200])
                continue
            reference = answer if reference is None else reference
            off = float((answer - reference).std() / reference.std())
            if not off < FURTHEST_OFF:
                yield Row(dims, backend, precision, threads, None, note=f"its answer is {off:.1%} off")
                continue
            yield Row(dims, backend, precision, threads, round(seconds, 5), round(first, 3))


def _timed(predictor: Any, tiles: Any) -> tuple[float, Any]:
    import torch

    start = time.perf_counter()
    answer = predictor.predict(tiles)
    if predictor.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, answer.cpu()
