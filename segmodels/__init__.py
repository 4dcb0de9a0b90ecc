"""WHAT predicts: networks, cards, loaders.

    create(name, **config)       a new network with random weights
    load(name_or_folder)         a Model: network (eval, float32, CPU), card, hash, source
    save(network, card, folder)  a model folder: card.json and weights.safetensors
    list_models(), describe(name)

Importing this package imports neither torch nor pydantic; the first use of a name does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from segmodels.errors import ModelError

if TYPE_CHECKING:
    from segmodels.card import Card
    from segmodels.folder import Model, load, save
    from segmodels.registry import create, describe, list_models

__all__ = ["Card", "Model", "ModelError", "create", "describe", "list_models", "load", "save"]

_HOMES = {
    "Card": "segmodels.card",
    "Model": "segmodels.folder",
    "load": "segmodels.folder",
    "save": "segmodels.folder",
    "create": "segmodels.registry",
    "describe": "segmodels.registry",
    "list_models": "segmodels.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'segmodels' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
