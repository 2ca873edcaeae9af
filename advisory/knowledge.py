"""The crop facts in `data/knowledge/*.yaml` as typed, frozen models.

One file is one crop with its problems (diseases, pests, weeds, shortages, stress) and the sources that each group of
claims rests on. A file that breaks the schema is refused with its line: a farmer reads what stands here. What needs a
second file (the status of a chemical) is checked by `advisory/check.py`. Files named `_…` are not crops.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, Strict, model_validator

from advisory.names import NameIndex
from advisory.normalise import match_key
from advisory.texts import DOSE as DOSE
from advisory.texts import Advice, AdviceLines, Advices, SomeAdvices, SomeTexts, Text, Texts
from advisory.texts import Source as Source
from advisory.texts import bare_words as bare_words
from advisory.texts import clean as clean
from advisory.yamlfile import Fault, Loc, Model, YamlFile, read_or_refuse, refuse
from litgpt.utils import UserError

KNOWLEDGE_DIR = Path("data/knowledge")
SAFETY_FILE = "_safety.yaml"

Kind = Literal[
    "fungal", "bacterial", "viral", "insect", "mite", "nematode", "nutrient", "water", "weed", "abiotic"
]  # fmt: skip
Part = Literal[
    "leaf", "stem", "root", "ear", "panicle", "tassel", "cob", "fruit", "pod", "boll", "bulb", "tuber", "whole",
    "flower", "grain",
]  # fmt: skip
FavouringWeather = Literal[
    "cool_humid", "warm_humid", "hot_dry", "cool_dry", "rain", "waterlogged", "frost", "any"
]  # fmt: skip
SoilFlag = Literal[
    "low_n", "low_p", "low_k", "low_s", "low_zn", "low_fe", "low_b", "low_mn", "low_cu", "low_ca", "low_mg",
    "low_oc", "high_n", "low_ph", "high_ph", "saline", "sandy", "heavy", "waterlogged",
]  # fmt: skip
ClaimGroup = Literal["signs", "days", "weather", "soil", "checks", "measures"]
CLAIM_GROUPS: tuple[ClaimGroup, ...] = ("signs", "days", "weather", "soil", "checks", "measures")

MIN_SYMPTOMS = 5


def _month_day(value: str) -> str:
    if not re.fullmatch(r"(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])", value):
        raise ValueError(f"must be a month and a day like 11-05, found {value!r}")
    return value


Symptoms = Annotated[Advices, Field(min_length=MIN_SYMPTOMS)]
Day = Annotated[int, Strict(), Field(ge=0)]
MonthDay = Annotated[str, AfterValidator(_month_day)]


class Names(Model):
    """What something is called: the first Hindi name is the one we use, all of them are understood."""

    hi: SomeTexts
    hinglish: SomeTexts
    en: SomeTexts
    misspelt: SomeTexts
    scientific: Text | None = None

    @cached_property
    def all(self) -> tuple[str, ...]:
        """Every name and misspelling in every script, without the scientific one."""
        return tuple(dict.fromkeys((*self.hi, *self.hinglish, *self.en, *self.misspelt)))


class Stage(Model):
    """A growth stage, in days after the crop's day basis, both ends included."""

    id: Text
    name_hi: Text
    from_day: Day
    to_day: Day


class SowingWindow(Model):
    """When a crop is sown, transplanted or planted somewhere."""

    where_hi: Text
    start: MonthDay = Field(alias="from")
    end: MonthDay = Field(alias="to")
    sources: SomeTexts


class Crop(Model):
    """A crop and its contiguous stages."""

    id: Annotated[str, Field(pattern=r"^[a-z]+$")]
    names: Names
    seasons: Annotated[tuple[Literal["rabi", "kharif", "zaid", "perennial"], ...], Field(min_length=1)]
    sowing: Annotated[tuple[SowingWindow, ...], Field(min_length=1)]
    day_basis: Literal["sowing", "transplanting", "planting"]
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    sources: SomeTexts

    @property
    def name_hi(self) -> str:
        return self.names.hi[0]

    @property
    def last_day(self) -> int:
        """The last day of the last stage."""
        return self.stages[-1].to_day

    def stage(self, age_days: int) -> Stage | None:
        """The stage at an age in days, `None` past the last stage or below zero."""
        return next((stage for stage in self.stages if stage.from_day <= age_days <= stage.to_day), None)


