"""The people in a text that others wrote: phone, identity and account numbers, e-mail, names and villages taken out.

Every pattern here is bounded: its time grows with the length of the text alone, however hostile the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import pairwise

from advisory.normalise import any_in, words_of

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
    if any_in(_NAME_GATES, lower) or (hindi and any_in(_NAME_GATES_HI, lower)):
        text = _scrub_spans(text, _names(text), "name", kinds)
    if hindi and any_in(_VILLAGE_GATES_HI, lower):
        text = _scrub_spans(text, _villages(_VILLAGE_CUE_HI, text), "village", kinds)
    if any_in(_VILLAGE_GATES, lower):
        text = _scrub_spans(text, _villages(_VILLAGE_CUE, text), "village", kinds)
    return text, sorted(kinds)


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
    cued, account = any_in(_PHONE_CUES, before), any_in(_ACCOUNT_CUES, before)
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
