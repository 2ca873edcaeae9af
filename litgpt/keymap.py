"""One table for four spellings of the same weights: lit disk, memory, Hugging Face per expert, Hugging Face fused.

A *block* is the largest piece that no spelling cuts: Q is one, K and V are others, so are the gate and the up
projection of one expert. Each spelling says which tensor holds the block; blocks that name the same tensor are stacked
on each other as rows, in the table's order. Translation in any direction is then moving rows, and the map is a
bijection because every spelling is a partition of its tensors into the same blocks.

Shape letters: V padded vocabulary, D model width, Q query rows (heads × head size), G key or value rows (groups × head
size), H head size, F dense FFN width, M expert width, S width of the shared expert, E experts. In a name `{i}` is the
layer, `{e}` the expert, and `[{e}]` the index into a stack of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from litgpt.config import Config

Naming = Literal["lit", "memory", "hf", "hf_fused"]


@dataclass(frozen=True)
class Block:
    """One row of the table; `None` means "as in the column before it" (memory ← lit, fused ← hf, mixtral ← hf)."""

    shape: str
    lit: str
    hf: str
    memory: str | None = None
    hf_fused: str | None = None
    mixtral: str | None = None
    when: Literal["always", "attn_bias", "norm_qk", "dense", "moe", "shared"] = "always"


_LIT = "transformer.h.{i}."
_HF = "model.layers.{i}."

BLOCKS: dict[str, Block] = {
    "head": Block("VD", "lm_head.weight", "lm_head.weight"),
    "embed": Block("VD", "transformer.wte.weight", "model.embed_tokens.weight"),
    "norm_1": Block("D", _LIT + "norm_1.weight", _HF + "input_layernorm.weight"),
    "q": Block("QD", _LIT + "attn.qkv.weight", _HF + "self_attn.q_proj.weight"),
    "k": Block("GD", _LIT + "attn.qkv.weight", _HF + "self_attn.k_proj.weight"),
    "v": Block("GD", _LIT + "attn.qkv.weight", _HF + "self_attn.v_proj.weight"),
    "q_bias": Block("Q", _LIT + "attn.qkv.bias", _HF + "self_attn.q_proj.bias", when="attn_bias"),
    "k_bias": Block("G", _LIT + "attn.qkv.bias", _HF + "self_attn.k_proj.bias", when="attn_bias"),
    "v_bias": Block("G", _LIT + "attn.qkv.bias", _HF + "self_attn.v_proj.bias", when="attn_bias"),
    "o": Block("DQ", _LIT + "attn.proj.weight", _HF + "self_attn.o_proj.weight"),
    "norm_q": Block("H", _LIT + "attn.norm_q.weight", _HF + "self_attn.q_norm.weight", when="norm_qk"),
    "norm_k": Block("H", _LIT + "attn.norm_k.weight", _HF + "self_attn.k_norm.weight", when="norm_qk"),
    "norm_2": Block("D", _LIT + "norm_2.weight", _HF + "post_attention_layernorm.weight"),
    "gate": Block("FD", _LIT + "mlp.fc_1.weight", _HF + "mlp.gate_proj.weight", when="dense"),
    "up": Block("FD", _LIT + "mlp.fc_2.weight", _HF + "mlp.up_proj.weight", when="dense"),
    "down": Block("DF", _LIT + "mlp.proj.weight", _HF + "mlp.down_proj.weight", when="dense"),
    "router": Block(
        "ED",
        _LIT + "mlp.gate.weight",
        _HF + "mlp.gate.weight",
        mixtral=_HF + "block_sparse_moe.gate.weight",
        when="moe",
    ),
    "expert_gate": Block(
        "MD",
        _LIT + "mlp.experts.{e}.fc_1.weight",
        _HF + "mlp.experts.{e}.gate_proj.weight",
        memory=_LIT + "mlp.experts.gate_up_proj[{e}]",
        hf_fused=_HF + "mlp.experts.gate_up_proj[{e}]",
        mixtral=_HF + "block_sparse_moe.experts.{e}.w1.weight",
        when="moe",
    ),
    "expert_up": Block(
        "MD",
        _LIT + "mlp.experts.{e}.fc_2.weight",
        _HF + "mlp.experts.{e}.up_proj.weight",
        memory=_LIT + "mlp.experts.gate_up_proj[{e}]",
        hf_fused=_HF + "mlp.experts.gate_up_proj[{e}]",
        mixtral=_HF + "block_sparse_moe.experts.{e}.w3.weight",
        when="moe",
    ),
    "expert_down": Block(
        "DM",
        _LIT + "mlp.experts.{e}.proj.weight",
        _HF + "mlp.experts.{e}.down_proj.weight",
        memory=_LIT + "mlp.experts.down_proj[{e}]",
        hf_fused=_HF + "mlp.experts.down_proj[{e}]",
        mixtral=_HF + "block_sparse_moe.experts.{e}.w2.weight",
        when="moe",
    ),
    # No Hugging Face family has these: `Config.hf_family` refuses them.
    "shared_gate": Block("SD", _LIT + "mlp.shared_experts.fc_1.weight", "", when="shared"),
    "shared_up": Block("SD", _LIT + "mlp.shared_experts.fc_2.weight", "", when="shared"),
    "shared_down": Block("DS", _LIT + "mlp.shared_experts.proj.weight", "", when="shared"),
    "norm_f": Block("D", "transformer.ln_f.weight", "model.norm.weight"),
}

DERIVED_HF_BUFFERS = ("model.layers.{i}.self_attn.rotary_emb.inv_freq",)
"""Tensors of old checkpoints that follow from config.json and are not read."""

LIT_HEAD, LIT_EMBED = BLOCKS["head"].lit, BLOCKS["embed"].lit
HF_HEAD, HF_EMBED = BLOCKS["head"].hf, BLOCKS["embed"].hf


class BlockId(NamedTuple):
    """Which block: its key in `BLOCKS`, its layer, its expert (-1 where there is none)."""

    key: str
    layer: int = -1
    expert: int = -1


class Rows(NamedTuple):
    """Rows `start:stop` of a tensor with its leading dimensions flattened.

    [E, R, C] has E·R rows; the rows of a vector are its elements.
    """

    tensor: str
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """One spelling of one model: where every block lies, and what every tensor is made of."""

    shapes: dict[str, tuple[int, ...]]
    """tensor name → shape."""
    rows: dict[BlockId, Rows]
    """block → the rows that hold it."""
    parts: dict[str, list[BlockId]]
    """tensor name → its blocks, top to bottom."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.shapes)


