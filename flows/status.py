"""`maskmill status OUT`: what the ledger says."""

from __future__ import annotations

import json
import sys
from typing import Any

from pipeline import ledger, ome, store
from pipeline.errors import UsageError
from pipeline.ingest import image_url
from pipeline.objects import check_address


def status_command(out: str, *, as_json: bool) -> int:
    """Print what is published, what failed and why, and what was interrupted and how far it got."""
    entries = read_status(out)
    if as_json:
        print(json.dumps({"studies": entries}))
        return 0
    counts = {state: sum(e["state"] == state for e in entries) for state in ("published", "failed", "interrupted")}
    claim = store.read_json(store.join(out, "ledger", "out.json"))
    if claim is None:
        print(f"maskmill: {out}/ledger/out.json, which says whose results these are, is damaged", file=sys.stderr)
        claim = {}
    print(f"model {claim.get('model', '?')}: " + ", ".join(f"{n} {state}" for state, n in counts.items()))
    for entry in entries:
        if entry["state"] == "failed":
            print(
                f"failed       {entry['study']}  {entry['cause']}: {entry['message']} (attempts: {entry['attempts']})"
            )
        elif entry["state"] == "interrupted":
            done = f"{entry['shards_done']} of {entry['shards']} shards done" if entry["shards"] else "not begun"
            print(f"interrupted  {entry['study']}  {done}")
    return 0


def read_status(out: str) -> list[dict[str, Any]]:
    """One entry per study that OUT's ledger knows, sorted by name. Raises UsageError without a ledger."""
    check_address(out, "OUT")
    if not store.exists(store.join(out, "ledger")):
        raise UsageError(f"{out} holds no results: there is no ledger in it; give the OUT of a segment command")
    entries = []
    for key in ledger.keys(out):
        folder = ledger.folder(out, key)
        failed, plan = ledger.read_failed(folder), ledger.read_plan(folder)
        entries += [
            {"study": study, "key": key, "state": "published"}
            for study in ledger.published_names(folder)
            if failed is None or failed["study"] != study  # its labels stand, its masks could not be made again
        ]
        if failed is not None:
            facts = {name: failed[name] for name in ("study", "cause", "message", "attempts")}
            facts["log"] = failed.get("log", [])
            entries.append({"key": key, "state": "failed", **facts})
        elif plan is not None and not ledger.published_names(folder) and _stands(out, key, plan):
            done = len(ledger.markers(folder, plan["runtime_hash"]))
            entries.append(
                {
                    "study": plan["study"],
                    "key": key,
                    "state": "interrupted",
                    "shards": plan["shards"],
                    "shards_done": done,
                }
            )
    known = {entry["study"] for entry in entries}
    for key, facts in _latest_run(out).items():
        if facts["study"] not in known:  # the newest command never came to it
            entries.append({"study": facts["study"], "key": key, "state": "interrupted", "shards": 0, "shards_done": 0})
    return sorted(entries, key=lambda entry: (entry["study"] or "", entry["key"]))


def _latest_run(out: str) -> dict[str, dict[str, str]]:
    """The studies of the newest command, by the key that they had when it began."""
    runs = [name for name in store.names(store.join(out, "runs")) if not name.startswith(".")]
    document = store.read_json(store.join(out, "runs", runs[-1], "run.json")) if runs else None
    return (document or {}).get("studies", {})


def _stands(out: str, key: str, plan: dict[str, Any]) -> bool:
    """Whether the unfinished labels are still there: the study may have got other content since."""
    labels = store.join(image_url(out, plan["study"]), "labels", plan["model"]["name"], "0")
    return ome.made_for(labels) == key
