"""Advice: every sentence traceable to a field or a rule, and moved by age, soil, weather and history."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from advisory import advice, guard
from advisory.advice import MAX_WORDS, answer_hi, derive, thought_en, thought_hi, words
from advisory.case import Applied, FarmCase, age_in, chemical_hi, oblique, with_case_lines
from advisory.exam import split
from advisory.facts import Facts, load_facts
from advisory.knowledge import Problem
from advisory.soil import SOIL_FLAG_HI, SoilCard
from advisory.weather import WeatherReport
from litgpt.utils import UserError

KNOWLEDGE_DIR = Path(__file__).parents[1] / "data" / "knowledge"
POOR_CARD = SoilCard.from_mapping({"n": 150, "zn": 0.3, "s": 5, "b": 0.2, "ph": 8.8, "texture": "sandy"})
WEATHERS = ("rain_soon", "heavy_rain", "windy", "hot", "cool_humid", "warm_humid", "dry", "frost", "clear")


@pytest.fixture(scope="module")
def facts() -> Facts:
    return load_facts(KNOWLEDGE_DIR)


def cases_of(problem: Problem, facts: Facts) -> Iterator[FarmCase]:
    crop = facts.knowledge.crops[problem.crop_id]
    for symptom in (problem.symptoms_hi[0], problem.symptoms_hi[-1]):
        for age in (None, problem.days[0], 0, crop.last_day):
            for weather in (WeatherReport(), WeatherReport.manual("rain_soon"), WeatherReport.manual("clear", "windy")):
                for soil in (None, POOR_CARD):
                    yield FarmCase(crop=crop.id, age_days=age, symptoms=(symptom,), soil=soil, weather=weather)
        table = tuple(chemical for chemical in problem.chemicals if chemical.dose)
        clear = WeatherReport.manual("clear")
        yield FarmCase(crop=crop.id, age_days=problem.days[0], symptoms=(symptom,), weather=clear, table=table)
        applied = (Applied("pesticide", 2), Applied("fertiliser", 3, "यूरिया"), Applied("irrigation", 1))
        yield FarmCase(crop=crop.id, age_days=problem.days[0], symptoms=(symptom,), applied=applied)


def sentences_of(problem: Problem) -> set[str]:
    """Every sentence that a problem's own fields allow, without its full stop."""
    checks = [look.check_hi for look in problem.look_alikes]
    pointers = [text for text in (problem.chemical_hi, problem.urgency_hi, problem.kvk_hi) if text]
    steps = [*problem.cultural_hi, *problem.biological_hi, *problem.prevention_hi]
    tables = [advice.TABLE_HI.format(chemical=chemical_hi(chemical)) for chemical in problem.chemicals]
    lines = [
        *steps, *pointers, *tables, *(advice.LATER_HI.format(step=step) for step in steps),
        *(advice.CHECK_HI.format(check=check) for check in checks), advice.SIGN_HI.format(signs=problem.signs_hi),
    ]  # fmt: skip
    return {sentence for line in lines for sentence in split(line)}


def test_every_sentence_is_a_field_or_a_rule(facts: Facts) -> None:
    rules = {rule.say_hi for rule in facts.weather.rules}
    rules |= {
        advice.HELPLINE_HI,
        advice.WEATHER_FAVOURS_HI,
        advice.SOIL_AGAINST_HI,
        advice.UNUSUAL_AGE_HI,
        advice.LATE_HI,
    }
    rules |= {advice.SOIL_SUPPORTS_HI.format(flag=flag) for flag in SOIL_FLAG_HI.values()}
    rules |= {
        advice.FERTILISED_HI.format(days=3),
        advice.SPRAYED_HI.format(days=2, kvk=advice.KVK_HI),
        advice.WATERED_HI.format(days=1),
    }
    fixed = {sentence for rule in rules for sentence in split(rule)}
    for problem in facts.knowledge.problems.values():
        for case in cases_of(problem, facts):
            said = derive(case, facts)
            if said.ask_hi:
                continue
            allowed = set(fixed)
            for cause in said.causes:
                allowed |= {*sentences_of(cause.problem), f"दूसरा शक: {cause.problem.name_hi}"}
            head, *rest = split(answer_hi(said, case, facts))
            assert said.causes[0].problem.name_hi in head and ("शायद" in head or "शक" in head)
            assert [sentence for sentence in rest if sentence not in allowed] == [], problem.id


