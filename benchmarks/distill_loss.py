"""Cross-entropy and distillation over Qwen3's vocabulary, forward and backward: time, and memory beyond the inputs.

Every measurement is one call in a process of its own, and contenders take turns within a round. Two tasks:

- `ce+kl`: cross-entropy and forward KL, ours against dense torch with autograd;
- `jsd`: the generalised JSD at β = 0.5, ours against TRL's way (its documented formula on dense logits) and Liger's
  chunked fused-linear JSD, where that runs.

Hidden rows always get a gradient, the head does or does not; the teacher never does. Memory is the largest resident
set beyond what the process had with all inputs in place (on CUDA, what torch allocated beyond them), so that a
trained head's own gradient is in it. The ratio is taken within each round, from processor time on a CPU, where other
work on the machine counts least, and from wall time on CUDA; the table shows its median.

    python benchmarks/distill_loss.py --rows '[512, 1024, 4096]' --dense_up_to 1024
"""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.losses import Divergence, Teacher, distill_terms
from litgpt.utils import UserError, parse_dtype, run_cli

GIB = 2**30
BETA = 0.5


class Sizes(NamedTuple):
    """One measurement's setting."""

    rows: int
    vocabulary: int
    n_embd: int
    teacher_width: int
    trained: bool
    dtype: str
    device: str
    threads: int
    chunk_rows: int
    compiled: bool


class Inputs(NamedTuple):
    """What every contender gets; all rows have both terms, and all ids are shared, as the peers know no less."""

    hidden_ND: Tensor
    head_VD: Tensor
    targets_N: Tensor
    teacher_NC: Tensor
    teacher_VC: Tensor
    sizes: Sizes


class Cost(NamedTuple):
    """What one forward and backward took."""

    wall: float
    cpu: float
    extra_bytes: int


def benchmark(
    rows: tuple[int, ...] = (512, 1024),
    dense_up_to: int = 1024,
    vocabulary: int = 151_936,
    n_embd: int = 1024,
    teacher_width: int = 1024 if not torch.cuda.is_available() else 5120,
    heads: tuple[Literal["frozen", "trained"], ...] = ("frozen", "trained"),
    tasks: tuple[Literal["ce+kl", "jsd"], ...] = ("ce+kl", "jsd"),
    rounds: int = 3,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    threads: int = torch.get_num_threads(),
    chunk_rows: int = 256,
    compiled: bool = False,
) -> None:
    """Print a markdown table of seconds, memory and ratios.

    Args:
        rows: N, how many tokens are scored.
        dense_up_to: above this N only ours and Liger's run, the others may not fit.
        vocabulary: V.
        n_embd: width of the student.
        teacher_width: width of the teacher.
        heads: whether the student's head gets a gradient.
        tasks: what is computed, see above.
        rounds: how often each contender is measured.
        dtype: of all inputs.
        device: where.
        threads: of the CPU.
        chunk_rows: of ours.
        compiled: let ours be compiled.
    """
    check_equal()
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{threads} threads of {os.cpu_count()} CPU cores"
    print(f"V {vocabulary}, D {n_embd}, C {teacher_width}, {dtype}; {machine}; torch {torch.__version__}\n")
    header = ["task", "head", "N", "contender", "processor s", "wall s", "extra GiB", "ours / it"]
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for task in tasks:
        for n in rows:
            for head in heads:
                sizes = Sizes(
                    n,
                    vocabulary,
                    n_embd,
                    teacher_width,
                    head == "trained",
                    dtype,
                    device,
                    threads,
                    chunk_rows,
                    compiled,
                )
                names = [name for name in CONTENDERS[task] if n <= dense_up_to or name not in DENSE]
                for line in table(task, head, sizes, names, rounds):
                    print(line, flush=True)
    print("\nfastest round (median); memory: largest of the rounds")


