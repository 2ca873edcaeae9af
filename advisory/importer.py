"""Questions and answers that others wrote → dialogues in our record contract, with an account of every row.

One pipeline for all sources: normalise, scrub, drop with a reason, map crop and problem, write. It holds a row at a
time; hashes of what was kept lie in a file that SQLite deletes by itself, so memory does not grow with the rows. Every
row is either kept or counted under one reason.
"""

from __future__ import annotations

import functools
import gc
import json
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

from advisory.names import NameIndex
from advisory.normalise import match_key, normalise_hindi
from advisory.personal import scrub_personal
from advisory.pesticides import PesticideList
from advisory.subject import Text, clean_text, is_empty, is_personal, is_price, is_weather
from advisory.tables import Broken, Raw
from litgpt.utils import UserError, atomic_file, progress

Reason = Literal[
    "broken_row", "no_question", "no_answer", "unreadable", "filtered", "no_licence", "noncommercial", "weather",
    "price", "empty_answer", "personal_only", "too_short", "language", "banned", "duplicate",
]  # fmt: skip
REASONS: Mapping[str, str] = {
    "broken_row": "the row could not be read (quotes, NUL bytes, number of fields, cut off)",
    "no_question": "there is no question",
    "no_answer": "there is no answer",
    "unreadable": "the letters are lost (????, broken encoding)",
    "filtered": "another value in a column that was asked for",
    "no_licence": "the record names no licence",
    "noncommercial": "the licence forbids commercial use",
    "weather": "about the weather of a day",
    "price": "about a price of a day",
    "empty_answer": "the answer says nothing (explained in details)",
    "personal_only": "nothing but a name or a number",
    "too_short": "too few words",
    "language": "neither Hindi nor English, or not a language asked for",
    "banned": "names a pesticide that must not be advised",
    "duplicate": "the same question and answer came before",
}
EXAMPLES = 3
EXAMPLE_CHARACTERS = 160
MAX_LISTED_BROKEN = 1000
_DOSE = re.compile(r"[0-9] ?(?:ml|gm?|gms|gram|kg|ltr|litre|liter|l|cc|ppm|मिली|ग्राम|किलो|किग्रा|लीटर|मि ली)(?= |$)")
_NONCOMMERCIAL = re.compile(r"\bNC\b|non[ -]?commercial", re.IGNORECASE)

IsBanned = Callable[[str, str | None], list[str]]
"""A text and the crop's id → the names in it that must not be advised."""


class Row(NamedTuple):
    """A question and its answer, as a source has them."""

    line: int
    question: str
    answer: str
    thought: str = ""
    system: str = ""
    crop: str = ""
    licence: str = ""
    reason: Reason | None = None
    """Why the source itself says that the row is of no use."""
    meta: Callable[[], Mapping[str, Any]] = dict
    """What else is to be noted; only asked of rows that are kept."""


@dataclass(frozen=True)
class Rules:
    """What is kept, and as what.

    Attributes:
        source: name of the source; it goes into ids and meta.
        system: the system prompt of records that bring none.
        names: maps words to our crops and problems.
        is_banned: finds pesticides that must not be advised.
        banned: drop such a row, or keep it with a flag.
        languages: of question and answer.
        allow_noncommercial: keep records under a licence that forbids commercial use.
        min_question_words: a question with fewer is too short.
        min_answer_words: the same for an answer.
    """

    source: str
    system: str
    names: NameIndex
    is_banned: IsBanned
    banned: Literal["drop", "flag"] = "drop"
    languages: frozenset[str] = frozenset({"hi", "hinglish", "en"})
    allow_noncommercial: bool = False
    min_question_words: int = 2
    min_answer_words: int = 3


# -- the account ------------------------------------------------------------------------------------------------------


