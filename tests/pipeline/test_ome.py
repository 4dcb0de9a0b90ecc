"""OME-Zarr as others read it: valid by yaozarrs, equal in tensorstore, image and labels in the same place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import yaozarrs
import zarr
from hypothesis import given
from hypothesis import strategies as st
from scans import OBLIQUE, brain, random_model, save_nifti
from yaozarrs import v05

import pipeline
from pipeline import ome
from pipeline.errors import StudyError


def opened(path: Path) -> np.ndarray:
    """A level as tensorstore, which shares no code with zarr-python, reads it."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return np.asarray(tensorstore.open(spec).result().read().result())


def attributes(group: Path) -> dict[str, Any]:
    document = json.loads((group / "zarr.json").read_text())
    assert (document["zarr_format"], document["node_type"]) == (3, "group")
    return document["attributes"]


SHAPES = {"small": (12, 14, 10), "two levels": (20, 260, 12), "three levels": (9, 70, 520)}  # x, y, z


@pytest.fixture(scope="module", params=SHAPES)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A published image, and the voxels (z, y, x) it was made of."""
    folder = tmp_path_factory.mktemp("ome")
    data = brain(SHAPES[request.param])
    save_nifti(folder / "scan.nii", data, OBLIQUE)
    summary = pipeline.segment(folder / "scan.nii", "kmeans", folder / "out", threads=1)
    assert summary.published == 1
    return folder / "out" / "images" / "scan.ome.zarr", data.transpose(2, 1, 0)


def test_it_is_valid_to_the_letter(published: tuple[Path, np.ndarray]) -> None:
    image, _ = published
    for group in (image, image / "labels", image / "labels" / "kmeans"):
        yaozarrs.validate_zarr_store(str(group))
    checked = yaozarrs.validate_ome_object(attributes(image / "labels" / "kmeans")["ome"], v05.LabelImage)
    named = attributes(image / "labels" / "kmeans")["ome"]["image-label"]["properties"]
    assert [(p["label-value"], p["name"]) for p in named] == [(k, f"class {k}") for k in (1, 2, 3)]
    assert [c.label_value for c in checked.image_label.colors] == [1, 2, 3]
    assert checked.image_label.source.image == "../../"
    listed = yaozarrs.validate_ome_object(attributes(image / "labels")["ome"], v05.LabelsGroup)
    assert listed.labels == ["kmeans"]


def test_every_level_is_there_and_reads_the_same_elsewhere(published: tuple[Path, np.ndarray]) -> None:
    image, voxels = published
    for group, first in ((image, voxels), (image / "labels" / "kmeans", None)):
        shapes = ome.level_shapes(voxels.shape)
        (multiscale,) = attributes(group)["ome"]["multiscales"]
        assert [d["path"] for d in multiscale["datasets"]] == [str(i) for i in range(len(shapes))]
        assert [axis["name"] for axis in multiscale["axes"]] == ["z", "y", "x"]
        assert {axis["unit"] for axis in multiscale["axes"]} == {"millimeter"}
        for level, shape in enumerate(shapes):
            found = opened(group / str(level))
            assert found.shape == shape
            assert np.array_equal(found, zarr.open_array(group / str(level), mode="r")[...])
            assert json.loads((group / str(level) / "zarr.json").read_text())["dimension_names"] == ["z", "y", "x"]
        assert not (group / str(len(shapes))).exists()
        if first is not None:
            assert np.array_equal(opened(group / "0"), first)


def placed(dataset: dict[str, Any], index: np.ndarray) -> np.ndarray:
    """Where a level says that a voxel's centre lies, in the multiscale's own coordinates."""
    point = index.astype(float)
    for step in dataset["coordinateTransformations"]:
        numbers = np.array(step[step["type"]])
        point = point * numbers if step["type"] == "scale" else point + numbers
    return point


def test_levels_of_image_and_labels_lie_in_one_place(published: tuple[Path, np.ndarray]) -> None:
    image, voxels = published
    both = [attributes(g)["ome"]["multiscales"][0]["datasets"] for g in (image, image / "labels" / "kmeans")]
    assert [d["coordinateTransformations"] for d in both[0]] == [d["coordinateTransformations"] for d in both[1]]
    spacing = np.linalg.norm(OBLIQUE[:3, :3], axis=0)[::-1]
    assert both[0][0]["coordinateTransformations"] == [{"type": "scale", "scale": pytest.approx(spacing.tolist())}]
    for level, shape in enumerate(ome.level_shapes(voxels.shape)):
        steps = np.round(np.array(voxels.shape) / shape).astype(int)
        steps = 2 ** np.round(np.log2(steps)).astype(int)
        # A coarse voxel's centre is the mean of the centres of the fine voxels it was made of.
        first = np.mean([placed(both[0][0], np.zeros(3)), placed(both[0][0], steps - 1)], axis=0)
        assert placed(both[0][level], np.zeros(3)) == pytest.approx(first)
        second = first + steps * spacing
        assert placed(both[0][level], np.ones(3)) == pytest.approx(second)


def test_the_affine_is_kept_beside_the_scale(published: tuple[Path, np.ndarray]) -> None:
    image, _ = published
    for group in (image, image / "labels" / "kmeans"):
        assert np.allclose(attributes(group)["maskmill"]["affine"], OBLIQUE, atol=1e-5)


def test_labels_hold_the_mask(published: tuple[Path, np.ndarray]) -> None:
    import nibabel as nib

    image, voxels = published
    labels = opened(image / "labels" / "kmeans" / "0")
    mask = nib.load(image.parents[1] / "masks" / "scan.nii.gz")
    assert labels.dtype == np.uint8
    assert np.array_equal(np.asarray(mask.dataobj).transpose(2, 1, 0), labels)
    properties = attributes(image / "labels" / "kmeans")["ome"]["image-label"]["properties"]
    assert {p["label-value"]: p["voxels"] for p in properties} == {k: int((labels == k).sum()) for k in (1, 2, 3)}
    # kmeans orders its classes by brightness: the labels fit the voxels they lie on.
    means = [voxels[labels == k].mean() for k in range(4) if (labels == k).any()]
    assert means == sorted(means)


def test_channels_have_an_axis_in_image_and_labels(tmp_path: Path) -> None:
    model = random_model(tmp_path / "model", channels=2)
    for c in range(2):
        save_nifti(tmp_path / "in" / f"scan_000{c}.nii", brain((20, 260, 11), seed=c))
    summary = pipeline.segment(tmp_path / "in", model, tmp_path / "out", threads=1)
    assert summary.published == 1
    (image,) = (tmp_path / "out" / "images").glob("*.ome.zarr")
    labels = image / "labels" / "tiny-resunet"
    for group, channels in ((image, 2), (labels, 1)):
        yaozarrs.validate_zarr_store(str(group))
        assert opened(group / "0").shape == (channels, 11, 260, 20)
        assert opened(group / "1").shape == (channels, 11, 130, 20)
        (multiscale,) = attributes(group)["ome"]["multiscales"]
        assert multiscale["axes"][0] == {"name": "c", "type": "channel"}
        assert all(len(t[t["type"]]) == 4 for d in multiscale["datasets"] for t in d["coordinateTransformations"])
    stacked = np.stack([brain((20, 260, 11), seed=c).transpose(2, 1, 0) for c in range(2)])
    assert np.array_equal(opened(image / "0"), stacked)


@pytest.mark.parametrize(("unit", "mm"), [("millimeter", 1.0), ("micrometer", 1e-3)])
def test_labels_in_a_linked_image_lie_where_it_lies(tmp_path: Path, unit: str, mm: float) -> None:
    scale, translation = [3.0, 1.5, 2.0], [70.0, -20.0, 5.5]
    image = tmp_path / "in" / "scan.ome.zarr"
    voxels = brain((10, 270, 12)).transpose(2, 1, 0)
    array = zarr.create_array(
        image / "full", shape=voxels.shape, dtype=voxels.dtype, chunks=(8, 64, 64), dimension_names=list("zyx")
    )
    array[...] = voxels
    axes = [{"name": n, "type": "space", "unit": unit} for n in "zyx"]
    steps = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": translation}]
    datasets = [{"path": "full", "coordinateTransformations": steps}]
    facts = {"ome": {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}}
    (image / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": facts}))
    yaozarrs.validate_zarr_store(str(image))
    before = {p: p.read_bytes() for p in image.rglob("*") if p.is_file()}

    summary = pipeline.segment(tmp_path / "in", "kmeans", tmp_path / "out", images="link", threads=1)
    assert summary.published == 1
    assert all(p.read_bytes() == data for p, data in before.items())
    yaozarrs.validate_zarr_store(str(image / "labels" / "kmeans"))
    described = attributes(image / "labels" / "kmeans")["ome"]["multiscales"][0]
    assert {axis["unit"] for axis in described["axes"]} == {"millimeter"}
    for index in (np.zeros(3), np.array([3.0, 7.0, 1.0])):
        there = placed(datasets[0], index) * mm
        assert placed(described["datasets"][0], index) == pytest.approx(there)
    assert placed(described["datasets"][1], np.zeros(3)) == pytest.approx(
        placed(datasets[0], np.array([0, 0.5, 0])) * mm
    )


@given(shape=st.tuples(*[st.integers(1, 3000)] * 3), channels=st.integers(1, 8), size=st.sampled_from([1, 2, 4, 8]))
def test_shards_are_whole_chunks_and_slabs_stay_small(shape: tuple[int, int, int], channels: int, size: int) -> None:
    labels, image = ome.shard_shape(shape), ome.image_shard_shape(shape, channels, size)
    for shard in (labels, image):
        chunk = ome.chunk_shape(shard)
        assert all(s % c == 0 and c <= 64 and s % 8 == 0 for s, c in zip(shard, chunk, strict=True))
        assert all(s <= n + 7 for s, n in zip(shard, shape, strict=True))
    assert image[1:] == labels[1:]
    slab = image[0] * shape[1] * shape[2] * channels * size
    assert slab <= ome.SLAB_BYTES or image[0] == min(8, labels[0])
    # Rows are halved and cut to whole chunks of 8 only while their slab is too large.
    assert slab // image[0] * (2 * image[0] + 15) > ome.SLAB_BYTES or image[0] == labels[0]


def test_background_shards_of_labels_are_not_stored(tmp_path: Path) -> None:
    array = ome.create_array(str(tmp_path / "0"), (64, 256, 128), (64, 128, 128), np.dtype(np.uint8), list("zyx"))
    array[:, 128:] = 5
    array[:, :128] = 0
    assert [p.name for p in (tmp_path / "0" / "c" / "0").iterdir()] == ["1"]
    assert not opened(tmp_path / "0")[:, :128].any()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"zarr_format": 3}', '{"zarr_format": 3, "node_type": "array"}'])
def test_damaged_metadata_is_a_storage_failure(tmp_path: Path, text: str) -> None:
    ome.create_array(str(tmp_path / "0"), (8, 8, 8), (8, 8, 8), np.dtype(np.uint8), list("zyx"))
    (tmp_path / "0" / "zarr.json").write_text(text)
    with pytest.raises(StudyError) as caught:
        ome.open_array(str(tmp_path / "0"))
    assert caught.value.cause == "storage"
    assert str(tmp_path) not in caught.value.message


def test_listing_labels_keeps_what_else_is_said_there(tmp_path: Path) -> None:
    ome.write_group(str(tmp_path / "labels"), {"ome": {"version": "0.5", "labels": ["theirs"], "note": 1}, "other": 2})
    assert ome.labels_listed(str(tmp_path)) == ["theirs"]
    ome.list_labels(str(tmp_path), ["theirs", "ours"])
    assert attributes(tmp_path / "labels") == {
        "ome": {"version": "0.5", "labels": ["theirs", "ours"], "note": 1},
        "other": 2,
    }
    assert ome.labels_listed(str(tmp_path / "nowhere")) == []
