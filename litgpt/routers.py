"""How a fresh router starts: at random, from clusters of hidden states, from groups of prompts, or as a trained one.

Equal experts give the dense model's output whatever the router says (`litgpt.upcycle`), so each start is free to say
something useful: which tokens belong together. Rows made of hidden states need care in three places.

- The mean direction. Hidden states have a part in common, their mean. Centroids with that part lean towards each
  other, and in a linear router without a bias it adds nearly the same to an expert's logit at every token: the expert
  whose row has most of it gets most tokens. Rows are orthogonal to the mean state.
- The balance. The router has no bias that could hold back a large cluster. So the clusters that its rows are the
  centroids of are made equally large, and all rows equally long.
- The scale. Centroids point at tokens and random rows do not, so rows of equal length would give logits many times as
  large as a random start's. Rows are scaled to the spread of logits that N(0, std) has on the same tokens.

Hidden states are what the router will read: the dense model's MLP input, after its norm. The first position of each
document is left out: it is an attention sink, equal in all documents and of another size than every other state.

Shapes: N tokens, D width, E experts, T positions.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from litgpt.data import read_records, render_record
from litgpt.keymap import BLOCKS, BlockId
from litgpt.model import document_mask, positions_in_document, rope_cos_sin
from litgpt.packing import pack, permutation
from litgpt.recipes import seeded
from litgpt.stored import Stored, Streamed
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, progress

__all__ = ["RouterStart", "balanced_rows", "group_rows", "hidden_states", "router_weights"]

ROW_TOKENS = 512
"""Tokens that run through a block at once. Longer documents are cut: one of them must not be the whole calibration."""
TOKENS_PER_EXPERT = 8
"""The fewest calibration tokens that a cluster can be made of."""
MAX_ROUNDS = 50
"""Of k-means; it mostly settles within 20."""
SETTLED = 1e-3
"""Share of the tokens that may still change their cluster when k-means stops."""
SAME_COSINE = 1 - 1e-5
"""Rows that are more alike than this are one row."""


@dataclass
class RouterStart:
    """Where the weights of fresh routers come from.

    Raises:
        UserError: a value out of range, a field that the start needs and lacks, or one that it does not use.
    """

    start: Literal["normal", "kmeans", "prompts", "copy-from"] = "normal"
    """normal: random; kmeans: clusters of hidden states; prompts: one group of texts an expert; copy-from: another
    mixture's routers."""
    std: float = 0.02
    """Standard deviation of random weights; kmeans and prompts are scaled to the logits that these would give."""
    data: Path | None = None
    """kmeans: calibration records, JSON lines of dialogues or texts."""
    prompts: Path | None = None
    """prompts: YAML, name of a group: list of texts; as many groups as experts."""
    checkpoint_dir: Path | None = None
    """copy-from: lit or Hugging Face directory of a mixture of experts."""
    max_tokens: int = 4096
    """kmeans: calibration tokens to read, from records in random order; 16 KiB of memory each at width 1024."""

    def __post_init__(self) -> None:
        if self.start not in _USES:
            raise UserError(f"router.start is {self.start!r}: choose one of {', '.join(_USES)}")
        if not (math.isfinite(self.std) and self.std > 0):
            raise UserError(f"router.std is {self.std}, expected above 0: a zero router gives all tokens equal experts")
        if self.max_tokens < 1:
            raise UserError(f"router.max_tokens is {self.max_tokens}: expected at least 1")
        for entry in fields(self):
            name, value = entry.name, getattr(self, entry.name)
            if name not in ("start", *_USES[self.start]) and value != entry.default:
                starts = " and ".join(start for start, used in _USES.items() if name in used)
                raise UserError(
                    f"router.{name} goes with router.start {starts}, but router.start is {self.start}: leave it out"
                )
            if name in _USES[self.start] and value is None:
                raise UserError(f"router.start {self.start} needs router.{name}: {_NEEDED[name]}")


