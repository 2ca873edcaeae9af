"""Knowledge × case → advice, by rules that leave a trace.

`derive` ranks the causes by evidence (sign, age, soil, weather), picks the check that tells the first two apart, and
takes the measures that fit this stage, soil, weather and history. Nothing is written freely: every sentence is a
field of a problem, a line of a rule file, or one of the few sentences below. Each rule that spoke is kept as a `Step`:
evidence → rule → conclusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from advisory.case import Applied, FarmCase, chemical_hi, oblique
from advisory.facts import Facts
from advisory.knowledge import Chemical, Crop, Problem, bare_words
from advisory.likeness import dice, trigrams
from advisory.soil import SOIL_FLAG_HI

MAX_WORDS = 120
"""No answer is longer."""
USUAL_WORDS = 90
"""What is only useful is added while the answer stays below this."""
MAX_MEASURES = 4
MAX_CAUSES = 3

HELPLINE_HI = "शक हो तो किसान कॉल सेंटर 1800-180-1551 पर पूछें।"
KVK_HI = "कृषि विज्ञान केंद्र"
LATER_HI = "आगे के लिए: {step}"
SURE_HI = "{crop} में यह शायद {first} है।"
WITH_SECOND_HI = "{crop} में यह शायद {first} है। दूसरा शक: {second}।"
UNSURE_HI = "{crop} में शक {first} और {second}, दोनों का है, पहले जांच करें।"
TWO_PROBLEMS_HI = "{crop} में दो दिक्कतें लगती हैं: शायद {first} और {second}।"
SIGN_HI = "पहचान: {signs}।"
CHECK_HI = "जांच: {check}।"
WEATHER_FAVOURS_HI = "इस मौसम में खतरा ज्यादा है, रोज खेत देखें।"
SOIL_SUPPORTS_HI = "मिट्टी की जांच: {flag}, इससे शक और बढ़ता है।"
SOIL_AGAINST_HI = "मिट्टी की जांच में यह कमी नहीं दिखती, दूसरे कारण भी देखें।"
UNUSUAL_AGE_HI = "इस उम्र में ऐसा कम होता है, पहले जांच करें।"
LATE_HI = f"फसल तैयार होने को है, दवा से पहले {KVK_HI} से पूछें।"
FERTILISED_HI = "खाद {days} दिन पहले डाली है, दोबारा डालने से पहले असर देखें।"
SPRAYED_HI = "दवा {days} दिन पहले छिड़की है, दोबारा छिड़कने से पहले {kvk} से पूछें।"
WATERED_HI = "पानी {days} दिन पहले दिया है, दोबारा देने से पहले मिट्टी की नमी देखें।"
TABLE_HI = "दवा सूची से: {chemical}। लेबल भी पढ़ें"
ASK_CROP_HI = "पहले बताएं, यह कौन सी फसल है और कितने दिन की है?"
ASK_SIGN_HI = "पहले बताएं, {crop} के किस भाग में क्या दिख रहा है: {parts}?"
ASK_PART_HI = "पहले बताएं, {crop} में यह किस भाग पर दिख रहा है: {parts}?"
ASK_AGE_HI = "पहले बताएं, {crop} की फसल कितने दिन की है?"

PART_HI = {
    "leaf": "पत्ते", "stem": "तना", "root": "जड़", "ear": "बाली", "panicle": "बाली", "cob": "भुट्टा", "fruit": "फल",
    "pod": "फली", "boll": "टिंडा", "bulb": "कंद", "tuber": "कंद", "flower": "फूल", "grain": "दाना", "tassel": "नर फूल",
}  # fmt: skip

# Which states of the weather bring a problem whose `favoured_by.weather` is the key.
FAVOURING = {
    "cool_humid": {"cool_humid"},
    "warm_humid": {"warm_humid"},
    "hot_dry": {"dry", "hot"},
    "cool_dry": {"dry"},
    "frost": {"frost"},
    "rain": {"rain_soon", "heavy_rain"},
    "waterlogged": {"rain_soon", "heavy_rain"},
}
# What each kind of evidence weighs. A sign outweighs all circumstances but those that speak together against it.
SIGN_POINTS, LOOK_ALIKE_POINTS = 4, 1
IN_WINDOW_POINTS, OUTSIDE_POINTS = 1, -2
SOIL_SUPPORTS_POINTS, SOIL_AGAINST_POINTS = 2, -3
WEATHER_POINTS = 1
SURE_MARGIN = 2
"""The first cause is said with "शायद" where it leads by so much; below, both are said to be possible."""
SAME_SIGN = 0.45
"""A farmer's words that share so much of their letter trigrams (Dice) with a known phrasing are taken for it."""
RECENT_DAYS = {"fertiliser": 10, "pesticide": 7, "irrigation": 4}

