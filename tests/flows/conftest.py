"""The command line in this process: quick where no run starts."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator

import pytest
from scans import Ended


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Ended]]:
    """Run the command `maskmill` with these arguments, as its script does."""
    from flows.cli import main

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["maskmill", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        said = capfd.readouterr()
        assert isinstance(end.value.code, int)
        return Ended(end.value.code, said.out, said.err)

    before, blocked = signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield run
    signal.signal(signal.SIGTERM, before)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