class FavouredBy(Model):
    """The weather that brings a problem."""

    weather: FavouringWeather
    weather_hi: Text
    weather_en: Text


class LookAlike(Model):
    """Another problem of the same crop that looks alike, and the check that tells them apart."""

    id: Text
    check_hi: Advice
    check_en: Text


class Amount(Model):
    """So much of something, on something: 200 ml per acre, 0.1 %."""

    amount: Annotated[float, Field(gt=0, allow_inf_nan=False)] | tuple[float, float]
    unit: Literal["g", "kg", "ml", "l", "%", "ppm"]
    per: Literal["acre", "hectare", "litre_water", "kg_seed", "plant"] | None = None

    @model_validator(mode="after")
    def _has_a_basis(self) -> Amount:
        if isinstance(self.amount, tuple) and not 0 < self.amount[0] < self.amount[1] < float("inf"):
            raise ValueError(f"amount {list(self.amount)} is no range")
        if (self.unit in {"%", "ppm"}) != (self.per is None):
            raise ValueError("g, kg, ml and l need `per`; % and ppm have none")
        return self


class Chemical(Model):
    """An active ingredient (or a fertiliser) that a source recommends for this problem of this crop."""

    ai: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9 ,.+()-]*$")]
    name_hi: Text
    formulation: Text
    use: Literal["spray", "seed_treatment", "seedling_dip", "soil", "bait", "fertiliser"]
    dose: Amount | None = None
    water: Amount | None = None
    waiting_days: Day | None = None
    sources: SomeTexts


class Problem(Model):
    """What can be wrong with a crop: how it shows, how it is told apart, what to do."""

    id: Annotated[str, Field(pattern=r"^[a-z]+_[a-z0-9_]+$")]
    names: Names
    kind: Kind
    parts: Annotated[tuple[Part, ...], Field(min_length=1)]
    days: tuple[Day, Day]
    """The usual window, in days after the crop's day basis, both ends included."""
    symptoms_hi: Symptoms
    """A farmer's own words, without the name of the problem."""
    signs_hi: Advice
    signs_en: Text
    favoured_by: FavouredBy
    soil_links: tuple[SoilFlag, ...]
    look_alikes: tuple[LookAlike, ...]
    cultural_hi: SomeAdvices
    biological_hi: Advices
    chemical_hi: Advice | None = None
    """Where to ask about chemicals, in words."""
    chemicals: tuple[Chemical, ...] = ()
    prevention_hi: SomeAdvices
    urgency: Literal["high", "medium", "low"]
    urgency_hi: Advice
    kvk_hi: Advice
    """When to go to the Krishi Vigyan Kendra."""
    sources: Mapping[ClaimGroup, SomeTexts]
    inferred: tuple[ClaimGroup, ...]
    """Groups of claims that no page we read states: they follow from stages and general knowledge of the crop."""

    @property
    def crop_id(self) -> str:
        return self.id.partition("_")[0]

    @property
    def name_hi(self) -> str:
        return self.names.hi[0]

    @property
    def name_en(self) -> str:
        return self.names.en[0]

    def in_window(self, age_days: int) -> bool:
        """Whether the age in days lies in the usual window."""
        return self.days[0] <= age_days <= self.days[1]

    @property
    def claims(self) -> tuple[ClaimGroup, ...]:
        """The groups of claims that this problem makes."""
        made = {"soil": self.soil_links, "checks": self.look_alikes, "weather": self.favoured_by.weather != "any"}
        return tuple(group for group in CLAIM_GROUPS if made.get(group, True))


class CropFile(Model):
    """A whole file."""

    crop: Crop
    problems: Annotated[tuple[Problem, ...], Field(min_length=1)]
    sources: Mapping[str, Source]


