"""A whole step of distillation: teacher, base, student, losses, backward, update; ours beside a straightforward loop.

The loop is what one writes in an afternoon: transformers models with equal weights, a dialogue a row padded to the
longest, logits of student and teacher for every token, cross-entropy, KL and linear CKA of them by torch, AdamW of
experts and routers. Ours packs the same dialogues into rows, and asks head and teacher only where something is scored.
Both read the same dialogues with the real vocabulary, and before anything is timed the two are shown to compute the
same cross-entropy and the same KL.

Each measurement is a process of its own: it builds one contender, takes a step that is not timed and then `steps` that
are. Contenders take turns; the ratio is taken within a round, the table shows its median. Memory is the largest
resident set beyond what the process had when its models were loaded (on CUDA, what torch allocated beyond them).
On a CPU glibc is told to keep what is freed: handing gigabytes back and forth would else be most of the plain loop.

    python benchmarks/distill_step.py --tokenizer_dir checkpoints/Qwen/Qwen3-0.6B                # CPU, narrow networks
    python benchmarks/distill_step.py --tokenizer_dir ... --full true --device cuda              # shapes of the recipe
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.cachewriter import CacheWriter
from litgpt.chat import Span
from litgpt.checkpoint import convert_lit_to_hf, load_model, save_lit_dir
from litgpt.config import Config
from litgpt.data import PackedLoader, read_records
from litgpt.distill import Distiller, MicroBatch, Reference, Totals
from litgpt.flops import peak_flops, step_flops
from litgpt.model import GPT
from litgpt.recipe import DataSettings, LossSettings, OptimSettings, RunSettings, Settings
from litgpt.teachercache import TargetForm, open_teacher
from litgpt.tokenizer import Tokenizer
from litgpt.utils import run_cli

GIB = 2**30
CONTENDERS = ("ours", "ours, cached teacher", "plain loop")


@dataclass(frozen=True)
class Task:
    """One measurement's setting.

    Attributes:
        folder: holds `student`, `base`, `teacher` and their Hugging Face copies `*-hf`, and `cache`.
        data: dialogues.
        dialogues: in a step.
        row: tokens in a row of ours.
        steps: timed.
        device: where.
        threads: of the CPU.
        cka_every: every n-th layer.
    """

    folder: Path
    data: Path
    dialogues: int
    row: int
    steps: int
    device: str
    threads: int
    cka_every: int


class Cost(NamedTuple):
    """What a step took and found."""

    wall: float
    cpu: float
    extra_bytes: int
    tokens: int
    ce: float
    kl: float
    mfu: float | None


def benchmark(
    tokenizer_dir: Path,
    data: Path = Path("data/dialogues/train.jsonl"),
    dialogues: int = 4,
    row: int = 1024,
    full: bool = False,
    rounds: int = 3,
    steps: int = 2,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    threads: int = torch.get_num_threads(),
) -> None:
    """Print a markdown table of tokens/s, memory and ratios.

    Args:
        tokenizer_dir: holds Qwen3's tokenizer.
        data: dialogues.
        dialogues: in a step.
        row: tokens in a row of ours.
        full: the recipe's own shapes, 14B and 0.6B; otherwise narrow ones, for a CPU.
        rounds: how often each contender is measured.
        steps: timed in each measurement.
        device: where.
        threads: of the CPU.
    """
    os.environ.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="-1")  # read when a process starts
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Apart: what building takes would else be the largest memory of this process, and of whoever it starts.
        _apart(build, folder, tokenizer_dir, *shapes(full), full)
        task = Task(folder, data, dialogues, row, steps, device, threads, cka_every=4 if full else 2)
        _apart(write_cache, task)
        costs: dict[str, list[Cost]] = {name: [] for name in CONTENDERS}
        skipped: dict[str, str] = {}
        for turn in range(rounds):
            for name in CONTENDERS[turn % 3 :] + CONTENDERS[: turn % 3]:
                result = _apart(measure, task, name) if name not in skipped else skipped[name]
                if isinstance(result, str):
                    skipped[name] = result
                else:
                    costs[name].append(result)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{threads} threads of {os.cpu_count()} CPU cores"
    kind = "recipe's shapes" if full else "narrow networks, whole vocabulary"
    print(f"{kind}; {dialogues} dialogues a step; {machine}; torch {torch.__version__}\n")
    check_equal(costs)
    header = ["contender", "tokens/s", "s a step", "extra GiB", "time, it / ours", "memory, it / ours", "MFU"]
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for name in CONTENDERS:
        print(f"| {' | '.join(_line(name, costs, skipped))} |")
    print(
        "\nmedian of the rounds; time is processor time on a CPU and wall time on CUDA; memory: largest of the rounds"
    )


def _line(name: str, costs: dict[str, list[Cost]], skipped: dict[str, str]) -> list[str]:
    if name in skipped:
        return [name, skipped[name], "", "", "", "", ""]
    own, its = costs["ours"], costs[name]
    clock = "wall" if its[0].mfu is not None else "cpu"
    seconds = statistics.median(getattr(cost, clock) for cost in its)
    most = max(cost.extra_bytes for cost in its)
    ratio = statistics.median(getattr(b, clock) / getattr(a, clock) for a, b in zip(own, its, strict=True))
    mfu = "" if its[0].mfu is None else f"{statistics.median(cost.mfu or 0 for cost in its):.1%}"
    return [
        name,
        f"{its[0].tokens / seconds:.0f}",
        f"{seconds:.2f}",
        f"{most / GIB:.2f}",
        f"{ratio:.2f}",
        f"{most / max(cost.extra_bytes for cost in own):.2f}",
        mfu,
    ]


def _apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in a new process: its peak is its own, and running out of memory ends it alone."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except (BrokenProcessPool, torch.OutOfMemoryError):
            return "out of memory"


def shapes(full: bool) -> tuple[Config, Config]:
    """Base and teacher: the recipe's own, or narrow ones."""
    base = Config.from_name("Qwen3-0.6B")
    teacher = Config.from_name("Qwen3-14B")
    if full:
        return base, teacher
    return (
        replace(base, n_layer=4, n_embd=256, intermediate_size=768, n_head=4, n_query_groups=2, head_size=64),
        replace(teacher, n_layer=8, n_embd=512, intermediate_size=1536, n_head=4, n_query_groups=2, head_size=64),
    )


