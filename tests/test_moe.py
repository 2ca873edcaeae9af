"""The mixture of experts against a naive float64 one: outputs, all gradients, idle and crowded experts, every dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import litgpt.model as model_module
from litgpt.config import Config
from litgpt.model import LLaMAMLP, LLaMAMoE, can_group, grouped_swiglu, looped_swiglu

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
RELATIVE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def moe_of(n_embd: int = 16, width: int = 24, n_expert: int = 4, k: int = 2, seed: int = 0) -> LLaMAMoE:
    config = Config.from_name("Qwen3-0.6B", n_embd=n_embd, intermediate_size=width).upcycled(n_expert, k)
    torch.manual_seed(seed)
    moe = LLaMAMoE(config)
    torch.nn.init.normal_(moe.gate.weight)
    return moe


def naive(x_ND: Tensor, gate_ED: Tensor, gate_up: Tensor, down: Tensor, k: int) -> Tensor:
    """Token by token, expert by expert."""
    rows = []
    for x in x_ND:
        probabilities, experts = (gate_ED @ x).softmax(0).topk(k)
        weights = probabilities / probabilities.sum()
        y = torch.zeros_like(x)
        for weight, e in zip(weights, experts.tolist(), strict=True):
            gate, up = (gate_up[e] @ x).chunk(2)
            y = y + weight * (down[e] @ (F.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_alone_gets_what_it_gets_among_others(dtype: torch.dtype, autocast: bool) -> None:
    """Decoding takes a shorter way."""
    moe = moe_of(n_embd=64, width=96, k=3).to(dtype)
    x = torch.randn(1, 9, 64, dtype=dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        together = moe(x)[0]
        for t in range(x.size(1)):
            alone, routing = moe(x[:, t : t + 1])
            assert alone.dtype == together.dtype and alone.shape == (1, 1, 64)
            assert routing.expert_ids_NK.shape == (1, 3)
            assert relative(alone[0, 0], together[0, t].double()) < RELATIVE[torch.bfloat16 if autocast else dtype]


def parameters_of(moe: LLaMAMoE) -> list[Tensor]:
    return [moe.gate.weight, moe.experts.gate_up_proj, moe.experts.down_proj]


def relative(ours: Tensor, expected: Tensor) -> float:
    return float((ours.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp(min=1e-30))


def check_against_naive(moe: LLaMAMoE, x_ND: Tensor, tolerance: float) -> None:
    """Outputs and gradients of everything. The reference reads the weights as rounded to the module's dtype."""
    seed_grad = torch.randn(x_ND.shape, generator=torch.Generator().manual_seed(9)).to(x_ND)
    x_ours = x_ND.clone().requires_grad_()
    y, _ = moe(x_ours[None])
    assert y.dtype == x_ND.dtype
    y[0].backward(seed_grad)
    wide = [t.detach().double().cpu().requires_grad_() for t in (x_ND, *parameters_of(moe))]
    expected = naive(wide[0], wide[1], wide[2], wide[3], moe.n_expert_per_token)
    expected.backward(seed_grad.double().cpu())
    assert relative(y[0].cpu(), expected) < tolerance
    names = ("x", "gate", "gate_up_proj", "down_proj")
    for name, ours, reference in zip(names, (x_ours, *parameters_of(moe)), wide, strict=True):
        assert ours.grad is not None and reference.grad is not None
        assert ours.grad.dtype == ours.dtype
        if name == "gate" and moe.n_expert_per_token == 1:
            assert ours.grad.norm() < 1e-4  # one weight, renormalised, is the constant 1
            continue
        assert relative(ours.grad.cpu(), reference.grad) < 2 * tolerance, name


def crowd(moe: LLaMAMoE, x_ND: Tensor, experts: list[int]) -> None:
    """Make every token choose exactly these experts: all tokens get one component in common, which the router reads."""
    with torch.no_grad():
        x_ND[:, 0] = 1
        moe.gate.weight *= 0.1
        moe.gate.weight[:, 0] = -6
        moe.gate.weight[experts, 0] = 6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", [[0, 1], [2, 5], [4, 5]])
def test_idle_and_crowded_experts(dtype: torch.dtype, chosen: list[int]) -> None:
    """All tokens in two of six experts: first, last, and in between."""
    moe = moe_of(n_expert=6).to(dtype)
    x = torch.randn(9, 16).to(dtype)
    crowd(moe, x, chosen)
    assert sorted(set(moe.route(x).expert_ids_NK.flatten().tolist())) == chosen
    check_against_naive(moe, x, RELATIVE[dtype])
    for weight in (moe.experts.gate_up_proj, moe.experts.down_proj):
        assert weight.grad is not None
        for e in range(6):
            assert bool(weight.grad[e].any()) == (e in chosen)


