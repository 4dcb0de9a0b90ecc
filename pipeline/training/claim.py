"""The model folder of a training: whose it is, and whether the model is whole."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import segmodels

from .. import store
from ..errors import UsageError
from .job import TrainJob

WORK = ".training"  # in the model folder, until the model is whole


def is_done(job: TrainJob, out: Path) -> bool:
    """Whether the model folder is whole and of this job.

    Raises UsageError where it holds something else, and where the weights of a whole model are missing or damaged.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give a folder for the model")
    card = store.read_json(str(out / "card.json"))
    begun = store.read_json(str(out / WORK / "job.json"))
    if card is not None:
        is_same, what = (card.get("training") or {}).get("job") == job.fingerprint, "a model"
    elif begun is not None:
        # What was begun and taught nothing, such as a job with a mistake, keeps nobody from mending the job.
        is_same, what = begun.get("lesson") == job.lesson or not has_learned(out), "a training that is not finished"
    else:
        if out.exists() and (strange := sorted(out.iterdir())):
            raise UsageError(f"{out} holds {strange[0].name}, which is no part of a model: give an empty or new folder")
        return False
    if not is_same:
        raise UsageError(f"{out} holds {what} of another job (or of other settings): give another folder")
    if card is not None:
        try:
            segmodels.load(str(out.resolve()))  # a path, whatever models are called
        except segmodels.ModelError as error:
            raise UsageError(f"{out} holds the model of this job, damaged: {error}; or give another folder") from None
        shutil.rmtree(out / WORK, ignore_errors=True)  # of a command that was killed at its very end
    return card is not None


def has_learned(out: Path) -> bool:
    """Whether any network in the work folder has made a step. Raises ModelError for a damaged checkpoint."""
    from segmodels.train import checkpoint

    states = (checkpoint.read(folder) for folder in (out / WORK).glob("member-*"))
    return any(state["step"] for state in states if state is not None)


@contextmanager
def claim(job: TrainJob, out: Path) -> Iterator[None]:
    """Make the model folder this job's, and this process's while it lasts.

    Raises UsageError where it cannot be written, or while another command trains there.
    """
    try:
        (out / WORK).mkdir(parents=True, exist_ok=True)
        handle = os.open(out / WORK, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UsageError(f"another command trains in {out}: wait for it, or give another folder") from None
    except OSError:
        pass  # a file system without locks
    try:
        try:
            begun = store.read_json(str(out / WORK / "job.json")) or {}
            if begun.get("lesson") != job.lesson and not has_learned(out):  # networks of a job that was mended
                for untaught in (out / WORK).glob("member-*"):
                    shutil.rmtree(untaught)
            store.write_json(str(out / WORK / "job.json"), {"lesson": job.lesson})
        except OSError as error:
            raise UsageError(f"{out} cannot be written: {error.strerror}") from None
        yield
    finally:
        os.close(handle)
