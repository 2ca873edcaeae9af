"""Soil cards are rated only by limits that a page states, and what was not tested is never called normal."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from advisory.knowledge import KNOWLEDGE_DIR
from advisory.soil import SOIL_FLAG_HI, SoilCard, SoilFile, SoilLimits
from advisory.soilcard import KEYS
from litgpt.utils import UserError

ROOT = Path(__file__).parents[1]
NORMAL: dict[str, Any] = {
    "ph": 7, "ec": 0.4, "oc": 0.6, "n": 300, "p": 15, "k": 200, "s": 15, "zn": 1, "b": 0.8, "fe": 8, "mn": 4, "cu": 0.6,
}  # fmt: skip


@pytest.fixture(scope="module")
def limits() -> SoilLimits:
    return SoilLimits.load(ROOT / KNOWLEDGE_DIR)


@pytest.fixture
def content() -> dict[str, Any]:
    """The shipped file as YAML gives it."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / KNOWLEDGE_DIR / "_soil.yaml").read_text(encoding="utf-8"))
    return loaded


def _save(directory: Path, content: object) -> Path:
    (directory / "_soil.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    ("values", "flags", "line"),
    [
        ({"zn": 0.3, "ph": 8.6}, ("high_ph", "low_zn"), "पीएच ज्यादा (8.6), जिंक कम (0.3), बाकी की जांच नहीं"),
        (NORMAL, (), "सामान्य"),
        (NORMAL | {"zn": 0.3}, ("low_zn",), "जिंक कम (0.3)"),
        (NORMAL | {"n": 600}, ("high_n",), "नाइट्रोजन ज्यादा (600)"),
        (NORMAL | {"ec": "2.5 mmho/cm"}, ("saline",), "नमक ज्यादा (2.5)"),
        (NORMAL | {"texture": "sandy"}, ("sandy",), "सामान्य, रेतीली मिट्टी"),
        (NORMAL | {"texture": "दोमट"}, (), "सामान्य, दोमट मिट्टी"),
        (NORMAL | {"drainage": "waterlogged"}, ("waterlogged",), "सामान्य, पानी भरा रहता है"),
        (NORMAL | {"fe": "NT", "cu": None}, (), "सामान्य, जांच नहीं: लोहा तांबा"),
        ({"ph": 7, "k": 150}, (), "सामान्य: पीएच पोटाश, बाकी की जांच नहीं"),
        ({}, (), "जांच नहीं हुई"),
        ({"texture": "heavy"}, ("heavy",), "भारी मिट्टी, जांच नहीं हुई"),
    ],
)
def test_what_a_card_says(limits: SoilLimits, values: dict[str, Any], flags: tuple[str, ...], line: str) -> None:
    card = SoilCard.from_mapping(values)
    assert card.flags(limits) == flags
    assert card.line_hi(limits) == line


def test_untested_is_never_normal(limits: SoilLimits) -> None:
    lines = set()
    for key in KEYS:
        card = SoilCard.from_mapping({name: value for name, value in NORMAL.items() if name != key})
        assert key not in card.readings
        assert card.line_hi(limits).startswith("सामान्य, जांच नहीं: ")
        lines.add(card.line_hi(limits))
    assert len(lines) == len(KEYS) == 12


def test_state_has_its_own_limits(limits: SoilLimits) -> None:
    def flags(state: str | None, **readings: float) -> tuple[str, ...]:
        return SoilCard.from_mapping({**readings, "state": state}).flags(limits)

    assert flags(None, oc=0.6, p=10.5) == ()
    assert flags("Kerala", oc=0.6, p=10.5) == flags("केरल", oc=0.6, p=10.5) == ("low_oc", "low_p")
    assert flags("Punjab", k=130) == ("low_k",)
    assert flags("Bihar", k=130) == flags(None, k=130) == ()
    assert flags(" telangana ", fe=4.2) == ()
    assert flags(None, fe=4.2) == ("low_fe",)