def test_answers_are_short_numbered_and_within_the_table(facts: Facts) -> None:
    for problem in facts.knowledge.problems.values():
        for case in cases_of(problem, facts):
            said = derive(case, facts)
            text = answer_hi(said, case, facts)
            assert words(text) <= MAX_WORDS, (problem.id, words(text), text)
            if said.ask_hi:
                assert text.endswith("?")
                continue
            steps = re.findall(r"^(\d)\. ", text, flags=re.MULTILINE)
            assert steps == [str(number + 1) for number in range(len(steps))] and 2 <= len(steps) <= 4, text
            assert advice.HELPLINE_HI in text or advice.KVK_HI in text
            allowed = [dose for chemical in said.table for dose in guard.allowed(chemical)]
            found = guard.violations(text, crop_id=case.crop, allowed_doses=allowed, pesticides=facts.pesticides)
            assert not found, (problem.id, text, found)


def test_chemicals_come_last(facts: Facts) -> None:
    for problem in facts.knowledge.problems.values():
        case = FarmCase(crop=problem.crop_id, symptoms=problem.symptoms_hi[:1], age_days=problem.days[0])
        said = derive(case, facts)
        if said.ask_hi or said.causes[0].problem is not problem:
            continue
        steps = re.findall(r"^\d\. (.*)।$", answer_hi(said, case, facts), flags=re.MULTILINE)
        order = [*problem.cultural_hi, *problem.biological_hi, problem.chemical_hi]
        places = [order.index(step) for step in steps if step in order]
        assert places == sorted(places), problem.id


def test_each_known_phrasing_leads_to_its_problem(facts: Facts) -> None:
    for problem in facts.knowledge.problems.values():
        for symptom in problem.symptoms_hi:
            found = advice.owner(problem.crop_id, symptom, facts)
            assert found is not None
            # A phrasing that two problems share leads to one of them, and a check tells them apart.
            linked = {look.id for look in problem.look_alikes} | {problem.id}
            assert found.id in linked or problem.id in {look.id for look in found.look_alikes}, (problem.id, symptom)


def test_weather_rules_appear_and_vanish(facts: Facts) -> None:
    spoke = 0
    for problem in facts.knowledge.problems.values():
        case = FarmCase(
            crop=problem.crop_id, symptoms=problem.symptoms_hi[:1], age_days=(problem.days[0] + problem.days[1]) // 2
        )
        first = derive(case, facts)
        if first.ask_hi:
            continue
        for state in WEATHERS:
            rule = facts.weather.rule_for(advice.action_of(first.causes[0].problem), (state,))
            told = answer_hi(derive(stated := replace(case, weather=WeatherReport.manual(state)), facts), stated, facts)
            clear = replace(case, weather=WeatherReport.manual("clear"))
            without = answer_hi(derive(clear, facts), clear, facts)
            if rule is not None and derive(stated, facts).causes[0].problem is first.causes[0].problem:
                assert rule.say_hi in told, (problem.id, state)
                if state != "clear":
                    assert rule.say_hi not in without
                    spoke += 1
    assert spoke > len(facts.knowledge.problems)


def said(facts: Facts, **case: object) -> str:
    full = FarmCase(**case)  # type: ignore[arg-type]
    return answer_hi(derive(full, facts), full, facts)


