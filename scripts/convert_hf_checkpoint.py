"""Convert a Hugging Face directory to a lit directory, in place and without holding the model in memory."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from litgpt.checkpoint import LIT_FILE, convert_hf_to_lit
from litgpt.utils import parse_dtype, run_cli


def convert(
    checkpoint_dir: Path, *, model_name: str | None = None, dtype: str | None = None, block_size: int | None = None
) -> None:
    """Convert a Hugging Face directory to a lit directory.

    Writes lit_model.pth, model_config.yaml and provenance.yaml beside the files that are there.

    Args:
        checkpoint_dir: config.json, tokenizer files and safetensors, e.g. checkpoints/Qwen/Qwen3-0.6B.
        model_name: name in model_config.yaml; the directory's name by default.
        dtype: float32, bfloat16 or float16 to cast every weight; as stored by default.
        block_size: positions the model shall handle; as in config.json by default.
    """
    convert_hf_to_lit(
        checkpoint_dir, name=model_name, dtype=parse_dtype(dtype) if dtype else None, block_size=block_size
    )
    print(checkpoint_dir / LIT_FILE)


if __name__ == "__main__":
    run_cli(convert)
