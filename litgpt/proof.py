"""The proof that a mixture of experts computes what the dense model computes that it was made from.

`prove` runs two lit directories side by side, one block of each in memory, through the modules that `GPT` is made of.
It compares the stored bits (copies must be copies), then logits and predictions on a little Hindi and English. Neither
check includes the other: a flipped low bit of one weight drowns in rounding, and equal bits say nothing about routing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from litgpt.checkpoint import CONFIG_FILE, require_lit_dir
from litgpt.config import Config
from litgpt.keymap import LIT_EMBED, LIT_HEAD, BlockId, Layout, flat_rows, layout
from litgpt.model import Block, RMSNorm, document_mask, positions_in_document, rope_cos_sin
from litgpt.tensorfile import LitReader
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, progress

__all__ = ["SAMPLE_TEXTS", "Proof", "Sample", "check_tensors", "prove", "prove_on", "twin"]

SAMPLE_TEXTS = (
    "धान की नर्सरी में बीज बोने से पहले खेत को समतल करें और पानी निकलने का रास्ता बना लें।",
    "Rain is expected on Thursday, so wait two days before you spray and keep the drains open.",
    "पत्तियों पर भूरे धब्बे दिखें तो पहले दस पौधों को ध्यान से देखें और गिनती लिख लें।",
    "मिट्टी का pH 7.8 है, इसलिए zinc sulphate की मात्रा कृषि केंद्र से पूछकर ही डालें।",
)
MAX_TOKENS_PER_TEXT = 32

EXACT_KL = 1e-9
EXACT_DIFF_FLOAT64 = 1e-10
"""Bounds of a proof. Float32 rounding alone moves KL by about 1e-12, float64 rounding the logits by about 1e-14."""

ROWS_AT_A_TIME = 4096
"""Of the vocabulary: as many logits of each model, in float64, are in memory for each token."""

# A MoE's expert pieces and the dense pieces that they are copies of; the other pieces keep their name.
_DENSE_KEY = {"expert_gate": "gate", "expert_up": "up", "expert_down": "down"}


@dataclass(frozen=True)
class Proof:
    """How far a mixture of experts is from its dense model, over some text and the dense model's real vocabulary."""

    dtype: str
    """Arithmetic of both models, `float32` or `float64`; the weights are the stored ones, cast."""
    n_tokens: int
    max_abs_diff: float
    """Largest difference of two logits."""
    kl: float
    """KL(dense ‖ MoE), mean over the tokens, nats."""
    kl_max: float
    """Its largest value at one token."""
    top1_agreement: float
    """Share of the tokens for which both predict the same next token."""
    changed: tuple[str, ...] = ()
    """Disk names of the tensors whose bits are not the dense model's (routers and new vocabulary rows do not count)."""

    @property
    def exact(self) -> bool:
        """Whether both are one function up to the rounding of `dtype`."""
        if self.changed:
            return False
        if self.dtype == "float64":
            return self.max_abs_diff <= EXACT_DIFF_FLOAT64
        return self.kl <= EXACT_KL and self.top1_agreement == 1.0

    def describe(self) -> str:
        """The figures in one line."""
        text = (
            f"{self.dtype}, {self.n_tokens} tokens: max |Δ logit| {self.max_abs_diff:.1e}, KL {self.kl:.1e} nats, "
            f"top-1 {self.top1_agreement:.2%}"
        )
        if self.changed:
            text += f"; {len(self.changed)} tensors differ, e.g. {self.changed[0]}"
        return text


