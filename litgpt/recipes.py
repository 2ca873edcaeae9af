"""How each expert is made of the dense FFN: five recipes for a mixture of experts, and one for a wider dense model.

A dense FFN is y = W_d (silu(W_g x) · W_u x) with W_g, W_u [F, D] and W_d [D, F]; its F columns of W_d belong to the F
rows of W_g and W_u, the neurons. E experts a layer, K a token; the router's weights w of the K chosen sum to 1.

| recipe | expert e | at step 0 |
|---|---|---|
| copy | W | equal to the dense model |
| noise | W + σ·std(W)·N(0, 1), drawn for each matrix of each expert | near it |
| drop | r·F neurons replaced by N(mean, std) of what they replace | far from it: made for long training |
| granular | neurons of shard g of G, W_d times G | equal, where G is a power of two |
| shared | W_g, W_u, and W_d = 0, beside the dense FFN as a shared expert | equal |

Nothing is kept between calls: a matrix follows from the dense one, its place and the seed, so a proof can make it again
and compare the bits.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from litgpt.config import Config
from litgpt.keymap import BlockId
from litgpt.utils import UserError

_MATRIX = {
    **{"expert_gate": "gate", "expert_up": "up", "expert_down": "down"},
    **{"shared_gate": "gate", "shared_up": "up", "shared_down": "down"},
}


def seeded(seed: int, name: str) -> torch.Generator:
    """A stream of its own for each name; hashed, since neighbouring seeds must not share streams of other names."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    # torch's CPU generator is seeded with 32 bits; more would be cut off.
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def origin(block: BlockId) -> BlockId:
    """The dense model's block that a block of the made model comes from; a router's does not exist."""
    return BlockId(_MATRIX.get(block.key, block.key), block.layer)


