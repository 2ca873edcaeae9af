"""One farmer's field: the crop, its age, what is seen, the soil card and the weather, as a few short Hindi lines.

What is not known is said ("मौसम: पता नहीं"), so that silence never reads as fine weather. Soil readings are rated
in code and shown as words ("नाइट्रोजन कम"), because a small model reads words better than numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from advisory.knowledge import Crop, Knowledge, Stage
from litgpt.utils import UserError

UNKNOWN_HI = "पता नहीं"
NORMAL_SOIL_HI = "सामान्य"


@dataclass(frozen=True)
class Weather:
    """A state of the weather: its words in a case line, in a farmer's question and in the English thought."""

    key: str
    line_hi: str
    spoken_hi: str
    name_en: str


WEATHERS: Mapping[str, Weather] = {
    weather.key: weather
    for weather in (
        Weather("rain_soon", "अगले 24 घंटे में बारिश", "कल बारिश के आसार हैं", "rain in 24 h"),
        Weather("windy", "तेज हवा", "तेज हवा चल रही है", "strong wind"),
        Weather("hot", "तेज गर्मी", "गर्मी बहुत तेज है", "high heat"),
        Weather("cool_humid", "ठंडा और नम", "ठंड और नमी है", "cool and humid"),
        Weather("warm_humid", "गर्म और नम", "उमस बहुत है", "warm and humid"),
        Weather("dry", "सूखा", "कई दिन से बारिश नहीं हुई", "dry spell"),
        Weather("frost", "पाले के आसार", "पाला पड़ने के आसार हैं", "frost likely"),
        Weather("clear", "साफ", "मौसम साफ है", "clear"),
        Weather("unknown", UNKNOWN_HI, "मौसम पता नहीं", "unknown"),
    )
}


@dataclass(frozen=True)
class SoilReading:
    """A parameter of the Soil Health Card and the limits that rate it.

    Limits differ by state; these are the common ones. `low` and `high` are in the card's own unit. No page was read yet
    that states those of P, K, Fe, Mn and Cu: nothing that a farmer reads may rest on these five numbers before one is.
    The dialogues name only the rating ("पोटाश कम"), which a card prints itself.
    """

    key: str
    unit: str
    low: float | None
    low_flag: str | None
    high: float | None = None
    high_flag: str | None = None


SOIL_READINGS: Mapping[str, SoilReading] = {
    reading.key: reading
    for reading in (
        SoilReading("ph", "pH", 6.5, "low_ph", 8.2, "high_ph"),
        SoilReading("ec", "dS/m", None, None, 1.0, "saline"),
        SoilReading("oc", "%", 0.5, "low_oc"),
        SoilReading("n", "kg/ha", 280.0, "low_n", 560.0, "high_n"),
        SoilReading("p", "kg/ha", 10.0, "low_p"),
        SoilReading("k", "kg/ha", 108.0, "low_k"),
        SoilReading("s", "ppm", 10.0, "low_s"),
        SoilReading("zn", "ppm", 0.6, "low_zn"),
        SoilReading("b", "ppm", 0.5, "low_b"),
        SoilReading("fe", "ppm", 4.5, "low_fe"),
        SoilReading("mn", "ppm", 2.0, "low_mn"),
        SoilReading("cu", "ppm", 0.2, "low_cu"),
    )
}

SOIL_FLAG_HI: Mapping[str, str] = {
    "low_n": "नाइट्रोजन कम",
    "high_n": "नाइट्रोजन ज्यादा",
    "low_p": "फास्फोरस कम",
    "low_k": "पोटाश कम",
    "low_s": "गंधक कम",
    "low_zn": "जिंक कम",
    "low_fe": "लोहा कम",
    "low_b": "बोरॉन कम",
    "low_mn": "मैंगनीज कम",
    "low_cu": "तांबा कम",
    "low_ca": "कैल्शियम कम",
    "low_mg": "मैग्नीशियम कम",
    "low_oc": "जैविक कार्बन कम",
    "low_ph": "पीएच कम",
    "high_ph": "पीएच ज्यादा",
    "saline": "नमक ज्यादा",
    "sandy": "रेतीली मिट्टी",
    "heavy": "भारी मिट्टी",
    "waterlogged": "पानी भरा रहता है",
}


