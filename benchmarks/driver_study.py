"""What one study costs the driver: processor seconds of reading, planning and publishing it, by size.

    python benchmarks/driver_study.py [--shapes 64,256,256 200,512,512]

Processor time and not the clock's, so that what else the machine does matters little. The blocks are computed in the
same process (kmeans) and left out; what remains is what a driver on Ray does alone, one study after the other: reading
in one thread, publishing in another.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def cost(shape: tuple[int, int, int]) -> dict[str, Any]:
    """Processor and wall seconds of each stage for a simulated CT of `shape` (z,y,x)."""
    import nibabel as nib

    import pipeline
    from pipeline import run
    from pipeline.phantoms import phantom

    spent: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began = time.process_time(), time.perf_counter()
            try:
                return function(*arguments)
            finally:
                spent[name] = [time.process_time() - began[0], time.perf_counter() - began[1]]

        return call

    run.take_in = timed("read", run.take_in)  # type: ignore[attr-defined]
    run.plan_blocks = timed("plan", run.plan_blocks)  # type: ignore[attr-defined]
    run.Run._publish = timed("publish", run.Run._publish)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(prefix="mmb-") as folder:
        one = phantom(0, shape)
        nib.save(nib.Nifti1Image(one.region()[0].T, one.affine), Path(folder, "scan.nii.gz"))
        summary = pipeline.segment(Path(folder, "scan.nii.gz"), "kmeans", Path(folder, "out"), threads=1)
        assert summary.exit_code == 0
    return {"shape": shape, **{f"{name}_cpu_s": round(s[0], 2) for name, s in spent.items()}} | {
        f"{name}_wall_s": round(s[1], 2) for name, s in spent.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["64,256,256", "200,512,512"])
    for text in parser.parse_args().shapes:
        z, y, x = map(int, text.split(","))
        print(json.dumps(cost((z, y, x))), flush=True)


if __name__ == "__main__":
    main()
