"""Shapes at any size, margins and reaches by probing, tiles that equal the whole."""

from __future__ import annotations

import pytest
import torch
from small_models import ARCHITECTURES
from small_models import small_network as network
from torch import Tensor, nn

from segmodels import ModelError, create
from segmodels.network import Network
from segmodels.registry import spec

WIDTHS = {1: [4, 6], 2: [4, 6, 8], 3: [2, 2, 2, 4], 4: [2, 2, 2, 2, 2]}


@pytest.mark.parametrize("norm", ["batch", "instance", "group", "none"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "size",
    [(1, 1), (1, 7), (8, 8), (9, 31), (2, 3, 5), (1, 1, 1), (8, 4, 12)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_same_padding_keeps_any_size(name: str, norm: str, size: tuple[int, ...]) -> None:
    net = network(name, dims=len(size), in_channels=2, classes=3, widths=WIDTHS[2], norm=norm)
    with torch.no_grad():
        y = net(torch.randn(2, 2, *size))
    assert y.shape == (2, 3, *size)
    assert torch.isfinite(y).all()


def test_the_padding_repeats_the_last_voxel_at_the_high_end() -> None:
    net = network("resunet", widths=WIDTHS[2], norm="batch")
    x = torch.randn(1, 1, 5, 8)
    grown = torch.cat([x, x[:, :, -1:].expand(1, 1, 3, 8)], dim=2)
    with torch.no_grad():
        assert torch.equal(net(x), net(grown)[:, :, :5])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_step_of_training_moves_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    net = create(name, dims=2, widths=WIDTHS[2], norm="group").train()
    net(torch.randn(2, 1, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_instance_norm_is_torchs_and_takes_a_single_voxel() -> None:
    from segmodels import nd

    ours, theirs = nd.norm("instance", 3, 5), nn.InstanceNorm3d(5, affine=True)
    x = torch.randn(2, 5, 3, 4, 5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert isinstance(ours, nd.GroupNorm)
    nn.init.constant_(ours.bias, 0.25)
    assert torch.equal(ours(torch.full((2, 5, 1, 1, 1), 1e6)), torch.full((2, 5, 1, 1, 1), 0.25))


@pytest.mark.parametrize(("depth", "margin", "legal"), [(1, 8, 18), (2, 20, 44), (3, 44, 92), (4, 92, 188)])
@pytest.mark.parametrize("name", ["unet", "unet3d"])
def test_valid_sizes(name: str, depth: int, margin: int, legal: int) -> None:
    net = network(name, dims=2, widths=WIDTHS[depth], padding="valid", norm="none")
    assert (net.margin, net.legal_size(1), net.legal_size(legal)) == (margin, legal, legal)
    assert net.legal_size(legal + 1) == legal + 2**depth
    with torch.no_grad():
        for n in (legal, legal + 2**depth):
            assert net(torch.randn(1, 1, legal, n)).shape == (1, 2, legal - 2 * margin, n - 2 * margin)
        for n in range(legal - 2**depth, legal + 2 ** (depth + 1)):
            if n not in (legal, legal + 2**depth):
                with pytest.raises(ModelError, match=f"next legal size is {legal}x{net.legal_size(n)}"):
                    net(torch.randn(1, 1, legal, n))


def test_the_papers_sizes() -> None:
    with torch.device("meta"):
        net = create("unet", widths=[2, 2, 2, 2, 2], padding="valid", norm="none")
        cicek = create("unet3d", in_channels=3, classes=3, padding="valid")
        assert net(torch.empty(1, 1, 572, 572)).shape == (1, 2, 388, 388)
        assert cicek(torch.empty(1, 3, 116, 132, 132)).shape == (1, 3, 28, 44, 44)


@pytest.mark.parametrize("x", [torch.zeros(1, 1, 8), torch.zeros(1, 2, 8, 8), torch.zeros(1, 1, 0, 8)])
def test_a_wrong_input_is_told_what_is_expected(x: Tensor) -> None:
    with pytest.raises(ModelError, match=r"expected \(N, C, Y, X\) with C = 1"):
        network("unet", widths=[2, 2])(x)


def positive_and_linear(net: Network) -> Network:
    """Weights 1 / fan-in, no bias, mean for maximum: with positive input all that is read leaves a trace."""
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.MaxPool2d):
                setattr(parent, name, nn.AvgPool2d(2))
    for key, p in net.named_parameters():
        nn.init.constant_(p, 0.0 if key.endswith("bias") else 1.0 / p[0].numel())
    return net.double()


def extent(net: Network, size: int, low: int, high: int) -> tuple[int, int]:
    """First and last input column that output columns low..high-1 read."""
    x = torch.ones(1, 1, size, size, dtype=torch.float64, requires_grad=True)
    net(x)[..., low:high].sum().backward()
    assert x.grad is not None
    read = x.grad.abs().sum(dim=(0, 1, 2)).nonzero().flatten()
    return int(read[0]), int(read[-1])


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reach_by_probing(name: str, depth: int) -> None:
    net = positive_and_linear(network(name, dims=2, widths=WIDTHS[depth], norm="none"))
    step, reach = net.divisor, spec(name).reach(net.config)
    assert reach is not None
    start = 8 * step
    first, last = extent(net, 17 * step, start, start + step)
    left, right = start - first, last - (start + step - 1)
    if name == "resunet":
        expected = (7, 6) if depth == 1 else (5 * step - 1, 4 * step)
    else:
        expected = (8, 8) if depth == 1 else (6 * step - 2, 6 * step - 2)
    assert (left, right) == expected
    assert max(expected) <= reach


@pytest.mark.parametrize("name", ["unet", "unet3d"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_valid_margin_by_probing(name: str, depth: int) -> None:
    net = positive_and_linear(network(name, dims=2, widths=WIDTHS[depth], norm="none", padding="valid"))
    size = net.legal_size(1) + net.divisor
    assert extent(net, size, 0, size - 2 * net.margin) == (0, size - 1)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_aligned_tiles_with_the_reach_as_halo_equal_the_whole(name: str, dims: int) -> None:
    net = network(name, dims=dims, widths=WIDTHS[1] if dims == 3 else WIDTHS[2]).double()
    step, halo = net.divisor, spec(name).reach(net.config)
    assert halo is not None
    other = (1, 1, *[8] * (dims - 1))
    x = torch.randn(*other, 4 * halo, dtype=torch.float64)
    with torch.no_grad():
        whole = net(x)
        a, b = 2 * halo - step, 2 * halo + step
        tile = net(x[..., a - halo : b + halo])[..., halo : halo + b - a]
        torch.testing.assert_close(tile, whole[..., a:b], rtol=0, atol=1e-12)
        shifted = net(x[..., a - halo + 1 : b + halo + 1])[..., halo : halo + b - a]
    assert (shifted - whole[..., a + 1 : b + 1]).abs().max() > 1e-6  # out of phase with the pooling grid


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_halo_one_step_shorter_is_too_short(name: str) -> None:
    net = positive_and_linear(network(name, dims=2, widths=WIDTHS[2], norm="none"))
    step, halo = net.divisor, (spec(name).reach(net.config) or 0) - net.divisor
    x = torch.rand(1, 1, 8, 20 * step, dtype=torch.float64)
    a, b = 10 * step, 11 * step
    with torch.no_grad():
        tile = net(x[..., a - halo : b + halo])[..., halo : halo + step]
        assert (tile - net(x)[..., a:b]).abs().max() > 1e-9


def test_valid_tiles_of_a_mirrored_image_equal_the_whole() -> None:
    net = network("unet", widths=WIDTHS[2], padding="valid", norm="none").double()
    m, step = net.margin, net.divisor
    out = 12 * step + 4
    image = torch.randn(1, 1, out, out, dtype=torch.float64)
    mirrored = nn.functional.pad(image, [m] * 4, mode="reflect")
    with torch.no_grad():
        whole = net(mirrored)
        assert whole.shape[2:] == image.shape[2:]
        for top in range(0, out - 20 + 1, 4 * step):
            for left in range(0, out - 20 + 1, 4 * step):
                tile = net(mirrored[..., top : top + 20 + 2 * m, left : left + 20 + 2 * m])
                torch.testing.assert_close(tile, whole[..., top : top + 20, left : left + 20], rtol=0, atol=1e-12)
