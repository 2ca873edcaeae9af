"""What a text of the facts is: cleaned, never empty, without a dose where a farmer reads it. And what a source is."""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, Strict

from advisory.yamlfile import Model

DOSE = re.compile(
    r"[0-9०-९]\s*(?:-|से\s*)?[0-9०-९.]*\s*"
    r"(?:%|प्रतिशत|फीसदी|ppm|पीपीएम|मिली|मि\.?\s?ली|एमएल|ml\b|सीसी|cc\b|लीटर|ltr|litre|liter|ली\.|ग्राम|gm?\b|mg\b|किग्रा|"
    r"कि\.?\s?ग्रा|किलो|kg\b|क्विंटल|चम्मच|ढक्कन|पैकेट|बोरी|बोरा|E\.?C\b|W\.?P\b|S\.?L\b|S\.?C\b|W\.?G\b|ईसी|डब्ल्यूपी|एसएल)",
    re.IGNORECASE,
)
"""A number with a unit of amount or a formulation: what a dose looks like."""

_NOT_WORD = re.compile(r"[^\w\u0900-\u0963]+")
"""What separates words; `\\w` alone would split at vowel signs."""


def clean(text: str) -> str:
    """NFC, one space between words, no full stop at the end: the form in which all texts are kept and compared."""
    return " ".join(unicodedata.normalize("NFC", text).replace("\u200d", "").replace("\u200c", "").split()).rstrip(
        "।. "
    )


def bare_words(text: str) -> str:
    """A text's words in lower case with one space between and around them, all else gone: what names are sought in."""
    return f" {' '.join(_NOT_WORD.split(clean(text).lower()))} "


def _text(value: str) -> str:
    if not (cleaned := clean(value)):
        raise ValueError("must be a text that is not empty")
    return cleaned


def _without_dose(value: str) -> str:
    if found := DOSE.search(value):
        raise ValueError(f"holds {found.group()!r}, which looks like a dose; doses belong in chemicals")
    return value


def _distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    if repeated := {value for value in values if values.count(value) > 1}:
        raise ValueError(f"repeats {', '.join(map(repr, sorted(repeated)))}")
    return values


def _lines(value: str) -> str:
    lines = [clean(line) for line in value.splitlines()]
    if not lines or not all(lines):
        raise ValueError("must be a text without empty lines")
    return "\n".join(f"{_without_dose(line)}।" for line in lines)


def _web_address(value: str) -> str:
    if not re.fullmatch(r"https?://[^\s/]+\.\S+", value):
        raise ValueError(f"a web address is needed, found {value!r}")
    return value


Text = Annotated[str, AfterValidator(_text)]
Advice = Annotated[Text, AfterValidator(_without_dose)]
AdviceLines = Annotated[str, AfterValidator(_lines)]
Texts = Annotated[tuple[Text, ...], AfterValidator(_distinct)]
SomeTexts = Annotated[Texts, Field(min_length=1)]
Advices = Annotated[tuple[Advice, ...], AfterValidator(_distinct)]
SomeAdvices = Annotated[Advices, Field(min_length=1)]
Url = Annotated[str, AfterValidator(_web_address)]


class Source(Model):
    """Where a fact was read, and how much of that was seen."""

    title: Text
    publisher: Text
    year: Annotated[int, Strict(), Field(ge=1900, le=2100)] | None
    url: Url
    read: Literal["page", "abstract", "excerpt"]
