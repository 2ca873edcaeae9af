"""One HTML page that holds a routing inspection: tables and pictures inside, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, "Noto Sans", "Noto Sans Devanagari", sans-serif; margin: 0 auto; max-width: 72rem;
  padding: 1rem; color: #1b1b1b; background: #fff; }
h1 { font-size: 1.4rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 0.85rem }
th, td { padding: 0.25rem 0.6rem; text-align: right; border-bottom: 1px solid #ddd } th:first-child, td:first-child
  { text-align: left } img { max-width: 100%; height: auto } p.note { color: #555 }
"""


_LEGEND = (
    "MaxVio: how much busier the busiest expert is than the mean, less 1, over all tokens and as the mean over "
    "batches. Entropies are divided by log E: 1 is indifference. Dead: chosen by no token; cold: less than a tenth of "
    "an even share, the dead ones among them. z: mean logsumexp². Cosine: mean over pairs of experts, and with the "
    "base's FFN. Changed: tokens whose set of experts (whose first expert) is another than in the first checkpoint."
)


def routing_page(result: Mapping[str, Any], pictures: Sequence[tuple[str, str, Path]]) -> str:
    """The page.

    Args:
        result: what `routing.json` holds.
        pictures: heading, explanation and PNG of each.
    """
    settings = result["settings"]
    parts = [
        f"<h1>Routing of {html.escape(str(settings['checkpoint_dir']))}</h1>",
        f"<p>{result['tokens']:,} tokens of {html.escape(str(settings['data']))}, padding left out; "
        f"{settings['n_expert']} experts a layer, {settings['n_expert_per_token']} for each token.</p>",
        "<h2>Layer by layer</h2>",
        _layer_table(result["layers"]),
        f'<p class="note">{_LEGEND}</p>',
    ]
    for name, found in result["maps"].items():
        parts += [f"<h2>{html.escape(name)} × expert</h2>", _map_table(found)]
    if result["missing"]:
        parts.append(
            f'<p class="note">No map by {html.escape(", ".join(result["missing"]))}: the data does not say.</p>'
        )
    for heading, text, path in pictures:
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(
            f'<h2>{html.escape(heading)}</h2><p class="note">{html.escape(text)}</p>'
            f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{data}">'
        )
    parts += ["<h2>Settings</h2>", _table(["setting", "value"], [[k, str(v)] for k, v in settings.items()])]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Routing</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


_COLUMNS = {
    "max_vio": "MaxVio",
    "max_vio_batch": "MaxVio, batch",
    "entropy": "entropy, mean of",
    "entropy_of_mean": "entropy, of mean",
    "dead": "dead",
    "cold": "cold",
    "top1_weight": "top-1 weight",
    "z": "z",
    "expert_cosine": "cosine, experts",
    "base_cosine": "cosine, base",
    "changed": "changed",
    "changed_top1": "changed, first",
}


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> str:
    names = {key: name for key, name in _COLUMNS.items() if any(layer.get(key) is not None for layer in layers)}
    rows = [[str(layer["layer"]), *(_number(layer.get(key)) for key in names)] for layer in layers]
    return _table(["layer", *names.values()], rows)


def _map_table(found: Mapping[str, Any]) -> str:
    layers = [str(layer) for layer in found["layers"]]
    rows = [["information, bits", *(f"{bits:.4f}" for bits in found["bits"])]]
    groups = ", ".join(f"{label} {tokens:,}" for label, tokens in zip(found["labels"], found["tokens"], strict=True))
    note = f"by chance about {found['chance_bits']:.4f} bits; tokens: {groups}"
    return _table(["layer", *layers], rows) + f'<p class="note">{html.escape(note)}</p>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'


def _number(value: Any) -> str:
    return "–" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