def build(folder: Path, tokenizer_dir: Path, base: Config, teacher: Config, half_teacher: bool) -> None:
    """Random networks of these shapes, as lit and as Hugging Face directories."""
    tokenizer = Tokenizer(tokenizer_dir)
    generator = torch.Generator().manual_seed(1)
    dense = GPT(base)
    dense.init_weights(std=0.02, generator=generator)
    save_lit_dir(folder / "base", dense.state_dict(), base, source_dir=tokenizer_dir, provenance={})
    # Experts that differ: the routers of a fresh upcycled student have no work to show.
    moe = GPT(base.upcycled(8, 2))
    moe.init_weights(std=0.02, generator=generator)
    moe.load_state_dict({k: v for k, v in dense.state_dict().items() if ".mlp." not in k}, strict=False)
    tokenizer.add_thought_tokens(base.padded_vocab_size)
    save_lit_dir(
        folder / "student", moe.state_dict(), moe.config, source_dir=tokenizer_dir, provenance={}, tokenizer=tokenizer
    )
    del dense, moe
    large = GPT(teacher)
    large.init_weights(std=0.02, generator=generator)
    if half_teacher:
        large = large.bfloat16()
    save_lit_dir(folder / "teacher", large.state_dict(), teacher, source_dir=tokenizer_dir, provenance={})
    del large
    for name in ("student", "base", "teacher"):
        convert_lit_to_hf(folder / name, folder / f"{name}-hf")


