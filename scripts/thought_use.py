"""Does a student use its thought? `python scripts/thought_use.py --checkpoints '[out/distill/final]'`.

The same answers are scored three times: after the record's own thought, after an empty thought, and after the thought
of another record. A student that uses its thought finds its answer likelier after its own. If the three are alike,
the thought is decoration; if another's is no worse than an empty one, only its presence counts.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from litgpt.chat import Span
from litgpt.checkpoint import load_model, require_lit_dir
from litgpt.data import PackedLoader, Record, read_records
from litgpt.losses import distill_terms
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, atomic_file, parse_device, parse_dtype, progress, run_cli, sha256_file

Thought = Literal["own", "empty", "other"]
THOUGHTS: tuple[Thought, ...] = get_args(Thought)
RESAMPLES = 2000


@dataclass(frozen=True)
class ThoughtUse:
    """What one checkpoint makes of its thoughts.

    Attributes:
        tokens_R: answer tokens of each record.
        nll_R: for each kind of thought the answer's negative log-likelihood, nats summed over its tokens, by record.
    """

    tokens_R: np.ndarray
    nll_R: dict[Thought, np.ndarray]

    def mean(self, thought: Thought) -> float:
        """Nats per answer token."""
        return float(self.nll_R[thought].sum() / self.tokens_R.sum())

    def gain(self, without: Thought, *, seed: int) -> tuple[float, float, float]:
        """How many nats a token the own thought saves against another kind, and its 95 % interval.

        The interval is a percentile bootstrap over records: tokens of one answer are no independent witnesses.
        """
        saved_R = self.nll_R[without] - self.nll_R["own"]
        draws = np.random.default_rng(seed).integers(0, len(saved_R), (RESAMPLES, len(saved_R)))
        resampled = saved_R[draws].sum(1) / self.tokens_R[draws].sum(1)
        low, high = np.quantile(resampled, (0.025, 0.975))
        return float(saved_R.sum() / self.tokens_R.sum()), float(low), float(high)


def thought_use(
    checkpoints: list[Path],
    data: Path = Path("data/dialogues/val.jsonl"),
    out_dir: Path = Path("out/thought_use"),
    max_records: int = 256,
    max_seq_length: int = 2048,
    micro_batch_size: int = 4,
    dtype: str = "float32",
    device: str = "auto",
    seed: int = 1337,
) -> None:
    """Score the same answers after their own thought, an empty one, and that of another record.

    Args:
        checkpoints: lit dirs of the students, side by side.
        data: dialogues as JSON lines; those whose last turn is an assistant's with a thought are scored.
        out_dir: where thought_use.json and thought_use.png go.
        max_records: dialogues scored, from the file's beginning.
        max_seq_length: tokens in a packed row; dialogues that are longer with any of the thoughts are left out.
        micro_batch_size: packed rows read at a time.
        dtype: the students run in it: float32, bfloat16 or float64.
        device: cpu, cuda or auto.
        seed: of who gets whose thought, and of the intervals.
    """
    if not checkpoints:
        raise UserError("checkpoints is empty: name at least one lit dir")
    if min(max_records, max_seq_length, micro_batch_size) < 1:
        raise UserError("max_records, max_seq_length and micro_batch_size must be positive")
    for directory in checkpoints:
        require_lit_dir(directory)
    torch_device, torch_dtype = parse_device(device), parse_dtype(dtype)
    given = read_records(data)[:max_records]
    records = [record for record in given if _thinks(record)]
    variants = with_thoughts(records, seed=seed)
    print(f"{len(records)} of {len(given)} dialogues of {data} end with a thought and its answer")
    results: list[ThoughtUse] = []
    used = []
    for directory in checkpoints:
        model = load_model(directory, dtype=torch_dtype, device=torch_device)
        found, scored = measure(
            model,
            Tokenizer(directory),
            variants,
            max_seq_length=min(max_seq_length, model.config.block_size),
            micro_batch_size=micro_batch_size,
        )
        results.append(found)
        used.append(scored)
    names = [str(directory) for directory in checkpoints]
    _print_table(names, results, seed)
    report = {
        "settings": {
            "data": str(data),
            "sha256": {str(path): sha256_file(path) for path in (*(d / "lit_model.pth" for d in checkpoints), data)},
            "max_records": max_records,
            "max_seq_length": max_seq_length,
            "dtype": dtype,
            "device": str(torch_device),
            "seed": seed,
        },
        "checkpoints": [
            _as_json(name, result, scored, seed) for name, result, scored in zip(names, results, used, strict=True)
        ],
    }
    with atomic_file(out_dir / "thought_use.json") as path:
        path.write_text(json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_file(out_dir / "thought_use.png") as path:
        _plot(names, results, path, seed)
    print(f"written: {out_dir / 'thought_use.json'}, {out_dir / 'thought_use.png'}")


def _thinks(record: Record) -> bool:
    last = record.messages[-1]
    return last["role"] == "assistant" and bool(last.get("thought", "").strip())


def with_thoughts(records: Sequence[Record], *, seed: int) -> dict[Thought, list[Record]]:
    """The records with their own last thought, without it, and with that of another record.

    Thoughts go round in a shuffled circle, each to the next record whose own thought reads differently.

    Raises:
        UserError: there are no two different thoughts.
    """
    thoughts = [record.messages[-1].get("thought", "") for record in records]
    if len(set(thoughts)) < 2:
        raise UserError(f"{len(records)} dialogues have a thought, {len(set(thoughts))} of them different: expected 2")
    circle = list(range(len(records)))
    random.Random(seed).shuffle(circle)
    other = {}
    for place, number in enumerate(circle):
        behind = (circle[(place + step) % len(circle)] for step in range(1, len(circle)))
        other[number] = next(thoughts[giver] for giver in behind if thoughts[giver] != thoughts[number])
    return {
        "own": list(records),
        "empty": [_with(record, "") for record in records],
        "other": [_with(record, other[number]) for number, record in enumerate(records)],
    }


def _with(record: Record, thought: str) -> Record:
    return replace(record, messages=[*record.messages[:-1], {**record.messages[-1], "thought": thought}])


def measure(
    model: GPT,
    tokenizer: Tokenizer,
    variants: dict[Thought, list[Record]],
    *,
    max_seq_length: int,
    micro_batch_size: int,
) -> tuple[ThoughtUse, list[str]]:
    """Score the last answers of the same records under each kind of thought.

    Args:
        model: the student on its device.
        tokenizer: its own.
        variants: the same records in the same order, see `with_thoughts`.
        max_seq_length: records longer than this in any variant are left out of all.
        micro_batch_size: packed rows at a time.

    Returns:
        the scores, and the ids of the records behind them.

    Raises:
        UserError: no record fits.
    """

    def packed(records: Sequence[Record]) -> PackedLoader:
        return PackedLoader(
            records, tokenizer, max_seq_length=max_seq_length, micro_batch_size=micro_batch_size, shuffle=False
        )

    loaders = {thought: packed(records) for thought, records in variants.items()}
    if any(loader.dropped for loader in loaders.values()):
        fitting = set.intersection(*({record.id for record in loader.records} for loader in loaders.values()))
        if not fitting:
            raise UserError(f"no dialogue fits into {max_seq_length} tokens with each thought: raise max_seq_length")
        loaders = {
            thought: packed([record for record in records if record.id in fitting])
            for thought, records in variants.items()
        }
    left_out = len(variants["own"]) - len(loaders["own"].records)
    if left_out:
        print(f"{left_out} dialogues have more than {max_seq_length} tokens and are left out", file=sys.stderr)
    tokens_R = np.array([_last_answer(document.spans_T).sum() for document in loaders["own"].documents])
    nll_R = {thought: _nll(model, loader, thought) for thought, loader in loaders.items()}
    return ThoughtUse(tokens_R, nll_R), [record.id for record in loaders["own"].records]


def _last_answer(spans_T: torch.Tensor) -> torch.Tensor:
    """Which tokens are the last answer: earlier ones stand before the thought and do not change with it."""
    answer_T = spans_T == Span.ANSWER
    others = (~answer_T[: int(answer_T.nonzero()[-1])]).nonzero()
    answer_T[: int(others[-1]) + 1] = False
    return answer_T


@torch.inference_mode()
def _nll(model: GPT, loader: PackedLoader, thought: str) -> np.ndarray:
    """Negative log-likelihood of each record's last answer, nats."""
    device = model.lm_head.weight.device
    nll_R = torch.zeros(len(loader.records), dtype=torch.float64)
    for batch in progress(loader, f"thought: {thought}", total=len(loader), unit="batch"):
        scored_BT = torch.zeros(batch.ids_BT.shape)
        number_BT = torch.zeros(batch.ids_BT.shape, dtype=torch.int64)
        for b, row in enumerate(batch.records):
            for document, number in enumerate(row):
                where_T = (batch.documents_BT[b] == document).nonzero().squeeze(1)
                number_BT[b, where_T] = number
                # The token at t is predicted at t - 1.
                scored_BT[b, where_T[_last_answer(batch.spans_BT[b, where_T])] - 1] = 1.0
        targets_BT, _ = batch.next_tokens()
        on_device = batch.to(device)
        hidden_BTD = model(on_device.ids_BT, documents_BT=on_device.documents_BT, return_logits=False).hidden
        terms = distill_terms(
            hidden_BTD.flatten(0, 1),
            model.lm_head.weight,
            targets_BT.flatten().to(device),
            scored_BT.flatten().to(device),
            ce_scale=1.0,
            kd_scale=0.0,
        )
        nll_R.index_add_(0, number_BT.flatten(), terms.ce_N.double().cpu())
    if not nll_R.isfinite().all():
        raise UserError(f"the likelihood after the thought {thought} is not finite: is the checkpoint damaged?")
    return nll_R.numpy()


