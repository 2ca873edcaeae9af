"""Who goes where: how often tokens of a group choose each expert, for groups of tokens and of records.

Groups of tokens are the span (prompt, thought, answer) and the script (Devanagari, Latin, other); groups of records are
whatever their `meta` holds, such as the crop or the kind of problem. Padding never counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from litgpt.chat import Span
from litgpt.data import Batch, Document, Record
from litgpt.model import Routing
from litgpt.tokenizer import Tokenizer

SCRIPTS = ("Devanagari", "Latin", "other")
SPANS = tuple(span.name.lower() for span in (Span.PROMPT, Span.THOUGHT, Span.ANSWER))


@dataclass
class RoutingMap:
    """One kind of group against the experts.

    Attributes:
        name: of the kind: span, script, crop, ...
        groups: names of the groups.
        counts_LGE: choices; a token counts once for each of its K experts.
        first_LGE: tokens by their first expert.
        layers: the layers' numbers.
    """

    name: str
    groups: tuple[str, ...]
    layers: tuple[int, ...] = ()
    counts_LGE: Tensor | None = None
    first_LGE: Tensor | None = None

    @torch.no_grad()
    def update(self, routing: Mapping[int, Routing], group_N: Tensor) -> None:
        """Add a forward pass; `group_N` is the number of each token's group, -1 for tokens of none (padding)."""
        of_group_N = group_N >= 0
        G, E = len(self.groups), next(iter(routing.values())).logits_NE.size(1)
        if self.counts_LGE is None or self.first_LGE is None:
            self.layers = tuple(routing)
            self.counts_LGE = torch.zeros(len(routing), G, E, dtype=torch.float64)
            self.first_LGE = torch.zeros_like(self.counts_LGE)
        for row, routed in enumerate(routing.values()):
            cells_NK = group_N[:, None] * E + routed.expert_ids_NK
            for total, cells in ((self.counts_LGE, cells_NK), (self.first_LGE, cells_NK[:, :1])):
                total[row] += torch.bincount(cells[of_group_N].flatten().cpu(), minlength=G * E).view(G, E)

    def share(self, row: int) -> list[list[float]]:
        """Of each group's choices, the part that goes to each expert; row is the place in `layers`."""
        assert self.counts_LGE is not None
        counts_GE = self.counts_LGE[row]
        return (counts_GE / counts_GE.sum(1, keepdim=True).clamp(min=1)).tolist()

    def bits(self, row: int) -> float:
        """Mutual information of group and first expert, bits: 0 where the router does not tell groups apart.

        With few tokens it is above 0 by chance, by about (G - 1)(E - 1) / (2 N ln 2) (Miller 1955).
        """
        assert self.first_LGE is not None
        return mutual_information(self.first_LGE[row])

    def tokens(self) -> list[int]:
        """Tokens of each group."""
        return [] if self.first_LGE is None else [int(n) for n in self.first_LGE[0].sum(1)]


def mutual_information(counts_GE: Tensor) -> float:
    """Σ p(g, e) log2(p(g, e) / (p(g) p(e))) of a table of counts; 0 for an empty one."""
    total = float(counts_GE.sum())
    if total == 0:
        return 0.0
    p_GE = counts_GE / total
    expected_GE = p_GE.sum(1, keepdim=True) * p_GE.sum(0, keepdim=True)
    terms = torch.where(p_GE > 0, p_GE * (p_GE / expected_GE.clamp(min=1e-300)).log2(), 0.0)
    return max(0.0, float(terms.sum()))


def script_of(character: str) -> int:
    """0 for Devanagari (U+0900 to U+097F and its extension), 1 for Latin letters, 2 for everything else."""
    code = ord(character)
    if 0x0900 <= code <= 0x097F or 0xA8E0 <= code <= 0xA8FF:
        return 0
    # Basic letters, and those of Latin-1 and its extensions but for the signs × and ÷.
    latin = character.isascii() and character.isalpha()
    return 1 if latin or (0x00C0 <= code <= 0x024F and code not in (0xD7, 0xF7)) else 2


