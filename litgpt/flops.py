"""How much arithmetic an optimizer step is, and how much a GPU can do: what model FLOPs utilisation (MFU) is made of.

    MFU = step_flops(...).model / (seconds of the step · devices · peak_flops(torch.cuda.get_device_name()))

A matrix product of [n, k] and [k, m] is 2·n·k·m operations. Counted are the products with weights (Kaplan et al. 2020,
arXiv 2001.08361, section 2.1) and the two of attention (Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B, but
with the keys that a causal mask lets through, not all). Left out, each below 1 % of a step: norms, softmax, the
embedding, CKA's products, the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from litgpt.config import Config
from litgpt.recipe import Settings


class Gpu(NamedTuple):
    """What a data sheet says of a GPU."""

    flops: float
    """Dense bf16 on the tensor cores with fp32 accumulation, FLOP/s."""
    memory: int
    """Bytes, as `nvidia-smi` counts them; torch sees about half a GiB less."""


# By the name that torch.cuda.get_device_name() gives. Source: NVIDIA's data sheets of H100, H200, A100 and L40S and the
# Ada white paper (RTX 4090). Where a sheet prints the figure with sparsity (Hopper) it is halved. Lightning's own
# table has the unhalved figure for the H200 and the H100 NVL, and no L40S.
GPUS: dict[str, Gpu] = {
    "NVIDIA H200": Gpu(989.5e12, 143771 << 20),
    "NVIDIA H200 NVL": Gpu(835.5e12, 143771 << 20),
    "NVIDIA H100 80GB HBM3": Gpu(989.5e12, 81559 << 20),
    "NVIDIA H100 NVL": Gpu(835.5e12, 95830 << 20),
    "NVIDIA H100 PCIe": Gpu(756.5e12, 81559 << 20),
    "NVIDIA A100-SXM4-80GB": Gpu(312e12, 81920 << 20),
    "NVIDIA A100 80GB PCIe": Gpu(312e12, 81920 << 20),
    "NVIDIA A100-SXM4-40GB": Gpu(312e12, 40960 << 20),
    "NVIDIA A100-PCIE-40GB": Gpu(312e12, 40960 << 20),
    "NVIDIA L40S": Gpu(362.05e12, 46068 << 20),
    "NVIDIA GeForce RTX 4090": Gpu(165.2e12, 24564 << 20),
}


def peak_flops(device_name: str) -> float | None:
    """Peak of a GPU in bf16 without sparsity, FLOP/s; `None` for one that is not in the table.

    Args:
        device_name: as `torch.cuda.get_device_name()` gives it, e.g. "NVIDIA H100 80GB HBM3".
    """
    gpu = GPUS.get(device_name)
    return None if gpu is None else gpu.flops


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of one optimizer step on all devices.

    Attributes:
        student_forward, student_backward: the student, once each; backward is the gradient of every activation and of
            the trained weights alone.
        teacher, base: their forward passes.
        repeated: work done a second time: blocks and logits recomputed in backward, and the forward pass that counts
            the experts' load before a step of several micro-batches.
    """

    student_forward: float
    student_backward: float
    teacher: float
    base: float
    repeated: float

    @property
    def model(self) -> float:
        """What the step asks for: MFU counts this, however it is computed (PaLM, appendix B)."""
        return self.student_forward + self.student_backward + self.teacher + self.base

    @property
    def hardware(self) -> float:
        """What is computed, repetitions included (Korthikanti et al. 2022, arXiv 2205.05198, section 6.3)."""
        return self.model + self.repeated


def tokens_per_step(settings: Settings, world_size: int) -> int:
    """Positions in a step: full rows of all micro-batches of all devices; padding, a few per cent, is among them."""
    data = settings.data
    return data.micro_batch_size * data.max_seq_length * settings.optim.accumulation * world_size


def step_flops(
    student: Config,
    teacher: Config | None,
    base: Config | None,
    settings: Settings,
    *,
    tokens: float,
    scored_tokens: float | None = None,
    kd_tokens: float | None = None,
    teacher_tokens: float | None = None,
    context: float | None = None,
    world_size: int = 1,
    more_teachers: Sequence[tuple[Config, float]] = (),
) -> StepFlops:
    """Operations of one optimizer step.

    Args:
        student, teacher, base: shapes; `None` for a network that does not run in this step (no KD, a cached teacher, a
            CKA weight of 0).
        settings: of the run; read are the row length, the accumulation and the checkpointing.
        tokens: the student's tokens on all devices, padding left out.
        scored_tokens: tokens with a cross-entropy or a teacher, whose logits are computed; all, if not known.
        kd_tokens: tokens with a teacher; `scored_tokens`, if not known.
        teacher_tokens: what the teacher reads; as much as the student, if not known.
        context: keys that a query sees, on average; half a row, if not known, more than short packed dialogues see.
        world_size: devices.
        more_teachers: those of single sources, with their share of the tokens; `teacher` reads the rest.
    """
    scored = tokens if scored_tokens is None else scored_tokens
    with_kd = scored if kd_tokens is None else kd_tokens
    read = tokens if teacher_tokens is None else teacher_tokens
    keys = (settings.data.max_seq_length + 1) / 2 if context is None else context

    trained, frozen = _trained_products(student), _frozen_products(student)
    attention = _attention(student, keys)
    blocks = tokens * (2 * (trained + frozen) + attention)
    logits = scored * 2 * student.n_embd * student.padded_vocab_size
    # Through a frozen weight flows the gradient of its input only; attention has four products for its two.
    backward = tokens * (2 * frozen + 4 * trained + 2 * attention) + logits
    repeated = logits + (blocks if settings.run.activation_checkpointing else 0.0)
    if settings.loss.router_weight > 0 and settings.optim.accumulation * world_size > 1:
        repeated += blocks
    teachers = list(more_teachers)
    if teacher is not None:
        teachers.append((teacher, 1.0 - sum(share for _, share in more_teachers)))
    return StepFlops(
        student_forward=blocks + logits,
        student_backward=backward,
        teacher=sum(_forward(config, share * read, share * with_kd, keys) for config, share in teachers),
        base=0.0 if base is None else _forward(base, tokens, 0.0, keys),
        repeated=repeated,
    )


def _forward(config: Config, tokens: float, logits: float, keys: float) -> float:
    products = _trained_products(config) + _frozen_products(config)
    head = 2 * config.n_embd * config.padded_vocab_size
    return tokens * (2 * products + _attention(config, keys)) + logits * head


def _trained_products(config: Config) -> int:
    """Weights that learn and that one token meets: the routers and K experts, or the dense MLPs of a dense model."""
    if not config.is_moe:
        return config.n_layer * 3 * config.n_embd * config.intermediate_size
    experts = config.n_expert_per_token * 3 * config.n_embd * config.expert_size
    return len(config.moe_layers) * (config.n_embd * config.n_expert + experts)


def _frozen_products(config: Config) -> int:
    """Weights of the attention's projections, and in a MoE of dense layers' MLPs and of shared experts."""
    heads = (2 * config.n_head + 2 * config.n_query_groups) * config.head_size
    dense = len(config.dense_layers) * config.intermediate_size
    shared = len(config.moe_layers) * (config.n_shared_expert or 0) * config.expert_size
    return config.n_embd * (config.n_layer * heads + 3 * (dense + shared))


def _attention(config: Config, keys: float) -> float:
    """Scores and weighted sum of one query, all heads and layers."""
    return config.n_layer * 4 * keys * config.n_head * config.head_size
