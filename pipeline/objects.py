"""Object stores behind `pipeline.store`: s3:// (and whatever speaks it), gs:// and az://, through obstore.

Credentials come from the environment or the usual files (AWS_*, ~/.aws, GOOGLE_*, AZURE_*), never from a URL. What is
transient (5xx answers, dropped connections, timeouts) is tried again with growing pauses for up to a minute; what is
left is an OSError that names no address, since it may be logged.

An object is there whole or not at all, and durable once its write returned. There are no folders: a "folder" is what
names have in common, so it cannot get another name in one step; a Zarr group is there for readers once its own
zarr.json is, which is therefore copied last and removed first.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import io
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from .errors import UsageError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")
SCHEMES = ("s3", "gs", "az")


class ObjectStoreError(OSError):
    """An object store that refuses, does not answer, or changes under our eyes; `strerror` names no address."""


PIECE = 16 << 20  # bytes that a reader asks for at once
TRIES = 3
NO_BUCKET = "there is no such bucket"
ROOT = "zarr.json"  # what makes a group visible
RETRY: Any = {
    "max_retries": 30,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=8), "base": 2},
}
TIMEOUTS = {"timeout": "60s", "connect_timeout": "10s"}
ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")


def is_remote(url: str) -> bool:
    """Whether a URL names an object store. Raises UsageError for a scheme that is neither this nor file."""
    scheme, separator, _ = url.partition("://")
    if not separator or scheme.lower() == "file":
        return False
    if scheme not in SCHEMES:
        raise UsageError(
            f"cannot read or write {scheme}:// addresses: give a local path, or one of file://, s3://, gs://, az://"
        )
    return True


def check_address(url: str, what: str) -> None:
    """Raise UsageError for an empty address, which would be the current folder or the root of everything, and, without
    repeating it, for one with a name or a password in it, which would be recorded."""
    if not url.strip():
        raise UsageError(f"{what} is empty: give a file, a folder or an address (is a variable not set?)")
    if "://" in url and "@" in url.split("://", 1)[1].partition("/")[0]:
        raise UsageError(
            "an address holds credentials: take them out of it; they come from the environment (AWS_ACCESS_KEY_ID) "
            "or the usual files"
        )


def bucket_and_key(url: str) -> tuple[str, str]:
    """("s3://bucket", "key"). Raises UsageError where there is no bucket, or more than these two."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.port or not parts.netloc:
        raise UsageError(
            f"{parts.scheme}:// addresses are {parts.scheme}://BUCKET/KEY; credentials and endpoints come from the "
            "environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...) or the usual files"
        )
    key = url.split("://", 1)[1].partition("/")[2].strip("/")  # a key may hold ? and #
    return f"{parts.scheme}://{parts.netloc}", key


def opened(url: str) -> tuple[ObjectStore, str]:
    """The bucket of a URL, and the key in it."""
    bucket, key = bucket_and_key(url)
    return _bucket(bucket), key


@functools.lru_cache(maxsize=32)
def _bucket(root: str) -> ObjectStore:
    from obstore.store import AzureStore, GCSStore, S3Store

    scheme, name = root.split("://")
    plain = any(os.environ.get(variable, "").startswith("http://") for variable in ENDPOINTS)
    shared: Any = {"client_options": {**TIMEOUTS, "allow_http": plain}, "retry_config": RETRY}
    with _reported():
        if scheme == "gs":
            return GCSStore(name, **shared)
        if scheme == "az":
            return AzureStore(name, **shared)
        return S3Store(name, **shared, **_s3_credentials())


def forget() -> None:
    """Look at the environment again: buckets that were opened keep what they saw there."""
    _bucket.cache_clear()


