"""The settings of a job: one model for flags, job files and the Python face."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import UsageError
from .objects import check_address
from .tiling import STITCHES

FORMATS = ("nifti",)
_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


class Job(BaseModel):
    """What `maskmill segment` is asked to do. Field names are the flags' names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: tuple[str, ...] = Field(description="files, folders or URLs of scans")
    model: str = Field(description="a name from `maskmill models list`, or a model folder")
    out: str | None = Field(None, description="where results go")
    reference: str | None = Field(None, description="folder of reference masks, to be scored against")
    engine: Literal["ray", "serial"] = "ray"
    workers: int | None = Field(None, ge=1, le=4096, description="default: one per GPU, else one")
    threads: int | None = Field(None, ge=1, le=1024, description="per worker; default: all cores")
    address: str | None = Field(None, description="an existing Ray cluster to join")
    gpus_per_worker: float | None = Field(None, ge=0, le=1, description="a share such as 0.5; default: 1 if there are")
    stall_minutes: float | None = Field(
        None, gt=0, description="without progress: the worker hangs; default: 10 or more"
    )
    wait_minutes: float | None = Field(None, gt=0, description="for machines; default: 2, on a joined cluster 15")
    memory: int | None = Field(None, ge=1, description="bytes per worker, such as 4GiB; default: 80 % of the machine's")
    stitch: str | None = Field(None, description=f"{', '.join(STITCHES)}; default: the card's first")
    overlap: float | None = Field(None, ge=0, lt=1, description="share of a tile; default: the card's")
    tile: tuple[int, ...] | None = Field(None, description="voxels along z,y,x; default: the card's")
    mirroring: bool | None = Field(None, description="average over flips along the card's mirror_axes; default: yes")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    backend: Literal["auto", "torch", "inductor", "openvino"] = "auto"
    fallback: Literal["none", "cpu"] = Field("none", description="cpu: what a GPU has no memory for is made on the CPU")
    formats: tuple[str, ...] = ("nifti",)
    images: Literal["copy", "link"] = "copy"
    overwrite: bool = False
    retry_failed: bool = False
    limit: int | None = Field(None, ge=1, description="only the first N studies")
    part: tuple[int, int] | None = Field(
        None, description="I/N: the I-th of N commands that share the studies of one OUT"
    )
    classes: int | None = Field(None, ge=2, le=255, description="clusters of kmeans")
    volume: int | None = Field(None, ge=0, description="which volume of a 4-D image")

    @field_validator("inputs", "formats", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [v for v in value.split(",") if v] if isinstance(value, str) else value

    @field_validator("inputs")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("give at least one file, folder or URL")
        return value

    @field_validator("memory", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value

    @field_validator("part", mode="before")
    @classmethod
    def _part_of(cls, value: Any) -> Any:
        if value is None or not isinstance(value, str):
            return value
        match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", value)
        if match is None:
            raise ValueError(f"expected I/N such as 3/8, got {value!r}")
        return int(match[1]), int(match[2])

    @field_validator("part")
    @classmethod
    def _one_of_them(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 1 <= value[0] <= value[1]:
            raise ValueError(f"I/N goes from 1/N to N/N, got {value[0]}/{value[1]}")
        return value

    @field_validator("tile", mode="before")
    @classmethod
    def _triple(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                value = [int(v) for v in re.split(r"[,x ]+", value.strip())]
            except ValueError:
                raise ValueError(f"expected whole numbers such as 96,96,96, got {value!r}") from None
        return value

    @field_validator("tile")
    @classmethod
    def _not_flat(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and any(v < 1 for v in value):
            raise ValueError("a tile has at least one voxel along each axis")
        return value

    @field_validator("stitch")
    @classmethod
    def _known_stitch(cls, value: str | None) -> str | None:
        return _choice(value, STITCHES)

    @field_validator("formats")
    @classmethod
    def _known_formats(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            _choice(name, FORMATS)
        return tuple(dict.fromkeys(value))


def _choice(value: str | None, choices: tuple[str, ...]) -> str | None:
    if value is not None and value not in choices:
        raise ValueError(f"unknown: {value!r}; choose from {', '.join(choices)}")
    return value


def parse_bytes(text: str) -> int:
    """4GiB, 800MB, 123456 as bytes; K, M, G, T are decimal, Ki, Mi, Gi, Ti binary."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not match or match[2] not in _UNITS:
        raise ValueError(f"expected a size such as 4GiB, got {text!r}")
    size = int(float(match[1]) * _UNITS[match[2]])
    if size < 1:
        raise ValueError("a size is above 0")
    return size


def make_job(settings: Mapping[str, Any]) -> Job:
    """A checked job. Raises UsageError naming each setting that is wrong, unknown ones with the nearest name."""
    unknown = [name for name in settings if name not in Job.model_fields]
    if unknown:
        near = difflib.get_close_matches(unknown[0], Job.model_fields, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(Job.model_fields)}"
        raise UsageError(f"unknown setting {unknown[0]!r}{hint}")
    for name in ("inputs", "out", "reference"):
        given = settings.get(name)
        for url in given if isinstance(given, list | tuple) else [given]:
            check_address(str(url), name)
    try:
        return Job(**settings)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, e['loc'])) or 'job'}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()
        ]
        raise UsageError("; ".join(lines)) from None


@functools.cache
def _loader() -> Any:
    """PyYAML's safe loader, but a key that is given twice is an error, and 1e-3 a number as in YAML 1.2."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        raise UsageError(f"{key.value} is set twice, again at line {key.start_mark.line + 1}")
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    with_exponent = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", with_exponent, list("-+.0123456789"))
    return Loader


def read_job_file(path: str) -> dict[str, Any]:
    """Settings from a YAML job file. Raises UsageError with line and column where it is not proper YAML."""
    import yaml

    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UsageError(f"cannot read the job file {path}: {reason}") from None
    try:
        settings = yaml.load(text, _loader())
    except UsageError as error:
        raise UsageError(f"the job file {path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-13-01
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"the job file {path} is not proper YAML{where}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise UsageError(f"the job file {path} must hold settings as 'name: value' lines")
    settings = {key.replace("-", "_"): value for key, value in settings.items()}
    if "input" in settings and "inputs" not in settings:
        settings["inputs"] = settings.pop("input")
    return settings
