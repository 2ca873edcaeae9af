"""The proof that a made model is what its recipe makes of the dense one, and how far its function is from it.

`prove` runs two models side by side, one block of each in memory, through the modules that `GPT` is made of. It makes
every block again by the recipe and compares the stored bits, then hidden states, logits and predictions on a little
Hindi and English. Neither check includes the other: a flipped low bit of one weight drowns in rounding, and equal bits
say nothing about routing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from litgpt.checkpoint import read_provenance
from litgpt.config import Config
from litgpt.keymap import BlockId
from litgpt.model import Routing, document_mask, positions_in_document, rope_cos_sin
from litgpt.recipes import COPY, Recipe, origin, recipe_of_provenance
from litgpt.routing import RouterStats
from litgpt.stored import EMBED, HEAD, NORM, Stored, Streamed, same_bits
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, progress

__all__ = ["SAMPLE_TEXTS", "LayerProof", "Proof", "Sample", "changed_bits", "prove", "prove_on"]

SAMPLE_TEXTS = (
    "धान की नर्सरी में बीज बोने से पहले खेत को समतल करें और पानी निकलने का रास्ता बना लें।",
    "Rain is expected on Thursday, so wait two days before you spray and keep the drains open.",
    "पत्तियों पर भूरे धब्बे दिखें तो पहले दस पौधों को ध्यान से देखें और गिनती लिख लें।",
    "मिट्टी का pH 7.8 है, इसलिए zinc sulphate की मात्रा कृषि केंद्र से पूछकर ही डालें।",
)
MAX_TOKENS_PER_TEXT = 16

EXACT_KL = 1e-9
EXACT_DIFF_FLOAT64 = 1e-10
"""Bounds of a proof. Float32 rounding alone moves KL by about 1e-12, float64 rounding the logits by about 1e-14."""

AHEAD_BYTES = 128 << 20
"""Read of the made model while both compute: about a layer of Qwen3-0.6B with 8 experts, so that neither waits."""

ROWS_AT_A_TIME = 4096
"""Of the vocabulary: as many logits of each model, in float64, are in memory for each token."""

_SAME = (
    *("n_layer", "n_embd", "n_head", "n_query_groups", "head_size", "padded_vocab_size"),
    *("norm_qk", "attn_bias", "norm_eps", "rope_base"),
)
"""Fields of a config in which a made model and its dense one agree, whatever the recipe."""


class LayerProof(NamedTuple):
    """One block of both models, over the sample."""

    layer: int
    error: float
    """‖x_made − x_dense‖ / ‖x_dense‖ of the residual stream after the block; what came before is in it."""
    load_E: tuple[float, ...]
    """Each expert's share of the choices; empty for a dense block."""
    entropy: float | None
    """Of the router's probabilities, mean over tokens, divided by log E: 1 is indifference."""


@dataclass(frozen=True)
class Proof:
    """How far a made model is from its dense one, over some text and the dense model's real vocabulary."""

    dtype: str
    """Arithmetic of both models, `float32`, `float64` or `bfloat16`; the weights are the stored ones, cast."""
    n_tokens: int
    max_abs_diff: float
    """Largest difference of two logits."""
    kl: float
    """KL(dense ‖ made), mean over the tokens, nats."""
    kl_max: float
    """Its largest value at one token."""
    top1_agreement: float
    """Share of the tokens for which both predict the same next token."""
    changed: tuple[str, ...] = ()
    """Disk names of the tensors whose bits are not what the recipe makes (routers and new rows do not count)."""
    layers: tuple[LayerProof, ...] = ()

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

    def figures(self) -> dict[str, Any]:
        """Plain values, for YAML; without the layers."""
        names = ("dtype", "n_tokens", "max_abs_diff", "kl", "kl_max", "top1_agreement")
        return {name: getattr(self, name) for name in names} | {"changed": list(self.changed)}

    def plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        layers = [layer._asdict() | {"load_E": list(layer.load_E)} for layer in self.layers]
        return self.figures() | {"layers": layers}


