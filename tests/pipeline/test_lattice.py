"""The lattice of a study: nnU-Net's sizes, nibabel's orientations, and which cells a voxel is made of."""

from __future__ import annotations

import itertools
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from block_helpers import card_facts, random_network
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import StudyError
from pipeline.grid import Box
from pipeline.lattice import Lattice, View, lattice_of
from segmodels.card import Card, parse

CODES = ["".join(code) for axes in itertools.permutations(["LR", "AP", "SI"]) for code in itertools.product(*axes)]


def card(**facts: Any) -> Card:
    network = random_network("unet", dims=facts.pop("dims", 3), classes=2, widths=[2, 4])
    reference = {"name": network.architecture, "config": network.config}
    return parse({"network": reference, **card_facts(network, **facts)})


def affine_of(code: str, spacing_xyz: tuple[float, float, float] = (0.7, 0.8, 2.5)) -> np.ndarray:
    """An affine whose voxel axes x,y,z point as `code` says."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for stored, (letter, size) in enumerate(zip(code, spacing_xyz, strict=True)):
        world = next(i for i, pair in enumerate(("LR", "PA", "IS")) if letter in pair)
        affine[world, stored] = size if letter in "RAS" else -size
    affine[:3, 3] = 5
    assert "".join(nib.orientations.aff2axcodes(affine)) == code
    return affine


@pytest.mark.parametrize("wanted", ["RAS", "LPS", "PSL", "IAR"])
def test_the_network_sees_what_nibabel_would_turn_it_to(wanted: str) -> None:
    assert len(CODES) == 48
    voxels = np.arange(3 * 4 * 5).reshape(3, 4, 5)  # x,y,z
    for code in CODES:
        image = nib.Nifti1Image(voxels.astype(np.int16), affine_of(code))
        turn = nib.orientations.ornt_transform(
            nib.orientations.io_orientation(image.affine), nib.orientations.axcodes2ornt(wanted)
        )
        expected = np.asarray(image.as_reoriented(turn).dataobj).T
        lattice = lattice_of((5, 4, 3), image.affine, card(orientation=wanted))
        turned = lattice.view.turned(voxels.T)
        assert np.array_equal(turned, expected), code
        assert lattice.view.seen((5, 4, 3)) == expected.shape
        assert lattice.view.stored(expected.shape) == (5, 4, 3)
        assert np.array_equal(lattice.view.turned_back(torch.from_numpy(turned.copy())), voxels.T), code


def test_without_an_orientation_nothing_is_turned() -> None:
    assert lattice_of((5, 4, 3), affine_of("PIL"), card()).view == View()


def test_an_oblique_study_is_turned_to_the_nearest_axes() -> None:
    turn = np.array([[0.9, -0.3, 0.3], [0.3, 0.95, 0.1], [-0.3, 0.0, 0.95]])
    affine = affine_of("LPS")
    affine[:3, :3] = turn @ affine[:3, :3]
    assert lattice_of((5, 4, 3), affine, card(orientation="RAS")).view == View((0, 1, 2), (False, True, True))


@given(
    shape=st.tuples(*[st.integers(1, 700)] * 3),
    spacing=st.tuples(*[st.floats(0.2, 6)] * 3),
    wanted=st.tuples(*[st.sampled_from([0.5, 1.0, 1.5, 3.0])] * 3),
)
def test_sizes_are_nnunets(shape: tuple[int, int, int], spacing: tuple[float, ...], wanted: tuple[float, ...]) -> None:
    lattice = lattice_of(shape, np.diag([*spacing[::-1], 1.0]), card(spacing_mm=list(wanted)))
    expected = [round(s / t * n) for n, s, t in zip(shape, spacing, wanted, strict=True)]
    for found, other, n, s, t in zip(lattice.cells, expected, shape, spacing, wanted, strict=True):
        halfway = abs((s * n / t) % 1 - 0.5) < 1e-9  # where two ways to write one product may round apart
        assert found == max(other, 1) or halfway


def test_spacing_follows_the_networks_axes() -> None:
    facts = card(orientation="RAS", spacing_mm=[2.5, 1.6, 0.35])
    lattice = lattice_of((10, 20, 30), affine_of("SRA", (2.5, 0.7, 0.8)), facts)  # x is S, y is R, z is A
    assert lattice.view.axes == (2, 0, 1)
    assert lattice.cells == (round(10 * 0.8 / 1.6), 20 * 2, 30)


def test_a_2d_network_leaves_the_axis_across_as_it_is() -> None:
    lattice = lattice_of((7, 40, 50), np.diag([0.5, 0.5, 4, 1]), card(dims=2, spacing_mm=[1, 1]))
    assert lattice.cells == (7, 20, 25)
    sagittal = lattice_of((7, 40, 50), np.diag([0.5, 0.5, 4, 1]), card(dims=2, spacing_mm=[1, 1], orientation="ASR"))
    assert sagittal.view.axes == (2, 0, 1)
    assert sagittal.cells == (28, 20, 50)


@pytest.mark.parametrize(("spacing", "wanted", "into", "back"), [
    ((5, 1, 1), (1, 1, 1), 0, 0),  # coarse study
    ((1, 1, 1), (5, 1, 1), 0, 0),  # coarse cells
    ((1, 5, 1), (4, 1, 1), 1, 0),  # each by its own
    ((3, 1, 1), (1, 1, 1), None, None),  # not more than three times
    ((5, 5, 1), (1, 1, 1), None, None),  # a tie
    ((5, 4.9999, 1), (1, 1, 1), None, None),  # a tie in a header that rounds
    ((5, 5, 1), (4, 1, 1), None, 0),  # a tie, and the cells' axis is for the way back alone
    ((5, 1, 1), (1, 4, 4), 0, None),
])  # fmt: skip
def test_a_coarse_axis_takes_the_nearest(spacing: Any, wanted: Any, into: int | None, back: int | None) -> None:
    lattice = lattice_of((40, 40, 40), np.diag([*spacing[::-1], 1.0]), card(spacing_mm=list(wanted)))
    assert lattice.orders == tuple(0 if axis == into else 3 for axis in range(3))
    assert lattice.nearest == tuple(axis == back for axis in range(3))


@pytest.mark.parametrize("spacing", [(100, 1, 1), (1, 0.01, 1)])
def test_a_spacing_that_cannot_be_meant_is_refused(spacing: tuple[float, ...]) -> None:
    with pytest.raises(StudyError, match="unit") as caught:
        lattice_of((40, 40, 40), np.diag([*spacing[::-1], 1.0]), card(spacing_mm=[1, 1, 1]))
    assert caught.value.cause == "geometry"


@given(voxels=st.integers(1, 60), cells=st.integers(1, 60), nearest=st.booleans(), data=st.data())
def test_the_span_of_voxels_holds_all_cells_that_they_need(
    voxels: int, cells: int, nearest: bool, data: st.DataObject
) -> None:
    lattice = Lattice((voxels,) * 3, (cells,) * 3, nearest=(nearest,) * 3)
    begin = data.draw(st.integers(0, voxels - 1))
    end = data.draw(st.integers(begin + 1, voxels))
    below, above, share = lattice.neighbours(1, begin, end)
    assert lattice.span(1, begin, end) == (below.min(), above.max() + 1)
    assert lattice.box(Box((begin,) * 3, (end,) * 3)).stop == (above.max() + 1,) * 3
    exact = ((np.arange(begin, end) + 0.5) * cells / voxels - 0.5).clip(0, cells - 1)
    if nearest and voxels != cells:
        assert np.abs(below - exact).max() <= 0.5 + 1e-9
    else:
        assert np.allclose(below + share, exact)
    assert ((above == below + 1) == (share > 0)).all()
