"""A decoder-only transformer, dense or mixture of experts: Qwen3, Qwen2, Llama, Mistral, Mixtral, by config alone.

Notable: pre-norm RMSNorm, RoPE, grouped-query attention with optional QK-norm, SwiGLU; experts as stacked tensors run
by grouped matrix products, with an fp32 router and an fp32 combine; packed documents; a KV cache that is handed in, not
stashed; hidden states and routing come back in the output, so that distillation, CKA and router losses need no hooks.
Parameter names are LitGPT's. Numerics are transformers': each cast happens where its models cast.

Shape legend (a name's suffix is its shape):
    B batch   T positions   N tokens, N = B·T   D width (n_embd)   V vocabulary (padded)
    H query heads   G key/value heads   S positions held by the cache   h head size
    E experts   K experts per token   F expert width   M token copies sorted by expert, M = N·K
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from litgpt.config import Config


# Both are NamedTuples and not dataclasses because FSDP2 and DDP find the tensors of an output by walking pytrees: what
# they cannot see has no backward hook.
class Routing(NamedTuple):
    """What one MoE layer decided, token by token (N = B·T in row-major order of `idx_BT`)."""

    expert_ids_NK: Tensor
    """int64; the first column is the expert with the largest weight."""
    weights_NK: Tensor
    """fp32, renormalised: each row sums to 1."""
    logits_NE: Tensor
    """fp32 router logits, before the softmax."""


class Output(NamedTuple):
    """What `GPT.forward` returns."""

    logits: Tensor | None
    """[B, T, V], or None with `return_logits=False`."""
    hidden: Tensor
    """[B, T, D] after the last norm: what lm_head reads."""
    hidden_states: dict[int, Tensor]
    """Residual stream [B, T, D] after block i, for each i asked for."""
    routing: dict[int, Routing]
    """Routing of each MoE layer; empty for a dense model."""


class GPT(nn.Module):
    """The whole model. `activation_checkpointing = True` recomputes each block in backward instead of keeping it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.transformer = Transformer(config)
        self.tie_weights()
        self.register_load_state_dict_post_hook(lambda module, _: module.tie_weights())

    def tie_weights(self) -> None:
        """Make lm_head and wte one Parameter where the config says so; runs by itself after moves and loads."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> GPT:
        # to_empty() and moves off the meta device replace parameters module by module, which would part the two.
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

    def init_weights(self, std: float = 0.02, generator: torch.Generator | None = None) -> None:
        """Random weights for training from scratch: matrices and embeddings N(0, std), norms one, biases zero."""
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, RMSNorm):
                    nn.init.ones_(parameter)
                elif name == "bias":
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter, std=std, generator=generator)

    def forward(
        self,
        idx_BT: Tensor,
        *,
        documents_BT: Tensor | None = None,
        kv_cache: KVCache | None = None,
        left_padding_B: Tensor | None = None,
        layers: Collection[int] = (),
        return_logits: bool = True,
    ) -> Output:
        """Run the model.

        Args:
            idx_BT: token ids.
            documents_BT: int; equal neighbours belong to one document. Attention stays inside a document and RoPE
                restarts with it. Padding is a document of its own, e.g. -1. None: each row is one document.
            kv_cache: keys and values seen so far; this call appends to it and attends to all of it. Inference only.
            left_padding_B: int64; so many positions at the head of each cached row are padding, which nothing attends
                to and from which RoPE does not count. Prompts of different length then end together.
            layers: blocks whose output to return in `hidden_states`.
            return_logits: False leaves the vocabulary projection to the caller (a chunked loss).

        Raises:
            ValueError: more positions than `block_size` or than the cache holds; a cache together with documents; a
                layer that does not exist.
        """
        T = idx_BT.size(1)
        start = 0 if kv_cache is None else kv_cache.length
        self._check(idx_BT, start, documents_BT, kv_cache, left_padding_B, layers)
        positions_BT = torch.arange(start, start + T, device=idx_BT.device)[None]
        mask = None
        if documents_BT is not None:
            positions_BT = positions_in_document(documents_BT)
            mask = document_mask(documents_BT)
        elif left_padding_B is not None:
            positions_BT, mask = _padded_positions(positions_BT, left_padding_B)
        elif start > 0 and T > 1:
            mask = torch.arange(start + T, device=idx_BT.device) <= positions_BT.transpose(0, 1)

        x_BTD = self.transformer.wte(idx_BT)
        cos, sin = rope_cos_sin(positions_BT, self.config, x_BTD.dtype)
        hidden_states: dict[int, Tensor] = {}
        routing: dict[int, Routing] = {}
        for i, block in enumerate(self.transformer.h):
            if self.activation_checkpointing and torch.is_grad_enabled() and kv_cache is None:
                x_BTD, routed = checkpoint(block, x_BTD, cos, sin, mask, use_reentrant=False)
            else:
                x_BTD, routed = block(x_BTD, cos, sin, mask, None if kv_cache is None else kv_cache.layer(i))
            if i in layers:
                hidden_states[i] = x_BTD
            if routed is not None:
                routing[i] = routed
        if kv_cache is not None:
            kv_cache.length += T
        hidden = self.transformer.ln_f(x_BTD)
        return Output(self.lm_head(hidden) if return_logits else None, hidden, hidden_states, routing)

    def _check(
        self,
        idx_BT: Tensor,
        start: int,
        documents_BT: Tensor | None,
        kv_cache: KVCache | None,
        left_padding_B: Tensor | None,
        layers: Collection[int],
    ) -> None:
        end = start + idx_BT.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} positions, but the model's block_size is {self.config.block_size}")
        if kv_cache is not None and end > kv_cache.max_seq_length:
            raise ValueError(f"{end} positions, but the cache holds {kv_cache.max_seq_length}")
        if kv_cache is not None and documents_BT is not None:
            raise ValueError("documents_BT and kv_cache exclude each other: a cached row is one document")
        if left_padding_B is not None and (kv_cache is None or left_padding_B.shape != idx_BT.shape[:1]):
            raise ValueError("left_padding_B goes with a kv_cache and has one entry a row")
        if documents_BT is not None and documents_BT.shape != idx_BT.shape:
            raise ValueError(f"documents_BT has shape {tuple(documents_BT.shape)}, idx_BT {tuple(idx_BT.shape)}")
        if bad := [i for i in layers if not 0 <= i < self.config.n_layer]:
            raise ValueError(f"layer {bad[0]} does not exist; the model has layers 0 to {self.config.n_layer - 1}")


class Transformer(nn.Module):
    """Embedding, blocks and last norm: a container for the names that LitGPT's checkpoints have."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd, config.norm_eps)


