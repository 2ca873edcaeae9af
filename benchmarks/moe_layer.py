"""One mixture-of-experts block, forward and forward + backward, against LitGPT's and transformers' on the same machine.

All contenders take turns within a round, with the same router weights and tokens. The table shows each one's fastest
round (and its median); the ratio that counts is taken within each round, where the machine's moods are shared, and its
median over the rounds is shown for the peer that does best against ours. The dense MLP with equal FLOPs (K times as
wide) is a yardstick, no peer.

On a CPU all run with torch's huge pages (THP_MEM_ALLOC_ENABLE=1) and with an allocator that keeps what is freed. As
they come, both return blocks of over 32 MB to the system each time, and a large part of a backward pass is the system
handing out fresh pages for the gradient of a stack of experts; LitGPT's gradients are one tensor an expert, small
enough to be kept. --keep false shows ours and those of transformers without the latter.

    pip install --no-deps --target .cache/litgpt-0.5.13 litgpt==0.5.13
    python benchmarks/moe_layer.py --litgpt_dir .cache/litgpt-0.5.13
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read at torch's first allocation

import torch
from torch import Tensor, nn

from benchmarks.original_litgpt_moe import keep_memory, measure, set_router
from litgpt.config import Config
from litgpt.model import LLaMAMLP, LLaMAMoE
from litgpt.utils import UserError, parse_dtype, run_cli

Contender = Callable[[int, bool, int, str], float]
"""(tokens, backward, repeats, clock) → seconds."""


def benchmark(
    n_embd: int = 1024,
    width: int = 3072,
    n_expert: int = 8,
    n_expert_per_token: int = 2,
    tokens: tuple[int, ...] = (1, 128, 1024, 4096),
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16"),
    passes: tuple[Literal["fwd", "fwd+bwd"], ...] = ("fwd", "fwd+bwd"),
    rounds: int = 7,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    threads: int = torch.get_num_threads(),
    clock: Literal["wall", "cpu"] = "wall",
    litgpt_dir: Path | None = None,
    keep: bool = True,
) -> None:
    """Print a markdown table of milliseconds and of the ratio between ours and the best peer.

    Args:
        n_embd: model width.
        width: inner width of one expert.
        n_expert: experts.
        n_expert_per_token: experts per token.
        tokens: batch sizes, in tokens.
        dtypes: of weights and activations.
        passes: forward alone, forward and backward.
        rounds: how often each contender is timed.
        device: where.
        threads: of the CPU.
        clock: `cpu` counts processor time instead, for a machine that others use too; with one thread only.
        litgpt_dir: folder with the original LitGPT 0.5.13 (or $LITGPT_ORIGINAL). Without it, its masked loop is
            timed as written here from a description of the algorithm.
        keep: let the allocator keep freed memory.
    """
    if keep:
        keep_memory()
    if clock == "cpu" and (threads != 1 or device != "cpu"):
        raise UserError("--clock cpu compares processor time: use it with --threads 1 --device cpu")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    folder = litgpt_dir or (Path(os.environ["LITGPT_ORIGINAL"]) if "LITGPT_ORIGINAL" in os.environ else None)
    sizes = (n_embd, width, n_expert, n_expert_per_token)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{threads} threads of {os.cpu_count()} CPU cores"
    print(f"D {n_embd}, F {width}, E {n_expert}, K {n_expert_per_token}; {machine}; torch {torch.__version__}\n")
    header: list[str] = []
    for dtype in dtypes:
        contenders, worker = build(sizes, dtype, device, threads, folder)
        if not header:
            header = ["dtype", "tokens", "pass", *contenders, "ours / best peer, within rounds", "fastest rounds"]
            print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
        for n in tokens:
            for name in passes:
                print(row(contenders, dtype, n, name == "fwd+bwd", rounds, clock), flush=True)
        if worker is not None:
            worker.stop()
    print(f"\nmilliseconds ({clock} clock), fastest (median)")


def row(contenders: dict[str, Contender], dtype: str, tokens: int, backward: bool, rounds: int, clock: str) -> str:
    """Time all contenders in turns and format the result."""
    # A sample of many short calls, or the clock and the scheduler are what is measured.
    repeats = {name: max(1, min(50, int(0.1 / run(tokens, backward, 1, clock)))) for name, run in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        names = list(contenders)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(1e3 * contenders[name](tokens, backward, repeats[name], clock))
    cells = [f"{min(t):.2f} ({statistics.median(t):.2f})" for t in times.values()]
    peers = [t for name, t in times.items() if name != "ours" and "dense" not in name]
    paired = max(statistics.median(own / peer for own, peer in zip(times["ours"], t, strict=True)) for t in peers)
    fastest = min(times["ours"]) / min(map(min, peers))
    ratios = [f"{paired:.2f}", f"{fastest:.2f}"]
    return f"| {' | '.join([dtype, str(tokens), 'fwd+bwd' if backward else 'fwd', *cells, *ratios])} |"


def build(
    sizes: tuple[int, int, int, int], dtype: str, device: str, threads: int, litgpt_dir: Path | None
) -> tuple[dict[str, Contender], Worker | None]:
    """All contenders by name, and the other process if there is one. Those in this process share their weights."""
    n_embd, width, n_expert, k = sizes
    config = Config.from_name("Qwen3-0.6B", n_embd=n_embd, intermediate_size=width)
    ours = LLaMAMoE(config.upcycled(n_expert, k)).to(device, parse_dtype(dtype))
    set_router(ours.gate)
    wide = Config.from_name("Qwen3-0.6B", n_embd=n_embd, intermediate_size=k * width)
    modules: dict[str, nn.Module] = {"ours": ours}
    contenders: dict[str, Contender] = {}
    worker = None
    if litgpt_dir is None:
        modules["LitGPT's loop, re-written"] = MaskedLoop(ours)
    else:
        worker = Worker(litgpt_dir, [*map(str, sizes), dtype, device, str(threads)])
        contenders["LitGPT 0.5.13"] = worker.time
    for implementation in ("eager", "grouped_mm"):
        modules[f"transformers {implementation}"] = transformers_block(ours, implementation)
    x = torch.randn(1, 64, n_embd).to(device, parse_dtype(dtype))
    for name, module in modules.items():
        check_equal(name, module, ours, x)
    modules[f"dense, F {k * width}"] = LLaMAMLP(wide).to(device, parse_dtype(dtype))
    in_process: dict[str, Contender] = {name: partial(measure, module) for name, module in modules.items()}
    return {"ours": in_process.pop("ours")} | contenders | in_process, worker


@torch.no_grad()
def check_equal(name: str, module: nn.Module, ours: LLaMAMoE, x_BTD: Tensor) -> None:
    """A peer that computes something else is no peer."""
    y = module(x_BTD)
    y, expected = (y[0] if isinstance(y, tuple) else y), ours(x_BTD)[0]
    if (y - expected).norm() > 2e-2 * expected.norm():
        raise UserError(
            f"{name} computes something else: relative difference {(y - expected).norm() / expected.norm()}"
        )


def transformers_block(ours: LLaMAMoE, implementation: str) -> nn.Module:
    """transformers' Qwen3-MoE block with our parameters, so that nothing is held twice."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    n_expert, n_embd, width = ours.experts.down_proj.shape
    config: Any = Qwen3MoeConfig(
        hidden_size=n_embd,
        moe_intermediate_size=width,
        num_experts=n_expert,
        num_experts_per_tok=ours.n_expert_per_token,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block: Any = Qwen3MoeSparseMoeBlock(config)
    block.gate.weight = ours.gate.weight
    block.experts.gate_up_proj, block.experts.down_proj = ours.experts.gate_up_proj, ours.experts.down_proj
    return block


class MaskedLoop(nn.Module):
    """The algorithm of LitGPT's MoE, re-written: a mask per expert, a `where`, every expert called every time."""

    def __init__(self, ours: LLaMAMoE) -> None:
        super().__init__()
        self.gate, self.k = ours.gate, ours.n_expert_per_token
        width = ours.experts.down_proj.size(-1)
        self.experts = nn.ModuleList()
        for gate_up, down in zip(ours.experts.gate_up_proj.data, ours.experts.down_proj.data, strict=True):
            expert = LLaMAMLP(Config.from_name("Qwen3-0.6B", n_embd=down.size(0), intermediate_size=width))
            for linear, weight in zip(expert.children(), (*gate_up.chunk(2), down), strict=True):
                linear.weight = nn.Parameter(weight)
            self.experts.append(expert)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        logits_NK, ids_NK = self.gate(x_ND).topk(self.k)
        weights_NK = logits_NK.softmax(-1, dtype=torch.float32).to(x_ND.dtype)
        masks_ENK = ids_NK == torch.arange(len(self.experts), device=x_ND.device)[:, None, None]
        y_ND = torch.zeros_like(x_ND)
        for mask_NK, expert in zip(masks_ENK, self.experts, strict=True):
            rows, slots = torch.where(mask_NK)
            y_ND[rows] += weights_NK[rows, slots, None] * expert(x_ND[rows])
        return y_ND.view_as(x_BTD)


class Worker:
    """The original in its own process, asked for one timing at a time."""

    def __init__(self, litgpt_dir: Path, arguments: list[str]) -> None:
        script = Path(__file__).with_name("original_litgpt_moe.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=os.environ | {"PYTHONPATH": str(litgpt_dir.resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def time(self, tokens: int, backward: bool, repeats: int, clock: str) -> float:
        """Seconds, as `measure` gives them."""
        assert self.process.stdin is not None
        print(tokens, int(backward), repeats, clock, file=self.process.stdin, flush=True)
        return float(self._read())

    def stop(self) -> None:
        """End the process."""
        self.process.communicate()

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise UserError("LitGPT's process ended; its message is above")
        return line


if __name__ == "__main__":
    run_cli(benchmark)
