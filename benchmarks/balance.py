"""What keeps the router of the tiny world balanced: switch loss, choice bias, z-loss, or nothing; three seeds each.

    python benchmarks/balance.py --work_dir out/balance

Two starts: the ordinary upcycled router, and one that has collapsed (two of eight experts get every token). Everything
else is as in configs/tiny/distill.yaml, only shorter. Runs that are finished are read again, so it goes on where it was
stopped.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from benchmarks.recipes import BEGIN, END, command, prepare, write
from litgpt.checkpoint import load_state, read_provenance, save_lit_dir
from litgpt.config import Config
from litgpt.data import read_records, render_record
from litgpt.routers import hidden_states
from litgpt.stored import Stored
from litgpt.tokenizer import Tokenizer
from litgpt.upcycle import upcycle
from litgpt.utils import atomic_file, progress, run_cli

N_EXPERT, N_EXPERT_PER_TOKEN = 8, 2
VAL_DIALOGUES = 40
LEAD = 4.0
"""How far the logits of the two experts that take everything lie above the others' at the collapsed start."""

MEANS: dict[str, dict[str, float]] = {
    "nothing": {"router_weight": 0.0},
    "switch 0.01": {"router_weight": 0.01},
    "switch 0.1": {"router_weight": 0.1},
    "bias 0.01": {"router_weight": 0.0, "bias_rate": 0.01},
    "z 0.001": {"router_weight": 0.0, "z_weight": 0.001},
}
STARTS = ("upcycled", "collapsed")