def test_soil_age_and_history_change_the_advice(facts: Facts) -> None:
    problem = facts.knowledge.problems["wheat_nitrogen_deficiency"]
    base = {"crop": "wheat", "symptoms": problem.symptoms_hi[:1], "age_days": 40}
    supports = advice.SOIL_SUPPORTS_HI.format(flag="नाइट्रोजन कम")
    assert supports in said(facts, **base, soil=SoilCard.from_mapping({"n": 150}))
    normal = said(facts, **base, soil=SoilCard.from_mapping({"n": 350}))
    assert advice.SOIL_AGAINST_HI in normal and supports not in normal
    assert advice.SOIL_AGAINST_HI not in said(facts, **base)
    assert advice.UNUSUAL_AGE_HI in said(facts, **{**base, "age_days": 120})
    assert advice.UNUSUAL_AGE_HI not in said(facts, **base)
    fed = said(facts, **base, applied=(Applied("fertiliser", 4, "यूरिया"),))
    assert advice.FERTILISED_HI.format(days=4) in fed
    assert "4 दिन पहले" not in said(facts, **base, applied=(Applied("fertiliser", 40),))


def test_circumstances_can_turn_the_order_of_causes(facts: Facts) -> None:
    """A sign outweighs what surrounds it, unless soil and age together speak for the look-alike."""
    case = FarmCase(
        crop="wheat", symptoms=facts.knowledge.problems["wheat_nitrogen_deficiency"].symptoms_hi[:1], age_days=40
    )
    plain = [cause.problem.id for cause in derive(case, facts).causes]
    assert plain[0] == "wheat_nitrogen_deficiency" and "wheat_sulphur_deficiency" in plain
    card = SoilCard.from_mapping({"n": 400, "s": 4})
    turned = [cause.problem.id for cause in derive(replace(case, soil=card), facts).causes]
    assert turned[0] == "wheat_sulphur_deficiency"


def test_what_is_missing_is_asked_for(facts: Facts) -> None:
    symptom = facts.knowledge.problems["wheat_yellow_rust"].symptoms_hi[0]
    assert said(facts, symptoms=(symptom,)) == advice.ASK_CROP_HI
    assert said(facts, crop="wheat").startswith("पहले बताएं, गेहूं के किस भाग में")
    assert said(facts, crop="wheat", symptoms=("कुछ ठीक नहीं लगता जी",)).startswith("पहले बताएं, गेहूं में यह किस भाग")
    assert derive(FarmCase(crop="unicorn", symptoms=(symptom,)), facts).ask_hi == advice.ASK_CROP_HI


def test_two_problems_get_a_step_each(facts: Facts) -> None:
    rust, termite = (facts.knowledge.problems[f"wheat_{name}"] for name in ("yellow_rust", "termite"))
    case = FarmCase(crop="wheat", symptoms=(rust.symptoms_hi[1], termite.symptoms_hi[0]), age_days=60)
    text = answer_hi(derive(case, facts), case, facts)
    assert f"1. {rust.name_hi}: " in text and f"2. {termite.name_hi}: " in text and words(text) <= MAX_WORDS


def test_a_listed_dose_is_copied_and_held_back_before_rain(facts: Facts) -> None:
    sprays = [
        (problem, chemical)
        for problem in facts.knowledge.problems.values()
        for chemical in problem.chemicals
        if chemical.dose and chemical.use == "spray" and advice.action_of(problem) == "spray"
    ]
    assert len(sprays) >= 50
    for problem, chemical in sprays:
        age = problem.days[0]
        case = FarmCase(crop=problem.crop_id, symptoms=problem.symptoms_hi[:1], age_days=age, table=(chemical,))
        fine, rain = (replace(case, weather=WeatherReport.manual(state)) for state in ("clear", "rain_soon"))
        first = derive(fine, facts)
        late = age >= facts.knowledge.crops[problem.crop_id].stages[-1].from_day
        if first.ask_hi or first.causes[0].problem is not problem or late:
            continue
        if problem.kind == "weed":
            assert not first.table
            continue
        assert chemical_hi(chemical) in answer_hi(first, fine, facts), problem.id
        assert chemical_hi(chemical) not in answer_hi(derive(rain, facts), rain, facts), problem.id
    # A line of the list for another problem is not copied.
    case = FarmCase(
        crop="wheat",
        symptoms=facts.knowledge.problems["wheat_yellow_rust"].symptoms_hi[1:2],
        age_days=60,
        table=(sprays[-1][1],),
    )
    assert not derive(replace(case, crop="wheat"), facts).table


