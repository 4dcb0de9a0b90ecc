"""Names, options, parameter counts, and what importing costs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from small_models import ARCHITECTURES

import segmodels
from segmodels import ModelError
from segmodels.registry import MODULES, count_parameters, on_meta, register, spec, trained

COUNTS = [(name, config, count) for name in MODULES for config, count in spec(name).params]


@pytest.mark.parametrize(("name", "config", "count"), COUNTS, ids=str)
def test_known_parameter_counts(name: str, config: dict[str, Any], count: int) -> None:
    assert count_parameters(on_meta(name, **config)) == count


def test_the_counts_of_the_contract() -> None:
    # Written out once more, so that an edit of the specs cannot quietly move them.
    widths = [64, 128, 256, 512]
    paper = on_meta("unet", dims=2, in_channels=1, classes=2, widths=[*widths, 1024], padding="valid", norm="none")
    assert count_parameters(paper) == 31_030_658
    assert count_parameters(on_meta("unet", in_channels=3, classes=2)) == 31_037_698
    assert count_parameters(on_meta("unet3d", in_channels=3, classes=3, norm="none")) == 19_069_955
    assert count_parameters(on_meta("unet3d", in_channels=3, classes=3)) == 19_069_955 + 4_672
    for dims, count in ((2, 8_223_809), (3, 23_783_873)):
        assert count_parameters(on_meta("resunet", dims=dims, in_channels=3, classes=1, widths=widths)) == count


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_defaults_and_facts_agree_with_the_spec(name: str) -> None:
    network, known = on_meta(name), spec(name)
    assert network.config["dims"] == (3 if name == "unet3d" else 2)
    assert network.config["norm"] == "batch"
    assert network.config.get("padding", "same") == "same"
    assert network.divisor == known.divisor(network.config) == 2 ** (len(network.config["widths"]) - 1)
    assert network.margin == known.margin(network.config) == 0
    assert (network.architecture, network.dims) == (name, network.config["dims"])
    reach = known.reach(network.config)
    assert reach is not None
    assert reach % network.divisor == 0
    assert known.reach(network.config | {"norm": "instance"}) is None


@pytest.mark.parametrize("norm", ["batch", "instance", "group", "none"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_config_rebuilds_the_network(name: str, norm: str) -> None:
    first = on_meta(name, dims=2, widths=(4, 6, 8), norm=norm, classes=5)
    again = on_meta(name, **first.config)
    assert again.config == first.config
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in first.state_dict().items()}


def test_lists() -> None:
    assert segmodels.list_models() == sorted(["ensemble", "kmeans", "resunet", "unet", "unet3d", *trained()])
    assert segmodels.list_models("unet*") == ["unet", "unet3d"]
    assert segmodels.list_models(dims=3) == ["ensemble", "resunet", "unet", "unet3d"]


@pytest.mark.parametrize("name", ["kmeans", *MODULES])
def test_describe_says_what_matters(name: str) -> None:
    text = segmodels.describe(name)
    for word in ("paper", "divisor", "margin", "halo", "parameters", "options"):
        assert word in text
    known = {"ensemble": "41,112,970", "unet": "31,030,658", "unet3d": "19,069,955", "resunet": "8,223,809"}
    assert known.get(name, "Lloyd") in text


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("unett", {}, ["no model is called 'unett'", "Did you mean 'unet'", "resunet"]),
        ("zzz", {}, ["no model is called 'zzz'", "There are: ensemble, "]),
        ("kmeans", {}, ["built-in", "segmodels.load('kmeans')"]),
        ("unet", {"widht": [1, 2]}, ["no option 'widht'", "Did you mean 'widths'", "padding='same'"]),
        ("resunet", {"padding": "valid"}, ["no option 'padding'", "norm='batch'"]),
        ("unet", {"widths": "abc"}, ["widths='abc'", "such as [32, 64, 128]", "got str"]),
        ("unet", {"widths": {3, 4}}, ["widths={3, 4}", "got set"]),
        ("unet", {"widths": [8]}, ["widths=[8]", "at least 2"]),
        ("unet", {"widths": [8, 16.0]}, ["widths", "integer"]),
        ("unet", {"widths": [8, 10**9]}, ["widths", "16384"]),
        ("unet", {"widths": [2] * 9}, ["widths", "at most 8"]),
        ("unet", {"dims": 4}, ["dims=4", "2 or 3"]),
        ("unet", {"dims": "2"}, ["dims='2'"]),
        ("unet", {"in_channels": True}, ["in_channels=True"]),
        ("unet", {"classes": 0}, ["classes=0", "whole number from 1"]),
        ("unet", {"norm": "bach"}, ["norm='bach'", "batch, instance, group or none"]),
        ("unet", {"padding": None}, ["padding=None", "same or valid"]),
        ("unet3d", {"widths": [7, 8]}, ["widths=[7, 8]", "even"]),
    ],
)
def test_errors_teach(name: str, config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as raised:
        on_meta(name, **config)
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_two_networks_cannot_have_one_name() -> None:
    spec("unet")
    with pytest.raises(ModelError, match="two networks are called 'unet'"):
        register("unet")(spec("resunet").build)


def test_importing_segmodels_and_listing_imports_no_torch() -> None:
    code = (
        "import sys, segmodels; assert 'pydantic' not in sys.modules; segmodels.list_models();"
        "segmodels.Card; segmodels.load('kmeans');"
        "import segmodels.kmeans, segmodels.runtime, segmodels.weights;"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'creat'"):
        segmodels.creat  # noqa: B018
    assert "create" in dir(segmodels)
