"""Small markers beside the data that say what is done: the only truth about progress.

    OUT/ledger/out.json                     whose results OUT holds: model and settings
    OUT/ledger/<key>/plan.json              what is being made: study, runtime, shards
    OUT/ledger/<key>/done/<z>.<y>.<x>.json  one label shard that is whole, with its share of the statistics
    OUT/ledger/<key>/done/all.json          the same of all shards, once the study is published
    OUT/ledger/<key>/published/<study>.json what was published under this key
    OUT/ledger/<key>/failed.json            why a study was set aside (a study whose content could not be read goes
                                            by "u" + the keyed hash of its location)

A marker counts only if it names the runtime of the plan beside it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

from segmodels.home import home

from . import store
from .grid import Triple

KEY_LENGTH = 24
MARKER = ("runtime", "at", "statistics")  # at: nanoseconds since 1970
TOGETHER = "all.json"
RECORD = ("study", "content", "model", "settings", "structures", "seconds")  # what a published study's record has


def study_key(content: str, model_hash: str, settings: Mapping[str, Any]) -> str:
    """Hash of a study's content, the model's hash and the settings that change the answer (24 hex digits)."""
    text = json.dumps([content, model_hash, dict(sorted(settings.items()))], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def location_key(location: str) -> str:
    """What a study is called while its content is not known: "u" + 15 hex digits of the keyed hash of its location."""
    return "u" + hmac.new(_secret(), location.encode(errors="surrogateescape"), "sha256").hexdigest()[:15]


def _secret() -> bytes:
    """This user's key for hashes of what must not be read back; made once, mode 0600."""
    path = home() / "key"
    if not path.exists():
        temporary = path.with_name(f".key.{secrets.token_hex(4)}")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
        try:
            os.link(temporary, path)  # the first of two commands wins
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    return path.read_bytes()


def _document(url: str, *fields: str) -> dict[str, Any] | None:
    """The JSON object at `url`; None where there is none that is whole and has these fields."""
    document = store.read_json(url)
    return document if document is not None and document.keys() >= set(fields) else None


def folder(out: str, key: str) -> str:
    return store.join(out, "ledger", key)


def marker_name(shard: Triple) -> str:
    return ".".join(map(str, shard)) + ".json"


def write_marker(ledger: str, shard: Triple, runtime: str, statistics: Mapping[str, Any]) -> None:
    """Say that one label shard is whole. Call it only after the shard's bytes are durable."""
    marker = {"runtime": runtime, "at": time.time_ns(), "statistics": statistics}
    store.write_json(store.join(ledger, "done", marker_name(shard)), marker)


def unmark(ledger: str, shard: Triple) -> None:
    """Take back that a shard is whole: its bytes were found damaged."""
    name, together = marker_name(shard), _together(ledger)
    if together.pop(name, None) is not None:
        store.write_json(store.join(ledger, "done", TOGETHER), together)
    store.delete(store.join(ledger, "done", name))


def is_marked(ledger: str, shard: Triple, runtime: str) -> bool:
    """Whether this shard is whole under `runtime`."""
    document = _document(store.join(ledger, "done", marker_name(shard)), *MARKER)
    return document is not None and document["runtime"] == runtime


def markers(ledger: str, runtime: str) -> dict[Triple, dict[str, Any]]:
    """Shards done under `runtime`, in raster order, with their statistics."""
    # One by one first: another command may be putting them together, which it ends by removing them.
    single = _single(ledger)
    found = _together(ledger) | single
    return {
        shard: marker["statistics"]
        for shard, marker in sorted((_shard(name), marker) for name, marker in found.items())
        if marker["runtime"] == runtime
    }


def fold(ledger: str) -> None:
    """Put the markers of a published study into one file: a store of many studies stays small and quick to list."""
    single = _single(ledger)
    if single:
        store.write_json(store.join(ledger, "done", TOGETHER), _together(ledger) | single)
        for name in single:
            store.delete(store.join(ledger, "done", name))


def _single(ledger: str) -> dict[str, dict[str, Any]]:
    """The whole markers that are files of their own, by file name."""
    names = [name for name in store.names(store.join(ledger, "done")) if name != TOGETHER]
    documents = store.read_documents([store.join(ledger, "done", name) for name in names])
    return {name: m for name, m in zip(names, documents, strict=True) if m is not None and m.keys() >= set(MARKER)}


def _together(ledger: str) -> dict[str, dict[str, Any]]:
    return store.read_json(store.join(ledger, "done", TOGETHER)) or {}


def _shard(name: str) -> Triple:
    z, y, x = map(int, name.removesuffix(".json").split("."))
    return z, y, x


def write_plan(ledger: str, plan: Mapping[str, Any]) -> None:
    store.write_json(store.join(ledger, "plan.json"), dict(plan))


def read_plan(ledger: str) -> dict[str, Any] | None:
    return _document(store.join(ledger, "plan.json"), "study", "content", "runtime", "runtime_hash", "shards")


def write_published(ledger: str, study: str, record: Mapping[str, Any]) -> None:
    store.write_json(store.join(ledger, "published", study + ".json"), dict(record))


def published(ledger: str, study: str) -> dict[str, Any] | None:
    """The record of what was published as `study` under this key."""
    return _document(store.join(ledger, "published", study + ".json"), *RECORD)


def forget_published(ledger: str, study: str) -> None:
    store.delete(store.join(ledger, "published", study + ".json"))


def published_names(ledger: str) -> list[str]:
    return [n.removesuffix(".json") for n in store.names(store.join(ledger, "published"))]


def write_failed(ledger: str, record: Mapping[str, Any]) -> None:
    store.write_json(store.join(ledger, "failed.json"), dict(record))


def read_failed(ledger: str) -> dict[str, Any] | None:
    return _document(store.join(ledger, "failed.json"), "study", "cause", "message", "attempts")


def clear_failed(ledger: str) -> None:
    """Forget that a study failed. Under a location key there is nothing else to keep."""
    store.delete(ledger if ledger.rsplit("/", 1)[-1].startswith("u") else store.join(ledger, "failed.json"))


def failures(out: str) -> dict[str, dict[str, Any]]:
    """The records of what stands as failed, by key."""
    found = {key: read_failed(folder(out, key)) for key in keys(out)}
    return {key: record for key, record in found.items() if record is not None}


def all_failed(out: str) -> dict[str, list[str]]:
    """The keys under which each study stands as failed, by its name."""
    found: dict[str, list[str]] = {}
    for key, record in failures(out).items():
        found.setdefault(record["study"], []).append(key)
    return found


def keys(out: str) -> Iterator[str]:
    """All study keys (and location keys) the ledger of `out` knows."""
    for name in store.names(store.join(out, "ledger")):
        if not name.endswith(".json") and not name.startswith("."):
            yield name


def all_published(out: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(key, study, record) of everything published in `out`."""
    for key in keys(out):
        for study in published_names(folder(out, key)):
            record = published(folder(out, key), study)
            if record is not None:
                yield key, study, record