def _print_table(names: list[str], results: list[ThoughtUse], seed: int) -> None:
    width = max(len(name) for name in names)
    print(f"{'nats a token':<{width}} {'own':>8} {'empty':>8} {'other':>8}   {'empty - own':>24}   {'other - own':>24}")
    for name, result in zip(names, results, strict=True):
        means = " ".join(f"{result.mean(thought):>8.4f}" for thought in THOUGHTS)
        gains = "   ".join(
            "{:>+7.4f} [{:>+.4f}, {:>+.4f}]".format(*result.gain(without, seed=seed)) for without in THOUGHTS[1:]
        )
        print(f"{name:<{width}} {means}   {gains}")


def _as_json(name: str, result: ThoughtUse, ids: list[str], seed: int) -> dict[str, Any]:
    gains = {without: result.gain(without, seed=seed) for without in THOUGHTS[1:]}
    return {
        "checkpoint": name,
        "records": len(ids),
        "answer_tokens": int(result.tokens_R.sum()),
        "nats_per_token": {thought: result.mean(thought) for thought in THOUGHTS},
        "saved_by_own": {
            without: {"nats_per_token": gain, "interval_95": [low, high]}
            for without, (gain, low, high) in gains.items()
        },
        "by_record": [
            {"id": identity, "tokens": int(result.tokens_R[r])}
            | {thought: round(float(result.nll_R[thought][r]), 4) for thought in THOUGHTS}
            for r, identity in enumerate(ids)
        ],
    }


