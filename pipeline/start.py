"""From a job to a run that may start: its studies and OUT. What is wrong here is exit code 2."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

from . import ledger, store
from .engine import share_of_machine
from .errors import StudyError, UsageError
from .job import Job
from .method import Method
from .sources import Found, find_studies
from .sources.names import shown
from .sweep import sweep


def find(job: Job) -> Found:
    """The studies of a job: the first `limit` of them, of these its `part`, which may be none.

    Raises UsageError when the INPUTs yield no study at all.
    """
    if job.reference is not None and not store.exists(job.reference):
        raise UsageError(f"the reference {job.reference} does not exist: give the folder of reference masks")
    try:
        found = find_studies(job.inputs, exclude=job.out)
    except StudyError as error:
        raise UsageError(f"OUT {job.out} cannot be written: {error}") from None
    if not found.studies:
        reasons = "; ".join(f"{shown(source)}: {error}" for source, error in found.failures[:3])
        raise UsageError(
            f"no INPUT yields a study ({reasons or 'no .nii, .nii.gz or OME-Zarr in it'}); "
            "give NIfTI files, OME-Zarr images or folders of them"
        )
    if not job.retry_failed:  # else the first of those that failed: `Run` knows them
        found = Found(found.studies[: job.limit], found.failures)
    return _part(found, job.part)


def _part(found: Found, part: tuple[int, int] | None) -> Found:
    """What falls to part I of N, by a hash of the name: a file that comes later moves no study to another part."""
    if part is None:
        return found
    i, n = part

    def is_ours(name: str) -> bool:
        return int(hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest(), 16) % n == i - 1

    return Found(
        [study for study in found.studies if is_ours(study.name)],
        [failure for failure in found.failures if is_ours(failure[0])],
    )


def claim_out(job: Job, method: Method, found: Found) -> dict[str, tuple[str, dict[str, Any]]]:
    """Make OUT ready for this model; gives what is published in it: study -> (key, record).

    Raises UsageError when OUT cannot be written, holds another model's results, or holds results of the same model
    under another hash or other settings (then `overwrite` says to replace them).
    """
    assert job.out is not None
    out = job.out
    probe = store.join(out, "ledger", f".probe-{secrets.token_hex(4)}")
    try:
        alone = sweep(out)  # before anything is written: another command may be sweeping what it takes for left over
        store.write(probe, b"")
        store.delete(probe)
    except (OSError, UsageError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"OUT {out} cannot be written: {reason}") from None
    published = {
        study: (key, record) for key, study, record in ledger.all_published(out) if not record.get("superseded")
    }
    claim_url = store.join(out, "ledger", "out.json")
    claim = store.read_json(claim_url)
    mine = {"model": method.card.name, "hash": method.model_hash, "settings": method.settings}
    if published:
        names = {study.name for study in found.studies}
        claims = {
            study: {"model": r["model"]["name"], "hash": r["model"]["hash"], "settings": r["settings"]}
            for study, (_, r) in published.items()
        }
        # The claim of OUT may be lost or damaged; what is published says the same.
        whole = claim if claim is not None and claim.keys() >= mine.keys() else next(iter(claims.values()))
        if whole["model"] != method.card.name:
            raise UsageError(
                f"OUT {out} holds results of the model {whole['model']}; one OUT holds one model's: give another OUT"
                " (and its images as INPUT with --images link, to share them)"
            )
        held = [whole, *(record for study, record in claims.items() if study in names)]
        differences = [text for text in (_difference(h, mine) for h in held) if text]
        if differences and not job.overwrite:
            raise UsageError(
                f"OUT {out} holds results made with {differences[0]}; give another OUT, or --overwrite to withdraw "
                "and replace them"
            )
    began_before = claim is not None
    if claim is None and not store.create(claim_url, json.dumps(mine).encode()):
        claim = store.read_json(claim_url)  # another command began at this moment
    if claim is not None and claim != mine:
        # Nothing of the other claim is published: whose it is may be at work on the first of it.
        if not (began_before and (alone or job.overwrite or published)):
            raise UsageError(
                f"OUT {out} is taken for the model {claim.get('model')}, by settings other than these; another command "
                "may be at work on it: give another OUT, or run this again with --overwrite when that has ended"
            )
        store.write_json(claim_url, mine)
    return published


def _difference(held: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    names = sorted({*held["settings"], *mine["settings"]})
    differing = [
        f"{name} {json.dumps(held['settings'].get(name))} (now {json.dumps(mine['settings'].get(name))})"
        for name in names
        if held["settings"].get(name) != mine["settings"].get(name)
    ]
    if not differing and held["hash"] != mine["hash"]:
        differing = [f"another version of the model, {held['hash'][:12]} (now {mine['hash'][:12]})"]
    return ", ".join(differing)


def memory_budget(job: Job, workers: int) -> int:
    """Bytes one worker may use: --memory, else its part of 80 % of the machine's memory."""
    return share_of_machine(workers) if job.memory is None else job.memory


def new_run_id() -> str:
    return time.strftime("%Y%m%dT%H%M%S") + "-" + secrets.token_hex(3)
