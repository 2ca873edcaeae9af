"""The crop facts in `data/knowledge/*.yaml`, read strictly into frozen dataclasses.

One file is one crop with its problems (diseases, pests, shortages) and the sources each problem rests on.
A file that breaks the schema is refused with its name, the problem and the fault: a farmer reads what stands here.
Advice never holds a dose; `DOSE` is the pattern that finds one. Files whose name starts with `_` are not crops.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from litgpt.utils import UserError

KNOWLEDGE_DIR = Path("data/knowledge")
SAFETY_FILE = "_safety.yaml"

KINDS = frozenset(
    {"fungal", "bacterial", "viral", "insect", "mite", "nematode", "nutrient", "water", "weed", "abiotic"}
)
PARTS = frozenset(
    {
        "leaf", "stem", "root", "ear", "panicle", "tassel", "cob", "fruit", "pod", "boll", "bulb", "tuber", "whole",
        "flower", "grain"
    }
)  # fmt: skip
WEATHERS = frozenset({"cool_humid", "warm_humid", "hot_dry", "cool_dry", "rain", "waterlogged", "frost", "any"})
SOIL_FLAGS = frozenset(
    {
        "low_n", "low_p", "low_k", "low_s", "low_zn", "low_fe", "low_b", "low_mn", "low_cu", "low_ca", "low_mg",
        "low_oc", "high_n", "low_ph", "high_ph", "saline", "sandy", "heavy", "waterlogged"
    }
)  # fmt: skip
URGENCIES = frozenset({"high", "medium", "low"})
DAY_BASES = frozenset({"sowing", "transplanting", "planting"})
READ_DEPTHS = frozenset({"page", "abstract", "excerpt"})

MIN_SYMPTOMS = 5

DOSE = re.compile(
    r"[0-9०-९]\s*(?:-|से\s*)?[0-9०-९.]*\s*"
    r"(?:%|प्रतिशत|फीसदी|ppm|पीपीएम|मिली|मि\.?\s?ली|एमएल|ml\b|सीसी|cc\b|लीटर|ltr|litre|liter|ली\.|ग्राम|gm?\b|mg\b|किग्रा|"
    r"कि\.?\s?ग्रा|किलो|kg\b|क्विंटल|चम्मच|ढक्कन|पैकेट|बोरी|बोरा|E\.?C\b|W\.?P\b|S\.?L\b|S\.?C\b|W\.?G\b|ईसी|डब्ल्यूपी|एसएल)",
    re.IGNORECASE,
)
"""A number with a unit of amount or a formulation: what a dose looks like."""


_NOT_WORD = re.compile(r"[^\w\u0900-\u0963]+")
"""What separates words; `\\w` alone would split at vowel signs."""


@dataclass(frozen=True)
class Source:
    """Where a fact was read."""

    key: str
    title: str
    publisher: str
    year: int | None
    url: str
    read: str
    """How much of it was seen: `page`, `abstract` or `excerpt`."""


@dataclass(frozen=True)
class Stage:
    """A growth stage, in days after the crop's day basis, both ends included."""

    id: str
    name_hi: str
    from_day: int
    to_day: int


@dataclass(frozen=True)
class Crop:
    """A crop, its names as farmers write them, and its contiguous stages."""

    id: str
    name_hi: str
    names: tuple[str, ...]
    season_hi: str
    day_basis: str
    stages: tuple[Stage, ...]
    sources: tuple[Source, ...]

    @property
    def last_day(self) -> int:
        """The last day of the last stage."""
        return self.stages[-1].to_day

    def stage(self, age_days: int) -> Stage | None:
        """The stage at an age in days, `None` past the last stage or below zero."""
        return next((stage for stage in self.stages if stage.from_day <= age_days <= stage.to_day), None)


@dataclass(frozen=True)
class FavouredBy:
    """The weather that brings a problem."""

    weather: str
    weather_hi: str
    weather_en: str


