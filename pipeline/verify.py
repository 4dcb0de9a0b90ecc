"""Whether label shards on the disk are still what their markers say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from . import ome, store
from .errors import StudyError
from .grid import Shards, Triple

Marked = Mapping[Triple, Mapping[str, Any]]


def shard_url(labels: str, index: Triple, lead: int) -> str:
    """Where a shard of the level-0 array at `labels` is stored; `lead`: how many axes come before z,y,x."""
    return store.join(labels, "c", *["0"] * lead, *map(str, index))


def damaged(labels: str, shards: Shards, marked: Marked) -> Iterator[Triple]:
    """Of the marked shards those that cannot be read or hold other labels than were counted when they were written.

    Reads them all: about 2 ms each. What a marker says of a shard of background, which is not stored, needs no reading.
    """
    array = ome.open_array(labels)
    lead = (0,) * (array.ndim - 3)
    for index, statistics in marked.items():
        if not statistics and not store.exists(shard_url(labels, index, len(lead))):
            continue
        try:
            counts = np.bincount(ome.read(array, lead + shards.box(index).slices).ravel())
        except StudyError:
            yield index
            continue
        found = {str(label): int(counts[label]) for label in np.nonzero(counts)[0] if label > 0}
        if found != {label: sums["n"] for label, sums in statistics.items()}:
            yield index


def gone(labels: str, marked: Marked) -> list[Triple]:
    """The marked shards that hold labels and are not stored: reading them would give background."""
    stored = store.sizes(store.join(labels, "c"))
    lead = ["0"] * (ome.open_array(labels).ndim - 3)
    return [i for i, statistics in marked.items() if statistics and not stored.get("/".join([*lead, *map(str, i)]))]
