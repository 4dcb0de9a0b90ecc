"""Several networks as one, by the mean of their logits: deep ensembles (Lakshminarayanan et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, Strict
from torch import Tensor, nn

from segmodels.errors import ModelError, shorten
from segmodels.network import Network
from segmodels.registry import Config, create, register, spec

FEWEST, MOST = 2, 16


class Ensemble(Network):
    """The mean over the members' logits; the tensors of member i are `members.i.*`.

    Logits and not probabilities are averaged, as nnU-Net does with folds: a mean of logits is linear, so it may be
    taken per tile, before or after stitching, with one result, and a single network stays a special case of it. The
    members are alike in everything but their weights.
    """

    def __init__(self, members: Sequence[Network]) -> None:
        first = members[0]
        super().__init__(
            dims=first.dims,
            in_channels=first.in_channels,
            classes=first.classes,
            divisor=first.divisor,
            margin=first.margin,
        )
        self.members = nn.ModuleList(members)

    @property
    def parts(self) -> Sequence[Network]:
        return list(self.members)  # type: ignore[arg-type]

    def logits(self, x: Tensor) -> Tensor:
        first, *others = self.parts
        total = first.logits(x)
        for member in others:
            total = total + member.logits(x)
        return total / len(self.members)


def join(members: Sequence[Network]) -> Network:
    """One network of 2 to 16 that `create` made with one config: as after training the folds of a cross-validation.

    They become its members as they are, without a copy. Raises ModelError for members that are not alike.
    """
    if not FEWEST <= len(members) <= MOST:
        raise ModelError(f"an ensemble has {FEWEST} to {MOST} members, got {len(members)}")
    descriptions = [{"name": m.architecture, "config": m.config} for m in members]
    for i, description in enumerate(descriptions):
        if description != descriptions[0]:
            raise ModelError(
                f"the members of an ensemble are alike in all but their weights; member {i} is "
                f"{shorten(description)}, member 0 {shorten(descriptions[0])}"
            )
    options = spec("ensemble").config({"members": len(members), "network": descriptions[0]})
    joined = Ensemble(members)
    joined.architecture, joined.config = "ensemble", options
    return joined


def _reference(value: object) -> object:
    if isinstance(value, dict) and {"name"} <= value.keys() <= {"name", "config"} and isinstance(value["name"], str):
        return value
    raise ValueError(f"expected an object with name and config, got {shorten(value)}")


def _completed(reference: dict[str, Any]) -> dict[str, Any]:
    if reference["name"] == "ensemble":
        raise ValueError("the members of an ensemble are networks, not ensembles")
    config = reference.get("config", {})
    if not isinstance(config, dict):
        raise ValueError(f"its config is an object with options, got {shorten(config)}")
    return {"name": reference["name"], "config": spec(reference["name"]).config(config)}


Members = Annotated[
    int, Strict(), Field(ge=FEWEST, le=MOST, description=f"how many: a whole number from {FEWEST} to {MOST}")
]
Reference = Annotated[
    dict[str, Any],
    BeforeValidator(_reference),
    AfterValidator(_completed),
    Field(
        validate_default=True,
        description='what each member is, as {"name": "resunet", "config": {...}}; not an ensemble',
    ),
]
DEFAULT: dict[str, Any] = {"name": "resunet", "config": {}}


def _of_member(fact: str) -> Any:
    """A fact of Spec that is the member's: divisor, margin or reach, as a function of the ensemble's config."""

    def ask(config: Config) -> Any:
        member = config["network"]
        return getattr(spec(member["name"]), fact)(member["config"])

    return ask


@register(
    "ensemble",
    dims=(2, 3),
    paper="Lakshminarayanan, Pritzel, Blundell 2017, arXiv:1612.01474",
    summary="several networks of one architecture, each with its own weights: the mean of their logits",
    divisor=_of_member("divisor"),
    margin=_of_member("margin"),
    reach=_of_member("reach"),
    params=(
        ({"members": 5, "network": {"name": "resunet", "config": {}}}, 5 * 8_222_594),
        ({"members": 3, "network": {"name": "unet", "config": {"widths": [8, 16, 32], "norm": "none"}}}, 3 * 29_330),
    ),
)
def ensemble(members: Members = 5, network: Reference = DEFAULT) -> Network:
    """`members` networks with random weights of their own. Five is the number of folds that nnU-Net trains."""
    return Ensemble([create(network["name"], **network["config"]) for _ in range(members)])
