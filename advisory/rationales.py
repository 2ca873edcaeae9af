"""Thought and answer written by a large model for given questions, and what of it is refused.

A question is sent with the facts we have about its crop, so that the model rests on them; what comes back is kept only
if no check of the guard and no fact of the knowledge base speaks against it. Every record says where it came from.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advisory import guard
from advisory.advice import MAX_WORDS, derive, owner, words
from advisory.case import FarmCase, age_in, listed_chemicals
from advisory.compose import SYSTEM_HI
from advisory.exam import Examiner, Reply
from advisory.facts import Facts
from advisory.knowledge import Crop, Problem
from advisory.remote import RemoteReply
from litgpt.utils import UserError

LEAST_THOUGHT, MOST_THOUGHT = 5, 250
"""Words of a thought."""
SHOWN_PROBLEMS = 4
DAYS_OUTSIDE = 15
"""A cause may be named so many days before and after its usual window."""

INSTRUCTION_EN = (
    "You advise farmers of northern India. First think briefly in English between <thought> and </thought>: evidence, "
    f"rule, conclusion. Then answer in plain village Hindi (Devanagari), at most {MAX_WORDS} words: the likely cause "
    "with doubt (शायद), the check that tells it from its look-alike, two to four numbered steps (cultural, then "
    "biological, then whom to ask about chemicals), and the Kisan Call Centre 1800-180-1551. Use only the facts below. "
    "Never name a dose or a chemical that is not in them. If crop or sign is missing, ask one question instead."
)

_CUT = {"length": "cut short", "content_filter": "stopped by the server's filter"}
_TAGS = re.compile(r"</?(?:thought|think)>|<\|")
_EMERGENCY_NUMBER = re.compile(r"(?<!\d)(?:108|112|14416)(?!\d)")


@dataclass(frozen=True)
class Question:
    """What is to be answered."""

    id: str
    turns: tuple[Mapping[str, str], ...]
    """Role and content of the user's turns and of the answers between them; the last turn is the user's."""
    meta: Mapping[str, Any]

    @property
    def said(self) -> str:
        """All that the user said."""
        return "\n".join(turn["content"] for turn in self.turns if turn["role"] == "user")


def read_questions(path: Path) -> Iterator[Question]:
    """Questions of dialogue records, one after the other: each up to its last user turn, with or without an answer.

    Raises:
        UserError: no such file, no question in it, or `path:line:` and what is wrong with that line.
    """
    if not path.is_file():
        raise UserError(f"no file {path}: expected dialogues as JSON lines, one object a line")
    line_of_id: dict[str, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            try:
                question = _parse(line)
                if question.id in line_of_id:
                    raise ValueError(f"id {question.id!r} stands in line {line_of_id[question.id]} already")
            except UnicodeDecodeError:
                raise UserError(f"{path}:{number}: not UTF-8: save the file as UTF-8") from None
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}") from None
            except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
                complaint = error if type(error) is ValueError else 'expected {"id", "messages": [{"role", "content"}]}'
                raise UserError(f"{path}:{number}: {complaint}") from None
            line_of_id[question.id] = number
            yield question
    if not line_of_id:
        raise UserError(f"{path} holds no question: expected dialogues as JSON lines, one object a line")


def _parse(line: bytes) -> Question:
    value = json.loads(line.decode("utf-8"))
    identity, messages, meta = value["id"], value["messages"], value.get("meta", {})
    last = max((number for number, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise ValueError("no user turn, so there is nothing to ask")
    turns = tuple({"role": m["role"], "content": m["content"]} for m in messages[: last + 1] if m["role"] != "system")
    texts = [identity, *(turn["content"] for turn in turns)]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("id and content must be strings that are not empty")
    if any("\ud800" <= sign <= "\udfff" for text in texts for sign in text):
        raise ValueError("half of a surrogate pair, which is no character")
    lists = [meta.get(key) or [] for key in ("causes", "table")]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise ValueError("meta.causes and meta.table are lists of strings")
    return Question(identity, turns, meta)


def prompt(question: Question, facts: Facts) -> list[Mapping[str, str]]:
    """The messages sent to the server: instruction, facts about the crop, question."""
    shown = known_facts(question, facts) or "none, the crop is not in the knowledge base."
    return [{"role": "system", "content": f"{INSTRUCTION_EN}\n\nFacts:\n{shown}"}, *question.turns]


def known_facts(question: Question, facts: Facts) -> str:
    """What we know about the problems that a question may be about, a line each; empty without a crop."""
    crop = facts.knowledge.crop_named(question.said)
    return "\n".join(_fact(problem, crop) for problem in _relevant(question, crop, facts)) if crop else ""


def _fact(problem: Problem, crop: Crop) -> str:
    checks = " ".join(f"{look.check_hi}।" for look in problem.look_alikes)
    chemical = [problem.chemical_hi] if problem.chemical_hi else []
    steps = "; ".join((*problem.cultural_hi, *problem.biological_hi, *chemical))
    head = f"- {crop.name_hi}, {problem.name_hi} ({problem.name_en}), {problem.days[0]}-{problem.days[1]} दिन"
    return f"{head}: {problem.signs_hi}। जांच: {checks or 'कोई नहीं।'} उपाय: {steps}। {problem.urgency_hi}।"


def _relevant(question: Question, crop: Crop, facts: Facts) -> list[Problem]:
    """The causes the question was composed for, or the one its words are nearest to; then look-alikes, then others."""
    known = facts.knowledge.problems
    nearest = owner(crop.id, _sign(question), facts)
    first = [known[name] for name in question.meta.get("causes") or () if name in known] or [*filter(None, [nearest])]
    looks = [known[look.id] for problem in first for look in problem.look_alikes]
    every = [*first, *looks, *facts.knowledge.of_crop(crop.id)]
    return list({problem.id: problem for problem in every}.values())[:SHOWN_PROBLEMS]


def _sign(question: Question) -> str:
    """The farmer's own words; the lines under them describe the field."""
    return question.turns[-1]["content"].split("\n")[0]


