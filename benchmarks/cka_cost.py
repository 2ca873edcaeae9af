"""What the anchor to the base costs in a step of distillation: steps with it and without it take turns.

    python benchmarks/cka_cost.py

Widths, experts and the length of a row are those of `configs/distill.yaml`; of the layers and of the vocabulary it is a
fourteenth (2 of 28 for the student, 3 of 40 for the teacher, so that this runs on a CPU), and one of the two layers is
compared instead of 7 of 28.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.distill_step import Task, build, our_step, write_cache
from litgpt.config import Config
from litgpt.utils import run_cli

SHARE = 14


def benchmark(
    tokenizer_dir: Path = Path("data/tiny/base"),
    data: Path = Path("data/dialogues/train.jsonl"),
    dialogues: int = 8,
    row: int = 1024,
    pairs: int = 5,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Print a markdown table: seconds of a step without the anchor, and what the anchor adds.

    Args:
        tokenizer_dir: holds a tokenizer of at most a fourteenth of Qwen3's vocabulary.
        data: dialogues.
        dialogues: in a step.
        row: tokens in a row.
        pairs: of steps, one with the anchor and one without it.
        device: where.
    """
    V = 151936 // SHARE // 64 * 64
    base = replace(Config.from_name("Qwen3-0.6B"), n_layer=2, vocab_size=V, padded_vocab_size=V)
    teacher = replace(Config.from_name("Qwen3-14B"), n_layer=3, vocab_size=V, padded_vocab_size=V)
    lines = [
        "| teacher | s a step without | with the anchor | what it costs |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, tokenizer_dir, base, teacher, device == "cuda")
        task = Task(folder, data, dialogues, row, pairs, device, torch.get_num_threads(), cka_every=2)
        write_cache(task)
        for kind, cached in (("beside the student", False), ("cached", True)):
            step, tokens, _ = our_step(task, cached=cached)
            seconds: dict[bool, list[float]] = {True: [], False: []}
            for anchored in (True, False):
                step(anchored=anchored)
            for pair in range(pairs):
                for anchored in (True, False) if pair % 2 else (False, True):
                    seconds[anchored].append(timed(step, anchored, device))
            without, with_it = (statistics.median(seconds[anchored]) for anchored in (False, True))
            costs = [a / b - 1 for a, b in zip(seconds[True], seconds[False], strict=True)]
            cost = statistics.median(costs)
            lines.append(
                f"| {kind} | {without:.2f} | {with_it:.2f} | {cost:+.1%} ({min(costs):+.1%} to {max(costs):+.1%}) |"
            )
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{tokens} tokens a step, {pairs} pairs, median (least to most); {where}; torch {torch.__version__}\n")
    print("\n".join(lines))


def timed(step: Callable[..., tuple[float, float]], anchored: bool, device: str) -> float:
    """Seconds of a step: wall time on CUDA, processor time on a CPU, which others use too."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    step(anchored=anchored)
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


if __name__ == "__main__":
    run_cli(benchmark)