class SafetyTopic(Model):
    """A request that is no crop question (poisoning, a banned chemical, something else) and its one safe answer."""

    id: Text
    questions_hi: Symptoms
    questions_hinglish: Texts = ()
    thought_en: Text
    answer_hi: AdviceLines
    sources: Texts


class SafetyLine(Model):
    """A sentence of caution, for instance about gloves and mask."""

    text_hi: Advice
    sources: SomeTexts


class SafetyFile(Model):
    """The file of safe answers."""

    topics: tuple[SafetyTopic, ...]
    lines: Mapping[str, SafetyLine] = {}
    sources: Mapping[str, Source]


@dataclass(frozen=True)
class Knowledge:
    """All crops, their problems, the safe answers, and the sources of each file."""

    crops: Mapping[str, Crop]
    problems: Mapping[str, Problem]
    safety: tuple[SafetyTopic, ...]
    lines: Mapping[str, SafetyLine]
    sources: Mapping[str, Mapping[str, Source]]
    """Crop id, or `safety` → key → source."""

    def of_crop(self, crop_id: str) -> tuple[Problem, ...]:
        """The problems of one crop, in file order; empty for an unknown crop."""
        return self._by_crop.get(crop_id, ())

    @cached_property
    def _by_crop(self) -> dict[str, tuple[Problem, ...]]:
        return {
            crop_id: tuple(problem for problem in self.problems.values() if problem.crop_id == crop_id)
            for crop_id in self.crops
        }

    def only(self, crop_ids: Collection[str]) -> Knowledge:
        """The part about some crops, with all safe answers.

        Raises:
            UserError: a crop that is not there.
        """
        if unknown := sorted(set(crop_ids) - self.crops.keys()):
            raise UserError(f"no crop {', '.join(unknown)}; there are {', '.join(self.crops)}")
        crops = {crop_id: crop for crop_id, crop in self.crops.items() if crop_id in crop_ids}
        problems = {problem.id: problem for problem in self.problems.values() if problem.crop_id in crops}
        return Knowledge(crops, problems, self.safety, self.lines, self.sources)

    def crop_named(self, text: str) -> Crop | None:
        """The crop whose name stands in `text` as a word of its own; the longest name wins, `None` if there is none."""
        found = self.names.crops(match_key(text).split())
        return self.crops[found[0]] if found else None

    def problems_named(self, text: str, crop_id: str) -> tuple[str, ...]:
        """The problems of a crop that a text names, in the order in which it names them first, each once."""
        return tuple(self.names.problems(match_key(text).split(), crop_id, in_order=True))

    @cached_property
    def names(self) -> NameIndex:
        """All names of the crops and their problems."""
        return NameIndex(
            {crop_id: crop.names.all for crop_id, crop in self.crops.items()},
            {crop_id: {problem.id: problem.names.all for problem in self.of_crop(crop_id)} for crop_id in self.crops},
        )


def load_knowledge(directory: Path = KNOWLEDGE_DIR) -> Knowledge:
    """Read every crop file of a directory, and `_safety.yaml` where there is one.

    Raises:
        UserError: no file, or one that breaks the schema; the line names the file, its line, the problem and the fault.
    """
    crops: dict[str, Crop] = {}
    problems: dict[str, Problem] = {}
    sources: dict[str, Mapping[str, Source]] = {}
    for path in crop_paths(directory):
        content, faults = read_crop_file(YamlFile(path))
        refuse(faults)
        assert content is not None
        crops[content.crop.id] = content.crop
        problems.update((problem.id, problem) for problem in content.problems)
        sources[content.crop.id] = content.sources
    safety_path = directory / SAFETY_FILE
    safety = read_or_refuse(safety_path, SafetyFile) if safety_path.exists() else SafetyFile(topics=(), sources={})
    sources["safety"] = safety.sources
    return Knowledge(crops, problems, safety.topics, safety.lines, sources)


def crop_paths(directory: Path) -> list[Path]:
    """The crop files of a directory, by name.

    Raises:
        UserError: there is none.
    """
    paths = sorted(path for path in directory.glob("*.yaml") if not path.name.startswith("_"))
    if not paths:
        raise UserError(
            f"{directory}: no crop file (*.yaml) found; give the folder that holds wheat.yaml and the others"
        )
    return paths