def prove(
    dense_dir: str | os.PathLike[str],
    moe_dir: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    texts: Sequence[str] = SAMPLE_TEXTS,
) -> Proof:
    """Compare a mixture of experts with the dense model it was made from: stored bits, logits, predictions.

    Both run block by block through the modules that `GPT` is made of, one block of each in memory, so it needs memory
    for one layer and not for a model.

    Args:
        dense_dir: lit directory of the dense model.
        moe_dir: lit directory of the MoE, fresh or trained.
        dtype: float32 or float64; the stored weights are cast to it.
        texts: each is a document of its own; its first `MAX_TOKENS_PER_TEXT` tokens are read.

    Raises:
        UserError: a directory is incomplete, the two are not of one shape, or the dense model's output is not finite.
        ValueError: there is no text.
    """
    dense_dir, moe_dir = require_lit_dir(dense_dir), require_lit_dir(moe_dir)
    known = Tokenizer(dense_dir)
    sample = Sample.of(known, texts, Config.from_checkpoint(dense_dir).block_size)
    added = set(Tokenizer(moe_dir).thought_ids or ()) - set(known.thought_ids or ())
    del known  # Qwen3's takes 100 MB
    return prove_on(sample, dense_dir, moe_dir, dtype=dtype, added=added)


@torch.inference_mode()
def prove_on(
    sample: Sample, dense_dir: Path, moe_dir: Path, *, dtype: torch.dtype, added: Collection[int] = ()
) -> Proof:
    """`prove`, for who has read the tokenizers already.

    Args:
        sample: tokens of the dense model's tokenizer.
        dense_dir, moe_dir, dtype: as in `prove`.
        added: vocabulary rows that only the MoE's tokenizer knows; they may differ.
    """
    dense, moe = _Streamed(dense_dir, dtype), _Streamed(moe_dir, dtype)
    expected = dense.config.upcycled(moe.config.n_expert, moe.config.n_expert_per_token)
    for key in ("name", "hf_config", "vocab_size"):
        setattr(expected, key, getattr(moe.config, key))
    if moe.config != expected:
        raise UserError(f"{moe_dir} ({moe.config.name}) is not a MoE made from {dense_dir} ({dense.config.name})")
    h_dense_ND, h_moe_ND, changed = _run(dense, moe, sample)
    if not h_dense_ND.isfinite().all():
        raise UserError(
            f"{dense.reader.path} gives numbers that are not finite, its weights are broken; convert it again"
        )
    changed += _compare_rows(dense, moe, added)
    vocabulary = min(sample.vocabulary, dense.config.padded_vocab_size)
    figures = _compare_logits(dense, h_dense_ND, moe, h_moe_ND, vocabulary)
    return Proof(dense.dtype_name, len(h_dense_ND), *figures, changed=tuple(dict.fromkeys(changed)))


class Sample(NamedTuple):
    """What both models read, and which of their answers count."""

    ids_BT: Tensor
    documents_BT: Tensor
    """The number of the text that each token is from."""
    vocabulary: int
    """How many ids the dense model's tokenizer knows: logits of padding rows mean nothing."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, texts: Sequence[str], block_size: int) -> Sample:
        documents = [tokenizer.encode(text)[: min(MAX_TOKENS_PER_TEXT, block_size)] for text in texts]
        ids = [index for document in documents for index in document]
        if not ids:
            raise ValueError("a proof needs at least one token of text")
        numbers = [number for number, document in enumerate(documents) for _ in document]
        return cls(torch.tensor([ids]), torch.tensor([numbers]), tokenizer.vocab_size)


class _Streamed:
    """A model on disk that is read piece by piece, and cast."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self.config = Config.from_checkpoint(directory)
        self.reader = LitReader(directory)
        self.dtype, self.dtype_name = dtype, str(dtype).removeprefix("torch.")
        self.on_disk, self._in_memory = layout(self.config, "lit"), layout(self.config, "memory")
        check_tensors(self.reader, self.on_disk)

    def block(self) -> Block:
        """A block without values, for `load`; made off the meta device, so that no time goes into random numbers."""
        with torch.device("meta"):
            block = Block(self.config).to(self.dtype)
        return block.to_empty(device="cpu")

    def load(self, block: Block, layer: int) -> Iterator[tuple[Tensor, list[BlockId]]]:
        """Fill a block with the weights of one layer; give each stored tensor once, with the pieces that it is.

        Equal experts may be one tensor on disk.
        """
        pieces_of: dict[tuple[str, int, int], list[BlockId]] = {}
        for piece, (name, start, stop) in self.on_disk.rows.items():
            if piece.layer == layer:
                pieces_of.setdefault((self.reader.aliases.get(name, name), start, stop), []).append(piece)
        for source, pieces in pieces_of.items():
            stored = self.reader.read_rows(*source)
            for piece in pieces:
                place = self._in_memory.rows[piece]
                parameter = block.get_parameter(place.tensor.removeprefix(f"transformer.h.{layer}."))
                flat_rows(parameter, place.start, place.stop).copy_(stored)
            yield stored, pieces

    def embed(self, ids_BT: Tensor) -> Tensor:
        """The rows of the embedding, [B, T, D]."""
        rows = {row: self.reader.read_rows(LIT_EMBED, row, row + 1)[0] for row in set(ids_BT.flatten().tolist())}
        return torch.stack([rows[row] for row in ids_BT.flatten().tolist()]).view(*ids_BT.shape, -1).to(self.dtype)

    def last_norm(self, x_BTD: Tensor, weight_D: Tensor) -> Tensor:
        """What the head reads, [N, D]."""
        norm = RMSNorm(self.config.n_embd, self.config.norm_eps).to(self.dtype)
        norm.weight.copy_(weight_D)
        return norm(x_BTD).flatten(0, 1)


