"""Dense → mixture of experts, and the proof that the function is what the recipe says.

- `upcycle` goes from a lit or a Hugging Face directory to either, rows at a time: the FFNs become experts by a recipe
  (`litgpt.recipes`), routers start as told (`litgpt.routers`), everything else goes over bit for bit; two free
  vocabulary rows become `<thought>` and `</thought>`.
- A directory whose proof (`litgpt.proof`) fails never appears; `report/upcycle.md` in it tells what was shown.
- `verify` makes the same proof and report for directories that are there already.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
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
    STORED_HEAD,
    TOKENIZER_FILES,
    copy_sidecars,
    read_provenance,
    stop_at_end_of_turn,
    tool_version,
    write_config,
    write_hf_config,
    write_provenance,
)
from litgpt.config import Config
from litgpt.keymap import LIT_EMBED, LIT_HEAD, BlockId, Layout, layout
from litgpt.proof import SAMPLE_TEXTS, Proof, Sample, changed_bits, prove, prove_on, recipe_behind
from litgpt.recipes import COPY, Recipe, origin, seeded
from litgpt.routers import RouterStart, router_weights
from litgpt.safetensorfile import HF_INDEX, HFWriter
from litgpt.stored import EMBED, HEAD, Stored
from litgpt.tensorfile import LIT_FILE, LitWriter, Spec, check_free_disk, full_disk_is_users_error
from litgpt.tokenizer import Tokenizer
from litgpt.trainable import default_parts, parts_of
from litgpt.upcycle_report import REPORT_DIR, Report, write_upcycle_report
from litgpt.utils import UserError, atomic_dir, progress, sha256_file

__all__ = ["Format", "Layers", "Proof", "ProofDtype", "Report", "default_out_dir", "prove", "upcycle", "verify"]

Format = Literal["lit", "hf"]
ProofDtype = Literal["float32", "float64", "both", "all", "none"]
Layers = str | Sequence[int]

THOUGHT_NOISE = 0.05
"""Standard deviation of the noise on a new vocabulary row, as a share of the row's (or the embedding's) own."""

ROWS_AT_A_TIME = 8192

CHUNK_BYTES = 32 << 20
"""What is copied is copied in pieces of this size, so that memory does not grow with the model's tensors."""

MAX_SHARD_BYTES = 5 * 10**9


def default_out_dir(
    checkpoint_dir: str | os.PathLike[str],
    n_expert: int,
    n_expert_per_token: int,
    recipe: Recipe = COPY,
    format: Format = "lit",
) -> Path:
    """Where the mixture of experts goes if nothing else is said: beside the dense model."""
    directory = Path(os.path.normpath(checkpoint_dir))
    directory = directory if directory.name else directory.resolve()  # "."
    kind = "" if recipe.name == "copy" else f"-{recipe.name}"
    end = "-hf" if format == "hf" else ""
    return directory.with_name(f"{directory.name}-MoE-{n_expert}x{n_expert_per_token}{kind}{end}")


def chosen_layers(layers: Layers, n_layer: int) -> list[int]:
    """Layers that get experts: `all`, `every:N` (every N-th and so the last of each N), or their numbers.

    Raises:
        UserError: something else, or a layer that does not exist.
    """
    if isinstance(layers, str):
        word, _, number = layers.partition(":")
        if layers == "all":
            return list(range(n_layer))
        if word == "every" and number.isdecimal() and 1 <= int(number) <= n_layer:
            return list(range(int(number) - 1, n_layer, int(number)))
        if not all(part.strip().isdecimal() for part in layers.split(",")):
            raise UserError(f"layers is {layers!r}, expected all, every:N (N up to {n_layer}) or numbers like 0,4,8")
        layers = [int(part) for part in layers.split(",")]
    if not layers or not set(layers) <= set(range(n_layer)):
        raise UserError(f"layers are {list(layers)}, expected one or more of 0 ... {n_layer - 1}")
    return sorted(set(layers))


