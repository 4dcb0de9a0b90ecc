"""What OUT shows to readers: publishing a study, withdrawing it, moving a superseded one aside.

A study is published in this order: label pyramid, label metadata, the label's name in labels/zarr.json (one atomic
write: from here readers of the OME-Zarr see it), masks (each appears whole), then the ledger's record. After a kill
anywhere in between, the same steps are done again. A study is withdrawn in the opposite direction.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import ledger, ome, store
from .colors import label_colors
from .errors import StudyError
from .exports.nifti import write_nifti
from .geometry import ome_scale
from .grid import Shards, Triple
from .metrics.components import count_components
from .metrics.masks import stored_mask
from .metrics.structures import merge_shards, structure_rows
from .pyramid import build_pyramid
from .sources.ome_metadata import read_image
from .verify import gone

SUFFIXES = {"nifti": ".nii.gz"}


@dataclass(frozen=True)
class Labels:
    """A study's label image, whole at level 0 but perhaps not yet published, and what is to be said of it."""

    out: str
    study: str
    key: str
    content: str
    image: str
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    structures: Mapping[int, str]
    runtime: Mapping[str, Any]
    runtime_hash: str
    shape: Triple
    channel_axis: bool
    affine: np.ndarray
    nifti: dict[str, Any] | None

    @property
    def name(self) -> str:
        return str(self.model["name"])

    @property
    def group(self) -> str:
        return store.join(self.image, "labels", self.name)

    @property
    def ledger(self) -> str:
        return ledger.folder(self.out, self.key)


def mask_url(out: str, study: str, kind: str) -> str:
    return store.join(out, "masks", study + SUFFIXES[kind])


def stands(out: str, study: str, key: str, model: str) -> bool:
    """Whether the labels that the ledger calls published are there for readers."""
    image = store.join(out, "images", study + ".ome.zarr")
    return model in ome.labels_listed(image) and ome.made_for(store.join(image, "labels", model)) == key


def is_stored(record: Mapping[str, Any], group: str) -> bool:
    """Whether level 0 of published labels takes as much room as when it was published: a file that is gone or cut off.

    Bytes that rotted in place are found by whoever reads them (every chunk has a checksum). Older records do not say.
    """
    return record.get("stored") in (None, store.footprint(store.join(group, "0")))


def standing(out: str, key: str, model: str, but: str | None = None) -> str | None:
    """A name under which the result of `key` is published and stands, other than `but`; None where there is none."""
    names = ledger.published_names(ledger.folder(out, key))
    return next((name for name in names if name != but and stands(out, name, key, model)), None)