STANDING_CROP_USES = frozenset({"spray", "soil", "bait", "fertiliser"})
"""Treating seed or seedlings comes too late for a crop that shows signs."""

Action = Literal["spray", "fertiliser", "irrigation", "drain", "none"]


@dataclass(frozen=True)
class Step:
    """A rule that spoke: what was seen, which rule, what follows, in short English."""

    evidence: str
    rule: str
    conclusion: str

    def __str__(self) -> str:
        return f"{self.evidence} -> {self.conclusion}"


@dataclass(frozen=True)
class Cause:
    """A possible cause with the weight of its evidence."""

    problem: Problem
    points: int


@dataclass(frozen=True)
class Advice:
    """What follows from a case. Either `ask_hi` is the one question to ask back, or the rest is filled."""

    causes: tuple[Cause, ...]
    steps: tuple[Step, ...]
    rules_hi: tuple[str, ...]
    """Sentences that age, soil, weather and history ask for."""
    table: tuple[Chemical, ...]
    """Chemicals of the list shown with the case that fit now."""
    ask_hi: str | None = None
    two: bool = False
    """Two problems were told of at once, each with its own sign."""
    hold: bool = False
    """Weather or history forbids spraying or feeding now."""


def derive(case: FarmCase, facts: Facts) -> Advice:
    """Advice for a case, or the one question that must be asked first."""
    crop = facts.knowledge.crops.get(case.crop) if case.crop else None
    if crop is None:
        return _ask(ASK_CROP_HI, Step("crop not given", "ask_crop", "ask one question: which crop, how old"))
    if not case.symptoms:
        parts = parts_hi(facts.knowledge.of_crop(crop.id))
        step = Step(f"crop {crop.id}, no sign given", "ask_sign", "ask one question: which part, what is seen")
        return _ask(ASK_SIGN_HI.format(crop=oblique(crop.name_hi), parts=parts), step)
    owners = [owner(crop.id, symptom, facts) for symptom in case.symptoms]
    known = list({problem.id: problem for problem in owners if problem is not None}.values())
    if not known:
        step = Step("the sign is not in our list", "unknown_sign", "do not guess, ask for part and sign")
        parts = parts_hi(facts.knowledge.of_crop(crop.id))
        return _ask(ASK_PART_HI.format(crop=oblique(crop.name_hi), parts=parts), step)
    causes = rank(known, case, facts)
    if case.age_days is None and len(causes) > 1 and _age_decides(causes):
        step = Step("age not given, and it decides", "ask_age", "ask one question: how old")
        return _ask(ASK_AGE_HI.format(crop=oblique(crop.name_hi)), step)
    two = len(known) > 1 and not _told_apart(known[0], known[1])
    return _conclude(causes, known, two, crop, case, facts)


def _age_decides(causes: Sequence[Cause]) -> bool:
    """Whether the first two causes look alike and never come at the same age."""
    (start, end), (other_start, other_end) = causes[0].problem.days, causes[1].problem.days
    return end < other_start or other_end < start


def parts_hi(problems: Sequence[Problem]) -> str:
    """Up to four parts of a crop on which its problems show, as "पत्ते, तना या फल"."""
    parts = list(dict.fromkeys(PART_HI[part] for problem in problems for part in problem.parts if part in PART_HI))[:4]
    return f"{', '.join(parts[:-1])} या {parts[-1]}" if len(parts) > 1 else parts[0]


def rank(known: Sequence[Problem], case: FarmCase, facts: Facts) -> tuple[Cause, ...]:
    """The problems whose sign was told, and their look-alikes, by the weight of the evidence."""
    points: dict[str, int] = {}
    for problem in known:
        points[problem.id] = points.get(problem.id, 0) + SIGN_POINTS
    for problem in known:
        for look_alike in problem.look_alikes:
            points.setdefault(look_alike.id, LOOK_ALIKE_POINTS)
    causes = [
        Cause(
            facts.knowledge.problems[problem_id],
            count + _circumstances(facts.knowledge.problems[problem_id], case, facts),
        )
        for problem_id, count in points.items()
    ]
    return tuple(sorted(causes, key=lambda cause: -cause.points)[:MAX_CAUSES])


