"""Continuous batching: texts join and leave between two steps, and each step decodes all that are there in one forward.

Rows of the cache end together: a text of n positions has them at the end of its row, and `left_padding_B` hides what is
before. Keys were rotated by the position in their own text, so a row may be moved: a text joins by copying its prompt's
keys to the end of a free row, and the rows are moved to the left when the longest has gone. New prompts run alone,
`prefill_tokens` at a time between two steps, so that those who are being answered do not wait for a long question.
What the last prompts left is kept, and a new prompt runs from where it departs from them, so that a system prompt is
read once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from litgpt.generate import GREEDY, NOT_NUMBERS, Sampling, bias, choose
from litgpt.model import GPT, KVCache
from litgpt.utils import UserError

__all__ = ["Engine", "Prefixes", "Text", "Turn"]

_FIRST_CAPACITY = 256
_WORTH_MOVING = 64


class Turn(Protocol):
    """A text in the making, as the engine sees it."""

    @property
    def prompt_ids(self) -> Sequence[int]:
        """What the text begins with; at least one id."""

    @property
    def sampling(self) -> Sampling:
        """How ids are chosen."""

    @property
    def seed(self) -> int | None:
        """Makes the draws repeatable."""

    @property
    def forbidden_ids(self) -> frozenset[int]:
        """Never chosen next."""

    def take(self, index: int) -> Sequence[int]:
        """The model chose this id. Returns what the text goes on with (the id, and what is put in); nothing ends it."""


class Text:
    """The plain turn: up to `max_new_tokens` ids or a stop id, which are gathered in `ids`."""

    def __init__(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        sampling: Sampling = GREEDY,
        seed: int | None = None,
        forbidden_ids: Collection[int] = (),
    ) -> None:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}: expected at least 1")
        self.prompt_ids = prompt_ids
        self.max_new_tokens = max_new_tokens
        self.stop_ids = frozenset(stop_ids)
        self.sampling = sampling
        self.seed = seed
        self.forbidden_ids = frozenset(forbidden_ids)
        self.ids: list[int] = []
        """New ids, the stop id included."""

    def take(self, index: int) -> Sequence[int]:
        """Note the id; the end is a stop id, or as many ids as asked for."""
        self.ids.append(index)
        return () if index in self.stop_ids or len(self.ids) == self.max_new_tokens else (index,)


class Prefixes:
    """Keys and values of the last prompts, [2, n_layer, 1, G, n, h] each; not shared between threads.

    Memory: `n` prompts. For Qwen3-0.6B in bf16 a token takes 115 kB.
    """

    def __init__(self, n: int = 4) -> None:
        self.n = n
        self._kept: list[tuple[list[int], Tensor]] = []

    def longest(self, ids: Sequence[int]) -> tuple[int, Tensor | None]:
        """How many ids at the head of `ids` are known, one less than all at most, and the memory that knows them."""
        best: tuple[int, Tensor | None] = (0, None)
        for position, (known, kv) in enumerate(self._kept):
            differ = (i for i, (a, b) in enumerate(zip(known, ids, strict=False)) if a != b)
            n = min(next(differ, len(known)), len(ids) - 1)
            if n > best[0]:
                best, last = (n, kv), position
        if best[1] is not None:
            self._kept.append(self._kept.pop(last))
        return best

    def keep(self, ids: Sequence[int], kv: Tensor) -> None:
        """Keep these, and let the ones go that were not used for longest."""
        if self.n:
            self._kept = [*self._kept, (list(ids), kv)][-self.n :]


class _Row:
    """A turn with its place in the cache."""

    def __init__(self, turn: Turn, device: torch.device) -> None:
        self.turn = turn
        self.ids = list(turn.prompt_ids)
        self.coming: deque[int] = deque()
        """Ids that are known and not yet run; after the last of them the next is chosen."""
        self.generator = None if turn.seed is None else torch.Generator(device).manual_seed(turn.seed)


class Engine:
    """Runs turns together. Not for several threads: one calls `add`, `step` and `drop`.

    Args:
        model: in eval mode.
        rows: at most so many texts at one time; others wait in order.
        max_seq_length: longest text, prompt included; the model's context, if not given.
        vocab_size: ids from here on are padding rows and never chosen.
        prefill_tokens: of a new prompt, run between two steps of the others.
        prefixes: of former prompts; `Prefixes(0)` keeps none.
    """

    def __init__(
        self,
        model: GPT,
        *,
        rows: int = 8,
        max_seq_length: int | None = None,
        vocab_size: int | None = None,
        prefill_tokens: int = 256,
        prefixes: Prefixes | None = None,
    ) -> None:
        self.model = model
        self.max_rows = rows
        self.max_seq_length = min(max_seq_length or model.config.block_size, model.config.block_size)
        self.vocab_size = vocab_size
        self.prefill_tokens = prefill_tokens
        self.prefixes = Prefixes() if prefixes is None else prefixes
        self.device, self.dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        self._waiting: deque[Turn] = deque()
        self._joining: tuple[_Row, KVCache] | None = None
        self._rows: list[_Row] = []
        self._kv: Tensor | None = None
        self._length = 0
        self._padding: list[int] = []
        self._bias: dict[frozenset[int], Tensor] = {}

    def add(self, turn: Turn) -> None:
        """Queue a turn.

        Raises:
            UserError: an empty prompt, or one that leaves no room for an answer.
        """
        if not turn.prompt_ids:
            raise UserError("the prompt is empty: expected at least one token")
        if len(turn.prompt_ids) >= self.max_seq_length:
            raise UserError(
                f"the prompt has {len(turn.prompt_ids)} tokens, but there is room for {self.max_seq_length}: shorten it"
            )
        self._waiting.append(turn)

    @torch.inference_mode()
    def drop(self, turn: Turn) -> None:
        """Forget a turn wherever it stands; nothing happens if it is not there."""
        if turn in self._waiting:
            self._waiting.remove(turn)
        elif self._joining is not None and self._joining[0].turn is turn:
            self._joining = None
        else:
            self._leave([i for i, row in enumerate(self._rows) if row.turn is turn])

    @property
    def running(self) -> int:
        """Texts that hold memory now."""
        return len(self._rows) + (self._joining is not None)

    @property
    def waiting(self) -> int:
        """Texts that wait for a row."""
        return len(self._waiting)

    @torch.inference_mode()
    def step(self) -> list[Turn]:
        """Run a part of one new prompt and one position of all others. Returns the turns that ended, in any order.

        Raises:
            UserError: logits that are not numbers.
        """
        ended: list[Turn] = []
        if self._joining is None and self._waiting and len(self._rows) < self.max_rows:
            self._start(self._waiting.popleft())
        if self._joining is not None:
            ended += self._prefill()
        if self._rows:
            ended += self._decode()
        return ended

    def run(self, turns: Sequence[Turn]) -> None:
        """All of these, to their ends."""
        for turn in turns:
            self.add(turn)
        while self.running or self.waiting:
            self.step()

    # ---- a new prompt ----

    def _start(self, turn: Turn) -> None:
        row = _Row(turn, self.device)
        n, known = self.prefixes.longest(row.ids)
        cache = KVCache(self.model.config, 1, len(row.ids), device=self.device, dtype=self.dtype)
        if known is not None:
            cache.kv[..., :n, :] = known[..., :n, :]
            cache.length = n
        self._joining = row, cache

    def _prefill(self) -> list[Turn]:
        assert self._joining is not None
        row, cache = self._joining
        # Nobody waits: all at once.
        n = self.prefill_tokens if self._rows else len(row.ids)
        piece = row.ids[cache.length : cache.length + n]
        idx_1T = torch.tensor([piece], device=self.device)
        hidden_D = self.model(idx_1T, kv_cache=cache, return_logits=False).hidden[0, -1]
        if cache.length < len(row.ids):
            return []
        self._joining = None
        self.prefixes.keep(row.ids, cache.kv)
        if not self._choose(row, self.model.lm_head(hidden_D).float()):
            return [row.turn]
        self._join(row, cache.kv)
        return []

    def _join(self, row: _Row, kv: Tensor) -> None:
        n = kv.size(4)
        if not self._rows:
            self._length = 0
        self._reserve(max(n, self._length) + 1)
        assert self._kv is not None
        B, more = len(self._rows), max(0, n - self._length)
        if more and B:
            self._kv[:, :, :B, :, more : more + self._length] = self._kv[:, :, :B, :, : self._length].clone()
            self._padding = [padding + more for padding in self._padding]
        self._length += more
        self._kv[:, :, B, :, self._length - n : self._length] = kv[:, :, 0]
        self._rows.append(row)
        self._padding.append(self._length - n)

    # ---- a step of all ----

    def _decode(self) -> list[Turn]:
        spare = min(self._padding)
        if spare and (len(self._rows) == 1 or spare >= _WORTH_MOVING):
            self._move_left(spare)
        n = min(len(row.coming) for row in self._rows)  # more than one where a tag was put in
        self._reserve(self._length + n)
        assert self._kv is not None
        B = len(self._rows)
        cache = KVCache.over(self._kv[:, :, :B], self._length)
        idx_BT = torch.tensor([[row.coming.popleft() for _ in range(n)] for row in self._rows], device=self.device)
        padding_B = torch.tensor(self._padding, device=self.device) if any(self._padding) else None
        hidden_BTD = self.model(idx_BT, kv_cache=cache, left_padding_B=padding_B, return_logits=False).hidden
        self._length += n
        choosing = [i for i, row in enumerate(self._rows) if not row.coming]
        gone = []
        if choosing:
            logits = self.model.lm_head(hidden_BTD[choosing, -1]).float()
            gone = [
                i for i, logits_V in zip(choosing, logits, strict=True) if not self._choose(self._rows[i], logits_V)
            ]
        ended = [self._rows[i].turn for i in gone]
        self._leave(gone)
        return ended

    def _choose(self, row: _Row, logits_V: Tensor) -> bool:
        """Choose the next id; whether the text goes on."""
        forbidden = frozenset(row.turn.forbidden_ids)
        if forbidden not in self._bias:
            self._bias[forbidden] = bias(self.model, forbidden, self.vocab_size)
        logits_V = logits_V + self._bias[forbidden]
        if not torch.isfinite(logits_V.max()):
            raise UserError(NOT_NUMBERS)
        row.coming.extend(row.turn.take(choose(logits_V, row.turn.sampling, row.generator, row.ids)))
        row.ids.extend(row.coming)
        return bool(row.coming) and len(row.ids) < self.max_seq_length

    def _leave(self, positions: Sequence[int]) -> None:
        assert self._kv is not None or not positions
        for i in sorted(positions, reverse=True):
            last = len(self._rows) - 1
            if i != last:
                assert self._kv is not None
                self._kv[:, :, i] = self._kv[:, :, last]
                self._rows[i], self._padding[i] = self._rows[last], self._padding[last]
            del self._rows[last], self._padding[last]

    def _move_left(self, n: int) -> None:
        assert self._kv is not None
        B = len(self._rows)
        self._kv[:, :, :B, :, : self._length - n] = self._kv[:, :, :B, :, n : self._length].clone()
        self._length -= n
        self._padding = [padding - n for padding in self._padding]

    def _reserve(self, length: int) -> None:
        """Room for so many positions: by moving rows to the left, else by more memory."""
        capacity = 0 if self._kv is None else self._kv.size(4)
        if length <= capacity:
            return
        spare = min(self._padding) if self._padding else 0
        if spare and length - spare <= capacity and (spare >= _WORTH_MOVING or capacity >= self.max_seq_length):
            self._move_left(spare)
            return
        capacity = max(length, min(max(2 * capacity, _FIRST_CAPACITY), self.max_seq_length))
        config = self.model.config
        shape = (2, config.n_layer, self.max_rows, config.n_query_groups, capacity, config.head_size)
        kv = torch.zeros(shape, device=self.device, dtype=self.dtype)
        if self._kv is not None:
            kv[..., : self._length, :] = self._kv[..., : self._length, :]
        self._kv = kv
