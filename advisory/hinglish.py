"""A Hindi sentence as it is typed or spoken: in Roman letters, with slips, in dialect, without punctuation.

Romanising follows what people type, not a standard: a word's last inherent vowel is silent, so is one between two
syllables that have vowels of their own (Ohala's rule of schwa deletion, "Aspects of Hindi Phonology", 1983), long
vowels are often written short, and very common words have a spelling of their own.
"""

from __future__ import annotations

import re
from functools import lru_cache
from random import Random

_CONSONANTS = {
    "क": "k", "ख": "kh", "ग": "g", "घ": "gh", "ङ": "n", "च": "ch", "छ": "chh", "ज": "j", "झ": "jh", "ञ": "n",
    "ट": "t", "ठ": "th", "ड": "d", "ढ": "dh", "ण": "n", "त": "t", "थ": "th", "द": "d", "ध": "dh", "न": "n",
    "प": "p", "फ": "ph", "ब": "b", "भ": "bh", "म": "m", "य": "y", "र": "r", "ल": "l", "व": "v",
    "श": "sh", "ष": "sh", "स": "s", "ह": "h", "ळ": "l",
}  # fmt: skip
_NUKTA = {"ड": "d", "ढ": "dh", "ज": "z", "फ": "f", "क": "q", "ख": "kh", "ग": "g"}
_SIGNS = dict(
    zip(
        ["ा", "ि", "ी", "ु", "ू", "ृ", "े", "ै", "ो", "ौ", "ॉ", "ॅ"],
        ["a", "i", "i", "u", "u", "ri", "e", "ai", "o", "au", "o", "e"],
        strict=True,
    )
)
_VOWELS = dict(
    zip(
        ["अ", "आ", "इ", "ई", "उ", "ऊ", "ऋ", "ए", "ऐ", "ओ", "औ", "ऑ"],
        ["a", "a", "i", "i", "u", "u", "ri", "e", "ai", "o", "au", "o"],
        strict=True,
    )
)
_LONG = {"ा": "aa", "ी": "ee", "ू": "oo", "ई": "ee", "ऊ": "oo", "आ": "aa"}
_VIRAMA, _NUKTA_SIGN = "\u094d", "\u093c"
_NASAL = {"\u0902": "n", "\u0901": "n", "\u0903": "h"}

# How very common words are typed; what a rule gives for them would look odd.
_COMMON = {
    "में": "me", "मैं": "main", "है": "hai", "हैं": "hain", "नहीं": "nahi", "क्या": "kya", "यह": "ye",
    "वह": "wo", "और": "aur",
    "को": "ko", "की": "ki", "के": "ke", "का": "ka", "से": "se", "पर": "par", "तो": "to", "भी": "bhi",
    "हो": "ho", "रहे": "rahe",
    "रहा": "raha", "रही": "rahi", "गए": "gaye", "गया": "gaya", "गई": "gayi", "दिन": "din",
    "फसल": "fasal", "करूं": "karu",
    "करें": "kare", "बताएं": "batayein", "मेरी": "meri", "मेरे": "mere", "पत्ते": "patte",
    "पत्तों": "patto", "पीले": "peele",
    "सूख": "sukh", "कीड़े": "keede", "कीड़ा": "keeda", "पौधे": "paudhe", "पौधा": "paudha",
    "कौन": "kaun", "दवा": "dawa", "खेत": "khet",
    "बारिश": "barish", "मौसम": "mausam", "मिट्टी": "mitti", "उपाय": "upay", "इलाज": "ilaj",
    "रोग": "rog", "पानी": "pani", "फूल": "phool",
    "फल": "fal", "जी": "ji", "नमस्ते": "namaste", "राम": "ram", "छोटे": "chhote", "सफेद": "safed",
    "काले": "kale", "भूरे": "bhure",
    "धब्बे": "dhabbe", "ऊपर": "upar", "नीचे": "neeche", "हुए": "hue", "चाहिए": "chahiye",
    "डालूं": "dalu", "कितने": "kitne",
}  # fmt: skip

# Words of the Hindi belt's dialects (Bhojpuri, Awadhi, Bundeli, Bagheli), as they are commonly written.
_DIALECT = {
    "पत्ते": "पाती", "पत्तों": "पातन", "पत्तियां": "पाती", "पत्तियों": "पातन", "कीड़े": "कीरा",
    "कीड़ा": "कीरा", "मेरी": "हमार", "मेरे": "हमार",
    "पौधे": "पउधा", "बहुत": "खूब", "गेहूं": "गोहूं", "फसल": "फसिल", "बारिश": "बरखा", "खेत": "खेतवा",
    "छोटे": "छोट",
}  # fmt: skip

# Slips of Hindi typing: a nasal left out, short for long vowels, an aspirate lost, doubled letters made single.
_SLIPS = (
    ("ीं", "ी"), ("ों", "ो"), ("ें", "े"), ("ी", "ि"), ("ू", "ु"), ("ु", "ू"), ("ं", ""), ("ँ", "ं"),
    ("ध्ब", "द्ब"), ("त्त", "त"),
    ("ब्ब", "ब"), ("ड़", "ड"), ("ढ़", "ढ"), ("श", "स"), ("ष", "श"), ("व", "ब"), ("ौ", "ो"), ("ै", "े"),
)  # fmt: skip