_USES = {
    "normal": ("std",),
    "kmeans": ("std", "data", "max_tokens"),
    "prompts": ("std", "prompts"),
    "copy-from": ("checkpoint_dir",),
}
_NEEDED = {
    "data": "a JSONL file of dialogues or texts",
    "prompts": "a YAML file, name of a group: list of texts",
    "checkpoint_dir": "the directory of a mixture of experts",
}


def router_weights(
    start: RouterStart, dense: Stored, tokenizer: Tokenizer, *, n_expert: int, layers: Sequence[int], seed: int
) -> dict[int, Tensor]:
    """Start values of the routers.

    kmeans and prompts run the dense model in float32 with one block in memory and say on stderr how their routers
    treat the tokens they were made from.

    Args:
        start: which.
        dense: the model that is being upcycled.
        tokenizer: its tokenizer.
        n_expert: rows of a router, E; all differ.
        layers: those that get experts.
        seed: of random rows, of the choice of calibration records and of the clusters.

    Returns:
        fp32 [E, D] by layer.

    Raises:
        UserError: files missing, broken or too small; as many groups as experts are not there; a checkpoint whose
            routers do not fit; hidden states that are not finite or all alike.
        ValueError: `dense` is no dense model, or has no such layer.
    """
    if dense.config.n_expert or any(not 0 <= layer < dense.config.n_layer for layer in layers):
        raise ValueError(f"expected a dense model with layers {list(layers)}, found {dense.config.name}")
    names = {layer: BLOCKS["router"].lit.format(i=layer) for layer in layers}
    if start.start == "copy-from":
        assert start.checkpoint_dir is not None
        return _copied(Stored(start.checkpoint_dir), n_expert, dense.config.n_embd, layers)
    if start.start == "normal":
        shape = (n_expert, dense.config.n_embd)
        return {i: torch.randn(shape, generator=seeded(seed, name)) * start.std for i, name in names.items()}

    longest = min(ROW_TOKENS, dense.config.block_size)
    groups: list[str] = []
    if start.start == "kmeans":
        assert start.data is not None
        source = start.data
        documents = _calibration(source, tokenizer, start.max_tokens, longest, n_expert, seed)
    else:
        assert start.prompts is not None
        source = start.prompts
        documents, group_of_document = _prompts(source, tokenizer, longest, n_expert)
        groups = list(dict.fromkeys(group_of_document))
        group_N = torch.tensor(
            [
                groups.index(group)
                for group, document in zip(group_of_document, documents, strict=True)
                for _ in document[1:]
            ]
        )
    rows: dict[int, Tensor] = {}
    said = []
    for layer, h_ND in hidden_states(dense, documents, layers):
        if not h_ND.isfinite().all():
            raise UserError(f"{dense.directory}: layer {layer} gives numbers that are not finite; convert it again")
        if groups:
            rows_ED = group_rows(h_ND, group_N, n_expert)
        else:
            rows_ED = balanced_rows(h_ND, n_expert, seeded(seed, names[layer]))
        _check_distinct(rows_ED, source, layer, groups)
        rows[layer] = _scaled(rows_ED, h_ND, start.std)
        said.append(_load_and_entropy(rows[layer], h_ND))
    loads, entropies = zip(*said, strict=True)
    print(
        f"routers of {len(rows)} layer{'s' * (len(rows) > 1)} from {len(h_ND)} tokens of {source}: on these the "
        f"busiest expert is the first choice of {max(loads):.2f} times its share at most, entropy "
        f"{min(entropies):.3f} to {max(entropies):.3f} of log E",
        file=sys.stderr,
    )
    return rows