@dataclass(frozen=True)
class LookAlike:
    """Another problem of the same crop that looks alike, and the check that tells them apart."""

    id: str
    check_hi: str
    check_en: str


@dataclass(frozen=True)
class Problem:
    """What can be wrong with a crop: how it shows, how it is told apart, what to do."""

    id: str
    crop_id: str
    name_hi: str
    name_en: str
    scientific_name: str | None
    kind: str
    names: tuple[str, ...]
    parts: tuple[str, ...]
    days: tuple[int, int]
    """The usual window, in days after the crop's day basis, both ends included."""
    symptoms_hi: tuple[str, ...]
    """A farmer's own words, without the name of the problem."""
    signs_hi: str
    signs_en: str
    favoured_by: FavouredBy
    soil_links: tuple[str, ...]
    look_alikes: tuple[LookAlike, ...]
    cultural_hi: tuple[str, ...]
    biological_hi: tuple[str, ...]
    chemical_hi: str | None
    """Where to ask about chemicals; never a product or a dose."""
    prevention_hi: tuple[str, ...]
    urgency: str
    urgency_hi: str
    sources: tuple[Source, ...]

    def in_window(self, age_days: int) -> bool:
        """Whether the age in days lies in the usual window."""
        return self.days[0] <= age_days <= self.days[1]


@dataclass(frozen=True)
class SafetyTopic:
    """A request that is no crop question (poisoning, a banned chemical, something else) and its one safe answer."""

    id: str
    questions_hi: tuple[str, ...]
    thought_en: str
    answer_hi: str
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Knowledge:
    """All crops, their problems, and the safe answers."""

    crops: Mapping[str, Crop]
    problems: Mapping[str, Problem]
    safety: tuple[SafetyTopic, ...]

    def of_crop(self, crop_id: str) -> tuple[Problem, ...]:
        """The problems of one crop, in file order; empty for an unknown crop."""
        return tuple(problem for problem in self.problems.values() if problem.crop_id == crop_id)

    def only(self, crop_ids: Collection[str]) -> Knowledge:
        """The part about some crops, with all safe answers.

        Raises:
            UserError: a crop that is not there.
        """
        if unknown := sorted(set(crop_ids) - self.crops.keys()):
            raise UserError(f"no crop {', '.join(unknown)}; there are {', '.join(self.crops)}")
        crops = {crop_id: crop for crop_id, crop in self.crops.items() if crop_id in crop_ids}
        problems = {problem.id: problem for problem in self.problems.values() if problem.crop_id in crops}
        return Knowledge(crops, problems, self.safety)

    def crop_named(self, text: str) -> Crop | None:
        """The crop whose name stands in `text` as a word of its own; the longest name wins, `None` if there is none."""
        # "500 gram" is no chickpea; आम is mango, and "आम तौर पर" is "usually".
        text = re.sub(r"\d\s*gram\b", " ", text, flags=re.IGNORECASE)
        words = f" {' '.join(_NOT_WORD.split(clean(text).lower()))} ".replace(" आम तौर ", " ")
        found: tuple[int, Crop] | None = None
        for crop in self.crops.values():
            for name in (crop.name_hi, *crop.names):
                if f" {name.lower()} " in words and (found is None or len(name) > found[0]):
                    found = (len(name), crop)
        return found[1] if found else None


def clean(text: str) -> str:
    """NFC, one space between words, no full stop at the end: the form in which all texts are kept and compared."""
    return " ".join(unicodedata.normalize("NFC", text).replace("\u200d", "").replace("\u200c", "").split()).rstrip(
        "।. "
    )


