"""What moved inside: layer-wise CKA of two or three checkpoints on the same tokens, or of many in a row.

    python eval_cka.py
    python eval_cka.py --checkpoint_a DENSE_BASE --checkpoint_b out/distill/final --data data/dialogues/val.jsonl
    python eval_cka.py --checkpoint_c TEACHER --sites '[block, attention, mlp]' --experts true
    python eval_cka.py --series '[STUDENT, out/distill/final]'

Unbiased linear CKA, exact over all tokens in one pass for the layers that correspond, with what else says how far they
are apart; a layer × layer map, intervals, floor and ceiling on a sample of rows. Position 0 of every dialogue, the
attention sink, is never a row, nor is a token whose norm is out of proportion (`litgpt.cka.ordinary_rows`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml

from litgpt.chat import Span
from litgpt.cka import OUTLIER_FACTOR
from litgpt.ckaeval import SITES, Comparison, Found, Site
from litgpt.ckapage import cka_page, draw_film, draw_site
from litgpt.data import PackedLoader, read_records
from litgpt.model import GPT
from litgpt.stored import Stored, load_stored
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, atomic_file, parse_device, parse_dtype, progress, run_cli, sha256_file

SpanName = Literal["prompt", "thought", "answer", "all"]
RUNS = Path("out")
PARTIAL = "cka.partial.pt"
SAVE_SECONDS = 120.0


def main(
    checkpoint_a: Path | None = None,
    checkpoint_b: Path | None = None,
    checkpoint_c: Path | None = None,
    series: list[Path] = [],  # noqa: B006
    data: Path | None = None,
    out_dir: Path | None = None,
    spans: list[SpanName] = ["all"],  # noqa: B006
    layers: str = "all",
    sites: list[Site] = ["block"],  # noqa: B006
    experts: bool = False,
    keep_first: bool = False,
    outlier_factor: float = OUTLIER_FACTOR,
    max_records: int = 256,
    max_tokens: int | None = None,
    max_seq_length: int = 1024,
    micro_batch_size: int = 4,
    map_rows: int = 2048,
    dtype: str = "float32",
    device: str = "auto",
    seed: int = 1337,
) -> None:
    """Compare checkpoints layer by layer with unbiased CKA; without arguments, the last run with its base.

    Widths, depths and dense or MoE may differ; the tokenizers may differ in the thought tags only. Interrupted, the
    same command goes on where it was.

    Args:
        checkpoint_a: lit or Hugging Face dir of the reference; default: the dense base that the last run names.
        checkpoint_b: dir to compare with it; default: `final/` of the last run in `out/`.
        checkpoint_c: a third, the teacher: it is compared with both others on the same tokens.
        series: further checkpoints, each compared with checkpoint_a: the film strip of a training, in this order.
        data: dialogues as JSON lines that all read; default: the last run's validation set.
        out_dir: where cka.json, cka*.png and cka.html go; default: `report/` beside the last run's `final/`, else
            `out/cka`.
        spans: which tokens are rows: prompt, thought, answer or all of them.
        layers: all (the corresponding layers and the map of every layer with every layer), diag (no map), or layers of
            checkpoint_a like 0,13,27.
        sites: representations: the residual stream after a block, what attention adds, what the MLP or MoE adds.
        experts: also what each expert makes of all tokens against the FFN of checkpoint_a.
        keep_first: position 0 of each dialogue is a row, too.
        outlier_factor: tokens of more than so many times their dialogue's median norm are no rows; inf keeps them.
        max_records: dialogues read, from the file's beginning.
        max_tokens: stop after the batch that reaches so many rows.
        max_seq_length: tokens in a packed row; longer dialogues are left out and counted.
        micro_batch_size: packed rows read at a time.
        map_rows: tokens in the seeded sample behind map and intervals.
        dtype: weights' dtype while reading: float32, bfloat16 or float64.
        device: cpu, cuda or auto.
        seed: of the sample.
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
    named = {"a": checkpoint_a, "b": checkpoint_b} | ({"c": checkpoint_c} if checkpoint_c else {})
    stored = {directory: Stored(directory) for directory in (*named.values(), *series)}  # refuses early
    chosen = _chosen_layers(layers, stored[checkpoint_a].config.n_layer)
    if not sites or not spans or map_rows < 0 or (max_tokens is not None and max_tokens < 1) or outlier_factor <= 1:
        raise UserError("expected at least one of sites and spans, map_rows >= 0, max_tokens >= 1, outlier_factor > 1")
    max_seq_length = min(max_seq_length, *(each.config.block_size for each in stored.values()))

    hashed = dict.fromkeys([*(file for each in stored.values() for file in each.files), data])
    settings: dict[str, Any] = {
        "checkpoint_a": str(checkpoint_a),
        "checkpoint_b": str(checkpoint_b),
        "checkpoint_c": str(checkpoint_c) if checkpoint_c else None,
        "series": [str(directory) for directory in series],
        "data": str(data),
        "sha256": {str(path): sha256_file(path) for path in progress(list(hashed), "hashing", unit="file")},
        "spans": list(spans),
        "layers": layers,
        "sites": list(sites),
        "experts": experts,
        "keep_first": keep_first,
        "outlier_factor": outlier_factor if np.isfinite(outlier_factor) else "inf",
        "max_records": max_records,
        "max_tokens": max_tokens,
        "max_seq_length": max_seq_length,
        "micro_batch_size": micro_batch_size,
        "map_rows": map_rows,
        "dtype": dtype,
        "device": str(parse_device(device)),
        "seed": seed,
        "estimator": "unbiased linear CKA (HSIC1), exact over all rows, never clamped",
    }
    reading = Reading(
        data, spans=_spans(spans), sites=sites, layers=chosen, experts=experts, drop_first=not keep_first,
        outlier_factor=outlier_factor, max_records=max_records, max_tokens=max_tokens, max_seq_length=max_seq_length,
        micro_batch_size=micro_batch_size, map_rows=map_rows, seed=seed,
    )  # fmt: skip
    out_dir.mkdir(parents=True, exist_ok=True)
    models = {name: _load(directory, dtype, device) for name, directory in named.items()}
    tokenizer = shared_tokenizer(named, models)
    versus = [("a", "b"), *([("c", "b"), ("a", "c")] if checkpoint_c else [])]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    print("\n".join(f"{name}: {directory}" for name, directory in named.items()))
    comparison = reading.compare(models, versus, tokenizer, partial=out_dir / PARTIAL, key=key)
    print(f"on {reading.n_records} dialogues of {data}, spans {', '.join(spans)}")
    found = comparison.found()
    _print_table(found, comparison)

    result = _result(comparison, found, settings | {"records": reading.n_records}, with_maps=layers == "all")
    if series:
        model_a = models["a"]
        del models, comparison
        result["series"] = [_frame(directory, model_a, checkpoint_a, reading, dtype, device) for directory in series]
        _print_series(result["series"])
    write(out_dir, result)
    (out_dir / PARTIAL).unlink(missing_ok=True)