def _copied(other: Stored, n_expert: int, n_embd: int, layers: Sequence[int]) -> dict[int, Tensor]:
    config = other.config
    if not config.n_expert:
        raise UserError(f"{other.directory} is a dense model: router.checkpoint_dir names a mixture of experts")
    for what, found, expected in (("experts", config.n_expert, n_expert), ("width", config.n_embd, n_embd)):
        if found != expected:
            raise UserError(f"the routers of {other.directory} have {what} {found}, the new ones {expected}")
    if without := sorted(set(layers) - set(config.moe_layers)):
        raise UserError(f"{other.directory} has no router in layer {without[0]}, which is to get one")
    return {layer: other.read(BlockId("router", layer)).float() for layer in layers}


def _calibration(
    path: Path, tokenizer: Tokenizer, max_tokens: int, longest: int, n_expert: int, seed: int
) -> list[list[int]]:
    """Token ids of records in an order of their own (files are often sorted), up to `max_tokens` in all."""
    records = read_records(path, texts=True)
    # The dense model knows <think>; the row of a <thought> added for the student means nothing to it.
    tags: Literal["think", "thought"] = "thought" if tokenizer.think_ids is None else "think"
    documents: list[list[int]] = []
    left = max_tokens
    for number in permutation(len(records), seed, 0):
        ids = render_record(records[number], tokenizer, tags=tags).ids[: min(longest, left)]
        documents.append(ids)
        left -= len(ids)
        if left <= 0:
            break
    usable = sum(len(ids) - 1 for ids in documents)
    if usable < TOKENS_PER_EXPERT * n_expert:
        raise UserError(
            f"{path} gives {usable} calibration tokens for {n_expert} experts, expected at least "
            f"{TOKENS_PER_EXPERT * n_expert}: add records, or raise router.max_tokens ({max_tokens})"
        )
    return documents


def _prompts(path: Path, tokenizer: Tokenizer, longest: int, n_expert: int) -> tuple[list[list[int]], list[str]]:
    """Token ids of all texts, and the group of each."""
    try:
        groups = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or 'cannot be read').lower()}; expected YAML of prompts") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(groups, dict) or not all(isinstance(name, str) for name in groups):
        raise UserError(f"{path}: expected groups of prompts, name: list of texts (quote names that YAML takes apart)")
    if len(groups) != n_expert:
        raise UserError(f"{path} has {len(groups)} groups of prompts for {n_expert} experts: expected one an expert")
    documents, names = [], []
    for name, texts in groups.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{path}: group {name!r} is no list of texts")
        group = [tokenizer.encode(text)[:longest] for text in texts]
        if all(len(ids) < 2 for ids in group):
            raise UserError(f"{path}: group {name!r} has no token but the first of a text, which does not count")
        documents += [ids for ids in group if ids]
        names += [name for ids in group if ids]
    return documents, names


def hidden_states(
    dense: Stored, documents: Sequence[Sequence[int]], layers: Collection[int]
) -> Iterator[tuple[int, Tensor]]:
    """What the MLP of each layer reads, layer by layer, with one block and one layer's states in memory.

    Args:
        dense: the model; it runs in float32.
        documents: token ids, none empty; at most `ROW_TOKENS` and `block_size` of each.
        layers: which to give.

    Yields:
        layer and its states, fp32 [N, D], in the documents' order and without the first position of each.
    """
    model = Streamed(dense, torch.float32)
    width = min(ROW_TOKENS, dense.config.block_size)
    rows = pack(range(len(documents)), [len(ids) for ids in documents], width)
    numbers_1T = [torch.tensor([[number for number in row for _ in documents[number]]]) for row in rows]
    x_1TD = [model.embed(torch.tensor([[index for number in row for index in documents[number]]])) for row in rows]
    # Where the tokens of the packed rows, end to end, stand in the documents' order, first positions left out.
    number_N = torch.cat(numbers_1T, dim=1)[0]
    position_N = torch.cat([positions_in_document(numbers) for numbers in numbers_1T], dim=1)[0]
    order_N = number_N.argsort(stable=True)
    order_N = order_N[position_N[order_N] > 0]

    for layer in progress(range(max(layers, default=-1) + 1), "hidden states", unit="layer"):
        block = model.block(layer)
        states = []
        for row, numbers in enumerate(numbers_1T):
            cos, sin = rope_cos_sin(positions_in_document(numbers), dense.config, torch.float32)
            x = x_1TD[row] + block.attn(block.norm_1(x_1TD[row]), cos, sin, document_mask(numbers), None)
            h = block.norm_2(x)
            x_1TD[row] = x + block.mlp(h)
            if layer in layers:
                states.append(h[0])
        if layer in layers:
            yield layer, torch.cat(states)[order_N]


