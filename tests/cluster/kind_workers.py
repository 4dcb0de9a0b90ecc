"""A worker that computes as any other, but waits with each block while a file says so."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.engine import Failure, Receipt, Work, Worker

WORKER = "kind_workers:Gated"
GATES = "TEST_GATES"  # the folder of these files, in the environment of the nodes


class Gated(Worker):
    def run(self, tasks: Work, stop: Any = None) -> Iterator[Receipt | Failure]:
        kind = dict(self.runtime.versions)["cpu"]
        gates = Path(os.environ[GATES])
        (gates / f"begun-{kind}").touch()
        while (gates / f"shut-{kind}").exists():
            time.sleep(0.1)
        yield from super().run(tasks, stop)
