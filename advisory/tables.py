"""Rows out of other people's files: CSV, JSON, JSON lines and Parquet, also gzipped, in whatever encoding.

Nothing is loaded whole, and nothing broken is fatal: a row that cannot be read comes out as `Broken`, with its line and
the reason, and reading goes on with the next one.
"""

from __future__ import annotations

import _csv
import codecs
import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import ftfy.bad_codecs  # noqa: F401  registers sloppy-windows-1252

from litgpt.utils import UserError

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
MAX_LINE = 1 << 20
"""Characters of a line or of a JSON object; what is longer is no row."""
MAX_ROW_LINES = 100
"""A quoted CSV field may run over so many lines."""
_CHUNK = 1 << 18
_HEAD = 1 << 13
_MIN_COLUMNS_TO_KNOW_A_ROW = 5


class Raw(NamedTuple):
    """A row as its file has it."""

    line: int
    columns: Sequence[str]
    """The same object for all rows of a CSV file."""
    values: Sequence[str]


class Broken(NamedTuple):
    """A row that cannot be read."""

    line: int
    why: str


def table_files(path: Path) -> list[Path]:
    """The file itself, or the tables in a folder and below it, by name.

    Raises:
        UserError: nothing there that could be read.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(
            f"no file or folder {path}; give a {', '.join(SUFFIXES)} file (.gz too) or a folder of such files"
        )
    files = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) in SUFFIXES)
    if not files:
        raise UserError(f"{path} holds no {', '.join(SUFFIXES)} file (.gz too)")
    return files


def read_table(path: Path) -> Iterator[Raw | Broken]:
    """The rows of a file, one after the other.

    Raises:
        UserError: not a table we can read, or an empty one.
    """
    kind = _kind(path)
    if kind == ".parquet":
        yield from _read_parquet(path)
        return
    if kind not in SUFFIXES:
        raise UserError(f"{path}: expected one of {', '.join(SUFFIXES)}, also with .gz")
    with _open_bytes(path) as stream:
        text = _text(stream)
        rows = _read_csv(text, path) if kind in (".csv", ".tsv") else _read_json(text, path)
        last = 1
        try:
            for row in rows:
                last = row.line
                yield row
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            yield Broken(last + 1, f"the compressed file breaks off or is damaged here ({error})")


def _kind(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _open_bytes(path: Path) -> BinaryIO:
    file = path.open("rb")
    # Peeked at, not read: a pipe cannot be wound back.
    return cast(BinaryIO, gzip.open(file) if file.peek(2).startswith(b"\x1f\x8b") else file)


def _one_byte(error: UnicodeError) -> tuple[str, int]:
    """Bytes that are no UTF-8 are read as cp1252; the rest of the row stays what it is."""
    assert isinstance(error, UnicodeDecodeError)
    return error.object[error.start : error.end].decode("sloppy-windows-1252"), error.end


codecs.register_error("else-cp1252", _one_byte)


def _text(stream: BinaryIO) -> io.TextIOWrapper:
    """Decoded lines. UTF-16 is told by its mark or by its zero bytes; everything else is UTF-8 with slips."""
    buffered = cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, stream), _HEAD))
    try:
        head = cast(io.BufferedReader, buffered).peek(_HEAD)
    except (EOFError, zlib.error):
        head = b""
    encoding, errors = "utf-8-sig", "else-cp1252"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding, errors = "utf-16", "replace"
    elif len(head) > 3 and head.count(0) * 4 > len(head):
        encoding, errors = ("utf-16-le" if head[1] == 0 else "utf-16-be"), "replace"
    newline = "\r" if b"\r" in head and b"\n" not in head else "\n"
    return io.TextIOWrapper(buffered, encoding=encoding, errors=errors, newline=newline)


# -- CSV --------------------------------------------------------------------------------------------------------------


class _Lines:
    """Numbered lines that can be given back."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self._back: list[str] = []
        self.number = 0

    def next(self) -> str:
        """The next line, "" at the end; a line that is too long comes in pieces."""
        line = self._back.pop() if self._back else self._text.readline(MAX_LINE)
        self.number += line != ""
        if "\r" in line:
            # Line ends of Windows and of old Macs; one in the middle of a row is a space.
            line = line.rstrip("\r\n").replace("\r", " ") + "\n"
        return line

    def give_back(self, lines: list[str]) -> None:
        """Put lines back; the first of them is the next."""
        self._back.extend(reversed(lines))
        self.number -= len(lines)


def _read_csv(text: io.TextIOWrapper, path: Path) -> Iterator[Raw | Broken]:
    lines = _Lines(text)
    header = ""
    while not header.strip():
        if not (header := lines.next()):
            raise UserError(f"{path} is empty; its first line should name the columns")
    if "\0" in header or len(header) >= MAX_LINE:
        raise UserError(f"{path}:{lines.number}: the first line should name the columns, this is no text")
    delimiter = max(",;\t|", key=header.count)
    columns = tuple(name.strip() for name in next(csv.reader([header], delimiter=delimiter)))
    # Made once: to read a dialect's settings takes longer than to split a line.
    dialect = csv.reader((), delimiter=delimiter, strict=True).dialect
    while line := lines.next():
        number = lines.number
        row = _parse(line, dialect)
        if row is None and line.count('"') % 2:
            row = _joined(line, lines, dialect, len(columns))
        if row == []:
            continue  # a blank line
        if row is None:
            yield Broken(number, "quotes that do not close, or a field without end")
        elif "\0" in line:
            yield Broken(number, "holds NUL bytes")
        elif len(line) >= MAX_LINE:
            yield Broken(number, f"longer than {MAX_LINE} characters")
        elif len(row) != len(columns):
            yield Broken(number, f"{len(row)} fields where the header has {len(columns)}")
        else:
            yield Raw(number, columns, row)


