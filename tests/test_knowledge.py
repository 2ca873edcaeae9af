"""The crop facts: the shipped files hold, and each kind of fault is refused with its file and problem named."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from advisory.case import SOIL_FLAG_HI, SOIL_READINGS, FarmCase
from advisory.knowledge import DOSE, SOIL_FLAGS, Knowledge, Problem, clean, load_knowledge
from litgpt.utils import UserError

KNOWLEDGE_DIR = Path(__file__).parents[1] / "data" / "knowledge"

# Active ingredients, brands and the banned list's names in both scripts: none may stand in advice.
CHEMICALS = """
    मैन्कोजेब मेन्कोजेब मैंकोजेब कार्बेन्डाजिम कार्बेंडाजिम प्रोपिकोनाजोल प्रोपीकोनाजोल टेबुकोनाजोल मेटालैक्सिल इमिडाक्लोप्रिड
    थायोमेथोक्साम थियामेथोक्साम एसिटामिप्रिड क्लोरपायरीफॉस क्लोरपाइरीफॉस डाइमेथोएट मैलाथियान मोनोक्रोटोफॉस क्विनालफॉस प्रोफेनोफॉस
    साइपरमेथ्रिन फिप्रोनिल स्पिनोसैड इंडोक्साकार्ब इमामेक्टिन क्लोरेन्ट्रानिलीप्रोल कार्बोफ्यूरान फोरेट एंडोसल्फान एंडोसल्फ़ान लिंडेन
    डाइक्लोरवास ट्राइजोफॉस कार्बारिल मेथोमिल डाइकोफॉल ग्लाइफोसेट पैराक्वाट स्ट्रेप्टोसाइक्लिन ब्लाइटॉक्स टिल्ट रिडोमिल कवच नुवान
    रोगर थिमेट फ्यूराडान
    mancozeb carbendazim propiconazole tebuconazole metalaxyl imidacloprid thiamethoxam acetamiprid chlorpyriphos
    chlorpyrifos dimethoate malathion monocrotophos quinalphos profenofos cypermethrin fipronil spinosad indoxacarb
    emamectin chlorantraniliprole carbofuran phorate endosulfan lindane dichlorvos triazophos carbaryl methomyl
    dicofol glyphosate paraquat streptocycline tricyclazole validamycin chlorothalonil hexaconazole azoxystrobin
    """
CHEMICAL_NAMES = frozenset(CHEMICALS.split())


def chemical_names(text: str) -> list[str]:
    """The chemical names that stand in a text as words."""
    return sorted(CHEMICAL_NAMES & set(re.split(r"[^\w\u0900-\u0963]+", text.lower())))


def advice(problem: Problem) -> list[str]:
    """Everything of a problem that a farmer may read."""
    checks = [look_alike.check_hi for look_alike in problem.look_alikes]
    fixed = [problem.signs_hi, problem.urgency_hi, problem.chemical_hi or ""]
    return [*problem.cultural_hi, *problem.biological_hi, *problem.prevention_hi, *checks, *fixed]


@pytest.fixture(scope="module")
def knowledge() -> Knowledge:
    return load_knowledge(KNOWLEDGE_DIR)


def test_shipped_knowledge_is_broad_enough(knowledge: Knowledge) -> None:
    assert len(knowledge.crops) >= 22
    assert len(knowledge.problems) >= 174
    for crop in knowledge.crops.values():
        assert len(knowledge.of_crop(crop.id)) >= 5, crop.id
    assert {"wheat_yellow_rust", "wheat_nitrogen_deficiency"} <= set(knowledge.problems)


def test_every_fact_has_a_source_with_an_address(knowledge: Knowledge) -> None:
    owners = [(crop.id, crop.sources) for crop in knowledge.crops.values()]
    owners += [(problem.id, problem.sources) for problem in knowledge.problems.values()]
    for name, sources in owners:
        assert sources, name
        for source in sources:
            assert re.fullmatch(r"https?://[^\s/]+\.[^\s]+", source.url), (name, source.url)
    # A refusal states no fact; whoever gives first aid or a number must say where it stands.
    assert all(topic.sources for topic in knowledge.safety if re.search(r"[0-9]|अस्पताल", topic.answer_hi))


def test_advice_names_no_chemical_and_no_dose(knowledge: Knowledge) -> None:
    for problem in knowledge.problems.values():
        for text in advice(problem):
            assert not chemical_names(text), (problem.id, text)
            assert not DOSE.search(text), (problem.id, text)
    for topic in knowledge.safety:
        assert not chemical_names(topic.answer_hi), topic.id


@pytest.mark.parametrize(
    "text", ["2 ग्राम प्रति लीटर", "५ मिली", "10 kg", "0.2% घोल", "दवा 20 EC डालें", "1.5 लीटर", "2-3 gm", "एक बार 250 ml"]
)
def test_dose_pattern_finds_doses(text: str) -> None:
    assert DOSE.search(text)


@pytest.mark.parametrize("text", ["60 दिन", "अगले 24 घंटे", "1800-180-1551", "एक-दो दिन में", "15 मिनट तक", "2 कदम"])
def test_dose_pattern_leaves_other_numbers(text: str) -> None:
    assert not DOSE.search(text)


def test_chemical_name_check_can_fail() -> None:
    assert chemical_names("मैन्कोजेब का छिड़काव करें") == ["मैन्कोजेब"]
    assert chemical_names("Spray Mancozeb.") == ["mancozeb"]


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
    ],
)
def test_crop_is_found_by_its_names(knowledge: Knowledge, text: str, crop: str | None) -> None:
    found = knowledge.crop_named(text)
    assert (found.id if found else None) == crop


def test_a_part_of_the_crops(knowledge: Knowledge) -> None:
    part = knowledge.only(["wheat", "okra"])
    assert set(part.crops) == {"wheat", "okra"} and part.safety == knowledge.safety
    assert {problem.crop_id for problem in part.problems.values()} == {"wheat", "okra"}
    with pytest.raises(UserError, match="no crop barley; there are banana, "):
        knowledge.only(["wheat", "barley"])


def test_stage_follows_age(knowledge: Knowledge) -> None:
    wheat = knowledge.crops["wheat"]
    days = [wheat.stage(day) for day in range(wheat.last_day + 1)]
    assert all(stage is not None for stage in days)
    assert wheat.stage(wheat.last_day + 1) is None
    assert wheat.stage(-1) is None


def _wheat() -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load((KNOWLEDGE_DIR / "wheat.yaml").read_text(encoding="utf-8"))
    return value


def _set(path: str, new: Any) -> Callable[[dict[str, Any]], None]:
    """Change one value, `path` like `problems.0.days`; `...` deletes it."""

    def change(data: Any) -> None:
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in parents:
            data = data[key]
        if new is ...:
            del data[last]
        else:
            data[last] = new

    return change


PROBLEM = r"wheat\.yaml: problem wheat_yellow_rust: "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("problems.0.colour", "yellow"), PROBLEM + r"unknown key 'colour'"),
        (_set("problems.0.signs_hi", ...), PROBLEM + r"signs_hi is missing"),
        (_set("problems.0.sources", []), PROBLEM + r"sources has 0 entries"),
        (_set("problems.0.sources", ["nowhere"]), PROBLEM + r"source 'nowhere' is not in the file's sources"),
        (_set("problems.0.look_alikes.0.id", "wheat_dragon"), PROBLEM + r"unknown look-alike 'wheat_dragon'"),
        (_set("problems.0.symptoms_hi", ["पत्ते पीले हैं"] * 4), PROBLEM + r"symptoms_hi (has 4 entries|repeats)"),
        (_set("problems.0.symptoms_hi", ["क", "ख", "ग", "घ"]), PROBLEM + r"symptoms_hi has 4 entries, at least 5"),
        (_set("problems.0.symptoms_hi.0", "पीला रतुआ लगा है"), PROBLEM + r"symptom .* names the problem"),
        (_set("problems.0.days", [40, 400]), PROBLEM + r"window 40 to 400 lies outside the crop's days 0 to 130"),
        (_set("problems.0.days", [90, 40]), PROBLEM + r"window 90 to 40"),
        (_set("problems.0.kind", "magic"), PROBLEM + r"kind is 'magic'; choose one of"),
        (_set("problems.0.parts", ["wing"]), PROBLEM + r"parts holds 'wing'"),
        (_set("problems.0.cultural_hi.0", "दवा 2 ग्राम डालें"), PROBLEM + r"cultural_hi holds '2 ग्राम', .* like a dose"),
        (_set("problems.0.chemical_hi", "200 ml छिड़कें"), PROBLEM + r"chemical_hi holds '200 ml'"),
        (_set("problems.0.urgency", "maybe"), PROBLEM + r"urgency is 'maybe'"),
        (_set("problems.0.favoured_by.weather", "cosy"), PROBLEM + r"favoured_by: weather is 'cosy'"),
        (_set("problems.0.id", "rust"), r"wheat\.yaml: problem rust: the id must start with wheat_"),
        (_set("problems.1.symptoms_hi.0", "पत्तों पर पीले धब्बे दिख रहे हैं"), r"symptom .* stands in wheat_yellow_rust too"),
        (_set("crop.stages.1.from_day", 25), r"wheat\.yaml: crop: stage 2: days 25 to 45; it must start on day 21"),
        (_set("crop.id", "barley"), r"wheat\.yaml: crop: id is 'barley' but the file is wheat\.yaml"),
        (_set("sources.times_rust.url", "somewhere"), r"wheat\.yaml: source times_rust: url is 'somewhere'"),
        (_set("sources.times_rust.read", "dreamt"), r"wheat\.yaml: source times_rust: read is 'dreamt'"),
    ],
)  # fmt: skip
def test_faults_are_refused_by_name(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    data = copy.deepcopy(_wheat())
    change(data)
    (tmp_path / "wheat.yaml").write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_knowledge(tmp_path)


def test_unchanged_copy_loads(tmp_path: Path) -> None:
    (tmp_path / "wheat.yaml").write_text(yaml.safe_dump(_wheat(), allow_unicode=True), encoding="utf-8")
    assert set(load_knowledge(tmp_path).crops) == {"wheat"}


def test_broken_yaml_and_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no crop file"):
        load_knowledge(tmp_path)
    (tmp_path / "wheat.yaml").write_text("crop: {id: wheat", encoding="utf-8")
    with pytest.raises(UserError, match=r"wheat\.yaml: not valid YAML"):
        load_knowledge(tmp_path)
    (tmp_path / "wheat.yaml").write_bytes(b"crop: \xff\xfe")
    with pytest.raises(UserError, match=r"wheat\.yaml: not UTF-8"):
        load_knowledge(tmp_path)


def test_texts_are_normalised() -> None:
    # U+095C and its NFC form are the same letter to a farmer, so they must be the same text to the code.
    assert clean("जड\u093c  सड\u093cन।") == clean("ज\u095c स\u095cन")


def test_case_says_what_is_unknown(knowledge: Knowledge) -> None:
    lines = FarmCase().render(None).splitlines()
    assert lines == ["फसल: पता नहीं, उम्र पता नहीं", "मौसम: पता नहीं", "मिट्टी: पता नहीं"]
    case = FarmCase(crop="wheat", age_days=60, weather="rain_soon", soil={"n": 180.0, "ph": 8.6})
    assert case.render(knowledge.crops["wheat"]).splitlines() == [
        "फसल: गेहूं, 60 दिन, गांठ बनना",
        "मौसम: अगले 24 घंटे में बारिश",
        "मिट्टी: पीएच ज्यादा, नाइट्रोजन कम",
    ]
    assert FarmCase(soil={"n": 320.0}).soil_hi() == "सामान्य"


def test_case_refuses_what_it_does_not_know() -> None:
    for wrong in ({"weather": "snow"}, {"age_days": -3}, {"soil": {"gold": 1.0}}, {"soil": {"texture": "cheese"}}):
        with pytest.raises(UserError):
            FarmCase(**wrong)


def test_soil_flags_have_words_and_exist() -> None:
    rated = {flag for reading in SOIL_READINGS.values() for flag in (reading.low_flag, reading.high_flag) if flag}
    assert rated <= SOIL_FLAGS
    assert set(SOIL_FLAG_HI) == SOIL_FLAGS
