"""What a row of logits is scored by: cross-entropy, and a divergence from the teacher; values and gradients by hand.

p is the teacher, q the student, both over the shared ids alone, u = z / T the student's scaled logits:

    forward   KL(p ‖ q)                                          dL/du = q - p
    reverse   KL(q ‖ p)                                          dL/du = q · (log q/p - L)
    jsd       β KL(p ‖ m) + (1 - β) KL(q ‖ m), m = βp + (1 - β)q  dL/du = q · (g - Σ q g), g = (1 - β) log q/m
    skew      KL(p ‖ m), m = αp + (1 - α)q                       dL/du = q · (g - Σ q g), g = -(1 - α) p/m

Everything is multiplied by T² (Hinton et al. 2015, arXiv 1503.02531, section 2), gradients in z therefore by T. The
generalised JSD is that of Agarwal et al. (arXiv 2306.13649), skew KL that of Ko et al. (arXiv 2402.03898).

A logit of -inf, or one more than 1e30 below the largest, counts as 1e30 below it: what it excludes has probability 0,
0 · log 0 is 0, and a divergence that is infinite comes out as about 1e30 times a probability instead of NaN. A NaN or
+inf among the logits stays NaN.

Shape suffixes: R rows, V the student's vocabulary, S the shared ids, K ids kept of the teacher, 1 a column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from litgpt.utils import UserError

KdKind = Literal["forward", "reverse", "jsd", "skew"]

FLOOR = -1e30
"""No sum of probabilities times it overflows fp32, and its exponential is 0."""


@dataclass(frozen=True)
class Divergence:
    """How the teacher's and the student's distribution are compared, see the top of this file.

    Attributes:
        kind: forward, reverse, jsd or skew.
        temperature: T > 0, softens both distributions.
        beta: of jsd, 0 … 1. As in TRL, 0 is forward KL and 1 is reverse KL.
        alpha: of skew, 0 up to but not 1, where nothing would be left to learn; 0 is forward KL.

    Raises:
        UserError: a value outside these.
    """

    kind: KdKind = "forward"
    temperature: float = 1.0
    beta: float = 0.5
    alpha: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in get_args(KdKind):
            raise UserError(f"divergence {self.kind!r} is not known: choose one of {', '.join(get_args(KdKind))}")
        if not (0 < self.temperature < math.inf):
            raise UserError(f"the temperature must be above 0 and finite, got {self.temperature}")
        if not 0 <= self.beta <= 1:
            raise UserError(f"beta of the divergence jsd must lie in 0 … 1, got {self.beta}")
        if not 0 <= self.alpha < 1:
            raise UserError(f"alpha of the divergence skew must lie in 0 … 1 without 1, got {self.alpha}")

    @property
    def limit(self) -> KdKind:
        """The kind, or the simpler one that it is with its β or α."""
        if self.kind == "jsd" and self.beta in (0, 1):
            return "reverse" if self.beta else "forward"
        return "forward" if self.kind == "skew" and self.alpha == 0 else self.kind


class Signal(NamedTuple):
    """What the teacher says of some rows: exactly one of the three.

    Attributes:
        logits_RS: all its logits; overwritten.
        top: ids_RK and log-probabilities_RK of the ids it likes best.
        sample: ids_RK and weights_RK drawn from it, and its entropy_R or `None`.
    """

    logits_RS: Tensor | None = None
    top: tuple[Tensor, Tensor] | None = None
    sample: tuple[Tensor, Tensor, Tensor | None] | None = None


class Task(NamedTuple):
    """Cross-entropy of some rows.

    Attributes:
        targets_R: the ids to predict.
        factor_R: what each row's gradient is multiplied by.
    """

    targets_R: Tensor
    factor_R: Tensor


def score_rows(
    z_RV: Tensor,
    shared: int,
    task: Task | None,
    signal: Signal | None,
    kd_factor: Tensor,
    divergence: Divergence,
    backward: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Cross-entropy and divergence of rows that all have the one, the other or both.

    Args:
        z_RV: the student's logits, fp32 or fp64; overwritten, with the gradient if `backward`.
        shared: S, the ids below it are compared with the teacher's.
        task: targets and weights, `None` where these rows have no cross-entropy.
        signal: the teacher's side, `None` where these rows have none.
        kd_factor: scalar that the divergence's gradient is multiplied by.
        divergence: how to compare; with `top` and `sample` forward at temperature 1.
        backward: leave factor · dCE/dz + kd_factor · dKD/dz in `z_RV`.

    Returns:
        cross-entropy and T² · divergence of each row, nats, unweighted; `None` for what was not asked for. Of `sample`
        it is -Σ w log q, less the entropy where that is known.
    """
    target_R1 = None if task is None else z_RV.gather(1, task.targets_R[:, None])
    z_RS, own_RV = z_RV[:, :shared], z_RV[:, shared:]
    has_own = task is not None and own_RV.size(1) > 0
    top_RK = None
    if signal is not None and signal.top is not None:
        # Out of the row: what stays is the tail, whose mass is summed and not taken as a difference.
        top_RK = z_RS.gather(1, signal.top[0])
        z_RS.scatter_(1, signal.top[0], -math.inf)

    # Each part is exponentiated below its own largest: ids past the shared ones cannot drown those, nor K ids the tail.
    shift_R1 = _below_largest_(z_RS)
    largest_R1 = shift_R1
    if top_RK is not None:
        largest_R1 = largest_R1.maximum(top_RK.amax(1, keepdim=True))
    if has_own:
        own_shift_R1 = _below_largest_(own_RV)
        largest_R1 = largest_R1.maximum(own_shift_R1)
    shift_R1 = shift_R1 - largest_R1
    e_RS = z_RS.exp()
    sum_R1 = e_RS.sum(1, keepdim=True)
    # Logarithms of sums, below the largest logit of the row.
    log_tail_R1 = log_shared_R1 = shift_R1 + sum_R1.log()
    if top_RK is not None:
        top_RK = (top_RK - largest_R1).clamp_(min=FLOOR)
        log_shared_R1 = torch.logaddexp(log_tail_R1, top_RK.logsumexp(1, keepdim=True))

    ce_R = kd_R = None
    parts: list[tuple[Tensor, Tensor]] = []  # the gradient in the shared ids: Σ tensor_RS · coefficient_R1
    at_ids: list[tuple[Tensor, Tensor]] = []  # and what comes on top of single ids
    if task is not None:
        assert target_R1 is not None
        log_all_R1 = log_shared_R1
        if has_own:
            own_RV.exp_()
            own_shift_R1 = own_shift_R1 - largest_R1
            log_all_R1 = torch.logaddexp(log_all_R1, own_shift_R1 + own_RV.sum(1, keepdim=True).log())
        ce_R = (log_all_R1 - (target_R1 - largest_R1).clamp_(min=FLOOR)).squeeze(1)
        factor_R1 = task.factor_R[:, None]
        parts.append((e_RS, factor_R1 * (shift_R1 - log_all_R1).exp()))
        if top_RK is not None and signal is not None and signal.top is not None:
            at_ids.append((signal.top[0], factor_R1 * (top_RK - log_all_R1).exp()))
        if has_own and backward:
            own_RV.mul_(factor_R1 * (own_shift_R1 - log_all_R1).exp())
    elif backward:
        own_RV.zero_()

    if signal is not None and signal.logits_RS is not None:
        kd_R, kd_parts = _full(z_RS, e_RS, sum_R1, signal.logits_RS, divergence, backward)
        factor = kd_factor * divergence.temperature
        parts += [(tensor_RS, factor * coefficient_R1) for tensor_RS, coefficient_R1 in kd_parts]
    elif signal is not None and signal.top is not None:
        assert top_RK is not None
        ids_RK, log_p_RK = signal.top
        log_q_RK = top_RK - log_shared_R1
        # Without an id in the tail there is no bucket, whatever rounding leaves of p beside its K ids.
        log_q_tail_R1 = None if ids_RK.size(1) == shared else (log_tail_R1 - log_shared_R1).clamp(min=FLOOR)
        kd_R, p_RK, p_tail_R1 = _buckets(log_p_RK, log_q_RK, log_q_tail_R1)
        parts.append((e_RS, kd_factor * ((shift_R1 - log_shared_R1).exp() - p_tail_R1 / sum_R1.clamp(min=1))))
        at_ids.append((ids_RK, kd_factor * (log_q_RK.exp() - p_RK)))
    elif signal is not None and signal.sample is not None:
        ids_RK, weight_RK, entropy_R = signal.sample
        log_q_RK = z_RS.gather(1, ids_RK) + (shift_R1 - log_shared_R1)
        kd_R = -(weight_RK * log_q_RK).sum(1)
        if entropy_R is not None:
            kd_R = kd_R - entropy_R
        parts.append((e_RS, kd_factor * weight_RK.sum(1, keepdim=True) / sum_R1))
        at_ids.append((ids_RK, -kd_factor * weight_RK))

    if backward:
        _write_(z_RS, parts)
        for ids_RK, values_RK in at_ids:
            z_RS.scatter_add_(1, ids_RK, values_RK)
        if task is not None:
            z_RV.scatter_add_(1, task.targets_R[:, None], -task.factor_R[:, None])
    return ce_R, kd_R


