"""The JSON of an OME-Zarr image, 0.4 (Zarr v2) and 0.5 (Zarr v3), read without trusting it."""

from __future__ import annotations

import json
import os
from typing import Any

LARGEST_JSON = 64 << 20


def read_json(folder: str, name: str) -> dict[str, Any] | None:
    """A JSON object in a folder; None where there is none, or no object, or something that is not JSON."""
    path = os.path.join(folder, name)
    try:
        if not os.path.isfile(path) or os.path.getsize(path) > LARGEST_JSON:
            return None
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError):
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
