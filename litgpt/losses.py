"""What the student is taught by: task cross-entropy, the teacher's distribution, and likeness to its own base.

The vocabulary projection belongs to the loss: logits, the student's and the teacher's, exist for one chunk of rows at
a time, and their gradient is made on the spot and multiplied into the gradients of the hidden rows and of the head.
Backward only scales those, so memory does not grow with the number of tokens and no product is taken twice. The caller
divides by its own global counts, over micro-batches, accumulation and ranks, through two scales, so that splitting a
batch changes nothing but rounding.

Precision: logits, probabilities, losses and the sums behind every gradient are fp32, outside autocast (fp64 if the
hidden rows or the head are). Products are taken in fp32 too: a head or hidden rows in lower precision are converted
first, the head once and not per chunk. There are two exceptions. If hidden rows and head are both bf16 on CUDA (a
model whose master weights are bf16), operands stay bf16 and are accumulated and written in fp32; dL/dlogits is then
rounded to bf16 as an operand. And a dense teacher's logits are taken in its own dtype, as the teacher itself would
predict (written in fp32 on CUDA, in its dtype on a CPU). Whether CUDA takes fp32 products in TF32 is the caller's
`torch.set_float32_matmul_precision`. A gradient is rounded to its parameter's dtype once, at the end.

Shape suffixes as in `model.py`; M rows of the teacher, C the teacher's width, R the rows of a chunk or the head's own
rows, K ids kept of the teacher.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from litgpt.cka import LEAST_CKA, linear_cka
from litgpt.divergence import Divergence, KdKind, Signal, Task, score_rows
from litgpt.utils import UserError

__all__ = [
    "DistillTerms",
    "Divergence",
    "Head",
    "KdKind",
    "SampledTeacher",
    "Teacher",
    "TeacherTargets",
    "TopKTeacher",
    "cka_loss",
    "distill_terms",
    "falling_weight",
    "mse_anchor",
]


@dataclass(frozen=True)
class Teacher:
    """The teacher's side of the KD rows, whole: its logits are made chunk by chunk.

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
    """The K best ids of the teacher; all others are one bucket, of the teacher and of the student.

    The loss is the forward KL of these K + 1 buckets at temperature 1, a lower bound of the whole KL.

    Attributes:
        ids_MK: int64, below the shared vocabulary's size, distinct within a row.
        log_p_MK: their log-probabilities over the shared ids at temperature 1, any float dtype; -inf for an id that
            only fills the row. Where rounding makes more than 1 of a row it is normalised.
        rows_N: as in `Teacher`.
    """

    ids_MK: Tensor
    log_p_MK: Tensor
    rows_N: Tensor


@dataclass(frozen=True)
class SampledTeacher:
    """Ids drawn from the teacher (random sampling KD, arXiv 2503.16870).

    The loss is -Σ w log q, whose expectation is the cross-entropy of the student under the teacher at temperature 1:
    the gradient is that of forward KL, the value is larger by the teacher's entropy, which the sample does not know.

    Attributes:
        ids_MK: int64, below the shared vocabulary's size; an id may occur more than once.
        weight_MK: counts / draws, or importance weights; each row sums to 1.
        rows_N: as in `Teacher`.
        entropy_M: the teacher's entropy in nats; where given it is subtracted and the value is an estimate of the KL
            (of a single row it may be negative).
    """

    ids_MK: Tensor
    weight_MK: Tensor
    rows_N: Tensor
    entropy_M: Tensor | None = None


TeacherTargets = Teacher | TopKTeacher | SampledTeacher


@dataclass(frozen=True)
class Head:
    """A vocabulary projection of which some rows are parameters of their own, without a copy of it.

    Attributes:
        weight_VD: the projection. It gets a gradient if it asks for one, 0 in the replaced rows.
        row_ids: which of its rows are replaced, distinct.
        rows_RD: what they are replaced by, in this order.
    """

    weight_VD: Tensor
    row_ids: tuple[int, ...] = ()
    rows_RD: Tensor | None = None

    def __post_init__(self) -> None:
        rows = 0 if self.rows_RD is None else len(self.rows_RD)
        if rows != len(self.row_ids) or len(set(self.row_ids)) != rows:
            raise ValueError(f"{rows} rows cannot replace the rows {self.row_ids} of the head")
        if any(not 0 <= index < len(self.weight_VD) for index in self.row_ids):
            raise ValueError(f"rows {self.row_ids} lie outside a head of {len(self.weight_VD)} rows")


