"""Dialogues as the losses see them: text on a terminal, coloured by what each token counts for.

Colour changes only between whole characters. A Hindi letter is often two tokens, and a vowel sign or a half consonant
belongs to its neighbour: an escape sequence between them would tear the syllable apart.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import torch

from litgpt.chat import Span
from litgpt.data import PackedLoader
from litgpt.distill import MicroBatch
from litgpt.recipe import LossSettings
from litgpt.teacher import TeacherView
from litgpt.tokenizer import Tokenizer

_RESET = "\x1b[0m"
_JOINERS = "\u200c\u200d"
_VIRAMA = 9  # Unicode's combining class of halant: the consonant after it is drawn together with the one before


class Label(Enum):
    """What a token counts for."""

    PROMPT = "prompt"
    THOUGHT = "thought"
    ANSWER = "answer"
    NOT_SCORED = "not scored"
    """Of thought or answer, and yet without weight in any loss."""


_COLOURS = {
    Label.PROMPT: "\x1b[2m",  # faint
    Label.THOUGHT: "\x1b[35m",  # magenta
    Label.ANSWER: "\x1b[32m",  # green
    Label.NOT_SCORED: "\x1b[31m",  # red
}
_MEANINGS = {
    Label.PROMPT: "read, never learnt",
    Label.THOUGHT: "cross-entropy alone",
    Label.ANSWER: "cross-entropy and teacher",
    Label.NOT_SCORED: "no loss counts it",
}


_LABELS = {Span.PROMPT: Label.PROMPT, Span.THOUGHT: Label.THOUGHT, Span.ANSWER: Label.ANSWER}


class Run(NamedTuple):
    """Neighbouring tokens with one label."""

    label: Label
    text: str


def runs(ids: Sequence[int], labels: Sequence[Label], tokenizer: Tokenizer) -> list[Run]:
    """Text of one dialogue in runs of one label each; joined they are the whole text.

    A token whose bytes do not end a character, or whose text continues the one before (a vowel sign, a joiner, a
    consonant after a halant), stays in the run of its predecessor.
    """
    found: list[Run] = []
    pending, pending_label = b"", Label.PROMPT
    for index, label in zip(ids, labels, strict=True):
        if not pending:
            pending_label = label
        pending += tokenizer.token_bytes(index)
        try:
            text = pending.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                continue
            text = pending.decode(errors="replace")
        pending = b""
        if found and (found[-1].label is pending_label or _continues(found[-1].text, text)):
            found[-1] = Run(found[-1].label, found[-1].text + text)
        elif text:
            found.append(Run(pending_label, text))
    if pending:
        found.append(Run(pending_label, pending.decode(errors="replace")))
    return found


def _continues(before: str, after: str) -> bool:
    """Whether the two are drawn together where they meet."""
    if not before or not after:
        return True
    return (
        unicodedata.category(after[0]).startswith("M")
        or after[0] in _JOINERS
        or before[-1] in _JOINERS
        or unicodedata.combining(before[-1]) == _VIRAMA
    )


def paint(dialogue: Sequence[Run], *, colour: bool) -> str:
    """The runs as one text: coloured, or each behind its label in brackets."""
    if not colour:
        return "".join(f"[{run.label.value}]{run.text}" for run in dialogue)
    # Line by line, because pagers forget a colour at the end of a line.
    return "".join("\n".join(_line(run.label, line) for line in run.text.split("\n")) for run in dialogue)


def legend(*, colour: bool) -> str:
    """One line: the labels in their colours, and what they mean."""
    return "   ".join(
        f"{_line(label, label.value) if colour else f'[{label.value}]'} {_MEANINGS[label]}" for label in Label
    )


def _line(label: Label, text: str) -> str:
    return f"{_COLOURS[label]}{text}{_RESET}" if text else ""


def label(
    loader: PackedLoader, view: TeacherView | None, number: int, tokenizer: Tokenizer, settings: LossSettings
) -> tuple[list[Label], int]:
    """What each token of a dialogue counts for, read off the micro-batch that the losses would get.

    Args:
        loader: holds the dialogue.
        view: the teacher's side of the same loader, `None` without a teacher.
        number: of the dialogue in the loader.
        tokenizer: the student's.
        settings: weights of the terms.

    Returns:
        a label for each token, and how many tokens have another weight than their span asks for: thought
        `thought_weight`, answer 1 and the teacher, the others nothing.
    """
    record, length = loader.records[number], loader.max_seq_length
    alone = PackedLoader([record], tokenizer, max_seq_length=length, micro_batch_size=1, shuffle=False)
    alone_view = None if view is None else TeacherView([view.readings[number]], alone.documents, view.shared_vocab_size)
    micro = MicroBatch(next(iter(alone)), settings, [alone_view] if alone_view else [], torch.device("cpu"))
    # The weight at t is that of the token at t + 1; nothing predicts the first.
    weights = [0.0, *micro.ce_weight_N.tolist()]
    taught = {t + 1 for side in micro.teacher_batches for t in side.student_at_M.tolist()}
    asked = {Span.PROMPT: 0.0, Span.THOUGHT: settings.thought_weight, Span.ANSWER: 1.0}
    labels, wrong = [], 0
    for t, span in enumerate(map(Span, alone.documents[0].spans_T.tolist())):
        has_teacher = view is not None and span == Span.ANSWER
        wrong += not math.isclose(weights[t], asked[span], rel_tol=1e-6) or (t in taught) != has_teacher
        scored = (settings.task_weight > 0 and weights[t] > 0) or t in taught
        labels.append(_LABELS[span] if scored or span == Span.PROMPT else Label.NOT_SCORED)
    return labels, wrong
