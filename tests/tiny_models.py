"""Tiny random transformers models of every family, saved as Hugging Face directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor

from tests.tiny_tokenizer import build_tiny_tokenizer

# No two sizes are equal, so that mixed-up dimensions cannot fit; transformers' grouped_mm wants multiples of 4.
_SIZES: dict[str, Any] = {
    "vocab_size": 448,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rope_theta": 1000000.0,
    "eos_token_id": 402,
}
_QWEN3_MOE = {"moe_intermediate_size": 20, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True}
_MIXTRAL = {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "head_dim": 4}),
    "llama": ("llama", {"tie_word_embeddings": False}),
    "mistral": ("mistral", {"tie_word_embeddings": False, "sliding_window": None}),
    "qwen3_moe": ("qwen3_moe", {"tie_word_embeddings": False, **_QWEN3_MOE}),
    "qwen3_moe-tied": ("qwen3_moe", {"tie_word_embeddings": True, **_QWEN3_MOE}),
    "mixtral": ("mixtral", {"tie_word_embeddings": False, **_MIXTRAL}),
}
"""Label → transformers' model type and what differs from the common sizes."""

MOE_FAMILIES = ("qwen3_moe", "qwen3_moe-tied", "mixtral")


def random_model(label: str, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A transformers model with random weights; norms and biases too, so that none may be swapped or lost unseen."""
    model_type, special = FAMILIES[label]
    torch.manual_seed(len(label))
    config = transformers.AutoConfig.for_model(model_type, **(_SIZES | special | overrides))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model.to(dtype)


def build_hf_dir(
    directory: Path, label: str, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "50GB", **overrides: Any
) -> Any:
    """Save a random model and the tiny tokenizer; returns the model."""
    model = random_model(label, dtype=dtype, **overrides)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    build_tiny_tokenizer(directory)
    return model


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor in a directory's safetensors by its name on disk, read with the library."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(path)
    return tensors


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Equal names, dtypes, shapes and bytes."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and torch.equal(left[name].flatten().view(torch.uint8), right[name].flatten().view(torch.uint8))
        for name in left
    )
