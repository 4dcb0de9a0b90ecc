"""What one driver can feed: empty blocks through the real run loop, the real Ray engine and the real ledger.

    python benchmarks/dispatch.py rate   [--blocks 20000] [--workers 2] [--studies 200] [--per-work 1] [--profile]
    python benchmarks/dispatch.py memory [--blocks 1000000] [--studies 10000] [--per-work 10]
    python benchmarks/dispatch.py pair   [--seconds 60]

`rate`: blocks per second, each with one marker that its worker writes and syncs, and the peak memory of the driver.
`memory`: the same without syncing, for the driver's memory alone. `pair`: tiles per second of one and of two workers of
one thread each, beside those of one and of two bare processes: what Ray and the run cost is the ratio of the two gains.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).resolve().parent


def runtime_of(batch: int) -> Any:
    from segmodels.runtime import Runtime

    return Runtime("cpu", "torch", "fp32", threads=1, batch=batch, versions=())


class EmptyWorker:
    """A worker whose blocks are done as soon as they are begun; `spec`: are markers synced, and how many a work has."""

    def __init__(self, spec: tuple[bool, int]) -> None:
        durable, per_work = spec
        self.runtime = runtime_of(batch=per_work)  # blocks have one tile: so many of them make a work
        if not durable:
            os.fsync = lambda handle: None

    def measure(self, window: tuple[int, int, int], channels: int) -> Any:
        from pipeline.engine import Baseline

        return Baseline(0, 0, 0.0)

    def run(self, tasks: tuple[Any, ...]) -> list[Any]:
        from pipeline import ledger
        from pipeline.engine import Receipt

        receipts = []
        for task in tasks:
            for shard in task.missing:
                ledger.write_marker(task.ledger, shard, "empty", {})
            receipts.append(Receipt(task.key, task.index, len(task.missing), 1, 0.0, 0))
        return receipts


# ------------------------------------------------------------------------------------------------- rate and memory


def feed(blocks: int, studies: int, workers: int, per_work: int, *, durable: bool) -> dict[str, float]:
    """Run so many empty blocks; what it took."""
    from cluster.engine import RayEngine
    from flows.progress import ProgressLine
    from pipeline import again, ledger, run, store
    from pipeline.api import run_blocks
    from pipeline.engine import peak_rss
    from pipeline.job import make_job
    from pipeline.method import resolve_method
    from pipeline.sources import Found, Study

    each = blocks // studies
    with tempfile.TemporaryDirectory(prefix="mmb-") as folder:
        given = {"inputs": ["none"], "model": "kmeans", "out": folder}
        job = make_job(given)
        method = resolve_method(job)
        found = Found([Study(f"s{i}", f"s{i}", (f"s{i}",), "nifti") for i in range(studies)], [])
        # Of a study only its blocks are left: what reading and publishing take is no part of this.
        # Nor is a network measured: these blocks are planned without.
        stages = (
            patch.object(run, "take_in", take_in),
            patch.object(run, "plan_blocks", partial(plan_blocks, count=each)),
            patch.object(again, "measure", lambda *_: None),
        )
        whole = run.Run(job, method, found, {})

        def publish(progress: Any) -> None:
            progress.state = "published"
            store.delete(store.join(ledger.folder(folder, progress.key), "done"))

        def start(_: Any) -> RayEngine:
            return RayEngine((durable, per_work), worker="dispatch:EmptyWorker", workers=workers)

        began: list[tuple[float, float]] = []
        with ProgressLine() as line, stages[0], stages[1], stages[2]:

            def observe(whole: Any) -> None:
                if not began:  # workers are there
                    began.append((time.perf_counter(), time.process_time()))
                line.show(whole)

            run_blocks(whole, start, publish, observe)
        seconds, cpu = time.perf_counter() - began[0][0], time.process_time() - began[0][1]
        assert all(progress.state == "published" for progress in whole.studies)
    return {
        "blocks": blocks,
        "blocks_per_second": round(blocks / seconds, 1),
        "driver_cpu_ms_per_block": round(1000 * cpu / blocks, 3),
        "driver_peak_mib": peak_rss() >> 20,
    }


def take_in(whole: Any, progress: Any) -> bool:
    progress.key = progress.study.name
    whole.by_key[progress.key] = [progress]
    return True


def plan_blocks(whole: Any, progress: Any, kind: Any, count: int) -> list[Any]:
    """`count` blocks of one tile and one shard each."""
    from pipeline import ledger
    from pipeline.engine import BlockTask
    from pipeline.grid import Box, Grid, Shards
    from pipeline.lattice import Lattice

    grid = Grid((8 * count, 8, 8), (8, 8, 8), (0, 0, 0), (tuple(range(0, 8 * count, 8)), (0,), (0,)))
    shards, lattice = Shards(grid.shape, (8, 8, 8)), Lattice(grid.shape, grid.shape)
    folder = ledger.folder(whole.out, progress.key)
    tasks = [
        BlockTask(
            progress.key, i, "image", "labels", folder, "statistics", lattice, grid, shards,
            Box((i, 0, 0), (i + 1, 1, 1)), ((i, 0, 0),), "gaussian", "zero", kind.runtime.hash,
        )
        for i in range(count)
    ]  # fmt: skip
    progress.pending = {task.index for task in tasks}
    progress.state = "segmenting"
    progress.tiles = count
    return tasks


@contextmanager
def profiled() -> Iterator[None]:
    profile = cProfile.Profile()
    profile.enable()
    try:
        yield
    finally:
        profile.disable()
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(25)


# ------------------------------------------------------------------------------------------------------------ pair

NETWORK = {"dims": 3, "in_channels": 1, "classes": 3, "widths": [16, 32, 64]}
TILE = (32, 64, 64)


def bare(seconds: float) -> float:
    """Tiles per second of this process alone, with one thread."""
    import torch

    import segmodels

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = segmodels.create("resunet", **NETWORK).eval()
    tiles, done = torch.zeros(1, 1, *TILE), 0
    with torch.inference_mode():
        network(tiles)
        print("ready", flush=True)
        sys.stdin.readline()
        end = time.perf_counter() + seconds
        begin = time.perf_counter()
        while time.perf_counter() < end:
            network(tiles)
            done += 1
    return done / (time.perf_counter() - begin)


def bare_processes(count: int, seconds: float) -> float:
    """Tiles per second of `count` bare processes together, from a common start."""
    command = [sys.executable, __file__, "bare", "--seconds", str(seconds)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(count)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in started)


class TileWorker:
    """A worker whose blocks are so many tiles of the bare loop's network."""

    def __init__(self, spec: int) -> None:
        import torch

        import segmodels

        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.runtime = runtime_of(batch=1)
        self.tiles, self.network = spec, segmodels.create("resunet", **NETWORK).eval()

    def measure(self, window: tuple[int, int, int], channels: int) -> Any:
        self.run_tiles(1)
        return os.getpid()

    def run_tiles(self, count: int) -> None:
        import torch

        with torch.inference_mode():
            for _ in range(count):
                self.network(torch.zeros(1, 1, *TILE))

    def run(self, tasks: tuple[Any, ...]) -> list[Any]:
        from pipeline.engine import Receipt

        for _ in tasks:
            self.run_tiles(self.tiles)
        return [Receipt(task.key, task.index, 1, self.tiles, 0.0, os.getpid()) for task in tasks]


