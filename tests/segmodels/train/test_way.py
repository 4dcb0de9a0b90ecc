"""The way a machine trains is a rule of its hardware, the recipe and the network."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

import segmodels
from segmodels.train.recipe import Recipe
from segmodels.train.way import choose_way, has_bf16

on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="Linux on x86-64")
def test_bf16_is_what_the_processor_says_and_nothing_emulated() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    assert has_bf16("cpu") == bool(flags & {"avx512_bf16", "amx_bf16"})


@on_a_cpu
@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_channels_last_where_it_pays(precision: str, norm: str) -> None:
    network = segmodels.create("resunet", dims=3, in_channels=1, classes=2, widths=[4, 8], norm=norm)
    way = choose_way(Recipe(steps=1, precision=precision), 2, network)
    assert (way.device, way.precision, way.threads) == ("cpu", precision, 2)
    assert way.channels_last == (norm != "instance")
    weight = next(p for p in way.place(network).parameters() if p.ndim == 5 and p.shape[1] > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last_3d) == way.channels_last


@on_a_cpu
def test_auto_is_bf16_where_there_is_bf16() -> None:
    network = segmodels.create("resunet", dims=3, in_channels=1, classes=2, widths=[4, 8])
    assert choose_way(Recipe(steps=1), 1, network).precision == ("bf16" if has_bf16("cpu") else "fp32")