def refusals(question: Question, reply: RemoteReply, examiner: Examiner) -> list[str]:
    """Why a reply may not be taught: for each check that it fails, "check: detail"; empty if it may."""
    if not reply.text:
        return [_CUT.get(reply.finish or "", "no answer")]
    reasons = [_CUT[reply.finish]] if reply.finish in _CUT else []
    thought = reply.thought or ""
    if not LEAST_THOUGHT <= words(thought) <= MOST_THOUGHT:
        reasons.append(f"thought: {words(thought)} words" if thought else "no thought")
    crop = examiner.facts.knowledge.crop_named(question.said)
    # What the exam counts as well-formed; `expect` is empty, so nothing else is scored.
    meta = {"crop": crop.id if crop else None, "expect": "", "must": (), "table": (), "causes": (), "two": False}
    form = examiner.score({"messages": [{"content": reply.text}], "meta": meta}, Reply(reply.text))
    if not form["devanagari"]:
        reasons.append("answer: not Hindi")
    if not form["length_fits"]:
        reasons.append(f"answer too short or long: {words(reply.text)} words")
    if form["thought_leaks"] or _TAGS.search(thought):
        reasons.append("thought leaks into the answer" if form["thought_leaks"] else "tags inside the thought")
    if guard.emergency(question.said) and not _EMERGENCY_NUMBER.search(reply.text):
        reasons.append("emergency without a number to call")
    reasons += _guard(question, f"{thought}\n{reply.text}", crop, examiner.facts)
    if crop is not None and (contradiction := _contradiction(question, reply.text, crop, examiner.facts)):
        reasons.append(f"against the knowledge base: {contradiction}")
    return reasons


def _guard(question: Question, said: str, crop: Crop | None, facts: Facts) -> list[str]:
    """What must not be said: a chemical that is banned or was not among the facts, a dose that was not in the list."""
    table = question.meta.get("table") or ()
    listed = listed_chemicals(facts, crop.id if crop else None, table)
    found = guard.violations(
        said,
        crop_id=crop.id if crop else None,
        allowed_doses=[dose for chemical in listed for dose in guard.allowed(chemical)],
        pesticides=facts.pesticides,
        allowed_ais=facts.pesticides.ids(known_facts(question, facts)) | {chemical.ai for chemical in listed},
    )
    return list(dict.fromkeys(f"{violation.rule}: {violation.reason}" for violation in found))


def _contradiction(question: Question, answer: str, crop: Crop, facts: Facts) -> str | None:
    """Where the knowledge base knows better: another first cause, or one far outside its window."""
    first = next(iter(facts.knowledge.problems_named(answer, crop.id)), None)
    if first is None:
        return None
    causes = question.meta.get("causes") or []
    if not causes and owner(crop.id, _sign(question), facts):
        case = FarmCase(crop=crop.id, symptoms=(_sign(question),))
        causes = [cause.problem.id for cause in derive(case, facts).causes]
    if causes and first not in causes:
        return f"first cause {first} is none of {', '.join(causes)}"
    age, (begin, end) = age_in(question.said), facts.knowledge.problems[first].days
    if age is not None and not begin - DAYS_OUTSIDE <= age <= end + DAYS_OUTSIDE:
        return f"{first} does not occur at {age} days"
    return None


def to_record(question: Question, reply: RemoteReply, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The dialogue in the record contract, with where it came from."""
    answer = {"role": "assistant", "content": reply.text, "thought": reply.thought}
    return {
        "id": question.id,
        "messages": [{"role": "system", "content": SYSTEM_HI}, *question.turns, answer],
        "meta": {**question.meta, "source": "generated", "provenance": dict(provenance)},
    }


def digest(value: object) -> str:
    """SHA-256 of a value's JSON, hexadecimal."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