def read_crop_file(file: YamlFile) -> tuple[CropFile | None, list[Fault]]:
    """A crop file and its faults; `None` where its parts could not be read as what they should be."""
    content, faults = file.read(CropFile)
    if content is not None:
        faults += [file.fault(loc, what) for loc, what in _faults(content, file.path)]
    return content, faults


def _faults(content: CropFile, path: Path) -> Iterator[tuple[Loc, str]]:
    """What a single value cannot see."""
    crop = content.crop
    if crop.id != path.stem:
        yield ("crop", "id"), f"is {crop.id!r} but the file is {path.name}; they must agree"
    expected = 0
    for number, stage in enumerate(crop.stages):
        if stage.from_day != expected or stage.to_day < stage.from_day:
            what = f"days {stage.from_day} to {stage.to_day}; it must start on day {expected} and not end before"
            yield ("crop", "stages", number), what
        expected = stage.to_day + 1
    ids: set[str] = set()
    for number, problem in enumerate(content.problems):
        loc: Loc = ("problems", number)
        if problem.id in ids:
            yield loc, "the id stands twice"
        ids.add(problem.id)
        yield from ((loc + part, what) for part, what in _problem_faults(problem, crop))
    yield from _source_faults(content)
    yield from _faults_between(content.problems)


def _problem_faults(problem: Problem, crop: Crop) -> Iterator[tuple[Loc, str]]:
    if problem.crop_id != crop.id:
        yield ("id",), f"must start with {crop.id}_"
    if not problem.days[0] <= problem.days[1] <= crop.last_day:
        what = f"window {problem.days[0]} to {problem.days[1]} lies outside the crop's days 0 to {crop.last_day}"
        yield ("days",), what
    for number, symptom in enumerate(problem.symptoms_hi):
        if problem.name_hi in symptom:
            yield ("symptoms_hi", number), f"{symptom!r} names the problem; a farmer does not know it yet"
    for group in CLAIM_GROUPS:
        times = (group in problem.sources) + problem.inferred.count(group)
        if group in problem.claims and times != 1:
            yield ("sources",), f"{group} must have sources or stand in inferred, and not both"
        elif group not in problem.claims and times:
            yield ("sources",), f"{group} has sources, but the problem claims nothing of it"


def _source_faults(content: CropFile) -> Iterator[tuple[Loc, str]]:
    cited: list[tuple[Loc, tuple[str, ...]]] = [(("crop", "sources"), content.crop.sources)]
    cited += [(("crop", "sowing", number), window.sources) for number, window in enumerate(content.crop.sowing)]
    for number, problem in enumerate(content.problems):
        loc: Loc = ("problems", number)
        cited += [((*loc, "sources", group), keys) for group, keys in problem.sources.items()]
        cited += [((*loc, "chemicals", n, "sources"), chemical.sources) for n, chemical in enumerate(problem.chemicals)]
    for loc, keys in cited:
        for key in keys:
            if key not in content.sources:
                yield loc, f"source {key!r} is not in the file's sources"
    for key in sorted(content.sources.keys() - {key for _, keys in cited for key in keys}):
        yield ("sources", key), "nothing rests on this source"


def _faults_between(problems: tuple[Problem, ...]) -> Iterator[tuple[Loc, str]]:
    """Look-alikes that exist, and names of one problem only."""
    ids = {problem.id for problem in problems}
    owner_of_name: dict[str, str] = {}
    for number, problem in enumerate(problems):
        loc: Loc = ("problems", number)
        for n, look_alike in enumerate(problem.look_alikes):
            if look_alike.id not in ids or look_alike.id == problem.id:
                yield (*loc, "look_alikes", n), f"unknown look-alike {look_alike.id!r}"
        for name in problem.names.all:
            owner = owner_of_name.setdefault(match_key(name), problem.id)
            if owner != problem.id:
                yield (*loc, "names"), f"the name {name!r} stands in {owner} too"