def _run(dense: _Streamed, moe: _Streamed, sample: Sample) -> tuple[Tensor, Tensor, list[str]]:
    """What the heads of both models read, [N, D], and the MoE's tensors whose bits are not the dense model's.

    One block of each model is refilled layer by layer; both are gone before the vocabulary needs their memory.
    """
    mask = document_mask(sample.documents_BT)
    cos, sin = rope_cos_sin(positions_in_document(sample.documents_BT), dense.config, dense.dtype)
    dense_block, moe_block = dense.block(), moe.block()
    x_dense_BTD, x_moe_BTD = dense.embed(sample.ids_BT), moe.embed(sample.ids_BT)
    changed: list[str] = []
    for layer in progress(range(dense.config.n_layer), f"proving in {dense.dtype_name}", unit="layer"):
        originals = {piece: stored for stored, pieces in dense.load(dense_block, layer) for piece in pieces}
        for stored, pieces in moe.load(moe_block, layer):
            twins = {twin(piece) for piece in pieces} & originals.keys()
            differing = {original for original in twins if not _same_bits(originals[original], stored)}
            changed += [moe.on_disk.rows[piece].tensor for piece in pieces if twin(piece) in differing]
        x_dense_BTD, _ = dense_block(x_dense_BTD, cos, sin, mask)
        x_moe_BTD, _ = moe_block(x_moe_BTD, cos, sin, mask)

    norm = dense.on_disk.rows[BlockId("norm_f")].tensor
    weight_dense_D, weight_moe_D = dense.reader.read(norm), moe.reader.read(norm)
    if not _same_bits(weight_dense_D, weight_moe_D):
        changed.append(norm)
    return dense.last_norm(x_dense_BTD, weight_dense_D), moe.last_norm(x_moe_BTD, weight_moe_D), changed


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal byte for byte; -0.0 is not 0.0 here, and a NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a_bytes, b_bytes = (x.reshape(-1).view(torch.uint8).numpy() for x in (a, b))
    # In words of 8 bytes, which is several times as fast as in bytes.
    whole = len(a_bytes) // 8 * 8
    same_words = np.array_equal(a_bytes[:whole].view(np.uint64), b_bytes[:whole].view(np.uint64))
    return same_words and np.array_equal(a_bytes[whole:], b_bytes[whole:])


