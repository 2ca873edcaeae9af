"""Made-up Kisan Call Centre rows in the real columns, each defect a known number of times, and as many as one likes.

All texts and people are invented. `sample` gives a small list with its exact account; `stream` rows for the
benchmark.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import cast

from advisory.knowledge import Knowledge
from advisory.names import NameIndex

COLUMNS = (
    "StateName", "DistrictName", "BlockName", "Season", "Sector", "Category", "Crop", "QueryType", "QueryText",
    "KccAns", "CreatedOn", "Year", "Month",
)  # fmt: skip
KccRow = dict[str, str]

CROPS = {
    "wheat": ("Wheat", "गेहूं", "gehu"),
    "rice": ("Paddy (Dhan)", "धान", "dhan"),
    "cotton": ("Cotton (Kapas)", "कपास", "kapas"),
    "chickpea": ("Bengal Gram (Gram/Chick Pea/Kabuli/Chana)", "चना", "chana"),
    "tomato": ("Tomato", "टमाटर", "tamatar"),
}
PROBLEMS = {
    "wheat_yellow_rust": ("पीला रतुआ", "yellow rust", "peela ratua"),
    "wheat_aphid": ("माहू", "aphid", "mahu"),
    "rice_blast": ("झोंका रोग", "blast", "jhonka rog"),
    "rice_zinc_deficiency": ("खैरा रोग", "zinc deficiency", "khaira rog"),
    "cotton_pink_bollworm": ("गुलाबी सुंडी", "pink bollworm", "gulabi sundi"),
    "chickpea_wilt": ("उकठा", "wilt", "uktha"),
    "tomato_late_blight": ("पछेती झुलसा", "late blight", "pachheti jhulsa"),
}
STATES = ("UTTAR PRADESH", "RAJASTHAN", "MADHYA PRADESH", "BIHAR", "HARYANA")
DISTRICTS = ("SITAPUR", "KOTA", "SEHORE", "GAYA", "HISAR")
ANSWERS = (
    "खेत की निगरानी करें और {n} दिन बाद फिर देखें। ज्यादा दिखे तो कृषि विज्ञान केंद्र से पूछें।",
    "पानी {n} दिन के अंतर पर दें, खेत में पानी न रुके और खरपतवार निकालें",
    "Remove the affected plants, keep the field clean and check it again after {n} days",
    "khet ki nigrani kare aur {n} din baad fir dekhe, zyada dikhe to kvk se puchhe",
    "नीम का तेल {n} मिली प्रति लीटर पानी में मिलाकर शाम को छिड़काव करें",
)
EMPTY = (
    "Explained him in details", "given information", "जानकारी दी गई", "explained to the farmer in detail",
    "jankari di gayi", "Explained", "किसान को विस्तार से जानकारी दे दी गई है", "answer given",
    "call disconnected", "Detailed information given to farmer",
)  # fmt: skip
WEATHER_TEXTS = (
    ("Information regarding weather", "Rainfall(mm) 0 Temp(Max/Min) 34/22 humidity 40"),
    ("mausam ki jankari", "aaj saaf rahega"),
    ("मौसम की जानकारी", "अगले तीन दिन बादल रहेंगे"),
    ("farmer asked about rain", "There is a chance of rain on {n} of this month"),
    ("weather report of the district", "weather will be clear for {n} days"),
)
PRICES = (
    ("mandi bhav of {crop}", "The rate is {n} per quintal in the market"),
    ("आज {crop} का भाव क्या है", "आज का भाव {n} रुपये प्रति क्विंटल है"),
    ("market rate of {crop} today", "{n} rupees per quintal at the mandi"),
)
FOREIGN = (
    ("control of leaf spot in {crop}", "{n} நாட்களுக்கு ஒருமுறை தண்ணீர் பாய்ச்சவும் நோய் தாக்கிய இலைகளை அகற்றவும்"),
    ("{crop} पिकावर रोग आला आहे काय करावे", "{n} दिवसांनी पाण्यात मिसळून फवारणी करावी आणि पिकावर लक्ष ठेवावे"),
    ("{crop} disease control", "{n} દિવસ પછી પાકમાં ફરી તપાસ કરવી અને પાણી આપવું જોઈએ"),
)


def tiny_knowledge() -> Knowledge:
    """The crops and problems of the sample, as far as the import looks at them."""
    problems = {crop: {id_: names for id_, names in PROBLEMS.items() if id_.startswith(f"{crop}_")} for crop in CROPS}
    index = NameIndex({crop: (crop, *_plain(names)) for crop, names in CROPS.items()}, problems)
    return cast(Knowledge, SimpleNamespace(names=index))


def _plain(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part.strip(" )") for name in names for part in name.replace("(", "/").split("/"))


def is_banned(text: str, crop: str | None) -> list[str]:
    """A stand-in for the list of pesticides."""
    return [name for name in ("endosulfan", "एंडोसल्फान", "phorate") if name in text.lower()]


def good_row(number: int, random: Random) -> KccRow:
    """A row to keep; its number makes it the only one of its kind."""
    problem = random.choice(list(PROBLEMS))
    crop = problem.partition("_")[0]
    english, hindi, hinglish = CROPS[crop]
    problem_hi, problem_en, problem_latin = PROBLEMS[problem]
    question = random.choice(
        (
            f"control of {problem_en} in {english.partition(' (')[0].lower()} at {number} days",
            f"{hindi} में {problem_hi} लगा है {number} दिन की फसल क्या करें",
            f"{hinglish} me {problem_latin} laga hai {number} din ki fasal kya kare",
            f"how to control {problem_en} after {number} days",
        )
    )
    place = random.randrange(len(STATES))
    return {
        "StateName": STATES[place],
        "DistrictName": DISTRICTS[place],
        "BlockName": "0   ",
        "Season": random.choice(("RABI", "KHARIF")),
        "Sector": "AGRICULTURE",
        "Category": "Cereals",
        "Crop": english,
        "QueryType": "\tPlant Protection\t",
        "QueryText": question,
        "KccAns": random.choice(ANSWERS).format(n=random.randint(2, 30)),
        "CreatedOn": f"2019-{random.randint(1, 12):02d}-11T10:32:25.12",
        "Year": "2019",
        "Month": "5",
    }


@dataclass(frozen=True)
class Sample:
    """Rows and what must become of them."""

    rows: list[KccRow]
    dropped: Counter[str]
    kept: int
    repaired: int
    """Kept rows whose text came in the wrong encoding."""
    scrubbed: Counter[str]
    """Kinds of personal data in rows that are kept."""
    secrets: tuple[str, ...]
    """What must stand in no output."""


def misread(text: str, codec: str) -> str:
    """UTF-8 as a program shows it that takes it for another encoding."""
    return text.encode().decode(codec)


def sample(seed: int = 7) -> Sample:
    """More than 300 rows, shuffled, with the exact account of what an import must say."""
    random = Random(seed)
    numbers = iter(range(11, 10_000))
    rows: list[KccRow] = []
    dropped: Counter[str] = Counter()
    scrubbed: Counter[str] = Counter()

    def add(reason: str | None, **changes: str) -> KccRow:
        row = good_row(next(numbers), random) | changes
        rows.append(row)
        if reason:
            dropped[reason] += 1
        return row

    def crop() -> str:
        return random.choice(list(CROPS.values()))[1]

    originals = [add(None) for _ in range(110)]
    for _ in range(15):
        add("weather", QueryType="Weather", Sector="AGRICULTURE")
    for number in range(15):
        question, answer = WEATHER_TEXTS[number % len(WEATHER_TEXTS)]
        add("weather", QueryText=question, KccAns=answer.format(n=number))
    for number in range(8):
        add("price", QueryType="Market Information", KccAns=f"{number} quintal")
    for number in range(12):
        question, answer = PRICES[number % len(PRICES)]
        add("price", QueryText=question.format(crop=crop()), KccAns=answer.format(n=1500 + number))
    for number in range(15):
        add("no_answer", KccAns=("", "   ", "-", ".", "\u200b")[number % 5])
    for number in range(20):
        add("empty_answer", KccAns=EMPTY[number % len(EMPTY)])
    add("empty_answer", QueryText="weed control in wheat", KccAns="Explained about weed control in wheat in details")
    for number in range(10):
        add("too_short", KccAns=("spray urea", "neem oil", "पानी दें", "DAP 50kg")[number % 4])
    for number in range(8):
        add(
            "personal_only",
            QueryText=(
                f"farmer name Ramesh Kumar mobile 98765{number:05d}",
                f"मेरा नाम सुरेश यादव है मोबाइल ९८७६५४३२१{number}",
            )[number % 2],
        )
    for number in range(12):
        add(
            "banned",
            KccAns=(
                f"spray endosulfan 35 EC {number} ml per litre of water",
                f"एंडोसल्फान {number} मिली प्रति लीटर पानी में मिलाकर डालें",
            )[number % 2],
        )
    for number in range(18):
        question, answer = FOREIGN[number % 3]
        add("language", QueryText=question.format(crop=crop()), KccAns=answer.format(n=number))
    for number in range(6):
        add("no_question", QueryText=("", "  ", "??", "...", "\u200d", "-")[number])
    for number in range(7):
        add("unreadable", KccAns=("?????? ?? ???? ????? ??", "??? ??? ??????? ???")[number % 2])
    for number, original in enumerate(originals[:20]):
        # The same to a reader: case, spaces, a full stop, another day.
        changed = original | {"CreatedOn": "2020-01-01", "Year": "2020"}
        if number % 2:
            changed["QueryText"] = f"  {original['QueryText'].upper()} ."
        rows.append(changed)
        dropped["duplicate"] += 1
    repaired = 0
    for number in range(20):
        hindi = f"गेहूं की फसल में {number + 40} दिन पर पानी दें और ठंडे मौसम में खेत देखें, भर कर न दें"
        shown = misread(hindi, ("sloppy-windows-1252", "latin-1")[number % 2])
        add(None, KccAns=misread(shown, "sloppy-windows-1252") if number % 5 == 4 else shown)
        repaired += 1
    for number in range(6):
        add(None, KccAns=f'पहले खेत देखें\nफिर {number + 3} दिन बाद, पानी दें\nऔर "पीले" पत्ते हटाएं')
    for number in range(5):
        add(None, KccAns=f"श्री मोहनलाल शर्मा के खेत में {number + 4} दिन बाद देखें, फोन ९८७६५ ४३२१{number} पर बात करें")
    scrubbed |= Counter(name=5, phone=5)
    for number in range(4):
        add(
            None,
            KccAns=f"Visit the field of Smt. Sita Devi village Rampur dist Sitapur after {number + 2} days, "
            f"call 0522-234567{number}",
        )
    scrubbed += Counter(name=4, phone=4, village=4)
    for number in range(3):
        add(None, KccAns=f"किसान कॉल सेंटर 1800-180-1551 पर {number + 2} दिन बाद पूछें और 500-600 लीटर पानी में 2 ग्राम घोलें")
    random.shuffle(rows)
    # A duplicate counts as one wherever it stands, and the first of the two is kept.
    return Sample(
        rows=rows,
        dropped=dropped,
        kept=len(rows) - sum(dropped.values()),
        repaired=repaired,
        scrubbed=scrubbed,
        secrets=("98765", "९८७६५", "0522-23", "मोहनलाल", "Sita Devi", "Rampur", "Ramesh Kumar", "सुरेश"),
    )


def csv_lines(rows: list[KccRow], columns: tuple[str, ...] = COLUMNS) -> list[str]:
    """Header and rows as CSV, a string for each row (some run over several lines)."""
    lines = [",".join(columns) + "\n"]
    for row in rows:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow([row.get(column, "") for column in columns])
        lines.append(text.getvalue())
    return lines


BROKEN_LINES = (
    'UP,SITAPUR,0,RABI,AGRI,Cereals,Wheat,Weeds,"control of weeds,"this quote never closes,2019-01-01,2019,1\n',
    "UP,SITAPUR,0,RABI,AGRI,Cereals,Wheat,Weeds,NUL \0 byte,some answer with a NUL byte,2019-01-01,2019,1\n",
    "UP,SITAPUR,0,RABI,AGRI,Cereals,Wheat,Weeds,too many,fields,in,this,row,by,far,2019-01-01,2019,1\n",
    '"UP,SITAPUR,0,RABI,AGRI,Cereals,Wheat,Weeds,weeds in wheat,pull them out by hand,2019-01-01,2019,1\n',
    "UP,SITAPUR,0\n",
)
"""CSV rows that cannot be read, one line each."""
CUT_OFF = "UP,SITAPUR,0,RABI,AGRI,Cereals,Wheat,Weeds,how to rem"
"""A last line as a broken download leaves it."""


def broken_csv(rows: list[KccRow], seed: int = 3) -> tuple[str, list[int]]:
    """The rows as CSV with `BROKEN_LINES` among them and `CUT_OFF` at the end, and the numbers of the broken lines."""
    random = Random(seed)
    lines = csv_lines(rows)
    places = sorted(random.sample(range(1, len(lines)), len(BROKEN_LINES)), reverse=True)
    for place, line in zip(places, BROKEN_LINES, strict=True):
        lines.insert(place, line)
    lines.append(CUT_OFF)
    numbers, number = [], 1
    for line in lines:
        if line in BROKEN_LINES or line == CUT_OFF:
            numbers.append(number)
        number += line.count("\n")
    return "".join(lines), numbers


def stream(count: int, seed: int = 1) -> Iterator[KccRow]:
    """`count` rows for measuring: a quarter weather, a twelfth each price and empty answers, a tenth repeated."""
    random = Random(seed)
    old: list[KccRow] = []
    for number in range(count):
        kind = random.random()
        row = good_row(number, random)
        if kind < 0.25:
            question, answer = random.choice(WEATHER_TEXTS)
            row |= {"QueryText": question, "KccAns": answer.format(n=number), "QueryType": "Weather"}
        elif kind < 0.33:
            question, answer = random.choice(PRICES)
            row |= {"QueryText": question.format(crop="गेहूं"), "KccAns": answer.format(n=number)}
        elif kind < 0.41:
            row["KccAns"] = random.choice(EMPTY)
        elif kind < 0.51 and old:
            row = random.choice(old)
        elif kind < 0.53:
            row["KccAns"] = misread(row["KccAns"], "sloppy-windows-1252")
        elif kind < 0.55:
            row["KccAns"] += f" श्री रामलाल यादव 98{number % 10**8:08d}"
        elif kind < 0.8:
            row["KccAns"] += f" {number} पौधे देखें"
        elif number % 97 == 0:
            old = [*old[-99:], row]
        yield row


def write_csv(path: Path, count: int, seed: int = 1) -> int:
    """Write `stream` as CSV, row by row; returns the size in bytes."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(stream(count, seed))
    return path.stat().st_size


def write_jsonl(path: Path, rows: list[KccRow]) -> None:
    """One object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
