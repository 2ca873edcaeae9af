"""What an anchor is worth: students of the tiny world held to the base or the teacher in different ways, or replayed.

    python benchmarks/cka_study.py --work_dir out/cka_study

Every student is the same upcycled base (4 equal experts, 2 a token) and sees the same tokens from the same teacher for
the same steps; what differs is the anchor: none, CKA to the base or to the teacher, the squared distance to the base,
and general text that the base itself teaches (replay), alone and with the best of them. Measured on held-out text:
cross-entropy of the advice, of general text of the kind that the base was made of (what is forgotten), and the CKA to
the base that is left. Runs that are finished are read again, so the study goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.recipes import BEGIN, END, command, figures, paired, prepare, write
from litgpt.upcycle import upcycle
from litgpt.utils import UserError, atomic_file, progress, run_cli

N_EXPERT, N_EXPERT_PER_TOKEN = 4, 2


@dataclass(frozen=True)
class Arm:
    """One way to hold on to the base."""

    weight: float = 0.0
    falls: bool = False
    """To 0 over the first half of training; else it stays."""
    anchor: str = "cka"
    to: str = "base"
    replay: bool = False


ARMS: dict[str, Arm] = {
    "no anchor": Arm(),
    "CKA to base, 0.01, falling": Arm(0.01, falls=True),
    "CKA to base, 0.1, falling": Arm(0.1, falls=True),
    "CKA to base, 1, falling": Arm(1.0, falls=True),
    "CKA to base, 0.1": Arm(0.1),
    "CKA to base, 1": Arm(1.0),
    "CKA to teacher, 0.1": Arm(0.1, to="teacher"),
    "MSE to base, 0.1": Arm(0.1, anchor="mse"),
    "MSE to base, 1": Arm(1.0, anchor="mse"),
    "replay": Arm(replay=True),
    "replay and CKA to base, 1": Arm(1.0, replay=True),
}


def benchmark(
    work_dir: Path = Path("out/cka_study"),
    seeds: list[int] | None = None,
    arms: list[str] | None = None,
    steps: int = 240,
    page: Path | None = None,
) -> None:
    """Train every kind of student with every seed, and print what came of it.

    Args:
        work_dir: checkpoints and runs; what is finished there is not done again.
        seeds: of routers and the order of the data; 1, 2 and 3 if not given.
        arms: some of the anchors only; all, if not given.
        steps: optimizer steps of each run.
        page: a markdown file whose part between the marks becomes the result; the picture goes beside it.
    """
    seeds = seeds or [1, 2, 3]
    if unknown := [arm for arm in arms or [] if arm not in ARMS]:
        raise UserError(f"arms: {unknown[0]!r} is not known; choose of {'; '.join(ARMS)}")
    names = arms or list(ARMS)
    folder = work_dir.resolve()
    prepare(folder)
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in names}
    runs = [(arm, seed) for seed in seeds for arm in names]
    for arm, seed in progress(runs, "students", total=len(runs), unit="run"):
        results[arm].append(one(folder, arm, seed, steps))
    text = "\n\n".join(tables(results))
    print(text)
    write(folder / "cka_study.json", json.dumps({"steps": steps, "seeds": seeds, "arms": results}, indent=2))
    if page is not None:
        plot(results, page.with_suffix(".png"))
        old = page.read_text(encoding="utf-8") if page.is_file() else f"{BEGIN}\n{END}\n"
        before, _, rest = old.partition(BEGIN)
        _, _, after = rest.partition(END)
        write(page, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def one(folder: Path, name: str, seed: int, steps: int) -> dict[str, Any]:
    """Make and train one student, unless its result is there; what the report says before and after."""
    arm = ARMS[name]
    label = "".join(c if c.isalnum() or c == "." else "-" for c in name.replace(",", ""))
    run, student = folder / f"{label}-{seed}-{steps}", folder / "students" / str(seed)
    result = run / "result.json"
    if not result.is_file():
        if not (student / "model_config.yaml").is_file():
            base = folder / "base"
            upcycle(base, student, n_expert=N_EXPERT, n_expert_per_token=N_EXPERT_PER_TOKEN, seed=seed)
        words: list[str | Path] = ["--config", "configs/tiny/distill.yaml", "--overwrite", "true", "--seed", str(seed)]
        words += ["--student", student, "--teacher", folder / "teacher", "--base", folder / "base", "--out_dir", run]
        words += ["--data.val", folder / "val.jsonl", "--data.more_val", "{general: data/general/val.jsonl}"]
        words += ["--optim.steps", str(steps), "--run.val_every", str(steps), "--run.samples", "0"]
        words += ["--loss.cka_weight", str(arm.weight), "--loss.cka_weight_end", "0" if arm.falls else str(arm.weight)]
        words += ["--loss.anchor", arm.anchor, "--loss.anchor_to", arm.to]
        if arm.replay:
            sources = {
                "advice": {"path": "data/dialogues/train.jsonl", "weight": 3},
                "general": {"path": "data/general/train.jsonl", "weight": 1, "teacher": str(folder / "base")},
            }
            words += ["--data.train", "null", "--data.sources", json.dumps(sources)]
        command("train_distill.py", *words)
        report = json.loads((run / "report" / "metrics.json").read_text(encoding="utf-8"))
        kept = {key: report[key] for key in ("before", "after")} | {"seconds": report["training"]["seconds"]}
        write(result, json.dumps({"seed": seed} | kept, ensure_ascii=False, indent=2))
    return dict(json.loads(result.read_text(encoding="utf-8")))


def tables(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Markdown: what was learnt, what was forgotten, and how much of the base's geometry is left."""
    against, found = next(iter(results.items()))
    before = found[0]["before"]
    intro = (
        f"Before training: answer CE {before['answer_ce']:.4f}, general CE "
        f"{before['more_val']['general']['answer_ce']:.4f} nats a token. {len(found)} seeds; means, and the 95 % "
        f"interval of the paired difference from '{against}'. CKA to the base is the mean over layers on held-out "
        "advice."
    )
    lines = [
        "| anchor | answer CE | difference | general CE | difference | forgotten | CKA to base | s a run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    start = before["more_val"]["general"]["answer_ce"]
    for arm, found in results.items():
        answer, _, general = (statistics.mean(values) for values in zip(*map(figures, found), strict=True))
        same = arm == against
        cka = statistics.mean(value for result in found for value in result["after"]["cka"].values())
        seconds = statistics.mean(result["seconds"] for result in found)
        learnt, forgot = ("–" if same else paired(results, arm, against, column) for column in (0, 2))
        lines.append(
            f"| {arm} | {answer:.4f} | {learnt} | {general:.4f} | {forgot} | {general - start:+.3f} | {cka:.3f} | "
            f"{seconds:.0f} |"
        )
    return [intro, "\n".join(lines)]


def plot(results: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Answer CE against general CE, one mark a seed: down is learnt, left is kept."""
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    for index, (arm, found) in enumerate(results.items()):
        answer, _, general = zip(*map(figures, found), strict=True)
        marker = {"mse": "s"}.get(ARMS[arm].anchor, "D" if ARMS[arm].replay else "o")
        axes.plot(
            general, answer, marker, color=f"C{index % 10}", label=arm, alpha=0.85, mec="k" if index > 9 else None
        )
    before = next(iter(results.values()))[0]["before"]["more_val"]["general"]["answer_ce"]
    axes.axvline(before, color="k", ls=":", lw=1, label="general CE of the base, before")
    axes.set_xlabel("cross-entropy of general text, nats a token: right is forgotten")
    axes.set_ylabel("cross-entropy of held-out advice: down is learnt")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_cli(benchmark)
