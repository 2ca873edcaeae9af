"""Tensors on disk, one at a time: `LitReader` and `LitWriter` for `lit_model.pth`.

A checkpoint may be larger than the memory, so nothing here holds more than the tensor asked for. Files are read and
written with `pread`/`pwrite` at known offsets: a memory map would count every page it has touched as resident until it
is closed.

The `.pth` is an ordinary `torch.save` archive. Torch documents how to fill one piece by piece (its notes on
serialization): `torch.save` under `skip_data` lays the archive out with holes for the numbers, and `torch.load` without
the numbers tells the offset of each hole. The holes' CRC-32 stays 0: `torch.load` does not look at it, `unzip -t` does.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import pickle
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litgpt.utils import UserError, atomic_file

LIT_FILE = "lit_model.pth"

FLUSH_BYTES = 128 << 20
"""Written between two flushes. What is on the disk leaves the page cache, so a checkpoint larger than the free memory
neither pushes everything else out of it nor waits for the kernel to find pages (5 GB in 4 s instead of 22 s on a
virtual machine whose host hands out memory page by page)."""


DIRECT_BYTES = 4096
"""Past the page cache it goes in multiples of a disk's blocks, from and to aligned memory; no disk has larger ones
today."""

STAGE_BYTES = 16 << 20
"""What `StreamFile` collects before it goes to the disk."""


class Spec(NamedTuple):
    """What a tensor is without its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def row_count(shape: tuple[int, ...]) -> int:
    """How many rows a tensor of this shape has when its leading dimensions are flattened."""
    return math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)


class _Hole(NamedTuple):
    """Where a tensor's elements lie in a file: byte offset of its first element, and its strides in elements."""

    spec: Spec
    offset: int
    stride: tuple[int, ...]


def _load_without_numbers(path: Path) -> Any:
    """What `torch.load` gives, but of the storages only their byte offsets (`_checkpoint_offset`)."""
    content = torch.load(path, map_location="meta", weights_only=True)
    tensors = [value for value in _state_of(content).values() if isinstance(value, Tensor)]
    if all(hasattr(tensor.untyped_storage(), "_checkpoint_offset") for tensor in tensors):
        return content
    # Before torch told the offsets on "meta", too. The import alone takes a second and a half.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.load(path, weights_only=True)


def _state_of(content: Any) -> Mapping[str, Any]:
    """The state dict: LitGPT's training scripts save {"model": state dict, ...}, its converters the dict itself."""
    state = content.get("model", content) if isinstance(content, dict) else None
    return state if isinstance(state, Mapping) else {"": None}


def _holes(path: Path) -> tuple[dict[str, _Hole], dict[str, str]]:
    """The tensors of a `torch.save` archive and, for those that share storage with an earlier one, its name.

    Raises:
        UserError: `path` is missing, cut short, or not a flat state dict of plain tensors.
    """
    try:
        state = _state_of(_load_without_numbers(path))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; convert the checkpoint first (scripts/convert_hf_checkpoint.py)") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} is not a checkpoint that torch.load can read safely ({reason}); convert it again"
        ) from None
    if not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path} is not a flat dictionary of tensors, which a lit checkpoint is; convert it again")
    size = path.stat().st_size
    holes: dict[str, _Hole] = {}
    aliases: dict[str, str] = {}
    first_with: dict[tuple[int, Spec, tuple[int, ...]], str] = {}
    for name, tensor in state.items():
        spec = Spec(tuple(tensor.shape), tensor.dtype)
        start: int = tensor.untyped_storage()._checkpoint_offset
        hole = _Hole(spec, start + tensor.storage_offset() * tensor.dtype.itemsize, tuple(tensor.stride()))
        if hole.offset + spec.nbytes > size:
            raise UserError(
                f"{path} is cut short: {name} ends at byte {hole.offset + spec.nbytes} of {size}; convert it again"
            )
        holes[name] = hole
        if spec.nbytes:
            original = first_with.setdefault((hole.offset, spec, hole.stride), name)
            if original != name:
                aliases[name] = original
    return holes, aliases


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def page_memory(count: int) -> Tensor:
    """Memory, uint8, in which `read_bytes` can put `count` bytes from any offset of a file, again and again."""
    # Of the allocator, not an anonymous map: what it gets back it hands out again without page faults.
    memory = torch.empty(count + 3 * DIRECT_BYTES, dtype=torch.uint8)
    return memory[-memory.data_ptr() % DIRECT_BYTES :]


