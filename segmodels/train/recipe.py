"""The recipe: everything that decides how a network is trained, as users write it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from segmodels.kinds import Positive, Real

Share = Annotated[Real, Field(ge=0, le=1)]
Whole = Annotated[int, Field(strict=True, ge=1)]
Span = tuple[Annotated[Real, Field(ge=0)], Annotated[Real, Field(ge=0)]]


class Part(BaseModel):
    """A part of a recipe: frozen, and no field that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="after")
    def _spans_ascend(self) -> Part:
        for name in type(self).model_fields:
            value = getattr(self, name)
            span = isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, float) for v in value)
            if span and value[0] > value[1]:
                raise ValueError(f"{name} goes from the smaller to the larger number, got {list(value)}")
        return self


class Augment(Part):
    """Random changes of the samples. A probability of 0 switches one off."""

    rotate: Share = Field(0.3, description="probability of a rotation about all three axes")
    rotate_degrees: Annotated[Real, Field(ge=0, le=180)] = Field(25.0, description="largest angle about each axis")
    scale: Share = Field(0.3, description="probability of a change of size")
    scale_range: tuple[Positive, Positive] = Field((0.75, 1.3), description="factors of size, drawn evenly in log")
    elastic: Share = Field(0.3, description="probability of a smooth deformation")
    elastic_mm: Annotated[Real, Field(ge=0)] = Field(2.0, description="standard deviation of its control points")
    elastic_grid_mm: Positive = Field(16.0, description="distance of its control points")
    flip_axes: tuple[Annotated[int, Field(strict=True, ge=0, le=2)], ...] | None = Field(
        None, description="axes (0 = z) along which samples are mirrored half of the time; default: mirror_axes"
    )
    noise: Share = Field(0.15, description="probability of gaussian noise")
    noise_std: Span = Field((0.0, 0.3), description="its standard deviation, of normalised intensities")
    blur: Share = Field(0.15, description="probability of gaussian smoothing")
    blur_sigma: Span = Field((0.5, 1.0), description="its sigma in voxels")
    brightness: Share = Field(0.15, description="probability that intensities are multiplied")
    brightness_range: tuple[Positive, Positive] = Field((0.75, 1.25), description="by a factor from this range")
    contrast: Share = Field(0.15, description="probability that the spread about the mean is multiplied")
    contrast_range: tuple[Positive, Positive] = Field((0.75, 1.25), description="by a factor from this range")
    low_resolution: Share = Field(0.15, description="probability that a sample is made of fewer voxels")
    low_resolution_range: tuple[Positive, Positive] = Field((0.5, 1.0), description="share of the voxels per axis")
    gamma: Share = Field(0.3, description="probability of a gamma curve, mean and spread kept")
    gamma_range: tuple[Positive, Positive] = Field((0.7, 1.5), description="its exponent")
    gamma_invert: Share = Field(0.25, description="share of the gamma curves that act on the negative image")


UNCHANGED = Augment(
    rotate=0.0, scale=0.0, elastic=0.0, noise=0.0, blur=0.0, brightness=0.0, contrast=0.0, low_resolution=0.0,
    gamma=0.0, flip_axes=(),
)  # fmt: skip


class Recipe(Part):
    """How a network is trained. `steps` or `minutes` must be given; with both, what ends first ends it."""

    patch: Annotated[tuple[Whole, ...], Field(min_length=2, max_length=3)] | None = Field(
        None, description="voxels of a sample along z,y,x, or y,x for networks of planes; default: the tile"
    )
    batch: Whole = Field(4, description="samples per step")
    steps: Whole | None = Field(None, description="optimiser steps")
    minutes: Positive | None = Field(None, description="time budget; the learning rate is at its end when it is")
    seed: Annotated[int, Field(strict=True, ge=0)] = Field(0, description="of weights, samples and order")
    foreground: Share = Field(0.5, description="share of the samples that are centred on a structure")
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Positive = Field(1e-3, description="the highest")
    warmup: Share = Field(0.02, description="share of the training in which the learning rate rises")
    weight_decay: Annotated[Real, Field(ge=0)] = 1e-2
    momentum: Share = Field(0.99, description="of sgd, which is Nesterov's")
    clip: Positive | None = Field(12.0, description="largest norm of the gradient; null: none")
    averaging: Annotated[Real, Field(ge=0, lt=1)] = Field(
        0.999, description="decay of the moving average of the weights that is kept; 0: the last weights are"
    )
    dice_weight: Annotated[Real, Field(ge=0)] = 1.0
    cross_entropy_weight: Annotated[Real, Field(ge=0)] = 1.0
    deep_supervision: Annotated[bool, Field(strict=True)] = Field(False, description="losses at coarser levels too")
    teacher_weight: Share = Field(0.5, description="share of the loss that a teacher has, where the job names one")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device has it")
    compile: Literal["auto", "yes", "no"] = Field(
        "no", description="torch.compile; auto: on a GPU, from a budget of ten minutes"
    )
    readers: Annotated[int, Field(strict=True, ge=0, le=64)] | None = Field(
        None, description="processes that make samples; default: none on a CPU, one per core (at most 8) on a GPU"
    )
    checkpoint_minutes: Positive = Field(1.0, description="what a kill can cost")
    validations: Annotated[int, Field(strict=True, ge=0, le=1000)] = Field(
        20, description="how often the validation cases are scored for the learning curve; they choose nothing"
    )
    augment: Augment = Augment()

    @model_validator(mode="after")
    def _ends(self) -> Recipe:
        if self.steps is None and self.minutes is None:
            raise ValueError("give steps or minutes: how long to train")
        if self.dice_weight == self.cross_entropy_weight == 0:
            raise ValueError("dice_weight and cross_entropy_weight are both 0: nothing is left to learn from")
        return self
