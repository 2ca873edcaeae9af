"""Records on disk → batches: JSON lines are read with exact complaints, rendered once, and laid into rows.

- `read_records` names file and line of whatever is wrong; nothing is skipped silently
- `PackedLoader` puts several dialogues into a row; each keeps its own document number, so attention, positions and
  the losses never cross from one into the next
- a mixture of sources, rendering by several processes with a cache, and corpora beyond memory have rooms of their own:
  `litgpt.mixture`, `litgpt.rendered`, `litgpt.streaming`
- the order depends on seed and epoch alone: a loader that gets its state back goes on with the very same batches
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, overload

import torch
from torch import Tensor

from litgpt.chat import ROLES, Message, Rendered, Span, Tags, render
from litgpt.packing import Lengths, bucket, pack, permutation
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError

__all__ = [
    "PADDING_DOCUMENT",
    "WIDTH_MULTIPLE",
    "Batch",
    "Document",
    "LazySequence",
    "Loader",
    "PackedLoader",
    "Packing",
    "Record",
    "assemble",
    "pack",
    "parse_record",
    "read_records",
    "render_document",
    "render_record",
    "tags_of",
]

PADDING_DOCUMENT = -1
# A micro-batch is as wide as its fullest row, rounded up to this, so that shapes repeat.
WIDTH_MULTIPLE = 64
END_OF_TEXT = "<|endoftext|>"

Packing = Literal["pack", "bucket"]
T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """One dialogue, or one plain text.

    Attributes:
        id: unique in its file.
        messages: turns in order; at least one is the assistant's. Empty for a plain text.
        meta: whatever else the writer of the file noted.
        text: the plain text; `None` for a dialogue.
    """

    id: str
    messages: list[Message]
    meta: dict[str, Any] = field(default_factory=dict)
    text: str | None = None


def read_records(path: str | os.PathLike[str], *, texts: bool = False) -> list[Record]:
    """Read dialogues from JSON lines: `{"id", "messages": [{"role", "content", "thought"?}], "meta"?}`.

    A byte-order mark, CRLF line ends and blank lines are accepted.

    Args:
        path: the file.
        texts: lines of plain text are welcome, too: `{"text", "id"?, "meta"?}`. One without an id is called by its
            file and line.

    Raises:
        UserError: no such file, no record in it, or `path:line:` and what is wrong with that line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}: expected dialogues as JSON lines, one object a line")
    records: list[Record] = []
    line_of_id: dict[str, int] = {}
    # Bytes are split at \n alone: str.splitlines would also cut at U+2028, which a JSON string may hold.
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_record(line, fallback_id=f"{path}:{number}" if texts else None)
            if record.id in line_of_id:
                raise ValueError(f"id {record.id!r} stands in line {line_of_id[record.id]} already: ids are unique")
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        line_of_id[record.id] = number
        records.append(record)
    if not records:
        raise UserError(f"{path} holds no record: expected dialogues as JSON lines, one object a line")
    return records


def parse_record(line: bytes, *, fallback_id: str | None = None) -> Record:
    """One line of a file of records.

    Args:
        line: JSON, without its line end.
        fallback_id: accept a plain text, and call it so if it names no id; `None` accepts dialogues alone.

    Raises:
        ValueError: what is wrong with the line.
    """
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line: save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {_kind(value)}")
    identity, messages, meta = value.get("id"), value.get("messages"), value.get("meta", {})
    is_text = fallback_id is not None and "text" in value
    if is_text:
        if "messages" in value:
            raise ValueError('both "text" and "messages": a record is a plain text or a dialogue')
        identity = value.get("id", fallback_id)
    if not isinstance(identity, str) or not identity:
        raise ValueError(f'expected "id" to be a non-empty string, found {_kind(identity)}')
    if not isinstance(meta, dict):
        raise ValueError(f'expected "meta" to be an object, found {_kind(meta)}')
    if is_text:
        return Record(identity, [], meta, text=_text(value["text"], "text"))
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'expected "messages" to be a non-empty list, found {_kind(messages)}')
    checked = [_parse_message(message, position) for position, message in enumerate(messages, start=1)]
    if all(message["role"] != "assistant" for message in checked):
        raise ValueError("no assistant turn: there is nothing to learn from this record")
    return Record(identity, checked, meta)


