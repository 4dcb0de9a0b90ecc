"""A driver of its own process for the tests that kill one: runs long blocks, and says what it started."""

from __future__ import annotations

import sys
import threading

from engine_workers import Spec, Task

from cluster.engine import RayEngine


def main(folder: str, address: str | None) -> None:
    stop = threading.Event()
    with RayEngine(Spec(), worker="engine_workers:Worker", workers=2, address=address) as engine:
        print("open", flush=True)
        try:
            for outcome in engine.run(((Task("study", i, "busy", 300, folder),) for i in range(9)), stop):
                print(outcome, flush=True)
        except KeyboardInterrupt:
            stop.set()
            print("interrupted", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
