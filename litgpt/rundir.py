"""A run directory: checkpoints that a kill cannot break, which of them to go on from, and what stands in the way.

out/distill/
  hyperparameters.yaml   everything, resolved
  metrics.csv, tensorboard/
  step-000200/state.pth  model, optimizer, loader position, RNG states, settings
  report/metrics.json    validation before and after
  final/                 the lit dir; its presence means the run is finished
"""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from litgpt.tensorfile import full_disk_is_users_error
from litgpt.utils import UserError, atomic_dir

STATE_FILE = "state.pth"
FINAL = "final"
KEPT_CHECKPOINTS = 2
_OWN_ENTRIES = ("hyperparameters.yaml", "metrics.csv", "tensorboard", "report", FINAL)


def checkpoints(out_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    steps = [path for path in out_dir.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted((path for path in steps if (path / STATE_FILE).is_file()), key=lambda path: int(path.name[5:]))


def save_checkpoint(out_dir: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `step-NNNNNN/` whole or not at all, then delete all but the newest two.

    Args:
        out_dir: the run directory.
        step: optimizer steps done.
        state: tensors and plain values only, so that it loads without unpickling code.

    Raises:
        UserError: the disk is full; the older checkpoints are as they were.
    """
    path = out_dir / f"step-{step:06d}"
    # Through a file object: given a path, torch hides a full disk behind an error of its own.
    with (
        full_disk_is_users_error(path),
        atomic_dir(path, replace=True) as temporary,
        open(temporary / STATE_FILE, "wb") as file,
    ):
        torch.save(state, file)
    for old in checkpoints(out_dir)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; tensors are mapped from the file, not yet in memory.

    Raises:
        UserError: no checkpoint there.
    """
    file = path / STATE_FILE
    if not file.is_file():
        raise UserError(f"{path} holds no {STATE_FILE}: --resume takes auto, none or a step-NNNNNN directory")
    state: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return state


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
    leftovers = [path for path in out_dir.glob(".*.tmp") if re.match(r"\.(step-\d+|final)\.", path.name)]
    if everything:
        leftovers += [*out_dir.glob("step-*"), *(out_dir / name for name in _OWN_ENTRIES)]
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


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
