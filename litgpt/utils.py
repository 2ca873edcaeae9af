"""The few helpers that several rooms share: the command-line frame, atomic writes, progress, hashes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import inspect
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from tqdm import tqdm

from litgpt.cka import linear_cka

__all__ = [
    "UserError",
    "atomic_dir",
    "atomic_file",
    "linear_cka",
    "parse_device",
    "parse_dtype",
    "progress",
    "run_cli",
    "sha256_file",
]

T = TypeVar("T")

USER_ERROR_EXIT_CODE = 2


class UserError(Exception):
    """A mistake of the user: what was found, what was expected, what to do, in one line."""


def run_cli(function: Callable[..., Any], *, args: list[str] | None = None, positional: bool = False) -> Any:
    """Run a typed function as a command: `--config file.yaml`, dotted overrides, help from its docstring.

    A user's mistake (`UserError`, a rejected argument, a full disk) prints one line on stderr and exits with 2;
    anything else is a bug and keeps its traceback.

    Args:
        function: the command; its parameters are the flags, its docstring the help.
        args: the words of the command line; `None` means `sys.argv`.
        positional: parameters without a default are words of their own instead of flags.

    Returns:
        what `function` returns.
    """
    import jsonargparse

    # Attribute docstrings of settings dataclasses are the help of the dotted flags.
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        description=_summary(function),
        exit_on_error=False,
        formatter_class=jsonargparse.DefaultHelpFormatter,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below.")
    parser.add_function_arguments(function, as_group=False, as_positional=positional)
    try:
        settings = parser.parse_args(_spell_out_switches(function, sys.argv[1:] if args is None else args))
        settings.pop("config", None)
        return function(**parser.instantiate(settings).as_dict())
    except jsonargparse.ArgumentError as error:
        _exit(str(error))
    except UserError as error:
        _exit(str(error))
    except BrokenPipeError:
        # The reader of our output has left (`| head`); Python would complain once more while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        _exit(f"{error.filename}: {(error.strerror or 'cannot be used').lower()}; check the path and its permissions")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _exit(f"no room left while writing {error.filename or 'a file'}: free some disk and run the command again")
    except KeyboardInterrupt:
        print("stopped by the user", file=sys.stderr)
        raise SystemExit(130) from None


def _spell_out_switches(function: Callable[..., Any], words: list[str]) -> list[str]:
    """`--overwrite` alone becomes `--overwrite=true`: jsonargparse wants a value, and people do not give one."""
    hints = get_type_hints(function)
    switches = {f"--{name}" for name in inspect.signature(function).parameters if hints.get(name) is bool}
    following = [*words[1:], ""]
    return [
        f"{word}=true" if word in switches and after not in ("true", "false") else word
        for word, after in zip(words, following, strict=False)
    ]


def _summary(function: Callable[..., Any]) -> str:
    """The docstring up to `Args:`, which jsonargparse shows per flag."""
    return (function.__doc__ or "").split("Args:")[0].strip()


def _exit(message: str) -> None:
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(USER_ERROR_EXIT_CODE) from None


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed over `path`, else removed.

    A reader or a kill therefore sees the old file or the new one, never a half.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(path)
    try:
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success its files are fsynced and it takes the name `path`.

    Args:
        path: the directory to appear.
        replace: an existing directory is moved aside, replaced and then deleted; otherwise it is a `UserError`.

    Raises:
        UserError: `path` exists and `replace` is false.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise UserError(f"{path} exists already; choose another directory or remove it first")
    path = path if path.name else path.resolve()  # "."
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _fsync(file)
        _fsync(temporary)
        if path.exists():
            _exchange(temporary, path)
        else:
            os.rename(temporary, path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary_beside(path: Path) -> Path:
    """A name that no other process uses, after removing what processes of this machine left there when killed."""
    own = f"{platform.node()}-{os.getpid()}"
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        node, _, pid = left.name.removeprefix(f".{path.name}.").removesuffix(".tmp").rpartition("-")
        if node == platform.node() and pid.isdecimal() and (int(pid) == os.getpid() or not _runs(int(pid))):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{own}.tmp")


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _exchange(first: Path, second: Path) -> None:
    """Swap the names of two directories in one step (Linux, renameat2(2)); in two steps where the system has none."""
    at_fdcwd, rename_exchange = -100, 2
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2") and not libc.renameat2(
        at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange
    ):
        return
    # rename(2) cannot replace a directory that is not empty: for an instant there is only the old one, aside.
    aside = second.with_name(f"{first.name}.old")
    os.rename(second, aside)
    os.rename(first, second)
    os.rename(aside, first)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, hexadecimal, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def progress(iterable: Iterable[T], description: str, *, total: int | None = None, unit: str = "it") -> Iterable[T]:
    """`iterable` with a progress bar on stderr, silent when stderr is no terminal."""
    bar: Iterable[T] = tqdm(iterable, desc=description, total=total, unit=unit, disable=None, leave=False)
    return bar


def parse_device(name: str) -> torch.device:
    """`"auto"` (a GPU where there is one), `"cpu"`, `"cuda"` or `"cuda:1"` → the torch device.

    Raises:
        UserError: another name, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise UserError(f"device {name!r}: expected auto, cpu, cuda or cuda:N")
    if name != "cpu" and int(match[1] or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r}: this machine has {torch.cuda.device_count()} GPUs that torch can use")
    return torch.device(name)


def parse_dtype(name: str) -> torch.dtype:
    """`"float32"`, `"bfloat16"`, `"float16"` or `"float64"` → the torch dtype.

    Raises:
        UserError: any other name.
    """
    dtypes = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float64": torch.float64,
    }
    if name not in dtypes:
        raise UserError(f"dtype {name!r} is not known; choose one of {', '.join(dtypes)}")
    return dtypes[name]
