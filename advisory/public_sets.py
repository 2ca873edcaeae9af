"""Which column of a question-and-answer set is what: by hand for any set, ready for some public ones.

Licences are those on the sets' pages when this was written; where a page states none, the user has to say it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advisory.importer import Row
from advisory.kcc import label
from advisory.tables import Raw
from advisory.yamlfile import Model, YamlFile
from litgpt.utils import UserError

DATA_PATTERNS = tuple(f"*.{end}{gz}" for end in ("csv", "json", "jsonl", "parquet") for gz in ("", ".gz"))


class Columns(Model):
    """Names of the columns of a set."""

    question: str
    """Several columns are joined: "instruction+input"."""
    answer: str
    thought: str | None = None
    system: str | None = None
    crop: str | None = None
    state: str | None = None
    district: str | None = None
    season: str | None = None
    query_type: str | None = None
    licence_column: str | None = None
    """The column that holds each record's licence."""
    licence: str | None = None
    """The licence of all records."""
    where: Mapping[str, str] = {}
    """Column → the value it must have (capitals do not matter); other rows are not wanted."""
    repo: str | None = None
    """The set's name on the Hugging Face hub."""


PRESETS: Mapping[str, Columns] = {
    "kisanvaani": Columns(
        question="question", answer="answers", licence="Apache-2.0", repo="KisanVaani/agriculture-qa-english-only"
    ),
    "talhakk": Columns(question="question", answer="answer", licence="Apache-2.0", repo="talhakk/agriculture-qa"),
    "farmerchat": Columns(
        question="query", answer="response", crop="asset_name", state="user_geo_level2", query_type="asset_type",
        licence="CC-BY-4.0", where={"user_country": "India"}, repo="DigiGreen/farmerchat-queries",
    ),
    "farmerchat_large": Columns(
        question="query", answer="response", crop="asset_name", state="user_geo_level2", query_type="asset_type",
        licence="CC-BY-4.0", where={"user_country": "India"}, repo="DigiGreen/farmerchat-queries-large",
    ),
    "agthoughts": Columns(
        question="Question", answer="Answer", thought="Reasoning Traces", query_type="Question Type",
        repo="BGLab/AgThoughts",
    ),
    "ajrasakha": Columns(
        question="question", answer="final_answer", crop="crop", state="state", district="district", season="season",
        query_type="domain", licence="MIT", repo="vicharanashala/ajrasakha-dataset-v1",
    ),
    "crop": Columns(
        question="instruction", answer="output", licence="CC-BY-NC-4.0", repo="AI4Agr/CROP-dataset"
    ),
    "agricare": Columns(question="instruction+input", answer="output", repo="Satyam66/Agricare"),
}  # fmt: skip


def read_columns(path: Path) -> Columns:
    """A map of columns from a YAML file with the keys of `Columns`.

    Raises:
        UserError: no such file, or something else in it.
    """
    columns, faults = YamlFile(path).read(Columns)
    if columns is None or faults:
        raise UserError(f"{faults[0]}; known are {', '.join(Columns.model_fields)}")
    return columns


class MappedRows:
    """Turns raw rows of one file into the pipeline's rows.

    Args:
        columns: which column is what.
        path: the file, for complaints.

    Raises:
        UserError: neither a licence nor a column of licences is named.
    """

    def __init__(self, columns: Columns, path: Path) -> None:
        if not columns.licence and not columns.licence_column:
            hint = f" (see the page of {columns.repo})" if columns.repo else ""
            raise UserError(
                f"the licence is not known: give --licence or --licence_column{hint}; without one nothing is imported"
            )
        self._map = columns
        self._path = path
        self._columns: Sequence[str] | None = None
        self._place: dict[str, int] = {}

    def __call__(self, raw: Raw) -> Row:
        """The row.

        Raises:
            UserError: a column of the map is not in the file.
        """
        if raw.columns is not self._columns and raw.columns != self._columns:
            self._place = self._places(raw.columns)
            self._columns = raw.columns
        values, m = (*raw.values, ""), self._map
        question = " ".join(filter(None, (values[self._at(name)].strip() for name in m.question.split("+"))))
        wanted = all(values[self._at(name)].strip().casefold() == value.casefold() for name, value in m.where.items())
        return Row(
            line=raw.line,
            question=question,
            answer=values[self._at(m.answer)],
            thought=values[self._at(m.thought)],
            system=values[self._at(m.system)],
            crop=label(values[self._at(m.crop)]),
            licence=values[self._at(m.licence_column)].strip() if m.licence_column else m.licence or "",
            reason=None if wanted else "filtered",
            meta=functools.partial(self._meta, values),
        )

    def _at(self, name: str | None) -> int:
        """The place of a column, that of the empty value behind the last for none."""
        return self._place.get(name, -1) if name else -1

    def _meta(self, values: Sequence[str]) -> dict[str, Any]:
        m = self._map
        names = {"state": m.state, "district": m.district, "season": m.season, "query_type": m.query_type}
        return {ours: label(values[self._at(theirs)]) or None for ours, theirs in names.items() if theirs}

    def _places(self, columns: Sequence[str]) -> dict[str, int]:
        by_folded = {name.strip().casefold(): place for place, name in reversed(list(enumerate(columns)))}
        m = self._map
        wanted = [*m.question.split("+"), m.answer, m.thought, m.system, m.crop, m.state, m.district, m.season,
                  m.query_type, m.licence_column, *m.where]  # fmt: skip
        names = [name for name in wanted if name]
        missing = [name for name in names if name.strip().casefold() not in by_folded]
        # Objects of a JSON file may lack keys; the first one shows whether the map fits the set.
        if missing and self._columns is None:
            found = ", ".join(map(str, columns[:30])) or "none"
            raise UserError(f"{self._path}: no column {', '.join(dict.fromkeys(missing))}; found: {found[:600]}")
        return {name: by_folded[name.strip().casefold()] for name in names if name not in missing}
