"""Damaged and hostile OME-Zarr images: one clear line each, and nothing outside the image is touched."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_helpers import ome, read_whole, write_ome

from pipeline.errors import StudyError
from pipeline.sources import open_source

VOXELS = np.random.default_rng(0).integers(-500, 500, (19, 12, 13)).astype(np.int16)


def refusal(folder: Path, cause: str = "input") -> str:
    with pytest.raises(StudyError) as refused:
        read_whole(ome(folder))
    assert refused.value.cause == cause
    assert str(folder) not in refused.value.message
    assert "\n" not in refused.value.message
    return refused.value.message


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def chunk_files(folder: Path) -> list[Path]:
    names = ("zarr.json", ".zarray", ".zattrs")
    return sorted(p for p in (folder / "0").rglob("*") if p.is_file() and p.name not in names)


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2": ("0.4", {}),
    "v2 plain": ("0.4", {"compressors": None}),
    "v3": ("0.5", {}),
    "v3 sharded": ("0.5", {"shards": (16, 16, 16)}),
}
DAMAGES = ("cut", "garbage", "empty", "flipped")
# Plain bytes carry nothing to tell a flipped bit by.
DAMAGED = [(form, damage) for form in FORMS for damage in DAMAGES if (form, damage) != ("v2 plain", "flipped")]


@pytest.mark.parametrize(("form", "damage"), DAMAGED)
def test_damaged_chunks(tmp_path: Path, form: str, damage: str) -> None:
    version, options = FORMS[form]
    folder = write_ome(tmp_path / "scan", VOXELS, version=version, **options)
    chunk = chunk_files(folder)[-1]
    data = chunk.read_bytes()
    middle = len(data) // 2
    chunk.write_bytes(
        {
            "cut": data[:middle],
            "garbage": b"garbage" * 3,
            "empty": b"",
            "flipped": b"\xff" * 40 + data[40:-40] + b"\xff" * 40,
        }[damage]
    )
    assert "cannot be decoded" in refusal(folder)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_missing_or_unreadable_array(tmp_path: Path, version: str) -> None:
    folder = write_ome(tmp_path / "scan", VOXELS, version=version)
    metadata = folder / "0" / ("zarr.json" if version == "0.5" else ".zarray")
    for content in ("", "[]", "{}", "{nonsense", "[" * 100_000):
        metadata.write_text(content)
        assert refusal(folder)
    metadata.unlink()
    assert "missing" in refusal(folder)


@pytest.mark.parametrize(
    "path",
    [
        "../other/0",
        "..",
        "/etc",
        "0/../../other/0",
        "",
        ".",
        "a\\b",
        "file:///x",
        0,
        None,
        ["0"],
        "x\0y",
        "0//0",
    ],
)
def test_paths_that_climb_are_not_followed(tmp_path: Path, path: Any) -> None:
    write_ome(tmp_path / "other", VOXELS)
    folder = write_ome(tmp_path / "scan", VOXELS, path=path)
    assert "stay inside the image" in refusal(folder)


V3 = Callable[[dict[str, Any]], Any]
ARRAY_V3: dict[str, tuple[V3, str]] = {
    "absurd shape": (lambda m: m.update(shape=[2**20, 2**20, 2**20]), "more than any scan"),
    "overflowing shape": (lambda m: m.update(shape=[2**62, 2**62, 2**62]), "more than any scan"),
    "zero size": (lambda m: m.update(shape=[0, 12, 13]), "no voxels"),
    "negative size": (lambda m: m.update(shape=[-1, 12, 13]), "no voxels"),
    "fractional size": (lambda m: m.update(shape=[1.5, 12, 13]), "whole numbers"),
    "other number of axes": (lambda m: m.update(shape=[12, 13], dimension_names=None), ""),
    "huge chunks": (
        lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[2**20, 2**20, 8]),
        "2 GiB",
    ),
    "no chunks": (lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[0, 8, 8]), ""),
    "dust": (
        lambda m: (
            m.update(shape=[4, 2**18, 2**18]),
            m["chunk_grid"]["configuration"].update(chunk_shape=[1, 1, 1]),
        ),
        "million chunks",
    ),
    "complex": (lambda m: m.update(data_type="complex64"), "real integer or float"),
    "strings": (lambda m: m.update(data_type="string"), "real integer or float"),
    "unknown codec": (lambda m: m["codecs"].append({"name": "numcodecs.pickle"}), "codec"),
    "a group": (lambda m: m.update(node_type="group"), ""),
    "no codecs": (lambda m: m.pop("codecs"), ""),
}


@pytest.mark.parametrize("name", ARRAY_V3)
def test_hostile_array_metadata(tmp_path: Path, name: str) -> None:
    change, says = ARRAY_V3[name]
    folder = write_ome(tmp_path / "scan", VOXELS)
    edit(folder / "0/zarr.json", change)
    assert says in refusal(folder)


@pytest.mark.parametrize("filters", [True, 7, {}, "pickle", [7]])
def test_filters_of_a_wrong_type_are_refused(tmp_path: Path, filters: Any) -> None:
    folder = write_ome(tmp_path / "scan", VOXELS, version="0.4")
    edit(folder / "0/.zarray", lambda m: m.update(filters=filters))
    assert "codec" in refusal(folder)


class _Trap:
    """Unpickling this makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.mark.parametrize("where", ["filters", "compressor", "object"])