def _s3_credentials() -> dict[str, Any]:
    """What S3 needs beside the environment: boto3 knows the usual files, profiles and roles."""
    if "AWS_ACCESS_KEY_ID" in os.environ and "AWS_SECRET_ACCESS_KEY" not in os.environ:
        raise UsageError("AWS_ACCESS_KEY_ID is set and AWS_SECRET_ACCESS_KEY is not: set both, or neither")
    if {"AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE", "AWS_WEB_IDENTITY_TOKEN_FILE"} & os.environ.keys():
        return {}
    import boto3
    from obstore.auth.boto3 import Boto3CredentialProvider

    session = boto3.Session()
    if session.get_credentials() is None:
        raise UsageError(
            "no credentials for s3:// were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE with "
            "~/.aws/credentials, or AWS_SKIP_SIGNATURE=true for a public bucket"
        )
    return {"credential_provider": Boto3CredentialProvider(session)}


@contextmanager
def _reported() -> Iterator[None]:
    """What went wrong as an OSError without the address, which obstore's messages quote."""
    from obstore import exceptions as e

    try:
        yield
    except (FileNotFoundError, e.NotFoundError) as error:
        if "NoSuchBucket" in str(error):
            raise ObjectStoreError(errno.ENOENT, NO_BUCKET) from None
        raise FileNotFoundError(errno.ENOENT, "not in the object store") from None
    except (e.PermissionDeniedError, e.UnauthenticatedError):
        raise ObjectStoreError(errno.EACCES, "the object store refuses these credentials") from None
    except e.PreconditionError:
        raise ObjectStoreError(errno.ESTALE, "it changed in the object store while it was being read") from None
    except e.InvalidPathError:  # obstore gives up the whole listing, and the key may hold a name
        what = "a key in it has an empty part or one of dots (such as a//b), which cannot be listed: rename that object"
        raise ObjectStoreError(errno.EINVAL, what) from None
    except (e.BaseError, ValueError) as error:
        if "NoSuchBucket" in str(error):  # told of otherwise by writing than by reading
            raise ObjectStoreError(errno.ENOENT, NO_BUCKET) from None
        code, what = _kind(str(error))
        raise ObjectStoreError(code, f"the object store failed: {what}") from None


def _kind(text: str) -> tuple[int, str]:
    """What a message of the store says of the kind of failure, and nothing else of it."""
    if status := re.search(r"status code: (\d{3})", text):
        return errno.EIO, f"it answered {status[1]}"
    kind = re.search(r"kind: (Timeout|Connect|Request|Interrupted|Decode|Unknown)\b", text)
    if kind is None:
        return errno.EIO, "unexpected answer"
    known = {"Timeout": (errno.ETIMEDOUT, "no answer in time"), "Connect": (errno.ECONNREFUSED, "no connection")}
    return known.get(kind[1], (errno.ECONNRESET, "the answer was cut off"))


def _tried(act: Callable[[], T]) -> T:
    """What `act` gives, which may be done twice.

    obstore tries again by itself, but not where the answer to a list or a removal is cut off in the middle.
    """
    for attempt in range(TRIES - 1):
        try:
            with _reported():
                return act()
        except ObjectStoreError as error:
            if error.errno != errno.ECONNRESET:
                raise
            time.sleep(0.2 * 2**attempt)
    with _reported():
        return act()


async def tried_async(act: Callable[[], Awaitable[T]]) -> T:
    """The same for what zarr calls."""
    for attempt in range(TRIES - 1):
        try:
            with _reported():
                return await act()
        except ObjectStoreError as error:
            if error.errno != errno.ECONNRESET:
                raise
            await asyncio.sleep(0.2 * 2**attempt)
    with _reported():
        return await act()


def exists(url: str) -> bool:
    """Whether there is an object of this name, or any below it."""
    bucket, key = opened(url)
    return is_object(url) or _tried(lambda: bool(next(iter(bucket.list(key or None, chunk_size=1)), [])))


def is_object(url: str) -> bool:
    return size(url) is not None


def size(url: str) -> int | None:
    """Bytes of the object; None where there is none."""
    bucket, key = opened(url)
    try:
        return int(_tried(lambda: bucket.head(key)["size"])) if key else None
    except FileNotFoundError:
        return None


