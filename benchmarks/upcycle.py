"""Upcycling Qwen3-0.6B to 8 experts, ours against mergekit-moe: wall time and peak memory of whole commands.

All read one random checkpoint of Qwen3-0.6B's shape (bf16, 1.2 GB). mergekit goes from a Hugging Face directory to
another, which takes 4.9 GB, and proves nothing; ours does the same and reads back and compares every byte, alone or
with a proof of the function in float32 or, as by default, in bfloat16, too. From a lit directory to another it stores
equal experts once. A plain write of as many bytes is the floor.

    python benchmarks/upcycle.py --work_dir /big/disk --mergekit_python /some/venv/bin/python
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from litgpt.utils import UserError, run_cli

ROOT = Path(__file__).resolve().parents[1]
MERGEKIT = "mergekit==0.1.5"
NAME = "Qwen3-0.6B"
MERGEKIT_LABEL = "mergekit-moe 0.1.5, HF → HF"
OURS = "**upcycle_moe, HF → HF, proof in fp32 and bf16**"
OURS_FP32 = "upcycle_moe, HF → HF, proof in fp32"
OURS_BITS = "upcycle_moe, HF → HF, every byte read back and compared"
QWEN3_TOKENIZER = ROOT.parent / "shared" / "qwen3_tokenizer"


class Cost(NamedTuple):
    """What a command cost."""

    seconds: float
    """Until it exits."""
    flushed: float
    """Until what it wrote is on the disk (`sync`): not every program waits for that."""
    peak_bytes: int
    """Largest resident set of the process or of one of its children (`ru_maxrss`)."""


def benchmark(
    work_dir: Path | None = None,
    mergekit_python: Path | None = None,
    tokenizer_dir: Path = QWEN3_TOKENIZER,
    rounds: int = 1,
    n_layer: int = 28,
    keep: bool = False,
) -> None:
    """Measure mergekit-moe, our upcycling, our conversions and a plain write of as many bytes; print a markdown table.

    Args:
        work_dir: where 15 GB fit; a temporary directory by default.
        mergekit_python: the Python of an environment with mergekit 0.1.5. Default: one is made in work_dir, on top of
            the packages of this Python, so that both run with one torch.
        tokenizer_dir: tokenizer.json and tokenizer_config.json of Qwen3; without them a tiny one is built.
        rounds: times to repeat everything; the table shows each command's fastest round and its largest memory.
        n_layer: below 28 for a quick look.
        keep: leave the checkpoint made for this (and the mergekit environment) in work_dir for another run.
    """
    folder = Path(work_dir or tempfile.mkdtemp(prefix="upcycle-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        python = mergekit_python or make_mergekit_environment(folder / "mergekit-environment")
        hf_dir = folder / f"hf-{n_layer}" / NAME
        if not (hf_dir / "model.safetensors").is_file():
            # In a process of its own: a child's ru_maxrss starts with what its parent had.
            run_apart(make_hf_dir, hf_dir, tokenizer_dir, n_layer)
        costs: dict[str, list[Cost]] = {}
        for _ in range(rounds):
            for label, cost in one_round(folder, hf_dir, python).items():
                costs.setdefault(label, []).append(cost)
        print(table({label: best_of(measured) for label, measured in costs.items()}))
    finally:
        if work_dir is None:
            shutil.rmtree(folder, ignore_errors=True)
        elif not keep:
            for made in (folder / f"hf-{n_layer}", folder / "mergekit-environment"):
                shutil.rmtree(made, ignore_errors=True)


def one_round(folder: Path, hf_dir: Path, mergekit_python: Path) -> dict[str, Cost]:
    """Every command once, with what it wrote deleted as soon as nothing needs it."""
    scripts, costs = ROOT / "scripts", {}
    theirs, lit, moe, exported = (folder / name for name in ("mergekit-out", NAME, f"{NAME}-MoE-8x2", "hf-out"))
    for left_over in (theirs, lit, moe, exported):
        shutil.rmtree(left_over, ignore_errors=True)

    recipe = folder / "mergekit.yaml"
    experts = [f"  - source_model: {hf_dir}" for _ in range(8)]
    head = [f"base_model: {hf_dir}", "gate_mode: random", "architecture: qwen3", "dtype: bfloat16"]
    recipe.write_text("\n".join([*head, "experts_per_token: 2", "experts:", *experts, ""]))
    costs[MERGEKIT_LABEL] = measure([mergekit_python.with_name("mergekit-moe"), recipe, theirs])
    if not list(theirs.glob("*.safetensors")):
        raise UserError(f"mergekit-moe wrote no weights into {theirs}")
    shutil.rmtree(theirs)

    upcycle, n_bytes = scripts / "upcycle_moe.py", 0
    for label, dtype in ((OURS, "all"), (OURS_FP32, "float32"), (OURS_BITS, "none")):
        costs[label] = measure(script(upcycle, checkpoint_dir=hf_dir, out_dir=exported, format="hf", proof_dtype=dtype))
        n_bytes = sum(path.stat().st_size for path in exported.glob("*.safetensors"))
        shutil.rmtree(exported)

    shutil.copytree(hf_dir, lit)
    costs["convert_hf_checkpoint, HF → lit"] = measure(script(scripts / "convert_hf_checkpoint.py", checkpoint_dir=lit))
    (lit / "model.safetensors").unlink()
    costs["upcycle_moe, lit → lit, proof in fp32 and bf16"] = measure(script(upcycle, checkpoint_dir=lit))
    shutil.rmtree(lit)
    shutil.rmtree(moe)

    plain = folder / "plain"
    costs[f"plain write of {n_bytes / 1e9:.2f} GB (dd)"] = measure(
        ["dd", "if=/dev/zero", f"of={plain}", "bs=8M", f"count={n_bytes // (8 << 20)}", "status=none"]
    )
    plain.unlink()
    return costs


def script(path: Path, **settings: str | Path) -> list[str | Path]:
    """The command line of one of our scripts."""
    return [sys.executable, path, *(word for key, value in settings.items() for word in (f"--{key}", value))]


def measure(command: Sequence[str | Path]) -> Cost:
    """Run a command and wait for it.

    Raises:
        UserError: it fails; its output is shown.
    """
    os.sync()
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            sys.stderr.write(output.read())
            raise UserError(f"exit code {process.returncode} of: {' '.join(map(str, command))}")
    os.sync()
    return Cost(seconds, time.perf_counter() - start, usage.ru_maxrss * 1024)


def best_of(costs: Sequence[Cost]) -> Cost:
    """The fastest times and the largest memory."""
    seconds, flushed, peaks = zip(*costs, strict=True)
    return Cost(min(seconds), min(flushed), max(peaks))


def table(costs: dict[str, Cost]) -> str:
    """The measurements and what follows from them, in markdown."""
    mergekit, plain = costs[MERGEKIT_LABEL], list(costs.values())[-1]
    lines = ["| command | wall, s | wall until on disk, s | peak RSS, GB |", "|---|---|---|---|"]
    for label, cost in costs.items():
        lines.append(f"| {label} | {cost.seconds:.1f} | {cost.flushed:.1f} | {cost.peak_bytes / 1e9:.2f} |")
    lines.append("")
    for label in (OURS, OURS_FP32, OURS_BITS):
        ours = costs[label]
        lines.append(
            f"{label}: {ours.seconds / mergekit.seconds:.2f} of mergekit-moe's time "
            f"({ours.flushed / mergekit.flushed:.2f} until on disk), "
            f"{ours.peak_bytes / mergekit.peak_bytes:.2f} of its memory; "
            f"{ours.flushed / plain.flushed:.2f} of the plain write until on disk"
        )
    return "\n".join(lines)


def make_mergekit_environment(folder: Path) -> Path:
    """An environment with mergekit over the packages of this Python, which get no second copy; returns its Python."""
    python = folder / "bin" / "python"
    if not python.with_name("mergekit-moe").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        own = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})["purelib"]
        (Path(own) / "below.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", MERGEKIT], check=True)
    return python


def run_apart(function: object, *arguments: object) -> None:
    """Call a function of this module in a fresh process."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)  # type: ignore[arg-type]
    process.start()
    process.join()
    if process.exitcode:
        raise UserError("the checkpoint for the benchmark could not be made; see the message above")


