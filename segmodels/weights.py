"""Weights on disk: safetensors only, looked at before they are believed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from segmodels.errors import ModelError, shorten

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_HEADER = 100_000_000  # bytes, the limit of the format itself
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FLOATS = ("F64", "F32", "F16", "BF16")
_WHY_NO_PICKLE = (
    "is a pickle (by its name or its first bytes); reading one runs code, so it is never opened here; "
    "load it where you trust it and write it again with segmodels.save, or convert it to safetensors"
)


@dataclass(frozen=True)
class Entry:
    """One tensor as the header announces it."""

    dtype: str
    shape: tuple[int, ...]


def refuse_pickle(path: Path) -> None:
    """ModelError if the name or the first bytes of `path` are those of a pickle; nothing is unpickled."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ModelError(f"{path.name} {_WHY_NO_PICKLE}")
    with path.open("rb") as file:
        start = file.read(2)
    # A zip is what torch.save writes; 0x80 and a protocol number is how every binary pickle begins. As the
    # length of a safetensors header either would be followed by zeros and '{', which is checked before
    # refusing.
    if start == b"PK" or (len(start) == 2 and start[0] == 0x80 and 2 <= start[1] <= 5):
        with path.open("rb") as file:
            if file.read(9)[8:] != b"{":
                raise ModelError(f"{path.name} {_WHY_NO_PICKLE}")


def read_header(path: Path) -> dict[str, Entry]:
    """Names, dtypes and shapes of the tensors in a safetensors file, from its header alone.

    Raises ModelError for a header that does not fit the file, is no JSON, or announces more or fewer bytes
    than the file has (a truncated download).
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length < 2 or length > min(size - 8, LARGEST_HEADER):
            raise ModelError(
                f"{path.name} is no whole safetensors file: its header would be {length:,} bytes long and "
                f"the file has {size:,}; copy it again"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: _entry(facts) for name, facts in header.items()}
        end = max((int(facts["data_offsets"][1]) for facts in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise ModelError(f"{path.name} is no safetensors file: its header cannot be read; copy it again") from None
    if end != size - 8 - length:
        verb = "truncated" if end > size - 8 - length else "damaged"
        raise ModelError(
            f"{path.name} is {verb}: its header announces {end:,} bytes of tensors, {size - 8 - length:,} "
            "are there; copy it again"
        )
    return entries


def _entry(facts: Mapping[str, object]) -> Entry:
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError
    if not all(type(n) is int and n >= 0 for n in (*shape, *offsets)) or len(offsets) != 2:
        raise TypeError
    if dtype in _BYTES and offsets[1] - offsets[0] != math.prod(shape) * _BYTES[dtype]:
        raise ValueError
    return Entry(dtype, tuple(shape))


def compare(name: str, found: Mapping[str, Entry], wanted: Mapping[str, Tensor]) -> None:
    """Raise ModelError, listing the first few, where the file's tensors are not the network's."""
    missing = [key for key in wanted if key not in found]
    extra = [key for key in found if key not in wanted]
    shapes = [
        f"{key} is {list(found[key].shape)} instead of {list(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in found and found[key].shape != tuple(tensor.shape)
    ]
    dtypes = [
        f"{key} is {found[key].dtype}"
        for key, tensor in wanted.items()
        if key in found and (found[key].dtype in _FLOATS) != tensor.is_floating_point()
    ]
    problems = [
        f"{len(names)} {what}: {'; '.join(shorten(n)[1:-1] for n in names[:3])}" + ("; ..." * (len(names) > 3))
        for what, names in (
            ("missing", missing),
            ("not the network's", extra),
            ("of another shape", shapes),
            ("of another type", dtypes),
        )
        if names
    ]
    if problems:
        raise ModelError(
            f"{name} does not fit the card's network: tensors {', '.join(problems)}; "
            "the network's config in card.json must be the one the weights were trained with"
        )


def read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose bytes have this SHA-256; floating ones as float32, on the CPU.

    The bytes are read once, so what is checked is what is used. Raises ModelError for other bytes, for what
    the safetensors reader refuses, and for NaN or infinite values.
    """
    import safetensors.torch
    import torch

    data = path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise ModelError(
            f"{path.name} is not the file that card.json describes: its sha256 is {found[:12]}..., the card "
            f"says {sha256[:12]}...; the file is damaged or was replaced, copy the folder again"
        )
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except Exception as error:
        raise ModelError(f"{path.name} cannot be read as safetensors: {shorten(str(error))}") from None
    # A clone lies where the allocator aligns it, so its sums do not depend on where the file put it.
    tensors = {k: (t.to(torch.float32) if t.is_floating_point() else t).clone() for k, t in tensors.items()}
    refuse_not_finite(path.name, tensors)
    return tensors


def refuse_not_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ModelError if a tensor holds NaN or infinity: such a network answers NaN everywhere."""
    import torch

    bad = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise ModelError(
            f"{name} holds NaN or infinite values in {len(bad)} tensors, the first {bad[0]}: the training "
            "diverged or the file was converted wrongly; take an earlier checkpoint"
        )


def to_bytes(tensors: Mapping[str, Tensor], dtype: str = "fp32") -> bytes:
    """The safetensors file with these tensors, the same bytes for the same tensors; floating ones as `dtype`.

    Raises ModelError where a value is too large for fp16.
    """
    import safetensors.torch
    import torch

    stored = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    kept = {k: t.detach().cpu().to(stored if t.is_floating_point() else t.dtype) for k, t in tensors.items()}
    if dtype == "fp16":
        finite = all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point())
        if finite and not all(bool(torch.isfinite(t).all()) for t in kept.values()):
            raise ModelError("the network has values too large for fp16 (above 65504): store it as bf16 or fp32")
    data: bytes = safetensors.torch.save({k: t.contiguous() for k, t in kept.items()})
    return data
