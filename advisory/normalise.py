"""Text that others wrote → the form our dialogues have, without the people in it.

- `normalise_hindi` repairs wrong decoding and writes digits, dandas, spaces and joiners in one way
- `match_key` folds spellings further, for comparing only; it is never shown to anybody
- `scrub_personal` takes out phone numbers, identity and account numbers, e-mail, names and villages

Every pattern here is bounded: its time grows with the length of the text alone, however hostile the text.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise
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
    if _any_in(_RULES, text):
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


def devanagari_share(text: str) -> float:
    """Devanagari letters and signs as a share of all letters, 0 … 1; 0 where there is no letter."""
    if text.isascii():
        return 0.0
    counts = _letters(text)
    return counts[0] / sum(counts) if any(counts) else 0.0


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


# -- people -----------------------------------------------------------------------------------------------------------

MASKS = {
    "phone": "[फोन]", "aadhaar": "[पहचान]", "account": "[खाता]", "email": "[ईमेल]", "name": "[नाम]", "village": "[गांव]",
}  # fmt: skip

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,4}")
_IFSC = re.compile(r"0(?<=[A-Za-z]{4}0)(?<![A-Za-z0-9][A-Za-z]{4}0)(?=[A-Za-z]{0,5}\d)[A-Za-z0-9]{6}(?![A-Za-z0-9])")
_NUMBER = re.compile(r"(?<!\d)(?:\+ ?)?\(?\d(?:[ ().\-–+]{0,3}\d){8,39}")
_LONG_NUMBER = re.compile(r"[0-9०-९](?:[ ().\-–+]{0,3}\d){8}")
_DIGITS = re.compile(r"\d+")
_PHONE_CUES = (
    "mob", "phone", "ph.", "contact", "call", "whatsapp", "number", "no.", "मोबाइल", "मोबाईल", "फोन", "फ़ोन", "नंबर",
    "नम्बर", "संपर्क", "सम्पर्क", "नं",
)  # fmt: skip
_ACCOUNT_CUES = ("account", "a/c", "acc ", "खाता", "खाते", "बैंक", "bank")
_TOLL_FREE = ("1800", "1860")
_CUE_REACH = 30

# Groups in which people write ten digits; anything else needs a word such as "mobile" before it.
_MOBILE_GROUPS = frozenset(
    {(10,), (5, 5), (3, 3, 4), (4, 3, 3), (3, 4, 3), (4, 6), (6, 4), (3, 7), (7, 3), (4, 4, 2), (2, 4, 4), (2, 8),
     (8, 2), (2, 2, 2, 2, 2), (2, 2, 3, 3), (1,) * 10, (5, 3, 2), (5, 2, 3), (2, 3, 5), (3, 2, 5)}
)  # fmt: skip

_HINDI_WORD = "[\u0900-\u0963]{2,24}"
_LATIN_WORD = "[A-Za-z][A-Za-z.]{1,23}"
_NAME_WORDS = re.compile(rf"[ ]*({_HINDI_WORD}|{_LATIN_WORD})")
_NAME_CUE = re.compile(
    r"(?<![\u0900-\u0963\w])(?:"
    r"(?:(?:मेरा|मेरे|हमारा|किसान का|कृषक का|पिता का|पिताजी का|पति का|पत्नी का)[ ]?)नाम[ ]?(?:है[ ])?[:=\-–]?"
    r"|(?:किसान|कृषक|पिता|पति)(?: का)? नाम[ ]?[:=\-–]?|नाम[ ]?[:=]"
    r"|(?:श्रीमती|श्रीमान|श्री|सुश्री|कुमारी)\.?(?![\u0900-\u0963])|(?:पुत्र|पत्नी|आत्मज|सुपुत्र) (?:श्री |का नाम )?"
    r"|(?:[sdwc][/][o]|(?:mr|mrs|smt|shri|shree|kumari)\b)[ ]?[.:\-]?"
    r"|(?:(?:farmers?|father|husband|caller|my)(?:['’]?s)?[ ]name)(?: is)?[ ]?[:=\-]?"
    r"|name[ ]?[:=]|mera nam+e? ?(?:hai )?"
    r")",
    re.IGNORECASE,
)
_NAME_GATES = ("/o", "name", "mr", "smt", "shr", "kumari", "mera n")
_NAME_GATES_HI = ("नाम", "श्री", "कुमारी", "पुत्र", "पत्नी", "आत्मज")
_NO_NAME = words_of(
    """
    है हैं हूं हूँ था थी ने को का की के से में पर तो भी और या क्या कौन कौनसा बताएं बताये बताइए बता
    बोल जी गांव ग्राम गाँव मोबाइल मोबाईल फोन नंबर जिला तहसील पोस्ट ब्लॉक निवासी पूछ पूछा चाहते चाहता
    चाहती द्वारा किसान कृषक विधि पद्धति अन्न लिखें दर्ज पिता पति पुत्र पत्नी गेहूं धान मक्का आलू फसल
    खेत दवा खाद बीज गलत नहीं हो कर करें जुड़ जोड़ने लिस्ट सूची कट is are was has have had asked
    asking ask want wants wanted to from of in on and or the for about his her vill village dist
    district mobile mob phone no number said says called caller not ke ki ka ko ne se me mein hai
    hain ji gaon gram method technique vidhi system paddy rice wheat crop with by at asks told need
    needs correction list missing wrong change
    """
)
_VARIETY = re.compile(r"[ ]*(?:राम|ram) (?:सुपर|super|\d)", re.IGNORECASE)  # Shri Ram Super 303 is a wheat variety
_OPENING = re.compile(r"(?:\A|[,;:।.|(\n])[ ]*\Z")
_MAX_NAME_WORDS = 3

_AFTER_CUE = rf"[ ]?[.:=\-–]{{0,2}}[ ]?({_HINDI_WORD}|{_LATIN_WORD})"
_VILLAGE_CUE_HI = re.compile(rf"(?:ग्राम|गांव|गाँव|मौजा)(?![\u0900-\u0963\w]){_AFTER_CUE}")
_VILLAGE_CUE = re.compile(rf"\b(?:village|vill|vlg|gaon|gram)\b{_AFTER_CUE}", re.IGNORECASE)
_VILLAGE_GATES = ("vill", "vlg", "gaon", "gram")
_VILLAGE_GATES_HI = ("ग्राम", "गांव", "गाँव", "मौजा")
_VILLAGE_ENDING = re.compile(
    r"(?:पुर|पुरा|पुरी|पुरवा|गंज|गढ़|गढ़|नगर|खेड़ा|खेड़ी|खेडा|खेडी|ाबाद|वाड़ी|वाड़ा|टोला|टोली|डीह|कलां|खुर्द|गांव|गाँव|हाट|डांगा|"
    r"pura?|puri|purwa|ganj|garh|nagar|khera|kheda|kheri|khedi|abad|gaon|wadi|wada|tola|toli|dih|kalan|khurd)$",
    re.IGNORECASE,
)
_ADDRESS = re.compile(
    r"[ ,.\-]{0,3}(?:पोस्ट|डाकघर|तहसील|थाना|post|p\.?o\.?|tehsil|tahsil|thana|teh)(?![\u0900-\u0963\w])"
    rf"[ ]?[.:=\-–]{{0,2}}[ ]?(?:{_HINDI_WORD}|{_LATIN_WORD})",
    re.IGNORECASE,
)
_DISTRICT = re.compile(r"[ ,.\-]{0,3}(?:जिला|जनपद|ब्लॉक|dist|district|block)(?![\u0900-\u0963\w])", re.IGNORECASE)
_PERSON_BEFORE = re.compile(r"(?:^|[,।:;\n\]]|निवासी|मेरा|मेरे|हमारे|हमारा|from|at|of|\bse)[ ]*$", re.IGNORECASE)
_WORD_BEFORE = re.compile(r"[\u0900-\u0963\w]$")
_NO_VILLAGE = _NO_NAME | words_of(
    """
    पंचायत सभा प्रधान सेवक विकास प्रति दवा पानी बीज यूरिया डीएपी चीनी गुड़ पाउडर मात्रा लीटर एकड़
    लेकर मिलाकर घोल सुबह आसपास वाले वालों तक सल्फर पोटाश जिंक बोरान कार्बेन्डाजिम मैंकोजेब
    इमिडाक्लोप्रिड level panchayat people fair pond land area near name where per water seed seeds
    urea dap litre liter acre powder flour pod pods sowing sevak sabha pradhan there this that all
    every farmers farmer it has
    """
)


def scrub_personal(text: str) -> tuple[str, list[str]]:
    """A text with what points to a person replaced by masks such as `[फोन]`.

    Mobile and landline numbers (any grouping, also Devanagari digits), Aadhaar-like and account numbers, IFSC, e-mail,
    names that follow a word such as श्री, Smt or "farmer name", and villages that follow ग्राम or "village". Toll-free
    numbers and the short public ones (108, 112, 1962, 14416), doses, years and dates stay.

    Returns:
        the text, and the kinds that were found in it (keys of `MASKS`), sorted.
    """
    kinds: set[str] = set()
    if "@" in text:
        text = _scrub_spans(text, (match.span() for match in _EMAIL.finditer(text)), "email", kinds)
    if _LONG_NUMBER.search(text):
        text = _NUMBER.sub(lambda match: _scrub_number(match, kinds), text)
    if "0" in text:
        spans = ((match.start() - 4, match.end()) for match in _IFSC.finditer(text))
        text = _scrub_spans(text, spans, "account", kinds)
    lower = text.lower()
    hindi = not text.isascii()
    if _any_in(_NAME_GATES, lower) or (hindi and _any_in(_NAME_GATES_HI, lower)):
        text = _scrub_spans(text, _names(text), "name", kinds)
    if hindi and _any_in(_VILLAGE_GATES_HI, lower):
        text = _scrub_spans(text, _villages(_VILLAGE_CUE_HI, text), "village", kinds)
    if _any_in(_VILLAGE_GATES, lower):
        text = _scrub_spans(text, _villages(_VILLAGE_CUE, text), "village", kinds)
    return text, sorted(kinds)


def _any_in(gates: tuple[str, ...], text: str) -> bool:
    for gate in gates:  # noqa: SIM110  any() over a generator takes three times as long
        if gate in text:
            return True
    return False


def _scrub_spans(text: str, spans: Iterable[tuple[int, int]], kind: str, kinds: set[str]) -> str:
    pieces, done = [], 0
    for start, end in spans:
        if start >= done:
            pieces += [text[done:start], MASKS[kind]]
            done = end
            kinds.add(kind)
    return "".join([*pieces, text[done:]]) if pieces else text


def _scrub_number(match: re.Match[str], kinds: set[str]) -> str:
    """A run of digits and separators with the phone, identity and account numbers in it masked."""
    found = match.group()
    ascii_digits = found if found.isascii() else "".join(map(_ascii_digit, found))
    before = match.string[max(0, match.start() - _CUE_REACH) : match.start()].lower()
    cued, account = _any_in(_PHONE_CUES, before), _any_in(_ACCOUNT_CUES, before)
    groups = list(_DIGITS.finditer(ascii_digits))
    digits = [group.group() for group in groups]
    if not cued and len(groups) > 1 and all(group[-1] in "05" and len(group) <= 4 for group in digits):
        return found  # quantities: 60 40 20
    pieces, done, index = [], 0, 0
    while index < len(groups):
        total, lasts = 0, []
        for last in range(index + 1, len(groups) + 1):
            total += len(digits[last - 1])
            if total > 13 and last > index + 1:
                break
            if total >= 10 or (total >= 9 and last == index + 1):
                lasts.append(last)
        # The longest first, so that +91 and 0 go with their number.
        for last in reversed(lasts):
            kind = _number_kind(digits[index:last], cued=cued, account=account)
            if kind is None or (kind == "phone" and not cued and not _uniform(ascii_digits, groups[index:last])):
                continue
            if kind != "public":
                start = groups[index].start()
                # "+91" and "(0522)" go whole.
                while start > done and found[start - 1] in "+(":
                    start -= 1
                pieces += [found[done:start], MASKS[kind]]
                done = groups[last - 1].end()
                kinds.add(kind)
            index = last - 1
            break
        index += 1
    return "".join([*pieces, found[done:]])


def _ascii_digit(character: str) -> str:
    return str(unicodedata.digit(character)) if character.isdigit() else character


def _uniform(found: str, groups: list[re.Match[str]]) -> bool:
    """Whether one and the same separator stands between all groups, as between quantities it seldom does."""
    if len(groups) < 3 or groups[0].group().startswith(("0", "91")):
        return True
    return len({found[left.end() : right.start()].strip() for left, right in pairwise(groups)}) == 1


def _number_kind(groups: list[str], *, cued: bool, account: bool) -> str | None:
    """A key of `MASKS`, `public` for a number that all may know, `None` for no such number.

    Args:
        groups: digits, in the groups in which they are written.
        cued: a word such as "mobile" stands before.
        account: a word such as "account" stands before.
    """
    total = sum(map(len, groups))
    if len(groups) == 1 and (total >= 14 or (total >= 9 and account)):
        return "account"
    if not 10 <= total <= 13:
        return None
    first = groups[0][0]
    if first == "1" and groups[0][:2] != "18":
        return "account" if len(groups) == 1 and total >= 11 else None
    if total > 10 and total != 12 and first not in "019":
        return "account" if len(groups) == 1 else None
    digits = "".join(groups)
    if digits.startswith(_TOLL_FREE) and total <= 11:
        return "public"
    sizes = tuple(map(len, groups))
    if not cued and len(groups) > 1:
        # Quantities are round, and dates have a year among short groups.
        if all(group[-1] in "05" and len(group) <= 4 for group in groups):
            return None
        if len(groups) > 2 and 4 in sizes and any(len(group) == 4 and "1950" <= group <= "2049" for group in groups):
            return None
    lead = total - 10
    if lead == 0 or digits.startswith(("0", "91", "091")):
        # What leads (0, +91) stands apart or is part of the first group; the rest must be grouped as people do.
        local = sizes if not lead else sizes[1:] if sizes[0] == lead else (sizes[0] - lead, *sizes[1:])
        if digits[lead] in "6789" and (cued or local in _MOBILE_GROUPS):
            return "phone"
    if digits[0] == "0" and total <= 11 and len(groups) <= 3 and len(groups[0]) >= 3:
        return "phone"
    if cued and total == 10 and digits[0] in "2345":
        return "phone"
    if total == 12 and digits[0] not in "01" and sizes in ((12,), (4, 4, 4), (4, 8), (8, 4)):
        return "aadhaar"
    return "account" if len(groups) == 1 and total >= 11 else None


def _names(text: str) -> Iterator[tuple[int, int]]:
    """Where names stand that follow a word which announces one."""
    position = 0
    while cue := _NAME_CUE.search(text, position):
        position = cue.end()
        if _VARIETY.match(text, cue.end()):
            continue
        # "नाम: रमेश" opens a sentence; "दवा का नाम: ..." and "variety name: ..." speak of things.
        if cue.group()[:4].lower() in ("नाम", "नाम:", "नाम ", "नाम=", "name") and not _OPENING.search(
            text, max(0, cue.start() - 3), cue.start()
        ):
            continue
        start = position
        first = ""
        for count in range(_MAX_NAME_WORDS):
            word = _NAME_WORDS.match(text, position)
            if word is None or word.group(1).casefold().strip(".") in _NO_NAME:
                break
            # "Mr Ramesh has" ends at the small letter; "mr ramesh kumar" has none to go by and ends at a known word.
            if count and first[0].isupper() and not word.group(1)[0].isupper() and word.group(1).isascii():
                break
            if count == 0:
                first = word.group(1)
                start = word.start(1)
            position = word.end()
        if first:
            yield start, position


def _villages(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    """Where village names stand. "5 ग्राम" is a weight, and "ग्राम पंचायत" no name."""
    for cue in pattern.finditer(text):
        name = cue.group(1)
        before = text[max(0, cue.start() - 12) : cue.start()]
        if name.casefold().strip(".") in _NO_VILLAGE or _WORD_BEFORE.search(before):
            continue
        if cue.group()[:4].casefold() in ("ग्रा", "gram") and before.rstrip(" -.%")[-1:].isdigit():
            continue
        end = cue.end()
        addressed = _ADDRESS.match(text, end) or _DISTRICT.match(text, end)
        announced = cue.group().casefold().startswith(("vill", "vlg", "ग्राम", "मौजा")) and (
            _PERSON_BEFORE.search(before) or name[0].isupper()
        )
        if not (addressed or _VILLAGE_ENDING.search(name) or announced):
            continue
        for _ in range(3):
            if (more := _ADDRESS.match(text, end)) is None:
                break
            end = more.end()
        yield cue.start(1), end
