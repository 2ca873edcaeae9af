"""The dialogues: traceable answers, rules that follow the case, disjoint splits, the same bytes each run."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from advisory import compose
from advisory.case import WEATHERS, FarmCase, with_case_lines
from advisory.dataset import HELD_OUT_QUESTION, SPLITS, build_splits, check_splits
from advisory.knowledge import DOSE, Knowledge, Problem, load_knowledge
from litgpt.utils import UserError
from tests.test_knowledge import KNOWLEDGE_DIR, chemical_names

ROOT = Path(__file__).parents[1]
Record = dict[str, Any]

SOILS: tuple[dict[str, float | str] | None, ...] = (
    None,
    {},
    {"n": 150.0, "zn": 0.3, "s": 5.0, "fe": 2.0, "b": 0.2, "k": 50.0, "ph": 8.8, "texture": "sandy"},
)


@pytest.fixture(scope="module")
def knowledge() -> Knowledge:
    return load_knowledge(KNOWLEDGE_DIR)


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Record]]:
    """The committed records."""
    return {
        split: [
            json.loads(line)
            for line in (ROOT / f"data/dialogues/{split}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for split in SPLITS
    }


def _answers(knowledge: Knowledge, problem: Problem) -> list[tuple[FarmCase, compose.Answer]]:
    crop = knowledge.crops[problem.crop_id]
    cases = [
        FarmCase(crop=crop.id, age_days=age, weather=weather, soil=soil)
        for age in (None, problem.days[0], 0, crop.last_day)
        for weather in (None, *WEATHERS)
        for soil in SOILS
    ]
    return [(case, compose.answer(problem, crop, case, knowledge)) for case in cases]


def _claims(text: str) -> list[str]:
    """The sentences of an answer without numbering and labels."""
    claims: list[str] = []
    for line in text.splitlines():
        line = re.sub(r"^\d\. ", "", line)
        for sentence in re.split(r"(?<=।) ", line):
            claims.append(re.sub(r"^(पहचान: |जांच: (?!.*इससे शक)|आगे के लिए: )", "", sentence))
    return claims


def test_every_claim_is_a_field_of_its_problem(knowledge: Knowledge) -> None:
    for problem in knowledge.problems.values():
        fields = [
            problem.signs_hi,
            problem.urgency_hi,
            *([problem.chemical_hi] if problem.chemical_hi else []),
            *problem.cultural_hi,
            *problem.biological_hi,
            *problem.prevention_hi,
            *(look_alike.check_hi for look_alike in problem.look_alikes),
        ]
        allowed = {claim for field in fields for claim in _claims(f"{field}।")} | compose.FIXED_SENTENCES_HI
        for _, answer in _answers(knowledge, problem):
            head, *claims = _claims(answer.content)
            assert problem.name_hi in head
            assert "शायद" in head
            assert [claim for claim in claims if claim not in allowed] == [], problem.id


def test_answers_are_short_numbered_and_safe(knowledge: Knowledge) -> None:
    for problem in knowledge.problems.values():
        for _, answer in _answers(knowledge, problem):
            assert compose.words(answer.content) <= compose.MAX_ANSWER_WORDS, problem.id
            steps = re.findall(r"^(\d)\. ", answer.content, flags=re.MULTILINE)
            assert steps == [str(number + 1) for number in range(len(steps))]
            assert compose.MIN_MEASURES <= len(steps) <= compose.MAX_MEASURES
            assert not DOSE.search(answer.content), problem.id
            assert not chemical_names(answer.content), problem.id
            assert compose.HELPLINE_HI in answer.content or compose.KVK_HI in answer.content


def test_chemicals_come_last(knowledge: Knowledge) -> None:
    for problem in knowledge.problems.values():
        for _, answer in _answers(knowledge, problem)[:1]:
            steps = re.findall(r"^\d\. (.*)।$", answer.content, flags=re.MULTILINE)
            kinds = [
                0
                if step in problem.cultural_hi
                else 3
                if step == problem.chemical_hi
                else 2
                if step in problem.biological_hi
                else 1
                for step in steps
            ]
            assert kinds == sorted(kinds), problem.id


def test_rain_wind_and_heat_change_the_advice(knowledge: Knowledge) -> None:
    sprayed = 0
    for problem in knowledge.problems.values():
        crop = knowledge.crops[problem.crop_id]
        said = {
            weather: compose.answer(problem, crop, FarmCase(crop=crop.id, weather=weather), knowledge).content
            for weather in ("rain_soon", "windy", "hot", "clear")
        }
        for weather, sentence in (
            ("rain_soon", compose.RAIN_NO_SPRAY_HI),
            ("windy", compose.WIND_NO_SPRAY_HI),
            ("hot", compose.HEAT_NO_SPRAY_HI),
        ):
            assert (sentence in said[weather]) == compose.sprays(problem), problem.id
            assert sentence not in said["clear"]
        assert (compose.RAIN_NO_FERTILISER_HI in said["rain_soon"]) == (problem.kind == "nutrient")
        sprayed += compose.sprays(problem)
    assert sprayed > len(knowledge.problems) / 3


def test_soil_card_and_age_change_the_advice(knowledge: Knowledge) -> None:
    problem, crop = knowledge.problems["wheat_nitrogen_deficiency"], knowledge.crops["wheat"]

    def said(**case: Any) -> str:
        return compose.answer(problem, crop, FarmCase(crop="wheat", **case), knowledge).content

    assert "नाइट्रोजन कम, इससे शक और बढ़ता है" in said(soil={"n": 150.0})
    assert compose.SOIL_UNSURE_HI in said(soil={"n": 350.0})
    assert compose.SOIL_UNSURE_HI not in said()
    assert compose.UNUSUAL_AGE_HI in said(age_days=120)
    assert compose.UNUSUAL_AGE_HI not in said(age_days=40)


def test_held_out_question_has_the_expected_answer(splits: dict[str, list[Record]]) -> None:
    bare = compose.bare_question(HELD_OUT_QUESTION)
    assert not [r["id"] for r in splits["train"] if bare in compose.bare_question(r["messages"][1]["content"])]
    [record] = [r for r in splits["test"] if r["messages"][1]["content"] == HELD_OUT_QUESTION]
    answer = record["messages"][2]["content"]
    assert "शायद पीला रतुआ" in answer
    assert "उंगली से पत्ती रगड़ें" in answer
    assert "नाइट्रोजन की कमी" in answer
    similar = [
        r
        for r in splits["train"]
        if "पत्तों पर पीले धब्बे दिख रहे हैं" in r["messages"][1]["content"] and r["meta"]["crop"] == "wheat"
    ]
    assert len(similar) >= 2


def test_splits_share_no_question_and_no_circumstance(splits: dict[str, list[Record]]) -> None:
    check_splits(splits)
    questions = {
        split: {compose.bare_question(r["messages"][1]["content"]) for r in records}
        for split, records in splits.items()
    }
    held_weather: dict[str, set[tuple[str, str]]] = {}
    for split, records in splits.items():
        held_weather[split] = {
            (r["meta"]["problem"], r["meta"]["weather"])
            for r in records
            if r["meta"]["problem"] and r["meta"]["weather"]
        }
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not questions[first] & questions[second]
        assert not held_weather[first] & held_weather[second]


def test_leak_is_noticed(splits: dict[str, list[Record]]) -> None:
    with pytest.raises(UserError, match="stands in train too"):
        check_splits({**splits, "val": [*splits["val"], splits["train"][0]]})
    leak = {**splits["train"][0], "messages": [{}, {"content": f"नमस्ते, {HELD_OUT_QUESTION}।"}, {}]}
    with pytest.raises(UserError, match="held-out question"):
        check_splits({"train": [leak]})


def test_val_and_test_use_phrasings_that_train_never_saw(splits: dict[str, list[Record]], knowledge: Knowledge) -> None:
    train = "\n".join(r["messages"][1]["content"] for r in splits["train"])
    for split, position in (("val", -2), ("test", -1)):
        for record in splits[split]:
            if record["meta"]["problem"] and record["meta"]["style"] != "held_out":
                symptom = knowledge.problems[record["meta"]["problem"]].symptoms_hi[position]
                assert symptom in record["messages"][1]["content"], record["id"]
                assert symptom not in train, record["id"]


def test_records_keep_the_contract(splits: dict[str, list[Record]]) -> None:
    ids = [record["id"] for records in splits.values() for record in records]
    assert len(set(ids)) == len(ids)
    keys = {"crop", "problem", "kind", "age_days", "weather", "soil", "style", "split_key"}
    for records in splits.values():
        for record in records:
            assert set(record) == {"id", "messages", "meta"}
            assert keys <= set(record["meta"])
            system, user, assistant = record["messages"]
            assert [m["role"] for m in record["messages"]] == ["system", "user", "assistant"]
            assert system["content"] == compose.SYSTEM_HI
            assert user["content"].strip()
            assert set(assistant) == {"role", "content", "thought"}
            assert assistant["content"].strip()
            assert assistant["thought"].isascii()
            assert not chemical_names(assistant["content"])
            assert not DOSE.search(assistant["content"])


def test_mix_and_lengths(splits: dict[str, list[Record]], knowledge: Knowledge) -> None:
    train = splits["train"]
    assert len(train) == 1200
    assert {len(splits[split]) for split in ("val", "test")} == {120}
    kinds = Counter(record["meta"]["kind"] for record in train)
    assert 0.06 <= kinds["clarify"] / len(train) <= 0.10
    assert 0.03 <= kinds["safety"] / len(train) <= 0.05
    crops = yaml.safe_load((ROOT / "configs" / "tiny" / "dialogues.yaml").read_text(encoding="utf-8"))["crops"]
    assert {record["meta"]["problem"] for record in train} - {None} == set(knowledge.only(crops).problems)
    advice = [record["messages"] for record in train if record["meta"]["problem"]]
    assert 15 <= statistics.fmean(compose.words(m[1]["content"]) for m in advice) <= 40
    assert 25 <= statistics.fmean(compose.words(m[2]["thought"]) for m in advice) <= 55
    assert 50 <= statistics.fmean(compose.words(m[2]["content"]) for m in advice) <= 85


def test_clarifying_answers_are_one_question(splits: dict[str, list[Record]]) -> None:
    records = [r for records in splits.values() for r in records if r["meta"]["kind"] == "clarify"]
    assert records
    for record in records:
        answer = record["messages"][2]["content"]
        assert answer.count("?") == 1
        assert answer.endswith("?")


def test_committed_files_are_what_the_command_writes(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/prepare_data.py", "--config", "configs/tiny/dialogues.yaml"]
    command += ["--out_dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for split in SPLITS:
        written = (tmp_path / f"{split}.jsonl").read_bytes()
        assert written == (ROOT / f"data/dialogues/{split}.jsonl").read_bytes(), (
            f"data/dialogues/{split}.jsonl is stale: run scripts/prepare_data.py with its config"
        )


def test_seed_and_size_change_the_records(knowledge: Knowledge) -> None:
    first, again = (build_splits(knowledge, size=400, seed=1) for _ in range(2))
    other = build_splits(knowledge, size=400, seed=2)
    assert first == again
    assert first["train"] != other["train"]
    assert len(first["train"]) == 400
    assert len(first["val"]) == len(first["test"]) == 40


def test_wrong_arguments_are_one_line(tmp_path: Path) -> None:
    for arguments, message in ((["--size", "10"], "too small"), (["--knowledge_dir", str(tmp_path)], "no crop file")):
        command = [sys.executable, "scripts/prepare_data.py", "--out_dir", str(tmp_path / "out"), *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("question", "lines"),
    [
        ("गेहूं के पत्तों पर पीले धब्बे हैं, फसल 60 दिन की है", ["फसल: गेहूं, 60 दिन, गांठ बनना", "मौसम: पता नहीं", "मिट्टी: पता नहीं"]),
        ("गेहूं की फसल ६० दिन की है", ["फसल: गेहूं, 60 दिन, गांठ बनना", "मौसम: पता नहीं", "मिट्टी: पता नहीं"]),
        ("Meri gehu ki fasal 60 din ki hai", ["फसल: गेहूं, 60 दिन, गांठ बनना", "मौसम: पता नहीं", "मिट्टी: पता नहीं"]),
        ("धान में धब्बे हैं", ["फसल: धान, उम्र पता नहीं", "मौसम: पता नहीं", "मिट्टी: पता नहीं"]),
        ("पत्ते पीले हैं, 60 दिन हुए", []),
        ("गेहूं पीला है\nफसल: गेहूं, 10 दिन", ["फसल: गेहूं, 10 दिन"]),
    ],
)  # fmt: skip
def test_what_a_question_says_of_the_case(knowledge: Knowledge, question: str, lines: list[str]) -> None:
    assert with_case_lines(question, knowledge).splitlines()[1:] == lines


@pytest.mark.parametrize(
    ("question", "first"),
    [
        ("गेहूं के पत्ते 3 दिन से पीले हैं", "फसल: गेहूं, उम्र पता नहीं"),
        ("गेहूं में 5 दिन पहले पानी दिया, फसल 60 दिन की है", "फसल: गेहूं, 60 दिन, गांठ बनना"),
        ("धान में 500 gram यूरिया डाला, फसल ४५ दिन की", "फसल: धान, 45 दिन, कल्ले फूटना"),
        ("एक गेहूं 30 दिन का है और एक 60 दिन का", "फसल: गेहूं, उम्र पता नहीं"),
    ],
)
def test_what_is_no_age_is_not_taken_for_one(knowledge: Knowledge, question: str, first: str) -> None:
    assert with_case_lines(question, knowledge).splitlines()[1] == first
