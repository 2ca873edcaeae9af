"""Text that others wrote → the form our dialogues have; who is named in it is `personal`'s matter.

- `normalise_hindi` repairs wrong decoding and writes digits, dandas, spaces and joiners in one way
- `match_key` folds spellings further, for comparing only; it is never shown to anybody

Every pattern here is bounded: its time grows with the length of the text alone, however hostile the text.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Collection
from typing import Literal

import ftfy
import ftfy.bad_codecs  # registers sloppy-windows-1252, which knows all 256 bytes

Language = Literal["hi", "hinglish", "en"]

MAX_LOSSY_REPAIR = 2500
"""Up to so many characters, mojibake that has lost bytes is worth ftfy's full search, which takes 3 µs a character."""

# -- normalising ------------------------------------------------------------------------------------------------------

# The 64 continuation bytes of UTF-8 as a reader in cp1252 or latin-1 shows them.
_CONTINUATION = "".join(
    sorted({bytes([byte]).decode(codec) for byte in range(0x80, 0xC0) for codec in ("sloppy-windows-1252", "latin-1")})
)
_MISREAD = re.compile(
    f"(?:[à-ï][{_CONTINUATION}]{{2}}|[Â-ß][{_CONTINUATION}]|[ð-ô][{_CONTINUATION}]{{3}})"
    f"(?:[à-ï][{_CONTINUATION}]{{2}}|[Â-ß][{_CONTINUATION}]|[ð-ô][{_CONTINUATION}]{{3}}|[\\x00-\\x7f])*"
)
"""UTF-8 read as a one-byte encoding, with the ASCII that stands between."""
_SUSPECT = re.compile("[Â-ô\ufffd]")
_MISREAD_HINDI = re.compile("à[¤¥]")
_PLAIN = re.compile("[ -%'-{}~\u0900-\u0950\u0960-\u0964\u0970-\u097f\u2013\u2014\u20b9°]*")
"""What needs no repair: ASCII but & and |, Devanagari that NFC leaves alone, no digits of its own, no "॥"."""
_UNSTABLE = ("न\u093c", "र\u093c", "ळ\u093c", "्\u093c")
"""The nukta's places that NFC changes."""
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff"
    "\ufff0-\ufffb\ufffe\uffff\ue000-\uf8ff\ud800-\udfff]+"
)
_DEVANAGARI_DIGITS = {0x966 + digit: str(digit) for digit in range(10)}
_SIGNS = str.maketrans(_DEVANAGARI_DIGITS | {"॥": "।", "\u00a0": " ", "‘": "'", "’": "'", "“": '"', "”": '"'})
_BAR_DANDA = re.compile(r"(?<=[\u0900-\u0963)\"'%])( ?)[|¦](?:[ |¦]*[|¦])?(?![\w(])|(?<=[\u0900-\u0963])( ?)[|¦]+")
_SPACED_DANDA = re.compile(r" +(?=।)")
_GLUED_DANDA = re.compile(r"।(?=[^\s।\"')\]])")
_REPEATED = re.compile(r"([!?,;।.])(?: ?\1)+")
_RULES = ("----", "====", "____", "****", "####", "~~~~")
_RULE = re.compile(r"([-=_*#~])\1{3,}")
_MARK = (
    "[\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u064b-\u065f\u093c\u094d\u0951-\u0954\u1ab0-\u1aff\u1dc0-\u1dff"
    "\u20d0-\u20ff]"
)
_HEAPED_MARKS = re.compile(f"({_MARK}{{8}}){_MARK}+")
_ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z]{2,8});", re.IGNORECASE)