def _circumstances(problem: Problem, case: FarmCase, facts: Facts) -> int:
    points = 0
    if case.age_days is not None:
        points += IN_WINDOW_POINTS if problem.in_window(case.age_days) else OUTSIDE_POINTS
    if _soil_support(problem, case, facts):
        points += SOIL_SUPPORTS_POINTS
    elif _soil_against(problem, case, facts):
        points += SOIL_AGAINST_POINTS
    if _weather_favours(problem, case, facts):
        points += WEATHER_POINTS
    return points


def _soil_support(problem: Problem, case: FarmCase, facts: Facts) -> str | None:
    flags = case.soil_flags(facts)
    return next((flag for flag in flags if flag in problem.soil_links), None)


def _soil_against(problem: Problem, case: FarmCase, facts: Facts) -> bool:
    """A shortage that the card measured and did not find."""
    if problem.kind != "nutrient" or case.soil is None or _soil_support(problem, case, facts):
        return False
    # A normal pH does not speak against a shortage of iron that nobody measured.
    shortages = (flag for flag in problem.soil_links if flag.startswith("low_") and flag not in {"low_ph", "low_oc"})
    return any(facts.soil.reading_of(flag) in case.soil.readings for flag in shortages)


def _weather_favours(problem: Problem, case: FarmCase, facts: Facts) -> bool:
    return bool(FAVOURING.get(problem.favoured_by.weather, set()) & set(case.weather_flags(facts)))


def owner(crop_id: str, words: str, facts: Facts) -> Problem | None:
    """The problem whose known phrasing a farmer's words are nearest to, `None` if none is near enough."""
    problem_id = _owner(crop_id, bare_words(words), facts)
    return None if problem_id is None else facts.knowledge.problems[problem_id]


@lru_cache(maxsize=100_000)
def _owner(crop_id: str, words: str, facts: Facts) -> str | None:
    grams = trigrams(words)
    best, found = SAME_SIGN, None
    for other, problem_id in _phrasings(crop_id, facts):
        score = dice(grams, other)
        if score > best:
            best, found = score, problem_id
    return found


@lru_cache(maxsize=1000)
def _phrasings(crop_id: str, facts: Facts) -> tuple[tuple[frozenset[str], str], ...]:
    """The trigrams of every known phrasing of a crop, and whose it is."""
    return tuple(
        (trigrams(bare_words(symptom)), problem.id)
        for problem in facts.knowledge.of_crop(crop_id)
        for symptom in problem.symptoms_hi
    )


def _told_apart(a: Problem, b: Problem) -> bool:
    return any(look.id == b.id for look in a.look_alikes) or any(look.id == a.id for look in b.look_alikes)


def action_of(problem: Problem) -> Action:
    """What the advice for a problem comes down to, for the rules of the weather; treating seed or soil is none."""
    if problem.kind == "nutrient":
        return "fertiliser"
    if problem.kind == "water":
        return "drain" if "waterlogged" in (*problem.soil_links, problem.favoured_by.weather) else "irrigation"
    if problem.kind == "abiotic" and problem.favoured_by.weather == "frost":
        return "irrigation"
    if problem.chemicals:
        return "spray" if any(chemical.use == "spray" for chemical in problem.chemicals) else "none"
    pointer = problem.chemical_hi or ""
    return "spray" if problem.kind != "nematode" and "दवा" in pointer and "उपचार" not in pointer else "none"


def _conclude(
    causes: tuple[Cause, ...], known: Sequence[Problem], two: bool, crop: Crop, case: FarmCase, facts: Facts
) -> Advice:
    first = causes[0].problem
    steps = [Step(first.signs_en, "sign", f"{first.name_en} likely")]
    sentences: list[str] = []
    if two:
        other = next(problem for problem in known if problem is not first)
        steps.append(Step(other.signs_en, "second_sign", f"{other.name_en} as well"))
    elif check := check_between(causes):
        steps.append(Step(f"looks like {causes[1].problem.name_en}", "check", check[1]))
    if case.age_days is not None and not first.in_window(case.age_days):
        steps.append(Step("unusual age", "age", "check first"))
        sentences.append(UNUSUAL_AGE_HI)
    if flag := _soil_support(first, case, facts):
        steps.append(Step(f"soil {flag.replace('_', ' ')}", "soil", "supports it"))
        sentences.append(SOIL_SUPPORTS_HI.format(flag=SOIL_FLAG_HI[flag]))
    elif _soil_against(first, case, facts):
        steps.append(Step("soil card does not show the shortage", "soil", "look for other causes too"))
        sentences.append(SOIL_AGAINST_HI)
    elif case.soil is not None:
        steps.append(Step("soil card", "soil", "changes nothing"))
    hold, weather_steps, weather_sentences = _weather(first, case, facts)
    steps += weather_steps
    sentences += weather_sentences
    for done in case.applied:
        if sentence := _already(done, first):
            steps.append(Step(f"{done.kind} {done.days_ago} days ago", "history", "do not repeat yet"))
            sentences.append(sentence)
            hold = hold or done.kind == "pesticide"
    late = case.age_days is not None and case.age_days >= crop.stages[-1].from_day
    if late and action_of(first) == "spray":
        steps.append(Step("crop near harvest", "stage", "ask before any chemical"))
        sentences.append(LATE_HI)
    treated = known if two else [first]
    listed = [chemical for one in treated for chemical in one.chemicals if chemical.use in STANDING_CROP_USES]
    # What a herbicide does hangs on the size of the weeds, which no case holds.
    not_now = hold or late or first.kind == "weed"
    table = () if not_now else tuple(chemical for chemical in case.table if chemical in listed)
    if table:
        steps.append(Step("list gives " + table[0].ai, "table", "copy the listed dose, nothing else"))
    return Advice(causes, tuple(steps), tuple(dict.fromkeys(sentences)), table, two=two, hold=hold)


