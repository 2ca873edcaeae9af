"""The losses against plain autograd references in float64."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

import litgpt.losses
from litgpt.losses import (
    DistillTerms,
    Divergence,
    Head,
    SampledTeacher,
    Teacher,
    TeacherTargets,
    TopKTeacher,
    cka_loss,
    distill_terms,
    falling_weight,
)
from litgpt.utils import UserError

N, D, C, V, V_TEACHER, SHARED, M, K = 37, 12, 20, 50, 48, 45, 21, 6
SCALES: Any = {"ce_scale": 0.3, "kd_scale": 0.7}
DIVERGENCES = [
    Divergence(),
    Divergence(temperature=2.0),
    Divergence("reverse"),
    Divergence("reverse", temperature=0.5),
    Divergence("jsd", beta=0.3),
    Divergence("jsd", temperature=3.0),
    Divergence("jsd", beta=0.0),
    Divergence("jsd", beta=1.0, temperature=2.0),
    Divergence("skew"),
    Divergence("skew", alpha=0.7, temperature=2.0),
    Divergence("skew", alpha=0.0),
]
Case = dict[str, Tensor]


def _case(dtype: torch.dtype = torch.float64, device: str = "cpu") -> Case:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows_N = torch.full((N,), -1)
    kd_rows = torch.randperm(N, generator=generator)[:15].sort().values
    rows_N[kd_rows] = torch.randperm(M, generator=generator)[:15]
    weight_N = (torch.rand(N, generator=generator) > 0.4).to(dtype) * 0.5
    weight_N[kd_rows[:5]] = 0.0  # rows with KD and no CE
    case = {
        "hidden": randn(N, D),
        "head": randn(V, D),
        "targets": torch.randint(V, (N,), generator=generator),
        "weight": weight_N,
        "teacher_hidden": randn(M, C),
        "teacher_head": randn(V_TEACHER, C),
        "rows": rows_N,
    }
    return {name: tensor.to(device) for name, tensor in case.items()}


def _in_float64(case: Case) -> Case:
    return {name: t.detach().cpu().double() if t.is_floating_point() else t.cpu() for name, t in case.items()}


def _teacher(case: Case) -> Teacher:
    return Teacher(case["teacher_hidden"], case["teacher_head"], case["rows"])


def _terms(case: Case, teacher: TeacherTargets | None = None, **options: Any) -> DistillTerms:
    arguments = [case[name] for name in ("hidden", "head", "targets", "weight")]
    options = {"teacher": teacher or _teacher(case), "shared_vocab_size": SHARED} | SCALES | options
    return distill_terms(*arguments, **options)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats, by its definition."""
    return (p * (p / q).log()).sum()


def _divergence(p: Tensor, q: Tensor, divergence: Divergence) -> Tensor:
    beta, alpha = divergence.beta, divergence.alpha
    if divergence.kind == "forward":
        return _kl(p, q)
    if divergence.kind == "reverse":
        return _kl(q, p)
    if divergence.kind == "jsd":
        if beta in (0.0, 1.0):  # the limits that TRL's generalised JSD has
            return _kl(p, q) if beta == 0.0 else _kl(q, p)
        m = beta * p + (1 - beta) * q
        return beta * _kl(p, m) + (1 - beta) * _kl(q, m)
    return _kl(p, alpha * p + (1 - alpha) * q)


def _row_of_kd(logits_V: Tensor, teacher: TeacherTargets, m: int, divergence: Divergence) -> Tensor:
    """One row's KD from dense logits, written out."""
    if isinstance(teacher, Teacher):
        t = divergence.temperature
        p = torch.softmax((teacher.head_VC @ teacher.hidden_MC[m])[:SHARED] / t, 0)
        return t**2 * _divergence(p, torch.softmax(logits_V[:SHARED] / t, 0), divergence)
    q = torch.softmax(logits_V[:SHARED], 0)
    ids = teacher.ids_MK[m]
    if isinstance(teacher, SampledTeacher):
        entropy = 0.0 if teacher.entropy_M is None else teacher.entropy_M[m]
        return -(teacher.weight_MK[m] * q[ids].log()).sum() - entropy
    p = teacher.log_p_MK[m].exp()
    p, q = (torch.cat((x, (1 - x.sum()).reshape(1))) for x in (p, q[ids]))
    return _kl(p, q)


