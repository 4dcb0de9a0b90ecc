"""Model folders: round trips, and every way in which one can be wrong, with real files."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small_models import small_network

import segmodels
from segmodels import ModelError


def edit_card(folder: Path, **changes: Any) -> None:
    path = folder / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def put_weights(folder: Path, data: bytes, *, name: str = "weights.safetensors") -> None:
    """Other bytes as the weights, with the card's hash made to match: what an attacker would do."""
    (folder / name).write_bytes(data)
    edit_card(folder, weights={"file": name, "sha256": hashlib.sha256(data).hexdigest()})


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(folder / "weights.safetensors")
    change(tensors)
    put_weights(folder, safetensors.torch.save({k: t.clone() for k, t in tensors.items()}))


def refusal(name: str | Path, **options: Any) -> str:
    with pytest.raises(ModelError) as raised:
        segmodels.load(name, **options)
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("norm", ["batch", "instance", "group", "none"])
@pytest.mark.parametrize(("name", "dims"), [("resunet", 3), ("unet", 2), ("unet3d", 3)])
def test_round_trip_is_bit_equal(tmp_path: Path, facts: dict[str, Any], name: str, dims: int, norm: str) -> None:
    network = small_network(name, dims=dims, classes=3, widths=[4, 8], norm=norm)
    facts |= {"axes": "zyx"[3 - dims :], "tile": [16] * dims}
    written = segmodels.save(network, facts, tmp_path / "m")
    model = segmodels.load(tmp_path / "m")
    assert model.card == written
    assert model.source == str(tmp_path / "m")
    assert model.network is not None
    assert not model.network.training
    assert model.network.config == network.config
    before, after = network.state_dict(), model.network.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    x = torch.randn(1, 1, *[11] * dims)
    with torch.no_grad():
        assert torch.equal(network(x), model.network(x))
    segmodels.save(model.network, model.card, tmp_path / "again")
    for file in ("card.json", "weights.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "m" / file).read_bytes()
    assert segmodels.load(tmp_path / "again").hash == model.hash
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["card.json", "weights.safetensors"]


def test_the_hash_follows_the_weights(folder: Path) -> None:
    before = segmodels.load(folder).hash
    change_tensors(folder, lambda t: t["head.bias"].add_(1))
    assert segmodels.load(str(folder)).hash != before


def test_half_precision_weights_become_float32(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({"head.weight": t["head.weight"].half()}))
    network = segmodels.load(folder).network
    assert network is not None
    assert network.get_parameter("head.weight").dtype == torch.float32


def test_a_loaded_network_can_be_trained_further(folder: Path) -> None:
    network = segmodels.load(folder).network
    assert network is not None
    network.train()(torch.randn(2, 1, 8, 8, 8)).sum().backward()
    assert all(p.is_leaf and p.grad is not None for p in network.parameters())


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self.mark, "it ran")


def torch_saved(thing: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "w.pth", "w.bin", "w.ckpt", "w.pkl"])
@pytest.mark.parametrize(
    "dump", [pickle.dumps, lambda b: pickle.dumps(b, 2), lambda b: pickle.dumps(b, 0), torch_saved]
)
def test_a_pickle_is_never_opened(tmp_path: Path, folder: Path, dump: Callable[[object], bytes], name: str) -> None:
    mark = tmp_path / "mark"
    data = dump(Bomb(mark))
    put_weights(folder, data, name=name)
    message = refusal(folder)
    assert not mark.exists()
    if data[:1] != b"c" or not name.endswith("safetensors"):  # protocol 0 is text: no header that fits, no more
        assert "is a pickle" in message
        assert "runs code" in message
        assert "segmodels.save" in message
    pickle.loads(data) if data[:2] != b"PK" else torch.load(io.BytesIO(data), weights_only=False)  # noqa: S301
    assert mark.exists()  # the payload was a live one


def test_a_zip_under_the_safetensors_name(folder: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"x")
    put_weights(folder, buffer.getvalue())
    assert "is a pickle" in refusal(folder)


def test_pickles_beside_the_card_or_as_the_model(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "checkpoint_final.pth").write_bytes(b"\x80\x02")
    assert "checkpoint_final.pth in it is a pickle" in refusal(tmp_path / "m")
    assert "is a pickle, which runs code" in refusal(tmp_path / "m" / "checkpoint_final.pth")


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no whole safetensors file"),
        (b"\0\0\0", "no whole safetensors file"),
        (struct.pack("<Q", 2**63) + b"{}", "its header would be 9,223,372,036,854,775,808 bytes long"),
        (struct.pack("<Q", 100) + b"{}", "its header would be 100 bytes long and the file has 10"),
        (struct.pack("<Q", 2) + b"xx", "its header cannot be read"),
        (struct.pack("<Q", 2) + b"[]", "its header cannot be read"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "its header cannot be read"),
        (header(a=1), "its header cannot be read"),
        (header(a={"dtype": "F32"}), "its header cannot be read"),
        (header(a=F32 | {"shape": [-2]}) + b"\0" * 8, "its header cannot be read"),
        (header(a=F32 | {"shape": [2**62, 4]}) + b"\0" * 8, "its header cannot be read"),
        (header(a=F32 | {"data_offsets": [0, 8, 9]}) + b"\0" * 8, "its header cannot be read"),
        (header(a=F32) + b"\0" * 7, "is truncated: its header announces 8 bytes of tensors, 7 are there"),
        (header(a=F32) + b"\0" * 9, "is damaged: its header announces 8 bytes"),
    ],
    ids=range(14),
)
def test_damaged_files(folder: Path, data: bytes, words: str) -> None:
    put_weights(folder, data)
    assert words in refusal(folder)


