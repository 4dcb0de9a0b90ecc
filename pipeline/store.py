"""Read, write, list, create: everything that is kept goes through these few functions, by URL.

A URL is a plain path or `file://...`, or names an object store (see `pipeline.objects`). Writes are atomic: a reader
sees the old bytes or the new ones, whole, also after a kill or a power cut.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from . import objects
from .errors import UsageError
from .objects import is_remote

PARTIAL = ".partial"
AT_ONCE = 16  # requests to an object store


def local(url: str) -> Path:
    """The local path behind a URL. Raises UsageError where there is none."""
    if is_remote(url):
        raise UsageError(f"this has to be on a local disk: {url} is in an object store")
    return Path(unquote(urlsplit(url).path)) if "://" in url else Path(url)


def join(url: str, *names: str) -> str:
    return "/".join([url.rstrip("/"), *names])


def exists(url: str) -> bool:
    return objects.exists(url) if is_remote(url) else local(url).exists()


def is_link(url: str) -> bool:
    """Whether a link stands there: an image of the user's own."""
    return not is_remote(url) and local(url).is_symlink()


def size(url: str) -> int:
    """Bytes at `url`, 0 where there is nothing."""
    if is_remote(url):
        return objects.size(url) or 0
    path = local(url)
    return path.stat().st_size if path.exists() else 0


def sizes(url: str) -> dict[str, int]:
    """Bytes of every file below `url`, by its path from there, without leftovers of unfinished writes."""
    if is_remote(url):
        return {path: item["size"] for path, item in objects.keys(url).items()}
    root = local(url)
    found = {}
    for path in (Path(folder, name) for folder, _, names in os.walk(root) for name in names):
        with suppress(FileNotFoundError):  # another command may be replacing it
            if not path.name.endswith(PARTIAL):
                found[path.relative_to(root).as_posix()] = path.stat().st_size
    return found


def read(url: str) -> bytes:
    return objects.read(url) if is_remote(url) else local(url).read_bytes()


def read_json(url: str) -> dict[str, Any] | None:
    """The JSON object at `url`; None where there is none, or something else (what we write is whole or not there)."""
    try:
        document = json.loads(read(url))
        return document if isinstance(document, dict) else None
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def read_documents(urls: Sequence[str]) -> list[dict[str, Any] | None]:
    """What `read_json` gives for each; from an object store many at once."""
    if not urls or not is_remote(urls[0]):
        return [read_json(url) for url in urls]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(read_json, urls))


@contextmanager
def writing(url: str) -> Iterator[IO[bytes]]:
    """A file to be filled, which appears at `url` whole and durable when the block ends, or not at all."""
    if is_remote(url):
        with tempfile.TemporaryFile() as held:
            yield held
            held.seek(0)
            objects.write(url, held)
        return
    path = local(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(str(path.parent))


def write(url: str, data: bytes) -> None:
    """Put `data` at `url`, atomically and durably (a local file and its folder are synced)."""
    if is_remote(url):
        objects.write(url, data)
        return
    with writing(url) as file:
        file.write(data)


def write_json(url: str, document: Any) -> None:
    write(url, json.dumps(document, indent=1, allow_nan=False).encode() + b"\n")


def create(url: str, data: bytes) -> bool:
    """Put `data` at `url` only if nothing is there; says whether it did."""
    if is_remote(url):
        return objects.create(url, data)
    path = local(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        temporary.write_bytes(data)
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def sync(url: str) -> None:
    """Make a file, or a folder's list of names, durable. An object is once it was put."""
    if is_remote(url):
        return
    try:
        handle = os.open(local(url), os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(handle)
    except OSError as error:  # some file systems cannot sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def names(url: str) -> Iterator[str]:
    """Names directly under `url`, sorted, without leftovers of unfinished writes."""
    try:
        entries = sorted(chain(*objects.listing(url)) if is_remote(url) else os.listdir(local(url)))
    except (FileNotFoundError, NotADirectoryError):
        return
    yield from (name for name in entries if not name.endswith(PARTIAL))


def delete(url: str) -> None:
    """Remove a file or a whole folder. A folder first gets a hidden name, so that nobody sees half of it."""
    if is_remote(url):
        objects.delete(url)
        return
    path = local(url)
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.is_dir():
        doomed = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def move(source: str, target: str) -> None:
    """Give a file or folder another name. A target that exists already is an error.

    Atomic on local disks; in an object store the target appears whole before the source goes.
    """
    if is_remote(source):
        if exists(target):
            raise FileExistsError(errno.EEXIST, "already there")
        objects.copy(source, target)
        objects.delete(source)
        return
    new = local(target)
    new.parent.mkdir(parents=True, exist_ok=True)
    if new.exists():
        raise FileExistsError(errno.EEXIST, "already there", str(new))
    local(source).rename(new)


def copy(source: str, target: str) -> None:
    """Copy a folder; the target appears whole (in an object store: its zarr.json is the last)."""
    if is_remote(source):
        objects.copy(source, target)
        return
    path = local(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    shutil.copytree(local(source), temporary)
    temporary.rename(path)


def sync_tree(url: str) -> None:
    """Make a folder and all in it durable."""
    if is_remote(url):
        return
    for folder, _, files in os.walk(local(url)):
        for name in files:
            sync(os.path.join(folder, name))
        sync(folder)


def footprint(url: str) -> dict[str, int]:
    """How many files lie below `url`, and their bytes: what is gone or cut off changes it."""
    found = sizes(url)
    return {"files": len(found), "bytes": sum(found.values())}


def zarr_store(url: str, *, read_only: bool = False) -> Any:
    """The place of an array or group, as zarr takes it."""
    if is_remote(url):
        from .zarr_objects import zarr_objects

        return zarr_objects(url, read_only=read_only)
    from zarr.storage import LocalStore

    return LocalStore(local(url), read_only=read_only)
