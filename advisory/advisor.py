"""A farmer's question → a thought and an answer, from a trained checkpoint.

The prompt is the one the dialogues were written with. The thought is told from the answer by token ids, never by text,
so nothing a farmer or the model writes can open or close it; a thought that does not end is ended here.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from advisory.compose import SYSTEM_HI
from litgpt.chat import IM_END, Message, Span, render, tag_ids
from litgpt.checkpoint import load_model, require_lit_dir
from litgpt.data import tags_of
from litgpt.engine import Engine
from litgpt.generate import GREEDY, Sampling
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, parse_device

__all__ = ["DISCLAIMER_HI", "Advisor", "Answer", "Piece", "Reply", "clean_question", "default_checkpoint"]

DISCLAIMER_HI = (
    "यह सलाह कंप्यूटर (AI) ने दी है और गलत हो सकती है। दवा या खाद डालने से पहले कृषि विज्ञान केंद्र (KVK) "
    "या किसान कॉल सेंटर 1800-180-1551 से पूछ लें।"
)
MAX_QUESTION_CHARACTERS = 2000
CHECKPOINTS = (Path("out/demo/final"), Path("out/distill/final"))

# Room for an answer below which asking makes no sense, in tokens.
_LEAST_ROOM = 64


@dataclass(frozen=True)
class Answer:
    """What the model said to one question."""

    text: str
    """The Hindi answer; empty if the model had none."""
    thought: str | None
    """The English thought; `None` if it was not asked for or the model had none."""
    ids: list[int]
    """Every token after the prompt, tags and `<|im_end|>` included."""
    complete: bool
    """Whether the answer ended by itself, and not at `max_new_tokens`."""


class Reply:
    """A thought, if there is to be one, its closing tag and the answer: what the engine may choose, and what is put in.

    The thought is closed after `max_thought_tokens`, or where the model would end the turn in it. `spoken` has every id
    after the prompt with its span: THOUGHT and ANSWER from the model, PROMPT for what was put in.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        *,
        sampling: Sampling,
        seed: int | None,
        thinking: bool,
        max_thought_tokens: int,
        max_new_tokens: int,
        tags: tuple[int, int],
        foreign: frozenset[int],
        stop_ids: frozenset[int],
        newline: Sequence[int],
        blank_line: Sequence[int],
    ) -> None:
        self.prompt_ids, self.sampling, self.seed = prompt_ids, sampling, seed
        self.max_thought_tokens, self.max_new_tokens, self.stop_ids = max_thought_tokens, max_new_tokens, stop_ids
        self.spoken: list[tuple[Span, int]] = []
        self._opening, self._closing = tags
        self._newline, self._blank_line = newline, blank_line
        self._phase: Literal["start", "thought", "answer"] = "start" if thinking else "answer"
        self._n_thought = self._n_answer = 0
        self._forbidden = {
            "start": foreign | {self._closing},
            "thought": foreign | {self._opening},
            "answer": foreign | set(tags),
        }

    @property
    def forbidden_ids(self) -> frozenset[int]:
        """Tags where they have no place."""
        return self._forbidden[self._phase]

    def take(self, index: int) -> Sequence[int]:
        """See `litgpt.engine.Turn`."""
        if self._phase == "thought":
            return self._think(index)
        if self._phase == "start" and index == self._opening:
            self._phase = "thought"
            self.spoken.append((Span.THOUGHT, index))
            return (index,)
        self._phase = "answer"
        self.spoken.append((Span.ANSWER, index))
        self._n_answer += 1
        return () if index in self.stop_ids or self._n_answer == self.max_new_tokens else (index,)

    def _think(self, index: int) -> Sequence[int]:
        over = index in self.stop_ids  # the turn is not: the answer is still to come
        said = [] if over else [index]
        self.spoken += [(Span.THOUGHT, id_) for id_ in said]
        self._n_thought += 1
        if index == self._closing:
            put_in = list(self._blank_line)
        elif over or self._n_thought == self.max_thought_tokens:
            put_in = [*self._newline, self._closing, *self._blank_line]
        else:
            return said
        self._phase = "answer"
        self.spoken += [(Span.PROMPT, id_) for id_ in put_in]
        return [*said, *put_in]


class Piece(NamedTuple):
    """A piece of streamed text; `cut`, which has none, comes last if the answer did not end by itself."""

    kind: Literal["thought", "answer", "cut"]
    text: str


