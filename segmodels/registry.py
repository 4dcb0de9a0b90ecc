"""Networks by name. The signature of a builder is the schema of its options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError, create_model

from segmodels.errors import ModelError, nearest, shorten

if TYPE_CHECKING:
    from segmodels.network import Network

# Where each name lives. Explicit, so that listing the names imports neither the zoo nor torch.
MODULES = {
    "ensemble": "segmodels.zoo.ensemble",
    "resunet": "segmodels.zoo.resunet",
    "unet": "segmodels.zoo.unet",
    "unet3d": "segmodels.zoo.unet",
}
BUILT_IN = ("kmeans",)  # models without weights: `load` knows them, `create` has nothing to build

STORE = Path(__file__).with_name("store")  # trained models that come with the package: a model folder each

Config = Mapping[str, Any]


def _sequence(value: object) -> object:
    if isinstance(value, list | tuple):
        return tuple(value)
    raise ValueError(f"expected a list of whole numbers, got {type(value).__name__}")


Dims = Annotated[Literal[2, 3], Field(description="2 (Y, X) or 3 (Z, Y, X)")]
Count = Annotated[int, Strict(), Field(ge=1, le=65_535)]
Channels = Annotated[Count, Field(description="how many channels: a whole number from 1")]
Width = Annotated[int, Strict(), Field(ge=1, le=16_384)]
Widths = Annotated[
    tuple[Width, ...],
    BeforeValidator(_sequence),
    Field(min_length=2, max_length=8, description="channels per level, shallow to deep, such as [32, 64, 128]"),
]
Norm = Annotated[Literal["batch", "instance", "group", "none"], Field(description="batch, instance, group or none")]
Padding = Annotated[Literal["same", "valid"], Field(description="same or valid")]


@dataclass(frozen=True)
class Spec:
    """One architecture: how to build it and the facts that running and checking it need.

    divisor, margin and reach answer for a full config, in voxels per axis and side. reach is the halo with
    which a tile, aligned to the divisor, knows all that its inner voxels can see (a multiple of the
    divisor, so that tiles keep their phase); None where there is no such halo, because a normalisation
    looks at the whole tile.
    params: (config, number of trainable parameters) pairs known from the papers or by arithmetic; tests
    check them.
    """

    name: str
    build: Callable[..., Network]
    dims: tuple[int, ...]
    paper: str
    summary: str
    divisor: Callable[[Config], int]
    margin: Callable[[Config], int]
    reach: Callable[[Config], int | None]
    params: tuple[tuple[dict[str, Any], int], ...]

    @cached_property
    def schema(self) -> type[BaseModel]:
        hints = get_type_hints(self.build, include_extras=True)
        fields = {
            name: (hints[name], parameter.default)
            for name, parameter in inspect.signature(self.build).parameters.items()
        }
        options: Any = fields  # create_model's keywords cannot be typed one by one
        return create_model(f"{self.name} options", __config__=ConfigDict(extra="forbid"), **options)

    def config(self, options: Config) -> dict[str, Any]:
        """`options` checked and completed with the defaults, as plain JSON values.

        Raises ModelError that names the option, what was given and what was expected.
        """
        known = self.schema.model_fields
        for key in options:
            if key not in known:
                listed = ", ".join(f"{k}={_plain(f.default)}" for k, f in known.items())
                raise ModelError(f"{self.name} has no option {str(key)!r}.{nearest(key, known)} Its options: {listed}")
        try:
            return self.schema.model_validate(dict(options)).model_dump(mode="json")
        except ValidationError as error:
            first = error.errors()[0]
            option = str(first["loc"][0])
            raise ModelError(
                f"{self.name}: {option}={shorten(options[option])} does not do; expected "
                f"{known[option].description} ({first['msg']})"
            ) from None


_SPECS: dict[str, Spec] = {}


def register(name: str, **facts: Any) -> Callable[[Callable[..., Network]], Callable[..., Network]]:
    """Make the decorated builder known as `name`; `facts` are the other fields of `Spec`."""

    def keep(build: Callable[..., Network]) -> Callable[..., Network]:
        if name in _SPECS:
            raise ModelError(f"two networks are called {name!r}: {_SPECS[name].build} and {build}")
        _SPECS[name] = Spec(name=name, build=build, **facts)
        return build

    return keep


def spec(name: str) -> Spec:
    """The Spec called `name`; ModelError, with the nearest name, where there is none. Imports torch."""
    if name in BUILT_IN:
        raise ModelError(f"{name} is a built-in model without a network: segmodels.load({name!r}) gives it")
    if name in trained():
        raise ModelError(f"{name} is a trained model, not an architecture: segmodels.load({name!r}) gives it")
    if name not in MODULES:
        known = list_models()
        raise ModelError(f"no model is called {shorten(name)}.{nearest(name, known)} There are: {', '.join(known)}")
    import_module(MODULES[name])
    return _SPECS[name]


def create(name: str, **config: Any) -> Network:
    """A new network with random weights: (N, in_channels, *S) -> (N, classes, *S) logits, float32.

    S is (Y, X) for dims 2 and (Z, Y, X) for dims 3, of any size from 1 up; with padding "valid" the output is
    smaller by twice `network.margin` and S must be legal. The network carries `.config` (defaults included),
    `.divisor` and `.margin`. Raises ModelError for an unknown name, an unknown option or an ill-typed value.
    """
    known = spec(name)
    full = known.config(config)
    network = known.build(**full)
    network.architecture, network.config = name, full
    return network


@cache
def trained() -> tuple[str, ...]:
    """The names of the trained models that come with the package."""
    return tuple(sorted(card.parent.name for card in STORE.glob("*/card.json")))


def list_models(pattern: str = "*", *, dims: int | None = None) -> list[str]:
    """The names of models and architectures that match the shell pattern, sorted; with `dims` only architectures that
    have that many.

    Without `dims` nothing is imported.
    """
    names = sorted(n for n in (*MODULES, *BUILT_IN, *trained()) if fnmatchcase(n, pattern))
    return names if dims is None else [n for n in names if n in MODULES and dims in spec(n).dims]


def count_parameters(network: Network) -> int:
    """Trainable parameters; running statistics of batch norm do not count."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def on_meta(name: str, **config: Any) -> Network:
    """The network without its memory: shapes only, on torch's meta device. For counting and comparing."""
    import torch

    with torch.device("meta"):
        return create(name, **config)