def make_loader(task: Task) -> tuple[PackedLoader, Tokenizer]:
    """The step's dialogues as one micro-batch of ours."""
    tokenizer = Tokenizer(task.folder / "student")
    records = read_records(task.data)[: task.dialogues]
    loader = PackedLoader(records, tokenizer, max_seq_length=task.row, micro_batch_size=task.dialogues, shuffle=False)
    rows = len(next(iter(loader)).records)
    used = sum(bool(row) for row in next(iter(PackedLoader(
        records, tokenizer, max_seq_length=task.row, micro_batch_size=rows, shuffle=False
    ))).records)  # fmt: skip
    return PackedLoader(records, tokenizer, max_seq_length=task.row, micro_batch_size=used, shuffle=False), tokenizer


def write_cache(task: Task) -> None:
    """The teacher's hidden states of the step's dialogues."""
    loader, tokenizer = make_loader(task)
    dtype = "bfloat16" if task.device == "cuda" else "float32"
    form = TargetForm("hidden", 1, dtype, 0)
    writer = CacheWriter(task.folder / "cache", task.folder / "teacher", tokenizer, [loader], view="mask", form=form)
    writer.write(device=torch.device(task.device))


def measure(task: Task, name: str) -> Cost:
    """Build a contender and time its steps."""
    torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    step, tokens, flops = plain_loop(task) if name == "plain loop" else our_step(task, cached="cached" in name)
    cuda = task.device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    ce, kl = step()  # the weights are still as they were made, so contenders can be compared
    if cuda:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(task.steps):
        step()
    if cuda:
        torch.cuda.synchronize()
    wall, cpu = (time.perf_counter() - wall) / task.steps, (time.process_time() - cpu) / task.steps
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    possible = peak_flops(torch.cuda.get_device_name()) if cuda else None
    return Cost(wall, cpu, peak - before, tokens, ce, kl, flops / wall / possible if possible else None)


def autocast(task: Task) -> contextlib.AbstractContextManager[Any]:
    """bf16 on a GPU, fp32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if task.device == "cuda" else contextlib.nullcontext()


def our_step(task: Task, *, cached: bool) -> tuple[Callable[..., tuple[float, float]], int, float]:
    """The step of `train_distill.py` on one micro-batch; the teacher reads the student's ids, as in the plain loop."""
    device = torch.device(task.device)
    loader, tokenizer = make_loader(task)
    settings = LossSettings(teacher_view="mask", thought_weight=1.0, cka_every=task.cka_every)
    student = load_model(task.folder / "student", dtype=torch.float32, device=device)
    distiller = Distiller(student, tokenizer.thought_ids, settings).train()
    base = load_model(task.folder / "base", dtype=torch.float32, device=device)
    reference = Reference(base, student, tokenizer.thought_ids, distiller.layers)
    teacher = open_teacher(task.folder / ("cache" if cached else "teacher"), tokenizer, view="mask")
    view = teacher.read(loader)
    teacher.load(dtype=torch.bfloat16 if task.device == "cuda" else torch.float32, device=device)
    trained = [p for p in distiller.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=task.device == "cuda")
    batch = next(iter(loader))

    def step(*, anchored: bool = True) -> tuple[float, float]:
        micro = MicroBatch(batch, settings, [view], device)
        micro.teachers = [teacher.targets(side, micro.targets_N.numel()) for side in micro.teacher_batches]
        with autocast(task):
            if anchored:
                micro.reference = reference.hidden_states(micro.batch)
            loss, terms = distiller(micro, Totals(**vars(micro.counts)), 0.05)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ce, kl, *_ = terms.terms.tolist()
        return ce, kl

    tokens = int((batch.documents_BT >= 0).sum())
    where = Path()
    whole = Settings(
        where, where, where, where,
        DataSettings(max_seq_length=task.row, micro_batch_size=len(batch.ids_BT)),
        settings, OptimSettings(accumulation=1), RunSettings(), "auto", False, 0,
    )  # fmt: skip
    scored = int(((batch.next_tokens()[1] == Span.ANSWER) | (batch.next_tokens()[1] == Span.THOUGHT)).sum())
    flops = step_flops(
        student.config,
        None if cached else teacher.config,
        base.config,
        whole,
        tokens=tokens,
        scored_tokens=scored,
        context=tokens / task.dialogues / 2,
    )
    return step, tokens, flops.model


