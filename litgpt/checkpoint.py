"""Lit directories: reading, writing and converting them, to and from Hugging Face directories.

A lit directory holds `lit_model.pth`, `model_config.yaml` (only keys that LitGPT 0.5.13 knows), `provenance.yaml` (what
is ours: tied embeddings, where the weights come from), the tokenizer's files and, when known, `config.json` and
`generation_config.json`. Every function reads strictly: a tensor too few, too many or of another shape is an error.
Conversion streams: it needs memory for the largest tensor, not for the model.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from litgpt.chat import IM_END, chat_template
from litgpt.config import Config
from litgpt.keymap import (
    DERIVED_HF_BUFFERS,
    HF_EMBED,
    HF_HEAD,
    LIT_EMBED,
    LIT_HEAD,
    Layout,
    assemble,
    flat_rows,
    layout,
)
from litgpt.model import GPT
from litgpt.safetensorfile import HF_INDEX, HFReader, HFWriter
from litgpt.tensorfile import LIT_FILE, LitReader, LitWriter, Spec, full_disk_is_users_error, row_count
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, atomic_dir, atomic_file, progress, sha256_file

__all__ = [
    "CONFIG_FILE",
    "LIT_FILE",
    "PROVENANCE_FILE",
    "LitReader",
    "LitWriter",
    "convert_hf_to_lit",
    "convert_lit_to_hf",
    "copy_sidecars",
    "load_model",
    "load_state",
    "read_provenance",
    "require_lit_dir",
    "save_lit_dir",
    "write_config",
    "write_hf_config",
    "write_provenance",
]

CONFIG_FILE = "model_config.yaml"
PROVENANCE_FILE = "provenance.yaml"
STORED_HEAD = "head_stored_though_tied"
"""Key of `provenance.yaml`: the Hugging Face file held `lm_head.weight` beside the embedding that it equals."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
GENERATION_FILE = "generation_config.json"
HF_CONFIG_FILE = "config.json"


def require_lit_dir(checkpoint_dir: str | os.PathLike[str], *, first: str | None = None) -> Path:
    """The directory as a path, if it is a complete lit directory.

    Args:
        checkpoint_dir: the directory.
        first: the command that makes it; without it, how to download or convert it.

    Raises:
        UserError: what is missing, and which command to run first.
    """
    directory = Path(checkpoint_dir)
    missing = [file for file in (LIT_FILE, CONFIG_FILE, "tokenizer.json") if not (directory / file).is_file()]
    if not missing:
        return directory
    if first is None:
        first = _how_to_make(directory)
    what = f"lacks {', '.join(missing)}" if directory.is_dir() else "does not exist"
    raise UserError(f"{directory} {what}; run first: {first}")


def _how_to_make(directory: Path) -> str:
    convert = f"python scripts/convert_hf_checkpoint.py --checkpoint_dir {directory}"
    if (directory / HF_CONFIG_FILE).is_file():
        return convert
    try:
        Config.from_name(directory.name)
    except UserError:
        return "the step that writes it (scripts/convert_hf_checkpoint.py, scripts/upcycle_moe.py or train_distill.py)"
    repo_id = "/".join(directory.parts[-2:])
    return f"python scripts/download.py --repo_id {repo_id} --checkpoint_dir {directory} && {convert}"


def read_provenance(checkpoint_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """What `provenance.yaml` says; empty where there is none (a directory made by LitGPT itself).

    Raises:
        UserError: the file is no YAML mapping.
    """
    path = Path(checkpoint_dir) / PROVENANCE_FILE
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be parsed: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} should hold a mapping, found {type(values).__name__}")
    return values


def write_provenance(checkpoint_dir: str | os.PathLike[str], provenance: Mapping[str, Any]) -> None:
    """Write `provenance.yaml`, all or nothing; values are YAML's plain types."""
    _write_yaml(Path(checkpoint_dir) / PROVENANCE_FILE, provenance)


def write_config(checkpoint_dir: str | os.PathLike[str], config: Config) -> None:
    """Write `model_config.yaml` in the form that LitGPT reads."""
    _write_yaml(Path(checkpoint_dir) / CONFIG_FILE, config.to_lit_dict())


