"""The kinds of normalisation that a card can ask for, and what all parts of a card have in common.

What they compute is the pipeline's business; here they are data: named, complete and checked.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

Real = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Positive = Annotated[Real, Field(gt=0)]


class Facts(BaseModel):
    """A part of a card: frozen, and no field that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Raw(Facts):
    """Intensities as they are stored."""

    kind: Literal["none"] = "none"


class ZScore(Facts):
    """(x - mean) / max(std, 1e-8) over the whole image in stored spacing, std with ddof 0."""

    kind: Literal["zscore"] = "zscore"


class ZScoreNonzero(Facts):
    """The same over the voxels that are not 0, which stay 0."""

    kind: Literal["zscore_nonzero"] = "zscore_nonzero"


class CT(Facts):
    """Clip to [lower, upper], then (x - mean) / std: numbers of the training set, in Hounsfield units."""

    kind: Literal["ct"] = "ct"
    lower: Real
    upper: Real
    mean: Real
    std: Positive

    @model_validator(mode="after")
    def _ordered(self) -> CT:
        if self.lower >= self.upper:
            raise ValueError(f"lower must be below upper, got {self.lower} and {self.upper}")
        return self


class Scale(Facts):
    """The line that takes `from` to `to`; with clip the result stays inside `to`."""

    kind: Literal["scale"] = "scale"
    from_: tuple[Real, Real] = Field(alias="from")
    to: tuple[Real, Real]
    clip: Annotated[bool, Strict()] = False

    @model_validator(mode="after")
    def _a_range(self) -> Scale:
        if self.from_[0] == self.from_[1]:
            raise ValueError(f"from must be two different values, got {list(self.from_)}")
        return self


class ImageNet(Facts):
    """x / 255, then ImageNet's mean and std of the channel: red, green, blue of 8 bits."""

    kind: Literal["imagenet"] = "imagenet"


Normalize = Annotated[Raw | ZScore | ZScoreNonzero | CT | Scale | ImageNet, Field(discriminator="kind")]
KINDS: dict[str, type[Facts]] = {
    str(kind.model_fields["kind"].default): kind for kind in (Raw, ZScore, ZScoreNonzero, CT, Scale, ImageNet)
}
