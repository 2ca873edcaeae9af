"""`report/upcycle.md` and `upcycle.json`: what an upcycling made of what, and what its proof showed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt.config import Config
from litgpt.keymap import layout
from litgpt.proof import LayerProof, Proof
from litgpt.utils import atomic_file

REPORT_DIR = "report"


@dataclass(frozen=True)
class Report:
    """What `upcycle` made, or `verify` found."""

    out_dir: Path
    dense: Config
    config: Config
    recipe: dict[str, Any]
    """Name and numbers."""
    thought_ids: tuple[int, int] | None
    proofs: tuple[Proof, ...]
    """By arithmetic; none where only the bits were compared."""
    changed: tuple[str, ...]
    """Stored tensors whose bits are not what the recipe makes."""
    dense_bytes: int
    """Of the dense model's weights on disk."""
    n_bytes: int
    """Of the made model's; equal experts of a lit file are stored once."""
    dense_sha256: dict[str, str]
    sha256: dict[str, str]
    """File name → SHA-256 of its bytes, read back from the disk."""

    @property
    def n_parameters(self) -> int:
        """Of the made model, every expert counted."""
        return count_parameters(self.config)

    @property
    def n_active(self) -> int:
        """Parameters that one token meets: K experts of each layer instead of E."""
        return active_parameters(self.config)

    def plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""

        def side(config: Config, n_bytes: int, sha256: dict[str, str]) -> dict[str, Any]:
            return {
                "name": config.name,
                "parameters": count_parameters(config),
                "active": active_parameters(config),
                "bytes": n_bytes,
                "sha256": sha256,
                "config": config.to_lit_dict() | config.ours(),
            }

        return {
            "recipe": self.recipe,
            "before": side(self.dense, self.dense_bytes, self.dense_sha256),
            "after": side(self.config, self.n_bytes, self.sha256),
            "thought_ids": list(self.thought_ids) if self.thought_ids else None,
            "changed": list(self.changed),
            "proofs": [proof.plain() for proof in self.proofs],
        }


def count_parameters(config: Config) -> int:
    """All parameters; tied ones once."""
    return sum(math.prod(shape) for shape in layout(config, "lit", tied=config.tie_embeddings).shapes.values())


def active_parameters(config: Config) -> int:
    """Those that one token meets."""
    if not config.is_moe:
        return count_parameters(config)
    per_expert = 3 * config.n_embd * config.expert_size
    return count_parameters(config) - len(config.moe_layers) * per_expert * (
        config.n_expert - config.n_expert_per_token
    )


def write_upcycle_report(directory: Path, report: Report) -> None:
    """Write `upcycle.md` and `upcycle.json` into a directory, each whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report.plain(), ensure_ascii=False, indent=2)
    for name, content in (("upcycle.json", text), ("upcycle.md", markdown(report))):
        with atomic_file(directory / name) as temporary:
            temporary.write_text(content + "\n", encoding="utf-8")


def markdown(report: Report) -> str:
    """The report as people read it."""
    numbers = ", ".join(f"{key} {value}" for key, value in report.recipe.items() if key != "recipe")
    recipe = str(report.recipe.get("recipe")) + (f" ({numbers})" if numbers else "")
    sections = [
        f"# {report.config.name}, made of {report.dense.name}",
        f"Recipe: {recipe}. {_verdict(report)}",
        "## Before and after",
        _table(["", "dense", "made"], _sizes(report)),
        _formats(report.config),
        *_function(report),
        "## Files",
        _table(["model", "file", "SHA-256"], _files(report)),
    ]
    if report.changed:
        listed = "\n".join(f"- `{name}`" for name in report.changed)
        sections += ["## Tensors that are not what the recipe makes", listed]
    return "\n\n".join(section for section in sections if section)


def _function(report: Report) -> list[str]:
    """What running both models showed."""
    if not report.proofs:
        return []
    return [
        "## Logits on sample text",
        "Differences of the two models over the dense tokenizer's vocabulary. KL(dense ‖ made) in nats a token.",
        _table(
            ["arithmetic", "tokens", "max abs Δ logit", "KL mean", "KL max", "top-1 equal"],
            [
                [
                    *(p.dtype, str(p.n_tokens), f"{p.max_abs_diff:.1e}", f"{p.kl:.1e}", f"{p.kl_max:.1e}"),
                    f"{p.top1_agreement:.2%}",
                ]
                for p in report.proofs
            ],
        ),
        "## Layer by layer",
        f"Relative error of the residual stream after each block in {report.proofs[0].dtype}, and what the router does "
        "with the sample's tokens. Load is the share of the choices that the idlest and the busiest expert get; "
        "entropy 1 is indifference.",
        _table(["layer", "error", "entropy", "least load", "most load"], [_layer(x) for x in report.proofs[0].layers]),
    ]


def _verdict(report: Report) -> str:
    if report.changed:
        return f"{len(report.changed)} tensors are not what the recipe makes of the dense model: trained, or damaged."
    bits = "Every stored tensor was read back and is, bit for bit, what the recipe makes of the dense model."
    if not report.proofs:
        return f"{bits} Neither model was run."
    decisive = [proof for proof in report.proofs if proof.dtype != "bfloat16"][-1]
    if decisive.exact:
        return f"{bits} Both are one function up to rounding."
    return f"{bits} The recipe changes the function: KL {decisive.kl:.2e} nats, top-1 {decisive.top1_agreement:.1%}."


def _sizes(report: Report) -> list[list[str]]:
    dense, made = report.dense, report.config
    experts = f"{made.n_expert} x {made.expert_size}, {made.n_expert_per_token} a token" if made.is_moe else "none"
    layers = f"{made.n_layer}, {len(made.moe_layers)} with experts" if made.is_moe else str(made.n_layer)
    rows = [
        ["width", str(dense.n_embd), str(made.n_embd)],
        ["layers", str(dense.n_layer), layers],
        ["FFN width", str(dense.intermediate_size), "-" if made.is_moe else str(made.intermediate_size)],
        ["experts", "none", experts + (", and a shared one" if made.n_shared_expert else "")],
        ["parameters", _count(count_parameters(dense)), _count(report.n_parameters)],
        ["active a token", _count(active_parameters(dense)), _count(report.n_active)],
        ["bytes of weights", f"{report.dense_bytes:,}", f"{report.n_bytes:,}"],
    ]
    if made.is_moe and made.dense_layers:
        rows[2][2] = f"{made.intermediate_size} in layers {made.dense_layers}"
    return rows


def _formats(config: Config) -> str:
    """What else can load it, where that is not a matter of course."""
    if not config.is_moe:
        return ""
    if not config.has_hf_family:
        return "No Hugging Face format holds this structure; it trains and runs here and in LitGPT."
    if config.dense_layers:
        return (
            "Some layers are dense: transformers and vLLM read that (`mlp_only_layers`), llama.cpp's qwen3moe does not."
        )
    return ""


def _layer(layer: LayerProof) -> list[str]:
    if layer.entropy is None:
        return [str(layer.layer), f"{layer.error:.1e}", "dense", "", ""]
    return [
        str(layer.layer),
        f"{layer.error:.1e}",
        f"{layer.entropy:.3f}",
        f"{min(layer.load_E):.1%}",
        f"{max(layer.load_E):.1%}",
    ]


def _files(report: Report) -> list[list[str]]:
    sides = (("dense", report.dense_sha256), ("made", report.sha256))
    return [[side, f"`{name}`", f"`{digest}`"] for side, files in sides for name, digest in files.items()]


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.3f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
