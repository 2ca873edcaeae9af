"""Tensors on disk, one at a time: `HFReader` and `HFWriter` for a Hugging Face directory's safetensors."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from litgpt.tensorfile import (
    FileSink,
    Spec,
    StreamFile,
    check_announced,
    check_complete,
    check_free_disk,
    check_rows,
    full_disk_is_users_error,
    read_bytes,
    row_count,
    tensor_bytes,
)
from litgpt.utils import UserError

HF_FILE = "model.safetensors"
HF_INDEX = "model.safetensors.index.json"

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


class HFReader:
    """Reads rows of single tensors of a directory's safetensors, one file or shards with an index.

    `safe_open` checks each file when it is opened here; the numbers are then read with `pread` at the header's offsets.

    Raises:
        UserError: no safetensors, a missing shard, a file that is cut short or broken, a dtype that is no plain float,
            an index and shards that contradict each other.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.once = False
        """Whether what is read is read once, see `litgpt.tensorfile.read_bytes`."""
        listed = _weight_map(self.directory)
        self.files: tuple[Path, ...] = tuple(self.directory / name for name in sorted(set(listed.values())))
        if not listed:
            self.files = (self.directory / HF_FILE,)
        self.specs: dict[str, Spec] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        for path in self.files:
            for name, (spec, offset) in _safetensors_header(path).items():
                if listed and listed.get(name) != path.name:
                    raise UserError(
                        f"{path} holds {name}, which {HF_INDEX} does not say; download the checkpoint again"
                    )
                self.specs[name] = spec
                self._places[name] = (path, offset)
        if absent := [name for name in listed if name not in self.specs]:
            raise UserError(
                f"{self.directory / listed[absent[0]]} lacks {absent[0]}, which {HF_INDEX} lists; download it again"
            )

    def read_rows(self, name: str, start: int, stop: int, *, into: Tensor | None = None) -> Tensor:
        """Rows `start:stop` of a tensor with its leading dimensions flattened, in memory of their own or in `into`.

        Raises:
            KeyError: no such tensor.
            UserError: the file has become shorter since it was opened.
        """
        spec = self.specs[name]
        path, offset = self._places[name]
        row = spec.shape[-1:] if len(spec.shape) > 1 else ()
        row_bytes = math.prod(row) * spec.dtype.itemsize
        first, count = offset + start * row_bytes, (stop - start) * row_bytes
        data = read_bytes(path, name, first, count, once=self.once, into=into)
        return data.view(spec.dtype).reshape(stop - start, *row)


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor name → shard, empty when there is one file and no index."""
    index = directory / HF_INDEX
    if not index.is_file():
        if (directory / HF_FILE).is_file():
            return {}
        if any(directory.glob("*.bin")):
            raise UserError(f"{directory} has its weights as .bin; only safetensors are read, which cannot carry code")
        raise UserError(
            f"{directory} holds no {HF_FILE} and no {HF_INDEX}; download the checkpoint (scripts/download.py)"
        )
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        weight_map = {str(name): str(shard) for name, shard in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is no index of safetensors shards (weight_map); download it again") from None
    # The index comes from outside: a shard is a file beside it, never a path.
    if foreign := [shard for shard in weight_map.values() if Path(shard).name != shard]:
        raise UserError(f"{index} points outside its directory ({foreign[0]!r}); download the checkpoint again")
    for shard in sorted(set(weight_map.values())):
        if not (directory / shard).is_file():
            raise UserError(
                f"{directory / shard} is missing, though {HF_INDEX} lists it; download the checkpoint again"
            )
    return weight_map


def _safetensors_header(path: Path) -> dict[str, tuple[Spec, int]]:
    """Tensor name → spec and byte offset in the file.

    The layout is documented: 8 bytes of header length (little endian), the header as JSON, then the tensors' bytes.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is cut short or broken ({error}); download it again") from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    found: dict[str, tuple[Spec, int]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise UserError(
                f"{path}: {name} is stored as {entry['dtype']}; only {', '.join(_SAFETENSORS_DTYPES)} are read, "
                "so take the checkpoint that is not quantised"
            )
        found[name] = (Spec(tuple(entry["shape"]), dtype), 8 + length + entry["data_offsets"][0])
    return found


