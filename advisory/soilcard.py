"""A Soil Health Card as people write it: names in English and Hindi, units of many kinds, three kinds of file.

What comes out are readings in the units of `UNITS`; `advisory/soil.py` says what they mean.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from advisory.readfile import read_json, read_rows
from advisory.yamlfile import YamlFile
from litgpt.utils import UserError

Key = Literal["ph", "ec", "oc", "n", "p", "k", "s", "zn", "b", "fe", "mn", "cu"]
KEYS: tuple[Key, ...] = get_args(Key)
"""The twelve readings of the card, in its order."""
UNITS: Mapping[str, str] = {
    "ph": "pH", "ec": "dS/m", "oc": "%", "n": "kg/ha", "p": "kg/ha", "k": "kg/ha", "s": "ppm", "zn": "ppm", "b": "ppm",
    "fe": "ppm", "mn": "ppm", "cu": "ppm",
}  # fmt: skip
"""The unit in which a reading is kept; nutrients as elements."""
POSSIBLE: Mapping[str, tuple[float, float]] = {
    "ph": (2, 12), "ec": (0, 200), "oc": (0, 60), "n": (0, 5000), "p": (0, 2000), "k": (0, 10000), "s": (0, 10000),
    "zn": (0, 1000), "b": (0, 500), "fe": (0, 5000), "mn": (0, 5000), "cu": (0, 2000),
}  # fmt: skip
"""Beyond these bounds a number is a slip of the pen, or in another unit than it says."""

# Where these figures were read stands under `conversions` in the file.
PLOUGH_LAYER_KG_PER_HA = 2.24e6
"""The assumed weight of the upper 15 cm of a hectare: 1 ppm is 2.24 kg/ha."""
HECTARES_PER_ACRE = 0.4047
OXIDES: Mapping[str, tuple[str, float]] = {"p2o5": ("p", 0.4364), "k2o": ("k", 0.8301)}
"""The oxide, the reading it belongs to, and the share of the element in it."""

Texture = Literal["sandy", "heavy", "loam"]
Drainage = Literal["waterlogged"]

_NAMES: Mapping[str, str] = {
    "ph": "soil ph, पीएच, पी एच",
    "ec": "electrical conductivity, conductivity, salinity, लवणता, विद्युत चालकता",
    "oc": "organic carbon, जैविक कार्बन, कार्बन",
    "n": "nitrogen, available nitrogen, available n, नाइट्रोजन, नत्रजन",
    "p": "phosphorus, phosphorous, available phosphorus, available p, फास्फोरस, फॉस्फोरस, स्फुर",
    "k": "potassium, potash, available potassium, available k, पोटाश, पोटैशियम, पोटेशियम",
    "s": "sulphur, sulfur, available sulphur, available s, गंधक, सल्फर",
    "zn": "zinc, available zinc, जिंक, जस्ता",
    "b": "boron, available boron, bo, बोरॉन, बोरान",
    "fe": "iron, available iron, लोहा, आयरन",
    "mn": "manganese, available manganese, मैंगनीज, मैंगनीज़",
    "cu": "copper, available copper, तांबा, ताम्बा, कॉपर",
    "p2o5": "p₂o₅, available p2o5",
    "k2o": "k₂o, available k2o",
    "texture": "soil type, बनावट, मिट्टी",
    "drainage": "जल निकास, निकासी",
    "state": "राज्य, प्रदेश",
    "tested_on": "date, tested on, तारीख, दिनांक",
}
_TEXTURES: Mapping[str, Texture | None] = {
    "sandy": "sandy", "sand": "sandy", "रेतीली": "sandy", "बलुई": "sandy", "heavy": "heavy", "clay": "heavy",
    "भारी": "heavy", "चिकनी": "heavy", "loam": "loam", "loamy": "loam", "दोमट": "loam",
}  # fmt: skip
_DRAINAGES: Mapping[str, Drainage | None] = {
    "waterlogged": "waterlogged", "पानी भरा रहता है": "waterlogged", "good": None, "अच्छी": None,
}  # fmt: skip
_UNIT_WORDS: Mapping[str, str] = {
    "kgha-1": "kg/ha", "kg/hectare": "kg/ha", "किग्रा/हे": "kg/ha", "किग्रा/हेक्टेयर": "kg/ha", "किलो/हेक्टेयर": "kg/ha",
    "किग्रा/एकड": "kg/acre", "किलो/एकड": "kg/acre", "mgkg-1": "mg/kg", "पीपीएम": "ppm", "dsm-1": "ds/m", "gkg-1": "g/kg",
    "percent": "%", "प्रतिशत": "%",
}  # fmt: skip
_NOT_TESTED = {"", "-", "na", "n/a", "nt", "nil", "not tested", "जांच नहीं", "नहीं"}
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)(?![\d,])\s*(.*)", re.IGNORECASE | re.DOTALL)


def fold(text: str) -> str:
    """Spellings that mean the same, made one: case, spaces, underscores, nukta, and a symbol added in brackets."""
    plain = unicodedata.normalize("NFC", text).replace("\u093c", "").replace("_", " ").casefold()
    return " ".join(re.sub(r"\([^)]*\)", " ", plain).split()) or " ".join(plain.split())


_KEY_OF = {fold(name): key for key, names in _NAMES.items() for name in (key, *names.split(","))}


@dataclass(frozen=True)
class Reading:
    """A measured value and its unit."""

    value: float
    unit: str

    def of(self, key: str) -> Reading:
        """The reading in the unit that `UNITS` has for `key`.

        Raises:
            UserError: a unit that does not belong to this reading, or a value that no soil has.
        """
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not math.isfinite(self.value):
            raise UserError(f"{key}: {self.value!r} is no number")
        value = self.value if self.unit == UNITS[key] else self.value * _factor(key, self.unit)
        least, most = POSSIBLE[key]
        if not least <= value <= most:
            what = "is below zero" if value < 0 else f"cannot be; {least} to {most} {UNITS[key]} is possible"
            raise UserError(f"{key}: {self.value:g} {self.unit} {what}")
        return self if self.unit == UNITS[key] else Reading(value, UNITS[key])


def _factor(key: str, unit: str) -> float:
    """What a value in a unit as people write it ("kg/ha as P2O5", "mg kg-1") is multiplied by."""
    plain = unicodedata.normalize("NFC", unit).casefold().replace("\u093c", "").replace("₂", "2").replace("₅", "5")
    words = [word for word in re.split(r"[\s()]+", plain) if word not in ("", "as", key)]
    share = 1.0
    for oxide, (element, part) in OXIDES.items():
        if oxide in words and element == key:
            words.remove(oxide)
            share = part
    bare = "".join(words)
    scale = _scales(key).get(_UNIT_WORDS.get(bare, bare))
    if scale is None:
        known = ", ".join(name for name in _scales(key) if name)
        raise UserError(f"{key}: the unit {unit!r:.40} is not known; known are {known}")
    return share * scale


def _scales(key: str) -> Mapping[str, float]:
    """What a value in each unit is multiplied by; "" stands for the unit of the card."""
    if key == "ph":
        return {"ph": 1.0, "": 1.0}
    if key == "ec":
        return {"ds/m": 1.0, "ms/cm": 1.0, "mmho/cm": 1.0, "mmhos/cm": 1.0, "μs/cm": 0.001, "us/cm": 0.001, "": 1.0}
    if key == "oc":
        return {"%": 1.0, "g/kg": 0.1, "": 1.0}
    ppm = PLOUGH_LAYER_KG_PER_HA / 1e6
    kept = 1.0 if UNITS[key] == "kg/ha" else ppm
    acre = 1 / HECTARES_PER_ACRE
    return {"kg/ha": 1 / kept, "kg/acre": acre / kept, "ppm": ppm / kept, "mg/kg": ppm / kept, "": 1.0}


Entry = tuple[str, Any, Any]
"""Where it stands, a name, a value."""


def entries_of_file(path: Path) -> list[Entry]:
    """What stands in a card file, each with its place: a .json or .yaml mapping, or a .csv with parameter,value[,unit].

    Raises:
        UserError: another kind of file, or one that cannot be read; with the line where it is known.
    """
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return _yaml_entries(path)
    if suffix == ".json":
        return [(str(path), name, value) for name, value in read_json(path).items()]
    if suffix == ".csv":
        return _csv_entries(path)
    raise UserError(f"{path}: a soil card is a .json, .yaml or .csv file")


def _yaml_entries(path: Path) -> list[Entry]:
    file = YamlFile(path)
    if not isinstance(file.value, dict):
        raise UserError(f"{path}: a mapping is needed, found {file.value!r:.60}")
    return [(f"{path}:{file.line((name,))}", name, value) for name, value in file.value.items()]


def _csv_entries(path: Path) -> list[Entry]:
    entries: list[Entry] = []
    for line, row in read_rows(path, ("parameter", "value")):
        value = row.get("value", "")
        unit = "" if fold(value) in _NOT_TESTED else row.get("unit", "")
        entries.append((f"{path}:{line}", row["parameter"], f"{value} {unit}".strip()))
    return entries


def fields_of(entries: Iterable[Entry]) -> dict[str, Any]:
    """What the entries of a card say, by the names of the fields of `SoilCard`.

    Raises:
        UserError: an unknown name or unit, a name that stands twice, or a value that makes no sense; one line.
    """
    readings: dict[str, Reading] = {}
    about: dict[str, Any] = {}
    seen: set[str] = set()
    for place, name, value in entries:
        key = _KEY_OF.get(fold(str(name)))
        if key is None:
            raise UserError(f"{place}: {name!r:.60} is not known; known are {', '.join(_NAMES)}")
        target = OXIDES[key][0] if key in OXIDES else key
        if target in seen:
            raise UserError(f"{place}: {target} is given twice")
        seen.add(target)
        try:
            if target not in KEYS:
                about[target] = _fact(target, value)
            elif (reading := _reading(key, target, value)) is not None:
                readings[target] = reading
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    return {"readings": readings, **about}


def _fact(key: str, value: Any) -> Any:
    """What is known of the land or the test besides the readings."""
    if value is None or (isinstance(value, str) and fold(value) in _NOT_TESTED):
        return None
    if key == "tested_on":
        if isinstance(value, date):
            return value.date() if isinstance(value, datetime) else value
        try:
            return date.fromisoformat(value)
        except (TypeError, ValueError):
            raise UserError(f"tested_on: {value!r:.60} is no day; write it like 2026-01-31") from None
    if not isinstance(value, str):
        raise UserError(f"{key}: {value!r:.60} is no word")
    if key == "state":
        return value.strip()
    words: Mapping[str, str | None] = _TEXTURES if key == "texture" else _DRAINAGES
    bare = fold(value).removesuffix(" मिट्टी").removesuffix(" soil")
    if bare not in words:
        raise UserError(f"{key}: {value!r:.60} is not known; known are {', '.join(words)}")
    return words[bare]


def _reading(name: str, key: str, value: Any) -> Reading | None:
    """A reading as it was written, `None` where it says that nothing was tested."""
    basis = f" {name}" if name in OXIDES else ""
    if isinstance(value, Reading):
        return value
    if isinstance(value, Mapping) and "value" in value and set(value) <= {"value", "unit"}:
        value = f"{value['value']} {value.get('unit') or ''}" if value["value"] is not None else None
    if value is None or (isinstance(value, str) and fold(value) in _NOT_TESTED):
        return None
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value.strip())
        if match is None:
            raise UserError(f"{key}: {value!r:.60} does not begin with a number like 0.6")
        value, unit = float(match[1]), match[2].strip()
    else:
        unit = ""
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"{key}: {value!r:.60} is no number")
    if basis and not any(oxide in unit.casefold() for oxide in OXIDES):
        unit = f"{unit}{basis}"
    reading = Reading(number, unit or UNITS[key])
    return reading.of(key)
