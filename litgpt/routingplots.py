"""Pictures of routing: panels of heatmaps, one a layer, with Devanagari set right.

Matplotlib shapes text with HarfBuzz (libraqm) from 3.11 on; what it needs is a font with the script, which comes as a
package (Noto Sans Devanagari, licence OFL 1.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litgpt.utils import atomic_file

COLUMNS = 4


def pyplot() -> Any:
    """pyplot without a display, with a font for Devanagari behind matplotlib's own."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import font_manager

    try:
        import fontpkg
    except ModuleNotFoundError:  # a machine where nothing can be installed: boxes in place of Hindi names
        return plt
    font = fontpkg.path("Noto Sans Devanagari")
    if not any(entry.fname == str(font) for entry in font_manager.fontManager.ttflist):
        font_manager.fontManager.addfont(font)
    plt.rcParams["font.family"] = ["DejaVu Sans", "Noto Sans Devanagari"]
    return plt


def heatmaps(
    path: Path,
    title: str,
    panels: Sequence[tuple[str, Sequence[Sequence[float]]]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    limits: tuple[float, float] | None = None,
    colours: str = "viridis",
) -> None:
    """Write a PNG with one heatmap a panel, all on one scale.

    Args:
        path: the file.
        title: above all.
        panels: title and values [rows][columns] of each.
        rows, columns: their names; row names may be Hindi.
        limits: of the scale; by default 0 and the largest value.
        colours: a colour map of matplotlib.
    """
    plt = pyplot()
    wide = min(COLUMNS, len(panels))
    high = math.ceil(len(panels) / wide)
    longest = max(map(len, rows), default=0)
    width = 0.09 * longest + max(2.2, min(6.0, 0.42 * len(columns))) * wide + 1.2
    height = max(1.3, 0.27 * len(rows) + 0.6) * high + 0.7
    figure, axes = plt.subplots(
        high, wide, figsize=(width, height), layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    low, top = limits or (0.0, max((v for _, values in panels for row in values for v in row), default=1.0) or 1.0)
    image = None
    for number, cell in enumerate(axes.flat):
        if number >= len(panels):
            cell.remove()
            continue
        name, values = panels[number]
        image = cell.imshow(values, vmin=low, vmax=top, cmap=colours, aspect="auto", interpolation="nearest")
        cell.set_title(name, fontsize=9)
        step = max(1, len(columns) // 8)
        cell.set_xticks(range(0, len(columns), step), [columns[i] for i in range(0, len(columns), step)], fontsize=8)
        cell.set_yticks(range(len(rows)), rows, fontsize=8)
        if len(rows) * len(columns) <= 64 and len(columns) <= 10:
            for y, row in enumerate(values):
                for x, value in enumerate(row):
                    dark = (value - low) / ((top - low) or 1) < 0.6
                    cell.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6, color="w" if dark else "k")
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.suptitle(title, fontsize=11)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
