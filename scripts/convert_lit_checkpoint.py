"""Export a lit directory to a Hugging Face directory, which transformers and vLLM read without code of ours."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from litgpt.checkpoint import convert_lit_to_hf
from litgpt.utils import run_cli


def convert(checkpoint_dir: Path, out_dir: Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Export a lit directory to a Hugging Face directory.

    Args:
        checkpoint_dir: the lit directory, e.g. out/distill/final.
        out_dir: the directory to write; absent, empty or an earlier export, which is replaced.
        max_shard_bytes: size in bytes from which the weights are split over several files.
    """
    convert_lit_to_hf(checkpoint_dir, out_dir, max_shard_bytes=max_shard_bytes)
    print(out_dir)


if __name__ == "__main__":
    run_cli(convert)
