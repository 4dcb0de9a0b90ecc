"""The loss against its formula, deep supervision against the levels of the decoder."""

from __future__ import annotations

import pytest
import torch
from training_cases import quick

import segmodels
from segmodels.errors import ModelError
from segmodels.train.loss import Supervised, distance_from, make_loss


def test_dice_and_cross_entropy_by_their_formulas() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64), torch.randint(0, 3, (2, 4, 5, 6))
    p = torch.softmax(logits, 1)
    y = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).double()
    over = (0, 2, 3, 4)
    dice = (2 * (p * y).sum(over) + 1e-5) / (p.sum(over) + y.sum(over) + 1e-5)
    entropy = -(y * p.log()).sum(1).mean()
    for weights in ((1.0, 1.0), (0.5, 2.0)):
        loss = make_loss(quick(dice_weight=weights[0], cross_entropy_weight=weights[1]))
        expected = weights[0] * (1 - dice[1:]).mean() + weights[1] * entropy
        assert float(loss([logits], labels)) == pytest.approx(float(expected), abs=1e-6)


def test_deep_supervision_has_a_loss_at_every_level_of_the_decoder() -> None:
    torch.manual_seed(0)
    network = segmodels.create("resunet", dims=3, in_channels=1, classes=3, widths=[4, 8, 16, 32])
    supervised = Supervised(network, deep=True)
    x = torch.randn(2, 1, 16, 16, 8)
    with torch.no_grad():
        levels = supervised(x)
    assert [tuple(level.shape) for level in levels] == [(2, 3, 16, 16, 8), (2, 3, 8, 8, 4), (2, 3, 4, 4, 2)]
    labels = torch.randint(0, 3, (2, 16, 16, 8))
    loss = make_loss(quick())
    parts = [
        float(loss([level], labels[:, :: 2**i, :: 2**i, :: 2**i] if i == 0 else _coarse(labels, i)))
        for i, level in enumerate(levels)
    ]
    weighed = sum(part * 0.5**i for i, part in enumerate(parts)) / 1.75
    assert float(loss(levels, labels)) == pytest.approx(weighed, rel=1e-5)
    loss(supervised(x), labels).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in supervised.heads.parameters())


def _coarse(labels: torch.Tensor, level: int) -> torch.Tensor:
    step = 2**level
    return labels[:, step // 2 :: step, step // 2 :: step, step // 2 :: step]


def test_deep_supervision_where_it_cannot_be() -> None:
    valid = segmodels.create("unet", dims=2, padding="valid", widths=[4, 8])
    with pytest.raises(ModelError, match="deep_supervision"):
        Supervised(valid, deep=True)


def test_the_distance_from_a_teacher() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 2, 3, 4, 5, 6, dtype=torch.float64)
    assert float(distance_from(teacher, teacher)) == pytest.approx(0, abs=1e-12)
    p, q = torch.softmax(teacher, 1), torch.softmax(student, 1)
    assert float(distance_from(teacher, student)) == pytest.approx(float((p * (p / q).log()).sum(1).mean()))
