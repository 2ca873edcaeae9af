"""A run directory: checkpoints that a kill cannot break, which of them to go on from, and what stands in the way.

out/distill/
  hyperparameters.yaml   everything, resolved
  metrics.csv, tensorboard/
  samples.jsonl          what the student answered at each validation
  events.jsonl           steps with numbers that are not finite, spikes of the loss: their records
  step-000200/state.pth  model, optimizer, loader position, RNG states, settings
  report/metrics.json    validation before and after
  final/                 the lit dir; its presence means the run is finished

A `state.pth` is what torch.save makes, a zip archive with a CRC-32 of every tensor: it is checked whole before a run
goes on from it, and the checkpoint before takes its place if it is not as it was written.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from litgpt.tensorfile import check_free_disk, full_disk_is_users_error
from litgpt.utils import UserError, atomic_dir, atomic_file

STATE_FILE = "state.pth"
FINAL = "final"
KEPT_CHECKPOINTS = 2
METRICS_FILE = "metrics.csv"
SAMPLES_FILE = "samples.jsonl"
EVENTS_FILE = "events.jsonl"
ROUTING_FILE = "routing.jsonl"
FIRST_CHOICES_FILE = "routing-first.pt"
_LOGS = (METRICS_FILE, SAMPLES_FILE, EVENTS_FILE, ROUTING_FILE)
_OWN_ENTRIES = ("hyperparameters.yaml", *_LOGS, FIRST_CHOICES_FILE, "tensorboard", "report", FINAL)
# Before each save so much must be free beside the state itself: logs and the small files of `final/`.
_SPARE_BYTES = 16 << 20


class DamagedCheckpoint(UserError):
    """A checkpoint that is not as it was written."""


def checkpoints(out_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    steps = [path for path in out_dir.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted((path for path in steps if (path / STATE_FILE).is_file()), key=lambda path: int(path.name[5:]))


def save_checkpoint(out_dir: Path, step: int, state: dict[str, Any], *, keep: int = KEPT_CHECKPOINTS) -> Path:
    """Write `step-NNNNNN/` whole or not at all, then delete all but the newest.

    Args:
        out_dir: the run directory.
        step: optimizer steps done.
        state: tensors and plain values only, so that it loads without unpickling code.
        keep: how many checkpoints stay, this one included.

    Raises:
        UserError: the disk is full or will be; the older checkpoints are as they were.
    """
    path = out_dir / f"step-{step:06d}"
    _prune(out_dir, keep)  # what kills have left: they may come between the rename and the deletion below
    check_free_disk(out_dir, _tensor_bytes(state) + _SPARE_BYTES)
    # Through a file object: given a path, torch hides a full disk behind an error of its own.
    with (
        full_disk_is_users_error(path),
        atomic_dir(path, replace=True) as temporary,
        open(temporary / STATE_FILE, "wb") as file,
    ):
        torch.save(state, file)
    _prune(out_dir, keep)
    return path


def _prune(out_dir: Path, keep: int) -> None:
    for old in checkpoints(out_dir)[:-keep]:
        shutil.rmtree(old)


def _tensor_bytes(state: Any) -> int:
    """Bytes of all tensors in nested containers, each storage once."""
    storages: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            with contextlib.suppress(NotImplementedError, RuntimeError):  # quantised wrappers have no storage
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            for item in value.values():
                walk(item)
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)

    walk(state)
    return sum(storages.values())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Check a checkpoint and read it; tensors are mapped from the file, not yet in memory.

    Every byte that counts is read once for its CRC-32, which `torch.load` does not look at: about a second a GB.

    Raises:
        UserError: no checkpoint there.
        DamagedCheckpoint: it is cut short or altered.
    """
    file = path / STATE_FILE
    if not file.is_file():
        raise UserError(f"{path} holds no {STATE_FILE}: --resume takes auto, none or a step-NNNNNN directory")
    try:
        with zipfile.ZipFile(file) as archive:
            if (bad := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {bad} is wrong")
        state: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except _SIGNS_OF_DAMAGE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedCheckpoint(f"{path} is damaged ({reason})") from None
    return state


# What zipfile and torch raise over a file with wrong bytes, as found by flipping and cutting them.
_SIGNS_OF_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    struct.error,
    pickle.UnpicklingError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    NotImplementedError,
)


def load_start(out_dir: Path, resume: str, *, overwrite: bool) -> tuple[Path | None, dict[str, Any] | None]:
    """Which checkpoint to go on from, checked and read; see `start_point`.

    With `resume` "auto" a damaged checkpoint is passed over, with one line on stderr, for the one before it.

    Raises:
        UserError: as `start_point`, or none of the checkpoints is whole.
    """
    start = start_point(out_dir, resume, overwrite=overwrite)
    candidates = [] if start is None else checkpoints(out_dir)[::-1] if resume == "auto" else [start]
    for candidate in candidates:
        try:
            return candidate, load_checkpoint(candidate)
        except DamagedCheckpoint as error:
            if candidate == candidates[-1]:
                raise UserError(f"{error}, and there is no older one: start anew with --overwrite true") from None
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"warning: {error}; going on from the checkpoint before", file=sys.stderr)
    return None, None