class HFWriter:
    """Writes a directory's safetensors tensor by tensor: one file, or shards and their index.

    safetensors' own `save_file` and `serialize_file` want all tensors of a file in memory at once, so the documented
    layout is written by hand. Header and order of tensors are the library's, and so are the bytes of the file.

    Args:
        directory: exists; whoever makes it also makes it appear at once (`utils.atomic_dir`).
        specs: name → (shape, dtype), in the order in which shards are filled.
        max_shard_bytes: a new shard begins before one would grow beyond this; a larger tensor has one to itself.
        streamed: the tensors come `in_file_order`, each row after the one before it; the files are then written past
            the page cache and hashed on the way, and `sha256` holds the digests after leaving.

    Raises:
        UserError: the disk has no room, or a dtype that safetensors files of ours do not have.
        ValueError: on leaving, when a tensor was not written.
    """

    def __init__(
        self,
        directory: Path,
        specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        *,
        max_shard_bytes: int,
        streamed: bool = False,
    ) -> None:
        self.directory = directory
        self._streamed = streamed
        self.sha256: dict[str, str] = {}
        """File name → SHA-256, of streamed ones."""
        self.specs = {name: Spec(tuple(shape), dtype) for name, (shape, dtype) in specs.items()}
        self._shards = _fill_shards(self.specs, max_shard_bytes)
        count = len(self._shards)
        self.file_names = (
            [HF_FILE] if count == 1 else [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
        )

    def __enter__(self) -> HFWriter:
        check_free_disk(self.directory, sum(spec.nbytes for spec in self.specs.values()))
        self._places: dict[str, tuple[str, int]] = {}
        self._headers: dict[str, bytes] = {}
        self._sinks: dict[str, FileSink] = {}
        self._stream: StreamFile | None = None
        self._missing = {name: row_count(spec.shape) for name, spec in self.specs.items()}
        with contextlib.ExitStack() as undo, full_disk_is_users_error(self.directory):
            for file_name, names in zip(self.file_names, self._shards, strict=True):
                header, offsets = _encode_header({name: self.specs[name] for name in names})
                self._places |= {name: (file_name, offset) for name, offset in offsets.items()}
                if self._streamed:
                    self._headers[file_name] = header
                    continue
                sink = self._sinks[file_name] = FileSink(self.directory / file_name, os.O_CREAT | os.O_TRUNC)
                undo.callback(sink.close)
                sink.write(0, header)
            self._undo = undo.pop_all()
        return self

    @property
    def in_file_order(self) -> list[str]:
        """All names, file by file, as their bytes follow each other."""
        return list(self._places)

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
            ValueError: another width or dtype, more rows than there are, or all were written before; streamed, but not
                what comes next.
        """
        check_rows(name, start, rows, self.specs[name], self._missing)
        file_name, offset = self._places[name]
        offset += start * math.prod(rows.shape[1:]) * rows.dtype.itemsize
        with full_disk_is_users_error(self.directory):
            if not self._streamed:
                self._sinks[file_name].write_tensor(offset, rows)
            elif (stream := self._stream_of(file_name)).length == offset:
                stream.write(tensor_bytes(rows))
            else:
                raise ValueError(f"{name}: rows {start} ... are not what comes next in {file_name}")
        self._missing[name] -= len(rows)
        if not self._missing[name]:
            del self._missing[name]

    def _stream_of(self, file_name: str) -> StreamFile:
        """The file that is being written; a new one ends the one before it."""
        if self._stream is None or file_name in self._headers:
            self._finish_stream()
            self._stream = StreamFile(self.directory / file_name)
            self._undo.callback(self._stream.close)
            self._stream.write(self._headers.pop(file_name))
        return self._stream

    def _finish_stream(self) -> None:
        if self._stream is not None:
            self.sha256[self._stream.path.name] = self._stream.finish()
            self._undo.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._undo:
            if error is not None:
                return
            check_complete(self.directory, self._missing)
            with full_disk_is_users_error(self.directory):
                self._finish_stream()
        if len(self.file_names) > 1:
            shard_of = {
                name: file_name
                for file_name, names in zip(self.file_names, self._shards, strict=True)
                for name in names
            }
            total = sum(spec.nbytes for spec in self.specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))}
            (self.directory / HF_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _fill_shards(specs: Mapping[str, Spec], max_shard_bytes: int) -> list[list[str]]:
    """Names shard by shard, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards


def _encode_header(specs: Mapping[str, Spec]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a safetensors file, and each tensor's byte offset in the file."""
    codes = {dtype: code for code, dtype in _SAFETENSORS_DTYPES.items()}
    if alien := [name for name, spec in specs.items() if spec.dtype not in codes]:
        raise UserError(f"{alien[0]} is {specs[alien[0]].dtype}; convert with --dtype bfloat16 or float32 first")
    # The library's order: wide dtypes first (so that every tensor is aligned), then by name.
    wide_first = list(codes)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for name in sorted(specs, key=lambda name: (wide_first.index(specs[name].dtype), name)):
        spec = specs[name]
        offsets[name], end = end, end + spec.nbytes
        entries[name] = {"dtype": codes[spec.dtype], "shape": list(spec.shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + offset for name, offset in offsets.items()}