def read_bytes(
    path: Path, name: str, offset: int, count: int, *, once: bool = False, into: Tensor | None = None
) -> Tensor:
    """`count` bytes of a file from `offset` on, as a uint8 tensor.

    Args:
        path: the file.
        name: the tensor to blame in the message.
        offset, count: which bytes.
        once: nobody will read them again, so they come straight from the disk where the system can do that: the page
            cache costs three times as much as the disk, and would show what was written rather than what is there.
        into: `page_memory` for as many bytes, of which a part is returned; by default the tensor has its own. Fresh
            memory costs a page fault per 4 kB, as much as reading.

    Raises:
        UserError: the file ends before that.
    """
    if once and hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):  # a file system without it, or with larger blocks
            return _read_bytes(path, name, offset, count, os.O_DIRECT, page_memory(count) if into is None else into)
    return _read_bytes(path, name, offset, count, 0, torch.empty(count, dtype=torch.uint8) if into is None else into)


def _read_bytes(path: Path, name: str, offset: int, count: int, flag: int, memory: Tensor) -> Tensor:
    """As `read_bytes`; with the flag `O_DIRECT`, memory and what is read of the file are whole `DIRECT_BYTES`."""
    before = offset % DIRECT_BYTES if flag else 0
    end = before + count
    whole = -(-end // DIRECT_BYTES) * DIRECT_BYTES if flag else end
    view = memory.numpy().data
    descriptor = os.open(path, os.O_RDONLY | flag)
    try:
        done = 0
        while done < end:
            # One call moves at most 2 GiB on Linux.
            got = os.preadv(descriptor, [view[done:whole]], offset - before + done)
            done += got
            if done < end and (not got or (flag and got % DIRECT_BYTES)):
                raise UserError(f"{path} ends {end - done} bytes early in {name}; download or convert it again")
    finally:
        os.close(descriptor)
    return memory[before:end]


class StreamFile:
    """A new file that is written from its first byte to its last, hashed on the way; `close` it.

    It goes past the page cache where the system can do that: nobody reads it again soon, and a copy for the cache costs
    more than the disk. One thread writes and one hashes while the next bytes are collected.

    Args:
        path: the file; an older one is overwritten.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._direct = path, getattr(os, "O_DIRECT", 0)
        try:
            self._descriptor = self._open(os.O_TRUNC)
        except OSError:  # a file system without it
            self._direct = 0
            self._descriptor = self._open(os.O_TRUNC)
        self._stages = [page_memory(STAGE_BYTES)[:STAGE_BYTES].numpy().data for _ in range(2)]
        self._filled = 0
        self._handed = 0
        self._hash = hashlib.sha256()
        self._pool = ThreadPoolExecutor(2)
        self._busy: tuple[Future[None], ...] = ()

    def _open(self, flags: int = 0) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | self._direct | flags, 0o644)

    @property
    def length(self) -> int:
        """Bytes so far."""
        return self._handed + self._filled

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        data = memoryview(data)
        while data:
            count = min(len(data), STAGE_BYTES - self._filled)
            self._stages[0][self._filled : self._filled + count] = data[:count]
            data = data[count:]
            self._filled += count
            if self._filled == STAGE_BYTES:
                self._hand_over()

    def finish(self) -> str:
        """Wait until all is written; its SHA-256, hexadecimal."""
        self._hand_over()
        self._wait()
        os.ftruncate(self._descriptor, self._handed)
        return self._hash.hexdigest()

    def close(self) -> None:
        self._pool.shutdown()
        os.close(self._descriptor)
        self._stages.clear()

    def _hand_over(self) -> None:
        self._wait()
        stage, count = self._stages[0], self._filled
        # A last piece that is no whole block takes some rubbish along, which is cut off in the end.
        whole = -(-count // DIRECT_BYTES) * DIRECT_BYTES
        self._busy = (
            self._pool.submit(self._put, stage[:whole], self._handed),
            self._pool.submit(self._hash.update, stage[:count]),
        )
        self._handed, self._filled = self._handed + count, 0
        self._stages.reverse()

    def _wait(self) -> None:
        for done in self._busy:
            done.result()

    def _put(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self._descriptor, data[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                # Opened, but not written past the cache.
                os.close(self._descriptor)
                self._direct = 0
                self._descriptor = self._open()


class FileSink:
    """An open file that takes tensors at known byte offsets; `close` it.

    Args:
        path: the file.
        flags: of `os.open`, beside `O_WRONLY`.
    """

    def __init__(self, path: Path, flags: int = 0) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | flags, 0o644)
        self._unflushed = 0

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at a byte offset."""
        data = memoryview(data)
        done = 0
        while done < len(data):
            # One call moves at most 2 GiB on Linux.
            done += os.pwrite(self._descriptor, data[done : done + FLUSH_BYTES], offset + done)
        self._unflushed += done
        if self._unflushed >= FLUSH_BYTES:
            os.fsync(self._descriptor)
            if hasattr(os, "posix_fadvise"):  # not on a Mac
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            self._unflushed = 0

    def write_tensor(self, offset: int, tensor: Tensor) -> None:
        """Write a tensor's elements, row-major, at a byte offset."""
        self.write(offset, tensor_bytes(tensor))

    def close(self) -> None:
        os.close(self._descriptor)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's elements, row-major."""
    if not tensor.numel():
        return memoryview(b"")
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def check_free_disk(directory: Path, needed: int) -> None:
    """Raise `UserError` when the disk of `directory` has less than `needed` bytes left."""
    existing = directory
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{directory} needs {needed / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB are free; "
            "free some or choose another disk"
        )


@contextlib.contextmanager
def full_disk_is_users_error(path: Path) -> Iterator[None]:
    """Turn ENOSPC and its kin into one `UserError`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save, finding that its file is not what it should be, raises over the error that made it so.
        cause = error if isinstance(error, OSError) else error.__context__
        if not (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
            raise
        raise UserError(f"no room left on the disk while writing {path}; free some and run the command again") from None


class LitReader:
    """Reads single tensors of a lit directory's `lit_model.pth` by their disk names.

    Args:
        checkpoint_dir: a directory with `lit_model.pth` (flat, or `{"model": ...}` as LitGPT's training writes it).

    Raises:
        UserError: the file is missing, cut short, or no checkpoint.
    """

    def __init__(self, checkpoint_dir: str | os.PathLike[str]) -> None:
        self.path = Path(checkpoint_dir) / LIT_FILE
        self.once = False
        """Whether what is read is read once, see `read_bytes`."""
        self._holes, self.aliases = _holes(self.path)
        """`aliases`: name → the earlier name whose storage it shares (`lm_head.weight` of a tied model)."""
        self.specs: dict[str, Spec] = {name: hole.spec for name, hole in self._holes.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the file's order."""
        return tuple(self._holes)

    def shares_storage(self, name: str, other: str) -> bool:
        """Whether two names are one tensor on disk."""
        return self.aliases.get(name, name) == self.aliases.get(other, other)

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own.

        Raises:
            KeyError: no such name; `names` has them all.
            UserError: the file has become shorter since it was opened.
        """
        spec, offset, stride = self._holes[name]
        elements = 1 + sum((length - 1) * step for length, step in zip(spec.shape, stride, strict=True))
        data = read_bytes(self.path, name, offset, elements * spec.dtype.itemsize if spec.nbytes else 0)
        return data.view(spec.dtype).as_strided(spec.shape, stride)

    def read_rows(self, name: str, start: int, stop: int, *, into: Tensor | None = None) -> Tensor:
        """Rows `start:stop` of a tensor with its leading dimensions flattened, in memory of their own or in `into`.

        Raises: as `read`.
        """
        spec, offset, stride = self._holes[name]
        row = spec.shape[-1:] if len(spec.shape) > 1 else ()
        if stride != _row_major(spec.shape):
            return self.read(name).reshape(-1, *row)[start:stop]
        row_bytes = math.prod(row) * spec.dtype.itemsize
        first, count = offset + start * row_bytes, (stop - start) * row_bytes
        data = read_bytes(self.path, name, first, count, once=self.once, into=into)
        return data.view(spec.dtype).reshape(stop - start, *row)


class LitWriter:
    """Writes a `lit_model.pth` tensor by tensor, in any order; as a context manager it appears whole or not at all.

    Args:
        path: the file to appear; an older one stays intact until then.
        specs: disk name → (shape, dtype) of every tensor that will be written.
        aliases: further names → the name in `specs` whose storage they share (a tied `lm_head.weight`).

    Raises:
        UserError: the disk has no room.
        ValueError: on leaving, when a tensor was not written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        *,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.specs = {name: Spec(tuple(shape), dtype) for name, (shape, dtype) in specs.items()}
        self.aliases = dict(aliases or {})
        if unknown := sorted(set(self.aliases.values()) - set(self.specs)):
            raise ValueError(f"aliases of tensors that are not in specs: {', '.join(unknown)}")
        if twice := sorted(set(self.aliases) & set(self.specs)):
            raise ValueError(f"both an alias and a tensor: {', '.join(twice)}")

    def __enter__(self) -> LitWriter:
        check_free_disk(self.path.parent, sum(spec.nbytes for spec in self.specs.values()))
        with contextlib.ExitStack() as undo:
            undo.enter_context(full_disk_is_users_error(self.path))
            temporary = undo.enter_context(atomic_file(self.path))
            skeleton = {name: _untouched(spec) for name, spec in self.specs.items()}
            skeleton |= {alias: skeleton[name] for alias, name in self.aliases.items()}
            # Through a file object: given a path, torch would write the temporary name into the archive.
            with open(temporary, "wb") as file, torch.serialization.skip_data():
                torch.save(skeleton, file)
            del skeleton
            holes, _ = _holes(temporary)
            self._offsets = {name: holes[name].offset for name in self.specs}
            self._sink = FileSink(temporary)
            undo.callback(self._sink.close)
            self._missing = {name: row_count(spec.shape) for name, spec in self.specs.items()}
            self._undo = undo.pop_all()
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; shape and dtype must be the announced ones.

        Raises:
            KeyError: `name` is not in `specs`.
            ValueError: other shape or dtype, or written before.
        """
        check_announced(name, tensor, self.specs[name], self._missing)
        self.write_rows(name, 0, tensor.reshape(-1, *tensor.shape[-1:]) if tensor.ndim > 1 else tensor.reshape(-1))

    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Write rows of a tensor with its leading dimensions flattened, from row `start` on; any order, each row once.

        Raises:
            KeyError: `name` is not in `specs`.
            ValueError: another width or dtype, more rows than there are, or all were written before.
        """
        check_rows(name, start, rows, self.specs[name], self._missing)
        sink, offset = self._sink, self._offsets[name]
        row_bytes = math.prod(rows.shape[1:]) * rows.dtype.itemsize
        with full_disk_is_users_error(self.path):
            sink.write_tensor(offset + start * row_bytes, rows)
        self._missing[name] -= len(rows)
        if not self._missing[name]:
            del self._missing[name]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._undo:
            if error is not None:
                # Handed to the exit stack, so that atomic_file removes the temporary file instead of renaming it.
                raise error
            check_complete(self.path, self._missing)


def _untouched(spec: Spec) -> Tensor:
    """A tensor whose memory nobody reads or writes, so that it takes none (`torch.empty` may fill it)."""
    return torch.empty(0, dtype=spec.dtype).set_(
        torch.UntypedStorage(spec.nbytes), 0, spec.shape, _row_major(spec.shape)
    )


def check_announced(name: str, tensor: Tensor, spec: Spec, missing: Collection[str]) -> None:
    if (tuple(tensor.shape), tensor.dtype) != spec:
        raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype} is not the announced {spec.shape} {spec.dtype}")
    if name not in missing:
        raise ValueError(f"{name} was written before")


def check_rows(name: str, start: int, rows: Tensor, spec: Spec, missing: Mapping[str, int]) -> None:
    """Raise `ValueError` unless these rows fit the tensor and some of it is still to be written."""
    width = spec.shape[-1:] if len(spec.shape) > 1 else ()
    if tuple(rows.shape[1:]) != width or rows.dtype != spec.dtype or start + len(rows) > row_count(spec.shape):
        raise ValueError(
            f"{name}: rows {start} ... of {tuple(rows.shape)} {rows.dtype} do not fit {spec.shape} {spec.dtype}"
        )
    if missing.get(name, 0) < len(rows) or name not in missing:
        raise ValueError(f"{name} was written before")


def check_complete(path: Path, missing: Collection[str]) -> None:
    if missing:
        names = sorted(missing)
        raise ValueError(f"{path}: {len(names)} tensors were not written: {', '.join(names[:5])}")
