"""On-policy distillation (GKD, Agarwal et al. 2024, arXiv 2306.13649): the student answers, the teacher scores it.

In place of the last assistant turn of each dialogue the student's own thought and answer are put, drawn at some
temperature; the teacher then says at each token of that answer what it would have said. There is no cross-entropy on
such text, for nobody has said that it is right.

- The mode is the dialogue's: where it has a thought the student thinks first, where it has none its block is empty.
- A reply ends with `<|im_end|>`, which the teacher scores, too. One that is cut off before has no such token: where it
  stops is nobody's choice, and nothing is learnt from it.
- A reply is at most as long as the one whose place it takes, its thought as long as the other's thought, so the
  micro-batch keeps its shape and the memory plan stays true.
- Draws depend on seed, step, micro-batch and rank alone: a run that goes on draws what it would have drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from litgpt.chat import IM_END, Span, render, tag_ids
from litgpt.data import Batch, Document, LazySequence, Loader, assemble, tags_of
from litgpt.distill import Distiller
from litgpt.teacher import BaseTeacher, OnlineTeacher, Reading, TeacherView
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError


@dataclass
class _Reply:
    """A dialogue whose last assistant turn the student gives.

    Attributes:
        record: its number in the loader.
        turn: number of the turn.
        prompt: ids before the turn's text, the header included; where it thinks, the opening tag, too.
        thinking: whether it thinks first.
        thought_room, answer_room: at most so many ids.
        thought: ids from the opening tag to the blank line after the closing one.
        answer: ids with `<|im_end|>`, if it came.
    """

    record: int
    turn: int
    prompt: list[int]
    thinking: bool
    thought_room: int
    answer_room: int
    thought: list[int]
    answer: list[int]


class OnPolicy:
    """Makes on-policy micro-batches of those of a loader.

    Args:
        distiller: gives the replies.
        tokenizer: the student's.
        loader: the training dialogues.
        teachers: in the order of `sources`.
        sources: numbers of the sources that each teaches, `None` for all.
        share: of the micro-batches.
        temperature: of the draws.
        seed: of the run.

    Raises:
        UserError: a teacher that has run already, or one with another vocabulary than the student.
    """

    def __init__(
        self,
        distiller: Distiller,
        tokenizer: Tokenizer,
        loader: Loader,
        teachers: Sequence[BaseTeacher],
        views: Sequence[TeacherView],
        *,
        share: float,
        temperature: float,
        seed: int,
    ) -> None:
        refuse_unfit(teachers, tokenizer)
        self.distiller, self.tokenizer, self.loader = distiller, tokenizer, loader
        self.teachers, self.views = teachers, views
        self.share, self.temperature, self.seed = share, temperature, seed
        self.vocab_size = min(teacher.shared_vocab_size for teacher in teachers)
        self._opening, self._closing = tag_ids(tokenizer, tags_of(tokenizer))
        self._newline, self._blank_line = tokenizer.encode("\n"), tokenizer.encode("\n\n")
        end = tokenizer.token_to_id(IM_END)
        assert end is not None  # dialogues could not have been rendered without it
        self._end = end

    def chosen(self, step: int, micro: int) -> bool:
        """Whether this micro-batch of the step is one, the same on every rank."""
        return _number(self.seed, "choose", step, micro) / 2**63 < self.share

    def batch(self, batch: Batch, step: int, micro: int, rank: int) -> tuple[Batch, list[TeacherView]]:
        """The micro-batch with the student's own replies, and the teachers' sides of it.

        Args:
            batch: of the loader, on the CPU.
            step, micro, rank: what the draws depend on.
        """
        replies = [reply for row in batch.records for record in row if (reply := self._asked(record)) is not None]
        self._generate(replies, _number(self.seed, "draw", step, micro, rank))
        of_record = {reply.record: reply for reply in replies}
        documents = {
            record: self._document(of_record[record]) if record in of_record else self.loader.documents[record]
            for row in batch.records
            for record in row
        }
        rows = [row for row in batch.records if row]
        sources = [source for source, row in zip(batch.sources, batch.records, strict=True) if row]
        made = assemble(rows, documents, len(batch.ids_BT), batch.ids_BT.shape[1], sources)
        views = []
        for teacher, view in zip(self.teachers, self.views, strict=True):
            own = [
                row for row, source in zip(rows, sources, strict=True) if view.sources is None or source in view.sources
            ]
            readings = {
                record: self._reading(teacher, of_record[record], documents[record])
                if record in of_record
                else view.readings[record]
                for row in own
                for record in row
            }
            count = len(self.loader.records)
            views.append(
                TeacherView(
                    LazySequence(count, readings.__getitem__),
                    LazySequence(count, documents.__getitem__),
                    view.shared_vocab_size,
                    view.sources,
                )
            )
        return made, views

    def _asked(self, number: int) -> _Reply | None:
        """The last assistant turn of a record as a prompt; `None` for a plain text, which stays what it is."""
        record, document = self.loader.records[number], self.loader.documents[number]
        turns = [i for i, message in enumerate(record.messages) if message["role"] == "assistant"]
        if not turns:
            return None
        turn = turns[-1]
        # What comes after the turn is left out: it answers what the dialogue said, not what the student says.
        through = render(record.messages[: turn + 1], self.tokenizer, tags=tags_of(self.tokenizer))
        thinking = bool(record.messages[turn].get("thought", "").strip())
        prompt = render(
            record.messages[:turn],
            self.tokenizer,
            tags=tags_of(self.tokenizer),
            add_generation_prompt=True,
            thinking=thinking,
        ).ids
        told = through.ids[len(prompt) : -len(self._newline)]
        room = min(len(told), len(document.ids_T) - len(prompt) - len(self._newline))
        n_thought = through.spans[len(prompt) :].count(Span.THOUGHT) if thinking else 0
        around = 2 + len(self._newline) + len(self._blank_line)
        return _Reply(
            record=number,
            turn=turn,
            prompt=[*prompt, self._opening] if thinking else prompt,
            thinking=thinking,
            thought_room=max(0, n_thought - around),
            answer_room=room - n_thought,
            thought=[],
            answer=[],
        )

    def _generate(self, replies: list[_Reply], seed: int) -> None:
        thinking = [reply for reply in replies if reply.thinking]
        longest = max((reply.thought_room for reply in thinking), default=0)
        said = self._draw([reply.prompt for reply in thinking], longest, {self._closing, self._end}, seed, tags=True)
        for reply, ids in zip(thinking, said, strict=True):
            ids = ids[: reply.thought_room]
            closed = bool(ids) and ids[-1] == self._closing
            if ids and ids[-1] in (self._closing, self._end):
                ids = ids[:-1]
            # A thought that does not end is ended, as the adviser does.
            put_in = [] if closed else self._newline
            reply.thought = [self._opening, *ids, *put_in, self._closing, *self._blank_line]
        prompts = [reply.prompt[:-1] + reply.thought if reply.thinking else reply.prompt for reply in replies]
        longest = max((reply.answer_room for reply in replies), default=0)
        said = self._draw(prompts, longest, {self._end}, seed + 1, tags=False)
        for reply, ids in zip(replies, said, strict=True):
            reply.prompt = reply.prompt[:-1] if reply.thinking else reply.prompt
            reply.answer = ids[: reply.answer_room]

    def _draw(self, prompts: list[list[int]], n: int, stop_ids: set[int], seed: int, *, tags: bool) -> list[list[int]]:
        if not prompts or n < 1:
            return [[] for _ in prompts]
        return self.distiller.replies(
            prompts,
            max_new_tokens=n,
            stop_ids=sorted(stop_ids),
            temperature=self.temperature,
            seed=seed,
            # Only what the teacher knows, and within the thought the tag that ends it.
            forbidden_ids=self._foreign(allow_closing=tags),
        )

    def _foreign(self, *, allow_closing: bool) -> list[int]:
        rows = self.distiller.student.config.padded_vocab_size
        return [
            *(index for index in range(self.vocab_size, rows) if not (allow_closing and index == self._closing)),
            *({self._opening, *(() if allow_closing else (self._closing,))} - set(range(self.vocab_size, rows))),
        ]

    def _document(self, reply: _Reply) -> Document:
        ended = bool(reply.answer) and reply.answer[-1] == self._end
        ids = [*reply.prompt, *reply.thought, *reply.answer, *(self._newline if ended else [])]
        spans = torch.full((len(ids),), Span.PROMPT, dtype=torch.uint8)
        start = len(reply.prompt)
        spans[start : start + len(reply.thought)] = Span.THOUGHT
        start += len(reply.thought)
        spans[start : start + len(reply.answer)] = Span.ANSWER
        return Document(torch.tensor(ids, dtype=torch.int32), spans)

    def _reading(self, teacher: BaseTeacher, reply: _Reply, document: Document) -> Reading:
        """What the teacher reads of it: its own prompt, and the student's ids, which stand for the same tokens."""
        answer_at = len(reply.prompt) + len(reply.thought)
        student_at_P = answer_at - 1 + torch.arange(len(reply.answer))
        if teacher.view == "mask":
            return Reading(document.ids_T, student_at_P, student_at_P)
        messages = self.loader.records[reply.record].messages[: reply.turn]
        with_thought = teacher.view == "native" and reply.thinking
        prompt = render(
            messages,
            teacher.tokenizer,
            tags="think",
            keep_thoughts=teacher.view == "native",
            add_generation_prompt=True,
            thinking=with_thought,
        ).ids
        if with_thought:
            tags = dict(zip((self._opening, self._closing), tag_ids(teacher.tokenizer, "think"), strict=True))
            prompt = prompt + [tags.get(index, index) for index in reply.thought]
        ids_T = torch.tensor([*prompt, *reply.answer], dtype=torch.int32)
        return Reading(ids_T, student_at_P, len(prompt) - 1 + torch.arange(len(reply.answer)))


def refuse_unfit(teachers: Sequence[BaseTeacher], tokenizer: Tokenizer) -> None:
    """Raise `UserError` for a teacher that cannot score what the student says."""
    for teacher in teachers:
        if not isinstance(teacher, OnlineTeacher):
            raise UserError(
                "loss.on_policy: a teacher that has run already cannot score what the student says now: "
                "give the teacher's lit dir, not a cache"
            )
        end = tokenizer.token_to_id(IM_END)
        if end is None or end >= teacher.shared_vocab_size:
            raise UserError("loss.on_policy: student and teacher do not share the token <|im_end|>")


def _number(*parts: object) -> int:
    """A number below 2^63 that depends on all parts."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