def load_knowledge(directory: Path = KNOWLEDGE_DIR) -> Knowledge:
    """Read every crop file of a directory, and `_safety.yaml` where there is one.

    Raises:
        UserError: no file, or a file that breaks the schema; the line names the file, the problem and the fault.
    """
    paths = sorted(path for path in directory.glob("*.yaml") if not path.name.startswith("_"))
    if not paths:
        raise UserError(
            f"{directory}: no crop file (*.yaml) found; give the folder that holds wheat.yaml and the others"
        )
    crops: dict[str, Crop] = {}
    problems: dict[str, Problem] = {}
    for path in paths:
        crop, crop_problems = _read_crop_file(path)
        crops[crop.id] = crop
        problems.update((problem.id, problem) for problem in crop_problems)
    safety_path = directory / SAFETY_FILE
    return Knowledge(crops, problems, _read_safety_file(safety_path) if safety_path.exists() else ())


class _Fields:
    """A YAML mapping from which each field is taken once; what is left over at the end is unknown."""

    def __init__(self, where: str, value: Any) -> None:
        self.where = where
        if not isinstance(value, dict):
            raise self.fault(f"expected a mapping, found {type(value).__name__}")
        self._left: dict[Any, Any] = dict(value)

    def fault(self, what: str) -> UserError:
        return UserError(f"{self.where}: {what}")

    def take(self, key: str) -> Any:
        if key not in self._left:
            raise self.fault(f"{key} is missing")
        return self._left.pop(key)

    def text(self, key: str) -> str:
        value = self.take(key)
        if not isinstance(value, str) or not clean(value):
            raise self.fault(f"{key} must be a text that is not empty, found {value!r}")
        return clean(value)

    def optional_text(self, key: str) -> str | None:
        return self.text(key) if key in self._left else None

    def texts(self, key: str, *, least: int) -> tuple[str, ...]:
        value = self.take(key)
        if not isinstance(value, list) or not all(isinstance(item, str) and clean(item) for item in value):
            raise self.fault(f"{key} must be a list of texts, found {value!r}")
        texts = tuple(clean(item) for item in value)
        if len(texts) < least:
            raise self.fault(f"{key} has {len(texts)} entries, at least {least} are needed")
        if len(set(texts)) < len(texts):
            raise self.fault(f"{key} repeats an entry")
        return texts

    def advice(self, key: str) -> str:
        text = self.text(key)
        self.refuse_dose(key, text)
        return text

    def lines(self, key: str) -> str:
        """A text of several lines, each ended by a danda."""
        value = self.take(key)
        lines = [clean(line) for line in value.splitlines()] if isinstance(value, str) else []
        if not lines or not all(lines):
            raise self.fault(f"{key} must be a text without empty lines, found {value!r}")
        for line in lines:
            self.refuse_dose(key, line)
        return "\n".join(f"{line}।" for line in lines)

    def advices(self, key: str, *, least: int) -> tuple[str, ...]:
        texts = self.texts(key, least=least)
        for text in texts:
            self.refuse_dose(key, text)
        return texts

    def refuse_dose(self, key: str, text: str) -> None:
        if found := DOSE.search(text):
            raise self.fault(f"{key} holds {found.group()!r}, which looks like a dose; doses do not belong here")

    def choice(self, key: str, allowed: frozenset[str]) -> str:
        text = self.text(key)
        if text not in allowed:
            raise self.fault(f"{key} is {text!r}; choose one of {', '.join(sorted(allowed))}")
        return text

    def choices(self, key: str, allowed: frozenset[str], *, least: int) -> tuple[str, ...]:
        texts = self.texts(key, least=least)
        for text in texts:
            if text not in allowed:
                raise self.fault(f"{key} holds {text!r}; choose from {', '.join(sorted(allowed))}")
        return texts

    def integer(self, key: str) -> int:
        value = self.take(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.fault(f"{key} must be a whole number, found {value!r}")
        return value

    def mappings(self, key: str) -> list[Any]:
        value = self.take(key)
        if not isinstance(value, list):
            raise self.fault(f"{key} must be a list, found {type(value).__name__}")
        return value

    def sources(self, known: Mapping[str, Source]) -> tuple[Source, ...]:
        keys = self.texts("sources", least=1)
        for key in keys:
            if key not in known:
                raise self.fault(f"source {key!r} is not in the file's sources")
        return tuple(known[key] for key in keys)

    def close(self) -> None:
        if self._left:
            raise self.fault(f"unknown key {', '.join(repr(key) for key in self._left)}")


# The C loader reads the folder in a tenth of the time; PyYAML may be built without it.
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _read_yaml(path: Path) -> _Fields:
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_YAML_LOADER)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save the file as UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    return _Fields(str(path), value)