def normalise_hindi(text: str) -> str:
    """A text in the form our dialogues are written in.

    Mojibake is repaired (Hindi in UTF-8 that was read as cp1252 or latin-1, also twice, also in a part of the text);
    the rest is NFC, ASCII digits, `।` for "|" and "॥", one space between words, one mark of a kind in a row, and
    nothing invisible. Line breaks stay; other scripts, words and the nukta are left alone.
    """
    if _PLAIN.fullmatch(text) is None or ("\u093c" in text and any(pair in text for pair in _UNSTABLE)):
        text = _mend(text)
    if "।" in text:
        text = _GLUED_DANDA.sub("। ", text.replace(" ।", "।"))
    text = _REPEATED.sub(r"\1", text)
    if any_in(_RULES, text):
        text = _RULE.sub(" ", text)
    if "\n" in text:
        lines = (" ".join(line.split()) for line in text.split("\n"))
        return "\n".join(line for line in lines if line)
    return " ".join(text.split()) if "  " in text or text[:1] == " " or text[-1:] == " " else text


def _normal(form: Literal["NFC", "NFD"], text: str) -> str:
    # To sort the marks of one letter takes the square of their number; no letter has more than a few.
    return unicodedata.normalize(form, _HEAPED_MARKS.sub(r"\1", text))


def _mend(text: str) -> str:
    """A text with signs that are not plain Hindi or English."""
    if "&" in text:
        text = _ENTITY.sub(lambda match: html.unescape(match.group()), text)
    if _SUSPECT.search(text):
        text = _repair(text)
    text = _normal("NFC", text).translate(_SIGNS)
    text = _INVISIBLE.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    if "|" in text or "¦" in text:
        text = _BAR_DANDA.sub("। ", text)
    text = _SPACED_DANDA.sub("", text)
    if not text.isprintable():
        # Tabs, thin spaces and the like: line by line, all space is one.
        text = "\n".join(" ".join(line.split()) for line in text.split("\n"))
    return text


def _repair(text: str) -> str:
    # Twice, because some dumps were read wrongly twice.
    for _ in range(2):
        repaired = _MISREAD.sub(_decoded, text)
        if repaired == text:
            break
        text = repaired
    if _MISREAD_HINDI.search(text):
        if len(text) <= MAX_LOSSY_REPAIR:
            text = ftfy.fix_encoding(text)
        # What ftfy could not read either is no text in any encoding.
        text = _MISREAD_HINDI.sub("\ufffd", text)
    return text


def _decoded(match: re.Match[str]) -> str:
    run = match.group()
    for codec in ("sloppy-windows-1252", "latin-1"):
        try:
            return run.encode(codec).decode("utf-8")
        except UnicodeError:
            continue
    return run


def is_lost(text: str) -> bool:
    """Whether the letters of a text are gone: words of question marks only, replacement characters, broken mojibake.

    To be asked of the text as it came, since `normalise_hindi` takes repeated question marks for one.
    """
    if "??" not in text and (_PLAIN.fullmatch(text) or not _SUSPECT.search(text)):
        return False
    words = text.split()
    lost = sum(1 for word in words if len(word) > 1 and not word.strip("?.,|।-"))
    if "?" in text and lost * 2 >= len(words) and lost > 1:
        return True
    return normalise_hindi(text).count("\ufffd") * 10 > len(text)


# -- comparing --------------------------------------------------------------------------------------------------------

_NOT_WORD = re.compile(r"[^\w\u0900-\u0963 ]+")
_COMMON_MARKS = ("।", ",", ".", "-", "_", "?", "(", ")", "/", ":", "%")
_HOMORGANIC = re.compile("ङ्(?=[क-घ])|ञ्(?=[च-झ])|ण्(?=[ट-ढ])|न्(?=[त-ध])|म्(?=[प-भ])")
_ODD = re.compile("[\u0929\u0931\u0934\u0958-\u095f\u0966-\u096f\u200c\u200d]")
_FOLD = str.maketrans(_DEVANAGARI_DIGITS | {"\u093c": None, "\u200c": None, "\u200d": None})
_ASCII_FOLD = bytes(byte if chr(byte).isalnum() else 0x20 for byte in bytes(range(128)).lower()) + b" " * 128


