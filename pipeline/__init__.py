"""WHAT HAPPENS to one study: read, plan, tile, predict, stitch, write, measure, export."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import plan, segment

__all__ = ["plan", "segment"]


def __getattr__(name: str) -> Any:
    """Import late: torch, zarr and nibabel are loaded when something is called."""
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
