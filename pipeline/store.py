"""Read, write, list, create: everything that is kept goes through these few functions, by URL.

A URL is a plain path or `file://...`; object stores come behind the same functions. Writes are atomic: a reader
sees the old bytes or the new ones, whole, also after a kill or a power cut.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from .errors import UsageError

PARTIAL = ".partial"


def local(url: str) -> Path:
    """The local path behind a URL. Raises UsageError for a scheme that is not kept locally."""
    if "://" not in url:
        return Path(url)
    parts = urlsplit(url)
    if parts.scheme != "file":
        raise UsageError(f"cannot read or write {parts.scheme}:// addresses yet: give a local path or a file:// URL")
    return Path(unquote(parts.path))


def join(url: str, *names: str) -> str:
    return "/".join([url.rstrip("/"), *names])


def exists(url: str) -> bool:
    return local(url).exists()


def size(url: str) -> int:
    """Bytes at `url`, 0 where there is nothing."""
    path = local(url)
    return path.stat().st_size if path.exists() else 0


def read(url: str) -> bytes:
    return local(url).read_bytes()


def read_json(url: str) -> dict[str, Any] | None:
    """The JSON object at `url`; None where there is none, or something else (what we write is whole or not there)."""
    try:
        document = json.loads(local(url).read_bytes())
        return document if isinstance(document, dict) else None
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def write(url: str, data: bytes) -> None:
    """Put `data` at `url`, atomically and durably (the file and its folder are synced)."""
    path = local(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(str(path.parent))


def write_json(url: str, document: Any) -> None:
    write(url, json.dumps(document, indent=1, allow_nan=False).encode() + b"\n")


def create(url: str, data: bytes) -> bool:
    """Put `data` at `url` only if nothing is there; says whether it did."""
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
    """Make a file, or a folder's list of names, durable."""
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
        entries = sorted(os.listdir(local(url)))
    except (FileNotFoundError, NotADirectoryError):
        return
    yield from (name for name in entries if not name.endswith(PARTIAL))


def delete(url: str) -> None:
    """Remove a file or a whole folder. A folder first gets a hidden name, so that nobody sees half of it."""
    path = local(url)
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.is_dir():
        doomed = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def move(source: str, target: str) -> None:
    """Give a file or folder another name, atomically. A target that exists already is an error."""
    new = local(target)
    new.parent.mkdir(parents=True, exist_ok=True)
    if new.exists():
        raise FileExistsError(errno.EEXIST, "already there", str(new))
    local(source).rename(new)


def copy(source: str, target: str) -> None:
    """Copy a folder; the target appears whole."""
    path = local(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    shutil.copytree(local(source), temporary)
    temporary.rename(path)


def sync_tree(url: str) -> None:
    """Make a folder and all in it durable."""
    for folder, _, files in os.walk(local(url)):
        for name in files:
            sync(os.path.join(folder, name))
        sync(folder)
