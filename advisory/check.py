"""All facts of a folder checked together, and a page of counts and gaps.

`advisory/knowledge.py` sees one crop file; here the chemicals of all of them meet the list of banned and restricted
pesticides, and every text that a farmer reads is searched for names that must not stand there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from advisory.case import chemical_hi
from advisory.knowledge import CLAIM_GROUPS, CropFile, Knowledge, Problem, crop_paths, read_crop_file
from advisory.pesticides import PesticideList
from advisory.yamlfile import Fault, Loc, YamlFile
from litgpt.utils import UserError

WANTED_SYMPTOMS = 6


@dataclass(frozen=True)
class Checked:
    """What was read, and everything wrong with it."""

    files: tuple[CropFile, ...]
    faults: tuple[Fault, ...]


def check_folder(directory: Path, pesticides: PesticideList) -> Checked:
    """Read and check every crop file of a folder; faults are collected, not raised."""
    return check_files(crop_paths(directory), pesticides)


def check_files(paths: list[Path], pesticides: PesticideList) -> Checked:
    """Read and check some crop files; faults are collected, not raised."""
    files: list[CropFile] = []
    faults: list[Fault] = []
    for path in paths:
        try:
            content, found = read_crop_file(path)
        except UserError as error:
            faults.append(Fault(path, 1, str(error).removeprefix(f"{path}: ")))
            continue
        faults += found
        if content is not None:
            files.append(content)
            file = YamlFile(path)
            faults += [file.fault(loc, what) for loc, what in chemical_faults(content, pesticides)]
    return Checked(tuple(files), tuple(faults))


def chemical_faults(content: CropFile, pesticides: PesticideList) -> Iterator[tuple[Loc, str]]:
    """Chemicals that may not be used on the crop or are on no list, and names in texts that must not stand there."""
    for number, problem in enumerate(content.problems):
        loc: Loc = ("problems", number)
        for n, chemical in enumerate(problem.chemicals):
            for name in chemical.ai.split(" + "):
                verdict = pesticides.verdict(name, content.crop.id, chemical.formulation)
                if verdict.forbidden:
                    yield (*loc, "chemicals", n), f"{name} is recommended: {verdict.reason}"
                elif verdict.unknown:
                    yield (
                        (*loc, "chemicals", n),
                        f"{name} is on no list of _pesticides.yaml; add it to actives or mend the name",
                    )
        for part, text in problem_texts(problem):
            for mention in pesticides.find(text):
                if not mention.is_active:
                    yield (*loc, *part), f"{text!r} names {mention.matched}, which is banned or restricted"


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
