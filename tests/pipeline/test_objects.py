"""The functions of `store` on a real S3-speaking server: what holds on a disk holds there."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from object_server import BadProxy, ObjectServer, put_files

from pipeline import objects, ome, store
from pipeline.errors import StudyError, UsageError
from pipeline.objects import ObjectStoreError
from pipeline.sources.stream import ByteStream, hash_file


def test_there_and_back(s3: str) -> None:
    url = store.join(s3, "a", "b")
    assert not store.exists(url)
    assert (store.size(url), store.read_json(url)) == (0, None)
    store.write(url, b"old")
    store.write(url, b"new")
    assert (store.read(url), store.size(url)) == (b"new", 3)
    assert store.exists(url)
    assert store.exists(store.join(s3, "a"))  # as a folder is there
    assert not store.exists(store.join(s3, "a", "bc"))
    store.write_json(url, {"x": [1]})
    assert store.read_json(url) == {"x": [1]}
    assert store.read_documents([url, url + "x", url]) == [{"x": [1]}, None, {"x": [1]}]
    with pytest.raises(FileNotFoundError):
        store.read(store.join(s3, "nothing"))


@pytest.mark.parametrize("name", ["with space", "ünïcödé", "a#b?c", "100%", "%20", "a+b", "tilde~"])
def test_odd_names(s3: str, name: str) -> None:
    store.write(store.join(s3, name, name), b"1")
    assert store.read(store.join(s3, name, name)) == b"1"
    assert list(store.names(s3)) == list(store.names(store.join(s3, name))) == [name]


def test_names_are_sorted_and_of_one_level(s3: str) -> None:
    for name in ("b", "a/x", "a/y", "c/d/e", ".hidden", "z.partial"):
        store.write(store.join(s3, name), b"")
    assert list(store.names(s3)) == [".hidden", "a", "b", "c"]
    assert list(store.names(store.join(s3, "nowhere"))) == []


def test_of_many_that_create_one_wins(s3: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: store.create(store.join(s3, "x"), b"%d" % i), range(8)))
    assert won.count(True) == 1
    assert store.read(store.join(s3, "x")) == b"%d" % won.index(True)


def make_group(url: str) -> dict[str, bytes]:
    content = {f"0/c/0/0/{i}": b"%d" % i for i in range(5)} | {"zarr.json": b"{}", "0/zarr.json": b"{}"}
    for name, data in content.items():
        store.write(store.join(url, name), data)
    return content


def tree(url: str) -> dict[str, bytes]:
    return {name: store.read(store.join(url, name)) for name in objects.keys(url)}


def test_copying_moving_and_deleting_a_group(s3: str) -> None:
    content = make_group(store.join(s3, "a"))
    make_group(store.join(s3, "ab"))
    store.copy(store.join(s3, "a"), store.join(s3, "b"))
    assert tree(store.join(s3, "a")) == tree(store.join(s3, "b")) == content
    with pytest.raises(FileExistsError):
        store.move(store.join(s3, "a"), store.join(s3, "b"))
    store.move(store.join(s3, "a"), store.join(s3, "c"))
    assert tree(store.join(s3, "c")) == content
    assert not store.exists(store.join(s3, "a"))
    store.delete(store.join(s3, "b"))
    store.delete(store.join(s3, "b"))
    assert list(store.names(s3)) == ["ab", "c"]
    assert tree(store.join(s3, "ab")) == content


def test_a_group_appears_last_and_goes_first(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_group(store.join(s3, "a"))
    bucket, key = objects.opened(s3)
    copied: list[str] = []
    removed: list[Any] = []

    class Watched:
        """The bucket, with its changes noted."""

        def __getattr__(self, name: str) -> Any:
            return getattr(bucket, name)

        def copy(self, source: str, target: str) -> None:
            copied.append(target)
            bucket.copy(source, target)

        def delete(self, paths: Any) -> None:
            removed.append(paths)
            bucket.delete(paths)

    watched = Watched()
    monkeypatch.setattr(objects, "opened", lambda url: (watched, objects.bucket_and_key(url)[1]))
    objects.copy(store.join(s3, "a"), store.join(s3, "b"))
    assert copied[-1] == f"{key}/b/zarr.json"
    assert len(copied) == 7
    objects.delete(store.join(s3, "b"))
    assert f"{key}/b/zarr.json" in removed[0]
    assert not any(name.startswith(f"{key}/b/0") for name in removed[0])


def test_what_is_being_removed_is_not_copied(s3: str) -> None:
    make_group(store.join(s3, "a"))
    store.delete(store.join(s3, "a", "zarr.json"))
    with pytest.raises(FileNotFoundError):
        store.copy(store.join(s3, "a"), store.join(s3, "b"))
    assert not store.exists(store.join(s3, "b"))


def test_a_file_that_is_not_finished_never_appears(s3: str) -> None:
    url = store.join(s3, "x")
    with suppress(KeyError), store.writing(url) as file:
        file.write(b"half")
        raise KeyError
    assert not store.exists(url)
    data = os.urandom(20 << 20)  # in parts
    with store.writing(url) as file:
        file.write(data)
    assert store.read(url) == data


def test_an_object_is_read_like_a_file(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PIECE", 1000)
    data, url = os.urandom(4321), store.join(s3, "x.nii")
    store.write(url, data)
    assert hash_file(url) == hashlib.sha256(data).hexdigest()
    with ByteStream(url) as stream:
        assert stream.size_limit == len(data)
        assert stream.read(5000) == data
    store.write(url, b"")
    with ByteStream(url) as stream:
        assert stream.read(10) == b""


def test_an_object_that_changes_while_it_is_read_is_refused(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PIECE", 1 << 20)
    url = store.join(s3, "x.nii")
    store.write(url, bytes(3 << 20))
    with ByteStream(url) as stream:
        stream.skip(1000)
        store.write(url, bytes([1]) * (3 << 20))
        with pytest.raises(StudyError, match="changed in the object store") as refused:
            stream.skip(2 << 20)
    assert refused.value.cause == "storage"


def test_arrays(s3: str) -> None:
    """Shards, whole and partly read; nothing above the array is made."""
    url = store.join(s3, "deep", "0")
    array = ome.create_array(url, (130, 140, 150), (64, 128, 128), np.dtype(np.int16), ["z", "y", "x"], {"a": 1})
    data = np.random.default_rng(0).integers(-5, 5, (130, 140, 150)).astype(np.int16)
    array[...] = data
    again = ome.open_array(url)
    np.testing.assert_array_equal(ome.read(again, (slice(3, 9), 5, slice(100, 150))), data[3:9, 5, 100:150])
    np.testing.assert_array_equal(again[...], data)
    assert again.attrs["a"] == 1
    assert set(store.names(store.join(s3, "deep"))) == {"0"}
    np.testing.assert_array_equal(ome.create_array(url, (8,) * 3, (8,) * 3, np.dtype("u1"), ["z", "y", "x"])[...], 0)
    assert set(objects.keys(url)) == {"zarr.json"}, "the old array's shards are gone"
    with pytest.raises(StudyError, match="is damaged"):
        ome.open_array(store.join(s3, "nowhere"))


def test_the_version_tells_of_any_change(s3: str) -> None:
    url = store.join(s3, "a")
    make_group(url)
    before = objects.version(url)
    assert objects.version(url) == before
    store.write(store.join(url, "0/c/0/0/3"), b"9")
    after = objects.version(url)
    store.write(store.join(url, "0/c/0/0/9"), b"9")
    assert len({before, after, objects.version(url)}) == 3
    assert objects.version(store.join(url, "zarr.json"))


# ------------------------------------------------------------------------------------------------------ a bad store


ACTS: dict[str, Callable[[str], Any]] = {
    "read": store.read,
    "write": lambda url: store.write(url, b"x"),
    "names": lambda url: list(store.names(url)),
    "exists": store.exists,
    "delete": store.delete,
    "open": ome.open_array,
    "stream": ByteStream,
}


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(objects.RETRY, "max_retries", 2)


@pytest.mark.parametrize("fault", ["503", "drop", "half"])
def test_what_fails_now_and_then_is_not_noticed(
    fault: str, s3: str, s3_server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_files(s3_server, {"steady": bytes(range(256)) * 4000})
    with BadProxy(s3_server, fault, every=3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.environment["AWS_ENDPOINT_URL"])
        objects.forget()
        for i in range(10):
            store.write(store.join(s3, str(i)), bytes([i]) * 3000)
            assert store.read("s3://bucket/steady") == bytes(range(256)) * 4000
        assert [store.read(store.join(s3, str(i))) for i in range(10)] == [bytes([i]) * 3000 for i in range(10)]
        assert list(store.names(s3)) == list("0123456789")
        store.delete(s3)
        assert not store.exists(s3)
        voxels = np.random.default_rng(0).integers(0, 99, (40, 140, 140)).astype(np.uint8)
        array = ome.create_array(store.join(s3, "0"), voxels.shape, (40, 128, 128), voxels.dtype, ["z", "y", "x"])
        array[...] = voxels
        for _ in range(5):
            np.testing.assert_array_equal(ome.read(ome.open_array(store.join(s3, "0")), (slice(None),)), voxels)
        assert proxy.faults >= 20


@pytest.mark.parametrize("act", ACTS)
def test_a_store_that_is_away_is_an_error_that_names_no_address(
    act: str, s3: str, s3_server: ObjectServer, monkeypatch: pytest.MonkeyPatch, patience: None
) -> None:
    with BadProxy(s3_server, "down") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.environment["AWS_ENDPOINT_URL"])
        objects.forget()
        with pytest.raises((ObjectStoreError, StudyError)) as failed:
            ACTS[act](store.join(s3, "secret-name"))
    said = f"{failed.value} {failed.value.__cause__}"
    assert not re.search(r"secret-name|127\.0\.0\.1|bucket", said)
    assert "object store failed" in said


@pytest.mark.parametrize(("fault", "words"), [("403", "refuses these credentials"), ("400", "it answered 400")])
def test_a_refusal_is_not_tried_again(
    fault: str, words: str, s3: str, s3_server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with BadProxy(s3_server, fault, every=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.environment["AWS_ENDPOINT_URL"])
        objects.forget()
        with pytest.raises(ObjectStoreError, match=words):
            store.read(store.join(s3, "x"))
        assert proxy.requests == 1


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://key:secret@bucket/x", "credentials and endpoints come from the environment"),
        ("s3:///x", "BUCKET/KEY"),
        ("s3://host:9000/x", "BUCKET/KEY"),
        ("ftp://host/x", "file://, s3://, gs://, az://"),
        ("https://host/x", "file://, s3://, gs://, az://"),
    ],
)
def test_addresses_that_cannot_be(url: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        store.read(url)
    assert "secret" not in str(refused.value)


def test_no_credentials_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    objects.forget()
    began = time.monotonic()
    with pytest.raises(UsageError, match="AWS_ACCESS_KEY_ID"):
        store.exists("s3://bucket/x")
    assert time.monotonic() - began < 60


def test_half_of_the_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    objects.forget()
    with pytest.raises(UsageError, match="AWS_SECRET_ACCESS_KEY is not"):
        store.exists("s3://bucket/x")


def test_a_key_that_cannot_be_listed_is_said_to_be_the_reason(s3: str, s3_server: ObjectServer) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=s3_server.environment["AWS_ENDPOINT_URL"])
    bucket, key = objects.bucket_and_key(s3)
    client.put_object(Bucket=bucket.removeprefix("s3://"), Key=f"{key}/in//mueller.nii", Body=b"x")
    for look in (objects.keys, objects.listing):
        with pytest.raises(OSError, match=r"an empty part .* rename that object") as refused:
            look(store.join(s3, "in"))
        assert "mueller" not in str(refused.value)


def test_credentials_of_the_usual_file(
    s3: str, s3_server: ObjectServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.environment["AWS_ENDPOINT_URL"])
    objects.forget()
    store.write(store.join(s3, "x"), b"1")
    assert store.read(store.join(s3, "x")) == b"1"
