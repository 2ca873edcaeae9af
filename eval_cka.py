"""What moved inside: layer-wise CKA of two checkpoints on the same tokens.

    python eval_cka.py
    python eval_cka.py --checkpoint_a DENSE_BASE --checkpoint_b out/distill/final --data data/dialogues/val.jsonl

Unbiased linear CKA, exact over all tokens in one pass for the layers that correspond, and a layer × layer map on a
sample of rows. Position 0 of every dialogue, the attention sink, is never a row.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import yaml
from torch import Tensor

from litgpt.chat import Span
from litgpt.checkpoint import load_model, require_lit_dir
from litgpt.cka import MINIMUM_ROWS, StreamingCKA, linear_cka, select_rows
from litgpt.config import Config
from litgpt.data import PackedLoader, read_records
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, atomic_file, parse_device, parse_dtype, progress, run_cli, sha256_file

SpanName = Literal["prompt", "thought", "answer"]
RUNS = Path("out")


@dataclass(frozen=True)
class CkaReport:
    """The result of one comparison.

    Attributes:
        pairs: corresponding layers (a, b), 0-based.
        values: unbiased CKA of each pair over all rows.
        map_AB: unbiased CKA of every layer of a with every layer of b on the sampled rows.
        rows: tokens compared.
        dropped_first: tokens left out because they begin a dialogue.
        map_rows: tokens in the sample behind the map.
    """

    pairs: list[tuple[int, int]]
    values: list[float]
    map_AB: np.ndarray
    rows: int
    dropped_first: int
    map_rows: int


def main(
    checkpoint_a: Path | None = None,
    checkpoint_b: Path | None = None,
    data: Path | None = None,
    out_dir: Path | None = None,
    spans: list[SpanName] = ["prompt", "thought", "answer"],  # noqa: B006
    max_records: int = 256,
    max_seq_length: int = 1024,
    micro_batch_size: int = 4,
    map_rows: int = 2048,
    dtype: str = "float32",
    device: str = "auto",
    seed: int = 1337,
) -> None:
    """Compare two checkpoints layer by layer with unbiased CKA; without arguments, the last run with its base.

    Args:
        checkpoint_a: lit dir of the reference; default: the dense base that the last run names.
        checkpoint_b: lit dir to compare with it; default: `final/` of the last run in `out/`.
        data: dialogues as JSON lines that both read; default: the last run's validation set.
        out_dir: where `cka.json` and `cka.png` go; default: `report/` beside the last run's `final/`, else `out/cka`.
        spans: which tokens are rows.
        max_records: dialogues read, from the file's beginning.
        max_seq_length: tokens in a packed row; longer dialogues are left out and counted.
        micro_batch_size: packed rows read at a time.
        map_rows: tokens in the seeded sample behind the layer × layer map.
        dtype: weights' dtype while reading: float32, bfloat16 or float64.
        device: cpu, cuda or auto.
        seed: of the sample behind the map.
    """
    if checkpoint_a is None or checkpoint_b is None or data is None:
        last = last_run()
        print(f"taking what is not named from the last run, {last}")
        inputs = inputs_of(last)
        checkpoint_a = checkpoint_a or inputs["a"]
        checkpoint_b = checkpoint_b or inputs["b"]
        data = data or inputs["data"]
        out_dir = out_dir or (last / "report" if checkpoint_b == inputs["b"] else None)
    out_dir = out_dir or RUNS / "cka"
    for directory in (checkpoint_a, checkpoint_b):
        require_lit_dir(directory)

    torch_device = parse_device(device)
    blocks = [Config.from_checkpoint(directory).block_size for directory in (checkpoint_a, checkpoint_b)]
    max_seq_length = min(max_seq_length, *blocks)
    model_a = load_model(checkpoint_a, dtype=parse_dtype(dtype), device=torch_device)
    model_b = load_model(checkpoint_b, dtype=parse_dtype(dtype), device=torch_device)
    tokenizer = shared_tokenizer(checkpoint_a, model_a, checkpoint_b, model_b)
    loader = PackedLoader(
        read_records(data)[:max_records],
        tokenizer,
        max_seq_length=max_seq_length,
        micro_batch_size=micro_batch_size,
        seed=seed,
        shuffle=False,
    )
    loader.say_dropped("of the given")
    print(
        f"a: {checkpoint_a}\nb: {checkpoint_b}\non {len(loader.records)} dialogues of {data}, spans {', '.join(spans)}"
    )
    report = compare(
        model_a, model_b, loader, keep_spans={Span[name.upper()] for name in spans}, map_rows=map_rows, seed=seed
    )
    _print_table(report)
    settings = {
        "checkpoint_a": str(checkpoint_a),
        "checkpoint_b": str(checkpoint_b),
        "data": str(data),
        "sha256": {str(path): sha256_file(path) for path in (*_weights(checkpoint_a, checkpoint_b), data)},
        "spans": list(spans),
        "records": len(loader.records),
        "records_too_long": len(loader.dropped),
        "max_seq_length": max_seq_length,
        "dtype": dtype,
        "device": str(torch_device),
        "seed": seed,
        "estimator": "unbiased linear CKA (HSIC1), position 0 of each dialogue dropped",
    }
    with atomic_file(out_dir / "cka.json") as path:
        path.write_text(json.dumps(_as_json(report, settings), indent=1, allow_nan=False) + "\n")
    with atomic_file(out_dir / "cka.png") as path:
        _plot(report, str(checkpoint_a), str(checkpoint_b), path)
    print(f"written: {out_dir / 'cka.json'}, {out_dir / 'cka.png'}")


def shared_tokenizer(dir_a: Path, model_a: GPT, dir_b: Path, model_b: GPT) -> Tokenizer:
    """The tokenizer by which both models read the same ids, thought tags included if one of them has these.

    The dense base has no row of its own for the thought tags, only unused padding. It is lent the other's rows, in
    memory, so that both read the same text and an upcycled checkpoint equals its base on the thought as well.

    Raises:
        UserError: the vocabularies differ in anything but the thought tags.
    """
    a, b = Tokenizer(dir_a), Tokenizer(dir_b)
    own = {tokenizer: set(tokenizer.thought_ids or ()) for tokenizer in (a, b)}
    known = min(a.vocab_size, b.vocab_size)
    differ = [i for i in range(known) if i not in own[a] | own[b] and a.token_bytes(i) != b.token_bytes(i)]
    beyond = {i for t in (a, b) for i in range(known, t.vocab_size) if i not in own[t]}
    if differ or beyond:
        example = differ[0] if differ else min(beyond)
        raise UserError(f"{dir_a} and {dir_b} have different vocabularies (id {example}): CKA needs the same tokens")
    if own[a] == own[b]:
        return a
    lender, borrower, rows = (model_b, model_a, own[b]) if own[b] else (model_a, model_b, own[a])
    lent = torch.tensor(sorted(rows), device=lender.transformer.wte.weight.device)
    with torch.no_grad():
        borrower.transformer.wte.weight[lent] = lender.transformer.wte.weight[lent].to(borrower.transformer.wte.weight)
    return b if own[b] else a


@torch.inference_mode()
def compare(
    model_a: GPT, model_b: GPT, loader: PackedLoader, *, keep_spans: set[Span], map_rows: int, seed: int = 1337
) -> CkaReport:
    """Layer-wise CKA of two models that read the same batches.

    Args:
        model_a: reference, on its device.
        model_b: the other; width and depth may differ.
        loader: packed batches, not shuffled.
        keep_spans: labels of the tokens that are rows.
        map_rows: rows sampled for the layer × layer map.
        seed: of that sample.

    Raises:
        UserError: fewer than 4 tokens in the chosen spans, or hidden states that are not finite.
    """
    depth_a, depth_b = model_a.config.n_layer, model_b.config.n_layer
    pairs = [(i, round(i * (depth_b - 1) / max(depth_a - 1, 1))) for i in range(depth_a)]
    device = model_a.transformer.wte.weight.device
    streams = [StreamingCKA() for _ in pairs]
    sample = random.Random(seed)
    dropped_first = 0
    kept: list[tuple[Tensor, Tensor]] = []  # sampled rows [R, L, D] of each batch
    share = min(1.0, 1.5 * map_rows / max(1, sum(len(document.ids_T) for document in loader.documents)))
    for batch in progress(loader, "reading", total=len(loader), unit="batch"):
        batch = batch.to(device)
        keep_BT = select_rows(batch.spans_BT, batch.documents_BT, keep_spans=keep_spans)
        all_BT = select_rows(batch.spans_BT, batch.documents_BT, keep_spans=keep_spans, drop_first=False)
        dropped_first += int(all_BT.sum() - keep_BT.sum())
        a, b = (
            model(batch.ids_BT, documents_BT=batch.documents_BT, layers=range(depth), return_logits=False).hidden_states
            for model, depth in ((model_a, depth_a), (model_b, depth_b))
        )
        for stream, (i, j) in zip(streams, pairs, strict=True):
            x_ND, y_NC = a[i][keep_BT], b[j][keep_BT]
            if not (x_ND.isfinite().all() and y_NC.isfinite().all()):
                raise UserError(f"hidden states of layer {i} (a) or {j} (b) are not finite: is a checkpoint damaged?")
            stream.update(x_ND, y_NC)
        chosen = [n for n in range(int(keep_BT.sum())) if sample.random() < share]
        kept.append(
            (
                torch.stack([a[i][keep_BT][chosen] for i in range(depth_a)], 1).float().cpu(),
                torch.stack([b[j][keep_BT][chosen] for j in range(depth_b)], 1).float().cpu(),
            )
        )
    rows = streams[0].n
    if rows < MINIMUM_ROWS:
        names = ", ".join(sorted(span.name.lower() for span in keep_spans))
        raise UserError(f"{rows} tokens in the spans {names}: CKA needs at least {MINIMUM_ROWS}; choose other --spans")
    x_NLD, y_NLC = (torch.cat(side)[:map_rows].to(device) for side in zip(*kept, strict=True))
    map_AB = np.full((depth_a, depth_b), np.nan)
    if len(x_NLD) >= MINIMUM_ROWS:
        cells = [(i, j) for i in range(depth_a) for j in range(depth_b)]
        for i, j in progress(cells, "layer map", unit="pair"):
            map_AB[i, j] = linear_cka(x_NLD[:, i], y_NLC[:, j]).item()
    return CkaReport(
        pairs=pairs,
        values=[stream.result() for stream in streams],
        map_AB=map_AB,
        rows=rows,
        dropped_first=dropped_first,
        map_rows=len(x_NLD),
    )


def last_run() -> Path:
    """The run in `out/` that finished last."""
    runs = [path.parent.parent for path in RUNS.glob("*/final/provenance.yaml")]
    if not runs:
        raise UserError(
            f"no finished run in {RUNS}/: run `make demo` or `python train_distill.py --config configs/distill.yaml` "
            "first, or name --checkpoint_a, --checkpoint_b and --data"
        )
    return max(runs, key=lambda run: (run / "final" / "provenance.yaml").stat().st_mtime)


def inputs_of(run: Path) -> dict[str, Path]:
    """The dense base, the result and the validation set of a run."""
    path = run / "hyperparameters.yaml"
    if not path.is_file():
        raise UserError(
            f"{run} lacks {path.name}, so its base is not known: name --checkpoint_a, --checkpoint_b and --data"
        )
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {
        "a": Path(settings["base"]),
        "student": Path(settings.get("student", settings["base"])),
        "b": run / "final",
        "data": Path(settings["data"]["val"]),
    }


def _weights(*directories: Path) -> list[Path]:
    return [directory / "lit_model.pth" for directory in directories]


def _print_table(report: CkaReport) -> None:
    print(f"{'layer a':>7} {'layer b':>7} {'CKA':>8}")
    for (i, j), value in zip(report.pairs, report.values, strict=True):
        print(f"{i:>7} {j:>7} {value:>8.4f}")
    print(f"{report.rows} tokens; {report.dropped_first} first tokens left out; map on {report.map_rows} tokens")


def _as_json(report: CkaReport, settings: dict[str, object]) -> dict[str, object]:
    def finite(value: float) -> float | None:
        return float(value) if np.isfinite(value) else None

    return {
        "settings": settings,
        "layers": [
            {"a": i, "b": j, "cka": finite(value)} for (i, j), value in zip(report.pairs, report.values, strict=True)
        ],
        "mean": finite(float(np.mean(report.values))),
        "map": [[finite(value) for value in row] for row in report.map_AB],
        "rows": report.rows,
        "dropped_first": report.dropped_first,
        "map_rows": report.map_rows,
    }


def _plot(report: CkaReport, name_a: str, name_b: str, path: Path) -> None:
    """The layer × layer map on a fixed 0 … 1 scale, and the diagonal beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    depth_a, depth_b = report.map_AB.shape
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    image = left.imshow(report.map_AB, origin="lower", vmin=0, vmax=1, cmap="viridis", aspect="auto")
    left.set(xlabel=f"layer of b: {name_b}", ylabel=f"layer of a: {name_a}", title=f"CKA map, {report.map_rows} tokens")
    left.set_xticks(range(0, depth_b, max(1, depth_b // 8)))
    left.set_yticks(range(0, depth_a, max(1, depth_a // 8)))
    if depth_a * depth_b <= 64:
        for (i, j), value in np.ndenumerate(report.map_AB):
            left.text(j, i, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
    figure.colorbar(image, ax=left, label="unbiased linear CKA")
    right.plot([i for i, _ in report.pairs], report.values, marker="o")
    right.set(ylim=(0, 1.05), xlabel="layer of a", ylabel="CKA", title=f"corresponding layers, {report.rows} tokens")
    right.grid(alpha=0.3)
    right.set_xticks(range(0, depth_a, max(1, depth_a // 8)))
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


if __name__ == "__main__":
    run_cli(main)
