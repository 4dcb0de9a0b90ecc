"""WHAT HAPPENS to one study: read, plan, tile, predict, stitch, write, measure, export."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import plan, segment
    from .evaluation import evaluate

__all__ = ["evaluate", "plan", "segment"]

_HOMES = {"evaluate": "evaluation", "plan": "api", "segment": "api"}


def __getattr__(name: str) -> Any:
    """Import late: torch, zarr and nibabel are loaded when something is called."""
    if name in __all__:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
