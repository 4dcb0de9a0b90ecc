"""Bytes of a file, plain or gzip, read once, forwards, hashed as they are stored.

Whether a file is gzip is seen from its first two bytes: browsers and transfer tools unpack files and keep
their names.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from pipeline import objects
from pipeline.errors import StudyError
from pipeline.objects import ObjectStoreError

PIECE = 1 << 20
GZIP_MAGIC = b"\x1f\x8b"
# Deflate cannot pack better than this (RFC 1951: 258 bytes in two bits, so 1032 to 1).
BEST_GZIP_RATIO = 1032


@contextmanager
def reading_errors() -> Iterator[None]:
    """Turn what reading a damaged or missing file raises into one clear line that names no path."""
    try:
        yield
    except (gzip.BadGzipFile, zlib.error) as error:
        raise StudyError("input", f"the gzip stream is damaged ({_why(error)}); copy the file again") from None
    except EOFError:
        raise StudyError("input", "the gzip stream ends too early; the file is cut off, copy it again") from None
    except ObjectStoreError as error:
        raise StudyError("storage", f"it could not be read: {error.strerror}") from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else "input/output error"
        raise StudyError("input", f"it could not be read: {reason}") from None


def _why(error: Exception) -> str:
    text = str(error).lower()
    if "crc" in text:
        return "its checksum does not match"
    if "length" in text:
        return "its length does not match"
    return "it does not decode"


def open_regular(path: str) -> tuple[io.RawIOBase, int]:
    """A regular file or an object, unbuffered, and its size; a pipe or device, which could block, is refused."""
    if objects.is_remote(path):
        reader = objects.Reader(path)
        return reader, reader.size
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise StudyError("input", "it is not a regular file; expected a .nii or .nii.gz file")
        return open(descriptor, "rb", buffering=0), facts.st_size
    except BaseException:
        os.close(descriptor)
        raise


def hash_file(path: str) -> str:
    """sha256 hex of a file's bytes as stored."""
    with reading_errors(), open_regular(path)[0] as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _HashingReader(io.RawIOBase):
    """A file that can only be read forwards and hashes every byte on its way."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count: int = self._file.readinto(buffer)
        self.sha256.update(buffer[:count])
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class ByteStream:
    """The content of a plain or gzip file, forwards; a context manager.

    `size_limit` is the most bytes the content can have: the file's size, or what gzip could unpack it to.
    """

    def __init__(self, path: str) -> None:
        with reading_errors(), ExitStack() as stack:
            file, size = open_regular(path)
            self._raw = _HashingReader(file)
            self._stored = stack.enter_context(io.BufferedReader(self._raw, PIECE))
            self.is_gzip = self._stored.peek(2)[:2] == GZIP_MAGIC
            stack.pop_all()
        self._content: io.BufferedIOBase = self._stored
        self.size_limit = size
        if self.is_gzip:
            self._content = gzip.GzipFile(fileobj=self._stored, mode="rb")
            self.size_limit = size * BEST_GZIP_RATIO

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._content.close()
        self._stored.close()

    def read(self, count: int) -> bytes:
        """At most `count` bytes; fewer only at the end."""
        into = bytearray(count)
        with memoryview(into) as view:
            got = self._fill(view)
        return bytes(into[:got])

    def read_into(self, buffer: memoryview) -> None:
        """Fill the buffer; StudyError("input") where the content ends first."""
        got = self._fill(buffer)
        if got < len(buffer):
            raise StudyError(
                "input",
                f"its voxels end {len(buffer) - got:,} bytes or more before the header says they do; "
                "the file is cut off, copy it again",
            )

    def skip(self, count: int) -> None:
        """Go forwards; StudyError("input") where the content ends first."""
        scratch = memoryview(bytearray(min(PIECE, count)))
        while count > 0:
            piece = scratch[: min(PIECE, count)]
            self.read_into(piece)
            count -= len(piece)

    def finish(self, tolerated: int) -> str:
        """Read to the end and give the sha256 hex of the stored bytes.

        Raises StudyError("input") when more than `tolerated` bytes of content follow (a gzip is not unpacked
        further than that) or the gzip's checksum does not match.
        """
        surplus = len(self.read(tolerated + 1))
        if surplus > tolerated:
            raise StudyError(
                "input",
                f"it {'unpacks to' if self.is_gzip else 'holds'} more than the header says, by over "
                f"{tolerated:,} bytes; the header or the file is damaged",
            )
        with reading_errors():
            while self._stored.read(PIECE):
                pass
        return self._raw.sha256.hexdigest()

    def _fill(self, buffer: memoryview) -> int:
        done = 0
        with reading_errors():
            while done < len(buffer):
                # In pieces: gzip unpacks into a buffer of its own as large as what is asked for.
                count = self._content.readinto(buffer[done : done + PIECE])
                if not count:
                    break
                done += count
        return done