def _padded_positions(index_1T: Tensor, left_padding_B: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [B, T] from each row's first real token on, and the mask [B, 1, T, S] that hides what is before."""
    keys_S = torch.arange(int(index_1T[0, -1]) + 1, device=index_1T.device)
    query_T1 = index_1T.transpose(0, 1)
    real_B1S = keys_S >= left_padding_B[:, None, None]
    # A padded query sees itself: an empty row would be NaN after the softmax.
    mask_BTS = (keys_S <= query_T1) & (real_B1S | (keys_S == query_T1))
    return (index_1T - left_padding_B[:, None]).clamp_min(0), mask_BTS[:, None]


def positions_in_document(documents_BT: Tensor) -> Tensor:
    """int64 [B, T]: distance of each token from the first token of its document (a run of equal numbers)."""
    index_T = torch.arange(documents_BT.size(1), device=documents_BT.device)
    starts_BT = torch.zeros_like(documents_BT, dtype=torch.int64)
    starts_BT[:, 1:] = torch.where(documents_BT[:, 1:] != documents_BT[:, :-1], index_T[1:], 0)
    return index_T - starts_BT.cummax(dim=1).values


def document_mask(documents_BT: Tensor) -> Tensor:
    """bool [B, 1, T, T]: True where a row's query may see a column's key: same document, not later.

    Every query sees itself, so no row is empty (an empty row would be NaN after the softmax).
    """
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    return same_BTT.tril_()[:, None]


def rope_cos_sin(positions_BT: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables [B, 1, T, h] of the rotary embedding, in fp32 and cast last, as transformers does.

    They are computed per forward and not kept in buffers: a buffer would follow `model.to(bfloat16)` and lose the
    frequencies, would be uninitialised after meta loading, and would cost 40 MB at Qwen3's block size.
    """
    pair = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=positions_BT.device)
    frequency = 1.0 / (config.rope_base ** (pair / config.head_size))
    angle = positions_BT[:, None, :, None].float() * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, H, T, h] by its positions; element j is paired with j + h/2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Which of the layers it is decides whether it has experts."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = CausalSelfAttention(config)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = LLaMAMoE(config) if layer in config.moe_layers else LLaMAMLP(config)

    def forward(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, kv: LayerKV | None = None
    ) -> tuple[Tensor, Routing | None]:
        """Run one block, alone if need be.

        Args:
            x_BTD: residual stream.
            cos, sin: from `rope_cos_sin`, [B or 1, 1, T, h].
            mask: bool, broadcastable to [B, H, T, keys], True = may attend; None = causal.
            kv: this layer's slice of a KV cache.

        Returns:
            the residual stream after the block, and the routing if the block is a MoE.
        """
        x_BTD = x_BTD + self.attn(self.norm_1(x_BTD), cos, sin, mask, kv)
        y = self.mlp(self.norm_2(x_BTD))
        routed = None
        if isinstance(self.mlp, LLaMAMoE):
            y, routed = y
        return x_BTD + y, routed


class CausalSelfAttention(nn.Module):
    """Grouped-query attention; `qkv` holds all query heads, then all key heads, then all value heads."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head, self.n_groups, self.head_size = config.n_head, config.n_query_groups, config.head_size
        self.qkv = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_groups) * self.head_size, bias=config.attn_bias)
        self.proj = nn.Linear(self.n_head * self.head_size, config.n_embd, bias=False)
        self.norm_q = RMSNorm(self.head_size, config.norm_eps) if config.norm_qk else nn.Identity()
        self.norm_k = RMSNorm(self.head_size, config.norm_eps) if config.norm_qk else nn.Identity()

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, kv: LayerKV | None) -> Tensor:
        B, T, _ = x_BTD.shape
        heads_BTHh = self.qkv(x_BTD).view(B, T, -1, self.head_size).transpose(1, 2)
        q_BHTh, k_BGTh, v_BGTh = heads_BTHh.split((self.n_head, self.n_groups, self.n_groups), dim=1)
        # Under autocast the norms and the rotation return fp32; attention and cache want the projection's dtype.
        q_BHTh = apply_rope(self.norm_q(q_BHTh), cos, sin).to(v_BGTh.dtype)
        k_BGTh = apply_rope(self.norm_k(k_BGTh), cos, sin).to(v_BGTh.dtype)
        if kv is not None:
            k_BGTh, v_BGTh = kv.append(k_BGTh, v_BGTh)
        y_BHTh = attend(q_BHTh, k_BGTh, v_BGTh, mask)
        return self.proj(y_BHTh.transpose(1, 2).reshape(B, T, -1))


