"""One farmer's field as a few short Hindi lines: crop and age, weather, soil, and, where known, what was done to it.

What is not known is said ("मौसम: पता नहीं"), so that silence never reads as fine weather. Soil readings are rated in
code and shown as words first ("जिंक कम"), because a small model reads words better than numbers. A case may carry lines
of the list of chemicals: a dose is only ever copied from there, never remembered.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from advisory.facts import Facts
from advisory.hinglish import NUMBERS, spellings
from advisory.knowledge import Amount, Chemical, Crop, Stage, clean
from advisory.soil import SoilCard
from advisory.weather import WeatherReport
from litgpt.utils import UserError

UNKNOWN_HI = "पता नहीं"
MAX_DAYS = 5000
"""No field crop is older; a mango tree's days are counted from flowering."""

UNIT_HI = {"g": "ग्राम", "kg": "किलो", "ml": "मिली", "l": "लीटर", "%": "%", "ppm": "ppm"}
PER_HI = {
    "acre": "प्रति एकड़", "hectare": "प्रति हेक्टेयर", "litre_water": "प्रति लीटर पानी",
    "kg_seed": "प्रति किलो बीज", "plant": "प्रति पौधा",
}  # fmt: skip
USE_HI = {
    "spray": "छिड़काव", "seed_treatment": "बीज उपचार", "seedling_dip": "पौध उपचार", "soil": "मिट्टी में", "bait": "चारा",
    "fertiliser": "खाद",
}  # fmt: skip
APPLIED_HI = {"fertiliser": "खाद", "pesticide": "दवा", "irrigation": "पानी"}

# Crop names that change before a postposition: "चने में", "गन्ने की".
_OBLIQUE = {"चना": "चने", "गन्ना": "गन्ने", "भुट्टा": "भुट्टे", "केला": "केले", "मक्का": "मक्के"}


def oblique(name_hi: str) -> str:
    """A crop's name as it stands before "में" or "की"."""
    return _OBLIQUE.get(name_hi, name_hi)


@dataclass(frozen=True)
class Applied:
    """What was put on the field, and how many days ago."""

    kind: Literal["fertiliser", "pesticide", "irrigation"]
    days_ago: int
    what_hi: str | None = None
    """The farmer's word for it, e.g. यूरिया."""

    def __post_init__(self) -> None:
        if self.kind not in APPLIED_HI:
            raise UserError(f"applied kind is {self.kind!r}; choose one of {', '.join(APPLIED_HI)}")
        if not 0 <= self.days_ago <= MAX_DAYS:
            raise UserError(f"applied days_ago is {self.days_ago}; give a whole number from 0")


