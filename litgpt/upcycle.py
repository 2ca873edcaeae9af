"""Dense → mixture of experts, and the proof that the function did not change.

- `upcycle` copies a lit directory tensor by tensor: each dense MLP becomes E equal experts and a small random router,
  everything else goes over bit for bit; two free vocabulary rows become `<thought>` and `</thought>`.
- A directory whose proof (`litgpt.proof`) fails never appears.

With renormalised router weights the average of K equal experts is the dense MLP, whatever the router says, so the
router may be random. It must not be zero (every token would pick the same K experts and training would keep it so), nor
large (a saturated softmax): N(0, 0.02) starts with a nearly uniform load.
Source of the recipe: Komatsuzaki et al. 2022, Sparse Upcycling (arXiv 2212.05055); full copies in every layer.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from litgpt.chat import chat_template
from litgpt.checkpoint import (
    CONFIG_FILE,
    GENERATION_FILE,
    HF_CONFIG_FILE,
    PROVENANCE_FILE,
    TOKENIZER_FILES,
    copy_sidecars,
    read_provenance,
    require_lit_dir,
    tool_version,
    write_config,
    write_hf_config,
    write_provenance,
)
from litgpt.config import Config
from litgpt.keymap import LIT_EMBED, LIT_HEAD, BlockId, layout
from litgpt.proof import SAMPLE_TEXTS, Proof, Sample, check_tensors, prove, prove_on, twin
from litgpt.tensorfile import LIT_FILE, LitReader, LitWriter, Spec, check_free_disk, full_disk_is_users_error
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, atomic_dir, progress, sha256_file

__all__ = ["Proof", "Upcycled", "default_out_dir", "prove", "upcycle"]

THOUGHT_NOISE = 0.05
"""Standard deviation of the noise on a new vocabulary row, as a share of the row's (or the embedding's) own."""

ROWS_AT_A_TIME = 8192


@dataclass(frozen=True)
class Upcycled:
    """What `upcycle` made."""

    out_dir: Path
    config: Config
    thought_ids: tuple[int, int] | None
    proofs: tuple[Proof, ...]
    n_bytes: int
    """Size of the new `lit_model.pth`."""
    n_parameters: int
    n_active: int
    """Parameters that one token meets: K experts of each layer instead of E."""


def default_out_dir(checkpoint_dir: str | os.PathLike[str], n_expert: int, n_expert_per_token: int) -> Path:
    """Where the mixture of experts goes if nothing else is said: beside the dense model."""
    directory = Path(os.path.normpath(checkpoint_dir))
    directory = directory if directory.name else directory.resolve()  # "."
    return directory.with_name(f"{directory.name}-MoE-{n_expert}x{n_expert_per_token}")


def upcycle(
    checkpoint_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str] | None = None,
    *,
    n_expert: int = 8,
    n_expert_per_token: int = 2,
    router_std: float = 0.02,
    thought_tokens: Literal["add", "none"] = "add",
    seed: int = 1337,
    proof_dtype: Literal["float32", "float64", "both"] = "float32",
) -> Upcycled:
    """Write the mixture of experts that computes the same function as a dense model, after proving that it does.

    Args:
        checkpoint_dir: lit directory of the dense model; it is only read.
        out_dir: lit directory to appear, whole or not at all; an earlier result of this function is replaced.
            None: `default_out_dir`.
        n_expert: experts per layer, at least 2.
        n_expert_per_token: experts that each token goes through.
        router_std: standard deviation of the router's random weights.
        thought_tokens: `add` gives `<thought>` and `</thought>` two free vocabulary rows that start as the rows of
            `<think>` and `</think>` (or, where the tokenizer has none, as the mean row), plus a little noise; `none`
            leaves tokenizer and embedding as they are.
        seed: of the routers and that noise.
        proof_dtype: arithmetic of the proof. A float32 proof beyond its bounds is repeated in float64, which decides.

    Raises:
        UserError: the source is missing, not a lit directory or a MoE already; sizes that make no sense; no free
            vocabulary row; `out_dir` holds something else; the disk is too small; the proof fails. What was in
            `out_dir` is then still there.
    """
    if n_expert < 2:
        raise UserError(f"n_expert is {n_expert}, expected at least 2; with one expert the model stays dense")
    if not (math.isfinite(router_std) and router_std > 0):
        raise UserError(
            f"router_std is {router_std}, expected above 0: a zero router gives all tokens the same experts"
        )
    source_dir = require_lit_dir(checkpoint_dir)
    dense = Config.from_checkpoint(source_dir)
    moe = dense.upcycled(n_expert, n_expert_per_token)
    out_dir = Path(out_dir) if out_dir is not None else default_out_dir(source_dir, n_expert, n_expert_per_token)
    # A link is followed: replacing it would leave the old directory behind where it points to.
    target = out_dir.resolve()
    _refuse_foreign(target, source_dir)

    reader = LitReader(source_dir)
    check_tensors(reader, layout(dense, "lit"))
    tokenizer = Tokenizer(source_dir)
    sample = Sample.of(tokenizer, SAMPLE_TEXTS, dense.block_size)
    new_rows: dict[str, dict[int, Tensor]] = {}
    added: tuple[int, ...] = ()
    if thought_tokens == "add" and tokenizer.thought_ids is None:
        think_ids = tokenizer.think_ids
        added = tokenizer.add_thought_tokens(dense.padded_vocab_size)
        for name in (LIT_EMBED,) if dense.tie_embeddings else (LIT_EMBED, LIT_HEAD):
            starts = _thought_rows(reader, name, think_ids, sample.vocabulary, seed)
            new_rows[name] = dict(zip(added, starts, strict=True))

    plan = _Plan.of(dense, moe, reader)
    needed = sum(spec.nbytes for spec in plan.specs.values()) + 512 * len(plan.specs)  # 512: a tensor's zip headers
    check_free_disk(target, needed + sum(file.stat().st_size for file in source_dir.glob("*.json")))
    with full_disk_is_users_error(target), atomic_dir(target, replace=True) as temporary:
        # What takes no disk to speak of is done while the weights are written: both leave the interpreter free.
        with ThreadPoolExecutor(1) as pool:
            digest = pool.submit(sha256_file, reader.path)
            dtypes = {spec.dtype for spec in plan.specs.values()}
            beside = pool.submit(_write_beside, temporary, source_dir, moe, tokenizer, dtypes)
            _write_weights(temporary / LIT_FILE, plan, reader, new_rows, router_std, seed)
        beside.result()
        made: dict[str, Any] = {
            "directory": target.name,
            "source": source_dir.resolve().name,
            "source_sha256": {LIT_FILE: digest.result()},
            "source_provenance": read_provenance(source_dir),
            "recipe": "copy",
            "n_expert": n_expert,
            "n_expert_per_token": n_expert_per_token,
            "router_std": router_std,
            "seed": seed,
            "thought_ids": list(tokenizer.thought_ids) if tokenizer.thought_ids else None,
        }
        provenance = {"tie_embeddings": moe.tie_embeddings, "tool": tool_version(), "upcycled": made}
        write_provenance(temporary, provenance)
        proofs = _prove_or_refuse(sample, source_dir, temporary, added, proof_dtype)
        made["proof"] = [asdict(proof) | {"changed": list(proof.changed)} for proof in proofs]
        write_provenance(temporary, provenance)

    per_expert = 3 * moe.n_layer * moe.n_embd * moe.expert_size
    return Upcycled(
        out_dir=out_dir,
        config=moe,
        thought_ids=tokenizer.thought_ids,
        proofs=proofs,
        n_bytes=(target / LIT_FILE).stat().st_size,
        n_parameters=plan.n_parameters,
        n_active=plan.n_parameters - (n_expert - n_expert_per_token) * per_expert,
    )


def _refuse_foreign(target: Path, source_dir: Path) -> None:
    """Raise `UserError` unless `target` is absent, empty, or an earlier result of `upcycle` with no file added."""
    if target == source_dir.resolve():
        raise UserError(f"out_dir {target} is the dense checkpoint itself; give another directory")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    own_files = {LIT_FILE, CONFIG_FILE, PROVENANCE_FILE, HF_CONFIG_FILE, GENERATION_FILE, *TOKENIZER_FILES}
    if target.is_dir() and {path.name for path in target.iterdir()} <= own_files:
        # A model trained from a result of ours may have inherited its provenance, but hardly its directory's name.
        made = read_provenance(target).get("upcycled")
        if isinstance(made, dict) and made.get("directory") == target.name:
            return
    raise UserError(
        f"out_dir {target} holds something that this command did not write; give another directory or remove it first"
    )


@dataclass(frozen=True)
class _Plan:
    """What the MoE's file consists of.

    E equal experts are stored once, under E names: `torch.save` keeps shared storage shared, and who loads the file
    into E parameters gets E copies. A tied head is another name for the embedding in the same way.
    """

    copies: dict[str, str]
    """Tensor of the dense file → the tensor of the MoE's file that starts as a copy of it."""
    routers: list[str]
    specs: dict[str, Spec]
    """Every tensor that is stored, in the file's order."""
    aliases: dict[str, str]
    """Further name → the stored tensor that it means."""
    n_parameters: int
    """Of the model, every expert counted."""

    @classmethod
    def of(cls, dense: Config, moe: Config, reader: LitReader) -> _Plan:
        source = layout(dense, "lit", tied=dense.tie_embeddings)
        target = layout(moe, "lit", tied=moe.tie_embeddings)
        copies: dict[str, str] = {}
        routers: list[str] = []
        specs: dict[str, Spec] = {}
        aliases: dict[str, str] = {LIT_HEAD: LIT_EMBED} if moe.tie_embeddings else {}
        for name, (piece, *_) in target.parts.items():
            is_router = piece.key == "router"
            origin = source.rows[BlockId("gate", piece.layer) if is_router else twin(piece)].tensor
            if is_router:
                routers.append(name)
            elif copies.setdefault(origin, name) != name:
                aliases[name] = copies[origin]
                continue
            specs[name] = Spec(target.shapes[name], reader.specs[origin].dtype)
        return cls(copies, routers, specs, aliases, sum(math.prod(shape) for shape in target.shapes.values()))


