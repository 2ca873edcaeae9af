"""Weather: words and figures become states; the rules speak only where they should."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from advisory.knowledge import KNOWLEDGE_DIR
from advisory.weather import FLAGS, UNKNOWN, WeatherReport, WeatherRules, parse_manual
from litgpt.utils import UserError

ROOT = Path(__file__).parents[1]
NOW = datetime(2026, 1, 15, 9, tzinfo=UTC)


@pytest.fixture(scope="module")
def rules() -> WeatherRules:
    return WeatherRules.load(ROOT / KNOWLEDGE_DIR)


@pytest.fixture
def content() -> dict[str, Any]:
    """The shipped file as YAML gives it."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / KNOWLEDGE_DIR / "_weather.yaml").read_text(encoding="utf-8"))
    return loaded


def _forecast(hours: float = 5, **values: Any) -> WeatherReport:
    known: dict[str, Any] = {"rain_24h_mm": 0.0, "wind_kmph": 6.0} | values
    return WeatherReport(source="open-meteo", place="Karnal", fetched_at=NOW - timedelta(hours=hours), **known)


@pytest.mark.parametrize(
    ("report", "flags", "line"),
    [
        (UNKNOWN, ("unknown",), "पता नहीं"),
        (WeatherReport(reason="no connection"), ("unknown",), "पता नहीं"),
        (WeatherReport.manual("unknown"), ("unknown",), "पता नहीं"),
        (WeatherReport.manual("clear"), ("clear",), "साफ"),
        (WeatherReport.manual("windy", "rain_soon"), ("rain_soon", "windy"), "अगले 24 घंटे में बारिश, तेज हवा"),
        (WeatherReport.manual("clear", "windy"), ("windy",), "तेज हवा"),
        (WeatherReport.manual("heavy_rain", "rain_soon"), ("heavy_rain",), "अगले 24 घंटे में भारी बारिश"),
        (WeatherReport.manual("dry"), ("dry",), "सूखा"),
        (_forecast(), ("clear",), "साफ (पूर्वानुमान, 5 घंटे पुराना)"),
        (_forecast(0), ("clear",), "साफ (पूर्वानुमान, अभी का)"),
        (
            _forecast(rain_24h_mm=6.0, wind_kmph=24.0),
            ("rain_soon", "windy"),
            "अगले 24 घंटे में बारिश, तेज हवा (पूर्वानुमान, 5 घंटे पुराना)",
        ),
        (_forecast(30), ("clear", "stale"), "साफ (पुराना पूर्वानुमान, 30 घंटे)"),
        (_forecast(100, rain_24h_mm=6.0), ("unknown", "stale"), "पता नहीं (पुराना पूर्वानुमान, 4 दिन)"),
        (_forecast(-3), ("unknown", "stale"), "पता नहीं (पुराना पूर्वानुमान, समय पता नहीं)"),
        (replace(_forecast(), fetched_at=None), ("unknown", "stale"), "पता नहीं (पुराना पूर्वानुमान, समय पता नहीं)"),
        (
            _forecast(rain_24h_mm=None, wind_kmph=20.0),
            ("windy", "unknown"),
            "तेज हवा, बारिश का पता नहीं (पूर्वानुमान, 5 घंटे पुराना)",
        ),
        (WeatherReport.manual("windy"), ("windy",), "तेज हवा"),
    ],
)
def test_states_and_lines(rules: WeatherRules, report: WeatherReport, flags: tuple[str, ...], line: str) -> None:
    assert report.flags(rules, NOW) == flags
    assert report.line_hi(rules, NOW) == line


