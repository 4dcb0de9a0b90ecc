"""Voxels to cells and back, against SciPy on whole arrays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates, zoom

from pipeline import ome
from pipeline.grid import Box, Triple
from pipeline.lattice import Lattice
from pipeline.normalize import Affine
from pipeline.planning import HEADROOM
from pipeline.resample import ResampledRows, VoxelRows, axis_matrix
from pipeline.uncertainty import CHUNK


@given(source=st.integers(1, 80), target=st.integers(1, 80), seed=st.integers(0, 9))
def test_an_axis_is_scipys_zoom(source: int, target: int, seed: int) -> None:
    line = np.random.default_rng(seed).normal(size=source)
    for order, close in ((1, 1e-12), (3, 1e-6)):
        found = axis_matrix(source, target, order) @ line
        expected = zoom(line, target / source, order=order, mode="nearest", grid_mode=True)
        if len(expected) == target:  # zoom rounds the size itself
            assert np.abs(found - expected).max() < close
    where = (np.arange(target) + 0.5) * source / target - 0.5
    nearest = map_coordinates(line, [where], order=0, mode="nearest")
    halves = np.isclose(where % 1, 0.5)  # where a rounding error decides for SciPy
    assert np.array_equal((axis_matrix(source, target, 0) @ line)[~halves], nearest[~halves])


def test_as_many_cells_as_voxels_are_the_voxels() -> None:
    for order in (0, 1, 3):
        assert np.array_equal(axis_matrix(7, 7, order).toarray(), np.eye(7))


def test_a_constant_stays_one_to_the_last_bit_but_one() -> None:
    for target in (3, 33, 61, 200):
        assert np.abs(axis_matrix(61, target, 3) @ np.ones(61) - 1).max() < 1e-15


def stored(folder: Path, voxels: np.ndarray) -> Any:
    names = ome.axis_names(voxels.ndim == 4)
    array = ome.create_array(str(folder), voxels.shape, (8, 16, 16), voxels.dtype, names)
    array[...] = voxels
    return ome.open_array(str(folder))


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("cells", [(31, 40, 17), (9, 13, 60), (19, 21, 46), (1, 5, 23)])
def test_rows_are_those_of_the_whole_volume_resampled(tmp_path: Path, cells: Triple, order: int) -> None:
    shape = (19, 26, 23)
    voxels = np.random.default_rng(1).integers(-1000, 1000, (2, *shape)).astype(np.int16)
    normal = (voxels.astype(np.float64) - 3) / 200
    ratio = [m / n for n, m in zip(shape, cells, strict=True)]
    expected = np.stack([zoom(c, ratio, order=order, mode="nearest", grid_mode=True) for c in normal])
    lattice = Lattice(shape, cells, orders=(order,) * 3)
    normalizers = [Affine(3.0, 200.0)] * 2
    whole = ResampledRows(stored(tmp_path / "a", voxels), normalizers, lattice, slice(0, cells[1]), slice(0, cells[2]))
    rows = np.stack([whole.row(z) for z in range(cells[0])], 1)
    assert rows.dtype == np.float32
    assert np.abs(rows - expected).max() < 1e-6 * np.abs(expected).max() + 1e-6

    # Any part of it, from any row on, has the same bits.
    y, x = slice(cells[1] // 3, cells[1] // 3 + 2), slice(cells[2] // 2, cells[2] // 2 + 3)
    part = ResampledRows(stored(tmp_path / "b", voxels), normalizers, lattice, y, x)
    for z in range(cells[0] // 2, cells[0]):
        assert np.array_equal(part.row(z), rows[:, z, y, x])
    assert np.array_equal(part.row(0), rows[:, 0, y, x])


def test_only_the_rows_that_are_still_needed_are_held(tmp_path: Path) -> None:
    voxels = np.ones((64, 16, 16), np.float32)
    lattice = Lattice(voxels.shape, (128, 16, 16), orders=(3, 3, 3))
    rows = ResampledRows(stored(tmp_path / "a", voxels), [Affine()], lattice, slice(0, 16), slice(0, 16))
    for z in range(128):
        rows.row(z)
        assert len(rows.planes) <= 26


@pytest.mark.parametrize(("cells", "nearest"), [
    ((31, 40, 17), (False, False, False)), ((9, 13, 60), (True, False, False)), ((19, 26, 46), (False, True, False)),
    ((1, 1, 1), (False, False, False)), ((50, 3, 23), (False, False, True)),
])  # fmt: skip
def test_logits_come_back_as_scipy_interpolates_them(cells: Triple, nearest: tuple[bool, bool, bool]) -> None:
    shape = (19, 26, 23)
    logits = np.random.default_rng(2).normal(size=(3, *cells)).astype(np.float32)
    expected = logits.astype(np.float64)
    for axis, (n, m, near) in enumerate(zip(shape, cells, nearest, strict=True), 1):
        where = (np.arange(n) + 0.5) * m / n - 0.5
        if near:
            expected = expected.take(np.floor(where + 0.5).clip(0, m - 1).astype(int), axis)
        elif n != m:
            expected = np.apply_along_axis(
                lambda line, at=where: map_coordinates(line, [at], order=1, mode="nearest"), axis, expected
            )
    lattice = Lattice(shape, cells, nearest=nearest)
    for block in (Box((0, 0, 0), shape), Box((3, 8, 5), (11, 17, 23)), Box((18, 0, 22), (19, 26, 23))):
        box = lattice.box(block)
        rows = VoxelRows(lattice, block, "cpu")
        found = []
        for z in range(box.start[0], box.stop[0]):
            found += list(rows.add(z, torch.from_numpy(logits[(slice(None), z, *box.slices[1:])].copy())))
        assert [z for z, _ in found] == list(range(block.start[0], block.stop[0]))
        answer = torch.stack([row for _, row in found], 1).numpy()
        assert np.abs(answer - expected[(slice(None), *block.slices)]).max() < 1e-6
        if block.start == (0, 0, 0):
            whole = answer
        assert np.array_equal(answer, whole[(slice(None), *block.slices)]), "the same bits in any block"


ROWS = """
import sys, torch
from pipeline.engine import peak_rss, reset_peak_rss
from pipeline.grid import Box
from pipeline.lattice import Lattice
from pipeline.resample import VoxelRows

def back(depth, cells, voxels, fields):
    lattice = Lattice((6, voxels, voxels), (depth, cells, cells))
    rows = VoxelRows(lattice, Box((0, 0, 0), lattice.voxels), "cpu")
    sums, weights = torch.ones(1).expand(fields, cells, cells), torch.ones(cells, cells)
    for cell_row in range(depth):
        for _, row in rows.add(cell_row, sums / weights):
            pass

depth, cells, voxels, fields = map(int, sys.argv[1:])
back(depth, 64, 48, fields)  # what torch loads for it
reset_peak_rss()
before = peak_rss()
back(depth, cells, voxels, fields)
print(peak_rss() - before)
"""


@pytest.mark.parametrize(("depth", "cells", "voxels"), [(12, 480, 48), (12, 480, 448), (6, 128, 448)])
def test_rows_on_their_way_back_take_no_more_than_is_planned(depth: int, cells: int, voxels: int) -> None:
    """Of the larger side a row is more than 32 MiB: what glibc always gives back as soon as it is free."""
    fields = 46  # 44 classes, disagreement, weights
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", ROWS, *map(str, (depth, cells, voxels, fields))],
        cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    planned = 4 * (fields + 1) * (4 * cells**2 + 2 * voxels**2 + 2 * voxels) + 16 * CHUNK
    assert int(ran.stdout) < HEADROOM * planned