def attend(q_BHTh: Tensor, k_BGSh: Tensor, v_BGSh: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention, [B, H, T, h]; without a mask it is causal and T is S, or T is 1 and sees all of S."""
    B, H, T, h = q_BHTh.shape
    if T == 1 and (mask is None or mask.size(1) == 1):
        # Decoding: the queries of a group become the rows of one head, so that each key and value is read once for all
        # of them (on a CPU up to ten times faster in bf16 than one row per head). The mask is the same for all heads.
        q_BGRh = q_BHTh.reshape(B, k_BGSh.size(1), -1, h)
        y_BGRh = F.scaled_dot_product_attention(q_BGRh, k_BGSh, v_BGSh, attn_mask=mask)
        return y_BGRh.reshape(B, H, T, h)
    if k_BGSh.is_cuda and (mask is not None or k_BGSh.dtype == torch.float32):
        # Flash attention takes neither; the next kernel in line takes both but not grouped heads, and would leave the
        # call to the one that keeps all T² scores.
        k_BGSh, v_BGSh = (x.repeat_interleave(H // x.size(1), dim=1) for x in (k_BGSh, v_BGSh))
    return F.scaled_dot_product_attention(
        q_BHTh, k_BGSh, v_BGSh, attn_mask=mask, is_causal=mask is None, enable_gqa=k_BGSh.size(1) != H
    )


class LLaMAMLP(nn.Module):
    """SwiGLU: proj(silu(fc_1 x) · fc_2 x)."""

    def __init__(self, config: Config, width: int | None = None) -> None:
        super().__init__()
        width = config.intermediate_size if width is None else width
        self.fc_1 = nn.Linear(config.n_embd, width, bias=False)
        self.fc_2 = nn.Linear(config.n_embd, width, bias=False)
        self.proj = nn.Linear(width, config.n_embd, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.proj(F.silu(self.fc_1(x_BTD)) * self.fc_2(x_BTD))


class LLaMAMoE(nn.Module):
    """Sparse SwiGLU: each token goes through its K best experts of E, averaged with the router's weights.

    Router, softmax and combine run in fp32 (float64 for a float64 model) whatever autocast says. The weights are those
    of a softmax over all experts, renormalised over the K kept: equal experts return exactly the dense MLP's output.
    A shared expert, where there is one, adds its output for every token, with weight 1 as in LitGPT.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_expert_per_token = config.n_expert_per_token
        self.gate = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.choice_bias_E: Tensor | None
        self.register_buffer("choice_bias_E", None, persistent=False)  # see litgpt.balance.ChoiceBias
        self.experts = Experts(config)
        if config.n_shared_expert:
            self.shared_experts = LLaMAMLP(config, config.n_shared_expert * config.expert_size)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        x_ND = x_BTD.reshape(-1, x_BTD.size(-1))
        routing = self.route(x_ND)
        y_ND = self.experts(x_ND, routing.expert_ids_NK, routing.weights_NK)
        if hasattr(self, "shared_experts"):
            y_ND = y_ND + self.shared_experts(x_ND)
        return y_ND.view_as(x_BTD), routing

    def route(self, x_ND: Tensor) -> Routing:
        """Choose the experts of each token."""
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.to(dtype), self.gate.weight.to(dtype))
            probabilities_NE = logits_NE.softmax(dim=-1)
            if self.choice_bias_E is None:
                weights_NK, expert_ids_NK = probabilities_NE.topk(self.n_expert_per_token, dim=-1)
            else:
                _, chosen_NK = (probabilities_NE.detach() + self.choice_bias_E.to(probabilities_NE)).topk(
                    self.n_expert_per_token, dim=-1
                )
                weights_NK, order_NK = probabilities_NE.gather(1, chosen_NK).sort(dim=-1, descending=True)
                expert_ids_NK = chosen_NK.gather(1, order_NK)
            weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True)
        return Routing(expert_ids_NK, weights_NK, logits_NE)