def match_key(text: str) -> str:
    """A text's words folded for comparison, with one space between them.

    Lower case, ASCII digits, no punctuation, no nukta (कीड़ा = कीडा), chandrabindu and half nasals as anusvara
    (पाँच = पांच, अन्त = अंत), no joiners.
    """
    if text.isascii():
        return " ".join(text.encode().translate(_ASCII_FOLD).decode().split())
    if _ODD.search(text):
        text = _normal("NFD", text).translate(_FOLD)
    folded = text.replace("\u093c", "").replace("ँ", "ं").casefold()
    folded = _HOMORGANIC.sub("ं", folded)
    for mark in _COMMON_MARKS:
        folded = folded.replace(mark, " ")
    return " ".join(_NOT_WORD.sub(" ", folded).split())


_DEVANAGARI = re.compile("[\u0900-\u0963\u0970-\u097f]+")
_OTHER_LETTERS = re.compile(r"[^\W\d_a-zA-Z\u0900-\u097f]+")
_LATIN = re.compile("[a-zA-Z]+")


def _letters(text: str) -> tuple[int, int, int]:
    """How many letters and signs of Devanagari, of Latin and of all other scripts."""
    hindi, latin, other = (sum(map(len, p.findall(text))) for p in (_DEVANAGARI, _LATIN, _OTHER_LETTERS))
    return hindi, latin, other


def any_in(gates: tuple[str, ...], text: str) -> bool:
    for gate in gates:  # noqa: SIM110  any() over a generator takes three times as long
        if gate in text:
            return True
    return False


def words_of(text: str) -> frozenset[str]:
    """The words of a list that is written as one text."""
    return frozenset(text.split())


# Words of grammar: they tell the languages apart, and every sentence has some.
_HINDI = words_of("है हैं का की के को में से पर और करें कर तो ही भी नहीं या यह इस लिए हो रहा रही रहे गया दें ले प्रति डालें मिलाकर बाद")
_MARATHI = words_of(
    """
    आहे आहेत नाही करावी करावे करावा द्यावे द्यावी द्यावा घ्यावी घ्यावे किंवा आणि साठी मध्ये फवारणी
    पाण्यात  घेऊन मिसळून प्रमाणे करून असल्यास त्यामुळे चे ची चा  पिकावर   झाडांना
    """
)
_HINGLISH = words_of(
    """
    hai hain ka ki ke ko mein me se par aur kare karen karo kya kaise kab nahi nhi ho raha rahi rahe
    gaya lag liye fasal phasal dawa dava khad paani pani patte patta patti keeda kide kitna kitni
    dale daale chahiye jankari
    """
)
_ENGLISH = words_of("the of in for and to is are how what with about per on from control use apply spray which")


def language(text: str, words: Collection[str] | None = None) -> Language | None:
    """Hindi in Devanagari, Hindi in Latin letters, or English; `None` for any other language we can tell.

    Marathi is told from Hindi by its words. Romanised languages other than Hindi pass as English.

    Args:
        text: the text.
        words: the words of its `match_key`, if the caller has them already.
    """
    if words is None:
        words = match_key(text).split()
    if not text.isascii():
        # A Devanagari letter takes two bytes more than it has characters, so most Hindi is told without counting.
        if not (_PLAIN.fullmatch(text) and len(text.encode()) - len(text) >= len(text)):
            hindi, latin, other = _letters(text)
            if other * 5 > hindi + latin:
                return None
            if hindi * 3 < latin:
                return _romanised(words)
        return None if len(_MARATHI.intersection(words)) > len(_HINDI.intersection(words)) else "hi"
    return _romanised(words) if any(word.isalpha() for word in words) else None


def _romanised(words: Collection[str]) -> Language:
    hinglish, english = (len(known.intersection(words)) for known in (_HINGLISH, _ENGLISH))
    return "hinglish" if hinglish > english else "en"
