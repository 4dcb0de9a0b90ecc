"""Box plots of structures over all studies: quartiles by NumPy, dots that lead to their studies, worst ones first."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from report_examples import PUBLISHED, ROW, SUMMARY, Page

from pipeline.report.page import OPEN, WORST, render
from pipeline.report.plots import ALL_DOTS, WIDTH, spreads


def studies(scores: list[float | None]) -> list[tuple[str, str, list[dict]]]:
    return [(f"k{i}", f"study {i}", [ROW | {"dice": s, "hd95_mm": None}]) for i, s in enumerate(scores)]


def test_a_plot_is_quartiles_ends_and_a_dot_per_study() -> None:
    scores = [0.91, 0.72, 0.85, 0.88, 0.95, 0.79, 0.9]
    titles, (row,) = spreads(studies(scores))
    assert titles == ["volume, mL", "Dice"]
    plot = row.plots[1]
    assert plot is not None
    at = [WIDTH * (q - 0.7) / 0.3 for q in np.quantile(scores, [0, 0.25, 0.5, 0.75, 1])]
    assert [plot.ends[0], *plot.box, plot.ends[1]] == pytest.approx(at, abs=0.01)
    assert [dot.anchor for dot in plot.dots] == [f"k{i}" for i in range(7)]
    assert plot.dots[1].text == "study 1: 0.720"
    assert (plot.low, plot.high) == ("0.7", "1.0")
    assert plot.text == "median 0.880, 0.720 to 0.950, 7 studies"


def test_of_many_studies_only_the_odd_ones_have_dots() -> None:
    scores = np.clip(np.random.default_rng(0).normal(0.9, 0.01, 500), 0, 1)
    scores[17], scores[400] = 0.2, 0.5
    _, (row,) = spreads(studies(scores.tolist()))
    plot = row.plots[1]
    assert plot is not None
    assert {"k17", "k400"} <= {dot.anchor for dot in plot.dots}
    assert len(plot.dots) < ALL_DOTS


@pytest.mark.parametrize("scores", [[], [0.9], [None, None, 0.5]])
def test_one_study_has_no_spread(scores: list[float | None]) -> None:
    titles, rows = spreads(studies(scores))
    assert "Dice" not in titles
    assert all(len(row.plots) == len(titles) for row in rows)


def test_values_that_are_all_the_same_stay_on_the_axis() -> None:
    for value in (0.0, 1.0):
        _, (row,) = spreads(studies([value, value]))
        assert all(0 <= x <= WIDTH for plot in row.plots if plot for x in (*plot.box, *plot.ends))


def test_studies_of_the_same_content_have_places_of_their_own() -> None:
    views = [replace(PUBLISHED, study=name, key="k", structures=[ROW | {"dice": 0.5}]) for name in ("one", "two")]
    page = Page(render(SUMMARY, views))
    assert {a["id"] for a in page.all("details") if a.get("data-state")} == {"study-k-one", "study-k-two"}
    assert {"#study-k-one", "#study-k-two"} <= {a["href"] for a in page.all("a")}


def test_the_worst_stand_first_and_open_on_a_long_page() -> None:
    scores = np.linspace(0.99, 0.5, OPEN + 6)
    views = [
        replace(PUBLISHED, study=f"s{i}", key=f"k{i}", structures=[ROW | {"dice": float(s)}])
        for i, s in enumerate(scores)
    ]
    views.insert(0, replace(PUBLISHED, study="none", key="none", structures=[ROW | {"dice": None}]))
    page = Page(render(SUMMARY, views))
    shown = [a for a in page.all("details") if a.get("data-state") == "published"]
    assert [a["id"] for a in shown] == [f"study-k{i}-s{i}" for i in reversed(range(len(scores)))] + ["study-none-none"]
    assert ["open" in a for a in shown] == [i < WORST for i in range(len(shown))]
    links = {a["href"] for a in page.all("a")}
    assert {f"#study-k{i}-s{i}" for i in range(len(scores))} <= links
    assert "White lines are the reference" in page.text
