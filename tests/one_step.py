"""One optimizer step of the real trainer in float64, whose gradient and metrics process 0 writes: a command for tests.

python tests/one_step.py OUT.pth --student ... (flags of train_distill.py)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import litgpt.teacher
import train_distill
from litgpt.checkpoint import load_model
from litgpt.recipe import DataSettings, LossSettings, OptimSettings, RunSettings, Settings
from litgpt.utils import run_cli


def in_float64(path: Path, **others: Any) -> Any:
    return load_model(path, **(others | {"dtype": torch.float64}))


def spread_experts(trainer: train_distill.Trainer) -> None:
    """Make the experts differ, the same on every process: at step 0 CKA is 1 and has no gradient."""
    with torch.no_grad():
        for name, parameter in trainer.distiller.named_parameters():
            if name.endswith("experts.down_proj"):
                parameter.mul_(1.5)


def main(
    out: Path,
    *,
    student: Path,
    teacher: Path,
    base: Path,
    out_dir: Path,
    data: DataSettings,
    loss: LossSettings,
    optim: OptimSettings,
    run: RunSettings,
    seed: int = 1337,
) -> None:
    """One step.

    Args:
        out: file to write.
        student, teacher, base, out_dir, data, loss, optim, run, seed: as of train_distill.py.
    """
    for module in (train_distill, litgpt.teacher):
        vars(module)["load_model"] = in_float64
    trainer = train_distill.Trainer(
        Settings(student, teacher, base, out_dir, data, loss, optim, run, "auto", False, seed)
    )
    spread_experts(trainer)
    gradients: dict[str, Tensor] = {}

    def keep() -> None:
        for name, parameter in trainer.distiller.named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad
                gradients[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()

    trainer.optimizer.step = keep  # type: ignore[method-assign, assignment]
    metrics = trainer._train_step(trainer.loader.forever())
    if trainer.fabric.is_global_zero:
        torch.save({"metrics": metrics, "gradients": gradients, "world": trainer.fabric.world_size}, out)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    run_cli(main)