def test_limit_itself_is_normal(limits: SoilLimits) -> None:
    for limit in limits.common:
        for value in (limit.low, limit.high):
            if value is not None:
                assert SoilCard.from_mapping({limit.key: value}).flags(limits) == ()


def test_shipped_limits_rest_on_pages(limits: SoilLimits) -> None:
    for limit in limits.common:
        assert limit.sources and not limit.unsourced, limit.key
        assert all(limits.sources[source].url for source in limit.sources)
    raised = {flag for limit in limits.common for flag in (limit.low_flag, limit.high_flag) if flag}
    assert raised <= set(SOIL_FLAG_HI)
    assert raised >= {"low_n", "low_p", "low_k", "low_s", "low_zn", "low_fe", "low_b", "low_mn", "low_cu", "saline"}


def test_limit_without_a_source_rates_nothing(tmp_path: Path, content: dict[str, Any]) -> None:
    copper = content["parameters"][-1]
    copper["sources"] = []
    with pytest.raises(UserError, match=r"cu: sources are missing|12: sources are missing"):
        SoilLimits.load(_save(tmp_path, content))
    copper["unsourced"] = True
    limits = SoilLimits.load(_save(tmp_path, content))
    card = SoilCard.from_mapping(NORMAL | {"cu": 0.05})
    assert card.flags(limits) == ()
    assert card.line_hi(limits) == "तांबा 0.05 (सीमा का स्रोत नहीं)"
    assert not limits.measures("low_cu")
    assert limits.card_with("low_cu", Random(1)).flags(limits) == ()


def test_oxide_limits_rate_elements(tmp_path: Path, content: dict[str, Any]) -> None:
    next(row for row in content["parameters"] if row["key"] == "p").update(low=23, high=56, basis="oxide", variants=[])
    limits = SoilLimits.load(_save(tmp_path, content))
    assert SoilCard.from_mapping({"p2o5": 22.9}).flags(limits) == ("low_p",)
    assert SoilCard.from_mapping({"p2o5": 23.1}).flags(limits) == ()
    assert SoilCard.from_mapping({"p": 10.1}).flags(limits) == ()


def _row(key: str, **change: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: next(row for row in content["parameters"] if row["key"] == key).update(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_row("n", low=600), "low 600 is not below high 560"),
        (_row("n", low=float("nan")), "finite"),
        (_row("zn", unit="kg/ha"), "the limits of zn are kept in ppm"),
        (_row("zn", basis="oxide"), "only phosphorus and potassium"),
        (_row("zn", sources=["nowhere"]), "source nowhere is not among the sources"),
        (_row("zn", colour="blue"), "colour: unknown key"),
        (_row("zn", high_flag="saline"), "a flag needs its limit"),
        (lambda content: content["parameters"].pop(), "parameters must be ph, ec"),
        (lambda content: content["states"].pop("punjab"), "state punjab is not among the states"),
        (lambda content: content["sources"].update(spare=content["sources"]["vt_factors"]), "spare is cited nowhere"),
    ],
)
def test_broken_limits_are_refused(
    tmp_path: Path, content: dict[str, Any], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    change(content)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        SoilLimits.load(_save(tmp_path, content))
    assert "_soil.yaml:" in str(error.value)


def test_made_cards_raise_what_they_are_made_for(limits: SoilLimits) -> None:
    rng = Random(7)
    for flag in SOIL_FLAG_HI:
        for _ in range(50):
            card, other = limits.card_with(flag, rng), limits.card_without(flag, rng)
            assert set(card.readings) == set(other.readings) == set(KEYS)
            assert other.flags(limits) == ()
            assert card.flags(limits) == (() if flag in ("low_ca", "low_mg") else (flag,))
        assert limits.measures(flag) == (flag not in {"low_ca", "low_mg", "sandy", "heavy", "waterlogged"})
    assert limits.card_with("low_k", Random(3)) == limits.card_with("low_k", Random(3))


def test_schema_reads_what_is_shipped(content: dict[str, Any]) -> None:
    assert SoilLimits.of(SoilFile.model_validate(content)).common[3].high == 560
