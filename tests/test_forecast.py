"""Forecasts: answers of Open-Meteo, a server that fails in every way, kept forecasts and files people bring."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from advisory.forecast import ForecastCache, fetch_open_meteo, from_open_meteo, read_weather
from advisory.knowledge import KNOWLEDGE_DIR
from advisory.weather import UNKNOWN, WeatherReport, WeatherRules
from litgpt.utils import UserError

ROOT = Path(__file__).parents[1]
NOW = datetime(2026, 1, 15, 9, tzinfo=UTC)


@pytest.fixture(scope="module")
def rules() -> WeatherRules:
    return WeatherRules.load(ROOT / KNOWLEDGE_DIR)


def _answer(*, days: int = 4, hourly: bool = True, daily: bool = True, old: bool = False) -> dict[str, Any]:
    """An answer as of 15 January, 14:30 in India: rain falls from 20:00 on, and three days later."""
    start = datetime(2026, 1, 15)
    hours = [start + timedelta(hours=hour) for hour in range(24 * days)]
    wind, humidity = ("windspeed_10m", "relativehumidity_2m") if old else ("wind_speed_10m", "relative_humidity_2m")
    answer: dict[str, Any] = {"latitude": 29.7, "longitude": 77.0, "utc_offset_seconds": 19800}
    if old:
        answer["current_weather"] = {"time": "2026-01-15T14:30", "temperature": 18.0, "windspeed": 9.0}
    else:
        answer["current"] = {"time": "2026-01-15T14:30", "temperature_2m": 18.0, wind: 9.0}
    if hourly:
        answer["hourly_units"] = {"time": "iso8601", "precipitation": "mm", wind: "km/h", "temperature_2m": "°C"}
        answer["hourly"] = {
            "time": [hour.strftime("%Y-%m-%dT%H:%M") for hour in hours],
            "temperature_2m": [10.0 + hour.hour / 2 for hour in hours],
            humidity: [60 + hour.hour for hour in hours],
            # 99 mm stood in the morning before the fetch: they must not count.
            "precipitation": [
                99.0 if i == 8 else 1.0 if 20 <= i < 24 else 10.0 if i == 40 else 50.0 if i > 72 else 0.0
                for i in range(len(hours))
            ],
            "precipitation_probability": [40 if i < 48 else 90 for i in range(len(hours))],
            wind: [5.0 + hour.hour / 4 for hour in hours],
        }
    if daily:
        answer["daily"] = {
            "time": [(start + timedelta(days=day)).strftime("%Y-%m-%d") for day in range(days)],
            "temperature_2m_max": [21.0, 22.0, 30.0, 30.0][:days],
            "temperature_2m_min": [8.0, 9.0, 1.0, 1.0][:days],
            "precipitation_sum": [3.0, 4.0, 5.0, 500.0][:days],
            "windspeed_10m_max" if old else "wind_speed_10m_max": [12.0, 13.0, 90.0, 90.0][:days],
        }
    return answer


@pytest.mark.parametrize("old", [False, True])
def test_open_meteo_hours_count_from_the_fetch(old: bool) -> None:
    report = from_open_meteo(_answer(old=old), "Karnal")
    assert report.fetched_at == NOW
    assert (report.source, report.place) == ("open-meteo", "Karnal")
    assert (
        report.rain_24h_mm == 4.0
    )  # 20:00 to 23:00 today; 99 mm of the morning and 10 mm of tomorrow 16:00 are outside
    assert report.rain_48h_mm == 14.0
    assert report.rain_prob_pct == 40
    assert (report.tmax_c, report.tmin_c) == (21.5, 10.0)
    assert (report.rh_max, report.rh_min) == (83, 60)
    assert report.wind_kmph == 10.75


def test_open_meteo_days_stand_in_for_missing_hours() -> None:
    report = from_open_meteo(_answer(hourly=False))
    assert (report.rain_24h_mm, report.rain_48h_mm) == (7.0, 12.0)
    assert (report.tmax_c, report.tmin_c, report.wind_kmph) == (22.0, 8.0, 13.0)
    assert report.rh_max is None
    short = _answer(days=2, daily=False)
    report = from_open_meteo(short)
    assert (report.rain_24h_mm, report.rain_48h_mm) == (4.0, None)  # only 33 of 48 hours are there


def test_open_meteo_with_nulls(rules: WeatherRules) -> None:
    answer = _answer(daily=False)
    answer["hourly"]["precipitation"][30] = None  # one gap
    assert from_open_meteo(answer).rain_24h_mm == 4.0
    answer["hourly"]["precipitation"] = [None] * 96
    answer["hourly"]["precipitation_probability"] = [None] * 96
    del answer["hourly"]["wind_speed_10m"], answer["hourly"]["relative_humidity_2m"]
    report = from_open_meteo(answer)
    assert (report.rain_24h_mm, report.rain_48h_mm, report.rh_max) == (None, None, None)
    assert report.wind_kmph == 9.0  # the current one
    assert report.flags(rules, NOW) == ("unknown",)
    bare = from_open_meteo({"current": {"time": "2026-01-15T14:30"}, "utc_offset_seconds": 19800})
    assert bare.flags(rules, NOW) == ("unknown",)


def test_open_meteo_hour_of_the_fetch_is_over() -> None:
    answer = _answer(daily=False)
    answer["current"]["time"] = "2026-01-15T20:00"  # the rain of 20:00 fell between 19:00 and 20:00
    assert from_open_meteo(answer).rain_24h_mm == 13.0  # 3 mm tonight, 10 mm tomorrow 16:00


def test_open_meteo_two_days_are_never_less_than_one() -> None:
    answer = _answer()
    # Too many of the first 24 hours are missing, few enough of 48.
    answer["hourly"]["precipitation"] = [None if 18 <= hour < 26 else 0.0 for hour in range(96)]
    report = from_open_meteo(answer)
    assert report.rain_24h_mm == report.rain_48h_mm == 7.0  # of the days; the hours that are known are dry


def test_open_meteo_units_and_unix_time() -> None:
    answer = _answer(daily=False)
    answer["hourly_units"] |= {"precipitation": "inch", "temperature_2m": "°F", "wind_speed_10m": "m/s"}
    start = datetime(2026, 1, 14, 18, 30, tzinfo=UTC).timestamp()
    answer["hourly"]["time"] = [int(start) + 3600 * hour for hour in range(96)]
    answer["current"]["time"] = int(NOW.timestamp())
    report = from_open_meteo(answer)
    assert report.rain_24h_mm == pytest.approx(4 * 25.4)
    assert report.tmax_c == pytest.approx((21.5 - 32) * 5 / 9, abs=0.01)
    assert report.wind_kmph == pytest.approx(10.75 * 3.6)


def _spoil(part: str, name: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda answer: answer[part].update({name: value})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda answer: (answer.clear(), answer.update(reason="Too many\nrequests")), "open-meteo: Too many requests"),
        (lambda answer: answer.pop("current"), "nothing says when it was fetched"),
        (lambda answer: answer.update(hourly=[1]), "hourly is not an object"),
        (lambda answer: answer.update(utc_offset_seconds="IST"), "utc_offset_seconds is 'IST'"),
        (_spoil("hourly", "time", "now"), "time is not a list"),
        (_spoil("hourly", "time", ["soon"] * 96), "'soon' is no time"),
        (_spoil("hourly", "precipitation", [1.0]), "precipitation does not fit its times"),
        (_spoil("hourly", "precipitation", ["wet"] * 96), "precipitation holds 'wet'"),
        (_spoil("hourly", "precipitation", [float("nan")] * 96), "precipitation holds nan"),
        (_spoil("hourly", "relative_humidity_2m", [140] * 96), "rh_max is 140"),
        (_spoil("hourly", "temperature_2m", [-300] * 96), "tmax_c is -300"),
        (_spoil("hourly_units", "precipitation", "furlong"), "the unit 'furlong'"),
        (_spoil("current", "time", None), "None is no time"),
    ],
)
def test_broken_answer_is_one_line(spoil: Callable[[dict[str, Any]], None], message: str) -> None:
    answer = _answer()
    spoil(answer)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        from_open_meteo(answer)
    assert "\n" not in str(error.value)


@contextmanager
def _server(reply: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[tuple[str, list[str]]]:
    """A real server on this machine: its address, and the paths it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            reply(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *args: object) -> None:
            pass  # the client hangs up on slow answers, as it should

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1/forecast", asked
    finally:
        server.shutdown()
        server.server_close()


