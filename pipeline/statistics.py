"""What normalisation and fitting need to know of a whole image, as sums over fixed chunks added in chunk order."""

from __future__ import annotations

import io
import zipfile
import zlib
from dataclasses import dataclass

import numpy as np

from .errors import StudyError

# Beyond this many distinct values an integer channel is binned as floats are (16 MiB of values and counts).
MAX_DISTINCT = 1 << 20


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations: merged by Chan, Golub and LeVeque (1979), in float64."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    @staticmethod
    def of(values: np.ndarray) -> Moments:
        if values.size == 0:
            return Moments()
        # Around the first value: exact where all are equal, and no digits lost to a large offset.
        first = float(values.flat[0])
        apart = values.astype(np.float64) - first
        mean = float(apart.mean())
        return Moments(int(values.size), first + mean, float(np.square(apart - mean).sum()))

    def merge(self, other: Moments) -> Moments:
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.m2 + other.m2 + delta * delta * (self.count * other.count / count),
        )

    @property
    def std(self) -> float:
        """Standard deviation, ddof 0."""
        return float(np.sqrt(self.m2 / self.count)) if self.count else 0.0


@dataclass(frozen=True)
class ChannelStatistics:
    """Sums of one channel. `values` ascending and their `counts`: exact for integers, binned for floats."""

    all: Moments
    nonzero: Moments
    minimum: float
    maximum: float
    values: np.ndarray
    counts: np.ndarray
    exact: bool

    @property
    def mean(self) -> float:
        return self.all.mean

    @property
    def std(self) -> float:
        return self.all.std

    @property
    def nonzero_mean(self) -> float:
        return self.nonzero.mean

    @property
    def nonzero_std(self) -> float:
        return self.nonzero.std

    def histogram(self) -> tuple[np.ndarray, np.ndarray]:
        """(values float64 ascending, counts int64)."""
        return self.values, self.counts


class ChannelSums:
    """Adds slabs up. What comes out depends on the voxels and the image's shape alone, not on how slabs were cut,
    as long as each slab holds whole multiples of `chunk_rows` (the last one may hold fewer).
    """

    def __init__(self, dtype: np.dtype, chunk_rows: int) -> None:
        self.chunk_rows = chunk_rows
        self.exact = dtype.kind in "iu"
        self.offset = np.iinfo(dtype).min if self.exact else 0
        # Small integers and floats have 65,536 bins at most; wide integers are counted by value.
        self.dense = np.zeros(1 << 16, np.int64) if not self.exact or dtype.itemsize <= 2 else None
        self.values, self.counts = np.zeros(0, np.float64), np.zeros(0, np.int64)
        self.all, self.nonzero = Moments(), Moments()
        self.minimum, self.maximum = np.inf, -np.inf

    def add(self, slab: np.ndarray) -> None:
        """Add one slab (z, y, x) of finite real voxels, the next in z order."""
        for row in range(0, slab.shape[0], self.chunk_rows):
            self._add_chunk(slab[row : row + self.chunk_rows].ravel())

    def _add_chunk(self, voxels: np.ndarray) -> None:
        self.minimum = min(self.minimum, float(voxels.min()))
        self.maximum = max(self.maximum, float(voxels.max()))
        if self.exact and self.dense is not None:
            self.dense += np.bincount(voxels.astype(np.int32) - self.offset, minlength=1 << 16)
            return  # moments follow from exact counts
        self.all = self.all.merge(Moments.of(voxels))
        self.nonzero = self.nonzero.merge(Moments.of(voxels[voxels != 0]))
        if self.dense is not None:
            self.dense += np.bincount(float_bins(voxels), minlength=1 << 16)
        else:
            self._count_wide(voxels)

    def _count_wide(self, voxels: np.ndarray) -> None:
        new, new_counts = np.unique(voxels, return_counts=True)
        values, inverse = np.unique(np.concatenate([self.values, new.astype(np.float64)]), return_inverse=True)
        counts = np.zeros(len(values), np.int64)
        np.add.at(counts, inverse, np.concatenate([self.counts, new_counts]))
        self.values, self.counts = values, counts
        if len(values) > MAX_DISTINCT:
            bins = np.zeros(1 << 16, np.int64)
            np.add.at(bins, float_bins(values), counts)
            self.dense, self.exact = bins, False

    def finish(self) -> ChannelStatistics:
        values, counts = self.values, self.counts
        everything, nonzero = self.all, self.nonzero
        if self.dense is not None:
            (present,) = np.nonzero(self.dense)
            counts = self.dense[present]
            values = (present + self.offset).astype(np.float64) if self.exact else bin_middles()[present]
            if self.exact:
                everything = _moments_of_counts(values, counts)
                nonzero = _moments_of_counts(values[values != 0], counts[values != 0])
        return ChannelStatistics(everything, nonzero, self.minimum, self.maximum, values, counts, self.exact)


