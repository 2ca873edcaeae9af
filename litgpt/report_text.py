"""The tables of a run in Markdown, for the report and for the model card; every number is one of the run's files."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from litgpt.runfiles import Exam, RunFiles, asked_of, dead_experts

MISSING = "–"
UNKNOWN = "unknown"
HELD_OUT: Mapping[str, tuple[str, str]] = {
    "answer_ce": ("cross-entropy of the answer, nats a token", "answer_tokens"),
    "thought_ce": ("cross-entropy of the thought, nats a token", "thought_tokens"),
    "kd_kl": ("KL(teacher, student) on the answer, nats a token", "kd_tokens"),
}
"""Key of a validation → what it is called, and the key of the number of tokens behind it."""
TRAINING: Mapping[str, str] = {
    "steps": "optimizer steps",
    "seconds": "seconds, with validations and checkpoints",
    "train_dialogues": "training documents",
    "train_dialogues_too_long": "training documents left out as too long",
    "val_dialogues": "held-out dialogues",
    "val_dialogues_too_long": "held-out dialogues left out as too long",
    "padding_share": "share of padding in the micro-batches",
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int = 1) -> str:
    """A Markdown table; the columns from `numbers_from` on are set to the right."""
    marks = ["---" if column < numbers_from else "---:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *rows))


def number(value: Any, digits: int = 4, *, sign: bool = False) -> str:
    """A number as text; a dash for one that is missing or not finite. Counts keep all their digits."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return MISSING
    if isinstance(value, int) and not sign:
        return f"{value:,}"
    return f"{value:{'+' if sign else ''}.{digits}f}"


def change(before: Any, after: Any, digits: int = 4) -> str:
    """After minus before with its sign; a dash where one of them is missing."""
    both = all(isinstance(value, int | float) for value in (before, after))
    return number(float(after - before), digits, sign=True) if both else MISSING


def code(text: object) -> str:
    """Text as it is, in a monospaced font, also within a table."""
    plain = re.sub(r"\s+", " ", str(text)).replace("|", "\\|")
    ticks = "`" * (1 + max(map(len, re.findall(r"`+", plain)), default=0))
    pad = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{ticks}{pad}{plain}{pad}{ticks}"


def fenced(text: str, language: str = "") -> str:
    """Text as it is, to the last character, whatever it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def held_out_table(before: Mapping[str, Any], after: Mapping[str, Any], *, after_name: str = "after") -> str:
    """Losses before and after with their difference; a figure that we do not know keeps its own name."""
    counts = {counted for _, counted in HELD_OUT.values()}
    names = [*HELD_OUT, *(key for key in {**before, **after} if key not in {*HELD_OUT, *counts, "step"})]
    rows = []
    for name in names:
        values = before.get(name), after.get(name)
        if not any(isinstance(value, int | float) for value in values):
            continue
        label, counted = HELD_OUT.get(name, (code(name), ""))
        tokens = after.get(counted, before.get(counted))
        rows.append([label, number(values[0]), number(values[1]), change(*values), number(tokens)])
    return table(["held-out dialogues", "before", after_name, "difference", "tokens"], rows)


def further_tables(before: Mapping[str, Any], after: Mapping[str, Any], *, after_name: str = "after") -> list[str]:
    """The same for each further validation file, under its name; empty where there is none."""
    sides = [values.get("more_val") or {} for values in (before, after)]
    parts = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        own = [side.get(name) or {} for side in sides]
        parts += [f"{code(name)}:", held_out_table(*own, after_name=after_name)]
    return parts


def sources_table(sources: Mapping[str, Mapping[str, Any]]) -> str:
    """What each source of a mixture has given."""
    rows = [
        [
            code(name),
            number(own.get("documents")),
            number(len(own.get("dropped") or [])),
            number(own.get("tokens")),
            number(own.get("share"), 3),
            number(own.get("epochs"), 2),
            number(own.get("padding_share"), 3),
        ]
        for name, own in sources.items()
    ]
    head = ["source", "documents", "left out as too long", "tokens", "share of the tokens", "passes", "padding share"]
    return table(head, rows)


def cka_table(before: Mapping[str, float], after: Mapping[str, float], *, after_name: str = "after") -> str:
    """CKA to the base by layer."""
    layers = sorted({*before, *after}, key=int)
    rows = [
        [layer, number(before.get(layer)), number(after.get(layer)), change(before.get(layer), after.get(layer))]
        for layer in layers
    ]
    return table(["layer", "before", after_name, "difference"], rows, numbers_from=0)


def router_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Expert load, balance and entropy by layer; dead experts by their number."""
    loads = {name: values.get("expert_load") or {} for name, values in (("before", before), ("after", after))}
    layers = sorted({layer for load in loads.values() for layer in load}, key=int)
    head = ["layer"]
    for name in loads:
        head += [f"busiest / mean, {name}", f"entropy / log E, {name}", f"dead, {name}"]
    rows = []
    for layer in layers:
        cells = [layer]
        for values, load in zip((before, after), loads.values(), strict=True):
            own = {key: (values.get(key) or {}).get(layer) for key in ("expert_max_over_mean", "router_entropy")}
            dead = dead_experts({layer: load[layer]}).get(layer, []) if layer in load else None
            cells += [number(own["expert_max_over_mean"], 2), number(own["router_entropy"], 3)]
            cells.append(MISSING if dead is None else ", ".join(map(str, dead)) or "none")
        rows.append(cells)
    return table(head, rows, numbers_from=0)


