"""A model on disk, read block by block, whichever way it is spelled: a lit directory or a Hugging Face one.

Upcycling and its proof ask for blocks (`litgpt.keymap`), so both work from and to either directory without a stop in
between. `Streamed` casts what it reads and runs the model with one transformer block of it in memory.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from litgpt.checkpoint import (
    CONFIG_FILE,
    HF_CONFIG_FILE,
    LIT_FILE,
    STORED_HEAD,
    check_tensors,
    check_tied,
    config_of_hf_dir,
    hf_layout,
    read_provenance,
    require_lit_dir,
)
from litgpt.config import Config
from litgpt.keymap import (
    DERIVED_HF_BUFFERS,
    HF_EMBED,
    HF_HEAD,
    LIT_EMBED,
    LIT_HEAD,
    BlockId,
    assemble,
    flat_rows,
    layout,
)
from litgpt.model import GPT, Block, LLaMAMoE, RMSNorm
from litgpt.safetensorfile import HFReader
from litgpt.tensorfile import LitReader, page_memory, row_count
from litgpt.utils import progress

AHEAD_BYTES = 32 << 20
"""A thread reads so far ahead of what is computed (and one piece at least)."""

EMBED, HEAD, NORM = BlockId("embed"), BlockId("head"), BlockId("norm_f")


class Place(NamedTuple):
    """Where a block lies: equal places hold equal numbers."""

    tensor: str
    start: int
    stop: int


class Stored:
    """A model in a lit or a Hugging Face directory; only its config and its files' headers are read here.

    Args:
        directory: with `lit_model.pth` and `model_config.yaml`, or with `config.json` and safetensors. One that holds
            both (a converted download) is read as a lit directory.

    Raises:
        UserError: neither, incomplete, or the tensors are not those of the config.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._equal: dict[Place, Place] = {}
        unconverted = (self.directory / HF_CONFIG_FILE).is_file() and not (self.directory / LIT_FILE).is_file()
        hugging_face = unconverted and any(self.directory.glob("*.safetensors*"))
        self.reader: LitReader | HFReader
        self.files: tuple[Path, ...]
        """What holds the weights."""
        if hugging_face:
            self.config = config_of_hf_dir(self.directory, None, {})
            tied = self.config.tie_embeddings
            self.reader = HFReader(self.directory)
            self.layout = hf_layout(self.config, self.reader.specs)
            buffers = {pattern.format(i=i) for pattern in DERIVED_HF_BUFFERS for i in range(self.config.n_layer)}
            ignored = buffers | ({HF_HEAD} if tied else set())
            check_tensors(self.directory, self.reader.specs, self.layout, because=HF_CONFIG_FILE, ignored=ignored)
            self.head_stored_twice = tied and HF_HEAD in self.reader.specs
            """A tied Hugging Face file that holds the head beside the embedding that it equals, as Qwen3-0.6B's."""
            if self.head_stored_twice:
                check_tied(self.reader, HF_HEAD, HF_EMBED)
            self.files = self.reader.files
            self._aliases: dict[str, str] = {}
        else:
            self.config = Config.from_checkpoint(require_lit_dir(self.directory))
            self.reader = LitReader(self.directory)
            self.layout = layout(self.config, "lit")
            check_tensors(self.reader.path, self.reader.specs, self.layout, because=CONFIG_FILE)
            self.head_stored_twice = bool(read_provenance(self.directory).get(STORED_HEAD))
            if self.config.tie_embeddings:
                check_tied(self.reader, LIT_HEAD, LIT_EMBED)
            self.files = (self.reader.path,)
            self._aliases = self.reader.aliases

    def place(self, block: BlockId) -> Place:
        """Where a block lies.

        Raises:
            KeyError: the model has no such block.
        """
        if block == HEAD and self.config.tie_embeddings:
            block = EMBED
        name, start, stop = self.layout.rows[block]
        place = Place(self._aliases.get(name, name), start, stop)
        return self._equal.get(place, place)

    def is_equal(self, block: BlockId, other: BlockId) -> None:
        """Take note that two blocks hold the same bits: from now on one is read for both."""
        self._equal[self.place(block)] = self.place(other)

    def spelling(self, block: BlockId) -> str:
        """The name on disk of the tensor that a block is (a part of)."""
        return self.layout.rows[block].tensor if block in self.layout.rows else self.place(block).tensor

    def dtype(self, block: BlockId) -> torch.dtype:
        """How it is stored."""
        return self.reader.specs[self.place(block).tensor].dtype

    def nbytes(self, block: BlockId) -> int:
        """Its size on disk."""
        place = self.place(block)
        spec = self.reader.specs[place.tensor]
        return (place.stop - place.start) * spec.nbytes // max(1, row_count(spec.shape))

    def read(self, block: BlockId, start: int = 0, stop: int | None = None, *, into: Tensor | None = None) -> Tensor:
        """Rows `start:stop` of a block (all of them by default), as stored, in memory of their own or in `into`.

        Raises:
            KeyError: no such block.
            UserError: the file has become shorter since it was opened.
        """
        place = self.place(block)
        end = place.stop if stop is None else place.start + stop
        return self.reader.read_rows(place.tensor, place.start + start, end, into=into)