@settings(deadline=None, max_examples=40)
@given(
    n_tokens=st.integers(1, 12),
    n_embd=st.integers(1, 20),
    width=st.integers(1, 20),
    n_expert=st.integers(1, 9),
    data=st.data(),
    seed=st.integers(0, 99),
)
def test_any_shape(n_tokens: int, n_embd: int, width: int, n_expert: int, data: st.DataObject, seed: int) -> None:
    """Also sizes that grouped products refuse (rows that are not multiples of 16 bytes)."""
    k = data.draw(st.integers(1, n_expert))
    moe = moe_of(n_embd, width, n_expert, k, seed).double()
    check_against_naive(moe, torch.randn(n_tokens, n_embd).double(), 1e-10)
    single = moe.float()
    x = torch.randn(n_tokens, n_embd)
    y, _ = single(x[None])
    gate, gate_up, down = (p.double() for p in parameters_of(single))
    expected = naive(x.double(), gate, gate_up, down, k)
    gap = single.route(x).logits_NE.sort(dim=1, descending=True).values
    if k < n_expert and float((gap[:, k - 1] - gap[:, k]).detach().min()) < 1e-4:
        return  # a tie within rounding may be broken either way
    torch.testing.assert_close(y[0].double(), expected, atol=1e-4, rtol=1e-4)


@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    n_embd=st.sampled_from([8, 16, 40]),
    width=st.sampled_from([8, 24]),
)
@settings(deadline=None)
def test_grouped_equals_looped(counts: list[int], dtype: torch.dtype, n_embd: int, width: int) -> None:
    """Values and gradients, with experts that have no rows."""
    ends = torch.tensor(counts).cumsum(0).int()
    shapes = ((sum(counts), n_embd), (len(counts), 2 * width, n_embd), (len(counts), n_embd, width))
    leaves = [torch.randn(shape).mul_(0.3).to(dtype) for shape in shapes]
    results = []
    for swiglu in (looped_swiglu, grouped_swiglu):
        x, gate_up, down = (leaf.clone().requires_grad_() for leaf in leaves)
        y = swiglu(x, gate_up, down, ends)
        assert y.dtype == dtype
        y.backward(leaves[0])
        results.append([y, x.grad, gate_up.grad, down.grad])
    for looped, grouped in zip(*results, strict=True):
        assert looped is not None and grouped is not None
        assert relative(grouped, looped.double()) < RELATIVE[dtype]


def test_which_one_runs() -> None:
    def asked(dtype: torch.dtype, n_embd: int = 16, width: int = 24, device: str = "cpu", rows: int = 3) -> bool:
        x, down = torch.empty(rows, n_embd, dtype=dtype, device=device), torch.empty(4, n_embd, width, device=device)
        return can_group(x, down.to(dtype))

    assert asked(torch.float32) and asked(torch.bfloat16)
    assert not asked(torch.float64) and not asked(torch.bfloat16, width=12) and not asked(torch.float32, n_embd=18)
    many = (32 << 20) // (2 * 24 * 4) + 1
    assert asked(torch.float32, rows=many)
    with torch.no_grad():
        assert asked(torch.float32, rows=many - 1) and not asked(torch.float32, rows=many)
        assert asked(torch.float32, rows=many, device="meta")


