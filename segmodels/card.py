"""The card: the facts about a model that running it needs, checked before anything runs.

`Card` is the document `card.json` field by field. What it says of its network is checked against the network
itself by `agree`, because only the network knows how many classes it has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    Field,
    JsonValue,
    Strict,
    ValidationError,
    field_validator,
    model_validator,
)

from segmodels.errors import ModelError, nearest, shorten
from segmodels.kinds import KINDS, Facts, ImageNet, Normalize, Positive, Real

if TYPE_CHECKING:
    from segmodels.network import Network

FORMAT: Literal["maskmill-card-1"] = "maskmill-card-1"
LARGEST_CARD = 16 * 2**20  # bytes; a card with 65,535 labels is about 3 MB
LARGEST_TILE = 2**28  # voxels: 1 GiB of float32 per channel

Whole = Annotated[int, Strict()]
Stitch = Literal["gaussian", "constant", "nnunet", "exact"]


class NetworkRef(Facts):
    """Which network, as `segmodels.create(name, **config)` builds it."""

    name: str
    config: dict[str, JsonValue] = Field(default_factory=dict)


class Weights(Facts):
    """The weights beside the card: a file name and the SHA-256 of the file's bytes, in hex."""

    file: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @field_validator("file")
    @classmethod
    def _inside_the_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
            raise ValueError(
                "the weights must be a plain file name inside the model's folder, such as weights.safetensors"
            )
        return name


class Label(Facts):
    """What a label value stands for."""

    name: Annotated[str, Field(min_length=1, max_length=200)]


