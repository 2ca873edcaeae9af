"""Crop facts × a farmer's case → one dialogue: question, short English thought, Hindi answer.

The answer is assembled, never written freely: every sentence is a field of the problem or one of the few fixed
sentences below, so what the model learns can be traced to a source. The same case always gives the same answer;
only the question varies. The rule against spraying in rain, wind and heat follows TNAU Agritech, "Safe use of
pesticides"; that rain washes nitrogen out follows Krishi GK, "Nitrogen deficiency in wheat at the early stage".
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from advisory.case import SOIL_FLAG_HI, WEATHERS, FarmCase
from advisory.knowledge import Crop, Knowledge, Problem, SafetyTopic, clean

SYSTEM_HI = "आप किसान सलाहकार हैं। सरल हिंदी में छोटी और सुरक्षित सलाह दें।"
HELPLINE_HI = "शक हो तो किसान कॉल सेंटर 1800-180-1551 पर पूछें।"
MAX_ANSWER_WORDS = 90
KVK_HI = "कृषि विज्ञान केंद्र"
MIN_MEASURES, MAX_MEASURES = 2, 4

LATER_HI = "आगे के लिए: {step}"

RAIN_NO_SPRAY_HI = "बारिश के आसार हैं, अभी छिड़काव न करें।"
RAIN_NO_FERTILISER_HI = "बारिश के आसार हैं, अभी खाद न डालें।"
RAIN_DRAIN_HI = "बारिश के आसार हैं, निकासी की नाली आज ही साफ करें।"
WIND_NO_SPRAY_HI = "तेज हवा में छिड़काव न करें।"
HEAT_NO_SPRAY_HI = "तेज गर्मी में छिड़काव न करें।"
WEATHER_FAVOURS_HI = "इस मौसम में खतरा ज्यादा है, रोज खेत देखें।"
CHECK_WEATHER_SPRAY_HI = "छिड़काव से पहले मौसम देख लें।"
CHECK_WEATHER_FERTILISER_HI = "खाद डालने से पहले मौसम देख लें।"
SOIL_SUPPORTS_HI = "मिट्टी की जांच: {flag}, इससे शक और बढ़ता है।"
SOIL_UNSURE_HI = "मिट्टी की जांच से यह पक्का नहीं होता, दूसरे कारण भी देखें।"
UNUSUAL_AGE_HI = "इस उम्र में ऐसा कम होता है, पहले जांच करें।"

FIXED_SENTENCES_HI = frozenset(
    {
        HELPLINE_HI, RAIN_NO_SPRAY_HI, RAIN_NO_FERTILISER_HI, RAIN_DRAIN_HI, WIND_NO_SPRAY_HI, HEAT_NO_SPRAY_HI,
        WEATHER_FAVOURS_HI, CHECK_WEATHER_SPRAY_HI, CHECK_WEATHER_FERTILISER_HI, SOIL_UNSURE_HI, UNUSUAL_AGE_HI,
        *(SOIL_SUPPORTS_HI.format(flag=flag) for flag in SOIL_FLAG_HI.values()),
    }
)  # fmt: skip

# Which states of the weather bring a problem whose `favoured_by.weather` is the key.
FAVOURING = {
    "cool_humid": {"cool_humid"},
    "warm_humid": {"warm_humid"},
    "hot_dry": {"dry", "hot"},
    "cool_dry": {"dry"},
    "frost": {"frost"},
    "rain": {"rain_soon"},
    "waterlogged": {"rain_soon"},
}

QUESTION_WITH_AGE = (
    "{in_crop} {symptom}, फसल {age} की है।",
    "मेरी {crop} की फसल {age} की है, {symptom}। क्या करूं?",
    "{crop} की {age} की फसल है और {symptom}। कौन सा रोग है?",
    "{basis} को {age} हुए हैं, {in_crop} {symptom}। क्या उपाय करें?",
    "{symptom}। फसल {crop} की है और {age} की हो गई है। क्या करना चाहिए?",
    "{in_crop} {symptom}। फसल {age} की है, इलाज बताएं।",
    "फसल {crop} की, उम्र {age}। {symptom}। सलाह दें।",
)
QUESTION_WITHOUT_AGE = (
    "{in_crop} {symptom}, क्या करूं?",
    "{in_crop} {symptom}। यह क्या है और क्या करूं?",
    "मेरे खेत की {crop} की फसल में दिक्कत है। {symptom}। कारण बताएं।",
    "{symptom}। फसल {crop} की है, उपाय बताएं।",
    "कई दिन से {in_crop} {symptom}। क्या करना चाहिए?",
)
QUESTION_MIXED = (
    "Meri {alias} ki fasal {days} din ki hai, {symptom}. Kya karu?",
    "{alias} me {symptom}, {days} din ki fasal hai. Kya upay hai?",
)
GREETINGS = ("", "", "", "नमस्ते, ", "राम राम जी, ", "भाई साहब, ", "नमस्कार, ")
CLOSINGS = ("", "", "", " जल्दी बताएं।", " कृपया मदद करें।")
MONTHS = {60: "दो महीने", 90: "तीन महीने"}
BASIS_HI = {"sowing": "बुवाई", "transplanting": "रोपाई", "planting": "बुवाई"}

# The possessive before a symptom that opens with its plant part: "गेहूं के पत्तों पर", "गेहूं की बालियां".
POSSESSIVE = {
    noun: particle
    for particle, nouns in {
        "के": "पत्ते पत्तों पौधे पौधों तने तनों फल फलों फूल फूलों दाने दानों कंद कंदों खेत टिंडे टिंडों पूरे",
        "की": "पत्तियां पत्तियों बाली बालियां बालियों जड़ जड़ें जड़ों फलियां फलियों फली पूरी फसल पत्ती टहनी टहनियां चोटी कलियां गांठों",
        "का": "पूरा पौधा तना पत्ता टिंडा",
    }.items()
    for noun in nouns.split()
}

# Crop names that change before a postposition: "चने में", "गन्ने की".
OBLIQUE = {"चना": "चने", "गन्ना": "गन्ने", "भुट्टा": "भुट्टे"}

ASKING = ("क्या", "कौन", "कैसे", "कहां", "कब", "किसे", "कितनी", "कितना")

CLARIFY_CROP_QUESTIONS = (
    "{symptom}। क्या करूं?",
    "मेरे खेत में {symptom}, उपाय बताएं।",
    "{symptom}। यह कौन सा रोग है?",
    "कई दिन से {symptom}। क्या करना चाहिए?",
)
CLARIFY_CROP_ANSWER = "पहले बताएं, यह कौन सी फसल है और कितने दिन की है?"
CLARIFY_CROP_THOUGHT = (
    "A sign is given but the crop is missing -> the same sign has other causes in other crops. "
    "Do not guess. Ask one question: which crop, how old."
)
CLARIFY_SIGN_QUESTIONS = (
    "मेरी {crop} की फसल खराब हो रही है, क्या करूं?",
    "{crop} की फसल में रोग लग गया है, उपाय बताएं।",
    "{crop} की फसल ठीक नहीं बढ़ रही, क्या दिक्कत है?",
    "{crop} की फसल {age} की है, कौन सी दवा डालूं?",
    "{crop} की {age} की फसल में कुछ गड़बड़ है, सलाह दें।",
    "मेरी {crop} की फसल {age} की है और खराब दिख रही है।",
    "{crop} में कीड़ा लगा है या रोग, कुछ समझ नहीं आ रहा।",
    "{crop} की फसल कमजोर है, क्या डालें?",
)
CLARIFY_SIGN_ANSWER = "पहले बताएं, {crop} के किस भाग में क्या दिख रहा है: {parts}?"
CLARIFY_SIGN_THOUGHT = (
    "Crop {crop}, but no sign is given -> the cause cannot be told. Do not guess, name no chemical. "
    "Ask one question: which part and what is seen."
)
PART_HI = {
    "leaf": "पत्ते", "stem": "तना", "root": "जड़", "ear": "बाली", "panicle": "बाली", "cob": "भुट्टा", "fruit": "फल",
    "pod": "फली", "boll": "टिंडा", "bulb": "कंद", "tuber": "कंद", "flower": "फूल", "grain": "दाना",
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """The Hindi answer and the English thought behind it."""

    content: str
    thought: str


def words(text: str) -> int:
    """Number of words, list numbers included."""
    return len(text.split())


def sprays(problem: Problem) -> bool:
    """Whether the advice may end in a spray, which rain, wind and heat forbid; treating seed or soil is none."""
    if problem.kind == "nutrient" or problem.chemical_hi is None:
        return False
    return "दवा" in problem.chemical_hi and "उपचार" not in problem.chemical_hi


def weather_rule(problem: Problem, weather: str | None) -> tuple[str | None, str | None]:
    """The sentence the weather asks for, in Hindi and for the thought; `None` where it changes nothing."""
    if weather is None:
        return None, None
    if weather == "rain_soon":
        if sprays(problem):
            return RAIN_NO_SPRAY_HI, "Rain in 24 h -> no spray now"
        if problem.kind == "nutrient":
            return RAIN_NO_FERTILISER_HI, "Rain in 24 h -> no fertiliser now"
        if problem.kind == "water":
            return RAIN_DRAIN_HI, "Rain in 24 h -> open the drain today"
    if sprays(problem):
        if weather == "windy":
            return WIND_NO_SPRAY_HI, "Strong wind -> no spray now"
        if weather == "hot":
            return HEAT_NO_SPRAY_HI, "High heat -> no spray now"
    if weather in FAVOURING.get(problem.favoured_by.weather, set()):
        return WEATHER_FAVOURS_HI, f"Weather {WEATHERS[weather].name_en} favours it -> watch daily"
    if weather == "unknown":
        if sprays(problem):
            return CHECK_WEATHER_SPRAY_HI, "Weather unknown -> check before spraying"
        if problem.kind == "nutrient":
            return CHECK_WEATHER_FERTILISER_HI, "Weather unknown -> check before fertiliser"
    return None, f"Weather {WEATHERS[weather].name_en} -> no change"


def soil_rule(problem: Problem, case: FarmCase) -> tuple[str | None, str | None]:
    """The sentence the soil card asks for, in Hindi and for the thought."""
    if case.soil is None:
        return None, None
    linked = [flag for flag in case.soil_flags() if flag in problem.soil_links]
    if linked:
        flag = linked[0]
        return SOIL_SUPPORTS_HI.format(flag=SOIL_FLAG_HI[flag]), f"Soil {flag.replace('_', ' ')} supports it"
    if problem.kind == "nutrient" and problem.soil_links:
        return SOIL_UNSURE_HI, "Soil card does not show it -> look for other causes too"
    return None, "Soil card changes nothing"


def answer(problem: Problem, crop: Crop, case: FarmCase, knowledge: Knowledge) -> Answer:
    """The advice for one problem in one case.

    Required lines: the likely cause with its doubt, the check against the look-alike (or the sign), two measures,
    the chemical line, the rules of age, soil and weather, the helpline. Further measures, the urgency and the sign
    follow while they fit into `MAX_ANSWER_WORDS`.
    """
    look_alike = problem.look_alikes[0] if problem.look_alikes else None
    head = f"{_oblique(crop.name_hi)} में यह शायद {problem.name_hi} है।"
    sign = f"पहचान: {problem.signs_hi}।"
    check = f"जांच: {look_alike.check_hi}।" if look_alike else sign
    urgency = f"{problem.urgency_hi}।"
    age_line = UNUSUAL_AGE_HI if case.age_days is not None and not problem.in_window(case.age_days) else None
    soil_line, soil_thought = soil_rule(problem, case)
    weather_line, weather_thought = weather_rule(problem, case.weather)
    rules = [line for line in (age_line, soil_line, weather_line) if line]

    cultural = list(problem.cultural_hi)
    later = [step if step.startswith("अगल") else LATER_HI.format(step=step) for step in problem.prevention_hi]
    biological = list(problem.biological_hi[:1])
    chemical = [problem.chemical_hi] if problem.chemical_hi else []
    helpline = [HELPLINE_HI]
    order = [*cultural, *later, *biological, *chemical]

    def text(steps: list[str], extras: list[str]) -> str:
        opening = [head, *([sign] if sign in extras else []), check]
        numbered = [f"{number}. {step}।" for number, step in enumerate(sorted(steps, key=order.index), start=1)]
        closing = [*([urgency] if urgency in extras else []), *rules, *helpline]
        return "\n".join([" ".join(opening), *numbered, *([" ".join(closing)] if closing else [])])

    # The least an answer needs may be too long already: what is said elsewhere in it goes first.
    least = [cultural[0], *chemical] if chemical else [*order[:2]]
    if words(text(least, [])) > MAX_ANSWER_WORDS and any(KVK_HI in step for step in least):
        helpline = []
    if words(text(least, [])) > MAX_ANSWER_WORDS and words(sign) < words(check):
        check = sign
    if words(text(least, [])) > MAX_ANSWER_WORDS and soil_line:
        rules.remove(soil_line)
    if words(text(least, [])) > MAX_ANSWER_WORDS and chemical:
        least = [min(cultural, key=words), *chemical]

    steps = least
    for step in [*biological, *cultural[1:], *later]:
        full = len(steps) >= (MIN_MEASURES + 1 if step in later else MAX_MEASURES)
        if step not in steps and not full and words(text([*steps, step], [])) <= MAX_ANSWER_WORDS:
            steps = [*steps, step]
    extras: list[str] = []
    for extra in [*([urgency] if problem.urgency == "high" else []), *([sign] if check != sign else [])]:
        if words(text(steps, [*extras, extra])) <= MAX_ANSWER_WORDS:
            extras.append(extra)
    return Answer(text(steps, extras), _thought(problem, crop, case, knowledge, soil_thought, weather_thought))


def _thought(
    problem: Problem,
    crop: Crop,
    case: FarmCase,
    knowledge: Knowledge,
    soil_thought: str | None,
    weather_thought: str | None,
) -> str:
    stage = case.stage(crop)
    if case.age_days is None:
        age = "age not given"
    else:
        age = f"{case.age_days} days" + (f" ({stage.id.replace('_', ' ')})" if stage else "")
    parts = [f"Crop {crop.id}, {age}", f"Sign: {problem.signs_en} -> {problem.name_en} likely"]
    if problem.look_alikes:
        other = knowledge.problems[problem.look_alikes[0].id]
        parts.append(f"Check against {other.name_en}: {problem.look_alikes[0].check_en}")
    if case.age_days is not None and not problem.in_window(case.age_days):
        parts.append("Unusual age -> check first")
    parts.extend(part for part in (soil_thought, weather_thought) if part)
    return ". ".join(parts) + "."


@dataclass(frozen=True)
class Circumstance:
    """What surrounds the symptom in one record, drawn before the question is worded."""

    style: str
    """`plain`, `mixed` (Hinglish), `spoken` (weather and soil in the question) or `lines` (the case's own lines)."""
    age_days: int | None
    weather: str | None
    soil: dict[str, float | str] | None


def advice_record(
    record_id: str,
    problem: Problem,
    crop: Crop,
    knowledge: Knowledge,
    symptoms: tuple[str, ...],
    circumstance: Circumstance,
    rng: Random,
) -> dict[str, Any]:
    """One dialogue about one problem; `rng` only chooses the wording of the question."""
    case = FarmCase(
        crop=crop.id,
        age_days=circumstance.age_days,
        part=problem.parts[0],
        symptoms=symptoms,
        soil=circumstance.soil,
        weather=circumstance.weather,
    )
    question = _question(crop, case, circumstance.style, rng)
    result = answer(problem, crop, case, knowledge)
    phrasings = "+".join(str(problem.symptoms_hi.index(symptom)) for symptom in symptoms)
    meta = {
        "crop": crop.id,
        "problem": problem.id,
        "kind": problem.kind,
        "age_days": case.age_days,
        "weather": case.weather,
        "soil": list(case.soil_flags()) if case.soil is not None else None,
        "style": circumstance.style,
        "split_key": f"{problem.id}|{phrasings}|{case.weather}",
    }
    return record(record_id, question, result, meta)


def record(record_id: str, question: str, result: Answer, meta: dict[str, Any]) -> dict[str, Any]:
    """The contract's dialogue record."""
    return {
        "id": record_id,
        "messages": [
            {"role": "system", "content": SYSTEM_HI},
            {"role": "user", "content": question},
            {"role": "assistant", "content": result.content, "thought": result.thought},
        ],
        "meta": meta,
    }


def _question(crop: Crop, case: FarmCase, style: str, rng: Random) -> str:
    joint = ", साथ ही " if any(" और " in symptom for symptom in case.symptoms) else " और "
    symptom = joint.join(case.symptoms)
    if style == "mixed" and case.age_days is not None:
        alias = rng.choice([name for name in crop.names if name.isascii()] or [crop.id])
        return rng.choice(QUESTION_MIXED).format(alias=alias, days=case.age_days, symptom=symptom)
    names = [
        crop.name_hi,
        crop.name_hi,
        crop.name_hi,
        crop.name_hi,
        *(name for name in crop.names if not name.isascii()),
    ]
    name = rng.choice(names)
    name = _oblique(name)
    in_crop = f"{name} {POSSESSIVE.get(symptom.split()[0], 'में')}"
    # The case's own lines give the age already.
    spoken_age = case.age_days is not None and style != "lines"
    template = rng.choice(QUESTION_WITH_AGE if spoken_age else QUESTION_WITHOUT_AGE)
    question = template.format(
        crop=name, in_crop=in_crop, symptom=symptom, age=_age_hi(case.age_days, rng), basis=BASIS_HI[crop.day_basis]
    )
    if style == "spoken":
        if case.weather is not None:
            question += f" {WEATHERS[case.weather].spoken_hi}।"
        if case.soil is not None:
            question += f" मिट्टी की जांच: {case.soil_hi()}।"
    elif not question.endswith("?"):
        question += rng.choice(CLOSINGS)
    question = rng.choice(GREETINGS) + question
    return f"{question}\n{case.render(crop)}" if style == "lines" else question


def _oblique(name: str) -> str:
    return OBLIQUE.get(name, name)


def _age_hi(age_days: int | None, rng: Random) -> str:
    if age_days in MONTHS and rng.random() < 0.3:
        return MONTHS[age_days]
    return f"करीब {age_days} दिन" if rng.random() < 0.2 else f"{age_days} दिन"


def clarify_crop_record(record_id: str, symptom: str, key: str, rng: Random) -> dict[str, Any]:
    """A sign without a crop: the right answer is one question."""
    question = rng.choice(GREETINGS) + rng.choice(CLARIFY_CROP_QUESTIONS).format(symptom=symptom)
    meta = _plain_meta("clarify", None, None, f"clarify_crop|{key}")
    return record(record_id, question, Answer(CLARIFY_CROP_ANSWER, CLARIFY_CROP_THOUGHT), meta)


def clarify_sign_record(
    record_id: str, crop: Crop, problems: tuple[Problem, ...], template: int, age_days: int, rng: Random
) -> dict[str, Any]:
    """A crop without a sign: the right answer is one question that names the crop's parts."""
    names = [crop.name_hi, crop.name_hi, *(name for name in crop.names if not name.isascii())]
    question = CLARIFY_SIGN_QUESTIONS[template].format(crop=_oblique(rng.choice(names)), age=_age_hi(age_days, rng))
    stated_age = age_days if "{age}" in CLARIFY_SIGN_QUESTIONS[template] else None
    parts = list(dict.fromkeys(PART_HI[part] for problem in problems for part in problem.parts if part in PART_HI))[:4]
    listed = f"{', '.join(parts[:-1])} या {parts[-1]}" if len(parts) > 1 else parts[0]
    result = Answer(
        CLARIFY_SIGN_ANSWER.format(crop=_oblique(crop.name_hi), parts=listed), CLARIFY_SIGN_THOUGHT.format(crop=crop.id)
    )
    meta = _plain_meta("clarify", crop.id, stated_age, f"clarify_sign|{crop.id}|{template}")
    return record(record_id, rng.choice(GREETINGS) + question, result, meta)


def safety_record(record_id: str, topic: SafetyTopic, index: int, rng: Random) -> dict[str, Any]:
    """A request that is no crop question: its one safe answer."""
    question = rng.choice(GREETINGS) + topic.questions_hi[index]
    asks = any(word in question.split() for word in ASKING)
    question += rng.choice(("?" if asks else "।", ""))
    meta = _plain_meta("safety", None, None, f"{topic.id}|{index}")
    return record(record_id, question, Answer(topic.answer_hi, f"{topic.thought_en}."), meta | {"topic": topic.id})


def _plain_meta(kind: str, crop: str | None, age_days: int | None, split_key: str) -> dict[str, Any]:
    return {
        "crop": crop,
        "problem": None,
        "kind": kind,
        "age_days": age_days,
        "weather": None,
        "soil": None,
        "style": "plain",
        "split_key": split_key,
    }


def bare_question(text: str) -> str:
    """A question without greeting, punctuation and case lines: what two wordings are compared by."""
    bare = clean(text.split("\n")[0])
    for greeting in sorted(set(GREETINGS) - {""}, key=len, reverse=True):
        bare = bare.removeprefix(clean(greeting)).strip()
    for mark in "।?,.!":
        bare = bare.replace(mark, " ")
    return " ".join(bare.split())
