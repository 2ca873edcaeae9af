"""A farmer's Soil Health Card, rated by the limits in `data/knowledge/_soil.yaml`.

A card is shown to the model in words ("जिंक कम (0.3)"), because a small model reads words better than numbers. What was
not tested is told apart from what is normal: a card that never measured zinc says nothing about zinc.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from advisory.knowledge import SoilFlag
from advisory.soilcard import KEYS, OXIDES, UNITS, Drainage, Key, Reading, Texture, entries_of_file, fields_of, fold
from advisory.texts import SomeTexts, Source, Text, Texts
from advisory.yamlfile import Model, YamlFile, refuse
from litgpt.utils import UserError

SOIL_FILE = "_soil.yaml"
NORMAL_SOIL_HI = "सामान्य"
UNTESTED_HI = "जांच नहीं हुई"
REST_UNTESTED_HI = "बाकी की जांच नहीं"
UNTESTED_LIST_HI = "जांच नहीं: {names}"
NORMAL_LIST_HI = "सामान्य: {names}"
NO_LIMIT_HI = "{name} {value} (सीमा का स्रोत नहीं)"
FEW = 4
"""Up to so many untested readings are named; of more, those that are normal are."""

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
LOAM_HI = "दोमट मिट्टी"


@dataclass(frozen=True)
class SoilCard:
    """What a card says. Any reading may be missing; those given are kept in the units of `UNITS`.

    Raises:
        UserError: a reading or unit that is not known, or a value that no soil has.
    """

    readings: Mapping[str, Reading] = field(default_factory=dict, hash=False)
    texture: Texture | None = None
    drainage: Drainage | None = None
    state: str | None = None
    """Whose limits rate it; the common ones where that state has none of its own."""
    tested_on: date | None = None

    def __post_init__(self) -> None:
        if unknown := [key for key in self.readings if key not in KEYS]:
            raise UserError(f"soil reading {unknown[0]!r} is not known; known are {', '.join(KEYS)}")
        if self.texture not in (None, *get_args(Texture)):
            raise UserError(f"soil texture is {self.texture!r}; choose sandy, heavy or loam")
        if self.drainage not in (None, *get_args(Drainage)):
            raise UserError(f"soil drainage is {self.drainage!r}; waterlogged is known, or leave it out")
        kept = {key: self.readings[key].of(key) for key in KEYS if key in self.readings}
        object.__setattr__(self, "readings", kept)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SoilCard:
        """A card as a person types it: `{"zn": 0.3, "p": "18 kg/ha P2O5", "oc": "0.4 %", "texture": "sandy"}`.

        Names are understood in English and Hindi; a number without a unit is in the unit of the card.

        Raises:
            UserError: an unknown name or unit, or a value that makes no sense; one line.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"soil card: a mapping is needed, found {values!r:.80}")
        return cls(**fields_of(("soil card", name, value) for name, value in values.items()))

    @classmethod
    def from_file(cls, path: Path) -> SoilCard:
        """A card in a .json or .yaml file (the mapping of `from_mapping`), or a .csv with parameter,value[,unit].

        Raises:
            UserError: one line that names the file and the line or field.
        """
        return cls(**fields_of(entries_of_file(Path(path))))

    def flags(self, limits: SoilLimits) -> tuple[SoilFlag, ...]:
        """What is out of the ordinary, in the order of the card; a limit without a source raises nothing."""
        flags = [flag for limit in limits.of_state(self.state) if (flag := self._flag(limit))]
        return (*flags, *self._land())

    def line_hi(self, limits: SoilLimits) -> str:
        """The card in words: "जिंक कम (0.3), पीएच ज्यादा (8.6)", "सामान्य", and what was not tested."""
        found: list[str] = []
        normal: list[str] = []
        untested: list[str] = []
        for limit in limits.of_state(self.state):
            reading = self.readings.get(limit.key)
            if reading is None:
                untested.append(limit.name_hi)
            elif limit.unsourced:
                found.append(NO_LIMIT_HI.format(name=limit.name_hi, value=_short(reading.value)))
            elif flag := self._flag(limit):
                found.append(f"{SOIL_FLAG_HI[flag]} ({_short(reading.value)})")
            else:
                normal.append(limit.name_hi)
        land = [SOIL_FLAG_HI[flag] for flag in self._land()] + ([LOAM_HI] if self.texture == "loam" else [])
        if not self.readings:
            return ", ".join([*land, UNTESTED_HI])
        if not untested:
            return ", ".join([*(found or [NORMAL_SOIL_HI]), *land])
        if len(untested) <= FEW:
            rest = [UNTESTED_LIST_HI.format(names=" ".join(untested))]
            return ", ".join([*(found or [NORMAL_SOIL_HI]), *land, *rest])
        rest = [NORMAL_LIST_HI.format(names=" ".join(normal))] if normal else []
        return ", ".join([*found, *land, *rest, REST_UNTESTED_HI])

    def _flag(self, limit: Limit) -> SoilFlag | None:
        reading = self.readings.get(limit.key)
        if reading is None or limit.unsourced:
            return None
        if limit.low is not None and reading.value < limit.low:
            return limit.low_flag
        return limit.high_flag if limit.high is not None and reading.value > limit.high else None

    def _land(self) -> tuple[SoilFlag, ...]:
        texture: tuple[SoilFlag, ...] = (self.texture,) if self.texture and self.texture != "loam" else ()
        return (*texture, self.drainage) if self.drainage else texture