def test_the_thought_is_the_trace_of_rules(facts: Facts) -> None:
    case = FarmCase(
        crop="wheat", age_days=60, symptoms=facts.knowledge.problems["wheat_yellow_rust"].symptoms_hi[:1],
        weather=WeatherReport.manual("rain_soon"),
    )  # fmt: skip
    said_here = derive(case, facts)
    thought = thought_en(said_here, case, facts)
    assert thought.startswith("Crop wheat, 60 days (") and thought.isascii()
    assert all(f"{step.evidence} -> {step.conclusion}" in thought for step in said_here.steps)
    assert {step.rule.partition(":")[0] for step in said_here.steps} >= {"sign", "check", "weather"}
    hindi = thought_hi(said_here, case, facts)
    assert "पीला रतुआ" in hindi and not re.search("[A-Za-z]{4}", hindi)


def test_case_lines(facts: Facts) -> None:
    assert FarmCase().render(facts).splitlines() == ["फसल: पता नहीं, उम्र पता नहीं", "मौसम: पता नहीं", "मिट्टी: पता नहीं"]
    chemical = next(c for p in facts.knowledge.of_crop("wheat") for c in p.chemicals if c.dose)
    case = FarmCase(
        crop="wheat", variety="HD-2967", place="कानपुर", age_days=60, soil=SoilCard.from_mapping({"n": 180, "ph": 8.8}),
        weather=WeatherReport.manual("rain_soon"), applied=(Applied("fertiliser", 5, "यूरिया"),), table=(chemical,),
    )  # fmt: skip
    lines = case.render(facts).splitlines()
    assert lines[0] == "फसल: गेहूं (HD-2967), 60 दिन, गांठ बनना, कानपुर"
    assert lines[1].startswith("मौसम: ") and "बारिश" in lines[1]
    assert "नाइट्रोजन कम" in lines[2] and "पीएच ज्यादा" in lines[2]
    assert lines[3] == "डाला गया: यूरिया 5 दिन पहले"
    assert lines[4] == f"सूची: {chemical_hi(chemical)}" and "{" not in case.render(facts)


def test_a_case_from_a_form(facts: Facts) -> None:
    case = FarmCase.from_mapping(
        {"crop": "गेहूँ", "age_days": 60, "symptoms": "पत्ते पीले हैं", "soil": {"zn": 0.3}, "weather": {"said": ["rain_soon"]},
         "applied": [{"kind": "fertiliser", "days_ago": 3}]}, facts,
    )  # fmt: skip
    assert (
        case.crop == "wheat" and case.soil_flags(facts) == ("low_zn",) and case.weather_flags(facts) == ("rain_soon",)
    )
    for wrong, message in (
        ({"crop": "unicorn"}, "'unicorn' is not known"),
        ({"colour": 1}, "unknown key colour"),
        ({"age_days": -3}, "-3"),
        ({"age_days": "old"}, "'old'"),
        ({"age_days": 10**9}, "1000000000"),
        ({"soil": {"gold": 1}}, "gold"),
        ({"applied": [{"kind": "magic", "days_ago": 1}]}, "magic"),
        ({"applied": [{"type": 1}]}, "applied takes"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            FarmCase.from_mapping(wrong, facts)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "age"),
    [("फसल 60 दिन की है", 60), ("60-din ki", 60), ("3 दिन से पीले हैं", None), ("2 दिन पहले पानी दिया, फसल 45 दिन की", 45),
     ("20 दिन की या 30 दिन की", None), ("६० दिन", 60), ("", None)],
)  # fmt: skip
def test_age_in_words(text: str, age: int | None) -> None:
    assert age_in(text) == age


def test_case_lines_are_added_once_and_only_to_a_known_crop(facts: Facts) -> None:
    asked = with_case_lines("गेहूं के पत्ते पीले हैं, फसल 60 दिन की है", facts)
    assert asked.splitlines()[1] == "फसल: गेहूं, 60 दिन, गांठ बनना"
    assert with_case_lines(asked, facts) == asked
    assert with_case_lines("पत्ते पीले हैं", facts) == "पत्ते पीले हैं"
    assert oblique("चना") == "चने"
