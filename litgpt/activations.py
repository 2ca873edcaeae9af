"""How many bytes a forward pass of `model.py` leaves behind for backward, and how many it needs on its way.

Operation by operation, as the code there runs: change one and `tests/test_memoryplan.py`, which compares with what
autograd really keeps, says so. Shape letters as in `model.py`.
"""

from __future__ import annotations

from litgpt.config import Config

FP32, BF16 = 4, 2


def around_activations(config: Config, rows: int, length: int) -> int:
    """What autograd keeps outside the blocks, bytes: RoPE's tables, the last norm's input, where thought tokens are."""
    N = rows * length
    return 2 * N * config.head_size * FP32 + N * (config.n_embd + 1) * FP32 + 2 * N


def block_activations(config: Config, rows: int, length: int, *, amp: bool, on_gpu: bool) -> int:
    """What autograd keeps of one MoE block with frozen attention and norms, bytes; weights and their casts left out.

    A frozen matrix keeps nothing of its input, only a trained one does (the router, the experts).

    Args:
        config: of the student.
        rows, length: B and T; attention has a document mask.
        amp: products in bf16 under autocast, the residual stream in fp32; otherwise all in fp32.
        on_gpu: keys and values are repeated for the query heads of their group (see `litgpt.model.attend`).
    """
    N, M, width = rows * length, rows * length * config.n_expert_per_token, BF16 if amp else FP32
    heads, groups = config.n_head * config.head_size, config.n_query_groups * config.head_size
    kept = 2 * N * (config.n_embd + 1) * FP32  # both norms: the residual stream, and 1 / rms

    projected = N * (heads + 2 * groups) * width
    if config.norm_qk:
        kept += N * (config.n_head + config.n_query_groups) * FP32
    # The norms read fp32: under autocast copies of q and k, otherwise the projection itself.
    kept += N * (heads + groups) * FP32 if config.norm_qk and amp else 0
    kept += projected if not on_gpu or (config.norm_qk and not amp) else 0  # v is a part of it
    kept += N * (3 * heads if on_gpu else heads + groups) * width  # q, k and repeated v after RoPE
    kept += N * heads * width + N * config.n_head * FP32  # attention's result, and its log-sum-exp
    kept += rows * length * length * width  # the mask as numbers, made anew in each layer

    kept += N * config.n_embd * FP32  # the router's input
    kept += N * config.n_expert * FP32 + N * FP32 + M * (8 + 2 * FP32)  # probabilities, their sum, choices and weights
    kept += 2 * M * 8 + config.n_expert * 4  # where each copy of a token went
    kept += M * (2 * config.n_embd + 4 * config.expert_size) * width
    # A frozen shared expert: what silu and the product read, and the sum of both outputs keeps nothing.
    kept += 3 * N * (config.n_shared_expert or 0) * config.expert_size * width
    return kept


def reading_bytes(config: Config, rows: int, length: int, *, amp: bool, width: int, on_gpu: bool) -> int:
    """Working memory of a forward pass without gradients: the larger of attention and MLP of one block, bytes.

    Args:
        config: of a dense model or a MoE.
        rows, length: B and T, with a document mask.
        amp: products in bf16 under autocast, whatever the weights are.
        width: bytes of a weight, and of the residual stream.
        on_gpu: as in `block_activations`.
    """
    N, product = rows * length, BF16 if amp else width
    heads, groups = config.n_head * config.head_size, config.n_query_groups * config.head_size
    always = N * config.n_embd * 2 * width + 2 * N * config.head_size * width + rows * length * length
    # q is normed and rotated in fp32 while the projection is there; then the mask becomes numbers.
    norm = N * (heads + 2 * groups) * product + 3 * N * heads * FP32
    attend = N * ((heads + 2 * groups) + (4 if on_gpu else 2) * heads + groups) * product + rows * length**2 * product
    if config.is_moe:
        mlp = N * config.n_expert_per_token * (2 * config.n_embd + 4 * config.expert_size) * product
    else:
        mlp = 3 * N * config.intermediate_size * product
    cast = config.n_embd * config.intermediate_size * BF16 if amp else 0
    return always + max(norm, attend, mlp) + cast
