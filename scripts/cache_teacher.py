"""Run the teacher once and keep what it says at the answers' tokens: `python scripts/cache_teacher.py`.

    python scripts/cache_teacher.py --kind sampled
    torchrun --nproc_per_node 8 scripts/cache_teacher.py --kind hidden

Give the directory to `train_distill.py` as its --teacher. A killed run goes on where it was when called again.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from litgpt.cachewriter import CacheWriter, process_of_many
from litgpt.checkpoint import require_lit_dir
from litgpt.data import PackedLoader, read_records
from litgpt.teacher import View
from litgpt.teachercache import Kind, TargetForm, shard_path
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, parse_device, parse_dtype, run_cli


def cache_teacher(
    teacher: Path = Path("checkpoints/Qwen/Qwen3-14B"),
    student: Path = Path("checkpoints/Qwen/Qwen3-0.6B-MoE-8x2"),
    data: list[Path] = [Path("data/dialogues/train.jsonl"), Path("data/dialogues/val.jsonl")],  # noqa: B006
    out_dir: Path = Path("out/teacher"),
    kind: Kind = "sampled",
    k: int | None = None,
    view: View = "strip",
    dtype: str = "auto",
    max_seq_length: int = 2048,
    batch_tokens: int = 16_384,
    chunk_rows: int = 256,
    shard_mb: int = 256,
    shard_records: int = 4096,
    device: str = "auto",
    seed: int = 1337,
) -> None:
    """Run the teacher once over dialogues and keep its targets for as many trainings as you like.

    Args:
        teacher: lit dir of the teacher.
        student: lit dir of the student; only its tokenizer is read.
        data: dialogues as JSON lines, training and validation.
        out_dir: the cache; an unfinished one of the same settings is finished.
        kind: sampled (k drawn ids, unbiased, smallest), hidden (last hidden state, exact, 100 times larger) or topk (k
            likeliest ids, biased).
        k: ids kept for a token; default 12 for sampled, 64 for topk.
        view: what the teacher reads: strip (no thought), native (the thought in its own tags) or mask (the student's
            ids).
        dtype: the teacher runs in it; auto is bfloat16 on a GPU and float32 on a CPU, as in training.
        max_seq_length: dialogues with more tokens are left out, as in training.
        batch_tokens: tokens the teacher reads at one time; memory only.
        chunk_rows: tokens whose logits exist at one time; memory only.
        shard_mb: size at which a new file begins, in MB.
        shard_records: records at which a new file begins.
        device: cpu, cuda or auto; under torchrun each process takes its own GPU.
        seed: of the draws.
    """
    if min(max_seq_length, batch_tokens, chunk_rows, shard_mb, shard_records) < 1 or not 0 <= seed < 2**63:
        raise UserError(
            "max_seq_length, batch_tokens, chunk_rows, shard_mb and shard_records must be positive, seed 0 or more"
        )
    # Before the dialogues are rendered, which takes a while.
    require_lit_dir(teacher)
    rank, world_size, local_rank = process_of_many()
    torch_device = parse_device(device)
    if torch_device == torch.device("cuda") and world_size > 1:
        torch_device = parse_device(f"cuda:{local_rank}")
    dtype = ("float32" if torch_device.type == "cpu" else "bfloat16") if dtype == "auto" else dtype
    parse_dtype(dtype)
    # What hidden has no use for must not make two caches differ.
    form = TargetForm(
        kind=kind,
        k=1 if kind == "hidden" else k if k is not None else 12 if kind == "sampled" else 64,
        dtype=dtype,
        seed=seed if kind == "sampled" else 0,
    )
    tokenizer = Tokenizer(student)
    loaders = []
    for path in data:
        loader = PackedLoader(
            read_records(path, texts=True),
            tokenizer,
            max_seq_length=max_seq_length,
            micro_batch_size=1,
            shuffle=False,
        )
        if rank == 0:
            loader.say_dropped(path.name)
        loaders.append(loader)
    writer = CacheWriter(
        out_dir,
        teacher,
        tokenizer,
        loaders,
        view=view,
        form=form,
        shard_bytes=shard_mb * 10**6,
        shard_records=shard_records,
    )
    manifest = writer.manifest
    if rank == 0:
        print(
            f"{out_dir}: {manifest.records} records, {manifest.rows} answer tokens, {kind} of "
            f"{form.row_bytes(writer.width)} bytes each: {size_of(writer.nbytes)} in {manifest.shards} shards, "
            f"{len(writer.missing())} of them to be written",
            flush=True,
        )
    start = time.perf_counter()
    written = writer.write(
        device=torch_device, rank=rank, world_size=world_size, batch_tokens=batch_tokens, chunk_rows=chunk_rows
    )
    seconds = time.perf_counter() - start
    who = f"process {rank} of {world_size} " if world_size > 1 else ""
    there = [path for n in range(manifest.shards) if (path := shard_path(out_dir, n)).is_file()]
    total = sum(path.stat().st_size for path in there)
    print(
        f"{who}wrote {written} shards in {seconds:.1f} s; {len(there)} of {manifest.shards} are there, {size_of(total)}"
    )


def size_of(nbytes: int) -> str:
    """A number of bytes to be read by people."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes / 1000:.1f} kB"


if __name__ == "__main__":
    run_cli(cache_teacher)
