"""Job files: what contradicts itself is named before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from balls import ball_job

from pipeline.errors import UsageError
from pipeline.training.job import make_train_job

RECIPE: dict[str, Any] = {"steps": 10}


def network(**config: Any) -> dict[str, Any]:
    return {"name": "resunet", "config": {"dims": 3, "in_channels": 1, "classes": 3, "widths": [4, 8]} | config}


FLAT: dict[str, Any] = {"tile": [16, 16], "network": network(dims=2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": network(classes=2)}, "2 labels are listed, but a softmax network of 2 classes has 1"),
        ({"network": network(in_channels=2)}, "1 channels are listed, the network takes 2"),
        ({"network": network(dims=2)}, "axes 'zyx' do not fit a 2-D network"),
        ({"network": {"name": "resnet", "config": {}}}, "resnet"),
        ({"network": network(widths=[4, 8, 16, 32, 64, 128])}, "multiples of 32"),
        ({"labels": {1: "a", 3: "b"}}, 'labels must be "1" to "2"'),
        ({"labels": {1: "a", 2: "a"}}, "two labels are called 'a'"),
        ({"recipe": {"batch": 2}}, "give steps or minutes"),
        ({"recipe": RECIPE | {"patch": [9, 16, 16]}}, "multiples of 2"),
        (
            {"recipe": RECIPE | {"learning_rte": 1.0}},
            "unknown setting 'recipe.learning_rte'. Did you mean 'learning_rate'",
        ),
        ({"recipe": RECIPE | {"augment": {"rotat": 1.0}}}, "Did you mean 'rotate'"),
        ({"recipe": RECIPE | {"augment": {"scale_range": [2.0, 1.0]}}}, "from the smaller to the larger"),
        ({"recipe": RECIPE | {"dice_weight": 0.0, "cross_entropy_weight": 0.0}}, "nothing is left to learn from"),
        ({"recipe": RECIPE | {"learning_rate": -1.0}}, "recipe.learning_rate"),
        ({"data": {"images": "x"}}, "either masks"),
        ({"data": {"images": "x", "masks": "y", "label_image": "z"}}, "either masks"),
        ({"data": {"images": [], "masks": "y"}}, "at least one"),
        ({"split": {"validation": 1.0}}, "split.validation"),
        ({"members_by": "folds"}, "at least 2 members"),
        ({"mirror_axes": [3]}, "mirror_axes"),
        ({"recipe": RECIPE | {"augment": {"noise_std": [-0.3, -0.1]}}}, "noise_std"),
        ({"recipe": RECIPE | {"patch": [16, 16]}}, "fewer axes than the tile"),
        (FLAT | {"recipe": RECIPE | {"patch": [4, 16, 16]}}, "more axes than the tile"),
        ({"recipe": RECIPE | {"patch": [2, 2, 2], "batch": 1}}, "leaves batch normalisation a single value"),
        (
            {
                "recipe": RECIPE | {"deep_supervision": True},
                "network": {"name": "ensemble", "config": {"members": 2, "network": network()}},
            },
            "deep_supervision is not possible with ensemble",
        ),
        ({"name": None}, "name: Field required"),
        ({"name": "a/b"}, "name"),
        ({"nmae": "x"}, "Did you mean 'name'"),
        ({"normalize": [{"kind": "zscroe"}]}, "normalize"),
    ],
)
def test_a_job_that_contradicts_itself(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        make_train_job({k: v for k, v in (ball_job(tmp_path) | changes).items() if v is not None})
    assert "\n" not in str(caught.value)


def test_the_patch_of_a_network_of_planes_has_two_numbers(tmp_path: Path) -> None:
    job = make_train_job(ball_job(tmp_path, **FLAT, recipe=RECIPE | {"patch": [8, 16]}))
    assert job.patch == (1, 8, 16)


def test_what_only_the_card_says_does_not_decide_what_is_learned(tmp_path: Path) -> None:
    job = make_train_job(ball_job(tmp_path))
    for changes in ({"version": "2"}, {"weights": "fp16"}, {"overlap": 0.25}, {"licence": "MIT"}):
        other = make_train_job(ball_job(tmp_path, **changes))
        assert other.lesson == job.lesson
        assert other.fingerprint != job.fingerprint
    for changes in ({"split": {"seed": 1}}, {"members": 2}, {"recipe": {"steps": 11}}, {"labels": {1: "a", 2: "b"}}):
        assert make_train_job(ball_job(tmp_path, **changes)).lesson != job.lesson


def test_what_decides_the_answer_decides_the_fingerprint(tmp_path: Path) -> None:
    job = make_train_job(ball_job(tmp_path))
    same = make_train_job(ball_job(tmp_path, threads=2, engine="serial"))
    assert job.fingerprint == same.fingerprint
    for changes in ({"version": "2"}, {"split": {"seed": 1}}, {"members": 2}, {"recipe": {"steps": 11}}):
        assert make_train_job(ball_job(tmp_path, **changes)).fingerprint != job.fingerprint
