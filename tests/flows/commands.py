"""A command under observation: started, watched and killed by tests; its results beside those of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import rmtree

import numpy as np
import zarr
from scans import (
    Ended,
    label_array,
    leftovers,
    markers,
    mask_bytes,
    maskmill,
    processes_of,
    random_model,
    scan,
    start,
    table,
)

import pipeline

SHAPE = (24, 24, 260)  # x, y, z
SHARDS = 5  # of each study of that shape
MODEL = "tiny-resunet"


@dataclass(frozen=True)
class Work:
    """A command line, its undisturbed results, and a place where it can be watched."""

    arguments: tuple[object, ...]
    undisturbed: Path
    studies: tuple[str, ...]
    out: Path
    temporary: Path
    tag: str = field(default_factory=lambda: uuid.uuid4().hex)

    def start(self, *flags: object) -> subprocess.Popen[str]:
        return start("segment", *self.arguments, "-o", self.out, "--json", *flags, **self.environment)

    def run(self, *flags: object) -> Ended:
        return maskmill("segment", *self.arguments, "-o", self.out, "--json", *flags, **self.environment)

    def again(self) -> Work:
        """The same work with a tag of its own: processes of the two are told from each other."""
        return replace(self, tag=uuid.uuid4().hex)

    @property
    def environment(self) -> dict[str, str]:
        return {"TMPDIR": str(self.temporary), "MASKMILL_TEST_TAG": self.tag}

    def processes(self) -> list[str]:
        """Whatever still runs of all that these commands ever started: children inherit the environment."""
        return processes_of(self.tag, self.temporary)

    def pids(self, *words: str) -> list[int]:
        """Process ids of those whose command line holds all these words."""
        return [int(line.split()[0]) for line in self.processes() if all(word in line for word in words)]

    def kill(self, *words: str) -> int:
        """SIGKILL for those processes; how many there were."""
        pids = self.pids(*words)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)

    def gone(self, seconds: float = 30) -> None:
        """Wait until nothing is left of these commands: guarantee 3 gives it 30 s."""
        end = time.monotonic() + seconds
        while left := self.processes():
            assert time.monotonic() < end, f"alive after {seconds} s: {left}"
            time.sleep(0.05)

    def marked(self, shards: int = 1) -> bool:
        return len(markers(self.out)) >= shards


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder for TMPDIR: Ray's sockets need a short path."""
    folder = Path(tempfile.mkdtemp(prefix="mmt-", dir="/tmp"))
    try:
        yield folder
    finally:
        rmtree(folder, ignore_errors=True)


def prepare(top: Path, studies: Sequence[str], shape: Sequence[int] = SHAPE) -> tuple[tuple[object, ...], Path]:
    """Scans that take some seconds each: the arguments of their command, and what an undisturbed run makes of them."""
    for seed, study in enumerate(studies, 1):
        scan(top / f"in/{study}.nii.gz", seed, shape)
    model = random_model(top / "model")
    assert pipeline.segment(top / "in", model, top / "undisturbed", threads=1).exit_code == 0
    return (top / "in", "-m", model, "--threads", 1), top / "undisturbed"


def check_results(work: Work) -> None:
    """Bit by bit what an undisturbed run makes, and nothing else left in OUT or in the temporary folder."""
    for study in work.studies:
        check_study(work, study)
    assert table(work.out, "structures") == table(work.undisturbed, "structures")
    assert leftovers(work.out) == []
    assert list(work.temporary.iterdir()) == []
    assert work.processes() == []


def check_shown(work: Work) -> None:
    """What readers of OUT see after a kill is whole: images, label images with their pyramids, masks."""
    images = sorted(path for path in work.out.glob("images/[!.]*"))
    assert {path.name for path in images} <= {f"{study}.ome.zarr" for study in work.studies}
    for image in images:
        whole = work.undisturbed / "images" / image.name
        listing = image / "labels/zarr.json"
        listed = json.loads(listing.read_text())["attributes"]["ome"]["labels"] if listing.exists() else []
        for group in ("", *(f"labels/{name}" for name in listed)):
            shown = json.loads((image / group / "zarr.json").read_text())["attributes"]["ome"]["multiscales"]
            for level in shown[0]["datasets"]:
                path = f"{group}/{level['path']}".lstrip("/")
                np.testing.assert_array_equal(zarr.open_array(image / path)[...], zarr.open_array(whole / path)[...])
    for mask in work.out.glob("masks/[!.]*"):
        study = mask.name.removesuffix(".nii.gz")
        assert mask_bytes(work.out, study) == mask_bytes(work.undisturbed, study)


def check_study(work: Work, study: str) -> None:
    np.testing.assert_array_equal(label_array(work.out, study, MODEL), label_array(work.undisturbed, study, MODEL))
    assert mask_bytes(work.out, study) == mask_bytes(work.undisturbed, study)


def check_kept(work: Work, done: dict[str, int]) -> None:
    now = markers(work.out)
    assert {name: now[name] for name in done} == done, "marked shards were done again"