def ray_workers(count: int, seconds: float, tiles: int = 8) -> float:
    """Tiles per second of `count` one-thread actors, counted when all of them are at work."""
    from types import SimpleNamespace

    from cluster.engine import RayEngine

    stop = threading.Event()
    with RayEngine(tiles, worker="dispatch:TileWorker", workers=count, threads=1) as engine:
        task = {"key": "k", "runtime": runtime_of(batch=1).hash}
        works = ((SimpleNamespace(**task, index=i),) for i in range(1_000_000))
        seen: set[int] = set()
        begin, done = 0.0, 0
        for receipt in engine.run(works, stop):  # type: ignore[arg-type]
            seen.add(receipt.peak_rss_bytes)  # type: ignore[union-attr]
            if len(seen) < count:
                continue
            if not begin:
                begin = time.perf_counter()
                continue
            done += tiles
            if time.perf_counter() - begin > seconds:
                stop.set()
        return done / (time.perf_counter() - begin)


def pair(seconds: float, rounds: int = 3) -> dict[str, Any]:
    """The gain of a second worker, Ray's and bare, in alternation: what else the machine does falls on both."""
    ratios = []
    for _ in range(rounds):
        bare_gain = bare_processes(2, seconds) / bare_processes(1, seconds)
        ray_gain = ray_workers(2, seconds) / ray_workers(1, seconds)
        ratios.append({"bare": round(bare_gain, 3), "ray": round(ray_gain, 3), "ratio": round(ray_gain / bare_gain, 3)})
        print(ratios[-1], file=sys.stderr, flush=True)
    return {"rounds": ratios, "median": sorted(r["ratio"] for r in ratios)[rounds // 2]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rate", "memory", "pair", "bare"))
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--studies", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--per-work", type=int)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--profile", action="store_true", help="where the driver's main thread spends its time")
    given = parser.parse_args()
    paths = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # actors import this file by name
    sys.path.insert(0, str(HERE.parent))
    if given.what == "bare":
        print(bare(given.seconds))
        return
    if given.what == "pair":
        result: dict[str, Any] = pair(given.seconds)
    else:
        rate = given.what == "rate"
        blocks, studies = given.blocks or (20_000 if rate else 1_000_000), given.studies or (200 if rate else 10_000)
        with profiled() if given.profile else nullcontext():
            per_work = given.per_work or (1 if rate else 10)
            result = feed(blocks, studies, given.workers, per_work, durable=rate)
    print(json.dumps(result | {"load": os.getloadavg()[0], "cores": os.cpu_count()}))


if __name__ == "__main__":
    main()