def reach_of(network: Network) -> int | None:
    """How far a voxel of a network's answer looks, in voxels per side, rounded up to its divisor (see `Spec`)."""
    return spec(network.architecture).reach(network.config)


def describe(name: str) -> str:
    """A page of text on one model: what it is, options with defaults, sizes, halo, parameters, paper."""
    if name == "kmeans":
        from segmodels.kmeans import DESCRIPTION

        return DESCRIPTION
    known = spec(name)
    network = on_meta(name)
    reach = known.reach(network.config)
    fields = known.schema.model_fields
    lines = [
        f"{name}: {known.summary}",
        f"  paper       {known.paper}",
        f"  dims        {' or '.join(map(str, known.dims))}",
        "  options     "
        + "\n              ".join(f"{k}={_plain(f.default)}  ({f.description})" for k, f in fields.items()),
        "  with these defaults:",
        f"  divisor     {network.divisor}  (other sizes are padded up to a multiple and cropped back)",
        f"  margin      {network.margin}  (voxels per side by which the output is smaller)",
        f"  halo        {'none: it normalises over the whole tile' if reach is None else reach}"
        "  (context for exact tiling, with batch norm or none)",
        f"  parameters  {count_parameters(network):,}",
        "  known counts",
        *(f"    {count:>12,}  {', '.join(f'{k}={_plain(v)}' for k, v in c.items())}" for c, count in known.params),
    ]
    return "\n".join(lines)


def _plain(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else repr(value)
