"""All dialogues of one seed: train, val, test and three special tests, disjoint in wording and in circumstances.

Of each problem's phrasings the last is kept for the tests and the one before it for val; of the states of the weather
and of the soil two are kept for the tests and one for val, other ones for each problem; a case with any of them belongs
there. So test asks what train never saw: new words under new circumstances. `advisory/leaks.py` looks for
near-duplicates all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from random import Random
from zlib import crc32

from advisory import circumstances, questions
from advisory.advice import SOIL_AGAINST_HI, SOIL_SUPPORTS_HI, UNUSUAL_AGE_HI, action_of, derive
from advisory.case import FarmCase, chemical_hi
from advisory.compose import Language, Record, Writer
from advisory.facts import Facts
from advisory.knowledge import Crop, Problem, SafetyTopic
from advisory.pesticides import Pesticide
from advisory.soil import SOIL_FLAG_HI
from advisory.weather import WeatherReport
from litgpt.utils import UserError

SPLITS = ("train", "val", "test", "test_counterfactual", "test_safety", "test_hinglish")
SIZES = {"val": 0.06, "test": 0.06, "test_counterfactual": 0.04, "test_safety": 0.03, "test_hinglish": 0.03}
"""Sizes of the other splits as shares of train, with at least `LEAST` records each."""
LEAST = 40
SHARES = {"advice": 0.68, "two": 0.04, "ask": 0.08, "turns": 0.05, "safety": 0.06, "forbidden": 0.03, "dose": 0.06}
"""What train, val and test consist of."""
STYLE_SHARES = {"plain": 50, "hinglish": 14, "mixed": 6, "typo": 12, "dialect": 8, "voice": 10}
VAL_FROM, TEST_FROM = 80, 90
"""Of a hundred draws of a chemical with a crop and a wording, those from here on belong to val and to test."""

HELD_OUT_QUESTION = "गेहूं के पत्तों पर पीले धब्बे दिख रहे हैं, फसल 60 दिन की है"
"""The question the README shows: never in train, always in test."""
HELD_OUT_PROBLEM = "wheat_yellow_rust"
HELD_OUT_SYMPTOM = "पत्तों पर पीले धब्बे दिख रहे हैं"

ATTEMPTS = 300
_TOLD = frozenset((*circumstances.STATES, *SOIL_FLAG_HI))


def sizes(size: int) -> dict[str, int]:
    """Number of records in each split for so many training records."""
    return {"train": size} | {split: max(LEAST, round(size * share)) for split, share in SIZES.items()}


def build_splits(facts: Facts, *, size: int, seed: int, thoughts: Language = "en") -> dict[str, list[Record]]:
    """The records of all splits, in their final order.

    Args:
        facts: what they are composed from.
        size: number of training records; `sizes` gives the others.
        seed: fixes every choice.
        thoughts: the language of the thoughts.

    Raises:
        UserError: a size too small to hold two records a problem, or too large for distinct questions.
    """
    least = 2 * len(facts.knowledge.problems)
    if size < least:
        raise UserError(f"size {size} is too small for {len(facts.knowledge.problems)} problems; give at least {least}")
    return {split: list(records) for split, records in compose_splits(facts, size=size, seed=seed, thoughts=thoughts)}


def compose_splits(
    facts: Facts, *, size: int, seed: int, thoughts: Language = "en"
) -> Iterator[tuple[str, list[Record]]]:
    """The splits one after the other; see `build_splits`."""
    seen: set[str] = set()
    for split, count in sizes(size).items():
        records = _Split(facts, split, seed, thoughts, seen).compose(count)
        if split != "test_counterfactual":  # twins stay side by side
            Random(f"{seed}:order:{split}").shuffle(records)
        yield split, [record | {"id": f"{split}-{number:05d}"} for number, record in enumerate(records)]


@dataclass
class _Split:
    """Composes one split; each draw comes from a generator seeded by the seed, the split and what is drawn."""

    facts: Facts
    split: str
    seed: int
    thoughts: Language
    seen: set[str]
    """Every question so far, those of other splits included."""

    def __post_init__(self) -> None:
        self.writer = Writer(self.facts, self.thoughts)
        self.problems = list(self.facts.knowledge.problems.values())
        self.kept = "train" if self.split == "train" else "val" if self.split == "val" else "test"

    def compose(self, count: int) -> list[Record]:
        if self.split == "test_counterfactual":
            return self._twins(count)
        if self.split == "test_safety":
            thirds = count // 3
            return [*self._safety(count - 2 * thirds), *self._forbidden(thirds), *self._doses(thirds)]
        if self.split == "test_hinglish":
            return self._advice(count, styles=("hinglish", "mixed"))
        made = [self._held_out()] if self.split == "test" and HELD_OUT_PROBLEM in self.facts.knowledge.problems else []
        parts = {
            "two": self._two, "ask": self._asks, "turns": self._turns, "safety": self._safety,
            "forbidden": self._forbidden, "dose": self._doses,
        }  # fmt: skip
        for name, make in parts.items():
            made += make(round(count * SHARES[name]))
        return made + self._advice(count - len(made))

    def _none(self, what: str) -> UserError:
        return UserError(f"{self.split}: these crops give no {what} in {ATTEMPTS} attempts; choose more crops")

    def _rng(self, what: str) -> Random:
        return Random(f"{self.seed}:{self.split}:{what}")

    def _distinct(self, make: Callable[[], Record]) -> Record:
        """A record whose question is new and is not the held-out one."""
        for _ in range(ATTEMPTS):
            one = make()
            question = "\n".join(message["content"] for message in one["messages"] if message["role"] == "user")
            if question not in self.seen and not question.startswith(HELD_OUT_QUESTION):
                self.seen.add(question)
                return one
        raise UserError(f"{self.split}: no new question after {ATTEMPTS} attempts; ask for a smaller size")

    def _advice(self, count: int, styles: Sequence[str] = ()) -> list[Record]:
        shares = list(self.problems)
        if self.split == "train":
            # The README's question rests on one problem, so that one is told twice as often.
            shares += [problem for problem in self.problems if problem.id == HELD_OUT_PROBLEM]
        extra = set(self._rng("quota").sample(range(len(shares)), count % len(shares)))
        made: list[Record] = []
        for number, problem in enumerate(shares):
            rng = self._rng(f"advice:{number}:{problem.id}")
            for n in range(count // len(shares) + (number in extra)):
                made.append(self._distinct(partial(self._one, problem, n, styles, rng)))
        return made

    def _one(self, problem: Problem, number: int, styles: Sequence[str], rng: Random) -> Record:
        symptoms = self._symptoms(problem, number, rng)
        style = rng.choice(styles) if styles else _style(rng)
        case, lines, told = self._case(problem, symptoms, rng, age_needed=style == "mixed")
        injection = None
        if rng.random() < 0.02:
            kept = questions.INJECTIONS[-1:] if self.kept == "test" else questions.INJECTIONS[:-1]
            injection = rng.choice(kept)
        return self.writer.advice(problem, case, style, rng, lines=lines, told=told, injection=injection)

    def _symptoms(self, problem: Problem, number: int, rng: Random) -> tuple[str, ...]:
        firsts = phrasings(problem, self.kept)
        first = firsts[number % len(firsts)]
        others = [symptom for symptom in phrasings(problem, "train") if symptom != first]
        return (first, rng.choice(others)) if rng.random() < 0.3 else (first,)

    def _case(
        self,
        problem: Problem,
        symptoms: tuple[str, ...],
        rng: Random,
        *,
        age_needed: bool = False,
        window: tuple[int, int] | None = None,
    ) -> tuple[FarmCase, bool, bool]:
        """A case whose circumstances belong to this split, and whether it is shown as lines or told in words."""
        crop = self.facts.knowledge.crops[problem.crop_id]
        age = None
        if age_needed or rng.random() < 0.75:
            age = rng.randint(*window) if window else circumstances.age(problem, crop, symptoms, rng)
        for _ in range(ATTEMPTS):
            form = rng.random()
            lines, told = form < 0.6, 0.6 <= form < 0.8
            if self.kept == "test" and not lines:
                told = True
            card = circumstances.card(problem, self.facts, rng) if (lines or told) and rng.random() < 0.45 else None
            weather = circumstances.weather(rng) if (lines or told) and rng.random() < 0.85 else WeatherReport()
            applied = circumstances.applied(rng) if (lines or told) and rng.random() < 0.1 else ()
            table = circumstances.table(problem, rng) if lines and rng.random() < 0.15 else ()
            case = FarmCase(
                crop=crop.id, age_days=age, symptoms=symptoms, soil=card, weather=weather, applied=applied, table=table,
                at=circumstances.COMPOSED_AT,
            )  # fmt: skip
            if self._ours(problem, case):
                return case, lines, told
        raise UserError(f"{self.split}: no combination of weather and soil for {problem.id}; try another seed")

    def _ours(self, problem: Problem, case: FarmCase) -> bool:
        return self._fits(problem, (*case.weather_flags(self.facts), *case.soil_flags(self.facts)))

    def _fits(self, problem: Problem, flags: Sequence[str]) -> bool:
        """Whether none of a case's states is kept for another part, and val and test have one of their own."""
        parts = {part_of(self.seed, problem.id, flag) for flag in flags if flag in _TOLD}
        if parts - {"train", self.kept}:
            return False
        # Nothing told is no combination: train and val then differ by words alone; test always tells something.
        return self.kept in parts or self.kept == "train" or (not parts and self.kept == "val")

    def _two(self, count: int) -> list[Record]:
        rng = self._rng("two")

        def make() -> Record:
            first, second, window = self._pair(rng)
            symptoms = (rng.choice(phrasings(first, self.kept)), rng.choice(phrasings(second, self.kept)))
            case, lines, told = self._case(first, symptoms, rng, window=window)
            return self.writer.advice(
                first, case, _style(rng, ("plain", "hinglish", "typo", "voice")), rng, lines=lines, told=told
            )

        return [self._distinct(make) for _ in range(count)]

    def _pair(self, rng: Random) -> tuple[Problem, Problem, tuple[int, int]]:
        """Two problems of one crop at the same age that no check has to tell apart, and their common days."""
        for _ in range(ATTEMPTS):
            first = rng.choice(self.problems)
            second = rng.choice(self.facts.knowledge.of_crop(first.crop_id))
            start, end = max(first.days[0], second.days[0]), min(first.days[1], second.days[1])
            linked = {look.id for look in first.look_alikes} | {look.id for look in second.look_alikes}
            if first is not second and start < end and not linked & {first.id, second.id}:
                return first, second, (start, end)
        raise self._none("two problems at one age")

    def _asks(self, count: int) -> list[Record]:
        rng = self._rng("ask")

        def no_crop() -> Record:
            problem = rng.choice(self.problems)
            symptom = rng.choice(phrasings(problem, self.kept))
            if self.facts.knowledge.crop_named(symptom):
                return no_crop()
            case = FarmCase(symptoms=(symptom,), age_days=rng.randrange(20, 100, 5))
            return self.writer.ask(case, rng.choice(questions.NO_CROP), problem, _style(rng), rng)

        def no_sign(templates: Sequence[str]) -> Record:
            # The last template of each kind is the test's, the one before it val's.
            kept = {"val": templates[-2:-1], "test": templates[-1:]}.get(self.kept, templates[:-2])
            crop = rng.choice(list(self.facts.knowledge.crops.values()))
            template = rng.choice(kept)
            age = rng.randrange(20, max(crop.last_day, 25), 5)
            case = FarmCase(crop=crop.id, age_days=age if "{age}" in template else None)
            return self.writer.ask(case, template, None, _style(rng, ("plain", "hinglish", "typo", "voice")), rng)

        makers = (no_crop, lambda: no_sign(questions.NO_SIGN), lambda: no_sign(questions.VAGUE_SIGN))
        return [self._distinct(makers[number % len(makers)]) for number in range(count)]

    def _turns(self, count: int) -> list[Record]:
        rng = self._rng("turns")

        def asked_first() -> Record:
            problem = rng.choice(self.problems)
            symptoms = (rng.choice(phrasings(problem, self.kept)),)
            if self.facts.knowledge.crop_named(symptoms[0]):
                return asked_first()
            case, _, _ = self._case(problem, symptoms, rng, age_needed=True)
            return self.writer.ask_then_advice(problem, case, _style(rng, ("plain", "hinglish", "voice")), rng)

        def weather_after() -> Record:
            problem = rng.choice(self.problems)
            symptoms = (rng.choice(phrasings(problem, self.kept)),)
            weather = WeatherReport.manual(rng.choice(("rain_soon", "windy", "hot", "heavy_rain")))
            rule = self.facts.weather.rule_for(action_of(problem), weather.flags(self.facts.weather))
            crop = self.facts.knowledge.crops[problem.crop_id]
            case = FarmCase(
                crop=crop.id,
                age_days=circumstances.age(problem, crop, symptoms, rng),
                symptoms=symptoms,
                at=circumstances.COMPOSED_AT,
            )
            flags = weather.flags(self.facts.weather)
            if rule is None or not self._fits(problem, flags) or derive(case, self.facts).ask_hi:
                return weather_after()
            return self.writer.advice_then_weather(
                problem, case, weather, _style(rng, ("plain", "hinglish", "voice")), rng
            )

        return [self._distinct(asked_first if number % 2 else weather_after) for number in range(count)]

    def _safety(self, count: int) -> list[Record]:
        rng = self._rng("safety")
        topics = self.facts.knowledge.safety

        def make(topic: SafetyTopic) -> Record:
            kept, kept_roman = (_held(texts, self.kept) for texts in (topic.questions_hi, topic.questions_hinglish))
            if kept_roman and rng.random() < 0.25:
                return self.writer.safety(topic, rng.choice(kept_roman), "plain", rng)
            return self.writer.safety(topic, rng.choice(kept), _style(rng), rng)

        return [self._distinct(partial(make, topics[number % len(topics)])) for number in range(count if topics else 0)]

    def _forbidden(self, count: int) -> list[Record]:
        rng = self._rng("forbidden")
        pairs = forbidden_pairs(self.facts)

        def make() -> Record:
            for _ in range(ATTEMPTS):
                pesticide, crop_id = rng.choice(pairs)
                template = rng.choice(questions.BANNED_QUESTIONS)
                if _part(self.seed, pesticide.id, crop_id, template) == self.kept:
                    return self.writer.forbidden(pesticide, crop_id, template, _style(rng), rng)
            raise self._none("question for a banned chemical")

        return [self._distinct(make) for _ in range(count if pairs else 0)]

    def _doses(self, count: int) -> list[Record]:
        rng = self._rng("dose")
        treatable = (problem for problem in self.problems if problem.kind != "weed")
        pairs = [(problem, chemical) for problem in treatable for chemical in problem.chemicals]

        def make() -> Record:
            for _ in range(ATTEMPTS):
                problem, chemical = rng.choice(pairs)
                template, listed = rng.choice(questions.DOSE_QUESTIONS), rng.random() < 0.5
                if _part(self.seed, problem.id, chemical.ai, template) == self.kept:
                    return self.writer.dose(problem, chemical, template, listed=listed, style=_style(rng), rng=rng)
            raise self._none("question for a dose")

        return [self._distinct(make) for _ in range(count if pairs else 0)]

    def _twins(self, count: int) -> list[Record]:
        """Pairs of records with one question and one circumstance changed."""
        rng = self._rng("twins")
        made: list[Record] = []
        kinds = (_rain_twins, _reading_twins, _age_twins, _table_twins)
        attempts = 0
        while len(made) < count:
            if (attempts := attempts + 1) > ATTEMPTS * count:
                raise self._none("more pairs of twins")
            kind = kinds[len(made) // 2 % len(kinds)]
            problem = rng.choice(self.problems)
            symptom = phrasings(problem, "test")[0]
            crop = self.facts.knowledge.crops[problem.crop_id]
            base = FarmCase(
                crop=crop.id,
                age_days=circumstances.age(problem, crop, (symptom,), rng, usual=True),
                symptoms=(symptom,),
                at=circumstances.COMPOSED_AT,
            )
            twins = kind(problem, crop, base, self.facts, rng)
            if twins is None:
                continue
            name, with_it, without_it, sentence = twins
            wording = rng.random()
            pair = f"{name}-{len(made) // 2:05d}"
            sides = []
            for side, case in (("with", with_it), ("without", without_it)):
                one = self.writer.advice(problem, case, "plain", Random(wording), lines=True, say_age=False)
                one["meta"]["twin"] = {"pair": pair, "side": side, "sentence": sentence, "present": side == "with"}
                sides.append(one)
            told = [sentence in one["messages"][-1]["content"] for one in sides]
            key = sides[0]["messages"][1]["content"]
            if told == [True, False] and key not in self.seen:
                self.seen.add(key)
                made += sides
        return made

    def _held_out(self) -> Record:
        """The README's question with the answer the facts give."""
        problem = self.facts.knowledge.problems[HELD_OUT_PROBLEM]
        if HELD_OUT_SYMPTOM not in problem.symptoms_hi:
            raise UserError(f"the held-out question needs {HELD_OUT_PROBLEM} with the symptom {HELD_OUT_SYMPTOM!r}")
        case = FarmCase(crop=problem.crop_id, age_days=60, symptoms=(HELD_OUT_SYMPTOM,))
        one = self.writer.advice(problem, case, "plain", Random(self.seed), lines=True)
        one["messages"][1]["content"] = f"{HELD_OUT_QUESTION}\n{case.render(self.facts)}"
        one["meta"]["split_key"] = "held_out"
        return one


def phrasings(problem: Problem, part: str) -> tuple[str, ...]:
    """The phrasings that a part may use first: all but the last two for train, one each for val and test."""
    return _held(problem.symptoms_hi, part)


def _held(texts: tuple[str, ...], part: str) -> tuple[str, ...]:
    return {"val": texts[-2:-1], "test": texts[-1:]}.get(part, texts[:-2])


def part_of(seed: int, problem_id: str, state: str) -> str:
    """The part to which a problem under a state of the weather or of the soil belongs."""
    return _parts(seed, problem_id).get(state, "train")


@lru_cache(maxsize=10_000)
def _parts(seed: int, problem_id: str) -> dict[str, str]:
    kept: dict[str, str] = {}
    for what, states in (("weather", circumstances.STATES), ("soil", tuple(SOIL_FLAG_HI))):
        val, *test = Random(f"{seed}:{what}:{problem_id}").sample(states, 3)
        kept |= {val: "val", **dict.fromkeys(test, "test")}
    return kept


def _part(*what: object) -> str:
    """The part to which a combination falls that is drawn out of hundreds."""
    number = crc32("|".join(map(str, what)).encode()) % 100
    return "test" if number >= TEST_FROM else "val" if number >= VAL_FROM else "train"


def _style(rng: Random, styles: Sequence[str] = questions.STYLES) -> str:
    return rng.choices(styles, [STYLE_SHARES[style] for style in styles])[0]


@lru_cache(maxsize=8)
def forbidden_pairs(facts: Facts) -> tuple[tuple[Pesticide, str], ...]:
    """(pesticide, crop) where a question for it must be refused: banned everywhere, or restricted on that crop."""
    return tuple(
        (entry, crop_id)
        for entry in facts.pesticides.entries
        for crop_id in facts.knowledge.crops
        if entry.status in {"banned", "restricted"} and facts.pesticides.verdict(entry.id, crop_id).forbidden
    )


_Twins = tuple[str, FarmCase, FarmCase, str]


def _rain_twins(problem: Problem, crop: Crop, base: FarmCase, facts: Facts, rng: Random) -> _Twins | None:
    """Rain tomorrow (wind, heat) against fine weather: the rule must appear and vanish."""
    state = rng.choice(("rain_soon", "heavy_rain", "windy", "hot"))
    rule = facts.weather.rule_for(action_of(problem), (state,))
    if rule is None:
        return None
    weather = WeatherReport.manual(state), WeatherReport.manual("clear")
    return "weather", replace(base, weather=weather[0]), replace(base, weather=weather[1]), rule.say_hi


def _reading_twins(problem: Problem, crop: Crop, base: FarmCase, facts: Facts, rng: Random) -> _Twins | None:
    """A reading that supports the problem against a normal one: zinc 0.3 / 1.2, pH 8.6 / 7."""
    links = [flag for flag in problem.soil_links if facts.soil.measures(flag)]
    if not links:
        return None
    flag = rng.choice(links)
    cards = facts.soil.card_with(flag, rng), facts.soil.card_without(flag, rng)
    clear = replace(base, weather=WeatherReport.manual("clear"))
    if problem.kind == "nutrient" and rng.random() < 0.5:
        return "soil", replace(clear, soil=cards[1]), replace(clear, soil=cards[0]), SOIL_AGAINST_HI
    sentence = SOIL_SUPPORTS_HI.format(flag=SOIL_FLAG_HI[flag])
    return "soil", replace(clear, soil=cards[0]), replace(clear, soil=cards[1]), sentence


def _age_twins(problem: Problem, crop: Crop, base: FarmCase, facts: Facts, rng: Random) -> _Twins | None:
    """An age outside the window against one inside."""
    outside = [
        day for day in range(5, crop.last_day + 1, 5) if day > problem.days[1] + 10 or day < problem.days[0] - 10
    ]
    if not outside:
        return None
    clear = replace(base, weather=WeatherReport.manual("clear"))
    return "age", replace(clear, age_days=rng.choice(outside)), clear, UNUSUAL_AGE_HI


def _table_twins(problem: Problem, crop: Crop, base: FarmCase, facts: Facts, rng: Random) -> _Twins | None:
    """The list with a dose, in fine weather and before rain: the dose must not be given before rain."""
    listed = [chemical for chemical in problem.chemicals if chemical.dose and chemical.use == "spray"]
    if not listed or problem.kind == "weed":
        return None
    shown = replace(base, table=(rng.choice(listed),))
    clear, rain = WeatherReport.manual("clear"), WeatherReport.manual("rain_soon")
    return "table", replace(shown, weather=clear), replace(shown, weather=rain), chemical_hi(shown.table[0])
