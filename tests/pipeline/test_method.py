"""How card and job settle the tiles: what exact stitching is given, and when it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from block_helpers import card_facts, grid_over, random_network

import segmodels
from pipeline.errors import StudyError, UsageError
from pipeline.job import make_job
from pipeline.method import resolve_method
from pipeline.tiling import Tiling


def method(folder: Path, network: dict[str, Any], card: dict[str, Any] | None = None, **job: Any) -> Any:
    made = random_network(**network)
    segmodels.save(made, card_facts(made, **(card or {})), folder / "model")
    return resolve_method(make_job({"inputs": ["in"], "model": str(folder / "model"), "out": "out", **job}))


RESUNET = {"name": "resunet", "dims": 3, "classes": 3, "widths": [4, 8, 16]}  # divisor 4, reach 20


def test_tiles_of_four_halos_or_more_are_taken_as_they_are(tmp_path: Path) -> None:
    found = method(tmp_path, RESUNET, {"tile": [83, 96, 128]}, stitch="exact")
    assert found.tiling == Tiling((80, 96, 128), 0.0, (0, 0, 0), "exact", (4, 4, 4), (20, 20, 20))
    assert "overlap" not in found.settings


def test_smaller_ones_become_four_halos(tmp_path: Path) -> None:
    assert method(tmp_path, RESUNET, {"tile": [32, 64, 96]}, stitch="exact").tiling.window == (80, 80, 96)


def test_tiles_that_the_user_gave_will_do_for_studies_that_fit(tmp_path: Path) -> None:
    found = method(tmp_path, RESUNET, stitch="exact", tile="42,40,64")
    assert found.tiling.window == (40, 40, 64)
    assert grid_over((38, 40, 90), found.tiling).window == (40, 40, 64)
    with pytest.raises(
        StudyError, match="needs tiles of 44 voxels or more along an axis that is longer than one, got 40"
    ):
        grid_over((41, 40, 90), found.tiling)


def test_a_small_study_is_one_tile_of_its_size(tmp_path: Path) -> None:
    found = method(tmp_path, RESUNET, {"tile": [32, 64, 96]}, stitch="exact")
    grid = grid_over((9, 30, 70), found.tiling)
    assert (grid.tiles, grid.window) == (1, (12, 32, 72))


def test_a_2d_network_has_no_halo_between_planes(tmp_path: Path) -> None:
    found = method(tmp_path, {**RESUNET, "dims": 2}, {"tile": [80, 80]}, stitch="exact")
    assert found.tiling == Tiling((1, 80, 80), 0.0, (0, 0, 0), "exact", (1, 4, 4), (0, 20, 20))


def test_an_unpadded_network_has_its_margin_for_a_halo(tmp_path: Path) -> None:
    network = {"name": "unet", "dims": 3, "classes": 3, "widths": [4, 8], "padding": "valid"}
    found = method(tmp_path, network, {"tile": [28, 32, 28]}, stitch="exact")
    assert found.tiling == Tiling((28, 32, 28), 0.0, (8, 8, 8), "exact", (2, 2, 2))
    assert found.tiling.fill == "reflect"


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_a_network_that_normalises_over_its_tile_is_refused(tmp_path: Path, norm: str) -> None:
    with pytest.raises(UsageError, match="normalises over the whole tile"):
        method(tmp_path, {**RESUNET, "norm": norm}, stitch="exact")


def test_a_card_that_does_not_list_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not allow --stitch exact \(gaussian\)"):
        method(tmp_path, RESUNET, {"stitch": ["gaussian"]}, stitch="exact")


def test_an_overlap_has_no_place_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="every voxel is answered once"):
        method(tmp_path, RESUNET, stitch="exact", overlap=0.5)


def test_an_unpadded_network_needs_a_step_of_its_grid(tmp_path: Path) -> None:
    network = {"name": "unet", "dims": 2, "classes": 2, "widths": [4, 4, 4, 4], "padding": "valid", "norm": "none"}
    with pytest.raises(UsageError, match=r"needs tiles of 100 voxels or more of this network, got \[1, 92, 92\]"):
        method(tmp_path, network, {"tile": [92, 92]}, stitch="exact")


def test_a_card_may_ask_for_nnunets_way(tmp_path: Path) -> None:
    found = method(tmp_path, RESUNET, {"stitch": ["nnunet"], "overlap": 0.5})
    assert found.tiling.stitch == found.settings["stitch"] == "nnunet"
    assert found.tiling.fill == "zero"
