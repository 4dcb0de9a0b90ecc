"""U-Net (Ronneberger et al. 2015, arXiv:1505.04597) and 3D U-Net (Cicek et al. 2016, arXiv:1606.06650)."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from segmodels import nd
from segmodels.blocks import conv_norm_act
from segmodels.errors import ModelError
from segmodels.network import Ladder, Network, rungs
from segmodels.registry import Channels, Config, Dims, Norm, Padding, Widths, register

# Two convolutions of reach 1 on either side of every down- and up-sampling of the d levels; the sums below
# were checked against brute force over every phase of the pooling grid (see the tests, which do it again).


def valid_margin(depth: int) -> int:
    """Voxels that unpadded convolutions cost per side: 6 * 2^d - 4 (92 for depth 4, 44 for depth 3)."""
    return 6 * (1 << depth) - 4


def _depth(config: Config) -> int:
    return len(config["widths"]) - 1


def _divisor(config: Config) -> int:
    return 1 << _depth(config)


def _margin(config: Config) -> int:
    return valid_margin(_depth(config)) if config["padding"] == "valid" else 0


def _reach(config: Config) -> int | None:
    if config["norm"] in ("instance", "group"):
        return None
    # 6 * 2^d - 2 (8 for d = 1), rounded up to the divisor: the first multiple is 6 * 2^d in every case.
    return 6 * _divisor(config)


@register(
    "unet",
    dims=(2, 3),
    paper="Ronneberger, Fischer, Brox 2015, arXiv:1505.04597",
    summary="U-Net: two convolutions per level, max-pooling down, transposed convolutions up, skips",
    divisor=_divisor,
    margin=_margin,
    reach=_reach,
    params=(
        ({"widths": [64, 128, 256, 512, 1024], "padding": "valid", "norm": "none"}, 31_030_658),
        ({"dims": 3, "widths": [64, 128, 256, 512, 1024], "padding": "valid", "norm": "none"}, 90_292_738),
        ({"in_channels": 3, "widths": [64, 128, 256, 512, 1024]}, 31_037_698),
        ({"widths": [32, 64, 128, 256, 512]}, 7_762_498),
        ({"dims": 3, "widths": [32, 64, 128, 256, 512]}, 22_578_306),
        ({"widths": [8, 16, 32], "norm": "none"}, 29_330),
        ({"dims": 3, "widths": [8, 16, 32], "norm": "none"}, 85_026),
    ),
)
def unet(
    dims: Dims = 2,
    in_channels: Channels = 1,
    classes: Channels = 2,
    widths: Widths = (64, 128, 256, 512, 1024),
    padding: Padding = "same",
    norm: Norm = "batch",
) -> Network:
    """The U-Net. padding "valid" and norm "none" is the paper's; "same" and "batch" is what most people run.

    Convolutions have a bias only where no normalisation follows; transposed ones always.
    """

    def double(i: int, o: int) -> nn.Sequential:
        return nn.Sequential(
            conv_norm_act(dims, i, o, norm=norm, padding=padding, bias=norm == "none"),
            conv_norm_act(dims, o, o, norm=norm, padding=padding, bias=norm == "none"),
        )

    network = Ladder(
        encoder=[
            double(in_channels, widths[0]),
            *(nn.Sequential(nd.max_pool(dims), double(i, o)) for i, o in pairwise(widths)),
        ],
        ups=[nd.up_conv(dims, deep, shallow) for deep, shallow in rungs(widths)],
        decoder=[double(2 * shallow, shallow) for _, shallow in rungs(widths)],
        head=nd.conv(dims, widths[0], classes, kernel=1),
        dims=dims,
        in_channels=in_channels,
        classes=classes,
        margin=valid_margin(len(widths) - 1) if padding == "valid" else 0,
    )
    he_init(network)
    return network


@register(
    "unet3d",
    dims=(2, 3),
    paper="Cicek, Abdulkadir, Lienkamp, Brox, Ronneberger 2016, arXiv:1606.06650",
    summary="3D U-Net: channels double before the pooling, the up-convolutions keep them",
    divisor=_divisor,
    margin=_margin,
    reach=_reach,
    params=(
        ({"in_channels": 3, "classes": 3, "norm": "none"}, 19_069_955),
        ({"in_channels": 3, "classes": 3, "norm": "batch"}, 19_074_627),
    ),
)
def unet3d(
    dims: Dims = 3,
    in_channels: Channels = 1,
    classes: Channels = 2,
    widths: Widths = (64, 128, 256, 512),
    padding: Padding = "same",
    norm: Norm = "batch",
) -> Network:
    """The 3D U-Net; `widths` are the channels that leave each level (its first convolution has half of them).

    Convolutions have a bias whether or not batch norm follows, transposed ones have none: with that the
    count is the paper's 19,069,955 to the unit.
    """
    if widths[0] % 2:
        raise ModelError(f"unet3d: the first of widths={list(widths)} must be even: its first convolution has half")

    def pair(i: int, mid: int, o: int) -> nn.Sequential:
        return nn.Sequential(
            conv_norm_act(dims, i, mid, norm=norm, padding=padding, bias=True),
            conv_norm_act(dims, mid, o, norm=norm, padding=padding, bias=True),
        )

    network = Ladder(
        encoder=[
            pair(in_channels, widths[0] // 2, widths[0]),
            *(nn.Sequential(nd.max_pool(dims), pair(i, i, o)) for i, o in pairwise(widths)),
        ],
        ups=[nd.up_conv(dims, deep, deep, bias=False) for deep, _ in rungs(widths)],
        decoder=[pair(shallow + deep, shallow, shallow) for deep, shallow in rungs(widths)],
        head=nd.conv(dims, widths[0], classes, kernel=1),
        dims=dims,
        in_channels=in_channels,
        classes=classes,
        margin=valid_margin(len(widths) - 1) if padding == "valid" else 0,
    )
    he_init(network)
    return network


def he_init(network: nn.Module) -> None:
    """Weights from N(0, sqrt(2 / fan_in)), as the U-Net paper asks (He et al. 2015); biases zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