class Experts(nn.Module):
    """The experts' weights, stacked: `gate_up_proj` [E, 2F, D] (gate rows first) and `down_proj` [E, D, F]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        E, D, width = config.n_expert, config.n_embd, config.expert_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, width))
        for weight in (self.gate_up_proj, self.down_proj):
            nn.init.uniform_(weight, -(weight.size(-1) ** -0.5), weight.size(-1) ** -0.5)  # as nn.Linear does

    def forward(self, x_ND: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Sum over k of weights[n, k] · expert[ids[n, k]](x[n]), in the experts' dtype; [N, D]."""
        N, K = expert_ids_NK.shape
        device = x_ND.device.type
        gate_up: Tensor = self.gate_up_proj
        down: Tensor = self.down_proj
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x_ND, gate_up, down = x_ND.to(dtype), gate_up.to(dtype), down.to(dtype)

        if N == 1 and device == "cpu" and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            # Decoding: there is nothing to sort, and a third of a millisecond of small steps to save in every layer.
            y_KD = torch.cat([swiglu(x_ND, gate_up[e], down[e]) for e in expert_ids_NK[0].tolist()])
            return (y_KD * weights_NK.T).sum(dim=0, keepdim=True).to(y_KD.dtype)

        # Bring the copies of tokens into the order of their experts. Nothing here waits for the device.
        sorted_ids_M, order_M = expert_ids_NK.flatten().sort(stable=True)
        inverse_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(N * K, device=order_M.device))
        experts_E = torch.arange(gate_up.size(0), device=order_M.device)
        ends_E = torch.searchsorted(sorted_ids_M, experts_E, right=True, out_int32=True)

        x_MD = _TakeRows.apply(x_ND, order_M // K, inverse_M, K)
        with torch.autocast(device, enabled=False):
            y_MD = (grouped_swiglu if can_group(x_MD, down) else looped_swiglu)(x_MD, gate_up, down, ends_E)
            y_NKD = _TakeRows.apply(y_MD, inverse_M, order_M, 1).view(N, K, -1)
            # One rounding, at the very end: with equal experts the sum is the dense output to the last bit of bf16.
            return (y_NKD * weights_NK[..., None]).sum(dim=1).to(y_MD.dtype)


def can_group(x_MD: Tensor, down_EDF: Tensor) -> bool:
    """Whether `grouped_swiglu` is possible, and better than the loop.

    Possible: rows of a multiple of 16 bytes; not float64; under torch.compile bf16 only (what shape inference knows).
    Better: always, but on a CPU without gradients once its buffers are larger than glibc keeps (32 MB): the loop's are
    small enough to be used again. With gradients the loop would have to gather them into one stack.
    """
    aligned = all(size * x_MD.element_size() % 16 == 0 for size in down_EDF.shape[1:])
    if torch.compiler.is_compiling():
        return aligned and x_MD.dtype == torch.bfloat16
    small = 2 * x_MD.size(0) * down_EDF.size(2) * x_MD.element_size() <= 32 << 20
    return aligned and x_MD.dtype != torch.float64 and (x_MD.device.type != "cpu" or torch.is_grad_enabled() or small)


def grouped_swiglu(x_MD: Tensor, gate_up: Tensor, down: Tensor, ends_E: Tensor) -> Tensor:
    """Rows ends[e-1]:ends[e] of x through expert e, for all experts at once; [M, D].

    `ends_E` is int32, cumulative, and ends with M; an expert may have no rows.
    """
    gate_MF, up_MF = F.grouped_mm(x_MD, gate_up.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate_MF) * up_MF, down.transpose(1, 2), offs=ends_E)