@dataclasses.dataclass
class Reading:
    """What is read of the data, and which rows count; see `main`."""

    data: Path
    spans: set[Span]
    sites: Sequence[Site] = ("block",)
    layers: Sequence[int] | None = None
    experts: bool = False
    drop_first: bool = True
    outlier_factor: float = OUTLIER_FACTOR
    max_records: int = 256
    max_tokens: int | None = None
    max_seq_length: int = 1024
    micro_batch_size: int = 4
    map_rows: int = 2048
    seed: int = 1337
    n_records: int = 0

    def compare(
        self,
        models: dict[str, GPT],
        versus: list[tuple[str, str]],
        tokenizer: Tokenizer,
        *,
        partial: Path | None = None,
        key: str = "",
    ) -> Comparison:
        """Read all batches with the models.

        Args:
            models, versus: as of `Comparison`.
            tokenizer: see `shared_tokenizer`.
            partial: where to store what was seen, now and then, and to go on from if it is of the same `key`.
            key: of the settings.

        Raises:
            UserError: no dialogue that fits; hidden states that are not finite.
        """
        loader = PackedLoader(
            read_records(self.data)[: self.max_records],
            tokenizer,
            max_seq_length=self.max_seq_length,
            micro_batch_size=self.micro_batch_size,
            seed=self.seed,
            shuffle=False,
        )
        loader.say_dropped("of the given")
        self.n_records = len(loader.records)
        comparison = Comparison(
            models,
            versus,
            sites=self.sites,
            layers=self.layers,
            experts=self.experts,
            keep_spans=self.spans,
            drop_first=self.drop_first,
            outlier_factor=self.outlier_factor,
            sample_rows=self.map_rows,
            seed=self.seed,
        )
        if partial is not None:
            _resume(comparison, partial, key)
        seen, saved = comparison.batches, time.monotonic()
        for number, batch in enumerate(progress(loader, "reading", total=len(loader), unit="batch")):
            if number < seen:
                continue
            if self.max_tokens is not None and comparison.rows >= self.max_tokens:
                break
            comparison.update(batch)
            if partial is not None and time.monotonic() - saved > SAVE_SECONDS:
                with atomic_file(partial) as path:
                    torch.save({"key": key, "state": comparison.state()}, path)
                saved = time.monotonic()
        return comparison