class Sample(NamedTuple):
    """What both models read, and which of their answers count."""

    ids_BT: Tensor
    documents_BT: Tensor
    """The number of the text that each token is from."""
    vocabulary: int
    """How many ids the dense model's tokenizer knows: logits of padding rows mean nothing."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, texts: Sequence[str], block_size: int) -> Sample:
        """The first tokens of each text.

        Raises:
            ValueError: there is no text.
        """
        documents = [tokenizer.encode(text)[: min(MAX_TOKENS_PER_TEXT, block_size)] for text in texts]
        ids = [index for document in documents for index in document]
        if not ids:
            raise ValueError("a proof needs at least one token of text")
        numbers = [number for number, document in enumerate(documents) for _ in document]
        return cls(torch.tensor([ids]), torch.tensor([numbers]), tokenizer.vocab_size)

    def first(self) -> Sample:
        """Its first text alone, for slow arithmetic."""
        kept = self.documents_BT[0] == self.documents_BT[0, 0]
        return Sample(self.ids_BT[:, kept], self.documents_BT[:, kept], self.vocabulary)


def prove(
    dense_dir: str | os.PathLike[str],
    made_dir: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    texts: Sequence[str] = SAMPLE_TEXTS,
) -> Proof:
    """Compare a made model with the dense one it was made from: stored bits, hidden states, logits, predictions.

    Both run block by block through the modules that `GPT` is made of, one block of each in memory, so it needs memory
    for one layer and not for a model.

    Args:
        dense_dir: lit or Hugging Face directory of the dense model.
        made_dir: of the MoE, fresh or trained. Its provenance.yaml names the recipe; without one its experts are
            expected to be copies.
        dtype: float32, float64 or bfloat16; the stored weights are cast to it.
        texts: each is a document of its own; its first `MAX_TOKENS_PER_TEXT` tokens are read.

    Raises:
        UserError: a directory is incomplete, the two are not of one shape, or the dense model's output is not finite.
        ValueError: there is no text.
    """
    dense, made = Stored(dense_dir), Stored(made_dir)
    known = Tokenizer(dense.directory)
    sample = Sample.of(known, texts, dense.config.block_size)
    added = set(Tokenizer(made.directory).thought_ids or ()) - set(known.thought_ids or ())
    del known  # Qwen3's takes 100 MB
    recipe, seed = recipe_behind(made)
    return prove_on(sample, dense, made, dtype=dtype, added=added, recipe=recipe, seed=seed)


def recipe_behind(made: Stored) -> tuple[Recipe, int]:
    """The recipe and the seed that a directory's provenance names; copies, where it names none.

    The provenance of an export or of a training holds that of what it was made of.
    """
    provenance: Any = read_provenance(made.directory)
    while isinstance(provenance, dict):
        upcycled = provenance.get("upcycled")
        if isinstance(upcycled, dict):
            return recipe_of_provenance(upcycled) or COPY, int(upcycled.get("seed", 0))
        provenance = provenance.get("source")
    return COPY, 0


@torch.inference_mode()
def prove_on(
    sample: Sample,
    dense: Stored,
    made: Stored,
    *,
    dtype: torch.dtype,
    added: Collection[int] = (),
    recipe: Recipe = COPY,
    seed: int = 0,
    compare_bits: bool = True,
) -> Proof:
    """`prove`, for who has opened both already.

    Args:
        sample: tokens of the dense model's tokenizer.
        dense, made: the models.
        dtype: as in `prove`.
        added: vocabulary rows that only the made model's tokenizer knows; they may differ.
        recipe, seed: how it was made.
        compare_bits: False where another proof of the same files has done so.
    """
    _require_same_shape(dense, made, recipe)
    a, b = Streamed(dense, dtype), Streamed(made, dtype, AHEAD_BYTES)
    run = _Run(recipe, seed, compare_bits)
    h_dense_ND, h_made_ND = run(a, b, sample)
    if not h_dense_ND.isfinite().all():
        raise UserError(f"{dense.files[0]} gives numbers that are not finite, its weights are broken; convert it again")
    if compare_bits:
        run.changed += _compare_rows(dense, made, added)
    vocabulary = min(sample.vocabulary, dense.config.padded_vocab_size)
    figures = _compare_logits(a, h_dense_ND, b, h_made_ND, vocabulary)
    name = str(dtype).removeprefix("torch.")
    return Proof(name, len(h_dense_ND), *figures, changed=tuple(dict.fromkeys(run.changed)), layers=tuple(run.layers))


def changed_bits(
    dense: Stored, made: Stored, *, added: Collection[int] = (), recipe: Recipe = COPY, seed: int = 0
) -> tuple[str, ...]:
    """The part of a proof that needs no arithmetic: the tensors whose bits are not what the recipe makes.

    Args:
        dense, made, added, recipe, seed: as of `prove_on`.

    Returns:
        disk names; routers and new rows do not count.

    Raises:
        UserError: the two are not of one shape.
    """
    _require_same_shape(dense, made, recipe)
    run = _Run(recipe, seed, True)
    a, b = Streamed(dense, torch.float32), Streamed(made, torch.float32, AHEAD_BYTES)
    for layer in progress(range(dense.config.n_layer), "reading back", unit="layer"):
        keep, compare = run.seeing(made)
        a.show(layer, keep)
        b.show(layer, compare)
    run.compare_norm(dense, made)
    return tuple(dict.fromkeys([*run.changed, *_compare_rows(dense, made, added)]))


def _require_same_shape(dense: Stored, made: Stored, recipe: Recipe) -> None:
    """Raise `UserError` unless the made model can have come from the dense one by this recipe."""
    ours, theirs = dense.config, made.config
    differing = [key for key in _SAME if getattr(ours, key) != getattr(theirs, key)]
    if not differing and theirs.is_moe:
        differing = _unlike(ours, theirs, recipe)
    if not differing and not theirs.is_moe and recipe.name != "wide":
        differing = ["mlp_class_name"]
    if differing or ours.is_moe:
        why = "the first is no dense model" if ours.is_moe else f"they differ in {', '.join(differing)}"
        raise UserError(
            f"{made.directory} ({theirs.name}) is not a MoE made from {dense.directory} ({ours.name}): {why}"
        )


def _unlike(dense: Config, moe: Config, recipe: Recipe) -> list[str]:
    """Fields that the recipe would have set otherwise."""
    parts = recipe.granularity
    if moe.n_expert % parts or moe.n_expert_per_token % parts:
        return ["n_expert"]
    expected = recipe.config(dense, moe.n_expert // parts, moe.n_expert_per_token // parts, moe.moe_layers)
    keys = ("intermediate_size", "expert_size", "n_shared_expert")
    return [key for key in keys if getattr(expected, key) != getattr(moe, key) and (moe.dense_layers or key != keys[0])]


_See = Callable[[Tensor, list[BlockId]], None]


class _Run:
    """Both models through their blocks; `changed` and `layers` are what was seen on the way."""

    def __init__(self, recipe: Recipe, seed: int, compare_bits: bool) -> None:
        self.recipe, self.seed, self.compare_bits = recipe, seed, compare_bits
        self.changed: list[str] = []
        self.layers: list[LayerProof] = []

    def __call__(self, dense: Streamed, made: Streamed, sample: Sample) -> tuple[Tensor, Tensor]:
        """What the heads of both models read, [N, D].

        One block of each model is refilled layer by layer; both are gone before the vocabulary needs their memory.
        """
        mask = document_mask(sample.documents_BT)
        cos, sin = rope_cos_sin(positions_in_document(sample.documents_BT), dense.config, dense.dtype)
        x_dense_BTD, x_made_BTD = dense.embed(sample.ids_BT), made.embed(sample.ids_BT)
        what = f"proving in {str(dense.dtype).removeprefix('torch.')}"
        for layer in progress(range(dense.config.n_layer), what, unit="layer"):
            keep, compare = self.seeing(made.stored)
            block = dense.block(layer, keep if self.compare_bits else None)
            x_dense_BTD, _ = block(x_dense_BTD, cos, sin, mask)
            block = made.block(layer, compare if self.compare_bits else None)
            x_made_BTD, routed = block(x_made_BTD, cos, sin, mask)
            self.layers.append(_layer_proof(layer, x_dense_BTD, x_made_BTD, routed))
        dense.drop_blocks()
        made.drop_blocks()
        if self.compare_bits:
            self.compare_norm(dense.stored, made.stored)
        return dense.last_norm(x_dense_BTD), made.last_norm(x_made_BTD)

    def seeing(self, made: Stored) -> tuple[_See, _See]:
        """What is to see a layer of the dense model, and then what is to see the same layer of the made one."""
        originals: dict[BlockId, Tensor] = {}

        def keep(values: Tensor, pieces: list[BlockId]) -> None:
            originals.update(dict.fromkeys(pieces, values))

        def compare(values: Tensor, pieces: list[BlockId]) -> None:
            self._compare(made, values, pieces, originals)

        return keep, compare

    def compare_norm(self, dense: Stored, made: Stored) -> None:
        """Note the last norm if it differs."""
        if not same_bits(dense.read(NORM), made.read(NORM)):
            self.changed.append(made.spelling(NORM))

    def _compare(self, made: Stored, values: Tensor, pieces: list[BlockId], originals: dict[BlockId, Tensor]) -> None:
        """Note the pieces whose bits are not what the recipe makes; equal ones of one tensor are made once."""
        verdicts: dict[Any, bool] = {}
        for piece in pieces:
            source = originals.get(origin(piece))
            if source is None:  # the router
                continue
            key = (origin(piece), self.recipe.kind(piece))
            if key not in verdicts:
                verdicts[key] = same_bits(self.recipe.make(piece, source, self.seed), values)
            if not verdicts[key]:
                self.changed.append(made.spelling(piece))


def _layer_proof(layer: int, x_dense_BTD: Tensor, x_made_BTD: Tensor, routed: Routing | None) -> LayerProof:
    error = float((x_made_BTD.double() - x_dense_BTD.double()).norm() / x_dense_BTD.double().norm())
    if routed is None:
        return LayerProof(layer, error, (), None)
    stats = RouterStats()
    stats.update({layer: routed})
    result = stats.results()[0]
    return LayerProof(layer, error, result.share_E, result.entropy)


def _compare_rows(dense: Stored, made: Stored, added: Collection[int]) -> list[str]:
    """Embedding and head, if they differ in any row that is not in `added`."""
    blocks = [EMBED, HEAD]
    if all(model.place(EMBED) == model.place(HEAD) for model in (dense, made)):
        blocks.remove(HEAD)
    rows = dense.config.padded_vocab_size
    differing = []
    for block in blocks:
        for start in range(0, rows, ROWS_AT_A_TIME):
            span = (start, min(start + ROWS_AT_A_TIME, rows))
            a, b = dense.read(block, *span), made.read(block, *span)
            if same_bits(a, b):
                continue
            if not all(start + row in added or same_bits(a[row], b[row]) for row in range(len(a))):
                differing.append(made.spelling(block))
                break
    return differing


class _Figures(NamedTuple):
    max_abs_diff: float
    kl: float
    kl_max: float
    top1_agreement: float


def _compare_logits(
    dense: Streamed, h_dense_ND: Tensor, made: Streamed, h_made_ND: Tensor, vocabulary: int
) -> _Figures:
    """The figures of a proof over the first `vocabulary` ids, a slice of them at a time.

    KL(p ‖ q) = E_p[log p − log q] = E_p[a − b] − logΣexp a + logΣexp b for logits a and b; the sums run in float64.
    """
    N = h_dense_ND.size(0)
    lse_a_N, lse_b_N = torch.full((2, N), -math.inf, dtype=torch.float64)
    mean_difference_N, max_abs_diff = torch.zeros(N, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    best_a, best_b = [], []
    for start in range(0, vocabulary, ROWS_AT_A_TIME):
        span = (HEAD, start, min(start + ROWS_AT_A_TIME, vocabulary))
        a_NV = F.linear(h_dense_ND, dense.stored.read(*span).to(dense.dtype)).double()
        b_NV = F.linear(h_made_ND, made.stored.read(*span).to(made.dtype)).double()
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
