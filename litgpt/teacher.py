"""The teacher: a frozen model that reads the same dialogues and is asked at the answer's tokens alone.

Which text the teacher reads is its *view*:

- `strip`: the dialogue without its thought and with the teacher's own empty `<think>` block. A Qwen3 that finds no
  block after the assistant's header wants to open one, so its opinion of the first answer token would be rubbish.
- `native`: the dialogue with its thought, between the teacher's own `<think>` tags.
- `mask`: the student's own ids, thought included.

Student and teacher rows thus differ in length. `TeacherView` knows, for every answer token, which student position
and which teacher position predict it; that the two predict the same id is checked when the dialogues are read.

A teacher runs beside the student (`OnlineTeacher`) or has run before (`litgpt.teachercache.CachedTeacher`); whoever
asks it need not know which, see `BaseTeacher`.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from litgpt.chat import Span
from litgpt.checkpoint import load_model
from litgpt.config import Config
from litgpt.data import (
    PADDING_DOCUMENT,
    WIDTH_MULTIPLE,
    Batch,
    Document,
    LazySequence,
    Loader,
    Record,
    render_record,
)
from litgpt.losses import Teacher, TeacherTargets
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError

View = Literal["strip", "native", "mask"]


@dataclass(frozen=True)
class Reading:
    """One dialogue as the teacher reads it.

    Attributes:
        ids_T: the teacher's token ids, int32.
        student_at_P: positions of the student's document that predict a token of the answer, ascending, int64.
        teacher_at_P: the positions of `ids_T` that predict the same tokens, int64.
        stored_at: where a cache holds its targets: number of the shard, first row in it.
    """

    ids_T: Tensor
    student_at_P: Tensor
    teacher_at_P: Tensor
    stored_at: tuple[int, int] | None = None

    def digest(self) -> bytes:
        """SHA-256 of what the teacher reads and where it is asked: all that its targets depend on but itself."""
        found = hashlib.sha256(len(self.ids_T).to_bytes(8, "little"))
        found.update(self.ids_T.numpy().tobytes() + self.teacher_at_P.numpy().tobytes())
        return found.digest()


@dataclass
class TeacherBatch:
    """The teacher's side of a `Batch`: the dialogues that it teaches, each beside those of its row.

    Attributes:
        ids_BS: the teacher's ids, int64; S differs from the student's T.
        documents_BS: number of the document within its row, int32; -1 is padding.
        student_at_M: positions in the flattened student batch (B·T) that have a teacher, ascending.
        teacher_at_M: positions in the flattened teacher batch (B·S) that predict the same tokens.
        readings: the dialogues that these pairs belong to, in the order of the pairs.
        rows: numbers of the student's rows that this teacher reads; its own rows are these, in order. A teacher of no
            row of the batch still gets an empty one: where it is spread over processes, they all have to ask it.
        shared_vocab_size: see `BaseTeacher`.
    """

    ids_BS: Tensor
    documents_BS: Tensor
    student_at_M: Tensor
    teacher_at_M: Tensor
    readings: list[Reading]
    rows: list[int]
    shared_vocab_size: int

    def pairs(self, student_tokens: int, device: torch.device | str) -> Tensor:
        """For each of N = B·T student positions the number of its pair, -1 where there is none; int64."""
        rows_N = torch.full((student_tokens,), -1, dtype=torch.int64, device=device)
        rows_N[self.student_at_M.to(device)] = torch.arange(len(self.student_at_M), device=device)
        return rows_N


class TeacherView:
    """The dialogues of one loader as the teacher reads them; see `BaseTeacher.read`.

    Args:
        readings: by the number of the record; those of other teachers' sources are empty.
        documents: the student's side of them.
        shared_vocab_size: see `BaseTeacher`.
        sources: it teaches the rows of these sources alone; `None` teaches all.
    """

    def __init__(
        self,
        readings: Sequence[Reading],
        documents: Sequence[Document],
        shared_vocab_size: int,
        sources: Collection[int] | None = None,
    ) -> None:
        self.readings, self.shared_vocab_size, self.sources = readings, shared_vocab_size, sources
        self._documents = documents

    def batch(self, batch: Batch) -> TeacherBatch:
        """The teacher's side of a micro-batch of the same loader, on the CPU."""
        own = [b for b in range(len(batch.records)) if self.sources is None or batch.sources[b] in self.sources]
        rows = [[self.readings[i] for i in batch.records[b]] for b in own] or [[]]
        fullest = max((sum(len(reading.ids_T) for reading in row) for row in rows), default=0)
        # Its side is seldom longer than the student's, which is what the block sizes are checked against.
        rounded = -(-max(fullest, 1) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        width = max(fullest, min(rounded, batch.ids_BT.shape[1]))
        ids_BS = torch.zeros(len(rows), width, dtype=torch.int64)
        documents_BS = torch.full((len(rows), width), PADDING_DOCUMENT, dtype=torch.int32)
        student, teacher = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
        for r, b in enumerate(own):
            student_start, teacher_start = b * batch.ids_BT.shape[1], r * width
            start = 0
            for number, (reading, record) in enumerate(zip(rows[r], batch.records[b], strict=True)):
                end = start + len(reading.ids_T)
                ids_BS[r, start:end] = reading.ids_T.long()
                documents_BS[r, start:end] = number
                student.append(student_start + reading.student_at_P)
                teacher.append(teacher_start + start + reading.teacher_at_P)
                student_start += len(self._documents[record].ids_T)
                start = end
        return TeacherBatch(
            ids_BS,
            documents_BS,
            torch.cat(student),
            torch.cat(teacher),
            readings=[reading for row in rows for reading in row],
            rows=own,
            shared_vocab_size=self.shared_vocab_size,
        )


class BaseTeacher(ABC):
    """What a teacher knows before it is asked: what it reads, and which of its positions answer for the student's.

    Making one compares the two vocabularies and reads no weights; `load` does.

    Args:
        text_dir: holds the teacher's `model_config.yaml` and its tokenizer's files.
        student: the student's tokenizer.
        view: what the teacher reads, see the top of this file.

    Attributes:
        config: the teacher's.
        shared_vocab_size: ids below it stand for the same token in both; KD compares the two over these alone, so
            neither padding rows nor the student's thought tokens enter.
        first_ids_V: for each of the student's ids the first teacher id it stands for: itself, as long as the student
            has no tokens beside the teacher's; -1 for the thought tokens. int64.
        model: the network that runs beside the student, once it is loaded; a teacher that has run already has none.

    Raises:
        UserError: no such checkpoint, an unknown view, or an id that stands for different tokens.
    """

    def __init__(self, text_dir: Path, student: Tokenizer, view: View) -> None:
        if view not in get_args(View):
            raise UserError(f"teacher view {view!r} is not known: choose one of {', '.join(get_args(View))}")
        self.view = view
        self.config = Config.from_checkpoint(text_dir)
        self.tokenizer = Tokenizer(text_dir)
        self.shared_vocab_size = shared_vocab_size(student, self.tokenizer)
        self.first_ids_V = _first_ids(student, self.tokenizer, self.shared_vocab_size)
        self.model: GPT | None = None
        self._student = student

    @abstractmethod
    def load(self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        """Read what `targets` needs of the weights; they get no gradient."""

    @abstractmethod
    def targets(self, batch: TeacherBatch, student_tokens: int) -> TeacherTargets:
        """What the teacher says at the paired positions of a micro-batch.

        Args:
            batch: from `TeacherView.batch`.
            student_tokens: N = B·T of the student's side.

        Returns:
            what the loss needs: one row for each pair, and which student position reads which of them.
        """

    def read(self, loader: Loader, sources: Collection[int] | None = None) -> TeacherView:
        """Render a loader's dialogues in the teacher's view and pair the positions.

        Of a corpus that is not in memory each dialogue is rendered, and checked, when its turn comes.

        Args:
            loader: whose micro-batches the view is to be asked for.
            sources: numbers of the sources that it teaches; `None` is all.

        Raises:
            UserError: a dialogue whose answer has other ids for the teacher, or ids that the teacher has no row for.
        """
        records, documents = loader.records, loader.documents

        def reading(i: int) -> Reading:
            return self._reading(records[i], documents[i])

        if isinstance(records, LazySequence):
            return TeacherView(LazySequence(len(records), reading), documents, self.shared_vocab_size, sources)
        none = torch.empty(0, dtype=torch.int64)
        readings = [
            reading(i) if sources is None or loader.source_of(i) in sources else Reading(none.int(), none, none)
            for i in range(len(records))
        ]
        return TeacherView(readings, documents, self.shared_vocab_size, sources)

    def _reading(self, record: Record, document: Document) -> Reading:
        ids_T, spans_T = document.ids_T, document.spans_T
        if self.view != "mask":
            rendered = render_record(record, self.tokenizer, tags="think", keep_thoughts=self.view == "native")
            ids_T = torch.tensor(rendered.ids, dtype=torch.int32)
            spans_T = torch.tensor(rendered.spans, dtype=torch.uint8)
        if (highest := int(ids_T.max())) >= self.config.padded_vocab_size:
            raise UserError(
                f"record {record.id!r} has id {highest}, the teacher has only {self.config.padded_vocab_size} rows: "
                "use the view strip, which leaves the student's own tokens out"
            )
        student_T = (document.spans_T == Span.ANSWER).nonzero().squeeze(1)
        teacher_T = (spans_T == Span.ANSWER).nonzero().squeeze(1)
        student_ids, teacher_ids = document.ids_T[student_T].long(), ids_T[teacher_T].long()
        if not torch.equal(self.first_ids_V[student_ids], teacher_ids):
            # Tokens of its own let the student say in one what the teacher says in several: what the two have in
            # common are the tokens that begin at the same byte of the answer.
            student_starts = _byte_starts(self._student, student_ids)
            teacher_starts = _byte_starts(self.tokenizer, teacher_ids)
            kept = torch.isin(student_starts, teacher_starts)
            student_T, student_ids = student_T[kept], student_ids[kept]
            kept = torch.isin(teacher_starts, student_starts)
            teacher_T, teacher_ids = teacher_T[kept], teacher_ids[kept]
        if not torch.equal(self.first_ids_V[student_ids], teacher_ids):
            raise UserError(
                f"record {record.id!r}: student and teacher split the answer into different tokens: "
                "they need tokenizers with the same merges"
            )
        # The token at t is predicted at t - 1; an answer never starts a document, its header stands before it.
        return Reading(ids_T, student_T - 1, teacher_T - 1)


class OnlineTeacher(BaseTeacher):
    """A frozen teacher that runs beside the student. It is no part of the student's module nor of any checkpoint.

    Args:
        checkpoint_dir: lit dir of the teacher, dense or not.
        student: the student's tokenizer.
        view: what the teacher reads, see the top of this file.

    Raises: as `BaseTeacher`.
    """

    def __init__(self, checkpoint_dir: str | os.PathLike[str], student: Tokenizer, *, view: View = "strip") -> None:
        self.checkpoint_dir = Path(checkpoint_dir)
        super().__init__(self.checkpoint_dir, student, view)

    def load(self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        """Read the weights; they get no gradient."""
        self.model = load_model(self.checkpoint_dir, dtype=dtype, device=device).requires_grad_(False)

    @torch.no_grad()
    def targets(self, batch: TeacherBatch, student_tokens: int) -> Teacher:
        """Run the teacher over its side of a micro-batch: the hidden rows at the paired positions alone."""
        if self.model is None:
            raise RuntimeError("the teacher's weights are not loaded: call load() first")
        head_VC = self.model.lm_head.weight
        device = head_VC.device
        output = self.model(batch.ids_BS.to(device), documents_BT=batch.documents_BS.to(device), return_logits=False)
        hidden_MC = output.hidden.flatten(0, 1)[batch.teacher_at_M.to(device)]
        return Teacher(hidden_MC, head_VC, batch.pairs(student_tokens, device))


def _byte_starts(tokenizer: Tokenizer, ids: Tensor) -> Tensor:
    """At which byte of their common text each of the ids begins, ascending."""
    lengths = torch.tensor([len(tokenizer.token_bytes(index)) for index in ids.tolist()])
    return lengths.cumsum(0) - lengths


def _first_ids(student: Tokenizer, teacher: Tokenizer, shared: int) -> Tensor:
    first_ids_V = torch.full((student.vocab_size,), -1, dtype=torch.int64)
    first_ids_V[:shared] = torch.arange(shared)
    for index in set(range(shared, student.vocab_size)) - set(student.thought_ids or ()):
        # Bytes that are no whole characters stand for no text of their own.
        pieces = teacher.encode(student.token_bytes(index).decode("utf-8", errors="ignore"))
        if pieces:
            first_ids_V[index] = pieces[0]
    return first_ids_V


def shared_vocab_size(student: Tokenizer, teacher: Tokenizer) -> int:
    """How many ids, from 0 on, stand for the same token in both vocabularies; the student's thought tokens end it.

    Raises:
        UserError: an id below that stands for different tokens.
    """
    size = min(student.vocab_size, teacher.vocab_size, *(student.thought_ids or ()))
    for index in range(size):
        ours, theirs = student.token_bytes(index), teacher.token_bytes(index)
        if ours != theirs:
            raise UserError(
                f"the vocabularies differ: id {index} is {ours.decode(errors='replace')!r} for the student and "
                f"{theirs.decode(errors='replace')!r} for the teacher; choose a teacher with the student's tokenizer"
            )
    return size
