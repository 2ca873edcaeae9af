"""What is known of a field's weather, and what it means for the work there.

A person's words, a file or a forecast (`advisory/forecast.py`) become one `WeatherReport`; the thresholds in
`data/knowledge/_weather.yaml` make states of it, the rules there say what they mean for spraying, fertiliser,
irrigation and drains. Nothing known is a state of its own, and so is a forecast that has grown old: silence must never
read as fine weather.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from advisory.texts import SomeTexts, Source, Text, Texts, bare_words, clean
from advisory.yamlfile import Model, YamlFile, refuse
from litgpt.utils import UserError

WEATHER_FILE = "_weather.yaml"
INDIA = timezone(timedelta(hours=5, minutes=30))
"""What a time without a zone is taken for."""
CLOCK_SLACK = timedelta(hours=1)
"""A forecast may seem to come from so far in the future; more means that a clock is wrong, and its age unknown."""

Flag = Literal[
    "rain_soon", "heavy_rain", "windy", "hot", "frost", "cool_humid", "warm_humid", "dry", "clear", "unknown", "stale"
]  # fmt: skip
FLAGS: tuple[Flag, ...] = get_args(Flag)
Action = Literal["spray", "fertiliser", "irrigation", "drain"]
Origin = Literal["manual", "file", "cache", "open-meteo"]

FORECAST_HI = "{words} (पूर्वानुमान, {age})"
OLD_FORECAST_HI = "{words} (पुराना पूर्वानुमान, {age})"
RAIN_UNKNOWN_HI = "बारिश का पता नहीं"

POSSIBLE: Mapping[str, tuple[float, float]] = {
    "tmax_c": (-60, 60), "tmin_c": (-60, 60), "rh_max": (0, 100), "rh_min": (0, 100), "rain_24h_mm": (0, 2000),
    "rain_48h_mm": (0, 4000), "rain_prob_pct": (0, 100), "wind_kmph": (0, 400),
}  # fmt: skip
_ORDERED = (("tmin_c", "tmax_c"), ("rh_min", "rh_max"), ("rain_24h_mm", "rain_48h_mm"))


@dataclass(frozen=True)
class WeatherReport:
    """What is known of the weather. Everything may be missing; `WeatherReport()` is `UNKNOWN`.

    Raises:
        UserError: a number that cannot be, an unknown flag, a time without a zone.
    """

    place: str | None = None
    source: Origin | None = None
    fetched_at: datetime | None = None
    tmax_c: float | None = None
    """Of the next 24 hours, as all that follows but `rain_48h_mm`."""
    tmin_c: float | None = None
    rh_max: float | None = None
    rh_min: float | None = None
    rain_24h_mm: float | None = None
    rain_48h_mm: float | None = None
    rain_prob_pct: float | None = None
    wind_kmph: float | None = None
    """The strongest."""
    said: tuple[Flag, ...] = ()
    """What a person picked."""
    reason: str | None = None
    """Why nothing is known, in one line."""

    def __post_init__(self) -> None:
        for name, (least, most) in POSSIBLE.items():
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"weather: {name} is {value!r:.60}, which is no number")
            if not least <= value <= most:
                raise UserError(f"weather: {name} is {value:g}; {least} to {most} is possible")
        for low, high in _ORDERED:
            below, above = getattr(self, low), getattr(self, high)
            if below is not None and above is not None and below > above:
                raise UserError(f"weather: {low} is {below:g}, which is more than {high} {above:g}")
        if unknown := [flag for flag in self.said if flag not in FLAGS or flag == "stale"]:
            raise UserError(f"weather is {unknown[0]!r}; choose of {', '.join(FLAGS[:-1])}")
        if self.source not in (None, *get_args(Origin)):
            raise UserError(f"weather: source is {self.source!r}; choose of {', '.join(get_args(Origin))}")
        if self.fetched_at is not None and self.fetched_at.tzinfo is None:
            raise UserError(f"weather: fetched_at {self.fetched_at} has no time zone")

    @classmethod
    def manual(cls, *flags: str) -> WeatherReport:
        """What a person picks, by the ids of the states.

        Raises:
            UserError: an id that is not known.
        """
        return cls(source="manual", said=tuple(flags))  # type: ignore[arg-type]

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> WeatherReport:
        """A report by the names of its fields; numbers may be written as text, a time without a zone is India's.

        Raises:
            UserError: an unknown field, or a value that makes no sense; one line.
        """
        known = [one.name for one in fields(cls)]
        if not isinstance(values, Mapping):
            raise UserError(f"weather: a mapping is needed, found {values!r:.60}")
        if unknown := [name for name in values if name not in known]:
            raise UserError(f"weather: {unknown[0]!r:.60} is not known; known are {', '.join(known)}")
        report: dict[str, Any] = {"source": "manual"}
        for name, value in values.items():
            if value is None or value == "":
                continue
            if name in POSSIBLE:
                report[name] = _number(name, value)
            elif name == "fetched_at":
                report[name] = moment_of(value, INDIA)
            elif name == "said" and isinstance(value, str | list | tuple):
                report[name] = tuple(value.replace(",", " ").split() if isinstance(value, str) else value)
            elif not isinstance(value, str):
                raise UserError(f"weather: {name} is {value!r:.60}, which is no text")
            else:
                report[name] = value
        return cls(**report)

    def flags(self, rules: WeatherRules, now: datetime | None = None) -> tuple[Flag, ...]:
        """The states of the weather, in the order of `FLAGS`; never empty.

        A forecast older than `stale_spray_hours` keeps its states and is `stale` besides; one older than `stale_hours`
        says nothing any more. `unknown` beside others means that of rain nothing is known.
        """
        limit = rules.thresholds
        age = self._age_hours(now) or 0.0
        if age > limit.stale_hours:
            return ("unknown", "stale")
        found = set(self.said) | self._measured(limit)
        rain_known = self.said or self.rain_prob_pct is not None or self._rain(limit.rain_soon_hours) is not None
        if not rain_known:
            found.add("unknown")
        if "heavy_rain" in found:
            found.discard("rain_soon")
        if found - {"clear", "unknown"}:
            found -= {"clear", "unknown"} if rain_known else {"clear"}
        elif not found:
            found.add("clear")
        if age > limit.stale_spray_hours:
            found.add("stale")
        return tuple(flag for flag in FLAGS if flag in found)

    def line_hi(self, rules: WeatherRules, now: datetime | None = None) -> str:
        """The weather in words: "तेज हवा", "साफ (पूर्वानुमान, 5 घंटे पुराना)", "पता नहीं"."""
        flags = self.flags(rules, now)
        shown = [flag for flag in flags if flag != "stale"]
        words = ", ".join(
            RAIN_UNKNOWN_HI if flag == "unknown" and len(shown) > 1 else rules.states[flag].line_hi for flag in shown
        )
        age = self._age_hours(now)
        if age is None or not self._knows_something():
            return words
        if "stale" in flags:
            return OLD_FORECAST_HI.format(words=words, age="समय पता नहीं" if math.isinf(age) else _span_hi(age))
        return FORECAST_HI.format(words=words, age=f"{_span_hi(age)} पुराना" if age >= 0.5 else "अभी का")

    def _measured(self, limit: Thresholds) -> set[Flag]:
        found: set[Flag] = set()
        rain = self._rain(limit.rain_soon_hours)
        if rain is not None and rain >= limit.heavy_rain_mm:
            found.add("heavy_rain")
        if (rain is not None and rain >= limit.rain_soon_mm) or (self.rain_prob_pct or 0) > limit.rain_prob_pct:
            found.add("rain_soon")
        if self.wind_kmph is not None and self.wind_kmph >= limit.wind_kmph:
            found.add("windy")
        if self.tmax_c is not None and self.tmax_c >= limit.hot_c:
            found.add("hot")
        if self.tmin_c is not None and self.tmin_c <= limit.frost_c:
            found.add("frost")
        if self.rh_max is not None and self.tmax_c is not None and self.tmin_c is not None:
            mean = (self.tmax_c + self.tmin_c) / 2
            if mean <= limit.cool_c and self.rh_max >= limit.cool_humid_pct:
                found.add("cool_humid")
            if mean >= limit.warm_c and self.rh_max >= limit.warm_humid_pct:
                found.add("warm_humid")
        return found

    def _rain(self, hours: float) -> float | None:
        """The rain expected; where only the longer sum is known, that, as it may all fall at once."""
        if hours > 24 or self.rain_24h_mm is None:
            return self.rain_48h_mm
        return self.rain_24h_mm

    def _age_hours(self, now: datetime | None) -> float | None:
        """How old it is; `None` for what is said just now, infinite for a forecast of which nothing says."""
        if self.fetched_at is None:
            return None if self.source in (None, "manual") else math.inf
        age = (now or datetime.now(UTC)) - self.fetched_at
        return math.inf if age < -CLOCK_SLACK else max(age.total_seconds(), 0.0) / 3600

    def _knows_something(self) -> bool:
        return bool(self.said) or any(getattr(self, name) is not None for name in POSSIBLE)


UNKNOWN = WeatherReport()
"""Nothing is known of the weather."""


def _span_hi(hours: float) -> str:
    if hours >= 72:
        return f"{hours // 24:.0f} दिन"
    return "1 घंटा" if round(hours) == 1 else f"{hours:.0f} घंटे"


def _sentence(value: str) -> str:
    if not (cleaned := clean(value)):
        raise ValueError("must be a text that is not empty")
    return f"{cleaned}।"


class Threshold(Model):
    """A figure, and the pages that set it or why this project did."""

    value: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    sources: Texts = ()
    why: Text | None = None

    @model_validator(mode="after")
    def _rests_on_something(self) -> Threshold:
        if bool(self.sources) == bool(self.why):
            raise ValueError("give sources, or `why` for a figure that this project chose")
        return self


@dataclass(frozen=True)
class Thresholds:
    """From which figures on there is rain, wind, heat, frost, humidity, and when a forecast is old.

    Raises:
        UserError: figures that contradict each other.
    """

    rain_soon_hours: float
    """How far ahead rain counts: 24 or 48."""
    rain_soon_mm: float
    rain_prob_pct: float
    """Above this, rain is expected whatever its amount."""
    heavy_rain_mm: float
    wind_kmph: float
    hot_c: float
    """Of the day's highest temperature."""
    frost_c: float
    """Of the night's lowest."""
    cool_c: float
    """Up to this mean of the two it is cool."""
    cool_humid_pct: float
    warm_c: float
    warm_humid_pct: float
    stale_spray_hours: float
    """A forecast older than this is no ground for spraying."""
    stale_hours: float
    """A forecast older than this says nothing."""

    def __post_init__(self) -> None:
        if self.rain_soon_hours not in (24, 48):
            raise UserError(f"rain_soon_hours is {self.rain_soon_hours:g}; 24 or 48 is possible")
        for low, high in (
            ("rain_soon_mm", "heavy_rain_mm"),
            ("frost_c", "hot_c"),
            ("cool_c", "warm_c"),
            ("stale_spray_hours", "stale_hours"),
        ):
            if getattr(self, low) >= getattr(self, high):
                raise UserError(f"{low} must be below {high}")


