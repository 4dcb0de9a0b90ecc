"""A run in a process of its own: what plans projected and what blocks took. Run by test_memory_receipts.py."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline import ome
from pipeline.api import run_blocks, start_run
from pipeline.engine import Failure, Receipt, SerialEngine, Work
from pipeline.job import make_job
from pipeline.study_plan import plan_shape


def main(settings: dict[str, Any]) -> list[dict[str, Any]]:
    run = start_run(make_job(settings | {"engine": "serial", "threads": 1}))
    ended: list[Receipt | Failure] = []

    class Engine(SerialEngine):
        """The serial engine, and what it answered."""

        def run(self, works: Iterable[Work], stop: threading.Event) -> Iterator[Receipt | Failure]:
            for outcome in super().run(works, stop):
                ended.append(outcome)
                yield outcome

    run_blocks(run, Engine)
    found = []
    for progress in run.studies:
        assert progress.image is not None
        assert progress.kind is not None
        kind, (baseline,) = progress.kind, run.baselines.values()
        chunks = ome.open_array(progress.image.level0).chunks[-3:]
        budget, workers = run.budget(kind), run.workers_for_one(kind)
        plan = plan_shape(
            progress.image.header, chunks, run.method, run.engine(), kind, run.baselines,
            budget=budget, workers=workers, on_device=False,
        )  # fmt: skip
        receipts = [r for r in ended if isinstance(r, Receipt) and r.key == progress.key]
        found.append(
            {
                "study": progress.study.name,
                "state": progress.state,
                "blocks": len(receipts),
                "across": len({b.start[1:] for b in plan.blocks}),
                "baseline": baseline.host_bytes,
                "projected": plan.host_bytes,
                "peak": max(r.peak_rss_bytes for r in receipts),
            }
        )
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
