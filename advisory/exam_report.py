"""The exam's table and plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from advisory.exam import HIGHER_IS_BETTER, LABELS, Score, differences

SPLIT_NAMES = ("test", "test_counterfactual", "test_safety", "test_hinglish")


def to_json(scores: Mapping[str, Mapping[str, Score]]) -> dict[str, dict[str, dict[str, float]]]:
    """Split → check → value, interval and count."""
    return {split: {name: asdict(score) for name, score in own.items()} for split, own in scores.items()}


def table(exams: Sequence[Mapping[str, Any]]) -> str:
    """All advisers side by side in Markdown, causes also by split; then the last one against each other, in a line."""
    names = [exam["name"] for exam in exams]
    lines = ["| check | good is | " + " | ".join(names) + " |", "| --- | --- |" + " --- |" * len(names)]
    for name, higher in HIGHER_IS_BETTER.items():
        cells = [_cell(exam["scores"]["all"].get(name)) for exam in exams]
        if any(cell != "–" for cell in cells):
            lines.append(f"| {LABELS[name]} | {'high' if higher else 'low'} | " + " | ".join(cells) + " |")
    for split in SPLIT_NAMES:
        cells = [_cell(exam["scores"].get(split, {}).get("cause_top1")) for exam in exams]
        if any(cell != "–" for cell in cells):
            lines.append(f"| {LABELS['cause_top1']}, {split} | high | " + " | ".join(cells) + " |")
    counts = {exam["scores"]["all"]["length_fits"]["count"] for exam in exams}
    lines += ["", f"Per cent with a 95 % bootstrap interval; {' or '.join(map(str, sorted(counts)))} replies each."]
    lines += [line for other in exams[:-1] for line in ("", compared(exams[-1], other))]
    return "\n".join(lines) + "\n"


def compared(exam: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """One line: on which checks the one is better or worse than the other, where the paired interval leaves out 0."""
    gains = differences(exam["values"], other["values"])
    better = [f"{LABELS[name]} (+{100 * gain.value:.1f})" for name, gain in gains.items() if gain.low > 0]
    worse = [f"{LABELS[name]} (-{-100 * gain.value:.1f})" for name, gain in gains.items() if gain.high < 0]
    return (
        f"{exam['name']} against {other['name']}, question by question: better on {', '.join(better) or 'nothing'}; "
        f"worse on {', '.join(worse) or 'nothing'}; no sure difference on the other "
        f"{len(gains) - len(better) - len(worse)} checks."
    )


def _cell(score: Mapping[str, float] | None) -> str:
    if score is None:
        return "–"
    return f"{100 * score['value']:.1f} ({100 * score['low']:.0f}–{100 * score['high']:.0f})"


def draw(exams: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A bar a check and adviser with its interval, on one scale from 0 to 100 %."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    checks = [name for name in HIGHER_IS_BETTER if any(name in exam["scores"]["all"] for exam in exams)]
    height = 0.8 / len(exams)
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + len(checks) * (0.22 + 0.14 * len(exams))))
    for number, exam in enumerate(exams):
        own = exam["scores"]["all"]
        rows = [(position, own[name]) for position, name in enumerate(checks) if name in own]
        places = [position + (number - (len(exams) - 1) / 2) * height for position, _ in rows]
        values = [100 * score["value"] for _, score in rows]
        errors = [
            [100 * max(0.0, score["value"] - score["low"]) for _, score in rows],
            [100 * max(0.0, score["high"] - score["value"]) for _, score in rows],
        ]
        axes.barh(places, values, height, xerr=errors, label=exam["name"], error_kw={"elinewidth": 0.8})
    axes.set_yticks(
        range(len(checks)), [f"{LABELS[name]} ({'↑' if HIGHER_IS_BETTER[name] else '↓'})" for name in checks]
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of replies (↑ more is better, ↓ less is better), 95 % interval")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.06 - 0.3 / len(checks)), ncols=len(exams), frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight", format="png")
    pyplot.close(figure)
