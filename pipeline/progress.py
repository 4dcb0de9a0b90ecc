"""Where one study stands in a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .engine import Kind
from .errors import Cause
from .ingest import Image
from .locks import Claim
from .sources import Study

if TYPE_CHECKING:
    from segmodels.runtime import Runtime

State = str  # waiting, segmenting, saving, whole, published, failed, interrupted


@dataclass
class Progress:
    """Where one study stands in this run."""

    study: Study
    key: str
    state: State = "waiting"
    image: Image | None = None
    kind: Kind | None = None  # of the workers that make it
    stranded: int = 0  # how often that kind went away
    saving: bool = False  # memory was short: blocks are to be the smallest
    in_smallest: bool = False  # they are
    under: Runtime | None = None  # the more frugal runtime that its workers take for it
    tiles: int = 0  # expected, see Run.estimate
    tiles_done: int = 0
    pending: set[int] = field(default_factory=set)
    blocks: int = 0
    numbered: int = 0  # blocks planned so far: a study that begins again has new numbers
    reused: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    cause: Cause | None = None
    message: str | None = None
    attempts: int = 1
    record: dict[str, Any] | None = None
    claim: Claim | None = None  # from planning to the end of the study: see `pipeline.locks`
