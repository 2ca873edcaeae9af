"""A self-contained HTML page: tables and pictures inside, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

_STYLE = """
body { font: 16px/1.5 system-ui, "Noto Sans", "Noto Sans Devanagari", sans-serif; margin: 0 auto; max-width: 72rem;
  padding: 1rem; color: #1b1b1b; background: #fff; }
h1 { font-size: 1.4rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 0.85rem }
th, td { padding: 0.25rem 0.6rem; text-align: right; border-bottom: 1px solid #ddd } th:first-child, td:first-child
  { text-align: left } img { max-width: 100%; height: auto } p.note { color: #555 }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The page, of parts that are HTML."""
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def heading(text: str) -> str:
    """A heading of the second level."""
    return f"<h2>{html.escape(text)}</h2>"


def note(text: str) -> str:
    """A remark."""
    return f'<p class="note">{html.escape(text)}</p>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text in cells."""
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'


def picture(path: Path, says: str) -> str:
    """A PNG, put into the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(says)}" src="data:image/png;base64,{data}">'