def read(url: str) -> bytes:
    bucket, key = opened(url)
    return _tried(lambda: bytes(bucket.get(key).bytes()))


def write(url: str, data: bytes | IO[bytes]) -> None:
    """Put an object. A large file goes in parts, which are forgotten where it fails."""
    bucket, key = opened(url)
    with _reported():
        bucket.put(key, data)


def create(url: str, data: bytes) -> bool:
    """Put an object only if there is none; says whether it did."""
    from obstore.exceptions import AlreadyExistsError

    bucket, key = opened(url)
    with _reported():
        try:
            bucket.put(key, data, mode="create")
        except AlreadyExistsError:
            return False
    return True


def keys(url: str) -> dict[str, Any]:
    """What is below a name: path relative to it -> e_tag, size, last_modified."""
    bucket, key = opened(url)
    start = len(key) + 1 if key else 0
    return {item["path"][start:]: item for item in _tried(lambda: bucket.list(key or None).collect())}


def listing(url: str) -> tuple[list[str], list[str]]:
    """Names directly below: of folders and of objects, each sorted."""
    bucket, key = opened(url)
    found = _tried(lambda: bucket.list_with_delimiter(key or None))
    folders = sorted(path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"])
    return folders, sorted(item["path"].rpartition("/")[2] for item in found["objects"])


def delete(url: str) -> None:
    """Remove an object and all below its name; a group's own zarr.json first."""
    bucket, key = opened(url)
    if key:
        _tried(lambda: bucket.delete([key, f"{key}/{ROOT}"]))
    paths = [item["path"] for item in keys(url).values()]
    if paths:
        _tried(lambda: bucket.delete(paths))


def copy(source: str, target: str) -> None:
    """Copy an object, or the Zarr group or array of that name, without the bytes coming here; its zarr.json last.

    Raises FileNotFoundError where it is not whole: whoever removes one begins with that file.
    """
    bucket, key = opened(source)
    to, new = opened(target)
    if to is not bucket:
        raise UsageError("cannot copy from one bucket to another")
    if is_object(source):
        _tried(lambda: bucket.copy(key, new))
        return
    names = keys(source).keys()
    if ROOT not in names:
        raise FileNotFoundError(errno.ENOENT, "not in the object store")
    for name in (*sorted(names - {ROOT}), ROOT):
        _tried(functools.partial(bucket.copy, f"{key}/{name}", f"{new}/{name}"))


def now(url: str) -> datetime:
    """The store's own clock, by an object that is written at `url` and removed."""
    bucket, key = opened(url)
    write(url, b"")
    at: datetime = _tried(lambda: bucket.head(key)["last_modified"])
    delete(url)
    return at


def version(url: str) -> str:
    """What changes whenever the object, or any below its name, does: names, e_tags and sizes, from one listing."""
    bucket, key = opened(url)
    found = keys(url) or {"": _tried(lambda: bucket.head(key))}
    return "\n".join(f"{name} {found[name]['e_tag']} {found[name]['size']}" for name in sorted(found))


class Reader(io.RawIOBase):
    """An object as a file that is read forwards, piece by piece; an OSError where it changes meanwhile."""

    def __init__(self, url: str) -> None:
        self._bucket, self._key = opened(url)
        facts = _tried(lambda: self._bucket.head(self._key))
        self.size, self._tag = int(facts["size"]), facts["e_tag"]
        self._at, self._piece = 0, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._piece and self._at < self.size:
            stop = min(self._at + PIECE, self.size)
            options: Any = {"range": (self._at, stop), "if_match": self._tag}
            self._piece = memoryview(_tried(lambda: bytes(self._bucket.get(self._key, options=options).bytes())))
            if len(self._piece) != stop - self._at:
                raise ObjectStoreError(errno.EIO, "the object store sent less than it has")
            self._at = stop
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count
