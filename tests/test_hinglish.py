"""Wording: Roman Hindi as it is typed, slips, dialect, voice transcripts."""

from __future__ import annotations

import re
import unicodedata
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisory.case import age_in
from advisory.hinglish import NUMBERS, as_spoken, in_dialect, romanise, with_slips
from advisory.questions import MONTHS, STYLES, in_style


class Never(Random):
    """Always draws 0.99 and the first choice: short vowels, a full stop for a danda."""

    def random(self) -> float:
        return 0.99


@pytest.mark.parametrize(
    ("hindi", "roman"),
    [
        ("निचली जगह की फसल पीली है", "nichli jagah ki fasal pili hai"),
        ("पत्तों पर धब्बे", "patto par dhabbe"),
        ("अचानक झुककर", "achanak jhukkar"),
        ("बढ़वार", "badhvar"),
        ("कमल", "kamal"),
        ("लड़का सड़क पर", "ladka sadak par"),
        ("ज़्यादा", "zyada"),
        ("ऊपर की इल्ली", "upar ki illi"),
        ("अंडे", "ande"),
        ("60 दिन", "60 din"),
    ],
)
def test_roman_hindi_as_people_type_it(hindi: str, roman: str) -> None:
    assert romanise(unicodedata.normalize("NFC", hindi), Never()) == roman


@given(st.text(st.characters(min_codepoint=0x900, max_codepoint=0x97F), max_size=30), st.integers())
def test_no_text_breaks_the_rules(text: str, seed: int) -> None:
    roman = romanise(text, Random(seed))
    assert not re.search(r"[\u0905-\u0939]", roman)
    for style in (with_slips(text, Random(seed)), in_dialect(text), as_spoken(text, Random(seed))):
        assert isinstance(style, str)


def test_slips_change_words_but_never_numbers() -> None:
    text = "गेहूं के पत्तों पर पीले धब्बे हैं, फसल 60 दिन की है"
    for seed in range(50):
        slipped = with_slips(text, Random(seed))
        changed = [a for a, b in zip(text.split(), slipped.split(), strict=True) if a != b]
        assert 1 <= len(changed) <= 2 and "60" in slipped
    assert with_slips("", Random(0)) == "" and with_slips("क ख", Random(0)) == "क ख"


def test_a_voice_transcript_has_no_punctuation_and_says_round_numbers() -> None:
    spoken = as_spoken("नमस्ते, फसल 60 दिन की है। क्या करूं?", Random(1))
    assert not re.search(r"[।?,.!]", spoken) and "साठ दिन" in spoken


def test_dialect_leaves_other_words_alone() -> None:
    assert in_dialect("मेरी फसल के पत्ते 60 दिन") == "हमार फसिल के पाती 60 दिन"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("age", "said"), [*((age, f"{age} दिन") for age in NUMBERS), *MONTHS.items()])
def test_an_age_that_is_composed_is_read_back_in_every_style(style: str, age: int, said: str) -> None:
    for seed in range(8):
        asked = in_style(f"मेरी गेहूं की फसल {said} की है, पत्तियां 3 दिन से पीली हैं।", style, Random(seed))
        assert age_in(asked) == age, asked


@pytest.mark.parametrize(
    ("text", "age"),
    [
        ("फसल दो महीने की है", 60),
        ("डेढ़ माह की फसल", 45),
        ("dhai mahine ki fasal", 75),
        ("1.5 months old", 45),
        ("पाँच महीने की", 150),
        ("What to do, 60 days old crop", 60),
        ("दो महीने पहले बोई थी", None),
        ("तीन महीने से पीले हैं", None),
        ("दो-तीन महीने की", None),
        ("50-60 दिन की", None),
        ("दो सौ दिन की", None),
        ("एक दिन देखा", None),
        ("999 महीने की", None),
        ("दो महीने की, 45 दिन की", None),
    ],
)
def test_ages_in_days_and_months(text: str, age: int | None) -> None:
    assert age_in(text) == age