def _parse(line: str, dialect: _csv.Dialect) -> list[str] | None:
    """The fields of one line, `None` if its quotes do not close."""
    try:
        return next(csv.reader((line,), dialect), [])
    except csv.Error as error:
        if "expected after" in str(error) and line.count('"') % 2 == 0:
            # Quotes inside a quoted field that nobody doubled: "the "pink" worm".
            return next(csv.reader((line,), delimiter=dialect.delimiter), [])
        return None


def _joined(line: str, lines: _Lines, dialect: _csv.Dialect, width: int) -> list[str] | None:
    """The fields of a row that goes on in the next lines; `None`, and those lines given back, if it does not."""
    taken: list[str] = []
    size, quotes = len(line), line.count('"')
    while len(taken) < MAX_ROW_LINES and size < MAX_LINE and (more := lines.next()):
        taken.append(more)
        size += len(more)
        quotes += more.count('"')
        if quotes % 2 == 0:
            try:
                row = next(csv.reader([line, *taken], dialect))
            except csv.Error:
                continue
            if len(row) == width:
                return row
        elif width >= _MIN_COLUMNS_TO_KNOW_A_ROW and more.count('"') % 2 == 0:
            # A line that is a whole row by itself is no continuation: the quote before it was a slip.
            alone = _parse(more, dialect)
            if alone is not None and len(alone) == width:
                break
    lines.give_back(taken)
    return None


# -- JSON -------------------------------------------------------------------------------------------------------------

_RECORDS = re.compile(r'"(?:records|data|rows)"\s*:\s*\[\s*(?=[{\]])')
_BETWEEN = re.compile(r"[\s,]*")
_NEXT_OBJECT = re.compile(r"\n[ \t,]{0,40}(?=\{)|\}\s{0,40},\s{0,40}(?=\{)")


def _read_json(text: io.TextIOWrapper, path: Path) -> Iterator[Raw | Broken]:
    """Objects of an array, of {"records": [...]} or one after the other (JSON lines), a few at a time."""
    decode = json.JSONDecoder().raw_decode
    buffer, at_end = text.read(_CHUNK), False
    if not buffer.strip():
        raise UserError(f"{path} is empty; expected JSON objects, an array of them or JSON lines")
    position, in_list = _json_start(buffer, path)
    line = 1 + buffer.count("\n", 0, position)
    while True:
        start = _after(_BETWEEN, buffer, position)
        line += buffer.count("\n", position, start)
        position = start
        if not at_end and len(buffer) - position < MAX_LINE // 4:
            more = text.read(_CHUNK)
            at_end = not more
            buffer, position = buffer[position:] + more, 0
            continue
        if position >= len(buffer) or (in_list and buffer[position] == "]"):
            return
        why, end = "", position
        try:
            value, end = decode(buffer, position)
        except json.JSONDecodeError as error:
            why = f"not valid JSON: {error.msg}"
        except RecursionError:
            why = "nested too deeply"
        if why and not at_end and len(buffer) - position < MAX_LINE:
            more = text.read(MAX_LINE)
            at_end = not more
            buffer, position = buffer[position:] + more, 0
            continue
        if why:
            yield Broken(line, why)
            following = _NEXT_OBJECT.search(buffer, position + 1)
            end = following.end() if following else len(buffer)
        elif not isinstance(value, dict):
            yield Broken(line, "no JSON object")
        else:
            yield Raw(line, tuple(value), [_string(item) for item in value.values()])
        line += buffer.count("\n", position, end)
        position = end


def _json_start(buffer: str, path: Path) -> tuple[int, bool]:
    """Where the first object begins, and whether it is one of a list."""
    position = _after(_BETWEEN, buffer, 0)
    if buffer[position] == "[":
        return position + 1, True
    if buffer[position] != "{":
        raise UserError(f"{path}: expected JSON objects, an array of them or JSON lines, found {buffer[position]!r}")
    # An envelope has its list inside the first object; a first line that is a row of its own has none.
    records = _RECORDS.search(buffer)
    first_end = buffer.find("}\n{", position)
    if records and (first_end < 0 or records.start() < first_end):
        return records.end(), True
    return position, False


def _after(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position


def _string(value: Any) -> str:
    """A cell as text; nothing, NaN and what holds other values are empty."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int):
        return str(value)
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else ""


# -- Parquet ----------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path) -> Iterator[Raw | Broken]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no Parquet file ({str(error).splitlines()[0]})") from None
    with file:
        columns = tuple(file.schema_arrow.names)
        batches = file.iter_batches(batch_size=1024)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (pyarrow.ArrowException, OSError) as error:
                yield Broken(number + 1, f"the file is damaged from here on ({str(error).splitlines()[0]})")
                return
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                number += 1
                yield Raw(number, columns, [_string(value) for value in values])
