"""Numbers as people read them."""

from __future__ import annotations

import pytest

from pipeline.report import numbers


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (numbers.fixed(None, 1), "–"),
        (numbers.fixed(float("nan"), 1), "–"),
        (numbers.fixed(-1234.56, 1), "−1,234.6"),
        (numbers.fixed(-0.04, 1), ">−0.1"),
        (numbers.fixed(0.0004, 2), "<0.01"),
        (numbers.fixed(0.0, 2), "0.00"),
        (numbers.fixed(3.2e12, 0), "3.200e+12"),
        (numbers.seconds(0.314), "0.31 s"),
        (numbers.seconds(59.96), "1 min 00 s"),
        (numbers.seconds(7620), "2 h 07 min"),
        (numbers.size(512), "512 B"),
        (numbers.size(1_342_177_280), "1.25 GiB"),
    ],
)
def test_numbers(shown: str, text: str) -> None:
    assert shown == text


@pytest.mark.parametrize(
    ("values", "decimals"), [([1443.1, 55.0], 1), ([1.52, 300.0], 2), ([0.004, 9.0], 3), ([None, 0.0], 1)]
)
def test_volumes_keep_two_figures_of_the_smallest(values: list[float | None], decimals: int) -> None:
    assert numbers.volume_decimals(values) == decimals


@pytest.mark.parametrize(
    ("values", "decimals"), [([52131.0, 1.0], 0), ([101.26, 3.0], 1), ([0.0123], 5), ([None], 1), ([0.0], 1)]
)
def test_measurements_keep_four_figures_of_the_largest(values: list[float | None], decimals: int) -> None:
    assert numbers.measure_decimals(values) == decimals


def test_facts_are_flat_and_plain() -> None:
    settings = {"tile": [48, 64], "train": {"loss": {"name": "dice"}, "mirror": True}, "memory": None}
    assert numbers.facts(settings) == [
        ("tile", "[48, 64]"),
        ("train.loss.name", "dice"),
        ("train.mirror", "yes"),
        ("memory", "–"),
    ]