def _reference(
    case: Case, teacher: TeacherTargets | None = None, divergence: Divergence | None = None
) -> tuple[Tensor, Tensor]:
    """The two sums from dense logits."""
    teacher, divergence = teacher or _teacher(case), divergence or Divergence()
    logits = case["hidden"] @ case["head"].T
    ce = (F.cross_entropy(logits, case["targets"], reduction="none") * case["weight"]).sum()
    kd = [_row_of_kd(logits[n], teacher, int(m), divergence) for n, m in enumerate(teacher.rows_N) if m >= 0]
    return ce, torch.stack(kd).sum()


def _stored(case: Case) -> dict[str, TeacherTargets]:
    """The case's teacher as the ids that one might have kept of it."""
    p_MS = torch.softmax((case["teacher_hidden"] @ case["teacher_head"].T)[:, :SHARED], -1)
    top = p_MS.topk(K)
    draws = torch.multinomial(p_MS, 8, replacement=True, generator=torch.Generator().manual_seed(1))
    weights = torch.full(draws.shape, 1 / 8, dtype=p_MS.dtype)
    entropy = torch.special.entr(p_MS).sum(-1)
    return {
        "top": TopKTeacher(top.indices, top.values.log(), case["rows"]),
        "sample": SampledTeacher(draws, weights, case["rows"]),
        "sample with entropy": SampledTeacher(draws, weights, case["rows"], entropy),
    }


