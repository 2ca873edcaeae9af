"""Token by token: prefill the prompt into a KV cache once, then one position a step, greedy or sampled."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from litgpt.model import GPT, KVCache
from litgpt.utils import UserError

__all__ = ["GREEDY", "Sampling", "bias", "choose", "distribution", "generate", "generate_batch", "new_cache"]


@dataclass(frozen=True)
class Sampling:
    """How the next id is chosen from the model's logits. The order is transformers': penalty, temperature, k, p, min_p.

    Raises:
        UserError: a setting outside its range.
    """

    temperature: float = 0.0
    """0 takes the most probable id; above it, ids are drawn from softmax(logits / temperature)."""
    top_k: int | None = None
    """Draw only from the k most probable ids."""
    top_p: float | None = None
    """Draw only from the most probable ids that together hold this probability; at least one."""
    min_p: float | None = None
    """Draw only from ids at least so probable as this share of the most probable one (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Logits of ids that were already there, in the prompt too, are divided by it, negative ones multiplied
    (arXiv 1909.05858)."""

    def __post_init__(self) -> None:
        # Below a hundredth, logits divided by it may leave fp32's range; the draw would be the most probable id anyway.
        if self.temperature != 0 and not 0.01 <= self.temperature <= 100:
            raise UserError(f"temperature is {self.temperature}: expected 0 (greedy) or a number from 0.01 to 100")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}: expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: expected a number above 0, up to 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}: expected a number from 0 to 1")
        if not 0.1 <= self.repetition_penalty <= 10:
            raise UserError(f"repetition_penalty is {self.repetition_penalty}: expected a number from 0.1 to 10")


GREEDY = Sampling()


def new_cache(model: GPT, max_seq_length: int, *, rows: int = 1) -> KVCache:
    """A cache in the model's own dtype and on its device, never longer than the model's context."""
    weight = model.lm_head.weight
    length = min(max_seq_length, model.config.block_size)
    return KVCache(model.config, rows, length, device=weight.device, dtype=weight.dtype)


def generate(
    model: GPT,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    sampling: Sampling = GREEDY,
    seed: int | None = None,
    forbidden_ids: Collection[int] = (),
    vocab_size: int | None = None,
    kv_cache: KVCache | None = None,
) -> Iterator[int]:
    """Yield the ids that continue `prompt_ids`, each as soon as it is known.

    Ends after `max_new_tokens`, after a stop id (which is yielded, as the last one), or where the context is full.
    The arguments are checked at once, before the first id is asked for.

    Args:
        model: in eval mode.
        prompt_ids: everything that was said so far, at least one id.
        max_new_tokens: at most so many ids.
        stop_ids: ids that end the text.
        sampling: how each id is chosen.
        seed: makes the draws repeatable, and independent of torch's global state; `None` uses that state.
        forbidden_ids: never chosen.
        vocab_size: ids from here on are padding rows of the vocabulary and never chosen (`Tokenizer.vocab_size`).
        kv_cache: a cache that already holds the first `kv_cache.length` ids of `prompt_ids`; only the rest is run.
            It goes on to hold all but the last id yielded, so a next call may continue from it. Default: a new one.

    Raises:
        UserError: an empty prompt, one that fills the context, no room asked for, or (while generating) logits that
            are not numbers.
    """
    limit = model.config.block_size if kv_cache is None else kv_cache.max_seq_length
    _check(prompt_ids, limit, max_new_tokens)
    if kv_cache is None:
        kv_cache = new_cache(model, len(prompt_ids) + max_new_tokens)
    elif kv_cache.length >= len(prompt_ids):
        raise ValueError(f"the cache holds {kv_cache.length} positions, the prompt has only {len(prompt_ids)}")
    n_new = min(max_new_tokens, limit - len(prompt_ids))

    bias_V = bias(model, forbidden_ids, vocab_size)
    generator = None if seed is None else torch.Generator(bias_V.device).manual_seed(seed)
    return _steps(model, list(prompt_ids), kv_cache, n_new, frozenset(stop_ids), bias_V, sampling, generator)


@torch.inference_mode()
def generate_batch(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    sampling: Sampling = GREEDY,
    seed: int | None = None,
    forbidden_ids: Collection[int] = (),
    vocab_size: int | None = None,
) -> list[list[int]]:
    """What `generate` gives for each of several prompts, all of them in one forward a step.

    Prompts are padded on the left, so that all rows end together; rows that have ended are dropped when they are half
    of the batch. Memory is that of `KVCache` with one row a prompt. Greedy rows equal those of `generate` up to
    rounding, which differs with the size of the batch.

    Args:
        model: in eval mode.
        prompts: at least one id each.
        max_new_tokens: at most so many ids a row.
        stop_ids, sampling, forbidden_ids, vocab_size: see `generate`.
        seed: of all rows' draws together.

    Returns:
        the new ids of each row, its stop id included.

    Raises:
        UserError: as `generate`, for the longest prompt.
    """
    if not prompts:
        return []
    limit = model.config.block_size
    for prompt in prompts:
        _check(prompt, limit, max_new_tokens)
    longest = max(len(prompt) for prompt in prompts)
    bias_V = bias(model, forbidden_ids, vocab_size)
    generator = None if seed is None else torch.Generator(bias_V.device).manual_seed(seed)
    cache = new_cache(model, longest + max_new_tokens, rows=len(prompts))
    padding_B = torch.tensor([longest - len(prompt) for prompt in prompts], device=bias_V.device)
    idx_BT = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=bias_V.device)
    made: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    for _ in range(min(max_new_tokens, limit - longest)):
        hidden_BTD = model(idx_BT, kv_cache=cache, left_padding_B=padding_B, return_logits=False).hidden
        logits_BV = model.lm_head(hidden_BTD[:, -1]).float() + bias_V
        if not torch.isfinite(logits_BV.amax(dim=-1)).all():
            raise UserError(NOT_NUMBERS)
        if sampling == GREEDY:
            chosen = logits_BV.argmax(dim=-1).tolist()
        else:
            chosen = [
                choose(logits_V, sampling, generator, (*prompts[row], *made[row]))
                for logits_V, row in zip(logits_BV, rows, strict=True)
            ]
        running = []
        for position, (row, index) in enumerate(zip(rows, chosen, strict=True)):
            ended = bool(made[row]) and made[row][-1] in stop_ids
            if not ended:
                made[row].append(index)
                if index not in stop_ids:
                    running.append(position)
        if not running:
            break
        if 2 * len(running) <= len(rows):
            cache.keep_rows(running)
            padding_B = padding_B[running]
            rows, chosen = [rows[position] for position in running], [chosen[position] for position in running]
        idx_BT = torch.tensor(chosen, device=bias_V.device)[:, None]
    return made


def bias(model: GPT, forbidden_ids: Collection[int], vocab_size: int | None) -> Tensor:
    """A mask of the whole vocabulary, built once: a choice is then one addition and one argmax."""
    bias_V = torch.zeros(model.config.padded_vocab_size, device=model.lm_head.weight.device)
    bias_V[list(forbidden_ids)] = -torch.inf
    if vocab_size is not None:
        bias_V[vocab_size:] = -torch.inf
    return bias_V


NOT_NUMBERS = "the model's logits are not numbers (NaN or infinite): the checkpoint is damaged or diverged"


# As a decorator, inference mode is left at every yield; a `with` in the body would switch it on for the caller, too.
@torch.inference_mode()
def _steps(
    model: GPT,
    ids: list[int],
    kv_cache: KVCache,
    n_new: int,
    stop_ids: frozenset[int],
    bias_V: Tensor,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> Iterator[int]:
    pending = ids[kv_cache.length :]
    for _ in range(n_new):
        idx_BT = torch.tensor([pending], device=bias_V.device)
        # Only the last position is projected to the vocabulary: a prompt of 1,000 ids would make 600 MB of logits.
        hidden_BTD = model(idx_BT, kv_cache=kv_cache, return_logits=False).hidden
        logits_V = model.lm_head(hidden_BTD[0, -1]).float() + bias_V
        if not torch.isfinite(logits_V.max()):
            raise UserError(NOT_NUMBERS)
        index = choose(logits_V, sampling, generator, ids)
        yield index
        if index in stop_ids:
            return
        ids.append(index)
        pending = [index]


def choose(
    logits_V: Tensor,
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
    seen_ids: Collection[int] = (),
) -> int:
    """One id from fp32 logits: the most probable one at temperature 0, else a draw from `distribution`.

    `seen_ids` are the ids so far, which only a repetition penalty looks at.
    """
    if sampling.repetition_penalty != 1 and seen_ids:
        logits_V = penalised(logits_V, sampling.repetition_penalty, seen_ids)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial(distribution(logits_V, sampling), 1, generator=generator))


def penalised(logits_V: Tensor, penalty: float, seen_ids: Collection[int]) -> Tensor:
    """The logits with those of `seen_ids` made less likely, each once however often it was seen."""
    seen = torch.tensor(sorted(set(seen_ids)), device=logits_V.device)
    old = logits_V[seen]
    return logits_V.index_copy(0, seen, torch.where(old < 0, old * penalty, old / penalty))


def distribution(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities ids are drawn from at a temperature above 0; fp32 [V], they sum to 1.

    Of ids that equal the k-th most probable one, top-k keeps all.
    """
    logits_V = logits_V / sampling.temperature
    if sampling.top_k is not None:
        kth = logits_V.topk(min(sampling.top_k, logits_V.numel())).values[-1]
        logits_V = logits_V.masked_fill(logits_V < kth, -torch.inf)
    if sampling.top_p is not None:
        sorted_V, order_V = logits_V.softmax(dim=-1).sort(descending=True, stable=True)
        # An id is out if those before it hold top_p already; before the first there is nothing, so one always stays.
        before_V = sorted_V.cumsum(dim=-1) - sorted_V
        logits_V = logits_V.index_fill(0, order_V[before_V >= sampling.top_p], -torch.inf)
    probability_V = logits_V.softmax(dim=-1)
    if sampling.min_p is not None:
        probability_V = probability_V.masked_fill(probability_V < sampling.min_p * probability_V.max(), 0)
        probability_V = probability_V / probability_V.sum()
    return probability_V


def _check(prompt_ids: Sequence[int], limit: int, max_new_tokens: int) -> None:
    if not prompt_ids:
        raise UserError("the prompt is empty: expected at least one token")
    if len(prompt_ids) >= limit:
        raise UserError(f"the prompt has {len(prompt_ids)} tokens, but there is room for {limit}: shorten it")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: expected at least 1")
