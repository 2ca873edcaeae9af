"""Which recipe, for this job: dense and sparse students of the tiny world, all distilled alike, three seeds each.

    python benchmarks/recipes.py --work_dir out/recipes

Every student starts from the same dense base and sees the same tokens from the same teacher for the same steps; what
differs is the recipe, or the width of a dense student. `replay` adds a quarter of general text that the base itself
teaches. Measured on held-out text: cross-entropy of the advice, and of general text of the kind that the base was made
of (what is forgotten). Runs that are finished are read again, so the study goes on where it was stopped.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib
import matplotlib.ticker

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from litgpt.recipes import COPY, Drop, Granular, Noise, Recipe, Shared, Wide
from litgpt.trainable import Part
from litgpt.upcycle import upcycle
from litgpt.utils import UserError, atomic_file, progress, run_cli

ROOT = Path(__file__).resolve().parents[1]
N_EXPERT, N_EXPERT_PER_TOKEN = 4, 2
VAL_DIALOGUES = 120
EXAM_QUESTIONS = 15
"""Of each test split."""
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t for a two-sided 95 % interval, by the number of seeds."""
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


@dataclass(frozen=True)
class Arm:
    """One kind of student."""

    recipe: Recipe
    parts: tuple[Part, ...] | None = None
    """What learns; `None`: the default."""
    replay: bool = False
    says: str = ""


ARMS: dict[str, Arm] = {
    "dense": Arm(Wide(factor=1, noise=0.0), says="the base itself, its FFNs learn"),
    "dense 2x": Arm(Wide(factor=2), says="FFNs twice as wide: as many active parameters"),
    "dense 4x": Arm(Wide(factor=4), says="FFNs four times as wide: as many parameters"),
    "copy": Arm(COPY, says="4 experts, 2 a token: equal copies"),
    "noise": Arm(Noise(sigma=0.1), says="copies with noise, σ 0.1"),
    "drop": Arm(Drop(ratio=0.25), says="a quarter of each expert's neurons anew"),
    "granular": Arm(Granular(parts=2), says="8 finer experts, 4 a token"),
    "shared": Arm(Shared(), says="the FFN stays frozen beside 4 experts that start at zero"),
    "shared, FFN learns": Arm(
        Shared(),
        parts=("experts", "router", "shared_expert", "thought_tokens"),
        says="the same, and the FFN learns too",
    ),
    "copy + replay": Arm(COPY, replay=True, says="copy, a quarter of the tokens general text that the base teaches"),
}