def equal_experts(dtype: torch.dtype, n_expert: int = 8, k: int = 2) -> tuple[LLaMAMLP, LLaMAMoE]:
    config = Config.from_name("Qwen3-0.6B", n_embd=64, intermediate_size=96)
    torch.manual_seed(0)
    dense, moe = LLaMAMLP(config).to(dtype), LLaMAMoE(config.upcycled(n_expert, k)).to(dtype)
    with torch.no_grad():
        moe.experts.gate_up_proj.copy_(torch.cat([dense.fc_1.weight, dense.fc_2.weight]))
        moe.experts.down_proj.copy_(dense.proj.weight)
    return dense, moe


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-7)])
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_equal_experts_are_the_dense_mlp(
    dtype: torch.dtype, tolerance: float, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, moe = equal_experts(dtype, k=k)
    x = torch.randn(1, 200, 64, dtype=dtype)
    expected = dense(x)
    assert (moe(x)[0] - expected).norm() / expected.norm() < tolerance
    monkeypatch.setattr(model_module, "can_group", lambda *_: False)
    looped = moe(x)[0]
    assert (looped - expected).norm() / expected.norm() < tolerance


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_combine_adds_no_bfloat16_rounding(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the weights, averaging equal bf16 outputs returns them to the last bit."""
    _, moe = equal_experts(torch.bfloat16, k=k)
    moe.gate.weight.normal_()

    monkeypatch.setattr(model_module, "grouped_swiglu", lambda x_MD, gate_up, down, ends_E: F.silu(x_MD))
    x = torch.randn(1, 500, 64).bfloat16()
    assert torch.equal(moe(x)[0], F.silu(x))


@pytest.mark.parametrize("grad", [False, True])
def test_bfloat16_equal_experts_are_the_dense_mlp_bit_for_bit(grad: bool) -> None:
    dense, moe = equal_experts(torch.bfloat16)
    x = torch.randn(1, 200, 64).bfloat16()
    with torch.set_grad_enabled(grad):
        assert (moe(x)[0] == dense(x)).float().mean() > 0.99  # the products themselves may round a few elements apart


def test_router_is_fp32_and_outside_autocast() -> None:
    moe = moe_of(n_embd=64, width=32, n_expert=8)
    x = torch.randn(1, 50, 64)
    plain = moe.route(x[0])
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = moe(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(routing.logits_NE, plain.logits_NE)
    assert torch.equal(routing.weights_NK, plain.weights_NK)
    y.float().square().sum().backward()
    reference = [p.detach().double().requires_grad_() for p in parameters_of(moe)]
    naive(x[0].double(), reference[0], reference[1], reference[2], 2).square().sum().backward()
    for p, wide in zip(parameters_of(moe), reference, strict=True):
        assert p.grad is not None and wide.grad is not None
        assert p.grad.dtype == torch.float32
        assert relative(p.grad, wide.grad) < 3e-2
    routing = moe.bfloat16().route(x[0].bfloat16())
    assert routing.logits_NE.dtype == routing.weights_NK.dtype == torch.float32


def test_routing_carries_gradients() -> None:
    moe = moe_of()
    x = torch.randn(1, 5, 16, requires_grad=True)
    _, routing = moe(x)
    routing.logits_NE.square().sum().backward()
    assert x.grad is not None and bool(x.grad.any())
    assert moe.gate.weight.grad is not None and bool(moe.gate.weight.grad.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_repeat(dtype: torch.dtype) -> None:
    moe = moe_of(n_embd=64, width=32, n_expert=8).to(dtype)
    x = torch.randn(1, 100, 64).to(dtype)

    def run() -> list[Tensor]:
        moe.zero_grad()
        leaf = x.clone().requires_grad_()
        y, _ = moe(leaf)
        y.square().sum().backward()
        return [y.detach(), *(t.grad.clone() for t in (leaf, *parameters_of(moe)) if t.grad is not None)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_batch_order_does_not_matter() -> None:
    """N is B·T in row-major order, and a token's output does not depend on its neighbours."""
    moe = moe_of()
    x = torch.randn(3, 4, 16)
    y, routing = moe(x)
    assert routing.logits_NE.shape == (12, 4)
    for b in range(3):
        for t in range(4):
            alone, alone_routing = moe(x[b, t][None, None])
            torch.testing.assert_close(alone[0, 0], y[b, t], atol=1e-6, rtol=1e-5)
            assert torch.equal(alone_routing.expert_ids_NK[0], routing.expert_ids_NK[4 * b + t])


def test_frozen_experts_get_no_gradient() -> None:
    moe = moe_of()
    moe.experts.requires_grad_(False)
    x = torch.randn(1, 6, 16, requires_grad=True)
    moe(x)[0].square().sum().backward()
    assert moe.experts.gate_up_proj.grad is None
    assert x.grad is not None and moe.gate.weight.grad is not None


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_tokens", [1, 33])
def test_cuda_equals_the_naive_mixture(dtype: torch.dtype, n_tokens: int) -> None:
    moe = moe_of(n_expert=6).to("cuda", dtype)
    check_against_naive(moe, torch.randn(n_tokens, 16).to("cuda", dtype), RELATIVE[dtype])
    x = torch.randn(9, 16).to("cuda", dtype)
    moe.zero_grad()
    crowd(moe, x, [2, 5])
    check_against_naive(moe, x, RELATIVE[dtype])


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_cuda_never_waits_for_the_device(how: str) -> None:
    """Forward and backward queue everything: no item(), no tolist(), no boolean mask."""
    moe = moe_of(n_embd=64, width=128, n_expert=8).cuda()
    x = torch.randn(2, 50, 64, device="cuda")
    if how == "bfloat16":
        moe, x = moe.bfloat16(), x.bfloat16()

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=how == "autocast"):
            y, routing = moe(x.requires_grad_())
        (y.float().square().mean() + routing.logits_NE.square().mean()).backward()

    run()  # the first call may initialise libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@needs_cuda
def test_cuda_bits_repeat() -> None:
    moe = moe_of(n_embd=64, width=128, n_expert=8).to("cuda", torch.bfloat16)
    x = torch.randn(2, 500, 64, device="cuda", dtype=torch.bfloat16)

    def run() -> list[Tensor]:
        moe.zero_grad()
        leaf = x.clone().requires_grad_()
        moe(leaf)[0].float().square().sum().backward()
        return [t.grad.clone() for t in (leaf, *parameters_of(moe)) if t.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