def upcycle(
    checkpoint_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str] | None = None,
    *,
    recipe: Recipe = COPY,
    n_expert: int = 8,
    n_expert_per_token: int = 2,
    layers: Layers = "all",
    router: RouterStart | None = None,
    format: Format = "lit",
    thought_tokens: Literal["add", "none"] = "add",
    trainable: Sequence[str] | None = None,
    seed: int = 1337,
    proof_dtype: ProofDtype = "all",
) -> Report:
    """Write the mixture of experts that a recipe makes of a dense model, after proving that it is that.

    Args:
        checkpoint_dir: lit or Hugging Face directory of the dense model; it is only read.
        out_dir: directory to appear, whole or not at all; an earlier result of this function is replaced.
            None: `default_out_dir`.
        recipe: how each expert is made of the FFN.
        n_expert: experts per layer, at least 2 (of a granular recipe: before they are cut).
        n_expert_per_token: experts that each token goes through.
        layers: which get experts, see `chosen_layers`. Qwen3-MoE's format can say so; Mixtral's and llama.cpp cannot.
        router: how routers start; `None`: N(0, 0.02).
        format: lit, or hf: what transformers and vLLM load.
        thought_tokens: `add` gives `<thought>` and `</thought>` two free vocabulary rows that start as the rows of
            `<think>` and `</think>` (or, where the tokenizer has none, as the mean row), plus a little noise; `none`
            leaves tokenizer and embedding as they are.
        trainable: parts that a later training changes (`litgpt.trainable.PARTS`), written into provenance.yaml.
        seed: of all that is drawn.
        proof_dtype: arithmetic of the proof. `all` is float32 and, on one sentence, bfloat16. A float32 proof beyond
            its bounds is repeated in float64, which decides. `none` reads back every stored tensor and compares its
            bits, as all do, but runs neither model.

    Raises:
        UserError: the source is missing, incomplete or a MoE already; sizes that make no sense; a format that cannot
            hold the result; no free vocabulary row; `out_dir` holds something else; the disk is too small; the proof
            fails. What was in `out_dir` is then still there.
    """
    if n_expert * recipe.granularity < 2:
        raise UserError(f"n_expert is {n_expert}, expected at least 2; with one expert the model stays dense")
    router = router or RouterStart()
    dense = Stored(checkpoint_dir)
    where = chosen_layers(layers, dense.config.n_layer)
    config = recipe.config(dense.config, n_expert, n_expert_per_token, where)
    if format == "hf":
        _ = config.hf_family  # says why there is none
    parts = parts_of(trainable or default_parts(config), config, {})
    if out_dir is None:
        out_dir = default_out_dir(checkpoint_dir, n_expert, n_expert_per_token, recipe, format)
    # A link is followed: replacing it would leave the old directory behind where it points to.
    target = Path(out_dir).resolve()
    _refuse_foreign(target, dense.directory)

    tokenizer = Tokenizer(dense.directory)
    sample = Sample.of(tokenizer, SAMPLE_TEXTS, dense.config.block_size)
    new_rows: dict[BlockId, dict[int, Tensor]] = {}
    added: tuple[int, ...] = ()
    if thought_tokens == "add" and tokenizer.thought_ids is None:
        think_ids = tokenizer.think_ids
        added = tokenizer.add_thought_tokens(dense.config.padded_vocab_size)
        for block in (EMBED,) if dense.config.tie_embeddings else (EMBED, HEAD):
            starts = _thought_rows(dense, block, think_ids, sample.vocabulary, seed)
            new_rows[block] = dict(zip(added, starts, strict=True))

    plan = _Plan.of(dense, config, recipe, format)
    needed = sum(spec.nbytes for spec in plan.specs.values()) + 512 * len(plan.specs)  # 512: a tensor's zip headers
    check_free_disk(target, needed + sum(file.stat().st_size for file in dense.directory.glob("*.json")))
    routers: dict[int, Tensor] = {}
    if config.is_moe:
        drawn = router_weights(router, dense, tokenizer, n_expert=n_expert, layers=where, seed=seed)
        routers = {layer: rows_ED.repeat_interleave(recipe.granularity, dim=0) for layer, rows_ED in drawn.items()}

    with full_disk_is_users_error(target), atomic_dir(target, replace=True) as temporary, ThreadPoolExecutor(1) as pool:
        # What takes no disk to speak of is done while the weights are written: both leave the interpreter free.
        source_hashes = _hashing(pool, dense.files)
        dtypes = {spec.dtype for spec in plan.specs.values()}
        beside = pool.submit(_write_beside, temporary, dense.directory, config, tokenizer, dtypes, format)
        written = plan.write(temporary, _Values(dense, recipe, routers, new_rows, seed))
        beside.result()
        thought_ids = tokenizer.thought_ids
        del tokenizer  # Qwen3's takes 100 MB
        made: dict[str, Any] = {
            "directory": target.name,
            "source": dense.directory.resolve().name,
            "source_sha256": {},
            "source_provenance": read_provenance(dense.directory),
            **recipe.settings(),
            "n_expert": n_expert,
            "n_expert_per_token": n_expert_per_token,
            "layers": where,
            "router": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(router).items()},
            "seed": seed,
            "thought_ids": list(thought_ids) if thought_ids else None,
            "trainable": list(parts),
        }
        provenance = config.ours() | {"tool": tool_version(), "upcycled": made}
        if format == "lit" and dense.head_stored_twice:
            provenance[STORED_HEAD] = True
        write_provenance(temporary, provenance)
        stored = Stored(temporary)
        stored.reader.once = True
        hashes = _hashing(pool, [path for path in stored.files if path.name not in written])
        proofs, changed = _prove(sample, dense, stored, added, recipe, seed, proof_dtype)
        _refuse_failed(proofs, changed, recipe)
        made["source_sha256"] = {name: digest.result() for name, digest in source_hashes.items()}
        made["proof"] = [proof.figures() for proof in proofs]
        write_provenance(temporary, provenance)
        report = Report(
            out_dir=Path(out_dir),
            dense=dense.config,
            config=config,
            recipe=recipe.settings(),
            thought_ids=thought_ids,
            proofs=proofs,
            changed=changed,
            dense_bytes=sum(path.stat().st_size for path in dense.files),
            n_bytes=sum(path.stat().st_size for path in stored.files),
            dense_sha256=made["source_sha256"],
            sha256=written | {name: digest.result() for name, digest in hashes.items()},
        )
        write_upcycle_report(temporary / REPORT_DIR, report)
    return report


