"""A soak of kills: commands on one OUT, and random processes of theirs killed at random moments.

    python benchmarks/soak_kills.py [--kills 200] [--seed 1] [--studies 4] [--minutes 60]

One command after the other works on the same studies. While it lives, somebody of its family is killed with SIGKILL
every now and then: the driver, a worker, the raylet, the GCS, another daemon of Ray, the Prefect server, the watchdog.
When all is published, the results are checked and OUT is emptied for another round. After every command: whatever its
end, none of its processes lives 30 s later, and what was marked before is marked still and was not made again. The last
run is left in peace. Prints a table; exits with 1 at the first thing that is lost, wrong or left behind.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
sys.path.append(str(ROOT / "tests/flows"))
sys.path.insert(0, str(ROOT))

VICTIMS: dict[str, tuple[str, ...]] = {
    "driver": ("flows.cli",),
    "worker": ("ray::Shell",),
    "raylet": ("raylet/raylet",),
    "GCS": ("gcs_server",),
    "any process of Ray": ("ray/",),
    "Prefect server": ("server_process.py",),
    "watchdog": ("watchdog.py",),
}
ENDS = {0: "published all", 1: "with failures", 2: "did not start", -9: "killed"}
SHAPE = (24, 24, 200)  # x, y, z: four label shards
SHARDS = 4
EARLY = 0.25  # the share of commands that may be struck before they have marked a shard
LONGEST_PAUSE = 6.0  # seconds between two strikes
ENOUGH_SECONDS = 30.0  # guarantee 3: no process of a killed driver outlives it by more
WITHOUT_WATCHDOG = 120.0  # unless the watchdog was killed in the same moments: Ray's agents then end by themselves


@dataclass
class Tally:
    """What the soak has seen so far."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    marked: int = 0
    slowest_end: float = 0.0
    folders: int = 0  # of clusters whose watchdog was killed together with their driver


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--studies", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=24 * 60, help="end after so long, whatever was killed by then")
    given = parser.parse_args()
    os.environ.setdefault("MASKMILL_HOME", tempfile.mkdtemp(prefix="mms-home-"))
    os.environ["PYTHONPATH"] = str(ROOT)
    began = time.monotonic()
    tally = soak(given.kills, given.seed, given.studies, began + 60 * given.minutes)
    print(report(tally, given.seed, time.monotonic() - began))


def soak(kills: int, seed: int, count: int, deadline: float) -> Tally:
    """Kill until there were `kills`; every check that fails is an AssertionError."""
    from commands import Work, check_kept, check_results, prepare, short_folder
    from scans import markers

    chance, tally = random.Random(seed), Tally()
    names = tuple(f"s{i}" for i in range(count))
    with tempfile.TemporaryDirectory(prefix="mms-") as top, short_folder() as temporary:
        arguments, undisturbed = prepare(Path(top), names, SHAPE)
        out = Path(top) / "out"
        while True:
            work = Work(arguments, undisturbed, names, out, temporary)
            last = sum(tally.kills.values()) >= kills or time.monotonic() > deadline
            done, watchdogs = markers(out), tally.kills["watchdog"]
            ended = one_run(work, chance, tally, kills if not last else 0)
            check_kept(work, done)
            gone_after(work, tally, watched=tally.kills["watchdog"] == watchdogs)
            published = ended.code in (0, 1) and ended.json["published"] == count
            tally.ends[ENDS[0 if published else ended.code]] += 1
            print(f"{sum(tally.kills.values())} kills, {len(markers(out))} shards, exit {ended.code}", file=sys.stderr)
            if not published:
                assert not last, f"the last run, in peace, did not finish: {ended}"
                continue
            tally.rounds += 1
            tally.marked += len(markers(out))
            if last:
                check_results(work)
                return tally
            check_shown(work)
            shutil.rmtree(out)


def one_run(work: Any, chance: random.Random, tally: Tally, kills: int) -> Any:
    """One command under fire, to its end."""
    from scans import Ended, markers

    tally.runs += 1
    before = len(markers(work.out))
    driver = work.start("--workers", 2)
    early = chance.random() < EARLY  # else there is time to get somewhere first
    while driver.poll() is None:
        pause = chance.uniform(0.2, LONGEST_PAUSE)
        try:
            driver.wait(pause if sum(tally.kills.values()) < kills else None)
        except subprocess.TimeoutExpired:
            if not early and len(markers(work.out)) == before:
                continue
            victim = strike(work, driver, chance)
            if victim is not None:
                tally.kills[victim] += 1
    ended = Ended(driver.returncode, *driver.communicate())
    assert ended.code in ENDS, ended
    assert ended.out or ended.code in (2, -9), f"it ended without its line of JSON: {ended}"
    assert "Traceback" not in ended.err, ended.err
    return ended


def strike(work: Any, driver: subprocess.Popen[str], chance: random.Random) -> str | None:
    """Kill one process of a kind that is there; its kind."""
    kinds = {kind: pids for kind, words in VICTIMS.items() if (pids := work.pids(*words))}
    if not kinds or driver.poll() is not None:
        return None
    kind = chance.choice(sorted(kinds))
    try:
        os.kill(chance.choice(kinds[kind]), 9)
    except ProcessLookupError:
        return None
    return kind


def gone_after(work: Any, tally: Tally, *, watched: bool) -> None:
    """Nothing of a command is alive 30 s after its driver."""
    began = time.monotonic()
    while left := work.processes():
        seconds = time.monotonic() - began
        assert seconds < (ENOUGH_SECONDS if watched else WITHOUT_WATCHDOG), f"alive {seconds:.0f} s after: {left}"
        time.sleep(0.05)
    if watched:
        tally.slowest_end = max(tally.slowest_end, time.monotonic() - began)
        return
    for folder in work.temporary.glob("mm-*"):  # which the watchdog would have removed
        shutil.rmtree(folder, ignore_errors=True)
        tally.folders += 1


def check_shown(work: Any) -> None:
    """Bit by bit what an undisturbed run makes. What killed commands left is swept by the next that is alone."""
    from commands import check_study

    for study in work.studies:
        check_study(work, study)


def report(tally: Tally, seed: int, seconds: float) -> str:
    lines = ["| victim | kills |\n|---|---|"]
    lines += [f"| {kind} | {tally.kills[kind]} |" for kind in VICTIMS]
    lines.append(f"| all | {sum(tally.kills.values())} |")
    ends = ", ".join(f"{count} {how}" for how, count in sorted(tally.ends.items()))
    return "\n".join(
        [
            *lines,
            "",
            f"seed {seed}, {seconds / 60:.0f} minutes: {tally.runs} commands ({ends}), {tally.rounds} rounds published "
            f"whole, {tally.marked} shards; marked shards made again: 0; labels that differ: 0; last process gone "
            f"{tally.slowest_end:.1f} s after its driver at most; folders of clusters that lost driver and watchdog: "
            f"{tally.folders}",
        ]
    )


if __name__ == "__main__":
    main()
