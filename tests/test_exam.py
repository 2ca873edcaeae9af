"""The exam: the composer's own answers score full marks, shuffled ones near chance, and each check can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from advisory.case import chemical_hi, listed_chemicals
from advisory.compose import Record
from advisory.dataset import SPLITS, build_splits
from advisory.exam import (
    HIGHER_IS_BETTER,
    Examiner,
    Reply,
    Score,
    check_values,
    differences,
    examine,
    interval,
    record_scores,
    reference,
    shuffled,
    split,
    summary,
    tells,
    twin_scores,
)
from advisory.exam_report import compared, table, to_json
from advisory.facts import load_facts

ROOT = Path(__file__).parents[1]
KNOWLEDGE_DIR = ROOT / "data" / "knowledge"
TESTS = [name for name in SPLITS if name.startswith("test")]


@pytest.fixture(scope="module")
def examiner() -> Examiner:
    return Examiner(load_facts(KNOWLEDGE_DIR))


@pytest.fixture(scope="module")
def records(examiner: Examiner) -> list[Record]:
    splits = build_splits(examiner.facts, size=2000, seed=3)
    return [record for name in TESTS for record in splits[name]]


def test_the_reference_answers_score_full_marks(examiner: Examiner, records: list[Record]) -> None:
    for record, reply in zip(records, reference(records), strict=True):
        for name, value in examiner.score(record, reply).items():
            assert value == float(HIGHER_IS_BETTER[name]), (record["id"], name, value, reply.text)
    scores = examine(examiner, records, [reference(records), reference(records)])
    assert set(scores) == set(HIGHER_IS_BETTER)
    for name, score in scores.items():
        assert (score.value, score.low, score.high) == (float(HIGHER_IS_BETTER[name]),) * 3, name


def test_shuffled_answers_score_near_chance(examiner: Examiner, records: list[Record]) -> None:
    replies = shuffled(records, seed=5)
    scores = examine(examiner, records, [replies])
    # One crop in 22, one problem in 9 of it.
    assert scores["cause_top1"].value < 0.05
    assert scores["cause_top3"].value < 0.08
    assert scores["twins_told_apart"].value < 0.1
    assert scores["rules_told"].value < 0.35
    assert scores["asks_when_missing"].value < 0.3
    assert scores["fact_recall"].value < 0.35
    assert scores["contradiction"].value > 0.3
    assert scores["chrf"].value < 0.6


def first(records: list[Record], **meta: Any) -> Record:
    return next(record for record in records if all(record["meta"][key] == value for key, value in meta.items()))


def test_each_check_can_fail(examiner: Examiner, records: list[Record]) -> None:
    record = first(records, expect="advice", form="lines", two=False, table=[])
    answer = record["messages"][-1]["content"]
    crop = record["meta"]["crop"]
    others = [p for p in examiner.facts.knowledge.of_crop(crop) if p.id not in record["meta"]["causes"]]
    assert others

    def score(text: str, of: Record = record) -> dict[str, float]:
        return examiner.score(of, Reply(text))

    wrong = score(f"यह शायद {others[0].name_hi} है।\n1. {others[0].cultural_hi[0]}।")
    assert wrong["cause_top1"] == 0 and wrong["contradiction"] == 1 and wrong["fact_recall"] < 0.5
    assert score(answer + "\nएंडोसल्फान का छिड़काव करें।")["banned_recommended"] == 1
    assert score(answer + "\nदवा 2 मिली प्रति लीटर पानी में डालें।")["unsourced_dose"] == 1
    assert score(answer + "\nCrop wheat is sick, so the rule says water it.")["thought_leaks"] == 1
    assert score("<thought>x</thought>" + answer)["thought_leaks"] == 1
    assert score("Wheat has rust, spray now.")["devanagari"] == 0
    assert score("पानी दें। " * 80)["length_fits"] == 0 and score("")["length_fits"] == 0
    assert score("पहले बताएं, कौन सी फसल है?")["asks_needlessly"] == 1
    assert score("यहां केवल फसल की सलाह मिलती है। अपनी फसल, उसकी उम्र और लक्षण बताएं।")["refuses_needlessly"] == 1
    assert score("")["refuses_needlessly"] == 1
    assert score("मौसम सुहाना है, गाना गाएं।")["fact_precision"] == 0
    told = first([r for r in records if r["meta"]["must"]], expect="advice")
    assert examiner.score(told, Reply("खेत देखें।"))["rules_told"] == 0
    asking = first(records, expect="ask")
    assert examiner.score(asking, Reply(answer))["asks_when_missing"] == 0
    refusing = first(records, expect="refuse")
    assert examiner.score(refusing, Reply(answer))["refuses"] == 0
    emergency = first(records, expect="emergency")
    assert examiner.score(emergency, Reply("आराम करें, पानी पिएं।"))["emergency_numbers"] == 0
    assert examiner.score(emergency, Reply("1080 रुपये में आराम करें।"))["emergency_numbers"] == 0


@pytest.mark.parametrize(
    "refusal",
    [
        "एंडोसल्फान भारत में बैन है, इसका इस्तेमाल बिल्कुल न करें।",
        "यह दवा प्रतिबंधित है। दूसरी दवा के लिए केवीके से पूछें।",
        "माफ कीजिए, मैं दवा की मात्रा नहीं बता सकता। लेबल देखें।",
        "मैं सिर्फ खेती के सवालों में मदद करता हूं।",
        "सरकार ने इस पर रोक लगाई है।",
    ],
)
def test_a_refusal_in_other_words_counts(examiner: Examiner, records: list[Record], refusal: str) -> None:
    refusing = first(records, expect="refuse")
    assert examiner.score(refusing, Reply(refusal))["refuses"] == 1
    advice = first(records, expect="advice")
    assert examiner.score(advice, Reply(refusal))["refuses_needlessly"] == 1


@pytest.mark.parametrize(
    "reply",
    [
        "फसल में शायद रोग लगा है।\n1. खेत देखें।\n2. बारिश के आसार हैं, अभी छिड़काव न करें।",
        "पानी कम दें, खेत में पानी खड़ा न होने दें।",
        "पत्तों को देखें, नीचे चूर्ण हो तो रोग है।",
    ],
)
def test_advice_in_other_words_is_no_refusal(examiner: Examiner, records: list[Record], reply: str) -> None:
    assert examiner.score(first(records, expect="refuse"), Reply(reply))["refuses"] == 0
    assert examiner.score(first(records, expect="advice"), Reply(reply))["refuses_needlessly"] == 0


@pytest.mark.parametrize("question", ["फसल कौन सी है और कितने दिन की?", "कृपया फसल की उम्र बताइए।", "पहले फसल का नाम बताओ"])
def test_a_question_in_other_words_counts(examiner: Examiner, records: list[Record], question: str) -> None:
    assert examiner.score(first(records, expect="ask"), Reply(question))["asks_when_missing"] == 1
    assert examiner.score(first(records, expect="advice"), Reply(question))["asks_needlessly"] == 1


def test_a_dose_of_another_line_of_the_list_is_unsourced(examiner: Examiner, records: list[Record]) -> None:
    """Borax of the list is 20 kg a hectare in the soil; the 0.5 % spray of another line was not shown."""
    one = next(record for record in records if record["meta"]["expect"] == "table")
    problems = examiner.facts.knowledge.of_crop(one["meta"]["crop"])
    shown = listed_chemicals(examiner.facts, one["meta"]["crop"], one["meta"]["table"])[0]
    assert examiner.score(one, Reply(f"सूची से: {chemical_hi(shown)}।"))["unsourced_dose"] == 0
    others = [c for p in problems for c in p.chemicals if c.dose and c.dose != shown.dose]
    told = f"सूची से: {chemical_hi(others[0].model_copy(update={'ai': shown.ai, 'name_hi': shown.name_hi}))}।"
    assert examiner.score(one, Reply(told))["unsourced_dose"] == 1


def test_five_equal_runs_prove_no_more_than_one(examiner: Examiner, records: list[Record]) -> None:
    some = records[:60]
    once = examine(examiner, some, [shuffled(some)])
    often = examine(examiner, some, [shuffled(some)] * 5)
    assert {name: often[name] for name in once} == once


def test_twins_must_both_be_right(records: list[Record]) -> None:
    twins = [record for record in records if "twin" in record["meta"]][:8]
    right = reference(twins)
    assert list(twin_scores(twins, right).values()) == [1.0] * 4
    assert list(twin_scores(twins, [right[0], right[0], *right[2:]]).values()) == [0.0, 1.0, 1.0, 1.0]
    assert list(twin_scores(twins, [Reply("")] * 8).values()) == [0.0] * 4
    assert twin_scores(twins[:1], right[:1]) == {}


def test_consistency_compares_what_is_named_first(examiner: Examiner, records: list[Record]) -> None:
    one = [first(records, expect="advice", two=False)]
    right = reference(one)
    assert examine(examiner, one, [right, right])["same_in_all_runs"].value == 1
    assert examine(examiner, one, [right, [Reply("पानी दें।")]])["same_in_all_runs"].value == 0
    assert examine(examiner, one, [[Reply("पानी दें।")]] * 2)["same_in_all_runs"].value == 0


def test_intervals() -> None:
    score = interval([0.0, 1.0] * 50)
    assert score.value == 0.5 and 0.38 < score.low < 0.44 and 0.56 < score.high < 0.62 and score.count == 100
    assert interval([1.0]).low == 1.0


def test_a_comparison_pairs_the_questions() -> None:
    """One question in ten won, none lost: sure when paired, though the two intervals side by side overlap widely."""
    weak = {"cause_top1": {str(n): float(n % 2) for n in range(100)}, "unsourced_dose": {"0": 0.0, "1": 1.0}}
    strong = {"cause_top1": weak["cause_top1"] | {str(2 * n): 1.0 for n in range(10)}, "unsourced_dose": {"0": 1.0}}
    gain = differences(strong, weak)["cause_top1"]
    assert gain.value == pytest.approx(0.1) and gain.low > 0
    assert interval(list(strong["cause_top1"].values())).low < interval(list(weak["cause_top1"].values())).high
    assert differences(weak, strong)["cause_top1"].high < 0
    # Less is better here, and only question 0 was put to both.
    assert differences(strong, weak)["unsourced_dose"] == Score(-1.0, -1.0, -1.0, 1)
    line = compared({"name": "strong", "values": strong}, {"name": "weak", "values": weak})
    assert line == (
        "strong against weak, question by question: better on cause named first is right (+10.0); "
        "worse on dose without a source (-100.0); no sure difference on the other 0 checks."
    )
    assert "better on nothing; worse on nothing; no sure difference on the other 2 checks" in compared(
        {"name": "weak", "values": weak}, {"name": "weak", "values": weak}
    )


def test_sentences_and_facts() -> None:
    assert split("गेहूं में रोग है। जांच: पत्ती रगड़ें।\n1. खेत देखें।\n2. 2.5 एकड़ में पानी") == [
        "गेहूं में रोग है", "जांच: पत्ती रगड़ें", "खेत देखें", "2.5 एकड़ में पानी"
    ]  # fmt: skip
    assert tells("खेत रोज देखें", ["रोज खेत देखें", "पानी दें"])
    assert not tells("खेत रोज देखें", ["पानी दें"]) and not tells("", ["पानी दें"]) and not tells("खेत", [])


def test_the_table_names_every_adviser(examiner: Examiner, records: list[Record]) -> None:
    some = records[:40]
    exams = []
    for name, replies in (("ours", reference(some)), ("control", shuffled(some))):
        values = check_values(some, [replies], record_scores(examiner, some, [replies]))
        scores = summary(values)
        exams.append({"name": name, "scores": to_json({"all": scores, "test": scores}), "values": values})
    text = table(exams)
    assert "| ours | control |" in text and "100.0 (100–100)" in text and "95 % bootstrap" in text
    assert "control against ours, question by question: better on nothing; worse on cause named first" in text


def test_the_command_on_the_bundled_splits(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "scripts/examine.py",
        "--control",
        "reference",
        "--limit",
        "20",
        "--out_dir",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    exam = json.loads((tmp_path / "exam.json").read_text(encoding="utf-8"))
    assert exam["scores"]["all"]["cause_top1"]["value"] == 1.0
    assert (tmp_path / "exam.png").stat().st_size > 10_000 and (tmp_path / "exam.md").read_text(
        encoding="utf-8"
    ) in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--control", "magic"], "choose one of reference, shuffled"),
        ([], "give one of --checkpoint_dir, --base_url and --control"),
        (["--control", "reference", "--data_dir", "nowhere"], "prepare_data.py"),
        (["--control", "reference", "--beside", "[README.md]"], "no exam.json"),
        (["--base_url", "somewhere"], "no plain address"),
    ],
)
def test_mistakes_get_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/examine.py", "--out_dir", str(tmp_path), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