def load_stored(directory: str | os.PathLike[str], dtype: torch.dtype, device: torch.device | str = "cpu") -> GPT:
    """A model from a lit or a Hugging Face directory, strict, in eval mode; one tensor at a time is read.

    Raises:
        UserError: as `Stored`.
    """
    stored = Stored(directory)
    config, state = stored.config, {}
    target = layout(config, "memory", tied=config.tie_embeddings)
    for name in progress(list(target.parts), f"loading {stored.directory.name}", unit="tensor"):
        state[name] = assemble(target, name, stored.layout, stored.reader.read_rows).to(device=device, dtype=dtype)
    if config.tie_embeddings:
        state[LIT_HEAD] = state[LIT_EMBED]
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


class _Stacks:
    """The experts of one layer as they are read: while all are equal, one in memory serves for all.

    Casting E equal experts would take most of a proof's time and memory.
    """

    def __init__(self) -> None:
        self.apart: set[str] = set()
        """Names of the stacked parameters whose experts differ."""
        self._first: dict[str, Tensor] = {}

    def keeps(self, values: Tensor) -> bool:
        """Whether these are the values that others are still compared with."""
        return any(values is kept for kept in self._first.values())

    def has(self, name: str, piece: BlockId, values: Tensor, memory: dict[str, Tensor]) -> bool:
        """Whether an expert's piece equals the first expert's, so that it need not be copied (yet)."""
        if piece.expert < 0 or name in self.apart:
            return False
        if same_bits(self._first.setdefault(piece.key, values), values):
            return piece.expert > 0
        # Those seen before were equal to the first in this parameter, and the others are still to come.
        memory[name][1:] = memory[name][0]
        self.apart.add(name)
        return False


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal byte for byte; -0.0 is not 0.0 here, and a NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a is b:
        return True
    a_bytes, b_bytes = (x.reshape(-1).view(torch.uint8).numpy() for x in (a, b))
    # In words of 8 bytes, which is several times as fast as in bytes.
    whole = len(a_bytes) // 8 * 8
    same_words = np.array_equal(a_bytes[:whole].view(np.uint64), b_bytes[:whole].view(np.uint64))
    return same_words and np.array_equal(a_bytes[whole:], b_bytes[whole:])


class _Coming(NamedTuple):
    """A piece that a thread reads."""

    same: list[BlockId]
    values: Future[Tensor]
    memory: Tensor


