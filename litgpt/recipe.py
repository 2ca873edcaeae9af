"""All settings of `train_distill.py`, and what follows from them alone.

The same names are flags (`--optim.lr`), the keys of `configs/distill.yaml` and the fields here; the docstring under a
field is its help.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from litgpt.teacher import View
from litgpt.utils import UserError

SpanName = Literal["prompt", "thought", "answer"]
# Settings that change neither the weights nor the order of the data: a resumed run may have others.
FREE_SETTINGS = {
    *("out_dir", "resume", "overwrite", "run.log_every", "run.val_every", "run.save_every"),
    "optim.epochs",  # what counts is the number of steps that follows from it
}


@dataclass
class LossSettings:
    """What the student is taught, and how much each part weighs."""

    task_weight: float = 0.5
    """Weight of the cross-entropy on thought and answer."""
    thought_weight: float = 0.5
    """Weight of a thought token within the cross-entropy; an answer token has 1."""
    kd_weight: float = 0.5
    """Weight of KL(teacher || student) on the answer; 0 leaves the teacher unloaded."""
    temperature: float = 1.0
    """Temperature of both distributions in KD; the term is multiplied by its square."""
    teacher_view: View = "strip"
    """What the teacher reads: strip (no thought, its own empty think block) or mask (the student's ids)."""
    cka_weight: float = 0.05
    """Weight of 1 - CKA between student and dense base at the first step."""
    cka_weight_end: float = 0.0
    """The same from cka_fraction of training on."""
    cka_fraction: float = 0.5
    """Share of training over which the CKA weight falls, linearly."""
    cka_every: int = 4
    """CKA looks at every n-th layer and at the last."""
    cka_spans: list[SpanName] = field(default_factory=lambda: ["prompt", "thought", "answer"])
    """Spans whose tokens are rows of CKA; padding and the first token of a dialogue never are."""
    router_weight: float = 0.01
    """Weight of the router's balance loss (1 when all experts get equal shares)."""
    chunk_rows: int = 256
    """Tokens whose logits exist at one time; memory only."""

    def __post_init__(self) -> None:
        for name in ("task_weight", "thought_weight", "kd_weight", "cka_weight", "cka_weight_end", "router_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"loss.{name} is {getattr(self, name)}: expected 0 or more")
        if self.temperature <= 0 or self.cka_every < 1 or self.chunk_rows < 1 or not 0 <= self.cka_fraction <= 1:
            raise UserError(
                "loss: expected temperature > 0, cka_every and chunk_rows of at least 1, and cka_fraction in 0 ... 1"
            )


@dataclass
class DataSettings:
    """Dialogues and how they are cut into micro-batches."""

    train: Path = Path("data/dialogues/train.jsonl")
    """Dialogues to learn from, JSON lines."""
    val: Path = Path("data/dialogues/val.jsonl")
    """Dialogues to validate on."""
    max_seq_length: int = 2048
    """Tokens in a row; several dialogues share one. Longer dialogues are left out and counted."""
    micro_batch_size: int = 8
    """Rows that a device works on at one time."""

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1 or self.max_seq_length < 2:
            raise UserError("data: expected micro_batch_size of at least 1 and max_seq_length of at least 2")


@dataclass
class OptimSettings:
    """AdamW, its schedule, and the size of a step."""

    epochs: float = 3.0
    """Passes over the training dialogues; not used when steps is given."""
    steps: int | None = None
    """Optimizer steps in all."""
    accumulation: int = 4
    """Micro-batches on each device in one optimizer step."""
    lr: float = 1e-4
    """Learning rate after the warm-up."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    warmup: float = 0.05
    """Share of training in which the learning rate rises from 0, linearly."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two averages."""
    weight_decay: float = 0.1
    """Weight decay of routers and experts; the thought tokens' rows have none."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""

    def __post_init__(self) -> None:
        if self.accumulation < 1 or (self.steps is not None and self.steps < 1) or self.epochs <= 0:
            raise UserError("optim: accumulation, steps and epochs must be positive")
        if not all(0 <= beta < 1 for beta in self.betas) or self.weight_decay < 0:
            raise UserError("optim: expected betas in 0 ... 1, below 1, and weight_decay of 0 or more")
        if not 0 <= self.min_lr <= self.lr or not 0 <= self.warmup <= 1 or self.clip <= 0:
            raise UserError("optim: expected 0 <= min_lr <= lr, warmup in 0 ... 1 and clip > 0")


@dataclass
class RunSettings:
    """Where it runs and how often it reports."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    devices: int = 1
    """Processes on this machine, each with a whole student and teacher."""
    num_nodes: int = 1
    """Machines."""
    strategy: Literal["auto", "ddp"] = "auto"
    """ddp averages gradients over processes; auto takes it when there are several."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """auto: bf16-mixed on a GPU, 32-true on a CPU."""
    activation_checkpointing: bool = False
    """Recompute each block in backward: less memory, about a third more student time."""
    log_every: int = 10
    """Optimizer steps between two lines of metrics.csv."""
    val_every: int = 100
    """Optimizer steps between two validations; there is one at the start and one at the end in any case."""
    save_every: int = 200
    """Optimizer steps between two checkpoints; the newest two are kept."""

    def __post_init__(self) -> None:
        if min(self.devices, self.num_nodes, self.log_every, self.val_every, self.save_every) < 1:
            raise UserError("run: devices, num_nodes, log_every, val_every and save_every must be at least 1")
        if self.accelerator == "cuda" and not torch.cuda.is_available():
            raise UserError("run.accelerator is cuda, and torch sees no GPU: use cpu or auto")


@dataclass
class Settings:
    """All settings of a run, as `hyperparameters.yaml` and the checkpoints keep them."""

    student: Path
    teacher: Path
    base: Path
    out_dir: Path
    data: DataSettings
    loss: LossSettings
    optim: OptimSettings
    run: RunSettings
    resume: str
    overwrite: bool
    seed: int

    def plain(self) -> dict[str, Any]:
        """Plain values only, nested as in a config file."""
        values: dict[str, Any] = _plain(asdict(self))
        return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def lr_at(step: int, steps: int, optim: OptimSettings) -> float:
    """Learning rate of an optimizer step (from 0): linear warm-up, then a cosine down to `min_lr` at the last."""
    warmup = round(optim.warmup * steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def require_same(settings: Settings, saved: dict[str, Any]) -> None:
    """Raise `UserError` if a setting that the result depends on differs from the checkpoint's."""
    now, then = dict(_dotted(settings.plain())), dict(_dotted(saved))
    differing = [name for name in now if name not in FREE_SETTINGS and now[name] != then.get(name)]
    if differing:
        name = differing[0]
        others = f" (and {len(differing) - 1} more settings)" if len(differing) > 1 else ""
        raise UserError(
            f"{settings.out_dir} was started with {name} {then.get(name)!r}, now it is {now[name]!r}{others}: "
            "go on with the old settings, choose another --out_dir, or start anew with --overwrite true"
        )