def make_hf_dir(hf_dir: Path, tokenizer_dir: Path, n_layer: int) -> None:
    """A Hugging Face directory of Qwen3-0.6B's shape with random weights: matrices N(0, 0.02), norms 1."""
    import torch

    from litgpt.config import Config
    from litgpt.keymap import layout
    from litgpt.safetensorfile import HFWriter
    from tests.tiny_tokenizer import build_tiny_tokenizer

    partial = hf_dir.with_name(f"{hf_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = Config.from_name(NAME, n_layer=n_layer)
    shapes = layout(config, "hf", tied=True).shapes
    generator = torch.Generator().manual_seed(0)
    with HFWriter(
        partial, {name: (shape, torch.bfloat16) for name, shape in shapes.items()}, max_shard_bytes=5 * 10**9
    ) as writer:
        for name, shape in shapes.items():
            weight = torch.ones(shape, dtype=torch.bfloat16)
            writer.write(name, weight if len(shape) == 1 else weight.normal_(0.0, 0.02, generator=generator))
    ids = {"eos_token_id": 151645, "bos_token_id": 151643, "torch_dtype": "bfloat16"}
    (partial / "config.json").write_text(json.dumps(config.to_hf() | ids))
    if (tokenizer_dir / "tokenizer.json").is_file():
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer_dir / file, partial / file)
    else:
        build_tiny_tokenizer(partial)
    os.rename(partial, hf_dir)


if __name__ == "__main__":
    run_cli(benchmark)