def _parse_message(message: Any, position: int) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"message {position}: expected an object, found {_kind(message)}")
    # An unknown key is most often a misspelt "thought", which would be lost without a word.
    if unknown := sorted(set(message) - {"role", "content", "thought"}):
        raise ValueError(f"message {position}: unknown key {unknown[0]!r}; known are role, content, thought")
    role, thought = message.get("role"), message.get("thought")
    if role not in ROLES:
        raise ValueError(f"message {position}: role {role!r} is none of {', '.join(ROLES)}")
    parsed: Message = {"role": role, "content": _text(message.get("content"), "content", f"message {position}: ")}
    if thought is not None:
        if role != "assistant":
            raise ValueError(f"message {position}: only an assistant has a thought, this is a {role} turn")
        parsed["thought"] = _text(thought, "thought", f"message {position}: ", may_be_empty=True)
    return parsed


def _text(value: Any, key: str, where: str = "", *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f'{where}expected "{key}" to be a string, found {_kind(value)}')
    if not may_be_empty and not value.strip():
        raise ValueError(f'{where}"{key}" is empty')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f'{where}"{key}" holds half of a surrogate pair, which is no character') from None
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "nothing"}
    if isinstance(value, str | list) and not value:
        return f"an empty {'string' if isinstance(value, str) else 'list'}"
    return names.get(type(value), "a number")


@dataclass(frozen=True)
class Document:
    """A rendered record.

    Attributes:
        ids_T: token ids, int32.
        spans_T: `litgpt.chat.Span` of each token, uint8.
    """

    ids_T: Tensor
    spans_T: Tensor


@dataclass
class Batch:
    """A micro-batch of rows.

    Attributes:
        ids_BT: token ids, int64; padding has id 0.
        spans_BT: `litgpt.chat.Span` of each token, uint8.
        documents_BT: number of the document within its row from 0, int32; -1 is padding.
        records: for each row the numbers of its records in the loader's `records`, in document order.
        sources: for each row the number of the source that all its records come from (0 where there is but one);
            -1 for an empty row.
    """

    ids_BT: Tensor
    spans_BT: Tensor
    documents_BT: Tensor
    records: list[list[int]]
    sources: list[int] = field(default_factory=list)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on another device."""
        ids_BT, spans_BT, documents_BT = (x.to(device) for x in (self.ids_BT, self.spans_BT, self.documents_BT))
        return Batch(ids_BT, spans_BT, documents_BT, self.records, self.sources)

    def next_tokens(self) -> tuple[Tensor, Tensor]:
        """What each position is to predict: the next id of its document and that id's span.

        Returns:
            targets [B, T], int64, and target spans [B, T], uint8; the last token of a document predicts nothing and
            has target 0 and span `PAD`, as has padding.
        """
        targets_BT = torch.zeros_like(self.ids_BT)
        spans_BT = torch.full_like(self.spans_BT, Span.PAD)
        same_BT = (self.documents_BT[:, 1:] == self.documents_BT[:, :-1]) & (self.documents_BT[:, 1:] >= 0)
        targets_BT[:, :-1] = torch.where(same_BT, self.ids_BT[:, 1:], 0)
        spans_BT[:, :-1] = torch.where(same_BT, self.spans_BT[:, 1:], int(Span.PAD))
        return targets_BT, spans_BT


def tags_of(tokenizer: Tokenizer) -> Tags:
    """The tags a checkpoint wraps its rationale in: `<thought>` where it has those tokens, else Qwen3's `<think>`."""
    return "think" if tokenizer.thought_ids is None else "thought"


def render_record(record: Record, tokenizer: Tokenizer, *, tags: Tags, keep_thoughts: bool = True) -> Rendered:
    """Token ids and spans of a record: `litgpt.chat.render` for a dialogue.

    A plain text is its tokens and an `<|endoftext|>` (or the tokenizer's end of text, if it has no token of that name).
    The first is PROMPT, for nothing predicts it; all others are ANSWER, so the losses count them.
    """
    if record.text is None:
        return render(record.messages, tokenizer, tags=tags, keep_thoughts=keep_thoughts)
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [*tokenizer.encode(record.text), tokenizer.eos_id if end is None else end]
    rendered = Rendered()
    rendered.add(ids[:1], Span.PROMPT)
    rendered.add(ids[1:], Span.ANSWER)
    return rendered


def render_document(record: Record, tokenizer: Tokenizer) -> Document:
    """A record as the student reads it."""
    rendered = render_record(record, tokenizer, tags=tags_of(tokenizer))
    return Document(torch.tensor(rendered.ids, dtype=torch.int32), torch.tensor(rendered.spans, dtype=torch.uint8))


class LazySequence(Sequence[T]):
    """A sequence whose items are made when they are asked for, and not kept.

    Args:
        count: how many there are.
        item: makes the i-th, from 0.
    """

    def __init__(self, count: int, item: Callable[[int], T]) -> None:
        self._count, self._item = count, item

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._item(index % self._count)


