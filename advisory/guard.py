"""Deterministic checks of a text that a farmer may read or has written.

They run on training data, on imported texts, on questions and on what the model writes, and never ask a model.
`violations` says which chemicals are not allowed and which doses have no source; `emergency` and `injection` look at
a question. All work on Devanagari, Hinglish and English, and err on the side of caution.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from advisory.doses import FORMULATIONS, Dose, doses
from advisory.knowledge import Amount, Chemical
from advisory.pesticides import Mention, Pesticide, PesticideList

__all__ = ["AllowedDose", "Dose", "Violation", "allowed", "doses", "emergency", "injection", "violations"]

Rule = Literal["banned_recommended", "restricted_for_crop", "unsourced_dose", "unsourced_chemical"]
Emergency = Literal["poisoning", "eye_skin", "self_harm"]


@dataclass(frozen=True)
class AllowedDose:
    """An amount that a source gives; kilograms, milligrams and litres in any unit, they are compared in g and ml."""

    low: float
    high: float
    unit: str
    per: str | None
    ai: str | None = None
    """The active ingredient it is for, a mixture as "carbendazim + mancozeb"; `None` for any."""

    def as_dose(self) -> Dose:
        """The same as `doses` would have found it."""
        times, unit = {"kg": (1000.0, "g"), "mg": (0.001, "g"), "l": (1000.0, "ml")}.get(self.unit, (1.0, self.unit))
        return Dose(self.low * times, self.high * times, unit, self.per, 0, 0, "")


@dataclass(frozen=True)
class Violation:
    """A place in a text that breaks a rule."""

    rule: Rule
    start: int
    end: int
    matched: str
    reason: str
    """One line."""


def allowed(chemical: Chemical) -> tuple[AllowedDose, ...]:
    """What a sourced chemical lets a text say: its dose, its water, and the strength of its formulation."""
    amounts = [_allowed(amount, chemical.ai) for amount in (chemical.dose, chemical.water) if amount is not None]
    strengths = [
        AllowedDose(dose.low, dose.high, dose.unit, dose.per, chemical.ai) for dose in doses(chemical.formulation)
    ]
    return (*amounts, *strengths)


def _allowed(amount: Amount, ai: str) -> AllowedDose:
    low, high = amount.amount if isinstance(amount.amount, tuple) else (amount.amount, amount.amount)
    return AllowedDose(low, high, amount.unit, amount.per, ai)


def violations(
    text: str,
    *,
    crop_id: str | None,
    allowed_doses: Sequence[AllowedDose] = (),
    pesticides: PesticideList,
    allowed_ais: Collection[str] | None = None,
) -> tuple[Violation, ...]:
    """Everything in `text` that must not be said to a farmer, in order.

    Args:
        text: an answer, or a text meant as training data.
        crop_id: the crop it is about, `None` where that is not known.
        allowed_doses: the only amounts it may name; without any, every dose is a violation.
        pesticides: the official list.
        allowed_ais: the only actives it may name (ids or names); `None` lets every registered one pass.
    """
    mentions = pesticides.find(text)
    found = [
        *_chemicals(text, mentions, crop_id, pesticides, allowed_ais),
        *_doses(text, mentions, allowed_doses, pesticides),
    ]
    return tuple(sorted(found, key=lambda violation: (violation.start, violation.end)))


def _chemicals(
    text: str,
    mentions: Sequence[Mention],
    crop_id: str | None,
    pesticides: PesticideList,
    allowed_ais: Collection[str] | None,
) -> Iterator[Violation]:
    known = None if allowed_ais is None else frozenset(one for name in allowed_ais for one in _ids(name, pesticides))
    warned = _Warnings(text, mentions) if mentions else None
    for mention in mentions:
        assert warned is not None
        if warned.covers(mention):
            continue
        if isinstance(mention.entry, Pesticide):
            verdict = pesticides.verdict(mention.entry.id, crop_id, _formulation(text, mention))
            if verdict.forbidden:
                by_crop = mention.entry.status in ("restricted", "held_back")
                yield _violation("restricted_for_crop" if by_crop else "banned_recommended", mention, verdict.reason)
                continue
        if known is not None and mention.entry.id not in known and not _SHORTAGE.match(text, mention.end):
            yield _violation("unsourced_chemical", mention, f"{mention.entry.en[0]} is not among the sourced chemicals")


def _doses(
    text: str, mentions: Sequence[Mention], allowed_doses: Sequence[AllowedDose], pesticides: PesticideList
) -> Iterator[Violation]:
    known = [(one.as_dose(), None if one.ai is None else frozenset(_ids(one.ai, pesticides))) for one in allowed_doses]
    for dose in doses(text):
        meant = _meant(text, dose, mentions)
        if not any(
            dose.same_as(other) and (ais is None or meant is None or not ais or meant.entry.id in ais)
            for other, ais in known
        ):
            per = f" per {dose.per}" if dose.per else ""
            reason = f"no source gives {dose.matched}{per}{f' for {meant.entry.en[0]}' if meant else ''}"
            yield Violation("unsourced_dose", dose.start, dose.end, dose.matched, reason)


def _ids(name: str, pesticides: PesticideList) -> Collection[str]:
    return (name,) if name in pesticides.by_id else pesticides.ids(name)


def _meant(text: str, dose: Dose, mentions: Sequence[Mention]) -> Mention | None:
    """The chemical a dose is for: the last one named before it in its sentence, else the first after it."""
    start = max((stop.end() for stop in _STRONG.finditer(text, 0, dose.start)), default=0)
    stop = _STRONG.search(text, dose.end)
    end = stop.start() if stop else len(text)
    before = [mention for mention in mentions if start <= mention.start and mention.end <= dose.start]
    after = [mention for mention in mentions if dose.end <= mention.start and mention.end <= end]
    return before[-1] if before else after[0] if after else None


def _formulation(text: str, mention: Mention) -> str | None:
    """The formulation written right behind a name: "कार्बोफ्यूरान 3% CG"."""
    behind = text[mention.end : mention.end + 16]
    for dose in doses(behind):
        if dose.unit in FORMULATIONS and dose.start <= 3:
            return f"{dose.low:g}% {dose.unit.upper()}"
    return behind.strip() if _SMOKE.match(behind) else None


def _violation(rule: Rule, mention: Mention, reason: str) -> Violation:
    return Violation(rule, mention.start, mention.end, mention.matched, reason)


# ---- warnings: a listed name may stand where the text says not to use it ---------------------------------------------

_LEFT, _RIGHT = r"(?<![a-z\u0900-\u0963])", r"(?![a-z\u0900-\u0963])"


def _pattern(source: str) -> re.Pattern[str]:
    """A pattern in any case, for words with and without their nukta and with either sign of the nasal vowel."""
    source = unicodedata.normalize("NFD", source).replace("\u093c", "\u093c?").replace("ँ", "[ँं]")
    return re.compile(source, re.IGNORECASE | re.MULTILINE)


_SHORTAGE = _pattern(r"\s*(?:की|का|ki)?\s*(?:कमी|कम|अभाव|की जांच|kami|kam\b|deficien)")
_SMOKE = _pattern(r"\s*3\s?%\s*smoke")
_STRONG = _pattern(r"[।\n!?;|]|\.(?=\s|$)(?<=[^\s.]{3}\.)")
_COMMA = _pattern(
    rf",|(?<=\s)[-–—](?=\s)|{_LEFT}(?:लेकिन|मगर|किंतु|किन्तु|परंतु|परन्तु|बल्कि|इसलिए|इसलिये|तो|वरना|जबकि|फिर|"
    rf"और|तथा|एवं|lekin|magar|balki|"
    rf"isliye|phir|aur|but|so|then|and|instead|(?:(?<=mile )|(?<=ho )|(?<=rahe ))to){_RIGHT}",
)
_USE_WORD = (
    r"डाल(?:ें|े|ो|ना|िए|िये|ते|ने|कर)?|छिड़क(?:ें|े|ो|ना|िए|ते|ने|कर)?|छिडक(?:ें|े|ो|ना|ने)?|छिड़काव|प्रयोग|"
    r"इस्तेमाल|उपयोग|खरीद(?:ें|े|ो|ना|ते|ने)?|"
    r"दें|दे|दो|देना|लें|लो|लेना|मिलाएं|मिलाये|मिलाओ|मिलाना|लगाएं|लगाये|लगाओ|लगाना|रखें|बेचें|करें|करे|करो|करना|"
    r"कीजिए|"
    r"dale|dalen|daale|daalen|daalo|dalo|dalna|daalna|daal|chhidke|chhidko|chidko|chidke|chhidkav|chhidkao|"
    r"chidkav|use|istemal|prayog|spray|apply|buy|"
    r"kharide|kharido|kharidna|kare|karen|karo|karna|lagaye|lagao|milaye|milao|le|lo|lena"
)
_BAN = _pattern(
    r"प्रतिबंध|प्रतिबन्ध|पाबंदी|अवैध|गैरकानूनी|गैर-कानूनी|वर्जित|निषिद्ध|मनाही|बैन\b|बैन(?=\s|$)|(?:पर|"
    r"की)\s+(?:पूरी\s+|सख्त\s+|सरकारी\s+)?(?:तरह\s+)?(?:से\s+)?रोक|"
    r"रोक\s+(?:है|लगी|लगा|लग)|(?<![\u0900-\u0963])मना(?![\u0900-\u0963])(?:\s+कर(?:ें|ो|े|ना|ता|ती|ते)?)?|"
    r"बंद\s+(?:है|हो|कर|दवा)|रद्द|pratibandh|prati?bandhit|par\s+rok|rok\s+(?:hai|lagi)|"
    r"mana\s+hai|gair\s?kanooni|\bban\b|\bbanned\b|prohibit|illegal|not\s+(?:allowed|permitted|approved|"
    r"registered)|withdrawn|forbidden",
)
_BAN_LIFTED = _pattern(
    r"(?:रोक|प्रतिबंध|प्रतिबन्ध|पाबंदी|मनाही|मना|बैन|बंद|अवैध|प्रतिबंधित|वर्जित|rok|pratibandh|mana|ban|"
    r"banned)\s+(?:तो\s+)?"
    r"(?:नहीं|नही|हट|nahi|nahin|hat)|(?:not|no longer|isn't|never)\s+(?:been\s+)?(?:banned|prohibited|illegal|"
    r"forbidden)|बिना\s+रोक",
)
_REFUSED_USE = _pattern(
    rf"{_LEFT}(?:न|ना|नहीं|नही|मत|कभी\s+न|na|nahi|nahin|mat)\s+(?:ही\s+|तो\s+|hi\s+)?(?:{_USE_WORD}){_RIGHT}"
    rf"|{_LEFT}(?:{_USE_WORD})\s+(?:मत|(?:नहीं|नही|nahi|nahin)(?!\s+(?:तो|to)\b)(?!\s+तो)|mat){_RIGHT}"
    r"|(?:do\s+not|don't|dont|never|should\s+not|must\s+not|shouldn't|cannot|"
    r"can't)\s+(?:ever\s+)?(?:be\s+)?(?:us(?:e|ed)|spray(?:ed)?|apply|applied|buy|mix|recommend|give)"
    r"|avoid|से\s+(?:हमेशा\s+|बिल्कुल\s+)?(?:बचें|बचे(?![\u0900-\u0963])|बचना|दूर\s+रह|परहेज)|se\s+(?:bache|"
    r"bachen|bachna)\b|की\s+सलाह\s+नहीं|नाम\s+न\s+लें|"
    r"(?:खतरनाक|जानलेवा|सुरक्षित\s+नहीं|असुरक्षित)(?=\s+(?:है|हैं|दवा))",
)
_URGES = _pattern(
    rf"{_LEFT}(?:डालें|डाले|डालो|डालिए|डालिये|डाल\s+(?:दें|दो|दीजिए)|छिड़कें|छिड़को|छिड़किए|छिडकें|करें|करे|करो|"
    rf"कीजिए|लें|दें|दीजिए|खरीदें|खरीदो|मिलाएं|मिलाये|मिलाओ|"
    r"लगाएं|लगाये|लगाओ|रखें|बेचें|dale|dalen|daale|daalen|daalo|dalo|daal\s+(?:de|do)|chhidke|chhidko|chidko|"
    r"chidke|kare|karen|karo|kijiye|kharide|kharido|"
    rf"lagaye|lagao|milaye|milao|(?<!for )(?<!the )(?<!its )(?<!any )(?:use|spray)(?!\s+of)|apply|buy){_RIGHT}",
)
_MAY_USE = _pattern(
    r"सकते|सकता|चाहिए|चाहिये|sakte|chahiye|\bcan\s+(?:be|use)|\bshould\s+(?:be|use)|recommended|effective|कारगर|असरदार|अच्छी\s+दवा"
)
_LIMITED = _pattern(
    r"ज्यादा|ज़्यादा|अधिक|बार-बार|दोबारा|बारिश|दोपहर|तेज\s+हवा|तेज\s+धूप|धूप\s+में|हवा\s+में|फूल\s+(?:आने|के)|"
    r"एक\s+साथ|साथ\s+मिला|बिना\s+(?:दस्ताने|मास्क)|अकेले|"
    r"zyada|jyada|barish|more\s+than|too\s+much|excess|in\s+(?:rain|wind)|without|together",
)
_INSTEAD = _pattern(
    r"\s*(?:\([^)]*\)\s*)?(?:की\s+जगह|के\s+बजाय|के\s+बजाए|के\s+स्थान\s+पर|के\s+बदले|ki\s+jagah|ke\s+bajay|ke\s+badle)"
)
_INSTEAD_OF = _pattern(r"(?:instead\s+of|in\s+place\s+of|rather\s+than)\s+$")
_POINTS_BACK = _pattern(
    r"\s*(?:और\s+|व\s+)?(?:(?:बिल्कुल|बिलकुल|कभी|हरगिज|भूलकर)?\s*(?:भी\s+)?(?:न|ना|मत)\s|do\s+not\b|don't\b|never\b|avoid\b|na\s|mat\s|इसे|इसको|इसका|इसकी|इन्हें|इनका|उसे|यह|ये|it\b|this\b|these\b|they\b|ise\b|isko\b|iska\b|inhe\b|yeh?\b)"
)
_VERB = _pattern(
    rf"{_LEFT}(?:{_USE_WORD}|है|हैं|था|थी|थे|मिले|मिलता|मिल|हो|होता|होती|जाए|जाएं|रहे|रहें|सकते|चाहिए|लगी|लगा|"
    rf"बचें|बताएं|पूछें|hai|hain|mile|ho|is|are|was|avoid|"
    rf"banned|prohibited|ask){_RIGHT}",
)


@dataclass(frozen=True)
class _Clause:
    start: int
    end: int
    warns: bool
    urges: bool
    """Tells to use something."""
    points_back: bool


class _Warnings:
    """The clauses of a text, each with whether it warns against what it names."""

    def __init__(self, text: str, mentions: Sequence[Mention]) -> None:
        self._text = text
        # A name may itself look like a verb or hold a comma, as 2,4-D does.
        bare = text
        for mention in mentions:
            bare = bare[: mention.start] + "#" * (mention.end - mention.start) + bare[mention.end :]
        self._sentences = [[_clause(bare, *span) for span in spans] for spans in _clauses(bare)]

    def covers(self, mention: Mention) -> bool:
        """Whether the text warns against this one: in its own clause, or by an "इसे न डालें" right behind it."""
        if _INSTEAD.match(self._text, mention.end) or _INSTEAD_OF.search(self._text[: mention.start]):
            return True
        for clauses in self._sentences:
            for number, clause in enumerate(clauses):
                if clause.start <= mention.start < clause.end:
                    after = clauses[number + 1] if number + 1 < len(clauses) else None
                    backed = after is not None and after.points_back and after.warns and not clause.urges
                    return clause.warns or backed
        return False


def _clauses(text: str) -> Iterator[list[tuple[int, int]]]:
    """The clauses of each sentence; a piece without a verb goes with what follows, the last with what precedes."""
    stops = [match.span() for match in _STRONG.finditer(text)]
    for start, end in zip([0, *(end for _, end in stops)], [*(start for start, _ in stops), len(text)], strict=True):
        spans: list[tuple[int, int]] = []
        begin = start
        for cut in [*_COMMA.finditer(text, start, end), None]:
            stop = cut.start() if cut else end
            if _VERB.search(text, begin, stop) or cut is None:
                if cut is None and spans and not _VERB.search(text, begin, stop):
                    spans[-1] = (spans[-1][0], stop)
                else:
                    spans.append((begin, stop))
                begin = cut.end() if cut else end
        yield spans


def _clause(text: str, start: int, end: int) -> _Clause:
    words = text[start:end]
    refused = bool(_REFUSED_USE.search(words))
    urges = bool(_URGES.search(_BAN.sub(" ", _REFUSED_USE.sub(" ", words)))) or (
        not refused and bool(_MAY_USE.search(words))
    )
    banned = bool(_BAN.search(words)) and not _BAN_LIFTED.search(words)
    # "फोरेट ज्यादा न डालें" only limits it; a ban does not depend on the weather.
    warns = not urges and (banned or (refused and not _LIMITED.search(words)))
    return _Clause(start, end, warns, urges, bool(_POINTS_BACK.match(text, start, end)))


# ---- emergencies -----------------------------------------------------------------------------------------------------

_POISON = (
    r"दवा|दवाई|कीटनाशक|कीटनाशी|जहर|ज़हर|विष|स्प्रे|छिड़क|छिडक|फफूंदनाशक|खरपतवारनाशक|सल्फास|सेल्फास|थिमेट|यूरिया|"
    r"dawa|dava|dawai|keetnashak|kitnashak|zeher|zehar|jahar|jeher|spray|chhidk|chidk|sulphas|salfas|celphos|"
    r"pesticide|insecticide|herbicide|poison|chemical|"
    r"endosulfan|monocrotophos"
)
_SWALLOWED = (
    r"(?<![\u0900-\u0963])पी\s+(?:ली|लिया|गया|गई|गयी|गए|डाली|चुका|चुकी)|निगल|खा\s+(?:ली|लिया|गया|गई|गयी|गए|चुका)|"
    r"पेट\s+में\s+(?:चली|चला|गई|गया)|"
    r"मुंह\s+में\s+(?:चली|चला|गई|गया|लग)|मुँह\s+में\s+(?:चली|चला|गई|गया|लग)|गटक|चाट\s+(?:ली|लिया|गया)|"
    r"\bpi\s+(?:li|liya|gaya|gayi)\b|\bpee\s+(?:li|liya|gaya|gayi)\b|kha\s+(?:li|liya|gaya|gayi)\b|nigal|"
    r"muh\s+me(?:in)?\s+(?:chal|gay|gai)|swallow|drank|drunk|ingest|"
    r"(?:ate|eaten)\s+(?:some|the)?\s*(?:poison|pesticide|sulphas)"
)
_ILL = (
    r"चक्कर\s+आ|उल्टी\s+(?:हो|आ|कर|जैस)|उल्टियां|उल्टियाँ|उबकाई|जी\s+मिचला|मिचली|मितली|बेहोश|होश\s+नहीं|झाग|"
    r"सांस|दम\s+घुट|घबराहट|जी\s+घबरा|सिर\s+घूम|sir\s+ghoom|सिर\s*(?:में\s+)?दर्द|सिरदर्द|सर\s+दर्द|"
    r"कंपकंपी|कांप\s+रह|काँप\s+रह|दौरे|पसीना|धुंधला|लार|(?:आदमी|भाई|मजदूर|वह|किसान|बेटा)\s+गिर|छाती\s+में|"
    r"पेट\s+(?:में\s+)?(?:दर्द|मरोड़)|तबीयत|तबियत|बुखार\s+जैसा|"
    r"chakkar\s+(?:aa|a\s)|ulti\s+(?:ho|aa|kar|lag)|ultiya|behosh|jhaag|jhag|sa+ns|dam\s+ghut|ghabrahat|"
    r"sir\s*(?:me\s+)?dard|sar\s+dard|kaanp|pasina|tabiyat|"
    r"vomit|dizz|giddi|faint|unconscious|breathless|trouble\s+breathing|difficulty\s+breathing|headache|nausea|"
    r"froth|convuls|seizure|sweating|blurred|collapsed"
)
_BODY = (
    r"आंख|त्वचा|चमड़ी|खाल|चेहरे|चेहरा|मुंह\s+पर|हाथ|पैर|बदन|शरीर|गर्दन|पीठ|कपड़|"
    r"aa?nkh|twacha|chamdi|chehr|haath|hath|peeth|pair|badan|sharir|kapd|eyes?\b|skin|face|hands?\b|\barms?\b|clothes|"
    r"\bbody"
)
_TOUCHED = (
    r"गिर|छींट|चली\s+गई|चला\s+गया|चली\s+गयी|पड़\s+ग|पड़ी|लग\s+ग|लग\s+रह|जल\s+(?:ग|रह)|जलन|खुजली|छाले|फफोले|दाने|"
    r"लाल\s+(?:हो|पड़)|चकत्ते|सूज|फैल\s+ग|भीग|उड़कर|उड़\s+ग|"
    r"gir\s*g|gir\s+p|chhint|chheent|chali\s+ga|chala\s+ga|pad\s+ga|lag\s+ga|jalan|khujli|chhale|soojan|"
    r"jal\s+(?:ra|ga)|"
    r"splash|spill|got\s+(?:in|into|on|some)|burn|itch|rash|blister|fell\s+on|sprayed\s+(?:in|into|on)"
)
_PLANT = _pattern(
    r"(?:गन्ने|गन्ना|आलू|बीज|कंद|गांठ|डाल|टहनी|कलम|पौधे|पौध|पत्त\S*|फल|फली|sugarcane|potato|ganne|aloo)\s+(?:की|"
    r"के|का|पर|ki|ke)\s+(?:आंख|त्वचा|aankh|ankh|eyes?|चेहर)|eye\s+bud",
)
_BEAST = _pattern(
    r"गाय|भैंस|बकरी|बकरे|बछड़|बछिया|पड़िया|बैल|भेड़|मुर्गी|मुर्गे|कुत्त|पशु|मवेशी|जानवर|मछली|चूह|मधुमक्ख|कीड़|"
    r"कीट(?!नाश)|इल्ली|सुंडी|माहू|पौध|फसल|पत्त|पेड़|"
    r"\b(?:gaa?y|bhains|bakri|bachhd\w*|bail|murgi|kutta|pashu|janwar|machhli|choo?h[ae]|keede|keeda|kide|sundi|"
    r"illi|cow|buffalo|goat|calf|ox|cattle|hen|chicken|dog|fish|rat|rats|bees?)\b",
)
_PERSON = _pattern(
    r"मैं|मैने|मैंने|मुझे|मेरी\s+(?:तबीयत|तबियत|आंख|पत्नी|मां|माँ|बेटी|बहन|सांस)|मेरे\s+(?:बेटे|भाई|पिता|बच्चे|"
    r"हाथ|पति|पापा|सिर)|बच्च[ाेी]|बेट[ाेी]|भाई\s+(?:ने|को|बेहोश|गिर|की)|आदमी|मजदूर|"
    r"किसान\s+(?:ने|को|बेहोश)|पिता|पापा|पत्नी|पति\s|बहन|औरत|लड़क|मरीज|किसी\s+ने|पड़ोसी|\b(?:main\s?ne|maine|"
    r"mujhe|bachch?[aei]|bacch[aei]|beta|bete|beti|admi|aadmi|mazdoor|majdoor|"
    r"papa|pita|patni|child|son|daughter|wife|husband|father|brother|worker|labou?rer|man|woman|kid|boy|girl|i|"
    r"my|me|he|she|someone|somebody)\b",
)
_SELF_HARM = _pattern(
    r"आत्महत्या|आत्म\s+हत्या|खुदकुशी|ख़ुदकुशी|खुदकशी|मरने\s+(?:का|की|के)\s+(?:मन|जी|ख्याल|सोच|इच्छा|बारे)|"
    r"मर(?:ना)?\s+(?:जाना\s+)?चाहत|मर\s+जाऊं|मर\s+जाऊँ|मरना\s+है|मर\s+जाना\s+(?:है|चाह|अच्छा|बेहतर)|"
    r"जान\s+(?:दे|देने|देनी|देना|दूंगा|दूँगा)(?![\u0900-\u0963])|जान\s+दे\s+द|(?:जीना|जीने)\s+(?:नहीं|"
    r"का\s+(?:मन|जी|कोई)|की\s+(?:इच्छा|चाह|उम्मीद)|से\s+(?:थक|अच्छा|ऊब)|बेकार)|जी\s+कर\s+क्या|"
    r"(?:जहर|ज़हर|दवा|दवाई|कीटनाशक|सल्फास|सेल्फास)\s+(?:ही\s+)?(?:खा|पी|निगल)\s*(?:लूं|लूँ|लूंगा|लूँगा|लूंगी|"
    r"जाऊं|जाऊँ|कर\s+(?:मर|सो|सब|जान)|लेने\s+का|लेता|लेती)|"
    r"(?:जहर|ज़हर|दवा|कीटनाशक|सल्फास)\s+(?:खाने|पीने)\s+(?:का|की|को|जा)\s*(?:मन|जी|सोच|इच्छा|रहा|रही)|(?:जहर|"
    r"ज़हर|दवा|कीटनाशक|सल्फास)\s+(?:पीकर|खाकर)\s+(?:मर|जान|सब)|"
    r"(?:खुद|अपने\s+आप|अपनी\s+(?:जान|जिंदगी|ज़िंदगी|जीवन))\s*(?:को|की|का)?\s+(?:खत्म|ख़त्म|मार|लीला|समाप्त|"
    r"ले\s+लूं)|फांसी|फाँसी|फंदा\s+लगा|कुएं\s+में\s+कूद|ट्रेन\s+के\s+(?:आगे|नीचे)|"
    r"aatmhatya|atmhatya|aatmahatya|khudkus?hi|marne\s+ka\s+(?:man|mann|ji)|marna\s+chah|mar\s+ja(?:na|u|oo)|"
    r"jaan\s+de|jeena\s+nahi|jina\s+nahi|jeene\s+ka\s+(?:man|mann|koi)|jeene\s+se|"
    r"(?:zeher|zehar|jahar|jeher|dawa|dava|sulphas|salfas)\s+(?:kha|pi|pee)\s*(?:lu|loo|lunga|loonga|ke\s+mar|"
    r"kar\s+mar|kar\s+so)|phansi|faansi|khud\s+ko\s+(?:khatam|khatm|maar)|"
    r"suicide|suicidal|kill\s+myself|killing\s+myself|end\s+(?:my|it\s+all)|don'?t\s+want\s+to\s+live|"
    r"do\s+not\s+want\s+to\s+live|want\s+to\s+die|no\s+reason\s+to\s+live|better\s+off\s+dead|hang\s+myself|"
    r"(?:drink|take|consume|eat)\s+(?:the\s+|this\s+|some\s+)?(?:poison|pesticide|sulphas)\s+(?:and|"
    r"to)\s+(?:die|end|sleep)",
)
_BEAST_DIES = _pattern(
    r"(?:पौध\S*|फसल|पत्त\S*|कीड़\S*|कीट|इल्ली|सुंडी|चूह\S*|गाय|भैंस|पशु|बकरी|मुर्गी|fasal|phasal|paudh\w*|keed\w*|crop|plants?|insects?|rats?)\s+(?:[^,।.]{0,20}\s)?(?:मर|mar|suicid)"
)
_POISONED, _SWALLOW, _ILLNESS, _SKIN, _TOUCH = (_pattern(part) for part in (_POISON, _SWALLOWED, _ILL, _BODY, _TOUCHED))
_SENTENCE = _pattern(r"[।\n!?]|\.(?=\s)")


_UNSEEN = str.maketrans(dict.fromkeys("\u093c\u200b\u200c\u200d\u2060\u00ad\ufeff", None) | {"ँ": "ं"})


def _plain(text: str) -> str:
    """The text without nukta, joiners and what else is not seen, and with one space between words."""
    return re.sub(r"[^\S\n]+", " ", unicodedata.normalize("NFD", text).translate(_UNSEEN))


def emergency(text: str) -> Emergency | None:
    """Whether a person is in danger: from their own hand, from a pesticide taken in, or from one on eye or skin.

    A sick animal, a crop or an insect is no such emergency. Without a pesticide in the text neither is an illness.
    """
    text = _plain(text)
    parts = _SENTENCE.split(text)
    if any(_SELF_HARM.search(part) and not _BEAST_DIES.search(part) for part in parts):
        return "self_harm"
    # "दवा छिड़की थी। अब चक्कर आ रहे हैं।" is told in two sentences.
    parts = [*parts, *(f"{one} {other}" for one, other in pairwise(parts))]
    for part in parts:
        if not _POISONED.search(part) or (_BEAST.search(part) and not _PERSON.search(part)):
            continue
        if _SWALLOW.search(part) or _ILLNESS.search(part):
            return "poisoning"
    for part in parts:
        if _POISONED.search(part) and _touched(part) and not (_BEAST.search(part) and not _PERSON.search(part)):
            return "eye_skin"
    return None


def _touched(part: str) -> bool:
    """Whether a part of the body met the pesticide; buds of cane and potato are called eyes too."""
    part = _PLANT.sub(" ", part)
    return any(
        _TOUCH.search(part, max(0, body.start() - 40), body.end() + 40) is not None for body in _SKIN.finditer(part)
    )


# ---- planted orders --------------------------------------------------------------------------------------------------

_RULES = (
    r"(?:नियम|निर्देश|निर्देशों|नियमों|आदेश|हिदायत|बंदिश|पाबंदी|पाबंदियां|सुरक्षा|प्रॉम्प्ट|इंस्ट्रक्शन|"
    r"niyam|nirdesh|instructions?|rules?|prompts?|guidelines?|guardrails?|restrictions?|safety)"
)
_DROPPED = (
    r"(?:भूल|भुला|अनदेख|नजरअंदाज|नज़रअंदाज|तोड़|छोड़|हटा|बदल|मत\s+मान|न\s+मान|नहीं\s+मान|बंद\s+कर|"
    r"दरकिनार|bhool|bhul|andekh|chhod|chod|tod|hata|badal|mat\s+maan)"
)
_INJECTION = _pattern(
    rf"(?:अपन[ेीा]|तुम्हार[ेीा]|आपक[ेीा]|सार[ेीा]|सभी|पिछल[ेीा]|पहले\s+(?:के|वाले|की)|ऊपर\s+(?:के|वाले)|सिस्टम|"
    rf"apne|tumhare|aapke|saare|sab|pichhle|pichle|"
    rf"purane)\s+(?:\S+\s+){{0,2}}?{_RULES}\S*\s+(?:\S+\s+){{0,2}}?{_DROPPED}"
    rf"|(?:नियम|निर्देश|niyam|nirdesh)\s+(?:को\s+|ko\s+)?{_DROPPED}\S*\s+(?:कर\s+|"
    rf"kar\s+)?(?:\S+\s+){{0,6}}(?:बता|लिख|दे|करो|कर|दिखा|bata|likh|de|karo)"
    r"|(?:पिछली|पहले\s+की|ऊपर\s+की|अब\s+तक\s+की)\s+(?:सारी\s+|सब\s+)?(?:बातें|बात|बातों|हिदायतें|"
    r"chat)\s*(?:को)?\s*(?:भूल|भुला|अनदेख|हटा)|(?:pichhli|pichli)\s+(?:saari\s+)?ba+te?n?\s+bhoo?l|(?:छिप|छुप)[ाे]\s*(?:हुआ\s+|हुए\s+)?(?:निर्देश|संदेश|प्रॉम्प्ट)|सुरक्षा\s+(?:के\s+)?नियम\S*\s+(?:को\s+)?(?:हटा|भूल|तोड|छोड|बंद)|koi\s+niyam\s+nahi\s+ma+n|pretend\s+(?:that\s+)?you\b|मान\s+लो\s+(?:कि\s+)?कोई\s+(?:नियम|बंदिश|पाबंदी)"
    r"|(?:सिस्टम|छिपे|छुपे|गुप्त|अपने|अपना|system|hidden|secret|apna|apne)\s+(?:का\s+|के\s+|ka\s+)?(?:प्रॉम्प्ट|"
    r"निर्देश|संदेश|मैसेज|prompt|instructions?|message|nirdesh)\S*\s*(?:को\s+)?(?:दिखा|बता|लिख|छाप|दोहरा|बदल|"
    r"dikha|bata|likh|print|reveal|repeat|badal)"
    r"|(?:show|reveal|print|repeat|leak|give|tell)\s+(?:me\s+)?(?:your|the)\s+(?:system|hidden|secret|initial|"
    r"original)\s*(?:prompt|instructions?|message|rules?)"
    rf"|(?:ignore|forget|disregard|override|bypass|skip|break|drop)\s+(?:all\s+|any\s+|"
    rf"every\s+)?(?:of\s+)?(?:the\s+|your\s+|my\s+|these\s+|those\s+)?(?:previous|prior|above|earlier|safety|"
    rf"system|original|own|old)?\s*{_RULES}"
    r"|(?:ignore|forget|disregard)\s+(?:everything|all|what)\s+(?:above|before|you|i\s+said)"
    r"|(?:तुम|आप|तू)\s+(?:अब\s+)?(?:से\s+)?(?:कोई\s+)?(?:सलाहकार|एआई|बॉट|मशीन)\s+(?:नहीं|मत)|(?:सलाहकार|"
    r"बॉट)\s+(?:मत|न)\s+(?:बनो|रहो|बन)|(?:अब|ab)\s+(?:से\s+|se\s+)?(?:तुम|आप|tum|aap)\s+(?:\S+\s+){0,4}(?:नियम|"
    r"बिना\s+नियम|बंदिश|niyam|rules?)"
    r"|(?:तुम|आप)\s+(?:अब\s+)?(?:कोई\s+)?नियम\s+(?:नहीं|मत)|कोई\s+नियम\s+(?:नहीं|मत|न)\s+मान|"
    r"बिना\s+(?:किसी\s+)?(?:नियम|रोक-टोक|रोकटोक|बंदिश|फिल्टर|सेंसर)\s+के\s+(?:\S+\s+){0,3}(?:बता|जवाब|लिख|बोल)"
    r"|you\s+are\s+(?:now|no\s+longer)\s+(?:a|an|the|in|my|free|bound|dan)|(?:act|behave|pretend|"
    r"respond)\s+(?:as|like|to\s+be)\s+(?:if\s+)?(?:you|an?|the|my|dan)\b|role-?play\s+as|jail-?break|"
    r"developer\s+mode|dan\s+mode|do\s+anything\s+now|no\s+restrictions"
    r"|(?:नाटक|भूमिका|रोल)\s+(?:करो|निभाओ|प्ले)\s+(?:कि|जैसे|मानो)|मान\s+लो\s+(?:कि\s+)?(?:तुम|"
    r"आप)\s+(?:\S+\s+){0,5}(?:नियम|बंदिश|रोक|पाबंदी)|जेलब्रेक|डेवलपर\s+मोड"
    r"|<\|?\s*(?:im_start|im_end|system|endoftext|assistant|user)[^>]{0,20}\|?>|\[/?(?:INST|SYS)\]|<</?SYS>>|"
    r"</?(?:s|think|thought|system|tool_call)>|^\s*#{0,4}\s*(?:system|assistant|developer|सिस्टम|सहायक)\s*:",
)


def injection(text: str) -> bool:
    """Whether a question tries to give the adviser orders: drop the rules, show them, be someone else."""
    return _INJECTION.search(_plain(text)) is not None
