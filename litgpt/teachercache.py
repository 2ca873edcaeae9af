"""What a teacher said, kept on disk: `CachedTeacher` reads it in place of running the teacher.

    out/teacher/
      teacher_cache.yaml          what it was made of, as hashes, and how
      shard-00000.safetensors     targets of some records, answer positions alone
      text/                       the teacher's config and tokenizer, to read dialogues as it did
      file_hashes.json            sizes, times and SHA-256 of files seen, so that weights are not hashed at each start

Three kinds of targets, per answer token:

- `hidden`: the teacher's last hidden state in the dtype it ran in. Its head, read from its own lit dir, makes the exact
  distribution of it again.
- `sampled`: K ids drawn from the distribution, an unbiased estimate of it (random sampling KD, arXiv 2503.16870), and
  its entropy.
- `topk`: the K likeliest ids with their log-probabilities. What is cut off biases the student (same paper).

A record is found by the digest of what the teacher read and where it was asked, so order, packing and choice of records
may be others than when the cache was written. `litgpt.cachewriter` writes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from litgpt.chat import Message, render
from litgpt.checkpoint import CONFIG_FILE, LIT_FILE, PROVENANCE_FILE, LitReader, require_lit_dir
from litgpt.config import Config
from litgpt.data import LazySequence, Loader, Record, tags_of
from litgpt.keymap import LIT_EMBED, LIT_HEAD
from litgpt.losses import SampledTeacher, Teacher, TeacherTargets, TopKTeacher
from litgpt.teacher import BaseTeacher, OnlineTeacher, Reading, TeacherBatch, TeacherView, View
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, atomic_file, parse_dtype, sha256_file

CACHE_FILE = "teacher_cache.yaml"
TEXT_DIR = "text"
TEXT_FILES = (CONFIG_FILE, PROVENANCE_FILE, "tokenizer.json", "tokenizer_config.json", "generation_config.json")
"""What `text/` has of the teacher, as far as it exists."""
HASHES_FILE = "file_hashes.json"
FORMAT = 1
# A sampled id and how often it was drawn share one int32: 23 bits and 8.
COUNT_BITS = 8
MAX_DRAWS = 2**COUNT_BITS - 1
MAX_SAMPLED_VOCAB = 2 ** (31 - COUNT_BITS)
OPEN_SHARDS = 64

Kind = Literal["hidden", "sampled", "topk"]
_Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TargetForm:
    """Which targets are kept, and how.

    Attributes:
        kind: see the top of this file.
        k: ids per token; not used by `hidden`.
        dtype: the teacher runs in it, and `hidden` is kept in it.
        seed: of the draws of `sampled`.
    """

    kind: Kind
    k: int
    dtype: str
    seed: int

    def check(self, shared_vocab_size: int) -> None:
        """Raise `UserError` for a `k` that this kind cannot keep."""
        most = {"hidden": self.k, "sampled": MAX_DRAWS, "topk": shared_vocab_size}[self.kind]
        if not 1 <= self.k <= most:
            raise UserError(f"k is {self.k}: {self.kind} keeps 1 ... {most} ids a token")
        if self.kind == "sampled" and shared_vocab_size > MAX_SAMPLED_VOCAB:
            raise UserError(
                f"sampled keeps ids below {MAX_SAMPLED_VOCAB}, the vocabulary has {shared_vocab_size}: take hidden"
            )

    def tensors(self, width: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name → shape of one row and dtype of what is kept; `width` is the teacher's."""
        if self.kind == "hidden":
            return {"hidden": ((width,), parse_dtype(self.dtype))}
        if self.kind == "sampled":
            return {"draws": ((self.k,), torch.int32), "entropy": ((), torch.float32)}
        return {"ids": ((self.k,), torch.int32), "log_p": ((self.k,), torch.float32)}

    def row_bytes(self, width: int) -> int:
        """Bytes on disk for one answer token."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors(width).values())


def sample(p_RV: Tensor, u_RK: Tensor) -> Tensor:
    """Draw K ids of each row's distribution, stratified: one in each K-th of the cumulated mass.

    Every id's expected count is K · p, as with independent draws, and no sum over the draws varies more than with them
    (Owen, Monte Carlo theory, section 8.4).

    Args:
        p_RV: distributions, float64 (a cumulated sum of 150,000 fp32 numbers would favour the first ids).
        u_RK: uniform random numbers in 0 … 1, float64.

    Returns:
        [R, K] int32: an id shifted by `COUNT_BITS`, plus its count; slots left over are 0.
    """
    k = u_RK.shape[1]
    cumulated_RV = p_RV.cumsum(1)
    total_R1 = cumulated_RV[:, -1:]
    points_RK = (torch.arange(k, device=u_RK.device) + u_RK) / k * total_R1
    # The last point may be rounded up to the total, where no id is left.
    points_RK = points_RK.minimum(total_R1.nextafter(torch.zeros_like(total_R1)))
    ids_RK = torch.searchsorted(cumulated_RV, points_RK, right=True)
    # The points ascend, so equal ids stand side by side.
    begins_RK = torch.ones_like(ids_RK, dtype=torch.bool)
    begins_RK[:, 1:] = ids_RK[:, 1:] != ids_RK[:, :-1]
    slots_RK = begins_RK.cumsum(1) - 1
    counts_RK = torch.zeros_like(ids_RK).scatter_add_(1, slots_RK, torch.ones_like(ids_RK))
    kept_RK = torch.zeros_like(ids_RK).scatter_(1, slots_RK, ids_RK)
    return ((kept_RK << COUNT_BITS) + counts_RK).int()


def compress(
    form: TargetForm, hidden_MC: Tensor, head_VC: Tensor, uniform_MK: Tensor | None, *, chunk_rows: int
) -> dict[str, Tensor]:
    """What a cache keeps of the teacher's rows; logits exist for `chunk_rows` rows at a time.

    Args:
        form: what to keep.
        hidden_MC: what the head reads.
        head_VC: the head's rows of the shared vocabulary.
        uniform_MK: uniform random numbers in 0 … 1, float64, for `sampled`.
        chunk_rows: rows at a time.
    """
    if form.kind == "hidden":
        return {"hidden": hidden_MC}
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(hidden_MC), chunk_rows):
        # In the teacher's own dtype first: that is what it predicts.
        logits_RV = F.linear(hidden_MC[start : start + chunk_rows], head_VC)
        if form.kind == "topk":
            log_p_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)).log_softmax(-1)
            log_p_RK, ids_RK = log_p_RV.topk(form.k, dim=-1)
            parts.append({"ids": ids_RK.int(), "log_p": log_p_RK.float()})
        else:
            assert uniform_MK is not None
            p_RV = logits_RV.double().softmax(-1)
            draws_RK = sample(p_RV, uniform_MK[start : start + chunk_rows])
            parts.append({"draws": draws_RK, "entropy": torch.special.entr(p_RV).sum(-1).float()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def expand(form: TargetForm, kept: Mapping[str, Tensor], rows_N: Tensor, head_VC: Tensor | None) -> TeacherTargets:
    """What the loss asks for, from what `compress` kept."""
    if form.kind == "hidden":
        assert head_VC is not None
        return Teacher(kept["hidden"], head_VC, rows_N)
    if form.kind == "topk":
        return TopKTeacher(kept["ids"].long(), kept["log_p"], rows_N)
    draws_MK = kept["draws"].long()
    return SampledTeacher(draws_MK >> COUNT_BITS, (draws_MK & MAX_DRAWS) / form.k, rows_N, kept["entropy"])


@dataclass(frozen=True)
class Manifest:
    """`teacher_cache.yaml`.

    Attributes:
        teacher: where the teacher's lit dir was; may be changed by hand when it has moved.
        keys: what the cache was made of → hash or plain name, as `identity_keys` gives it.
        form: what is kept.
        data: SHA-256 over the digests of all records, in the order of the shards.
        records, rows, shards: how many of each; a row is one answer token.
    """

    teacher: str
    keys: dict[str, str]
    form: TargetForm
    data: str
    records: int
    rows: int
    shards: int

    def identity(self) -> str:
        """SHA-256 of everything but the teacher's place; each shard carries it."""
        values = {key: value for key, value in asdict(self).items() if key != "teacher"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def write(self, directory: Path) -> None:
        """Write the file, all or nothing."""
        with atomic_file(directory / CACHE_FILE) as temporary:
            temporary.write_text(yaml.safe_dump({"format": FORMAT, **asdict(self)}, sort_keys=False), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read it back.

        Raises:
            UserError: there is none, or it is not one of this format.
        """
        path = directory / CACHE_FILE
        if not path.is_file():
            raise UserError(f"{directory} holds no {CACHE_FILE}: write a cache with python scripts/cache_teacher.py")
        try:
            values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
            found = values.pop("format")
            if found != FORMAT:
                raise UserError(f"{path} has format {found}, this program reads {FORMAT}: write the cache again")
            return cls(**{**values, "form": TargetForm(**values["form"])})
        except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} is not what a cache's {CACHE_FILE} should be ({reason}): write it again") from None


def shard_path(directory: Path, number: int) -> Path:
    """Where a shard lies."""
    return directory / f"shard-{number:05d}.safetensors"


def open_shard(path: Path, identity: str) -> Any:
    """A shard, mapped into memory by safetensors; `get_tensor` and `get_slice` copy what they are asked for.

    Raises:
        UserError: it is missing, broken, or of another cache.
    """
    try:
        shard = safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run python scripts/cache_teacher.py again, it writes what lacks") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is cut short or broken ({error}): delete it and run python scripts/cache_teacher.py again"
        ) from None
    if (shard.metadata() or {}).get("cache") != identity:
        raise UserError(f"{path} belongs to another cache than the {CACHE_FILE} beside it: delete it")
    return shard


class CachedTeacher(BaseTeacher):
    """A teacher that has run already; asked in the same words as an `OnlineTeacher`.

    Args:
        directory: a finished cache.
        student: the student's tokenizer.
        view: what the teacher is to have read.

    Raises:
        UserError: the cache is not whole, or stale: its teacher, the tokenizers, the rendering or the view differ.
    """

    def __init__(self, directory: str | os.PathLike[str], student: Tokenizer, *, view: View = "strip") -> None:
        self.directory = Path(directory)
        self.manifest = manifest = Manifest.read(self.directory)
        super().__init__(self.directory / TEXT_DIR, student, view)
        self.form = manifest.form
        teacher_dir = Path(manifest.teacher)
        if not teacher_dir.is_dir():
            # The numbers are here. Only the head of `hidden` is not, and then `load` says so.
            teacher_dir = self.directory / TEXT_DIR
        keys = identity_keys(teacher_dir, student, view, memory=self.directory)
        for name, value in keys.items():
            if (then := manifest.keys.get(name, "unknown")) != value:
                raise UserError(
                    f"{self.directory} is stale, it was cached with another {name} ({then[:12]}, now {value[:12]}): "
                    "write a new cache with python scripts/cache_teacher.py"
                )
        if "teacher weights" in keys:
            remember_sha256(teacher_dir / LIT_FILE, keys["teacher weights"], self.directory / HASHES_FILE)
        there = sum(shard_path(self.directory, number).is_file() for number in range(manifest.shards))
        if there < manifest.shards:
            raise UserError(
                f"{self.directory} holds {there} of its {manifest.shards} shards: "
                "finish it with the same python scripts/cache_teacher.py command"
            )
        self._identity = manifest.identity()
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(self._open)
        self._device: torch.device | None = None
        self._head_VC: Tensor | None = None
        self._sorted: tuple[_Array, _Array, _Array] | None = None

    def _open(self, number: int) -> Any:
        return open_shard(shard_path(self.directory, number), self._identity)

    def load(self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        """Read the teacher's head where it is needed (`hidden`), and no other weight.

        Raises:
            UserError: the teacher's lit dir is no longer where it was.
        """
        self._device = torch.device(device)
        if self.form.kind == "hidden":
            if not Path(self.manifest.teacher).is_dir():
                raise UserError(
                    f"{self.manifest.teacher} is not there, the teacher whose head {self.directory} needs: "
                    f"correct the line teacher: in its {CACHE_FILE}"
                )
            reader = LitReader(require_lit_dir(self.manifest.teacher))
            head_VC = reader.read(LIT_HEAD if LIT_HEAD in reader.specs else LIT_EMBED)
            self._head_VC = head_VC.to(device=self._device, dtype=dtype)

    def read(self, loader: Loader, sources: Collection[int] | None = None) -> TeacherView:
        """As `BaseTeacher.read`, and find each dialogue's targets.

        Raises:
            UserError: as there, or a dialogue that the cache does not hold.
        """
        view = super().read(loader, sources)
        readings = view.readings
        if isinstance(readings, LazySequence):
            lazy = readings

            def placed(i: int) -> Reading:
                reading = self._placed(lazy[i])
                if reading is None:
                    raise self._lacks(loader.records[i], "")
                return reading

            view.readings = LazySequence(len(lazy), placed)
            return view
        found = [self._placed(reading) for reading in readings]
        missing = [number for number, reading in enumerate(found) if reading is None]
        if missing:
            more = f" and {len(missing) - 1} more of {len(found)}" if len(missing) > 1 else ""
            raise self._lacks(loader.records[missing[0]], more)
        view.readings = [reading for reading in found if reading is not None]
        return view

    def _lacks(self, record: Record, more: str) -> UserError:
        return UserError(
            f"{self.directory} holds no targets of the record {record.id!r}{more}: it was not "
            "cached, or its text has changed since; write a new cache with python scripts/cache_teacher.py"
        )

    def _placed(self, reading: Reading) -> Reading | None:
        """The same reading with the place of its targets; `None` if there are none."""
        if len(reading.ids_T) == 0:
            return reading
        digest = np.frombuffer(reading.digest(), dtype=np.uint8)
        heads, digests, places = self._places()
        head = digest[:8].view(np.uint64)
        for at in range(int(np.searchsorted(heads, head)[0]), int(np.searchsorted(heads, head, side="right")[0])):
            if np.array_equal(digests[at], digest):
                shard, start = places[at].tolist()
                return replace(reading, stored_at=(shard, start))
        return None

    def _places(self) -> tuple[_Array, _Array, _Array]:
        """All digests' first 8 bytes, ascending; the digests; shard and first row of each: 56 bytes a record."""
        if self._sorted is None:
            digests, places = [], []
            for shard in range(self.manifest.shards):
                opened = self._shard(shard)
                digests.append(opened.get_tensor("digests").numpy())
                starts = opened.get_tensor("starts").numpy()[:-1]
                places.append(np.stack((np.full_like(starts, shard), starts), axis=1))
            together = np.concatenate(digests)
            heads = np.ascontiguousarray(together[:, :8]).view(np.uint64).ravel()
            order = np.argsort(heads)
            self._sorted = heads[order], together[order], np.concatenate(places)[order]
        return self._sorted

    def targets(self, batch: TeacherBatch, student_tokens: int) -> TeacherTargets:
        """Read what the teacher said at the paired positions; nothing of it stays in memory."""
        if self._device is None:
            raise RuntimeError("the teacher is not loaded: call load() first")
        device = self._device
        kept: dict[str, Tensor] = {}
        for name, (shape, dtype) in self.form.tensors(self.config.n_embd).items():
            parts = [torch.empty(0, *shape, dtype=dtype)]
            for reading in batch.readings:
                assert reading.stored_at is not None
                shard, start = reading.stored_at
                parts.append(self._shard(shard).get_slice(name)[start : start + len(reading.teacher_at_P)])
            kept[name] = torch.cat(parts).to(device)
        return expand(self.form, kept, batch.pairs(student_tokens, device), self._head_VC)


def open_teacher(path: str | os.PathLike[str], student: Tokenizer, *, view: View = "strip") -> BaseTeacher:
    """The teacher at `path`: a cache if `teacher_cache.yaml` lies there, else a lit dir that is run beside the student.

    Raises:
        UserError: neither of them, or one that does not fit the student.
    """
    if (Path(path) / CACHE_FILE).is_file():
        return CachedTeacher(path, student, view=view)
    return OnlineTeacher(require_lit_dir(path), student, view=view)


def identity_keys(teacher_dir: Path, student: Tokenizer, view: View, *, memory: Path) -> dict[str, str]:
    """What targets depend on beside the records, in the order in which differences are told.

    Args:
        teacher_dir: the teacher's lit dir; without weights in it, they are left out.
        student: the student's tokenizer.
        view: what the teacher reads.
        memory: the cache's directory, where hashes of files are remembered.
    """
    keys = {}
    if (teacher_dir / LIT_FILE).is_file():
        keys["teacher weights"] = known_sha256(teacher_dir / LIT_FILE, memory / HASHES_FILE)
    config = json.dumps(asdict(Config.from_checkpoint(teacher_dir)), sort_keys=True, default=str)
    keys["teacher config"] = hashlib.sha256(config.encode()).hexdigest()
    keys["teacher tokenizer"] = sha256_file(teacher_dir / "tokenizer.json")
    keys["student tokenizer"] = _vocabulary_digest(student)
    keys["rendering"] = _rendering_digest(Tokenizer(teacher_dir), student)
    keys["view"] = view
    return keys


def _vocabulary_digest(tokenizer: Tokenizer) -> str:
    found = hashlib.sha256()
    for index in range(tokenizer.vocab_size):
        token = tokenizer.token_bytes(index)
        found.update(len(token).to_bytes(4, "little") + token)
    return found.hexdigest()


_PROBE: list[Message] = [
    {"role": "system", "content": "आप खेती के सलाहकार हैं।"},
    {"role": "user", "content": "गेहूँ के पत्ते पीले हैं।\n\nWhy?"},
    {"role": "assistant", "content": " कब से? ", "thought": "\nask\n"},
    {"role": "user", "content": "12 दिन से।"},
    {"role": "assistant", "content": "\n\nपानी कम दें।\n", "thought": "\nyellow leaves:\n\ntoo much water\n"},
]


def _rendering_digest(teacher: Tokenizer, student: Tokenizer) -> str:
    """SHA-256 of what a dialogue with all parts looks like to either: no version number that somebody must raise."""
    rendered = [
        render(_PROBE, student, tags=tags_of(student)),
        *(render(_PROBE, teacher, tags="think", keep_thoughts=kept) for kept in (False, True)),
    ]
    return hashlib.sha256(json.dumps([[r.ids, r.spans] for r in rendered]).encode()).hexdigest()


def known_sha256(path: Path, memory: Path) -> str:
    """SHA-256 of a file, computed only if its size or its time of change is not the one remembered in `memory`."""
    known = _remembered(memory).get(str(path.resolve()), [])
    return str(known[2]) if known[:2] == _stamp(path) else sha256_file(path)


def remember_sha256(path: Path, digest: str, memory: Path) -> None:
    """Note a hash in `memory`, JSON of {path: [size, time in ns, SHA-256]}; where that cannot be written, do not."""
    known = _remembered(memory)
    entry = {str(path.resolve()): [*_stamp(path), digest]}
    # Somebody else's cache may lie on a disk that is not ours to write.
    with contextlib.suppress(OSError):
        if known | entry != known:
            with atomic_file(memory) as temporary:
                temporary.write_text(json.dumps(known | entry, indent=1) + "\n", encoding="utf-8")


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _remembered(memory: Path) -> dict[str, list[Any]]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
