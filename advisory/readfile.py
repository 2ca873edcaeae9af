"""Small files that people bring (a soil card, the weather) read whole, each fault in one line with its place."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NoReturn

from litgpt.utils import UserError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        UserError: not there, not UTF-8, not JSON, a key twice, NaN, or no object; with the line where it is known.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if repeated := next((key for key in keys if keys.count(key) > 1), None):
            raise UserError(f"{path}: the key {repeated!r} stands twice")
        return dict(pairs)

    def constant(name: str) -> NoReturn:
        raise UserError(f"{path}: {name} is no number")

    try:
        content = json.loads(read_text(path), object_pairs_hook=distinct, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (RecursionError, ValueError):  # nested without end, or a number of thousands of digits
        raise UserError(f"{path}: not valid JSON that could be read") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: an object {{...}} is needed, found {content!r:.60}")
    return content


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark.

    Raises:
        UserError: not there, a folder, or not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, a file is needed") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None


def read_rows(path: Path, columns: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """The rows of a CSV file with their line numbers; column names are taken without regard to case and spaces.

    Raises:
        UserError: not UTF-8, not CSV, a column that is missing or stands twice, or a row of another length.
    """
    lines = csv.reader(read_text(path).splitlines(), strict=True)
    try:
        header = [name.strip().casefold() for name in next(lines, [])]
        if missing := [name for name in columns if name not in header]:
            raise UserError(f"{path}:1: the column {missing[0]} is missing; found {', '.join(header) or 'nothing'}")
        if repeated := next((name for name in header if header.count(name) > 1), None):
            raise UserError(f"{path}:1: the column {repeated!r} stands twice")
        rows = []
        for row in lines:
            if len(row) > len(header):
                raise UserError(f"{path}:{lines.line_num}: {len(row)} fields for {len(header)} columns")
            if any(cell.strip() for cell in row):
                rows.append((lines.line_num, {name: cell.strip() for name, cell in zip(header, row, strict=False)}))
        return rows
    except csv.Error as error:
        raise UserError(f"{path}:{lines.line_num}: not valid CSV: {error}") from None