def tool_version() -> str:
    """What wrote a file: the program and its version, for `provenance.yaml`."""
    try:
        version = importlib.metadata.version("distilled-qwen3-moe")
    except importlib.metadata.PackageNotFoundError:
        version = "(source tree)"
    return f"distilled-qwen3-moe {version}, torch {torch.__version__}"


def copy_sidecars(source_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> None:
    """Copy the tokenizer's files and `generation_config.json`, byte for byte, as far as they exist."""
    for file in (*TOKENIZER_FILES, GENERATION_FILE):
        if (Path(source_dir) / file).is_file():
            shutil.copyfile(Path(source_dir) / file, Path(out_dir) / file)


def load_state(checkpoint_dir: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors under their memory names, in their stored dtypes.

    Tensors that are the same on disk and in memory are mapped, not read (copy on write); stacked experts are read. A
    tied `lm_head.weight` is the same tensor object as `transformer.wte.weight`.

    Raises:
        UserError: a file is missing or broken, or its tensors are not those of `model_config.yaml`.
    """
    directory = require_lit_dir(checkpoint_dir)
    config = Config.from_checkpoint(directory)
    reader = LitReader(directory)
    on_disk, in_memory = layout(config, "lit"), layout(config, "memory")
    check_tensors(reader.path, reader.specs, on_disk, because=CONFIG_FILE)
    # Training on a GPU leaves the GPU's name in the file.
    mapped = torch.load(reader.path, mmap=True, weights_only=True, map_location="cpu")
    mapped = mapped.get("model", mapped)
    state = {
        name: mapped[name] if name in on_disk.shapes else assemble(in_memory, name, on_disk, reader.read_rows)
        for name in in_memory.names
    }
    if config.tie_embeddings:
        check_tied(reader, LIT_HEAD, LIT_EMBED)
        state[LIT_HEAD] = state[LIT_EMBED]
    elif reader.shares_storage(LIT_HEAD, LIT_EMBED):
        # LitGPT stores a tied model so and trains the two apart; they must not share memory then.
        state[LIT_HEAD] = state[LIT_HEAD].clone()
    return state


def load_model(
    checkpoint_dir: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> GPT:
    """A model from a lit directory, strict, in eval mode.

    Args:
        checkpoint_dir: the lit directory.
        dtype: cast every weight; `None` keeps them as stored.
        device: where the weights go, one tensor at a time. On the CPU in the stored dtype they stay mapped to the file.

    Raises:
        UserError: a file is missing or broken, or its tensors are not those of `model_config.yaml`.
    """
    state = load_state(checkpoint_dir)
    config = Config.from_checkpoint(Path(checkpoint_dir))
    with torch.device("meta"):
        model = GPT(config)
    for name in state:
        state[name] = state[name].to(device=device, dtype=dtype)
    if config.tie_embeddings:
        state[LIT_HEAD] = state[LIT_EMBED]
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def save_lit_dir(
    out_dir: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    config: Config,
    *,
    source_dir: str | os.PathLike[str],
    provenance: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a lit directory; it appears whole or not at all. A lit directory that is there already is replaced.

    Args:
        out_dir: the directory to appear.
        state: memory name → tensor on any device, as `GPT.state_dict()` gives it; a tied `lm_head.weight` may lack.
        config: the model's.
        source_dir: a lit or Hugging Face directory whose tokenizer and generation settings go with the weights.
        provenance: where the weights come from, plain YAML values.
        tokenizer: written in place of the source's tokenizer files (tokens were added).

    Raises:
        UserError: `out_dir` holds something else, or the disk is full.
        ValueError: `state` is not a state of `config`.
    """
    out_dir, source_dir = Path(out_dir), Path(source_dir)
    _refuse_foreign(out_dir, mark=LIT_FILE)
    tied = config.tie_embeddings
    in_memory, on_disk = layout(config, "memory", tied=tied), layout(config, "lit", tied=tied)
    given = {name: tensor for name, tensor in state.items() if not (tied and name == LIT_HEAD)}
    wrong = sorted(set(given) ^ set(in_memory.names)) or [
        name for name, shape in in_memory.shapes.items() if tuple(given[name].shape) != shape
    ]
    if wrong:
        raise ValueError(
            f"the state is not one of {config.name}: {len(wrong)} tensors differ, e.g. {', '.join(wrong[:3])}"
        )
    specs = {
        name: (shape, given[in_memory.rows[on_disk.parts[name][0]].tensor].dtype)
        for name, shape in on_disk.shapes.items()
    }

    def read_rows(name: str, start: int, stop: int) -> Tensor:
        return flat_rows(given[name], start, stop)

    with full_disk_is_users_error(out_dir), atomic_dir(out_dir, replace=True) as temporary:
        with LitWriter(temporary / LIT_FILE, specs, aliases={LIT_HEAD: LIT_EMBED} if tied else {}) as writer:
            for name in on_disk.names:
                writer.write(name, assemble(on_disk, name, in_memory, read_rows))
        copy_sidecars(source_dir, temporary)
        if tokenizer is not None:
            tokenizer.save(temporary)
        write_config(temporary, config)
        # Both are facts about this directory, whatever a copied provenance says.
        facts = config.ours() | {"tool": tool_version()}
        write_provenance(temporary, facts | dict(provenance) | facts)
        write_hf_config(temporary, config, source_dir, dtypes={dtype for _, dtype in specs.values()})


def convert_hf_to_lit(
    checkpoint_dir: str | os.PathLike[str],
    *,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    block_size: int | None = None,
) -> None:
    """Write `lit_model.pth`, `model_config.yaml` and `provenance.yaml` beside the files of a Hugging Face directory.

    Args:
        checkpoint_dir: `config.json`, `tokenizer.json`, `tokenizer_config.json` and safetensors, one file or shards;
            experts one by one or fused.
        name: the model's name; the directory's name by default. A name that LitGPT knows gives LitGPT's config where
            that agrees with `config.json`; otherwise `config.json` alone decides.
        dtype: cast every tensor; `None` keeps them as stored.
        block_size: positions the model shall handle; `None` takes it from `config.json`. A model with a sliding window
            is accepted only up to its window, where it never acts.

    Raises:
        UserError: a file is missing or broken, or its tensors are not those of `config.json`. What was there stays.
    """
    directory = Path(checkpoint_dir)
    for file in (HF_CONFIG_FILE, *TOKENIZER_FILES[:2]):
        if not (directory / file).is_file():
            what = f"holds no {file}" if directory.is_dir() else "does not exist"
            raise UserError(f"{directory} {what}; download the checkpoint first: python scripts/download.py")
    config = config_of_hf_dir(directory, name, {} if block_size is None else {"block_size": block_size})
    tied = config.tie_embeddings
    reader = HFReader(directory)
    source, target = hf_layout(config, reader.specs), layout(config, "lit", tied=tied)
    redundant = {HF_HEAD} if tied else set()
    buffers = {pattern.format(i=i) for pattern in DERIVED_HF_BUFFERS for i in range(config.n_layer)}
    check_tensors(directory, reader.specs, source, because=HF_CONFIG_FILE, ignored=redundant | buffers)
    if tied and HF_HEAD in reader.specs:
        check_tied(reader, HF_HEAD, HF_EMBED)

    specs = {
        name: (shape, dtype or _common_dtype(directory, name, target, source, reader))
        for name, shape in target.shapes.items()
    }
    with LitWriter(directory / LIT_FILE, specs, aliases={LIT_HEAD: LIT_EMBED} if tied else {}) as writer:
        for name in progress(target.names, f"converting {config.name}", unit="tensor"):
            writer.write(name, assemble(target, name, source, reader.read_rows).to(specs[name][1]))
        # Hashed before the file appears: a source that cannot be read to its end leaves nothing new.
        hashes = {
            path.name: sha256_file(path) for path in progress((*reader.files, directory / HF_CONFIG_FILE), "hashing")
        }
    with full_disk_is_users_error(directory):
        provenance = {
            **config.ours(),
            "tool": tool_version(),
            "converted_from": "safetensors",
            "dtype": _dtype_name(dtype) if dtype else "as stored",
            "sha256": hashes,
        }
        if tied and HF_HEAD in reader.specs:
            provenance[STORED_HEAD] = True
        write_provenance(directory, provenance)
        # Last: a directory without it is not complete, and without provenance.yaml nobody knows that it is tied.
        write_config(directory, config)


def convert_lit_to_hf(
    checkpoint_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a directory that transformers, vLLM and others load without code of ours; it appears whole or not at all.

    Args:
        checkpoint_dir: a lit directory.
        out_dir: the directory to appear; empty, absent, or an earlier export, which is replaced.
        max_shard_bytes: size from which the weights are split over several files.

    Raises:
        UserError: a file is missing or broken, `out_dir` holds something else, or the disk is full.
    """
    directory, out_dir = require_lit_dir(checkpoint_dir), Path(out_dir)
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes is {max_shard_bytes}, expected a positive number of bytes")
    if out_dir.resolve() == directory.resolve():
        raise UserError(f"{out_dir} is the checkpoint itself; give another out_dir")
    _refuse_all_but_exports(out_dir)
    config = Config.from_checkpoint(directory)
    tied = config.tie_embeddings
    reader = LitReader(directory)
    # Some tied checkpoints, Qwen3-0.6B among them, store the head a second time; they get back what they had.
    without_head = tied and not read_provenance(directory).get(STORED_HEAD)
    source, target = layout(config, "lit"), layout(config, "hf", tied=without_head)
    check_tensors(reader.path, reader.specs, source, because=CONFIG_FILE)
    if tied:
        check_tied(reader, LIT_HEAD, LIT_EMBED)
    specs = {
        name: (shape, reader.specs[source.rows[target.parts[name][0]].tensor].dtype)
        for name, shape in target.shapes.items()
    }
    with full_disk_is_users_error(out_dir), atomic_dir(out_dir, replace=True) as temporary:
        with HFWriter(temporary, specs, max_shard_bytes=max_shard_bytes) as writer:
            for name in progress(target.names, f"exporting {config.name}", unit="tensor"):
                writer.write(name, assemble(target, name, source, reader.read_rows))
        copy_sidecars(directory, temporary)
        # Only ours have it, and not every family's tokenizer is one that we can run.
        if "<thought>" in (directory / "tokenizer.json").read_text(encoding="utf-8"):
            tokenizer = Tokenizer(directory)
            tokenizer.chat_template = chat_template("thought")
            tokenizer.save(temporary)
            stop_at_end_of_turn(temporary / GENERATION_FILE, tokenizer)
        write_hf_config(temporary, config, directory, dtypes={dtype for _, dtype in specs.values()})
        exported = {"exported_from": config.name, "tool": tool_version(), "source": read_provenance(directory)}
        write_provenance(temporary, exported)


def stop_at_end_of_turn(path: Path, tokenizer: Tokenizer) -> None:
    """Let other engines stop where a chat's answer ends; a base model's own settings know the end of a text only."""
    end = tokenizer.token_to_id(IM_END)
    if end is not None and end not in tokenizer.stop_ids:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        _write_json(path, settings | {"eos_token_id": [end, *tokenizer.stop_ids]})


def write_hf_config(
    out_dir: Path, config: Config, source_dir: str | os.PathLike[str], *, dtypes: Collection[torch.dtype]
) -> None:
    """Write `config.json` into a lit or Hugging Face directory; none for a model that no Hugging Face family fits."""
    if config.has_hf_family:
        _write_json(out_dir / HF_CONFIG_FILE, hf_config_of(config, source_dir, dtypes=dtypes))


def hf_config_of(
    config: Config, source_dir: str | os.PathLike[str], *, dtypes: Collection[torch.dtype]
) -> dict[str, Any]:
    """The `config.json` for a model: the source's own where it describes this model, else a complete new one.

    Args:
        config: the model, of a Hugging Face family.
        source_dir: may hold a `config.json`; its token ids are kept in any case.
        dtypes: of the stored tensors; where there is one, `torch_dtype` says so.
    """
    path = Path(source_dir) / HF_CONFIG_FILE
    original = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    dtype = _dtype_name(next(iter(dtypes))) if len(dtypes) == 1 else None
    if original and _structure(_from_hf_or_none(original)) == _structure(config):
        key = "dtype" if "dtype" in original else "torch_dtype"
        return original if dtype is None else original | {key: dtype}
    tokenizer = Tokenizer(source_dir)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    ids |= {key: original[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in original}
    return config.to_hf() | ids | ({"torch_dtype": dtype} if dtype else {})


def _from_hf_or_none(hf: Mapping[str, Any]) -> Config | None:
    try:
        return Config.from_hf(hf)
    except UserError:
        return None


def _structure(config: Config | None) -> dict[str, Any]:
    """What decides a model's numbers: all fields but its names and how many vocabulary rows are real."""
    if config is None:
        return {}
    return {
        key: value
        for key, value in asdict(config).items()
        if key not in ("name", "hf_config", "vocab_size", "padding_multiple")
    }


def config_of_hf_dir(directory: Path, name: str | None, overrides: Mapping[str, Any]) -> Config:
    name = name or directory.resolve().name
    described = Config.from_hf(directory, name=name, **overrides)
    try:
        known = Config.from_name(name)
    except UserError:
        return described
    return known if _structure(known) == _structure(described) else described


def hf_layout(config: Config, found: Collection[str]) -> Layout:
    """The per-expert or the fused layout, whichever differs less from the names found."""
    layouts = (layout(config, "hf", tied=config.tie_embeddings), layout(config, "hf_fused", tied=config.tie_embeddings))
    return min(layouts, key=lambda candidate: len(set(candidate.names) ^ set(found)))


def check_tensors(
    path: Path, found: Mapping[str, Spec], expected: Layout, *, because: str, ignored: Collection[str] = ()
) -> None:
    """Raise `UserError` unless exactly the expected tensors were found, in their shapes."""
    missing = [name for name in expected.names if name not in found]
    unknown = [name for name in found if name not in expected.shapes and name not in ignored]
    if missing or unknown:
        parts = [
            f"{len(names)} {what} ({_some(names)})"
            for names, what in ((missing, "missing"), (unknown, "unknown"))
            if names
        ]
        raise UserError(
            f"{path}: tensors do not fit {because}: {' and '.join(parts)}; check that both are of one model"
        )
    for name, shape in expected.shapes.items():
        if found[name].shape != shape:
            raise UserError(f"{path}: {name} has shape {found[name].shape}, but {because} says {shape}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def check_tied(reader: LitReader | HFReader, head: str, embed: str) -> None:
    """Raise `UserError` unless head and embedding hold the same numbers; reads them in slices."""
    if isinstance(reader, LitReader) and reader.shares_storage(head, embed):
        return
    rows = row_count(reader.specs[embed].shape)
    for start in range(0, rows, 8192):
        stop = min(start + 8192, rows)
        if not torch.equal(reader.read_rows(head, start, stop), reader.read_rows(embed, start, stop)):
            raise UserError(
                f"the embeddings are said to be tied, but {head} and {embed} differ; "
                "set tie_word_embeddings: false in config.json (tie_embeddings in provenance.yaml) to keep both"
            )


def _common_dtype(directory: Path, name: str, target: Layout, source: Layout, reader: HFReader) -> torch.dtype:
    dtypes = {reader.specs[source.rows[block].tensor].dtype for block in target.parts[name]}
    if len(dtypes) > 1:
        raise UserError(
            f"{directory}: the parts of {name} are stored as {' and '.join(sorted(map(_dtype_name, dtypes)))}; "
            "choose one with --dtype"
        )
    return dtypes.pop()


def _refuse_foreign(out_dir: Path, *, mark: str | None = None) -> None:
    """Raise `UserError` for a directory with content not of our making (without `mark`), which would be lost."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    if mark is None or not (out_dir / mark).is_file():
        raise UserError(f"{out_dir} holds other files; give an empty or new directory, or remove it first")


def _refuse_all_but_exports(out_dir: Path) -> None:
    """Raise `UserError` unless `out_dir` is absent, empty, or an export of ours with no file added."""
    own = {PROVENANCE_FILE, HF_CONFIG_FILE, GENERATION_FILE, HF_INDEX, *TOKENIZER_FILES}
    if out_dir.is_dir() and "exported_from" in read_provenance(out_dir):
        added = {path.name for path in out_dir.iterdir()} - own
        if all(re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", name) for name in added):
            return
    _refuse_foreign(out_dir)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True), encoding="utf-8")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