def _write_weights(
    path: Path,
    plan: _Plan,
    reader: LitReader,
    new_rows: dict[str, dict[int, Tensor]],
    router_std: float,
    seed: int,
) -> None:
    """Write the MoE's `lit_model.pth`, holding one tensor of the dense model at a time."""
    with LitWriter(path, plan.specs, aliases=plan.aliases) as writer:
        for source, name in progress(plan.copies.items(), "upcycling", total=len(plan.copies), unit="tensor"):
            tensor = reader.read(source)
            for row, values in new_rows.get(source, {}).items():
                tensor[row] = values
            writer.write(name, tensor)
        for name in plan.routers:
            shape, dtype = plan.specs[name]
            writer.write(name, (torch.randn(shape, generator=_generator(seed, name)) * router_std).to(dtype))


def _write_beside(
    directory: Path, source_dir: Path, moe: Config, tokenizer: Tokenizer, dtypes: Collection[torch.dtype]
) -> None:
    """Write what stands beside the weights: the tokenizer and the configs."""
    copy_sidecars(source_dir, directory)
    if tokenizer.thought_ids is not None:
        tokenizer.chat_template = chat_template("thought")
        tokenizer.save(directory)
    write_config(directory, moe)
    write_hf_config(directory, moe, source_dir, dtypes=dtypes)


