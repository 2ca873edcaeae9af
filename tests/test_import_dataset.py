"""Any question-and-answer set → dialogues: column maps, presets, licences, filters, and the two commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from advisory.importer import Account, Rules, import_rows, raw_rows
from advisory.public_sets import PRESETS, Columns, MappedRows, read_columns
from advisory.tables import read_table, table_files
from litgpt.data import read_records
from litgpt.utils import UserError
from tests.kcc_sample import is_banned, tiny_knowledge

NAMES = tiny_knowledge().names
QUESTION = "how to control yellow rust in wheat"
ANSWER = "keep watching the field and remove the affected leaves"
MAP = Columns(question="q", answer="a", licence="CC0")


def rules(**changes: Any) -> Rules:
    plain = Rules(source="set", system="आप सलाहकार हैं।", names=NAMES, is_banned=is_banned)
    return replace(plain, **changes)


def run(path: Path, columns: Columns, with_rules: Rules | None = None) -> Account:
    tables = [(file.name, raw_rows(read_table(file), MappedRows(columns, file))) for file in table_files(path)]
    return import_rows(tables, with_rules or rules(), path.parent / "out")


def jsonl(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def records(tmp_path: Path) -> list[dict[str, Any]]:
    read_records(tmp_path / "out/dialogues.jsonl")
    return [json.loads(line) for line in (tmp_path / "out/dialogues.jsonl").read_text("utf-8").splitlines()]


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)
    return path


# Columns and a row of each public set, as their pages list them.
PUBLIC: dict[str, dict[str, Any]] = {
    "kisanvaani": {"question": QUESTION, "answers": ANSWER},
    "talhakk": {"question": QUESTION, "answer": ANSWER},
    "farmerchat": {
        "asset_type": "crop", "asset_name": "Wheat", "query": QUESTION, "response": ANSWER,
        "user_country": "India",
        "user_geo_level2": "Bihar", "query_year_month": "2025-01", "language": "en",
    },
    "agthoughts": {"Question": QUESTION, "Reasoning Traces": "rust is a fungus", "Answer": ANSWER,
    "Question Type": "Disease"},
    "ajrasakha": {
        "question_id": "1", "question": QUESTION, "priority": "low", "source": "x", "state": "Bihar",
        "district": "Gaya",
        "crop": "Wheat", "normalised_crop": "wheat", "season": "Rabi", "domain": "Disease",
        "final_answer": ANSWER,
        "final_answer_sources": [{"name": "a"}],
    },
    "crop": {"instruction": QUESTION, "output": ANSWER, "history": [["a", "b"]]},
    "agricare": {"instruction": "Answer the farmer", "input": QUESTION, "output": ANSWER},
}  # fmt: skip
PUBLIC["farmerchat_large"] = PUBLIC["farmerchat"]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_the_columns_of_the_public_sets(preset: str, tmp_path: Path) -> None:
    columns = PRESETS[preset]
    if columns.licence is None:
        with pytest.raises(UserError, match=f"the licence is not known.*{columns.repo}"):
            MappedRows(columns, tmp_path)
        columns = columns.model_copy(update={"licence": "CC-BY-4.0"})
    path = parquet(tmp_path / "a.parquet", [PUBLIC[preset]])
    run(path, columns, rules(allow_noncommercial=True))
    (record,) = records(tmp_path)
    assert record["messages"][1]["content"].endswith(QUESTION) and record["messages"][2]["content"] == ANSWER
    assert record["messages"][2].get("thought") == ("rust is a fungus" if preset == "agthoughts" else None)
    assert record["meta"]["crop"] == "wheat" and record["meta"]["problem"] == "wheat_yellow_rust"
    assert record["meta"]["licence"] == columns.licence
    assert record["meta"]["flags"] == (["noncommercial"] if preset == "crop" else [])


def test_noncommercial_records_are_dropped_unless_they_are_asked_for(tmp_path: Path) -> None:
    licences = ["MIT", "CC BY-NC-SA 4.0", "", "cc-by-nc-4.0", "non-commercial use only", "CC-BY-4.0 (ncert text)"]
    path = jsonl(tmp_path, *({"q": f"{QUESTION} {n}", "a": ANSWER, "l": licence} for n, licence in enumerate(licences)))
    columns = Columns(question="q", answer="a", licence_column="l")
    account = run(path, columns)
    assert account.kept == 2 and account.dropped == {"noncommercial": 3, "no_licence": 1}
    account = run(path, columns, rules(allow_noncommercial=True))
    assert account.kept == 5 and account.flags["noncommercial"] == 3 and account.licences["CC BY-NC-SA 4.0"] == 1
    with pytest.raises(UserError, match="give --licence or --licence_column"):
        MappedRows(Columns(question="q", answer="a"), path)


def test_rows_of_other_countries_and_languages_are_dropped(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path,
        {"q": QUESTION, "a": ANSWER, "c": "INDIA"},
        {"q": QUESTION + " now", "a": ANSWER, "c": "Kenya"},
        {"q": "गेहूं में क्या करें", "a": "खेत में पानी दें और देखें", "c": "india"},
    )
    account = run(path, MAP.model_copy(update={"where": {"c": "India"}}), rules(languages=frozenset({"hi"})))
    assert account.dropped == {"filtered": 1, "language": 1} and account.kept == 1


def test_all_is_cleaned_and_scrubbed_and_deduplicated_as_for_the_call_centre(tmp_path: Path) -> None:
    wrong = "गेहूं में पानी दें और देखें".encode().decode("latin-1")
    path = jsonl(
        tmp_path,
        {"q": QUESTION, "a": wrong, "t": "call Mr Ramesh on 98765 43210", "s": "be brief"},
        {"q": QUESTION.upper() + "!", "a": wrong, "t": "", "s": ""},
        {"q": QUESTION, "a": ANSWER, "t": "endosulfan would kill it", "s": ""},
        {"q": QUESTION, "a": "information given", "t": "", "s": ""},
        {"q": QUESTION, "a": None, "t": None, "s": 5},
        {"q": "weather forecast for today", "a": "it will rain in the evening"},
    )
    account = run(path, MAP.model_copy(update={"thought": "t", "system": "s"}))
    assert account.dropped == {"duplicate": 1, "banned": 1, "empty_answer": 1, "no_answer": 1, "weather": 1}
    (record,) = records(tmp_path)
    assert record["messages"][0]["content"] == "be brief"
    assert record["messages"][2] == {
        "role": "assistant", "content": "गेहूं में पानी दें और देखें", "thought": "call Mr [नाम] on [फोन]"
    }  # fmt: skip
    assert record["meta"]["flags"] == ["repaired", "scrubbed"] and account.scrubbed == {"name": 1, "phone": 1}


def test_parquet_csv_and_json_lines_give_the_same(tmp_path: Path) -> None:
    rows = [{"q": f"{QUESTION} after {n} days", "a": f"{ANSWER} for {n} days"} for n in range(2500)]
    found = []
    for name in ("a.parquet", "a.jsonl", "a.csv"):
        directory = tmp_path / name
        directory.mkdir()
        if name == "a.parquet":
            parquet(directory / name, rows)
        elif name == "a.jsonl":
            (directory / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        else:
            (directory / name).write_text("q,a\n" + "".join(f"{r['q']},{r['a']}\n" for r in rows), encoding="utf-8")
        assert run(directory / name, MAP).kept == 2500
        found.append(records(directory))
    assert found[0] == found[1] == found[2]


def test_a_wrong_map_is_told_in_one_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"question": QUESTION, "reply": ANSWER})
    with pytest.raises(UserError, match=r"set\.jsonl: no column q, a; found: question, reply"):
        run(path, MAP)
    file = tmp_path / "map.yaml"
    for content, told in (
        ("question: q\nanwser: a\n", "anwser|answer"),
        ("- a", r"map\.yaml:1: "),
        ("a: [", "not valid YAML"),
        ("question: a\nquestion: b\nanswer: c\n", r"map\.yaml:\d: question: the key stands twice"),
        ("question: 2026-02-31\nanswer: c\n", "not valid YAML"),
    ):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=told):
            read_columns(file)
    with pytest.raises(UserError, match="no such file"):
        read_columns(tmp_path / "absent.yaml")
    file.write_text("question: a+b\nanswer: c\nlicence: MIT\nwhere: {d: x}\n", encoding="utf-8")
    assert read_columns(file) == Columns(question="a+b", answer="c", licence="MIT", where={"d": "x"})


# -- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands with the crops of the sample, and with the real list of pesticides."""
    from scripts import import_dataset, import_kcc

    for module in (import_dataset, import_kcc):
        monkeypatch.setattr(module, "load_knowledge", lambda directory: tiny_knowledge())