def verify(
    dense_dir: str | os.PathLike[str],
    made_dir: str | os.PathLike[str],
    *,
    out_dir: str | os.PathLike[str] | None = None,
    proof_dtype: ProofDtype = "all",
) -> Report:
    """The proof and the report of `upcycle` for a MoE that is there already, fresh or trained, ours or another's.

    Args:
        dense_dir, made_dir: lit or Hugging Face directories.
        out_dir: where `upcycle.md` and `upcycle.json` go; `None`: nowhere.
        proof_dtype: as of `upcycle`.

    Raises:
        UserError: a directory is incomplete, or the two are not of one shape.
    """
    dense, made = Stored(dense_dir), Stored(made_dir)
    known, theirs = Tokenizer(dense.directory), Tokenizer(made.directory)
    sample = Sample.of(known, SAMPLE_TEXTS, dense.config.block_size)
    added = tuple(set(theirs.thought_ids or ()) - set(known.thought_ids or ()))
    recipe, seed = recipe_behind(made)
    made.reader.once = True
    with ThreadPoolExecutor(1) as pool:
        hashes = [_hashing(pool, model.files) for model in (dense, made)]
        proofs, changed = _prove(sample, dense, made, added, recipe, seed, proof_dtype)
        dense_sha256, sha256 = ({name: digest.result() for name, digest in each.items()} for each in hashes)
    report = Report(
        out_dir=Path(made_dir),
        dense=dense.config,
        config=made.config,
        recipe=recipe.settings(),
        thought_ids=theirs.thought_ids,
        proofs=proofs,
        changed=changed,
        dense_bytes=sum(path.stat().st_size for path in dense.files),
        n_bytes=sum(path.stat().st_size for path in made.files),
        dense_sha256=dense_sha256,
        sha256=sha256,
    )
    if out_dir is not None:
        write_upcycle_report(Path(out_dir), report)
    return report


def _hashing(pool: ThreadPoolExecutor, files: Sequence[Path]) -> dict[str, Future[str]]:
    return {path.name: pool.submit(sha256_file, path) for path in files}


def _refuse_foreign(target: Path, source_dir: Path) -> None:
    """Raise `UserError` unless `target` is absent, empty, or an earlier result of `upcycle` with no file added."""
    if target == source_dir.resolve():
        raise UserError(f"out_dir {target} is the dense checkpoint itself; give another directory")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    own = {LIT_FILE, CONFIG_FILE, PROVENANCE_FILE, HF_CONFIG_FILE, GENERATION_FILE, HF_INDEX, REPORT_DIR}
    if target.is_dir():
        weights = {path.name for path in target.glob("model*.safetensors")}
        if {path.name for path in target.iterdir()} <= own | set(TOKENIZER_FILES) | weights:
            # A model trained from a result of ours may have inherited its provenance, but hardly its directory's name.
            made = read_provenance(target).get("upcycled")
            if isinstance(made, dict) and made.get("directory") == target.name:
                return
    raise UserError(
        f"out_dir {target} holds something that this command did not write; give another directory or remove it first"
    )


