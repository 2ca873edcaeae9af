"""LitGPT 0.5.13's own MoE block, timed in a process of its own with PYTHONPATH set to its folder.

It has our package's name, so the two never meet in one process. `moe_layer.py` starts this, writes one request a line
(`tokens backward repeats clock`) and reads one line of seconds, so that both sides are timed in turns.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

VERSION = "0.5.13"


def measure(module: nn.Module, tokens: int, backward: bool, repeats: int, clock: str) -> float:
    """Seconds for one forward, or forward and backward, of `module` on random [1, tokens, D]; mean over `repeats`.

    The clock is "wall", or "cpu": processor time of this process.
    """
    now = time.process_time if clock == "cpu" else time.perf_counter
    weight = next(module.parameters())
    x_BTD = torch.randn(1, tokens, weight.size(-1), generator=torch.Generator().manual_seed(0)).to(weight)
    total = 0.0
    for _ in range(repeats):
        module.zero_grad()
        x = x_BTD.clone().requires_grad_(backward)
        synchronize(weight.device)
        start = now()
        with torch.set_grad_enabled(backward):
            y = module(x)
            y = y[0] if isinstance(y, tuple) else y
            if backward:
                y.backward(x_BTD)
        synchronize(weight.device)
        total += now() - start
    return total / repeats


def keep_memory() -> None:
    """Let glibc keep what is freed (mallopt(3)), or the pages that the system hands out anew are what is timed."""
    if sys.platform == "linux":
        m_trim_threshold, m_mmap_max = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)


@torch.no_grad()
def set_router(gate: nn.Linear) -> None:
    """The same router in every process: how evenly tokens fall on experts decides the time."""
    weight_ED = torch.randn(gate.weight.shape, generator=torch.Generator().manual_seed(0)) * 0.02
    gate.weight.copy_(weight_ED)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(n_embd: str, width: str, n_expert: str, k: str, dtype: str, device: str, threads: str) -> None:
    """Answer requests until the input ends."""
    # By name, so that a type checker does not take ours for it.
    theirs: dict[str, Any] = {name: importlib.import_module(f"litgpt.{name}") for name in ("config", "model")}
    if not (Path(theirs["model"].__file__).parents[1] / f"litgpt-{VERSION}.dist-info").is_dir():
        raise SystemExit(f"{theirs['model'].__file__} is not LitGPT {VERSION}")
    keep_memory()
    torch.set_num_threads(int(threads))
    config = theirs["config"].Config.from_name(
        "Qwen3-30B-A3B",
        n_embd=int(n_embd),
        moe_intermediate_size=int(width),
        n_expert=int(n_expert),
        n_expert_per_token=int(k),
    )
    moe = theirs["model"].LLaMAMoE(config).to(device=device, dtype=getattr(torch, dtype))
    set_router(moe.gate)
    print("ready", flush=True)
    for line in sys.stdin:
        *numbers, clock = line.split()
        tokens, backward, repeats = map(int, numbers)
        print(measure(moe, tokens, bool(backward), repeats, clock), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
