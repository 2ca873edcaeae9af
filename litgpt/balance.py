"""What keeps a router's load even: the switch loss, a bias on the choice alone, and the z-loss on large logits.

Everything is per layer and over the whole optimizer step, all micro-batches of all ranks, without padding: balance
asked of every small batch would forbid experts to specialise (Qiu et al. 2025, arXiv 2501.11873).

Shapes as in `litgpt.model`: N tokens, E experts; L layers with experts, in the order of the routing's keys.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from litgpt.model import GPT, LLaMAMoE, Routing
from litgpt.routing import expert_counts


def balance_loss(
    routing: Mapping[int, Routing], keep_N: Tensor, *, load_LE: Tensor | None = None, tokens: float | None = None
) -> Tensor:
    """E · Σₑ fₑ Pₑ, averaged over layers: fₑ is expert e's share of the choices, Pₑ its mean probability.

    1 if all experts are chosen equally often, E if all tokens go to one expert. (transformers' loss is K times this.)
    Only P has a gradient. To balance a whole optimizer step rather than every micro-batch of it, which leaves experts
    room to specialise, hand in the step's load and token count: the losses of its micro-batches then add up to the
    step's loss exactly.

    Args:
        routing: of this micro-batch, with gradients.
        keep_N: bool, False for padding.
        load_LE: `expert_counts` of the whole step, over all micro-batches and ranks; `None`: of this micro-batch.
        tokens: kept tokens of the whole step; `None`: of this micro-batch.

    Returns:
        scalar fp32; 0 where nothing is kept.

    Source: Fedus et al. 2022 (arXiv 2101.03961), eq. 4; the load of a whole step: Qiu et al. 2025 (arXiv 2501.11873).
    """
    if load_LE is None:
        load_LE = expert_counts(routing, keep_N)
    n_tokens = keep_N.sum().clamp(min=1) if tokens is None else max(tokens, 1.0)
    logits_LNE = torch.stack([routed.logits_NE for routed in routing.values()])
    probability_LE = (logits_LNE.softmax(-1) * keep_N[:, None]).sum(1) / n_tokens
    share_LE = (load_LE / load_LE.sum(1, keepdim=True).clamp(min=1)).to(probability_LE.dtype)
    return share_LE.size(1) * (share_LE * probability_LE).sum(1).mean()


def z_loss(routing: Mapping[int, Routing], keep_N: Tensor, *, tokens: float | None = None) -> Tensor:
    """Mean over tokens and layers of logsumexp(logits)²: pulls the router's logits towards small ones.

    Args:
        routing: of this micro-batch, with gradients.
        keep_N: bool, False for padding.
        tokens: kept tokens of the whole step; `None`: of this micro-batch. The losses of a step's micro-batches then
            add up to the step's.

    Returns:
        scalar fp32; 0 where nothing is kept.

    Source: Zoph et al. 2022, ST-MoE (arXiv 2202.08906), eq. 5.
    """
    n_tokens = keep_N.sum().clamp(min=1) if tokens is None else max(tokens, 1.0)
    squares_LN = torch.stack([routed.logits_NE.logsumexp(-1).square() for routed in routing.values()])
    return (squares_LN * keep_N).sum(1).mean() / n_tokens


class ChoiceBias:
    """A number for each expert that is added to its probability when experts are chosen, and nowhere else.

    After each step the experts with more than the mean load lose `rate`, the others gain it: b ← b + rate · sign(mean -
    load). The weights of the combine stay the softmax's, so nothing is added to the loss. The source adds it to the
    gate's scores after their activation, so here to the softmax's probabilities; `rate` is in their unit.

    No exported format holds it. It must be let go before the end (`scale` falls to 0), and what the load does then is
    up to what the router has learnt.

    Source: Wang et al. 2024, Auxiliary-Loss-Free Load Balancing (arXiv 2408.15664), algorithm 1.

    Args:
        student: a mixture of experts; its layers get a buffer that no checkpoint of theirs holds.
        rate: of an update.
    """

    def __init__(self, student: GPT, rate: float) -> None:
        self.rate = rate
        self._layers = [block.mlp for block in student.transformer.h if isinstance(block.mlp, LLaMAMoE)]
        self.bias_LE = torch.stack([torch.zeros_like(layer.gate.weight[:, 0].detach()) for layer in self._layers])
        for layer, bias_E in zip(self._layers, self.bias_LE, strict=True):
            layer.choice_bias_E = bias_E.clone()

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Let the next choices be made with so much of the bias."""
        for layer, bias_E in zip(self._layers, self.bias_LE, strict=True):
            assert layer.choice_bias_E is not None
            layer.choice_bias_E.copy_(bias_E * factor)

    @torch.no_grad()
    def update(self, load_LE: Tensor) -> None:
        """Move it against the load of a whole step, [L, E], the same on all ranks."""
        self.bias_LE += self.rate * (load_LE.mean(1, keepdim=True) - load_LE).sign().to(self.bias_LE)

    def remove(self) -> None:
        """Choose by the probabilities alone from now on."""
        for layer in self._layers:
            layer.choice_bias_E = None


def let_go(step: int, total_steps: int, fraction: float) -> float:
    """How much of the bias is in force at a step (from 0): all, and from `fraction` of training on less, linearly.

    At the last step it is none, so that what is left was trained as it will be used.
    """
    begin, last = fraction * total_steps, total_steps - 1
    return 1.0 if step < begin else (last - step) / max(last - begin, 1e-9)
