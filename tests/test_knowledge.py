"""The crop facts: the shipped files hold, and each kind of fault is found on its line."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from advisory.check import check_files, check_folder, page, problem_texts
from advisory.knowledge import DOSE, Knowledge, clean, load_knowledge, read_crop_file
from advisory.pesticides import PesticideList
from advisory.yamlfile import YamlFile
from litgpt.utils import UserError
from tests.small_crop import SMALL_CROP, line_of

ROOT = Path(__file__).parents[1]
KNOWLEDGE_DIR = ROOT / "data" / "knowledge"


@pytest.fixture(scope="module")
def knowledge() -> Knowledge:
    return load_knowledge(KNOWLEDGE_DIR)


@pytest.fixture(scope="module")
def pesticides() -> PesticideList:
    return PesticideList.load(KNOWLEDGE_DIR)


def test_shipped_knowledge_is_broad_enough(knowledge: Knowledge) -> None:
    assert len(knowledge.crops) >= 22
    assert len(knowledge.problems) >= 190
    for crop in knowledge.crops.values():
        assert len(knowledge.of_crop(crop.id)) >= 7, crop.id
    kinds = {problem.kind for problem in knowledge.problems.values()}
    assert kinds == {
        "fungal", "bacterial", "viral", "insect", "mite", "nematode", "nutrient", "water", "weed", "abiotic"
    }  # fmt: skip
    lacking = {
        flag for problem in knowledge.problems.values() if problem.kind == "nutrient" for flag in problem.soil_links
    }
    assert {"low_n", "low_p", "low_k", "low_s", "low_zn", "low_fe", "low_mn", "low_b"} <= lacking
    assert sum(len(problem.chemicals) for problem in knowledge.problems.values()) >= 100


def test_shipped_knowledge_has_no_fault(pesticides: PesticideList) -> None:
    checked = check_folder(KNOWLEDGE_DIR, pesticides)
    assert not checked.faults, "\n".join(map(str, checked.faults))


def test_the_page_of_counts_is_the_one_in_the_repository(knowledge: Knowledge, pesticides: PesticideList) -> None:
    made = page(knowledge, pesticides)
    assert made == (ROOT / "docs" / "knowledge.md").read_text(encoding="utf-8"), (
        "run python scripts/check_knowledge.py --page_path docs/knowledge.md"
    )


def test_advice_names_no_dose_and_no_banned_chemical(knowledge: Knowledge, pesticides: PesticideList) -> None:
    for problem in knowledge.problems.values():
        for _, text in problem_texts(problem):
            assert not DOSE.search(text), (problem.id, text)
            assert all(mention.is_active for mention in pesticides.find(text)), (problem.id, text)


def test_first_aid_and_numbers_have_a_source(knowledge: Knowledge) -> None:
    assert all(topic.sources for topic in knowledge.safety if re.search(r"[0-9]|अस्पताल", topic.answer_hi))
    assert {"ppe", "waiting_period", "poisoning", "kcc"} <= set(knowledge.lines)


@pytest.mark.parametrize(
    "text", ["2 ग्राम प्रति लीटर", "५ मिली", "10 kg", "0.2% घोल", "दवा 20 EC डालें", "1.5 लीटर", "2-3 gm", "एक बार 250 ml"]
)
def test_dose_pattern_finds_doses(text: str) -> None:
    assert DOSE.search(text)


@pytest.mark.parametrize("text", ["60 दिन", "अगले 24 घंटे", "1800-180-1551", "एक-दो दिन में", "15 मिनट तक", "2 कदम"])
def test_dose_pattern_leaves_other_numbers(text: str) -> None:
    assert not DOSE.search(text)


@pytest.mark.parametrize(
    ("text", "crop"),
    [
        ("मेरी गेहूँ की फसल", "wheat"),
        ("gehu me daag", "wheat"),
        ("धान के पत्ते", "rice"),
        ("आलू में", "potato"),
        ("मौसम कैसा है", None),
        ("आम के पेड़ पर बौर काला हो रहा है", "mango"),
        ("आम तौर पर पानी कब देते हैं", None),
        ("500 gram डाला", None),
        ("500gram डाला", None),
        ("gram me keede lage hain", "chickpea"),
        ("sweet potato me daag", None),
        ("horse gram ki patti", None),
        ("सरसों का तेल छिड़का", None),
        ("सरसों का तेल गेहूं में डाला", "wheat"),
        ("मिर्ची में और प्याज\u093c में", "chilli"),
    ],
)
def test_crop_is_found_by_its_names(knowledge: Knowledge, text: str, crop: str | None) -> None:
    found = knowledge.crop_named(text)
    assert (found.id if found else None) == crop


def test_problems_are_found_in_the_order_in_which_they_are_named(knowledge: Knowledge) -> None:
    text = "यह शायद पीला रतुआ है, थोड़ा शक नाइट्रोजन की कमी का भी है। Yellow rust."
    assert knowledge.problems_named(text, "wheat") == ("wheat_yellow_rust", "wheat_nitrogen_deficiency")
    assert knowledge.problems_named(text, "cotton") == ("cotton_nitrogen_deficiency",)
    assert knowledge.problems_named("पानी दें", "wheat") == ()


def test_every_name_finds_its_own_problem(knowledge: Knowledge) -> None:
    for problem in knowledge.problems.values():
        for name in problem.names.all:
            assert knowledge.problems_named(f"यह {name} है", problem.crop_id) == (problem.id,), (problem.id, name)


def test_a_part_of_the_crops(knowledge: Knowledge) -> None:
    part = knowledge.only(["wheat", "okra"])
    assert set(part.crops) == {"wheat", "okra"} and part.safety == knowledge.safety
    assert {problem.crop_id for problem in part.problems.values()} == {"wheat", "okra"}
    with pytest.raises(UserError, match="no crop barley; there are banana, "):
        knowledge.only(["wheat", "barley"])


def test_stage_follows_age(knowledge: Knowledge) -> None:
    wheat = knowledge.crops["wheat"]
    assert all(wheat.stage(day) is not None for day in range(wheat.last_day + 1))
    assert wheat.stage(wheat.last_day + 1) is None
    assert wheat.stage(-1) is None


def test_the_small_file_is_right(tmp_path: Path, pesticides: PesticideList) -> None:
    path = tmp_path / "wheat.yaml"
    path.write_text(SMALL_CROP, encoding="utf-8")
    assert check_files([path], pesticides).faults == ()
    assert set(load_knowledge(tmp_path).problems) == {"wheat_rust", "wheat_nitrogen"}


# (what is replaced, by what, the text on the line where the fault is seen, the fault)
BROKEN = [
    (
        "    kind: fungal\n",
        "    kind: magic\n",
        "kind: fungal",
        r"wheat_rust: kind: Input should be 'fungal'.*found 'magic'",
    ),
    (
        "    kind: fungal\n",
        "    kind: fungal\n    colour: blue\n",
        "parts: [leaf]\n    days: [40",
        "colour: unknown key",
    ),
    ("    signs_hi: धारियों में पीला चूर्ण\n", "", "id: wheat_rust", "wheat_rust: signs_hi: is missing"),
    (
        "sources: {signs: [a], days: [a], weather: [a], measures: [b]}",
        "sources: {signs: [a], days: [a], measures: [b]}",
        "sources: {signs: [a], days: [a], weather",
        "weather must have sources or stand in inferred",
    ),
    ("inferred: [checks]", "inferred: []", "sources: {signs: [a], days: [a], weather", "checks must have sources"),
    (
        "inferred: [checks]",
        "inferred: [checks, days]",
        "sources: {signs: [a], days: [a], weather",
        "days must have .* not both",
    ),
    (
        "inferred: [checks]",
        "inferred: [checks, soil]",
        "sources: {signs: [a], days: [a], weather",
        "claims nothing of it",
    ),
    (
        "measures: [b]}",
        "measures: [nowhere]}",
        "sources: {signs: [a], days: [a], weather",
        "source 'nowhere' is not in",
    ),
    (
        "id: wheat_nitrogen, check_hi",
        "id: wheat_dragon, check_hi",
        "id: wheat_nitrogen, check_hi",
        "unknown look-alike 'wheat_dragon'",
    ),
    (
        "id: wheat_nitrogen, check_hi",
        "id: wheat_rust, check_hi",
        "id: wheat_nitrogen, check_hi",
        "unknown look-alike 'wheat_rust'",
    ),
    (
        "      - पत्तियों पर पीली लकीरें बन गई हैं\n",
        "",
        "symptoms_hi:\n      - पत्तों",
        "symptoms_hi: .*at least 5",
    ),
    ("पत्तों पर हल्दी जैसा चूर्ण है", "पीला रतुआ लगा है", "पत्तों पर हल्दी", "names the problem"),
    ("पूरी फसल फीकी है", "पत्तों पर पीले रंग की धारियां हैं।", None, None),  # told apart by the check: no fault
    ("days: [40, 110]", "days: [40, 400]", "days: [40, 110]", "window 40 to 400 lies outside the crop's days 0 to 130"),
    ("days: [40, 110]", "days: [90, 40]", "days: [40, 110]", "window 90 to 40"),
    ("days: [40, 110]", "days: [40, many]", "days: [40, 110]", "days: .*valid integer"),
    ("- यूरिया कम दें", "- यूरिया 20 किलो दें", "- यूरिया कम दें", "holds '20 किलो', which looks like a dose"),
    ("unit: ml, per: acre", "per: acre", "ai: propiconazole", "dose: unit: is missing"),
    ("unit: ml, per: acre", "unit: ml", "ai: propiconazole", "need `per`"),
    ("unit: ml, per: acre", "unit: cup, per: acre", "ai: propiconazole", "unit: Input should be 'g'"),
    ("amount: 200", "amount: -3", "ai: propiconazole", "greater than 0"),
    ("amount: 200", "amount: .nan", "ai: propiconazole", "finite number"),
    ("ai: propiconazole, name_hi", "ai: endosulfan, name_hi", "ai: propiconazole", "endosulfan is recommended: "),
    ("ai: propiconazole, name_hi", "ai: moonstone, name_hi", "ai: propiconazole", "moonstone is on no list"),
    (
        "name_hi: प्रोपिकोनाजोल",
        "name_hi: एंडोसल्फान",
        "ai: prop",
        "name_hi: 'एंडोसल्फान' is endosulfan, but ai is propiconazole",
    ),
    ("name_hi: प्रोपिकोनाजोल", "name_hi: मैंकोजेब", "ai: prop", "'मैंकोजेब' is mancozeb, but ai is propiconazole"),
    ("name_hi: प्रोपिकोनाजोल", "name_hi: दवाई", "ai: prop", "'दवाई' is nothing on the list"),
    ("formulation: 25 EC", "formulation: 99 कुछ भी", "ai: prop", "formulation: '99 कुछ भी' is no formulation like 25 EC"),
    ("formulation: 25 EC", "formulation: 25 XX", "ai: prop", "'25 XX' is no formulation"),
    ("formulation: 25 EC", 'formulation: "12.6% + 9.5% ZC"', None, None),
    ("formulation: 25 EC", "formulation: FeSO4.7H2O", None, None),
    ("formulation: 25 EC", "formulation: DDT", "ai: prop", "'DDT' names DDT, which is banned"),
    ("सिफारिश की हुई दवा कृषि", "एंडोसल्फान या दवा कृषि", "chemical_hi", "names एंडोसल्फान"),
    ("from_day: 21", "from_day: 25", "id: ripening", "days 25 to 130; it must start on day 21"),
    ("  id: wheat\n", "  id: barley\n", "  id: wheat\n  names", "is 'barley' but the file is wheat.yaml"),
    ("- id: wheat_rust\n", "- id: rice_rust\n", "id: wheat_rust\n", "must start with wheat_"),
    ("- id: wheat_nitrogen\n", "- id: wheat_rust\n", "id: wheat_nitrogen\n", "the id stands twice"),
    (
        "hi: [नाइट्रोजन की कमी]",
        "hi: [पिला रतुआ]",
        "hi: [नाइट्रोजन की कमी]",
        "the name 'पिला रतुआ' stands in wheat_rust too",
    ),
    ('"https://a.example/one"', '"somewhere"', "a: {title", "a web address is needed"),
    ("read: excerpt", "read: dreamt", "b: {title", "read: Input should be 'page'"),
    ("publisher: A, year: 2020", "year: 2020", "a: {title", "publisher: is missing"),
    ("measures: [b]}", "measures: [a]}", None, None),
    ("from: 11-01", "from: 13-01", "where_hi", "month and a day"),
    ("    urgency: high\n", "    urgency: high\n    urgency: low\n", "urgency: high", "the key stands twice"),
    ("misspelt: [पिला रतुआ]", "misspelt: []", "पिला रतुआ", "misspelt: .*at least 1"),
]


@pytest.mark.parametrize(("old", "new", "place", "message"), BROKEN)
def test_each_fault_is_found_on_its_line(
    tmp_path: Path, pesticides: PesticideList, old: str, new: str, place: str | None, message: str | None
) -> None:
    assert SMALL_CROP.count(old) == 1
    path = tmp_path / "wheat.yaml"
    path.write_text(SMALL_CROP.replace(old, new), encoding="utf-8")
    faults = [str(fault) for fault in check_files([path], pesticides).faults]
    if place is None or message is None:
        assert faults == []
        return
    line = SMALL_CROP[: SMALL_CROP.index(place)].count("\n") + 1
    assert any(re.match(rf"{re.escape(str(path))}:{line}: .*{message}", fault) for fault in faults), (line, faults)


def test_a_shared_symptom_needs_a_check(tmp_path: Path, pesticides: PesticideList) -> None:
    text = SMALL_CROP.replace("पूरी फसल फीकी है", "पत्तों पर पीले रंग की धारियां दिखती हैं")
    unlinked = text.replace(
        '      - {id: wheat_nitrogen, check_hi: "रगड़ें, चूर्ण लगे तो रतुआ है", check_en: rub the leaf}\n', ""
    )
    unlinked = unlinked.replace("    look_alikes:\n    cultural", "    look_alikes: []\n    cultural").replace(
        "inferred: [checks]", "inferred: []"
    )
    path = tmp_path / "wheat.yaml"
    path.write_text(text, encoding="utf-8")
    assert check_files([path], pesticides).faults == ()
    path.write_text(unlinked, encoding="utf-8")
    (fault,) = check_files([path], pesticides).faults
    assert "no check tells the two apart" in fault.what and "wheat_rust" in fault.what
    assert unlinked.splitlines()[fault.line - 1].strip() == "- पत्तों पर पीले रंग की धारियां दिखती हैं"


# (file, what is replaced, by what, the fault)
BROKEN_RULES = [
    ("_weather.yaml", "action: spray,", "action: dance,", "action: Input should be 'spray'"),
    ("_weather.yaml", "say_hi: तेज हवा", "say_hi: फोरेट डालें, तेज हवा", "names फोरेट, which is banned"),
    ("_soil.yaml", "key: zn,", "key: gold,", "key: Input should be"),
    ("_safety.yaml", "answer_hi: |-\n", "answer_hi: |-\n      एंडोसल्फान डालें।\n", "names एंडोसल्फान, which is banned"),
    ("_safety.yaml", "id: pesticide_in_eye", "id: poisoned_person", "the id stands twice"),
    ("_safety.yaml", "sources: [pnw_poisoning,", "sources: [nowhere,", "source 'nowhere' is not in"),
    (
        "_safety.yaml",
        "\nsources:\n",
        "\nsources:\n  nobody: {title: T, publisher: P, year: 2020, url: 'https://a.example/b', read: page}\n",
        "nobody: nothing rests on this source",
    ),
]


@pytest.mark.parametrize(("name", "old", "new", "message"), BROKEN_RULES)
def test_the_files_of_rules_are_checked_too(
    tmp_path: Path, pesticides: PesticideList, name: str, old: str, new: str, message: str
) -> None:
    (tmp_path / "wheat.yaml").write_text(SMALL_CROP, encoding="utf-8")
    for rules in ("_weather.yaml", "_soil.yaml", "_safety.yaml"):
        shutil.copy(KNOWLEDGE_DIR / rules, tmp_path)
    assert check_folder(tmp_path, pesticides).faults == ()
    text = (tmp_path / name).read_text(encoding="utf-8")
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new, 1), encoding="utf-8")
    faults = [str(fault) for fault in check_folder(tmp_path, pesticides).faults]
    assert faults and all(re.match(rf"{re.escape(str(tmp_path / name))}:\d+: ", fault) for fault in faults), faults
    assert any(message in fault for fault in faults), faults


def test_a_file_of_rules_that_is_missing_is_a_fault(tmp_path: Path, pesticides: PesticideList) -> None:
    (tmp_path / "wheat.yaml").write_text(SMALL_CROP, encoding="utf-8")
    assert [fault.path.name for fault in check_folder(tmp_path, pesticides).faults] == ["_soil.yaml", "_weather.yaml"]


def test_faults_come_in_the_order_of_the_file(tmp_path: Path, pesticides: PesticideList) -> None:
    unused = "".join(
        f'  {key}: {{title: T, publisher: P, year: 2020, url: "https://a.example/{key}", read: page}}\n'
        for key in "cdefgh"
    )
    (tmp_path / "wheat.yaml").write_text(SMALL_CROP + unused, encoding="utf-8")
    lines = [fault.line for fault in check_files([tmp_path / "wheat.yaml"], pesticides).faults]
    assert len(lines) == 6 and lines == sorted(lines)


def test_files_that_cannot_be_read_are_refused_with_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no crop file"):
        load_knowledge(tmp_path)
    path = tmp_path / "wheat.yaml"
    path.write_text("crop:\n  id: [wheat", encoding="utf-8")
    with pytest.raises(UserError, match=r"wheat\.yaml:\d+: not valid YAML"):
        load_knowledge(tmp_path)
    path.write_bytes(b"crop:\n  id: \xff\xfe")
    with pytest.raises(UserError, match=r"wheat\.yaml:2: not UTF-8"):
        load_knowledge(tmp_path)
    for odd in ("crop: {year: 2026-02-31}", "crop: !!bool maybe", "crop: &a [*a]", "[" * 20_000):
        path.write_text(odd, encoding="utf-8")
        with pytest.raises(UserError, match=r"wheat\.yaml.*: not valid YAML") as refused:
            load_knowledge(tmp_path)
        assert "\n" not in str(refused.value)
    path.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"wheat\.yaml:1: "):
        load_knowledge(tmp_path)
    path.write_text(SMALL_CROP[: len(SMALL_CROP) // 2], encoding="utf-8")
    with pytest.raises(UserError, match=r"wheat\.yaml:\d+: "):
        load_knowledge(tmp_path)


def test_one_line_says_how_many_faults_there_are(tmp_path: Path) -> None:
    path = tmp_path / "wheat.yaml"
    path.write_text(
        SMALL_CROP.replace("kind: fungal", "kind: magic").replace("read: excerpt", "read: dreamt"), encoding="utf-8"
    )
    assert len(read_crop_file(YamlFile(path))[1]) == 2
    with pytest.raises(UserError, match=r"and 1 more: python scripts/check_knowledge.py") as refused:
        load_knowledge(tmp_path)
    assert "\n" not in str(refused.value)


def test_the_command_lists_every_fault_and_exits_with_2(tmp_path: Path) -> None:
    path = tmp_path / "wheat.yaml"
    path.write_text(
        SMALL_CROP.replace("kind: fungal", "kind: magic").replace("read: excerpt", "read: dreamt"), encoding="utf-8"
    )
    command = [
        sys.executable,
        "scripts/check_knowledge.py",
        "--files",
        str([str(path)]),
        "--knowledge_dir",
        str(KNOWLEDGE_DIR),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stdout.splitlines()) == 2
    assert f"{path}:{line_of('kind: fungal')}: " in done.stdout
    assert done.stderr.splitlines()[-1].endswith("2 faults in 1 files") and "Traceback" not in done.stderr


def test_texts_are_normalised() -> None:
    # U+095C and its NFC form are the same letter to a farmer, so they must be the same text to the code.
    assert clean("जड\u093c  सड\u093cन।") == clean("ज\u095c स\u095cन")
