"""Where a mixture of experts sends its tokens: `python scripts/inspect_routing.py [--checkpoint_dir D --data F.jsonl]`.

Writes routing.json (all numbers, every setting, hashes), heatmaps as PNG, and routing.html that holds them all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from advisory.knowledge import KNOWLEDGE_DIR, load_knowledge
from eval_cka import inputs_of, last_run
from litgpt.checkpoint import load_model, require_lit_dir
from litgpt.config import Config
from litgpt.data import PackedLoader, read_records
from litgpt.expertweights import ExpertCosines, expert_cosines
from litgpt.model import GPT
from litgpt.routing import Choices, RouterStats, routing_change
from litgpt.routingmaps import RoutingMap, RoutingMaps
from litgpt.routingpage import routing_page
from litgpt.routingplots import heatmaps
from litgpt.stored import Stored
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, atomic_file, parse_device, parse_dtype, progress, run_cli, sha256_file


def main(
    checkpoint_dir: Path | None = None,
    data: Path | None = None,
    base: Path | None = None,
    first: Path | None = None,
    out_dir: Path | None = None,
    max_records: int = 512,
    max_seq_length: int = 1024,
    micro_batch_size: int = 4,
    dtype: str = "float32",
    device: str = "auto",
) -> None:
    """Show the routing of a mixture of experts on any dialogues or texts; without arguments, of the last run.

    Args:
        checkpoint_dir: lit dir of the mixture; default: final/ of the last run in out/.
        data: JSON lines of dialogues or texts; default: the last run's validation set. Maps by crop and by kind of
            problem need a meta that names them.
        base: lit or Hugging Face dir of the dense model it was made of, for cosines; default: the last run's.
        first: lit dir of an earlier moment, e.g. the fresh mixture: how many tokens go elsewhere since. Default: the
            last run's student.
        out_dir: where the files go; default: routing/ beside the checkpoint.
        max_records: records read, from the file's beginning.
        max_seq_length: tokens in a packed row; longer records are left out and counted.
        micro_batch_size: packed rows read at a time, a batch of MaxVio.
        dtype: weights' dtype while reading: float32, bfloat16 or float64.
        device: cpu, cuda or auto.
    """
    if checkpoint_dir is None or data is None:
        last = last_run()
        print(f"taking what is not named from the last run, {last}")
        inputs = inputs_of(last)
        data = data or inputs["data"]
        if checkpoint_dir is None:
            checkpoint_dir, base, first = inputs["b"], base or inputs["a"], first or inputs["student"]
    out_dir = out_dir or require_lit_dir(checkpoint_dir).parent / "routing"
    config = Config.from_checkpoint(require_lit_dir(checkpoint_dir))
    if not config.is_moe:
        raise UserError(f"{checkpoint_dir} ({config.name}) is dense: there is no routing to see")
    tokenizer = Tokenizer(checkpoint_dir)
    loader = PackedLoader(
        read_records(data, texts=True)[:max_records],
        tokenizer,
        max_seq_length=min(max_seq_length, config.block_size),
        micro_batch_size=micro_batch_size,
        shuffle=False,
    )
    loader.say_dropped("of the given")
    torch_device = parse_device(device)
    model = load_model(checkpoint_dir, dtype=parse_dtype(dtype), device=torch_device)
    stats, choices, maps = read(model, loader, RoutingMaps(loader.records, loader.documents, tokenizer))
    del model
    changed = {}
    if first is not None:
        if Tokenizer(first).vocab_size != tokenizer.vocab_size:
            raise UserError(f"{first} has another vocabulary than {checkpoint_dir}: routing needs the same tokens")
        model = load_model(first, dtype=parse_dtype(dtype), device=torch_device)
        _, then, _ = read(model, loader, None, what="reading as at first")
        del model
        try:
            changed = routing_change(then.result(), choices.result())
        except ValueError as error:
            raise UserError(f"{first} and {checkpoint_dir} cannot be compared: {error}") from None
    cosines = expert_cosines(Stored(checkpoint_dir), None if base is None else Stored(base))

    labels = labels_of(maps)
    layers = [
        layer_numbers(result, cosine, changed.get(result.layer), maps, row)
        for row, (result, cosine) in enumerate(zip(stats.results(), cosines, strict=True))
    ]
    result = {
        "settings": {
            "checkpoint_dir": str(checkpoint_dir),
            "data": str(data),
            "base": None if base is None else str(base),
            "first": None if first is None else str(first),
            "records": len(loader.records),
            "records_too_long": len(loader.dropped),
            "max_seq_length": max_seq_length,
            "micro_batch_size": micro_batch_size,
            "dtype": dtype,
            "device": str(torch_device),
            "n_expert": config.n_expert,
            "n_expert_per_token": config.n_expert_per_token,
            "sha256": {str(path): sha256_file(path) for path in (checkpoint_dir / "lit_model.pth", data)},
        },
        "tokens": int(stats.sums_LX[0, -1]),
        "layers": layers,
        "maps": {name: map_numbers(found, labels[name], maps.chance_bits(name)) for name, found in maps.maps.items()},
        "missing": maps.missing,
    }
    pictures = draw(out_dir, stats, cosines, maps, labels)
    with atomic_file(out_dir / "routing.json") as path:
        path.write_text(json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_file(out_dir / "routing.html") as path:
        path.write_text(routing_page(result, pictures), encoding="utf-8")
    print(table(layers))
    for name, found in maps.maps.items():
        bits = sum(found.bits(row) for row in range(len(found.layers))) / len(found.layers)
        print(f"{name}: {bits:.4f} bits a layer (by chance {maps.chance_bits(name):.4f})")
    if maps.missing:
        print(f"no map by {', '.join(maps.missing)}: the data does not say")
    print(f"written: {out_dir / 'routing.html'}, routing.json and {len(pictures)} pictures")


@torch.inference_mode()
def read(
    model: GPT, loader: PackedLoader, maps: RoutingMaps | None, *, what: str = "reading"
) -> tuple[RouterStats, Choices, Any]:
    """Run the model over the data; routing of tokens that are no padding."""
    stats, choices = RouterStats(), Choices(most=1 << 20)
    device = model.transformer.wte.weight.device
    for batch in progress(loader, what, total=len(loader), unit="batch"):
        moved = batch.to(device)
        output = model(moved.ids_BT, documents_BT=moved.documents_BT, return_logits=False)
        keep_N = (moved.documents_BT >= 0).flatten()
        stats.update(output.routing, keep_N)
        choices.update(output.routing, keep_N)
        if maps is not None:
            maps.update(output.routing, batch)
    return stats, choices, maps


def labels_of(maps: RoutingMaps) -> dict[str, list[str]]:
    """Names of the groups as people read them: crops in Hindi, too."""
    labels = {name: list(found.groups) for name, found in maps.maps.items()}
    knowledge = Path(__file__).resolve().parent.parent / KNOWLEDGE_DIR
    if "crop" in labels and knowledge.is_dir():
        crops = load_knowledge(knowledge).crops
        labels["crop"] = [f"{crops[c].name_hi} ({c})" if c in crops else c for c in labels["crop"]]
    return labels


def layer_numbers(result: Any, cosine: ExpertCosines, change: Any, maps: RoutingMaps, row: int) -> dict[str, Any]:
    """Everything about one layer, plain."""
    base = cosine.base_E
    return {
        "layer": result.layer,
        "load": list(result.share_E),
        "max_vio": result.max_vio,
        "max_vio_batch": result.max_vio_batch,
        "entropy": result.entropy,
        "entropy_of_mean": result.entropy_of_mean,
        "dead": result.idle,
        "cold": result.cold,
        "top1_weight": result.top1_weight,
        "z": result.z,
        "together": [list(row) for row in result.together_EE],
        "expert_cosine": cosine.mean,
        "expert_cosines": cosine.expert_EE,
        "base_cosine": None if base is None else sum(base) / len(base),
        "base_cosines": base,
        "changed": None if change is None else change.any,
        "changed_top1": None if change is None else change.top1,
        "crop_bits": maps.maps["crop"].bits(row) if "crop" in maps.maps else None,
    }


def map_numbers(found: RoutingMap, labels: Sequence[str], chance: float) -> dict[str, Any]:
    """One map, plain."""
    assert found.counts_LGE is not None and found.first_LGE is not None
    return {
        "groups": list(found.groups),
        "labels": list(labels),
        "layers": list(found.layers),
        "tokens": found.tokens(),
        "bits": [found.bits(row) for row in range(len(found.layers))],
        "chance_bits": chance,
        "counts": found.counts_LGE.long().tolist(),
        "first": found.first_LGE.long().tolist(),
    }


def draw(
    out_dir: Path,
    stats: RouterStats,
    cosines: Sequence[ExpertCosines],
    maps: RoutingMaps,
    labels: Mapping[str, Sequence[str]],
) -> list[tuple[str, str, Path]]:
    """All heatmaps; heading, explanation and path of each."""
    out_dir.mkdir(parents=True, exist_ok=True)
    results = stats.results()
    experts = [str(e) for e in range(stats.n_expert)]
    pictures = []

    def add(name: str, heading: str, text: str, *arguments: Any, **more: Any) -> None:
        path = out_dir / f"{name}.png"
        heatmaps(path, heading, *arguments, **more)
        pictures.append((heading, text, path))

    load = [("share of the choices", [r.share_E for r in results])]
    add(
        "load",
        "load",
        "Each expert's share of a layer's choices.",
        load,
        [f"layer {r.layer}" for r in results],
        experts,
    )
    for name, found in maps.maps.items():
        panels = [(f"layer {i}, {found.bits(row):.3f} bits", found.share(row)) for row, i in enumerate(found.layers)]
        text = "Of each group's choices, the part that goes to each expert. Equal rows: no group is told apart."
        add(f"map_{name}", f"{name} × expert", text, panels, labels[name], experts)
    if stats.n_expert > 1:
        together = [(f"layer {r.layer}", r.together_EE) for r in results]
        add("together", "chosen together", "Share of the tokens that chose both experts.", together, experts, experts)
        weights = [(f"layer {c.layer}", c.expert_EE) for c in cosines]
        text = "Cosine of two experts' weights: 1 for copies."
        add("cosines", "experts' weights", text, weights, experts, experts, limits=cosine_limits(cosines))
    return pictures


def cosine_limits(cosines: Sequence[ExpertCosines]) -> tuple[float, float]:
    """A scale from the smallest cosine to 1, and never finer than 0.01."""
    return min(0.99, *(value for cosine in cosines for row in cosine.expert_EE for value in row)), 1.0


def table(layers: Sequence[Mapping[str, Any]]) -> str:
    """The main numbers for a terminal."""
    names = ["max_vio", "max_vio_batch", "entropy", "entropy_of_mean", "dead", "cold", "top1_weight", "z"]
    names += ["expert_cosine", "base_cosine", "changed"]
    shown = [name for name in names if any(layer[name] is not None for layer in layers)]
    lines = ["layer  " + "  ".join(f"{name:>15}" for name in shown)]
    for layer in layers:
        cells = [f"{'–' if (value := layer[name]) is None else format(value, '.4g'):>15}" for name in shown]
        lines.append(f"{layer['layer']:>5}  " + "  ".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
