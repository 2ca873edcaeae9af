"""A farmer's question → a thought and an answer, from a trained checkpoint.

The prompt is the one the dialogues were written with. The thought is told from the answer by token ids, never by text,
so nothing a farmer or the model writes can open or close it; a thought that does not end is ended here.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from advisory.compose import SYSTEM_HI
from litgpt.chat import IM_END, Message, Span, render, tag_ids
from litgpt.checkpoint import load_model, require_lit_dir
from litgpt.data import tags_of
from litgpt.generate import generate, generate_batch, new_cache
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, parse_device

__all__ = ["DISCLAIMER_HI", "Advisor", "Answer", "Piece", "clean_question", "default_checkpoint"]

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
        temperature: 0 always takes the most probable token; see `litgpt.generate.generate`.
        top_k: see there.
        top_p: see there.
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
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
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
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
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
        pieces = list(self._pieces(tokens))
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
        rendered = [
            render(list(messages), self.tokenizer, tags=self.tags, add_generation_prompt=True, thinking=self.thinking)
            for messages in conversations
        ]
        ids = [list(prompt.ids) for prompt in rendered]
        starts = [len(row) for row in ids]
        room = self.model.config.block_size - max(starts, default=0)
        if room < _LEAST_ROOM:
            raise UserError(
                f"the longest question takes {max(starts)} of {self.model.config.block_size} positions: shorten it"
            )
        spoken: list[list[tuple[Span, int]]] = [[] for _ in ids]

        def go_on(
            rows: Sequence[int], n: int, span: Span, stop_ids: Collection[int], forbidden: Collection[int]
        ) -> None:
            seed = None if self.seed is None else self.seed + n
            made = generate_batch(
                self.model,
                [ids[row] for row in rows],
                max_new_tokens=n,
                stop_ids=stop_ids,
                forbidden_ids=forbidden,
                vocab_size=self.tokenizer.vocab_size,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                seed=seed,
            )
            for row, new in zip(rows, made, strict=True):
                ids[row] += new
                spoken[row] += [(span, index) for index in new]

        rows = range(len(ids))
        if self.thinking and rows:
            go_on(rows, 1, Span.THOUGHT, (), {self._closing, *self._foreign})
            thinking = [row for row in rows if ids[row][-1] == self._opening]
            for row in set(rows) - set(thinking):
                spoken[row] = [(Span.ANSWER, ids[row][-1])]
            stops = {*self._stop_ids, self._closing}
            forbidden = {self._opening, *self._foreign}
            go_on(thinking, min(self.max_thought_tokens, room // 2), Span.THOUGHT, stops, forbidden)
            newline, blank_line = self.tokenizer.encode("\n"), self.tokenizer.encode("\n\n")
            for row in thinking:
                if ids[row][-1] in self._stop_ids:
                    ids[row].pop()
                    spoken[row].pop()
                put_in = blank_line if ids[row][-1] == self._closing else [*newline, self._closing, *blank_line]
                ids[row] += put_in
                spoken[row] += [(Span.PROMPT, index) for index in put_in]
        begun = [row for row in rows if spoken[row] and spoken[row][-1][0] == Span.ANSWER]
        n_answer, forbidden = self.max_new_tokens, {self._opening, self._closing, *self._foreign}
        go_on([row for row in rows if row not in begun], n_answer, Span.ANSWER, self._stop_ids, forbidden)
        going_on = [row for row in begun if ids[row][-1] not in self._stop_ids]
        if n_answer > 1:
            go_on(going_on, n_answer - 1, Span.ANSWER, self._stop_ids, forbidden)
        return [self._answer(tokens, show_thought=show_thought) for tokens in spoken]

    def stream(self, question: str) -> Iterator[Piece]:
        """The thought and the answer, piece by piece as they come; joined, they are what `ask` returns.

        Raises:
            UserError: at once for a question that is empty, too long or no text.
        """
        return self._pieces(self._tokens(clean_question(question)))

    def _tokens(self, question: str) -> Iterator[tuple[Span, int]]:
        """The reply's ids: THOUGHT and ANSWER from the model, PROMPT where the format was put in for it."""
        messages: list[Message] = [
            {"role": "system", "content": SYSTEM_HI},
            {"role": "user", "content": question},
        ]
        prompt = render(messages, self.tokenizer, tags=self.tags, add_generation_prompt=True, thinking=self.thinking)
        ids = list(prompt.ids)
        newline, blank_line = self.tokenizer.encode("\n"), self.tokenizer.encode("\n\n")

        room = self.model.config.block_size - len(ids)
        if room < _LEAST_ROOM:
            raise UserError(
                f"the question takes {len(ids)} of the model's {self.model.config.block_size} positions: shorten it"
            )
        # In a short context the thought leaves at least half of the room to the answer.
        max_thought = min(self.max_thought_tokens, room // 2)
        overhead = 2 + len(newline) + len(blank_line)
        cache = new_cache(self.model, len(ids) + max_thought + overhead + self.max_new_tokens)

        def go_on(n: int, *, stop_ids: Collection[int], forbidden_ids: Collection[int]) -> Iterator[int]:
            # The length makes a seed of its own for each part of the reply.
            seed = None if self.seed is None else self.seed + len(ids)
            for index in generate(
                self.model,
                ids,
                max_new_tokens=n,
                stop_ids=stop_ids,
                forbidden_ids=forbidden_ids,
                vocab_size=self.tokenizer.vocab_size,
                kv_cache=cache,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                seed=seed,
            ):
                ids.append(index)
                yield index

        n_answer = self.max_new_tokens
        if self.thinking:
            (first,) = go_on(1, stop_ids=(), forbidden_ids={self._closing, *self._foreign})
            if first == self._opening:
                yield Span.THOUGHT, first
                closed = False
                stops = {*self._stop_ids, self._closing}
                for index in go_on(max_thought, stop_ids=stops, forbidden_ids={first, *self._foreign}):
                    if index in self._stop_ids:
                        ids.pop()  # the turn is not over: the answer is still to come
                        break
                    closed = index == self._closing
                    yield Span.THOUGHT, index
                put_in = blank_line if closed else [*newline, self._closing, *blank_line]
                ids.extend(put_in)
                yield from ((Span.PROMPT, index) for index in put_in)
            else:
                yield Span.ANSWER, first
                n_answer -= 1
                if first in self._stop_ids or n_answer == 0:
                    return
        forbidden = {self._opening, self._closing, *self._foreign}
        for index in go_on(n_answer, stop_ids=self._stop_ids, forbidden_ids=forbidden):
            yield Span.ANSWER, index

    def _pieces(self, tokens: Iterable[tuple[Span, int]]) -> Iterator[Piece]:
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
