"""What the student is taught by: task cross-entropy, the teacher's distribution, and likeness to its own base.

The vocabulary projection belongs to the loss: logits exist for one chunk of rows at a time, in forward and again in
backward, so memory does not grow with the number of tokens. Sums are returned, not means: the caller divides by its
own global counts, over micro-batches, accumulation and ranks, so that splitting a batch changes nothing but rounding.
Everything here runs in fp32 outside autocast (fp64 for fp64 input).

Shape suffixes as in `model.py`; M rows of the teacher, C the teacher's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from litgpt.cka import linear_cka


@dataclass(frozen=True)
class Teacher:
    """The teacher's side of the KD rows.

    Attributes:
        hidden_MC: what the teacher's head reads, any float dtype.
        head_VC: the teacher's vocabulary projection.
        rows_N: for each student row the teacher's row that predicts the same token, -1 where there is no KD.
    """

    hidden_MC: Tensor
    head_VC: Tensor
    rows_N: Tensor


@dataclass(frozen=True)
class TopKTeacher:
    """The teacher's K likeliest ids of each KD row; what mass they leave is its tail.

    Attributes:
        ids_MK: ids below the shared vocabulary's size, the likeliest first, int64.
        log_p_MK: their log-probabilities over the shared vocabulary at temperature 1.
        rows_N: as in `Teacher`.
    """

    ids_MK: Tensor
    log_p_MK: Tensor
    rows_N: Tensor


@dataclass(frozen=True)
class SampledTeacher:
    """An unbiased estimate of the teacher's distribution over the shared vocabulary at temperature 1: drawn ids.

    Attributes:
        ids_MK: drawn ids, int64; a slot without a draw has id 0 and weight 0.
        weight_MK: share of the draws; each row sums to 1, and the expected weight of an id is its probability.
        rows_N: as in `Teacher`.
        entropy_M: the teacher's entropy in nats, which turns a cross-entropy into a KL; `None` if not known.
    """

    ids_MK: Tensor
    weight_MK: Tensor
    rows_N: Tensor
    entropy_M: Tensor | None = None


TeacherTargets = Teacher | TopKTeacher | SampledTeacher


@dataclass(frozen=True)
class DistillTerms:
    """Sums over rows, and the same row by row for reporting.

    Attributes:
        ce: Σ weight · cross-entropy, nats, differentiable.
        kd: Σ T² · KL(teacher ‖ student), nats, differentiable; 0 without a teacher.
        ce_N: unweighted cross-entropy of each row, 0 where its weight is 0, detached.
        kd_N: T² · KL of each row, 0 where there is no KD, detached.
    """

    ce: Tensor
    kd: Tensor
    ce_N: Tensor
    kd_N: Tensor


def distill_terms(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    ce_weight_N: Tensor,
    *,
    teacher: Teacher | None = None,
    shared_vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_rows: int = 256,
) -> DistillTerms:
    """Task cross-entropy and forward-KL distillation in one pass over the vocabulary projection.

    Args:
        hidden_ND: what the student's head reads, any float dtype.
        head_VD: the student's vocabulary projection.
        targets_N: the id each row should predict; any valid id where the weight is 0.
        ce_weight_N: weight of each row's cross-entropy, 0 leaves the row out.
        teacher: the teacher's rows, or `None` for cross-entropy alone.
        shared_vocab_size: ids below it exist in both vocabularies; KD compares the two distributions over these
            alone, so padding ids and the student's own tokens never enter. `None`: all of the student's.
        temperature: T; the KL of the softened distributions is multiplied by T² (Hinton et al. 2015,
            arXiv 1503.02531, section 2).
        chunk_rows: rows whose logits exist at one time.

    Returns:
        sums over rows; divide by the global counts.

    Raises:
        ValueError: lengths that differ, or a shared vocabulary larger than one of the two heads.
    """
    n = len(hidden_ND)
    if len(targets_N) != n or len(ce_weight_N) != n or (teacher is not None and len(teacher.rows_N) != n):
        raise ValueError(f"targets, weights and teacher rows must each have one entry for each of the {n} rows")
    shared = len(head_VD) if shared_vocab_size is None else shared_vocab_size
    if shared > len(head_VD) or (teacher is not None and shared > len(teacher.head_VC)):
        raise ValueError(f"a shared vocabulary of {shared} ids does not fit into both heads")

    with torch.autocast(hidden_ND.device.type, enabled=False):
        high = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        needed_N = ce_weight_N != 0
        if teacher is not None:
            needed_N = needed_N | (teacher.rows_N >= 0)
        rows_R = needed_N.nonzero().squeeze(1)
        head_VD = head_VD.to(high)  # once, not per chunk; the same tensor when the master weights are fp32
        ce = hidden_ND.new_zeros((), dtype=high)
        kd = hidden_ND.new_zeros((), dtype=high)
        ce_N = torch.zeros(n, dtype=high, device=hidden_ND.device)
        kd_N = torch.zeros_like(ce_N)
        for chunk_R in rows_R.split(chunk_rows):
            weight_R = ce_weight_N[chunk_R].to(high)
            teacher_logits_RV, has_kd_R = _teacher_logits(teacher, chunk_R, shared, high)
            ce_R, kd_R = checkpoint(
                _row_losses,
                hidden_ND[chunk_R],
                head_VD,
                targets_N[chunk_R],
                teacher_logits_RV,
                has_kd_R,
                shared,
                temperature,
                use_reentrant=False,
            )
            ce = ce + (weight_R * ce_R).sum()
            kd = kd + kd_R.sum()
            ce_N[chunk_R] = ce_R.detach() * (weight_R != 0)
            kd_N[chunk_R] = kd_R.detach()
        return DistillTerms(ce=ce, kd=kd, ce_N=ce_N, kd_N=kd_N)


def _teacher_logits(
    teacher: Teacher | None, rows_R: Tensor, shared: int, high: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The teacher's logits for the rows that have KD, in the teacher's own dtype first: that is what it predicts."""
    if teacher is None:
        return None, None
    pairs_R = teacher.rows_N[rows_R]
    has_kd_R = pairs_R >= 0
    with torch.no_grad():
        hidden_MC = teacher.hidden_MC[pairs_R[has_kd_R]].to(teacher.head_VC.dtype)
        return F.linear(hidden_MC, teacher.head_VC[:shared]).to(high), has_kd_R