def _read_crop_file(path: Path) -> tuple[Crop, list[Problem]]:
    fields = _read_yaml(path)
    sources = _read_sources(path, fields.take("sources"))
    crop = _read_crop(path, fields.take("crop"), sources)
    problems: list[Problem] = []
    for value in fields.mappings("problems"):
        problem = _read_problem(path, value, crop, sources)
        if any(problem.id == other.id for other in problems):
            raise UserError(f"{path}: problem {problem.id}: the id stands twice")
        problems.append(problem)
    fields.close()
    if not problems:
        raise fields.fault("no problems")
    _check_between(path, problems)
    return crop, problems


def _read_sources(path: Path, value: Any) -> dict[str, Source]:
    if not isinstance(value, dict):
        raise UserError(f"{path}: sources must be a mapping of keys to sources")
    sources: dict[str, Source] = {}
    for key, entry in value.items():
        fields = _Fields(f"{path}: source {key}", entry)
        year = fields.take("year")
        if year is not None and (not isinstance(year, int) or not 1900 <= year <= 2100):
            raise fields.fault(f"year must be null or a year, found {year!r}")
        title, publisher, url = fields.text("title"), fields.text("publisher"), fields.text("url")
        if not url.startswith(("https://", "http://")):
            raise fields.fault(f"url is {url!r}; a web address is needed")
        sources[str(key)] = Source(str(key), title, publisher, year, url, fields.choice("read", READ_DEPTHS))
        fields.close()
    return sources


def _read_crop(path: Path, value: Any, sources: Mapping[str, Source]) -> Crop:
    fields = _Fields(f"{path}: crop", value)
    crop_id = fields.text("id")
    if crop_id != path.stem:
        raise fields.fault(f"id is {crop_id!r} but the file is {path.name}; they must agree")
    stages: list[Stage] = []
    for entry in fields.mappings("stages"):
        part = _Fields(f"{path}: crop: stage {len(stages) + 1}", entry)
        stage = Stage(part.text("id"), part.text("name_hi"), part.integer("from_day"), part.integer("to_day"))
        part.close()
        expected = stages[-1].to_day + 1 if stages else 0
        if stage.from_day != expected or stage.to_day < stage.from_day:
            raise part.fault(
                f"days {stage.from_day} to {stage.to_day}; it must start on day {expected} and not end before"
            )
        stages.append(stage)
    if not stages:
        raise fields.fault("no stages")
    crop = Crop(
        id=crop_id,
        name_hi=fields.text("name_hi"),
        names=fields.texts("names", least=1),
        season_hi=fields.text("season_hi"),
        day_basis=fields.choice("day_basis", DAY_BASES),
        stages=tuple(stages),
        sources=fields.sources(sources),
    )
    fields.close()
    return crop


