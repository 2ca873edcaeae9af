"""Kisan Call Centre transcripts: their columns in all dumps, what in them is of no use, and the public API.

The transcripts are published by the Government of India under GODL-India. Dumps differ in their columns' names and
encodings; `QueryText` is mostly short English, `KccAns` Hindi, Hinglish or English.
"""

from __future__ import annotations

import functools
import gzip
import http.client
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from advisory.importer import Reason, Row
from advisory.normalise import normalise_hindi
from advisory.tables import Raw
from litgpt.utils import UserError, atomic_file

SOURCE = "kcc"
LICENCE = "GODL-India"
API_URL = "https://api.data.gov.in/resource/cef25fe2-9231-4128-8aec-2c948fedd43f"
KEY_VARIABLE = "DATA_GOV_IN_API_KEY"

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "question": ("querytext", "query", "question", "querydescription"),
    "answer": ("kccans", "kccanswer", "answer", "ans", "answers"),
    "state": ("statename", "state"),
    "district": ("districtname", "district"),
    "season": ("season",),
    "sector": ("sector",),
    "category": ("category",),
    "crop": ("crop", "cropname"),
    "query_type": ("querytype", "typeofquery"),
    "created": ("createdon", "createddate", "createdat", "date"),
    "year": ("year",),
}
"""Our name of a column → its names in the dumps, in small letters and without spaces and signs."""
REQUIRED = {"question": "QueryText", "answer": "KccAns"}

_YEAR = re.compile(r"(?:19|20)\d\d")
_NO_VALUE = frozenset({"", "0", "na", "n/a", "nan", "null", "none", "-", "others", "other"})


class KccRows:
    """Turns raw rows of one file into the pipeline's rows.

    Args:
        path: the file, for complaints.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns: Sequence[str] | None = None
        self._place: dict[str, int] = {}

    def __call__(self, raw: Raw) -> Row:
        """The row.

        Raises:
            UserError: the file has no question or answer column, or two of one.
        """
        if raw.columns is not self._columns and raw.columns != self._columns:
            self._place = find_columns(raw.columns, self._path, first=self._columns is None)
            self._columns = raw.columns
        values, place = (*raw.values, ""), self._place
        return Row(
            line=raw.line,
            question=values[place["question"]],
            answer=values[place["answer"]],
            crop=label(values[place["crop"]]),
            licence=LICENCE,
            reason=reason_of_type(values[place["query_type"]], values[place["sector"]]),
            meta=functools.partial(_meta, values, place),
        )


def _meta(values: Sequence[str], place: Mapping[str, int]) -> dict[str, Any]:
    """What is noted of a row that is kept."""
    return {
        "state": label(values[place["state"]], title=True) or None,
        "district": label(values[place["district"]], title=True) or None,
        "season": label(values[place["season"]], title=True) or None,
        "query_type": label(values[place["query_type"]]) or None,
        "year": _year(values[place["year"]], values[place["created"]]),
    }


def find_columns(columns: Sequence[str], path: Path, *, first: bool = True) -> dict[str, int]:
    """Our names of columns → their places, -1 for what is not there.

    Args:
        columns: names as the file has them; case, spaces and underscores do not matter.
        path: the file, for complaints.
        first: the file's first columns. Later objects of a JSON file may lack some; their rows are then empty.

    Raises:
        UserError: question or answer are missing, or a column stands twice.
    """
    names = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in columns]
    place: dict[str, int] = {}
    for ours, theirs in COLUMNS.items():
        places = [index for index, name in enumerate(names) if name in theirs]
        if len(places) > 1:
            found = " and ".join(repr(columns[index]) for index in places)
            raise UserError(f"{path}: the columns {found} both stand for {ours}; remove or rename one")
        place[ours] = places[0] if places else -1
    missing = [name for ours, name in REQUIRED.items() if place[ours] < 0]
    if missing and first:
        found = ", ".join(map(str, columns[:30])) or "none"
        raise UserError(
            f"{path}: no column {' and no column '.join(missing)}; found: {found[:600]}. Expected those of the "
            "Kisan Call Centre: StateName, DistrictName, BlockName, Season, Sector, Category, Crop, QueryType, "
            "QueryText, KccAns, CreatedOn"
        )
    return place


@functools.lru_cache(maxsize=4096)
def reason_of_type(query_type: str, sector: str) -> Reason | None:
    """Calls about a day's weather or price are useless the day after."""
    kind = re.sub(r"[^a-z]+", " ", f"{query_type} {sector}".lower())
    if "weather" in kind:
        return "weather"
    return "price" if "market" in kind or re.search(r"\bprices?\b", kind) else None


@functools.lru_cache(maxsize=16384)
def label(text: str, *, title: bool = False) -> str:
    """A name in a column, cleaned; placeholders such as "0" and "Others" are empty. `title` evens out UPPER CASE."""
    cleaned = normalise_hindi(text)[:120].strip()
    if cleaned.lower() in _NO_VALUE:
        return ""
    return cleaned.title() if title else cleaned


@functools.lru_cache(maxsize=16384)
def _year(year: str, created: str) -> int | None:
    match = _YEAR.search(year) or _YEAR.search(created)
    return int(match.group()) if match else None


# -- the public API ---------------------------------------------------------------------------------------------------

RETRIES = 6
LONGEST_WAIT = 60.0
TIMEOUT = 120.0
_PAGE = re.compile(r"rows-(\d{9})-(\d{9})\.json\.gz")


