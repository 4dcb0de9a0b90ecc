"""A night on many GPUs, simulated: where one driver stops, and what preemption costs (docs/scaling.md).

    python benchmarks/scaling_model.py [--gpus 1 8 64 512 4096] [--drivers 1] [--gpu-seconds 20] [--hours-between 4] ...

What is modelled: a driver reads studies one after the other, two ahead of each worker, and publishes them one after
the other. A worker takes a study, marks one row of shards after the other, and now and then loses its machine: a new
one comes after a while and loads the model, and whoever takes the study up goes on behind its last whole row. Reading
and publishing are measured (docs/scaling.md says where); the seconds of a GPU per study are whatever you have.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import simpy


@dataclass(frozen=True)
class Night:
    """Seconds, unless a name says otherwise."""

    gpus: int
    drivers: int = 1
    read: float = 3.8  # of the driver, per study
    publish: float = 2.2
    gpu: float = 20.0  # of a GPU, per study
    rows: int = 7  # of shards, per study: what is marked one after the other
    boot: float = 20.0  # a worker, until its model is loaded
    hours_between: float = 0.0  # losses of one machine, on average; 0: none is lost
    replacement: float = 180.0  # until the cluster has another machine
    hours: float = 8.0
    seed: int = 1


@dataclass
class Books:
    published: int = 0
    losses: int = 0
    rows_redone: float = 0.0
    busy: float = 0.0


def simulate(night: Night) -> dict[str, Any]:
    """Studies per hour, the share of GPU time that made progress, and what losses cost."""
    world, chance, books = simpy.Environment(), random.Random(night.seed), Books()
    for number in range(night.drivers):
        workers = night.gpus // night.drivers + (number < night.gpus % night.drivers)
        if workers:
            driver(world, night, workers, chance, books)
    world.run(until=night.hours * 3600)
    return asdict(night) | {
        "studies_per_hour": round(books.published / night.hours, 1),
        "gpu_share": round(books.busy / (night.gpus * night.hours * 3600), 3),
        "losses": books.losses,
        "redone_share": round(books.rows_redone * night.gpu / night.rows / max(books.busy, 1e-9), 5),
    }


def driver(world: simpy.Environment, night: Night, workers: int, chance: random.Random, books: Books) -> None:
    """One command with its workers."""
    waiting = simpy.Store(world, capacity=2 * workers)
    again: list[int] = []  # rows that are left of studies whose worker was lost
    whole = simpy.Store(world)

    def read() -> Iterator[Any]:
        while True:
            yield world.timeout(night.read)
            yield waiting.put(night.rows)

    def publish() -> Iterator[Any]:
        while True:
            yield whole.get()
            yield world.timeout(night.publish)
            books.published += 1

    def work() -> Iterator[Any]:
        row = night.gpu / night.rows
        lost_at = next_loss()
        yield world.timeout(night.boot)
        while True:
            left = again.pop() if again else (yield waiting.get())
            while left:
                if world.now + row > lost_at:
                    books.losses += 1
                    books.rows_redone += max(0.0, lost_at - world.now) / row
                    again.append(left)
                    yield world.timeout(max(0.0, lost_at - world.now) + night.replacement + night.boot)
                    lost_at = next_loss()
                    break
                yield world.timeout(row)
                books.busy += row
                left -= 1
            else:
                yield whole.put(1)

    def next_loss() -> float:
        if not night.hours_between:
            return float("inf")
        return world.now + chance.expovariate(1 / (night.hours_between * 3600))

    world.process(read())
    world.process(publish())
    for _ in range(workers):
        world.process(work())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="*", default=[1, 8, 64, 512, 4096])
    defaults = {name: value for name, value in asdict(Night(1)).items() if name != "gpus"}
    for name, value in defaults.items():
        flag = "--gpu-seconds" if name == "gpu" else "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(value), default=value, dest=name)
    given = vars(parser.parse_args())
    for gpus in given.pop("gpus"):
        print(json.dumps(simulate(Night(gpus, **given))), flush=True)


if __name__ == "__main__":
    main()
