"""The checkpoint of a training: written whole or not at all, read without running code."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from segmodels.errors import ModelError

if TYPE_CHECKING:
    from segmodels.train.loop import Training

FILE = "checkpoint.pt"


def write(folder: Path, training: Training) -> None:
    """Replace the folder's checkpoint by this state, durably."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "way": training.way.to_json(),
        "step": training.step,
        "seconds": training.seconds,
        "losses": list(training.losses),
        "rows": training.rows,
        "scored": training.scored,
        "supervised": training.supervised.state_dict(),
        "kept": training.kept.state_dict(),
        "optimizer": training.optimizer.state_dict(),
    }
    temporary = folder / f".{FILE}.{os.getpid()}"
    with open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # how torch says that a write failed
            raise OSError(errno.EIO, "the checkpoint cannot be written (is the disk full?)") from error
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / FILE)


def read(folder: Path) -> dict[str, Any] | None:
    """The state that `write` kept, None where there is none. Raises ModelError for a file that is none."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        state["supervised"], state["kept"], state["optimizer"], state["way"], state["scored"]
    except Exception as error:
        raise ModelError(
            f"the checkpoint {path} cannot be read ({type(error).__name__}): remove it to begin anew"
        ) from None
    return state


def restore(training: Training, state: dict[str, Any]) -> None:
    """Put a state that was read into a training of the same network and recipe. Raises ModelError if it is not."""
    try:
        training.supervised.load_state_dict(state["supervised"])
        training.kept.load_state_dict(state["kept"])
        training.optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError):
        raise ModelError(f"{FILE} is of another network: remove it to begin anew") from None
    training.step, training.seconds = int(state["step"]), float(state["seconds"])
    training.losses, training.rows = list(state["losses"]), list(state["rows"])
    training.scored = int(state["scored"])