def balanced_rows(h_ND: Tensor, n_expert: int, draw: torch.Generator) -> Tensor:
    """Rows of a router from clusters of hidden states, unit vectors; [E, D].

    Spherical k-means (Dhillon & Modha 2001: unit vectors, cosine) on the states without their mean direction, seeded
    as k-means++ (Arthur & Vassilvitskii 2007). Clusters are of one size, as in balanced k-means (Malinen & Fränti
    2014), here by Sinkhorn's iteration instead of the Hungarian method: it finds a price for each cluster at which
    every cluster is the first choice of equally many tokens.

    The router itself has no prices, so its loads come near each other and are not equal. On the tiny base the busiest
    of 8 experts is the first choice of 1.13 to 1.22 times its share, after k-means without prices of 1.38 to 1.50, of
    a random router 1.14 to 2.26. (Prices can be built in as weights along the mean direction, of which most tokens have
    something. That evens out first choices and makes second ones less even than they were.)

    Args:
        h_ND: hidden states, fp32.
        n_expert: how many rows, E.
        draw: random numbers of the seeding.
    """
    u_D = F.normalize(h_ND.mean(dim=0), dim=0)
    return _spherical_kmeans(_apart(h_ND, u_D), n_expert, draw)


def _apart(x_ND: Tensor, u_D: Tensor) -> Tensor:
    """The direction of each row without its part along the unit vector u; zero where no more than rounding is left."""
    rest_ND = x_ND - (x_ND @ u_D)[:, None] * u_D
    is_rounding_N = rest_ND.norm(dim=1) <= 1e-5 * x_ND.norm(dim=1)
    return F.normalize(rest_ND, dim=1).masked_fill(is_rounding_N[:, None], 0)


def _spherical_kmeans(x_ND: Tensor, k: int, draw: torch.Generator) -> Tensor:
    """Unit centroids [K, D] of unit vectors, each of (nearly) N/K of them."""
    c_KD = _seeds(x_ND, k, draw)
    price_K1 = torch.zeros(k, 1)
    member_N = torch.full((len(x_ND),), -1)
    for number in range(MAX_ROUNDS):
        scores_KN = c_KD @ x_ND.T
        price_K1 = _prices(scores_KN, price_K1, (0.01,) if number else (0.3, 0.1, 0.03, 0.01))
        before_N, member_N = member_N, (scores_KN - price_K1).argmax(dim=0)
        if (before_N != member_N).float().mean() <= SETTLED:
            break
        sums_KD = torch.zeros_like(c_KD).index_add_(0, member_N, x_ND)
        c_KD = torch.where(sums_KD.any(dim=1, keepdim=True), F.normalize(sums_KD, dim=1), c_KD)
    return c_KD


def _seeds(x_ND: Tensor, k: int, draw: torch.Generator) -> Tensor:
    """The first centroids [K, D]: each drawn by its squared distance to the nearest before it, the best of a few."""
    chosen = [int(torch.randint(len(x_ND), (), generator=draw))]
    distance_N = 1 - x_ND @ x_ND[chosen[0]]
    while len(chosen) < k:
        # Half the squared distance of unit vectors; rounding may leave it below zero, and all may be equal.
        weight_N = distance_N.clamp(min=0) + 1e-12
        tried_C = torch.multinomial(weight_N, 2 + int(math.log(k)), replacement=True, generator=draw)
        nearest_NC = torch.minimum(distance_N[:, None], 1 - x_ND @ x_ND[tried_C].T)
        best = int(nearest_NC.sum(dim=0).argmin())
        chosen.append(int(tried_C[best]))
        distance_N = nearest_NC[:, best]
    return x_ND[chosen]


