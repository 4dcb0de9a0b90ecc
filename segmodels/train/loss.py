"""What training makes small: Dice and cross-entropy, at several levels if asked, and distance from a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmodels import nd
from segmodels.errors import ModelError
from segmodels.network import Ladder, Network
from segmodels.train.recipe import Recipe

Loss = Callable[[Sequence[Tensor], Tensor], Tensor]


class Supervised(nn.Module):
    """A network and, with deep supervision, one 1x1 head for each coarser level of its decoder.

    forward: (N, C, *S) -> [logits at S, at about S / 2, ...]. Only the network itself is kept after training
    (deeply supervised nets: Lee et al. 2015, arXiv:1409.5185; the levels weigh 1, 1/2, 1/4, ... as in nnU-Net).
    """

    def __init__(self, network: Network, *, deep: bool) -> None:
        super().__init__()
        self.network = network
        self.heads = nn.ModuleList()
        self._coarse: list[Tensor] = []
        if deep:
            if not isinstance(network, Ladder) or network.margin or "widths" not in network.config:
                raise ModelError(f"deep_supervision is not possible with {network.architecture}: leave it out")
            widths = network.config["widths"][1:-1]  # of the decoder's outputs but the finest
            self.heads.extend(nd.conv(network.dims, w, network.classes, kernel=1) for w in reversed(widths))
            for block in list(network.decoder)[:-1]:
                block.register_forward_hook(lambda _block, _given, features: self._coarse.append(features))

    def forward(self, x: Tensor) -> list[Tensor]:
        self._coarse.clear()
        finest = self.network(x)
        coarse = [head(features) for head, features in zip(self.heads, self._coarse, strict=True)]
        self._coarse.clear()
        return [finest, *reversed(coarse)]


def make_loss(recipe: Recipe) -> Loss:
    """Weighted sum of Dice (of the structures, over the whole batch) and cross-entropy, both MONAI's, per level."""
    from monai.losses import DiceCELoss

    base: Any = DiceCELoss(
        to_onehot_y=True,
        softmax=True,
        include_background=False,
        batch=True,
        lambda_dice=recipe.dice_weight,
        lambda_ce=recipe.cross_entropy_weight,
    )

    def loss(levels: Sequence[Tensor], labels: Tensor) -> Tensor:
        weights = [0.5**level for level in range(len(levels))]
        total = levels[0].new_zeros(())
        for weight, logits in zip(weights, levels, strict=True):
            target = labels[:, None].to(logits.dtype)
            if logits.shape[2:] != target.shape[2:]:
                target = F.interpolate(target, size=logits.shape[2:], mode="nearest-exact")
            total = total + weight * base(logits, target)
        return total / sum(weights)

    return loss


def distance_from(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over the voxels of the Kullback-Leibler divergence of the student's classes from the teacher's."""
    return F.kl_div(
        F.log_softmax(student, 1), F.log_softmax(teacher, 1), reduction="none", log_target=True
    ).sum(1).mean()  # fmt: skip


def refuse_nan(loss: Tensor, step: int, cases: Sequence[str]) -> None:
    """Raise TrainingError for a loss that is not finite."""
    if not torch.isfinite(loss):
        named = ", ".join(sorted(set(cases)))
        raise TrainingError(
            f"the loss became {float(loss.detach())} at step {step}, with samples of {named}: look at these "
            "cases, or lower the learning_rate, and train into another folder; the last good state is kept in this one"
        )


class TrainingError(Exception):
    """Training cannot go on. One line: what happened, what to do."""
