"""Label colours: distinct, stable, told apart by colour-blind eyes, seen on grey."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.colors import DISTINCT, label_colors

# Machado, Oliveira and Fernandes (2009), severity 1.0, over linear RGB, row by row
BLINDNESS = {
    "protan": [0.152286, 1.052583, -0.204868, 0.114503, 0.786281, 0.099216, -0.003882, -0.048116, 1.051998],
    "deutan": [0.367322, 0.860646, -0.227968, 0.280085, 0.672501, 0.047413, -0.011820, 0.042940, 0.968881],
    "tritan": [1.255528, -0.076749, -0.178779, -0.078411, 0.930809, 0.147602, 0.004733, 0.691367, 0.303900],
}


def test_a_label_keeps_its_colour_whatever_the_number_of_labels() -> None:
    long = label_colors(300)
    for n in (0, 1, 8, 9, 62):
        assert label_colors(n) == long[:n]


def test_colours_are_distinct_and_bytes() -> None:
    colors = label_colors(DISTINCT)
    assert len(set(colors)) == DISTINCT
    assert all(0 <= value <= 255 for color in colors for value in color)
    assert all(max(color) - min(color) > 20 for color in colors), "a grey label hides in a grey scan"


def test_more_labels_than_colours_repeat() -> None:
    assert label_colors(65535)[DISTINCT] == label_colors(1)[0]


def test_sixty_labels_stay_apart() -> None:
    colors = np.array(label_colors(62), float)
    distance = np.linalg.norm(colors[:, None] - colors[None], axis=-1)
    assert distance[~np.eye(62, dtype=bool)].min() > 30


@pytest.mark.parametrize("kind", BLINDNESS)
def test_the_first_eight_are_told_apart_by_colour_blind_eyes(kind: str) -> None:
    linear = (np.array(label_colors(8)) / 255) ** 2.2
    seen = np.clip(linear @ np.reshape(BLINDNESS[kind], (3, 3)).T, 0, 1) ** (1 / 2.2) * 255
    distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
    assert distance[~np.eye(8, dtype=bool)].min() > 25


def test_a_negative_number_of_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="negative, got -1"):
        label_colors(-1)