def _send(status: int, body: bytes, length: int | None = None) -> Callable[[BaseHTTPRequestHandler], None]:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return reply


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_fetch_over_http(rules: WeatherRules) -> None:
    now = datetime.now(UTC)
    answer = _answer(hourly=False) | {"daily": {"time": [], "precipitation_sum": []}}
    stamps = [now.replace(minute=0, second=0, microsecond=0) + timedelta(hours=hour) for hour in range(72)]
    answer["hourly"] = {"time": [int(stamp.timestamp()) for stamp in stamps], "precipitation": [1.0] * 72}
    with _server(_send(200, json.dumps(answer).encode())) as (url, asked):
        report = fetch_open_meteo(29.68571, 76.99123, 5, place="करनाल", url=url)
    assert report.reason is None
    assert (report.source, report.place) == ("open-meteo", "करनाल")
    assert report.fetched_at is not None and abs(report.fetched_at - now) < timedelta(seconds=30)
    assert report.rain_24h_mm == 24.0
    assert report.flags(rules) == ("rain_soon",)
    query = parse_qs(urlsplit(asked[0]).query)
    assert (query["latitude"], query["longitude"]) == (["29.69"], ["76.99"])
    assert "precipitation" in query["hourly"][0].split(",")


def _drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(120):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (_send(500, b"oops"), "open-meteo answered 500"),
        (_send(404, b"{}"), "open-meteo answered 404"),
        (_send(200, b'{"hourly": {"time": ['), "the answer is not valid JSON"),
        (_send(200, b"\xff\xfe"), "the answer is not valid JSON"),
        (_send(200, b"[" * 100_000), "the answer is not valid JSON"),
        (_send(200, b""), "the answer is not valid JSON"),
        (_send(200, b"[1]"), "not an answer with a forecast"),
        (_send(200, b'{"error": true, "reason": "no\\nway"}'), "open-meteo: no way"),
        (_send(200, b'{"hourly": {"time": ["2026-01-15T00:00"], "precipitation": [NaN]}}'), "holds nan"),
        (_send(200, b'{"a": 1}'), "not an answer with a forecast"),
        (_send(200, b'{"a": 1}', length=99), "the connection broke: IncompleteRead"),
        (_send(200, b" " * 3_000_000), "the answer is too long"),
        (lambda handler: time.sleep(6), "did not answer within 0.4 seconds"),
        (_drip, "did not answer within 0.4 seconds"),
        (lambda handler: handler.wfile.write(b"no http at all\r\n\r\n"), "the connection broke: BadStatusLine"),
    ],
)
def test_fetch_that_fails_is_unknown_with_its_reason(
    rules: WeatherRules, reply: Callable[[BaseHTTPRequestHandler], None], reason: str
) -> None:
    # Only who never answers is cut short: a busy machine may take its time for the other answers.
    timeout = 0.4 if "within 0.4" in reason else 20
    start = time.monotonic()
    with _server(reply) as (url, _):
        report = fetch_open_meteo(29.7, 77.0, timeout, url=url)
        assert timeout == 20 or time.monotonic() - start < 4
    assert report.reason is not None and reason in report.reason
    assert replace(report, reason=None) == UNKNOWN
    assert report.flags(rules) == ("unknown",)