def test_a_truncated_copy(folder: Path) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    message = refusal(folder)
    assert "is truncated" in message
    assert "copy it again" in message


def test_a_flipped_bit(folder: Path) -> None:
    path = folder / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert "is not the file that card.json describes: its sha256" in refusal(folder)


def test_overlapping_tensors(folder: Path) -> None:
    change_tensors(folder, lambda t: t)
    path = folder / "weights.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    names = [n for n in entries if entries[n]["shape"] == [4]]
    entries[names[0]]["data_offsets"] = entries[names[1]]["data_offsets"]
    text = json.dumps(entries).encode()
    put_weights(folder, struct.pack("<Q", len(text)) + text + data[8 + length :])
    assert "cannot be read as safetensors" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("head.bias"), ["1 missing: head.bias"]),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("decoder")], ["missing: decoder.0", "; ..."]),
        (lambda t: t.update(foo=torch.ones(2)), ["1 not the network's: foo"]),
        (
            lambda t: t.update({"head.bias": torch.ones(4)}),
            ["1 of another shape: head.bias is [4] instead of [3]"],
        ),
        (
            lambda t: t.update({"head.bias": torch.ones(3, dtype=torch.int32)}),
            ["of another type: head.bias is I32"],
        ),
        (lambda t: (t.clear(), t.update(x=torch.ones(1))), ["missing", "1 not the network's: x"]),
    ],
    ids=range(6),
)
def test_weights_that_do_not_fit(folder: Path, change: Callable[..., object], words: list[str]) -> None:
    change_tensors(folder, change)
    message = refusal(folder)
    assert "does not fit the card's network" in message
    assert "config in card.json" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(tmp_path: Path, folder: Path, facts: dict[str, Any], value: float) -> None:
    change_tensors(folder, lambda t: t["head.bias"].fill_(value))
    assert "holds NaN or infinite values in 1 tensors, the first head.bias" in refusal(folder)
    network = small_network(dims=3, classes=3, widths=[4, 8])
    torch.nn.init.constant_(network.get_parameter("head.weight"), value)
    with pytest.raises(ModelError, match="the network holds NaN or infinite"):
        segmodels.save(network, facts, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (
            {"name": "resunet", "config": {"dims": 3, "classes": 3, "widths": [16384] * 8}},
            "parameters; at most",
        ),
        ({"name": "unet", "config": {"dims": 3, "widths": [4, 10**12]}}, "widths"),
        ({"name": "resunet", "config": {"dims": 3, "classes": 3, "widths": [512, 1024]}}, "of another shape"),
        ({"name": "resunett", "config": {}}, "no network is called 'resunett'. Did you mean 'resunet'"),
        ({"name": "kmeans", "config": {}}, "no network is called 'kmeans'"),
        ({"name": "os.system", "config": {}}, "no network is called 'os.system'"),
        ({"name": "resunet", "config": {"width": 3}}, "resunet has no option 'width'. Did you mean 'widths'"),
    ],
    ids=range(7),
)
def test_networks_that_are_not_built(folder: Path, network: dict[str, Any], words: str) -> None:
    edit_card(folder, network=network)
    assert words in refusal(folder)


def test_missing_things(tmp_path: Path, folder: Path) -> None:
    (folder / "weights.safetensors").rename(folder / "other")
    assert "no file 'weights.safetensors', which its card.json names" in refusal(folder)
    (folder / "card.json").unlink()
    assert "has no card.json" in refusal(folder)
    assert "there is no such folder" in refusal(tmp_path / "nowhere")
    assert "Did you mean 'kmeans'" in refusal("kmean")
    assert "is an architecture, without weights of its own" in refusal("unet")
    assert "is a file; a model is a folder" in refusal(folder / "other")


def test_classes_belong_to_kmeans(folder: Path) -> None:
    assert "classes=3 is for kmeans" in refusal(folder, classes=3)
    assert "from 2 to 255, got 1" in refusal("kmeans", classes=1)


def test_a_card_with_an_unknown_field(folder: Path) -> None:
    edit_card(folder, tiles=[1, 2, 3])
    assert "unknown field 'tiles'. Did you mean 'tile'?" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": {"1": {"name": "a"}}}, "1 labels are listed"),
        (
            {"network": {"name": "resunet", "config": {"dims": 3, "classes": 3, "widths": [4, 6]}}},
            "the network is",
        ),
        ({"axes": "zy"}, "axes"),
    ],
    ids=range(3),
)
def test_save_refuses_a_card_that_does_not_fit(
    tmp_path: Path, facts: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    network = small_network(dims=3, classes=3, widths=[4, 8])
    with pytest.raises(ModelError, match=words):
        segmodels.save(network, facts | changes, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_save_takes_only_our_networks(tmp_path: Path, facts: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"made by segmodels\.create, got a Conv2d"):
        segmodels.save(torch.nn.Conv2d(1, 1, 1), facts, tmp_path / "m")
