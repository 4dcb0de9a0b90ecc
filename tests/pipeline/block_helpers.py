"""Images, models and block tasks in a folder, for tests of what blocks compute; and the answers by other means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import segmodels
from pipeline import ledger, ome, statistics, store
from pipeline.blocks import segment_blocks
from pipeline.engine import BlockTask, Failure, Receipt
from pipeline.grid import Box, Grid, Shards, Triple
from pipeline.lattice import Lattice
from pipeline.tiling import Tiling, make_grid
from segmodels import Model
from segmodels.card import parse
from segmodels.network import Network
from segmodels.predictor import Predictor, make_predictor
from segmodels.runtime import Runtime

THREADS = 1


def runtime(batch: int = 1) -> Runtime:
    return Runtime("cpu", "torch", "fp32", THREADS, batch, (("torch", torch.__version__),))


def random_network(name: str = "resunet", *, seed: int = 5, **config: Any) -> Network:
    """In eval mode; biases and running statistics are random too, and all classes win somewhere."""
    torch.manual_seed(seed)
    network = segmodels.create(name, **config)
    for key, tensor in network.state_dict().items():
        if key.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.2)
        elif key.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    return network.eval()


def card_facts(network: Network | None = None, *, classes: int = 3, channels: int = 1, **facts: Any) -> dict[str, Any]:
    """A card for `network`, or for a predictor with so many classes and channels; `facts` go over it."""
    if network is not None:
        classes, channels = network.classes, network.in_channels
    sigmoid = facts.get("activation") == "sigmoid"
    return {
        "name": "tiny",
        "version": "1",
        "axes": "yx" if network is not None and network.dims == 2 else "zyx",
        "channels": [f"c{i}" for i in range(channels)],
        "normalize": [{"kind": "none"}],
        "tile": [16, 16] if network is not None and network.dims == 2 else [8, 16, 16],
        "activation": "softmax",
        "labels": {str(k): {"name": f"s{k}"} for k in range(1, classes + sigmoid)},
        **facts,
    }


def model_of(network: Network | None = None, **facts: Any) -> Model:
    """A model in memory; without a network for predictors of the tests' own."""
    card = card_facts(network, **facts)
    reference = {"name": "resunet"} if network is None else {"name": network.architecture, "config": network.config}
    return Model(network, parse({"network": reference, **card}), "0" * 64, "test")


@dataclass(frozen=True)
class Stored:
    """An image on disk, the facts of its tiling, and an empty label image with its ledger."""

    folder: Path
    lattice: Lattice
    grid: Grid
    shards: Shards
    stitch: str
    fill: str
    lead: int

    def task(
        self, range_: Box, *, key: str = "k", index: int = 0, missing: Sequence[Triple] | None = None
    ) -> BlockTask:
        shards = tuple(self.shards.indices(range_)) if missing is None else tuple(missing)
        url = str(self.folder)
        return BlockTask(
            key=key, index=index, image=url + "/image", labels=url + "/labels", ledger=url + "/ledger",
            statistics=url + "/statistics.npz", lattice=self.lattice, grid=self.grid, shards=self.shards,
            range=range_, missing=shards, stitch=self.stitch, fill=self.fill, runtime=runtime().hash,
        )  # fmt: skip

    def tasks(self, ranges: Sequence[Box], **facts: Any) -> list[BlockTask]:
        return [self.task(range_, index=i, **facts) for i, range_ in enumerate(ranges)]

    def whole(self, **facts: Any) -> BlockTask:
        return self.task(Box((0, 0, 0), self.shards.counts), **facts)

    @property
    def labels(self) -> np.ndarray:
        """(z, y, x)"""
        return np.asarray(ome.open_array(str(self.folder / "labels"))[(0,) * self.lead])

    def marked(self, batch: int = 1) -> set[Triple]:
        return set(ledger.markers(str(self.folder / "ledger"), runtime(batch).hash))

    def emptied(self, folder: Path) -> Stored:
        """The same image with another, empty label image and ledger."""
        folder.mkdir(parents=True)
        for name in ("image", "statistics.npz"):
            (folder / name).symlink_to(self.folder / name)
        _create_labels(folder, self.shards, self.lead)
        return replace(self, folder=folder)


