"""The scores of the learning curve, against sums over the tiles."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from balls import LABELS, ball_folder, ball_job

from pipeline.training.gather import prepare_cases
from pipeline.training.job import make_train_job
from pipeline.training.quality import CURVE_TILES, curve_scorer, validation_tiles


class Bright(torch.nn.Module):
    """Calls what is brighter than the mean label 2 and the rest background: never right, never quite wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([-x * self.scale, torch.full_like(x, -9.0), x], dim=1)


def test_dice_is_over_all_tiles_together(tmp_path: Path) -> None:
    job = make_train_job(ball_job(ball_folder(tmp_path, 8)))
    cases = prepare_cases(job, tmp_path / "model", threading.Event()).validation
    tiles = list(validation_tiles(job, cases, CURVE_TILES))
    found = torch.stack([image[0] > 0 for image, _ in tiles])
    true = torch.stack([labels == 2 for _, labels in tiles])
    scores = curve_scorer(job, cases)(Bright())
    assert scores.keys() == {f"dice {name}" for name in LABELS.values()}
    assert scores["dice lower half"] == 0
    assert scores["dice upper half"] == pytest.approx(2 * float((found & true).sum()) / float(found.sum() + true.sum()))
    assert 0.1 < scores["dice upper half"] < 1
