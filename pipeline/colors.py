"""One colour per label, the same in OME-Zarr metadata, pictures, legends and palettes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Color = tuple[int, int, int]

# Okabe and Ito, "Color Universal Design" (2008), without black and in an order that keeps neighbours apart;
# the eighth is Paul Tol's wine. All pairs stay distinct under simulated protanopia, deuteranopia, tritanopia.
FIRST: tuple[Color, ...] = (
    (230, 159, 0),  # orange
    (86, 180, 233),  # sky blue
    (0, 158, 115),  # bluish green
    (240, 228, 66),  # yellow
    (0, 114, 178),  # blue
    (213, 94, 0),  # vermilion
    (204, 121, 167),  # reddish purple
    (136, 34, 85),  # wine
)
DISTINCT = 512  # after these many the colours repeat: nobody tells more apart
LATTICE = 17  # steps per primary among which later colours are searched
LIGHTNESS = (0.42, 0.93)  # OKLab L: seen on black air, on white bone and on the page
CHROMA = 0.07  # OKLab: a scan is grey, so no label is


def label_colors(n: int) -> list[Color]:
    """Colours of labels 1..n as 8-bit sRGB: label i has `label_colors(n)[i - 1]`.

    The first eight are told apart by colour-blind eyes; each later one lies as far as possible from all
    before it (greedy, in OKLab). A label's colour does not depend on n. Distinct up to 512, then they repeat.
    Raises ValueError for a negative n.
    """
    if n < 0:
        raise ValueError(f"a number of labels cannot be negative, got {n}")
    palette = _palette() if n > len(FIRST) else FIRST
    return [palette[i % len(palette)] for i in range(n)]


@lru_cache(maxsize=1)
def _palette() -> tuple[Color, ...]:
    steps = np.linspace(0, 255, LATTICE).round().astype(np.int64)
    rgb = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(rgb)
    fit = (np.hypot(lab[:, 1], lab[:, 2]) > CHROMA) & (lab[:, 0] > LIGHTNESS[0]) & (lab[:, 0] < LIGHTNESS[1])
    rgb, lab = rgb[fit], lab[fit]
    first = _oklab(np.array(FIRST))
    nearest = np.linalg.norm(lab[:, None] - first[None], axis=-1).min(axis=1)
    chosen = list(FIRST)
    while len(chosen) < DISTINCT:
        best = int(nearest.argmax())
        r, g, b = (int(v) for v in rgb[best])
        chosen.append((r, g, b))
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[best], axis=-1))
    return tuple(chosen)


def _oklab(rgb: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """OKLab of 8-bit sRGB (n, 3): Ottosson, https://bottosson.github.io/posts/oklab (2020)."""
    unit = rgb / 255.0
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    to_cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    lab: npt.NDArray[np.float64] = np.cbrt(linear @ to_cones.T) @ to_lab.T
    return lab
