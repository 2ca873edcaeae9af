"""One real training step on one micro-batch, in memory only: are the losses finite, and does the right thing learn?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from litgpt.chat import Span
from litgpt.checkpoint import load_model, read_provenance
from litgpt.data import Loader, PackedLoader, Record
from litgpt.distill import Distiller, MicroBatch, Reference, Totals
from litgpt.recipe import Settings
from litgpt.teacher import BaseTeacher
from litgpt.tokenizer import Tokenizer
from litgpt.trainable import parts_of


@dataclass(frozen=True)
class FirstStep:
    """What a step showed; lists hold names of parameters.

    Attributes:
        loss: weighted sum of the terms.
        terms: CE, KD, 1 - CKA and balance, each divided by its count.
        tokens: in the micro-batch, padding left out.
        cka_rows: tokens that CKA compared; with 0 there is no CKA.
        trained, frozen: what should get a gradient, and what should not.
        touched: frozen, and yet with a gradient.
        none, infinite, zero: trained, and without a gradient, with one that is not finite, or with nothing but zeros.
        broken: no longer finite after the optimizer's update.
        idle_experts: experts, over all layers, that got no gradient because no token chose them.
        has_thought: whether the micro-batch holds thoughts, without which their tokens' rows learn nothing.
        gpu_bytes: the most that was allocated on the GPU, `None` on a CPU.
    """

    loss: float
    terms: dict[str, float]
    tokens: int
    cka_rows: int
    trained: list[str]
    frozen: list[str]
    touched: list[str]
    none: list[str]
    infinite: list[str]
    zero: list[str]
    broken: list[str]
    idle_experts: int
    has_thought: bool
    gpu_bytes: int | None


def first_step(settings: Settings, loader: Loader, tokenizer: Tokenizer, teacher: BaseTeacher | None) -> FirstStep:
    """Load the models as a training does and take one step on the first micro-batch that holds a thought.

    Args:
        settings: of the run.
        loader: the training dialogues.
        tokenizer: the student's.
        teacher: not loaded yet; `None` without KD.

    Raises:
        UserError: a model cannot be read, or the base is not the student's.
    """
    on_gpu = settings.run.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    mixed = settings.run.precision == "bf16-mixed" or (settings.run.precision == "auto" and on_gpu)
    chosen = PackedLoader(
        _with_thought(loader),
        tokenizer,
        max_seq_length=loader.max_seq_length,
        micro_batch_size=loader.micro_batch_size,
        shuffle=False,
    )
    micro = MicroBatch(next(iter(chosen)), settings.loss, [teacher.read(chosen)] if teacher else [], device)
    student = load_model(settings.student, dtype=torch.float32, device=device)
    student.activation_checkpointing = settings.run.activation_checkpointing
    parts = parts_of(settings.optim.trainable, student.config, read_provenance(settings.student))
    distiller = Distiller(student, tokenizer.thought_ids, settings.loss, parts).train()
    base = load_model(settings.base, dtype=torch.float32, device=device)
    reference = Reference(base, student, tokenizer.thought_ids, distiller.layers)
    if teacher is not None:
        teacher.load(dtype=torch.bfloat16 if on_gpu else torch.float32, device=device)
        micro.teachers = [teacher.targets(side, micro.targets_N.numel()) for side in micro.teacher_batches]
    parameters = dict(distiller.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=settings.optim.lr, fused=on_gpu)
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        micro.reference = reference.hidden_states(micro.batch)
        loss, terms = distiller(micro, Totals(**vars(micro.counts)), settings.loss.cka_weight)
    loss.backward()
    gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
    optimizer.step()
    return FirstStep(
        loss=float(loss.detach()),
        terms=dict(zip(("CE", "KD", "1 - CKA", "balance", "z"), terms.terms.tolist(), strict=True)),
        tokens=int(micro.counts.tokens),
        cka_rows=int(micro.counts.cka),
        trained=list(trained),
        frozen=[name for name in parameters if name not in trained],
        touched=[name for name, p in parameters.items() if name not in trained and p.grad is not None],
        none=[name for name in trained if name not in gradients],
        infinite=[name for name, gradient in gradients.items() if not _finite(gradient)],
        zero=[name for name, gradient in gradients.items() if not bool(gradient.any())],
        broken=[name for name, p in trained.items() if not _finite(p.detach())],
        idle_experts=sum(
            int((~gradient.flatten(1).any(1)).sum())
            for name, gradient in gradients.items()
            if name.endswith("down_proj")
        ),
        has_thought=bool((micro.batch.spans_BT == Span.THOUGHT).any()),
        gpu_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
    )


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _with_thought(loader: Loader) -> list[Record]:
    """Dialogues of the first micro-batch that holds a thought, or else of the first, in the order of training."""
    first: list[Record] = []
    for batch in loader:
        chosen = [loader.records[i] for row in batch.records for i in row]
        first = first or chosen
        if bool((batch.spans_BT == Span.THOUGHT).any()):
            first = chosen
            break
    loader.epoch = loader.position = 0  # the caller's loader stands where it stood
    return first
