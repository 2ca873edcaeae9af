"""The official list: complete, unambiguous, found in every spelling, and never where it is not meant."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from pathlib import Path

import pytest

from advisory.pesticides import PESTICIDES_FILE, Active, Pesticide, PesticideList
from litgpt.utils import UserError

FOLDER = Path(__file__).parent.parent / "data" / "knowledge"


@pytest.fixture(scope="module")
def pesticides() -> PesticideList:
    return PesticideList.load(FOLDER)


def test_counts_are_those_of_the_official_list(pesticides: PesticideList) -> None:
    sections = Counter(section for entry in pesticides.entries for section in entry.sections)
    assert sections == {"I.A": 49, "I.B": 5, "I.C": 8, "II": 18, "III": 16}
    assert pesticides.list_date.isoformat() == "2026-07-31"
    assert len(pesticides.actives) > 80


def test_every_name_is_found_and_is_its_own(pesticides: PesticideList) -> None:
    for entry in pesticides.by_id.values():
        for name in entry.names:
            (mention,) = pesticides.find(f"खेत में {name} की बात")
            assert mention.entry is entry, name
            assert mention.matched == name and mention.is_active == isinstance(entry, Active)


def test_every_entry_has_its_names_in_both_scripts_and_its_sources(pesticides: PesticideList) -> None:
    for entry in pesticides.by_id.values():
        assert all(re.search("[\u0900-\u097f]", name) for name in (*entry.hi, *entry.brands_hi)), entry.id
        assert all(name.isascii() and name == name.lower() for name in (*entry.en, *entry.brands)), entry.id
        assert set(entry.sources) <= pesticides.sources.keys()
        if isinstance(entry, Pesticide) or entry.kind not in ("fertiliser", "biological"):
            assert entry.sources, entry.id
    for source in pesticides.sources.values():
        assert re.fullmatch(r"https?://[^\s/]+\.[^\s]+", source.url)


SPELLINGS = {
    "endosulfan": ["एंडोसल्फान", "एंडोसल्फ़ान", "एन्डोसल्फान", "एण्डोसल्फान", "एंडो\u200dसल्फान", "ऐंडोसल्फान",
    "एंडोसलफान",
                   "एंडोसल्फानका", "Endosulfan", "ENDOSULPHAN", "endosulfaan", "endosulfen", "endo sulfan",
                   "endo-sulfan", "Thiodan",
                   "ｅｎｄｏｓｕｌｆａｎ", "en\u200bdosulfan", "एंडोसल्फान35EC"],
    "phorate": ["फोरेट", "फ़ोरेट", "फौरेट", "थिमेट", "थीमेट", "Thimet 10G", "phoret", "PHORATE", "फोरेट10जी"],
    "monocrotophos": ["मोनोक्रोटोफॉस", "मोनोक्रोटोफास", "मोनोक्रोटोफ़ॉस", "मोनो क्रोटो फॉस", "मोनोक्रोटो फॉस",
    "mono crotophos", "monocrotofos",
                      "monocrotofas", "monocrotopos", "Monocil", "नुवाक्रॉन"],
    "dichlorvos": ["डाइक्लोरवास", "डायक्लोरवॉस", "डाईक्लोरवॉस", "नुवान", "Nuvan", "DDVP", "डीडीवीपी", "D.D.V.P.",
    "dichlorvas"],
    "ddt": ["डीडीटी", "डी डी टी", "डी.डी.टी.", "डी. डी. टी.", "DDT", "D.D.T.", "d d t"],
    "benzene_hexachloride": ["बीएचसी", "बी.एच.सी.", "BHC", "bhc"],
    "methyl_parathion": ["मिथाइल पैराथियान", "मिथाईल पैराथियॉन", "methyl-parathion", "Methyl Parathion", "मेटासिड",
    "folidol"],
    "ethyl_parathion": ["पैराथियान", "parathion"],
    "triazophos": ["ट्राइजोफॉस", "ट्रायजोफॉस", "ट्राईज़ोफॉस", "ट्राइजोफास", "Triazophos", "triazofos", "होस्टाथियान"],
    "methomyl": ["मेथोमिल", "मिथोमाइल", "methomyl", "methomil", "Lannate"],
    "carbofuran": ["कार्बोफ्यूरान", "कार्बोफुरान", "carbofuran", "Furadan", "फ्यूराडान", "carbofuron"],
    "malathion": ["मैलाथियान", "मेलाथियॉन", "मैलाथिऑन", "malathion", "malathian", "Malathiyon"],
    "chlorpyriphos": ["क्लोरपायरीफॉस", "क्लोरोपाइरीफॉस", "chlorpyrifos", "chloropyriphos", "chlorpyriphos 20 EC"],
    "dimethoate": ["डाइमेथोएट", "डायमेथोएट", "रोगोर", "रोगर", "Rogor", "dimethoat"],
    "mancozeb": ["मैंकोजेब", "मैन्कोज़ेब", "मेन्कोजेब", "mancozeb", "mankojeb", "Dithane M-45", "डाइथेन एम 45"],
    "aluminium_phosphide": ["सल्फास", "सेल्फॉस", "celphos", "एल्युमिनियम फॉस्फाइड"],
    "2_4_5_t": ["2,4,5-T", "२,४,५-टी", "2 4 5 T"],
}  # fmt: skip


@pytest.mark.parametrize(("entry", "written"), [(entry, name) for entry, names in SPELLINGS.items() for name in names])
def test_spellings_of_listed_names(pesticides: PesticideList, entry: str, written: str) -> None:
    text = f"क्या मैं {written} डाल दूं"
    assert [mention.entry.id for mention in pesticides.find(text)] == [entry]


ACTIVES = {
    "imidacloprid": ["इमिडाक्लोप्रिड", "इमीडाक्लोप्रिड", "imidaclopride", "Confidor"], "2_4_d": ["2,4-D", "2,4-डी",
    "2, 4-D", "२,४-डी"],
    "copper_oxychloride": ["कॉपर ऑक्सीक्लोराइड", "कॉपर ऑक्सी क्लोराइड", "copper-oxychloride", "Copper oxy chloride",
    "Blitox"],
    "meptyldinocap": ["meptyl dinocap", "मेप्टाइल डाइनोकैप"], "carbendazim": ["कार्बेन्डाज़िम", "कार्बेंडाजीम",
    "carbendazym", "Bavistin"],
    "azadirachtin": ["नीम का तेल", "नीम तेल", "neem oil", "neem ka tel"], "zinc_sulphate": ["जिंक सल्फेट",
    "Zinc Sulphate", "zinc sulfate"],
    "trichoderma": ["ट्राइकोडर्मा", "ट्राईकोडर्मा विरिडी", "trichoderma"],
    "emamectin_benzoate": ["इमामेक्टिन बेंजोएट", "emamectin"],
    "chlorpyriphos_methyl": ["chlorpyriphos methyl"], "thiamethoxam": ["थायमेथोक्सम", "थायोमेथोक्जाम", "thiomethoxam"],
    "sulfosulfuron": ["सल्फोसल्फ्यूरॉन", "sulphosulphuron"], "npk": ["NPK"], "urea": ["यूरिया", "युरिया", "urea"],
}  # fmt: skip


@pytest.mark.parametrize(("entry", "written"), [(entry, name) for entry, names in ACTIVES.items() for name in names])
def test_spellings_of_actives(pesticides: PesticideList, entry: str, written: str) -> None:
    mentions = pesticides.find(f"{written} का छिड़काव")
    assert [(mention.entry.id, mention.is_active) for mention in mentions] == [(entry, True)]


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "\ud800", "नाइट्रोजन की कमी है", "nitrogen aur nitrojen kam hai", "मिथाइल", "methyl",
        "2 BHK ka makan", "EPN सूत्रकृमि लाभदायक हैं",
        "पत्तों का रंग उड़ रहा है", "रोग रुक नहीं रहा", "रोगरोधी किस्म", "बेनामी जमीन", "paint se formation",
        "फसलों में कीड़ा", "phasalon me kida",
        "मोनो रंग का पंप", "more than ten days", "सेवन न करें", "captain ne kaha", "डाली टूट गई",
        "गेहूं 60 दिन का है", "थाली में दाल",
        "हेल्पलाइन 1800-180-1551", "मौसम: पता नहीं", "लिंग और उम्र", "चूना पत्थर", "सुपर बीज", "नीम के पेड़ के नीचे",
        "carbon aur carboxyl", "tin sheet",
        "एल्बम", "डीडी न्यूज", "बी.ए. पास", "24 डिग्री", "2, 4 दिन", "parachute", "monocyte", "formation", "quinine",
    ],
)  # fmt: skip
def test_ordinary_words_are_no_pesticides(pesticides: PesticideList, text: str) -> None:
    assert pesticides.find(text) == ()


def test_places_are_those_of_the_text(pesticides: PesticideList) -> None:
    text = "पहले फ़ोरेट, फिर Methyl-Parathion 50EC और  मोनो क्रोटोफॉस।"
    found = [(text[mention.start : mention.end], mention.entry.id) for mention in pesticides.find(text)]
    assert found == [("फ़ोरेट", "phorate"), ("Methyl-Parathion", "methyl_parathion"), ("मोनो क्रोटोफॉस", "monocrotophos")]


def test_a_slip_never_turns_one_entry_into_another(pesticides: PesticideList) -> None:
    """A name of one word with one letter gone is still found, mostly; never is a listed name taken for an active."""
    rng = random.Random(0)
    owners = {name: entry.id for entry in pesticides.by_id.values() for name in (*entry.en, *entry.hi)}
    names = [
        name
        for name in sorted(owners)
        if (len(name) >= 9 and name.isalpha()) or re.fullmatch("[\u0900-\u097f]{9,}", name)
    ]
    found = 0
    for name in names:
        place = rng.randrange(1, len(name))
        ids = pesticides.ids(name[:place] + name[place + 1 :])
        listed = isinstance(pesticides.by_id[owners[name]], Pesticide)
        assert all(one == owners[name] or (listed and isinstance(pesticides.by_id[one], Pesticide)) for one in ids), (
            name
        )
        found += bool(ids)
    assert found > 0.9 * len(names) > 400


@pytest.mark.parametrize(
    ("name", "crop", "formulation", "state", "reason"),
    [
        ("endosulfan", "cotton", None, "forbidden", "banned in India"), ("फोरेट", None, None, "forbidden",
        "2026-07-31"),
        ("captafol", "rice", None, "forbidden", "export only"), ("simazine", "maize", None, "forbidden", "withdrawn"),
        ("dicrotophos", "rice", None, "forbidden", "refused"), ("malathion", "okra", None, "forbidden",
        "must not be used on okra"),
        ("malathion", "rice", None, "ok", ""), ("malathion", None, None, "ok", "not on sorghum"), ("mancozeb",
        "potato", None, "ok", ""),
        ("mancozeb", "guava", None, "forbidden", "guava"), ("dimethoate", "tomato", None, "forbidden", "tomato"),
        ("dimethoate", "mustard", None, "ok", ""),
        ("monocrotophos", "okra", None, "forbidden", "vegetables"), ("monocrotophos", "cotton", "36% SL",
        "forbidden", "cancelled"),
        ("carbofuran", "rice", "3% CG", "ok", ""), ("carbofuran", "rice", "3 CG", "ok", ""), ("carbofuran", "rice",
        None, "forbidden", "no formulation"),
        ("carbofuran", "rice", "50% SP", "forbidden", "only as 3% CG"), ("cypermethrin", "okra", "10 EC", "ok", ""),
        ("cypermethrin", "okra", "3% Smoke Generator", "forbidden", "Smoke"), ("trifluralin", "wheat", None, "ok", ""),
        ("trifluralin", "cotton", None, "forbidden", "only on wheat"), ("oxyfluorfen", "potato", None, "forbidden",
        "potato"),
        ("oxyfluorfen", "onion", None, "ok", ""), ("quinalphos", "rice", None, "ok", ""), ("chlorpyriphos", "citrus",
        None, "forbidden", "citrus"),
        ("ddt", "wheat", None, "forbidden", "public health"), ("paraquat", "cotton", None, "forbidden", "dimethyl"),
        ("streptocycline", "rice", None, "forbidden", "antibiotic"),
        ("propiconazole", "wheat", "25 EC", "ok", ""), ("carbendazim + mancozeb", "guava", None, "forbidden",
        "guava"), ("quinoxyfen", "wheat", None, "unknown", "quinoxyfen"),
    ],
)  # fmt: skip
def test_verdicts(
    pesticides: PesticideList, name: str, crop: str | None, formulation: str | None, state: str, reason: str
) -> None:
    verdict = pesticides.verdict(name, crop, formulation)
    assert verdict.state == state and reason in verdict.reason and "\n" not in verdict.reason
    assert (verdict.forbidden, verdict.unknown) == (state == "forbidden", state == "unknown")


def test_vegetables_are_all_crops_we_know(pesticides: PesticideList) -> None:
    crops = {path.stem for path in FOLDER.glob("[a-z]*.yaml")}
    for name, members in pesticides.groups.items():
        assert set(members) <= crops, name


FAULTS = {
    "unknown status": ("status: withdrawn", "status: gone", r"dalapon: status: "),
    "unknown key": ("{id: aldicarb, ", "{id: aldicarb, colour: red, ", r"aldicarb: colour: unknown key"),
    "a name twice": ("hi: [फरबाम,", "hi: [फोरेट, फरबाम,", r"ferbam: the name 'फोरेट' stands for phorate too"),
    "a crop that is not there": ("not_on: [tea]", "not_on: [mars]", r"dazomet: mars is neither a crop nor a group"),
    "a source that is not there": ("sources: [list_2026]}", "sources: [nowhere]}", r"alachlor: source nowhere"),
    "an id twice": ("{id: aldrin,", "{id: aldicarb,", r"the id stands twice"),
    "a limit without its status": ("{id: aldrin,", "{id: aldrin, not_on: [tea],", r"aldrin: "),
    "a day that is none": ('list_date: "2026-07-31"', "list_date: 2026-02-31", r"day"),
    "cut off": ("sources:\n  list_2026", "sources: {\n  list_2026", r"not valid YAML"),
}


@pytest.mark.parametrize(("found", "changed", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_refused_with_their_line(tmp_path: Path, found: str, changed: str, message: str) -> None:
    text = (FOLDER / PESTICIDES_FILE).read_text(encoding="utf-8")
    assert found in text
    (tmp_path / PESTICIDES_FILE).write_text(text.replace(found, changed, 1), encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        PesticideList.load(tmp_path)
    assert PESTICIDES_FILE in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_missing_or_in_another_encoding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        PesticideList.load(tmp_path)
    (tmp_path / PESTICIDES_FILE).write_bytes("फोरेट".encode("utf-16"))
    with pytest.raises(UserError, match="UTF-8"):
        PesticideList.load(tmp_path)


def test_finding_is_fast(pesticides: PesticideList) -> None:
    """The aim is 5,000 texts of 100 words a second; a tenth of that is asked for, test machines are busy."""
    words = [
        "मेरी",
        "गेहूं",
        "की",
        "फसल",
        "में",
        "पत्तों",
        "पर",
        "पीले",
        "धब्बे",
        "हैं",
        "और",
        "यूरिया",
        "डाला",
        "था",
        "क्या",
        "मैंकोजेब",
        "या",
        "mono",
        "crotophos",
        "डालूं",
        "बताएं",
    ]
    rng = random.Random(1)
    texts = [" ".join(rng.choices(words, k=100)) for _ in range(300)]
    start = time.process_time()
    for text in texts:
        pesticides.find(text)
    assert len(texts) / (time.process_time() - start) > 500


def test_a_hostile_text_takes_no_longer(pesticides: PesticideList) -> None:
    start = time.process_time()
    for text in ("मोनो " * 20_000, "a" * 200_000, "क़" * 100_000, "d." * 50_000, "न्" * 100_000):
        pesticides.find(text)
    assert time.process_time() - start < 15