class Card(Facts):
    """The facts about a model. Lists follow `axes`; sizes are voxels, spacings millimetres.

    activation "softmax": channel k of the network is label k, 0 is the background and not listed. "sigmoid":
    channel i paints the i-th key of `labels`, in their order.
    orientation: nibabel's code of the axes x, y, z that the network sees; a network of axes "yx" sees the planes of x
    and y, one z after the other. resampling_order: of the spline by which images come to `spacing_mm`.
    """

    format: Literal["maskmill-card-1"] = FORMAT
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=100)]
    version: str = "0"
    network: NetworkRef
    weights: Weights | None = None
    axes: Literal["zyx", "yx", "tyx"]
    channels: Annotated[tuple[str, ...], Field(min_length=1)]
    orientation: str | None = None
    spacing_mm: tuple[Positive, ...] | None = None
    resampling_order: Literal[1, 3] = 3
    normalize: Annotated[tuple[Normalize, ...], Field(min_length=1)]
    tile: tuple[Annotated[int, Strict(), Field(ge=1, le=16_384)], ...]
    overlap: Annotated[Real, Field(ge=0, lt=1)] = 0.5
    stitch: Annotated[tuple[Stitch, ...], Field(min_length=1)] = get_args(Stitch)
    mirror_axes: tuple[Annotated[int, Strict(), Field(ge=0)], ...] = ()
    activation: Literal["softmax", "sigmoid"]
    labels: Annotated[dict[str, Label], Field(min_length=1)]
    regions: dict[str, Annotated[tuple[Whole, ...], Field(min_length=1)]] | None = None
    locator: str | None = None
    background: Real | None = None
    licence: str | None = None
    training: JsonValue = None
    quality: JsonValue = None
    intended_use: str | None = None

    @field_validator("name")
    @classmethod
    def _a_folder_name(cls, name: str) -> str:
        if set(name) == {"."}:
            raise ValueError("the name also names folders, so it cannot be only dots")
        return name

    @field_validator("labels")
    @classmethod
    def _label_values(cls, labels: dict[str, Label]) -> dict[str, Label]:
        for key in labels:
            if not re.fullmatch(r"[1-9][0-9]{0,4}", key) or int(key) > 65_535:
                raise ValueError(
                    f'keys are label values as text, "1" to "65535" (0 is the background), got {shorten(key)}'
                )
        return labels

    @model_validator(mode="after")
    def _lists_follow_axes(self) -> Card:
        for field, value in (("tile", self.tile), ("spacing_mm", self.spacing_mm)):
            if value is not None and len(value) != len(self.axes):
                raise ValueError(f"{field} must have one number per axis of {self.axes!r}, got {shorten(list(value))}")
        voxels = 1
        for n in self.tile:
            voxels *= n
        if voxels > LARGEST_TILE:
            raise ValueError(f"a tile of {list(self.tile)} is {voxels:,} voxels; at most {LARGEST_TILE:,} do")
        if len(set(self.mirror_axes)) != len(self.mirror_axes) or any(a >= len(self.axes) for a in self.mirror_axes):
            raise ValueError(f"mirror_axes are distinct indices into axes {self.axes!r}, got {list(self.mirror_axes)}")
        return self

    @model_validator(mode="after")
    def _one_normalisation_per_channel(self) -> Card:
        if len(self.normalize) not in (1, len(self.channels)):
            raise ValueError(
                f"normalize must have one entry for all or one per channel ({len(self.channels)}), "
                f"got {len(self.normalize)}"
            )
        if any(isinstance(n, ImageNet) for n in self.normalize) and (
            len(self.channels) != 3 or len(self.normalize) != 1
        ):
            raise ValueError(
                "normalize imagenet is one entry for the three channels red, green, blue; "
                f"got {len(self.normalize)} entries and {len(self.channels)} channels"
            )
        return self

    @model_validator(mode="after")
    def _orientation_is_a_code(self) -> Card:
        code = self.orientation
        if code is not None:
            if self.axes == "tyx":
                raise ValueError("orientation is for scans, and axes 'tyx' are of clips: leave it null")
            if len(code) != 3 or any(sum(c in pair for c in code) != 1 for pair in ("LR", "AP", "SI")):
                raise ValueError(
                    f"orientation must be nibabel's code in x, y, z order, such as 'RAS' or 'LPS', or null "
                    f"for as stored; got {shorten(code)}"
                )
        return self

    @model_validator(mode="after")
    def _regions_and_softmax_labels(self) -> Card:
        keys = list(self.labels)
        if self.activation == "softmax" and {int(k) for k in keys} != set(range(1, len(keys) + 1)):
            raise ValueError(
                f'with softmax channel k is label k, so the {len(keys)} labels must be "1" to "{len(keys)}"'
                f" (0 is the background and not listed); got {shorten(keys)}"
            )
        for name, members in (self.regions or {}).items():
            if unknown := [m for m in members if str(m) not in self.labels]:
                raise ValueError(f"region {shorten(name)} joins labels that are not listed: {shorten(unknown)}")
        return self

    def to_json(self) -> str:
        """The text of card.json: indented, fields in the order of this class, `from` as `from`."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False) + "\n"


def parse(facts: Mapping[str, Any] | Card) -> Card:
    """A Card from a dict (or the card itself). Raises ModelError: one line that names the field."""
    if isinstance(facts, Card):
        return facts
    try:
        return Card.model_validate(dict(facts))
    except ValidationError as error:
        raise ModelError(_one_line(error)) from None


def read(path: Path) -> Card:
    """The card in a card.json. Raises ModelError for a file that is no card or lacks format or weights."""
    try:
        if path.stat().st_size > LARGEST_CARD:
            raise ModelError(f"card.json: larger than {LARGEST_CARD // 2**20} MiB; this is no card")
        facts = json.loads(path.read_text("utf-8"), object_pairs_hook=_no_twins)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"card.json: cannot be read ({_reason(error)})") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"card.json: not JSON ({_reason(error)})") from None
    if not isinstance(facts, dict):
        raise ModelError(f"card.json: expected an object with fields, got {type(facts).__name__}")
    for field in ("format", "weights"):
        if facts.get(field) is None:
            raise ModelError(f"card.json: the field {field!r} is missing")
    return parse(facts)


def agree(card: Card, network: Network) -> None:
    """Check what card and network both say. Raises ModelError where they differ."""
    expected = {"zyx": (3,), "yx": (2,), "tyx": (2, 3)}[card.axes]
    if network.dims not in expected:
        raise ModelError(f"card.json: axes {card.axes!r} do not fit a {network.dims}-D network (its config says dims)")
    if len(card.channels) != network.in_channels:
        raise ModelError(
            f"card.json: {len(card.channels)} channels are listed, the network takes {network.in_channels}"
        )
    background = 1 if card.activation == "softmax" else 0
    if len(card.labels) != network.classes - background:
        raise ModelError(
            f"card.json: {len(card.labels)} labels are listed, but a {card.activation} network of "
            f"{network.classes} classes has {network.classes - background}"
            + (" (0 is the background and not listed)" if background else "")
        )
    tile = card.tile[-network.dims :]
    legal = [network.legal_size(n) for n in tile]
    if legal != list(tile):
        raise ModelError(
            f"card.json: tile {list(tile)} is no input size that this network with padding 'valid' takes; "
            f"the next legal one is {legal}"
        )


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        keys = [k for k, _ in pairs]
        twin = next(k for k in keys if keys.count(k) > 1)
        raise ModelError(f"card.json: the field {shorten(twin)} stands twice")
    return fields


def _one_line(error: ValidationError) -> str:
    found = error.errors()
    # pydantic also calls a list too short when an entry is wrong: only the entry's own problem is told.
    problems = [p for p in found if not any(_inside(q["loc"], p["loc"]) for q in found)]
    # An unknown field is the best clue where there is one: a misspelt name also makes the right one missing.
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known_fields(first["loc"])
        text = f"unknown field {where!r}.{nearest(first['loc'][-1], known)} Known: {', '.join(known)}"
    elif first["type"] == "union_tag_invalid":
        kind = first["input"]["kind"]
        text = f"{where}: unknown kind {shorten(kind)}.{nearest(kind, KINDS)} Known: {', '.join(KINDS)}"
    elif first["type"] == "missing":
        text = f"the field {where!r} is missing"
    else:
        message = first["msg"].removeprefix("Value error, ")
        given = f"; got {shorten(first['input'])}" if first["type"] != "value_error" else ""
        text = (f"{where}: " if where else "") + message + given
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"card.json: {text}{more}"


def _inside(inner: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _known_fields(loc: tuple[int | str, ...]) -> list[str]:
    top: dict[str, type[BaseModel]] = {"network": NetworkRef, "weights": Weights, "labels": Label}
    owner: type[BaseModel] = Card
    if len(loc) > 1 and loc[0] == "normalize":
        owner = KINDS[str(loc[2])]
    elif len(loc) > 1:
        owner = top[str(loc[0])]
    return [field.alias or name for name, field in owner.model_fields.items()]


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error) or type(error).__name__