def set_aside_newer(out_dir: Path, start: Path | None) -> None:
    """Rename checkpoints newer than the one the run goes on from, which are damaged: `damaged-step-NNNNNN`."""
    found = checkpoints(out_dir)
    for path in found[found.index(start) + 1 :] if start in found else []:
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def start_point(out_dir: Path, resume: str, *, overwrite: bool) -> Path | None:
    """Which checkpoint to go on from; changes nothing.

    Args:
        out_dir: the run directory, which need not exist.
        resume: `auto` takes the newest, `none` starts anew, anything else is the path of a checkpoint.
        overwrite: an earlier run in `out_dir` does not matter, it is to be replaced.

    Returns:
        a checkpoint, or `None` to start at step 0.

    Raises:
        UserError: the run is finished, `none` would mix a new run with an old one, a named checkpoint is not the newest
            of its run, or `overwrite` would delete it.
    """
    if overwrite:
        if resume not in ("auto", "none"):
            raise UserError("--resume names a checkpoint and --overwrite would delete it: give one of them")
        return None
    if (out_dir / FINAL).exists():
        raise UserError(
            f"{out_dir} holds a finished run: choose another --out_dir, or replace it with --overwrite true"
        )
    found = checkpoints(out_dir)
    if resume not in ("auto", "none"):
        names = [path.name for path in found]
        here = Path(resume).resolve().parent == out_dir.resolve() and Path(resume).name in names
        newer = names[names.index(Path(resume).name) + 1 :] if here else []
        if newer:
            raise UserError(
                f"{out_dir} holds checkpoints newer than {resume} ({', '.join(newer)}): "
                "delete them to go back, or give another --out_dir"
            )
        return Path(resume)
    if found and resume == "none":
        raise UserError(
            f"{out_dir} holds an unfinished run at {found[-1].name}: go on with --resume auto, "
            "or replace it with --overwrite true"
        )
    return found[-1] if found else None


def refuse_input(out_dir: Path, path: Path) -> None:
    """Raise `UserError` for a model or a file that the run would read from what it writes or clears itself."""
    inside = path.resolve()
    if inside.is_relative_to(out_dir.resolve()):
        first = inside.relative_to(out_dir.resolve()).parts[:1]
        if not first or first[0] in _OWN_ENTRIES or first[0].startswith("step-"):
            raise UserError(f"{path} lies in --out_dir {out_dir}, which this run writes: give another --out_dir")


def clear(out_dir: Path, *, everything: bool) -> None:
    """Delete what a killed save left behind; with `everything` also an earlier run's own files, and no others."""
    leftovers = [
        path for path in out_dir.glob(".*.tmp") if re.match(r"\.(step-\d+|final|[a-z]+\.(csv|jsonl))\.", path.name)
    ]
    if everything:
        leftovers += [
            *out_dir.glob("step-*"),
            *out_dir.glob("damaged-step-*"),
            *(out_dir / name for name in _OWN_ENTRIES),
        ]
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class MetricsFile:
    """metrics.csv, one line a report, columns as they come; a kill at any moment costs at most the line being written.

    Lightning's CSVLogger starts the file afresh when it is made and rewrites it in place for a new column, so that a
    kill in between loses the run's history.

    Args:
        path: the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line."""
        row = {"step": step, **values}
        # Read late: the file may have been cleared since this was made.
        self.columns = self.columns or next(csv.reader(_whole_lines(self.path)[:1]), [])
        if added := [name for name in row if name not in self.columns]:
            earlier = list(csv.DictReader(_whole_lines(self.path)))
            self.columns += added
            with atomic_file(self.path) as temporary:
                header = {name: name for name in self.columns}
                temporary.write_text(self._text([header, *earlier, row]), encoding="utf-8")
        else:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._text([row]))

    def _text(self, rows: list[Any]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, lineterminator="\n").writerows(rows)
        return text.getvalue()


def save_tensors(path: Path, tensors: Mapping[int, torch.Tensor]) -> None:
    """Write tensors by number, all or nothing; `torch.load` reads them."""
    with atomic_file(path) as temporary:
        torch.save(dict(tensors), temporary)


def append_jsonl(path: Path, *values: Mapping[str, Any]) -> None:
    """Write objects as lines, in one go."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def keep_logs_up_to(out_dir: Path, step: int) -> None:
    """Drop from metrics, samples and events what a checkpoint of this step does not know of, and lines cut by a kill.

    Each file is replaced as a whole, so a kill leaves the old or the new one.
    """
    for path in (out_dir / name for name in _LOGS if (out_dir / name).is_file()):
        kept = [line for line, at in _steps_of(path) if at is None or at <= step]
        with atomic_file(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _steps_of(path: Path) -> Iterator[tuple[str, int | None]]:
    """The whole lines of a log with their steps; the header of a CSV file has none. Unreadable lines are left out."""
    lines = _whole_lines(path)
    if path.suffix == ".csv":
        columns = next(csv.reader(lines[:1]), [])
        at = columns.index("step") if "step" in columns else -1
        yield from ((line, None) for line in lines[:1])
        for line in lines[1:]:
            cells = next(csv.reader([line]))
            if at >= 0 and len(cells) == len(columns) and cells[at].isdecimal():
                yield line, int(cells[at])
        return
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            yield line, int(json.loads(line)["step"])


def _whole_lines(path: Path) -> list[str]:
    """Lines that end with a line break: what follows the last one was cut, and half a number is a number, too."""
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.is_file() else []


def rng_state() -> dict[str, Any]:
    """States of Python's, numpy's and torch's generators, as tensors and plain values.

    A step draws no random number (the order of the data comes from the loader's own seed); they are kept so that it
    stays true of the next dropout.
    """
    version, keys, gauss = random.getstate()
    _, state, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(keys), gauss],
        "numpy": [torch.from_numpy(np.asarray(state).astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` gave."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    array, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", array.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].clone())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([x.clone() for x in state["cuda"]])