def _already(done: Applied, problem: Problem) -> str | None:
    if done.days_ago > RECENT_DAYS[done.kind]:
        return None
    action = action_of(problem)
    if done.kind == "fertiliser" and action == "fertiliser":
        return FERTILISED_HI.format(days=done.days_ago)
    if done.kind == "pesticide" and action == "spray":
        return SPRAYED_HI.format(days=done.days_ago, kvk=KVK_HI)
    if done.kind == "irrigation" and action == "irrigation":
        return WATERED_HI.format(days=done.days_ago)
    return None


def _weather(problem: Problem, case: FarmCase, facts: Facts) -> tuple[bool, list[Step], list[str]]:
    """Whether the weather forbids acting now, and the rules that say so."""
    flags = case.weather_flags(facts)
    action = action_of(problem)
    rule = facts.weather.rule_for(action, flags)
    if rule is not None:
        forbids = not {"unknown", "stale"} & set(rule.when)
        return (
            forbids and action in {"spray", "fertiliser"},
            [Step(rule.when_en, f"weather:{rule.id}", rule.thought_en)],
            [rule.say_hi],
        )
    if _weather_favours(problem, case, facts):
        return False, [Step("this weather", "weather:favours", "favours it, watch daily")], [WEATHER_FAVOURS_HI]
    return False, [], []


def check_between(causes: Sequence[Cause]) -> tuple[str, str] | None:
    """The check, in Hindi and English, that tells the first cause from the second, from whichever of them has it."""
    if len(causes) < 2:
        return None
    first, second = causes[0].problem, causes[1].problem
    for one, other in ((first, second), (second, first)):
        for look_alike in one.look_alikes:
            if look_alike.id == other.id:
                return look_alike.check_hi, look_alike.check_en
    return None


def _ask(question_hi: str, step: Step) -> Advice:
    return Advice((), (step,), (), (), ask_hi=question_hi)


def words(text: str) -> int:
    """Number of words, list numbers included."""
    return len(text.split())


def answer_hi(advice: Advice, case: FarmCase, facts: Facts) -> str:
    """The advice in plain Hindi: cause and doubt, check, numbered steps, rules, helpline; at most `MAX_WORDS`.

    The cause, the check (or the sign), two measures, the pointer to the KVK and the rules always stand; further
    measures, urgency, sign and the time to go to the KVK follow while the text stays below `USUAL_WORDS`.
    """
    if advice.ask_hi:
        return advice.ask_hi
    assert case.crop is not None
    crop = facts.knowledge.crops[case.crop]
    first = advice.causes[0].problem
    second = advice.causes[1].problem if len(advice.causes) > 1 else None
    heads = {"crop": oblique(crop.name_hi), "first": first.name_hi, "second": second.name_hi if second else ""}
    check = check_between(advice.causes)
    sign = SIGN_HI.format(signs=first.signs_hi)
    if advice.two and second:
        return _answer_two(TWO_PROBLEMS_HI.format(**heads), first, second, advice)
    if second is None or check is None:
        head, shown = SURE_HI.format(**heads), sign
    else:
        sure = advice.causes[0].points - advice.causes[1].points >= SURE_MARGIN
        head = (WITH_SECOND_HI if sure else UNSURE_HI).format(**heads)
        shown = CHECK_HI.format(check=check[0])
    return _fit(head, shown, sign, first, advice)


