"""Corpora that do not fit into memory: rendered once into litdata chunks, read back a window at a time.

What litdata does here: its chunk format, its writer (`litdata.optimize`) and random access (`StreamingDataset[i]`), for
a local folder or an object store. Its own order and `state_dict` are not used. They count samples that were handed out,
and a loader that packs has handed out documents which lie in no finished row yet, so a run that resumed from them would
lose some or read some twice. Here the order follows from seed and epoch, and the state is an epoch and a position.

The chunks are read in a shuffled order, several of them a window; the documents of a window are shuffled and laid into
rows, and a window's last step is filled up with empty rows. Every rank knows all lengths (4 bytes a document, mapped,
not read), so all ranks agree on the rows without a word; each reads the documents of its own rows alone.

Needs the extra `streaming` (litdata); nothing else imports it.
"""

from __future__ import annotations

import bisect
import codecs
import contextlib
import hashlib
import io
import json
import os
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from litgpt.chat import Span
from litgpt.data import Batch, Document, LazySequence, Loader, Packing, Record, assemble, parse_record, render_document
from litgpt.packing import permutation
from litgpt.rendered import rendering_sha256
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, atomic_dir, progress

CHUNKS, LENGTHS, CARD = "chunks", "lengths.npy", "stream.json"
# Bytes of the JSON lines in one piece of a writer's work.
PIECE_BYTES = 1 << 20
# A list of every dropped id could itself be too long for memory.
MOST_NAMED = 1000


@dataclass(frozen=True)
class _Piece:
    """Lines of a file: where they start and end, in bytes, and the number of the first."""

    start: int
    end: int
    line: int


class _Render:
    """Piece of the file → its items; litdata calls it in its own processes."""

    def __init__(self, path: Path, tokenizer_dir: Path) -> None:
        self.path, self.tokenizer_dir = path, tokenizer_dir
        self._tokenizer: Tokenizer | None = None

    def __call__(self, piece: _Piece) -> Iterator[dict[str, bytes]]:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self.tokenizer_dir)
        for record in _records(self.path, piece):
            document = render_document(record, self._tokenizer)
            plain: dict[str, Any] = {"id": record.id, "meta": record.meta}
            plain |= {"messages": record.messages} if record.text is None else {"text": record.text}
            yield {
                "ids": document.ids_T.numpy().tobytes(),
                "spans": document.spans_T.numpy().tobytes(),
                "record": json.dumps(plain, ensure_ascii=False).encode(),
            }


def _records(path: Path, piece: _Piece) -> Iterator[Record]:
    with path.open("rb") as file:
        file.seek(piece.start)
        number = piece.line
        while file.tell() < piece.end:
            line = file.readline()
            if line.strip():
                try:
                    yield parse_record(line, fallback_id=f"{path}:{number}")
                except ValueError as error:
                    raise UserError(f"{path}:{number}: {error}") from None
            number += 1