def test_a_codec_that_runs_code_does_not_run(tmp_path: Path, where: str) -> None:
    folder = write_ome(tmp_path / "scan", VOXELS, version="0.4")
    trap = {"id": "pickle", "protocol": 5}
    change = {
        "filters": {"filters": [trap]},
        "compressor": {"compressor": trap},
        "object": {"dtype": "|O", "filters": [trap], "fill_value": None},
    }[where]
    edit(folder / "0/.zarray", lambda m: m.update(change))
    for chunk in chunk_files(folder):
        chunk.write_bytes(pickle.dumps(_Trap(str(tmp_path / "sprung"))))
    refusal(folder)
    assert not (tmp_path / "sprung").exists()


IMAGE: dict[str, tuple[dict[str, Any], str, str]] = {
    "two axes": ({"axes": [{"name": "y"}, {"name": "x"}]}, "input", "not a volume's"),
    "swapped axes": ({"axes": [{"name": n} for n in "xyz"]}, "input", "not a volume's"),
    "axes as words": ({"axes": ["z", "y", "x"]}, "input", "not described"),
    "no axes": ({"axes": None}, "input", "not described"),
    "odd unit": ({"axes": [{"name": n, "unit": "second"} for n in "zyx"]}, "geometry", "no length"),
    "unit of no kind": ({"axes": [{"name": n, "unit": ["mm"]} for n in "zyx"]}, "geometry", "no length"),
    "no datasets": ({"datasets": []}, "input", "no datasets"),
    "datasets of no kind": ({"datasets": ["0"]}, "input", "no datasets"),
}
TRANSFORMS: dict[str, Any] = {
    "none": None,
    "empty": [],
    "zero": [{"type": "scale", "scale": [1, 0, 1]}],
    "negative": [{"type": "scale", "scale": [1, -1, 1]}],
    "infinite": [{"type": "scale", "scale": [1, 1, 1e400]}],
    "huge": [{"type": "scale", "scale": [1, 1, 1e90]}],
    "words": [{"type": "scale", "scale": ["1", "1", "1"]}],
    "short": [{"type": "scale", "scale": [1, 1]}],
    "file": [{"type": "scale", "path": "../secret"}],
    "rotation": [{"type": "rotation", "rotation": [1] * 9}],
    "number": [5],
}


@pytest.mark.parametrize("name", IMAGE)
def test_hostile_image_metadata(tmp_path: Path, name: str) -> None:
    change, cause, says = IMAGE[name]
    assert says in refusal(write_ome(tmp_path / "scan", VOXELS, multiscale=change), cause)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_scales_that_place_nothing(tmp_path: Path, name: str) -> None:
    change = {"coordinateTransformations": TRANSFORMS[name]}
    assert refusal(write_ome(tmp_path / "scan", VOXELS, dataset=change), "geometry")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | st.just("blosc"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["name", "id", "x"]), inner),
    max_leaves=4,
)


def nodes(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON document."""
    pairs = document.items() if isinstance(document, dict) else enumerate(document)
    found = []
    for key, value in list(pairs):
        found.append((document, key))
        if isinstance(value, dict | list):
            found += nodes(value)
    return found


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("images")
    for version in ("0.4", "0.5"):
        write_ome(top / version, VOXELS, version=version, maskmill={"affine": np.eye(4).tolist()})
    return top


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(["0.4/.zattrs", "0.4/0/.zarray", "0.5/zarr.json", "0.5/0/zarr.json"]),
    pick=st.integers(0, 10**6),
    value=JSON,
)
def test_any_metadata_reads_or_is_refused(images: Path, name: str, pick: int, value: Any) -> None:
    """One value of the metadata replaced by any other: a volume comes out or a StudyError, nothing else."""
    good = (images / name).read_text()
    document = json.loads(good)
    places = nodes(document)
    container, key = places[pick % len(places)]
    container[key] = value
    (images / name).write_text(json.dumps(document))
    try:
        with suppress(StudyError), open_source(ome(images / name[:3])) as source:
            z, y, x = source.header.shape
            assert z * y * x <= 2**40
            if source.header.channels * y * x < 10**6:  # a larger sparse image is as good as any
                assert all(np.isfinite(slab).all() for slab in islice(source.slabs(8), 4))
    finally:
        (images / name).write_text(good)


def test_axes_and_array_must_agree(tmp_path: Path) -> None:
    folder = write_ome(tmp_path / "scan", VOXELS, axes="czyx", scale=[1] * 4)
    assert "3 axes" in refusal(folder)


def test_not_an_image(tmp_path: Path) -> None:
    assert "no OME-Zarr image" in refusal(tmp_path / "nowhere.zarr")
    (tmp_path / "plain.zarr").mkdir()
    (tmp_path / "plain.zarr/zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    assert "no OME-Zarr image" in refusal(tmp_path / "plain.zarr")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_nan_also_where_no_chunk_was_written(tmp_path: Path, version: str) -> None:
    voxels = np.zeros((19, 12, 13), np.float32)
    voxels[16:] = np.nan
    folder = write_ome(tmp_path / "scan", voxels, version=version, fill_value=np.nan)
    message = refusal(folder)
    assert "z=16, y=0, x=0" in message
    voxels[16:] = 0
    voxels[9, 2, 3] = np.inf
    message = refusal(write_ome(tmp_path / "other", voxels, version=version))
    assert "1 voxels of rows 8 to 11" in message
    assert "z=9, y=2, x=3" in message
