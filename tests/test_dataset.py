"""The dialogues: the record contract, disjoint splits, twins that differ in one sentence, the same bytes each run."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from advisory import guard, questions
from advisory.advice import MAX_WORDS, words
from advisory.case import chemical_hi, listed_chemicals
from advisory.compose import Record
from advisory.dataset import HELD_OUT_QUESTION, SPLITS, build_splits, part_of, phrasings, sizes
from advisory.facts import Facts, load_facts
from advisory.leaks import leaks
from litgpt.data import read_records
from litgpt.utils import UserError

ROOT = Path(__file__).parents[1]
KNOWLEDGE_DIR = ROOT / "data" / "knowledge"
SIZE, SEED = 1500, 7


@pytest.fixture(scope="module")
def facts() -> Facts:
    return load_facts(KNOWLEDGE_DIR)


@pytest.fixture(scope="module")
def splits(facts: Facts) -> dict[str, list[Record]]:
    return build_splits(facts, size=SIZE, seed=SEED)


def asked(record: Record) -> str:
    return "\n".join(message["content"] for message in record["messages"] if message["role"] == "user")


def test_sizes_and_the_record_contract(splits: dict[str, list[Record]], tmp_path: Path) -> None:
    assert {split: len(records) for split, records in splits.items()} == sizes(SIZE) and tuple(splits) == SPLITS
    path = tmp_path / "all.jsonl"
    everything = [record for records in splits.values() for record in records]
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in everything), encoding="utf-8")
    assert len(read_records(path)) == len(everything)
    assert len({record["id"] for record in everything}) == len(everything)
    keys = {
        "crop",
        "problem",
        "causes",
        "kind",
        "expect",
        "weather",
        "soil",
        "table",
        "must",
        "style",
        "form",
        "split_key",
    }
    for record in everything:
        assert keys <= set(record["meta"])
        assert record["meta"]["expect"] in {"advice", "ask", "refuse", "emergency", "table", "rule"}
        for message in record["messages"]:
            assert message["content"].strip() == message["content"] != ""
            assert message["role"] != "assistant" or message["thought"]


def test_every_question_is_new(splits: dict[str, list[Record]]) -> None:
    counts = Counter(asked(record) for records in splits.values() for record in records)
    assert max(counts.values()) == 1


def test_answers_are_safe_short_and_hindi(splits: dict[str, list[Record]], facts: Facts) -> None:
    for records in splits.values():
        for record in records:
            meta, answer = record["meta"], record["messages"][-1]["content"]
            assert words(answer) <= MAX_WORDS
            listed = listed_chemicals(facts, meta["crop"], meta["table"])
            assert len({chemical_hi(chemical) for chemical in listed}) == len(meta["table"])
            allowed = [dose for chemical in listed for dose in guard.allowed(chemical)]
            found = guard.violations(answer, crop_id=meta["crop"], allowed_doses=allowed, pesticides=facts.pesticides)
            assert not found, (record["id"], answer, found)
            assert not re.search(r"[A-Za-z]{4,}", answer) or meta["table"], answer


def test_test_holds_unseen_phrasings_and_combinations(splits: dict[str, list[Record]], facts: Facts) -> None:
    train_text = "\n".join(asked(record) for record in splits["train"] if record["meta"]["style"] == "plain")
    combinations = {
        (r["meta"]["split_key"].split("|")[0], tuple(r["meta"]["weather"]), tuple(r["meta"]["soil"] or ()))
        for r in splits["train"]
        if r["meta"]["expect"] == "advice"
    }
    checked = 0
    for record in splits["test"]:
        meta = record["meta"]
        if meta["expect"] != "advice" or meta["split_key"] == "held_out":
            continue
        problem_id, phrasing, *_ = meta["split_key"].split("|")
        first = phrasing.split("+")[0]
        assert first in phrasings(facts.knowledge.problems[problem_id], "test")
        assert first not in train_text
        assert (problem_id, tuple(meta["weather"]), tuple(meta["soil"] or ())) not in combinations
        checked += 1
    assert checked > 40


def test_no_state_of_weather_or_soil_stands_in_two_parts(splits: dict[str, list[Record]], facts: Facts) -> None:
    seen: dict[str, set[tuple[str, str]]] = {}
    for split in ("train", "val", "test"):
        for record in splits[split]:
            meta = record["meta"]
            problem_id = meta["split_key"].split("|")[0]
            if problem_id in facts.knowledge.problems:
                states = {*meta["weather"], *(meta["soil"] or ())}
                seen.setdefault(split, set()).update((problem_id, state) for state in states)
    assert len(seen["train"]) > 300
    for split in ("val", "test"):
        assert all(part_of(SEED, *pair) in {"train", split} for pair in seen[split])
        assert sum(part_of(SEED, *pair) == split for pair in seen[split]) >= 10
    assert all(part_of(SEED, *pair) == "train" for pair in seen["train"])


def test_nothing_leaks_between_splits(splits: dict[str, list[Record]]) -> None:
    assert leaks(splits) == []
    # The check itself can fail: a copy with two letters changed is found, one with other words is not.
    copy = json.loads(json.dumps(splits["train"][5], ensure_ascii=False)) | {"id": "copy"}
    copy["messages"][-2]["content"] = copy["messages"][-2]["content"][:-2] + "॥॥"
    other = splits["val"][0]
    found = leaks({"train": splits["train"], "val": [copy, other]})
    assert [identity for identity, _ in found] == ["copy"]
    # Two splits beside train are compared with each other, too.
    again = other | {"id": "again"}
    assert leaks({"train": splits["train"], "val": [other], "test": [again]}) == [("again", other["id"])]


def test_twins_differ_in_one_circumstance_and_one_sentence(splits: dict[str, list[Record]]) -> None:
    twins = splits["test_counterfactual"]
    kinds: Counter[str] = Counter()
    for a, b in zip(twins[::2], twins[1::2], strict=True):
        assert a["meta"]["twin"]["pair"] == b["meta"]["twin"]["pair"]
        assert (a["meta"]["twin"]["side"], b["meta"]["twin"]["side"]) == ("with", "without")
        first, second = (one["messages"][1]["content"].split("\n") for one in (a, b))
        assert first[0] == second[0]
        assert sum(x != y for x, y in zip(first, second, strict=True)) == 1
        sentence = a["meta"]["twin"]["sentence"]
        assert sentence in a["messages"][2]["content"] and sentence not in b["messages"][2]["content"]
        kinds[a["meta"]["twin"]["pair"].split("-")[0]] += 1
    assert set(kinds) == {"weather", "soil", "age", "table"}


def test_all_that_is_asked_for_is_there(splits: dict[str, list[Record]], facts: Facts) -> None:
    train = splits["train"]
    assert {record["meta"]["style"] for record in train} == set(questions.STYLES)
    assert {record["meta"]["form"] for record in train} == {"bare", "told", "lines", "turns"}
    assert {record["meta"]["expect"] for record in train} == {"advice", "ask", "refuse", "emergency", "table", "rule"}
    assert any(record["meta"]["two"] for record in train)
    assert any(record["meta"]["applied"] for record in train)
    assert any(record["meta"].get("topic") == "injection_in_question" for record in train)
    assert {record["meta"]["problem"] for record in train} - {None} >= {
        problem.id for problem in facts.knowledge.problems.values()
    } - {record["meta"]["problem"] for record in train if record["meta"]["two"]} - dataset_turned(splits)
    lines = [line for record in train for line in asked(record).split("\n") if line.startswith("मौसम:")]
    assert any("पता नहीं" in line for line in lines) and any("पुराना" in line for line in lines)
    assert all({"style", "form"} <= set(record["meta"]) for record in train)
    hinglish = [r for r in splits["test_hinglish"] if r["meta"]["style"] == "hinglish" and "topic" not in r["meta"]]
    assert hinglish and all(asked(record).split("\n")[0].isascii() for record in hinglish)


def dataset_turned(splits: dict[str, list[Record]]) -> set[str]:
    """Problems whose every case was turned to another cause by its circumstances."""
    told = {record["meta"]["split_key"].split("|")[0] for record in splits["train"] if record["meta"]["problem"]}
    return told - {record["meta"]["problem"] for record in splits["train"]}


def test_the_held_out_question(splits: dict[str, list[Record]]) -> None:
    assert not [record for record in splits["train"] if HELD_OUT_QUESTION in asked(record)]
    (record,) = [record for record in splits["test"] if asked(record).startswith(HELD_OUT_QUESTION)]
    answer = record["messages"][2]["content"]
    assert "शायद पीला रतुआ" in answer and "उंगली से पत्ती रगड़ें" in answer and "नाइट्रोजन की कमी" in answer


def test_thoughts_in_hindi(facts: Facts) -> None:
    record = build_splits(facts, size=2 * len(facts.knowledge.problems), seed=1, thoughts="hi")["val"][0]
    assert re.search("[\u0900-\u097f]", record["messages"][-1]["thought"])


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(facts: Facts, splits: dict[str, list[Record]]) -> None:
    again = build_splits(facts, size=SIZE, seed=SEED)
    digests = [
        hashlib.sha256(json.dumps(one, ensure_ascii=False).encode()).hexdigest()
        for one in (splits, again, build_splits(facts, size=SIZE, seed=8))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_sizes_that_cannot_be(facts: Facts) -> None:
    with pytest.raises(UserError, match="too small"):
        build_splits(facts, size=10, seed=1)
    with pytest.raises(UserError, match="no crop unicorn"):
        facts.only(["unicorn"])


def test_the_bundled_dialogues_are_what_their_command_writes(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "scripts/prepare_data.py",
        "--config",
        "configs/tiny/dialogues.yaml",
        "--out_dir",
        str(tmp_path),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (ROOT / f"data/dialogues/{split}.jsonl").read_bytes(), (
            split
        )


def test_ages_are_said_as_people_say_them() -> None:
    assert questions.age_hi(60, Random(0)) in {"60 दिन", "करीब 60 दिन", "दो महीने"}
