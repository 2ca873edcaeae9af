"""Forecasts as files have them, as Open-Meteo sends them, and as they were kept: each becomes a `WeatherReport`.

Where a forecast cannot be had, there is a report that says why and knows nothing: a farm without a network still gets
advice. What a report means stands in `advisory/weather.py`.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from advisory.readfile import read_json, read_rows
from advisory.weather import WeatherReport, moment_of
from litgpt.utils import UserError, atomic_file

OPEN_METEO_URL = "https://api.open-meteo.com/v1/forecast"
MAX_ANSWER = 2_000_000
KNOWN_SHARE = 0.8
"""Of the hours that are summed, so many must be known."""


def read_weather(path: Path) -> WeatherReport:
    """A report in a .json file (its fields, or an answer of Open-Meteo as it came) or a .csv with one row of them.

    Raises:
        UserError: one line that names the file, and the line or field.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".json", ".csv"):
        raise UserError(f"{path}: weather is read from a .json or .csv file")
    values: Mapping[str, Any]
    if suffix == ".json":
        values, place = read_json(path), str(path)
    else:
        rows = read_rows(path, ())
        if len(rows) != 1:
            raise UserError(f"{path}: {len(rows)} rows; one row of weather is needed")
        values, place = rows[0][1], f"{path}:{rows[0][0]}"
    try:
        if {"hourly", "daily", "error"} & set(values):
            return replace(from_open_meteo(values), source="file")
        return replace(WeatherReport.from_mapping(values), source="file")
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def from_open_meteo(
    answer: Mapping[str, Any], place: str | None = None, fetched_at: datetime | None = None
) -> WeatherReport:
    """An answer of Open-Meteo: the 24 and 48 hours after it was fetched.

    Hourly values count; where they are missing, whole days do, the rain of today and tomorrow together standing
    for 24 hours, so that rain is rather said too often. Old names ("windspeed_10m") and units are understood.

    Args:
        answer: the parsed JSON.
        place: what the place is called.
        fetched_at: when it was fetched; by default the time of its `current` values.

    Raises:
        UserError: an error that Open-Meteo reports, or an answer of another form.
    """
    if not isinstance(answer, Mapping) or not {"current", "current_weather", "hourly", "daily"} & set(answer):
        reason = answer.get("reason") if isinstance(answer, Mapping) else None
        raise UserError(f"open-meteo: {_line(reason) or 'not an answer with a forecast'}")
    offset = answer.get("utc_offset_seconds") or 0
    if isinstance(offset, bool) or not isinstance(offset, int) or abs(offset) >= 86_400:
        raise UserError(f"open-meteo: utc_offset_seconds is {offset!r:.60}")
    zone = timezone(timedelta(seconds=offset))
    current = answer.get("current") or answer.get("current_weather") or {}
    if fetched_at is None:
        if not isinstance(current, Mapping) or "time" not in current:
            raise UserError("open-meteo: nothing says when it was fetched; ask for current values, too")
        fetched_at = moment_of(current["time"], zone)
    hours, days = _Series(answer, "hourly", zone), _Series(answer, "daily", zone)
    end, later = fetched_at + timedelta(hours=24), fetched_at + timedelta(hours=48)
    today = fetched_at.astimezone(zone).replace(hour=0, minute=0, second=0, microsecond=0)
    tomorrow, after = today + timedelta(days=1), today + timedelta(days=2)

    def rain(until: datetime, last_day: datetime) -> float | None:
        # An hour's rain is what fell before it, so the hour at which it was fetched is over.
        hourly = hours.known("precipitation", after=fetched_at, until=until)
        return math.fsum(hourly) if hourly else _sum(days.known("precipitation_sum", since=today, until=last_day))

    def of(name: str, daily: str) -> list[float]:
        return hours.some(name, since=fetched_at, until=end) or days.some(daily, since=today, until=tomorrow)

    wind = of("wind_speed_10m", "wind_speed_10m_max") or _current_wind(answer, current)
    temperatures = hours.some("temperature_2m", since=fetched_at, until=end)
    rain_24h, rain_48h = rain(end, tomorrow), rain(later, after)
    if rain_24h is not None and rain_48h is not None:
        rain_48h = max(rain_24h, rain_48h)  # the first may come from whole days, the second from hours
    return WeatherReport(
        place=place,
        source="open-meteo",
        fetched_at=fetched_at,
        tmax_c=_best(max, temperatures or days.some("temperature_2m_max", since=today, until=tomorrow)),
        tmin_c=_best(min, temperatures or days.some("temperature_2m_min", since=today, until=tomorrow)),
        rh_max=_best(max, of("relative_humidity_2m", "relative_humidity_2m_max")),
        rh_min=_best(min, of("relative_humidity_2m", "relative_humidity_2m_min")),
        rain_24h_mm=rain_24h,
        rain_48h_mm=rain_48h,
        rain_prob_pct=_best(max, of("precipitation_probability", "precipitation_probability_max")),
        wind_kmph=_best(max, wind),
    )


