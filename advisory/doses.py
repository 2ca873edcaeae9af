"""Every dose in a text: an amount with its unit and what it is meant for, or the strength of a formulation.

Devanagari, Hinglish and English, in digits or words ("2 मिली प्रति लीटर पानी", "आधा लीटर", "do chammach", "25 EC").
Ages, times, telephone numbers, rain, temperatures and the readings of a soil card are no doses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_WORDS = {
    "आधा आधी आधे aadha aadhi adha adhi half": 0.5, "पाव चौथाई paav pav quarter": 0.25, "पौन पौना पौनी paun pauna": 0.75,
    "सवा sawa": 1.25, "डेढ dedh derh": 1.5, "ढाई अढाई dhai dhaai": 2.5, "एक ek one": 1, "दो do two": 2,
    "तीन teen tin three": 3, "चार char chaar four": 4, "पांच paanch panch five": 5, "छह छः छे chhe chhah six": 6,
    "सात saat seven": 7, "आठ aath eight": 8, "नौ nau nine": 9, "दस das dus ten": 10, "बारह barah twelve": 12,
    "पंद्रह पन्द्रह pandrah fifteen": 15, "बीस bees bis twenty": 20, "पच्चीस pachis pachchis": 25, "तीस tees thirty": 30,
    "चालीस chalis forty": 40, "पचास pachas fifty": 50, "साठ sixty": 60, "पचहत्तर": 75, "अस्सी": 80,
    "सौ sau hundred": 100, "हजार hazar hajar thousand": 1000,
}  # fmt: skip
_VALUE = {word: value for words, value in _WORDS.items() for word in words.split()}
_MORE = {"साढे": 0.5, "सवा": 0.25, "पौने": -0.25, "sadhe": 0.5, "saadhe": 0.5, "sawa": 0.25, "paune": -0.25}
_FRACTION = {"½": 0.5, "¼": 0.25, "¾": 0.75}

_LEFT, _RIGHT = r"(?<![0-9a-z\u0900-\u0963])", r"(?![a-z\u0900-\u0963])"
_WORD = "|".join(sorted(_VALUE, key=len, reverse=True))
# Bounded, so that a long run of digits is passed over in one go.
_DIGITS = (
    r"(?<![0-9a-z\u0900-\u0963.,/])(?:\d{1,3}(?:,\d{2,3}){1,3}(?:\.\d{1,4})?|\d{1,3}\s?/\s?\d{1,3}|"
    r"(?:\d{1,7}(?:\.\d{1,4})?|\.\d{1,4})\s?[½¼¾]?|[½¼¾])(?!\d)"
)
_SPOKEN = (
    rf"{_LEFT}(?:(?:{'|'.join(_MORE)})\s+(?:{_WORD})|(?:{_WORD})(?:\s+(?:सौ|हजार|sau|hazar|hajar|hundred|"
    rf"thousand){_RIGHT})?)"
    rf"{_RIGHT}(?:\s+an?\b)?"
)
_NUMBER = f"(?:{_DIGITS}|{_SPOKEN})"
_RANGE = rf"(?P<low>{_NUMBER})(?:\s*(?:-|–|—|~|से|या|to|or|se|ya)\s*(?P<high>{_NUMBER}))?"
_BETWEEN = (
    r"\s*-?\s*(?:(?:छोटा|छोटे|छोटी|बडा|बडे|बडी|पूरा|पूरी|चाय का|भरा|chhota|chota|bada|small|big|level|"
    r"full|tea|table)\s+)?"
)

_PHONE = r"(?!\s?(?:नेटवर्क|फोन|मोबाइल|सिम|network|phone|mobile|sim|हां|हाँ))"
# The first pattern that fits decides, so the longer spellings stand first: "मिली" is no "मि", "ग्राम" no "ग्रा".
_UNITS = {
    "mg": r"मिलीग्राम|मिग्रा\.?|मि\.\s?ग्रा\.?|milligrams?|mg",
    "ml": r"मिलीलीटर|मिलीलिटर|मिली\.?|मिलि\.?|मि\.?\s?ली\.?|एम\.?\s?एल\.?|सीसी|सी\.\s?सी\.?|mill?ilit(?:er|"
    "re)s?|mls?|mili|cc",
    "kg": r"किलोग्राम|किग्रा\.?|कि\.?\s?ग्रा\.?|किलो|के\.?\s?जी\.?|kilograms?|kilos?|kgs?",
    "g": rf"ग्राम|ग्रैम|ग्रा\.?|grammes?|grams?|gms?|जी{_PHONE}|g{_PHONE}",
    "l": r"लीटर|लिटर|ली\.|ली(?!\s*(?:है|हैं|थी|गई|हुई|जाए))|लि\.|lit(?:er|re)s?|ltrs?|lit|lt|l",
    "quintal": r"क्विंटल|क्विन्टल|कुंतल|कुन्तल|quintals?|qtls?|kuintal",
    "tonne": r"टन|tonnes?|tons?",
    "trolley": r"ट्राली|ट्रॉली|ट्रोली|troll(?:e?y|ies)",
    "ppm": r"पी\.?\s?पी\.?\s?एम\.?|ppm",
    "spoon": r"चम्मच|चमच|chamm?ach|(?:tea|table)?spoons?|tsp|tbsp",
    "cap": r"ढक्कन|ढकन|dhakk?an|capfuls?|caps?",
    "packet": r"पैकेट|पाउच|पुडिया|शीशी|बोतल|डिब्बी|डिब्बा|डिब्बे|packets?|pouch(?:es)?|bottles?|sachets?",
    "tablet": r"गोली|गोलियां|टिकिया|tablets?|goli",
    "bag": r"बोरी|बोरियां|बोरा|बोरे|कट्टा|कट्टे|bags?|bor[aie]|katt[ae]",
    "handful": r"(?:मुट्ठी|मुठ्ठी|मुट्टी|handfuls?|mutthi)(?!\s+(?:भर\s+|bhar\s+|of\s+)?(?:मिट्टी|mitti|soil))",
    "drop": r"बूंद|बूंदें|drops?|boond",
    "ec": r"%?\s?-?\s?(?:ई\.?\s?सी\.?|e\.?c\.?)", "sc": r"%?\s?-?\s?(?:एस\.?\s?सी\.?|s\.?c\.?)",
    "sl": r"%?\s?-?\s?(?:एस\.?\s?एल\.?|s\.?l\.?)", "wdg": r"%?\s?-?\s?(?:डब्ल्?यू\.?\s?डी\.?\s?जी\.?|wdg)",
    "wp": r"%?\s?-?\s?(?:डब्ल्?यू\.?\s?पी\.?|डब्लू\.?\s?पी\.?|w\.?p\.?)",
    "wg": r"%?\s?-?\s?(?:डब्ल्?यू\.?\s?जी\.?|डब्लू\.?\s?जी\.?|w\.?g\.?)",
    "ws": r"%?\s?-?\s?(?:डब्ल्?यू\.?\s?एस\.?|ws)", "sg": r"%?\s?-?\s?(?:एस\.?\s?जी\.?|sg)",
    "sp": r"%?\s?-?\s?(?:एस\.?\s?पी\.?|sp)", "gr": r"%?\s?-?\s?(?:जी\.?\s?आर\.?|"
    "gr)", "cg": r"%?\s?-?\s?(?:सी\.?\s?जी\.?|cg)",
    "fs": r"%?\s?-?\s?(?:एफ\.?\s?एस\.?|fs)", "ds": r"%?\s?-?\s?(?:डी\.?\s?एस\.?|"
    "ds)", "dp": r"%?\s?-?\s?(?:डी\.?\s?पी\.?|dp)",
    "zc": r"%?\s?-?\s?(?:जेड\.?\s?सी\.?|zc)", "od": r"%?\s?-?\s?(?:ओ\.?\s?डी\.?|"
    "od)", "ew": r"%?\s?-?\s?(?:ई\.?\s?डब्ल्यू\.?|ew)",
    "cs": r"%?\s?-?\s?(?:सी\.?\s?एस\.?|cs)",
    "%": r"%|प्रतिशत|फीसदी|फीसद|परसेंट|per\s?cent|pratishat|fisadi",
}  # fmt: skip
FORMULATIONS = frozenset(
    ("ec", "sc", "sl", "wdg", "wp", "wg", "ws", "sg", "sp", "gr", "cg", "fs", "ds", "dp", "zc", "od", "ew", "cs")
)
_SMALL = {"mg": ("g", 0.001), "kg": ("g", 1000.0), "l": ("ml", 1000.0)}
_NAMES = tuple(_UNITS)
_AMOUNT = re.compile(
    f"{_RANGE}{_BETWEEN}(?:{'|'.join(f'(?P<u{n}>(?:{_UNITS[unit]}){_RIGHT})' for n, unit in enumerate(_NAMES))})"
)
_FULL = re.compile(rf"{_LEFT}(?P<unit>चम्मच|ढक्कन|chamm?ach|dhakk?an)\s+(?:भर|bhar){_RIGHT}")
_MAY = re.compile(r"[0-9०-९½¼¾]|" + "|".join(f"(?:{_LEFT}{word})" for word in _VALUE) + r"|भर|bhar")

_LITRE = r"(?:लीटर|लिटर|ली\.?|lit(?:er|re)s?|ltrs?|lit|l)"
_WATER = r"(?:पानी|pa+ni|water)"
_AREAS = {
    "acre": r"एकड|acres?|akad|ekad|ekar",
    "hectare": r"हेक्टेयर|हैक्टेयर|हेक्टर|हे\.|hectares?|hec|ha",
    "bigha": r"बीघा|बीघे|bigha|bighe",
}
_SEED = r"(?:बीज|seeds?|beej)"
_KILO = r"(?:किलो(?:ग्राम)?|किग्रा|kgs?|kilo)"
_BASES = _AREAS | {
    "quintal_seed": rf"(?:क्विंटल|कुंतल|quintal)\s*{_SEED}",
    "kg_seed": rf"{_KILO}(?:\s*(?:of\s+)?{_SEED})?",
    "plant": r"पौध[ाे]|पेड|plants?|trees?|paudha|ped",
    "tank": r"टंकी|पंप|pump|tank|tanki|ड्रम",
    "litre_water": rf"{_LITRE}(?:\s*(?:of\s+)?{_WATER})?",
}
_PER = re.compile(
    rf"(?:(?:प्रति|हर|per|prati|har|every|each)\s*(?P<many>\d{{1,5}}(?:\.\d{{1,3}})?)?\s*-?|"
    rf"(?<!\d)/\s?(?P<slash>\d{{1,5}}(?:\.\d{{1,3}})?)?\s?|{_LEFT}(?:एक|ek|an?|one)\s+)"
    rf"(?:{'|'.join(f'(?P<b{n}>{pattern})' for n, pattern in enumerate(_BASES.values()))}){_RIGHT}"
)
_COUNTED = re.compile(
    rf"(?P<count>{_NUMBER})\s*(?:(?P<water>{_LITRE}\s*(?:of\s+)?{_WATER})"
    rf"|(?P<tank>{_LITRE}\s*(?:(?:की|का|के|वाली|वाला|वाले|ki|ka|wali|wale)\s+)?(?:टंकी|पंप|टैंक|tanki|tank|pump|"
    rf"ड्रम))"
    rf"|(?P<seed>(?:किलो(?:ग्राम)?|किग्रा|kgs?|kilo)\s*(?:of\s+)?(?:बीज|seeds?|beej)))(?=\s*(?:में|मे\b|me\b|"
    rf"mein\b|पर|के लिए|[,.)।]|$))"
    rf"|\bin\s+(?P<count_in>{_NUMBER})\s*{_LITRE}\s+(?:of\s+)?{_WATER}"
)
_NEAR = 40
"""So many letters may stand between an amount and what it is for ("2 मिली दवा को एक लीटर पानी में")."""

_SHARE_OF = re.compile(
    r"\s*(?:से\s+(?:ज्यादा|अधिक|कम|ऊपर)|तक|(?:se\s+)?(?:zyada|jyada|kam)|of\s+(?:the\s+)?)?\s*(?:"
    r"पौध|पत्त|फल|फूल|फली|फलियां|बाल|दाने(?!दार)|खेत|फसल|टिंड|डोड|शाख|कल्ल|नुकसान|हानि|नमी|आर्द्रता|उपज|पैदावार|सब्सिडी|"
    r"छूट|अनुदान|संभावना|चांस|रोग|"
    r"कीट(?!नाश)|प्रकोप|संक्रमण|अंकुरण|जमाव|हिस्स|भाग|किसान|ब्याज|खराब|बर्बाद|सूख|plants?|lea(?:f|ves)|damage|loss|"
    r"humidity|moisture|yield|"
    r"subsidy|chance|germination|infest|infect|area|crop|fruits?|pods?|bolls?|farmers|patt|paud|phal|fasal|"
    r"nuksan|nami|khet)"
)
_SHARE_BEFORE = re.compile(
    r"(?:नमी|आर्द्रता|कार्बन|humidity|moisture|\brh|\boc|nami|subsidy|सब्सिडी)\s*(?::|=|"
    r"है|is)?\s*(?:करीब|लगभग)?\s*$"
)
_HARVEST = re.compile(
    r"\s*(?:प्रति\s+\S+\s+)?(?:की\s+|का\s+)?(?:पैदावार|उपज|उत्पादन|दूध|अनाज|yield|production|"
    r"milk|paidawar|upaj|doodh)"
)
_HARVEST_BEFORE = re.compile(r"(?:पैदावार|उपज|उत्पादन|yield|paidawar|upaj)\s*(?:करीब|लगभग|about|of)?\s*$")
_READING = re.compile(r"\s*(?:मिट्टी|मौसम|mitti|mausam|soil|weather)\s*(?:की जांच)?\s*:")
_PH = re.compile(r"p\.?h\.?\s*[:=]?\s*$")

_GONE = "\u093c\u200b\u200c\u200d\u00ad\ufeff"
_SIGNS = str.maketrans(
    {0x966 + digit: str(digit) for digit in range(10)}
    | {0x958 + n: base for n, base in enumerate("कखगजडढफय")}
    | {"ँ": "ं", "\u00a0": " ", "％": "%", "॥": "।"}
)
_STOP = re.compile(r"[।\n!?;|]|\.(?=\s+[^\s\d])(?<=[^\s.]{3}\.)(?<!ग्रा\.)")


@dataclass(frozen=True)
class Dose:
    """An amount in a text."""

    low: float
    high: float
    """The same as `low` where no range is given."""
    unit: str
    """g, ml, %, ppm, quintal, tonne, spoon, cap, packet, bag …, or the letters of a formulation (ec, wp …).

    Kilograms and milligrams are counted in g, litres in ml."""
    per: str | None
    """acre, hectare, bigha, litre_water, kg_seed, quintal_seed, plant, tank; `None` where the text does not say."""
    start: int
    end: int
    matched: str

    def same_as(self, other: Dose) -> bool:
        """Whether both say the same, wherever they stand."""
        numbers = zip((self.low, self.high), (other.low, other.high), strict=True)
        return (self.unit, self.per) == (other.unit, other.per) and all(
            abs(a - b) <= 1e-6 * max(a, b) for a, b in numbers
        )


@dataclass(frozen=True)
class _Basis:
    start: int
    end: int
    per: str
    count: float
    counted: bool
    """Whether the text gives its number ("10 लीटर पानी में"), so that it may be an amount itself."""


def doses(text: str) -> tuple[Dose, ...]:
    """Every dose in `text`, in order; lines of a soil card or a weather report (`मिट्टी:`, `मौसम:`) are passed over."""
    if not _MAY.search(text.lower()):
        return ()
    plain, places = _plain(text)
    found: list[Dose] = []
    start = 0
    for stop in [*_STOP.finditer(plain), None]:
        end = stop.start() if stop is not None else len(plain)
        line = plain.rfind("\n", 0, start) + 1
        if end > start and not _READING.match(plain, line):
            found += _in_sentence(plain, start, end)
        if stop is not None:
            start = stop.end()
    if places is None:
        return tuple(_placed(dose, text, dose.start, dose.end) for dose in found)
    return tuple(_placed(dose, text, places[dose.start], places[dose.end - 1] + 1) for dose in found)


def _placed(dose: Dose, text: str, start: int, end: int) -> Dose:
    return Dose(dose.low, dose.high, dose.unit, dose.per, start, end, text[start:end])


def _plain(text: str) -> tuple[str, list[int] | None]:
    """The text in lower case with ASCII digits and without nukta and joiners, and where each letter stood."""
    signs = text.translate(_SIGNS)
    lower = signs.lower()
    if len(lower) != len(signs):
        lower = "".join(sign.lower() if len(sign.lower()) == 1 else sign for sign in signs)
    if not any(sign in lower for sign in _GONE):
        return lower, None
    places = [index for index, sign in enumerate(lower) if sign not in _GONE]
    return "".join(lower[index] for index in places), places


def _in_sentence(plain: str, start: int, end: int) -> Iterator[Dose]:
    bases = list(_bases(plain, start, end))
    amounts = list(_amounts(plain, start, end))
    is_area = {(basis.start, basis.end) for basis in bases if basis.per in _AREAS}
    # A counted basis is an amount of its own unless another amount leans on it and no area is named.
    leaning = [
        basis for basis in bases
        if basis.counted and not is_area and any(not _overlap(amount, basis) for amount in amounts)
    ]  # fmt: skip
    kept = [
        amount
        for amount in amounts
        if not any(_overlap(amount, basis) for basis in bases if not basis.counted or basis in leaning)
    ]
    usable = [basis for basis in bases if not basis.counted or basis in leaning]
    for amount in kept:
        basis = None if amount.unit in FORMULATIONS or amount.unit in ("%", "ppm") else _basis_of(amount, kept, usable)
        low, high, unit = amount.low, amount.high, amount.unit
        if unit in _SMALL:
            unit, times = _SMALL[unit]
            low, high = low * times, high * times
        if basis is not None:
            low, high = low / basis.count, high / basis.count
        yield Dose(low, high, unit, basis.per if basis else None, amount.start, amount.end, "")


def _overlap(amount: Dose, basis: _Basis) -> bool:
    return amount.start < basis.end and basis.start < amount.end


def _basis_of(amount: Dose, amounts: list[Dose], bases: list[_Basis]) -> _Basis | None:
    """What an amount is for: what follows it at once, what stands just before it, or the area the sentence names."""

    def beside(start: int, end: int) -> bool:
        return end - start <= _NEAR and not any(start <= other.start < end for other in amounts)

    following = next((basis for basis in bases if basis.start >= amount.end), None)
    if following is not None and beside(amount.end, following.start):
        return following
    before = next((basis for basis in reversed(bases) if basis.end <= amount.start), None)
    if before is not None and beside(before.end, amount.start):
        return before
    areas = [basis for basis in bases if basis.per in _AREAS]
    return next((basis for basis in areas if basis.start >= amount.end), areas[-1] if areas else before)


def _bases(plain: str, start: int, end: int) -> Iterator[_Basis]:
    taken: list[tuple[int, int]] = []
    for match in _PER.finditer(plain, start, end):
        per = next(name for n, name in enumerate(_BASES) if match[f"b{n}"])
        count = float(match["many"] or match["slash"] or 1)
        taken.append(match.span())
        if count > 0:
            yield _Basis(match.start(), match.end(), per, count, False)
    for match in _COUNTED.finditer(plain, start, end):
        if any(match.start() < stop and begin < match.end() for begin, stop in taken):
            continue
        count = _value(match["count"] or match["count_in"])
        if count > 0:
            yield _Basis(match.start(), match.end(), "kg_seed" if match["seed"] else "litre_water", count, True)


def _amounts(plain: str, start: int, end: int) -> Iterator[Dose]:
    for match in _AMOUNT.finditer(plain, start, end):
        unit = next(name for n, name in enumerate(_NAMES) if match[f"u{n}"])
        if _no_dose(plain, match, unit, start):
            continue
        low = _value(match["low"])
        high = _value(match["high"]) if match["high"] else low
        yield Dose(min(low, high), max(low, high), unit, None, match.start(), match.end(), "")
    for match in _FULL.finditer(plain, start, end):
        unit = next(name for name, pattern in _UNITS.items() if re.fullmatch(pattern, match["unit"]))
        yield Dose(1.0, 1.0, unit, None, match.start(), match.end(), "")


def _no_dose(plain: str, match: re.Match[str], unit: str, start: int) -> bool:
    """Shares of a field, moisture, yields, and the acidity before an "EC" that is no formulation."""
    before = plain[max(start, match.start() - 30) : match.start()]
    if unit == "%":
        return bool(_SHARE_OF.match(plain, match.end()) or _SHARE_BEFORE.search(before))
    if unit in ("kg", "quintal", "tonne", "l"):
        return bool(_HARVEST.match(plain, match.end()) or _HARVEST_BEFORE.search(before))
    return unit in FORMULATIONS and bool(_PH.search(before))


def _value(written: str) -> float:
    """The number that digits or words say."""
    written = written.strip()
    if written[0].isdigit() or written[0] in "." or written[-1] in _FRACTION:
        extra = _FRACTION.get(written[-1], 0.0)
        digits = written.rstrip("½¼¾ ").replace(",", "")
        if "/" in digits:
            above, below = digits.split("/")
            return float(above) / float(below) if float(below) else 0.0
        return (float(digits) if digits else 0.0) + extra
    words = [word for word in written.split() if word not in ("a", "an")]
    if len(words) == 2 and words[0] in _MORE and words[1] not in ("सौ", "हजार", "sau", "hazar", "hajar"):
        return _VALUE[words[1]] + _MORE[words[0]]
    value = _VALUE[words[0]]
    return value * _VALUE[words[1]] if len(words) == 2 else value
