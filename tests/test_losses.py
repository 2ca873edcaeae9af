"""The losses against plain autograd references in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.losses import Teacher, cka_loss, distill_terms, falling_weight

N, D, C, V, V_TEACHER, SHARED = 37, 12, 20, 50, 48, 45


def _case(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows_N = torch.full((N,), -1)
    kd_rows = torch.randperm(N, generator=generator)[:15].sort().values
    rows_N[kd_rows] = torch.randperm(21, generator=generator)[:15]
    weight_N = (torch.rand(N, generator=generator) > 0.4).to(dtype) * 0.5
    weight_N[kd_rows[:5]] = 0.0  # rows with KD and no CE
    return {
        "hidden": randn(N, D),
        "head": randn(V, D),
        "targets": torch.randint(V, (N,), generator=generator),
        "weight": weight_N,
        "teacher_hidden": randn(21, C),
        "teacher_head": randn(V_TEACHER, C),
        "rows": rows_N,
    }


def _reference(case: dict[str, Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """The two sums from dense logits, written out."""
    logits = case["hidden"] @ case["head"].T
    ce = (F.cross_entropy(logits, case["targets"], reduction="none") * case["weight"]).sum()
    kd = torch.zeros((), dtype=torch.float64)
    for n in range(N):
        m = int(case["rows"][n])
        if m < 0:
            continue
        p = torch.softmax((case["teacher_head"] @ case["teacher_hidden"][m])[:SHARED] / temperature, 0)
        q = torch.softmax(logits[n, :SHARED] / temperature, 0)
        kd = kd + temperature**2 * sum(p[v] * (p[v] / q[v]).log() for v in range(SHARED))
    return ce, kd


def _terms(case: dict[str, Tensor], **options: object):  # type: ignore[no-untyped-def]
    teacher = Teacher(case["teacher_hidden"], case["teacher_head"], case["rows"])
    arguments = [case[name] for name in ("hidden", "head", "targets", "weight")]
    return distill_terms(*arguments, teacher=teacher, shared_vocab_size=SHARED, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk_rows", [1, 7, 16, 1000])
def test_values_and_gradients_equal_the_dense_reference(temperature: float, chunk_rows: int) -> None:
    ours, reference = _case(), _case()
    for case in (ours, reference):
        case["hidden"].requires_grad_()
        case["head"].requires_grad_()
    terms = _terms(ours, temperature=temperature, chunk_rows=chunk_rows)
    ce, kd = _reference(reference, temperature)
    torch.testing.assert_close(terms.ce, ce, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.kd, kd, rtol=1e-12, atol=1e-12)
    (0.3 * terms.ce + 0.7 * terms.kd).backward()
    (0.3 * ce + 0.7 * kd).backward()
    for name in ("hidden", "head"):
        torch.testing.assert_close(ours[name].grad, reference[name].grad, rtol=1e-11, atol=1e-12)


def test_low_precision_inputs_are_scored_in_fp32() -> None:
    exact = _case(torch.bfloat16)
    terms = _terms(exact)
    ce, kd = _reference({k: v.double() if v.is_floating_point() else v for k, v in exact.items()}, 1.0)
    assert terms.ce.dtype == torch.float32
    torch.testing.assert_close(terms.ce.double(), ce, rtol=1e-5, atol=1e-4)
    # The teacher's own logits are bf16, as the teacher itself would predict.
    torch.testing.assert_close(terms.kd.double(), kd, rtol=3e-2, atol=1e-2)


def test_rows_are_reported_and_add_up() -> None:
    case = _case()
    terms = _terms(case)
    torch.testing.assert_close((terms.ce_N * case["weight"]).sum(), terms.ce)
    torch.testing.assert_close(terms.kd_N.sum(), terms.kd)
    assert (terms.ce_N[case["weight"] == 0] == 0).all()
    assert (terms.kd_N[case["rows"] < 0] == 0).all()


def test_kd_direction_by_hand() -> None:
    # KL(p ‖ q) with p = (3/4, 1/4), q = (1/2, 1/2): 3/4 ln 3/2 + 1/4 ln 1/2; the reverse would be 0.1438.
    hidden = torch.ones(1, 1, dtype=torch.float64)
    teacher = Teacher(hidden, torch.tensor([[3.0], [1.0]], dtype=torch.float64).log(), torch.tensor([0]))
    head = torch.zeros(2, 1, dtype=torch.float64)
    terms = distill_terms(hidden, head, torch.tensor([0]), torch.zeros(1), teacher=teacher)
    assert terms.kd.item() == pytest.approx(0.1308120359, abs=1e-9)


def test_kd_of_a_model_with_itself_is_zero_with_zero_gradient() -> None:
    case = _case()
    hidden = case["hidden"].clone().requires_grad_()
    teacher = Teacher(case["hidden"], case["head"], torch.arange(N))
    terms = distill_terms(hidden, case["head"], case["targets"], torch.zeros(N), teacher=teacher)
    terms.kd.backward()
    assert terms.kd.item() == pytest.approx(0, abs=1e-12)
    assert hidden.grad is not None and hidden.grad.abs().max() < 1e-12


def test_rows_without_kd_get_exactly_zero_kd_gradient() -> None:
    case = _case()
    case["hidden"].requires_grad_()
    _terms(case).kd.backward()
    grad = case["hidden"].grad
    assert grad is not None
    assert (grad[case["rows"] < 0] == 0).all()
    assert (grad[case["rows"] >= 0].abs().sum(1) > 0).all()


def test_ids_past_the_shared_vocabulary_never_enter_the_kd_term() -> None:
    case, changed = _case(), _case()
    changed["head"][SHARED:] += 100.0
    changed["teacher_head"][SHARED:] -= 100.0
    torch.testing.assert_close(_terms(case).kd, _terms(changed).kd, rtol=0, atol=0)


def test_nothing_to_score_is_zero_and_finite() -> None:
    case = _case()
    case["hidden"].requires_grad_()
    terms = distill_terms(case["hidden"], case["head"], case["targets"], torch.zeros(N))
    assert terms.ce.item() == 0 and terms.kd.item() == 0
    empty = distill_terms(case["hidden"][:0], case["head"], case["targets"][:0], torch.zeros(0))
    assert empty.ce.item() == 0


@pytest.mark.parametrize("broken", ["targets", "weight", "rows"])
def test_lengths_that_differ_are_refused(broken: str) -> None:
    case = _case()
    case[broken] = case[broken][:-1]
    with pytest.raises(ValueError, match="one entry for each"):
        _terms(case)


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