class Advisor:
    """Answers questions with the model of a lit directory. Calls share nothing but the weights.

    Args:
        checkpoint_dir: a lit directory, e.g. `out/distill/final`.
        thinking: `False` makes the model answer at once, after an empty thought.
        max_new_tokens: at most so many tokens of answer. Qwen3 needs about 4 a Hindi word; the longest of the
            composed answers has 460.
        max_thought_tokens: the thought is closed after so many tokens.
        sampling: how tokens are chosen; by default always the most probable one.
        seed: makes draws repeatable.
        device: `auto` is the GPU if there is one.
        dtype: cast the weights; `None` keeps them as stored.

    Raises:
        UserError: no checkpoint there (the line says what to run), or its tokenizer is another model's.
    """

    def __init__(
        self,
        checkpoint_dir: str | os.PathLike[str],
        *,
        thinking: bool = True,
        max_new_tokens: int = 512,
        max_thought_tokens: int = 200,
        sampling: Sampling = GREEDY,
        seed: int | None = None,
        device: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        directory = require_lit_dir(checkpoint_dir)
        for name, value in (("max_new_tokens", max_new_tokens), ("max_thought_tokens", max_thought_tokens)):
            if value < 1:
                raise UserError(f"{name} is {value}: expected at least 1")
        self.tokenizer = Tokenizer(directory)
        self.tags = tags_of(self.tokenizer)
        self._opening, self._closing = tag_ids(self.tokenizer, self.tags)
        # A mixture fresh from upcycling knows <thought> as near copies of <think>: of the two it must take its own.
        foreign = self.tokenizer.think_ids if self.tags == "thought" else None
        self._foreign = frozenset(foreign or ())
        self.model = load_model(directory, device=parse_device(device), dtype=dtype)
        rows = self.model.config.padded_vocab_size
        if self.tokenizer.vocab_size > rows:
            raise UserError(
                f"{directory}: the tokenizer has {self.tokenizer.vocab_size} tokens, the model {rows} rows: "
                "the two are not of one checkpoint"
            )
        self.thinking = thinking
        self.max_new_tokens = max_new_tokens
        self.max_thought_tokens = max_thought_tokens
        self.sampling = sampling
        self.seed = seed
        # A base checkpoint names another end of text, yet was trained on turns that end so.
        im_end = self.tokenizer.token_to_id(IM_END)
        self._stop_ids = frozenset(self.tokenizer.stop_ids) | ({im_end} if im_end is not None else set())

    def ask(self, question: str, *, show_thought: bool = False) -> Answer:
        """The whole answer at once.

        Args:
            question: in Hindi, any script; cleaned by `clean_question`.
            show_thought: return the thought, too.

        Raises:
            UserError: a question that is empty, too long or no text.
        """
        return self._answer(list(self._tokens(clean_question(question))), show_thought=show_thought)

    def _answer(self, tokens: Sequence[tuple[Span, int]], *, show_thought: bool) -> Answer:
        pieces = list(self.pieces(tokens))
        text, thought = (
            "".join(piece.text for piece in pieces if piece.kind == kind) for kind in ("answer", "thought")
        )
        return Answer(
            text=text,
            thought=(thought or None) if show_thought else None,
            ids=[index for _, index in tokens],
            complete=not any(piece.kind == "cut" for piece in pieces),
        )

    def ask_many(self, conversations: Sequence[Sequence[Message]], *, show_thought: bool = False) -> list[Answer]:
        """The answers to several conversations at once, each as `ask` gives it; much faster than one by one.

        Args:
            conversations: messages up to and including the user's last one, in the form the model is to read.
            show_thought: return the thoughts, too.

        Raises:
            UserError: a conversation that leaves no room for an answer.
        """
        replies = [self.reply(messages) for messages in conversations]
        self.engine(rows=max(1, len(replies))).run(replies)
        return [self._answer(reply.spoken, show_thought=show_thought) for reply in replies]

    def reply(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling | None = None,
        seed: int | None = None,
        max_new_tokens: int | None = None,
        max_thought_tokens: int | None = None,
        thinking: bool | None = None,
    ) -> Reply:
        """The turn that answers a conversation, for an engine to run; what is not given is the adviser's own.

        Raises:
            UserError: a conversation that leaves no room for an answer.
        """
        thinking = self.thinking if thinking is None else thinking
        prompt = render(list(messages), self.tokenizer, tags=self.tags, add_generation_prompt=True, thinking=thinking)
        room = self.model.config.block_size - len(prompt.ids)
        if room < _LEAST_ROOM:
            raise UserError(
                f"the question takes {len(prompt.ids)} of the model's {self.model.config.block_size} positions: "
                "shorten it"
            )
        return Reply(
            prompt.ids,
            sampling=sampling or self.sampling,
            seed=self.seed if seed is None else seed,
            thinking=thinking,
            # In a short context the thought leaves at least half of the room to the answer.
            max_thought_tokens=min(max_thought_tokens or self.max_thought_tokens, room // 2),
            max_new_tokens=max_new_tokens or self.max_new_tokens,
            tags=(self._opening, self._closing),
            foreign=self._foreign,
            stop_ids=self._stop_ids,
            newline=self.tokenizer.encode("\n"),
            blank_line=self.tokenizer.encode("\n\n"),
        )

    def engine(self, rows: int, max_seq_length: int | None = None) -> Engine:
        """A new engine over this model; for one thread."""
        return Engine(self.model, rows=rows, max_seq_length=max_seq_length, vocab_size=self.tokenizer.vocab_size)

    def stream(self, question: str) -> Iterator[Piece]:
        """The thought and the answer, piece by piece as they come; joined, they are what `ask` returns.

        Raises:
            UserError: at once for a question that is empty, too long or no text.
        """
        return self.pieces(self._tokens(clean_question(question)))

    def _tokens(self, question: str) -> Iterator[tuple[Span, int]]:
        """The reply's ids: THOUGHT and ANSWER from the model, PROMPT where the format was put in for it."""
        reply = self.reply([{"role": "system", "content": SYSTEM_HI}, {"role": "user", "content": question}])
        return self._run(reply)

    def _run(self, reply: Reply) -> Iterator[tuple[Span, int]]:
        engine = self.engine(rows=1)
        engine.add(reply)
        told = 0
        while engine.running or engine.waiting:
            engine.step()
            yield from reply.spoken[told:]
            told = len(reply.spoken)

    def pieces(self, tokens: Iterable[tuple[Span, int]]) -> Iterator[Piece]:
        """Text of the ids, without tags, and without line breaks at either end of the thought and of the answer."""
        kind: Literal["thought", "answer"] = "thought"
        decoder = self.tokenizer.stream()
        started, held, last = False, "", -1
        for span, last in tokens:
            if span == Span.PROMPT or last in (self._opening, self._closing):
                continue
            if span == Span.ANSWER and kind == "thought":
                kind, decoder, started, held = "answer", self.tokenizer.stream(), False, ""
            text = held + decoder.push(last)
            if not started:
                text = text.lstrip("\n")
            body = text.rstrip("\n")
            held = text[len(body) :]
            if body:
                started = True
                yield Piece(kind, body)
        if last not in self._stop_ids:
            yield Piece("cut", "")


def clean_question(question: str) -> str:
    """The question in the form the dialogues are written in: NFC, single spaces, line breaks kept.

    Control and format characters go: a keyboard's zero-width joiners (र्‍य) are not in the dialogues either.

    Raises:
        UserError: nothing but signs and spaces, more than `MAX_QUESTION_CHARACTERS`, or a lone surrogate.
    """
    if len(question) > MAX_QUESTION_CHARACTERS:
        raise UserError(
            f"the question has {len(question)} characters: at most {MAX_QUESTION_CHARACTERS} are read, shorten it"
        )
    try:
        question.encode()
    except UnicodeEncodeError:
        raise UserError("the question is not valid UTF-8 text: write it again, for instance in Devanagari") from None
    kept = (
        character
        for character in unicodedata.normalize("NFC", question)
        if character.isspace() or unicodedata.category(character) not in ("Cc", "Cf")
    )
    lines = (" ".join(line.split()) for line in "".join(kept).splitlines())
    cleaned = "\n".join(line for line in lines if line)
    if not any(unicodedata.category(character)[0] in "LN" for character in cleaned):
        raise UserError('the question is empty: ask, for instance, "गेहूं के पत्ते पीले पड़ रहे हैं, क्या करूं?"')
    return cleaned


def default_checkpoint() -> Path:
    """The checkpoint that the project's own commands left behind last: the demo's or the real recipe's.

    Raises:
        UserError: neither is there.
    """
    found = [directory for directory in CHECKPOINTS if directory.is_dir()]
    if found:
        return require_lit_dir(max(found, key=lambda directory: directory.stat().st_mtime))
    raise UserError(
        f"no trained model in {' or '.join(map(str, CHECKPOINTS))}: run first make demo (minutes), or "
        "python train_distill.py (the real recipe); or give --checkpoint_dir"
    )