def _create_labels(folder: Path, shards: Shards, lead: int) -> None:
    shape = (1,) * lead + shards.shape
    ome.create_array(str(folder / "labels"), shape, shards.shard, np.dtype(np.uint8), ome.axis_names(lead > 0))


def grid_over(shape: Triple, tiling: Tiling) -> Grid:
    """The grid of a study that is not resampled."""
    return make_grid(Lattice(shape, shape), tiling)


def store_image(
    folder: Path, voxels: np.ndarray, window: Triple, *, shard: Triple = (8, 8, 8), image_shard: Triple = (8, 16, 16),
    overlap: float = 0.5, margin: Triple = (0, 0, 0), stitch: str = "gaussian", lattice: Lattice | None = None,
    **exact: Triple,
) -> Stored:  # fmt: skip
    """Write `voxels` (z,y,x) or (c,z,y,x) and all that blocks need beside it; without a lattice that of the voxels."""
    lead = voxels.ndim - 3
    names = ome.axis_names(lead > 0)
    image = ome.create_array(str(folder / "image"), voxels.shape, image_shard, voxels.dtype, names)
    image[...] = voxels
    channels = []
    for channel in voxels if lead else voxels[None]:
        sums = statistics.ChannelSums(voxels.dtype, 8)
        sums.add(channel)
        channels.append(sums.finish())
    store.write(str(folder / "statistics.npz"), statistics.to_bytes(channels))
    z, y, x = voxels.shape[-3:]
    shards = Shards((z, y, x), shard)
    _create_labels(folder, shards, lead)
    tiling = Tiling(window, overlap, margin, stitch, **exact)
    lattice = lattice or Lattice((z, y, x), (z, y, x))
    return Stored(folder, lattice, make_grid(lattice, tiling), shards, stitch, tiling.fill, lead)


def nnunet_weights(tile: tuple[int, ...]) -> torch.Tensor:
    """Weights of a tile (float16) as nnU-Net makes them: a filtered delta, which torch rounds by way of float32."""
    from scipy.ndimage import gaussian_filter

    delta = np.zeros(tile)
    delta[tuple(n // 2 for n in tile)] = 1
    weights = torch.from_numpy(gaussian_filter(delta, [n / 8 for n in tile], 0, mode="constant", cval=0))
    weights /= weights.max() / 10
    weights = weights.to(torch.float16)
    weights[weights == 0] = weights[weights != 0].min()
    return weights


class Analytic:
    """A predictor made of a function of its tiles: (N,C,Z,Y,X) -> (N,K,Z,Y,X), each tile for itself."""

    margin = (0, 0, 0)
    disagreement = False

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], classes: int, channels: int = 1) -> None:
        self.function, self.classes, self.channels = function, classes, channels
        self.calls = 0

    def fit(self, statistics: Any) -> Analytic:
        return self

    def predict(self, tiles: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.function(tiles)


def run(
    tasks: Sequence[BlockTask], model: Model, batch: int = 1, predictor: Predictor | None = None
) -> list[Receipt | Failure]:
    """The outcomes of these blocks in one call, by the model's own network unless a predictor is given."""
    predictor = predictor or make_predictor(model, runtime(batch))
    return list(segment_blocks(tasks, model, predictor, runtime(batch)))


def receipts(outcomes: Sequence[Receipt | Failure]) -> list[Receipt]:
    """All of them, having checked that no block failed."""
    assert not [o for o in outcomes if isinstance(o, Failure)]
    return [o for o in outcomes if isinstance(o, Receipt)]


def noise(shape: tuple[int, ...], seed: int = 3, dtype: Any = np.float32) -> np.ndarray:
    """Noise with structure at several scales, so that labels come in patches."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    white = rng.normal(size=shape)
    smooth = sum(gaussian_filter(rng.normal(size=shape), (*[0] * (len(shape) - 3), s, s, s)) * 4 * s for s in (1, 2))
    return (white + smooth).astype(dtype)


def margin_of(logits: np.ndarray) -> np.ndarray:
    """How far the best class is from the second: where it is small, rounding may decide."""
    ordered = np.sort(logits, axis=0)
    return ordered[-1] - ordered[-2]