@dataclass(frozen=True)
class _Values:
    """What the made model's blocks hold."""

    dense: Stored
    recipe: Recipe
    routers: dict[int, Tensor]
    new_rows: dict[BlockId, dict[int, Tensor]]
    seed: int
    recent: dict[tuple[BlockId, int], Tensor] = field(default_factory=dict)
    """The pieces read last: a file holds the three matrices of one expert after those of the other."""

    def rows(self, block: BlockId, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of a block, in pieces of `CHUNK_BYTES` where it is a copy, else at once."""
        if block.key == "router":
            yield 0, self.routers[block.layer].to(dtype)
            return
        source = origin(block)
        if self.recipe.kind(block) is not None:
            yield 0, self.recipe.make(block, self.dense.read(source), self.seed)
            return
        place = self.dense.place(source)
        height = place.stop - place.start
        row_bytes = math.prod(self.dense.reader.specs[place.tensor].shape[1:]) * dtype.itemsize
        step = max(1, CHUNK_BYTES // row_bytes)
        for start in range(0, height, step):
            rows = self._read(source, start, min(start + step, height))
            for row, values in self.new_rows.get(source, {}).items():
                if start <= row < start + len(rows):
                    rows[row - start] = values
            yield start, rows

    def _read(self, source: BlockId, start: int, stop: int) -> Tensor:
        rows = self.recent.get((source, start))
        if rows is None:
            while len(self.recent) >= 3:
                del self.recent[next(iter(self.recent))]
            rows = self.recent[source, start] = self.dense.read(source, start, stop)
        return rows


@dataclass(frozen=True)
class _Plan:
    """What the made model's files consist of.

    A lit file stores tensors of the same origin and kind once, under many names:
    `torch.save` keeps shared storage shared, and who loads the file into E parameters gets E copies. A tied head is
    another name for the embedding in the same way. Safetensors have no such names, so there each is written.
    """

    format: Format
    layout: Layout
    specs: dict[str, Spec]
    """Every tensor that is stored, in the file's order."""
    aliases: dict[str, str]
    """Further name → the stored tensor that it means."""

    @classmethod
    def of(cls, dense: Stored, config: Config, recipe: Recipe, format: Format) -> _Plan:
        without_head = config.tie_embeddings and (format == "lit" or not dense.head_stored_twice)
        target = layout(config, format, tied=without_head)
        groups: dict[Any, list[str]] = {}
        specs: dict[str, Spec] = {}
        for name, blocks in target.parts.items():
            if blocks[0].key == "router":
                key: Any = name
                dtype = dense.dtype(BlockId("gate", blocks[0].layer))
            else:
                key = tuple((origin(block), recipe.kind(block)) for block in blocks)
                dtype = dense.dtype(origin(blocks[0]))
                if len({dense.dtype(origin(block)) for block in blocks}) > 1:
                    raise UserError(
                        f"{dense.directory}: the parts of {name} are stored in different dtypes; convert it first "
                        "with scripts/convert_hf_checkpoint.py --dtype"
                    )
            groups.setdefault(key, []).append(name)
            specs[name] = Spec(target.shapes[name], dtype)
        aliases = {LIT_HEAD: LIT_EMBED} if config.tie_embeddings and format == "lit" else {}
        if format == "lit":
            aliases |= {name: names[0] for names in groups.values() for name in names[1:]}
            specs = {name: spec for name, spec in specs.items() if name not in aliases}
        return cls(format, target, specs, aliases)

    def write(self, directory: Path, values: _Values) -> dict[str, str]:
        """Write the weights, holding a few rows at a time, or one matrix that a recipe makes.

        Returns:
            SHA-256 of the files by name, as far as they were hashed on their way: safetensors, which are written from
            the first byte to the last.
        """
        writer: LitWriter | HFWriter
        if self.format == "lit":
            writer = LitWriter(directory / LIT_FILE, self.specs, aliases=self.aliases)
        else:
            writer = HFWriter(directory, self.specs, max_shard_bytes=MAX_SHARD_BYTES, streamed=True)
        with writer:
            names = list(self.specs) if isinstance(writer, LitWriter) else writer.in_file_order
            for name in progress(names, f"upcycling to {self.format}", unit="tensor"):
                first = 0
                for block in self.layout.parts[name]:
                    for start, rows in values.rows(block, self.specs[name].dtype):
                        writer.write_rows(name, first + start, rows)
                    first += self.layout.rows[block].stop - self.layout.rows[block].start
        return {} if isinstance(writer, LitWriter) else writer.sha256


def _write_beside(
    directory: Path,
    source_dir: Path,
    config: Config,
    tokenizer: Tokenizer,
    dtypes: Collection[torch.dtype],
    format: Format,
) -> None:
    """Write what stands beside the weights: the tokenizer and the configs."""
    copy_sidecars(source_dir, directory)
    if tokenizer.thought_ids is not None:
        tokenizer.chat_template = chat_template("thought")
        tokenizer.save(directory)
        if format == "hf":
            stop_at_end_of_turn(directory / GENERATION_FILE, tokenizer)
    if format == "lit":
        write_config(directory, config)
    write_hf_config(directory, config, source_dir, dtypes=dtypes)


def _thought_rows(
    dense: Stored, block: BlockId, think_ids: tuple[int, int] | None, known_rows: int, seed: int
) -> list[Tensor]:
    """Start values of the two rows of `<thought>` and `</thought>` in the embedding or the head, in its dtype.

    Raises:
        UserError: the two are equal.
    """
    name = LIT_EMBED if block == EMBED else LIT_HEAD
    if think_ids is not None:
        starts = [dense.read(block, row, row + 1)[0].float() for row in think_ids]
        stds = [float(row.std()) for row in starts]
    else:
        mean, std = _mean_row(dense, block, known_rows)
        starts, stds = [mean, mean], [std, std]
    generator = seeded(seed, name)
    rows = [
        (start + THOUGHT_NOISE * std * torch.randn(start.shape, generator=generator)).to(dense.dtype(block))
        for start, std in zip(starts, stds, strict=True)
    ]
    # A checkpoint in float32 is soon cast to bfloat16.
    if torch.equal(rows[0].bfloat16(), rows[1].bfloat16()):
        raise UserError(
            f"{dense.files[0]}: the rows of {name} give <thought> and </thought> one and the same start; "
            "convert the checkpoint again, its embedding is broken"
        )
    return rows


def _mean_row(dense: Stored, block: BlockId, rows: int) -> tuple[Tensor, float]:
    """Mean of the first rows, fp32 [D], and the standard deviation of all their elements."""
    total, squares, count = torch.zeros(1, dtype=torch.float64), 0.0, 0
    for start in range(0, rows, ROWS_AT_A_TIME):
        chunk = dense.read(block, start, min(start + ROWS_AT_A_TIME, rows)).double()
        total = total + chunk.sum(dim=0)
        squares += float(chunk.square().sum())
        count += chunk.numel()
    return (total / rows).float(), math.sqrt(max(0.0, squares / count - float(total.sum() / count) ** 2))


def _prove(
    sample: Sample,
    dense: Stored,
    made: Stored,
    added: tuple[int, ...],
    recipe: Recipe,
    seed: int,
    proof_dtype: ProofDtype,
) -> tuple[tuple[Proof, ...], tuple[str, ...]]:
    """The proofs, and the tensors whose bits are not what the recipe makes."""
    if proof_dtype == "none":
        return (), changed_bits(dense, made, added=added, recipe=recipe, seed=seed)

    def proof(dtype: torch.dtype, text: Sample = sample) -> Proof:
        return prove_on(text, dense, made, dtype=dtype, added=added, recipe=recipe, seed=seed, compare_bits=not proofs)

    proofs: list[Proof] = []
    if proof_dtype != "float64":
        proofs.append(proof(torch.float32))
    # How much rounding float32 shows depends on the model; float64 tells rounding from a fault.
    unsure = recipe.exact and not (proofs and (proofs[0].exact or proofs[0].changed))
    if not proofs or proof_dtype == "both" or unsure:
        proofs.append(proof(torch.float64))
    if proof_dtype == "all":
        # Few machines have fast bf16 on the CPU, and its rounding shows on one sentence.
        proofs.append(proof(torch.bfloat16, sample.first()))
    return tuple(proofs), proofs[0].changed


def _refuse_failed(proofs: Sequence[Proof], changed: Sequence[str], recipe: Recipe) -> None:
    """Raise `UserError` where the bits are not the recipe's, or an exact recipe shows more than rounding."""
    decisive = next((proof for proof in reversed(proofs) if proof.dtype != "bfloat16"), None)
    finite = all(math.isfinite(proof.kl) for proof in proofs)
    if changed:
        shown = f"{len(changed)} tensors differ, e.g. {changed[0]}"
    elif decisive is not None and ((recipe.exact and not decisive.exact) or not finite):
        shown = decisive.describe()
    else:
        return
    raise UserError(
        f"the proof fails, so nothing was kept ({shown}); "
        "check disk and memory of this machine and the source's weights, and run the command again"
    )