def plain_loop(task: Task) -> tuple[Callable[[], tuple[float, float]], int, float]:
    """Transformers models, padded rows, dense logits."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = torch.device(task.device)
    loader, tokenizer = make_loader(task)
    documents = loader.documents
    width = max(len(document.ids_T) for document in documents)
    ids_BT = torch.zeros(len(documents), width, dtype=torch.int64)
    spans_BT = torch.full((len(documents), width), int(Span.PAD), dtype=torch.uint8)
    for b, document in enumerate(documents):
        ids_BT[b, : len(document.ids_T)] = document.ids_T
        spans_BT[b, : len(document.ids_T)] = document.spans_T
    mask_BT = (spans_BT != Span.PAD).long()
    ids_BT, spans_BT, mask_BT = ids_BT.to(device), spans_BT.to(device), mask_BT.to(device)

    def load(name: str, dtype: torch.dtype) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(task.folder / f"{name}-hf", dtype=dtype)
        return model.to(device)

    student, base = load("student", torch.float32).train(), load("base", torch.float32).eval()
    teacher = load("teacher", torch.bfloat16 if task.device == "cuda" else torch.float32).eval()
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=task.device == "cuda")
    shared = min(tokenizer.thought_ids or (tokenizer.vocab_size,))
    layers = [n for n in range(base.config.num_hidden_layers) if (n + 1) % task.cka_every == 0]
    # The base has no rows for the two thought tokens of its own; ours gives it the student's.
    rows = list(tokenizer.thought_ids or ())
    with torch.no_grad():
        base.get_input_embeddings().weight[rows] = student.get_input_embeddings().weight[rows]
    targets_BT, of_BT = ids_BT[:, 1:], spans_BT[:, 1:]
    learnt_BT = (of_BT == Span.ANSWER) | (of_BT == Span.THOUGHT)

    def step() -> tuple[float, float]:
        with autocast(task):
            with torch.no_grad():
                teacher_logits = teacher(ids_BT, attention_mask=mask_BT).logits[:, :-1, :shared].float()
                base_states = base.model(ids_BT, attention_mask=mask_BT, output_hidden_states=True).hidden_states
            output = student(ids_BT, attention_mask=mask_BT, output_hidden_states=True, output_router_logits=True)
        logits = output.logits[:, :-1].float()
        ce = F.cross_entropy(logits[learnt_BT], targets_BT[learnt_BT])
        answer_BT = of_BT == Span.ANSWER
        log_q = logits[..., :shared].log_softmax(-1)
        log_p = teacher_logits.log_softmax(-1)
        kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)[answer_BT].mean()
        keep = mask_BT.bool()
        similar = [cka(output.hidden_states[n + 1][keep], base_states[n + 1][keep]) for n in layers]
        loss = 0.5 * ce + 0.5 * kl + 0.05 * (1 - torch.stack(similar).mean()) + 0.01 * output.aux_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return ce.item(), kl.item()

    tokens = int(mask_BT.sum())
    return step, tokens, 0.0


def cka(x_ND: Tensor, y_NC: Tensor) -> Tensor:
    """Linear CKA in its plain, biased form (Kornblith et al. 2019, equation 5)."""
    x_ND, y_NC = x_ND.float() - x_ND.float().mean(0), y_NC.float() - y_NC.float().mean(0)
    return (y_NC.T @ x_ND).square().sum() / ((x_ND.T @ x_ND).norm() * (y_NC.T @ y_NC).norm())


def check_equal(costs: dict[str, list[Cost]]) -> None:
    """All contenders found the same cross-entropy and KL before the first update, or the comparison is worthless."""
    found = {name: its[0] for name, its in costs.items() if its}
    for term in ("ce", "kl"):
        values = {name: getattr(cost, term) for name, cost in found.items()}
        print(f"{term} before the first update: " + ", ".join(f"{name} {value:.5f}" for name, value in values.items()))
        if max(values.values()) - min(values.values()) > 0.01 * max(values.values()):
            raise RuntimeError(f"the contenders do not compute the same {term}")
    print()


if __name__ == "__main__":
    run_cli(benchmark)