def write_stream(
    data: str | os.PathLike[str],
    tokenizer_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    processes: int = 1,
    chunk_bytes: int = 16 << 20,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Render a file of records into litdata chunks; memory does not grow with the file but for 8 bytes a record.

    Args:
        data: JSON lines, dialogues or texts; see `litgpt.data.read_records`.
        tokenizer_dir: the student's.
        out_dir: appears whole: `chunks/` (litdata's), `lengths.npy` and `stream.json`.
        processes: that tokenise; they decide how documents are spread over chunks.
        chunk_bytes: size of a chunk.
        overwrite: replace an `out_dir` that is there.

    Returns:
        what `stream.json` says.

    Raises:
        UserError: as `read_records`, no record with a token that is learnt, or `out_dir` exists.
    """
    litdata = _litdata()
    data, out_dir = Path(data), Path(out_dir)
    if not data.is_file():
        raise UserError(f"no file {data}: expected records as JSON lines, one object a line")
    if processes < 1 or chunk_bytes < 1:
        raise UserError("expected processes and chunk_bytes of at least 1")
    tokenizer = Tokenizer(tokenizer_dir)
    # Every line is checked before the long work starts, and before anything is written.
    pieces = _pieces(data)
    count = _check_records(data, pieces)
    with atomic_dir(out_dir, replace=overwrite) as temporary:
        # It reports on stdout what is its own business.
        with contextlib.redirect_stdout(io.StringIO()):
            litdata.optimize(
                fn=_Render(data, Path(tokenizer_dir)),
                inputs=pieces,
                output_dir=str(temporary / CHUNKS),
                chunk_bytes=chunk_bytes,
                num_workers=processes,
                reorder_files=False,
                keep_data_ordered=True,
                verbose=False,
                start_method="spawn",
            )
        card = _read_back(litdata, temporary, count) | {"rendering": rendering_sha256(tokenizer)}
        (temporary / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card


def _pieces(path: Path) -> list[_Piece]:
    pieces = []
    with path.open("rb") as file:
        start = end = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(start)
        first = number = 1
        for line in file:
            end, number = end + len(line), number + 1
            if end - start >= PIECE_BYTES:
                pieces.append(_Piece(start, end, first))
                start, first = end, number
    return [*pieces, _Piece(start, end, first)] if end > start else pieces


def _check_records(path: Path, pieces: Sequence[_Piece]) -> int:
    hashes = array("Q")
    for piece in progress(pieces, "checking", unit="MB"):
        for record in _records(path, piece):
            hashes.append(_hash(record.id))
    if not hashes:
        raise UserError(f"{path} holds no record: expected records as JSON lines, one object a line")
    ordered = np.sort(np.frombuffer(hashes, dtype=np.uint64))
    twice = {int(value) for value in ordered[1:][ordered[1:] == ordered[:-1]]}
    seen: set[str] = set()
    # Only the few that look equal are compared as text.
    for piece in pieces if twice else []:
        for record in _records(path, piece):
            if _hash(record.id) in twice:
                if record.id in seen:
                    raise UserError(f"{path}: id {record.id!r} stands there twice: ids are unique")
                seen.add(record.id)
    return len(hashes)


def _hash(identity: str) -> int:
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "little")


def _read_back(litdata: Any, folder: Path, count: int) -> dict[str, Any]:
    """Read what was written, in its order: lengths, hash, and whether there is anything to learn."""
    index = json.loads((folder / CHUNKS / "index.json").read_text(encoding="utf-8"))
    sizes = [chunk["chunk_size"] for chunk in index["chunks"]]
    if sum(sizes) != count:
        raise RuntimeError(f"litdata wrote {sum(sizes)} of {count} documents")
    dataset = litdata.StreamingDataset(str(folder / CHUNKS))
    lengths = np.lib.format.open_memmap(folder / LENGTHS, mode="w+", dtype=np.int32, shape=(count,))
    digest, learnt = hashlib.sha256(), False
    for i in progress(range(count), "reading back", unit="doc"):
        item = dataset[i]
        lengths[i] = len(item["spans"])
        digest.update(int(lengths[i]).to_bytes(8, "little") + item["ids"] + item["spans"])
        learnt = learnt or any(span in item["spans"][1:] for span in (Span.THOUGHT, Span.ANSWER))
    if not learnt:
        raise UserError("no record has a token that is learnt, only prompts")
    lengths.flush()
    return {
        "documents": count,
        "tokens": int(lengths.sum(dtype=np.int64)),
        "chunks": sizes,
        "sha256": digest.hexdigest(),
    }


class StreamingLoader(Loader):
    """Micro-batches of a corpus on disk, in the memory of one window.

    `records` and `documents` hold every record of the corpus, also those that are too long, and read it when it is
    asked for; those of the micro-batch just handed out are in memory.

    Args:
        stream_dir: made by `write_stream`.
        tokenizer: the student's; it must be the one that the corpus was rendered with.
        max_seq_length, micro_batch_size, seed, shuffle, rank, world_size, packing: see `litgpt.data.Loader`.
        window: documents that are shuffled together, rounded up to whole chunks.

    Attributes:
        dropped: ids of records that are too long, at most the first 1000 of them.
        dropped_count: how many there are.

    Raises:
        UserError: litdata is not installed, no such folder, another tokenizer, or nothing fits.
    """

    def __init__(
        self,
        stream_dir: str | os.PathLike[str],
        tokenizer: Tokenizer,
        *,
        max_seq_length: int,
        micro_batch_size: int,
        seed: int = 1337,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        packing: Packing = "pack",
        window: int = 8192,
    ) -> None:
        super().__init__(
            max_seq_length=max_seq_length,
            micro_batch_size=micro_batch_size,
            seed=seed,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
            packing=packing,
        )
        if window < 1:
            raise UserError(f"window is {window}: expected at least 1 document")
        folder = Path(stream_dir)
        if not (folder / CARD).is_file():
            raise UserError(f"no {CARD} in {folder}: make it with python scripts/prepare_stream.py")
        self.card: dict[str, Any] = json.loads((folder / CARD).read_text(encoding="utf-8"))
        if self.card["rendering"] != rendering_sha256(tokenizer):
            raise UserError(
                f"{folder} was tokenised with another tokenizer, or by another version of it: "
                "make it again with python scripts/prepare_stream.py"
            )
        self.window = window
        self._dataset = _litdata().StreamingDataset(str(folder / CHUNKS))
        self._lengths = np.load(folder / LENGTHS, mmap_mode="r")
        self._starts = [0, *np.cumsum(self.card["chunks"]).tolist()]
        too_long = np.flatnonzero(self._lengths > max_seq_length)
        self.dropped_count = len(too_long)
        count = self.card["documents"]
        if self.dropped_count == count:
            raise UserError(
                f"none of {count} documents fits into {max_seq_length} tokens; "
                f"the shortest has {self._lengths.min()}: raise max_seq_length"
            )
        self._held: dict[int, dict[str, bytes]] = {}
        self.records = LazySequence(count, self._record)
        self.documents = LazySequence(count, self._document)
        self.dropped = [self.records[int(i)].id for i in too_long[:MOST_NAMED]]
        self._planned_epoch = -1
        self._plan()

    def __len__(self) -> int:
        self._plan()
        while self._count_window():
            pass
        return self._ends[-1]

    @property
    def padding_share(self) -> float:
        """Share of padding in the current epoch's micro-batches on all ranks, 0 … 1."""
        used = room = 0
        for w in range(len(self._plan())):
            rows, lengths = self._window_rows(w)
            used += sum(lengths[i] for row in rows for i in row)
            room += self._room(rows, lengths)
        return 1 - used / room

    def say_dropped(self, what: str) -> None:
        """One line on stderr if documents were left out."""
        if self.dropped_count:
            print(
                f"{self.dropped_count} of {len(self.records)} {what} documents have more than {self.max_seq_length} "
                f"tokens (max_seq_length) and are left out, e.g. {self.dropped[0]}",
                file=sys.stderr,
            )

    @property
    def _digest(self) -> str:
        return str(self.card["sha256"])

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"window": self.window, "chunks": self.card["chunks"]}

    def _plan(self) -> list[list[int]]:
        """Chunks of each window of the current epoch."""
        if self._planned_epoch != self.epoch:
            sizes = self.card["chunks"]
            self._windows: list[list[int]] = [[]]
            filled = 0
            for chunk in permutation(len(sizes), self.seed, self.epoch, shuffle=self.shuffle):
                if filled >= self.window:
                    self._windows.append([])
                    filled = 0
                self._windows[-1].append(chunk)
                filled += sizes[chunk]
            # Micro-batches up to the end of each window, as far as they were counted.
            self._ends: list[int] = []
            self._planned_epoch = self.epoch
            self._open: int | None = None
        return self._windows

    def _window_rows(self, w: int) -> tuple[list[list[int]], dict[int, int]]:
        """Rows of a window, by numbers in the corpus, and the lengths of its documents."""
        numbers = [i for chunk in self._plan()[w] for i in range(self._starts[chunk], self._starts[chunk + 1])]
        lengths = {i: n for i in numbers if (n := int(self._lengths[i])) <= self.max_seq_length}
        fitting = list(lengths)
        # Windows of one epoch are shuffled apart from each other.
        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {w}".encode()).digest()[:5], "little")
        order = permutation(len(fitting), seed, self.epoch, shuffle=self.shuffle)
        return self._into_rows([fitting[i] for i in order], lengths), lengths

    def _count_window(self) -> bool:
        """Count the micro-batches of the next window; `False` after the last."""
        windows = self._plan()
        if len(self._ends) == len(windows):
            return False
        rows, _ = self._window_rows(len(self._ends))
        before = self._ends[-1] if self._ends else 0
        self._ends.append(before + -(-len(rows) // (self.micro_batch_size * self.world_size)))
        return True

    def _has(self, position: int) -> bool:
        # Counted as it goes: the first micro-batch need not wait until all windows are laid out.
        self._plan()
        while not self._ends or self._ends[-1] <= position:
            if not self._count_window():
                return False
        return True

    def _batch(self, position: int) -> Batch:
        self._has(position)
        w = bisect.bisect_right(self._ends, position)
        start = self._ends[w - 1] if w else 0
        if self._open != w:
            self._enter(w, self._ends[w] - start)
        rows = self._own[position - start]
        documents = {i: self._document(i) for row in rows for i in row}
        return assemble(rows, documents, self.micro_batch_size, self._width(rows, self._open_lengths), [0] * len(rows))

    def _enter(self, w: int, count: int) -> None:
        """Read this rank's documents of a window, chunk by chunk: litdata keeps one chunk open at a time."""
        rows, self._open_lengths = self._window_rows(w)
        self._own = [self._own_rows(rows, position) for position in range(count)]
        self._held = {}
        needed = sorted(i for batch in self._own for row in batch for i in row)
        self._held = {i: self._dataset[i] for i in needed}
        self._open = w

    def _item(self, i: int) -> dict[str, bytes]:
        item: dict[str, bytes] = self._held[i] if i in self._held else self._dataset[i]
        return item

    def _document(self, i: int) -> Document:
        item = self._item(i)
        ids_T = torch.frombuffer(bytearray(item["ids"]), dtype=torch.int32)
        return Document(ids_T, torch.frombuffer(bytearray(item["spans"]), dtype=torch.uint8))

    def _record(self, i: int) -> Record:
        plain = json.loads(self._item(i)["record"])
        return Record(plain["id"], plain.get("messages", []), plain["meta"], plain.get("text"))


def _litdata() -> Any:
    try:
        import litdata
    except ImportError as error:
        raise UserError(f"streaming needs litdata ({error}): pip install 'distilled-qwen3-moe[streaming]'") from None
    return litdata
