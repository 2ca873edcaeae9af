"""Which parameters of a student learn, by names that people use: `experts, router, thought_tokens` by default.

The set is written beside the checkpoint when it is made (`provenance.yaml`) and may be changed for a training. The rows
of the thought tokens learn apart from the embedding that holds them (`litgpt.distill.ThoughtRows`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from litgpt.config import Config
from litgpt.utils import UserError

Part = Literal["experts", "router", "shared_expert", "mlp", "attention", "norms", "thought_tokens"]

_IN_NAME: dict[Part, tuple[str, ...]] = {
    "experts": (".mlp.experts.",),
    "router": (".mlp.gate.",),
    "shared_expert": (".mlp.shared_experts.",),
    "mlp": (".mlp.fc_1.", ".mlp.fc_2.", ".mlp.proj."),
    "attention": (".attn.qkv.", ".attn.proj."),
    "norms": (".norm_1.", ".norm_2.", ".norm_q.", ".norm_k.", ".ln_f."),
}
"""Part → what the memory names of its parameters contain; `mlp` is that of layers without experts."""

PARTS: tuple[Part, ...] = (*_IN_NAME, "thought_tokens")


def learns(name: str, parts: Collection[Part]) -> bool:
    """Whether the parameter of that memory name is in one of the parts."""
    return any(mark in name for part in parts for mark in _IN_NAME.get(part, ()))


def default_parts(config: Config) -> tuple[Part, ...]:
    """`experts, router, thought_tokens`; of a dense model, its MLPs and the thought tokens."""
    return ("experts", "router", "thought_tokens") if config.is_moe else ("mlp", "thought_tokens")


def parts_of(names: Sequence[str] | None, config: Config, provenance: Mapping[str, Any]) -> tuple[Part, ...]:
    """The parts that are to learn.

    Args:
        names: what the user asked for, if anything.
        config: of the student.
        provenance: the student's, which may hold what was chosen when it was made.

    Raises:
        UserError: an unknown part, one that the model does not have, or a dense model and nothing named.
    """
    upcycled = provenance.get("upcycled")
    stored = upcycled.get("trainable") if isinstance(upcycled, Mapping) else None
    if not config.is_moe and not (names or stored):
        raise UserError(
            f"the student {config.name!r} is dense: make a mixture of experts of it first, "
            "with python scripts/upcycle_moe.py (or name what shall learn, --optim.trainable [mlp,thought_tokens])"
        )
    chosen = list(names or stored or default_parts(config))
    if unknown := [name for name in chosen if name not in PARTS]:
        raise UserError(f"trainable: {unknown[0]!r} is not known; choose of {', '.join(PARTS)}")
    lacking = {
        "experts": not config.is_moe,
        "router": not config.is_moe,
        "shared_expert": not config.n_shared_expert,
        "mlp": config.is_moe and not config.dense_layers,
    }
    if absent := [name for name in chosen if lacking.get(name)]:
        raise UserError(f"trainable: {config.name!r} has no {absent[0]}")
    return tuple(part for part in PARTS if part in chosen)
