"""A source into its image: the same voxels, sums and digest; whole or not there; linked or copied, one answer."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import ome, statistics, store
from pipeline.errors import Interrupted, StudyError
from pipeline.ingest import Image, known_content, stage_image
from pipeline.sources import Study, digest_of

AFFINE = np.array([[-0.9, 0.1, 0.3, 12.0], [0.2, 1.1, -0.2, -7.5], [0.1, -0.3, 2.9, 40.25], [0, 0, 0, 1.0]])


def voxels(shape: tuple[int, ...] = (21, 14, 17), dtype: Any = np.int16, seed: int = 0) -> np.ndarray:
    """(z, y, x) or (c, z, y, x)"""
    return (np.random.default_rng(seed).normal(100, 40, shape) * 100 // 100).astype(dtype)


def nifti(folder: Path, data: np.ndarray, name: str = "scan") -> Study:
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for c, channel in enumerate(data.reshape(-1, *data.shape[-3:])):
        path = folder / f"{name}_{c:04d}.nii"
        nib.save(nib.Nifti1Image(channel.T, AFFINE, dtype=data.dtype), path)
        parts.append(str(path))
    return Study(name, parts[0], tuple(parts), "nifti")


def omezarr(folder: Path, data: np.ndarray, axes: str = "", path: str = "0") -> Study:
    image = folder / "scan.ome.zarr"
    axes = axes or "czyx"[-data.ndim :]
    chunks = tuple(min(n, 6) for n in data.shape)
    array = zarr.create_array(image / path, shape=data.shape, dtype=data.dtype, chunks=chunks)
    array[...] = data
    kinds = {"c": "channel", "t": "time"}
    described = [{"name": n, "type": kinds.get(n, "space")} for n in axes]
    scale = [{"type": "scale", "scale": [1.0] * data.ndim}]
    multiscale = {"axes": described, "datasets": [{"path": path, "coordinateTransformations": scale}]}
    facts = {"ome": {"version": "0.5", "multiscales": [multiscale]}}
    (image / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": facts}))
    return Study("scan", str(image), (str(image),), "ome-zarr")


def staged(out: Path, study: Study, *, link: bool = False, volume: int | None = None) -> tuple[Image, str | None]:
    return stage_image(str(out), study, volume=volume, link=link, stop=threading.Event())


def taken_in(out: Path, study: Study) -> Image:
    """The image under its name, as a run takes it in."""
    image, folder = staged(out, study)
    assert folder is not None
    store.move(folder, image.group)
    return image


def sums(image: Image) -> list[statistics.ChannelStatistics]:
    return statistics.from_bytes(store.read(image.statistics))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(21, 14, 17), (1, 1, 1), (70, 9, 8), (2, 21, 14, 17)])
def test_the_image_is_the_source(tmp_path: Path, shape: tuple[int, ...], dtype: Any) -> None:
    data = voxels(shape, dtype)
    study = nifti(tmp_path / "in", data)
    image = taken_in(tmp_path / "out", study)
    level0 = ome.open_array(image.level0)
    assert level0.dtype == dtype
    assert np.array_equal(level0[...], data)
    assert image.content == digest_of(study)
    attributes = ome.read_attributes(image.group)
    assert attributes is not None
    assert attributes["maskmill"]["content"] == image.content
    assert np.allclose(attributes["maskmill"]["affine"], AFFINE, atol=1e-6)
    channels = data.reshape(-1, *data.shape[-3:]).astype(np.float64)
    for channel, found, shown in zip(channels, sums(image), attributes["ome"]["omero"]["channels"], strict=True):
        assert found.mean == pytest.approx(channel.mean())
        assert found.std == pytest.approx(channel.std(), abs=1e-9)
        window = shown["window"]
        assert (window["min"], window["max"]) == (found.minimum, found.maximum) == (channel.min(), channel.max())


def test_reading_again_takes_what_is_there(tmp_path: Path) -> None:
    study = nifti(tmp_path / "in", voxels())
    first = taken_in(tmp_path / "out", study)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    assert known_content(str(tmp_path / "out"), study) == first.content
    again, folder = staged(tmp_path / "out", study)
    assert folder is None
    assert (again.group, again.content, again.statistics) == (first.group, first.content, first.statistics)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize("lost", ["statistics", "metadata", "content"])
def test_what_is_not_whole_is_read_anew(tmp_path: Path, lost: str) -> None:
    study = nifti(tmp_path / "in", voxels())
    first = taken_in(tmp_path / "out", study)
    if lost == "statistics":
        store.delete(first.statistics)
    elif lost == "metadata":
        store.delete(first.group + "/zarr.json")
    else:
        nifti(tmp_path / "in", voxels(seed=1))
    again, folder = staged(tmp_path / "out", study)
    assert folder is not None
    assert np.array_equal(ome.open_array(folder + "/0")[...], voxels(seed=1 if lost == "content" else 0))
    assert (again.content == first.content) == (lost != "content")
    assert store.exists(again.statistics)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_voxel_leaves_nothing_behind(tmp_path: Path, bad: float) -> None:
    data = voxels(dtype=np.float32)
    data[-1, 3, 4] = bad
    with pytest.raises(StudyError, match="NaN or infinite") as refused:
        staged(tmp_path / "out", nifti(tmp_path / "in", data))
    assert refused.value.cause == "input"
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_numbers_past_float32_are_refused_and_its_ends_are_not(tmp_path: Path) -> None:
    data = np.zeros((4, 5, 6), np.float64)
    data[0, 0, :2] = (np.finfo(np.float32).max, -np.finfo(np.float32).max)
    assert sums(taken_in(tmp_path / "out", nifti(tmp_path / "in", data)))[0].maximum == np.finfo(np.float32).max
    for value in (1e300, -1e39):
        data[3, 4, 5] = value
        with pytest.raises(StudyError, match="float32") as refused:
            staged(tmp_path / "other", nifti(tmp_path / "in", data, "large"))
        assert refused.value.cause == "input"


def test_a_stop_leaves_nothing_behind(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    study = nifti(tmp_path / "in", voxels())
    with pytest.raises(Interrupted):
        stage_image(str(tmp_path / "out"), study, volume=None, link=False, stop=stop)
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


@settings(max_examples=12)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 20), st.integers(1, 20)),
    dtype=st.sampled_from([np.uint8, np.int16, np.int32, np.float32]),
    channels=st.integers(0, 2),
)
def test_linked_or_copied_the_sums_are_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], dtype: Any, channels: int
) -> None:
    """Slabs are cut otherwise when an image is only looked at: that must not change what networks are given."""
    folder = tmp_path_factory.mktemp("both")
    data = voxels((channels, *shape) if channels else shape, dtype)
    study = omezarr(folder / "in", data)
    copied, _ = staged(folder / "copied", study)
    linked, nothing = staged(folder / "linked", study, link=True)
    assert nothing is None
    assert copied.content == linked.content == digest_of(study)
    assert store.read(copied.statistics) == store.read(linked.statistics)
    assert np.array_equal(ome.open_array(linked.level0)[...], data)


def test_a_link_writes_nothing_into_the_image(tmp_path: Path) -> None:
    study = omezarr(tmp_path / "in", voxels(), path="scale0/image")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "in").rglob("*")}
    image, _ = staged(tmp_path / "out", study, link=True)
    assert os.path.realpath(image.group) == os.path.realpath(study.parts[0])
    assert image.level0.endswith("scale0/image")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "in").rglob("*")} == before
    again, _ = staged(tmp_path / "out", study, link=True)
    assert again.level0 == image.level0


@pytest.mark.parametrize(("axes", "lead"), [("tzyx", (3,)), ("tczyx", (3, 1)), ("tzyx", (1,))])
def test_an_image_with_a_time_axis_is_not_linked(tmp_path: Path, axes: str, lead: tuple[int, ...]) -> None:
    study = omezarr(tmp_path / "in", voxels((*lead, 5, 6, 7)), axes)
    with pytest.raises(StudyError, match="time axis") as refused:
        staged(tmp_path / "out", study, link=True, volume=lead[0] - 1)
    assert refused.value.cause == "input"
    copied, _ = staged(tmp_path / "out", study, volume=lead[0] - 1)
    assert copied.header.shape == (5, 6, 7)


def test_a_copy_is_not_turned_into_a_link(tmp_path: Path) -> None:
    study = omezarr(tmp_path / "in", voxels())
    taken_in(tmp_path / "out", study)
    store.delete(str(tmp_path / "out" / "images" / ".statistics"))
    with pytest.raises(StudyError, match="already holds a copy"):
        staged(tmp_path / "out", study, link=True)
