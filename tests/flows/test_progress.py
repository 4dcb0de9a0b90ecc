"""What is shown of a command on its way."""

from __future__ import annotations

import pytest

from flows import progress
from flows.progress import ProgressLine


def test_each_stage_has_a_pace_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A training that goes on at 69 % is not said to end in seconds because its cases were read fast."""
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    line = ProgressLine()
    for seconds, stage, share in [(0, "prepare", 0.1), (20, "prepare", 0.6), (21, "train", 0.69), (121, "train", 0.7)]:
        now = 1000.0 + seconds
        line.tell(stage, share, "done", stage=stage)
    said = capsys.readouterr().err.splitlines()
    assert said == ["prepare, 60% done, 20 s, about 16 s left", "train, 70% done, 121 s, about 3000 s left"]
