"""One HTML page that holds a routing inspection: tables and pictures inside, nothing fetched from anywhere."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from litgpt.htmlpage import heading, note, page, picture, table

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
        heading("Layer by layer"),
        _layer_table(result["layers"]),
        note(_LEGEND),
    ]
    for name, found in result["maps"].items():
        parts += [heading(f"{name} × expert"), _map_table(found)]
    if result["missing"]:
        parts.append(note(f"No map by {', '.join(result['missing'])}: the data does not say."))
    for title, text, path in pictures:
        parts += [heading(title), note(text), picture(path, title)]
    parts += [heading("Settings"), table(["setting", "value"], [[k, str(v)] for k, v in settings.items()])]
    return page("Routing", parts)


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
    return table(["layer", *names.values()], rows)


def _map_table(found: Mapping[str, Any]) -> str:
    layers = [str(layer) for layer in found["layers"]]
    rows = [["information, bits", *(f"{bits:.4f}" for bits in found["bits"])]]
    groups = ", ".join(f"{label} {tokens:,}" for label, tokens in zip(found["labels"], found["tokens"], strict=True))
    text = f"by chance about {found['chance_bits']:.4f} bits; tokens: {groups}"
    return table(["layer", *layers], rows) + note(text)


def _number(value: Any) -> str:
    return "–" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
