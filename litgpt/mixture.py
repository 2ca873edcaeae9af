"""A weighted mixture of sources: advice beside general text, each source with a teacher of its own if it wants one.

**Weight** is a share of tokens: of two sources with weights 3 and 1, three tokens in four come from the first, however
long the documents of either are. **An epoch** is one pass over the source that `epoch_of` names (the first, unless
said otherwise); the others give tokens in proportion, less than a pass or several, and go on in the next epoch where
they stopped. So every document of a source is read n times before any is read n + 1 times.

A row holds documents of one source alone, so a micro-batch can be split by row among teachers. The rows of the sources
are spread evenly over the epoch. Everything follows from seed and epoch; nothing but these and a position is state.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from litgpt.chat import Span
from litgpt.data import Document, PackedLoader, Packing, Record
from litgpt.packing import generator, pack, permutation
from litgpt.rendered import RenderSettings, read_rendered
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError


@dataclass
class SourceSettings:
    """One source of a mixture."""

    path: Path
    """JSON lines: dialogues, or plain texts (`{"text": ...}`)."""
    weight: float = 1.0
    """Share of the tokens, in proportion to the other sources' weights."""
    teacher: Path | None = None
    """Lit dir of the teacher for this source; the run's own unless given."""


@dataclass(frozen=True)
class Source:
    """A source as it was read.

    Attributes:
        name: unique in its mixture.
        records: dialogues or texts.
        documents: the same, rendered.
        weight: see the top of this file.
        teacher: lit dir of its own teacher; `None` for the run's.
    """

    name: str
    records: Sequence[Record]
    documents: Sequence[Document]
    weight: float = 1.0
    teacher: Path | None = None


@dataclass
class SourceReport:
    """What a source has given so far.

    Attributes:
        documents, tokens: those that fit into a row.
        dropped: ids of the documents that do not.
        share: of the mixture's tokens, as the weights say.
        epochs: passes over the source so far.
        padding_share: of its rows in the current epoch, 0 … 1.
    """

    documents: int
    tokens: int
    dropped: list[str] = field(repr=False)
    share: float
    epochs: float
    padding_share: float


def read_sources(
    settings: Mapping[str, SourceSettings], tokenizer: Tokenizer, render: RenderSettings | None = None
) -> list[Source]:
    """Read and render all sources of a mixture.

    Args:
        settings: by name.
        tokenizer: the student's.
        render: processes and cache.

    Raises:
        UserError: no source, a file that is not as it should be, a source that teaches nothing, or a record's id that
            stands in two sources.
    """
    if not settings:
        raise UserError("the mixture has no source: name at least one")
    for name, one in settings.items():
        _check_weight(name, one.weight)
    sources: list[Source] = []
    source_of_id: dict[str, str] = {}
    for name, one in settings.items():
        records, documents = read_rendered(one.path, tokenizer, render, texts=True)
        for record in records:
            if (other := source_of_id.setdefault(record.id, name)) != name:
                raise UserError(
                    f"id {record.id!r} stands in the source {name!r} ({one.path}) and in {other!r} "
                    f"({settings[other].path}): ids are unique, or one text would be read twice"
                )
        sources.append(Source(name, records, documents, one.weight, one.teacher))
    return sources


