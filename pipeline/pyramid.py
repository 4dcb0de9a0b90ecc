"""Coarser levels of an image or a label image, shard by shard, with dask's threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import zarr

from . import ome, store


def build_pyramid(group: str, *, labels: bool, names: list[str]) -> None:
    """Write levels 1, 2, ... beside level 0 of `group`, for axes (z,y,x) or (c,z,y,x).

    An image's voxel is the mean of the (up to 8) voxels it spans; a label is the most frequent one among them, the
    smallest on a tie. At a far border with an odd length the last voxel stands for its missing neighbour too.
    Memory: a few shards per dask thread.
    """
    base = ome.open_array(store.join(group, "0"))
    shape = (int(base.shape[-3]), int(base.shape[-2]), int(base.shape[-1]))
    shapes = ome.level_shapes(shape)
    lead = tuple(int(n) for n in base.shape[:-3])
    for level in range(1, len(shapes)):
        finer = ome.open_array(store.join(group, str(level - 1)))
        shards = ome.shard_shape(shapes[level])
        coarser = ome.create_array(store.join(group, str(level)), lead + shapes[level], shards, base.dtype, names)
        _reduce(finer, coarser, labels=labels)


def _reduce(finer: zarr.Array[Any], coarser: zarr.Array[Any], *, labels: bool) -> None:
    import dask
    import dask.array as da

    steps = tuple(2 if a > b else 1 for a, b in zip(finer.shape, coarser.shape, strict=True))
    shards = coarser.shards or coarser.chunks
    chunks = tuple(s * k for s, k in zip(shards, steps, strict=True))
    source = da.from_array(finer, chunks=chunks, name=False, asarray=True)
    reduced = source.map_blocks(
        reduce_labels if labels else reduce_mean,
        steps=steps,
        dtype=coarser.dtype,
        chunks=tuple(tuple(-(-c // k) for c in axis) for axis, k in zip(source.chunks, steps, strict=True)),
    )
    with dask.config.set(scheduler="threads", num_workers=2):
        da.store(reduced, coarser, lock=False)  # every dask chunk is one whole shard


def _corners(block: np.ndarray, steps: tuple[int, ...]) -> np.ndarray:
    """The voxels that each coarser voxel spans, stacked in a new first axis."""
    odd = [(0, n % k if k > 1 else 0) for n, k in zip(block.shape, steps, strict=True)]
    block = np.pad(block, odd, mode="edge") if any(hi for _, hi in odd) else block
    picks = np.stack(np.meshgrid(*[range(k) for k in steps], indexing="ij"), -1).reshape(-1, len(steps))
    return np.stack(
        [block[tuple(slice(int(o), None, k) for o, k in zip(offset, steps, strict=True))] for offset in picks]
    )


def reduce_mean(block: np.ndarray, steps: tuple[int, ...]) -> np.ndarray:
    """Mean over windows of `steps`, in the block's dtype (integers rounded half to even)."""
    mean = _corners(block, steps).mean(axis=0, dtype=np.float64)
    reduced: np.ndarray = (np.rint(mean) if block.dtype.kind in "iu" else mean).astype(block.dtype)
    return reduced


def reduce_labels(block: np.ndarray, steps: tuple[int, ...]) -> np.ndarray:
    """Most frequent label over windows of `steps`, the smallest on a tie."""
    corners = np.sort(_corners(block, steps), axis=0)
    best: np.ndarray = corners[0].copy()
    votes = np.zeros(corners.shape[1:], np.int8)
    for candidate in corners:
        count = (corners == candidate).sum(axis=0, dtype=np.int8)
        better = count > votes
        np.copyto(best, candidate, where=better)
        np.copyto(votes, count, where=better)
    return best
