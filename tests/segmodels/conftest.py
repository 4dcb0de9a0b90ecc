"""A small model's card and folder, for the tests of segmodels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from small_models import CARD, small_network

import segmodels


@pytest.fixture
def facts() -> dict[str, Any]:
    """A card as a dict, without network and weights, for the network of `folder`."""
    return copy.deepcopy(CARD)


@pytest.fixture
def folder(tmp_path: Path, facts: dict[str, Any]) -> Path:
    """A whole model folder."""
    segmodels.save(small_network(dims=3, classes=3, widths=[4, 8, 16]), facts, tmp_path / "model")
    return tmp_path / "model"