class State(Model):
    """A state of the weather: its words in a case line, in a farmer's question and in the English thought."""

    id: Flag
    line_hi: Text
    spoken_hi: Text
    name_en: Text
    words: Texts
    """What people say for it."""


class WeatherRule(Model):
    """What some states of the weather mean for one kind of field work."""

    id: Annotated[str, Field(pattern=r"^[a-z_]+$")]
    action: Action
    when: Annotated[tuple[Flag, ...], Field(min_length=1)]
    when_en: Text
    say_hi: Annotated[str, AfterValidator(_sentence)]
    thought_en: Text
    sources: SomeTexts


class WeatherFile(Model):
    """The whole file."""

    thresholds: Mapping[str, Threshold]
    states: tuple[State, ...]
    rules: tuple[WeatherRule, ...]
    sources: Mapping[str, Source]

    @model_validator(mode="after")
    def _is_whole(self) -> WeatherFile:
        if [state.id for state in self.states] != list(FLAGS):
            raise ValueError(f"states must be {', '.join(FLAGS)}, in this order")
        ids = [rule.id for rule in self.rules]
        if repeated := next((one for one in ids if ids.count(one) > 1), None):
            raise ValueError(f"the rule {repeated} stands twice")
        if (found := set(self.thresholds)) != (wanted := {one.name for one in fields(Thresholds)}):
            raise ValueError(f"thresholds: missing or unknown: {', '.join(sorted(found ^ wanted))}")
        try:
            self.figures()
        except UserError as error:
            raise ValueError(f"thresholds: {error}") from None
        cited = {source for rule in self.rules for source in rule.sources}
        cited |= {source for figure in self.thresholds.values() for source in figure.sources}
        if unknown := sorted(cited - set(self.sources)):
            raise ValueError(f"source {unknown[0]} is not among the sources")
        if unused := sorted(set(self.sources) - cited):
            raise ValueError(f"source {unused[0]} is cited nowhere")
        return self

    def figures(self) -> Thresholds:
        """The bare figures."""
        return Thresholds(**{name: threshold.value for name, threshold in self.thresholds.items()})


