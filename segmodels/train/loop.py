"""The loop: step after step until the recipe's end, with a checkpoint from which it goes on exactly."""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segmodels.network import Network
from segmodels.train import checkpoint
from segmodels.train.augment import Triple
from segmodels.train.cases import Case, require
from segmodels.train.loss import Supervised, TrainingError, distance_from, make_loss, refuse_nan
from segmodels.train.recipe import Recipe
from segmodels.train.samples import Samples, batches
from segmodels.train.way import Way, choose_way, halved, is_out_of_memory

ENDLESS = 1 << 40  # steps, where only the time ends a training
LEAST_ROWS = 20  # of the learning curve
ROW = ("step", "minutes", "learning_rate", "loss")

Validate = Callable[[nn.Module], Mapping[str, float]]


@dataclass
class Training:
    """Where a training stands. `kept`: the averaged weights, or the last ones where nothing is averaged."""

    supervised: Supervised
    kept: Network
    optimizer: torch.optim.Optimizer
    way: Way
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # since the last row
    rows: list[dict[str, float]] = field(default_factory=list)  # the learning curve
    scored: int = 0  # how often the validation cases were

    def progress(self, recipe: Recipe) -> float:
        """0 to 1: the share of the steps or of the minutes that is used up, whichever is more."""
        by_steps = self.step / recipe.steps if recipe.steps else 0.0
        by_time = self.seconds / (60 * recipe.minutes) if recipe.minutes else 0.0
        return min(1.0, max(by_steps, by_time))


@dataclass(frozen=True)
class Task:
    """One network to train. flips: axes that may be mirrored; folder: where its checkpoint lies."""

    network: Network
    cases: tuple[Case, ...]
    recipe: Recipe
    patch: Triple
    flips: tuple[int, ...]
    folder: Path
    threads: int
    teacher: Network | None = None


def train(
    task: Task,
    *,
    validate: Validate | None = None,
    stop: threading.Event | None = None,
    observe: Callable[[Training, float], None] = lambda training, progress: None,
) -> Training:
    """Train to the recipe's end, or until `stop` is set; goes on from the checkpoint in the folder if there is one.

    With `steps` (and the same cases, recipe, threads and library versions) the weights after any number of kills and
    resumes on a CPU are bit for bit those of an undisturbed training. Raises TrainingError for a loss that is not
    finite and where even one sample does not fit into memory; ModelError for bad cases.
    """
    torch.set_num_threads(task.threads)
    samples = Samples(require(task.cases), task.recipe, task.patch, task.flips)
    stop = stop or threading.Event()
    training = _begin(task)
    if task.teacher is not None:
        training.way.place(task.teacher.eval())
    run: Any = torch.compile(training.supervised) if training.way.compiled else training.supervised
    loss = make_loss(task.recipe)
    readers = _readers(task.recipe, training.way.device)
    saved = began = time.monotonic()
    before = training.seconds
    last = task.recipe.steps or ENDLESS
    for images, labels, names in batches(samples, training.step, last, readers):
        training.seconds = before + time.monotonic() - began
        progress = training.progress(task.recipe)
        if stop.is_set() or (progress >= 1 and training.step):  # the smallest budget is one step
            break
        _step(training, run, loss, task, images, labels, names)
        training.seconds = before + time.monotonic() - began
        progress = training.progress(task.recipe)
        _note(training, task.recipe, progress, validate)
        observe(training, progress)
        if time.monotonic() - saved >= 60 * task.recipe.checkpoint_minutes:
            checkpoint.write(task.folder, training)
            saved = time.monotonic()
    checkpoint.write(task.folder, training)
    return training


def _begin(task: Task) -> Training:
    """A new training, or the one that the checkpoint holds."""
    kept = copy.deepcopy(task.network)  # before hooks of the training are on it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.recipe.seed)
        supervised = Supervised(task.network, deep=task.recipe.deep_supervision)
    held = checkpoint.read(task.folder)
    way = Way(**held["way"]) if held is not None else choose_way(task.recipe, task.threads, supervised)
    if way.device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("this training began on a GPU and there is none here: go on there, or begin anew")
    way.place(supervised)
    way.place(kept.eval())
    training = Training(supervised, kept, _optimizer(supervised, task.recipe), way)
    if held is not None:
        checkpoint.restore(training, held)
    else:
        checkpoint.write(task.folder, training)  # the way is settled from here on
    return training