def scripts_of(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The script of each token: the first letter's that it holds a byte of; control tokens are `other`.

    A byte-level token may hold a part of a character only, and a vowel sign may be split over two: both parts belong to
    the character that the bytes make together with their neighbours.
    """
    own = set(tokenizer.thought_ids or ()) | set(tokenizer.think_ids or ())
    pieces = [b"" if i in own else tokenizer.token_bytes(i, skip_special=True) for i in ids]
    text = b"".join(pieces).decode("utf-8", errors="surrogateescape")
    of_byte: list[int] = []
    for character in text:
        # A byte that is no part of a character stands alone.
        length = 1 if 0xDC80 <= ord(character) <= 0xDCFF else len(character.encode())
        of_byte += [script_of(character)] * length
    scripts, at = [], 0
    for piece in pieces:
        found = of_byte[at : at + len(piece)]
        at += len(piece)
        scripts.append(next((script for script in found if script != 2), 2))
    return scripts


class RoutingMaps:
    """All maps of a data set.

    Args:
        records: those that the batches name by number.
        documents: the same, rendered.
        tokenizer: theirs.
        kinds: keys of `meta` to map; one that fewer than two values are known of is left out, see `missing`.
    """

    def __init__(
        self,
        records: Sequence[Record],
        documents: Sequence[Document],
        tokenizer: Tokenizer,
        kinds: Sequence[str] = ("crop", "kind"),
    ) -> None:
        self._scripts = [torch.tensor(scripts_of(document.ids_T.tolist(), tokenizer)) for document in documents]
        self.maps = {"span": RoutingMap("span", SPANS), "script": RoutingMap("script", SCRIPTS)}
        self.missing: list[str] = []
        self._group_of: dict[str, list[int]] = {}
        for kind in kinds:
            values = [record.meta.get(kind) for record in records]
            groups = tuple(sorted({str(value) for value in values if value is not None}))
            if len(groups) < 2:
                self.missing.append(kind)
                continue
            self.maps[kind] = RoutingMap(kind, groups)
            self._group_of[kind] = [-1 if value is None else groups.index(str(value)) for value in values]

    def update(self, routing: Mapping[int, Routing], batch: Batch) -> None:
        """Add a batch, on the CPU or a GPU."""
        shape, device = batch.ids_BT.shape, next(iter(routing.values())).logits_NE.device
        script_BT = torch.full(shape, -1)
        record_groups = {kind: torch.full(shape, -1) for kind in self._group_of}
        documents_BT = batch.documents_BT.cpu()
        for row, records in enumerate(batch.records):
            for number, record in enumerate(records):
                of_document_T = documents_BT[row] == number
                script_BT[row, of_document_T] = self._scripts[record]
                for kind, group_BT in record_groups.items():
                    group_BT[row, of_document_T] = self._group_of[kind][record]
        numbers = torch.full((256,), -1)
        for group, span in enumerate((Span.PROMPT, Span.THOUGHT, Span.ANSWER)):
            numbers[int(span)] = group
        groups = {"span": numbers[batch.spans_BT.cpu().long()], "script": script_BT, **record_groups}
        for name, group_BT in groups.items():
            padded_BT = group_BT.masked_fill(documents_BT < 0, -1)
            self.maps[name].update(routing, padded_BT.flatten().to(device))

    def chance_bits(self, name: str) -> float:
        """What `RoutingMap.bits` shows of groups that do not matter, on average (Miller's correction)."""
        found = self.maps[name]
        tokens = sum(found.tokens())
        if found.first_LGE is None or not tokens:
            return 0.0
        used = sum(n > 0 for n in found.tokens())
        return (used - 1) * (found.first_LGE.size(2) - 1) / (2 * tokens * math.log(2))
