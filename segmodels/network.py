"""What every network of the zoo has in common: its facts, and what happens to sizes it cannot divide."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from segmodels import nd
from segmodels.errors import ModelError


class Network(nn.Module):
    """A segmentation network: (N, in_channels, *S) -> (N, classes, *(S - 2 margin)) logits.

    dims: 2 (S is Y, X) or 3 (S is Z, Y, X).
    divisor: the step of its down-sampling grid in voxels, the same on every axis. With margin 0 any size
    from 1
        up is taken: the input grows at the high ends to a multiple of the divisor and the logits are
        cropped back.
    margin: voxels per side by which the output is smaller than the input; above 0 the sizes must be legal,
    that
        is, every pooling sees an even size and at least one voxel comes out. `legal_size` finds the next one.
    architecture, config: what `segmodels.create` was called with, defaults included.
    """

    def __init__(self, *, dims: int, in_channels: int, classes: int, divisor: int, margin: int = 0) -> None:
        super().__init__()
        self.dims, self.in_channels, self.classes = dims, in_channels, classes
        self.divisor, self.margin = divisor, margin
        self.architecture: str = type(self).__name__
        self.config: dict[str, Any] = {}

    @property
    def parts(self) -> Sequence[Network]:
        """The networks whose mean logits are this one's: itself, or the members of an ensemble."""
        return (self,)

    def logits(self, x: Tensor) -> Tensor:
        """The computation itself, for sizes that fit the divisor (margin 0) or are legal (margin above 0)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        self._check_shape(x)
        if self.margin:
            return self.logits(x)
        return nd.crop_high(self.logits(nd.pad_high(x, self.divisor)), x.shape[2:])

    def legal_size(self, size: int) -> int:
        """The smallest input length per axis that is at least `size` and that this network takes."""
        if not self.margin:
            return max(size, 1)
        # Paper's rule for depth 4, "16 m + 188": the input is 4 below a multiple of the divisor.
        size = max(size, 2 * self.margin + 1)
        return size + (-(size + 4)) % self.divisor

    def _check_shape(self, x: Tensor) -> None:
        axes = "(N, C, Y, X)" if self.dims == 2 else "(N, C, Z, Y, X)"
        if x.ndim != self.dims + 2 or x.shape[1] != self.in_channels or 0 in x.shape[2:]:
            raise ModelError(
                f"{self.architecture} got an input of shape {tuple(x.shape)}; expected {axes} with "
                f"C = {self.in_channels} channels and at least one voxel per axis"
            )
        if self.margin and any(n != self.legal_size(n) for n in x.shape[2:]):
            nearby = tuple(self.legal_size(n) for n in x.shape[2:])
            raise ModelError(
                f"{self.architecture} with padding 'valid' got an input of {_sizes(x.shape[2:])}; each axis "
                f"must be a multiple of {self.divisor} minus 4 and above {2 * self.margin} (output = input - "
                f"{2 * self.margin}); the next legal size is {_sizes(nearby)}"
            )


class Ladder(Network):
    """Encoder down, decoder up, with a rung between them at every level: the shape of the U-Net family.

    encoder[l] maps level l-1 to level l (the first one: the input to level 0) and does its own down-sampling;
    ups[j] brings the deep map up by 2; decoder[j] maps the concatenation (skip first) of the next-shallower
    level.
    """

    def __init__(
        self,
        *,
        encoder: Sequence[nn.Module],
        ups: Sequence[nn.Module],
        decoder: Sequence[nn.Module],
        head: nn.Module,
        dims: int,
        in_channels: int,
        classes: int,
        margin: int = 0,
    ) -> None:
        super().__init__(dims=dims, in_channels=in_channels, classes=classes, divisor=2 ** len(ups), margin=margin)
        self.encoder, self.ups = nn.ModuleList(encoder), nn.ModuleList(ups)
        self.decoder, self.head = nn.ModuleList(decoder), head

    def logits(self, x: Tensor) -> Tensor:
        levels: list[Tensor] = []
        for down in self.encoder:
            x = down(x)
            levels.append(x)
        x = levels.pop()
        for up, block in zip(self.ups, self.decoder, strict=True):
            x = up(x)
            skip = nd.crop_centre(levels.pop(), x.shape[2:])
            x = block(torch.cat([skip, x], dim=1))
        y: Tensor = self.head(x)
        return y


def rungs(widths: Sequence[int]) -> list[tuple[int, int]]:
    """(deep, shallow) channel pairs from the bottom up: (64, 128, 256) gives (256, 128), (128, 64)."""
    return [(deep, shallow) for shallow, deep in reversed(list(pairwise(widths)))]


def _sizes(sizes: Sequence[int]) -> str:
    return "x".join(str(n) for n in sizes)