def table(task: str, head: str, sizes: Sizes, names: list[str], rounds: int) -> list[str]:
    """Measure all contenders in turns and format a line for each."""
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    skipped: dict[str, str] = {}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name in skipped:
                continue
            result = apart(task, name, sizes)
            if isinstance(result, str):
                skipped[name] = result
            else:
                costs[name].append(result)
    lines = []
    for name in names:
        cells = [task, head, str(sizes.rows), name]
        if name in skipped:
            lines.append(f"| {' | '.join([*cells, skipped[name], '', '', ''])} |")
            continue
        for clock in ("cpu", "wall"):
            seconds = [float(getattr(cost, clock)) for cost in costs[name]]
            cells.append(f"{min(seconds):.3g} ({statistics.median(seconds):.3g})")
        cells.append(f"{max(cost.extra_bytes for cost in costs[name]) / GIB:.2f}")
        clock = "wall" if sizes.device == "cuda" else "cpu"
        pairs = zip(costs["ours"], costs[name], strict=False)
        ratios = [getattr(own, clock) / getattr(cost, clock) for own, cost in pairs]
        cells.append(f"{statistics.median(ratios):.2f}" if name != "ours" and ratios else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def apart(task: str, name: str, sizes: Sizes) -> Cost | str:
    """Measure in a new process: its peak is its own, and running out of memory ends it alone."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, task, name, sizes).result()
        except BrokenProcessPool:
            return "killed: out of memory"


def measure(task: str, name: str, sizes: Sizes) -> Cost | str:
    """Time and memory of one forward and backward, after one of 8 rows that loads what is loaded once."""
    torch.set_num_threads(sizes.threads)
    contender = CONTENDERS[task][name]
    inputs = make_inputs(sizes)
    try:
        small = inputs._replace(
            hidden_ND=inputs.hidden_ND[:8].detach().requires_grad_(),
            targets_N=inputs.targets_N[:8],
            teacher_NC=inputs.teacher_NC[:8],
        )
        contender(small).backward()
        if sizes.compiled or sizes.device == "cuda":
            # And one in full, since kernels are chosen, and compiled, by size.
            contender(inputs).backward()
    except ImportError as error:
        return f"skipped: {error}"
    inputs.hidden_ND.grad = inputs.head_VD.grad = None
    cuda = sizes.device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resident_bytes()
    wall, cpu = time.perf_counter(), time.process_time()
    contender(inputs).backward()
    if cuda:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = torch.cuda.max_memory_allocated() if cuda else peak_bytes()
    return Cost(wall, cpu, peak - before)


def resident_bytes() -> int:
    """What the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """The most it has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_inputs(sizes: Sizes) -> Inputs:
    """Random, with logits of about the spread that a language model has."""
    generator = torch.Generator(sizes.device).manual_seed(0)

    def randn(n: int, width: int, spread: float) -> Tensor:
        tensor = torch.empty(n, width, dtype=parse_dtype(sizes.dtype), device=sizes.device)
        return tensor.normal_(0, spread, generator=generator)

    return Inputs(
        hidden_ND=randn(sizes.rows, sizes.n_embd, 1.0).requires_grad_(),
        head_VD=randn(sizes.vocabulary, sizes.n_embd, 2 / math.sqrt(sizes.n_embd)).requires_grad_(sizes.trained),
        targets_N=torch.randint(sizes.vocabulary, (sizes.rows,), generator=generator, device=sizes.device),
        teacher_NC=randn(sizes.rows, sizes.teacher_width, 1.0),
        teacher_VC=randn(sizes.vocabulary, sizes.teacher_width, 2 / math.sqrt(sizes.teacher_width)),
        sizes=sizes,
    )


def ours(inputs: Inputs, divergence: Divergence, ce_scale: float) -> Tensor:
    """One call of `distill_terms`."""
    n = len(inputs.hidden_ND)
    rows_N = torch.arange(n, device=inputs.hidden_ND.device)
    return distill_terms(
        inputs.hidden_ND,
        inputs.head_VD,
        inputs.targets_N,
        torch.full((n,), float(ce_scale != 0), device=inputs.hidden_ND.device),
        ce_scale=ce_scale / n,
        kd_scale=0.5 / n,
        teacher=Teacher(inputs.teacher_NC, inputs.teacher_VC, rows_N),
        divergence=divergence,
        chunk_rows=inputs.sizes.chunk_rows,
        compiled=inputs.sizes.compiled,
    ).loss


def dense(inputs: Inputs) -> Tensor:
    """Cross-entropy and forward KL as torch's own functions give them."""
    logits_NV = F.linear(inputs.hidden_ND, inputs.head_VD).float()
    with torch.no_grad():
        log_p_NV = F.log_softmax(F.linear(inputs.teacher_NC, inputs.teacher_VC).float(), -1)
    kd = F.kl_div(F.log_softmax(logits_NV, -1), log_p_NV, reduction="batchmean", log_target=True)
    return 0.5 * F.cross_entropy(logits_NV, inputs.targets_N) + 0.5 * kd


def trl(inputs: Inputs) -> Tensor:
    """The generalised JSD from dense logits, by the formula that TRL documents for its GKD trainer."""
    log_q_NV = F.log_softmax(F.linear(inputs.hidden_ND, inputs.head_VD).float(), -1)
    with torch.no_grad():
        log_p_NV = F.log_softmax(F.linear(inputs.teacher_NC, inputs.teacher_VC).float(), -1)
    mixed = torch.stack((log_q_NV + math.log(1 - BETA), log_p_NV + math.log(BETA)))
    log_m_NV = torch.logsumexp(mixed, 0)
    of_teacher = F.kl_div(log_m_NV, log_p_NV, reduction="batchmean", log_target=True)
    of_student = F.kl_div(log_m_NV, log_q_NV, reduction="batchmean", log_target=True)
    return 0.5 * (BETA * of_teacher + (1 - BETA) * of_student)


def liger(inputs: Inputs) -> Tensor:
    """Liger's chunked fused-linear JSD, without its cross-entropy."""
    chunked: Any = importlib.import_module("liger_kernel.chunked_loss")  # imports Triton
    loss = chunked.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=0.5, beta=BETA)
    result: Tensor = loss(inputs.hidden_ND, inputs.head_VD, inputs.teacher_NC, inputs.teacher_VC, inputs.targets_N)
    return result