def _resume(comparison: Comparison, partial: Path, key: str) -> None:
    """Go on from what an interrupted command of the same settings left, if it is whole."""
    if not partial.is_file():
        return
    try:
        stored = torch.load(partial, map_location=comparison.device, weights_only=True)
        if stored["key"] != key:
            return
        comparison.resume(stored["state"])
    except Exception:
        print(f"{partial} is broken and not used")
        return
    print(f"going on after {comparison.batches} batches, {comparison.rows} tokens")


def _load(directory: Path, dtype: str, device: str) -> GPT:
    return load_stored(directory, parse_dtype(dtype), parse_device(device))


def _spans(names: Sequence[SpanName]) -> set[Span]:
    if "all" in names:
        return {Span.PROMPT, Span.THOUGHT, Span.ANSWER}
    return {Span[name.upper()] for name in names}


def _chosen_layers(layers: str, n_layer: int) -> list[int] | None:
    if layers in ("all", "diag"):
        return None
    numbers = [part.strip() for part in layers.strip("[]").split(",")]
    if not all(number.isdecimal() and int(number) < n_layer for number in numbers):
        raise UserError(f"layers is {layers!r}, expected all, diag or numbers below {n_layer} like 0,2")
    return sorted({int(number) for number in numbers})


def shared_tokenizer(directories: dict[str, Path], models: dict[str, GPT]) -> Tokenizer:
    """The tokenizer by which all models read the same ids, thought tags included if one of them has these.

    A dense base or a teacher has no row of its own for the thought tags, only unused padding. It is lent another's rows
    where both are equally wide, in memory, so that an upcycled checkpoint equals its base on the thought as well; else
    it reads its own `<think>` tags there, or, without such, its mean row.

    Raises:
        UserError: the vocabularies differ in anything but the thought tags.
    """
    tokenizers = {name: Tokenizer(directory) for name, directory in directories.items()}
    own = {name: set(tokenizer.thought_ids or ()) for name, tokenizer in tokenizers.items()}
    lender = next((name for name, ids in own.items() if ids), None)
    (first, a), *others = tokenizers.items()
    for name, b in others:
        tags = own[first] | own[name]
        known = min(a.vocab_size, b.vocab_size)
        differ = [i for i in range(known) if i not in tags and a.token_bytes(i) != b.token_bytes(i)]
        beyond = {i for t in (a, b) for i in range(known, t.vocab_size) if i not in tags}
        # Tags of their own on both sides must be the same ones.
        if differ or beyond or (own[first] and own[name] and own[first] != own[name]):
            example = differ[0] if differ else min(beyond or tags)
            raise UserError(
                f"{directories[first]} and {directories[name]} have different vocabularies (id {example}): "
                "CKA needs the same tokens"
            )
    if lender is None:
        return a
    thought_ids = sorted(own[lender])
    for name, ids in own.items():
        if not ids:
            _lend(models[lender], models[name], tokenizers[name], thought_ids, str(directories[name]))
    return tokenizers[lender]


@torch.no_grad()
def _lend(lender: GPT, borrower: GPT, tokenizer: Tokenizer, rows: list[int], directory: str) -> None:
    theirs, mine = lender.transformer.wte.weight, borrower.transformer.wte.weight
    if len(mine) <= rows[-1]:
        raise UserError(f"{directory} has {len(mine)} vocabulary rows, none for the thought tag {rows[-1]}")
    lent = torch.tensor(rows, device=mine.device)
    if mine.shape[1] == theirs.shape[1]:
        mine[lent] = theirs[lent.to(theirs.device)].to(mine)
    elif tokenizer.think_ids is not None:
        mine[lent] = mine[torch.tensor(tokenizer.think_ids, device=mine.device)]
    else:
        mine[lent] = mine[: tokenizer.vocab_size].float().mean(0).to(mine)


def _frame(
    directory: Path, model_a: GPT, checkpoint_a: Path, reading: Reading, dtype: str, device: str
) -> dict[str, Any]:
    """One picture of the film strip."""
    models = {"a": model_a, "b": _load(directory, dtype, device)}
    tokenizer = shared_tokenizer({"a": checkpoint_a, "b": directory}, models)
    one = dataclasses.replace(reading, sites=("block",), experts=False, map_rows=min(reading.map_rows, 512))
    found = one.compare(models, [("a", "b")], tokenizer).found()
    return {"checkpoint": str(directory), "layers": [each.plain() for each in found]}


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


