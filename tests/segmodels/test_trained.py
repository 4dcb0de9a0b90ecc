"""The trained models that come with the package: whole, small, licensed, and made by the job file beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import segmodels
from pipeline.training.job import make_train_job
from segmodels.registry import STORE, trained

MEGABYTES = {"hippocampus-resunet": 8, "phantom-resunet": 4}


def test_they_are_listed_by_name_and_no_architectures() -> None:
    assert trained()
    assert set(trained()) <= set(segmodels.list_models())
    assert not set(trained()) & set(segmodels.list_models(dims=3))
    with pytest.raises(segmodels.ModelError, match="is a trained model, not an architecture"):
        segmodels.create(trained()[0])


@pytest.mark.parametrize("name", trained())
def test_a_model_of_the_store(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # a name wins over a folder of that name
    model = segmodels.load(name)
    assert (model.card.name, model.source) == (name, name)
    assert model.network is not None
    assert model.card.licence
    size = sum(path.stat().st_size for path in (STORE / name).iterdir())
    assert size <= MEGABYTES[name] * 1_000_000
    assert sorted(path.name for path in (STORE / name).iterdir()) == ["card.json", "train.yaml", "weights.safetensors"]


@pytest.mark.parametrize("name", trained())
def test_the_card_says_what_it_was_trained_with_and_how_good_it_is(name: str) -> None:
    card = segmodels.load(name).card
    job = make_train_job(yaml.safe_load((STORE / name / "train.yaml").read_text("utf-8")))
    training, quality = card.training, card.quality
    assert isinstance(training, dict)
    assert isinstance(quality, dict)
    assert training["job"] == job.fingerprint
    split = training["split"]
    assert not set(split["training"]) & set(split["validation"])
    assert set(training["data"]["sha256_of_image_and_mask"]) == {*split["training"], *split["validation"]}
    assert quality["cases"] == len(split["validation"])
    for facts in quality["structures"].values():
        low, high = facts["interval_95"]
        assert low <= facts["mean"] <= high