@pytest.mark.usefixtures("tiny_facts")
def test_the_dataset_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from litgpt.utils import run_cli
    from scripts.import_dataset import import_dataset

    path = jsonl(
        tmp_path,
        {"q": QUESTION, "a": ANSWER},
        {"q": QUESTION, "a": "एंडोसल्फान 2 मिली प्रति लीटर डालें"},
        {"q": "blast in paddy", "a": "mancozeb 2 gram per litre of water"},
        {"q": "leaf spot of guava", "a": "mancozeb 2 gram per litre of water"},
    )
    out = ["--out_dir", str(tmp_path / "out")]
    run_cli(import_dataset, args=["--data", str(path), "--question", "q", "--answer", "a", "--licence", "MIT", *out])
    told = capsys.readouterr().out
    # Mancozeb is allowed on rice and not on guava.
    assert "2 kept" in told and "2 dropped: banned" in told and "'leaf spot of guava'" in told
    (tmp_path / "map.yaml").write_text("question: q\nanswer: a\n", encoding="utf-8")
    for args, message in (
        (["--data", str(path), "--columns", str(tmp_path / "map.yaml")], "the licence is not known"),
        (["--data", str(path)], "which column is the question?"),
        (["--preset", "nosuch"], "choose one of kisanvaani"),
        (["--question", "q", "--answer", "a"], "give --data"),
        (["--data", str(tmp_path / "none.csv"), "--preset", "talhakk"], "no file or folder"),
    ):
        with pytest.raises(SystemExit):
            run_cli(import_dataset, args=[*args, *out])
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run_cli(import_dataset, args=["--preset", "talhakk", *out])
    assert "the hub did not deliver talhakk/agriculture-qa" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_facts")
def test_the_call_centre_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from litgpt.utils import run_cli
    from scripts.import_kcc import import_kcc
    from tests.kcc_sample import csv_lines, sample

    made = sample()
    (tmp_path / "dump.csv").write_text("".join(csv_lines(made.rows)), encoding="utf-8")
    run_cli(import_kcc, args=["--dump", str(tmp_path), "--out_dir", str(tmp_path / "out")])
    assert f"{made.kept:,} kept" in capsys.readouterr().out
    assert len(read_records(tmp_path / "out/dialogues.jsonl")) == made.kept
    monkeypatch.delenv("DATA_GOV_IN_API_KEY", raising=False)
    with pytest.raises(SystemExit):
        run_cli(import_kcc, args=["--out_dir", str(tmp_path / "out")])
    assert "DATA_GOV_IN_API_KEY" in capsys.readouterr().err