@pytest.mark.parametrize(
    ("below", "at", "flag"),
    [
        ({"rain_24h_mm": 2.4}, {"rain_24h_mm": 2.5}, "rain_soon"),
        ({"rain_24h_mm": 64.4}, {"rain_24h_mm": 64.5}, "heavy_rain"),
        ({"rain_prob_pct": 50}, {"rain_prob_pct": 51}, "rain_soon"),
        ({"wind_kmph": 14.9}, {"wind_kmph": 15}, "windy"),
        ({"tmax_c": 31.9}, {"tmax_c": 32}, "hot"),
        ({"tmin_c": 4.1}, {"tmin_c": 4}, "frost"),
        ({"tmax_c": 25, "tmin_c": 10, "rh_max": 89}, {"tmax_c": 25, "tmin_c": 10, "rh_max": 90}, "cool_humid"),
        ({"tmax_c": 31, "tmin_c": 18, "rh_max": 95}, {"tmax_c": 31, "tmin_c": 19, "rh_max": 80}, "warm_humid"),
        ({"rain_24h_mm": None, "rain_48h_mm": 1}, {"rain_24h_mm": None, "rain_48h_mm": 70}, "heavy_rain"),
    ],
)
def test_thresholds(rules: WeatherRules, below: dict[str, Any], at: dict[str, Any], flag: str) -> None:
    assert flag not in _forecast(**below).flags(rules, NOW)
    assert flag in _forecast(**at).flags(rules, NOW)


def test_every_state_can_be_shown_and_said(rules: WeatherRules) -> None:
    for flag in FLAGS[:-1]:
        report = WeatherReport.manual(flag)
        assert report.flags(rules) == (flag,)
        assert parse_manual(rules.spoken_hi(flag), rules) == report, flag
        assert parse_manual(report.line_hi(rules), rules) == report, flag
    for other in ("stale", "sunny", "\ud800"):
        with pytest.raises(UserError, match="choose of rain_soon"):
            WeatherReport.manual(other)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("बारिश कल, तेज हवा", ("rain_soon", "windy")),
        ("पता नहीं", ("unknown",)),
        ("कल भारी बारिश होगी", ("heavy_rain",)),
        ("बारिश नहीं होगी", ("clear",)),
        ("बारिश के आसार नहीं हैं तेज हवा चल रही है", ("windy",)),
        ("आज गर्मी है पर बारिश नहीं", ("hot",)),
        ("कई दिन से बारिश नहीं हुई", ("dry",)),
        ("मौसम साफ है, हवा नहीं", ("clear",)),
        ("हवा नहीं है", ()),
        ("", ()),
        ("  ।", ()),
        ("\ud800", ()),
        ("kal barish hogi", ("rain_soon",)),
        ("बारिश\u200d कल", ("rain_soon",)),
    ],
)
def test_words_of_a_person(rules: WeatherRules, text: str, said: tuple[str, ...]) -> None:
    assert parse_manual(text, rules).said == said


@pytest.mark.parametrize("text", ["ठीक ठाक", "xyz", "\ud800x", "हवाई जहाज"])
def test_words_that_name_no_state(rules: WeatherRules, text: str) -> None:
    with pytest.raises(UserError, match="is not understood; say for instance बारिश") as error:
        parse_manual(text, rules)
    str(error.value).encode("utf-8")


@pytest.mark.parametrize(
    ("action", "flags", "rule"),
    [
        ("spray", ("rain_soon",), "rain_no_spray"),
        ("spray", ("heavy_rain",), "rain_no_spray"),
        ("spray", ("rain_soon", "windy", "stale"), "rain_no_spray"),
        ("spray", ("windy", "hot"), "wind_no_spray"),
        ("spray", ("hot",), "heat_no_spray"),
        ("spray", ("clear", "stale"), "stale_look_again"),
        ("spray", ("unknown", "stale"), "stale_look_again"),
        ("spray", ("unknown",), "unknown_look_before_spray"),
        ("spray", ("clear",), None),
        ("fertiliser", ("heavy_rain",), "heavy_rain_no_fertiliser"),
        ("fertiliser", ("rain_soon",), "rain_no_fertiliser"),
        ("fertiliser", ("windy",), None),
        ("fertiliser", ("clear", "stale"), None),
        ("fertiliser", ("unknown", "stale"), "unknown_look_before_fertiliser"),
        ("irrigation", ("rain_soon",), "rain_no_irrigation"),
        ("irrigation", ("frost",), "frost_irrigate"),
        ("irrigation", ("rain_soon", "frost"), "rain_no_irrigation"),
        ("drain", ("heavy_rain",), "rain_drain"),
        ("drain", ("clear",), None),
        ("none", ("heavy_rain",), None),
    ],
)
def test_which_rule_speaks(rules: WeatherRules, action: str, flags: tuple[str, ...], rule: str | None) -> None:
    found = rules.rule_for(action, flags)
    assert (found.id if found else None) == rule


