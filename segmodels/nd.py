"""Layers in 2 and 3 dimensions: the only file that knows which class of torch goes with which `dims`.

Tensors are (N, C, Y, X) for dims 2 and (N, C, Z, Y, X) for dims 3, any floating dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_UP = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def conv(
    dims: int, i: int, o: int, kernel: int = 3, *, stride: int = 1, padding: str = "same", bias: bool = True
) -> nn.Module:
    """A convolution of odd `kernel`; padding "same" keeps n at stride 1 and gives ceil(n / 2) at stride 2."""
    pad = kernel // 2 if padding == "same" else 0
    return _CONV[dims](i, o, kernel, stride=stride, padding=pad, bias=bias)


def up_conv(dims: int, i: int, o: int, *, bias: bool = True) -> nn.Module:
    """A transposed convolution, kernel 2, stride 2: it doubles every axis, and its cells never overlap."""
    return _UP[dims](i, o, 2, stride=2, bias=bias)


def max_pool(dims: int) -> nn.Module:
    """The maximum of every cell of 2 voxels per axis."""
    return _POOL[dims](2)


def norm(kind: str, dims: int, channels: int) -> nn.Module:
    """ "batch", "instance", "group" (8 groups where the channels allow it) or "none" (the identity)."""
    if kind == "batch":
        return _BATCH_NORM[dims](channels)
    if kind == "instance":
        return GroupNorm(channels, channels)
    if kind == "group":
        return GroupNorm(gcd(8, channels), channels)
    return nn.Identity()


class GroupNorm(nn.Module):
    """Group normalisation (Wu and He 2018); with one channel per group it is instance normalisation.

    Unlike torch's two classes it takes a group of one single value (the bottom of a deep network on a small
    tile): its deviation from its own mean is zero, so the answer is the bias.
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:].numel() * x.shape[1] == self.groups:
            return x * 0 + self.bias.reshape(-1, *[1] * (x.ndim - 2))
        return torch.group_norm(x, self.groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.groups} groups, {self.weight.numel()} channels"


def pad_high(x: Tensor, divisor: int) -> Tensor:
    """`x` grown at the high end of every spatial axis to a multiple of `divisor`, the last voxel repeated."""
    grow = [-n % divisor for n in x.shape[2:]]
    if not any(grow):
        return x
    pad = [amount for n in reversed(grow) for amount in (0, n)]
    return F.pad(x, pad, mode="replicate")


def crop_high(x: Tensor, size: Sequence[int]) -> Tensor:
    """The low corner of `x`, of spatial shape `size`: what undoes `pad_high`."""
    return x[(slice(None), slice(None), *(slice(0, n) for n in size))]


def crop_centre(x: Tensor, size: Sequence[int]) -> Tensor:
    """The middle of `x`, of spatial shape `size`; the differences must be even (the valid U-Net's are)."""
    starts = [(have - want) // 2 for have, want in zip(x.shape[2:], size, strict=True)]
    return x[(slice(None), slice(None), *(slice(a, a + n) for a, n in zip(starts, size, strict=True)))]
