"""The whole way, from NIfTI files to NIfTI masks, against MONAI on what nibabel reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from block_helpers import card_facts, margin_of, noise, random_network
from monai.inferers import sliding_window_inference
from scans import OBLIQUE, mask_bytes

import pipeline
import segmodels
from pipeline.engine import SerialEngine
from segmodels.network import Network

CLOSE = 1e-4


class FourWorkers(SerialEngine):
    """The serial engine, planned for as if it were four workers: one study is cut into at least four blocks."""

    workers = 4


def scan(folder: Path, seed: int, shape: tuple[int, ...], name: str = "scan.nii.gz") -> np.ndarray:
    """An int16 scan of so many voxels (x, y, z); what is stored, as (x, y, z)."""
    folder.mkdir(parents=True, exist_ok=True)
    data = (noise(shape, seed) * 60 + 800).astype(np.int16)
    nib.save(nib.Nifti1Image(data, OBLIQUE), folder / name)
    return data


def masked(out: Path, study: str = "scan") -> np.ndarray:
    """The published mask as (z, y, x)."""
    return np.asarray(nib.load(out / "masks" / f"{study}.nii.gz").dataobj).transpose(2, 1, 0)


def zscored(data: np.ndarray) -> np.ndarray:
    """(x, y, z) stored numbers as the network sees them, (z, y, x)."""
    wide = data.astype(np.float64).transpose(2, 1, 0)
    return ((wide - wide.mean()) / wide.std()).astype(np.float32)


def logits_of(network: Any, channels: list[np.ndarray], tile: tuple[int, ...], **facts: Any) -> np.ndarray:
    with torch.inference_mode():
        voxels = torch.from_numpy(np.stack(channels)[None])
        found = sliding_window_inference(voxels, tile, 1, network, **({"overlap": 0.5, "mode": "gaussian"} | facts))
    return found[0].numpy()


def saved(folder: Path, network: Network, **facts: Any) -> Path:
    segmodels.save(network, card_facts(network, normalize=[{"kind": "zscore"}], **facts), folder)
    return folder


def test_a_residual_unet_over_many_tiles_in_several_blocks(tmp_path: Path) -> None:
    network = random_network("resunet", dims=3, classes=3, widths=[4, 8])
    model = saved(tmp_path / "model", network, tile=[32, 64, 48])
    data = scan(tmp_path / "in", 1, (41, 250, 125))
    summary = pipeline.segment(tmp_path / "in", model, tmp_path / "out", engine=FourWorkers, threads=1)
    assert summary.published == 1
    assert summary.blocks_computed >= 4
    logits = logits_of(network, [zscored(data)], (32, 64, 48))
    clear = margin_of(logits) > CLOSE
    assert clear.mean() > 0.99
    assert np.array_equal(masked(tmp_path / "out")[clear], logits.argmax(axis=0)[clear])
    structures = {row["label"]: row["voxels"] for row in summary.studies[0]["structures"]}
    assert structures == {k: int((masked(tmp_path / "out") == k).sum()) for k in (1, 2)}


def test_blocks_change_no_byte_of_the_mask(tmp_path: Path) -> None:
    network = random_network("unet", dims=3, classes=4, widths=[4, 8])
    model = saved(tmp_path / "model", network, tile=[48, 64, 24], overlap=0.0)
    scan(tmp_path / "in", 2, (23, 256, 128))
    blocks = {}
    for name, engine in (("one", "serial"), ("four", FourWorkers)):
        summary = pipeline.segment(tmp_path / "in", model, tmp_path / name, engine=engine, threads=1)
        blocks[name] = summary.blocks_computed
    assert blocks["one"] == 1
    assert blocks["four"] >= 4
    assert mask_bytes(tmp_path / "one", "scan") == mask_bytes(tmp_path / "four", "scan")


def test_two_channels_and_sigmoid(tmp_path: Path) -> None:
    network = random_network("unet", dims=3, in_channels=2, classes=2, widths=[4, 8], seed=9)
    model = saved(tmp_path / "model", network, tile=[16, 32, 32], activation="sigmoid")
    shape = (33, 47, 21)
    channels = [zscored(scan(tmp_path / "in" / "case", c, shape, f"brain_000{c}.nii")) for c in range(2)]
    summary = pipeline.segment(tmp_path / "in" / "case", model, tmp_path / "out", threads=1)
    assert summary.published == 1
    logits = logits_of(network, channels, (16, 32, 32))
    expected = np.where(logits[1] > 0, 2, np.where(logits[0] > 0, 1, 0))
    clear = (np.abs(logits) > CLOSE).all(axis=0)
    assert len(np.unique(expected)) == 3
    assert np.array_equal(masked(tmp_path / "out", summary.studies[0]["study"])[clear], expected[clear])


def test_a_2d_model(tmp_path: Path) -> None:
    network = random_network("resunet", dims=2, classes=3, widths=[4, 8])
    model = saved(tmp_path / "model", network, tile=[32, 32], stitch=["constant"])
    data = scan(tmp_path / "in", 4, (50, 41, 5))
    assert pipeline.segment(tmp_path / "in", model, tmp_path / "out", threads=1).published == 1

    def plane(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = network(x.squeeze(2))
        return y.unsqueeze(2)

    logits = logits_of(plane, [zscored(data)], (1, 32, 32), mode="constant")
    clear = margin_of(logits) > CLOSE
    assert np.array_equal(masked(tmp_path / "out")[clear], logits.argmax(axis=0)[clear])


def test_several_small_scans_in_one_run(tmp_path: Path) -> None:
    network = random_network("resunet", dims=3, classes=3, widths=[4, 8])
    model = saved(tmp_path / "model", network, tile=[16, 24, 24])
    shapes = [(20, 13, 9), (30, 40, 17), (24, 24, 16), (5, 60, 3)]
    scans = {f"s{i}": scan(tmp_path / "in", i, shape, f"s{i}.nii.gz") for i, shape in enumerate(shapes)}
    assert pipeline.segment(tmp_path / "in", model, tmp_path / "out", threads=1).published == 4
    for name, data in scans.items():
        logits = logits_of(network, [zscored(data)], (16, 24, 24), padding_mode="constant", cval=0.0)
        clear = margin_of(logits) > CLOSE
        assert np.array_equal(masked(tmp_path / "out", name)[clear], logits.argmax(axis=0)[clear])
