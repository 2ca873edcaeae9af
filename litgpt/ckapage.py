"""What `eval_cka.py` found, as pictures on a fixed 0 … 1 scale and as one self-contained page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from litgpt.htmlpage import heading, note, page, picture, table

SITES = {
    "block": "the residual stream after each block",
    "attention": "what attention adds",
    "mlp": "what the MLP or the mixture adds",
    "expert": "what each expert makes of all tokens, against the other's FFN",
}

_LEGEND = (
    "CKA: unbiased linear CKA, exact over all rows; 1 is the same geometry up to rotation and scale. Interval: 95 %, "
    "resampled over sequences of a sample of the rows, so rather too wide for all of them. Floor: the largest of 20 "
    "values with the tokens paired at random; below it there is nothing. Biased: what the usual estimator says. "
    "Relative L2 and cosine compare the numbers themselves, Procrustes (0 to 2) up to rotation: CKA alone can be high "
    "for networks that differ in many small directions."
)

_COLUMNS = {
    "cka": "CKA",
    "low": "from",
    "high": "to",
    "floor": "floor",
    "ceiling": "ceiling",
    "biased": "biased",
    "relative_l2": "relative L2",
    "cosine": "cosine",
    "procrustes": "Procrustes",
}


def cka_page(result: Mapping[str, Any], names: Mapping[str, str], pictures: Sequence[Path], film: Path | None) -> str:
    """The page.

    Args:
        result: what `cka.json` holds.
        names: what a, b and c are.
        pictures: a PNG of each of its comparisons.
        film: that of the series.
    """
    settings = result["settings"]
    parts = [
        "<h1>What moved inside</h1>",
        table(["", "checkpoint"], [[name, text] for name, text in names.items()]),
        note(
            f"{result['rows']:,} tokens ({', '.join(settings['spans'])}) of {settings['data']}; left out: "
            f"{result['dropped_first']:,} at position 0, {result['dropped_outliers']:,} of an outlying norm. Maps and "
            f"intervals on {result['map_rows']:,} of them, from {result['map_sequences']:,} sequences."
        ),
    ]
    for entry, path in zip(result["comparisons"], pictures, strict=True):
        title = f"{entry['a']} and {entry['b']}: {SITES[entry['site']]}"
        parts += [heading(title), picture(path, title), _layers(entry)]
    if film is not None:
        parts += [heading(f"The series, each against {names['a']}"), picture(film, "CKA by checkpoint and layer")]
    parts += [note(_LEGEND), heading("Settings")]
    parts.append(table(["setting", "value"], [[key, str(value)] for key, value in settings.items()]))
    return page("What moved inside: CKA", parts)


def _layers(entry: Mapping[str, Any]) -> str:
    layers = entry["layers"]
    columns = {key: name for key, name in _COLUMNS.items() if any(layer.get(key) is not None for layer in layers)}
    places = {"a": f"layer of {entry['a']}", "b": f"layer of {entry['b']}"}
    if entry["site"] == "expert":
        places["expert"] = "expert"
    rows = [[*(str(layer[key]) for key in places), *(_number(layer.get(key)) for key in columns)] for layer in layers]
    return table([*places.values(), *columns.values()], rows)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def draw_site(entry: Mapping[str, Any], names: Mapping[str, str], result: Mapping[str, Any], path: Path) -> None:
    """The layer × layer map, if there is one, and the corresponding layers with their intervals and floor."""
    import numpy as np

    plt = _pyplot()
    name_a, name_b = (f"{side} ({_short(names[side])})" for side in (entry["a"], entry["b"]))
    if entry["site"] == "expert":
        _draw_experts(plt, entry, name_a, name_b, path)
        return
    cells = entry.get("map")
    figure, axes = plt.subplots(1, 2 if cells else 1, figsize=(11 if cells else 6, 4.8), layout="constrained")
    axes = list(np.atleast_1d(axes))
    if cells:
        left, values = axes[0], np.array(cells, dtype=float)
        image = left.imshow(values, origin="lower", vmin=0, vmax=1, cmap="viridis", aspect="auto")
        left.set(xlabel=f"layer of {name_b}", ylabel=f"layer of {name_a}", title=f"map, {result['map_rows']} tokens")
        left.set_xticks(range(0, values.shape[1], max(1, values.shape[1] // 8)))
        left.set_yticks(range(0, values.shape[0], max(1, values.shape[0] // 8)))
        if values.size <= 64:
            for (i, j), value in np.ndenumerate(values):
                left.text(j, i, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
        figure.colorbar(image, ax=left, label="unbiased linear CKA")
    right, layers = axes[-1], entry["layers"]
    x = [layer["a"] for layer in layers]
    value = [math.nan if layer["cka"] is None else layer["cka"] for layer in layers]
    if all(layer.get("low") is not None and layer.get("high") is not None for layer in layers):
        right.fill_between(
            x,
            [layer["low"] for layer in layers],
            [layer["high"] for layer in layers],
            alpha=0.25,
            label="95 % interval",
        )
    right.plot(x, value, marker="o", label="CKA")
    if all(layer.get("floor") is not None for layer in layers):
        right.plot(x, [layer["floor"] for layer in layers], ls=":", color="gray", label="tokens paired at random")
    lowest = min((v for v in value if math.isfinite(v)), default=0.0)
    right.set(
        ylim=(min(-0.02, lowest - 0.02), 1.02), xlabel=f"layer of {name_a}", ylabel="CKA",
        title=f"corresponding layers, {result['rows']} tokens",
    )  # fmt: skip
    right.set_xticks(x[:: max(1, len(x) // 8)])
    right.grid(alpha=0.3)
    right.legend(loc="lower left")
    figure.suptitle(f"{entry['a']} and {entry['b']}: {SITES[entry['site']]}", fontsize=11)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def _draw_experts(plt: Any, entry: Mapping[str, Any], name_a: str, name_b: str, path: Path) -> None:
    layers = sorted({layer["b"] for layer in entry["layers"]})
    experts = sorted({layer["expert"] for layer in entry["layers"]})
    cells = [[math.nan] * len(experts) for _ in layers]
    for layer in entry["layers"]:
        if layer["cka"] is not None:
            cells[layers.index(layer["b"])][layer["expert"]] = layer["cka"]
    _heatmap(
        plt, cells, path, xlabel=f"expert of {name_b}", ylabel=f"layer of {name_b}",
        x=[str(expert) for expert in experts], y=[str(layer) for layer in layers],
        title=f"each expert against the FFN of {name_a}",
    )  # fmt: skip


def draw_film(series: Sequence[Mapping[str, Any]], name_a: str, path: Path) -> None:
    """CKA to the reference, a row for each checkpoint in the order given."""
    cells = [[math.nan if layer["cka"] is None else layer["cka"] for layer in frame["layers"]] for frame in series]
    layers = [str(layer["a"]) for layer in series[0]["layers"]]
    _heatmap(
        _pyplot(), cells, path, xlabel=f"layer of {_short(name_a)}", ylabel="", x=layers,
        y=[_short(frame["checkpoint"]) for frame in series], title="CKA of the corresponding layers",
    )  # fmt: skip


def _heatmap(
    plt: Any, cells: Sequence[Sequence[float]], path: Path, *, xlabel: str, ylabel: str, x: list[str], y: list[str],
    title: str,
) -> None:  # fmt: skip
    figure, axes = plt.subplots(
        figsize=(max(5.0, 0.6 * len(x) + 3), max(2.4, 0.45 * len(y) + 1.5)), layout="constrained"
    )
    image = axes.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.set_xticks(range(len(x)), x)
    axes.set_yticks(range(len(y)), y)
    if len(x) * len(y) <= 200:
        for i, row in enumerate(cells):
            for j, value in enumerate(row):
                color = "black" if value > 0.6 else "white"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=axes, label="unbiased linear CKA")
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def _short(name: str) -> str:
    return str(Path(*Path(name).parts[-2:]))


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
