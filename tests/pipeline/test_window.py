"""The rolling window of input rows against the whole image padded by numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import ome
from pipeline.errors import StudyError
from pipeline.grid import Box, Triple
from pipeline.normalize import IDENTITY, Affine
from pipeline.resample import StoredRows
from pipeline.window import InputWindow, source_index


def stored(folder: Path, voxels: np.ndarray, shard: Triple = (8, 16, 16)) -> object:
    names = ome.axis_names(voxels.ndim == 4)
    array = ome.create_array(str(folder), voxels.shape, shard, voxels.dtype, names)
    array[...] = voxels
    return ome.open_array(str(folder))


def window_of(image: Any, region: Box, depth: int, normalizers: list[Affine], fill: str) -> InputWindow:
    def open_rows(y: slice, x: slice) -> StoredRows:
        return StoredRows(image, normalizers, y, x)

    return InputWindow(image.shape[-3:], len(normalizers), region, depth, fill, open_rows)


def padded(voxels: np.ndarray, region: Box, fill: str) -> np.ndarray:
    """The voxels (c, z, y, x) of `region`, by padding the whole image as far as it takes."""
    far = max(max(-min(region.start), 0), max(b - n for b, n in zip(region.stop, voxels.shape[1:], strict=True)), 0)
    pads = [(0, 0)] + [(far, far)] * 3
    whole = np.pad(voxels, pads, mode="constant" if fill == "zero" else "reflect")
    return whole[(slice(None), *region.shift((far, far, far)).slices)]


@given(
    start=st.integers(-40, 10),
    length=st.integers(1, 60),
    size=st.integers(1, 20),
    fill=st.sampled_from(["zero", "reflect"]),
)
def test_each_position_is_where_numpy_pads_it(start: int, length: int, size: int, fill: str) -> None:
    index = source_index(start, start + length, size, fill)
    padded_index = np.pad(
        np.arange(size), 100, **({"mode": "reflect"} if fill == "reflect" else {"constant_values": -1})
    )
    assert np.array_equal(index, padded_index[100 + start : 100 + start + length])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[np.ndarray, object]]:
    """Voxels (c, z, y, x) and the array they stand in, of several sizes and shard layouts."""
    rng = np.random.default_rng(0)
    found = []
    for i, (shape, shard) in enumerate(
        [((19, 21, 23), (8, 16, 16)), ((5, 6, 7), (8, 8, 8)), ((1, 9, 4), (8, 16, 8)), ((2, 40, 11, 9), (16, 16, 16))]
    ):
        voxels = rng.integers(1, 1000, shape).astype(np.int16)
        array = stored(tmp_path_factory.mktemp("image") / str(i), voxels, shard)
        found.append((voxels.reshape(-1, *shape[-3:]), array))
    return found


@settings(max_examples=150)
@given(
    which=st.integers(0, 3),
    start=st.tuples(*[st.integers(-12, 9)] * 3),
    tile=st.tuples(*[st.integers(1, 14)] * 3),
    moves=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=6),
    fill=st.sampled_from(["zero", "reflect"]),
)
def test_any_tiles_in_rising_z_order_equal_the_padded_image(
    images: list, which: int, start: Triple, tile: Triple, moves: list[Triple], fill: str
) -> None:
    voxels, image = images[which]
    z, tiles = start[0], []
    for dz, dy, dx in moves:
        z += dz
        corner = (z, start[1] + dy, start[2] + dx)
        tiles.append(Box(corner, tuple(a + n for a, n in zip(corner, tile, strict=True))))
    image_box = Box((0, 0, 0), voxels.shape[1:])
    region = Box(
        tuple(min(t.start[i] for t in tiles) for i in range(3)), tuple(max(t.stop[i] for t in tiles) for i in range(3))
    )
    if region.clip(image_box).size == 0:
        return  # a block's tiles always touch the image
    channels = [Affine(3.0, 2.0, 1.0)] * len(voxels)
    window = window_of(image, region, tile[0], channels, fill)
    assert window.data.shape == (len(voxels), tile[0], *region.shape[1:])
    normalized = ((voxels.astype(np.float64) - 3) / 2 + 1).astype(np.float32)
    for t in tiles:
        assert np.array_equal(window.tile(t), padded(normalized, t, fill))
        assert window.data.shape == (len(voxels), tile[0], *region.shape[1:])


def test_each_chunk_of_a_plain_image_is_decoded_once(tmp_path: Path) -> None:
    class Counting:
        """The array, and how many rows of chunks were asked for."""

        def __init__(self, array: object) -> None:
            self.array, self.asked = array, []
            self.shape, self.chunks = array.shape, array.chunks

        def __getitem__(self, selection: tuple) -> np.ndarray:
            self.asked.append(selection[-3].start)
            return self.array[selection]

    voxels = np.arange(40 * 16 * 16, dtype=np.int16).reshape(40, 16, 16)
    image = Counting(stored(tmp_path / "a", voxels))
    window = window_of(image, Box((0, 0, 0), (40, 16, 16)), 16, [IDENTITY], "zero")
    for z in (0, 8, 16, 24):
        for y in (0, 8):
            tile = Box((z, y, 0), (z + 16, y + 8, 16))
            assert np.array_equal(window.tile(tile)[0], voxels[tile.slices])
    assert image.asked == [0, 8, 16, 24, 32]


def test_only_what_the_region_needs_is_held(tmp_path: Path) -> None:
    image = stored(tmp_path / "a", np.ones((64, 64, 64), np.uint8))
    window = window_of(image, Box((0, 16, 40), (64, 32, 56)), 8, [IDENTITY], "zero")
    for z in (0, 4, 40, 56):
        assert window.tile(Box((z, 16, 40), (z + 8, 32, 56))).all()
        assert window.rows.raw.shape == (1, 8, 16, 16)


def _garbage(path: Path) -> None:
    path.write_bytes(np.random.default_rng(1).bytes(path.stat().st_size))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _rotten(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[40:80] = bytes(b ^ 0xFF for b in data[40:80])
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_garbage, _cut, _rotten])
def test_a_damaged_chunk_is_a_storage_failure(tmp_path: Path, damage: object) -> None:
    voxels = np.random.default_rng(0).integers(0, 255, (16, 32, 32)).astype(np.int16)
    image = stored(tmp_path / "a", voxels)
    damage(tmp_path / "a" / "c" / "1" / "0" / "1")  # type: ignore[operator]
    window = window_of(image, Box((0, 0, 0), (16, 32, 32)), 8, [IDENTITY], "zero")
    assert np.array_equal(window.tile(Box((0, 0, 0), (8, 32, 32)))[0], voxels[:8])
    with pytest.raises(StudyError) as caught:
        window.tile(Box((8, 0, 0), (16, 32, 32)))
    assert caught.value.cause == "storage"
    assert str(tmp_path) not in caught.value.message
