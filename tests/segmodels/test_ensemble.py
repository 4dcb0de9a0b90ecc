"""Ensembles in one model folder: the mean of members that were trained apart, and configs that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from small_models import small_network

import segmodels
from segmodels import ModelError
from segmodels.card import parse
from segmodels.folder import answer_hash
from segmodels.network import Network
from segmodels.predictor import NetworkPredictor, make_predictor
from segmodels.registry import count_parameters, on_meta, spec
from segmodels.runtime import Runtime
from segmodels.zoo.ensemble import join

MEMBER: dict[str, Any] = {"name": "resunet", "config": {"dims": 3, "classes": 3, "widths": [4, 8, 16]}}


def runtime(batch: int = 1) -> Runtime:
    return Runtime("cpu", "torch", "fp32", 1, batch, (("torch", torch.__version__),))


def fold(seed: int, **changes: Any) -> Network:
    network = small_network(MEMBER["name"], **(MEMBER["config"] | changes))
    torch.manual_seed(seed)
    for parameter in network.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    return network


@pytest.fixture
def folds(tmp_path: Path, facts: dict[str, Any]) -> list[Path]:
    """Three models that were trained apart, as folders."""
    for seed in range(3):
        segmodels.save(fold(seed), facts, tmp_path / f"fold{seed}")
    return [tmp_path / f"fold{seed}" for seed in range(3)]


def network_of(folder: Path) -> Network:
    network = segmodels.load(folder).network
    assert network is not None
    return network


def test_an_ensemble_is_the_mean_of_its_members_loaded_apart(
    folds: list[Path], tmp_path: Path, facts: dict[str, Any]
) -> None:
    members = [network_of(folder) for folder in folds]
    written = segmodels.save(join(members), facts, tmp_path / "all")
    assert written.network.model_dump() == {
        "name": "ensemble",
        "config": {"members": 3, "network": {"name": "resunet", "config": members[0].config}},
    }
    model = segmodels.load(tmp_path / "all")
    together = model.network
    assert together is not None
    x = torch.randn(1, 1, 9, 10, 12)
    with torch.no_grad():
        apart = [network_of(folder)(x) for folder in folds]
        found = together(x)
    assert np.allclose(found.numpy(), np.mean([a.numpy() for a in apart], axis=0), atol=1e-6)
    assert not torch.equal(found, apart[0])
    tensors = safetensors.torch.load_file(tmp_path / "all" / "weights.safetensors")
    assert {key.split(".")[1] for key in tensors} == {"0", "1", "2"}
    assert all(key.startswith("members.") for key in tensors)
    # The predictor asks each member by itself; its mean is the network's own to the bit.
    predictor = make_predictor(model, runtime())
    assert isinstance(predictor, NetworkPredictor)
    assert (predictor.disagreement, predictor.classes) == (True, 3)
    assert torch.equal(predictor.predict(x)[:, :3], found)


def test_members_and_flips_are_averaged_together(tmp_path: Path, facts: dict[str, Any]) -> None:
    members = [fold(seed) for seed in range(2)]
    segmodels.save(join(members), facts | {"mirror_axes": [1]}, tmp_path / "m")
    x = torch.randn(1, 1, 8, 12, 8)
    with torch.no_grad():
        answers = [m(x) for m in members] + [m(x.flip(3)).flip(3) for m in members]
    found = make_predictor(segmodels.load(tmp_path / "m"), runtime()).predict(x)
    torch.testing.assert_close(found[:, :3], torch.stack(answers).mean(0), rtol=0, atol=1e-5)


def test_facts_are_the_members() -> None:
    reference = {"name": "unet", "config": {"dims": 3, "in_channels": 2, "widths": [4, 8, 16], "padding": "valid"}}
    network, member = on_meta("ensemble", members=4, network=reference), on_meta("unet", **reference["config"])
    for fact in ("dims", "in_channels", "classes", "divisor", "margin"):
        assert getattr(network, fact) == getattr(member, fact)
    assert network.legal_size(45) == member.legal_size(45)
    assert count_parameters(network) == 4 * count_parameters(member)
    known = spec("ensemble")
    for fact in ("divisor", "margin", "reach"):
        assert getattr(known, fact)(network.config) == getattr(spec("unet"), fact)(member.config)
    assert known.reach({"members": 2, "network": {"name": "unet", "config": member.config | {"norm": "group"}}}) is None


def test_members_begin_with_weights_of_their_own() -> None:
    network = segmodels.create("ensemble", members=2, network=MEMBER)
    first, second = network.parts
    assert not torch.equal(next(iter(first.parameters())), next(iter(second.parameters())))
    network.train()(torch.randn(2, 1, 8, 8, 8)).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_members_that_are_alike_agree() -> None:
    """Every voxel 0, but for the rounding of two sums that are not the same."""
    x = torch.randn(1, 1, 8, 12, 8)
    alike = NetworkPredictor(join([fold(0), fold(0)]), runtime()).predict(x)
    apart = NetworkPredictor(join([fold(0), fold(1)]), runtime()).predict(x)
    assert float(alike[:, 3].abs().max()) < 1e-6
    assert float(apart[:, 3].mean()) > 1e-3
    assert torch.equal(alike[:, :3], NetworkPredictor(fold(0), runtime()).predict(x))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([fold(0)], "2 to 16 members, got 1"),
        ([fold(0)] * 17, "got 17"),
        ([fold(0), fold(1, classes=4)], "member 1 is .*'classes': 4"),
        ([fold(0), small_network("unet", dims=3, classes=3, widths=[4, 8, 16])], "member 1 is .*unet"),
        ([join([fold(0), fold(1)])] * 2, "not ensembles"),
    ],
    ids=range(5),
)
def test_what_cannot_be_joined(members: list[Network], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        join(members)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"members": 1}, ["members=1", "from 2 to 16"]),
        ({"members": 10**12}, ["members=1000000000000", "from 2 to 16"]),
        ({"members": "5"}, ["members='5'"]),
        ({"members": True}, ["members=True"]),
        ({"members": 2.0}, ["members=2.0"]),
        ({"member": 2}, ["no option 'member'", "Did you mean 'members'"]),
        ({"network": "unet"}, ["expected an object with name and config", "'unet'"]),
        ({"network": None}, ["expected an object"]),
        ({"network": {"config": {}}}, ["expected an object"]),
        ({"network": {"name": ["unet"]}}, ["expected an object"]),
        ({"network": {"name": "unet", "weights": "x"}}, ["expected an object"]),
        ({"network": {"name": "unet", "config": [1]}}, ["an object with options, got [1]"]),
        ({"network": {"name": "ensemble", "config": {"members": 2}}}, ["networks, not ensembles"]),
        ({"network": {"name": "kmeans"}}, ["without a network"]),
        ({"network": {"name": "../../etc/passwd"}}, ["no model is called"]),
        ({"network": {"name": "unet", "config": {"widht": [1]}}}, ["unet has no option 'widht'"]),
        ({"network": {"name": "unet", "config": {"widths": [10**9, 1]}}}, ["widths", "16384"]),
    ],
    ids=range(17),
)
def test_hostile_configs(tmp_path: Path, facts: dict[str, Any], config: dict[str, Any], words: list[str]) -> None:
    """From Python and from a card on disk alike: one line, nothing built."""
    segmodels.save(join([fold(0), fold(1)]), facts, tmp_path / "m")
    path = tmp_path / "m" / "card.json"
    card = json.loads(path.read_text())
    card["network"]["config"] |= config
    path.write_text(json.dumps(card))
    for attempt in (lambda: on_meta("ensemble", **config), lambda: segmodels.load(tmp_path / "m")):
        with pytest.raises(ModelError) as raised:
            attempt()
        message = str(raised.value)
        assert "\n" not in message
        assert len(message) < 600
        for word in words:
            assert word in message


def test_weights_of_another_number_of_members_are_refused(tmp_path: Path, facts: dict[str, Any]) -> None:
    segmodels.save(join([fold(0), fold(1)]), facts, tmp_path / "m")
    path = tmp_path / "m" / "card.json"
    card = json.loads(path.read_text())
    card["network"]["config"]["members"] = 3
    path.write_text(json.dumps(card))
    with pytest.raises(ModelError, match=r"missing: members\.2\."):
        segmodels.load(tmp_path / "m")


def test_too_many_parameters_in_all(tmp_path: Path, facts: dict[str, Any]) -> None:
    """Each member would do, sixteen of them do not."""
    segmodels.save(join([fold(0), fold(1)]), facts, tmp_path / "m")
    path = tmp_path / "m" / "card.json"
    card = json.loads(path.read_text())
    card["network"]["config"]["members"] = 16
    card["network"]["config"]["network"]["config"]["widths"] = [64, 128, 256, 512, 4096]
    path.write_text(json.dumps(card))
    single = on_meta("resunet", dims=3, classes=3, widths=[64, 128, 256, 512, 4096])
    assert count_parameters(single) < 4e9 < 16 * count_parameters(single)
    with pytest.raises(ModelError, match="at most 4,000,000,000 are built"):
        segmodels.load(tmp_path / "m")


def test_options_of_members_that_equal_their_defaults_do_not_enter_the_hash(facts: dict[str, Any]) -> None:
    def hash_of(config: dict[str, Any]) -> str:
        weights = {"file": "w", "sha256": "1" * 64}
        return answer_hash(parse(facts | {"network": {"name": "ensemble", "config": config}, "weights": weights}))

    short = hash_of({"members": 3, "network": MEMBER})
    written_out = MEMBER["config"] | {"norm": "batch", "in_channels": 1}
    assert hash_of({"members": 3, "network": {"name": "resunet", "config": written_out}}) == short
    assert hash_of({"members": 4, "network": MEMBER}) != short
    assert hash_of({"members": 3, "network": {"name": "resunet", "config": written_out | {"norm": "group"}}}) != short
    assert hash_of({"members": 3, "network": {"name": "unet", "config": MEMBER["config"]}}) != short
    assert hash_of({}) == hash_of({"members": 5, "network": {"name": "resunet", "config": {"dims": 2}}})