Contender = Callable[[Inputs], Tensor]


def ours_ce_kl(inputs: Inputs) -> Tensor:
    """Both terms."""
    return ours(inputs, Divergence(), 0.5)


def ours_jsd(inputs: Inputs) -> Tensor:
    """The divergence alone."""
    return ours(inputs, Divergence("jsd", beta=BETA), 0.0)


CONTENDERS: dict[str, dict[str, Contender]] = {
    "ce+kl": {"ours": ours_ce_kl, "dense torch": dense},
    "jsd": {"ours": ours_jsd, "TRL's formula": trl, "Liger": liger},
}
DENSE = {"dense torch", "TRL's formula"}


def check_equal() -> None:
    """A peer that computes something else is no peer."""
    for contenders in CONTENDERS.values():
        found = []
        for name in contenders.keys() - {"Liger"}:  # which needs Triton; its JSD is the same formula
            inputs = make_inputs(Sizes(9, 300, 16, 24, True, "float32", "cpu", 1, 4, False))
            loss = contenders[name](inputs)
            loss.backward()
            assert inputs.hidden_ND.grad is not None and inputs.head_VD.grad is not None
            found.append(
                torch.cat([loss.detach().view(1), inputs.hidden_ND.grad.flatten(), inputs.head_VD.grad.flatten()])
            )
        if (found[0] - found[1]).norm() > 1e-5 * found[0].norm():
            raise UserError(f"{' and '.join(contenders)} do not compute the same")


if __name__ == "__main__":
    run_cli(benchmark)
