"""What the store promises: whole files under kills, one winner of a race, folders that come and go at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import store
from pipeline.errors import UsageError

ROOT = Path(__file__).parents[2]
WRITER = """
import sys
from pipeline import store
documents = [bytes([n]) * (300_000 + n) for n in range(1, 20)]
print("ready", flush=True)
while True:
    for document in documents:
        store.write(sys.argv[1], document)
"""


def whole(data: bytes) -> bool:
    """Whether these bytes are one of the writer's documents."""
    return len(data) == 300_000 + data[0] and data == bytes([data[0]]) * len(data)


def test_a_reader_sees_old_or_new_however_often_the_writer_is_killed(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "file"
    seen = set()
    for attempt in range(6):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], cwd=ROOT, stdout=subprocess.PIPE)
        try:
            assert writer.stdout is not None
            writer.stdout.readline()
            end = time.monotonic() + 0.15 + 0.013 * attempt
            while time.monotonic() < end:
                if target.exists():
                    data = target.read_bytes()
                    assert whole(data)
                    seen.add(data[0])
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
        assert whole(target.read_bytes())
        assert list(store.names(str(target.parent))) == ["file"]
    assert len(seen) > 3, "the writer never wrote while it was watched"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    url = str(tmp_path / "file")
    store.write(url, b"old")

    with pytest.raises(TypeError):
        store.write(url, "text")  # type: ignore[arg-type]
    assert store.read(url) == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_document_is_whole_or_none(tmp_path: Path) -> None:
    url = str(tmp_path / "a" / "b.json")
    assert store.read_json(url) is None
    store.write_json(url, {"k": [1, None, "ü"]})
    assert store.read_json(url) == {"k": [1, None, "ü"]}
    assert store.read_json(url + "/below") is None
    for damaged in (b"", b'{"k": [1, ', b"\xff\xfe{}", b"\x00" * 40):
        Path(url).write_bytes(damaged)
        assert store.read_json(url) is None
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write_json(url, {"k": float("nan")})


def test_of_many_that_create_one_wins(tmp_path: Path) -> None:
    url = str(tmp_path / "folder" / "claim")
    start = threading.Barrier(16)

    def claim(n: int) -> bool:
        start.wait()
        return store.create(url, b"%d" % n)

    for _ in range(10):
        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(claim, range(16)))
        assert won.count(True) == 1
        assert store.read(url) == b"%d" % won.index(True)
        assert os.listdir(tmp_path / "folder") == ["claim"]
        store.delete(url)


def test_names_are_sorted_and_hide_what_is_unfinished(tmp_path: Path) -> None:
    for name in ("b", "a", f".a.0123{store.PARTIAL}", "c.json"):
        (tmp_path / name).touch()
    assert list(store.names(str(tmp_path))) == ["a", "b", "c.json"]
    assert list(store.names(str(tmp_path / "nowhere"))) == []
    assert list(store.names(str(tmp_path / "a"))) == []


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def make_tree(folder: Path) -> dict[str, bytes]:
    (folder / "x" / "y").mkdir(parents=True)
    (folder / "one").write_bytes(b"1")
    (folder / "x" / "y" / "two").write_bytes(b"22")
    return tree(folder)


def test_deleting(tmp_path: Path) -> None:
    store.delete(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("x")
    store.delete(str(tmp_path / "file"))
    content = make_tree(tmp_path / "kept")
    (tmp_path / "link").symlink_to(tmp_path / "kept", target_is_directory=True)
    store.delete(str(tmp_path / "link"))
    assert tree(tmp_path / "kept") == content, "only the link goes, not what it points at"
    store.delete(str(tmp_path / "kept"))
    assert os.listdir(tmp_path) == []


def test_nobody_sees_half_of_a_folder_that_is_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for n in range(800):
        (folder / str(n)).touch()
    seen: list[int] = []
    begun, over = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.is_set():
            seen.append(len(list(store.names(str(folder)))))
            begun.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun.wait()
    store.delete(str(folder))
    over.set()
    watcher.join()
    assert set(seen) <= {800, 0}


def test_moving(tmp_path: Path) -> None:
    content = make_tree(tmp_path / "a")
    store.move(str(tmp_path / "a"), str(tmp_path / "new" / "b"))
    assert tree(tmp_path / "new" / "b") == content
    assert not (tmp_path / "a").exists()
    (tmp_path / "c").mkdir()
    with pytest.raises(FileExistsError):
        store.move(str(tmp_path / "new" / "b"), str(tmp_path / "c"))
    assert tree(tmp_path / "new" / "b") == content
    with pytest.raises(FileNotFoundError):
        store.move(str(tmp_path / "nowhere"), str(tmp_path / "d"))


def test_copying(tmp_path: Path) -> None:
    content = make_tree(tmp_path / "a")
    store.copy(str(tmp_path / "a"), str(tmp_path / "new" / "b"))
    assert tree(tmp_path / "new" / "b") == tree(tmp_path / "a") == content
    assert list(store.names(str(tmp_path / "new"))) == ["b"]
    store.sync_tree(str(tmp_path / "new"))
    store.sync(str(tmp_path / "nowhere"))


def test_sizes_count_no_unfinished_write(tmp_path: Path) -> None:
    content = make_tree(tmp_path / "a")
    (tmp_path / "a" / "x.1234.partial").write_bytes(b"half")
    assert store.sizes(str(tmp_path / "a")) == {name: len(data) for name, data in content.items()}
    assert store.footprint(str(tmp_path / "a")) == {"files": len(content), "bytes": sum(map(len, content.values()))}
    assert store.footprint(str(tmp_path / "nowhere")) == {"files": 0, "bytes": 0}


@pytest.mark.parametrize("act", [store.read, store.exists, store.delete, lambda url: store.write(url, b"")])
def test_other_addresses_are_refused(act: Callable[[str], Any]) -> None:
    with pytest.raises(UsageError, match="ftp://"):
        act("ftp://host/key")


@given(name=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=30))
def test_a_file_url_is_the_path_it_quotes(name: str) -> None:
    path = Path("/tmp/somewhere") / name
    if ".." not in path.parts and "." not in path.parts:
        assert store.local(path.as_uri()) == path
        assert store.local(str(path)) == path


def test_joining() -> None:
    assert store.join("/a/", "b", "c") == store.join("/a", "b", "c") == "/a/b/c"
    assert store.join("file:///a", "b") == "file:///a/b"
