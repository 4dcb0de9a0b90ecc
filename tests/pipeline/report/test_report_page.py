"""The report page: everything is on it, what needs attention first, and everybody can use it."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from report_examples import PUBLISHED, ROW, STUDIES, SUMMARY, Page

from pipeline.colors import label_colors
from pipeline.errors import Cause
from pipeline.report.page import OPEN, REMEDY, WORST, StudyView, render, write_report


def test_what_happened_stands_first_then_failures_by_cause_then_the_rest() -> None:
    text = Page(render(SUMMARY, STUDIES)).text
    places = [
        text.index(part)
        for part in (
            "2 of 5 studies have their masks, 2 failed and 1 interrupted.",
            "7 min 43 s",
            "1,234 blocks computed",
            "0.873",
            "cut_off",
            "it unpacks to 5 bytes, 10 were expected",
            "no_disk",
            "no space left",
            "late",
            "brain_1",
            "brain_2",
            "the reference has another shape",
            "3 GiB",
            "How it was made",
            "9f" * 32,
            "[48, 64, 48]",
            "fp32",
            "2.13.0",
        )
    ]
    # the headline is also the page's title; what follows is looked for after its own section
    assert places == sorted(places)
    assert "Not a medical device." in text


def test_every_cause_says_what_to_do() -> None:
    for cause in get_args(Cause):
        text = Page(render(SUMMARY, [StudyView("s", "k", "failed", cause, "why")])).text
        assert REMEDY[cause] in text
    assert "No cause was recorded." in Page(render(SUMMARY, [StudyView("s", "k", "failed")])).text


@pytest.mark.parametrize(
    ("counts", "headline"),
    [
        ((0, 0, 0), "There was no study to segment."),
        ((1, 0, 0), "The one study has its mask."),
        ((1200, 0, 0), "All 1,200 studies have their masks."),
        ((1, 1, 0), "1 of 2 studies has its mask, 1 failed."),
        ((0, 3, 0), "No study has a mask, 3 failed."),
    ],
)
def test_headline(counts: tuple[int, int, int], headline: str) -> None:
    summary = {**SUMMARY, **dict(zip(("published", "failed", "interrupted"), counts, strict=True))}
    assert f"<h1>{headline}</h1>" in render(summary, [])


def test_a_summary_without_a_count_is_refused() -> None:
    with pytest.raises(KeyError, match="reused"):
        render({name: value for name, value in SUMMARY.items() if name != "reused"}, [])


def test_the_structures_table() -> None:
    page = Page(render(SUMMARY, STUDIES))
    at = next(i for i, row in enumerate(page.rows) if row[:2] == ["structure", "label"])
    groups, titles, values = page.rows[at : at + 3]
    assert groups[2:5] == ["size", "against the reference", "pieces"]
    assert groups[5:] == ["intensity", "centroid, mm", "bounding box, voxels", "touches"]
    scores, pieces = ["Dice", "IoU", "HD95, mm", "mean distance, mm"], ["count", "largest, mL", "holes"]
    assert titles == ["mL", "voxels", *scores, *pieces, "mean", "std", "x", "y", "z", "x", "y", "z", "border"]
    assert values == [
        "anterior", "1", "12.0", "12,034", "0.912", "0.839", "2.34", "0.40", "2", "11.9", "0", "101.3", "8.7",
        "−12.3", "5.0", "410.0", "3–17", "0–9", "20–31", "yes",
    ]  # fmt: skip


def test_a_row_of_missing_values_keeps_the_table_whole() -> None:
    empty = dict.fromkeys(ROW) | {"label": 2, "structure": "gone", "voxels": 0, "volume_ml": 0.0}
    page = Page(render(SUMMARY, [replace(PUBLISHED, structures=[ROW, empty])]))
    full, missing = page.rows[-2:]
    assert len(full) == len(missing)
    assert missing[:5] == ["gone", "2", "0.0", "0", "–"]


def test_only_some_labels_are_named_beside_the_picture_but_all_in_the_table() -> None:
    rows = [{**ROW, "label": i, "structure": f"part {i}", "volume_ml": float(i)} for i in range(1, 31)]
    page = Page(render(SUMMARY, [replace(PUBLISHED, structures=rows)]))
    assert sum(row[0].startswith("part ") for row in page.rows if row) == 30
    legend = page.text[: page.text.index("The 10 largest of 30")]
    assert "part 21" in legend
    assert "part 20 " not in legend


def test_swatches_have_the_labels_colours() -> None:
    html = render(SUMMARY, STUDIES)
    assert f".c1{{background:#{bytes(label_colors(1)[0]).hex()}}}" in html
    assert 'class="swatch c1"' in html


def test_timings_are_a_bar_and_words() -> None:
    html = render(SUMMARY, [PUBLISHED])
    text = Page(html).text
    assert "ingest 1.25 s" in text
    assert "segment 1 min 15 s" in text
    widths = [float(w) for w in re.findall(r'<rect class="s\d" x="[\d.]+" width="([\d.]+)"', html)]
    assert sum(widths) == pytest.approx(200, abs=0.1), "one bar for the run and one for the study"


def test_it_can_be_used_with_a_keyboard_and_a_screen_reader() -> None:
    page = Page(render(SUMMARY, STUDIES))
    assert page.all("html")[0]["lang"] == "en"
    assert all(header["scope"] in ("col", "row", "colgroup") for header in page.all("th"))
    assert all(image["alt"] and image["loading"] == "lazy" for image in page.all("img"))
    assert "Axial, coronal and sagittal plane of brain_1" in str(page.all("img")[0]["alt"])
    names = {attributes.get("id") for _, attributes in page.tags}
    for _, attributes in page.tags:
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in names
        if attributes.get("role") == "region":
            assert attributes["tabindex"] == "0"
            assert attributes["aria-label"]
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_contrast_is_aa(scheme: str) -> None:
    css = re.findall(r"<style>(.*?)</style>", render(SUMMARY, []), re.S)[0]
    light, dark = re.findall(r":root \{(.*?)\}", css, re.S)
    colors = dict(re.findall(r"--([\w-]+): (#\w{6})", light))
    colors |= dict(re.findall(r"--([\w-]+): (#\w{6})", dark)) if scheme == "dark" else {}

    def luminance(name: str) -> float:
        unit = np.frombuffer(bytes.fromhex(colors[name][1:]), np.uint8) / 255
        linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    pairs = [(text, ground) for text in ("ink", "quiet", "accent") for ground in ("paper", "card")]
    pairs += [(text, ground) for text in ("ink", "quiet", "bad") for ground in ("bad-card",)]
    pairs += [(text, ground) for text in ("ink", "quiet", "unsure") for ground in ("unsure-card",)]
    pairs += [("good", "card"), ("unsure", "paper")]
    for text, ground in pairs:
        low, high = sorted((luminance(text), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{text} on {ground}"


def test_the_page_asks_nothing_of_the_network() -> None:
    page = Page(render(SUMMARY, STUDIES))
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in str(policy)
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action"):
            assert "//" not in (attributes.get(name) or "")
        assert "style" not in attributes, "the policy forbids style attributes"


def test_the_file_appears_whole_and_readable(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("old")
    path = Path(write_report(str(tmp_path), SUMMARY, STUDIES))
    assert path == tmp_path / "index.html"
    assert path.read_text(encoding="utf-8") == render(SUMMARY, STUDIES)
    assert [entry.name for entry in tmp_path.iterdir()] == ["index.html"]


def test_a_thousand_studies_are_a_small_folded_page(tmp_path: Path) -> None:
    rows = [{**ROW, "label": i, "structure": f"structure {i}"} for i in range(1, 5)]
    views = [replace(PUBLISHED, study=f"study_{i}", key=f"{i:016x}", structures=rows) for i in range(1000)]
    path = Path(write_report(str(tmp_path), SUMMARY | {"published": 1000}, views))
    assert path.stat().st_size < 6_000_000
    page = Page(path.read_text(encoding="utf-8"))
    studies = [a for a in page.all("details") if a.get("data-state") == "published"]
    assert len(studies) == 1000
    assert ["open" in attributes for attributes in studies] == [i < WORST for i in range(1000)]
    few = Page(render(SUMMARY, views[:OPEN]))
    assert all("open" in a for a in few.all("details") if a.get("data-state") == "published")
