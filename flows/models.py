"""`maskmill models`: what there is, the facts about one, and whether a folder can be used."""

from __future__ import annotations

import json
from pathlib import Path

import segmodels
from pipeline.job import make_job


def list_command(*, as_json: bool) -> None:
    """Print the ready models and the architectures."""
    names = segmodels.list_models()
    if as_json:
        print(json.dumps({"models": [{"name": name, "ready": is_ready(name)} for name in names]}))
        return
    for name in names:
        kind = "model" if is_ready(name) else "architecture (train it, or bring a folder with weights)"
        print(f"{name:20} {kind}")


def is_ready(name: str) -> bool:
    """Whether `segment -m NAME` works without a folder."""
    from segmodels.registry import BUILT_IN, trained

    return name in (*BUILT_IN, *trained())


def show_command(name: str) -> None:
    """Print what is known of a name or a model folder."""
    from segmodels.registry import trained

    if name in trained() or (Path(name) / "card.json").is_file():
        print(segmodels.load(name).card.to_json(), end="")
    else:
        print(segmodels.describe(name))


def check_command(path: str) -> None:
    """Load a model and run one tile of it; raises what is wrong, in one line."""
    from pipeline.engine import SerialEngine
    from pipeline.method import resolve_method
    from pipeline.study_plan import baseline_of, measure

    method = resolve_method(make_job({"inputs": ["-"], "model": path, "engine": "serial"}))
    with SerialEngine(method.spec) as engine:
        (kind, *_) = engine.kinds()
        measure(engine, method, kind, known := {})
        baseline = baseline_of(method.tiling.window, engine, method, kind, known)
    card = method.card
    print(
        f"{card.name} {card.version}: good. {len(card.labels)} structures, tile {list(method.tiling.window)}, "
        f"{baseline.seconds_per_tile:.3f} s per tile, {baseline.host_bytes / 2**30:.2f} GiB, "
        f"hash {method.model_hash[:12]}"
    )
