"""OME-Zarr 0.4 and 0.5 as a source: voxels, affine, digest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_helpers import AFFINE, ome, read_whole, write_ome

from pipeline.errors import StudyError
from pipeline.geometry import ome_scale, ome_translation
from pipeline.sources import digest_of, open_source

VERSIONS = ["0.4", "0.5"]
VOXELS = np.random.default_rng(0).integers(-500, 500, (19, 12, 13)).astype(np.int16)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    version=st.sampled_from(VERSIONS),
    dtype=st.sampled_from(["u1", "i1", "<u2", ">i2", "<u4", ">i4", "<u8", "<i8", "<f2", "<f4", ">f8", "?"]),
    shape=st.tuples(st.integers(1, 11), st.integers(1, 9), st.integers(1, 9)),
    lead=st.sampled_from([(), (2,), (1, 3)]),
    chunks=st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)),
    rows=st.integers(1, 12),
    data=st.data(),
)
def test_any_stored_form_reads_back(tmp_path_factory, version, dtype, shape, lead, chunks, rows, data) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("ome") / "scan.ome.zarr"
    voxels = (np.random.default_rng(len(shape)).standard_normal(lead + shape) * 99).astype(dtype)
    options: dict[str, Any] = {"chunks": (1,) * len(lead) + chunks}
    if version == "0.5" and data.draw(st.booleans(), label="sharded"):
        options["shards"] = (1,) * len(lead) + tuple(2 * c for c in chunks)
    if version == "0.4" and data.draw(st.booleans(), label="Fortran order"):
        options["order"] = "F"
    write_ome(folder, voxels, version=version, **options)
    whole, header = read_whole(ome(folder), rows)
    assert header.shape == shape
    assert header.has_channel_axis == bool(lead)
    assert header.channels == (lead[-1] if lead else 1)
    assert header.nifti is None
    assert np.array_equal(whole, voxels.reshape(header.channels, *shape).astype(header.dtype))


def test_types_without_a_home_elsewhere_are_widened(tmp_path: Path) -> None:
    for kind, becomes in ((np.bool_, np.uint8), (np.float16, np.float32), (np.dtype(">i4"), np.int32)):
        folder = tmp_path / str(np.dtype(kind))
        assert read_whole(ome(write_ome(folder, VOXELS.astype(kind))))[1].dtype == np.dtype(becomes)


def test_digest_is_of_the_content_not_of_its_storage(tmp_path: Path) -> None:
    forms = [
        write_ome(tmp_path / "a", VOXELS),
        write_ome(tmp_path / "b", VOXELS, version="0.4", chunks=(5, 12, 4), compressors=None),
        write_ome(tmp_path / "c", VOXELS, shards=(16, 16, 16)),
        write_ome(tmp_path / "d", VOXELS.astype(">i2"), version="0.4", order="F"),
        write_ome(tmp_path / "e", VOXELS, unit="micrometer", scale=[1e3] * 3),
    ]
    digests = set()
    for folder in forms:
        for rows in (1, 3, 8, 16, 100):
            with open_source(ome(folder)) as source:
                for _ in source.slabs(rows):
                    pass
                digests.add(source.digest())
    assert len(digests) == 1
    changed = VOXELS.copy()
    changed[7, 3, 5] += 1
    others = [
        write_ome(tmp_path / "f", changed),
        write_ome(tmp_path / "g", VOXELS, scale=[1, 1, 2]),
        write_ome(tmp_path / "h", VOXELS.astype(np.int32)),
        write_ome(tmp_path / "i", VOXELS[np.newaxis]),
        write_ome(tmp_path / "j", VOXELS.transpose(0, 2, 1)),
    ]
    assert len(digests | {digest_of(ome(folder)) for folder in others}) == 6


@pytest.mark.parametrize("version", VERSIONS)
def test_missing_chunks_are_the_fill_value(tmp_path: Path, version: str) -> None:
    folder = write_ome(tmp_path / "scan", np.full((9, 9, 9), 7, np.int16), version=version, fill_value=7)
    files = [p for p in (folder / "0").rglob("*") if p.is_file() and not p.name.startswith((".", "zarr"))]
    assert not files  # zarr leaves chunks of nothing but the fill value out
    assert (read_whole(ome(folder))[0] == 7).all()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("unit", "factor"), [("micrometer", 1e-3), ("meter", 1e3), ("millimeter", 1.0), (None, 1.0)])
def test_scale_translation_and_units_make_the_affine(
    tmp_path: Path, version: str, unit: str | None, factor: float
) -> None:
    move = [
        {"type": "scale", "scale": [3.0, 2.0, 0.5]},
        {"type": "translation", "translation": [30.0, -20.0, 10.0]},
    ]
    again = [
        {"type": "scale", "scale": [2.0, 1.0, 1.0]},
        {"type": "translation", "translation": [1.0, 2.0, 3.0]},
    ]
    folder = write_ome(
        tmp_path / "scan", VOXELS, version=version, unit=unit, dataset={"coordinateTransformations": move},
        multiscale={"coordinateTransformations": again},
    )  # fmt: skip
    header = read_whole(ome(folder))[1]
    expected = np.array([[0.5, 0, 0, 13], [0, 2, 0, -18], [0, 0, 6, 61], [0, 0, 0, 1.0]])
    expected[:3] *= factor
    assert np.allclose(header.affine, expected, rtol=1e-12)
    assert any("no affine is kept" in warning for warning in header.warnings)
    assert any("no unit" in warning for warning in header.warnings) == (unit is None)


def test_kept_affine_is_used_where_it_agrees(tmp_path: Path) -> None:
    kept = {"affine": AFFINE.tolist()}
    scale = list(ome_scale(AFFINE))
    header = read_whole(ome(write_ome(tmp_path / "a", VOXELS, scale=scale, maskmill=kept)))[1]
    assert np.array_equal(header.affine, AFFINE)
    assert header.warnings == ()
    micrometres = [1e3 * s for s in scale]
    folder = write_ome(tmp_path / "b", VOXELS, scale=micrometres, unit="micrometer", maskmill=kept, version="0.4")
    assert np.array_equal(read_whole(ome(folder))[1].affine, AFFINE)


@pytest.mark.parametrize(
    ("affine", "scale", "moved"),
    [
        (AFFINE.tolist(), [1.0, 1.0, 1.0], None),
        (AFFINE.tolist(), None, [40.25, -7.5, 13.0]),
        ([[1, 2], [3, 4]], [1.0, 1.0, 1.0], None),
        ("not numbers", [1.0, 1.0, 1.0], None),
        ([[float("nan")] * 4] * 4, [1.0, 1.0, 1.0], None),
        (np.zeros((4, 4)).tolist(), [1.0, 1.0, 1.0], None),
        ([[1, 0, 0, 0], [0, 1], [0]], [1.0, 1.0, 1.0], None),
    ],
)
def test_kept_affine_that_disagrees_is_not_used(
    tmp_path: Path, affine: Any, scale: list[float] | None, moved: list[float] | None
) -> None:
    scale = scale or list(ome_scale(AFFINE))
    transforms: list[dict[str, Any]] = [{"type": "scale", "scale": scale}]
    if moved:
        transforms.append({"type": "translation", "translation": moved})
    folder = write_ome(
        tmp_path / "scan",
        VOXELS,
        maskmill={"affine": affine},
        dataset={"coordinateTransformations": transforms},
    )
    header = read_whole(ome(folder))[1]
    assert ome_scale(header.affine) == tuple(scale)
    assert np.array_equal(header.affine[:3, :3], np.diag(scale[::-1]))
    assert "does not agree" in header.warnings[0]


def test_kept_affine_agrees_with_its_own_translation(tmp_path: Path) -> None:
    transforms = [
        {"type": "scale", "scale": ome_scale(AFFINE)},
        {"type": "translation", "translation": ome_translation(AFFINE)},
    ]
    folder = write_ome(
        tmp_path / "scan", VOXELS, maskmill={"affine": AFFINE.tolist()},
        dataset={"coordinateTransformations": transforms},
    )  # fmt: skip
    assert np.array_equal(read_whole(ome(folder))[1].affine, AFFINE)


@pytest.mark.parametrize("version", VERSIONS)
def test_time_points(tmp_path: Path, version: str) -> None:
    moving = np.stack([VOXELS, VOXELS + 1, VOXELS + 2])[:, np.newaxis]
    folder = write_ome(tmp_path / "scan", moving, version=version)
    with pytest.raises(StudyError, match="`segment --volume N`"), open_source(ome(folder)):
        pass
    with pytest.raises(StudyError, match="--volume 3"), open_source(ome(folder), volume=3):
        pass
    assert np.array_equal(read_whole(ome(folder), volume=2)[0][0], VOXELS + 2)


def test_all_levels_but_the_first_are_left_alone(tmp_path: Path) -> None:
    folder = write_ome(tmp_path / "scan", VOXELS)
    group = json.loads((folder / "zarr.json").read_text())
    datasets = group["attributes"]["ome"]["multiscales"][0]["datasets"]
    datasets.append({"path": "1", "coordinateTransformations": [{"type": "scale", "scale": [2, 2, 2]}]})
    (folder / "zarr.json").write_text(json.dumps(group))
    zarr.create_array(str(folder / "1"), shape=(10, 6, 7), chunks=(8, 8, 8), dtype="i2")
    assert np.array_equal(read_whole(ome(folder))[0][0], VOXELS)
