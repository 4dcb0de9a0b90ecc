"""Torsos: solids lie as their volumes need, differ by seed, and are the same in every process."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solids import centers, holds

from pipeline.phantoms import LABELS, Phantom, Scanner, phantom
from pipeline.phantoms.body import FIELD_MM, draw_body
from pipeline.phantoms.lattice import Lattice

VALUE = {name: value for value, name in LABELS.items()} | {"": 0}
ROOT = Path(__file__).parents[3]


def misplaced(one: Phantom) -> list[str]:
    """Painted voxel by voxel: parts that would cover anything but what they are painted on."""
    mask, wrong = np.zeros(one.shape, np.uint8), []
    for part, box in one._bounded:
        inside, there = np.ones(box.shape, bool), mask[box.slices]
        for f, _ in part.shape.faces(Lattice(one.affine, box.start, box.stop)):
            inside &= f <= 0
        if not (there[inside] == VALUE[part.within]).all():
            wrong.append(f"{part.structure} on {part.within}")
        there[inside] = VALUE[part.structure]
    return wrong


@settings(max_examples=12)
@given(seed=st.integers(0, 2**63 - 1))
def test_parts_cover_nothing_but_what_they_are_painted_on(seed: int) -> None:
    """So volumes may be added and subtracted. Solids of one structure in one parent are told by the volumes below."""
    one = phantom(seed, (77, 58, 77))
    assert misplaced(one) == []
    assert one.whole == frozenset(LABELS.values())


@pytest.mark.parametrize("seed", [0, 7, 2026])
def test_masks_hold_the_exact_volumes(seed: int) -> None:
    errors = {}
    for spacing in (4.0, 2.0):
        size = tuple(round(n / spacing) for n in reversed(FIELD_MM))
        one = phantom(seed, size, spacing_mm=spacing, scanner=Scanner(0, 0, 0))
        counts = np.bincount(one.region()[1].ravel(), minlength=9)
        truth = one.volumes_ml
        errors[spacing] = {n: counts[v] * spacing**3 / 1000 / truth[n] - 1 for v, n in LABELS.items()}
        assert all(counts[1:] > 100)
    fine = errors[2.0]
    assert max(abs(fine[n]) for n in ("liver", "lungs", "body")) < 0.003
    assert max(map(abs, fine.values())) < 0.015
    assert sum(map(abs, fine.values())) < sum(map(abs, errors[4.0].values()))


def test_volumes_are_the_solids() -> None:
    body = draw_body(3)
    lesions = sum(p.shape.volume_mm3 for p in body.parts if p.structure == "lesions")
    liver = next(p.shape.volume_mm3 for p in body.parts if p.structure == "liver")
    assert body.volumes_ml()["lesions"] == pytest.approx(lesions / 1000)
    assert body.volumes_ml()["liver"] == pytest.approx((liver - lesions) / 1000)
    skin = next(p.shape.volume_mm3 for p in body.parts if p.structure == "body")
    assert sum(body.volumes_ml().values()) == pytest.approx(skin / 1000)


def test_a_voxel_has_the_label_of_what_holds_its_centre() -> None:
    """By the definition of each solid, on an oblique, sheared, left-handed lattice."""
    turn = np.array([[-6.0, 1.5, 0.8], [1.2, 5.2, -1.4], [-0.9, 1.0, 7.1]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn, -turn @ [28, 27, 24]
    one = phantom(11, (49, 55, 57), affine=affine)
    expected, points = np.zeros(one.shape, np.uint8), centers(affine, one.shape)
    for part in one.body.parts:
        expected[holds(part.shape, points)] = VALUE[part.structure]
    _, mask = one.region()
    np.testing.assert_array_equal(mask, expected)
    assert set(np.unique(mask)) == set(range(9))


def test_seeds_make_different_torsos() -> None:
    volumes = np.array([list(draw_body(seed).volumes_ml().values()) for seed in range(30)])
    spread = volumes.std(0) / volumes.mean(0)
    assert (spread > 0.02).all()
    assert spread[1] > 0.2  # lesions
    assert len({draw_body(seed) for seed in range(30)}) == 30


def test_every_process_makes_the_same() -> None:
    code = (
        "import hashlib; from pipeline.phantoms import phantom\n"
        "image, mask = phantom(5, (40, 30, 44)).region()\n"
        "print(hashlib.sha256(image.tobytes() + mask.tobytes()).hexdigest())"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    said = {
        subprocess.run(
            command, cwd=ROOT, env={"PYTHONHASHSEED": s}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for s in ("1", "2")
    }
    image, mask = phantom(5, (40, 30, 44)).region()
    assert said == {hashlib.sha256(image.tobytes() + mask.tobytes()).hexdigest()}
