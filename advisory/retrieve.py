"""What a farmer's free text tells of: the crop's known signs, found by letters, whichever script it is written in.

Each known phrasing is a document of letter 4-grams in a romanised, folded spelling, so that "पत्ते पीले", "patte peele"
and "pate pile" look alike. A phrasing's BM25 score (Robertson and Zaragoza 2009, by the bm25s package) is divided by
what it would score for its own words: 1 where all of it stands in the text, however long the text is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import bm25s
import numpy as np

from advisory.facts import Facts
from advisory.hinglish import roman_word
from advisory.knowledge import Problem, SafetyTopic, bare_words

__all__ = ["Index", "Sign", "letters", "signs", "topic"]

LEAST = 0.45
"""Share of a phrasing that must stand in the text. Of phrasings with three words in ten left out 85 % reach it; of
signs that no phrasing tells of, 6 % reach that of another problem."""
LEAST_SECOND = 0.6
"""The same for a further sign, in what the first one leaves of the text."""
LEAST_TOPIC = 0.55
LONGER = 3
MAX_SIGNS = 3

_HINDI = re.compile("[\u0900-\u0963\u0970-\u097f]+")
_NOT_LETTER = re.compile("[^a-z0-9 ]+")
_DOUBLED = re.compile(r"(.)\1+")
_FOLDED = (
    ("chh", "ch"), ("sh", "s"), ("ph", "f"), ("w", "v"), ("z", "j"), ("q", "k"), ("x", "ks"), ("aa", "a"),
    ("ee", "i"), ("oo", "u"), ("ai", "e"), ("au", "o"), ("y", "i"),
)  # fmt: skip


class Sign(NamedTuple):
    """A known sign that a text tells of."""

    problem: Problem
    phrasing: str
    share: float
    """How much of the phrasing stands in the text, about 0 … 1."""


def letters(text: str) -> str:
    """A text in Roman letters as people type them, with the spellings that people mix up made one."""
    text = _HINDI.sub(lambda word: roman_word(word.group()), text).lower()
    text = _NOT_LETTER.sub(" ", text)
    for written, folded in _FOLDED:
        text = text.replace(written, folded)
    return " ".join(_DOUBLED.sub(r"\1", text).split())


def _grams(text: str) -> list[str]:
    spelt = f" {letters(bare_words(text))} "
    return [spelt[start : start + 4] for start in range(len(spelt) - 3)]


class Index:
    """Phrasings to be found in texts.

    Args:
        phrasings: at least one.
    """

    def __init__(self, phrasings: Sequence[str]) -> None:
        self.phrasings = list(phrasings)
        self._grams = [frozenset(_grams(phrasing)) for phrasing in self.phrasings]
        self._bm25 = bm25s.BM25()
        self._bm25.index([_grams(phrasing) for phrasing in self.phrasings], show_progress=False)
        self._own = np.array([self._scores(grams)[number] for number, grams in enumerate(self._grams)])

    def _scores(self, grams: Iterable[str]) -> np.ndarray:
        known = sorted(gram for gram in grams if gram in self._bm25.vocab_dict)
        return self._bm25.get_scores(known) if known else np.zeros(len(self.phrasings))

    def find(self, text: str, *, least: float, least_next: float = 1.0, most: int = 1) -> list[tuple[int, float]]:
        """Numbers of the phrasings that stand in a text, best first, each with its share.

        What one has found is taken out of the text before the next is looked for.
        """
        found: list[tuple[int, float]] = []
        left = set(_grams(text))
        while left and len(found) < most:
            shares = self._scores(left) / np.maximum(self._own, 1e-9)
            best = int(np.argmax(shares))
            if shares[best] < (least_next if found else least):
                break
            found.append((best, float(shares[best])))
            left -= self._grams[best]
        return found


@lru_cache(maxsize=100)
def _of_crop(crop_id: str, facts: Facts) -> tuple[Index, tuple[Problem, ...]]:
    told = [(phrasing, problem) for problem in facts.knowledge.of_crop(crop_id) for phrasing in problem.symptoms_hi]
    return Index([phrasing for phrasing, _ in told]), tuple(problem for _, problem in told)


@lru_cache(maxsize=4)
def _topics(facts: Facts) -> tuple[Index, tuple[SafetyTopic, ...]]:
    asked = [(question, topic) for topic in facts.knowledge.safety for question in topic.questions_hi]
    return Index([question for question, _ in asked]), tuple(topic for _, topic in asked)


def signs(text: str, crop_id: str, facts: Facts) -> list[Sign]:
    """The signs of a crop's problems in a text, best first, one of each problem, at most `MAX_SIGNS`.

    A problem that is called by its name stands before all signs, by the first of its phrasings.
    """
    index, problems = _of_crop(crop_id, facts)
    named = [facts.knowledge.problems[problem_id] for problem_id in facts.knowledge.problems_named(text, crop_id)]
    found = [Sign(problem, problem.symptoms_hi[0], 1.0) for problem in named[:1]]
    for number, share in index.find(text, least=LEAST, least_next=LEAST_SECOND, most=MAX_SIGNS):
        if all(problems[number].id != sign.problem.id for sign in found):
            found.append(Sign(problems[number], index.phrasings[number], share))
    return found


def topic(text: str, facts: Facts) -> tuple[SafetyTopic, float] | None:
    """The subject other than a crop's problem that a text asks about, and how sure that is; `None` for none."""
    index, topics = _topics(facts)
    found = index.find(text, least=LEAST_TOPIC)
    # In a long text the letters of a short question are found by chance.
    if not found or len(_grams(text)) > LONGER * len(_grams(index.phrasings[found[0][0]])):
        return None
    return topics[found[0][0]], found[0][1]