def test_fetch_without_network(rules: WeatherRules) -> None:
    with _server(_send(200, b"")) as (url, _):
        pass
    report = fetch_open_meteo(29.7, 77.0, 2, url=url)
    assert report.reason is not None and report.reason.startswith("no connection")
    for latitude, longitude, timeout in ((91, 0, 1), (0, 181, 1), (float("nan"), 0, 1), (0, 0, 0)):
        with pytest.raises(UserError, match=r"is no place|timeout is"):
            fetch_open_meteo(latitude, longitude, timeout, url=url)


def _kept(hours: float = 5, rain_24h_mm: float = 0.0) -> WeatherReport:
    fetched_at = NOW - timedelta(hours=hours)
    return WeatherReport(
        place="Karnal", source="open-meteo", fetched_at=fetched_at, rain_24h_mm=rain_24h_mm, wind_kmph=6.0
    )


def test_cache_gives_back_with_age(tmp_path: Path, rules: WeatherRules) -> None:
    cache = ForecastCache(tmp_path / "kept")
    for place in ("करनाल", "Karnal", "../../etc", "\ud800"):
        report = replace(_kept(30, rain_24h_mm=6.0), place=place)
        assert cache.save(report).parent == tmp_path / "kept"
        kept = cache.load(place)
        assert kept == replace(report, source="cache")
        assert kept.flags(rules, NOW) == ("rain_soon", "stale")
    assert len(list((tmp_path / "kept").iterdir())) == 4
    cache.save(replace(_kept(1), place="Karnal"))
    assert cache.load("Karnal").flags(rules, NOW) == ("clear",)
    for report in (UNKNOWN, WeatherReport.manual("clear")):
        with pytest.raises(UserError, match="place and a time"):
            cache.save(report)


