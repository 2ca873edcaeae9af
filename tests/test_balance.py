"""Balance: each means moves the load as promised, against plain formulas; how a step is cut changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from litgpt.balance import ChoiceBias, balance_loss, let_go, z_loss
from litgpt.config import Config
from litgpt.model import GPT, LLaMAMoE, Routing
from litgpt.recipe import LossSettings
from litgpt.routing import RouterStats, expert_counts
from litgpt.utils import UserError
from tests.test_routing import cut, logits_of, routing_of
from tests.test_train_distill import flags, world  # noqa: F401

D, E, K, N = 16, 8, 2, 512


def layer(*, crowded: bool) -> tuple[LLaMAMoE, Tensor]:
    """A layer and tokens; crowded: two experts take nearly all."""
    config = Config.from_name("Qwen3-0.6B", n_embd=D, intermediate_size=8, n_layer=1).upcycled(E, K)
    generator = torch.Generator().manual_seed(0)
    moe = LLaMAMoE(config)
    x_ND = torch.randn(N, D, generator=generator) + 1.0
    with torch.no_grad():
        moe.gate.weight.normal_(0, 0.02, generator=generator)
        if crowded:
            moe.gate.weight[:2] += 0.1
    return moe, x_ND


def load(moe: LLaMAMoE, x_ND: Tensor) -> Tensor:
    with torch.no_grad():
        return moe.route(x_ND).expert_ids_NK.flatten().bincount(minlength=E).double()


def max_vio(load_E: Tensor) -> float:
    return float(load_E.max() / load_E.mean() - 1)


def test_switch_loss_balances_a_crowded_router() -> None:
    moe, x_ND = layer(crowded=True)
    before = max_vio(load(moe, x_ND))
    optimizer = torch.optim.SGD([moe.gate.weight], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        balance_loss({0: moe.route(x_ND)}, torch.ones(N, dtype=torch.bool)).backward()
        optimizer.step()
    after = load(moe, x_ND)
    assert before > 2.5 and max_vio(after) < 1.0 and int((after == 0).sum()) == 0


class TestChoiceBias:
    def model(self) -> tuple[GPT, LLaMAMoE, Tensor]:
        config = Config.from_name("Qwen3-0.6B", n_embd=D, intermediate_size=8, n_layer=1, padded_vocab_size=64)
        model = GPT(config.upcycled(E, K))
        moe, x_ND = layer(crowded=True)
        block = model.transformer.h[0].mlp
        assert isinstance(block, LLaMAMoE)
        block.load_state_dict(moe.state_dict())
        return model, block, x_ND

    def test_it_balances_without_any_gradient(self) -> None:
        model, moe, x_ND = self.model()
        weights = {name: p.clone() for name, p in model.named_parameters()}
        bias = ChoiceBias(model, rate=0.0005)
        before = load(moe, x_ND)
        assert max_vio(before) > 2.5 and int((before == 0).sum()) > 0
        for _ in range(400):
            bias.scale(1.0)
            bias.update(load(moe, x_ND)[None])
        after = load(moe, x_ND)
        assert max_vio(after) < 0.2 and int((after == 0).sum()) == 0
        assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
        assert not any("choice_bias" in name for name in model.state_dict())
        bias.scale(0.0)
        assert torch.equal(load(moe, x_ND), before)
        bias.remove()
        assert moe.choice_bias_E is None and torch.equal(load(moe, x_ND), before)

    def test_each_update_is_the_formula(self) -> None:
        model, _, _ = self.model()
        bias = ChoiceBias(model, rate=0.25)
        bias.update(torch.tensor([[9.0, 1, 4, 4, 4, 4, 4, 2]], dtype=torch.float64))
        assert bias.bias_LE.tolist() == [[-0.25, 0.25, 0, 0, 0, 0, 0, 0.25]]

    def test_weights_are_those_of_the_softmax(self) -> None:
        _, moe, x_ND = self.model()
        moe.choice_bias_E = torch.zeros(E).index_fill(0, torch.tensor([5]), 1.0)
        routing = moe.route(x_ND)
        p_NE = torch.nn.functional.linear(x_ND.double(), moe.gate.weight.double()).softmax(-1)
        assert bool((routing.expert_ids_NK == 5).any(1).all())
        chosen_NK = p_NE.gather(1, routing.expert_ids_NK)
        expected_NK = chosen_NK / chosen_NK.sum(1, keepdim=True)
        torch.testing.assert_close(routing.weights_NK.double(), expected_NK, rtol=1e-5, atol=1e-6)
        assert bool((routing.weights_NK[:, 0] >= routing.weights_NK[:, 1]).all())

    def test_a_bias_of_zero_changes_nothing(self) -> None:
        _, moe, x_ND = self.model()
        plain = moe.route(x_ND)
        moe.choice_bias_E = torch.zeros(E)
        assert all(torch.equal(a, b) for a, b in zip(plain, moe.route(x_ND), strict=True))

    def test_the_router_learns_through_the_weights(self) -> None:
        _, moe, x_ND = self.model()
        moe.choice_bias_E = torch.linspace(-0.1, 0.1, E)
        y_ND, _ = moe(x_ND)
        y_ND.square().sum().backward()
        assert moe.gate.weight.grad is not None and bool(moe.gate.weight.grad.any())

    def test_letting_go(self) -> None:
        assert [let_go(step, 11, 0.5) for step in (0, 5, 8, 10)] == pytest.approx([1.0, 1.0, 2 / 4.5, 0.0])
        assert let_go(0, 1, 0.0) == let_go(9, 10, 0.0) == 0.0


class TestZ:
    def test_value_and_gradient(self) -> None:
        logits = logits_of(3, 20, 5).double().requires_grad_()
        keep = torch.arange(20) % 4 != 1
        routing = {i: Routing(torch.zeros(20, 2).long(), torch.zeros(20, 2), x) for i, x in enumerate(logits)}
        expected = logits.exp().sum(-1).log()[:, keep].square().mean()
        ours = z_loss(routing, keep)
        torch.testing.assert_close(ours, expected)
        (theirs,) = torch.autograd.grad(expected, logits)
        (own,) = torch.autograd.grad(ours, logits)
        torch.testing.assert_close(own, theirs)
        assert z_loss(routing, torch.zeros(20, dtype=torch.bool)).item() == 0.0

    def test_it_makes_logits_small(self) -> None:
        moe, x_ND = layer(crowded=True)
        keep = torch.ones(N, dtype=torch.bool)
        with torch.no_grad():
            moe.gate.weight.mul_(20)
        optimizer = torch.optim.SGD([moe.gate.weight], lr=0.01)
        values = []
        for _ in range(100):
            optimizer.zero_grad()
            loss = z_loss({0: moe.route(x_ND)}, keep)
            loss.backward()
            optimizer.step()
            values.append(float(loss.detach()))
        # With uniform logits of zero it would be log² E.
        assert values[-1] < values[0] / 3 and values[-1] < 2 * math.log(E) ** 2

    @pytest.mark.parametrize("pieces", [[20], [7, 13], [1, 1, 18]])
    def test_micro_batches_add_up(self, pieces: list[int]) -> None:
        routing, keep = routing_of(logits_of(2, 20, 6)), torch.arange(20) % 3 != 0
        total, start = torch.zeros(()), 0
        for n in pieces:
            rows = slice(start, start + n)
            total = total + z_loss(cut(routing, rows), keep[rows], tokens=float(keep.sum()))
            start += n
        torch.testing.assert_close(total, z_loss(routing, keep))


class TestSettings:
    def test_schedule_of_the_weight(self) -> None:
        loss = LossSettings(router_weight=0.1, router_weight_end=0.0, router_fraction=0.5)
        assert [loss.router_weight_at(step, 10) for step in (0, 1, 5, 9)] == pytest.approx([0.1, 0.08, 0.0, 0.0])
        assert LossSettings(router_weight=0.3).router_weight_at(7, 10) == 0.3

    @pytest.mark.parametrize(
        "wrong", [{"z_weight": -1.0}, {"bias_rate": -0.1}, {"bias_fraction": 1.0}, {"router_weight_end": -0.1}]
    )
    def test_refusals(self, wrong: dict[str, float]) -> None:
        with pytest.raises(UserError, match=next(iter(wrong))):
            LossSettings(**wrong)  # type: ignore[arg-type]


def test_statistics_follow_a_biased_choice() -> None:
    moe, x_ND = layer(crowded=False)
    moe.choice_bias_E = torch.zeros(E).index_fill(0, torch.tensor([3]), 9.0)
    routing = {0: moe.route(x_ND)}
    stats = RouterStats()
    stats.update(routing)
    assert stats.results()[0].share_E[3] == 0.5
    assert expert_counts(routing, torch.ones(N, dtype=torch.bool))[0, 3] == N
