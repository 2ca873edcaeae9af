"""A farmer's words and form → advice that can be shown: understood, backed by facts, asked of a model, and guarded.

What is certain is decided in code, before and after the model: emergencies come first; banned names, orders to break
the rules and questions that are not about a crop have their fixed answers; the signs in the text lead to the known
problems, and these to causes, rules, doses and sources. A model only words the advice. What it says is shown if it
names one of the causes, every measure is one of the knowledge base, no chemical or dose stands there that the facts do
not give, and nothing goes against the weather; otherwise the farmer reads the advice composed from the facts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from advisory import guard
from advisory.advice import HELPLINE_HI, KVK_HI, Advice, answer_hi, derive
from advisory.advisor import clean_question
from advisory.case import FarmCase, age_in, chemical_hi, oblique
from advisory.compose import BANNED_HI, INSTEAD_HI, NO_DOSE_HI, RESTRICTED_HI, SYSTEM_HI
from advisory.doses import doses
from advisory.facts import Facts
from advisory.guard import AllowedDose
from advisory.knowledge import Crop, Problem, SafetyTopic, Source, bare_words
from advisory.likeness import dice, trigrams
from advisory.pesticides import Pesticide
from advisory.retrieve import Sign, letters, signs, topic
from advisory.subject import clean_text, is_price
from litgpt.chat import Message

__all__ = ["Consultant", "Consultation", "Decision", "Plan"]

BACKED = 0.5
"""A measure is backed where its letter trigrams overlap with those of a known sentence by this (Dice)."""
MAX_WORDS_SAID = 150
LEAST_DEVANAGARI = 0.8
UNKNOWN_SIGN_HI = (
    "यह लक्षण हमारी सूची में नहीं मिला, इसलिए अंदाजे से कारण बताना ठीक नहीं।\n"
    f"1. रोग वाले पत्ते या पौधे का नमूना {KVK_HI} में दिखाएं।\n2. तब तक कोई दवा न डालें।\n{HELPLINE_HI}"
)
ASK_MORE_HI = "और बताएं: किस भाग पर, क्या रंग, कब से?"

# An answer's helpline numbers; any other number of this length is made up.
_NUMBERS = frozenset({"18001801551", "14416", "108", "112", "1800116117"})
_PHONE = re.compile(r"(?<![\d.])\d[\d\s-]{6,}\d(?![\d.])")
_TAGS = re.compile(r"</?\s*(?:thought|think)\s*>|<\|im_(?:start|end)\|>|<\|endoftext\|>")
_ENGLISH = re.compile(r"(?:\b[A-Za-z]{2,}\b[ ,.:>-]*){5,}")
_STEP = re.compile(r"^\s*\d+[.)]\s*(.+)$", re.MULTILINE)
_SPRAYS = re.compile(r"छिड़क(?:ें|ो|िए|\s+दें)|छिड़काव\s+(?:अभी\s+|आज\s+|तुरंत\s+)?(?:करें|कर\s+दें|कीजिए)|दवा\s+डालें")
_WAITS = re.compile(r"(?:न|ना|मत|नहीं|टाल|रुक|बाद|पहले|तभी|तब|सिर्फ|केवल|पूछ|शाम|हवा|बीज|अगल)")
_ASKS_DOSE = re.compile(
    r"मात्रा|डोज|खुराक|कितन[ीाे]\s+(?:दवा|ml|मिली|ग्राम|कीटनाशक|मिलाऊं|डालूं)|\bdose\b|\bmatra\b|"
    r"kitn[iae]+\s+(?:dawa|dava|ml|gram|milau|dalu)",
    re.IGNORECASE,
)
_SCHEME = re.compile(
    r"सब्सिडी|योजना|किस्त|लोन|बीमा|subsid|yojana|\bkist\b|\bloan\b|\bbima\b|मंडी|भाव|दाम|\bmandi\b|\bbhav\b|\brate\b",
    re.IGNORECASE,
)
# The beginnings of words of the field, in the spelling of `letters`.
_FIELD_WORDS = (
    "fas", "pata", "pate", "pati", "pato", "paud", "khet", "fal", "ful", "jad", "tana", "tane", "bij", "khad", "kid",
    "kit", "rog", "ped", "dava", "sinchai", "buvai", "ropai", "bali", "dana", "mithi", "miti", "iuria", "uria", "chidk",
    "sundi", "ili", "kisan", "bimari", "pil", "sukh", "dhabe",
)  # fmt: skip
SURE_SIGN = 0.6
"""A sign that stands in the text to this share makes it a crop question, whatever else it asks."""
SOUNDS_ALIKE = 0.7
"""From this overlap on a word is held to be a forbidden name spelt differently (Dice of trigrams, `letters`)."""
_LEAST_NAME = 5


@dataclass(frozen=True)
class Decision:
    """What was decided in code, and by which rule."""

    stage: Literal["input", "retrieval", "output"]
    rule: str
    detail: str = ""


@dataclass(frozen=True)
class Plan:
    """What is known before a model is asked."""

    question: str
    case: FarmCase
    advice: Advice | None
    safe: str
    """The answer composed from the facts: shown as it is where `ask_model` is false, else if the model's fails."""
    ask_model: bool
    decisions: tuple[Decision, ...]
    topic: SafetyTopic | None = None
    messages: tuple[Message, ...] = ()
    """For the model: system, earlier turns, the question with its case."""