NUMBERS = {
    5: "पांच", 10: "दस", 15: "पंद्रह", 20: "बीस", 25: "पच्चीस", 30: "तीस", 35: "पैंतीस",
    40: "चालीस", 45: "पैंतालीस", 50: "पचास", 55: "पचपन", 60: "साठ", 65: "पैंसठ", 70: "सत्तर",
    75: "पचहत्तर", 80: "अस्सी", 85: "पचासी", 90: "नब्बे", 95: "पंचानबे", 100: "सौ", 110: "एक सौ दस",
    120: "एक सौ बीस",
}  # fmt: skip
"""How round numbers are spoken."""
_FILLERS = ("मतलब", "वो", "अच्छा", "हां जी", "सुनिए", "देखिए")

_WORD = re.compile(r"[\u0900-\u0963\u0970-\u097f]+")


def roman_word(word: str) -> str:
    """One Hindi word in Roman letters, its vowels written short."""
    return _COMMON.get(word) or _roman_word(word, False)


def romanise(text: str, rng: Random) -> str:
    """Hindi in Roman letters,
    each long vowel written long or short as the writer's habit (drawn once) has it."""
    long_vowels = rng.random() < 0.3
    text = _WORD.sub(lambda match: _roman_word(match.group(), long_vowels), text)
    return text.replace("।", rng.choice((".", ",", ""))).lower()


@lru_cache(maxsize=50_000)
def _roman_word(word: str, long_vowels: bool) -> str:
    if word in _COMMON:
        return _COMMON[word]
    # Each syllable is (consonants, vowel), where "" is no vowel and None the inherent one.
    syllables: list[tuple[str, str | None]] = []
    onset = ""
    position = 0
    while position < len(word):
        letter = word[position]
        after = word[position + 1] if position + 1 < len(word) else ""
        if letter in _CONSONANTS:
            nukta = after == _NUKTA_SIGN
            onset += _NUKTA.get(letter, _CONSONANTS[letter]) if nukta else _CONSONANTS[letter]
            position += nukta
            after = word[position + 1] if position + 1 < len(word) else ""
            if after == _VIRAMA:
                position += 1
                if position + 1 >= len(word):
                    syllables.append((onset, ""))
                    onset = ""
            elif after in _SIGNS:
                position += 1
                # Nobody types a long a at the end of a word.
                long = long_vowels and not (after == "ा" and position + 1 == len(word))
                syllables.append((onset, (_LONG if long else {}).get(after, _SIGNS[after])))
                onset = ""
            else:
                syllables.append((onset, None))
                onset = ""
        elif letter in _VOWELS:
            syllables.append(("", (_LONG if long_vowels else {}).get(letter, _VOWELS[letter])))
        elif letter in _NASAL and syllables:
            consonants, vowel = syllables[-1]
            syllables[-1] = (consonants, ("a" if vowel is None else vowel) + _NASAL[letter])
        position += 1
    return "".join(consonants + vowel for consonants, vowel in _without_silent(syllables))


def _without_silent(syllables: list[tuple[str, str | None]]) -> list[tuple[str, str]]:
    """Inherent vowels spoken or not: silent at the end, and between two syllables that keep a vowel."""
    spoken: list[tuple[str, str]] = []
    last = len(syllables) - 1
    for number in range(last, -1, -1):
        consonants, vowel = syllables[number]
        if vowel is None:
            at_end = number == last and number > 0
            followed = number < last and bool(spoken) and spoken[-1][1] != "" and spoken[-1][0] != ""
            between = 0 < number < last and followed and (syllables[number - 1][1] != "")
            vowel = "" if at_end or between else "a"
        spoken.append((consonants, vowel))
    return spoken[::-1]


def spellings(words: str) -> frozenset[str]:
    """Hindi words in Devanagari, and in Roman letters with long vowels written short and long."""
    return frozenset({words, *(" ".join(_roman_word(word, long) for word in words.split()) for long in (False, True))})


def with_slips(text: str, rng: Random, *, slips: int = 2) -> str:
    """Up to so many usual slips of typing,
    each in a word of its own; at least one where the text gives room for it."""
    words = text.split(" ")
    order = list(range(len(words)))
    rng.shuffle(order)
    for number in order:
        if slips == 0:
            break
        # Numbers, and what was said to be unknown or asked, must stay readable.
        if len(words[number]) < 4 or any(character.isdigit() for character in words[number]):
            continue
        fitting = [(right, wrong) for right, wrong in _SLIPS if right in words[number]]
        if fitting:
            right, wrong = rng.choice(fitting)
            words[number] = words[number].replace(right, wrong, 1)
            slips -= 1
    return " ".join(words)


def in_dialect(text: str) -> str:
    """The words of a dialect where we know them."""
    return _WORD.sub(lambda match: _DIALECT.get(match.group(), match.group()), text)


def as_spoken(text: str, rng: Random) -> str:
    """A voice transcript: no punctuation, numbers in words where they are round, a filler."""
    text = re.sub(r"\d+", lambda match: NUMBERS.get(int(match.group()), match.group()), text)
    text = re.sub(r"[।?,.!]", " ", text)
    return " ".join([rng.choice(_FILLERS), *text.split()])