@pytest.mark.parametrize(
    "text", ["", '{"place": "Karnal", "tmax', '{"place": "Karnal", "tmax_c": 900}', "[]", "\x00", "{}"]
)
def test_corrupt_cache_is_ignored_with_its_reason(tmp_path: Path, rules: WeatherRules, text: str) -> None:
    cache = ForecastCache(tmp_path)
    path = cache.save(_kept())
    path.write_text(text, encoding="utf-8")
    report = cache.load("Karnal")
    assert report.reason is not None and report.reason.startswith("no kept forecast: ")
    assert report.flags(rules, NOW) == ("unknown",)
    path.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in (cache.load("Karnal").reason or "")
    assert "no such file" in (cache.load("Rewari").reason or "")
    cache.save(replace(_kept(), place="Hisar")).rename(path)
    assert "of another place" in (cache.load("Karnal").reason or "")


def test_files(tmp_path: Path, rules: WeatherRules) -> None:
    own = {"place": "करनाल", "rain_24h_mm": 6.0, "wind_kmph": 24, "fetched_at": "2026-01-15T09:30"}
    (tmp_path / "a.json").write_text(json.dumps(own), "utf-8")
    (tmp_path / "a.csv").write_text(
        f"Place, rain_24h_mm,wind_kmph,tmax_c,fetched_at\r\n{own['place']},6.0,24,,2026-01-15T09:30\r\n", "utf-8-sig"
    )
    reports = [read_weather(tmp_path / name) for name in ("a.json", "a.csv")]
    assert reports[0] == reports[1]
    assert reports[0].line_hi(rules, NOW) == "अगले 24 घंटे में बारिश, तेज हवा (पूर्वानुमान, 5 घंटे पुराना)"
    (tmp_path / "b.json").write_text(json.dumps(_answer()), "utf-8")
    assert read_weather(tmp_path / "b.json").rain_24h_mm == 4.0
    assert read_weather(tmp_path / "b.json").source == "file"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"tmax_c": 40', "a.json:1: not valid JSON"),
        ("a.json", '{"tmax_c": NaN}', "NaN is no number"),
        ("a.json", '{"rh_max": 140}', "a.json: weather: rh_max is 140"),
        ("a.json", '{"hourly": {"time": []}}', "nothing says when it was fetched"),
        ("a.csv", "tmax_c\n40\n41\n", "2 rows; one row of weather"),
        ("a.csv", "", "0 rows"),
        ("a.csv", "tmax_c\n900\n", "a.csv:2: weather: tmax_c is 900"),
        ("a.csv", "heat\n40\n", "a.csv:2: weather: 'heat' is not known"),
        ("a.xml", "<a/>", "read from a .json or .csv file"),
    ],
)
def test_broken_file_is_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read_weather(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)
