"""The JSON of an OME-Zarr image, 0.4 (Zarr v2) and 0.5 (Zarr v3), read without trusting it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from pipeline import objects, store
from pipeline.errors import StudyError

LARGEST_JSON = 64 << 20
NOT_AN_IMAGE = (
    "it is no OME-Zarr image: expected zarr.json with attributes.ome.multiscales (0.5) or .zattrs with "
    "multiscales (0.4); of a folder that holds several images (a plate, a bioformats2raw folder) name one "
    "of them"
)
# UDUNITS-2 names that OME-NGFF lists for space axes, in mm.
MILLIMETRES = {
    "angstrom": 1e-7,
    "picometer": 1e-9,
    "nanometer": 1e-6,
    "micrometer": 1e-3,
    "millimeter": 1.0,
    "centimeter": 10.0,
    "decimeter": 100.0,
    "meter": 1e3,
    "inch": 25.4,
    "foot": 304.8,
    "yard": 914.4,
}
_AXES = (("z", "y", "x"), ("c", "z", "y", "x"), ("t", "z", "y", "x"), ("t", "c", "z", "y", "x"))


@dataclass(frozen=True)
class Image:
    """What an image's metadata says of its highest resolution."""

    zarr_format: int
    path: str
    """Of the array, inside the image's folder."""
    axes: tuple[str, ...]
    scale: tuple[float, float, float]
    """(z, y, x), mm."""
    translation: tuple[float, float, float]
    """(z, y, x), mm: where the centre of voxel 0 lies."""
    affine: Any
    """What stands in attributes.maskmill.affine, unchecked; None if nothing does."""
    warnings: tuple[str, ...]


def read_json(folder: str, name: str) -> dict[str, Any] | None:
    """A JSON object in a folder; None where there is none, or no object, or something that is not JSON."""
    url = store.join(folder, name)
    try:
        if not 0 < store.size(url) <= LARGEST_JSON:
            return None
        value = json.loads(store.read(url))
    except (ValueError, RecursionError):
        return None
    except OSError as error:
        if objects.is_remote(url) and not isinstance(error, FileNotFoundError):
            raise  # it may well be there
        return None
    return value if isinstance(value, dict) else None


def attributes_of(folder: str) -> tuple[int, dict[str, Any]] | None:
    """The Zarr format (2 or 3) and the attributes of a group; None where the folder is none."""
    group = read_json(folder, "zarr.json")
    if group is not None:
        attributes = group.get("attributes")
        return 3, attributes if isinstance(attributes, dict) else {}
    attributes = read_json(folder, ".zattrs")
    return None if attributes is None else (2, attributes)


def multiscales_of(folder: str) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
    """The Zarr format, the first multiscale and all attributes of an image; None where it is no image."""
    found = attributes_of(folder)
    if found is None:
        return None
    zarr_format, attributes = found
    ome = attributes.get("ome") if zarr_format == 3 else attributes
    multiscales = ome.get("multiscales") if isinstance(ome, dict) else None
    if not isinstance(multiscales, list) or not multiscales or not isinstance(multiscales[0], dict):
        return None
    return zarr_format, multiscales[0], attributes


def looks_like_ome_zarr(folder: str) -> bool:
    """Whether a folder is an image, by its metadata, or claims to be one by its ending .zarr.

    A damaged one is then refused by name when it is opened, not passed over in silence.
    """
    return folder.lower().endswith(".zarr") or multiscales_of(folder) is not None


def read_image(folder: str) -> Image:
    """The checked metadata of an image.

    Raises StudyError: "input", or "geometry" where its scale places no voxels.
    """
    found = multiscales_of(folder)
    if found is None:
        raise StudyError("input", NOT_AN_IMAGE)
    zarr_format, multiscale, attributes = found
    axes, units, warnings = _axes(multiscale.get("axes"))
    datasets = multiscale.get("datasets")
    if not isinstance(datasets, list) or not datasets or not isinstance(datasets[0], dict):
        raise StudyError("input", "its multiscale lists no datasets; expected at least the full resolution")
    scale, translation = _transform(
        len(axes), datasets[0].get("coordinateTransformations"), multiscale.get("coordinateTransformations")
    )
    ours = attributes.get("maskmill")
    return Image(
        zarr_format=zarr_format,
        path=_safe_path(datasets[0].get("path")),
        axes=axes,
        scale=_last_three(scale, units),
        translation=_last_three(translation, units),
        affine=ours.get("affine") if isinstance(ours, dict) else None,
        warnings=warnings,
    )


def _axes(value: Any) -> tuple[tuple[str, ...], list[float], tuple[str, ...]]:
    """Axis names, mm per unit of z, y and x, and warnings."""
    if not isinstance(value, list) or not all(isinstance(axis, dict) for axis in value):
        raise StudyError("input", "its axes are not described; expected OME-Zarr 0.4 or 0.5 metadata")
    names = tuple(str(axis.get("name")).lower() for axis in value)
    if names not in _AXES:
        raise StudyError("input", f"it has {len(names)} axes that are not a volume's; expected z,y,x or c,z,y,x")
    units = [axis.get("unit") for axis in value[-3:]]
    warnings = ("the axes have no unit; millimetres are assumed",) if None in units else ()
    if any(unit is not None and not (isinstance(unit, str) and unit in MILLIMETRES) for unit in units):
        raise StudyError("geometry", "the unit of an axis is no length; expected millimeter, micrometer or the like")
    return names, [1.0 if unit is None else MILLIMETRES[unit] for unit in units], warnings


def _transform(axes: int, *steps: Any) -> tuple[list[float], list[float]]:
    """Scale and translation of transformations applied one after the other (dataset's first)."""
    if not isinstance(steps[0], list) or not steps[0]:
        raise StudyError("geometry", "its full resolution has no scale; expected one in coordinateTransformations")
    scale, translation = [1.0] * axes, [0.0] * axes
    for step in (entry for entries in steps if isinstance(entries, list) for entry in entries):
        kind = step.get("type") if isinstance(step, dict) else None
        if kind == "identity":
            continue
        if kind not in ("scale", "translation"):
            raise StudyError("geometry", "it has a coordinate transformation that is neither scale nor translation")
        numbers = _numbers(step.get(kind), axes)
        if kind == "scale":
            scale = [s * n for s, n in zip(scale, numbers, strict=True)]
            translation = [t * n for t, n in zip(translation, numbers, strict=True)]
        else:
            translation = [t + n for t, n in zip(translation, numbers, strict=True)]
    if not all(s > 0 for s in scale):
        raise StudyError("geometry", "a scale of it is zero or negative; expected the size of a voxel on each axis")
    return scale, translation


def _numbers(value: Any, count: int) -> list[float]:
    is_list = isinstance(value, list) and len(value) == count
    if not is_list or not all(type(n) in (int, float) and abs(n) < 1e100 and math.isfinite(n) for n in value):
        raise StudyError("geometry", f"a scale or translation of it is not a list of {count} finite numbers")
    return [float(n) for n in value]


def _last_three(values: list[float], units: list[float]) -> tuple[float, float, float]:
    z, y, x = (value * unit for value, unit in zip(values[-3:], units, strict=True))
    return z, y, x


def _safe_path(value: Any) -> str:
    """A dataset's path, if it stays inside the image."""
    parts = value.split("/") if isinstance(value, str) else []
    bad = {"", ".", ".."} & set(parts) or any(c in part for part in parts for c in "\\:\0")
    if not parts or bad:
        raise StudyError("input", "the path of its full resolution does not stay inside the image; it was not read")
    return "/".join(parts)