@dataclass(frozen=True, eq=False)
class WeatherRules:
    """Thresholds, the words of the states, and the rules in the order in which they count."""

    thresholds: Thresholds
    states: Mapping[str, State]
    rules: tuple[WeatherRule, ...]
    sources: Mapping[str, Source]

    @classmethod
    def load(cls, directory: Path) -> WeatherRules:
        """Read `_weather.yaml` of a knowledge folder.

        Raises:
            UserError: no such file, or one that breaks the schema; the line names file, line and fault.
        """
        content, faults = YamlFile(directory / WEATHER_FILE).read(WeatherFile)
        refuse(faults)
        assert content is not None
        figures = content.figures()
        hours = f"{figures.rain_soon_hours:g}"
        states: dict[str, State] = {
            state.id: state.model_copy(
                update={name: getattr(state, name).replace("{hours}", hours) for name in ("line_hi", "name_en")}
            )
            for state in content.states
        }
        return cls(figures, states, content.rules, content.sources)

    def rule_for(self, action: str, flags: Sequence[str]) -> WeatherRule | None:
        """The first rule for this work that one of the states brings on, `None` if the weather asks for nothing."""
        fitting = (rule for rule in self.rules if rule.action == action and not set(flags).isdisjoint(rule.when))
        return next(fitting, None)

    def spoken_hi(self, flag: str) -> str:
        """A state as a farmer would say it."""
        return self.states[flag].spoken_hi


