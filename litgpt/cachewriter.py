"""Running the teacher once: dialogues → a cache that `litgpt.teachercache.CachedTeacher` reads.

The plan depends on the dialogues and the settings alone: records are sorted by length, longest first, and cut into
shards. A shard is computed from nothing but itself and appears whole or not at all, so a killed run goes on with the
shards that lack, and processes that take shards in turn need not speak to each other.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from litgpt.checkpoint import LIT_FILE, load_model, require_lit_dir
from litgpt.data import PackedLoader
from litgpt.model import GPT
from litgpt.teacher import OnlineTeacher, Reading, View
from litgpt.teachercache import (
    CACHE_FILE,
    HASHES_FILE,
    TEXT_DIR,
    TEXT_FILES,
    Manifest,
    TargetForm,
    compress,
    identity_keys,
    open_shard,
    remember_sha256,
    shard_path,
)
from litgpt.tensorfile import check_free_disk, full_disk_is_users_error
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, atomic_file, parse_dtype

# Header of a shard: names, shapes and the cache's hash, with room to spare.
_HEADER_BYTES = 1024


@dataclass(frozen=True)
class Shard:
    """A part of the cache, planned.

    Attributes:
        readings: its records, longest first.
        nbytes: what its file will take, to within its header.
    """

    readings: list[Reading]
    nbytes: int

    @property
    def rows(self) -> int:
        """Answer tokens."""
        return sum(len(reading.teacher_at_P) for reading in self.readings)

    @property
    def tokens(self) -> int:
        """Tokens that the teacher reads."""
        return sum(len(reading.ids_T) for reading in self.readings)


class CacheWriter:
    """One cache to be written. Making it checks everything and reads the dialogues, but no weight; `write` works.

    Args:
        out_dir: the cache; one that a killed run left unfinished is gone on with.
        teacher_dir: lit dir of the teacher.
        student: the student's tokenizer.
        loaders: the dialogues, rendered for the student; what two of them share is cached once.
        view: what the teacher reads.
        form: what is kept.
        shard_bytes, shard_records: a shard ends where it would grow beyond either.

    Attributes:
        manifest: what `teacher_cache.yaml` will say.
        shards: the plan.

    Raises:
        UserError: `out_dir` is something else or another cache, or a dialogue does not fit the teacher.
    """

    def __init__(
        self,
        out_dir: Path,
        teacher_dir: Path,
        student: Tokenizer,
        loaders: list[PackedLoader],
        *,
        view: View,
        form: TargetForm,
        shard_bytes: int = 256 * 10**6,
        shard_records: int = 4096,
    ) -> None:
        self.out_dir, self.teacher_dir, self.form = out_dir, teacher_dir, form
        _refuse_foreign(out_dir)
        require_lit_dir(teacher_dir)
        teacher = OnlineTeacher(teacher_dir, student, view=view)
        form.check(teacher.shared_vocab_size)
        self.width = teacher.config.n_embd
        self.shared_vocab_size = teacher.shared_vocab_size
        readings: dict[bytes, Reading] = {}
        for loader in loaders:
            for record, reading in zip(loader.records, teacher.read(loader).readings, strict=True):
                if len(reading.ids_T) > teacher.config.block_size:
                    raise UserError(
                        f"record {record.id!r} has {len(reading.ids_T)} tokens for the teacher, which reads at most "
                        f"{teacher.config.block_size}: lower max_seq_length"
                    )
                readings.setdefault(reading.digest(), reading)
        # The digest breaks ties, so that the order of the files does not matter.
        order = sorted(readings, key=lambda digest: (-len(readings[digest].ids_T), digest))
        self.shards = self._cut([readings[digest] for digest in order], shard_bytes, shard_records)
        self.manifest = Manifest(
            teacher=str(teacher_dir),
            keys=identity_keys(teacher_dir, student, view, memory=out_dir),
            form=form,
            data=hashlib.sha256(b"".join(order)).hexdigest(),
            records=len(order),
            rows=sum(shard.rows for shard in self.shards),
            shards=len(self.shards),
        )
        if (out_dir / CACHE_FILE).is_file():
            _refuse_other(out_dir, Manifest.read(out_dir), self.manifest)

    def _cut(self, readings: list[Reading], shard_bytes: int, shard_records: int) -> list[Shard]:
        if shard_bytes < 1 or shard_records < 1:
            raise UserError("shard_mb and shard_records must be positive")
        row_bytes = self.form.row_bytes(self.width)
        shards: list[Shard] = []
        part: list[Reading] = []
        size = _HEADER_BYTES + 8
        for reading in readings:
            # With its rows come a digest and where they start.
            more = len(reading.teacher_at_P) * row_bytes + 32 + 8
            if part and (size + more > shard_bytes or len(part) == shard_records):
                shards.append(Shard(part, size))
                part, size = [], _HEADER_BYTES + 8
            part.append(reading)
            size += more
        return [*shards, Shard(part, size)]

    @property
    def nbytes(self) -> int:
        """What the whole cache will take on the disk, to within the shards' headers."""
        return sum(shard.nbytes for shard in self.shards)

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there, or not whole."""
        identity = self.manifest.identity()
        return [
            number for number in range(len(self.shards)) if not _is_whole(shard_path(self.out_dir, number), identity)
        ]

    def check_disk(self) -> None:
        """Raise `UserError` when what is missing does not fit on the disk."""
        check_free_disk(self.out_dir, sum(self.shards[number].nbytes for number in self.missing()))

    def write(
        self,
        *,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        batch_tokens: int = 16_384,
        chunk_rows: int = 256,
    ) -> int:
        """Run the teacher over the shards that are missing.

        Args:
            device: where the teacher runs.
            rank, world_size: of the processes that share the work, this one takes every shard whose number leaves
                `rank` when divided by `world_size`.
            batch_tokens: tokens the teacher reads at one time, padding included.
            chunk_rows: tokens whose logits exist at one time.

        Returns:
            how many shards it wrote.

        Raises:
            UserError: they do not fit on the disk; whole shards stay.
        """
        self.check_disk()
        # By number and not by place in the list of missing ones, which other processes shorten at this moment.
        mine = [number for number in self.missing() if number % world_size == rank]
        with full_disk_is_users_error(self.out_dir):
            for name in TEXT_FILES:
                if (self.teacher_dir / name).is_file():
                    with atomic_file(self.out_dir / TEXT_DIR / name) as temporary:
                        shutil.copyfile(self.teacher_dir / name, temporary)
            self.manifest.write(self.out_dir)
        weights = self.teacher_dir / LIT_FILE
        remember_sha256(weights, self.manifest.keys["teacher weights"], self.out_dir / HASHES_FILE)
        if not mine:
            return 0
        dtype = parse_dtype(self.form.dtype)
        model = load_model(self.teacher_dir, dtype=dtype, device=device).requires_grad_(False)
        total = sum(self.shards[number].tokens for number in mine)
        bar: tqdm[Any] = tqdm(
            total=total, desc="teacher", unit="token", unit_scale=True, disable=True if rank else None
        )
        with bar:
            for number in mine:
                tensors = self._shard_tensors(number, model, batch_tokens, chunk_rows, bar)
                # To bytes here: writing the file itself, safetensors hides a full disk behind an error of its own.
                content = safetensors.torch.save(tensors, metadata={"cache": self.manifest.identity()})
                path = shard_path(self.out_dir, number)
                with full_disk_is_users_error(path), atomic_file(path) as temporary:
                    temporary.write_bytes(content)
        return len(mine)

    @torch.no_grad()
    def _shard_tensors(
        self, number: int, model: GPT, batch_tokens: int, chunk_rows: int, bar: tqdm[Any]
    ) -> dict[str, Tensor]:
        shard = self.shards[number]
        head_VC = model.lm_head.weight[: self.shared_vocab_size]
        device = head_VC.device
        rows = {
            name: torch.empty(shard.rows, *shape, dtype=dtype)
            for name, (shape, dtype) in self.form.tensors(self.width).items()
        }
        start = 0
        for readings in _batches(shard.readings, batch_tokens):
            # One dialogue a row and padding behind it: causal attention needs no mask then.
            ids_BT = torch.zeros(len(readings), len(readings[0].ids_T), dtype=torch.int64)
            for b, reading in enumerate(readings):
                ids_BT[b, : len(reading.ids_T)] = reading.ids_T
            hidden_BTC = model(ids_BT.to(device), return_logits=False).hidden
            at_M = torch.cat([b * ids_BT.shape[1] + reading.teacher_at_P for b, reading in enumerate(readings)])
            hidden_MC = hidden_BTC.flatten(0, 1)[at_M.to(device)]
            uniform_MK = None
            if self.form.kind == "sampled":
                uniform_MK = torch.cat([self._uniform(reading) for reading in readings]).to(device)
            kept = compress(self.form, hidden_MC, head_VC, uniform_MK, chunk_rows=chunk_rows)
            for name, values in kept.items():
                rows[name][start : start + len(at_M)] = values.cpu()
            start += len(at_M)
            bar.update(sum(len(reading.ids_T) for reading in readings))
        digests = b"".join(reading.digest() for reading in shard.readings)
        counts = torch.tensor([0, *(len(reading.teacher_at_P) for reading in shard.readings)])
        return rows | {
            "digests": torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(-1, 32),
            "starts": counts.cumsum(0),
        }

    def _uniform(self, reading: Reading) -> Tensor:
        """Random numbers [P, K] that depend on the seed and the record alone, not on what else is in its batch."""
        seed = hashlib.sha256(self.form.seed.to_bytes(8, "little") + reading.digest()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "little"))
        return torch.rand(len(reading.teacher_at_P), self.form.k, dtype=torch.float64, generator=generator)


def _batches(readings: list[Reading], batch_tokens: int) -> Iterator[list[Reading]]:
    """Neighbours that, padded to the first and longest of them, have at most `batch_tokens` tokens."""
    start = 0
    while start < len(readings):
        count = max(1, batch_tokens // len(readings[start].ids_T))
        yield readings[start : start + count]
        start += count


def _is_whole(path: Path, identity: str) -> bool:
    try:
        open_shard(path, identity)
    except UserError:
        return False
    return True


def _refuse_foreign(out_dir: Path) -> None:
    """Raise `UserError` for a directory with files that are not a cache's."""
    own = (CACHE_FILE, HASHES_FILE, TEXT_DIR)
    for path in out_dir.iterdir() if out_dir.is_dir() else ():
        if path.name not in own and not path.name.startswith(".") and not path.match("shard-?????.safetensors"):
            raise UserError(f"{out_dir} holds other files ({path.name}): give an empty or new --out_dir")


def _refuse_other(out_dir: Path, found: Manifest, planned: Manifest) -> None:
    """Raise `UserError` if the directory holds a cache of something else, and say of what."""
    differing = [name for name, value in planned.keys.items() if found.keys.get(name) != value]
    differing += [
        f"{name} of the targets"
        for name in ("kind", "k", "dtype", "seed")
        if getattr(found.form, name) != getattr(planned.form, name)
    ]
    differing += [] if found.data == planned.data else ["set of records"]
    differing += [] if found.shards == planned.shards else ["size of shards"]
    if differing:
        raise UserError(
            f"{out_dir} holds a cache with another {' and another '.join(differing)}: "
            "choose another --out_dir, or delete it first"
        )


def process_of_many() -> tuple[int, int, int]:
    """Rank, number of processes and local rank, as torchrun and `fabric run` tell them; 0, 1, 0 without either."""
    environment = os.environ
    rank, local_rank = int(environment.get("RANK", "0")), int(environment.get("LOCAL_RANK", "0"))
    return rank, int(environment.get("WORLD_SIZE", "1")), local_rank