class Streamed:
    """A stored model that runs in some arithmetic with one transformer block in memory.

    Args:
        stored: the model.
        dtype: of the arithmetic; the stored weights are cast to it.
        ahead_bytes: a thread reads so far ahead of what is computed.
    """

    def __init__(self, stored: Stored, dtype: torch.dtype, ahead_bytes: int = AHEAD_BYTES) -> None:
        self.stored, self.config, self.dtype, self._ahead_bytes = stored, stored.config, dtype, ahead_bytes
        self._in_memory = layout(self.config, "memory")
        self._blocks: dict[bool, Block] = {}
        self._pool = ThreadPoolExecutor(1)
        self._ahead: deque[_Coming] = deque()
        self._coming: Iterator[list[BlockId]] = iter(())
        self._next = -1
        self._free: dict[int, list[Tensor]] = {}
        self._memory: dict[bool, dict[str, Tensor]] = {}

    def block(self, layer: int, see: Callable[[Tensor, list[BlockId]], None] | None = None) -> Block:
        """The transformer block of one layer, filled; the next call may fill the same memory with another.

        Args:
            layer: its number.
            see: is shown each stored piece once, as stored, with all the blocks that it is (equal experts of a lit
                directory are one piece). Experts are lent: their memory is used again.
        """
        block, stacks = self._empty(layer), _Stacks()
        for same, values, lent in self._read(layer):
            for piece in same:
                place = self._in_memory.rows[piece]
                name = place.tensor.removeprefix(f"transformer.h.{layer}.")
                if stacks.has(name, piece, values, self._memory[layer in self.config.moe_layers]):
                    if piece == same[0]:
                        self.stored.is_equal(piece, piece._replace(expert=0))
                    continue
                parameter = self._memory[layer in self.config.moe_layers][name]
                flat_rows(parameter, place.start, place.stop).copy_(values)
            if see is not None:
                see(values, same)
            if same[0].expert >= 0 and not stacks.keeps(values):
                self._free.setdefault(values.nbytes, []).append(lent)
        if isinstance(block.mlp, LLaMAMoE):
            memory = self._memory[True]
            for stack in ("gate_up_proj", "down_proj"):
                full = memory[f"mlp.experts.{stack}"]
                shown = full if f"mlp.experts.{stack}" in stacks.apart else full[:1].expand_as(full)
                setattr(block.mlp.experts, stack, nn.Parameter(shown, requires_grad=False))
        return block

    def show(self, layer: int, see: Callable[[Tensor, list[BlockId]], None]) -> None:
        """Read a layer without making a block of it; `see` as of `block`."""
        for same, values, lent in self._read(layer):
            see(values, same)
            if same[0].expert >= 0:
                self._free.setdefault(values.nbytes, []).append(lent)

    def _read(self, layer: int) -> Iterator[tuple[list[BlockId], Tensor, Tensor]]:
        """The stored pieces of a layer, each with the blocks that it is and the memory that it is in.

        A thread reads ahead, into the next layer, too: a disk has time while a block computes.
        """
        if layer != self._next:
            self._ahead.clear()
            self._coming = chain.from_iterable(map(self._pieces, range(layer, self.config.n_layer)))
        self._next = layer + 1
        while True:
            waiting = sum(self.stored.nbytes(coming.same[0]) for coming in self._ahead)
            while waiting < self._ahead_bytes and (same := next(self._coming, None)) is not None:
                n_bytes = self.stored.nbytes(same[0])
                free = self._free.get(n_bytes)
                memory = free.pop() if free else page_memory(n_bytes)
                values = self._pool.submit(self.stored.read, same[0], into=memory)
                self._ahead.append(_Coming(same, values, memory))
                waiting += n_bytes
            if not self._ahead or self._ahead[0].same[0].layer != layer:
                return
            coming = self._ahead.popleft()
            yield coming.same, coming.values.result(), coming.memory

    def _pieces(self, layer: int) -> list[list[BlockId]]:
        """The blocks of a layer, those that are one piece on disk together."""
        pieces: dict[Place, list[BlockId]] = {}
        for piece in self.stored.layout.rows:
            if piece.layer == layer:
                pieces.setdefault(self.stored.place(piece), []).append(piece)
        return list(pieces.values())

    def _empty(self, layer: int) -> Block:
        kind = layer in self.config.moe_layers
        if kind not in self._blocks:
            # Off the meta device, so that no time goes into random numbers.
            with torch.device("meta"):
                block = Block(self.config, layer).to(self.dtype)
            self._blocks[kind] = block.to_empty(device="cpu").requires_grad_(False)
            self._memory[kind] = {name: parameter.data for name, parameter in block.named_parameters()}
        return self._blocks[kind]

    def drop_blocks(self) -> None:
        """Give the blocks' memory back."""
        self._blocks.clear()
        self._memory.clear()
        self._free.clear()

    def embed(self, ids_BT: Tensor) -> Tensor:
        """The rows of the embedding, [B, T, D]."""
        rows = {row: self.stored.read(EMBED, row, row + 1)[0] for row in set(ids_BT.flatten().tolist())}
        return torch.stack([rows[row] for row in ids_BT.flatten().tolist()]).view(*ids_BT.shape, -1).to(self.dtype)

    def last_norm(self, x_BTD: Tensor) -> Tensor:
        """What the head reads, [N, D]."""
        norm = RMSNorm(self.config.n_embd, self.config.norm_eps).to(self.dtype).requires_grad_(False)
        norm.weight.copy_(self.stored.read(NORM))
        return norm(x_BTD).flatten(0, 1)