def _measures(problem: Problem, advice: Advice) -> tuple[list[str], list[str], list[str], list[str]]:
    """The cultural, biological, chemical and later measures of a problem, each in its order."""
    later = [step if step.startswith("अगल") else LATER_HI.format(step=step) for step in problem.prevention_hi]
    chemical = [problem.chemical_hi] if problem.chemical_hi else []
    listed = [chemical for chemical in advice.table if chemical in problem.chemicals]
    if listed:
        chemical = [TABLE_HI.format(chemical=chemical_hi(listed[0]))]
    return list(problem.cultural_hi), list(problem.biological_hi), chemical, later


def _fit(head: str, shown: str, sign: str, problem: Problem, advice: Advice) -> str:
    cultural, biological, chemical, later = _measures(problem, advice)
    order = [*cultural, *biological, *chemical, *later]
    rules, helpline = list(advice.rules_hi), [HELPLINE_HI]
    urgency = f"{problem.urgency_hi}।"

    def text(steps: Sequence[str], extras: Sequence[str] = ()) -> str:
        opening = [head, *([sign] if sign in extras else []), shown]
        numbered = [f"{number}. {step}।" for number, step in enumerate(sorted(steps, key=order.index), start=1)]
        closing = [*(extra for extra in extras if extra != sign), *rules, *helpline]
        return "\n".join([" ".join(opening), *numbered, *([" ".join(closing)] if closing else [])])

    steps = [cultural[0], *chemical] if chemical else [*cultural, *later][:2]
    # The least an answer needs may be too long already: what stands elsewhere in it goes first.
    if words(text(steps)) > USUAL_WORDS and any(KVK_HI in step for step in steps):
        helpline = []
    if words(text(steps)) > USUAL_WORDS and words(sign) < words(shown):
        shown = sign
    if words(text(steps)) > USUAL_WORDS and chemical:
        steps = [min(cultural, key=words), *chemical]
    for step in [*biological[:1], *cultural[1:], *later[:1]]:
        if step not in steps and len(steps) < MAX_MEASURES and words(text([*steps, step])) <= USUAL_WORDS:
            steps = [*steps, step]
    extras: list[str] = []
    wanted = [
        *([urgency] if problem.urgency == "high" else []),
        *([sign] if shown != sign else []),
        f"{problem.kvk_hi}।",
    ]
    for extra in wanted:
        if words(text(steps, [*extras, extra])) <= USUAL_WORDS:
            extras.append(extra)
    return text(steps, extras)


def _answer_two(head: str, first: Problem, second: Problem, advice: Advice) -> str:
    """Both problems, each with its sign and its first measure, as the farmer can do two things today."""
    lines = [head]
    number = 0
    for problem in (first, second):
        cultural, _, chemical, _ = _measures(problem, advice)
        for step in (min(cultural, key=words), *(chemical if advice.table else [])):
            number += 1
            lines.append(f"{number}. {problem.name_hi}: {step}।")
    pointer = first.chemical_hi or second.chemical_hi
    if pointer and not advice.table:
        lines.append(f"{number + 1}. {pointer}।")
    closing = [*advice.rules_hi, HELPLINE_HI]
    while len(closing) > 1 and words(" ".join([*lines, *closing])) > MAX_WORDS:
        closing.pop()
    return "\n".join([*lines, " ".join(closing)])


def thought_en(advice: Advice, case: FarmCase, facts: Facts) -> str:
    """The trace in short English: evidence -> conclusion, rule by rule."""
    return f"{_known_en(case, facts)}{'. '.join(map(str, advice.steps))}."


def thought_hi(advice: Advice, case: FarmCase, facts: Facts) -> str:
    """The trace in Hindi, for models that are to think in it."""
    if advice.ask_hi:
        return "जानकारी पूरी नहीं है, इसलिए अंदाजा न लगाएं, एक सवाल पूछें।"
    first = advice.causes[0].problem
    parts = [
        f"फसल {facts.knowledge.crops[first.crop_id].name_hi}",
        f"लक्षण: {first.signs_hi}, इसलिए {first.name_hi} का शक",
    ]
    if check := check_between(advice.causes):
        parts.append(f"{advice.causes[1].problem.name_hi} से अलग करने को: {check[0]}")
    return "। ".join([*parts, *(sentence.rstrip("।") for sentence in advice.rules_hi)]) + "।"


def _known_en(case: FarmCase, facts: Facts) -> str:
    crop = facts.knowledge.crops.get(case.crop) if case.crop else None
    if crop is None:
        return ""
    if case.age_days is None:
        return f"Crop {crop.id}, age not given. "
    stage = crop.stage(case.age_days)
    return f"Crop {crop.id}, {case.age_days} days{f' ({stage.id.replace(chr(95), chr(32))})' if stage else ''}. "