def test_rules_are_plain_sentences_with_pages(rules: WeatherRules) -> None:
    for rule in rules.rules:
        assert rule.say_hi.endswith("।") and rule.say_hi.count("।") == 1
        assert rule.when_en.isascii() and rule.thought_en.isascii()
        assert all(source in rules.sources for source in rule.sources)
    assert {rule.action for rule in rules.rules} == {"spray", "fertiliser", "irrigation", "drain"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tmax_c": float("nan")}, "tmax_c is nan"),
        ({"tmin_c": -300}, "tmin_c is -300; -60 to 60 is possible"),
        ({"rh_max": 140}, "rh_max is 140; 0 to 100"),
        ({"rain_24h_mm": -1}, "rain_24h_mm is -1"),
        ({"rain_24h_mm": "viel"}, "rain_24h_mm is 'viel'"),
        ({"wind_kmph": True}, "wind_kmph is True"),
        ({"wind_kmph": 10**400}, "is no number"),
        ({"tmax_c": 10, "tmin_c": 20}, "tmin_c is 20, which is more than tmax_c 10"),
        ({"rain_24h_mm": 9, "rain_48h_mm": 3}, "rain_24h_mm is 9, which is more than rain_48h_mm"),
        ({"said": ["monsoon"]}, "weather is 'monsoon'"),
        ({"said": 3}, "said is 3, which is no text"),
        ({"said": [{}]}, "weather is {}"),
        ({"rain": 3}, "'rain' is not known; known are place"),
        ({"fetched_at": "yesterday"}, "'yesterday' is no time"),
        ({"fetched_at": 10**30}, "is no time"),
        ({"source": "oracle"}, "source is 'oracle'"),
        ({"place": 3}, "place is 3"),
    ],
)
def test_nonsense_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        WeatherReport.from_mapping(values)
    assert "\n" not in str(error.value)


def test_time_without_a_zone_is_indian(rules: WeatherRules) -> None:
    report = WeatherReport.from_mapping({"rain_24h_mm": "6", "fetched_at": "2026-01-15T14:30"})
    assert report.fetched_at == NOW
    with pytest.raises(UserError, match="has no time zone"):
        WeatherReport(fetched_at=datetime(2026, 1, 15))


def _figure(name: str, **change: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["thresholds"].update({name: change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_figure("hot_c", value=32), "give sources, or `why`"),
        (_figure("hot_c", value=float("nan"), why="x"), "finite"),
        (_figure("warm_c", value=10, why="x"), "cool_c must be below warm_c"),
        (_figure("rain_soon_hours", value=36, why="x"), "24 or 48 is possible"),
        (_figure("hail_mm", value=1, why="x"), "missing or unknown: hail_mm"),
        (lambda content: content["thresholds"].pop("hot_c"), "missing or unknown: hot_c"),
        (lambda content: content["rules"][0].update(when=["snow"]), "rules: rain_no_spray: when"),
        (lambda content: content["rules"][0].update(sources=["nowhere"]), "source nowhere"),
        (lambda content: content["rules"][0].update(id="wind_no_spray"), "the rule wind_no_spray stands twice"),
        (lambda content: content["rules"][0].update(say_hi=" । "), "must be a text that is not empty"),
        (lambda content: content["states"].pop(), "states must be rain_soon"),
        (lambda content: content["sources"].update(spare=content["sources"]["grdc_weather"]), "spare is cited nowhere"),
    ],
)
def test_broken_rules_are_refused(
    tmp_path: Path, content: dict[str, Any], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    change(content)
    (tmp_path / "_weather.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        WeatherRules.load(tmp_path)
    assert "_weather.yaml:" in str(error.value)


def test_hours_stand_in_the_words(tmp_path: Path, content: dict[str, Any]) -> None:
    content["thresholds"]["rain_soon_hours"]["value"] = 48
    (tmp_path / "_weather.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    rules = WeatherRules.load(tmp_path)
    report = _forecast(rain_24h_mm=0.0, rain_48h_mm=6.0)
    assert report.line_hi(rules, NOW).startswith("अगले 48 घंटे में बारिश")