def looped_swiglu(x_MD: Tensor, gate_up: Tensor, down: Tensor, ends_E: Tensor) -> Tensor:
    """The same, expert by expert. Waits for the device to learn `ends_E`; idle experts are not read."""
    y_MD = []
    # unbind, not weight[e]: each weight[e] would fill a gradient of the whole stack with zeros in backward.
    spans = pairwise([0, *ends_E.tolist()])
    for (start, end), gate_up_FD, down_DF in zip(spans, gate_up.unbind(0), down.unbind(0), strict=True):
        if end > start:
            y_MD.append(swiglu(x_MD[start:end], gate_up_FD, down_DF))
    return torch.cat(y_MD)


def swiglu(x_MD: Tensor, gate_up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """All rows through one expert; [M, D]."""
    gate_MF, up_MF = F.linear(x_MD, gate_up_FD).chunk(2, dim=-1)
    return F.linear(F.silu(gate_MF) * up_MF, down_DF)


class _TakeRows(torch.autograd.Function):
    """x[index], where every row is taken `copies` times and `back` lists, row by row, where its copies went.

    Backward is the opposite gather. Autograd's own is a scatter-add: atomics, in no fixed order, and slower.
    """

    @staticmethod
    def forward(x: Tensor, index: Tensor, back: Tensor, copies: int) -> Tensor:
        return x.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.copies = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        grad = grad.index_select(0, back)
        return grad if ctx.copies == 1 else grad.unflatten(0, (-1, ctx.copies)).sum(dim=1), None, None, None


class RMSNorm(nn.Module):
    """x / rms(x) · weight, normalised in fp32 and cast to the input's dtype before the weight, as transformers does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        x_wide = x.to(dtype)
        x_wide = x_wide * torch.rsqrt(x_wide.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * x_wide.to(x.dtype)


class LayerKV(NamedTuple):
    """One layer's part of a KV cache."""

    k_BGSh: Tensor
    v_BGSh: Tensor
    start: int

    def append(self, k_BGTh: Tensor, v_BGTh: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new positions, without gradient, and return views of all that is stored, [B, G, start + T, h]."""
        end = self.start + k_BGTh.size(2)
        self.k_BGSh[:, :, self.start : end] = k_BGTh.detach()
        self.v_BGSh[:, :, self.start : end] = v_BGTh.detach()
        return self.k_BGSh[:, :, :end], self.v_BGSh[:, :, :end]


class KVCache:
    """Keys and values of all layers for `batch_size` rows of up to `max_seq_length` positions. For inference only.

    Memory: 2 · n_layer · batch_size · n_query_groups · max_seq_length · head_size elements, allocated at once.
    """

    def __init__(
        self,
        config: Config,
        batch_size: int,
        max_seq_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (2, config.n_layer, batch_size, config.n_query_groups, max_seq_length, config.head_size)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.max_seq_length = max_seq_length
        self.length = 0
        """Positions stored so far."""

    @classmethod
    def over(cls, kv: Tensor, length: int = 0) -> KVCache:
        """A cache over memory [2, n_layer, B, G, S, h] that is there already and may be a view; nothing is copied."""
        cache = cls.__new__(cls)
        cache.kv, cache.max_seq_length, cache.length = kv, kv.size(4), length
        return cache

    def layer(self, i: int) -> LayerKV:
        """The part of block i."""
        return LayerKV(self.kv[0, i], self.kv[1, i], self.length)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop all other rows; what is left is copied once."""
        self.kv = self.kv[:, :, list(rows)]
