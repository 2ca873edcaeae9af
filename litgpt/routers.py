"""How a fresh router starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from litgpt.recipes import seeded
from litgpt.stored import Stored
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError


@dataclass
class RouterStart:
    """How routers start."""

    start: Literal["normal"] = "normal"
    std: float = 0.02

    def __post_init__(self) -> None:
        if not (math.isfinite(self.std) and self.std > 0):
            raise UserError(
                f"router.std is {self.std}, expected above 0: a zero router gives all tokens the same experts"
            )


def router_weights(
    start: RouterStart, dense: Stored, tokenizer: Tokenizer, *, n_expert: int, layers: Sequence[int], seed: int
) -> dict[int, Tensor]:
    """fp32 [n_expert, D] by layer."""
    shape = (n_expert, dense.config.n_embd)
    return {
        layer: torch.randn(shape, generator=seeded(seed, f"transformer.h.{layer}.mlp.gate.weight")) * start.std
        for layer in layers
    }