def benchmark(
    work_dir: Path = Path("out/balance"),
    seeds: list[int] | None = None,
    steps: int = 60,
    page: Path | None = None,
) -> None:
    """Train with each means from each start and print what the load and the answers did.

    Args:
        work_dir: checkpoints and runs; what is finished there is not done again.
        seeds: of routers and of the order of the data; 1, 2 and 3 if not given.
        steps: optimizer steps of each run; the bias is let go from 80 % of them on.
        page: a markdown file whose part between the marks becomes the result; JSON and picture go beside it.
    """
    seeds = seeds or [1, 2, 3]
    folder = work_dir.resolve()
    prepare(folder, val_dialogues=VAL_DIALOGUES)
    arms = [(start, means) for start in STARTS for means in MEANS if not (start == "collapsed" and means == "z 0.001")]
    runs = [(start, means, seed) for seed in seeds for start, means in arms]
    results: dict[str, list[dict[str, Any]]] = {f"{start}, {means}": [] for start, means in arms}
    for start, means, seed in progress(runs, "runs", total=len(runs), unit="run"):
        results[f"{start}, {means}"].append(one(folder, start, means, seed, steps))
    text = table(results, len(seeds), steps)
    print(text)
    if page is not None:
        settings = {"steps": steps, "seeds": seeds, "means": MEANS, "lead": LEAD, "val_dialogues": VAL_DIALOGUES}
        values = json.dumps({"settings": settings, "runs": results}, ensure_ascii=False, indent=1)
        write(page.with_suffix(".json"), values)
        plot(results, page.with_suffix(".png"))
        old = page.read_text(encoding="utf-8") if page.is_file() else f"{BEGIN}\n{END}\n"
        before, _, rest = old.partition(BEGIN)
        _, _, after = rest.partition(END)
        write(page, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def one(folder: Path, start: str, means: str, seed: int, steps: int) -> dict[str, Any]:
    """One run, unless its result is there: routing at each validation, and the losses before and after."""
    run = folder / f"{start}-{means.replace(' ', '-')}-{seed}-{steps}"
    result = run / "result.json"
    if not result.is_file():
        student = students(folder, seed)[start]
        words: list[str | Path] = ["--config", "configs/tiny/distill.yaml", "--overwrite", "true", "--seed", str(seed)]
        words += ["--student", student, "--teacher", folder / "teacher", "--base", folder / "base", "--out_dir", run]
        words += ["--data.val", folder / "val.jsonl", "--optim.steps", str(steps), "--run.samples", "0"]
        words += ["--run.val_every", str(max(1, steps // 4)), "--loss.cka_weight", "0.05", "--loss.cka_weight_end", "0"]
        for name, value in MEANS[means].items():
            words += [f"--loss.{name}", str(value)]
        command("train_distill.py", *words)
        lines = (run / "routing.jsonl").read_text(encoding="utf-8").splitlines()
        report = json.loads((run / "report" / "metrics.json").read_text(encoding="utf-8"))
        values = {
            "seed": seed,
            "routing": [json.loads(line) for line in lines],
            "answer_ce": {side: report[side]["answer_ce"] for side in ("before", "after")},
        }
        write(result, json.dumps(values, indent=1))
    return dict(json.loads(result.read_text(encoding="utf-8")))


def students(folder: Path, seed: int) -> dict[str, Path]:
    """The two starts of a seed, made where they lack."""
    paths = {start: folder / "students" / f"{start}-{seed}" for start in STARTS}
    if not (paths["upcycled"] / "model_config.yaml").is_file():
        upcycle(folder / "base", paths["upcycled"], n_expert=N_EXPERT, n_expert_per_token=N_EXPERT_PER_TOKEN, seed=seed)
    if not (paths["collapsed"] / "model_config.yaml").is_file():
        collapse(folder, paths["upcycled"], paths["collapsed"])
    return paths


def collapse(folder: Path, source: Path, target: Path) -> None:
    """Give two experts of each layer a lead at every token: weights along the mean of what the router reads."""
    config, state = Config.from_checkpoint(source), load_state(source)
    tokenizer = Tokenizer(folder / "base")
    records = read_records(folder / "val.jsonl")
    documents = [render_record(record, tokenizer, tags="think").ids for record in records]
    for layer, h_ND in hidden_states(Stored(folder / "base"), documents, config.moe_layers):
        mean_D = h_ND.mean(dim=0)
        router = state[f"transformer.h.{layer}.mlp.gate.weight"]
        lead_D = LEAD * mean_D / mean_D.square().sum()
        state[f"transformer.h.{layer}.mlp.gate.weight"] = torch.cat((router[:2] + lead_D.to(router.dtype), router[2:]))
    save_lit_dir(target, state, config, source_dir=source, provenance=read_provenance(source))


def final(result: Mapping[str, Any]) -> dict[str, float]:
    """Means over layers at the end of a run, with its answer CE; cold experts are added up."""
    layers = result["routing"][-1]["layers"]
    names = ("max_vio", "entropy_of_mean", "z")
    means = {name: statistics.mean(layer[name] for layer in layers) for name in names}
    return means | {"cold": sum(layer["cold"] for layer in layers), "answer_ce": result["answer_ce"]["after"]}


def table(results: Mapping[str, Sequence[Mapping[str, Any]]], seeds: int, steps: int) -> str:
    """Markdown: where load and answers are at the end, mean and spread (least to most) over the seeds."""
    lines = [
        f"{seeds} seeds, {steps} steps; at the end, mean over the seeds (least to most).",
        "",
        "| start, means | MaxVio | cold experts of all layers | entropy of mean | z | answer CE | MaxVio at first |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        ends = [final(result) for result in found]
        first = statistics.mean(layer["max_vio"] for result in found for layer in result["routing"][0]["layers"])
        cells = []
        for key, digits in (("max_vio", 2), ("cold", 1), ("entropy_of_mean", 3), ("z", 2), ("answer_ce", 4)):
            values = [end[key] for end in ends]
            spread = f"({min(values):.{digits}f} to {max(values):.{digits}f})"
            cells.append(f"{statistics.mean(values):.{digits}f} {spread}")
        lines.append(f"| {name} | {' | '.join(cells)} | {first:.2f} |")
    return "\n".join(lines)


def plot(results: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """MaxVio over steps, mean over layers and seeds with the range of the seeds, one panel a start."""
    figure, axes = plt.subplots(1, len(STARTS), figsize=(11, 4.2), layout="constrained", sharey=True)
    for cell, start in zip(axes, STARTS, strict=True):
        for index, means in enumerate(MEANS):
            found = results.get(f"{start}, {means}")
            if not found:
                continue
            steps = [line["step"] for line in found[0]["routing"]]
            runs = [
                [statistics.mean(layer["max_vio"] for layer in line["layers"]) for line in result["routing"]]
                for result in found
            ]
            columns = list(zip(*runs, strict=True))
            cell.plot(steps, [statistics.mean(column) for column in columns], "o-", color=f"C{index}", label=means)
            cell.fill_between(steps, list(map(min, columns)), list(map(max, columns)), color=f"C{index}", alpha=0.15)
        cell.set_title(f"{start} start")
        cell.set_xlabel("optimizer step")
        cell.grid(alpha=0.3)
    axes[0].set_ylabel("MaxVio (0 is balance)")
    axes[0].legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


if __name__ == "__main__":
    run_cli(benchmark)