def _result(
    comparison: Comparison, found: Sequence[Found], settings: dict[str, Any], *, with_maps: bool
) -> dict[str, Any]:
    """What cka.json holds; the residual streams of a and b come first, as `layers` and `map`."""
    comparisons = []
    for a, b in comparison.versus:
        for site in comparison.sites:
            of_site = [each for each in found if (each.pair.a, each.pair.b, each.pair.place_a.site) == (a, b, site)]
            plain = [each.plain() for each in of_site if each.pair.place_b.expert < 0]
            entry: dict[str, Any] = {"a": a, "b": b, "site": site, "layers": plain}
            values = [layer["cka"] for layer in plain if layer["cka"] is not None]
            entry["mean"] = float(np.mean(values)) if values else None
            if with_maps:
                cells = comparison.map(a, b, site)
                entry["map"] = [[float(x) if np.isfinite(x) else None for x in row] for row in cells]
            comparisons.append(entry)
        if experts := [each.plain() for each in found if each.pair.a == a and each.pair.b == b
                       and each.pair.place_b.expert >= 0]:  # fmt: skip
            comparisons.append({"a": a, "b": b, "site": "expert", "layers": experts})
    first = comparisons[0]
    _, sequences_N = comparison.sample(comparison.versus[0][0], comparison.sites[0])
    return {
        "settings": settings,
        "layers": first["layers"],
        "mean": first["mean"],
        "map": first.get("map"),
        "rows": comparison.rows,
        "dropped_first": comparison.dropped.first,
        "dropped_outliers": comparison.dropped.outliers,
        "map_rows": len(sequences_N),
        "map_sequences": len(sequences_N.unique()),
        "comparisons": comparisons,
    }


def write(out_dir: Path, result: dict[str, Any]) -> None:
    """cka.json, a picture of every comparison, and the page that holds them."""
    settings = result["settings"]
    names = {name: settings[f"checkpoint_{name}"] for name in "abc" if settings[f"checkpoint_{name}"]}
    with atomic_file(out_dir / "cka.json") as path:
        path.write_text(json.dumps(result, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
    pictures = []
    for number, entry in enumerate(result["comparisons"]):
        kind = f"_{entry['a']}_{entry['b']}_{entry['site']}" if number else ""
        with atomic_file(out_dir / f"cka{kind}.png") as path:
            draw_site(entry, names, result, path)
        pictures.append(out_dir / f"cka{kind}.png")
    film = None
    if result.get("series"):
        film = out_dir / "cka_series.png"
        with atomic_file(film) as path:
            draw_film(result["series"], names["a"], path)
    with atomic_file(out_dir / "cka.html") as path:
        path.write_text(cka_page(result, names, pictures, film), encoding="utf-8")
    written = [out_dir / "cka.json", *pictures, *([film] if film else []), out_dir / "cka.html"]
    print("written: " + ", ".join(map(str, written)))


def _print_table(found: Sequence[Found], comparison: Comparison) -> None:
    for a, b in comparison.versus:
        for site in SITES:
            rows = [
                each for each in found
                if (each.pair.a, each.pair.b, each.pair.place_a.site) == (a, b, site) and each.pair.place_b.expert < 0
            ]  # fmt: skip
            if not rows:
                continue
            print(f"\n{a} and {b}, {site}")
            print(
                f"{'layer ' + a:>7} {'layer ' + b:>7} {'CKA':>8} {'95 % interval':>17} {'floor':>7} {'rel. L2':>8} "
                f"{'cosine':>7} {'Procrustes':>10}"
            )
            for each in rows:
                plain = each.plain()
                low, high = (_number(plain.get(key)) for key in ("low", "high"))
                print(
                    f"{plain['a']:>7} {plain['b']:>7} {each.cka:>8.4f} {low + ' – ' + high:>17} "
                    f"{_number(plain.get('floor')):>7} {_number(plain['relative_l2']):>8} "
                    f"{_number(plain['cosine']):>7} {_number(plain['procrustes']):>10}"
                )
    print(
        f"{comparison.rows} tokens; {comparison.dropped.first} first tokens and {comparison.dropped.outliers} of an "
        "outlying norm left out"
    )


def _print_series(series: Sequence[dict[str, Any]]) -> None:
    for frame in series:
        print(f"{frame['checkpoint']}: " + " ".join(_number(layer["cka"]) for layer in frame["layers"]))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    run_cli(main)