def _read_problem(path: Path, value: Any, crop: Crop, sources: Mapping[str, Source]) -> Problem:
    name = value.get("id", "without id") if isinstance(value, dict) else "without id"
    fields = _Fields(f"{path}: problem {name}", value)
    problem_id = fields.text("id")
    if not problem_id.startswith(f"{crop.id}_"):
        raise fields.fault(f"the id must start with {crop.id}_")
    days = fields.take("days")
    if not (isinstance(days, list) and len(days) == 2 and all(isinstance(day, int) for day in days)):
        raise fields.fault(f"days must be two whole numbers, found {days!r}")
    if not 0 <= days[0] <= days[1] <= crop.last_day:
        raise fields.fault(f"window {days[0]} to {days[1]} lies outside the crop's days 0 to {crop.last_day}")
    weather = _Fields(f"{fields.where}: favoured_by", fields.take("favoured_by"))
    favoured_by = FavouredBy(
        weather.choice("weather", WEATHERS), weather.text("weather_hi"), weather.text("weather_en")
    )
    weather.close()
    look_alikes: list[LookAlike] = []
    for entry in fields.mappings("look_alikes"):
        part = _Fields(f"{fields.where}: look_alike {len(look_alikes) + 1}", entry)
        look_alikes.append(LookAlike(part.text("id"), part.advice("check_hi"), part.text("check_en")))
        part.close()
    problem = Problem(
        id=problem_id,
        crop_id=crop.id,
        name_hi=fields.text("name_hi"),
        name_en=fields.text("name_en"),
        scientific_name=fields.optional_text("scientific_name"),
        kind=fields.choice("kind", KINDS),
        names=fields.texts("names", least=1),
        parts=fields.choices("parts", PARTS, least=1),
        days=(days[0], days[1]),
        symptoms_hi=fields.advices("symptoms_hi", least=MIN_SYMPTOMS),
        signs_hi=fields.advice("signs_hi"),
        signs_en=fields.text("signs_en"),
        favoured_by=favoured_by,
        soil_links=fields.choices("soil_links", SOIL_FLAGS, least=0),
        look_alikes=tuple(look_alikes),
        cultural_hi=fields.advices("cultural_hi", least=1),
        biological_hi=fields.advices("biological_hi", least=0),
        chemical_hi=fields.optional_text("chemical_hi"),
        prevention_hi=fields.advices("prevention_hi", least=1),
        urgency=fields.choice("urgency", URGENCIES),
        urgency_hi=fields.advice("urgency_hi"),
        sources=fields.sources(sources),
    )
    if problem.chemical_hi:
        fields.refuse_dose("chemical_hi", problem.chemical_hi)
    for symptom in problem.symptoms_hi:
        if problem.name_hi in symptom:
            raise fields.fault(f"symptom {symptom!r} names the problem; a farmer does not know it yet")
    fields.close()
    return problem


def _check_between(path: Path, problems: list[Problem]) -> None:
    """What a single problem cannot see: look-alikes that exist, and symptoms that belong to one problem only."""
    ids = {problem.id for problem in problems}
    owner: dict[str, str] = {}
    for problem in problems:
        for look_alike in problem.look_alikes:
            if look_alike.id not in ids or look_alike.id == problem.id:
                raise UserError(f"{path}: problem {problem.id}: unknown look-alike {look_alike.id!r}")
        for symptom in problem.symptoms_hi:
            if symptom in owner:
                raise UserError(f"{path}: problem {problem.id}: symptom {symptom!r} stands in {owner[symptom]} too")
            owner[symptom] = problem.id


def _read_safety_file(path: Path) -> tuple[SafetyTopic, ...]:
    fields = _read_yaml(path)
    sources = _read_sources(path, fields.take("sources"))
    topics: list[SafetyTopic] = []
    for value in fields.mappings("topics"):
        part = _Fields(f"{path}: topic {len(topics) + 1}", value)
        topics.append(
            SafetyTopic(
                id=part.text("id"),
                questions_hi=part.texts("questions_hi", least=MIN_SYMPTOMS),
                thought_en=part.text("thought_en"),
                answer_hi=part.lines("answer_hi"),
                sources=part.sources(sources) if value.get("sources") else _no_sources(part),
            )
        )
        part.close()
    fields.close()
    return tuple(topics)


def _no_sources(fields: _Fields) -> tuple[Source, ...]:
    """A refusal states no fact, so its list of sources may be empty."""
    fields.take("sources")
    return ()