def _optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Weights decay; biases and the scales of normalisations do not."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if recipe.optimizer == "sgd":
        nesterov = recipe.momentum > 0
        return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=nesterov)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def learning_rate(recipe: Recipe, progress: float) -> float:
    """Linear up during the warm-up, then half a cosine down to 0 (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    if progress < recipe.warmup:
        return recipe.learning_rate * max(progress / recipe.warmup, 0.01)
    share = (progress - recipe.warmup) / max(1 - recipe.warmup, 1e-9)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def _readers(recipe: Recipe, device: str) -> int:
    from segmodels.runtime import usable_cores

    if recipe.readers is not None:
        return recipe.readers
    return min(8, usable_cores()) if device == "cuda" else 0


def _of_dims(images: Tensor, labels: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """Samples of one plane lose their z axis for a 2-D network."""
    return (images.squeeze(2), labels.squeeze(1)) if dims == 2 else (images, labels)


def _step(
    training: Training, run: Any, loss: Any, task: Task, images: Tensor, labels: Tensor, names: Sequence[str]
) -> None:
    """One step of the optimiser and of the average. A batch that memory cannot take goes through in parts."""
    recipe = task.recipe
    images, labels = _of_dims(images, labels, task.network.dims)
    rate = learning_rate(recipe, training.progress(recipe))
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    training.supervised.train()
    while True:
        training.optimizer.zero_grad(set_to_none=True)
        try:
            value = _backward(training, run, loss, task, images, labels, names)
            break
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        training.way = halved(training.way)
    norm = nn.utils.clip_grad_norm_(training.supervised.parameters(), recipe.clip or math.inf)
    refuse_nan(norm, training.step, names)
    training.optimizer.step()
    training.step += 1
    training.losses.append(value)
    _average(training, recipe.averaging)


def _backward(
    training: Training, run: Any, loss: Any, task: Task, images: Tensor, labels: Tensor, names: Sequence[str]
) -> float:
    """Gradients of the whole batch, part by part; gives its loss."""
    way, total = training.way, 0.0
    for start in range(0, len(images), way.batch):
        part = slice(start, start + way.batch)
        given, target = way.give(images[part]), labels[part].to(way.device, non_blocking=True)
        with way.autocast():
            levels = run(given)
        levels = [level.float() for level in levels]
        value = loss(levels, target)
        if task.teacher is not None:
            with torch.no_grad(), way.autocast():
                taught = task.teacher(given)
            share = task.recipe.teacher_weight
            value = (1 - share) * value + share * distance_from(taught.float(), levels[0])
        refuse_nan(value, training.step, names[part])
        weight = len(given) / len(images)
        torch.autograd.backward(value * weight)
        total += float(value.detach()) * weight
    return total


@torch.no_grad()
def _average(training: Training, decay: float) -> None:
    """kept = decay kept + (1 - decay) last; early on the decay is smaller, or random weights would stay in it."""
    decay = min(decay, (1 + training.step) / (10 + training.step)) if decay else 0.0
    for kept, last in zip(_state(training.kept), _state(training.supervised.network), strict=True):
        if kept.is_floating_point():
            kept.lerp_(last, 1 - decay)
        else:
            kept.copy_(last)


def _state(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _note(training: Training, recipe: Recipe, progress: float, validate: Validate | None) -> None:
    """A row of the learning curve whenever the next part of the training is done, scored as often as asked."""
    wants_scores = validate is not None and _due(progress, recipe.validations, training.scored)
    if not wants_scores and not _due(progress, LEAST_ROWS, len(training.rows)):
        return
    values = (
        float(training.step),
        training.seconds / 60,
        learning_rate(recipe, progress),
        sum(training.losses) / len(training.losses),
    )
    scores: Mapping[str, float] = {}
    if validate is not None and wants_scores:
        scores = validate(training.kept)
        training.scored += 1
    training.rows.append(dict(zip(ROW, values, strict=True)) | dict(scores))
    training.losses.clear()


def _due(progress: float, parts: int, done: int) -> bool:
    return math.floor(progress * parts + 1e-9) > done
