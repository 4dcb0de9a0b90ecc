"""The loop learns, stops, goes on exactly where a kill ended it, and says what went wrong."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_cases import ball_case, ball_cases, quick

import segmodels
from segmodels.errors import ModelError
from segmodels.network import Network
from segmodels.train import checkpoint
from segmodels.train.loop import Task, Training, learning_rate, train
from segmodels.train.loss import TrainingError

PATCH = (16, 16, 16)


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return segmodels.create("resunet", dims=3, in_channels=1, classes=3, widths=[4, 8, 8])


def task(tmp_path: Path, **changes: object) -> Task:
    cases = ball_cases(tmp_path / "cases", 4) if not (tmp_path / "cases").exists() else ()
    return Task(network(), cases, quick(**changes), PATCH, (), tmp_path / "work", threads=1)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = checkpoint.read(folder)
    assert state is not None
    kept: dict[str, torch.Tensor] = state["kept"]
    return kept


def test_it_learns(tmp_path: Path) -> None:
    given = task(tmp_path, steps=120, validations=4)
    unseen = ball_case(tmp_path / "unseen", 99)

    def dice(trained: torch.nn.Module) -> dict[str, float]:
        with torch.inference_mode():
            found = trained(torch.from_numpy(unseen.image().copy())[None]).argmax(1)[0].numpy()
        true = unseen.labels()
        return {
            f"dice {k}": 2 * ((found == k) & (true == k)).sum() / ((found == k).sum() + (true == k).sum())
            for k in (1, 2)
        }

    ended = train(given, validate=dice)
    assert ended.step == 120
    scores = [row for row in ended.rows if "dice 1" in row]
    assert len(scores) == 4
    assert len(ended.rows) >= 20
    assert min(scores[-1]["dice 1"], scores[-1]["dice 2"]) > 0.85
    assert ended.rows[-1]["loss"] < ended.rows[0]["loss"] / 2
    assert ended.rows[-1]["learning_rate"] < 1e-5


KILLED = """
import os, signal, sys
sys.path += {paths!r}
from pathlib import Path
from test_loop import network, PATCH
from training_cases import quick
from segmodels.train.cases import Case
from segmodels.train.loop import Task, train
folder = Path({folder!r})
cases = tuple(Case(p.name, p, (1.0, 1.0, 1.0)) for p in sorted((folder / "cases").iterdir()))
def observe(training, progress):
    if training.step == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
