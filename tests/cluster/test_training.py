"""Training on a cluster that has fewer cores than the job would like."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from balls import ball_folder, ball_job

from cluster.training import train_on_ray
from pipeline.errors import Interrupted, UsageError
from pipeline.training.gather import Preparation, prepare_cases
from pipeline.training.job import TrainJob, make_train_job
from segmodels.train import checkpoint

NEVER = threading.Event()


def unseen(stage: str, share: float, facts: Any) -> None:
    pass


@pytest.fixture(scope="module")
def one_core() -> Iterator[str]:
    """The address of a cluster with a single core."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            yield cluster.address
        finally:
            cluster.shutdown()


def prepared(folder: Path, **changes: Any) -> tuple[TrainJob, Preparation]:
    settings = ball_job(ball_folder(folder, 4), members=2, workers=2)
    settings["recipe"] |= changes
    job = make_train_job(settings)
    return job, prepare_cases(job, folder / "model", NEVER)


@pytest.mark.slow
def test_members_that_find_no_core_wait_for_the_others(one_core: str, tmp_path: Path) -> None:
    job, preparation = prepared(tmp_path, steps=3)
    train_on_ray(job.model_copy(update={"address": one_core}), tmp_path / "model", preparation, 1, NEVER, unseen)
    for member in range(2):
        state = checkpoint.read(tmp_path / f"model/.training/member-{member}")
        assert state is not None
        assert state["step"] == 3


def test_a_stop_does_not_wait_for_those_that_never_began(one_core: str, tmp_path: Path) -> None:
    job, preparation = prepared(tmp_path, steps=1_000_000)
    stop = threading.Event()

    def observe(stage: str, share: float, facts: Any) -> None:
        if facts.get("step", 0) > 2:
            stop.set()

    began = time.monotonic()
    with pytest.raises(Interrupted):
        train_on_ray(job.model_copy(update={"address": one_core}), tmp_path / "model", preparation, 1, stop, observe)
    assert time.monotonic() - began < 120
    assert (tmp_path / "model/.training/member-0/checkpoint.pt").is_file()


def test_more_threads_than_any_machine_has_are_refused(one_core: str, tmp_path: Path) -> None:
    job, preparation = prepared(tmp_path, steps=3)
    with pytest.raises(UsageError, match="threads is 2, but no machine of the cluster has more than 1 cores"):
        train_on_ray(job.model_copy(update={"address": one_core}), tmp_path / "model", preparation, 2, NEVER, unseen)
