"""Router statistics and the balance loss, against transformers' and against counting by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from litgpt.balance import balance_loss
from litgpt.model import Routing
from litgpt.routing import RouterStats, expert_counts


def routing_of(logits_LNE: Tensor, k: int = 2) -> dict[int, Routing]:
    routing = {}
    for i, logits_NE in enumerate(logits_LNE):
        weights, ids = logits_NE.softmax(-1).topk(k)
        routing[i] = Routing(ids, weights / weights.sum(-1, keepdim=True), logits_NE)
    return routing


def cut(routing: dict[int, Routing], rows: slice) -> dict[int, Routing]:
    return {i: Routing(*(x[rows] for x in routed)) for i, routed in routing.items()}


def logits_of(n_layer: int = 3, n_tokens: int = 20, n_expert: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(n_layer, n_tokens, n_expert, generator=torch.Generator().manual_seed(seed))


def test_counts() -> None:
    routing = routing_of(logits_of())
    keep = torch.arange(20) % 3 != 0
    counts = expert_counts(routing, keep)
    assert counts.dtype == torch.float64
    for i, routed in routing.items():
        expected = routed.expert_ids_NK[keep].flatten().bincount(minlength=5)
        assert counts[i].tolist() == expected.tolist()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_loss_equals_transformers_layer_by_layer(k: int) -> None:
    """Theirs, asked for one layer at a time, is K times ours."""
    logits = logits_of()
    expected = sum(load_balancing_loss_func((layer,), 5, k) / k for layer in logits) / 3
    ours = balance_loss(routing_of(logits, k), torch.ones(20, dtype=torch.bool))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected)


def test_padding_does_not_count() -> None:
    logits = logits_of().requires_grad_()
    keep = torch.tensor([True] * 13 + [False] * 7)
    loss = balance_loss(routing_of(logits), keep)
    torch.testing.assert_close(loss, balance_loss(routing_of(logits[:, :13]), keep[:13]))
    theirs = load_balancing_loss_func((logits[0].detach(),), 5, 2, keep.long()[None])
    torch.testing.assert_close(balance_loss(routing_of(logits[:1]), keep), theirs / 2)
    loss.backward()
    assert logits.grad is not None
    assert bool(logits.grad[:, :13].any()) and not bool(logits.grad[:, 13:].any())
    assert balance_loss(routing_of(logits), torch.zeros(20, dtype=torch.bool)).item() == 0.0


def test_bounds() -> None:
    balanced = torch.eye(4).repeat(1, 3, 1)[0].roll(1, 0)[None] * 50
    keep = torch.ones(12, dtype=torch.bool)
    torch.testing.assert_close(balance_loss(routing_of(balanced, 1), keep), torch.tensor(1.0))
    collapsed = torch.zeros(1, 12, 4)
    collapsed[..., 2] = 50
    torch.testing.assert_close(balance_loss(routing_of(collapsed, 1), keep), torch.tensor(4.0))


def test_layers_do_not_cancel() -> None:
    """Two layers that collapse onto different experts are no better than two that collapse onto the same."""
    same, different = torch.zeros(2, 8, 2), torch.zeros(2, 8, 2)
    same[..., 0] = 9
    different[0, :, 0] = different[1, :, 1] = 9
    keep = torch.ones(8, dtype=torch.bool)
    torch.testing.assert_close(balance_loss(routing_of(same, 1), keep), balance_loss(routing_of(different, 1), keep))


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 99))
def test_micro_batches_add_up_to_the_step(pieces: list[int], seed: int) -> None:
    """Value and gradient, however the step is cut."""
    n_tokens = sum(pieces)
    whole = logits_of(2, n_tokens, 6, seed).requires_grad_()
    keep = torch.rand(n_tokens, generator=torch.Generator().manual_seed(seed)) < 0.8
    balance_loss(routing_of(whole), keep).backward()
    parts = whole.detach().clone().requires_grad_()
    routing = routing_of(parts)
    load = expert_counts(routing, keep)
    total, start = torch.zeros(()), 0
    for n in pieces:
        rows = slice(start, start + n)
        total = total + balance_loss(cut(routing, rows), keep[rows], load_LE=load, tokens=float(keep.sum()))
        start += n
    total.backward()
    torch.testing.assert_close(total, balance_loss(routing_of(whole), keep))
    torch.testing.assert_close(parts.grad, whole.grad, atol=1e-6, rtol=1e-4)


def test_stats() -> None:
    logits = logits_of(2, 20, 4)
    routing = routing_of(logits)
    keep = torch.arange(20) < 15
    stats = RouterStats()
    assert stats.results() == []
    for rows in (slice(0, 7), slice(7, 20)):
        stats.update(cut(routing, rows), keep[rows])
    assert len(stats.results()) == 2
    for i, result in enumerate(stats.results()):
        load = routing[i].expert_ids_NK[:15].flatten().bincount(minlength=4).double()
        assert result.layer == i
        assert result.share_E == pytest.approx((load / 30).tolist())
        assert result.max_over_mean == pytest.approx(float(load.max() / load.mean()))
        assert result.top1_weight == pytest.approx(float(routing[i].weights_NK[:15, 0].mean()), rel=1e-6)
        entropy = torch.distributions.Categorical(logits=logits[i, :15]).entropy().mean() / torch.tensor(4.0).log()
        assert result.entropy == pytest.approx(float(entropy), rel=1e-6)
        assert result.idle == int((load == 0).sum())


def test_stats_of_extremes() -> None:
    collapsed = torch.zeros(1, 6, 4)
    collapsed[..., 1] = 80
    stats = RouterStats()
    stats.update(routing_of(collapsed, 1))
    (result,) = stats.results()
    assert (result.share_E, result.max_over_mean, result.idle) == ((0.0, 1.0, 0.0, 0.0), 4.0, 3)
    assert (result.top1_weight, result.entropy) == (1.0, pytest.approx(0.0, abs=1e-6))
    single = RouterStats()
    single.update(routing_of(torch.zeros(1, 3, 1), 1))
    assert single.results()[0].entropy == 0.0
    uniform = RouterStats()
    uniform.update(routing_of(torch.zeros(1, 3, 4)))
    assert uniform.results()[0].entropy == pytest.approx(1.0)


def test_table() -> None:
    stats = RouterStats()
    assert stats.table().count("\n") == 1
    stats.update(routing_of(logits_of(2, 20, 3)))
    lines = stats.table().splitlines()
    assert lines[0] == "| layer | e0 % | e1 % | e2 % | max/mean | idle | top-1 weight | entropy |"
    assert len(lines) == 4
    assert all(line.count("|") == 9 for line in lines)


def test_other_models_are_refused() -> None:
    stats = RouterStats()
    with pytest.raises(ValueError, match="expected those of a MoE"):
        stats.update({})
    stats.update(routing_of(logits_of(2)))
    with pytest.raises(ValueError, match=r"routing of layers \(0, 1, 2\), expected \(0, 1\)"):
        stats.update(routing_of(logits_of(3)))