@dataclass(frozen=True)
class FarmCase:
    """What is known of one field.

    Raises:
        UserError: an unknown weather or soil parameter, an age below zero.
    """

    crop: str | None = None
    """Id of the crop, `None` when the farmer did not say."""
    age_days: int | None = None
    """Days after the crop's day basis (sowing, transplanting or planting)."""
    part: str | None = None
    symptoms: tuple[str, ...] = ()
    """The farmer's own words."""
    soil: Mapping[str, float | str] | None = field(default=None)
    """Readings of the Soil Health Card by `SOIL_READINGS` key, and `"texture": "sandy"|"heavy"`,
    `"drainage": "waterlogged"`; an empty mapping means a card without remarks, `None` no card."""
    weather: str | None = None
    """A key of `WEATHERS`; `None` is the same as `"unknown"` in the rendered lines."""

    def __post_init__(self) -> None:
        if self.age_days is not None and self.age_days < 0:
            raise UserError(f"age_days is {self.age_days}; days after sowing cannot be below 0")
        if self.weather is not None and self.weather not in WEATHERS:
            raise UserError(f"weather is {self.weather!r}; choose one of {', '.join(WEATHERS)}")
        for key, value in (self.soil or {}).items():
            if key in SOIL_READINGS and isinstance(value, int | float):
                continue
            if (key, value) in {("texture", "sandy"), ("texture", "heavy"), ("drainage", "waterlogged")}:
                continue
            raise UserError(
                f"soil {key}: {value!r} is not known; give numbers for {', '.join(SOIL_READINGS)}, "
                "texture: sandy or heavy, drainage: waterlogged"
            )

    def stage(self, crop: Crop) -> Stage | None:
        """The growth stage, `None` when the age is unknown or past the last stage."""
        return None if self.age_days is None else crop.stage(self.age_days)

    def soil_flags(self) -> tuple[str, ...]:
        """What the soil card says out of the ordinary, as flags in the order of `SOIL_READINGS`."""
        soil = self.soil or {}
        flags: list[str] = []
        for key, reading in SOIL_READINGS.items():
            value = soil.get(key)
            if not isinstance(value, int | float):
                continue
            if reading.low_flag and reading.low is not None and value < reading.low:
                flags.append(reading.low_flag)
            if reading.high_flag and reading.high is not None and value > reading.high:
                flags.append(reading.high_flag)
        flags.extend(str(soil[key]) for key in ("texture", "drainage") if key in soil)
        return tuple(flags)

    def soil_hi(self) -> str:
        """The soil in words: what is out of the ordinary, "सामान्य", or "पता नहीं" without a card."""
        if self.soil is None:
            return UNKNOWN_HI
        return ", ".join(SOIL_FLAG_HI[flag] for flag in self.soil_flags()) or NORMAL_SOIL_HI

    def weather_hi(self) -> str:
        """The weather in words, "पता नहीं" when it is not known."""
        return WEATHERS[self.weather or "unknown"].line_hi

    def render(self, crop: Crop | None) -> str:
        """The case as three short lines: crop with age and stage, weather, soil.

        Args:
            crop: the crop that `self.crop` names, `None` when it is not known.
        """
        name = crop.name_hi if crop else UNKNOWN_HI
        age = f"{self.age_days} दिन" if self.age_days is not None else f"उम्र {UNKNOWN_HI}"
        stage = self.stage(crop) if crop else None
        first = ", ".join([name, age, *([stage.name_hi] if stage else [])])
        return f"फसल: {first}\nमौसम: {self.weather_hi()}\nमिट्टी: {self.soil_hi()}"


# "60 दिन", "60-दिन", "60 din", "60 days"; \d takes Devanagari digits as well.
# What follows tells an age from a time span: "3 दिन से पीले हैं", "2 दिन पहले", "5 din baad".
_AGE_DAYS = re.compile(
    r"(?<!\d)(\d{1,3})[\s-]*(?:दिनों|दिन|din\b|days?\b)(?!\s*(?:से|पहले|बाद|में|तक|se\b|pehle|pahle|baad|bad\b|me\b|ago|later))",
    re.IGNORECASE,
)


def with_case_lines(question: str, knowledge: Knowledge) -> str:
    """A farmer's question followed by the three case lines that say what was understood of it.

    Crop and age are read from the words (two different ages are none); weather and soil are said to be unknown. A
    question without a crop we know, or with case lines of its own, stays as it is.
    """
    crop = knowledge.crop_named(question)
    if crop is None or "\n" in question:
        return question
    ages = {int(days) for days in _AGE_DAYS.findall(question)}
    case = FarmCase(crop=crop.id, age_days=ages.pop() if len(ages) == 1 else None)
    return f"{question}\n{case.render(crop)}"