@dataclass(frozen=True)
class DistillTerms:
    """The loss of some rows, and its parts for reporting; all but `loss` are detached.

    Attributes:
        loss: ce_scale · ce + kd_scale · kd, differentiable.
        ce: Σ weight · cross-entropy, nats.
        kd: Σ T² · divergence, nats; 0 without a teacher. See `SampledTeacher` for what it is there.
        ce_N: unweighted cross-entropy of each row, 0 where its weight is 0.
        kd_N: T² · divergence of each row, 0 where there is no KD.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    ce_N: Tensor
    kd_N: Tensor


def distill_terms(
    hidden_ND: Tensor,
    head: Head | Tensor,
    targets_N: Tensor,
    ce_weight_N: Tensor,
    *,
    ce_scale: float,
    kd_scale: float,
    teacher: TeacherTargets | None = None,
    shared_vocab_size: int | None = None,
    divergence: Divergence | None = None,
    chunk_rows: int = 256,
    compiled: bool = False,
) -> DistillTerms:
    """Task cross-entropy and distillation in one pass over the vocabulary projection, gradients included.

    Rows without either are skipped. Gradients are made here, in forward, for those of hidden rows, head and its own
    rows that ask for one; so a frozen head costs none, and under `torch.no_grad()` there are values alone. `backward`
    can be called once. A sharded head (DTensor) is gathered once; its gradient goes back sharded and averaged over the
    mesh, as FSDP and DDP average those of all other parameters. On CUDA the host waits for the device once a call.

    Args:
        hidden_ND: what the student's head reads, any float dtype.
        head: the student's vocabulary projection [V, D].
        targets_N: the id each row should predict; any valid id where the weight is 0.
        ce_weight_N: weight of each row's cross-entropy, 0 leaves the row out.
        ce_scale: weight of the task divided by the global count of weights.
        kd_scale: weight of KD divided by the global count of its rows.
        teacher: the teacher's rows, or `None` for cross-entropy alone.
        shared_vocab_size: ids below it exist in both vocabularies; KD compares the two distributions over these
            alone, so padding ids and the student's own tokens never enter. `None`: all of the student's.
        divergence: how the two are compared, `None` for forward KL at temperature 1.
        chunk_rows: rows whose logits exist at one time: 4 · V bytes each in fp32, twice with a dense teacher.
        compiled: let `torch.compile` fuse what happens to the logits of a chunk. Meant for CUDA, needs a compiler.

    Returns:
        the loss and its parts.

    Raises:
        ValueError: lengths that differ, or a shared vocabulary larger than one of the two heads.
        UserError: a temperature or a divergence that needs the teacher's whole distribution, of which only some ids
            are known. (Reverse KL over the best ids alone falls when the student's mass leaves them.)
    """
    n = len(hidden_ND)
    if len(targets_N) != n or len(ce_weight_N) != n or (teacher is not None and len(teacher.rows_N) != n):
        raise ValueError(f"targets, weights and teacher rows must each have one entry for each of the {n} rows")
    head = Head(head) if isinstance(head, Tensor) else head
    vocabulary = len(head.weight_VD)
    shared = vocabulary if shared_vocab_size is None else shared_vocab_size
    if shared > vocabulary or (isinstance(teacher, Teacher) and shared > len(teacher.head_VC)):
        raise ValueError(f"a shared vocabulary of {shared} ids does not fit into both heads")
    divergence = Divergence() if divergence is None else divergence
    if isinstance(teacher, TopKTeacher | SampledTeacher) and (
        divergence.limit != "forward" or divergence.temperature != 1
    ):
        raise UserError(
            f"the divergence {divergence.kind} at temperature {divergence.temperature:g} needs the teacher's whole "
            "distribution: with stored ids use forward at temperature 1"
        )
    if chunk_rows < 1:
        raise ValueError(f"a chunk needs at least 1 row, got {chunk_rows}")
    weight_VD, rows_RD = _gathered(head.weight_VD), None if head.rows_RD is None else _gathered(head.rows_RD)
    job = _Job(
        row_ids=head.row_ids,
        targets_N=targets_N,
        ce_weight_N=ce_weight_N,
        ce_scale=ce_scale,
        kd_scale=kd_scale,
        teacher=teacher,
        shared=shared,
        divergence=divergence,
        chunk_rows=chunk_rows,
        score=_compiled_score_rows() if compiled else score_rows,
    )
    inputs = (hidden_ND, weight_VD, rows_RD)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return DistillTerms(*_LossWithGradients.apply(*inputs, job))
    return _run(job, *inputs, wanted=(False, False, False))[0]


@cache
def _compiled_score_rows() -> Callable[..., tuple[Tensor | None, Tensor | None]]:
    return torch.compile(score_rows, dynamic=True)


def _gathered(weight: Tensor) -> Tensor:
    """The whole of a sharded parameter, once; any other tensor as it is."""
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(weight, DTensor)
    mesh = weight.device_mesh
    whole: Tensor = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        # Summed over the mesh on its way back: gloo has no mean.
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole


@dataclass(frozen=True)
class _Job:
    """What a pass over the rows needs beside the tensors that may get a gradient."""

    row_ids: tuple[int, ...]
    targets_N: Tensor
    ce_weight_N: Tensor
    ce_scale: float
    kd_scale: float
    teacher: TeacherTargets | None
    shared: int
    divergence: Divergence
    chunk_rows: int
    score: Callable[..., tuple[Tensor | None, Tensor | None]]


class _LossWithGradients(torch.autograd.Function):
    """`_run` with its gradients kept for backward, which only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, rows_RD: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        terms, ctx.gradients = _run(job, hidden_ND, weight_VD, rows_RD, wanted=ctx.needs_input_grad[:3])
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden_ND, weight_VD, rows_RD)]
        ctx.mark_non_differentiable(terms.ce, terms.kd, terms.ce_N, terms.kd_N)
        return terms.loss, terms.ce, terms.kd, terms.ce_N, terms.kd_N

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were made once and are used up: call backward only once")
        gradients, ctx.gradients = ctx.gradients, None
        # In place: the head's is as large as the head.
        scaled = [None if g is None else g.mul_(d_loss).to(t) for g, t in zip(gradients, ctx.dtypes, strict=True)]
        return (*scaled, None)