def _row_losses(
    hidden_RD: Tensor,
    head_VD: Tensor,
    targets_R: Tensor,
    teacher_logits_RV: Tensor | None,
    has_kd_R: Tensor | None,
    shared: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    logits_RV = F.linear(hidden_RD.to(head_VD.dtype), head_VD)
    ce_R = F.cross_entropy(logits_RV, targets_R, reduction="none")
    kd_R = torch.zeros_like(ce_R)
    if teacher_logits_RV is not None and has_kd_R is not None and len(teacher_logits_RV):
        log_q_RV = F.log_softmax(logits_RV[has_kd_R, :shared] / temperature, dim=-1)
        log_p_RV = F.log_softmax(teacher_logits_RV / temperature, dim=-1)
        kl_R = (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum(-1)
        kd_R = kd_R.masked_scatter(has_kd_R, kl_R * temperature**2)
    return ce_R, kd_R


def cka_loss(student: Mapping[int, Tensor], reference: Mapping[int, Tensor], keep_BT: Tensor) -> Tensor:
    """Mean over layers of 1 - CKA between the student's and the reference's hidden states, 0 when they agree.

    Args:
        student: hidden states [B, T, D] by layer.
        reference: hidden states [B, T, C] of the same layers and tokens; no gradient flows into them.
        keep_BT: which tokens are rows (see `litgpt.cka.select_rows`).

    Returns:
        a scalar in fp32, unbiased CKA, differentiable in the student.

    Raises:
        ValueError: layers that differ, or fewer than 4 tokens kept.
    """
    if set(student) != set(reference) or not student:
        raise ValueError(f"CKA needs the same layers of both: got {sorted(student)} and {sorted(reference)}")
    layers = [1 - linear_cka(student[i][keep_BT], reference[i][keep_BT].detach()) for i in sorted(student)]
    return torch.stack(layers).mean()


def falling_weight(step: int, total_steps: int, *, start: float, end: float, fraction: float) -> float:
    """A weight that falls linearly from `start` to `end` over the first `fraction` of training, then stays.

    Args:
        step: optimizer steps done, from 0.
        total_steps: optimizer steps in all.
        start: weight at step 0.
        end: weight from step `fraction · total_steps` on.
        fraction: share of training in 0 … 1; 0 means `end` from the first step on.
    """
    span = fraction * total_steps
    if step >= span:
        return end
    return start + (end - start) * step / span