class Limits(Model):
    """The limits of a reading, with the pages that state them."""

    low: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    high: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    basis: Literal["element", "oxide"] = "element"
    sources: Texts
    unsourced: bool = False

    @model_validator(mode="after")
    def _make_sense(self) -> Limits:
        if self.low is None and self.high is None:
            raise ValueError("low or high is missing")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.unsourced != (not self.sources):
            raise ValueError("sources are missing; without a page that was read, say `unsourced: true`")
        return self


class StateLimits(Limits):
    """What a state has instead."""

    state: Text


class Limit(Limits):
    """A reading of the card: its words, and the limits that hold where a state has none of its own."""

    key: Key
    name_hi: Text
    unit: Text
    method: Text
    low_flag: SoilFlag | None = None
    high_flag: SoilFlag | None = None
    variants: tuple[StateLimits, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Limit:
        if self.unit != UNITS[self.key]:
            raise ValueError(f"unit is {self.unit}; the limits of {self.key} are kept in {UNITS[self.key]}")
        if (self.low_flag and self.low is None) or (self.high_flag and self.high is None):
            raise ValueError("a flag needs its limit")
        if self.basis == "oxide" and self.key not in ("p", "k"):
            raise ValueError("only phosphorus and potassium have oxide limits")
        return self

    def as_element(self) -> Limit:
        """The same with limits for the element."""
        if self.basis == "element":
            return self
        share = next(share for element, share in OXIDES.values() if element == self.key)
        scaled = {side: None if (old := getattr(self, side)) is None else old * share for side in ("low", "high")}
        return self.model_copy(update={**scaled, "basis": "element"})

    def in_state(self, state: str) -> Limit:
        """The limits of a state, or these where it has none of its own."""
        own = next((variant for variant in self.variants if variant.state == state), None)
        return self if own is None else self.model_copy(update=own.model_dump(exclude={"state"}))


class Conversion(Model):
    """A conversion that the program makes, and where it was read."""

    what: Text
    sources: SomeTexts


class SoilFile(Model):
    """The whole file."""

    parameters: tuple[Limit, ...]
    states: Mapping[str, SomeTexts]
    conversions: Mapping[str, Conversion]
    sources: Mapping[str, Source]

    @model_validator(mode="after")
    def _is_whole(self) -> SoilFile:
        if [limit.key for limit in self.parameters] != list(KEYS):
            raise ValueError(f"parameters must be {', '.join(KEYS)}, in this order")
        rows = [limits for limit in self.parameters for limits in (limit, *limit.variants)]
        cited = {source for row in rows for source in row.sources}
        cited |= {source for conversion in self.conversions.values() for source in conversion.sources}
        if unknown := sorted(cited - set(self.sources)):
            raise ValueError(f"source {unknown[0]} is not among the sources")
        if unused := sorted(set(self.sources) - cited):
            raise ValueError(f"source {unused[0]} is cited nowhere")
        states = {variant.state for limit in self.parameters for variant in limit.variants}
        if unknown := sorted(states - set(self.states)):
            raise ValueError(f"state {unknown[0]} is not among the states")
        return self


@dataclass(frozen=True, eq=False)
class SoilLimits:
    """The limits of all readings, common and by state."""

    common: tuple[Limit, ...]
    by_state: Mapping[str, tuple[Limit, ...]]
    """Folded name of a state → its limits."""
    sources: Mapping[str, Source]

    @classmethod
    def load(cls, directory: Path) -> SoilLimits:
        """Read `_soil.yaml` of a knowledge folder.

        Raises:
            UserError: no such file, or one that breaks the schema; the line names file, line and fault.
        """
        content, faults = YamlFile(directory / SOIL_FILE).read(SoilFile)
        refuse(faults)
        assert content is not None
        return cls.of(content)

    @classmethod
    def of(cls, content: SoilFile) -> SoilLimits:
        """The limits that a file's content sets."""
        by_state = {
            fold(name): tuple(limit.in_state(state).as_element() for limit in content.parameters)
            for state, names in content.states.items()
            for name in (state, *names)
        }
        return cls(tuple(limit.as_element() for limit in content.parameters), by_state, content.sources)

    def of_state(self, state: str | None) -> tuple[Limit, ...]:
        """The limits of a state, in the order of the card."""
        return self.common if state is None else self.by_state.get(fold(state), self.common)

    def measures(self, flag: str) -> bool:
        """Whether a reading of the card can raise this flag."""
        return self._raising(flag) is not None

    def reading_of(self, flag: str) -> str | None:
        """The reading of the card that can raise this flag."""
        limit = self._raising(flag)
        return limit.key if limit else None

    def card_with(self, flag: str, rng: Random) -> SoilCard:
        """A card with all twelve readings on which this flag alone is out of the ordinary.

        Calcium and magnesium are not on the card: for them, all is normal.
        """
        card = self.card_without(flag, rng)
        if flag in ("sandy", "heavy"):
            return replace(card, texture="sandy" if flag == "sandy" else "heavy")
        if flag == "waterlogged":
            return replace(card, drainage="waterlogged")
        limit = self._raising(flag)
        if limit is None:
            return card
        return replace(card, readings={**card.readings, limit.key: Reading(_unusual(limit, flag, rng), limit.unit)})

    def card_without(self, flag: str, rng: Random) -> SoilCard:
        """A card with all twelve readings and nothing out of the ordinary; loam where the flag is one of texture."""
        readings: dict[str, Reading] = {limit.key: Reading(_normal(limit, rng), limit.unit) for limit in self.common}
        return SoilCard(readings, texture="loam" if flag in ("sandy", "heavy") else None)

    def _raising(self, flag: str) -> Limit | None:
        return next(
            (limit for limit in self.common if flag in (limit.low_flag, limit.high_flag) and not limit.unsourced), None
        )


def _short(value: float) -> str:
    """A value with as many digits as a card has: 0.31, 7.86, 252."""
    return f"{round(value, 2 if value < 10 else 1):g}"


def _normal(limit: Limit, rng: Random) -> float:
    """A value between the limits."""
    if limit.key == "ph":  # a scale of its own: half of 6.5 is no pH of a field
        assert limit.low is not None and limit.high is not None
        return _rounded(rng.uniform(limit.low + 0.3, limit.high - 0.3))
    least = limit.low * 1.15 if limit.low is not None else (limit.high or 0) * 0.2
    return _rounded(rng.uniform(least, limit.high * 0.9 if limit.high is not None else least * 2.5))


def _unusual(limit: Limit, flag: str, rng: Random) -> float:
    """A value that raises the flag."""
    if flag == limit.low_flag:
        assert limit.low is not None
        return _rounded(limit.low - rng.uniform(0.2, 1.5) if limit.key == "ph" else limit.low * rng.uniform(0.4, 0.85))
    assert limit.high is not None
    return _rounded(limit.high + rng.uniform(0.2, 1.2) if limit.key == "ph" else limit.high * rng.uniform(1.15, 1.9))


def _rounded(value: float) -> float:
    return round(value, 2 if value < 1 else 1 if value < 100 else 0)