def publish(labels: Labels, formats: Sequence[str], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Show a finished study to readers and record it. Gives the record; `facts` (timings and such) go into it."""
    seconds = dict(facts.get("seconds", {}))
    began = time.perf_counter()
    done = ledger.markers(labels.ledger, labels.runtime_hash)
    shards = Shards(labels.shape, ome.shard_shape(labels.shape))
    if len(done) != shards.total:
        raise RuntimeError(f"{len(done)} of {shards.total} shards are marked: the study is not whole")
    if lost := gone(store.join(labels.group, "0"), done):
        raise StudyError("storage", f"{len(lost)} label shards are gone from the disk: run it again to make them anew")
    mask = stored_mask(store.join(labels.group, "0"), labels.affine)
    components = count_components(mask.slabs(), mask.shape)
    rows = structure_rows(merge_shards(done.values()), components, labels.structures, labels.shape, labels.affine)
    seconds["measure"] = time.perf_counter() - began

    began = time.perf_counter()
    names = ome.axis_names(labels.channel_axis)
    build_pyramid(labels.group, labels=True, names=names)
    store.sync_tree(labels.group)
    ome.write_group(labels.group, _label_attributes(labels, rows))
    ome.list_labels(labels.image, [*dict.fromkeys([*ome.labels_listed(labels.image), labels.name])])
    seconds["publish"] = time.perf_counter() - began

    began = time.perf_counter()
    export(labels, formats)
    seconds["export"] = time.perf_counter() - began
    record = {
        **facts,
        "study": labels.study,
        "content": labels.content,
        "model": dict(labels.model),
        "settings": dict(labels.settings),
        "runtime": dict(labels.runtime),
        "structures": rows,
        "seconds": seconds,
        "stored": store.footprint(store.join(labels.group, "0")),
        "masks": _mask_sizes(labels, formats),
    }
    ledger.write_published(labels.ledger, labels.study, record)
    ledger.clear_failed(labels.ledger)
    ledger.fold(labels.ledger)
    return record


def export(labels: Labels, formats: Sequence[str]) -> None:
    """Write the masks of a study in each format."""
    for kind in formats:
        url = mask_url(labels.out, labels.study, kind)
        write_nifti(store.join(labels.group, "0"), url, labels.affine, labels.nifti)


def export_missing(labels: Labels, formats: Sequence[str]) -> None:
    """Write those masks of a published study that are not there, or not as large as when they were written."""
    record = ledger.published(labels.ledger, labels.study) or {}
    known, there = dict(record.get("masks", {})), _mask_sizes(labels, formats)
    missing = [kind for kind, size in there.items() if size == 0 or size != known.get(kind, size)]
    export(labels, missing)
    now = known | there | _mask_sizes(labels, missing)
    if record and known != now:
        ledger.write_published(labels.ledger, labels.study, {**record, "masks": now})


def _mask_sizes(labels: Labels, formats: Sequence[str]) -> dict[str, int]:
    return {kind: store.size(mask_url(labels.out, labels.study, kind)) for kind in formats}


def _label_attributes(labels: Labels, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    colors = label_colors(max(labels.structures, default=0))
    # Labels lie where their image says that it lies: ours say 0, a linked one may say something else.
    origin = read_image(labels.image).translation
    return {
        "ome": {
            "version": ome.VERSION,
            "multiscales": ome.multiscales(
                labels.name, labels.shape, ome_scale(labels.affine), labels.channel_axis, "mode", origin
            ),
            "image-label": {
                "version": ome.VERSION,
                "colors": [{"label-value": label, "rgba": [*colors[label - 1], 255]} for label in labels.structures],
                "properties": [
                    {
                        "label-value": row["label"],
                        "name": row["structure"],
                        "voxels": row["voxels"],
                        "volume_ml": row["volume_ml"],
                    }
                    for row in rows
                ],
                "source": {"image": "../../"},
            },
        },
        "maskmill": {
            "key": labels.key,
            "model": dict(labels.model),
            "settings": dict(labels.settings),
            "runtime": dict(labels.runtime),
            "affine": labels.affine.tolist(),
            "notice": "Not a medical device.",
        },
    }


def withdraw(out: str, study: str, key: str, image: str, name: str) -> None:
    """Take a study's result back: first from the label list, then its masks, its labels and its record."""
    ome.list_labels(image, [n for n in ome.labels_listed(image) if n != name])
    for kind in SUFFIXES:
        store.delete(mask_url(out, study, kind))
    store.delete(store.join(image, "labels", name))
    others = [n for n in ledger.published_names(ledger.folder(out, key)) if n != study]
    if others:
        ledger.forget_published(ledger.folder(out, key), study)
    else:
        store.delete(ledger.folder(out, key))


def move_aside(out: str, study: str, image: str, content: str) -> str:
    """Make room for a study whose content changed: what stands under its name gets `-` and 6 hex of its content.

    Moves the masks, the image with its labels, and the record of each model. Can be done again after a kill.
    """
    aside = f"{study}-{content[:6]}"
    for kind in SUFFIXES:
        if store.exists(mask_url(out, study, kind)):
            store.delete(mask_url(out, aside, kind))
            store.move(mask_url(out, study, kind), mask_url(out, aside, kind))
    facts = (ome.read_attributes(image) or {}).get("maskmill", {})
    if facts.get("content") == content:  # else it was moved before the kill
        target = store.join(out, "images", aside + ".ome.zarr")
        store.delete(target)
        store.move(image, target)
    for key, name, record in list(ledger.all_published(out)):
        if name == study and record["content"] == content:
            folder = ledger.folder(out, key)
            ledger.write_published(folder, aside, {**record, "study": aside, "superseded": True})
            ledger.forget_published(folder, study)
    return aside
