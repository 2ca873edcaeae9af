"""How far experts have moved: cosines of their weights with each other and with the dense FFN they were made of.

Experts that were copies begin at 1 with each other and with the base; where that is still so after training, nothing
has specialised (He et al. 2024, arXiv 2410.07524, found 0.6 to 0.7 after good upcycling and about 1 after bad).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from litgpt.keymap import BlockId
from litgpt.stored import Stored
from litgpt.utils import UserError, progress

_DENSE = {"expert_gate": "gate", "expert_up": "up", "expert_down": "down"}


@dataclass(frozen=True)
class ExpertCosines:
    """One layer's experts, each as one vector of its three matrices."""

    layer: int
    expert_EE: list[list[float]]
    """Cosine of each two experts."""
    base_E: list[float] | None
    """Cosine of each with the base's FFN; `None` without a base, or where an expert is not as wide as the FFN."""

    @property
    def mean(self) -> float | None:
        """Over the pairs of different experts; `None` for a single expert."""
        E = len(self.expert_EE)
        pairs = [self.expert_EE[i][j] for i in range(E) for j in range(i)]
        return sum(pairs) / len(pairs) if pairs else None


def expert_cosines(made: Stored, base: Stored | None = None) -> list[ExpertCosines]:
    """Cosines layer by layer, with one matrix of all experts of one layer in memory.

    Args:
        made: a mixture of experts.
        base: the dense model it was made of.

    Raises:
        UserError: the first is dense, or the base has other sizes.
    """
    config = made.config
    if not config.is_moe:
        raise UserError(f"{made.directory} ({config.name}) is dense: it has no experts")
    if base is not None and (base.config.n_layer, base.config.n_embd) != (config.n_layer, config.n_embd):
        raise UserError(f"{base.directory} ({base.config.name}) has other sizes than {made.directory}: not its base")
    of_same_width = base is not None and base.config.intermediate_size == config.expert_size
    results = []
    for layer in progress(config.moe_layers, "experts' weights", unit="layer"):
        E = config.n_expert
        # With the base's FFN as one more vector.
        products = torch.zeros(E + 1, E + 1, dtype=torch.float64)
        for key, dense in _DENSE.items():
            vectors = [made.read(BlockId(key, layer, e)).flatten() for e in range(E)]
            zero = torch.zeros_like(vectors[0])
            vectors.append(base.read(BlockId(dense, layer)).flatten() if base is not None and of_same_width else zero)
            stack = torch.stack([vector.float() for vector in vectors])
            products += _gram(stack)
        norms = products.diagonal().sqrt()
        cosines = (products / (norms[:, None] * norms).clamp(min=1e-300)).clamp(-1, 1)
        results.append(
            ExpertCosines(layer, cosines[:E, :E].tolist(), cosines[E, :E].tolist() if of_same_width else None)
        )
    return results


def _gram(stack_EX: Tensor) -> Tensor:
    """Inner products of the rows, fp64 sums of fp32 pieces: a million equal terms would lose digits."""
    pieces = stack_EX.split(1 << 16, dim=1)
    return sum((piece @ piece.T).double() for piece in pieces)