def fetch_open_meteo(
    latitude: float, longitude: float, timeout: float = 10.0, *, place: str | None = None, url: str = OPEN_METEO_URL
) -> WeatherReport:
    """The forecast for a place from Open-Meteo; where it cannot be had within `timeout` seconds, the reason why.

    The place is rounded to 0.01 degrees (a kilometre): nobody needs to know which house asks.

    Raises:
        UserError: no place on earth, or no time to wait.
    """
    if not (-90 <= latitude <= 90 and -180 <= longitude <= 180):
        raise UserError(f"weather: {latitude}, {longitude} is no place; give latitude -90 to 90, longitude -180 to 180")
    if not 0 < timeout < math.inf:
        raise UserError(f"weather: timeout is {timeout}; give seconds above 0")
    query = {
        "latitude": round(latitude, 2),
        "longitude": round(longitude, 2),
        "current": "temperature_2m,wind_speed_10m",
        "hourly": "temperature_2m,relative_humidity_2m,precipitation,precipitation_probability,wind_speed_10m",
        "daily": "temperature_2m_max,temperature_2m_min,precipitation_sum,wind_speed_10m_max",
        "timezone": "Asia/Kolkata",
        "forecast_days": 4,
    }
    try:
        answer = json.loads(_download(f"{url}?{urllib.parse.urlencode(query, safe=',')}", timeout))
        return from_open_meteo(answer, place, datetime.now(UTC))
    except urllib.error.HTTPError as error:
        reason = f"open-meteo answered {error.code}"
        error.close()
    except UserError as error:
        reason = str(error)
    except TimeoutError:
        reason = f"open-meteo did not answer within {timeout:g} seconds"
    except urllib.error.URLError as error:
        late = isinstance(error.reason, TimeoutError)
        reason = f"open-meteo did not answer within {timeout:g} seconds" if late else f"no connection: {error.reason}"
    except (OSError, http.client.HTTPException) as error:
        reason = f"the connection broke: {type(error).__name__}"
    except (ValueError, RecursionError):
        reason = "open-meteo: the answer is not valid JSON"
    return WeatherReport(place=place, reason=_line(reason))


@dataclass(frozen=True)
class ForecastCache:
    """The last forecast of each place, in a folder; for when there is no network."""

    directory: Path

    def save(self, report: WeatherReport) -> Path:
        """Keep a forecast in place of the last one.

        Raises:
            UserError: a report without place or time.
        """
        if report.place is None or report.fetched_at is None:
            raise UserError("weather: only a forecast with a place and a time can be kept")
        content = asdict(report) | {"fetched_at": report.fetched_at.isoformat()}
        path = self._path(report.place)
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
        return path

    def load(self, place: str) -> WeatherReport:
        """The kept forecast, its age counting from when it was fetched; without one, a report with the reason."""
        try:
            report = WeatherReport.from_mapping(read_json(self._path(place)))
            if report.place != place or report.fetched_at is None:
                raise UserError("it is of another place, or says no time")
            return replace(report, source="cache")
        except (UserError, OSError) as error:
            return WeatherReport(place=place, reason=_line(f"no kept forecast: {error}"))

    def _path(self, place: str) -> Path:
        # A name of its own for each place, whatever letters it is written in.
        return self.directory / f"{hashlib.sha256(place.encode('utf-8', 'surrogatepass')).hexdigest()[:24]}.json"


def _download(address: str, timeout: float) -> bytes:
    """The bytes behind an address within `timeout`, whatever takes long.

    A thread waits, because no timeout of a socket ends a look-up of a name, or the patience with a server that drips.
    """
    box: queue.Queue[bytes | Exception] = queue.Queue()

    def work() -> None:
        try:
            box.put(_read(address, timeout))
        except Exception as error:
            box.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        got = box.get(timeout=timeout)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(got, Exception):
        raise got
    return got