_NOT = {"नहीं", "नही", "ना", "न", "मत", "nahi", "nahin", "no"}
_REACH = 3
"""So many words after a state may stand before its "नहीं": "बारिश के आसार नहीं"."""


def parse_manual(text: str, rules: WeatherRules) -> WeatherReport:
    """What a person says of the weather: "बारिश कल, तेज हवा", "पता नहीं". Nothing said is nothing known.

    Raises:
        UserError: words that name no state.
    """
    spoken = bare_words(text)
    if not spoken.strip():
        return UNKNOWN
    states = rules.states.values()
    phrases = [(bare_words(word), state.id) for state in states for word in (state.line_hi, *state.words)]
    for phrase, flag in sorted(phrases, key=lambda one: -len(one[0])):
        spoken = spoken.replace(phrase, f" <{flag}> ")
    found: list[str] = []
    denied: list[str] = []
    for match in re.finditer(r"<(\w+)>([^<]*)", spoken):
        refused = match[1] not in ("unknown", "dry") and not _NOT.isdisjoint(match[2].split()[:_REACH])
        (denied if refused else found).append(match[1])
    if not found and {"rain_soon", "heavy_rain"} & set(denied):
        found.append("clear")
    if not found and not denied:
        known = ", ".join(state.words[0] for state in rules.states.values() if state.words)
        raise UserError(f"weather {text!r:.60} is not understood; say for instance {known}")
    return WeatherReport.manual(*dict.fromkeys(found)) if found else UNKNOWN


def _number(name: str, value: Any) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"weather: {name} is {value!r:.60}, which is no number")
    return number


def moment_of(value: Any, zone: timezone) -> datetime:
    """A moment in ISO form or in seconds since 1970; without a zone it is taken in the one given.

    Raises:
        UserError: no moment.
    """
    try:
        if isinstance(value, int) and not isinstance(value, bool):
            return datetime.fromtimestamp(value, UTC)
        if isinstance(value, date):
            moment = value if isinstance(value, datetime) else datetime(value.year, value.month, value.day)
        else:
            moment = datetime.fromisoformat(value)
        return moment if moment.tzinfo else moment.replace(tzinfo=zone)
    except (TypeError, ValueError, OverflowError, OSError):
        raise UserError(f"weather: {value!r:.60} is no time like 2026-01-31T14:00") from None
