"""A whole world of training, tiny and random: dense base, wider teacher, upcycled student, dialogues."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from litgpt.checkpoint import save_lit_dir
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.upcycle import upcycle
from tests.tiny_tokenizer import build_tiny_tokenizer

PADDED_VOCAB = 448


@dataclass(frozen=True)
class World:
    """Paths of lit dirs and dialogues."""

    base: Path
    teacher: Path
    student: Path
    train: Path
    val: Path


def make_world(directory: Path, *, dialogues: int = 12, layers: int = 2) -> World:
    """Build it; a second or two on one core.

    Args:
        directory: where everything goes.
        dialogues: for training; a third as many for validation.
        layers: of base and student.
    """
    tokenizer_dir = build_tiny_tokenizer(directory / "tokenizer")
    base = make_model(directory / "Tiny", tokenizer_dir, n_embd=32, n_layer=layers, seed=1)
    teacher = make_model(directory / "TinyTeacher", tokenizer_dir, n_embd=48, n_layer=layers + 1, seed=2)
    student = upcycle(base, n_expert=4, n_expert_per_token=2, seed=3).out_dir
    train, val = directory / "train.jsonl", directory / "val.jsonl"
    write_dialogues(train, dialogues, prefix="train")
    write_dialogues(val, max(2, dialogues // 3), prefix="val")
    return World(base, teacher, student, train, val)


def make_model(
    directory: Path,
    tokenizer_dir: Path,
    *,
    n_embd: int,
    n_layer: int,
    seed: int,
    padded_vocab_size: int = PADDED_VOCAB,
) -> Path:
    """A dense Qwen3 with random weights as a lit dir."""
    config = Config.from_name(
        "Qwen3-0.6B",
        name=f"Qwen3-{directory.name}",
        hf_config={},
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=4,
        n_query_groups=2,
        head_size=8,
        intermediate_size=2 * n_embd,
        block_size=512,
        vocab_size=padded_vocab_size,
        padded_vocab_size=padded_vocab_size,
    )
    model = GPT(config)
    model.init_weights(std=0.1, generator=torch.Generator().manual_seed(seed))
    save_lit_dir(directory, model.state_dict(), config, source_dir=tokenizer_dir, provenance={})
    return directory


def write_dialogues(path: Path, count: int, *, prefix: str, thought: str = "") -> None:
    """Dialogues of unequal lengths; every third has no thought, every fourth a second round."""
    lines = []
    for i in range(count):
        messages = [
            {"role": "system", "content": "आप खेती के सलाहकार हैं।"},
            {"role": "user", "content": "गेहूँ के पत्ते पीले हैं। " * (1 + i % 3)},
        ]
        if i % 4 == 3:
            messages += [
                {"role": "assistant", "content": "कब से?"},
                {"role": "user", "content": f"{i} दिन से।"},
            ]
        answer = {"role": "assistant", "content": "पानी कम दें। " * (1 + i % 2) + f"{i} दिन बाद देखें।"}
        if i % 3:
            answer["thought"] = thought or f"yellow leaves, day {i}: check water"
        lines.append(json.dumps({"id": f"{prefix}-{i}", "messages": [*messages, answer]}, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