def _generator(seed: int, name: str) -> torch.Generator:
    """A stream of its own for each tensor; hashed, since neighbouring seeds must not share streams of other tensors."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    # torch's CPU generator is seeded with 32 bits; more would be cut off.
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def _thought_rows(
    reader: LitReader, name: str, think_ids: tuple[int, int] | None, known_rows: int, seed: int
) -> list[Tensor]:
    """Start values of the two rows of `<thought>` and `</thought>` in the embedding or the head, in its dtype.

    Raises:
        UserError: the two are equal.
    """
    if think_ids is not None:
        starts = [reader.read_rows(name, row, row + 1)[0].float() for row in think_ids]
        stds = [float(row.std()) for row in starts]
    else:
        mean, std = _mean_row(reader, name, known_rows)
        starts, stds = [mean, mean], [std, std]
    generator = _generator(seed, name)
    rows = [
        (start + THOUGHT_NOISE * std * torch.randn(start.shape, generator=generator)).to(reader.specs[name].dtype)
        for start, std in zip(starts, stds, strict=True)
    ]
    # A checkpoint in float32 is soon cast to bfloat16.
    if torch.equal(rows[0].bfloat16(), rows[1].bfloat16()):
        raise UserError(
            f"{reader.path}: the rows of {name} give <thought> and </thought> one and the same start; "
            "convert the checkpoint again, its embedding is broken"
        )
    return rows


def _mean_row(reader: LitReader, name: str, rows: int) -> tuple[Tensor, float]:
    """Mean of the first rows, fp32 [D], and the standard deviation of all their elements."""
    total, squares, count = torch.zeros(1, dtype=torch.float64), 0.0, 0
    for start in range(0, rows, ROWS_AT_A_TIME):
        chunk = reader.read_rows(name, start, min(start + ROWS_AT_A_TIME, rows)).double()
        total = total + chunk.sum(dim=0)
        squares += float(chunk.square().sum())
        count += chunk.numel()
    return (total / rows).float(), math.sqrt(max(0.0, squares / count - float(total.sum() / count) ** 2))


def _prove_or_refuse(
    sample: Sample, dense_dir: Path, moe_dir: Path, added: tuple[int, ...], proof_dtype: str
) -> tuple[Proof, ...]:
    proofs: list[Proof] = []
    if proof_dtype != "float64":
        proofs.append(prove_on(sample, dense_dir, moe_dir, dtype=torch.float32, added=added))
    # How much rounding float32 shows depends on the model; float64 tells rounding from a fault.
    if not proofs or proof_dtype == "both" or not (proofs[0].exact or proofs[0].changed):
        proofs.append(prove_on(sample, dense_dir, moe_dir, dtype=torch.float64, added=added))
    if not proofs[-1].exact or any(proof.changed for proof in proofs):
        raise UserError(
            f"the proof fails, so nothing was kept ({proofs[-1].describe()}); "
            "check disk and memory of this machine and the source's weights, and run the command again"
        )
    return tuple(proofs)
