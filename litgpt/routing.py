"""Where the router sends its tokens: how often each expert was chosen, the loss that keeps them balanced, statistics.

Everything is per layer, in fp32 or wider, without padding, and without waiting for the device. One layer's crowding
never cancels against another's, as it does in a loss over all layers at once.

Shapes as in `litgpt.model`: N tokens, E experts, K experts per token; L layers in the order of the routing's keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from litgpt.model import Routing


def expert_counts(routing: Mapping[int, Routing], keep_N: Tensor) -> Tensor:
    """How many tokens each layer gave to each expert.

    Args:
        routing: of a forward pass.
        keep_N: bool, False for padding.

    Returns:
        fp64 [L, E] (whole numbers; sums over micro-batches and ranks stay exact). A token counts K times, once for
        each of its experts.
    """
    if not routing:  # of a dense model
        return torch.zeros(0, 0, dtype=torch.float64, device=keep_N.device)
    ids_LNK = torch.stack([routed.expert_ids_NK for routed in routing.values()])
    kept_LNK = keep_N.double()[:, None].expand_as(ids_LNK)
    n_expert = next(iter(routing.values())).logits_NE.size(-1)
    counts_LE = torch.zeros(len(routing), n_expert, dtype=torch.float64, device=ids_LNK.device)
    return counts_LE.scatter_add_(1, ids_LNK.flatten(1), kept_LNK.flatten(1))


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


class LayerStats(NamedTuple):
    """What the router of one layer did, over all tokens seen."""

    layer: int
    share_E: tuple[float, ...]
    """Each expert's share of the choices; sums to 1."""
    max_over_mean: float
    """How much busier the busiest expert is than the average: 1 is balance, E/K or more is collapse."""
    idle: int
    """Experts that no token chose."""
    top1_weight: float
    """Mean weight of a token's first expert after renormalisation: 1/K is indifference, 1 is certainty."""
    entropy: float
    """Mean entropy of a token's probabilities over all experts, divided by log E: 1 is indifference, 0 certainty."""


class RouterStats:
    """Sums over forward passes; `sums_LX` [L, E + 3] is the whole state and may be added up over ranks."""

    def __init__(self) -> None:
        self.layers: tuple[int, ...] = ()
        self.sums_LX: Tensor = torch.zeros(0)

    @torch.no_grad()
    def update(self, routing: Mapping[int, Routing], keep_N: Tensor | None = None) -> None:
        """Add one forward pass.

        Args:
            routing: from `Output.routing`.
            keep_N: bool, False for padding; `None` keeps all.

        Raises:
            ValueError: the model is dense, or not the same as before.
        """
        if not routing or self.layers not in ((), tuple(routing)):
            raise ValueError(f"routing of layers {tuple(routing)}, expected {self.layers or 'those of a MoE'}")
        first = next(iter(routing.values()))
        keep_N = torch.ones_like(first.logits_NE[:, 0], dtype=torch.bool) if keep_N is None else keep_N
        log_p_LNE = torch.stack([routed.logits_NE for routed in routing.values()]).log_softmax(-1)
        entropy_LN = -(log_p_LNE.exp() * log_p_LNE).sum(-1)
        top1_LN = torch.stack([routed.weights_NK[:, 0] for routed in routing.values()])
        means_LX = torch.stack([(x_LN.double() * keep_N).sum(1) for x_LN in (top1_LN, entropy_LN)], dim=1)
        tokens_LX = keep_N.sum().double().expand(len(routing), 1)
        sums_LX = torch.cat([expert_counts(routing, keep_N), means_LX, tokens_LX], dim=1)
        self.sums_LX = sums_LX if not self.layers else self.sums_LX + sums_LX
        self.layers = tuple(routing)

    def results(self) -> list[LayerStats]:
        """One entry per layer; empty before the first token."""
        return [self._result(*row) for row in zip(self.layers, self.sums_LX.tolist(), strict=True) if row[1][-1] > 0]

    @staticmethod
    def _result(layer: int, sums_X: list[float]) -> LayerStats:
        *load_E, top1, entropy, tokens = sums_X
        mean = sum(load_E) / len(load_E)
        return LayerStats(
            layer=layer,
            share_E=tuple(load / sum(load_E) for load in load_E),
            max_over_mean=max(load_E) / mean,
            idle=load_E.count(0.0),
            top1_weight=top1 / tokens,
            entropy=entropy / tokens / math.log(len(load_E)) if len(load_E) > 1 else 0.0,
        )

    def table(self) -> str:
        """The results as a Markdown table, one row a layer; shares in per cent."""
        results = self.results()
        experts = range(len(results[0].share_E) if results else 0)
        head = ["layer", *(f"e{e} %" for e in experts), "max/mean", "idle", "top-1 weight", "entropy"]
        rows = [
            [
                str(r.layer),
                *(f"{100 * share:.1f}" for share in r.share_E),
                f"{r.max_over_mean:.2f}",
                str(r.idle),
                f"{r.top1_weight:.3f}",
                f"{r.entropy:.3f}",
            ]
            for r in results
        ]
        lines = [head, ["---:"] * len(head), *rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