def _compare_rows(dense: _Streamed, moe: _Streamed, added: Collection[int]) -> list[str]:
    """Embedding and head, if they differ in any row that is not in `added`."""
    names = [LIT_EMBED, LIT_HEAD]
    if all(model.reader.shares_storage(LIT_EMBED, LIT_HEAD) for model in (dense, moe)):
        names.remove(LIT_HEAD)
    rows = dense.config.padded_vocab_size
    differing = []
    for name in names:
        for start in range(0, rows, ROWS_AT_A_TIME):
            span = (name, start, min(start + ROWS_AT_A_TIME, rows))
            a, b = dense.reader.read_rows(*span), moe.reader.read_rows(*span)
            if _same_bits(a, b):
                continue
            if not all(start + row in added or _same_bits(a[row], b[row]) for row in range(len(a))):
                differing.append(name)
                break
    return differing


class _Figures(NamedTuple):
    max_abs_diff: float
    kl: float
    kl_max: float
    top1_agreement: float


def _compare_logits(
    dense: _Streamed, h_dense_ND: Tensor, moe: _Streamed, h_moe_ND: Tensor, vocabulary: int
) -> _Figures:
    """The figures of a proof over the first `vocabulary` ids, a slice of them at a time.

    KL(p ‖ q) = E_p[log p − log q] = E_p[a − b] − logΣexp a + logΣexp b for logits a and b; the sums run in float64.
    """
    N = h_dense_ND.size(0)
    lse_a_N, lse_b_N = torch.full((2, N), -math.inf, dtype=torch.float64)
    mean_difference_N, max_abs_diff = torch.zeros(N, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    best_a, best_b = [], []
    for start in range(0, vocabulary, ROWS_AT_A_TIME):
        span = (LIT_HEAD, start, min(start + ROWS_AT_A_TIME, vocabulary))
        a_NV = F.linear(h_dense_ND, dense.reader.read_rows(*span).to(dense.dtype)).double()
        b_NV = F.linear(h_moe_ND, moe.reader.read_rows(*span).to(moe.dtype)).double()
        seen_lse_a_N, lse_a_N = lse_a_N, torch.logaddexp(lse_a_N, a_NV.logsumexp(dim=1))
        lse_b_N = torch.logaddexp(lse_b_N, b_NV.logsumexp(dim=1))
        difference_NV = a_NV - b_NV
        here_N = ((a_NV - lse_a_N[:, None]).exp() * difference_NV).sum(dim=1)
        mean_difference_N = mean_difference_N * (seen_lse_a_N - lse_a_N).exp() + here_N
        max_abs_diff = torch.maximum(max_abs_diff, difference_NV.abs().max())
        best_a.append(a_NV.max(dim=1))
        best_b.append(b_NV.max(dim=1))
    # Rounding may leave a tiny negative number where the two are equal.
    kl_N = (mean_difference_N - lse_a_N + lse_b_N).clamp(min=0.0)
    agree_N = _argmax(best_a) == _argmax(best_b)
    return _Figures(float(max_abs_diff), float(kl_N.mean()), float(kl_N.max()), float(agree_N.double().mean()))


def _argmax(best_of_slices: list[torch.return_types.max]) -> Tensor:
    """Index of each row's maximum, from the maxima of equal slices of it (all but the last hold `ROWS_AT_A_TIME`)."""
    values_SN = torch.stack([best.values for best in best_of_slices])
    ids_SN = torch.stack([best.indices + i * ROWS_AT_A_TIME for i, best in enumerate(best_of_slices)])
    return ids_SN.gather(0, values_SN.argmax(dim=0, keepdim=True))[0]


def check_tensors(reader: LitReader, expected: Layout) -> None:
    """Raise `UserError` unless the file holds exactly the tensors that its config describes."""
    found = {name: spec.shape for name, spec in reader.specs.items()}
    for name in sorted(found.keys() | expected.shapes.keys()):
        if found.get(name) != expected.shapes.get(name):
            raise UserError(
                f"{reader.path}: {name} has shape {found.get(name, 'none')}, {CONFIG_FILE} says "
                f"{expected.shapes.get(name, 'none')}; check that both are of one model"
            )


def twin(piece: BlockId) -> BlockId:
    """The dense model's piece that a piece of the MoE is a copy of; a router's does not exist."""
    return BlockId(_DENSE_KEY.get(piece.key, piece.key), piece.layer)