def _prices(scores_KN: Tensor, price_K1: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Prices [K, 1] at which each row is the largest of `scores - price` in nearly N/K columns.

    Sinkhorn's iteration (Cuturi 2013, arXiv 1306.0895), from given prices on.

    Args:
        scores_KN: cosines.
        price_K1: where to start.
        temperatures: one after another, in units of the scores' standard deviation; 0.01 is nearly a hard choice.
    """
    even = math.log(scores_KN.size(1) / len(scores_KN))
    # Not zero, should all scores be equal.
    spread = float(scores_KN.std().clamp(min=1e-9))
    for temperature in temperatures:
        t = temperature * spread
        for _ in range(20):
            log_load_K1 = ((scores_KN - price_K1) / t).log_softmax(dim=0).logsumexp(dim=1, keepdim=True)
            price_K1 = price_K1 + t * (log_load_K1 - even)
    return price_K1


def group_rows(h_ND: Tensor, group_N: Tensor, n_expert: int) -> Tensor:
    """Rows of a router from groups of hidden states, unit vectors; [E, D].

    The means of the groups, without the direction of the mean of these means: what sets a group apart.

    Args:
        h_ND: hidden states, fp32.
        group_N: the group of each, 0 … E - 1, each at least once.
        n_expert: E.
    """
    count_E = torch.bincount(group_N, minlength=n_expert)
    mean_ED = torch.zeros(n_expert, h_ND.size(1)).index_add_(0, group_N, h_ND) / count_E[:, None]
    u_D = F.normalize(mean_ED.mean(dim=0), dim=0)
    return _apart(mean_ED, u_D)


def _check_distinct(rows_ED: Tensor, source: Path, layer: int, groups: Sequence[str]) -> None:
    unit_ED = F.normalize(rows_ED, dim=1)
    cosine_EE = (unit_ED @ unit_ED.T).fill_diagonal_(-1)
    # A row of zeros is like every other.
    if not (cosine_EE.max() < SAME_COSINE and unit_ED.any(dim=1).all()):
        first, second = divmod(int(cosine_EE.argmax()), len(rows_ED))
        what = f"groups {groups[first]!r} and {groups[second]!r}" if groups else "its tokens"
        raise UserError(f"{source}: {what} look alike to layer {layer}, so their experts would be one: use other texts")


def _scaled(rows_ED: Tensor, h_ND: Tensor, std: float) -> Tensor:
    """Rows times the number that gives their logits the spread over experts that N(0, std) rows have on these states.

    The logits of such rows are N(0, std² ‖h‖²) for a token of state h. Rows of equal length instead would saturate: on
    made-up states of width 1024, the entropy over 8 experts would be 0.23 of log 8, where random rows have 0.77 and
    these 0.75.
    """
    spread = (h_ND @ rows_ED.T).var(dim=1).mean().sqrt()
    return rows_ED * (std * h_ND.square().sum(dim=1).mean().sqrt() / spread)


def _load_and_entropy(rows_ED: Tensor, h_ND: Tensor) -> tuple[float, float]:
    """How many times its share the busiest expert is the first choice, and the mean entropy as a share of log E."""
    log_p_NE = (h_ND @ rows_ED.T).log_softmax(dim=1)
    n_expert = len(rows_ED)
    load = torch.bincount(log_p_NE.argmax(dim=1), minlength=n_expert).max() * n_expert / len(h_ND)
    return float(load), float(-(log_p_NE.exp() * log_p_NE).sum(dim=1).mean() / math.log(n_expert))
