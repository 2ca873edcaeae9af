"""What a reviewer asks of a run: tables, plots and a model card, made from the run directory's files alone.

`write_report` may be called at any time and again: on a run that is under way or was killed it says what is not there
yet. A value that no file holds is said to be unknown, never guessed. Texts go through unchanged, as UTF-8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from litgpt.report_card import MARK, model_card
from litgpt.report_plots import draw_cka, draw_curves, draw_router
from litgpt.report_text import (
    UNKNOWN,
    cka_table,
    code,
    exam_table,
    fenced,
    further_tables,
    held_out_table,
    number,
    router_table,
    routing_table,
    sources_table,
    table,
    training_table,
)
from litgpt.rundir import FINAL
from litgpt.runfiles import DEAD_SHARE, SAMPLES_FILE, RunFiles, read_run
from litgpt.utils import atomic_file

SAMPLES_SHOWN = 10
ROUTING_LEGEND = (
    "MaxVio is the busiest expert's load over the mean, less 1; entropies are divided by log E; z is the mean squared "
    "logsumexp of the router's logits; changed is the share of tokens that go to another set of experts than at "
    "step 0. routing.jsonl has these for every validation, and more; scripts/inspect_routing.py shows who goes where."
)


def write_report(
    out_dir: Path,
    *,
    exam: Path | None = None,
    license: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
) -> list[Path]:
    """Write `report/` of a run, and `final/README.md` where the run is finished; returns the files written.

    Args:
        out_dir: the run directory.
        exam: exam.json of the trained model, where it does not lie in the run directory.
        license: licence of the model as the Hugging Face hub names it; without it the card says unknown.
        base_model: the dense model's name on the hub; without it the one that its directory's name gives, if any.
        datasets: names on the hub of the training data, for the card.

    Raises:
        UserError: `out_dir` is no run, or a file of it is damaged.
    """
    run = read_run(out_dir, exam=exam)
    report = out_dir / "report"
    before, after = (values or {} for values in run.validations())
    drawings = {
        "curves.png": lambda path: draw_curves(run, path),
        "cka_layers.png": lambda path: draw_cka(
            _finite(before.get("cka")), _finite(after.get("cka")), run, path, after_name=_after_name(run)
        ),
        "router.png": lambda path: draw_router(before, after, path),
    }
    drawn = [report / name for name, draw in drawings.items() if draw(report / name)]
    written = [*drawn, report / "README.md"]
    _write(report / "README.md", report_page(run, {path.name for path in drawn}))
    if run.finished:
        card = out_dir / FINAL / "README.md"
        if card.is_file() and MARK not in card.read_text(encoding="utf-8", errors="replace"):
            print(f"{card} was written or changed by hand and is left as it is; delete it for a new one")
        else:
            _write(card, model_card(run, license=license, base_model=base_model, datasets=datasets))
            written.append(card)
    return written


def report_page(run: RunFiles, drawn: set[str]) -> str:
    """`report/README.md`.

    Args:
        run: finished or not.
        drawn: names of the pictures that lie beside it.
    """
    before, after = (values or {} for values in run.validations())
    after_name = _after_name(run)
    parts = [f"# Run {code(run.name)}", _status(run)]
    parts += [f"- {remark}" for remark in run.remarks]
    parts += ["## Held-out dialogues"]
    if before or after:
        parts += [held_out_table(before, after, after_name=after_name), _about_validation(run)]
        parts += further_tables(before, after, after_name=after_name)
    else:
        parts += ["No validation has been logged yet."]
    parts += ["## The training", training_table(run)]
    sources = ((run.metrics or {}).get("training") or {}).get("sources")
    parts += [sources_table(sources)] if sources else []
    parts += _picture("curves.png", "loss terms, schedules, gradient norm, speed and expert load by step", drawn)
    parts += ["## Likeness to the dense base"]
    if before.get("cka") or after.get("cka"):
        parts += [cka_table(_finite(before.get("cka")), _finite(after.get("cka")), after_name=after_name)]
        parts += ["Unbiased linear CKA on the held-out dialogues; an upcycled student begins at 1."]
    else:
        parts += ["Not measured."]
    parts += _picture("cka_layers.png", "CKA to the base by layer", drawn)
    parts += _eval_cka(run)
    parts += ["## Experts"]
    if before.get("expert_load") or after.get("expert_load"):
        least = f"{DEAD_SHARE:.0%}"
        further = routing_table(before, after)
        parts += [router_table(before, after), *([further, ROUTING_LEGEND] if further else [])]
        parts += [f"An expert with less than {least} of an equal share counts as dead."]
    else:
        parts += ["Expert load by layer is written at the end of training; metrics.csv has the busiest expert only."]
    parts += _picture("router.png", "expert load and router entropy by layer, before and after", drawn)
    parts += ["## Frozen weights", _frozen(run), "## Exam"]
    parts += [exam_table(run.exams) if run.exams else "No exam of this run's model was found (`scripts/examine.py`)."]
    parts += _samples(run)
    settings = yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True).rstrip("\n")
    parts += ["## All settings", fenced(settings, "yaml")]
    return "\n\n".join(parts) + "\n"


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        # Half a surrogate pair, which JSON can hold, has no UTF-8: it is written as \udXXX.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def _finite(values: Any) -> dict[str, float]:
    """Layer → value, without what was not measured."""
    found = values.items() if isinstance(values, Mapping) else ()
    return {str(k): float(v) for k, v in found if isinstance(v, int | float) and math.isfinite(v)}


def _status(run: RunFiles) -> str:
    training = (run.metrics or {}).get("training") or {}
    if run.finished:
        seconds = training.get("seconds")
        took = f" in {seconds / 60:,.0f} minutes" if isinstance(seconds, int | float) else ""
        return f"**Finished**: {number(training.get('steps'))} steps{took}. Model card: `../final/README.md`."
    steps = run.setting("optim.steps")
    last = max(run.lines, default=None)
    where = f"the last step in metrics.csv is {last}" if last is not None else "metrics.csv has no step yet"
    return (
        f"**Not finished**: {where}, of {UNKNOWN if steps is None else steps}; "
        f"newest checkpoint: {run.checkpoint or 'none'}. There is no `final/` yet, and so no model card."
    )


def _after_name(run: RunFiles) -> str:
    """What the last validation is called: the end of the training, or how far it is."""
    last = run.validations()[1]
    return f"step {last['step']}" if last and run.metrics is None else "after"


def _about_validation(run: RunFiles) -> str:
    text = (
        "Before: the upcycled student at step 0. Lower is better; the thought before an answer is the dialogue's own."
    )
    return text if run.metrics else f"{text} Read from metrics.csv, which has no token counts."


def _picture(name: str, says: str, drawn: set[str]) -> list[str]:
    return [f"![{says}]({name})"] if name in drawn else []


def _eval_cka(run: RunFiles) -> list[str]:
    """What eval_cka.py found for these very weights: every layer, and the map."""
    if run.cka is None:
        return []
    hashes = (run.cka.get("settings") or {}).get("sha256") or {}
    if run.final_sha256 not in hashes.values():
        return ["`cka.json` here is about other weights than those of `final/`, and is not shown."]
    rows = [[str(layer.get("a")), str(layer.get("b")), number(layer.get("cka"))] for layer in run.cka.get("layers", [])]
    about = f"`eval_cka.py` on the stored weights, {number(run.cka.get('rows'))} tokens:"
    parts = [about, table(["layer of the base", "layer of this model", "CKA"], rows, numbers_from=0)]
    there = {path.name for path in (run.directory / "report").glob("cka.png")}
    return parts + _picture("cka.png", "CKA of every layer with every layer", there)


def _frozen(run: RunFiles) -> str:
    frozen = (run.metrics or {}).get("frozen")
    if not isinstance(frozen, Mapping):
        return "They are compared at the end of training."
    changed = frozen.get("changed") or []
    text = (
        f"{frozen.get('identical')} of {frozen.get('compared')} tensors that must not change are the same to the bit."
    )
    return text + (f" **Changed**: {', '.join(map(code, changed))}." if changed else "")


def _samples(run: RunFiles) -> list[str]:
    """Every text of the newest step's samples, unchanged."""
    if not run.samples:
        return []
    newest = run.samples[-1].get("step")
    own = [sample for sample in run.samples if sample.get("step") == newest]
    parts = ["## Samples", f"{len(own)} of step {newest}" if newest is not None else f"{len(own)} samples"]
    for sample in own[:SAMPLES_SHOWN]:
        rest = {key: value for key, value in sample.items() if not isinstance(value, str)}
        parts.append(
            "---"
            if not rest
            else fenced(yaml.safe_dump(rest, allow_unicode=True, sort_keys=False).rstrip("\n"), "yaml")
        )
        for key, value in sample.items():
            if isinstance(value, str):
                parts += [f"**{key}**", fenced(value, "text")]
    if len(own) > SAMPLES_SHOWN:
        parts.append(f"The other {len(own) - SAMPLES_SHOWN} are in `../{SAMPLES_FILE}`.")
    return parts