def _read(address: str, timeout: float) -> bytes:
    end = time.monotonic() + timeout
    content = b""
    with urllib.request.urlopen(address, timeout=timeout) as response:
        while part := response.read1(65_536):
            content += part
            if len(content) > MAX_ANSWER:
                raise UserError("open-meteo: the answer is too long")
            if time.monotonic() > end:
                raise TimeoutError
        if response.length:  # of what it promised, so much never came
            raise http.client.IncompleteRead(content)
    return content


# What a unit of an answer is multiplied by, after the zero point is taken off.
_UNITS: Mapping[str, tuple[float, float]] = {
    "": (0, 1), "mm": (0, 1), "°C": (0, 1), "%": (0, 1), "km/h": (0, 1), "inch": (0, 25.4), "°F": (32, 5 / 9),
    "m/s": (0, 3.6), "mp/h": (0, 1.609344), "mph": (0, 1.609344), "kn": (0, 1.852),
}  # fmt: skip
_OLD_NAMES = {"wind_speed_10m": "windspeed_10m", "relative_humidity_2m": "relativehumidity_2m"}


class _Series:
    """The columns of a part of an answer ("hourly", "daily"), by time."""

    def __init__(self, answer: Mapping[str, Any], part: str, zone: timezone) -> None:
        self._part = part
        self._columns: Mapping[str, Any] = answer.get(part) or {}
        self._units: Mapping[str, Any] = answer.get(f"{part}_units") or {}
        if not isinstance(self._columns, Mapping) or not isinstance(self._units, Mapping):
            raise UserError(f"open-meteo: {part} is not an object")
        times = self._columns.get("time") or []
        if not isinstance(times, list):
            raise UserError(f"open-meteo: {part} time is not a list")
        self._times = [moment_of(moment, zone) for moment in times]

    def _values(self, name: str) -> list[float | None]:
        for new, old in _OLD_NAMES.items():
            name = name if name in self._columns else name.replace(new, old)
        values = self._columns.get(name)
        if values is None:
            return [None] * len(self._times)
        if not isinstance(values, list) or len(values) != len(self._times):
            raise UserError(f"open-meteo: {self._part} {name} does not fit its times")
        return [None if value is None else _in_unit(name, value, self._units.get(name, "")) for value in values]

    def _window(self, name: str, since: datetime | None, after: datetime | None, until: datetime) -> list[float | None]:
        return [
            value
            for moment, value in zip(self._times, self._values(name), strict=True)
            if (since is None or moment >= since) and (after is None or moment > after) and moment <= until
        ]

    def some(self, name: str, *, since: datetime, until: datetime) -> list[float]:
        """The known values of a column from a time to another."""
        return [value for value in self._window(name, since, None, until) if value is not None]

    def known(
        self, name: str, *, since: datetime | None = None, after: datetime | None = None, until: datetime
    ) -> list[float]:
        """The values where nearly all of them are known up to the end, else none: a gap may hide rain."""
        values = self._window(name, since, after, until)
        start = since or after
        assert start is not None
        step = timedelta(days=1) if self._part == "daily" else timedelta(hours=1)
        wanted = (until - start) // step + (1 if since else 0)
        found = [value for value in values if value is not None]
        return found if found and len(found) >= KNOWN_SHARE * wanted else []


def _in_unit(name: str, value: Any, unit: Any) -> float:
    if unit not in _UNITS:
        raise UserError(f"open-meteo: the unit {unit!r:.20} of {name} is not known")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"open-meteo: {name} holds {value!r:.60}, which is no number")
    zero, factor = _UNITS[unit]
    return (value - zero) * factor


def _current_wind(answer: Mapping[str, Any], current: Any) -> list[float]:
    units = answer.get("current_units") or answer.get("current_weather_units") or {}
    if not isinstance(current, Mapping) or not isinstance(units, Mapping):
        return []
    names = ("wind_speed_10m", "windspeed_10m", "windspeed")
    return [_in_unit(name, current[name], units.get(name, "")) for name in names if current.get(name) is not None][:1]


def _best(choose: Any, values: Sequence[float]) -> float | None:
    return round(choose(values), 2) if values else None


def _sum(values: Sequence[float]) -> float | None:
    return math.fsum(values) if values else None


def _line(text: object) -> str:
    """A text from outside in one short printable line."""
    return " ".join(str(text or "").encode("utf-8", "replace").decode().split())[:200]
