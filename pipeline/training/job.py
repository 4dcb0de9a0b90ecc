"""The settings of a training, as users write them in a job file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Set
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from segmodels.card import Card, NetworkRef, agree, parse
from segmodels.errors import ModelError, nearest
from segmodels.kinds import Normalize, ZScore
from segmodels.train.recipe import Part, Recipe

from ..errors import UsageError

Name = Annotated[str, Field(min_length=1, max_length=200)]
Size = Annotated[int, Field(strict=True, ge=1, le=16_384)]


class Data(Part):
    """Where cases come from. A mask is found by its image's name, or inside its image."""

    images: tuple[str, ...] = Field(description="files or folders of scans")
    masks: str | None = Field(None, description="the folder of the masks, named as the images are")
    label_image: str | None = Field(None, description="instead: the name of a label image in each OME-Zarr image")
    licence: str | None = Field(None, description="of the data; goes into the card")
    source: str | None = Field(None, description="where the data is from; goes into the card")

    @field_validator("images", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_kind_of_masks(self) -> Data:
        if not self.images:
            raise ValueError("images: give at least one file or folder")
        if (self.masks is None) == (self.label_image is None):
            raise ValueError("give either masks (a folder) or label_image (a name), not both and not neither")
        return self


class Split(Part):
    """Which cases only measure. They choose nothing: neither weights nor settings."""

    seed: Annotated[int, Field(strict=True, ge=0)] = 0
    validation: Annotated[float, Field(ge=0, lt=1)] = Field(0.2, description="share of the cases")
    file: str | None = Field(None, description="JSON with the lists training and validation, instead of a draw")


class TrainJob(Part):
    """What `maskmill train` is asked to do."""

    name: str
    version: str = "1.0.0"
    data: Data
    labels: dict[str, Name] = Field(description="label values and the names of their structures")
    channels: tuple[str, ...] = ("image",)
    normalize: tuple[Normalize, ...] = Field((ZScore(),), description="one entry per channel, or one for all")
    tile: tuple[Size, ...] = Field(description="voxels of the network's window along the axes")
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    mirror_axes: tuple[int, ...] = Field((), description="axes (0 = z) along which the anatomy may be mirrored")
    network: NetworkRef
    recipe: Recipe
    split: Split = Split()
    members: Annotated[int, Field(strict=True, ge=1, le=16)] = Field(1, description="networks of an ensemble")
    members_by: Literal["seeds", "folds"] = Field("seeds", description="what makes them differ")
    teacher: str | None = Field(None, description="a model folder to learn from as well")
    weights: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="what the weights are stored as")
    licence: str | None = Field(None, description="of the model; default: that of the data")
    intended_use: str | None = None
    engine: Literal["ray", "serial"] = "ray"
    address: str | None = Field(None, description="an existing Ray cluster to join")
    workers: Annotated[int, Field(strict=True, ge=1, le=16)] | None = Field(
        None, description="members trained at once on Ray; default: one per GPU, else one"
    )
    threads: Annotated[int, Field(strict=True, ge=1, le=1024)] | None = Field(
        None, description="per member; default: all cores"
    )

    @field_validator("labels", mode="before")
    @classmethod
    def _text_keys(cls, value: Any) -> Any:
        return {str(key): name for key, name in value.items()} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> TrainJob:
        from segmodels import registry
        from segmodels.train.loss import Supervised
        from segmodels.train.way import has_batch_norm

        try:
            network = registry.on_meta(self.network.name, **self.network.config)
            agree(self.card(), network)
            Supervised(network, deep=self.recipe.deep_supervision)
        except ModelError as error:
            raise ValueError(str(error).removeprefix("card.json: ")) from None
        if network.margin:
            raise ValueError("networks with padding 'valid' cannot be trained by this version: use padding 'same'")
        if self.recipe.patch is not None and len(self.recipe.patch) > len(self.tile):
            raise ValueError(f"the patch {list(self.recipe.patch)} has more axes than the tile {list(self.tile)}")
        if self.recipe.patch is not None and len(self.recipe.patch) < len(self.tile):
            raise ValueError(f"the patch {list(self.recipe.patch)} has fewer axes than the tile {list(self.tile)}")
        uneven = [n for n in self.patch[-network.dims :] if n % network.divisor]
        if uneven:
            raise ValueError(f"the patch {list(self.patch)} must have multiples of {network.divisor}, the divisor")
        if self.recipe.batch * math.prod(self.patch) == network.divisor**network.dims and has_batch_norm(network):
            raise ValueError(
                f"a batch of one patch {list(self.patch)} leaves batch normalisation a single value at the bottom of "
                "the network: give a larger batch or patch, or another norm"
            )
        names = list(self.labels.values())
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two labels are called {twice[0]!r}: every structure has a name of its own")
        if self.members_by == "folds" and self.members == 1:
            raise ValueError("members_by 'folds' needs at least 2 members")
        return self

    @property
    def window(self) -> tuple[int, int, int]:
        """Voxels of a tile along z, y, x."""
        z, y, x = (1,) * (3 - len(self.tile)) + self.tile
        return z, y, x

    @property
    def patch(self) -> tuple[int, int, int]:
        """Voxels of a sample along z, y, x."""
        z, y, x = (1,) * (3 - len(self.recipe.patch or self.tile)) + (self.recipe.patch or self.tile)
        return z, y, x

    def card(self, **more: Any) -> Card:
        """The card of the model that this job makes, without weights. Raises ModelError."""
        config = dict(self.network.config)
        facts = {
            "name": self.name,
            "version": self.version,
            "network": {"name": self.network.name, "config": config},
            "axes": "zyx" if len(self.tile) == 3 else "yx",
            "channels": list(self.channels),
            "normalize": [entry.model_dump(by_alias=True) for entry in self.normalize],
            "tile": list(self.tile),
            "overlap": float(self.overlap),
            "mirror_axes": list(self.mirror_axes),
            "activation": "softmax",
            "labels": {value: {"name": name} for value, name in self.labels.items()},
            "licence": self.licence or self.data.licence,
            "intended_use": self.intended_use,
        }
        return parse(facts | more)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of all that decides the model; how long and where it is trained does not enter."""
        return self._digest({"engine", "address", "workers", "threads", "intended_use"})

    @property
    def lesson(self) -> str:
        """16 hex digits of what decides what is learned: a training goes on where only the card would be another."""
        what = {"version", "licence", "overlap", "weights"}
        return self._digest({"engine", "address", "workers", "threads", "intended_use", *what}, {"licence", "source"})

    def _digest(self, left_out: set[str], of_data: Set[str] = frozenset()) -> str:
        facts = self.model_dump(mode="json", by_alias=True, exclude=left_out)
        for field in ("minutes", "readers", "checkpoint_minutes"):
            del facts["recipe"][field]
        for field in of_data:
            del facts["data"][field]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def make_train_job(settings: Mapping[str, Any]) -> TrainJob:
    """A checked job. Raises UsageError that names each setting that is wrong."""
    try:
        return TrainJob.model_validate(dict(settings))
    except ValidationError as error:
        raise UsageError("; ".join(_line(e) for e in error.errors())) from None


def _line(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "job"
    if error["type"] == "extra_forbidden":
        owner: Any = {"data": Data, "split": Split, "recipe": Recipe}.get(str(error["loc"][0]), TrainJob)
        if error["loc"][:2] == ("recipe", "augment"):
            owner = type(Recipe.model_fields["augment"].default)
        return f"unknown setting {where!r}.{nearest(error['loc'][-1], owner.model_fields)}"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}"
