"""Where the router sends its tokens: how often each expert was chosen, statistics, what changed since another moment.

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


COLD_SHARE = 0.1
"""An expert is cold if it gets less than this part of an even share: it hardly learns, though it is not dead."""


class LayerStats(NamedTuple):
    """What the router of one layer did, over all tokens seen."""

    layer: int
    share_E: tuple[float, ...]
    """Each expert's share of the choices; sums to 1."""
    max_over_mean: float
    """How much busier the busiest expert is than the average: 1 is balance, E/K or more is collapse."""
    max_vio_batch: float
    """max/mean - 1 of each batch, mean over batches: never below the global one, which lets batches differ."""
    idle: int
    """Experts that no token chose (dead)."""
    cold: int
    """Experts with less than `COLD_SHARE` of an even share, the dead ones among them."""
    top1_weight: float
    """Mean weight of a token's first expert after renormalisation: 1/K is indifference, 1 is certainty."""
    entropy: float
    """Mean entropy of a token's probabilities over all experts, divided by log E: 1 is indifference, 0 certainty."""
    entropy_of_mean: float
    """Entropy of the mean probabilities, divided by log E: 1 is a balance that single tokens need not have."""
    z: float
    """Mean of logsumexp(logits)²: how large the logits grow."""
    together_EE: tuple[tuple[float, ...], ...]
    """Share of the tokens that chose both; on the diagonal, of those that chose the one."""

    @property
    def max_vio(self) -> float:
        """MaxVio, max/mean - 1 over all tokens (Wang et al. 2024, arXiv 2408.15664): 0 is balance."""
        return self.max_over_mean - 1

    def figures(self) -> dict[str, float]:
        """The numbers of a layer that are no tables, by name."""
        names = ("max_vio", "max_vio_batch", "entropy", "entropy_of_mean", "cold", "top1_weight", "z")
        return {name: getattr(self, name) for name in names} | {"dead": self.idle}


class RouterStats:
    """Sums over forward passes; `sums_LX` [L, 2E + E² + 6] is the whole state and may be added up over ranks."""

    def __init__(self) -> None:
        self.layers: tuple[int, ...] = ()
        self.n_expert = 0
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
        load_LE = expert_counts(routing, keep_N)
        mean_L1 = load_LE.mean(1, keepdim=True)
        # Of a batch that is all padding there is no violation.
        vio_L1 = torch.where(mean_L1 > 0, load_LE.amax(1, keepdim=True) / mean_L1.clamp(min=1e-9) - 1, 0)
        tokens_L1 = keep_N.sum().double().expand(len(routing), 1)
        rows = []
        for routed in routing.values():
            log_p_NE = routed.logits_NE.log_softmax(-1)
            p_NE = log_p_NE.exp()
            chosen_NE = torch.zeros_like(routed.logits_NE).scatter_(1, routed.expert_ids_NK, 1.0) * keep_N[:, None]
            per_token_N3 = torch.stack(
                (routed.weights_NK[:, 0], -(p_NE * log_p_NE).sum(-1), routed.logits_NE.logsumexp(-1).square()), dim=1
            )
            # Whole numbers below 2^24 are exact in fp32.
            parts = ((p_NE * keep_N[:, None]).double().sum(0), (chosen_NE.T @ chosen_NE).double().flatten())
            rows.append(torch.cat((*parts, (per_token_N3.double() * keep_N[:, None]).sum(0))))
        batch_L1 = (tokens_L1 > 0).double()
        sums_LX = torch.cat([load_LE, torch.stack(rows), vio_L1, batch_L1, tokens_L1], dim=1)
        self.sums_LX = sums_LX if not self.layers else self.sums_LX + sums_LX
        self.layers, self.n_expert = tuple(routing), load_LE.size(1)

    def results(self) -> list[LayerStats]:
        """One entry per layer; empty before the first token."""
        return [self._result(*row) for row in zip(self.layers, self.sums_LX.tolist(), strict=True) if row[1][-1] > 0]

    def _result(self, layer: int, sums_X: list[float]) -> LayerStats:
        E = self.n_expert
        load_E, p_E, together, rest = sums_X[:E], sums_X[E : 2 * E], sums_X[2 * E : 2 * E + E * E], sums_X[-6:]
        top1, entropy, z, vio, batches, tokens = rest
        mean, log_E = sum(load_E) / E, math.log(E) if E > 1 else math.inf
        mean_p_E = [p / tokens for p in p_E]
        return LayerStats(
            layer=layer,
            share_E=tuple(load / sum(load_E) for load in load_E),
            max_over_mean=max(load_E) / mean,
            max_vio_batch=vio / batches,
            idle=load_E.count(0.0),
            cold=sum(load < COLD_SHARE * mean for load in load_E),
            top1_weight=top1 / tokens,
            entropy=entropy / tokens / log_E,
            entropy_of_mean=-sum(p * math.log(p) for p in mean_p_E if p > 0) / log_E,
            z=z / tokens,
            together_EE=tuple(tuple(n / tokens for n in together[e * E : (e + 1) * E]) for e in range(E)),
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


class Choices:
    """The experts that the first tokens of a data set choose, to be compared with those of another moment.

    Args:
        most: so many tokens are kept; the others of the set do not count.
    """

    def __init__(self, most: int = 4096) -> None:
        self.most = most
        self.ids: dict[int, list[Tensor]] = {}
        self._count = 0

    @torch.no_grad()
    def update(self, routing: Mapping[int, Routing], keep_N: Tensor) -> None:
        """Keep the choices of a forward pass, as long as there is room."""
        room = self.most - self._count
        if room <= 0:
            return
        for layer, routed in routing.items():
            self.ids.setdefault(layer, []).append(routed.expert_ids_NK[keep_N][:room].to("cpu", torch.int16))
        self._count += min(room, int(keep_N.sum()))

    def result(self) -> dict[int, Tensor]:
        """int16 [S, K] by layer."""
        return {layer: torch.cat(parts) for layer, parts in self.ids.items()}


class Changed(NamedTuple):
    """How many tokens go elsewhere than they did, as shares."""

    any: float
    """Another set of K experts."""
    top1: float
    """Another first expert."""


def routing_change(before: Mapping[int, Tensor], after: Mapping[int, Tensor]) -> dict[int, Changed]:
    """Compare two `Choices.result` of the same tokens, layer by layer.

    Raises:
        ValueError: other layers, tokens or K.
    """
    if {i: x.shape for i, x in before.items()} != {i: x.shape for i, x in after.items()}:
        raise ValueError("the choices are not of the same layers, tokens and experts per token")
    return {
        layer: Changed(
            any=float((ids_SK.sort(1).values != after[layer].sort(1).values).any(1).double().mean()),
            top1=float((ids_SK[:, 0] != after[layer][:, 0]).double().mean()),
        )
        for layer, ids_SK in before.items()
    }
