"""Expected calibration error against a direct computation, voxel by voxel and bin by bin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from segmodels import ModelError
from segmodels.calibration import CalibrationSums, calibration_sums, expected_calibration_error, merge


def case(seed: int, classes: int = 3, sharpness: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((classes, 6, 7, 8), generator=generator) * sharpness
    return logits, torch.randint(0, classes, (6, 7, 8), generator=generator)


def direct(logits: np.ndarray, labels: np.ndarray) -> float:
    """As the paper writes it: sum over bins of |B| / n |accuracy(B) - confidence(B)|."""
    probabilities = softmax(logits.reshape(len(logits), -1).astype(np.float64), axis=0)
    truth = labels.ravel()
    chosen = [
        (float(column.max()), int(column.argmax()) == int(t))
        for column, t in zip(probabilities.T, truth, strict=True)
        if t > 0 or column.argmax() > 0
    ]
    total = 0.0
    for i in range(15):
        inside = [(c, ok) for c, ok in chosen if i / 15 < c <= (i + 1) / 15]
        if inside:
            accuracy = sum(ok for _, ok in inside) / len(inside)
            confidence = sum(c for c, _ in inside) / len(inside)
            total += len(inside) / len(chosen) * abs(accuracy - confidence)
    return total


@settings(max_examples=15)
@given(seed=st.integers(0, 99), classes=st.integers(2, 6), sharpness=st.sampled_from([0.1, 1.0, 5.0, 50.0]))
def test_it_is_the_papers(seed: int, classes: int, sharpness: float) -> None:
    logits, labels = case(seed, classes, sharpness)
    found = expected_calibration_error(calibration_sums(logits, labels))
    assert found == pytest.approx(direct(logits.numpy(), labels.numpy()), abs=1e-12)


def test_a_calibrated_network_has_none_and_a_boaster_all() -> None:
    """Of 4 voxels with confidence 3/4 three are right; then of 4 with confidence 1 none."""
    odds = torch.tensor([[1.0] * 4, [3.0] * 4]).log()
    assert expected_calibration_error(calibration_sums(odds, torch.tensor([1, 1, 1, 0]))) == pytest.approx(0, abs=1e-7)
    sure = torch.tensor([[0.0] * 4, [100.0] * 4])
    assert expected_calibration_error(calibration_sums(sure, torch.tensor([0] * 4))) == pytest.approx(1)


def test_background_that_nobody_doubts_does_not_count() -> None:
    logits, labels = case(1)
    around = torch.zeros(3, 6, 7, 50)
    around[0] = 20
    more = calibration_sums(torch.cat([logits, around], -1), torch.cat([labels, torch.zeros(6, 7, 50).long()], -1))
    assert expected_calibration_error(more) == expected_calibration_error(calibration_sums(logits, labels))
    assert expected_calibration_error(calibration_sums(around, torch.zeros(6, 7, 50).long())) is None


def test_cases_merge_as_if_they_were_one() -> None:
    cases = [case(seed) for seed in range(4)]
    joined = calibration_sums(torch.cat([a for a, _ in cases], 1), torch.cat([b for _, b in cases]))
    merged = merge(calibration_sums(*one) for one in cases)
    assert np.array_equal(merged.voxels, joined.voxels)
    assert np.array_equal(merged.right, joined.right)
    assert merged.confidence == pytest.approx(joined.confidence, rel=1e-12)
    assert expected_calibration_error(merge([])) is None
    assert isinstance(merged, CalibrationSums)


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        (torch.zeros(3, 4, 5), torch.zeros(4, 4).long(), r"\(3, 4, 5\) and \(4, 4\)"),
        (torch.zeros(3, 0), torch.zeros(0).long(), "shapes"),
        (torch.zeros(3, 4), torch.zeros(4), "labels of torch.float32"),
        (torch.zeros(3, 4), torch.tensor([0, 1, 2, 3]), "labels from 0 to 3; a network of 3 classes knows 0 to 2"),
        (torch.zeros(3, 4), torch.tensor([0, -1, 2, 1]), "labels from -1"),
    ],
    ids=range(5),
)
def test_what_does_not_fit_is_refused(logits: torch.Tensor, labels: torch.Tensor, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        calibration_sums(logits, labels)