def benchmark(
    work_dir: Path = Path("out/recipes"),
    seeds: list[int] | None = None,
    arms: list[str] | None = None,
    steps: int = 240,
    exam: bool = True,
    page: Path | None = None,
) -> None:
    """Train every kind of student with every seed, and print what came of it.

    Args:
        work_dir: checkpoints and runs; what is finished there is not done again.
        seeds: of experts, routers and the order of the data; 1, 2 and 3 if not given.
        arms: some of the students only; all, if not given.
        steps: optimizer steps of each run.
        exam: put 15 questions of each test split to each student of the first seed.
        page: a markdown file whose part between the marks becomes the result; the picture goes beside it.
    """
    seeds = seeds or [1, 2, 3]
    if unknown := [arm for arm in arms or [] if arm not in ARMS]:
        raise UserError(f"arms: {unknown[0]!r} is not known; choose of {', '.join(ARMS)}")
    names = arms or list(ARMS)
    folder = work_dir.resolve()
    prepare(folder)
    runs = [(arm, seed) for seed in seeds for arm in names]
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in names}
    for arm, seed in progress(runs, "students", total=len(runs), unit="run"):
        results[arm].append(one(folder, arm, seed, steps))
    exams = {arm: examine(folder, arm, seeds[0]) for arm in names} if exam else {}
    text = "\n\n".join([*tables(results), exam_table(exams)] if exam else tables(results))
    print(text)
    summary = {"steps": steps, "seeds": seeds, "arms": results, "exam": exams}
    write(folder / "recipes.json", json.dumps(summary, ensure_ascii=False, indent=2))
    if page is not None:
        plot(results, page.with_suffix(".png"))
        old = page.read_text(encoding="utf-8") if page.is_file() else f"{BEGIN}\n{END}\n"
        before, _, rest = old.partition(BEGIN)
        _, _, after = rest.partition(END)
        write(page, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def prepare(folder: Path, val_dialogues: int = VAL_DIALOGUES) -> None:
    """Lit directories of the shipped base and teacher, and a part of the validation dialogues."""
    for name in ("base", "teacher"):
        if not (folder / name / "model_config.yaml").is_file():
            shutil.rmtree(folder / name, ignore_errors=True)
            shutil.copytree(ROOT / "data" / "tiny" / name, folder / name)
            command("scripts/convert_hf_checkpoint.py", "--checkpoint_dir", folder / name)
    lines = (ROOT / "data" / "dialogues" / "val.jsonl").read_text(encoding="utf-8").splitlines()[:val_dialogues]
    write(folder / "val.jsonl", "\n".join(lines))


def command(script: str, *words: str | Path) -> None:
    """Run one of our commands.

    Raises:
        UserError: it fails; what it said is shown.
    """
    done = subprocess.run([sys.executable, script, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stdout[-2000:] + done.stderr[-4000:])
        raise UserError(f"{script} ended with exit code {done.returncode}")


def one(folder: Path, name: str, seed: int, steps: int) -> dict[str, Any]:
    """Make and train one student, unless its result is there; what the report says before and after."""
    arm = ARMS[name]
    label = f"{name.replace(' ', '-').replace(',', '').replace('+', 'and')}-{seed}"
    run, student = folder / f"{label}-{steps}", folder / "students" / label
    result = run / "result.json"
    if not result.is_file():
        made = upcycle(
            folder / "base",
            student,
            recipe=arm.recipe,
            n_expert=N_EXPERT,
            n_expert_per_token=N_EXPERT_PER_TOKEN,
            trainable=arm.parts,
            seed=seed,
        )
        words: list[str | Path] = ["--config", "configs/tiny/distill.yaml", "--overwrite", "true", "--seed", str(seed)]
        words += ["--student", student, "--teacher", folder / "teacher", "--base", folder / "base", "--out_dir", run]
        words += ["--data.val", folder / "val.jsonl", "--data.more_val", "{general: data/general/val.jsonl}"]
        words += ["--optim.steps", str(steps), "--run.val_every", str(steps), "--run.samples", "0"]
        words += ["--loss.cka_weight", "0.05", "--loss.cka_weight_end", "0"]
        if arm.replay:
            sources = {
                "advice": {"path": "data/dialogues/train.jsonl", "weight": 3},
                "general": {"path": "data/general/train.jsonl", "weight": 1, "teacher": str(folder / "base")},
            }
            words += ["--data.train", "null", "--data.sources", json.dumps(sources)]
        command("train_distill.py", *words)
        report = json.loads((run / "report" / "metrics.json").read_text(encoding="utf-8"))
        proof = made.proofs[0]
        values = {
            "seed": seed,
            "parameters": made.n_parameters,
            "active": made.n_active,
            "step_0": {"max_abs_diff": proof.max_abs_diff, "kl": proof.kl, "top1": proof.top1_agreement},
            "before": report["before"],
            "after": report["after"],
            "seconds": report["training"]["seconds"],
        }
        write(result, json.dumps(values, ensure_ascii=False, indent=2))
    values = json.loads(result.read_text(encoding="utf-8"))
    if "routing" not in values and values["after"]["expert_load"]:
        values |= inspect(folder, run)
        write(result, json.dumps(values, ensure_ascii=False, indent=2))
    return dict(values)


def inspect(folder: Path, run: Path) -> dict[str, Any]:
    """Routing maps of a finished student, and how far its experts are from each other and from the base's FFN."""
    out = run / "routing"
    words: list[str | Path] = ["--checkpoint_dir", run / "final", "--data", folder / "val.jsonl", "--out_dir", out]
    command("scripts/inspect_routing.py", *words, "--base", folder / "base")
    return {"routing": json.loads((out / "routing.json").read_text(encoding="utf-8"))}


def examine(folder: Path, name: str, seed: int) -> dict[str, Any]:
    """The exam's scores of one student."""
    label = f"{name.replace(' ', '-').replace(',', '').replace('+', 'and')}-{seed}"
    (run,) = folder.glob(f"{label}-[0-9]*")
    if not (run / "exam" / "exam.json").is_file():
        words: list[str | Path] = ["--checkpoint_dir", run / "final", "--out_dir", run / "exam", "--name", name]
        command("scripts/examine.py", *words, "--limit", str(EXAM_QUESTIONS), "--overwrite", "true")
    scores = json.loads((run / "exam" / "exam.json").read_text(encoding="utf-8"))["scores"]["all"]
    return {key: scores[key] for key in ("cause_top1", "facts", "rules") if key in scores}


def figures(result: Mapping[str, Any]) -> tuple[float, float, float]:
    """Answer CE, thought CE and general CE after training, nats a token."""
    after = result["after"]
    return after["answer_ce"], after["thought_ce"], after["more_val"]["general"]["answer_ce"]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval; infinite for one value."""
    if len(values) < 2:
        return values[0], math.inf
    return statistics.mean(values), T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def paired(results: Mapping[str, Sequence[Mapping[str, Any]]], arm: str, against: str, column: int) -> str:
    """Difference of an arm from another, seed by seed, with its interval."""
    pairs = zip(results[arm], results[against], strict=True)
    mean, half = interval([figures(a)[column] - figures(b)[column] for a, b in pairs])
    return f"{mean:+.4f}" if math.isinf(half) else f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})"


def tables(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Markdown: what each student is, what it learnt and forgot, and what its experts and routers did."""
    first = next(iter(results.values()))[0]
    against = "copy" if "copy" in results else next(iter(results))
    before, count = first["before"], len(next(iter(results.values())))
    intro = (
        f"Before training the base has answer CE {before['answer_ce']:.4f}, thought CE {before['thought_ce']:.4f} and "
        f"general CE {before['more_val']['general']['answer_ce']:.4f} nats a token. {count} seeds; means, and in "
        "brackets the 95 % interval of the paired difference over the seeds."
    )
    learnt = [f"| student | parameters, active | answer CE | against {against} | general CE | against {against} |"]
    learnt.append("|---|---|---|---|---|---|")
    made = ["| student | what it is | KL at step 0 | top-1 equal | MaxVio | entropy | expert cosine | crop, bits |"]
    made.append("|---|---|---|---|---|---|---|---|")
    for arm, found in results.items():
        answer, _, general = (statistics.mean(values) for values in zip(*map(figures, found), strict=True))
        size = f"{found[0]['parameters'] / 1e6:.2f} M, {found[0]['active'] / 1e6:.2f} M"
        same = arm == against
        learnt.append(
            f"| {arm} | {size} | {answer:.4f} | {'–' if same else paired(results, arm, against, 0)} | {general:.4f} | "
            f"{'–' if same else paired(results, arm, against, 2)} |"
        )
        start = found[0]["step_0"]
        made.append(
            f"| {arm} | {ARMS[arm].says} | {start['kl']:.1e} | {start['top1']:.1%} | {' | '.join(routing(found))} |"
        )
    return [intro, "\n".join(learnt), "\n".join(made)]


def routing(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """MaxVio, entropy, cosine of two experts, and information about the crop; means over layers and seeds."""
    if "routing" not in found[0]:
        return ["–"] * 4
    layers = [layer for result in found for layer in result["routing"]["layers"]]

    def mean(key: str) -> str:
        values = [layer[key] for layer in layers if layer.get(key) is not None]
        return f"{statistics.mean(values):.3f}" if values else "–"

    return [mean(key) for key in ("max_vio", "entropy", "expert_cosine", "crop_bits")]


def exam_table(exams: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: exam scores of the first seed, in per cent, with the number of questions behind each."""
    names = list(dict.fromkeys(name for scores in exams.values() for name in scores))
    lines = [f"| student | {' | '.join(name.replace('_', ' ') for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for arm, scores in exams.items():
        cells = [f"{100 * s['value']:.1f} (n {s['count']})" if (s := scores.get(name)) else "–" for name in names]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(["Exam of the first seed's students, per cent:", "", *lines])


def plot(results: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Answer CE against general CE, one mark a seed: down is learnt, left is kept."""
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for index, (arm, found) in enumerate(results.items()):
        answer, _, general = zip(*map(figures, found), strict=True)
        marker = "s" if arm.startswith("dense") else "o"
        axes.plot(general, answer, marker, color=f"C{index}", label=arm, alpha=0.85)
    before = next(iter(results.values()))[0]["before"]
    axes.plot(
        before["more_val"]["general"]["answer_ce"], before["answer_ce"], "k*", markersize=11, label="base, before"
    )
    axes.set_xscale("log")
    axes.set_xlabel("cross-entropy of general text, nats a token (log): right is forgotten")
    axes.set_ylabel("cross-entropy of held-out advice: down is learnt")
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%.2g"))
    axes.xaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%.2g"))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


def write(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_cli(benchmark)
