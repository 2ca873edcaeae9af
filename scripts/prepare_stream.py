"""Render a corpus that does not fit into memory into chunks that training streams: see `litgpt/streaming.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from litgpt.streaming import write_stream
from litgpt.utils import run_cli


def prepare_stream(
    data: Path, tokenizer_dir: Path, out_dir: Path, processes: int = 1, chunk_mb: int = 16, overwrite: bool = False
) -> None:
    """Tokenise dialogues or plain texts into chunks for streaming.

    Args:
        data: JSON lines: dialogues, or plain texts ({"text": ...}).
        tokenizer_dir: lit dir of the student, or any folder with its tokenizer.
        out_dir: folder to write; it appears when it is whole.
        processes: that tokenise; each writes chunks of its own.
        chunk_mb: size of a chunk in MiB.
        overwrite: replace a folder that is there.
    """
    card = write_stream(
        data, tokenizer_dir, out_dir, processes=processes, chunk_bytes=chunk_mb << 20, overwrite=overwrite
    )
    print(f"{out_dir}: {card['documents']} documents, {card['tokens']} tokens, {len(card['chunks'])} chunks")


if __name__ == "__main__":
    run_cli(prepare_stream)
