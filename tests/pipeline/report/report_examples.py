"""An example of a night, and a parser that reads a page as people do."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from pipeline.report.page import StudyView

SUMMARY: dict[str, Any] = {
    "run": "20261121T0100-ab12",
    "published": 2,
    "failed": 2,
    "interrupted": 1,
    "reused": 1,
    "blocks_computed": 1234,
    "seconds": 463.2,
    "model": {"name": "hippocampus-resunet", "version": "1.0.0", "hash": "9f" * 32, "licence": "Apache-2.0"},
    "settings": {"stitch": "gaussian", "tile": [48, 64, 48], "overlap": 0.5},
    "runtime": {"device": "cpu", "precision": "fp32", "threads": 2, "hash": "a1b2c3d4e5f60718"},
    "versions": {"torch": "2.13.0"},
    "dice": {"anterior": 0.8812},
    "mean_dice": 0.8731,
}
ROW: dict[str, Any] = {
    "label": 1, "structure": "anterior", "voxels": 12034, "volume_ml": 12.034, "mean": 101.26, "std": 8.7,
    "centroid_x_mm": -12.34, "centroid_y_mm": 5.0, "centroid_z_mm": 410.0,
    "bbox_x_min": 3, "bbox_x_max": 17, "bbox_y_min": 0, "bbox_y_max": 9, "bbox_z_min": 20, "bbox_z_max": 31,
    "touches_border": True, "dice": 0.91234, "iou": 0.83879, "sensitivity": None, "precision": None,
    "hd95_mm": 2.344, "asd_mm": 0.4, "surface_dice_1mm": None,
    "components": 2, "largest_component_ml": 11.9, "holes": 0,
}  # fmt: skip
SECONDS = {"ingest": 1.25, "segment": 75.0, "export": 0.5}
PUBLISHED = StudyView("brain_1", "k1", "published", picture="pictures/k1.png", seconds=SECONDS, structures=[ROW])
STUDIES = [
    PUBLISHED,
    StudyView("late", "k2", "interrupted"),
    StudyView("cut_off", "k3", "failed", "input", "it unpacks to 5 bytes, 10 were expected"),
    StudyView("no_disk", "k4", "failed", "storage", "no space left", source="/data/no_disk.nii"),
    StudyView("brain_2", "k5", "published", message="the reference has another shape", peak_rss_bytes=3 << 30),
]


class Page(HTMLParser):
    """Tags with their attributes, texts in order, and tables as rows of cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.unseen = self.in_cell = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.unseen = tag in ("style", "script")
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.unseen = False
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if not self.unseen:
            self.texts.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]
