"""ResUNet, the deep residual U-Net (Zhang, Liu, Wang 2018, arXiv:1711.10684)."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from segmodels import nd
from segmodels.blocks import Residual, norm_act_conv
from segmodels.network import Ladder, Network, rungs
from segmodels.registry import Channels, Config, Dims, Norm, Widths, register


def _divisor(config: Config) -> int:
    return 1 << (len(config["widths"]) - 1)


def _no_margin(config: Config) -> int:
    return 0


def _reach(config: Config) -> int | None:
    if config["norm"] in ("instance", "group"):
        return None
    # 5 * 2^d - 1 to the left and 4 * 2^d to the right (7 and 6 for d = 1), rounded up to the divisor.
    return 5 * _divisor(config)


@register(
    "resunet",
    dims=(2, 3),
    paper="Zhang, Liu, Wang 2018, arXiv:1711.10684",
    summary="ResUNet: pre-activated residual units, strided convolutions down, nearest neighbour up, skips",
    divisor=_divisor,
    margin=_no_margin,
    reach=_reach,
    params=(
        ({"in_channels": 3, "classes": 1, "widths": [64, 128, 256, 512]}, 8_223_809),
        ({"dims": 3, "in_channels": 3, "classes": 1, "widths": [64, 128, 256, 512]}, 23_783_873),
        ({"widths": [64, 128, 256, 512]}, 8_222_594),
        ({"dims": 3, "widths": [64, 128, 256, 512]}, 23_780_354),
        ({"dims": 3, "classes": 1, "widths": [64, 128, 256, 512]}, 23_780_289),
        ({"widths": [32, 64, 128, 256]}, 2_059_202),
        ({"dims": 3, "widths": [32, 64, 128, 256]}, 5_948_930),
        ({"widths": [16, 32, 64, 128]}, 516_578),
        ({"dims": 3, "widths": [16, 32, 64, 128]}, 1_489_154),
        ({"widths": [8, 16, 32, 64]}, 130_034),
        ({"dims": 3, "widths": [8, 16, 32, 64]}, 373_250),
        ({"widths": [8, 16, 32]}, 31_826),
        ({"dims": 3, "widths": [8, 16, 32]}, 90_722),
    ),
)
def resunet(
    dims: Dims = 2,
    in_channels: Channels = 1,
    classes: Channels = 2,
    widths: Widths = (64, 128, 256, 512),
    norm: Norm = "batch",
) -> Network:
    """The ResUNet. Shortcuts are a 1x1 convolution and a normalisation, strided where the branch is.

    The paper leaves the shortcut open where the shape changes; this is the common reading, and its count
    (8,223,809 for 3 -> 1) is the published 7.8 million of the main path plus 434,496 for the shortcuts.
    Convolutions have a bias throughout.
    """

    def shortcut(i: int, o: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(nd.conv(dims, i, o, kernel=1, stride=stride), nd.norm(norm, dims, o))

    def unit(i: int, o: int, stride: int = 1) -> Residual:
        branch = nn.Sequential(
            norm_act_conv(dims, i, o, norm=norm, stride=stride), norm_act_conv(dims, o, o, norm=norm)
        )
        return Residual(branch, shortcut(i, o, stride))

    first = widths[0]
    stem = Residual(
        nn.Sequential(nd.conv(dims, in_channels, first), norm_act_conv(dims, first, first, norm=norm)),
        shortcut(in_channels, first),
    )
    return Ladder(
        encoder=[stem, *(unit(i, o, stride=2) for i, o in pairwise(widths))],
        ups=[nn.Upsample(scale_factor=2, mode="nearest") for _ in rungs(widths)],
        decoder=[unit(shallow + deep, shallow) for deep, shallow in rungs(widths)],
        head=nd.conv(dims, first, classes, kernel=1),
        dims=dims,
        in_channels=in_channels,
        classes=classes,
    )