@dataclass(frozen=True)
class Consultation:
    """What is shown."""

    answer: str
    origin: Literal["model", "facts"]
    """Who worded it."""
    plan: Plan
    decisions: tuple[Decision, ...]
    sources: tuple[Source, ...]


class Consultant:
    """Plans and checks advice; holds the facts and no conversation.

    Args:
        facts: as `load_facts` gives them.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self._topics = {one.id: one for one in facts.knowledge.safety}
        # How the names of what no crop may have sound, and how those of what is allowed do.
        entries = facts.pesticides.by_id.values()
        self._bad = [
            (trigrams(f" {letters(name)} "), entry)
            for entry in entries
            if isinstance(entry, Pesticide) and facts.pesticides.verdict(entry.id).state == "forbidden"
            for name in (*entry.hi, *entry.en)
            if len(letters(name)) >= _LEAST_NAME
        ]
        bad = {entry.id for _, entry in self._bad}
        # A word that the facts themselves use is no slip.
        problems = facts.knowledge.problems.values()
        used = [text for problem in problems for text in (*_texts(problem), *problem.symptoms_hi)]
        self._used = {word for text in used for word in letters(text).split()}
        self._good = [
            trigrams(f" {letters(name)} ")
            for entry in entries
            if entry.id not in bad
            for name in (*entry.hi, *entry.en)
        ]

    # ---- before the model --------------------------------------------------------------------------------------------

    def plan(self, text: str, form: FarmCase | None = None, earlier: Sequence[Message] = ()) -> Plan:
        """What the text asks, what is missing, and what the facts say.

        Args:
            text: the farmer's last message.
            form: what was filled in beside it; its symptoms are read like text.
            earlier: the turns before, roles `user` and `assistant`.

        Raises:
            UserError: an empty or unreadable text.
        """
        form = form or FarmCase()
        question = clean_question(text)
        told = [message["content"] for message in earlier if message["role"] == "user"]
        if urgent := guard.emergency(question):
            names = {"poisoning": "poisoned_person", "eye_skin": "pesticide_in_eye", "self_harm": "self_harm"}
            return self._fixed(question, form, self._topics[names[urgent]], Decision("input", f"emergency:{urgent}"))
        decisions: list[Decision] = []
        ordered = guard.injection(question)
        if ordered:
            decisions.append(Decision("input", "injection"))
        case = self._case(question, told, form)
        crop = self.facts.knowledge.crops.get(case.crop) if case.crop else None
        whole = " । ".join([question, *form.symptoms, *reversed(told)])
        found = signs(whole, crop.id, self.facts) if crop else []
        forbidden = self._forbidden(question, crop)
        about = topic(question, self.facts)
        if forbidden:
            decisions.append(Decision("input", "banned_asked", ", ".join(forbidden)))
        elif about and not self._on_crop(found, about):
            return self._fixed(question, case, about[0], *decisions, Decision("input", f"topic:{about[0].id}"))
        elif ordered and not found:
            decisions.append(Decision("input", "topic:change_the_rules"))
            return self._fixed(question, case, self._topics["change_the_rules"], *decisions)
        elif not found and (is_price(clean_text(question)) or _SCHEME.search(question)):
            return self._fixed(
                question, case, self._topics["price_or_scheme"], Decision("input", "topic:price_or_scheme")
            )
        elif crop is None and not told and not _of_field(question):
            return self._fixed(question, case, self._topics["off_topic"], *decisions, Decision("input", "off_topic"))
        case = replace(case, symptoms=tuple(sign.phrasing for sign in found))
        decisions += [Decision("retrieval", "sign", f"{sign.problem.id} {sign.share:.2f}") for sign in found]
        return self._advise(question, case, crop, found, earlier, forbidden, ordered, decisions)

    def _advise(
        self,
        question: str,
        case: FarmCase,
        crop: Crop | None,
        found: Sequence[Sign],
        earlier: Sequence[Message],
        forbidden: Sequence[str],
        ordered: bool,
        decisions: list[Decision],
    ) -> Plan:
        asked = any(message["role"] == "assistant" for message in earlier)
        if forbidden and not found:
            return Plan(question, case, None, "\n".join([*forbidden, INSTEAD_HI]), False, tuple(decisions))
        if not found and _ASKS_DOSE.search(question):
            return Plan(question, case, None, NO_DOSE_HI, False, (*decisions, Decision("input", "dose_asked")))
        advice = derive(case, self.facts)
        if advice.causes:
            # The doses of the list are those of the likeliest cause, and none that the official list forbids.
            table = tuple(
                chemical for chemical in advice.causes[0].problem.chemicals if self._may(chemical.ai, case.crop)
            )
            case = replace(case, table=table[:2])
            advice = derive(case, self.facts)
        if advice.ask_hi:
            decisions.append(Decision("retrieval", advice.steps[0].rule))
            if asked and crop is not None:
                # Asked once already: a second question of the same kind helps nobody.
                decisions.append(Decision("retrieval", "unknown_sign"))
                return Plan(question, case, None, UNKNOWN_SIGN_HI, False, tuple(decisions))
            ask = f"{advice.ask_hi} {ASK_MORE_HI}" if advice.steps[0].rule == "unknown_sign" else advice.ask_hi
            return Plan(question, case, advice, ask, False, tuple(decisions))
        safe = "\n".join([*forbidden, answer_hi(advice, case, self.facts)])
        prompt: Message = {"role": "user", "content": f"{question}\n{case.render(self.facts)}"}
        system: Message = {"role": "system", "content": SYSTEM_HI}
        # A question that names what is banned, or gives orders, is answered from the facts alone.
        ask_model = not forbidden and not ordered
        return Plan(question, case, advice, safe, ask_model, tuple(decisions), messages=(system, *earlier, prompt))

    def _fixed(self, question: str, case: FarmCase, about: SafetyTopic, *decisions: Decision) -> Plan:
        return Plan(question, case, None, about.answer_hi, False, decisions, topic=about)

    def _case(self, question: str, told: Sequence[str], form: FarmCase) -> FarmCase:
        """The form, and what the words add to it; the newest words count most."""
        crop, age = form.crop, None
        for text in (question, *reversed(told)):
            named = self.facts.knowledge.crop_named(text)
            if named and not (form.crop and self._names(form.crop, text)):
                crop = named.id
                break
        for text in (question, *reversed(told)):
            age = age_in(text)
            if age is not None:
                break
        return replace(form, crop=crop, age_days=form.age_days if age is None else age)

    def _names(self, crop_id: str, text: str) -> bool:
        crop = self.facts.knowledge.crops[crop_id]
        return any(name in text for name in (crop.name_hi, *crop.names.hi))

    def _on_crop(self, found: Sequence[Sign], about: tuple[SafetyTopic, float]) -> bool:
        """Whether a sign of the crop fits the text as well as another subject does."""
        return bool(found) and found[0].share >= min(about[1], SURE_SIGN)

    def _may(self, active: str, crop_id: str | None) -> bool:
        return self.facts.pesticides.verdict(active, crop_id).state == "ok"

    def _forbidden(self, text: str, crop: Crop | None) -> list[str]:
        """A line for each chemical in the text that is banned, or must not be used on this crop."""
        lines: list[str] = []
        for mention in self.facts.pesticides.find(text):
            entry = mention.entry
            if isinstance(entry, Pesticide):
                verdict = self.facts.pesticides.verdict(entry.id, crop.id if crop else None)
                if verdict.state == "forbidden":
                    by_crop = entry.status == "restricted" and crop is not None
                    line = RESTRICTED_HI if by_crop else BANNED_HI
                    lines.append(line.format(chemical=entry.hi[0], crop=oblique(crop.name_hi) if crop else ""))
        lines += [BANNED_HI.format(chemical=entry.hi[0]) for _, entry in self._sounds_forbidden(text)]
        return list(dict.fromkeys(lines))

    def _sounds_forbidden(self, text: str) -> list[tuple[str, Pesticide]]:
        """Words that are a forbidden name in another spelling, which the list itself does not know."""
        told = self.facts.pesticides.find(text)
        for mention in reversed(told):
            text = f"{text[: mention.start]} {text[mention.end :]}"
        words = letters(text).split()
        found: list[tuple[str, Pesticide]] = []
        for word in (*words, *(f"{one} {two}" for one, two in pairwise(words))):
            if len(word) < _LEAST_NAME or self._used.issuperset(word.split()):
                continue
            own = trigrams(f" {word} ")
            likeness, entry = max(((dice(own, other), entry) for other, entry in self._bad), key=lambda pair: pair[0])
            if likeness >= SOUNDS_ALIKE and likeness > max((dice(own, other) for other in self._good), default=0):
                found.append((word, entry))
        return found

    # ---- after the model ---------------------------------------------------------------------------------------------

    def finish(self, plan: Plan, said: str | None = None, *, complete: bool = True) -> Consultation:
        """What is shown: the model's words where nothing speaks against them, else the facts'.

        Args:
            plan: of the question.
            said: the model's answer; `None` where it was not asked or did not answer.
            complete: whether the answer ended by itself.
        """
        faults: tuple[Decision, ...] = ()
        if plan.ask_model:
            if said is None:
                faults = (Decision("output", "no_answer"),)
            else:
                faults = self.faults(plan, said)
                if not complete:
                    faults = (*faults, Decision("output", "cut_short"))
        good = plan.ask_model and said is not None and not faults
        return Consultation(
            answer=said.strip() if good and said is not None else plan.safe,
            origin="model" if good else "facts",
            plan=plan,
            decisions=(*plan.decisions, *faults),
            sources=self.sources(plan),
        )

    def faults(self, plan: Plan, said: str, *, whole: bool = True) -> tuple[Decision, ...]:
        """Everything that speaks against showing a text, each with its rule.

        Args:
            plan: of the question.
            said: the model's answer, or its first lines.
            whole: `False` for first lines: they need not name a cause yet.
        """
        advice = plan.advice
        assert advice is not None
        found = [Decision("output", rule, detail) for rule, detail in _form_faults(said)]
        table = advice.table
        texts = [text for cause in advice.causes for text in _texts(cause.problem)]
        sentences = [*texts, *advice.rules_hi, *plan.safe.splitlines(), *(chemical_hi(one) for one in table)]
        found += [
            Decision("output", one.rule, f"{one.matched}: {one.reason}")
            for one in guard.violations(
                said,
                crop_id=plan.case.crop,
                allowed_doses=[dose for one in table for dose in guard.allowed(one)]
                + [AllowedDose(dose.low, dose.high, dose.unit, dose.per) for text in texts for dose in doses(text)],
                pesticides=self.facts.pesticides,
                allowed_ais={*(one.ai for one in table), *self._named(texts)},
            )
        ]
        found += [
            Decision("output", "sounds_banned", f"{word}: {entry.en[0]}")
            for word, entry in self._sounds_forbidden(said)
        ]
        assert plan.case.crop is not None
        named = self.facts.knowledge.problems_named(said, plan.case.crop)
        known = {cause.problem.id for cause in advice.causes}
        if named and named[0] not in known:
            found.append(Decision("output", "wrong_cause", named[0]))
        elif whole and not named:
            found.append(Decision("output", "no_cause"))
        grams = [trigrams(bare_words(sentence)) for sentence in sentences]
        for step in _STEP.findall(said):
            own = trigrams(bare_words(step))
            if max((dice(own, other) for other in grams), default=0) < BACKED:
                found.append(Decision("output", "unbacked_measure", step[:60]))
        for sentence in re.split(r"[।\n]", said) if advice.hold else ():
            if _SPRAYS.search(sentence) and not _WAITS.search(sentence):
                found.append(Decision("output", "against_weather", sentence[:60]))
        return tuple(found)

    def _named(self, texts: Sequence[str]) -> set[str]:
        return {mention.entry.id for text in texts for mention in self.facts.pesticides.find(text)}

    def sources(self, plan: Plan) -> tuple[Source, ...]:
        """Where the facts behind the answer come from: first cause, doses of the list, or the safe answer's."""
        book = self.facts.knowledge.sources
        keys: list[tuple[str, str]] = []
        if plan.advice and plan.advice.causes and plan.case.crop:
            first = plan.advice.causes[0].problem
            keys = [(plan.case.crop, key) for group in first.sources.values() for key in group]
            keys += [(plan.case.crop, key) for chemical in plan.advice.table for key in chemical.sources]
        elif plan.topic:
            keys = [("safety", key) for key in plan.topic.sources]
        return tuple(book[room][key] for room, key in dict.fromkeys(keys) if key in book.get(room, {}))


