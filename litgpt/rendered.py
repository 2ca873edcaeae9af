"""Records rendered by several processes and kept on disk: rendering is the start-up cost of a run.

A cache file is called by a hash of everything that the ids follow from: the bytes of the data file, the tokenizer with
its added tokens, the tags, and the versions of this rendering and of the `tokenizers` library. It is one safetensors
file, written whole and memory-mapped when read. Two processes may race for it: both write the same tensors, and the
later rename wins. A file that is broken is made anew. Nothing ever deletes old ones: the folder may be emptied at will.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from litgpt.data import Document, Record, read_records, render_record, tags_of
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, atomic_file, sha256_file

# To be raised by whoever changes which ids or spans a record gets (`litgpt.chat.render`, `render_record`).
RENDERING_VERSION = 1
# Records in one piece of work, and how many make a process worth the seconds it takes to start.
PIECE, WORTH_A_PROCESS = 256, 4000
MOST_PROCESSES = 8


@dataclass
class RenderSettings:
    """How records become tokens; neither setting changes what comes out."""

    processes: int | None = None
    """Processes that tokenise; by default one for each core (at most 8), fewer for small files."""
    cache: str = "auto"
    """Folder of tokenised files; auto: distilled-qwen3-moe/rendered in the user's cache folder; none: nowhere."""

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise UserError(f"render.processes is {self.processes}: expected at least 1")

    @property
    def folder(self) -> Path | None:
        """Where tokenised files are kept; `None` if they are not."""
        if self.cache == "none":
            return None
        if self.cache != "auto":
            return Path(self.cache)
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(home) / "distilled-qwen3-moe" / "rendered"


@dataclass(frozen=True)
class Flat:
    """Documents end to end.

    Attributes:
        ids_N: token ids of all, int32.
        spans_N: `litgpt.chat.Span` of each, uint8.
        ends_D: where each document ends, int64.
    """

    ids_N: Tensor
    spans_N: Tensor
    ends_D: Tensor

    def documents(self) -> list[Document]:
        """Views, not copies."""
        ends = self.ends_D.tolist()
        pairs = zip([0, *ends[:-1]], ends, strict=True)
        return [Document(self.ids_N[start:end], self.spans_N[start:end]) for start, end in pairs]

    def sha256(self) -> str:
        """Hash of the content."""
        digest = hashlib.sha256()
        for tensor in (self.ends_D, self.ids_N, self.spans_N):
            digest.update(tensor.numpy().data)
        return digest.hexdigest()


def read_rendered(
    path: str | os.PathLike[str], tokenizer: Tokenizer, settings: RenderSettings | None = None, *, texts: bool = False
) -> tuple[list[Record], list[Document]]:
    """Read a file of records and render them, or take them from the cache.

    Args:
        path: JSON lines; see `litgpt.data.read_records`.
        tokenizer: the student's.
        settings: processes and cache.
        texts: lines of plain text are welcome, too.

    Raises:
        UserError: as `read_records`.
    """
    settings = settings or RenderSettings()
    records = read_records(path, texts=texts)
    folder = settings.folder
    if folder is None:
        return records, render_records(records, tokenizer, processes=settings.processes).documents()
    key = _key(Path(path), tokenizer)
    file = folder / f"{key}.safetensors"
    kept = _load(file, key, len(records))
    if kept is None:
        kept = render_records(records, tokenizer, processes=settings.processes)
        try:
            _store(file, key, kept)
        except OSError as error:
            print(f"tokenised {path} is not kept: {error.strerror or error} ({folder})", file=sys.stderr)
    return records, kept.documents()


def render_records(records: Sequence[Record], tokenizer: Tokenizer, *, processes: int | None = None) -> Flat:
    """Render records in order; the same ids whatever the number of processes.

    Args:
        records: dialogues or texts.
        tokenizer: the student's.
        processes: how many; by default as many as are worth their start.
    """
    if processes is None:
        processes = max(1, min(os.cpu_count() or 1, MOST_PROCESSES, len(records) // WORTH_A_PROCESS))
    if processes == 1:
        return _join([_render(records, tokenizer)])
    pieces = [records[start : start + PIECE] for start in range(0, len(records), PIECE)]
    # Spawned: a fork would carry over the threads of torch and of the tokenizer in whatever state they are.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _keep_tokenizer, (tokenizer,))
    with pool:
        return _join(pool.map(_render_piece, pieces))


_tokenizer: Tokenizer | None = None


def _keep_tokenizer(tokenizer: Tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    torch.set_num_threads(1)


# Arrays travel between processes as plain bytes: tensors would take a shared file each.
_Piece = tuple[bytes, bytes, list[int]]


def _render_piece(records: Sequence[Record]) -> _Piece:
    assert _tokenizer is not None
    return _render(records, _tokenizer)


def _render(records: Sequence[Record], tokenizer: Tokenizer) -> _Piece:
    tags = tags_of(tokenizer)
    ids, spans, lengths = [], bytearray(), []
    for record in records:
        rendered = render_record(record, tokenizer, tags=tags)
        ids.append(torch.tensor(rendered.ids, dtype=torch.int32))
        spans += bytes(rendered.spans)
        lengths.append(len(rendered.ids))
    return torch.cat(ids).numpy().tobytes(), bytes(spans), lengths


def _join(pieces: Iterable[_Piece]) -> Flat:
    all_ids, all_spans, all_lengths = bytearray(), bytearray(), list[int]()
    for ids, spans, lengths in pieces:
        all_ids += ids
        all_spans += spans
        all_lengths += lengths
    return Flat(
        torch.frombuffer(all_ids, dtype=torch.int32),
        torch.frombuffer(all_spans, dtype=torch.uint8),
        torch.tensor(all_lengths, dtype=torch.int64).cumsum(0),
    )


def _key(path: Path, tokenizer: Tokenizer) -> str:
    return hashlib.sha256(f"{rendering_sha256(tokenizer)} {sha256_file(path)}".encode()).hexdigest()


def rendering_sha256(tokenizer: Tokenizer) -> str:
    """Hash of all that the ids follow from beside the text: the tokenizer, its added tokens, tags and versions."""
    parts = [f"{RENDERING_VERSION} {tokenizers.__version__} {tags_of(tokenizer)} {tokenizer.eos_id}"]
    # Saved first: tokens may have been added since the tokenizer was read.
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        parts += [sha256_file(file) for file in sorted(Path(folder).iterdir())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _load(file: Path, key: str, count: int) -> Flat | None:
    """What the cache holds; `None`, and a line if it is broken, if it must be made."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            flat = Flat(*(opened.get_tensor(name) for name in ("ids", "spans", "ends")))
        if metadata.get("key") == key and len(flat.ends_D) == count and metadata.get("sha256") == flat.sha256():
            return flat
        found = "its content is not what its hash says"
    except (SafetensorError, OSError) as error:
        found = str(error)
    print(f"{file} is broken ({found}): tokenising again", file=sys.stderr)
    return None


def _store(file: Path, key: str, flat: Flat) -> None:
    tensors = {"ids": flat.ids_N, "spans": flat.spans_N, "ends": flat.ends_D}
    with atomic_file(file) as temporary:
        try:
            save_file(tensors, temporary, metadata={"key": key, "sha256": flat.sha256()})
        except SafetensorError as error:
            raise OSError(str(error)) from None