@dataclass(frozen=True)
class FarmCase:
    """What is known of one field. Everything may be missing.

    Raises:
        UserError: an age below zero or beyond all sense.
    """

    crop: str | None = None
    """Id of the crop, `None` when the farmer did not say."""
    variety: str | None = None
    place: str | None = None
    age_days: int | None = None
    """Days after the crop's day basis (sowing, transplanting or planting)."""
    symptoms: tuple[str, ...] = ()
    """The farmer's own words, one sign each."""
    soil: SoilCard | None = None
    weather: WeatherReport = field(default_factory=WeatherReport)
    applied: tuple[Applied, ...] = ()
    table: tuple[Chemical, ...] = ()
    """Lines of the list of chemicals that are shown with the case."""
    at: datetime | None = None
    """When it is asked, from which a forecast's age counts; `None` is now."""

    _flags: dict[tuple[str, Facts], tuple[str, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Flags once worked out: every rule asks for them."""

    def __post_init__(self) -> None:
        if self.age_days is not None and not 0 <= self.age_days <= MAX_DAYS:
            raise UserError(f"age_days is {self.age_days}; give days after sowing, from 0 to {MAX_DAYS}")

    def stage(self, crop: Crop) -> Stage | None:
        """The growth stage, `None` when the age is unknown or past the last stage."""
        return None if self.age_days is None else crop.stage(self.age_days)

    def soil_flags(self, facts: Facts) -> tuple[str, ...]:
        """What the soil card says out of the ordinary."""
        if self.soil is None:
            return ()
        if ("soil", facts) not in self._flags:
            self._flags["soil", facts] = self.soil.flags(facts.soil)
        return self._flags["soil", facts]

    def weather_flags(self, facts: Facts) -> tuple[str, ...]:
        """The states of the weather that rules look at, `("unknown",)` when nothing is known."""
        if ("weather", facts) not in self._flags:
            self._flags["weather", facts] = self.weather.flags(facts.weather, self.at)
        return self._flags["weather", facts]

    def soil_hi(self, facts: Facts) -> str:
        """The soil in words, "पता नहीं" without a card."""
        return UNKNOWN_HI if self.soil is None else self.soil.line_hi(facts.soil)

    def render(self, facts: Facts) -> str:
        """Three short lines (crop, weather, soil), and further ones for history and list where there is some."""
        crop = facts.knowledge.crops.get(self.crop) if self.crop else None
        name = crop.name_hi if crop else UNKNOWN_HI
        if self.variety:
            name += f" ({self.variety})"
        age = f"{self.age_days} दिन" if self.age_days is not None else f"उम्र {UNKNOWN_HI}"
        stage = self.stage(crop) if crop else None
        first = ", ".join([name, age, *([stage.name_hi] if stage else []), *([self.place] if self.place else [])])
        lines = [
            f"फसल: {first}",
            f"मौसम: {self.weather.line_hi(facts.weather, self.at)}",
            f"मिट्टी: {self.soil_hi(facts)}",
        ]
        if self.applied:
            done = (f"{one.what_hi or APPLIED_HI[one.kind]} {one.days_ago} दिन पहले" for one in self.applied)
            lines.append(f"डाला गया: {', '.join(done)}")
        lines += [f"सूची: {chemical_hi(chemical)}" for chemical in self.table]
        return "\n".join(lines)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], facts: Facts) -> FarmCase:
        """A case as a form or a JSON file gives it: `crop` by any of its names, soil and weather as their records.

        Raises:
            UserError: an unknown key, an unknown crop, or a value that makes no sense; one line.
        """
        known = {"crop", "variety", "place", "age_days", "symptoms", "soil", "weather", "applied"}
        if unknown := sorted(set(values) - known):
            raise UserError(f"case: unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        crop = None
        if values.get("crop"):
            name = str(values["crop"])
            crop = facts.knowledge.crops.get(name) or facts.knowledge.crop_named(name)
            if crop is None:
                raise UserError(f"case: crop {name!r} is not known; known are {', '.join(facts.knowledge.crops)}")
        age = values.get("age_days")
        if age is not None and (not isinstance(age, int) or isinstance(age, bool)):
            raise UserError(f"case: age_days is {age!r}; give a whole number of days")
        symptoms = values.get("symptoms") or ()
        weather = values.get("weather")
        try:
            applied = tuple(Applied(**entry) for entry in values.get("applied") or ())
        except TypeError:
            raise UserError("case: applied takes a list of {kind, days_ago, what_hi}") from None
        return cls(
            crop=crop.id if crop else None,
            variety=values.get("variety"),
            place=values.get("place"),
            age_days=age,
            symptoms=(symptoms,) if isinstance(symptoms, str) else tuple(symptoms),
            soil=SoilCard.from_mapping(values["soil"]) if values.get("soil") is not None else None,
            weather=WeatherReport.from_mapping(weather) if weather is not None else WeatherReport(),
            applied=applied,
        )


def amount_hi(amount: Amount) -> str:
    """ "200 मिली प्रति एकड़"."""
    number = " से ".join(
        f"{value:g}" for value in (amount.amount if isinstance(amount.amount, tuple) else [amount.amount])
    )
    return " ".join([number, UNIT_HI[amount.unit], *([PER_HI[amount.per]] if amount.per else [])])


def chemical_hi(chemical: Chemical) -> str:
    """A line of the list: name, formulation, use, dose and waiting period as far as a source gives them."""
    parts = [f"{chemical.name_hi} {chemical.formulation} ({USE_HI[chemical.use]})"]
    parts.append(amount_hi(chemical.dose) if chemical.dose else "मात्रा लेबल से")
    if chemical.water:
        parts.append(f"पानी {amount_hi(chemical.water)}")
    if chemical.waiting_days:
        parts.append(f"कटाई से {chemical.waiting_days} दिन पहले बंद")
    return ", ".join(parts)


_MONTHS = {1: "एक", 1.5: "डेढ", 2: "दो", 2.5: "ढाई", 3: "तीन", 4: "चार", 5: "पांच", 6: "छह"}
DAYS_OF_MONTH = 30


def _spoken(numbers: Mapping[int, str] | Mapping[float, str]) -> dict[str, float]:
    """Every spelling of a number in words → the number."""
    return {spelt: number for number, words in numbers.items() for spelt in spellings(words)}


_DAYS_OF = _spoken(NUMBERS)
_MONTHS_OF = _spoken(_MONTHS)
_NUMBER_WORDS = "|".join(sorted({word for spelt in (*_DAYS_OF, *_MONTHS_OF) for word in spelt.split()}))
# "60 दिन", "60-din", "साठ दिन", "दो महीने", "2.5 months"; \d takes Devanagari digits as well. All number words before
# the unit are taken together, so that "दो-तीन महीने" and "दो सौ दिन", which stand in no table, are no age.
# What follows tells an age from a time span: "3 दिन से पीले हैं", "2 दिन पहले", "5 din baad".
_AGE = re.compile(
    rf"(?:(?<![\d.])(?<!\d[-–])(\d{{1,3}}(?:\.\d)?)[\s-]*|(?<![\w\u0900-\u0963])((?:(?:{_NUMBER_WORDS})[\s-]+)+))"
    r"(?:(दिनों|दिन|din\b|days?\b)|मह[ीि]न(?:ों|े|ा)|माह|mah(?:i|ee)n[ea]\b|months?\b)"
    r"(?!\s*(?:से|पहले|बाद|में|तक|se\b|pehle|pahle|baad|bad\b|me\b|ago|later))",
    re.IGNORECASE,
)


def age_in(text: str) -> int | None:
    """The crop's age in days that a text states, in digits or words, in days or months; two different ages are none."""
    ages: set[int] = set()
    for digits, words, in_days in _AGE.findall(clean(text).replace("\u093c", "").replace("ँ", "ं")):
        spoken = _DAYS_OF if in_days else _MONTHS_OF
        number = float(digits) if digits else spoken.get(" ".join(re.split(r"[\s-]+", words.lower().strip(" -"))))
        if number is not None:
            ages.add(round(number * (1 if in_days else DAYS_OF_MONTH)))
    age = ages.pop() if len(ages) == 1 else None
    return age if age is not None and age <= MAX_DAYS else None


def with_case_lines(question: str, facts: Facts) -> str:
    """A farmer's question followed by the three case lines that say what was understood of it.

    Crop and age are read from the words; weather and soil are said to be unknown. A question without a crop we know,
    or with case lines of its own, stays as it is.
    """
    crop = facts.knowledge.crop_named(question)
    if crop is None or "\n" in question:
        return question
    return f"{question}\n{FarmCase(crop=crop.id, age_days=age_in(question)).render(facts)}"


def listed_chemicals(facts: Facts, crop_id: str | None, lines: Collection[str]) -> list[Chemical]:
    """The chemicals of a crop that were shown in the list, found by their lines: name, formulation, use and dose."""
    problems = facts.knowledge.of_crop(crop_id) if crop_id else ()
    return [chemical for problem in problems for chemical in problem.chemicals if chemical_hi(chemical) in lines]