def layout(config: Config, naming: Naming, *, tied: bool = False) -> Layout:
    """Lay out a model under one naming.

    Args:
        config: the model; `hf_family` chooses between the Hugging Face columns.
        naming: which column of the table.
        tied: leave `lm_head` out, because it is the embedding.

    Returns:
        the layout, its tensors in the table's order within a layer.

    Raises:
        UserError: a Hugging Face naming, and no family has this structure.
    """
    if naming.startswith("hf"):
        _ = config.hf_family  # raises where there is none
    with_experts = set(config.moe_layers)
    sizes = _sizes(config)
    heights: dict[str, int] = {}
    rows: dict[BlockId, Rows] = {}
    parts: dict[str, list[BlockId]] = {}
    tails: dict[str, tuple[int, ...]] = {}
    stacked: set[str] = set()
    for block_id in _in_file_order(config):
        block = BLOCKS[block_id.key]
        present = {
            "always": True,
            "attn_bias": config.attn_bias,
            "norm_qk": config.norm_qk,
            "dense": block_id.layer not in with_experts,
            "moe": block_id.layer in with_experts,
            "shared": block_id.layer in with_experts and config.n_shared_expert,
        }
        if not present[block.when] or (tied and block_id.key == "head"):
            continue
        shape = tuple(sizes[letter] for letter in block.shape)
        spelling = _spelling(block, naming, config).format(i=block_id.layer, e=block_id.expert)
        name, _, index = spelling.partition("[")
        start = heights.get(name, 0)
        heights[name] = start + shape[0]
        rows[block_id] = Rows(name, start, start + shape[0])
        parts.setdefault(name, []).append(block_id)
        tails[name] = shape[1:]
        if index:
            stacked.add(name)
    shapes = {
        name: (config.n_expert, height // config.n_expert, *tails[name]) if name in stacked else (height, *tails[name])
        for name, height in heights.items()
    }
    return Layout(shapes, rows, parts)


def assemble(target: Layout, name: str, source: Layout, read_rows: Callable[[str, int, int], Tensor]) -> Tensor:
    """One tensor of `target`, from the rows of the tensors in `source` that hold its blocks.

    Args:
        target: the spelling wanted.
        name: a tensor of it.
        source: the spelling at hand.
        read_rows: (source tensor, start, stop) → those rows, leading dimensions flattened.

    Returns:
        the tensor; what `read_rows` gave, reshaped, where one block is all of it, else a new one.
    """
    pieces = [read_rows(*source.rows[block]) for block in target.parts[name]]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).reshape(target.shapes[name])


def flat_rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Rows `start:stop` of a tensor with its leading dimensions flattened; a view where the strides allow."""
    return (tensor.flatten(0, -2) if tensor.dim() > 2 else tensor)[start:stop]


def _sizes(config: Config) -> dict[str, int]:
    return {
        "V": config.padded_vocab_size,
        "D": config.n_embd,
        "Q": config.n_head * config.head_size,
        "G": config.n_query_groups * config.head_size,
        "H": config.head_size,
        "F": config.intermediate_size,
        # As in LitGPT, an expert is as wide as a dense FFN where nothing else is said (Mixtral).
        "M": config.moe_intermediate_size or config.intermediate_size,
        "S": (config.n_shared_expert or 0) * config.expert_size,
        "E": config.n_expert,
    }


def _in_file_order(config: Config) -> Iterator[BlockId]:
    """All block ids as the table stands: layer by layer, and within a layer expert by expert.

    Gate and up of one expert follow each other, which is what stacks them as [E, 2·M, D].
    """
    keys = list(BLOCKS)
    per_layer = [key for key in keys if "{i}" in BLOCKS[key].lit]
    per_expert = [key for key in per_layer if "{e}" in BLOCKS[key].lit]
    first, last = keys.index(per_layer[0]), keys.index(per_layer[-1])
    yield from (BlockId(key) for key in keys[:first])
    for layer in range(config.n_layer):
        yield from (BlockId(key, layer) for key in per_layer if key not in per_expert)
        yield from (BlockId(key, layer, expert) for expert in range(config.n_expert) for key in per_expert)
    yield from (BlockId(key) for key in keys[last + 1 :])


def _spelling(block: Block, naming: Naming, config: Config) -> str:
    # Asked for only where the answer matters: a MoE of Qwen2 has lit names and no Hugging Face family.
    by_family = block.mixtral if naming.startswith("hf") and config.hf_family == "mixtral" else None
    return {
        "lit": block.lit,
        "memory": block.memory or block.lit,
        "hf": by_family or block.hf,
        "hf_fused": block.hf_fused or block.hf,
    }[naming]