class MixtureLoader(PackedLoader):
    """Micro-batches of several sources; with one source exactly those of `PackedLoader`.

    `Batch.sources` says for each row which of `sources` it belongs to.

    Args:
        sources: at least one; see `read_sources`.
        tokenizer: the student's.
        max_seq_length, micro_batch_size, seed, shuffle, rank, world_size, packing: as `PackedLoader`; without
            `shuffle` each source keeps its own order.
        epoch_of: name of the source whose pass is an epoch; the first, if `None`.

    Raises:
        UserError: no source, an unknown `epoch_of`, or a source of which nothing fits or nothing is learnt.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        *,
        max_seq_length: int,
        micro_batch_size: int,
        seed: int = 1337,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        packing: Packing = "pack",
        epoch_of: str | None = None,
    ) -> None:
        if not sources:
            raise UserError("the mixture has no source: name at least one")
        names = [source.name for source in sources]
        if epoch_of is not None and epoch_of not in names:
            raise UserError(f"epoch_of is {epoch_of!r}, which is no source: choose one of {', '.join(names)}")
        self.sources = list(sources)
        self.epoch_of = names[0] if epoch_of is None else epoch_of
        for source in sources:
            _check(source, max_seq_length)
        super().__init__(
            [record for source in sources for record in source.records],
            tokenizer,
            max_seq_length=max_seq_length,
            micro_batch_size=micro_batch_size,
            seed=seed,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
            packing=packing,
            documents=[document for source in sources for document in source.documents],
        )
        fitting = [[len(document.ids_T) <= max_seq_length for document in source.documents] for source in sources]
        self._dropped_of = [
            [record.id for record, fits in zip(source.records, chosen, strict=True) if not fits]
            for source, chosen in zip(sources, fitting, strict=True)
        ]
        # Records of source s are numbered starts[s] ... starts[s + 1] - 1.
        self._starts = [0]
        for chosen in fitting:
            self._starts.append(self._starts[-1] + sum(chosen))
        self._tokens = [sum(self._lengths[i] for i in self._members(s)) for s in range(len(sources))]

    def report(self) -> dict[str, SourceReport]:
        """By source: what it holds, and what it has given up to the current position."""
        total = sum(source.weight for source in self.sources)
        rows, size = self._rows(), self.micro_batch_size
        room, filled, seen = ([0] * len(self.sources) for _ in range(3))
        for start in range(0, len(rows), size):
            group = rows[start : start + size]
            width = self._width(group, self._lengths)
            for row in group:
                s, tokens = self.source_of(row[0]), sum(self._lengths[i] for i in row)
                room[s] += width
                filled[s] += tokens
                if start < self.position * self.world_size * size:
                    seen[s] += tokens
        return {
            source.name: SourceReport(
                documents=len(self._members(s)),
                tokens=self._tokens[s],
                dropped=self._dropped_of[s],
                share=source.weight / total,
                epochs=(self._given(s, self.epoch) + seen[s]) / self._tokens[s],
                padding_share=1 - filled[s] / room[s] if room[s] else 0.0,
            )
            for s, source in enumerate(self.sources)
        }

    def _members(self, s: int) -> range:
        return range(self._starts[s], self._starts[s + 1])

    def source_of(self, record: int) -> int:
        return bisect_right(self._starts, record) - 1

    def _identity(self) -> dict[str, Any]:
        identity = super()._identity()
        if len(self.sources) > 1:
            parts = [[source.name, source.weight, len(self._members(s))] for s, source in enumerate(self.sources)]
            identity |= {"sources": parts, "epoch_of": self.epoch_of}
        return identity

    def _source_seed(self, s: int) -> int:
        """Of the order within a source; it does not depend on which other sources there are beside it."""
        if len(self.sources) == 1:
            return self.seed
        digest = hashlib.sha256(f"{self.seed} {self.sources[s].name}".encode()).digest()
        return int.from_bytes(digest[:5], "little")

    def _budget(self, s: int, epochs: int) -> int:
        """Tokens that a source owes by the end of so many epochs; exact, so nothing drifts."""
        leader = next(n for n, source in enumerate(self.sources) if source.name == self.epoch_of)
        ratio = Fraction(self.sources[s].weight) / Fraction(self.sources[leader].weight)
        return math.floor(epochs * self._tokens[leader] * ratio)

    def _walk(self, s: int, start: int, end: int) -> list[int]:
        """Records of a source's endless stream, pass after pass, that begin at tokens `start` … `end - 1` of it."""
        members, tokens = self._members(s), self._tokens[s]
        chosen = []
        # Every pass has the same number of tokens, so a place in the stream is a pass and a place in it.
        for number in range(start // tokens, -(-end // tokens)):
            place = number * tokens
            for i in permutation(len(members), self._source_seed(s), number, shuffle=self.shuffle):
                if start <= place < end:
                    chosen.append(members[i])
                place += self._lengths[members[i]]
        return chosen

    def _given(self, s: int, epoch: int) -> int:
        """Tokens of a source in all epochs before `epoch`: its budget, and the end of the last document."""
        budget, tokens = self._budget(s, epoch), self._tokens[s]
        before = budget // tokens * tokens
        return before + sum(self._lengths[i] for i in self._walk(s, before, budget))

    def _lay_out(self) -> list[list[int]]:
        placed: list[tuple[float, int, list[int]]] = []
        for s in range(len(self.sources)):
            order = self._walk(s, self._budget(s, self.epoch), self._budget(s, self.epoch + 1))
            rows = pack(order, self._lengths, self.max_seq_length) if self.packing == "pack" else [[i] for i in order]
            # Row j of n stands somewhere in the j-th n-th part of the epoch: shares hold in every stretch of it, and
            # no fixed pattern could meet the number of ranks.
            jitter = torch.full((len(rows),), 0.5, dtype=torch.float64)
            if self.shuffle:
                jitter = torch.rand(
                    len(rows), dtype=torch.float64, generator=generator(self._source_seed(s) + 1, self.epoch)
                )
            placed += [((j + jitter[j].item()) / len(rows), s, row) for j, row in enumerate(rows)]
        # Rounding must not swap two rows of one source: the sort is stable, and equal places keep their order.
        merged = [row for _, _, row in sorted(placed, key=lambda entry: entry[:2])]
        if self.packing == "pack":
            return merged
        return self._into_rows([row[0] for row in merged], self._lengths)


def _check_weight(name: str, weight: float) -> None:
    if not (math.isfinite(weight) and weight > 0):
        raise UserError(f"the source {name!r} has weight {weight}: expected a number above 0")


def _check(source: Source, max_seq_length: int) -> None:
    _check_weight(source.name, source.weight)
    if not source.records:
        raise UserError(f"the source {source.name!r} is empty")
    fitting = [document for document in source.documents if len(document.ids_T) <= max_seq_length]
    if not fitting:
        shortest = min(len(document.ids_T) for document in source.documents)
        raise UserError(
            f"source {source.name!r}: none of {len(source.records)} records fits into {max_seq_length} tokens; "
            f"the shortest has {shortest}: raise max_seq_length"
        )
    # The first token of a document is predicted by nothing.
    if not any(bool(((d.spans_T[1:] == Span.ANSWER) | (d.spans_T[1:] == Span.THOUGHT)).any()) for d in fitting):
        raise UserError(f"source {source.name!r}: no record has a token that is learnt, only prompts")
