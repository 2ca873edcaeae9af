"""What surrounds a sign in a composed case: age, soil card, weather, what was done, and the list of chemicals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from random import Random

from advisory.advice import STANDING_CROP_USES
from advisory.case import Applied
from advisory.facts import Facts
from advisory.knowledge import Chemical, Crop, Problem
from advisory.soil import SoilCard
from advisory.weather import WeatherReport

STATES = ("rain_soon", "heavy_rain", "windy", "hot", "cool_humid", "warm_humid", "dry", "frost", "clear")
"""The states of the weather that are told."""
COMPOSED_AT = datetime(2026, 1, 15, 9, tzinfo=UTC)
"""When forecasts in the dialogues are read; a fixed moment, so that the same seed gives the same bytes."""
LATE_ORGANS = ("बाली", "बालि", "दाना", "दाने", "भुट्ट", "फूल", "फली", "फलि", "फल ", "फलों", "टिंड", "कंद", "डोडी")
UNRELATED_SOIL = ("low_n", "low_p", "low_k", "low_oc", "low_zn", "high_ph")


def age(problem: Problem, crop: Crop, symptoms: Sequence[str], rng: Random, *, usual: bool = False) -> int:
    """Mostly a day of the usual window, one time in twelve a day well outside it; often a round number.

    An ear, a pod or a tuber is there only later on, so a symptom that names one keeps to the later half of the window.
    """
    start, end = problem.days
    late = any(organ in symptom for organ in LATE_ORGANS for symptom in symptoms)
    outside = [day for day in range(5, crop.last_day + 1, 5) if day > end + 7 or (day < start - 7 and not late)]
    if late:
        start = (start + end) // 2
    if outside and not usual and rng.random() < 1 / 12:
        return rng.choice(outside)
    day = rng.randint(max(start, 1), max(end, 1))
    rounded = round(day / 5) * 5
    return rounded if rng.random() < 0.7 and max(start, 1) <= rounded <= end else day


def card(problem: Problem, facts: Facts, rng: Random) -> SoilCard:
    """A card that supports the problem, one that is normal, one that speaks against it, or one about something else."""
    draw = rng.random()
    if problem.soil_links and draw < 0.6:
        flag: str = rng.choice(problem.soil_links)
        card = (facts.soil.card_with if draw < 0.45 else facts.soil.card_without)(flag, rng)
    elif draw < 0.8:
        flag, card = "low_n", facts.soil.card_without("low_n", rng)
    else:
        flag = rng.choice([flag for flag in UNRELATED_SOIL if flag not in problem.soil_links])
        card = facts.soil.card_with(flag, rng)
    if rng.random() < 0.5:
        return card
    # Few cards are whole: the reading that matters and some others.
    kept = {facts.soil.reading_of(flag), *rng.sample(list(card.readings), rng.randint(1, 4))}
    return replace(card, readings={key: reading for key, reading in card.readings.items() if key in kept})


def weather(rng: Random) -> WeatherReport:
    """What a person says of the weather, or a forecast of some hours ago."""
    if rng.random() < 0.75:
        flags = [rng.choice(STATES)]
        if flags[0] in {"rain_soon", "hot", "dry"} and rng.random() < 0.2:
            flags.append("windy")
        return WeatherReport.manual(*flags)
    tmax = rng.choice((18.0, 24.0, 30.0, 34.0, 41.0))
    return WeatherReport(
        source=rng.choice(("open-meteo", "cache")),
        fetched_at=COMPOSED_AT - timedelta(hours=rng.choice((1, 3, 6, 12, 30, 80))),
        tmax_c=tmax,
        tmin_c=tmax - rng.choice((8.0, 12.0, 16.0)),
        rain_24h_mm=rng.choice((0.0, 0.0, 0.0, 6.0, 15.0, 70.0)),
        wind_kmph=rng.choice((5.0, 9.0, 14.0, 24.0)),
    )


def applied(rng: Random) -> tuple[Applied, ...]:
    days = rng.choice((1, 2, 3, 5, 8, 15))
    return (
        rng.choice((Applied("fertiliser", days, "यूरिया"), Applied("pesticide", days), Applied("irrigation", days))),
    )


def table(problem: Problem, rng: Random) -> tuple[Chemical, ...]:
    """Up to two lines of the list for this problem, in the order of the file."""
    if problem.kind == "weed":
        return ()
    listed = [chemical for chemical in problem.chemicals if chemical.dose and chemical.use in STANDING_CROP_USES]
    chosen = rng.sample(range(len(listed)), min(len(listed), rng.choice((1, 1, 2))))
    return tuple(listed[number] for number in sorted(chosen))