from segmodels.train.recipe import Augment
recipe = quick(steps=30, checkpoint_minutes=1e-4, augment=Augment(), deep_supervision=True)
train(Task(network(), cases, recipe, PATCH, (2,), folder / {work!r}, threads=1), observe=observe)
"""


def run_killed(folder: Path, work: str, at: int) -> int:
    here = Path(__file__)
    script = KILLED.format(paths=[str(here.parent), str(here.parents[3])], folder=str(folder), work=work, at=at)
    environment = {**os.environ, "PYTHONPATH": str(here.parents[3])}
    return subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode


def test_killed_trainings_end_with_the_same_weights(tmp_path: Path) -> None:
    ball_cases(tmp_path / "cases", 3)
    assert run_killed(tmp_path, "whole", -1) == 0
    for at in (7, 8, 23):
        assert run_killed(tmp_path, "killed", at) == -signal.SIGKILL
        state = checkpoint.read(tmp_path / "killed")
        assert state is not None
        assert 0 < state["step"] < at
    assert run_killed(tmp_path, "killed", -1) == 0
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_the_seed_decides_all_weights(tmp_path: Path) -> None:
    """Also those of the heads of deep supervision, whatever was drawn in this process before."""
    given = task(tmp_path, steps=5, deep_supervision=True)
    first = train(given)
    assert len(first.supervised.heads) == 1
    torch.rand(7)
    second = train(replace(given, network=network(), folder=tmp_path / "again"))
    one, two = first.supervised.state_dict(), second.supervised.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_scoring_does_not_touch_the_training(tmp_path: Path) -> None:
    given = task(tmp_path, steps=6, validations=6, deep_supervision=True)
    calls = []

    def score(kept: torch.nn.Module) -> dict[str, float]:
        calls.append(kept(torch.zeros(1, 1, *PATCH)).shape)
        return {}  # nothing to score on these tiles

    ended = train(given, validate=score)
    assert len(calls) == ended.scored == 6
    assert not ended.supervised._coarse


def test_a_training_of_a_gpu_is_no_training_of_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = task(tmp_path, steps=2)
    train(given)
    path = given.folder / checkpoint.FILE
    state = torch.load(path, weights_only=True)
    state["way"]["device"] = "cuda"
    torch.save(state, path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match="began on a GPU and there is none here"):
        train(replace(given, network=network()))


def test_sgd_without_momentum(tmp_path: Path) -> None:
    assert train(task(tmp_path, steps=2, optimizer="sgd", momentum=0.0)).step == 2


def test_a_stop_keeps_the_state(tmp_path: Path) -> None:
    stop = threading.Event()

    def observe(training: Training, _: float) -> None:
        if training.step == 5:
            stop.set()

    given = task(tmp_path)
    ended = train(given, stop=stop, observe=observe)
    assert ended.step == 5
    assert ended.progress(given.recipe) < 1
    again = train(replace(given, network=network(1)))
    assert again.step == 40


def test_minutes_end_it_with_the_learning_rate_at_its_end(tmp_path: Path) -> None:
    given = task(tmp_path, steps=None, minutes=0.05)
    began = time.monotonic()
    ended = train(given)
    assert 2.5 < time.monotonic() - began < 60
    assert ended.step > 3
    assert ended.optimizer.param_groups[0]["lr"] < 0.2 * given.recipe.learning_rate


def test_the_smallest_budget_is_one_step(tmp_path: Path) -> None:
    assert train(task(tmp_path, steps=None, minutes=1e-9)).step == 1


def test_the_learning_rate_rises_and_falls() -> None:
    recipe = quick(warmup=0.1, learning_rate=1.0)
    rates = [learning_rate(recipe, i / 100) for i in range(101)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)


def test_the_average_is_the_recursion_of_the_weights(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    def observe(training: Training, _: float) -> None:
        seen.append(next(training.supervised.network.parameters()).detach().clone())

    given = task(tmp_path, steps=12, averaging=0.6)
    expected = next(network().parameters()).detach().clone()
    ended = train(given, observe=observe)
    for step, last in enumerate(seen, 1):
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * last
    torch.testing.assert_close(next(ended.kept.parameters()).detach(), expected)
    last_only = train(
        replace(given, network=network(), folder=tmp_path / "other", recipe=quick(steps=3, averaging=0.0))
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            last_only.kept.state_dict().values(), last_only.supervised.network.state_dict().values(), strict=True
        )
    )


def test_a_loss_that_is_no_number_names_the_cases_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    given = task(tmp_path, steps=40, learning_rate=1e-3, checkpoint_minutes=1e-6)
    poisoned = ball_case(tmp_path / "poisoned", 7)
    image = poisoned.image().copy()
    image[...] = math.inf
    np.save(poisoned.folder / "image.npy", image)
    with pytest.raises(TrainingError, match=r"at step \d+, with samples of .*poisoned.*: look at these"):
        train(replace(given, cases=(*given.cases, poisoned)))
    assert all(torch.isfinite(t).all() for t in weights(given.folder).values())


class Hungry(Network):
    """A network that has memory for so many samples only."""

    def __init__(self, most: int) -> None:
        super().__init__(dims=3, in_channels=1, classes=3, divisor=1)
        self.inner, self.most = network(), most

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > self.most:
            raise torch.OutOfMemoryError("not so many")
        return self.inner.logits(x)


def test_out_of_memory_takes_smaller_batches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = replace(task(tmp_path, steps=4, batch=4), network=Hungry(1))
    with caplog.at_level("WARNING", logger="maskmill"):
        ended = train(given)
    assert ended.step == 4
    assert ended.way.batch == 1
    assert "out of memory: gradients add up over smaller batches" in caplog.text
    with pytest.raises(TrainingError, match="not even one sample"):
        train(replace(given, network=Hungry(0), folder=tmp_path / "none"))


def test_a_teacher_is_followed(tmp_path: Path) -> None:
    given = task(tmp_path, steps=60)
    teacher = train(given).kept
    pupil = train(
        replace(
            given,
            network=network(5),
            folder=tmp_path / "pupil",
            teacher=teacher,
            recipe=quick(steps=60, teacher_weight=1.0),
        )
    ).kept
    x = torch.from_numpy(ball_case(tmp_path / "unseen", 50).image().copy())[None]
    with torch.inference_mode():
        agreement = (teacher(x).argmax(1) == pupil(x).argmax(1)).float().mean()
    assert agreement > 0.97


@pytest.mark.parametrize("damage", ["cut", "foreign", "other network"])
def test_a_checkpoint_that_is_none(tmp_path: Path, damage: str) -> None:
    given = task(tmp_path, steps=2)
    train(given)
    path = given.folder / checkpoint.FILE
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        given = replace(given, network=segmodels.create("resunet", dims=3, in_channels=1, classes=3, widths=[8, 8]))
    with pytest.raises(ModelError, match="remove it to begin anew"):
        train(given)


def test_cases_that_are_not_there(tmp_path: Path) -> None:
    given = task(tmp_path)
    with pytest.raises(ModelError, match="no case"):
        train(replace(given, cases=()))
    (given.cases[0].folder / "labels.npy").unlink()
    with pytest.raises(ModelError, match=r"lacks labels\.npy"):
        train(given)