def _check(terms: DistillTerms, ours: Case, ce: Tensor, kd: Tensor, reference: Case) -> None:
    """Values, and gradients of whatever asks for one in `reference`."""
    torch.testing.assert_close(terms.ce, ce.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.kd, kd.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.loss.detach(), (0.3 * ce + 0.7 * kd).detach(), rtol=1e-12, atol=1e-12)
    (2 * terms.loss).backward()
    (2 * (0.3 * ce + 0.7 * kd)).backward()
    for name, tensor in reference.items():
        if tensor.requires_grad:
            torch.testing.assert_close(ours[name].grad, tensor.grad, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_values_and_gradients_equal_the_dense_reference(divergence: Divergence, chunk_rows: int) -> None:
    ours, reference = _case(), _case()
    for case in (ours, reference):
        case["hidden"].requires_grad_()
        case["head"].requires_grad_()
    terms = _terms(ours, divergence=divergence, chunk_rows=chunk_rows)
    _check(terms, ours, *_reference(reference, divergence=divergence), reference)


@pytest.mark.parametrize("kind", ["top", "sample", "sample with entropy"])
@pytest.mark.parametrize("chunk_rows", [5, 1000])
def test_stored_ids_equal_the_dense_reference(kind: str, chunk_rows: int) -> None:
    ours, reference = _case(), _case()
    teacher = _stored(ours)[kind]
    for case in (ours, reference):
        case["hidden"].requires_grad_()
        case["head"].requires_grad_()
    _check(_terms(ours, teacher, chunk_rows=chunk_rows), ours, *_reference(reference, teacher), reference)


@pytest.mark.parametrize("block", [1, 3])
def test_rows_scored_a_few_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    # The cache's share is far above these sizes; a vocabulary of 1.3 to 4 MB a row is cut like this.
    blocks = litgpt.losses._blocks
    whole = _terms(_case(), chunk_rows=16)
    monkeypatch.setattr(litgpt.losses, "_blocks", lambda start, end, bounds, _: blocks(start, end, bounds, block))
    cut = _terms(_case(), chunk_rows=16)
    for name in ("loss", "ce", "kd", "ce_N", "kd_N"):
        torch.testing.assert_close(getattr(cut, name), getattr(whole, name), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("which", ["hidden", "head", "own"])
def test_only_what_asks_gets_a_gradient(which: str) -> None:
    ours, reference = _case(), _case()
    for case in (ours, reference):
        case["own"] = torch.stack((case["head"][3] + 1, case["head"][47] - 1))
        case[which].requires_grad_()
    ours["head"], whole = Head(ours["head"], (3, 47), ours["own"]), ours["head"]  # type: ignore[assignment]
    terms = _terms(ours)
    ours["head"] = whole
    reference["head"] = (leaf := reference["head"]).index_copy(0, torch.tensor([3, 47]), reference["own"])
    ce, kd = _reference(reference)
    reference["head"] = leaf
    _check(terms, ours, ce, kd, reference)
    assert [name for name, tensor in ours.items() if tensor.grad is not None] == [which]
    if which == "head":
        assert whole.grad is not None and (whole.grad[[3, 47]] == 0).all() and (whole.grad[4] != 0).any()


def test_a_tied_head_gets_both_gradients() -> None:
    ids = torch.randint(SHARED, (N,), generator=torch.Generator().manual_seed(2))
    ours, reference = _case(), _case()
    for case in (ours, reference):
        case["head"].requires_grad_()
        case["hidden"] = case["head"][ids].tanh()
    _check(_terms(ours), ours, *_reference(reference), {"head": reference["head"]})


def test_no_second_whole_head_exists() -> None:
    """A frozen head with two rows of its own: no tensor of its size is made, in forward or in backward."""
    head = torch.randn(5000, 64)
    own = torch.randn(2, 64, requires_grad=True)
    hidden = torch.randn(8, 64, requires_grad=True)
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() != head.untyped_storage().data_ptr():
                made.append(out.untyped_storage().nbytes() // out.itemsize)
            return out

    with Watch():
        terms = distill_terms(hidden, Head(head, (7, 9), own), torch.arange(8), torch.ones(8), **SCALES, chunk_rows=4)
        terms.loss.backward()
    assert own.grad is not None and (own.grad != 0).any()
    assert max(made) == 4 * 5000  # one chunk of logits


def test_backward_can_be_called_once() -> None:
    case = _case()
    case["hidden"].requires_grad_()
    loss = _terms(case).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_without_gradients_there_are_the_same_values() -> None:
    case = _case()
    case["hidden"].requires_grad_()
    with_gradients = _terms(case, divergence=Divergence("jsd"))
    with torch.no_grad():
        values = _terms(case, divergence=Divergence("jsd"))
    assert with_gradients.loss.requires_grad and not values.loss.requires_grad
    for name in ("loss", "ce", "kd", "ce_N", "kd_N"):
        assert torch.equal(getattr(values, name), getattr(with_gradients, name).detach())


def test_autocast_changes_nothing() -> None:
    case = _case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_terms(case).loss, _terms(case).loss)
        inside = _terms(case).loss
    assert torch.equal(inside, _terms(case).loss)


@pytest.mark.parametrize(
    ("hidden", "head", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-5),
        (torch.float32, torch.bfloat16, 1e-5),
        (torch.bfloat16, torch.bfloat16, 1e-5),
        (torch.float16, torch.float16, 1e-5),
    ],
)
def test_low_precision_inputs_are_scored_in_fp32(hidden: torch.dtype, head: torch.dtype, tolerance: float) -> None:
    ours = _case(torch.float32) | {"hidden": _case(hidden)["hidden"], "head": _case(head)["head"]}
    reference = _in_float64(ours)
    for case in (ours, reference):
        case["hidden"].requires_grad_()
        case["head"].requires_grad_()
    terms = _terms(ours)
    ce, kd = _reference(reference)
    assert terms.loss.dtype == torch.float32
    torch.testing.assert_close(terms.ce.double(), ce.detach(), rtol=tolerance, atol=1e-4)
    torch.testing.assert_close(terms.kd.double(), kd.detach(), rtol=tolerance, atol=1e-4)
    terms.loss.backward()
    (0.3 * ce + 0.7 * kd).backward()
    for name in ("hidden", "head"):
        grad, exact = ours[name].grad, reference[name].grad
        assert grad is not None and exact is not None and grad.dtype == ours[name].dtype
        # Rounded once: half a unit in the last place of each entry.
        last_place = torch.finfo(grad.dtype).eps / 2 if grad.dtype != torch.float32 else 1e-5
        torch.testing.assert_close(grad.double(), exact, rtol=1.01 * last_place, atol=3e-6)


def test_a_teacher_in_bf16_is_asked_in_bf16() -> None:
    case = _case(torch.bfloat16)
    _, kd = _reference(_in_float64(case))
    torch.testing.assert_close(_terms(case).kd.double(), kd, rtol=3e-2, atol=1e-2)


def test_rows_are_reported_and_add_up() -> None:
    case = _case()
    terms = _terms(case)
    torch.testing.assert_close((terms.ce_N * case["weight"]).sum(), terms.ce)
    torch.testing.assert_close(terms.kd_N.sum(), terms.kd)
    assert (terms.ce_N[case["weight"] == 0] == 0).all() and (terms.ce_N[case["weight"] != 0] > 0).all()
    assert (terms.kd_N[case["rows"] < 0] == 0).all() and (terms.kd_N[case["rows"] >= 0] > 0).all()


def test_kd_by_hand() -> None:
    # p = (3/4, 1/4), q = (1/2, 1/2), in nats.
    hidden = torch.ones(1, 1, dtype=torch.float64)
    rows, target = torch.tensor([0]), torch.tensor([0])
    teacher = Teacher(hidden, torch.tensor([[3.0], [1.0]], dtype=torch.float64).log(), rows)
    head = torch.zeros(2, 1, dtype=torch.float64)

    def kd(teacher: TeacherTargets, divergence: Divergence | None = None) -> float:
        terms = distill_terms(hidden, head, target, torch.zeros(1), teacher=teacher, divergence=divergence, **SCALES)
        return float(terms.kd)

    ln = math.log
    assert kd(teacher) == pytest.approx(3 / 4 * ln(3 / 2) + 1 / 4 * ln(1 / 2), abs=1e-12)
    assert kd(teacher, Divergence("reverse")) == pytest.approx(1 / 2 * ln(2 / 3) + 1 / 2 * ln(2), abs=1e-12)
    # m = (5/8, 3/8) and, with β = 1/4, (9/16, 7/16)
    half = (3 / 4 * ln(6 / 5) + 1 / 4 * ln(2 / 3)) / 2 + (1 / 2 * ln(4 / 5) + 1 / 2 * ln(4 / 3)) / 2
    quarter = (3 / 4 * ln(4 / 3) + 1 / 4 * ln(4 / 7)) / 4 + (1 / 2 * ln(8 / 9) + 1 / 2 * ln(8 / 7)) * 3 / 4
    assert kd(teacher, Divergence("jsd")) == pytest.approx(half, abs=1e-12)
    assert kd(teacher, Divergence("jsd", beta=0.25)) == pytest.approx(quarter, abs=1e-12)
    assert kd(teacher, Divergence("skew", alpha=0.25)) == pytest.approx(
        3 / 4 * ln(4 / 3) + 1 / 4 * ln(4 / 7), abs=1e-12
    )
    best = TopKTeacher(torch.tensor([[0]]), torch.tensor([[0.75]], dtype=torch.float64).log(), rows)
    assert kd(best) == pytest.approx(3 / 4 * ln(3 / 2) + 1 / 4 * ln(1 / 2), abs=1e-12)
    drawn = SampledTeacher(torch.tensor([[0, 1]]), torch.tensor([[0.75, 0.25]], dtype=torch.float64), rows)
    assert kd(drawn) == pytest.approx(ln(2), abs=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_kd_of_a_model_with_itself_is_zero_with_zero_gradient(divergence: Divergence) -> None:
    case = _case()
    hidden = case["hidden"].clone().requires_grad_()
    teacher = Teacher(case["hidden"], case["head"], torch.arange(N))
    terms = distill_terms(
        hidden, case["head"], case["targets"], torch.zeros(N), teacher=teacher, divergence=divergence, **SCALES
    )
    terms.loss.backward()
    assert terms.kd.item() == pytest.approx(0, abs=1e-11)
    assert hidden.grad is not None and hidden.grad.abs().max() < 1e-11


def test_all_ids_kept_are_the_whole_divergence() -> None:
    case = _case()
    log_p = torch.log_softmax((case["teacher_hidden"] @ case["teacher_head"].T)[:, :SHARED], -1)
    ids = torch.arange(SHARED).expand(M, -1)
    kept = _terms(case, TopKTeacher(ids, log_p, case["rows"])).kd_N
    torch.testing.assert_close(kept, _terms(case).kd_N, rtol=1e-11, atol=1e-12)
    # And fp16 in store, whose mass is 1 but for rounding, on either side of it.
    rounded = _terms(case, TopKTeacher(ids, log_p.half(), case["rows"])).kd_N
    torch.testing.assert_close(rounded, _terms(case).kd_N, rtol=1e-2, atol=5e-3)


def test_the_mean_over_samples_is_the_forward_gradient() -> None:
    case = _case()
    case["hidden"].requires_grad_()
    _terms(case, ce_scale=0.0).loss.backward()
    assert case["hidden"].grad is not None
    exact = case["hidden"].grad.clone()
    case["hidden"].grad.zero_()
    with torch.no_grad():
        p = torch.softmax((case["teacher_hidden"] @ case["teacher_head"].T)[:, :SHARED], -1)
    draws = torch.multinomial(p, 20_000, replacement=True, generator=torch.Generator().manual_seed(3))
    teacher = SampledTeacher(draws, torch.full(draws.shape, 1 / 20_000, dtype=torch.float64), case["rows"])
    _terms(case, teacher, ce_scale=0.0).loss.backward()
    assert case["hidden"].grad is not None
    assert (case["hidden"].grad - exact).norm() < 0.03 * exact.norm()


def test_rows_without_kd_get_exactly_zero_kd_gradient() -> None:
    case = _case()
    case["hidden"].requires_grad_()
    _terms(case, ce_scale=0.0).loss.backward()
    grad = case["hidden"].grad
    assert grad is not None
    assert (grad[case["rows"] < 0] == 0).all()
    assert (grad[case["rows"] >= 0].abs().sum(1) > 0).all()


def test_ids_past_the_shared_vocabulary_never_enter_the_kd_term() -> None:
    # In fp32, where everything beside a logit 300 higher would vanish.
    case, changed = _case(torch.float32), _case(torch.float32)
    changed["head"][SHARED:] *= 100.0
    changed["teacher_head"][SHARED:] -= 100.0
    assert torch.equal(_terms(case).kd, _terms(changed).kd)
    teacher = _stored(case)["top"]
    torch.testing.assert_close(_terms(case, teacher).kd, _terms(changed, teacher).kd, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_a_tail_without_mass_is_stable_in_fp32(scale: float) -> None:
    """The student's tail lies e^-90 and less below its K ids: its logarithm must not come out as -inf."""
    hidden = torch.ones(1, 1, requires_grad=True)
    head = torch.cat((torch.zeros(2), torch.full((5,), -90.0 * scale)))[:, None]  # q = 1/2, 1/2, and next to nothing
    teacher = TopKTeacher(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]).log(), torch.tensor([0]))
    terms = distill_terms(hidden, head, torch.tensor([0]), torch.zeros(1), teacher=teacher, **SCALES)
    log_q_tail = math.log(5 / 2) - 90 * scale
    expected = 0.25 * math.log(0.25 / 0.5) + 0.25 * (math.log(0.25) - log_q_tail)
    assert float(terms.kd) == pytest.approx(expected, rel=1e-5)
    terms.loss.backward()
    assert hidden.grad is not None and float(hidden.grad) == pytest.approx(0.7 * 0.25 * 90 * scale, rel=1e-4)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("excluded_by", ["teacher", "student", "both"])
def test_minus_infinity_excludes_without_nan(divergence: Divergence, excluded_by: str) -> None:
    student, teacher = torch.tensor([0.3, -0.4, 1.0, 0.1])[:, None], torch.tensor([0.5, 0.2, -0.3, 0.9])[:, None]
    if excluded_by != "student":
        teacher[2] = -torch.inf
    if excluded_by != "teacher":
        student[2] = -torch.inf
    # The head's gradient is looked at: on the way to the hidden row even 0 · -inf is NaN.
    student.requires_grad_()
    terms = distill_terms(
        torch.ones(1, 1),
        student,
        torch.tensor([0]),
        torch.ones(1),
        teacher=Teacher(torch.ones(1, 1), teacher, torch.tensor([0])),
        divergence=divergence,
        **SCALES,
    )
    terms.loss.backward()
    assert student.grad is not None and student.grad.isfinite().all() and terms.kd.isfinite()
    if excluded_by == {"forward": "student", "reverse": "teacher"}.get(divergence.limit):
        assert terms.kd > 1e20  # infinite, in truth
        return
    t, tiny = divergence.temperature, 1e-300  # 0 · log 0 is 0
    p, q = (torch.softmax(x[:, 0].detach().double() / t, 0) + tiny for x in (teacher, student))
    expected = t**2 * _divergence(p, q, divergence)
    assert float(terms.kd) == pytest.approx(float(expected), rel=1e-5, abs=1e-6)


def test_nan_is_not_hidden() -> None:
    case = _case(torch.float32)
    case["hidden"][int(case["rows"].argmax())] = torch.nan
    assert _terms(case).kd.isnan() and _terms(case).loss.isnan()
    assert _terms(case, _stored(case)["top"]).kd.isnan()


@pytest.mark.parametrize("rows", [0, N])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_nothing_to_score_is_zero_and_finite(rows: int, with_teacher: bool) -> None:
    case = _case()
    hidden, head = case["hidden"][:rows].requires_grad_(), case["head"].requires_grad_()
    own = torch.zeros(1, D, dtype=torch.float64, requires_grad=True)
    hidden.retain_grad()
    teacher = Teacher(case["teacher_hidden"], case["teacher_head"], torch.full((rows,), -1)) if with_teacher else None
    arguments = (hidden, Head(head, (4,), own), case["targets"][:rows], torch.zeros(rows))
    terms = distill_terms(*arguments, teacher=teacher, shared_vocab_size=SHARED, **SCALES)
    terms.loss.backward()
    assert [t.item() for t in (terms.loss, terms.ce, terms.kd)] == [0, 0, 0]
    assert terms.ce_N.shape == terms.kd_N.shape == (rows,)
    for tensor in (hidden, head, own):
        assert tensor.grad is not None and (tensor.grad == 0).all()


@pytest.mark.parametrize("broken", ["targets", "weight", "rows"])
def test_lengths_that_differ_are_refused(broken: str) -> None:
    case = _case()
    case[broken] = case[broken][:-1]
    with pytest.raises(ValueError, match="one entry for each"):
        _terms(case)


def test_what_does_not_fit_is_refused() -> None:
    case = _case()
    with pytest.raises(ValueError, match="does not fit"):
        _terms(case, shared_vocab_size=V_TEACHER + 1)
    with pytest.raises(ValueError, match="at least 1 row"):
        _terms(case, chunk_rows=0)
    for ids in ((1,), (1, 1), (1, V)):
        with pytest.raises(ValueError, match="rows"):
            Head(case["head"], ids, case["head"][:2])
    for wrong in ({"kind": "tvd"}, {"temperature": 0.0}, {"beta": 1.5}, {"alpha": 1.0}, {"alpha": -0.1}):
        with pytest.raises(UserError):
            Divergence(**wrong)
    for teacher in _stored(case).values():
        for divergence in (Divergence("reverse"), Divergence("jsd"), Divergence("skew"), Divergence(temperature=2.0)):
            with pytest.raises(UserError, match="whole distribution"):
                _terms(case, teacher, divergence=divergence)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
def test_compiled_is_the_same() -> None:
    plain, compiled = _case(), _case()
    for case in (plain, compiled):
        case["hidden"].requires_grad_()
    expected, terms = _terms(plain), _terms(compiled, compiled=True)
    for loss in (expected.loss, terms.loss):
        loss.backward()
    torch.testing.assert_close(terms.kd_N, expected.kd_N, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(compiled["hidden"].grad, plain["hidden"].grad, rtol=1e-10, atol=1e-12)


def _sharded(rank: int, folder: str) -> None:
    """One of two ranks: a sharded head, other rows on each, and the mean of both ranks' gradients as the reference."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    case, whole = _case(), _case()["head"].requires_grad_()
    sharded = distribute_tensor(case["head"], mesh, [Shard(0)]).requires_grad_()
    mine = torch.arange(N) % 2 == rank

    def loss(head: Tensor) -> Tensor:
        return _terms(case | {"weight": case["weight"] * mine, "head": head, "rows": case["rows"].where(mine, -1)}).loss

    loss(sharded).backward()
    loss(whole).backward()
    assert isinstance(sharded.grad, DTensor) and sharded.grad.placements == (Shard(0),) and whole.grad is not None
    distributed.all_reduce(whole.grad)
    gathered = sharded.grad.full_tensor()
    torch.testing.assert_close(gathered, whole.grad / 2, rtol=1e-12, atol=1e-12)
    assert not torch.equal(gathered, torch.zeros_like(gathered))
    distributed.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_head_gets_the_mean_gradient_back_sharded(tmp_path: Path) -> None:
    spawn(_sharded, (str(tmp_path),), nprocs=2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["whole", "top", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_the_reference(dtype: torch.dtype, kind: str, compiled: bool) -> None:
    ours = _case(dtype, "cuda")
    reference = _in_float64(ours)
    teacher = _teacher(reference) if kind == "whole" else _stored(reference)[kind]
    for case in (ours, reference):
        case["hidden"].requires_grad_()
        case["head"].requires_grad_()
    moved = (
        _teacher(ours)
        if kind == "whole"
        else replace(teacher, **{name: t.cuda() for name, t in vars(teacher).items() if t is not None})
    )
    terms = _terms(ours, moved, compiled=compiled, chunk_rows=16)
    ce, kd = _reference(reference, teacher)
    torch.testing.assert_close(terms.ce.cpu().double(), ce.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms.kd.cpu().double(), kd.detach(), rtol=1e-4, atol=1e-4)
    terms.loss.backward()
    (0.3 * ce + 0.7 * kd).backward()
    for name in ("hidden", "head"):
        grad, exact = ours[name].grad, reference[name].grad
        assert grad is not None and exact is not None
        assert (grad.cpu().double() - exact).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * exact.norm()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_waits_once_a_call() -> None:
    case = _case(torch.float32, "cuda")
    case["hidden"].requires_grad_()
    _terms(case, chunk_rows=4)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as caught:
            _terms(case, chunk_rows=4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(caught) == 1


def test_cka_loss_is_zero_for_equal_states_and_differentiable() -> None:
    generator = torch.Generator().manual_seed(0)
    states = {i: torch.randn(2, 9, D, generator=generator, dtype=torch.float64) for i in (0, 3)}
    keep = torch.rand(2, 9, generator=generator) > 0.3
    assert cka_loss(states, states, keep).item() == pytest.approx(0, abs=1e-12)
    other = {i: torch.randn(2, 9, D, generator=generator, dtype=torch.float64) for i in (0, 3)}
    inputs = [states[0].requires_grad_(), states[3].requires_grad_()]
    assert torch.autograd.gradcheck(lambda a, b: cka_loss({0: a, 3: b}, other, keep), inputs)
    cka_loss(states, other, keep).backward()
    grad = inputs[0].grad
    assert grad is not None and (grad[~keep] == 0).all() and (grad[keep] != 0).any()


def test_cka_loss_refuses_layers_that_differ() -> None:
    state = torch.randn(1, 8, D)
    with pytest.raises(ValueError, match="same layers"):
        cka_loss({0: state}, {1: state}, torch.ones(1, 8, dtype=torch.bool))


def test_weight_falls_linearly_and_stays() -> None:
    weights = [falling_weight(step, 100, start=1.0, end=0.2, fraction=0.4) for step in (0, 20, 40, 41, 100)]
    assert weights == pytest.approx([1.0, 0.6, 0.2, 0.2, 0.2])
    assert falling_weight(0, 100, start=1.0, end=0.2, fraction=0.0) == 0.2
