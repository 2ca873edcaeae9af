"""Runs LitGPT 0.5.13 itself: `PYTHONPATH=its_folder python tests/original_litgpt.py ids.pt out.pt DIR...`

It has our package's name, so the two never meet in one process. For each lit directory: load strictly, write the
logits. For a Hugging Face directory: let LitGPT's own converter make `lit_model.pth`.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch


def main(ids_file: str, out_file: str, *directories: str) -> None:
    """Write a list with one dictionary a lit directory: logits [B, T, V] and what its tokenizer makes of a sentence."""
    # By name, so that a type checker does not take ours for it.
    theirs: dict[str, Any] = {
        name: importlib.import_module(f"litgpt.{name}")
        for name in ("config", "model", "scripts.convert_hf_checkpoint", "tokenizer", "utils")
    }
    assert Path(theirs["model"].__file__).parents[1].name == "litgpt-0.5.13"
    idx_BT = torch.load(ids_file)
    results: list[dict[str, Any]] = []
    for directory in map(Path, directories):
        if not (directory / "lit_model.pth").exists():
            # The name decides LitGPT's key map; its sizes are not those of the tiny model, so it is only converted.
            theirs["scripts.convert_hf_checkpoint"].convert_hf_checkpoint(directory, model_name="Qwen3-0.6B")
            results.append({})
            continue
        theirs["utils"].check_valid_checkpoint_dir(directory)
        model = theirs["model"].GPT(theirs["config"].Config.from_checkpoint(directory)).eval()
        state = torch.load(directory / "lit_model.pth", mmap=True, weights_only=True)
        model.load_state_dict(state.get("model", state), strict=True)
        with torch.no_grad():
            logits = model(idx_BT)
        ids = theirs["tokenizer"].Tokenizer(directory).encode("गेहूँ के पत्ते").tolist()
        results.append({"logits": logits, "ids": ids})
    torch.save(results, out_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