def _plot(names: list[str], results: list[ThoughtUse], path: Path, seed: int) -> None:
    """Left the three likelihoods of each checkpoint, right what its own thought saves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 2.2 + 0.9 * len(names)), layout="constrained", sharey=True)
    rows = np.arange(len(names))
    colours = {"own": "#1b7837", "empty": "#999999", "other": "#c51b7d"}
    for offset, thought in zip((-0.26, 0.0, 0.26), THOUGHTS, strict=True):
        values = [result.mean(thought) for result in results]
        bars = left.barh(rows + offset, values, 0.24, color=colours[thought], label=f"{thought} thought")
        left.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    left.set_yticks(rows, [name if len(name) <= 36 else f"…{name[-35:]}" for name in names])
    left.invert_yaxis()
    left.margins(x=0.14)
    left.set(xlabel="nats per answer token, less is better", title="the answer after each thought")
    for offset, without in zip((-0.13, 0.13), THOUGHTS[1:], strict=True):
        gains = np.array([result.gain(without, seed=seed) for result in results])
        right.errorbar(
            gains[:, 0],
            rows + offset,
            xerr=np.maximum(0, [gains[:, 0] - gains[:, 1], gains[:, 2] - gains[:, 0]]),
            fmt="o",
            capsize=4,
            color=colours[without],
            label=f"against {without}",
        )
    right.axvline(0, color="black", linewidth=0.8)
    right.grid(alpha=0.3, axis="x")
    right.set(xlabel="nats a token saved by the own thought, 95 % interval", title="what the own thought is worth")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


if __name__ == "__main__":
    run_cli(thought_use)