def most_values(dtype: np.dtype, voxels: int) -> int:
    """How many values the histogram of a channel of so many voxels has at most."""
    return min(voxels, MAX_DISTINCT if dtype.kind in "iu" and dtype.itemsize > 2 else 1 << 16)


def _moments_of_counts(values: np.ndarray, counts: np.ndarray) -> Moments:
    count = int(counts.sum())
    if count == 0:
        return Moments()
    # No dot product: BLAS splits it among as many threads as there are cores, and with them the rounding; and where the
    # system refuses it a thread, OpenBLAS waits for that for ever.
    mean = float(np.sum(values * counts)) / count
    return Moments(count, mean, float(np.sum(np.square(values - mean) * counts)))


def float_bins(values: np.ndarray) -> np.ndarray:
    """The bin of each value: float32 bits, sign folded so that order is kept, top 16 of them."""
    with np.errstate(over="ignore"):
        floats = np.clip(values, -3.4028234e38, 3.4028234e38).astype(np.float32)
    bits = np.ascontiguousarray(floats + np.float32(0)).ravel().view(np.uint32)  # -0.0 counts as 0.0
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (ordered >> 16).astype(np.int32)


def bin_middles() -> np.ndarray:
    """The middle of each of the 65,536 bins, float64, ascending (bins of non-finite values hold 0)."""
    edges = np.arange((1 << 16) + 1, dtype=np.uint64) << 16
    edges[-1] = (1 << 32) - 1
    ordered = edges.astype(np.uint32)
    bits = np.where(ordered >> 31, ordered & np.uint32(0x7FFFFFFF), ~ordered)
    with np.errstate(invalid="ignore", over="ignore"):
        values = bits.view(np.float32).astype(np.float64)
        values[np.isposinf(values)] = 2.0**128  # where the last finite bin ends
        middles = (values[:-1] + values[1:]) / 2
    return np.where(np.isfinite(middles), middles, 0.0)


def to_bytes(channels: list[ChannelStatistics]) -> bytes:
    """As an .npz without pickles."""
    arrays: dict[str, np.ndarray] = {}
    for i, c in enumerate(channels):
        arrays[f"values{i}"], arrays[f"counts{i}"] = c.values, c.counts
        arrays[f"moments{i}"] = np.array(
            [c.all.mean, c.all.m2, c.nonzero.mean, c.nonzero.m2, c.minimum, c.maximum], np.float64
        )
        arrays[f"numbers{i}"] = np.array([c.all.count, c.nonzero.count, c.exact], np.int64)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def from_bytes(data: bytes, *, histograms: bool = True) -> list[ChannelStatistics]:
    """What `to_bytes` wrote; without `histograms` they are left empty. Raises StudyError("storage") for damage."""
    try:
        return _channels(data, histograms)
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise StudyError(
            "storage", f"the statistics stored with the image are damaged ({type(error).__name__})"
        ) from error


def _channels(data: bytes, histograms: bool) -> list[ChannelStatistics]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        channels = []
        for i in range(len(arrays.files) // 4):
            mean, m2, nonzero_mean, nonzero_m2, low, high = map(float, arrays[f"moments{i}"])
            count, nonzero_count, exact = map(int, arrays[f"numbers{i}"])
            channels.append(
                ChannelStatistics(
                    Moments(count, mean, m2),
                    Moments(nonzero_count, nonzero_mean, nonzero_m2),
                    low,
                    high,
                    arrays[f"values{i}"] if histograms else np.zeros(0),
                    arrays[f"counts{i}"] if histograms else np.zeros(0, np.int64),
                    bool(exact),
                )
            )
    return channels
