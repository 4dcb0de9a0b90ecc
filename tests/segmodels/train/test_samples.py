"""Samples are functions of seed and number, use every case once per epoch and lie where they should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_cases import ball_cases, quick, write_case

from segmodels.train.cases import PLACES, PlacesSampler
from segmodels.train.recipe import Augment
from segmodels.train.samples import Samples, batches, cut


def test_a_sample_is_a_function_of_its_number(tmp_path: Path) -> None:
    cases = ball_cases(tmp_path, 3)
    recipe = quick(augment=Augment())
    first, second = (Samples(cases, recipe, (8, 8, 8), (2,)) for _ in range(2))
    forward = [first[i] for i in range(8)]
    backward = [second[i] for i in reversed(range(8))][::-1]
    for (a, b, c), (d, e, f) in zip(forward, backward, strict=True):
        assert torch.equal(a, d)
        assert torch.equal(b, e)
        assert c == f
    assert len({a.numpy().tobytes() for a, _, _ in forward}) == 8
    other = Samples(cases, recipe.model_copy(update={"seed": 1}), (8, 8, 8), (2,))
    assert not torch.equal(other[0][0], forward[0][0])


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # two readers where there is one core
def test_other_processes_make_the_same_samples(tmp_path: Path) -> None:
    samples = Samples(ball_cases(tmp_path, 3), quick(augment=Augment()), (8, 8, 8), ())
    here, there = (list(batches(samples, 1, 4, readers)) for readers in (0, 2))
    assert len(here) == 3
    for (a, b, names), (c, d, others) in zip(here, there, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
        assert names == others


def test_every_case_once_per_epoch_in_a_new_order(tmp_path: Path) -> None:
    samples = Samples(ball_cases(tmp_path, 5), quick(), (8, 8, 8), ())
    epochs = [[samples.case_of(i) for i in range(5 * e, 5 * e + 5)] for e in range(6)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize(("share", "least", "most"), [(1.0, 1.0, 1.0), (0.0, 0.0, 0.2)])
def test_foreground_share(tmp_path: Path, share: float, least: float, most: float) -> None:
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[30:33, 5:8, 20:23] = 1
    case = write_case(tmp_path / "one", labels[None], labels, (1.0, 1.0, 1.0))
    samples = Samples([case], quick(foreground=share), (8, 8, 8), ())
    hit = np.mean([bool(samples[i][1].any()) for i in range(60)])
    assert least <= hit <= most


@settings(max_examples=40, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 12)] * 3), patch=st.tuples(*[st.integers(1, 12)] * 3), seed=st.integers(0, 99))
def test_cut_equals_padding_and_slicing(shape: tuple, patch: tuple, seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = random.integers(1, 9, shape)
    starts = [int(random.integers(min(0, n - p), max(0, n - p) + 1)) for n, p in zip(shape, patch, strict=True)]
    centre = [s + (p - 1) / 2 for s, p in zip(starts, patch, strict=True)]
    voxels, chosen = cut(labels[None].astype(np.float32), labels, centre, patch)
    padded = np.pad(labels, 12)
    expected = padded[tuple(slice(s + 12, s + 12 + p) for s, p in zip(starts, patch, strict=True))]
    np.testing.assert_array_equal(chosen, expected)
    np.testing.assert_array_equal(voxels[0], expected)


def test_places_are_all_or_an_even_choice() -> None:
    labels = np.zeros((60, 50, 40), np.uint16)
    labels[:, :, :30] = 1
    labels[5, 6, 7] = 300
    sampler = PlacesSampler()
    for z in range(0, 60, 7):
        sampler.add(labels[z : z + 7], z)
    places = sampler.finish()
    assert places[300].tolist() == [[5, 6, 7]]
    assert len(places[1]) == PLACES == len(np.unique(places[1], axis=0))
    assert (labels[tuple(places[1].T)] == 1).all()
    assert abs(places[1][:, 0].mean() - 29.5) < 1
    assert abs(places[1][:, 2].mean() - 14.5) < 0.5
