"""All dialogues of one seed: train, val and test, disjoint in wording and in circumstance.

Of each problem's symptom phrasings the last is kept for test and the one before it for val; one state of the weather
per problem is kept for val and one for test. `check_splits` proves that nothing leaks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from advisory import compose
from advisory.case import SOIL_READINGS
from advisory.knowledge import Crop, Knowledge, Problem
from litgpt.utils import UserError

Record = dict[str, Any]

SPLITS = ("train", "val", "test")
CLARIFY_SHARE = 0.08
SAFETY_SHARE = 0.04
EVALUATION_SHARE = 0.1
"""Size of val and of test as a share of train."""

HELD_OUT_QUESTION = "गेहूं के पत्तों पर पीले धब्बे दिख रहे हैं, फसल 60 दिन की है"
"""The question the README shows: never in train, always in test."""
HELD_OUT_PROBLEM = "wheat_yellow_rust"
HELD_OUT_SYMPTOM = "पत्तों पर पीले धब्बे दिख रहे हैं"

UNRELATED_SOIL_FLAGS = ("low_n", "low_p", "low_k", "low_oc", "low_zn", "high_ph")
NORMAL_SOIL: Mapping[str, float] = {"ph": 7.2, "n": 320.0}
LATE_ORGANS = ("बाली", "बालि", "दाना", "दाने", "भुट्ट", "फूल", "फली", "फलि", "फल ", "फलों", "टिंड", "कंद", "डोडी")
ATTEMPTS = 200


def build_splits(knowledge: Knowledge, *, size: int, seed: int) -> dict[str, list[Record]]:
    """The records of the three splits, in their final order.

    Args:
        knowledge: the facts.
        size: number of training records; val and test have a tenth of it each.
        seed: fixes every choice.

    Raises:
        UserError: a size too small to hold one record a problem, or too large for distinct questions.
    """
    least = 2 * len(knowledge.problems)
    if size < least:
        raise UserError(f"size {size} is too small for {len(knowledge.problems)} problems; give at least {least}")
    splits: dict[str, list[Record]] = {}
    for split in SPLITS:
        count = size if split == "train" else round(size * EVALUATION_SHARE)
        records = _split(knowledge, split, count, seed)
        Random(f"{seed}:order:{split}").shuffle(records)
        splits[split] = [record | {"id": f"{split}-{number:05d}"} for number, record in enumerate(records)]
    check_splits(splits)
    return splits


def check_splits(splits: Mapping[str, Sequence[Record]]) -> None:
    """Refuse a question or a (problem, symptom, weather) that stands in two splits.

    Raises:
        UserError: naming what leaks and where.
    """
    seen: dict[tuple[str, str], str] = {}
    for split, records in splits.items():
        for record in records:
            question = compose.bare_question(record["messages"][1]["content"])
            for what in (("question", record["messages"][1]["content"]), ("key", record["meta"]["split_key"])):
                if seen.setdefault(what, split) != split:
                    raise UserError(f"{record['id']}: {what[0]} {what[1]!r} stands in {seen[what]} too")
            if split == "train" and compose.bare_question(HELD_OUT_QUESTION) in question:
                raise UserError(f"{record['id']}: the held-out question {HELD_OUT_QUESTION!r} stands in train")


def _split(knowledge: Knowledge, split: str, count: int, seed: int) -> list[Record]:
    safety = round(count * SAFETY_SHARE) if knowledge.safety else 0
    clarify = round(count * CLARIFY_SHARE)
    records: list[Record] = []
    seen: set[str] = set()
    if split == "test":
        records.append(_held_out_record(knowledge, seed))
        seen.add(HELD_OUT_QUESTION)
    problems = list(knowledge.problems.values())
    # The README's question rests on one problem, so that one is told twice as often.
    shares = [problem for problem in problems if split == "train" and problem.id == HELD_OUT_PROBLEM] + problems
    quota = count - safety - clarify - len(records)
    extra = Random(f"{seed}:quota:{split}").sample(range(len(shares)), quota % len(shares))
    amounts = Counter({problem.id: 0 for problem in problems})
    for number, problem in enumerate(shares):
        amounts[problem.id] += quota // len(shares) + (number in extra)
    for problem in problems:
        records.extend(_advice(knowledge, problem, split, amounts[problem.id], seed, seen))
    rng = Random(f"{seed}:other:{split}")
    for number in range(clarify):
        make = _clarify_crop if number % 2 else _clarify_sign
        records.append(_distinct(lambda make=make: make(knowledge, split, rng), split, seen))  # type: ignore[misc]
    for number in range(safety):
        topic = knowledge.safety[number % len(knowledge.safety)]
        index = {"val": len(topic.questions_hi) - 2, "test": len(topic.questions_hi) - 1}.get(split)
        records.append(
            _distinct(
                lambda topic=topic, index=index: compose.safety_record(  # type: ignore[misc]
                    "", topic, rng.randrange(len(topic.questions_hi) - 2) if index is None else index, rng
                ),
                split,
                seen,
            )
        )
    return records


def _distinct(make: Callable[[], Record], split: str, seen: set[str]) -> Record:
    """A record whose question is new in its split and is not the held-out one."""
    held_out = compose.bare_question(HELD_OUT_QUESTION)
    for _ in range(ATTEMPTS):
        record = make()
        question = record["messages"][1]["content"]
        if question not in seen and held_out not in compose.bare_question(question):
            seen.add(question)
            return record
    raise UserError(f"{split}: no new question after {ATTEMPTS} attempts; ask for a smaller size")


def _symptoms(problem: Problem, split: str) -> tuple[str, ...]:
    """The phrasings a split may use first: all but the last two for train, one each for val and test."""
    if split == "train":
        return problem.symptoms_hi[:-2]
    return problem.symptoms_hi[-2:-1] if split == "val" else problem.symptoms_hi[-1:]


def _weathers(problem: Problem, split: str, seed: int) -> list[str]:
    """The states of the weather that a problem is told with in a split; those that change nothing are among them."""
    states = ["rain_soon", "clear", "unknown", "windy", "hot"]
    states += [state for state in sorted(compose.FAVOURING.get(problem.favoured_by.weather, ())) if state not in states]
    Random(f"{seed}:weather:{problem.id}").shuffle(states)
    return {"val": states[:1], "test": states[1:2]}.get(split, states[2:])


def _advice(knowledge: Knowledge, problem: Problem, split: str, amount: int, seed: int, seen: set[str]) -> list[Record]:
    rng = Random(f"{seed}:advice:{split}:{problem.id}")
    crop = knowledge.crops[problem.crop_id]
    firsts, weathers = _symptoms(problem, split), _weathers(problem, split, seed)
    others = _symptoms(problem, "train")
    records: list[Record] = []
    for number in range(amount):

        def make(number: int = number) -> Record:
            first = firsts[number % len(firsts)]
            second = rng.choice([symptom for symptom in others if symptom != first])
            symptoms = (first, second) if rng.random() < 0.35 else (first,)
            return compose.advice_record(
                "", problem, crop, knowledge, symptoms, _circumstance(problem, crop, symptoms, weathers, rng), rng
            )

        records.append(_distinct(make, split, seen))
    return records


def _circumstance(
    problem: Problem, crop: Crop, symptoms: Sequence[str], weathers: Sequence[str], rng: Random
) -> compose.Circumstance:
    draw = rng.random()
    style = "mixed" if draw < 0.03 else "spoken" if draw < 0.23 else "lines" if draw < 0.63 else "plain"
    age = _age(problem, crop, symptoms, rng) if style == "mixed" or rng.random() < 0.75 else None
    # Case lines always name the weather, so that "पता नहीं" always carries its own rule.
    told = style == "lines" or (style == "spoken" and rng.random() < 0.85)
    weather = rng.choice(weathers) if told and weathers else None
    card = style in {"lines", "spoken"} and rng.random() < (0.5 if style == "lines" else 0.3)
    return compose.Circumstance(style, age, weather, _soil(problem, rng) if card else None)


def _age(problem: Problem, crop: Crop, symptoms: Sequence[str], rng: Random) -> int:
    """Mostly a day of the usual window, one time in twelve a day well outside it; often a round number.

    An ear, a pod or a tuber is there only later on, so a symptom that names one keeps to the later half of the window.
    """
    start, end = problem.days
    late = any(organ in symptom for organ in LATE_ORGANS for symptom in symptoms)
    outside = [day for day in range(5, crop.last_day + 1, 5) if day > end + 7 or (day < start - 7 and not late)]
    if late:
        start = (start + end) // 2
    if outside and rng.random() < 1 / 12:
        return rng.choice(outside)
    day = rng.randint(max(start, 1), end)
    rounded = round(day / 5) * 5
    return rounded if rng.random() < 0.7 and max(start, 1) <= rounded <= end else day


def _soil(problem: Problem, rng: Random) -> dict[str, float | str]:
    """A card that supports the problem, one that is normal, or one that says something else."""
    draw = rng.random()
    if problem.soil_links and draw < 0.6:
        return dict(_reading(rng.choice(problem.soil_links), rng))
    if draw < 0.8:
        return dict(NORMAL_SOIL)
    unrelated = [flag for flag in UNRELATED_SOIL_FLAGS if flag not in problem.soil_links]
    return dict(_reading(rng.choice(unrelated), rng))


def _reading(flag: str, rng: Random) -> dict[str, float | str]:
    for reading in SOIL_READINGS.values():
        if flag == reading.low_flag and reading.low is not None:
            return {reading.key: round(reading.low * rng.uniform(0.5, 0.9), 2)}
        if flag == reading.high_flag and reading.high is not None:
            return {reading.key: round(reading.high * rng.uniform(1.05, 1.2), 2)}
    if flag == "waterlogged":
        return {"drainage": flag}
    return {"texture": flag} if flag in {"sandy", "heavy"} else dict(NORMAL_SOIL)


def _clarify_crop(knowledge: Knowledge, split: str, rng: Random) -> Record:
    """A symptom that names no crop, asked without the crop."""
    while True:
        problem = rng.choice(list(knowledge.problems.values()))
        symptom = rng.choice(_symptoms(problem, split))
        if not any(name in symptom for crop in knowledge.crops.values() for name in (crop.name_hi, *crop.names)):
            return compose.clarify_crop_record("", symptom, f"{problem.id}|{problem.symptoms_hi.index(symptom)}", rng)


def _clarify_sign(knowledge: Knowledge, split: str, rng: Random) -> Record:
    last = len(compose.CLARIFY_SIGN_QUESTIONS) - 1
    crop = rng.choice(list(knowledge.crops.values()))
    template = {"val": last - 1, "test": last}.get(split, rng.randrange(last - 1))
    return compose.clarify_sign_record(
        "", crop, knowledge.of_crop(crop.id), template, rng.randrange(20, crop.last_day, 5), rng
    )


def _held_out_record(knowledge: Knowledge, seed: int) -> Record:
    """The README's question with the answer the facts give."""
    problem = knowledge.problems.get(HELD_OUT_PROBLEM)
    if problem is None or HELD_OUT_SYMPTOM not in problem.symptoms_hi:
        raise UserError(
            f"the held-out question needs the problem {HELD_OUT_PROBLEM} with the symptom {HELD_OUT_SYMPTOM!r}"
        )
    crop = knowledge.crops[problem.crop_id]
    circumstance = compose.Circumstance("plain", 60, None, None)
    record = compose.advice_record("", problem, crop, knowledge, (HELD_OUT_SYMPTOM,), circumstance, Random(seed))
    record["messages"][1]["content"] = HELD_OUT_QUESTION
    record["meta"] |= {"style": "held_out", "split_key": "held_out"}
    return record