def _texts(problem: Problem) -> list[str]:
    """Every Hindi sentence that the facts hold about a problem."""
    chemical = [problem.chemical_hi] if problem.chemical_hi else []
    checks = [look.check_hi for look in problem.look_alikes]
    return [*problem.cultural_hi, *problem.biological_hi, *chemical, *problem.prevention_hi, problem.signs_hi,
            problem.urgency_hi, problem.kvk_hi, *checks]  # fmt: skip


def _form_faults(said: str) -> list[tuple[str, str]]:
    """What is wrong with a text whatever it is about."""
    found: list[tuple[str, str]] = []
    if not said.strip():
        return [("empty", "")]
    if _TAGS.search(said) or _ENGLISH.search(said):
        found.append(("thought_leaks", ""))
    letters_ = [character for character in said if character.isalpha()]
    if letters_ and sum("\u0900" <= one <= "\u097f" for one in letters_) < LEAST_DEVANAGARI * len(letters_):
        found.append(("not_hindi", ""))
    if len(said.split()) > MAX_WORDS_SAID:
        found.append(("too_long", f"{len(said.split())} words"))
    for number in _PHONE.findall(said):
        if re.sub(r"\D", "", number) not in _NUMBERS:
            found.append(("unknown_number", number.strip()))
    return found


def _of_field(text: str) -> bool:
    """Whether anything in the text belongs to a field."""
    return any(word.startswith(_FIELD_WORDS) for word in letters(text).split())
