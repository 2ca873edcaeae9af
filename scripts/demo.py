"""The whole way on the shipped tiny checkpoints, in minutes on two CPU cores: what `make demo` runs.

It runs the commands that a user would type, one after the other, and prints each before running it. The table at the
end is read from the files that they wrote.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from advisory.exam_report import compared
from litgpt.utils import UserError, run_cli

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "गेहूं के पत्तों पर पीले धब्बे दिख रहे हैं, फसल 60 दिन की है"
CHECKPOINTS = Path("checkpoints/tiny")
STUDENT = CHECKPOINTS / "base-MoE-4x2"
EXAM_QUESTIONS = 40
"""Of each test split; the whole splits are examined by the line without --limit."""
NOT_BETTER_EXIT_CODE = 1


def run(script: str, *words: str | Path, capture: bool = False) -> str:
    """Print a command, run it from the repository's root, and return its stdout if it is captured.

    A command that fails ends the demo with its exit code.
    """
    command = [script, *map(str, words)]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE if capture else None, encoding="utf-8"
    )
    if done.returncode:
        # subprocess counts signals below zero; a shell, and whoever reads our exit code, from 128 upwards.
        code = done.returncode if done.returncode > 0 else 128 - done.returncode
        print(f"demo stopped: {script} ended with exit code {code}", file=sys.stderr)
        raise SystemExit(code)
    return done.stdout or ""


def copy_checkpoints(source: Path, target: Path) -> None:
    """Put fresh copies of the shipped directories where the commands work on them.

    Raises:
        UserError: they are not there.
    """
    for name in ("base", "teacher"):
        if not (source / name / "model.safetensors").is_file():
            raise UserError(
                f"{source / name} holds no model.safetensors: restore it from the repository, or make it with "
                "python scripts/make_tiny.py --config configs/tiny/models.yaml"
            )
    for name in ("base", "teacher"):
        shutil.rmtree(target / name, ignore_errors=True)
        shutil.copytree(source / name, target / name)
        print(f"copied {source / name} to {target / name}")


def table(report: dict[str, Any], cka: dict[str, Any]) -> str:
    """The result of a run as text: held-out losses before and after, CKA and expert load by layer, the frozen part.

    Args:
        report: `report/metrics.json` of the training.
        cka: `cka.json` of eval_cka.
    """
    before, after, frozen = report["before"], report["after"], report["frozen"]
    lines = [f"{'held-out dialogues':<34}{'before':>9}{'after':>9}"]
    names = {"answer_ce": "answer CE, nats/token", "thought_ce": "thought CE, nats/token"}
    names["kd_kl"] = "KL to the teacher, nats/token"
    lines += [f"{label:<34}{_number(before[key])}{_number(after[key])}" for key, label in names.items()]
    lines += ["", f"{'layer':<8}{'CKA to base':>12}   expert load, % of the choices"]
    for layer in cka["layers"]:
        load = "  ".join(f"{share:5.1%}" for share in after["expert_load"][str(layer["b"])])
        lines.append(f"{layer['b']:<8}{_number(layer['cka'], width=12)}   {load}")
    unchanged = "no" if frozen["changed"] else "yes"
    lines += ["", f"frozen weights unchanged: {unchanged} ({frozen['compared']} tensors compared bit for bit)"]
    lines.append("before: the upcycled base; after: the distilled mixture of experts")
    return "\n".join(lines)


def _number(value: float | None, *, width: int = 9) -> str:
    return f"{'–' if value is None else format(value, '.4f'):>{width}}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that a command wrote."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def examine(advisers: dict[str, Path], out_dir: Path) -> dict[str, dict[str, Any]]:
    """Put the exam to each adviser; the last one's table shows them all. Returns each one's `exam.json`."""
    exams: list[Path] = []
    for name, checkpoint_dir in advisers.items():
        words: list[str | Path] = [
            "--checkpoint_dir",
            checkpoint_dir,
            "--out_dir",
            out_dir / name,
            "--name",
            name,
            "--overwrite",
            "true",
        ]
        # The teacher learnt to answer at once; the others think first.
        words += ["--limit", str(EXAM_QUESTIONS), "--thinking", "false" if name == "teacher" else "true"]
        run("scripts/examine.py", *words, "--beside", f"[{', '.join(map(str, exams))}]", capture=True)
        exams.append(out_dir / name / "exam.json")
    print("\n" + (ROOT / out_dir / list(advisers)[-1] / "exam.md").read_text(encoding="utf-8"))
    return {exam.parent.name: read_json(ROOT / exam) for exam in exams}


def verdict(report: dict[str, Any], student: dict[str, Any], base: dict[str, Any]) -> int:
    """Exit code: 0 if the student predicts held-out dialogues better than its base and names more causes rightly."""
    before, after = report["before"]["answer_ce"], report["after"]["answer_ce"]
    better = after < before and student["cause_top1"]["value"] > base["cause_top1"]["value"]
    return 0 if better and not report["frozen"]["changed"] else NOT_BETTER_EXIT_CODE


def demo(out_dir: Path = Path("out/demo"), steps: int | None = None) -> None:
    """Convert, upcycle, distil, compare, export, ask and examine, on the shipped tiny checkpoints.

    Args:
        out_dir: run directory; an earlier run in it is replaced.
        steps: optimizer steps of the distillation; by default those of configs/tiny/distill.yaml.
    """
    start = time.monotonic()
    getattr(sys.stdout, "reconfigure", lambda **_: None)(encoding="utf-8")
    copy_checkpoints(ROOT / "data" / "tiny", ROOT / CHECKPOINTS)
    for name in ("base", "teacher"):
        run("scripts/convert_hf_checkpoint.py", "--checkpoint_dir", CHECKPOINTS / name)
    experts = ("--n_expert", "4", "--n_expert_per_token", "2")
    run("scripts/upcycle_moe.py", "--checkpoint_dir", CHECKPOINTS / "base", "--out_dir", STUDENT, *experts)
    training = ("--config", "configs/tiny/distill.yaml", "--out_dir", out_dir, "--overwrite", "true")
    run("train_distill.py", *training, *(("--optim.steps", str(steps)) if steps else ()))
    sides = ("--checkpoint_a", CHECKPOINTS / "base", "--checkpoint_b", out_dir / "final")
    data = ("--data", "data/dialogues/val.jsonl")
    run("eval_cka.py", *sides, *data, "--out_dir", out_dir / "report")
    run("scripts/convert_lit_checkpoint.py", "--checkpoint_dir", out_dir / "final", "--out_dir", out_dir / "hf")
    answer = run("scripts/advise.py", QUESTION, "--checkpoint_dir", out_dir / "final", capture=True)

    report = read_json(ROOT / out_dir / "report" / "metrics.json")
    base = CHECKPOINTS / "base"
    advisers = {"base": base, "upcycled": STUDENT, "teacher": CHECKPOINTS / "teacher", "distilled": out_dir / "final"}
    exams = examine(advisers, out_dir / "exam")
    print("\n" + table(report, read_json(ROOT / out_dir / "report" / "cka.json")))
    print(f"\nप्रश्न: {QUESTION}\nउत्तर: {answer.strip()}")
    print(f"\n{time.monotonic() - start:.0f} s; the run is in {out_dir}, the Hugging Face model in {out_dir / 'hf'}")
    print(compared(exams["distilled"], exams["base"]))
    if code := verdict(report, *(exams[name]["scores"]["all"] for name in ("distilled", "base"))):
        print("demo failed: the student is not better than the base on held-out dialogues", file=sys.stderr)
        raise SystemExit(code)


if __name__ == "__main__":
    run_cli(demo)
