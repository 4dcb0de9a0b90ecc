"""The convolution blocks that networks are made of."""

from __future__ import annotations

from torch import Tensor, nn

from segmodels import nd


def conv_norm_act(dims: int, i: int, o: int, *, norm: str, padding: str, bias: bool) -> nn.Sequential:
    """conv3, normalisation, ReLU: the step of the U-Nets."""
    return nn.Sequential(nd.conv(dims, i, o, padding=padding, bias=bias), nd.norm(norm, dims, o), nn.ReLU(inplace=True))


def norm_act_conv(dims: int, i: int, o: int, *, norm: str, stride: int = 1) -> nn.Sequential:
    """Normalisation, ReLU, conv3: the pre-activated step of He et al. 2016 (arXiv:1603.05027)."""
    # Not in place: with norm="none" it would overwrite the input that the shortcut still needs.
    return nn.Sequential(nd.norm(norm, dims, i), nn.ReLU(), nd.conv(dims, i, o, stride=stride))


class Residual(nn.Module):
    """branch(x) + shortcut(x), and nothing after the sum."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branch(x) + self.shortcut(x)
        return y
