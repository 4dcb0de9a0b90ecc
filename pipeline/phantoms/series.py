"""A folder of phantoms: images, masks and a table of their true volumes. Made again, it makes only what is missing."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .. import store
from ..errors import UsageError
from ..objects import check_address
from .body import LABELS
from .render import Phantom, phantom
from .write import IMAGES, MASKS, write_nifti, write_omezarr

FORMATS = {"nifti": (".nii.gz", write_nifti), "omezarr": (".ome.zarr", write_omezarr)}
TRUTH = "truth.json"
PREFIX = "phantom-"  # of the names
COLUMNS = ("study", "label", "structure", "volume_ml", "whole")


def phantom_name(seed: int) -> str:
    return f"{PREFIX}{seed:04d}"


def make_phantoms(
    folder: str,
    seeds: Iterable[int],
    shape: Sequence[int],
    *,
    spacing_mm: Sequence[float] | float | None = None,
    orientation: str = "RAS",
    tilt_degrees: Sequence[float] = (0.0, 0.0, 0.0),
    format: str = "nifti",
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Make the phantoms of some seeds in a folder; gives the names of those that were not there yet.

    images/<name> and labels/<name> with the same ending; truth.json and truth.csv hold, per phantom, every structure's
    exact volume and whether all of it is in the field of view. A phantom is listed once it is whole. `progress` is told
    how many are there. Raises UsageError for an unknown format, for what makes no phantom, and where the folder holds
    phantoms made otherwise.
    """
    check_address(folder, "the folder")
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}: choose from {', '.join(FORMATS)}")
    ending, write = FORMATS[format]
    lattice = phantom(0, shape, spacing_mm=spacing_mm, orientation=orientation, tilt_degrees=tilt_degrees)
    settings = {"format": format, "shape": list(lattice.shape), "affine": lattice.affine.tolist()}
    truth, made = _stored(folder, settings), []
    _clear(folder)
    for done, seed in enumerate(seeds):
        progress(done)
        name = phantom_name(seed)
        files = [store.join(folder, part, name + ending) for part in (IMAGES, MASKS)]
        if name in truth and all(map(store.exists, files)):
            continue
        one = phantom(seed, lattice.shape, affine=lattice.affine)
        write(one, folder, name)
        truth[name] = _truth(one)
        _write_truth(folder, settings, truth)
        made.append(name)
    return made


def _clear(folder: str) -> None:
    """Remove what a killed command left half made."""
    for part in (IMAGES, MASKS):
        for left in store.local(store.join(folder, part)).glob(f".{PREFIX}*{store.PARTIAL}"):
            store.delete(str(left))


def _stored(folder: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The truth that a folder holds already."""
    document = store.read_json(store.join(folder, TRUTH))
    if document is None:
        if store.exists(store.join(folder, TRUTH)):
            raise UsageError(f"{TRUTH} in the folder is damaged: remove the folder, or give another one")
        return {}
    before = {name: document.get(name) for name in settings}
    if before != settings or not isinstance(document.get("phantoms"), dict):
        raise UsageError(
            f"the folder holds phantoms of shape {before['shape']} as {before['format']}, made with other settings: "
            "give the same format, shape, spacing, orientation and tilt, or another folder"
        )
    return dict(document["phantoms"])


def _truth(one: Phantom) -> dict[str, Any]:
    volumes, whole = one.volumes_ml, one.whole
    structures = [
        {"label": label, "structure": name, "volume_ml": volumes[name], "whole": name in whole}
        for label, name in LABELS.items()
    ]
    return {"seed": one.seed, "structures": structures}


def _write_truth(folder: str, settings: Mapping[str, Any], truth: Mapping[str, Any]) -> None:
    """The CSV first: what JSON lists is what a rerun keeps."""
    phantoms = {name: truth[name] for name in sorted(truth)}
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    for name, entry in phantoms.items():
        table.writerows({"study": name, **row, "whole": str(row["whole"]).lower()} for row in entry["structures"])
    store.write(store.join(folder, "truth.csv"), text.getvalue().encode())
    store.write_json(store.join(folder, TRUTH), {**settings, "labels": dict(LABELS), "phantoms": phantoms})