@dataclass
class Account:
    """What became of the rows."""

    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    """The places of the first `MAX_LISTED_BROKEN` broken rows, and why."""
    flags: Counter[str] = field(default_factory=Counter)
    crops: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    scrubbed: Counter[str] = field(default_factory=Counter)
    unknown_crops: Counter[str] = field(default_factory=Counter)

    def drop(self, reason: str, place: str, question: str, answer: str) -> None:
        """Count a row under a reason; the first few are remembered, scrubbed."""
        self.dropped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            # What is unreadable is shown as it came: normalised, nothing would be left to see.
            form = str if reason == "unreadable" else normalise_hindi
            shown = (scrub_personal(form(text[:5000]))[0][:EXAMPLE_CHARACTERS] for text in (question, answer))
            examples.append({"place": place, **dict(zip(("question", "answer"), shown, strict=True))})

    def table(self) -> str:
        """The account for a terminal."""
        lines = [f"{self.rows:>12,} rows in", f"{self.kept:>12,} kept"]
        for reason, count in sorted(self.dropped.items(), key=lambda item: -item[1]):
            lines.append(f"{count:>12,} dropped: {reason} - {REASONS[reason]}")
            lines += [
                f"{'':15}{example['place']}: {example['question'][:60]!r} -> {example['answer'][:60]!r}"
                for example in self.examples[reason]
            ]
        for title, counts in (
            ("flags", self.flags),
            ("scrubbed", self.scrubbed),
            ("languages", self.languages),
            ("crops", self.crops),
        ):
            if counts:
                lines.append(f"{title}: {', '.join(f'{name} {count:,}' for name, count in counts.most_common(12))}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The account for `report.json`; rows = kept + dropped."""
        return {
            "rows_in": self.rows,
            "kept": self.kept,
            "dropped_total": sum(self.dropped.values()),
            "dropped": {reason: self.dropped.get(reason, 0) for reason in REASONS},
            "examples": self.examples,
            "broken_rows": self.broken,
            "flags": dict(self.flags.most_common()),
            "scrubbed": dict(self.scrubbed.most_common()),
            "languages": dict(self.languages.most_common()),
            "licences": dict(self.licences.most_common()),
            "crops": dict(self.crops.most_common()),
            "problems": dict(self.problems.most_common()),
            "unknown_crops": dict(self.unknown_crops.most_common(50)),
        }


class _Seen:
    """Hashes of what was kept, in a temporary file (in SQLITE_TMPDIR, TMPDIR or /var/tmp)."""

    def __init__(self) -> None:
        self._file = sqlite3.connect("", isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", "cache_size=-65536"):
            self._file.execute(f"PRAGMA {pragma}")
        self._file.execute("CREATE TABLE seen (hash INTEGER PRIMARY KEY)")
        self._file.execute("BEGIN")
        self._add = self._file.cursor()

    def add(self, digest: bytes) -> bool:
        """Whether these 8 bytes are new."""
        try:
            self._add.execute("INSERT OR IGNORE INTO seen VALUES (?)", (int.from_bytes(digest, "big", signed=True),))
        except sqlite3.OperationalError as error:
            raise UserError(f"no room for the file of hashes ({error}); set SQLITE_TMPDIR to a larger disk") from None
        return self._add.rowcount == 1

    def close(self) -> None:
        self._file.close()


# -- the pipeline -----------------------------------------------------------------------------------------------------

_encode = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode


def import_rows(tables: Iterable[tuple[str, Iterable[Row | Broken]]], rules: Rules, out_dir: Path) -> Account:
    """Write `dialogues.jsonl` and `report.json`; a run that is killed leaves the old ones.

    Args:
        tables: name of each file and its rows.
        rules: see there.
        out_dir: where the two files go.

    Raises:
        UserError: no row was kept; the report is written all the same, the old dialogues stay.
    """
    account, seen, started = Account(), _Seen(), time.monotonic()
    report_path, names = out_dir / "report.json", []
    # Rows make no cycles, and looking for some among the remembered texts takes a fifth of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with atomic_file(out_dir / "dialogues.jsonl") as temporary:
            with temporary.open("w", encoding="utf-8", newline="\n", buffering=1 << 20) as file:
                for name, rows in tables:
                    names.append(name)
                    for row in progress(rows, name, unit="row"):
                        account.rows += 1
                        if (record := _judge(row, name, rules, account, seen)) is not None:
                            account.kept += 1
                            file.write(_encode(record))
                            file.write("\n")
            report = {
                "source": rules.source,
                "files": names,
                **account.as_dict(),
                "seconds": round(time.monotonic() - started, 1),
            }
            with atomic_file(report_path) as temporary_report:
                temporary_report.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            if not account.kept:
                most = (
                    ", ".join(f"{reason} {count:,}" for reason, count in account.dropped.most_common(3))
                    or "none came in"
                )
                raise UserError(
                    f"none of {account.rows:,} rows was kept ({most}); {report_path} has examples of each reason"
                )
    finally:
        seen.close()
        if collecting:
            gc.enable()
    return account


def _judge(row: Row | Broken, name: str, rules: Rules, account: Account, seen: _Seen) -> dict[str, Any] | None:
    """The record of a row; `None` after the account has been told why there is none."""
    if isinstance(row, Broken):
        place = f"{name}:{row.line}"
        account.drop("broken_row", place, row.why, "")
        if len(account.broken) < MAX_LISTED_BROKEN:
            account.broken.append(f"{place}: {row.why}")
        return None
    reason = _reason_at_sight(row, rules)
    if reason is not None:
        account.drop(reason, f"{name}:{row.line}", row.question, row.answer)
        return None
    question, answer = clean_text(row.question), clean_text(row.answer)
    reason = _reason(question, answer, rules)
    crop = problem = None
    flags: list[str] = []
    thought = ""
    kinds = {*question.kinds, *answer.kinds}
    if reason is None:
        crop, problem = _subject(row, question, answer, rules.names, flags)
        texts = [question.text, answer.text]
        if row.thought:
            thinking = clean_text(row.thought)
            thought = thinking.text
            kinds.update(thinking.kinds)
            texts.append(thought)
        if named := [name for text in texts for name in rules.is_banned(text, crop)]:
            if rules.banned == "drop":
                reason = "banned"
            flags += [f"banned:{one}" for one in dict.fromkeys(named)]
    if reason is None:
        digest = blake2b(f"{question.key}\x1f{answer.key}\x1f{crop or row.crop}".encode(), digest_size=8).digest()
        if not seen.add(digest):
            reason = "duplicate"
    if reason is not None:
        account.drop(reason, f"{name}:{row.line}", row.question, row.answer)
        return None

    if question.repaired or answer.repaired:
        flags.append("repaired")
    if kinds:
        flags.append("scrubbed")
        for kind in kinds:
            account.scrubbed[kind] += 1
    if _DOSE.search(answer.key):
        flags.append("dose")
    if is_noncommercial(row.licence):
        flags.append("noncommercial")
    asked = question.text.replace("\n", " ")
    if crop is not None and "crop_from_column" in flags:
        # Without its crop the question has no answer; the adviser reads the crop from the words.
        asked = f"{_crop_label(row.crop)}: {asked}"
    for flag in flags:
        account.flags[flag.partition(":")[0]] += 1
    account.languages[answer.language or ""] += 1
    account.licences[row.licence] += 1
    if crop is not None:
        account.crops[crop] += 1
    elif row.crop and (len(account.unknown_crops) < 10_000 or row.crop in account.unknown_crops):
        account.unknown_crops[row.crop] += 1
    if problem is not None:
        account.problems[problem] += 1
    reply = {"role": "assistant", "content": answer.text}
    if thought:
        reply["thought"] = thought
    return {
        "id": f"{rules.source}-{digest.hex()}",
        "messages": [
            {"role": "system", "content": row.system.strip() or rules.system},
            {"role": "user", "content": asked},
            reply,
        ],
        "meta": {
            "source": rules.source,
            "crop": crop,
            "crop_raw": row.crop,
            "problem": problem,
            "language": answer.language,
            "question_language": question.language,
            "licence": row.licence,
            "flags": flags,
            **row.meta(),
        },
    }


def _reason_at_sight(row: Row, rules: Rules) -> Reason | None:
    """Why a row is of no use, as far as that shows before its texts are read."""
    if row.reason == "filtered":
        return row.reason
    if not row.licence:
        return "no_licence"
    if not rules.allow_noncommercial and is_noncommercial(row.licence):
        return "noncommercial"
    if not row.question or row.question.isspace():
        return "no_question"
    return row.reason


@functools.lru_cache(maxsize=1024)
def is_noncommercial(licence: str) -> bool:
    """Whether a licence forbids commercial use."""
    return bool(_NONCOMMERCIAL.search(licence))


def _reason(question: Text, answer: Text, rules: Rules) -> Reason | None:
    """Why the texts are of no use; pesticides and duplicates come later."""
    if question.lost or answer.lost:
        return "unreadable"
    if not question.words:
        return "no_question"
    if is_weather(question, answer):
        return "weather"
    if is_price(question):
        return "price"
    if not answer.words:
        return "no_answer"
    if is_empty(question, answer):
        return "empty_answer"
    if is_personal(question) or is_personal(answer):
        return "personal_only"
    if len(question.words) < rules.min_question_words or len(answer.words) < rules.min_answer_words:
        return "too_short"
    if question.language not in rules.languages or answer.language not in rules.languages:
        return "language"
    return None


def _subject(
    row: Row, question: Text, answer: Text, names: NameIndex, flags: list[str]
) -> tuple[str | None, str | None]:
    """Crop and problem by our ids. What the question says goes before the column, which is often wrong."""
    asked = names.crops(question.words)
    column = _crop_of_column(row.crop, names)
    crop = column if column in asked or not asked else asked[0]
    if crop is None:
        return None, None
    if not asked:
        flags.append("crop_from_column")
    elif column is not None and column not in asked:
        flags.append("crop_mismatch")
    problems = names.problems(question.words, crop)
    if not problems:
        # An answer may compare; only a single name is a finding.
        problems = names.problems(answer.words, crop)
        if len(problems) != 1:
            return crop, None
    return crop, problems[0]


@functools.lru_cache(maxsize=4096)
def _crop_of_column(crop: str, names: NameIndex) -> str | None:
    found = names.crops(match_key(normalise_hindi(crop)).split())
    return found[0] if found else None


@functools.lru_cache(maxsize=4096)
def _crop_label(crop: str) -> str:
    """ "Paddy (Dhan)" → "Paddy"."""
    return normalise_hindi(crop).partition("(")[0].strip() or normalise_hindi(crop)


def raw_rows(table: Iterable[Raw | Broken], to_row: Callable[[Raw], Row]) -> Iterator[Row | Broken]:
    """The rows of a table in the pipeline's form; broken ones pass."""
    return (row if isinstance(row, Broken) else to_row(row) for row in table)


def banned_names(pesticides: PesticideList) -> IsBanned:
    """The check for pesticides: what the official list forbids, for the crop where that is known.

    Without a crop of ours, a name that is restricted to or barred from some crops counts as forbidden.
    """

    @functools.lru_cache(maxsize=1 << 14)
    def check(text: str, crop: str | None) -> list[str]:
        found = []
        for mention in pesticides.find(text):
            if not mention.is_active:
                verdict = pesticides.verdict(mention.entry.id, crop)
                if verdict.forbidden or (crop is None and verdict.reason):
                    found.append(mention.entry.id)
        return found

    return check