@dataclass(frozen=True)
class Recipe:
    """`copy`: every expert is the dense FFN, so their weighted mean is, too, whatever the router says.

    Source: Komatsuzaki et al. 2022, Sparse Upcycling (arXiv 2212.05055); with renormalised weights it is exact.
    """

    name: ClassVar[str] = "copy"

    @property
    def exact(self) -> bool:
        """Whether the made model is the dense one's function up to rounding."""
        return True

    @property
    def granularity(self) -> int:
        """How many finer experts share one row of the router as it starts."""
        return 1

    def config(
        self, dense: Config, n_expert: int, n_expert_per_token: int, layers: Collection[int] | None = None
    ) -> Config:
        """What the dense model becomes; arguments and errors as of `Config.upcycled`."""
        return dense.upcycled(n_expert, n_expert_per_token, layers=layers)

    def kind(self, block: BlockId) -> Hashable:
        """Blocks of the same origin and kind have the same bits, so they are made, and may be stored, once.

        `None` means: the origin itself, bit for bit.
        """
        return None

    def make(self, block: BlockId, dense: Tensor, seed: int) -> Tensor:
        """One block of the made model, in the dense one's dtype.

        Args:
            block: which.
            dense: its `origin`, [F, D] or [D, F] if it is a matrix of the FFN.
            seed: of everything drawn.
        """
        return dense

    def settings(self) -> dict[str, Any]:
        """Its name and numbers, plain, for `provenance.yaml`; `recipe_of` reads them."""
        return {"recipe": self.name, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Noise(Recipe):
    """`noise`: W_e = W + σ · std(W) · N(0, 1), for each of the three matrices; the experts differ from the first step.

    Source: the "randomness at initialisation" of Qwen1.5-MoE and the `noise_scale` of mergekit-moe.
    """

    name: ClassVar[str] = "noise"
    sigma: float = 0.01
    """Relative standard deviation."""

    def __post_init__(self) -> None:
        if not 0 < self.sigma <= 1:
            raise UserError(f"recipe noise: sigma is {self.sigma}, expected above 0 and at most 1")

    @property
    def exact(self) -> bool:
        return False

    def kind(self, block: BlockId) -> Hashable:
        return block.expert if block.key in _MATRIX else None

    def make(self, block: BlockId, dense: Tensor, seed: int) -> Tensor:
        if block.key not in _MATRIX:
            return dense
        wide = dense.to(torch.float32, copy=True)
        generator = seeded(seed, f"noise {block.key} {block.layer} {block.expert}")
        return wide.add_(_normal(wide.shape, generator), alpha=float(self.sigma * wide.std())).to(dense.dtype)


@dataclass(frozen=True)
class Drop(Recipe):
    """`drop`: a share r of the neurons starts anew, W[I] ~ N(mean(W[I]), std(W[I])²), the same neurons I in all three.

    I are rows of W_g and W_u and columns of W_d; mean and standard deviation are those of the slice that is replaced.
    Source: Nakamura et al. 2025, Drop-Upcycling (arXiv 2502.19261), section 3. It pays after very long training; at the
    start it costs most of what the layer knows.
    """

    name: ClassVar[str] = "drop"
    ratio: float = 0.1
    """Share r of the neurons that are replaced in each expert."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise UserError(f"recipe drop: ratio is {self.ratio}, expected above 0 and at most 1")

    @property
    def exact(self) -> bool:
        return False

    def kind(self, block: BlockId) -> Hashable:
        return block.expert if block.key in _MATRIX else None

    def make(self, block: BlockId, dense: Tensor, seed: int) -> Tensor:
        if block.key not in _MATRIX:
            return dense
        axis = 1 if _MATRIX[block.key] == "down" else 0
        width = dense.size(axis)
        # One draw for the three matrices of an expert: the name holds no matrix.
        order = torch.randperm(width, generator=seeded(seed, f"drop {block.layer} {block.expert}"))
        neurons = order[: max(1, round(self.ratio * width))]
        made = dense.to(torch.float32, copy=True)
        old = made.index_select(axis, neurons)
        new = _normal(old.shape, seeded(seed, f"drop {block.key} {block.layer} {block.expert}"))
        made.index_copy_(axis, neurons, new.mul_(old.std()).add_(old.mean()))
        return made.to(dense.dtype)


@dataclass(frozen=True)
class Granular(Recipe):
    """`granular`: each FFN is cut into G finer experts, E·G in all and K·G a token, at the same cost.

    Finer expert e·G + g holds neurons g·F/G … (g+1)·F/G - 1. The G of one e start with one and the same row of the
    router (a virtual group), so the K·G chosen are K whole groups, each expert with weight w_e / G. The G that this
    takes away goes into W_d, which is linear: Σ_g (w_e / G) · G · W_d,g h_g = w_e · FFN(x).

    A power of two is exact in every float format. (Scaling gate, up and down by G^(1/3) each, as Megatron-Core's
    upcycling does, is not exact: silu is not homogeneous.) Rows of the router that are equal make equal logits; an
    engine that computes these in bf16 may see two groups tie, and then mixes their parts at that token.
    Source of the virtual groups: He et al. 2024, Upcycling Large Language Models into MoE (arXiv 2410.07524), 3.2.
    """

    name: ClassVar[str] = "granular"
    parts: int = 2
    """G, finer experts that each FFN is cut into; divides its width."""

    def __post_init__(self) -> None:
        if self.parts < 2:
            raise UserError(f"recipe granular: granularity is {self.parts}, expected at least 2")

    @property
    def exact(self) -> bool:
        return self.parts & (self.parts - 1) == 0

    @property
    def granularity(self) -> int:
        return self.parts

    def config(
        self, dense: Config, n_expert: int, n_expert_per_token: int, layers: Collection[int] | None = None
    ) -> Config:
        return dense.upcycled(n_expert, n_expert_per_token, granularity=self.parts, layers=layers)

    def kind(self, block: BlockId) -> Hashable:
        return block.expert % self.parts if block.key in _MATRIX else None

    def make(self, block: BlockId, dense: Tensor, seed: int) -> Tensor:
        if block.key not in _MATRIX:
            return dense
        axis = 1 if _MATRIX[block.key] == "down" else 0
        shard = dense.chunk(self.parts, dim=axis)[block.expert % self.parts]
        return (shard.float() * self.parts).to(dense.dtype) if axis else shard.contiguous()


@dataclass(frozen=True)
class Shared(Recipe):
    """`shared`: the dense FFN stays as an expert that every token passes; routed experts start with W_d = 0.

    y = FFN(x) + Σ_k w_k · 0. Exact, and the router learns as soon as the experts' W_d are no longer 0: then its weights
    change the output, which those of equal experts do not. LitGPT's format holds it; Qwen3-MoE's and Mixtral's do not.
    Source: the residual form of Rajbhandari et al. 2022, DeepSpeed-MoE (arXiv 2201.05596), section 4.1, with shared
    experts as in Dai et al. 2024, DeepSeekMoE (arXiv 2401.06066).
    """

    name: ClassVar[str] = "shared"

    def config(
        self, dense: Config, n_expert: int, n_expert_per_token: int, layers: Collection[int] | None = None
    ) -> Config:
        return dense.upcycled(n_expert, n_expert_per_token, shared=True, layers=layers)

    def kind(self, block: BlockId) -> Hashable:
        return "zero" if block.key == "expert_down" else None

    def make(self, block: BlockId, dense: Tensor, seed: int) -> Tensor:
        return torch.zeros_like(dense) if block.key == "expert_down" else dense


@dataclass(frozen=True)
class Wide(Recipe):
    """`wide`: a dense model with m times the neurons, to compare with: each neuron m times, W_d divided by m.

    Copy j's W_d also gets noise ε_j with Σ_j ε_j = 0: equal neurons give equal activations, so the noise cancels at
    step 0, and what follows can tell the copies apart.
    Source: Chen et al. 2016, Net2Net (arXiv 1511.05641), section 2.2.
    """

    name: ClassVar[str] = "wide"
    factor: int = 2
    """m."""
    noise: float = 0.1
    """Standard deviation of ε_j, as a share of that of W_d / m."""

    @property
    def exact(self) -> bool:
        return False

    def config(
        self, dense: Config, n_expert: int, n_expert_per_token: int, layers: Collection[int] | None = None
    ) -> Config:
        size = dense.intermediate_size * self.factor
        return replace(dense, name=f"{dense.name}-wide{self.factor}", hf_config={}, intermediate_size=size)

    def kind(self, block: BlockId) -> Hashable:
        return "wide" if block.key in ("gate", "up", "down") else None

    def make(self, block: BlockId, dense: Tensor, seed: int) -> Tensor:
        if block.key not in ("gate", "up", "down"):
            return dense
        if block.key != "down":
            return dense.repeat(self.factor, 1)
        base = dense.float() / self.factor
        noise = _normal((self.factor, *base.shape), seeded(seed, f"wide {block.layer}")) * base.std() * self.noise
        return torch.cat(list(base + noise - noise.mean(dim=0)), dim=1).to(dense.dtype)


COPY = Recipe()

_RECIPES: dict[str, type[Recipe]] = {kind.name: kind for kind in (Recipe, Noise, Drop, Granular, Shared, Wide)}


def recipe_of(name: str, **numbers: float | int | None) -> Recipe:
    """A recipe by name; numbers that are `None` keep their default.

    Raises:
        UserError: an unknown name, a number that the recipe does not have, or one out of range.
    """
    if name not in _RECIPES:
        raise UserError(f"recipe {name!r} is not known; choose of copy, noise, drop, granular, shared")
    given = {key: value for key, value in numbers.items() if value is not None}
    known = {field.name for field in dataclasses.fields(_RECIPES[name])}
    if alien := sorted(set(given) - known):
        raise UserError(f"recipe {name}: it has no {alien[0]}")
    return _RECIPES[name](**given)


def recipe_of_provenance(upcycled: Mapping[str, Any]) -> Recipe | None:
    """The recipe that a `provenance.yaml` names under `upcycled`; `None` where it names none that is known."""
    kind = _RECIPES.get(str(upcycled.get("recipe")))
    if kind is None:
        return None
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{key: value for key, value in upcycled.items() if key in names})


def _normal(shape: Collection[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator)