def _below_largest_(z_RV: Tensor) -> Tensor:
    """Subtract each row's largest logit in place, with the floor, and return it."""
    largest_R1 = z_RV.amax(1, keepdim=True).clamp_(min=FLOOR)
    z_RV.sub_(largest_R1).clamp_(min=FLOOR)
    return largest_R1


def _write_(z_RS: Tensor, parts: list[tuple[Tensor, Tensor]]) -> None:
    """z = Σ tensor · coefficient, one pass for each tensor: exp z often stands there twice. The first is consumed."""
    merged: list[tuple[Tensor, Tensor]] = []
    for tensor_RS, coefficient_R1 in parts:
        if merged and merged[0][0] is tensor_RS:
            merged[0] = tensor_RS, merged[0][1] + coefficient_R1
        else:
            merged.append((tensor_RS, coefficient_R1))
    total_RS = merged[0][0].mul_(merged[0][1])
    for tensor_RS, coefficient_R1 in merged[1:]:
        total_RS.addcmul_(tensor_RS, coefficient_R1)
    # Not `out=`: compiled, torch 2.13 leaves such a view as it was.
    z_RS.copy_(total_RS)


def _full(
    z_RS: Tensor, e_RS: Tensor, sum_R1: Tensor, t_RS: Tensor, divergence: Divergence, backward: bool
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """T² · divergence of whole distributions, and dL/du as parts. z is below its largest, e = exp z; t is consumed."""
    temperature = divergence.temperature
    if temperature != 1:
        t_RS.div_(temperature)
        z_RS = z_RS / temperature
        e_RS = z_RS.exp()
        sum_R1 = e_RS.sum(1, keepdim=True)
    _below_largest_(t_RS)
    p_RS = t_RS.exp()
    p_sum_R1 = p_RS.sum(1, keepdim=True)
    kind = divergence.limit
    if kind == "forward":
        # Σ p (log p - log q), with both normalisers taken out of the sum.
        kl_R1 = t_RS.sub_(z_RS).mul_(p_RS).sum(1, keepdim=True) / p_sum_R1 - p_sum_R1.log() + sum_R1.log()
        return kl_R1.squeeze(1) * temperature**2, [(e_RS, 1 / sum_R1), (p_RS, -1 / p_sum_R1)]
    log_p_RS, p_RS = t_RS.sub_(p_sum_R1.log()), p_RS.div_(p_sum_R1)
    log_q_RS, q_RS = z_RS - sum_R1.log(), e_RS / sum_R1
    if kind == "reverse":
        g_RS = log_q_RS.sub_(log_p_RS)
        value_R1 = (q_RS * g_RS).sum(1, keepdim=True)
    elif kind == "jsd":
        beta = divergence.beta
        log_m_RS = torch.logaddexp(log_p_RS + math.log(beta), log_q_RS + math.log1p(-beta))
        value_R1 = beta * log_p_RS.sub_(log_m_RS).mul_(p_RS).sum(1, keepdim=True)
        g_RS = log_q_RS.sub_(log_m_RS).mul_(1 - beta)
        value_R1 = value_R1 + (q_RS * g_RS).sum(1, keepdim=True)
    else:
        alpha = divergence.alpha
        ratio_RS = log_p_RS.sub_(torch.logaddexp(log_p_RS + math.log(alpha), log_q_RS + math.log1p(-alpha)))
        value_R1 = (p_RS * ratio_RS).sum(1, keepdim=True)
        g_RS = ratio_RS.exp_().mul_(alpha - 1)
    if backward:
        g_RS = q_RS.mul_(g_RS.sub_((q_RS * g_RS).sum(1, keepdim=True)))
    return value_R1.squeeze(1) * temperature**2, [(g_RS, torch.ones_like(sum_R1))]


def _buckets(log_p_RK: Tensor, log_q_RK: Tensor, log_q_tail_R1: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Forward KL of K ids and one bucket for all others, if there are others → kl_R, p_RK, p_tail_R1."""
    mass_R1 = log_p_RK.exp().sum(1, keepdim=True)
    # Rounding in storage may leave a mass above 1; below it, what lacks is the tail.
    log_p_RK = (log_p_RK - mass_R1.clamp(min=1).log()).clamp_(min=FLOOR)
    p_RK = log_p_RK.exp()
    kl_R1 = (p_RK * (log_p_RK - log_q_RK)).sum(1, keepdim=True)
    if log_q_tail_R1 is None:
        return kl_R1.squeeze(1), p_RK, torch.zeros_like(mass_R1)
    p_tail_R1 = (1 - mass_R1).clamp_(min=0)
    kl_R1 = kl_R1 + p_tail_R1 * (p_tail_R1.log().clamp_(min=FLOOR) - log_q_tail_R1)
    return kl_R1.squeeze(1), p_RK, p_tail_R1
