"""From a job and a card to a method: the model, how its tiles lie, and the settings that change the answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .engine import WorkerSpec
from .errors import UsageError
from .grid import Triple
from .job import Job
from .tiling import Tiling
from .uncertainty import measures_of

if TYPE_CHECKING:
    from segmodels import Card, Model
    from segmodels.network import Network


@dataclass(frozen=True)
class Method:
    """How this run answers: the model and the settings that change the answer, resolved from card and job."""

    card: Card
    model_hash: str
    spec: WorkerSpec
    tiling: Tiling
    classes: int
    uncertainty: tuple[str, ...]
    volume: int | None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that change the answer, as they stand in keys and records."""
        settings: dict[str, Any] = {
            "stitch": self.tiling.stitch,
            "tile": list(self.tiling.window),
            "mirroring": self.spec.mirroring,
        }
        if self.tiling.stitch != "exact":  # where nothing is blended
            settings["overlap"] = self.tiling.overlap
        if self.spec.classes is not None:
            settings["classes"] = self.spec.classes
        if self.volume is not None:
            settings["volume"] = self.volume
        return settings

    @property
    def fits_itself(self) -> bool:
        """Whether the model has no network and fits itself to each study's histogram."""
        from segmodels.registry import BUILT_IN

        return self.card.network.name in BUILT_IN

    @property
    def structures(self) -> dict[int, str]:
        return {int(label): facts.name for label, facts in self.card.labels.items()}

    @property
    def model_facts(self) -> dict[str, Any]:
        return {
            "name": self.card.name,
            "version": self.card.version,
            "hash": self.model_hash,
            "licence": self.card.licence,
        }


def resolve_method(job: Job) -> Method:
    """Load the model and settle how it is run. Raises UsageError."""
    import segmodels
    from segmodels.errors import ModelError
    from segmodels.predictor import make_predictor
    from segmodels.runtime import resolve_runtime

    try:
        if job.classes is not None and job.model != "kmeans":
            raise UsageError(f"--classes is for kmeans; the model {job.model} has its own")
        model = segmodels.load(job.model, classes=job.classes)
        _check_supported(model)
        runtime = resolve_runtime(model, backend=job.backend, precision=job.precision, threads=job.threads)
        mirroring = _mirroring(job, model.card)
        predictor = make_predictor(model, runtime, mirroring=mirroring)
    except ModelError as error:
        raise UsageError(f"model: {error}") from None
    card = model.card
    location = job.model if not Path(job.model).exists() else str(Path(job.model).resolve())
    return Method(
        card=card,
        model_hash=model.hash,
        spec=WorkerSpec(location, model.hash, job.classes, runtime, mirroring),
        tiling=_tiling(job, model, predictor.margin),
        classes=predictor.classes,
        uncertainty=measures_of(model, predictor),
        volume=job.volume,
    )


def _check_supported(model: Model) -> None:
    card = model.card
    for field in ("regions", "locator"):
        if getattr(card, field) is not None:
            raise UsageError(f"the model {card.name} uses the card field {field}, which this version cannot run")
    if card.axes == "tyx":
        raise UsageError(f"the model {card.name} is for clips (axes tyx); this version segments scans")


def _mirroring(job: Job, card: Card) -> bool:
    """Whether tiles are flipped too: where the card lists axes for it, unless the job says no."""
    if job.mirroring and not card.mirror_axes:
        raise UsageError(
            f"--mirroring needs axes along which the model {card.name} may be flipped, and its card lists none "
            "(mirror_axes); leave the flag out"
        )
    return bool(card.mirror_axes) and job.mirroring is not False


def _tiling(job: Job, model: Model, margin: Triple) -> Tiling:
    """How the job or else the card lays tiles. Raises UsageError where the network cannot take them so."""
    card, network = model.card, model.network
    window, stitch = _window(job.tile or card.tile, card), job.stitch or card.stitch[0]
    if network is not None:
        _check_tile(window, network)
    overlap = card.overlap if job.overlap is None else job.overlap
    if stitch != "exact":
        return Tiling(window, overlap, margin, stitch)
    if job.overlap is not None:
        raise UsageError("--overlap is for tiles that are blended; with --stitch exact every voxel is answered once")
    if "exact" not in card.stitch:
        raise UsageError(f"the card of the model {card.name} does not allow --stitch exact ({', '.join(card.stitch)})")
    return _exact_tiling(job, model, window, margin)


def _exact_tiling(job: Job, model: Model, window: Triple, margin: Triple) -> Tiling:
    """Tiles of `window`, cut to whole steps of the network's grid; the card's are four times the halo at least.

    A study that fits into one tile needs no halo. Larger tiles cost less: (W / (W - 2 halo))^3 is computed.
    """
    from segmodels.registry import reach_of

    network = model.network
    if network is None:
        return Tiling(window, 0.0, margin, "exact")
    if (reach := reach_of(network)) is None:
        raise UsageError(
            f"the model {model.card.name} cannot be stitched exactly: its network normalises over the whole tile, so "
            "that what a voxel gets depends on where its tile ends; use gaussian, constant or nnunet"
        )
    flat = network.dims == 2
    divisor: Triple = (1 if flat else network.divisor, network.divisor, network.divisor)
    if any(margin):
        least = network.legal_size(2 * network.margin + network.divisor)
        if min(window[flat:]) < least:
            raise UsageError(
                f"--stitch exact needs tiles of {least} voxels or more of this network, got {list(window)}"
            )
        return Tiling(window, 0.0, margin, "exact", divisor)
    halo: Triple = (0 if flat else reach, reach, reach)
    floor = (0, 0, 0) if job.tile is not None else tuple(4 * h for h in halo)
    z, y, x = (max(w // d * d, d, f) for w, d, f in zip(window, divisor, floor, strict=True))
    return Tiling((z, y, x), 0.0, margin, "exact", divisor, halo)


def _window(tile: tuple[int, ...], card: Card) -> Triple:
    if len(tile) == len(card.axes) == 2:
        tile = (1, *tile)
    if len(tile) != 3 or (card.axes == "yx" and tile[0] != 1):
        raise UsageError(f"tile {list(tile)} does not follow the card's axes {card.axes}")
    z, y, x = tile
    return z, y, x


def _check_tile(window: Triple, network: Network) -> None:
    spatial = window[-network.dims :]
    legal = tuple(network.legal_size(n) for n in spatial)
    if legal != spatial:
        raise UsageError(f"tile {list(spatial)} is no size this network takes; the next one is {list(legal)}")
