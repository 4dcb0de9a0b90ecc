"""Small scans, a small model, and the command line itself: what tests that go all the way start from."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import zarr

# Rotated about an oblique axis, unequal voxel sizes, x mirrored (left-handed), far from the origin.
OBLIQUE = np.array(
    [
        [-0.8571, 0.2598, -0.6, -31.5],
        [-0.3962, 0.6862, 1.7, 12.25],
        [0.3299, 0.6806, -2.0, 77.0],
        [0, 0, 0, 1],
    ]
)


# ------------------------------------------------------------------------------------------------ scans and models


def brain(shape: Sequence[int] = (12, 14, 10), seed: int = 0) -> np.ndarray:
    """float32 noise over (x, y, z) with one bright box, another for every seed."""
    rng = np.random.default_rng(seed)
    data = rng.normal(100, 5, tuple(shape)).astype(np.float32)
    x, y, z = (int(n) // 4 for n in shape)
    data[x : 2 * x, y : 3 * y, z : 2 * z] += 200
    return data


def save_nifti(
    path: Path,
    data: np.ndarray,
    affine: np.ndarray | None = None,
    *,
    qform: int = 1,
    sform: int = 1,
    comment: str | None = None,
    **fields: Any,
) -> Path:
    """`data` (x, y, z, ...) as it is, under an affine that both transforms hold; `fields` go into the header.

    `comment` becomes a header extension.
    """
    header = nib.Nifti1Header()
    header.set_data_dtype(data.dtype)
    image = nib.Nifti1Image(data, np.diag([1.0, 1.5, 2.0, 1.0]) if affine is None else affine, header)
    image.header.set_xyzt_units("mm")
    for name, value in fields.items():
        image.header[name] = value
    if comment is not None:
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", comment.encode()))
    raw = bytearray(image.to_bytes())
    struct.pack_into("<hh", raw, 252, qform, sform)  # nibabel would not write a file that lies nowhere
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw, 1, mtime=0) if path.suffix == ".gz" else raw)
    return path


def scan(path: Path, seed: int = 0, shape: Sequence[int] = (12, 14, 10), affine: np.ndarray | None = None) -> Path:
    """A small proper scan."""
    return save_nifti(path, brain(shape, seed), affine)


def random_model(
    folder: Path,
    *,
    seed: int = 4,
    name: str = "tiny-resunet",
    tile: Sequence[int] = (16, 16, 16),
    widths: Sequence[int] = (4, 8),
    channels: int = 1,
    **facts: Any,
) -> Path:
    """A model folder: a residual U-Net of three classes with random weights and random batch-norm statistics.

    With the seed as it is, it finds all three labels in a `brain`.
    """
    import torch

    import segmodels

    torch.manual_seed(seed)
    network = segmodels.create("resunet", dims=3, in_channels=channels, classes=3, widths=list(widths))
    for key, tensor in network.state_dict().items():
        if key.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.3)
        elif key.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    card: dict[str, Any] = {
        "name": name,
        "version": "1.0.0",
        "axes": "zyx",
        "channels": [f"MR{c}" for c in range(channels)],
        "orientation": None,
        "spacing_mm": None,
        "normalize": [{"kind": "zscore"}],
        "tile": list(tile),
        "overlap": 0.5,
        "activation": "softmax",
        "labels": {"1": {"name": "front"}, "2": {"name": "back"}},
    }
    segmodels.save(network, card | facts, folder)
    return folder


# ------------------------------------------------------------------------------------------------- the command line


@dataclass(frozen=True)
class Ended:
    """What a command left behind: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line of stdout."""
        document: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return document

    def lines(self, start: str) -> list[str]:
        """The lines of stderr that begin with `start`."""
        return [line for line in self.err.splitlines() if line.startswith(start)]


COMMAND = [sys.executable, "-c", "from flows.cli import main; main()"]


def maskmill(*arguments: object, timeout: float = 240, **environment: str) -> Ended:
    """The command in a process of its own."""
    done = start(*arguments, **environment)
    try:
        return wait(done, timeout)
    finally:
        done.kill()


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """The command in a process and session of its own, still running."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="surrogateescape",
        env=os.environ | environment,
        start_new_session=True,
    )


def wait(process: subprocess.Popen[str], timeout: float = 240) -> Ended:
    out, err = process.communicate(timeout=timeout)
    return Ended(process.returncode, out, err)


def until(condition: Callable[[], Any], seconds: float = 240, pause: float = 0.002) -> Any:
    """What `condition` gives once that is true; fails when it never is."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for it in vain"
        time.sleep(pause)
    return found


def kill(process: subprocess.Popen[str]) -> None:
    """End a driver as a power cut would: no handler runs, no child is told."""
    assert process.poll() is None, f"it ended by itself: {process.communicate()}"
    process.send_signal(signal.SIGKILL)
    process.communicate()


def processes_of(tag: str, temporary: Path | str) -> list[str]:
    """ "PID command" of all that runs with `tag` in its environment, or has a file in the folder `temporary` open.

    A title that a process gives itself, as Ray's do, may be written over what the kernel shows of its environment.
    """
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int(process.name) != os.getpid() and (
                tag.encode() in (process / "environ").read_bytes()
                or any(file.startswith(f"{temporary}/") for file in open_files(process))
            ):
                command = (process / "cmdline").read_bytes().rstrip(b"\0")
                found.append(f"{process.name} {command!r}")
    return found


def open_files(process: Path) -> Iterator[str]:
    for number in (process / "fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            yield os.readlink(number)


# ---------------------------------------------------------------------------------------------------- what OUT holds


def label_array(out: Path, study: str, model: str = "kmeans") -> np.ndarray:
    """Level 0 of a published label image, decoded."""
    group = out / "images" / f"{study}.ome.zarr" / "labels"
    assert model in json.loads((group / "zarr.json").read_text())["attributes"]["ome"]["labels"]
    return np.asarray(zarr.open_array(group / model / "0", mode="r")[...])


def mask_bytes(out: Path, study: str) -> bytes:
    """A mask as NIfTI, unpacked: header and voxels."""
    return gzip.decompress((out / "masks" / f"{study}.nii.gz").read_bytes())


def table(out: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a table of OUT/metrics."""
    import pyarrow.parquet

    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(out / "metrics" / f"{name}.parquet").to_pylist()
    return rows


def markers(out: Path) -> dict[str, int]:
    """When each marker of a whole shard was written (nanoseconds), by its path inside the ledger."""
    found = {}
    for path in sorted(out.glob("ledger/*/done/[!.]*.json")):
        with suppress(FileNotFoundError):  # a run that is on puts them together
            held = json.loads(path.read_text())
            held = held if path.name == "all.json" else {path.name: held}
            found |= {str(path.with_name(name).relative_to(out)): marker["at"] for name, marker in held.items()}
    return found


def leftovers(out: Path) -> list[str]:
    """Unfinished writes and half images that something left in OUT."""
    found = [p for p in out.rglob("*") if p.name.endswith(".partial")]
    found += [p for p in (out / "images").glob(".*") if p.name != ".statistics"]
    return sorted(str(p.relative_to(out)) for p in found)


def fingerprint(folder: Path) -> dict[str, tuple[int, str]]:
    """Modification time and hash of every file, and the time of every folder, below `folder`."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[str(path.relative_to(folder))] = (path.stat().st_mtime_ns, content)
    return found
