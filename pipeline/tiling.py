"""Where the tiles of a study lie: MONAI's places, nnU-Net's, or those of exact answers. Pure integers."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from .errors import StudyError
from .grid import Grid, Spans, Starts, Triple
from .lattice import Lattice

STITCHES = ("gaussian", "constant", "nnunet", "nnunet-fp16", "exact")


@dataclass(frozen=True)
class Tiling:
    """How a method lays its tiles over any study, axes in the network's order.

    window: the voxels that the network is given. overlap: share of a tile that the next one repeats, where tiles are
    blended. margin: by how much the network's answer is smaller per side. For `exact` also the step of the network's
    down-sampling grid (`divisor`) and how far it looks (`halo`, a multiple of that), per axis.
    """

    window: Triple
    overlap: float = 0.5
    margin: Triple = (0, 0, 0)
    stitch: str = "gaussian"
    divisor: Triple = (1, 1, 1)
    halo: Triple = (0, 0, 0)

    @property
    def fill(self) -> str:
        """What a tile sees outside the image: zeros after normalisation, its mirror image, or its border voxels."""
        if any(self.margin):
            return "reflect"
        return "edge" if self.stitch == "exact" else "zero"


def tile_starts(length: int, tile: int, overlap: float) -> tuple[int, ...]:
    """Origins of the tiles along one axis, as MONAI's `sliding_window_inference` places them.

    A regular stride of `int(tile * (1 - overlap))` voxels (at least 1), the last tile moved back to end at the
    border. An axis shorter than the tile is centred in one tile: its origin is `-((tile - length) // 2)`.
    """
    if tile >= length:
        return (-((tile - length) // 2),)
    step = max(int(tile * (1 - overlap)), 1)
    count = math.ceil((length - tile) / step) + 1
    return tuple(min(i * step, length - tile) for i in range(count))


def nnunet_starts(length: int, tile: int, overlap: float) -> tuple[int, ...]:
    """Origins of the tiles along one axis, as nnU-Net's predictor places them (`tile_step_size` is 1 - overlap).

    As many tiles as strides of at most `tile * (1 - overlap)` voxels need, spread evenly from border to border and
    rounded to whole voxels, halves to the even one. An axis shorter than the tile is centred as above.
    """
    if tile >= length:
        return (-((tile - length) // 2),)
    share = round(1 - overlap, 9)  # of 0.8 it is 0.19999999999999996, and then a tile more
    count = math.ceil((length - tile) / max(tile * share, 1.0)) + 1
    step = (length - tile) / (count - 1)
    return tuple(round(step * i) for i in range(count))


def exact_axis(length: int, window: int, margin: int, divisor: int, halo: int) -> tuple[int, Starts, Spans]:
    """Tile length, origins and cores of the tiles along one axis, so that they answer what one pass over all would.

    The axis grows at its high end to a multiple of `divisor`, as the network itself would grow it. All tiles lie inside
    and begin on that grid, so their down-sampling falls as that of the whole. A tile answers for its core, `halo` away
    from its ends unless the axis ends there, too. A network that gives up a `margin` sees all that it needs: its tiles
    lie side by side, the last one reaching past the border. Raises StudyError for a window with no core.
    """
    if margin:
        tile = window - 2 * margin
        step = tile // divisor * divisor
        if step < 1:
            raise _no_core(window, 2 * margin + divisor)
        starts = tuple(range(0, length, step))
        return tile, starts, tuple(itertools.pairwise((*starts, length)))
    whole = -(-length // divisor) * divisor
    tile = min(window // divisor * divisor, whole)
    step = tile - 2 * halo
    if tile < whole and step < 1:
        raise _no_core(window, 2 * halo + divisor)
    starts = (*range(0, whole - tile, step), whole - tile) if tile < whole else (0,)
    return tile, starts, tuple(itertools.pairwise((0, *(start + halo for start in starts[1:]), length)))


def _no_core(window: int, least: int) -> StudyError:
    return StudyError(
        "model",
        f"--stitch exact needs tiles of {least} voxels or more along an axis that is longer than one, got {window}: "
        "on so many around it depends what this network answers for a voxel; well above that less is computed twice",
    )


def make_grid(lattice: Lattice, tiling: Tiling) -> Grid:
    """The grid of a study with this lattice. Along an axis that the network sees the other way round, tiles lie as they
    would lie on the turned study. Raises StudyError where the tiles of `exact` have no core."""
    view = lattice.view
    tile, margin = [0, 0, 0], view.stored(tiling.margin)
    starts: list[Starts] = [(), (), ()]
    cores: list[Spans] = [(), (), ()]
    exact = tiling.stitch == "exact"
    for seen, axis in enumerate(view.axes):
        length, window = lattice.cells[axis], tiling.window[seen]
        if exact:
            tile[axis], starts[axis], cores[axis] = exact_axis(
                length, window, tiling.margin[seen], tiling.divisor[seen], tiling.halo[seen]
            )
        else:
            tile[axis] = window - 2 * tiling.margin[seen]
            place = nnunet_starts if tiling.stitch.startswith("nnunet") else tile_starts
            starts[axis] = place(length, tile[axis], tiling.overlap if tile[axis] > 1 else 0.0)
        if view.against[seen]:
            starts[axis] = tuple(length - tile[axis] - start for start in reversed(starts[axis]))
            cores[axis] = tuple((length - end, length - begin) for begin, end in reversed(cores[axis]))
    (tz, ty, tx), (z, y, x), (cz, cy, cx) = tile, starts, cores
    return Grid(lattice.cells, (tz, ty, tx), margin, (z, y, x), (cz, cy, cx) if exact else None)
