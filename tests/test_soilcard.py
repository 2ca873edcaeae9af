"""A soil card as people write it, in words or in a file, is understood or refused in one line."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from advisory.knowledge import KNOWLEDGE_DIR
from advisory.soil import SOIL_FILE, SoilCard
from advisory.soilcard import HECTARES_PER_ACRE, OXIDES, PLOUGH_LAYER_KG_PER_HA
from litgpt.utils import UserError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "value", "key", "expected"),
    [
        ("p", "18 kg/ha P2O5", "p", 18 * 0.4364),
        ("P", "18 kg/ha (P₂O₅)", "p", 18 * 0.4364),
        ("P2O5", 18, "p", 18 * 0.4364),
        ("K2O", "240 kg/ha", "k", 240 * 0.8301),
        ("k", "200 kg/ha as K", "k", 200),
        ("p", "5 kg/acre", "p", 5 / 0.4047),
        ("n", "100 ppm", "n", 224),
        ("n", "100 mg kg-1", "n", 224),
        ("zn", "1.344 kg/ha", "zn", 0.6),
        ("s", "10 किग्रा/हे", "s", 10 / 2.24),
        ("oc", "4 g/kg", "oc", 0.4),
        ("Organic Carbon (OC)", "0.4 %", "oc", 0.4),
        ("ec", "900 µS/cm", "ec", 0.9),
        ("ec", "900 μS/cm", "ec", 0.9),  # the Greek letter, not the sign
        ("नाइट्रोजन", "२५०", "n", 250),
        ("ज़िंक", ".3 ppm Zn", "zn", 0.3),  # composed nukta
        ("ज\u093cिंक", 0.3, "zn", 0.3),
        ("pH", "7.2 pH", "ph", 7.2),
        ("zn", {"value": 0.3, "unit": "mg/kg"}, "zn", 0.3),
    ],
)
def test_units_and_names(name: str, value: object, key: str, expected: float) -> None:
    card = SoilCard.from_mapping({name: value})
    assert list(card.readings) == [key]
    assert card.readings[key].value == pytest.approx(expected)


def test_conversions_are_those_of_the_file() -> None:
    content = yaml.safe_load((ROOT / KNOWLEDGE_DIR / SOIL_FILE).read_text(encoding="utf-8"))
    what = {key: entry["what"] for key, entry in content["conversions"].items()}
    assert f"{PLOUGH_LAYER_KG_PER_HA / 1e6:g} million kg" in what["plough_layer"]
    assert str(HECTARES_PER_ACRE) in what["acre"]
    assert str(OXIDES["p2o5"][1]) in what["p2o5_to_p"]
    assert str(OXIDES["k2o"][1]) in what["k2o_to_k"]
    phosphorus, potassium, oxygen = 30.974, 39.098, 15.999
    assert OXIDES["p2o5"][1] == pytest.approx(2 * phosphorus / (2 * phosphorus + 5 * oxygen), abs=1e-4)
    assert OXIDES["k2o"][1] == pytest.approx(2 * potassium / (2 * potassium + oxygen), abs=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ph": 15}, "ph: 15 pH cannot be"),
        ({"oc": 75}, "oc: 75 % cannot be"),
        ({"zn": -0.1}, "zn: -0.1 ppm is below zero"),
        ({"zn": float("nan")}, "zn: nan is no number"),
        ({"zn": "NaN"}, "does not begin with a number"),
        ({"zn": "1e999"}, "is no number"),
        ({"zn": 10**400}, "is no number"),
        ({"zn": True}, "is no number"),
        ({"zn": [0.3]}, "is no number"),
        ({"zn": "0,3"}, "does not begin with a number like 0.6"),
        ({"n": "1,250"}, "does not begin with a number"),
        ({"zn": "0.3 bags"}, "the unit 'bags' is not known; known are kg/ha"),
        ({"p": "18 kg/ha K2O"}, "the unit 'kg/ha K2O' is not known"),
        ({"zn": "0.3 ppm P2O5"}, "is not known"),
        ({"ph": "7 kg/ha"}, "is not known"),
        ({"gold": 1}, "'gold' is not known; known are ph"),
        ({"\ud800": 1}, r"'\\ud800' is not known"),
        ({"zn": "\ud800"}, "does not begin with a number"),
        ({"n": 200, "नत्रजन": 210}, "n is given twice"),
        ({"p": 5, "p2o5": 12}, "p is given twice"),
        ({"texture": "moon"}, "texture: 'moon' is not known"),
        ({"texture": 3}, "texture: 3 is no word"),
        ({"tested_on": "2026-02-31"}, "is no day"),
        ({"tested_on": 2026}, "is no day"),
    ],
)
def test_nonsense_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        SoilCard.from_mapping(values)
    assert "\n" not in str(error.value)
    str(error.value).encode("utf-8")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"zn": 0.3', r"a.json:1: not valid JSON"),
        ("a.json", '{"zn": 0.3, "zn": 0.4}', "the key 'zn' stands twice"),
        ("a.json", '{"zn": NaN}', "NaN is no number"),
        ("a.json", "[1]", "an object"),
        ("a.json", "", r"a.json:1: not valid JSON"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("a.json", '{"zn": "0.3 bags"}', "a.json: zn: the unit"),
        ("a.yaml", "ph: 7\nzn: -1\n", r"a.yaml:2: zn: -1 ppm is below zero"),
        ("a.yaml", "ph: [7\n", r"a.yaml:\d: not valid YAML"),
        ("a.yaml", "- 7\n", "a mapping is needed"),
        ("a.yaml", "tested_on: 2026-02-31\n", "not valid YAML"),
        ("a.csv", "parameter,unit\nzn,ppm\n", "a.csv:1: the column value is missing"),
        ("a.csv", "", "the column parameter is missing; found nothing"),
        ("a.csv", "parameter,value,unit\nzn,0.3,ppm\nph,15,\n", "a.csv:3: ph: 15 pH cannot be"),
        ("a.csv", "parameter,value\nzn,0.3,ppm\n", "a.csv:2: 3 fields for 2 columns"),
        ("a.csv", 'parameter,value\nzn,"0.3\n', r"a.csv:\d: not valid CSV"),
        ("a.csv", "parameter,value\nzn,0.3\nzinc,0.4\n", "a.csv:3: zn is given twice"),
        ("a.txt", "zn 0.3", "is a .json, .yaml or .csv file"),
    ],
)
def test_broken_file_is_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        SoilCard.from_file(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["json", "yaml", "csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "iso-8859-1"])
def test_wrong_encoding_is_said(tmp_path: Path, suffix: str, encoding: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text('{"ec": "900 µS/cm"}\n', encoding=encoding)
    with pytest.raises(UserError, match=r"not UTF-8"):
        SoilCard.from_file(path)


def test_missing_file_is_said(tmp_path: Path) -> None:
    for name in ("no.json", "no.yaml", "no.csv"):
        with pytest.raises(UserError, match="no such file"):
            SoilCard.from_file(tmp_path / name)


def test_three_kinds_of_file_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        '\ufeff{"जिंक": "0.3 ppm", "ph": 8.6, "fe": null, "texture": "sandy", "tested_on": "2026-01-31"}', "utf-8"
    )
    (tmp_path / "a.yaml").write_text("जिंक: 0.3 ppm\nph: 8.6\nfe:\ntexture: sandy\ntested_on: 2026-01-31\n", "utf-8")
    (tmp_path / "a.csv").write_text(
        "Parameter, Value ,Unit\r\nजिंक,0.3,ppm\r\npH,8.6,\r\nfe,-,ppm\r\n\r\n"
        "texture,sandy\r\ntested_on,2026-01-31,\r\n",
        "utf-8",
    )
    cards = [SoilCard.from_file(tmp_path / f"a.{suffix}") for suffix in ("json", "yaml", "csv")]
    assert cards[0] == cards[1] == cards[2]
    assert cards[0].tested_on == date(2026, 1, 31)
    assert hash(cards[0]) == hash(cards[1])
