"""Progress of a run on stderr: a live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from pipeline.run import Run

SECONDS_BETWEEN_LINES = 15.0
SECONDS_BETWEEN_LOOKS = 0.1


class ProgressLine:
    """Shows what is done, its share of the work and the time that is left, as often as is useful."""

    def __init__(self) -> None:
        self.live: Any = None
        self.shown = self.began = time.monotonic()
        self.looked = 0.0
        self.stage = ""
        self.first: tuple[float, float] | None = None  # when its first result came, and the share done by then

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self.live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self.live.start()
            self.bar = self.live.add_task("starting", total=1.0)
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, run: Run) -> None:
        """Bring what is shown of a run over studies up to date: not at each of a million blocks, it counts them all."""
        if time.monotonic() - self.looked < SECONDS_BETWEEN_LOOKS:
            return
        self.looked = time.monotonic()
        self.tell(_studies(run), run.fraction_done(), "of the tiles")

    def tell(self, text: str, fraction: float, of: str, *, stage: str = "") -> None:
        """Show `text` and that a share of the work (0 to 1, `of` what) is done; each stage has a pace of its own."""
        if self.first is None or stage != self.stage:
            self.stage, self.first = stage, (time.monotonic(), fraction)
        if self.live is not None:
            self.live.update(self.bar, completed=fraction, description=text)
        elif time.monotonic() - self.shown >= SECONDS_BETWEEN_LINES:
            self.shown = time.monotonic()
            left = self._left(fraction)
            print(
                f"{text}, {fraction:.0%} {of}, {self.shown - self.began:.0f} s"
                + (f", about {left:.0f} s left" if left is not None else ""),
                file=sys.stderr,
                flush=True,
            )

    def _left(self, fraction: float) -> float | None:
        """Seconds that are left at the rate since the first result: what came before was start-up."""
        if self.first is None or fraction <= self.first[1]:
            return None
        return (time.monotonic() - self.first[0]) * (1 - fraction) / (fraction - self.first[1])


def _studies(run: Run) -> str:
    published = sum(p.state == "published" for p in run.studies)
    failed = sum(p.state == "failed" for p in run.studies)
    return f"{published} of {len(run.studies)} studies" + (f", {failed} failed" if failed else "")
