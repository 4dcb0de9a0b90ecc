"""Hostile names are text and nothing else, and a real Chromium shows the page whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_examples import PUBLISHED, ROW, STUDIES, SUMMARY, Page

from pipeline.colors import label_colors
from pipeline.report.page import StudyView, render, write_report

HOSTILE = [
    "<script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "' onmouseover='document.title=1' x='",
    "</title></style></script><script>document.title='owned'</script>",
    "{{ 7 * 7 }}{% raw %}",
    "two\nlines\ttab\x00\x07",
    "\u202egnp.exe\u202c \u05e9\u05dc\u05d5\u05dd",
    "bad bytes \udcff\udc80",
    "javascript:alert(1)//&amp;lt;",
]


def hostile_studies() -> list[StudyView]:
    views = []
    for i, name in enumerate(HOSTILE):
        row = {**ROW, "structure": name}
        common = {"source": name, "message": name, "warnings": [name], "seconds": {name: 1.0, "ingest": 1.0}}
        views.append(StudyView(name, f"p{i}{name}", "published", picture=name, structures=[row], **common))
        views.append(StudyView(name, f"f{i}", "failed", "input", **common))
    return views


def hostile_summary() -> dict[str, Any]:
    bad = dict.fromkeys(HOSTILE, HOSTILE[1])
    words = {"run": HOSTILE[0], "model": bad, "settings": {"deep": bad}, "dice": dict.fromkeys(HOSTILE, 0.5)}
    return SUMMARY | words | {"published": len(HOSTILE), "failed": len(HOSTILE)}


def test_hostile_text_is_only_text(tmp_path: Path) -> None:
    html = Path(write_report(str(tmp_path), hostile_summary(), hostile_studies())).read_text(encoding="utf-8")
    page = Page(html)
    assert len(page.all("script")) == 1
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in Page(render(SUMMARY, STUDIES)).tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    for image in page.all("img"):
        assert ":" not in str(image["src"]), "a picture's name never becomes an address of another scheme"
    assert HOSTILE[0] in " ".join(page.texts)
    assert "{{ 7 * 7 }}" in page.text
    assert r"bad bytes \udcff\udc80" in page.text


@pytest.mark.browser
def test_hostile_text_runs_nothing_in_a_browser(tmp_path: Path, chromium: Callable[..., str]) -> None:
    def title(dom: str) -> str:
        return re.findall(r"<title>(.*?)</title>", dom, re.S)[0]

    path = Path(write_report(str(tmp_path), hostile_summary(), hostile_studies()))
    assert title(chromium(path, "--dump-dom")).startswith("maskmill · ")
    # the policy is taken away: escaping alone must hold
    html = path.read_text(encoding="utf-8")
    bare = tmp_path / "bare.html"
    bare.write_text(html.replace('http-equiv="Content-Security-Policy"', 'name="none"'), encoding="utf-8")
    assert title(chromium(bare, "--dump-dom")).startswith("maskmill · ")
    # escaping is taken away: the policy alone must hold
    leak = html.replace("</main>", HOSTILE[0] + HOSTILE[1] + "</main>")
    bare.write_text(leak, encoding="utf-8")
    assert title(chromium(bare, "--dump-dom")).startswith("maskmill · ")
    # both are taken away: this probe does tell
    bare.write_text(leak.replace('http-equiv="Content-Security-Policy"', 'name="none"'), encoding="utf-8")
    assert title(chromium(bare, "--dump-dom")) == "owned"


@pytest.mark.browser
@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_shows_the_page_its_pictures_and_its_controls(
    tmp_path: Path, chromium: Callable[..., str], width: int
) -> None:
    magenta = (255, 0, 254)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (676, 220), magenta).save(tmp_path / "pictures" / "k1.png")
    path = Path(write_report(str(tmp_path), SUMMARY | {"failed": 0, "interrupted": 0}, [PUBLISHED]))
    shot = tmp_path / "shot.png"
    dom = chromium(path, "--dump-dom", f"--window-size={width},1600")
    assert '<form id="find" role="search">' in dom, "the script ran under its hash and showed the controls"
    chromium(path, f"--screenshot={shot}", f"--window-size={width},1600")
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    shown = (pixels == magenta).all(axis=-1)
    columns = np.flatnonzero(shown.any(axis=0))
    assert columns.size > 0.4 * width, "the picture is loaded and as wide as it may be"
    swatch = (pixels == label_colors(1)[0]).all(axis=-1)
    assert swatch.sum() > 100, "the style, and with it the swatches, was accepted by the policy"
    assert columns[-1] < width, "nothing runs out of the page"


@pytest.mark.browser
def test_finding_sorting_and_folding(tmp_path: Path, chromium: Callable[..., str]) -> None:
    scores = {"scan_b": 0.5, "scan_a": 0.9, "other": None, "scan_c": 0.1}
    views = [
        replace(PUBLISHED, study=name, key=name, structures=[ROW | {"dice": dice}]) for name, dice in scores.items()
    ]
    drive = """<script>
      const { text, order, all } = document.getElementById("find").elements;
      const set = (field, value, event) => { field.value = value; field.dispatchEvent(new Event(event)); };
      set(order, "dice", "change");
      set(text, " SCAN", "input");
      all.click();
    </script></body>"""
    page = tmp_path / "driven.html"
    html = render(SUMMARY, views).replace('http-equiv="Content-Security-Policy"', 'name="none"')
    page.write_text(html.replace("</body>", drive), encoding="utf-8")
    dom = Page(chromium(page, "--dump-dom"))
    studies = [a for a in dom.all("details") if a.get("data-state") == "published"]
    assert [a["id"] for a in studies] == [f"study-{name}-{name}" for name in ("scan_c", "scan_b", "scan_a", "other")]
    assert ["hidden" in a for a in studies] == [False, False, False, True]
    assert ["open" in a for a in studies] == [False, False, False, True], "only what is shown is folded"
    assert "3 of 4 shown" in dom.text
