"""Models on disk: a folder with card.json and weights.safetensors, and the built-in ones by name.

A model folder runs no code: the card is checked data, the weights are safetensors, and what is built from
them is counted on torch's meta device before any memory is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from segmodels import card as cards
from segmodels import weights
from segmodels.card import Card
from segmodels.errors import ModelError, nearest, shorten
from segmodels.registry import MODULES, STORE, count_parameters, list_models, on_meta, trained

if TYPE_CHECKING:
    from torch import nn

    from segmodels.network import Network

LARGEST_NETWORK = 4_000_000_000  # parameters: 16 GB of float32
WEIGHTS_FILE = "weights.safetensors"


@dataclass(frozen=True, eq=False)
class Model:
    """A model ready to predict: eval mode, float32, on the CPU.

    network: None for a built-in model that has none (kmeans).
    hash: SHA-256, hex, of what decides the answer: see `answer_hash`.
    source: the built-in name or the folder it was loaded from.
    """

    network: Network | None
    card: Card
    hash: str
    source: str


def load(name_or_folder: str | os.PathLike[str], classes: int | None = None) -> Model:
    """A model by name (a trained one, or "kmeans", with `classes`, default 4) or a model folder.

    A name wins over a folder of that name; "./kmeans" is the folder. Raises ModelError, one line, for
    everything
    that is wrong with it: no such model, a bad card, pickled, damaged or mismatching weights.
    """
    name = os.fspath(name_or_folder)
    if name == "kmeans":
        from segmodels import kmeans

        card = kmeans.card(kmeans.DEFAULT_CLASSES if classes is None else classes)
        return Model(None, card, answer_hash(card), "kmeans")
    if classes is not None:
        raise ModelError(f"classes={classes!r} is for kmeans; {shorten(name)} has those of its card")
    if name in trained():
        return replace(_load_folder(STORE / name), source=name)
    folder = Path(name)
    if not folder.is_dir():
        raise ModelError(_no_folder(name, folder))
    return _load_folder(folder)


def save(
    network: nn.Module,
    card: Card | Mapping[str, Any],
    folder: str | os.PathLike[str],
    *,
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
) -> Card:
    """Write `network` (made by `create`) and its card as a model folder, and return the card as written.

    dtype: what floating weights are stored as; loading gives float32 again.
    `format`, `weights` and, where it is absent, `network` are filled in. The weights are written before the
    card that names their hash, each by rename: a folder that was half written does not load. Raises
    ModelError for a card that does not fit the network, and for weights with NaN or infinity.
    """
    architecture, config = getattr(network, "architecture", None), getattr(network, "config", None)
    if architecture not in MODULES or not isinstance(config, dict):
        raise ModelError(f"save takes a network made by segmodels.create, got a {type(network).__name__}")
    facts = card.model_dump(by_alias=True, mode="json") if isinstance(card, Card) else dict(card)
    facts.setdefault("network", {"name": architecture, "config": config})
    data = weights.to_bytes(network.state_dict(), dtype)
    facts |= {
        "format": cards.FORMAT,
        "weights": {"file": WEIGHTS_FILE, "sha256": hashlib.sha256(data).hexdigest()},
    }
    whole = cards.parse(facts)
    described = on_meta(whole.network.name, **whole.network.config)
    if (described.architecture, described.config) != (architecture, config):
        raise ModelError(
            f"the card describes {described.architecture} {described.config}, the network is {architecture} {config}"
        )
    cards.agree(whole, described)
    weights.refuse_not_finite("the network", network.state_dict())
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    _write(target / WEIGHTS_FILE, data)
    _write(target / "card.json", whole.to_json().encode())
    return whole


def answer_hash(card: Card) -> str:
    """SHA-256, hex, of what in a card decides the answer, the weights' hash included.

    Texts about the model (version, licence, training, quality, intended_use), the weights' file name and
    the further choices of stitching do not enter; options of the network that equal their defaults do not
    either, so writing a default out, or a new option with a default, changes no hash.
    """
    facts = card.model_dump(mode="json", by_alias=True)
    for field in ("format", "version", "licence", "training", "quality", "intended_use"):
        del facts[field]
    facts["weights"] = card.weights.sha256 if card.weights else None
    facts["stitch"] = card.stitch[0]
    if card.spacing_mm is None:
        del facts["resampling_order"]
    facts["network"] = _without_defaults(card.network.name, card.network.config)
    # Lists of pairs: for sigmoid the order of the labels is part of the answer, and JSON objects have none.
    pairs = [[key, label.name] for key, label in card.labels.items()]
    facts["labels"] = sorted(pairs, key=lambda p: int(p[0])) if card.activation == "softmax" else pairs
    # What a card leaves out does not enter, so a new optional field changes no hash.
    facts = {field: value for field, value in facts.items() if value not in (None, [], {})}
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _load_folder(folder: Path) -> Model:
    if not (folder / "card.json").is_file():
        raise ModelError(_no_card(folder))
    card = cards.read(folder / "card.json")
    if card.weights is None or card.network.name not in MODULES:
        raise ModelError(
            f"card.json: no network is called {shorten(card.network.name)}."
            f"{nearest(card.network.name, MODULES)} There are: {', '.join(MODULES)}"
        )
    path = folder / card.weights.file
    if not path.is_file():
        raise ModelError(f"the model folder has no file {card.weights.file!r}, which its card.json names")
    try:
        weights.refuse_pickle(path)
        header = weights.read_header(path)
        network = on_meta(card.network.name, **card.network.config)
        if (count := count_parameters(network)) > LARGEST_NETWORK:
            raise ModelError(
                f"card.json: this config of {card.network.name} has {count:,} parameters; at most "
                f"{LARGEST_NETWORK:,} are built"
            )
        cards.agree(card, network)
        weights.compare(path.name, header, network.state_dict())
        tensors = weights.read_tensors(path, card.weights.sha256)
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read ({error.strerror})") from None
    # assign: the tensors that were read become the network's own; it never had others.
    network.load_state_dict(tensors, assign=True)
    return Model(network.eval(), card, answer_hash(card), str(folder))


def _without_defaults(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A network's reference with the options that differ from their defaults, those of an ensemble's members too."""
    if name not in MODULES:
        return {"name": name, "config": dict(config)}
    from segmodels.registry import spec

    known = spec(name)
    full, defaults = known.config(config), known.config({})
    kept = {key: value for key, value in full.items() if value != defaults[key]}
    if "network" in kept:
        kept["network"] = _without_defaults(**kept["network"])
    return {"name": name, "config": kept}


def _no_folder(name: str, path: Path) -> str:
    if path.is_file():
        if path.suffix.lower() in weights.PICKLE_SUFFIXES:
            return f"{path.name} is a pickle, which runs code when it is read; a model is a folder with {_PARTS}"
        return f"{path.name} is a file; a model is a folder with {_PARTS}"
    if name in MODULES:
        return (
            f"{name} is an architecture, without weights of its own: give a model folder trained with it "
            f"(written by segmodels.save), or the built-in kmeans"
        )
    return (
        f"no model is called {shorten(name)} and there is no such folder.{nearest(name, list_models())} "
        f"There are: {', '.join(('kmeans', *trained()))}; anything else is a folder with {_PARTS}"
    )


_PARTS = "card.json and weights.safetensors"


def _no_card(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in weights.PICKLE_SUFFIXES)
    hint = f" ({pickles[0]} in it is a pickle and is never opened)" if pickles else ""
    return f"the folder {folder.name!r} has no card.json{hint}; a model is a folder with {_PARTS}"


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)