def _run(
    job: _Job, hidden_ND: Tensor, weight_VD: Tensor, rows_RD: Tensor | None, *, wanted: tuple[bool, bool, bool]
) -> tuple[DistillTerms, list[Tensor | None]]:
    """All chunks: the terms, and the gradients of those of the three tensors that are wanted, in high precision."""
    device, shared = hidden_ND.device, job.shared
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        high = torch.promote_types(torch.promote_types(hidden_ND.dtype, weight_VD.dtype), torch.float32)
        both_bf16 = hidden_ND.dtype == weight_VD.dtype == torch.bfloat16
        operand = torch.bfloat16 if both_bf16 and device.type == "cuda" else high
        weight_VD = weight_VD.to(operand)  # once, not per chunk; the same tensor when the master weights are fp32
        vocabulary = len(weight_VD)
        rows_RD = None if rows_RD is None else rows_RD.to(high)

        # KD alone, both, CE alone: so the rows of each term lie together, and their numbers are all the host asks for.
        has_ce_N = job.ce_weight_N != 0
        has_kd_N = torch.zeros_like(has_ce_N) if job.teacher is None else job.teacher.rows_N >= 0
        order_N = torch.where(has_kd_N, has_ce_N.int(), torch.where(has_ce_N, 2, 3)).argsort(stable=True)
        n_both, n_kd, n_ce = torch.stack(((has_ce_N & has_kd_N).sum(), has_kd_N.sum(), has_ce_N.sum())).tolist()
        n = n_kd + n_ce - n_both
        bounds = (n_kd - n_both, n_kd, n)

        ce_R = torch.zeros(n, dtype=high, device=device)
        kd_R = torch.zeros_like(ce_R)
        order_R = order_N[:n]
        factor_R = job.ce_weight_N[order_R].to(high) * job.ce_scale
        targets_R = job.targets_N[order_R]
        kd_factor = torch.full((), job.kd_scale, dtype=high, device=device)
        d_hidden_ND = torch.zeros(hidden_ND.shape, dtype=high, device=device) if wanted[0] else None
        d_weight_VD = torch.zeros(weight_VD.shape, dtype=high, device=device) if wanted[1] else None
        d_rows_RD = torch.zeros_like(rows_RD) if wanted[2] and rows_RD is not None else None

        most = min(job.chunk_rows, n)
        z_RV = torch.empty(most, vocabulary, dtype=high, device=device)
        t_RS = None
        if isinstance(job.teacher, Teacher):
            t_RS = torch.empty(min(most, n_kd), shared, dtype=high, device=device)
        # On a CPU as many rows at a time as the cache holds with all that is made of them; on CUDA as many as keep it
        # busy. Fused, nothing else is made of them.
        budget = 1 << 21 if device.type == "cpu" else 1 << 25
        block = most if job.score is not score_rows else max(1, budget // (vocabulary * z_RV.itemsize))

        for start in range(0, n, job.chunk_rows):
            end = min(start + job.chunk_rows, n)
            at_R = order_R[start:end]
            h_RD = hidden_ND[at_R].to(operand)
            chunk_RV = z_RV[: end - start]
            _multiply(h_RD, weight_VD.T, out=chunk_RV)
            if rows_RD is not None:
                own_RR = h_RD.to(high) @ rows_RD.T
                for column, index in enumerate(job.row_ids):  # a tensor of ids would have to be sent to the device
                    chunk_RV[:, index] = own_RR[:, column]
            signals = _signals(job.teacher, at_R[: max(0, n_kd - start)], shared, t_RS, high)
            for a, b in _blocks(start, end, bounds, block):
                task = Task(targets_R[a:b], factor_R[a:b]) if a >= bounds[0] else None
                signal = None if signals is None or a >= n_kd else _part(signals, slice(a - start, b - start))
                ce, kd = job.score(
                    chunk_RV[a - start : b - start], shared, task, signal, kd_factor, job.divergence, any(wanted)
                )
                if ce is not None:
                    ce_R[a:b] = ce
                if kd is not None:
                    kd_R[a:b] = kd
            if rows_RD is not None and any(wanted):
                for column, index in enumerate(job.row_ids):
                    own_RR[:, column] = chunk_RV[:, index]
                    chunk_RV[:, index] = 0
                if d_rows_RD is not None:
                    d_rows_RD.addmm_(own_RR.T, h_RD.to(high))
            dz_RV = chunk_RV.to(operand) if any(wanted) else chunk_RV
            if d_hidden_ND is not None:
                d_RD = _multiply(dz_RV, weight_VD)
                if rows_RD is not None:
                    d_RD.addmm_(own_RR, rows_RD)
                d_hidden_ND[at_R] = d_RD
            if d_weight_VD is not None:
                _multiply_add_(d_weight_VD, dz_RV.T, h_RD)

        ce, kd = (ce_R * job.ce_weight_N[order_R].to(high)).sum(), kd_R.sum()
        ce_N, kd_N = (torch.zeros(len(hidden_ND), dtype=high, device=device) for _ in range(2))
        ce_N[order_R], kd_N[order_R] = ce_R, kd_R
        loss = job.ce_scale * ce + job.kd_scale * kd
        return DistillTerms(loss, ce, kd, ce_N, kd_N), [d_hidden_ND, d_weight_VD, d_rows_RD]


def _blocks(start: int, end: int, bounds: tuple[int, ...], block: int) -> list[tuple[int, int]]:
    """Cut start … end at the bounds, where the kind of row changes, and into at most `block` rows."""
    cuts = [start, *(bound for bound in bounds if start < bound < end), end]
    return [(a, min(a + block, until)) for since, until in itertools.pairwise(cuts) for a in range(since, until, block)]


def _signals(
    teacher: TeacherTargets | None, at_R: Tensor, shared: int, t_RS: Tensor | None, high: torch.dtype
) -> Signal | None:
    """What the teacher says of the chunk's rows with KD, which come first in it; logits are written into `t_RS`."""
    if teacher is None or len(at_R) == 0:
        return None
    pairs_R = teacher.rows_N[at_R]
    if isinstance(teacher, Teacher):
        assert t_RS is not None
        head_VC = teacher.head_VC[:shared]
        hidden_RC = teacher.hidden_MC[pairs_R].to(head_VC.dtype)
        return Signal(logits_RS=_multiply(hidden_RC, head_VC.T, out=t_RS[: len(at_R)]))
    ids_RK = teacher.ids_MK[pairs_R]
    if isinstance(teacher, TopKTeacher):
        return Signal(top=(ids_RK, teacher.log_p_MK[pairs_R].to(high)))
    entropy_R = None if teacher.entropy_M is None else teacher.entropy_M[pairs_R].to(high)
    return Signal(sample=(ids_RK, teacher.weight_MK[pairs_R].to(high), entropy_R))


def _part(signal: Signal, at: slice) -> Signal:
    """Some rows of a chunk's signal."""
    if signal.logits_RS is not None:
        return Signal(logits_RS=signal.logits_RS[at])
    if signal.top is not None:
        ids_RK, log_p_RK = signal.top
        return Signal(top=(ids_RK[at], log_p_RK[at]))
    assert signal.sample is not None
    ids_RK, weight_RK, entropy_R = signal.sample
    return Signal(sample=(ids_RK[at], weight_RK[at], None if entropy_R is None else entropy_R[at]))


def _multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, into `out` if given; half-precision operands on CUDA give fp32 without a rounding in between."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    if out is None or out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    return out.copy_(torch.mm(a, b))


def _multiply_add_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, accumulated in the precision of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    # `addmm` of bf16 into fp32 is not in every torch: in parts, so that the product takes little memory.
    for part, some in zip(total.split(16_384), a.split(16_384), strict=True):
        part += _multiply(some, b)


def cka_loss(
    student: Mapping[int, Tensor], reference: Mapping[int, Tensor], keep_BT: Tensor, *, root: bool = False
) -> Tensor:
    """Mean over layers of 1 - CKA (`root`: 1 - sqrt(CKA)) of the student's and the reference's states; 0 if they agree.

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
    values = torch.stack([linear_cka(student[i][keep_BT], reference[i][keep_BT].detach()) for i in sorted(student)])
    return (1 - (values.clamp_min(LEAST_CKA).sqrt() if root else values)).mean()


def mse_anchor(student: Mapping[int, Tensor], reference: Mapping[int, Tensor], keep_BT: Tensor) -> Tensor:
    """Σ over kept tokens of |x − y|² / |y|², mean over layers: how far the student's states are from the reference's.

    A sum, so that micro-batches add up; who calls divides by the tokens of all (REPINA, arXiv 2106.02102, with the
    identity as its map, and scaled so that no layer outweighs the others).

    Args:
        student, reference, keep_BT: as of `cka_loss`, with states of one width.
    """
    layers = []
    for i in sorted(student):
        dtype = torch.promote_types(student[i].dtype, torch.float32)
        x_ND, y_ND = student[i][keep_BT].to(dtype), reference[i][keep_BT].detach().to(dtype)
        layers.append(((x_ND - y_ND).square().sum(1) / y_ND.square().sum(1).clamp_min(1e-12)).sum())
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
