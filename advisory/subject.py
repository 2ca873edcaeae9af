"""What makes a question and its answer useless: nothing said, a person, a day's weather or price.

Everything is decided on the folded words of `advisory/normalise.py`, by sets of words first: most rows are told that
way, and a set is ten times as fast as a pattern.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from advisory.normalise import is_lost, language, match_key, normalise_hindi, words_of
from advisory.personal import MASKS, scrub_personal

CACHED_TEXTS = 1 << 14
"""Texts whose cleaned form is remembered; farmers ask the same again and again."""

_WEATHER = words_of("weather mausam mosam mausham मौसम rainfall barish baarish rain बारिश वर्षा forecast पूर्वानुमान")
_FORECAST_ANSWER = re.compile(
    r"rain ?fall mm|temp(?:erature)? ?c? ?max|max(?:imum)? temp|no rain|chances? of rain|weather forecast|"
    r"rain(?:fall)? (?:is )?expected|"
    r"बारिश (?:होने )?की संभावना|वर्षा (?:होने )?की संभावना|मौसम (?:पूर्वानुमान|विभाग के अनुसार|साफ रहेगा)|बादल छाए|"
    r"mausam saaf rahega"
)
_FORECAST_WORDS = _WEATHER | frozenset({"temp", "temperature", "बादल"})
_ABOUT = words_of(
    """
    information info report forecast detail details about regarding update condition status query
    related asked jankari when tomorrow today जानकारी पूर्वानुमान हाल कैसा कब कल आज रहेगा होगी बारे
    kab kal aaj rahega hogi
    """
)
_NO_TOPIC = (
    _WEATHER
    | _ABOUT
    | words_of(
        """
    the of in on for to and is will farmer asking want wants wanted ask know give me please sir this
    week next days day का की के में है से को और किसान ने पूछा बताएं क्या ka ki ke hai se ko kya
    batayen block district state
    """
    )
)
_PRICE = words_of("price prices rate rates mandi bhav bhaav भाव दाम रेट मंडी कीमत msp मूल्य बाजार")
_PRICE_ASK = re.compile(
    r"\b(?:mandi|market|today|aaj|sale|selling|current)\b.{0,40}\b(?:rate|price|bhav|bhaav)s?\b|\b(?:rate|price|bhav|bhaav)s?\b.{0,40}\b(?:mandi|market|today|"
    r"quintal|qtl)\b|\bmarket (?:rate|price|information)|\bmandi\b|\bmsp\b|(?:^| )(?:भाव|मंडी|समर्थन मूल्य)(?= |$)"
)
_EMPTY_WORDS = words_of(
    """
    explained explain explaining him her them to the a an farmer farmers in detail details detailed
    given gave give information info about all provided provide full fully suggested suggest told
    tell query solved resolved ans answer answered done na nil none null no call calls disconnected
    disconnect dropped transferred transfer sir madam and has have been was is it as per his he she
    ok okay yes advised advise advice available not test testing level expert fta kcc related
    regarding on of for with complete completely जानकारी दी गई गयी दे है हैं बताया बता दिया विस्तार
    से पूरी सलाह किसान को समझाया समझा के बारे में की का कर दीगई गया कृषक भाई जी उपलब्ध कराई नहीं हां
    ठीक संबंधित प्रदान उत्तर jankari jaankari di gayi gai de diya gaya bata bataya batayi vistar se
    samjhaya kisan ko hai ke bare me ki ka
    """
)
_SAYS_TOLD = words_of("explained explain informed information जानकारी बताया समझाया jankari samjhaya")
_PERSON_WORDS = words_of(
    """
    नाम फोन गांव पहचान खाता ईमेल मेरा मेरे है का की के में से और किसान कृषक मोबाइल मोबाईल नंबर
    संपर्क करें पर श्री श्रीमती ग्राम जिला बात बोल रहा हूं जी name my is farmer father mobile
    mob phone number no contact call on at please sir mr mrs smt shri village vill dist and of from
    the s o
    """
)
_MASK_WORDS = frozenset(match_key(mask) for mask in MASKS.values())


class Text(NamedTuple):
    """A cleaned text."""

    text: str
    key: str
    words: list[str]
    kinds: tuple[str, ...]
    """Kinds of personal data that were taken out."""
    language: str | None
    lost: bool
    repaired: bool


@functools.lru_cache(maxsize=CACHED_TEXTS)
def clean_text(raw: str) -> Text:
    """Normalise, scrub, and fold into words."""
    text, kinds = scrub_personal(normalise_hindi(raw))
    key = match_key(text)
    words = key.split(" ") if key else []
    repaired = not raw.isascii() and ("à¤" in raw or "à¥" in raw or "Ã" in raw)
    return Text(text, key, words, tuple(kinds), language(text, words), is_lost(raw), repaired)


def is_weather(question: Text, answer: Text) -> bool:
    words = set(question.words)
    if not words.isdisjoint(_WEATHER) and (
        words <= _NO_TOPIC or (not words.isdisjoint(_ABOUT) and len(words - _NO_TOPIC) <= 2)
    ):
        return True
    return not _FORECAST_WORDS.isdisjoint(answer.words) and bool(_FORECAST_ANSWER.search(answer.key))


def is_price(question: Text) -> bool:
    return not _PRICE.isdisjoint(question.words) and bool(_PRICE_ASK.search(question.key))


def is_empty(question: Text, answer: Text) -> bool:
    """An answer of filler words and words of the question."""
    words = answer.words
    if len(words) > 25:
        return False
    left = set(words) - _EMPTY_WORDS
    if not left:
        return True
    if _SAYS_TOLD.isdisjoint(words[:4]):
        return False
    return len(left.difference(question.words)) <= 1 and not any(character.isdigit() for character in answer.key)


def is_personal(text: Text) -> bool:
    return bool(text.kinds) and all(word in _PERSON_WORDS or word in _MASK_WORDS for word in text.words)
