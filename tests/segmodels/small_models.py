"""Small networks with nothing at its neutral value, and a card for one of them."""

from __future__ import annotations

from typing import Any

import torch

from segmodels import create
from segmodels.network import Network
from segmodels.registry import MODULES

ARCHITECTURES = [name for name in MODULES if name != "ensemble"]  # what has layers of its own

CARD: dict[str, Any] = {
    "name": "tiny-resunet",
    "version": "1.0.0",
    "axes": "zyx",
    "channels": ["MR"],
    "orientation": None,
    "spacing_mm": None,
    "normalize": [{"kind": "zscore"}],
    "tile": [16, 24, 16],
    "overlap": 0.5,
    "activation": "softmax",
    "labels": {"1": {"name": "anterior"}, "2": {"name": "posterior"}},
}


def small_network(name: str = "resunet", **config: Any) -> Network:
    """In eval mode; biases and running statistics are random too, so that nothing is at its neutral value."""
    torch.manual_seed(7)
    network = create(name, **config)
    for key, tensor in network.state_dict().items():
        if key.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.1)
        elif key.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    return network.eval()
