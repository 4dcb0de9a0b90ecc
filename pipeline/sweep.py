"""What killed commands left in OUT, removed by the next one."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from . import objects, ome, store

ABANDONED = timedelta(hours=1)
LOCK = ".lock"
_held: dict[str, int] = {}  # one shared lock per OUT for as long as this process lives


def sweep(out: str) -> bool:
    """Remove unfinished writes and images that were never taken in, unless another command works on `out` now.

    Every command holds a shared lock on OUT/ledger/.lock while it lives; the kernel gives it back however it ends.
    Who can get the lock for itself is alone; says whether that is known. In an object store it never is.
    """
    if objects.is_remote(out):
        _remove_old_stages(out)
        return False
    alone = False
    root = store.local(out)
    (root / "ledger").mkdir(parents=True, exist_ok=True)
    lock, place = root / "ledger" / LOCK, str(root.resolve())
    handle = _held.pop(place, None)
    if handle is not None and not _is_open(lock, handle):  # OUT was removed and made again
        os.close(handle)
        handle = None
    if handle is None:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    _held[place] = handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = True
        _remove_leftovers(root)
    except OSError:
        pass  # somebody else is at work, or this file system has no locks: leftovers stay, hidden
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH)
    return alone


def _remove_old_stages(out: str) -> None:
    """In an object store: images that nobody has written to for an hour and that were never taken in.

    There are no locks, but a command that reads a study puts a slab of it far more often. The store's clock counts.
    """
    images = store.join(out, "images")
    stages = [name for name in objects.listing(images)[0] if name.startswith(".") and name.endswith(".ome.zarr")]
    now = objects.now(store.join(out, "ledger", f".clock-{secrets.token_hex(4)}")) if stages else None
    for name in stages:
        written = [item["last_modified"] for item in objects.keys(store.join(images, name)).values()]
        if written and now is not None and now - max(written) > ABANDONED:
            store.delete(store.join(images, name))


def _is_open(path: Path, handle: int) -> bool:
    """Whether a handle is of the file that has this path now."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except OSError:
        return False


def _remove_leftovers(root: Path) -> None:
    for folder in ("images", "images/.statistics", "masks", "metrics", "report", "report/pictures"):
        for path in (root / folder).glob(".*"):
            if path.name.endswith(store.PARTIAL) or (folder == "images" and path.name.endswith(".ome.zarr")):
                _remove(path)
    for folder in ("ledger", "runs"):
        for path in (root / folder).rglob(f".*{store.PARTIAL}"):
            _remove(path)
    model = (store.read_json(store.join(str(root), "ledger", "out.json")) or {}).get("model", "")
    for image in (root / "images").glob("*.ome.zarr"):
        if not image.is_symlink():  # in a linked image others may be at work, beside our own labels
            for path in (image / "labels").glob(f".*{store.PARTIAL}"):
                _remove(path)
        if model and model not in ome.labels_listed(str(image)):
            for path in (image / "labels" / model).rglob(f"*{store.PARTIAL}"):
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
