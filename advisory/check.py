"""All facts of a folder checked together, and a page of counts and gaps.

`advisory/knowledge.py` sees one crop file; here the chemicals of all of them meet the list of banned and restricted
pesticides, and every text that a farmer reads, the safe answers and the rules of soil and weather among them, is
searched for names that must not stand there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advisory.case import chemical_hi
from advisory.doses import FORMULATIONS
from advisory.knowledge import (
    CLAIM_GROUPS,
    SAFETY_FILE,
    CropFile,
    Knowledge,
    Problem,
    SafetyFile,
    crop_paths,
    read_crop_file,
)
from advisory.likeness import jaccard, trigrams
from advisory.pesticides import PesticideList
from advisory.soil import SOIL_FILE, SoilFile
from advisory.texts import bare_words
from advisory.weather import WEATHER_FILE, WeatherFile
from advisory.yamlfile import Fault, Loc, Model, YamlFile
from litgpt.utils import UserError

WANTED_SYMPTOMS = 6
SAME_SYMPTOM = 0.8
"""Two symptoms whose letter trigrams overlap by so much (Jaccard) are one and the same to a reader."""
RULE_FILES: Mapping[str, type[Model]] = {SAFETY_FILE: SafetyFile, SOIL_FILE: SoilFile, WEATHER_FILE: WeatherFile}

_NOT_TOLD = frozenset({"sources", "questions_hi", "questions_hinglish"})
_STRENGTH = r"\d+(?:\.\d+)?(?:%| g/l)?"
_CODES = "|".join(sorted(code.upper() for code in (*FORMULATIONS, "af", "as", "dc", "g", "sd")))
_FORMULATION = re.compile(
    rf"(?:{_STRENGTH}(?: \+ {_STRENGTH})* )?(?:{_CODES})"  # 25 EC, 12% + 63% WP
    r"|\d{1,2}-\d{1,2}-\d{1,2}"  # N-P-K
    r"|\d+(?:\.\d+)?% [A-Z][a-z]?"  # 21% Zn
    r"|(?:[A-Z][a-z]?\d*)+(?:\.\d?H2O)?"  # FeSO4.7H2O
)
_MATERIALS = frozenset({"खली", "खेती का जिप्सम", "गंधक वाली खाद", "घुलनशील चूर्ण", "चूर्ण", "बोरेक्स", "यूरिया", "सक्रिय तत्व"})
"""Where a source says no more."""


@dataclass(frozen=True)
class Checked:
    """What was read, and everything wrong with it."""

    files: tuple[CropFile, ...]
    faults: tuple[Fault, ...]


def check_folder(directory: Path, pesticides: PesticideList) -> Checked:
    """Read and check every file of a folder, crops and rules; faults are collected, not raised.

    Raises:
        UserError: no crop file.
    """
    rules = [directory / name for name in RULE_FILES]
    # `load_knowledge` does without safe answers; limits and rules of the weather must be there.
    return check_files(
        [*crop_paths(directory), *(path for path in rules if path.exists() or path.name != SAFETY_FILE)], pesticides
    )


def check_files(paths: list[Path], pesticides: PesticideList) -> Checked:
    """Read and check some files of crops and rules; faults are collected, not raised."""
    files: list[CropFile] = []
    faults: list[Fault] = []
    for path in paths:
        try:
            file = YamlFile(path)
        except UserError as error:
            faults.append(Fault(path, 1, str(error).removeprefix(f"{path}: ")))
            continue
        if path.name in RULE_FILES:
            faults += _rule_file_faults(file, pesticides)
            continue
        content, found = read_crop_file(file)
        faults += found
        if content is not None:
            files.append(content)
            more = (*chemical_faults(content, pesticides), *symptom_faults(content.problems))
            faults += [file.fault(loc, what) for loc, what in more]
    return Checked(tuple(files), tuple(faults))


def _rule_file_faults(file: YamlFile, pesticides: PesticideList) -> list[Fault]:
    """A file of rules by its schema, and names in what it says that must not stand there."""
    content, faults = file.read(RULE_FILES[file.path.name])
    if isinstance(content, SafetyFile):
        faults += [file.fault(loc, what) for loc, what in _safety_faults(content)]
    for loc, text in _told(file.value):
        faults += [file.fault(loc, what) for what in _listed(text, pesticides)]
    return faults


def _safety_faults(content: SafetyFile) -> Iterator[tuple[Loc, str]]:
    """Topics that stand once, and sources that exist and are cited."""
    ids: set[str] = set()
    cited: list[tuple[Loc, tuple[str, ...]]] = [
        (("lines", name, "sources"), line.sources) for name, line in content.lines.items()
    ]
    for number, topic in enumerate(content.topics):
        if topic.id in ids:
            yield ("topics", number), "the id stands twice"
        ids.add(topic.id)
        cited.append((("topics", number, "sources"), topic.sources))
    for loc, keys in cited:
        for key in keys:
            if key not in content.sources:
                yield loc, f"source {key!r} is not in the file's sources"
    for key in sorted(content.sources.keys() - {key for _, keys in cited for key in keys}):
        yield ("sources", key), "nothing rests on this source"


def _told(value: Any, loc: Loc = ()) -> Iterator[tuple[Loc, str]]:
    """Every text of a file of rules but the titles of sources and what farmers ask."""
    if isinstance(value, str):
        yield loc, value
    elif isinstance(value, dict):
        for key, part in value.items():
            if key not in _NOT_TOLD:
                yield from _told(part, (*loc, key))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _told(part, (*loc, number))


def _listed(text: str, pesticides: PesticideList) -> Iterator[str]:
    """What is wrong with a text that names a pesticide of the official list."""
    for mention in pesticides.find(text):
        if not mention.is_active:
            yield f"{text!r} names {mention.matched}, which is banned or restricted"


def chemical_faults(content: CropFile, pesticides: PesticideList) -> Iterator[tuple[Loc, str]]:
    """Chemicals that may not be used on the crop or are on no list, and names in texts that must not stand there."""
    for number, problem in enumerate(content.problems):
        loc: Loc = ("problems", number)
        for n, chemical in enumerate(problem.chemicals):
            place = (*loc, "chemicals", n)
            if (hindi := pesticides.ids(chemical.name_hi)) != (english := pesticides.ids(chemical.ai)):
                named = ", ".join(sorted(hindi)) or "nothing on the list"
                yield (*place, "name_hi"), f"{chemical.name_hi!r} is {named}, but ai is {', '.join(sorted(english))}"
            if not _FORMULATION.fullmatch(chemical.formulation) and chemical.formulation not in _MATERIALS:
                what = f"{chemical.formulation!r} is no formulation like 25 EC, 12% + 63% WP, 18-46-0, 21% Zn or FeSO4"
                yield (*place, "formulation"), what
            yield from ((place, what) for what in _listed(chemical.formulation, pesticides))
            for name in chemical.ai.split(" + "):
                verdict = pesticides.verdict(name, content.crop.id, chemical.formulation)
                if verdict.forbidden:
                    yield place, f"{name} is recommended: {verdict.reason}"
                elif verdict.unknown:
                    yield place, f"{name} is on no list of _pesticides.yaml; add it to actives or mend the name"
        for part, text in problem_texts(problem):
            yield from (((*loc, *part), what) for what in _listed(text, pesticides))


def symptom_faults(problems: tuple[Problem, ...]) -> Iterator[tuple[Loc, str]]:
    """A check is needed wherever two problems show the same symptom."""
    seen: list[tuple[Problem, frozenset[str], str]] = []
    for number, problem in enumerate(problems):
        looks = {look.id for look in problem.look_alikes}
        for n, symptom in enumerate(problem.symptoms_hi):
            grams = trigrams(bare_words(symptom))
            for other, other_grams, other_symptom in seen:
                told_apart = other.id in looks or problem.id in {look.id for look in other.look_alikes}
                if other.id != problem.id and not told_apart and jaccard(grams, other_grams) >= SAME_SYMPTOM:
                    what = f"{symptom!r} stands in {other.id} as {other_symptom!r}, and no check tells the two apart"
                    yield ("problems", number, "symptoms_hi", n), what
            seen.append((problem, grams, symptom))


def problem_texts(problem: Problem) -> Iterator[tuple[Loc, str]]:
    """Everything of a problem that a farmer may read, with its place."""
    for key in ("cultural_hi", "biological_hi", "prevention_hi"):
        for number, text in enumerate(getattr(problem, key)):
            yield (key, number), text
    for number, look_alike in enumerate(problem.look_alikes):
        yield ("look_alikes", number, "check_hi"), look_alike.check_hi
    for key in ("signs_hi", "urgency_hi", "kvk_hi", "chemical_hi"):
        if text := getattr(problem, key):
            yield (key,), text


def page(knowledge: Knowledge, pesticides: PesticideList) -> str:
    """`docs/knowledge.md`: counts, what each crop has, and the gaps, in Markdown."""
    problems = list(knowledge.problems.values())
    chemicals = [chemical for problem in problems for chemical in problem.chemicals]
    sources = [source for group in knowledge.sources.values() for source in group.values()]
    kinds = Counter(problem.kind for problem in problems)
    read = Counter(source.read for source in sources)
    counts = [
        ("crops", len(knowledge.crops)),
        ("problems", f"{len(problems)}: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())),
        ("symptom phrasings", sum(len(problem.symptoms_hi) for problem in problems)),
        ("names and misspellings", sum(len(problem.names.all) for problem in problems)),
        ("checks between look-alikes", sum(len(problem.look_alikes) for problem in problems)),
        (
            "chemicals with a source",
            f"{len(chemicals)}, {sum(chemical.dose is not None for chemical in chemicals)} with a dose, "
            f"{sum(chemical.waiting_days is not None for chemical in chemicals)} with a waiting period",
        ),
        ("different active ingredients", len({chemical.ai for chemical in chemicals})),
        ("sources", f"{len(sources)}: " + ", ".join(f"{count} read as {depth}" for depth, count in read.most_common())),
        (
            "pesticides on the list of banned and restricted ones",
            f"{len(pesticides.entries)}, list of {pesticides.list_date}",
        ),
    ]
    lines = [
        "# What the knowledge base holds, and what it lacks",
        "",
        "Written by `python scripts/check_knowledge.py --page_path docs/knowledge.md`; do not edit.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in counts),
        "",
        "## Crops",
        "",
        "A claim is sourced when a page we read states it; the others are inferred from stages and the crop's habit.",
        "",
        "| crop | problems | phrasings | chemicals (with dose) | claims sourced |",
        "| --- | --- | --- | --- | --- |",
    ]
    for crop in knowledge.crops.values():
        own = knowledge.of_crop(crop.id)
        of_crop = [chemical for problem in own for chemical in problem.chemicals]
        claims = sum(len(problem.claims) for problem in own)
        sourced = claims - sum(len(problem.inferred) for problem in own)
        lines.append(
            f"| {crop.name_hi} ({crop.names.en[0]}) | {len(own)} | {sum(len(p.symptoms_hi) for p in own)} "
            f"| {len(of_crop)} "
            f"({sum(chemical.dose is not None for chemical in of_crop)}) | {sourced} of {claims} |"
        )
    lines += ["", "## Gaps", ""]
    for group in CLAIM_GROUPS:
        without = [problem.id for problem in problems if group in problem.inferred]
        lines.append(f"- **{group}** inferred, no page read states it ({len(without)}): {', '.join(without) or 'none'}")
    curable = [problem for problem in problems if problem.kind in {"fungal", "insect", "mite", "nutrient", "nematode"}]
    bare = [problem.id for problem in curable if not any(chemical.dose for chemical in problem.chemicals)]
    few = [problem.id for problem in problems if len(problem.symptoms_hi) < WANTED_SYMPTOMS]
    lonely = [problem.id for problem in problems if not problem.look_alikes]
    lines += [
        f"- **no sourced dose** for a problem that chemicals can treat ({len(bare)} of {len(curable)}; the advice "
        "says label and KVK): "
        f"{', '.join(bare) or 'none'}",
        f"- **fewer than {WANTED_SYMPTOMS} phrasings** ({len(few)}): {', '.join(few) or 'none'}",
        f"- **no look-alike** ({len(lonely)}): {', '.join(lonely) or 'none'}",
        "- Nobody has reviewed the facts as an agronomist yet.",
        "",
        "## Chemicals with a dose",
        "",
        "| problem | line of the list | source |",
        "| --- | --- | --- |",
    ]
    for problem in problems:
        for chemical in problem.chemicals:
            if chemical.dose:
                source = knowledge.sources[problem.crop_id][chemical.sources[0]]
                lines.append(f"| {problem.id} | {chemical_hi(chemical)} | [{source.publisher}]({source.url}) |")
    return "\n".join(lines) + "\n"
