"""The pictures of a run: curves of its training, likeness to the base and load of the experts, before and after.

Each function draws what there is and says whether there was anything: no empty panel, no number without a source.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from litgpt.runfiles import RunFiles, Series, dead_experts
from litgpt.utils import atomic_file

COLUMNS = 3
SMOOTHED_FROM = 30
"""A curve of fewer points is read as it is."""
WIDEST_WINDOW = 201
LOG_FROM = 10.0
"""A panel of positive values gets a log scale where the largest is this many times the smallest."""
_RAW, _SMOOTH = "tab:blue", "navy"
_VALIDATION = ("tab:orange", "tab:red", "tab:purple", "tab:brown", "tab:pink", "gray")


@dataclass
class Panel:
    """One of the small multiples.

    Attributes:
        title: what is drawn, with its unit.
        curves: of the training, by label.
        points: of the validations, by label.
        level: a level to compare with, and its name.
        log: a log scale where the values span `LOG_FROM`.
        noisy: show a smoothed curve beside the raw one.
        events: single steps, not a curve.
    """

    title: str
    curves: dict[str, Series] = field(default_factory=dict)
    points: dict[str, Series] = field(default_factory=dict)
    level: tuple[float, str] | None = None
    log: bool = False
    noisy: bool = True
    events: bool = False


def smoothed(series: Series) -> Series:
    """Moving mean over the tenth of the points around each; towards both ends, to stay centred, over fewer.

    The outermost points, whose window would be less than a quarter of a whole one, have no mean.
    """
    values_N = np.asarray(series.values, dtype=np.float64)
    half = min(max(2, len(values_N) // 20), WIDEST_WINDOW // 2)
    place_N = np.arange(len(values_N))
    reach_N = np.minimum(half, np.minimum(place_N, len(values_N) - 1 - place_N))
    sums = np.concatenate(([0.0], np.cumsum(values_N)))
    means_N = (sums[place_N + reach_N + 1] - sums[place_N - reach_N]) / (2 * reach_N + 1)
    kept = slice(half // 4, len(values_N) - half // 4)
    return Series(series.steps[kept], means_N[kept].tolist())


def panels(run: RunFiles) -> list[Panel]:
    """What there is to draw of metrics.csv, terms that were switched off left out; a column we do not know as well."""
    weight = {name: run.setting(f"loss.{name}_weight") for name in ("task", "kd", "router")}
    clip = run.setting("optim.clip")

    def curve(name: str) -> dict[str, Series]:
        return {"": run.series(name)}

    def points(**names: str) -> dict[str, Series]:
        return {
            label.replace("_", "-", 1).replace("_", " "): run.series(f"val/{name}") for label, name in names.items()
        }

    def further(measures: Mapping[str, str]) -> dict[str, Series]:
        names = [column[4:].rpartition("/") for column in run.columns if column.startswith("val_")]
        return {
            f"{name}, {measures[measure]}".rstrip(", "): run.series(f"val_{name}/{measure}")
            for name, _, measure in names
            if measure in measures
        }

    def on(name: str) -> dict[str, Series]:
        series = run.series(name)
        return {"": series} if any(series.values) else {}

    likeness = run.series("cka")
    norms = [name for name in run.columns if name.startswith("grad_norm")]
    whole = "all" if len(norms) > 1 else ""
    known = [
        Panel("loss", curve("loss"), log=True),
        Panel(
            f"cross-entropy (weight {_said(weight['task'])}), nats a token",
            curve("ce"),
            points(held_out_answer="answer_ce", held_out_thought="thought_ce")
            | further({"answer_ce": "answer", "thought_ce": "thought"}),
            log=True,
        ),
        Panel(
            f"KD: KL to the teacher (weight {_said(weight['kd'])})",
            on("kd"),
            points(held_out="kd_kl") | further({"kd_kl": ""}),
            log=True,
        ),
        Panel(
            "1 − CKA to the base",
            {"": Series(likeness.steps, [1 - value for value in likeness.values])},
            {"held-out, mean of layers": _mean_distance(run)},
        ),
        Panel(f"router balance (weight {_said(weight['router'])})", on("balance"), level=(1.0, "equal shares")),
        Panel("learning rate", curve("lr"), noisy=False),
        Panel("weight of 1 − CKA", on("cka_weight"), noisy=False),
        Panel(
            "gradient norm",
            {name[9:].strip("_/") or whole: run.series(name) for name in norms},
            level=(float(clip), "clip") if isinstance(clip, int | float) else None,
            log=True,
        ),
        Panel("tokens a second", curve("tokens_per_second")),
        Panel(
            "expert load / mean, worst layer",
            {"busiest": run.series("expert_max_over_mean"), "idlest": run.series("expert_min_over_mean")},
            points(held_out_busiest="expert_max_over_mean", held_out_idlest="expert_min_over_mean"),
            level=(1.0, "equal shares"),
        ),
        Panel("tokens a step", curve("tokens")),
        Panel("share of micro-batches on-policy", on("on_policy")),
        Panel("steps left out, as not finite", curve("skipped"), events=True),
    ]
    known_columns = {"loss", "ce", "kd", "cka", "balance", "lr", "cka_weight", "tokens_per_second", "tokens", "skipped"}
    known_columns |= {"on_policy", "eta_seconds", "val/answer_ce", "val/thought_ce", "val/kd_kl"}
    known_columns |= {f"{where}expert_{end}_over_mean" for where in ("", "val/") for end in ("max", "min")}
    others: dict[str, Panel] = {}
    for name in run.columns:
        if name in known_columns or name.startswith(("grad_norm", "val/cka_", "val_")):
            continue
        bare = name.removeprefix("val/")
        # x_0, x_1, ... are one panel.
        panel = others.setdefault(re.sub(r"[_/]\d+$", "", bare), Panel(re.sub(r"[_/]\d+$", "", bare)))
        (panel.points if bare != name else panel.curves)[bare.removeprefix(panel.title).strip("_/")] = run.series(name)
    every = [*known, *others.values()]
    for panel in every:
        panel.curves = {label: series for label, series in panel.curves.items() if series.steps}
        panel.points = {label: series for label, series in panel.points.items() if series.steps}
    return [panel for panel in every if panel.curves or panel.points]


def _said(weight: Any) -> str:
    return "unknown" if weight is None else f"{weight:g}" if isinstance(weight, int | float) else str(weight)


def _mean_distance(run: RunFiles) -> Series:
    """1 - CKA at each validation, averaged over the layers, as the loss term is."""
    means = {
        step: [value for name, value in values.items() if name.startswith("val/cka_")]
        for step, values in run.lines.items()
    }
    means = {step: values for step, values in means.items() if values}
    return Series(list(means), [1 - sum(values) / len(values) for values in means.values()])


def draw_curves(run: RunFiles, path: Path) -> bool:
    """All panels on one axis of steps, raw values pale and the moving mean dark, validations as points."""
    drawn = panels(run)
    if not drawn:
        return False
    plt = _pyplot()
    rows = math.ceil(len(drawn) / COLUMNS)
    columns = min(COLUMNS, len(drawn))
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.4 * columns, 2.5 * rows + 0.4), layout="constrained", squeeze=False
    )
    last = max(run.lines)
    first = min(run.lines)
    room = max(1, last - first) * 0.02
    for number, cell in enumerate(axes.flat):
        if number >= len(drawn):
            cell.remove()
            continue
        _draw_panel(cell, drawn[number])
        cell.set_xlim(first - room, last + room)
        cell.xaxis.get_major_locator().set_params(integer=True)
        if number + columns >= len(drawn):
            cell.set_xlabel("optimizer step")
    if any(len(series.steps) >= SMOOTHED_FROM for panel in drawn for series in panel.curves.values()):
        figure.suptitle("pale: as logged; dark: moving mean; points: held-out dialogues", fontsize=10, color="dimgray")
    _save(figure, path)
    return True


def _draw_panel(axes: Any, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)
    everything = [value for series in (*panel.curves.values(), *panel.points.values()) for value in series.values]
    spread = min(everything) > 0 and max(everything) / min(everything) >= LOG_FROM
    if panel.log and spread:
        from matplotlib import ticker

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    colours = [_RAW, "tab:green", "tab:cyan", "tab:olive"]
    for number, (label, series) in enumerate(panel.curves.items()):
        colour = colours[number % len(colours)]
        if panel.events:
            axes.vlines(series.steps, 0, 1, color="tab:red", linewidth=1.2)
            axes.set_yticks([])
            continue
        if not panel.noisy or len(series.steps) < SMOOTHED_FROM:
            mark = "o" if len(series.steps) < SMOOTHED_FROM else None
            axes.plot(series.steps, series.values, color=colour, linewidth=1.4, marker=mark, markersize=3, label=label)
            continue
        axes.plot(series.steps, series.values, color=colour, linewidth=0.7, alpha=0.35)
        dark = _SMOOTH if colour == _RAW else colour
        mean = smoothed(series)
        axes.plot(mean.steps, mean.values, color=dark, linewidth=1.6, label=label)
    for number, (label, series) in enumerate(panel.points.items()):
        colour = _VALIDATION[number % len(_VALIDATION)]
        # Between two points nothing is known of the way.
        line = "o--" if len(series.steps) > 2 else "o"
        axes.plot(series.steps, series.values, line, color=colour, markersize=4.5, linewidth=0.8, label=label)
    if panel.level is not None:
        level, name = panel.level
        axes.axhline(level, color="dimgray", linestyle=":", linewidth=1.2, label=f"{name} {level:g}")
    if any(text and not text.startswith("_") for text in axes.get_legend_handles_labels()[1]):
        axes.legend(fontsize=7, framealpha=0.7)


def draw_cka(
    before: Mapping[str, float], after: Mapping[str, float], run: RunFiles, path: Path, *, after_name: str = "after"
) -> bool:
    """CKA to the base by layer, before and after; beside it its course, where there were three validations or more.

    Args:
        before: layer → value at step 0.
        after: layer → value at the end; may be empty.
        run: for the course.
        path: of the PNG.
        after_name: what the second is called.
    """
    layers = sorted({*before, *after}, key=int)
    if not layers:
        return False
    course = {layer: run.series(f"val/cka_{layer}") for layer in layers}
    course = {layer: series for layer, series in course.items() if len(series.steps) > 2}
    plt = _pyplot()
    figure, cells = plt.subplots(
        1, 1 + bool(course), figsize=(5.2 * (1 + bool(course)), 3.6), layout="constrained", squeeze=False
    )
    left = cells[0, 0]
    for name, values, colour in (("before", before, "darkgray"), (after_name, after, "tab:blue")):
        own = [layer for layer in layers if layer in values]
        if own:
            left.plot([int(x) for x in own], [values[x] for x in own], "o-", color=colour, label=name)
            if values is after and len(own) <= 12:
                for x in own:
                    spot = {"xytext": (0, -13), "textcoords": "offset points", "ha": "center", "fontsize": 8}
                    left.annotate(f"{values[x]:.3f}", (int(x), values[x]), **spot)
    lowest = min([*before.values(), *after.values()])
    floor = 0.0 if lowest < 0.5 else math.floor(lowest * 10 - 0.5) / 10
    left.set(xlabel="layer", ylabel="CKA to the dense base", ylim=(min(floor, lowest), 1.02), title="by layer")
    left.set_xticks([int(layer) for layer in layers])
    left.margins(x=0.1)
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    if course:
        right = cells[0, 1]
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(course)))
        for (layer, series), colour in zip(course.items(), colours, strict=True):
            right.plot(series.steps, series.values, "o-", markersize=3, color=colour, label=f"layer {layer}")
        right.set(xlabel="optimizer step", title="over the training", ylim=left.get_ylim())
        right.grid(alpha=0.3)
        right.legend(fontsize=7, ncols=1 + len(course) // 8)
    _save(figure, path)
    return True


def draw_router(before: Mapping[str, Any], after: Mapping[str, Any], path: Path) -> bool:
    """Expert load by layer before and after, equal shares in white, dead experts crossed; beside it the entropy.

    Args:
        before: a validation as in metrics.json.
        after: the same at the end; may be empty.
        path: of the PNG.
    """
    loads = {
        name: values["expert_load"]
        for name, values in (("before", before), ("after", after))
        if values.get("expert_load")
    }
    if not loads:
        return False
    from matplotlib.colors import TwoSlopeNorm

    plt = _pyplot()
    layers = sorted({layer for load in loads.values() for layer in load}, key=int)
    n_expert = max(len(share_E) for load in loads.values() for share_E in load.values())
    entropies = {name: values.get("router_entropy") or {} for name, values in (("before", before), ("after", after))}
    with_entropy = any(entropies.values())
    widths = [max(3.6, min(6.5, 0.5 * n_expert + 1.4))] * len(loads) + [3.0] * with_entropy
    height = max(3.2, min(9.0, 0.27 * len(layers) + 1.6))
    figure, cells = plt.subplots(
        1, len(widths), figsize=(sum(widths), height), layout="constrained", squeeze=False, width_ratios=widths
    )
    even = 1 / n_expert
    most = max(max(share_E) for load in loads.values() for share_E in load.values())
    top = max(most, 2 * even)
    colours = TwoSlopeNorm(vcenter=even, vmin=0, vmax=top)
    image = None
    for axes, (name, load) in zip(cells[0], loads.items(), strict=False):
        share_LE = np.full((len(layers), n_expert), np.nan)
        for row, layer in enumerate(layers):
            share_LE[row, : len(load.get(layer, []))] = load.get(layer, [])
        image = axes.imshow(share_LE, cmap="RdBu_r", norm=colours, aspect="auto")
        dead = dead_experts(load)
        if share_LE.size <= 400 and n_expert <= 16:
            for (row, e), share in np.ndenumerate(share_LE):
                is_dead = e in dead.get(layers[row], [])
                strong = is_dead or share > even + 0.6 * (top - even) or share < 0.4 * even
                text = f"× {100 * share:.1f}" if is_dead else f"{100 * share:.0f}"
                axes.text(e, row, text, ha="center", va="center", fontsize=8, color="white" if strong else "black")
        else:
            spots = [(e, layers.index(layer)) for layer, experts in dead.items() for e in experts]
            axes.scatter([x for x, _ in spots], [y for _, y in spots], marker="x", color="white", s=14, linewidths=1)
        count = sum(map(len, dead.values()))
        axes.set_title(f"{name}: {count or 'no'} dead expert{'s' * (count != 1)}", fontsize=10)
        axes.set(xlabel="expert", ylabel="layer")
        axes.set_xticks(range(0, n_expert, max(1, n_expert // 16)))
        axes.set_yticks(range(0, len(layers), max(1, len(layers) // 28)), layers[:: max(1, len(layers) // 28)])
    bar = figure.colorbar(image, ax=list(cells[0][: len(loads)]), pad=0.01)
    ticks = (0.0, even, top)
    bar.set_ticks(ticks, labels=[f"{100 * tick:.3g} %" + (" = 1/E" if tick == even else "") for tick in ticks])
    bar.ax.tick_params(labelsize=8)
    if with_entropy:
        axes = cells[0, -1]
        for (name, values), colour in zip(entropies.items(), ("darkgray", "tab:blue"), strict=True):
            rows = [row for row, layer in enumerate(layers) if layer in values]
            if rows:
                axes.plot([values[layers[row]] for row in rows], rows, "o-", markersize=4, color=colour, label=name)
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.set_yticks(range(0, len(layers), max(1, len(layers) // 28)), layers[:: max(1, len(layers) // 28)])
        axes.set_xlim(0, 1.03)
        axes.set_title("router entropy / log E", fontsize=10)
        axes.set_xlabel("1: no preference, 0: certain")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    _save(figure, path)
    return True


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