def download(
    pages_dir: Path,
    api_key: str,
    *,
    url: str = API_URL,
    filters: Mapping[str, str] | None = None,
    page_size: int = 1000,
    max_rows: int | None = None,
    wait: Callable[[float], None] = time.sleep,
    say: Callable[[str], None] = print,
) -> int:
    """Fetch pages of transcripts into `pages_dir`; what is there already is not fetched again.

    Args:
        pages_dir: one file a page, written whole or not at all.
        api_key: a key of data.gov.in; it is never shown or stored.
        url: the resource.
        filters: column → value, e.g. {"StateName": "UTTAR PRADESH"}.
        page_size: rows asked for at once.
        max_rows: stop after so many; all by default.
        wait: waits so many seconds between two tries.
        say: takes a line about the progress.

    Returns:
        rows on the disk.

    Raises:
        UserError: the server refuses, or does not answer after several tries.
    """
    if not _is_address(url):
        raise UserError(f"{url!r} is no web address; expected e.g. {API_URL}, without spaces and without ?...")
    if page_size < 1:
        raise UserError(f"page_size is {page_size}: expected at least 1")
    _same_query(pages_dir, url, filters or {})
    offset, total = _rows_on_disk(pages_dir), None
    if offset:
        say(f"{pages_dir} has {offset:,} rows already; going on from there")
    while (total is None or offset < total) and (max_rows is None or offset < max_rows):
        limit = page_size if max_rows is None else min(page_size, max_rows - offset)
        query = {"api-key": api_key, "format": "json", "offset": str(offset), "limit": str(limit)}
        query |= {f"filters[{column}]": value for column, value in (filters or {}).items()}
        page = _fetch(url, query, offset, wait)
        records = page["records"]
        if not records:
            break
        # The server may give fewer rows than it was asked for (10 with the public sample key).
        end = offset + len(records)
        with (
            atomic_file(pages_dir / f"rows-{offset:09d}-{end:09d}.json.gz") as temporary,
            gzip.open(temporary, "wt", encoding="utf-8") as file,
        ):
            json.dump(records, file, ensure_ascii=False)
        offset = end
        total = int(page["total"]) if str(page.get("total", "")).isdigit() else None
        say(f"{offset:,} of {total if total is None else format(total, ',')} rows")
    return offset


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that are not closed, a port that is no number
        return False
    return known and url.isascii() and url.isprintable() and not set(" ?#") & set(url)


def _same_query(pages_dir: Path, url: str, filters: Mapping[str, str]) -> None:
    """Pages of two queries in one folder would be mixed up."""
    asked = {"url": url, "filters": dict(filters)}
    path = pages_dir / "query.meta"
    if not path.exists():
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(asked, ensure_ascii=False), encoding="utf-8")
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # cut off, or not UTF-8
        raise UserError(f"{path} is broken; remove {pages_dir} and run the same command again") from None
    if known != asked:
        raise UserError(f"{pages_dir} holds pages of another query ({path}); give another pages_dir or remove that one")


def pages(pages_dir: Path) -> Iterator[Path]:
    """The pages on the disk, in order, up to the first gap."""
    by_start = {
        int(match[1]): path for path in pages_dir.glob("rows-*.json.gz") if (match := _PAGE.fullmatch(path.name))
    }
    offset = 0
    while path := by_start.get(offset):
        match = _PAGE.fullmatch(path.name)
        assert match is not None
        offset = int(match[2])
        yield path


def _rows_on_disk(pages_dir: Path) -> int:
    last = None
    for last in pages(pages_dir):  # noqa: B007
        pass
    match = _PAGE.fullmatch(last.name) if last else None
    return int(match[2]) if match else 0


def _fetch(url: str, query: Mapping[str, str], offset: int, wait: Callable[[float], None]) -> dict[str, Any]:
    """One page; messages show the address without the query, which holds the key."""
    address, key, trouble = f"{url}?{urllib.parse.urlencode(query)}", query["api-key"], ""

    def clean(told: object) -> str:
        """One line without the key, which servers and libraries repeat."""
        line = " ".join(str(told).split())
        for secret in filter(None, (key, urllib.parse.quote_plus(key))):
            line = line.replace(secret, "***")
        return line[:300]

    for attempt in range(RETRIES):
        pause = min(LONGEST_WAIT, 2.0**attempt)
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
                page = json.loads(answer.read())
            if isinstance(page, dict) and isinstance(page.get("records"), list):
                return page
            told = page.get("message") or page.get("error") or page.get("status") if isinstance(page, dict) else ""
            trouble = f"an answer without records{f' ({clean(told)})' if told else ''}"
        except urllib.error.HTTPError as error:
            trouble = f"HTTP {error.code} {clean(error.reason)}"
            if error.code in (401, 403):
                raise UserError(
                    f"{url} refuses the key ({trouble}): put a valid key of data.gov.in into {KEY_VARIABLE}"
                ) from None
            if error.code < 500 and error.code not in (408, 429):
                raise UserError(
                    f"{url} refuses the query at row {offset:,} ({trouble}); check url and filters"
                ) from None
            after = error.headers.get("Retry-After", "")
            pause = min(LONGEST_WAIT, float(after)) if after.isdigit() else pause
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            trouble = clean(getattr(error, "reason", error)) or type(error).__name__
        except ValueError:  # cut-off or garbled JSON
            trouble = "an answer that is not valid JSON"
        if attempt + 1 < RETRIES:
            wait(pause)
    raise UserError(
        f"{url} did not deliver row {offset:,} in {RETRIES} tries ({trouble}); what has arrived is kept, "
        "run the same command again"
    )