def routing_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """What the routers do by layer, before and after; `None` where it was not measured."""
    layers = sorted(before.get("router") or after.get("router") or {}, key=int)
    if not layers:
        return None
    names = {"max_vio": "MaxVio", "entropy_of_mean": "entropy of the mean", "z": "z", "changed": "changed"}
    rows = []
    for layer in layers:
        cells = [layer]
        for name in names:
            cells += [number(((side.get("router") or {}).get(layer) or {}).get(name), 3) for side in (before, after)]
        rows.append(cells)
    head = ["layer", *(f"{name}, {side}" for name in names.values() for side in ("before", "after"))]
    return table(head, rows, numbers_from=0)


def exam_table(exams: Sequence[Exam]) -> str:
    """The checks over all splits, per cent with the 95 % interval, one column a model."""
    checks = list(dict.fromkeys(check for exam in exams for check in exam.values["scores"]["all"]))
    rows = []
    for check in checks:
        scores = [exam.values["scores"]["all"].get(check) for exam in exams]
        counts = {score["count"] for score in scores if score}
        rows.append([check.replace("_", " "), " or ".join(map(str, sorted(counts))), *map(_score, scores)])
    data, count = asked_of(exams[0])
    lines = [
        table(["check, %", "replies", *(exam.who for exam in exams)], rows),
        "",
        f"{count} replies each to the questions of {code(data)}; in brackets a 95 % interval. Of *contradiction*, "
        "*banned recommended*, *unsourced dose*, *asks needlessly*, *refuses needlessly* and *thought leaks* less is "
        "better, of all others more. Who answered:",
        "",
    ]
    for exam in exams:
        own = exam.values.get("settings") or {}
        said = ", ".join(f"{key} {own[key]}" for key in ("thinking", "temperature", "max_new_tokens") if key in own)
        lines.append(f"- {exam.who}: {code(own.get('adviser', UNKNOWN))}{f' ({said})' if said else ''}")
    return "\n".join(lines)


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return MISSING
    value, low, high = (number(100 * float(score[key]), 1) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def training_table(run: RunFiles) -> str:
    """Size, time and speed of a run."""
    training = (run.metrics or {}).get("training") or {}
    rows = []
    for key in [*TRAINING, *(key for key in training if key not in TRAINING)]:
        value = training.get(key)
        if isinstance(value, list | tuple):
            value = len(value)
        if isinstance(value, int | float):
            rows.append([TRAINING.get(key, code(key)), number(value, 3 if key == "padding_share" else 1)])
    for column, label in (("tokens", "tokens a step"), ("tokens_per_second", "tokens a second")):
        values = sorted(run.series(column).values)
        if values:
            rows += [
                [f"{label}, median of {len(values)} logged", f"{statistics.median(values):,.0f}"],
                [f"{label}, least and most", f"{values[0]:,.0f} … {values[-1]:,.0f}"],
            ]
    if "padding_share" not in training:
        rows.append([TRAINING["padding_share"], UNKNOWN])
    return table(["training", ""], rows)