class Loader(ABC):
    """Micro-batches of one epoch after another, the same whoever asks, resumable after any of them.

    Every rank gets the same number of micro-batches: the last ones are filled up with empty rows, which weigh nothing
    in any loss, rather than by dropping or repeating dialogues.

    Args:
        max_seq_length: tokens in a row; a longer document is left out, never cut: a cut dialogue loses its end-of-turn
            token and teaches not to stop.
        micro_batch_size: rows in a micro-batch.
        seed: with the epoch it determines the order.
        shuffle: a new order each epoch; otherwise that of the records.
        rank: this process, from 0.
        world_size: processes that share the data.
        packing: `pack` lays several documents into a row; `bucket` gives each a row of its own and puts rows of like
            length into one micro-batch.

    Attributes:
        records: what `Batch.records` numbers.
        documents: the same, rendered.
        dropped: ids of the records that are too long.
        dropped_count: how many these are.

    Raises:
        UserError: an unknown packing.
    """

    records: Sequence[Record]
    documents: Sequence[Document]
    dropped: list[str]
    dropped_count: int

    def __init__(
        self,
        *,
        max_seq_length: int,
        micro_batch_size: int,
        seed: int = 1337,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        packing: Packing = "pack",
    ) -> None:
        if packing not in get_args(Packing):
            raise UserError(f"packing {packing!r} is not known: choose one of {', '.join(get_args(Packing))}")
        self.max_seq_length = max_seq_length
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.packing = packing
        self.epoch = 0
        self.position = 0

    @abstractmethod
    def __len__(self) -> int:
        """Micro-batches of the current epoch on this rank."""

    @property
    @abstractmethod
    def padding_share(self) -> float:
        """Share of padding in the current epoch's micro-batches on all ranks, 0 … 1."""

    def source_of(self, record: int) -> int:
        """Number of the source that a record comes from; 0 where there is but one."""
        return 0

    @abstractmethod
    def say_dropped(self, what: str) -> None:
        """One line on stderr if dialogues were left out."""

    @abstractmethod
    def _batch(self, position: int) -> Batch: ...

    @property
    @abstractmethod
    def _digest(self) -> str:
        """Hash of the data."""

    def _has(self, position: int) -> bool:
        return position < len(self)

    def __iter__(self) -> Iterator[Batch]:
        """The remaining micro-batches of the current epoch; after the last the loader stands at the next epoch."""
        while self._has(self.position):
            batch = self._batch(self.position)
            # Moved on before the batch is handed out: a state saved while it is in use does not give it out again.
            self.position += 1
            yield batch
        self.epoch += 1
        self.position = 0

    def forever(self) -> Iterator[Batch]:
        """Micro-batches of one epoch after another, from the current position on."""
        while True:
            yield from self

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: plain numbers and strings."""
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken.

        Raises:
            UserError: the state is that of other data or of other settings, so the order would differ.
        """
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise UserError(
                    f"the checkpoint's data loader has {key} {state.get(key)!r}, this one has {value!r}: "
                    "go on with the same data and settings, or start again without the checkpoint"
                )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])

    def _identity(self) -> dict[str, Any]:
        return {
            "data": self._digest,
            "max_seq_length": self.max_seq_length,
            "micro_batch_size": self.micro_batch_size,
            "packing": self.packing,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "world_size": self.world_size,
        }

    def _into_rows(self, order: Sequence[int], lengths: Lengths) -> list[list[int]]:
        """Lay documents, by number in the order they come, into rows."""
        if self.packing == "pack":
            return pack(order, lengths, self.max_seq_length)
        step = self.micro_batch_size * self.world_size
        return bucket(order, lengths, step, seed=self.seed if self.shuffle else None, epoch=self.epoch)

    def _own_rows(self, rows: Sequence[list[int]], position: int) -> list[list[int]]:
        """Those of `rows` that are this rank's micro-batch number `position`."""
        start = (position * self.world_size + self.rank) * self.micro_batch_size
        return list(rows[start : start + self.micro_batch_size])

    def _width(self, rows: Sequence[list[int]], lengths: Lengths) -> int:
        fullest = max((sum(lengths[i] for i in row) for row in rows), default=0)
        return min(self.max_seq_length, -(-max(fullest, 1) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE)

    def _room(self, rows: Sequence[list[int]], lengths: Lengths) -> int:
        """Places that rows take as micro-batches; without the empty micro-batches of an unfinished step."""
        size = self.micro_batch_size
        return sum(size * self._width(rows[start : start + size], lengths) for start in range(0, len(rows), size))


class PackedLoader(Loader):
    """Rendered records as micro-batches, one epoch an iteration.

    Args:
        records: dialogues or texts; see `read_records`.
        tokenizer: the student's.
        max_seq_length, micro_batch_size, seed, shuffle, rank, world_size, packing: see `Loader`.
        documents: the records rendered already (`litgpt.rendered.render_records`); otherwise they are rendered here.

    Attributes:
        records: the dialogues that fit, in their given order.
        documents: the same, rendered.
        dropped: ids of the dialogues that are too long.

    Raises:
        UserError: no dialogue fits, or an unknown packing.
    """

    records: list[Record]
    documents: list[Document]

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: Tokenizer,
        *,
        max_seq_length: int,
        micro_batch_size: int,
        seed: int = 1337,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        packing: Packing = "pack",
        documents: Sequence[Document] | None = None,
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
        if documents is None:
            documents = [render_document(record, tokenizer) for record in records]
        kept: list[Record] = []
        kept_documents: list[Document] = []
        self.dropped = []
        shortest = 0
        digest = hashlib.sha256()
        for record, document in zip(records, documents, strict=True):
            length = len(document.ids_T)
            if length > max_seq_length:
                self.dropped.append(record.id)
                shortest = min(shortest or length, length)
                continue
            digest.update(length.to_bytes(8, "little") + document.ids_T.numpy().tobytes())
            digest.update(document.spans_T.numpy().tobytes())
            kept.append(record)
            kept_documents.append(document)
        self.records, self.documents = kept, kept_documents
        self.dropped_count = len(self.dropped)
        if not kept:
            raise UserError(
                f"none of {len(self.dropped)} dialogues fits into {max_seq_length} tokens; "
                f"the shortest has {shortest}: raise max_seq_length"
            )
        self._lengths = [len(document.ids_T) for document in self.documents]
        self._sha256 = digest.hexdigest()
        self._packed: tuple[int, list[list[int]]] | None = None

    def say_dropped(self, what: str) -> None:
        """One line on stderr if dialogues were left out."""
        if self.dropped:
            total = len(self.dropped) + len(self.records)
            print(
                f"{len(self.dropped)} of {total} {what} dialogues have more than {self.max_seq_length} tokens "
                f"(max_seq_length) and are left out, e.g. {self.dropped[0]}",
                file=sys.stderr,
            )

    def __len__(self) -> int:
        """Micro-batches of the current epoch on this rank."""
        return -(-len(self._rows()) // (self.micro_batch_size * self.world_size))

    @property
    def padding_share(self) -> float:
        """Share of padding in the current epoch's micro-batches on all ranks, 0 … 1."""
        rows = self._rows()
        room = self._room(rows, self._lengths)
        return 1 - sum(self._lengths[i] for row in rows for i in row) / room

    @property
    def _digest(self) -> str:
        return self._sha256

    def _rows(self) -> list[list[int]]:
        """Record numbers of each row of the current epoch, the same on every rank."""
        if self._packed is None or self._packed[0] != self.epoch:
            self._packed = (self.epoch, self._lay_out())
        return self._packed[1]

    def _lay_out(self) -> list[list[int]]:
        order = permutation(len(self.documents), self.seed, self.epoch, shuffle=self.shuffle)
        return self._into_rows(order, self._lengths)

    def _batch(self, position: int) -> Batch:
        rows = self._own_rows(self._rows(), position)
        sources = [self.source_of(row[0]) for row in rows]
        return assemble(rows, self.documents, self.micro_batch_size, self._width(rows, self._lengths), sources)


def assemble(
    rows: Sequence[list[int]],
    documents: Sequence[Document] | Mapping[int, Document],
    size: int,
    width: int,
    sources: Sequence[int],
) -> Batch:
    """Lay documents into the tensors of a micro-batch.

    Args:
        rows: numbers of the documents of each row.
        documents: by number.
        size: rows of the micro-batch; those beyond `rows` stay empty.
        width: tokens in a row.
        sources: number of the source of each of `rows`.
    """
    empty = size - len(rows)
    batch = Batch(
        ids_BT=torch.zeros(size, width, dtype=torch.int64),
        spans_BT=torch.full((size, width), Span.PAD, dtype=torch.uint8),
        documents_BT=torch.full((size, width), PADDING_DOCUMENT, dtype=torch.int32),
        records=[*rows, *([] for _ in range(empty))],
        sources=[*sources, *([-1] * empty)],
    )
    for b, row in enumerate(rows):
        start = 0
        for number, record in enumerate(row):
            document = documents[record]
            place = slice(start, start + len(document.ids_T))
            batch.ids_BT[b, place] = document.ids_T.long()
            batch.spans_BT[b, place] = document.spans_T
            batch.documents_BT[b, place] = number
            start = place.stop
    return batch
