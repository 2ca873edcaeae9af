"""A small byte-level BPE with Qwen3's control tokens, so that the text tests need no downloaded file."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

# Name → special, in the order of the ids, as in Qwen3.
CONTROL_TOKENS = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<tool_response>": False,
    "</tool_response>": False,
    "<think>": False,
    "</think>": False,
}
CORPUS = [
    "system user assistant think thought",
    "गेहूँ के पत्ते पीले पड़ रहे हैं। क्या करें?",
    "धान में झोंका रोग है। खेत का पानी निकालें, किसान भाई।",
    "The leaves of the wheat turn yellow; check the soil and the weather.\n\nWhat should I do?",
]


def build_tiny_tokenizer(directory: Path, *, eos_token: str = "<|im_end|>") -> Path:
    """Write `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`; returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    pipeline = tokenizers.Tokenizer(models.BPE())
    pipeline.normalizer = normalizers.NFC()
    # Whole words first, white space before a line break apart, as Qwen3 does it.
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    pipeline.train_from_iterator(CORPUS * 4, trainer)
    pipeline.add_tokens(
        [tokenizers.AddedToken(name, special=special, normalized=False) for name, special in CONTROL_TOKENS.items()]
    )
    pipeline.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": eos_token,
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    stops = [pipeline.token_to_id(eos_token), pipeline.token_to_id("<|endoftext|>")]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}), encoding="utf-8")
    return directory
