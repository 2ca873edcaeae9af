"""The command frame and atomic writes: what a user's mistake or a kill may and may not do."""

import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from litgpt.utils import UserError, atomic_dir, atomic_file, parse_device, parse_dtype, run_cli, sha256_file


@dataclass(frozen=True)
class Settings:
    rate: float = 1.0
    """step size"""


def command(path: str, settings: Settings = Settings(), count: int = 3, loud: bool = False) -> tuple[str, float, int]:
    """Do a thing.

    Args:
        path: where it is.
        settings: how to do it.
        count: how often.
        loud: whether to shout.
    """
    if count < 0:
        raise UserError(f"count is {count};\nit must be 0 or more")
    return path.upper() if loud else path, settings.rate, count


def test_flags_yaml_and_dotted_overrides(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("path: a\nsettings:\n  rate: 0.5\ncount: 4\n")
    assert run_cli(command, args=["--config", str(config), "--settings.rate", "0.25"]) == ("a", 0.25, 4)
    assert run_cli(command, args=["b"], positional=True) == ("b", 1.0, 3)


def test_a_switch_needs_no_value() -> None:
    assert run_cli(command, args=["--path", "b", "--loud"]) == ("B", 1.0, 3)
    assert run_cli(command, args=["--loud", "b", "--count", "1"], positional=True) == ("B", 1.0, 1)
    assert run_cli(command, args=["--path", "b", "--loud", "false"]) == ("b", 1.0, 3)


def test_a_reader_that_leaves_is_no_error() -> None:
    body = "def f() -> None:\n    'Print.'\n    print('x\\n' * 10**6)\n"
    code = f"from litgpt.utils import run_cli\n{body}run_cli(f, args=[])"
    script = f'set -o pipefail; {sys.executable} -c "$CODE" | head -1'
    result = subprocess.run(
        ["bash", "-c", script], env={**os.environ, "CODE": code}, cwd=Path(__file__).parents[1], capture_output=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"x\n", b"")


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli(command, args=["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "Do a thing." in text
    assert "step size" in text
    assert "how often." in text


@pytest.mark.parametrize(
    "words",
    [
        ["--path", "a", "--count", "x"],
        ["--path", "a", "--bogus", "1"],
        ["--path", "a", "--count", "-1"],
        ["--path", "a", "--config", "no-such-file.yaml"],
        ["--path", "a", "--settings.bogus", "1"],
        [],
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli(command, args=words)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")


def test_a_bug_keeps_its_traceback() -> None:
    def broken() -> None:
        """Fail."""
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_cli(broken, args=[])


def test_atomic_file_keeps_the_old_one_when_writing_fails(tmp_path: Path) -> None:
    target = tmp_path / "a" / "f.txt"
    with atomic_file(target) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_atomic_dir_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with atomic_dir(target) as temporary:
        (temporary / "f").write_text("old")
        assert not target.exists()
    with pytest.raises(UserError, match="exists already"), atomic_dir(target):
        pass
    with pytest.raises(RuntimeError), atomic_dir(target, replace=True) as temporary:
        (temporary / "f").write_text("half")
        raise RuntimeError
    assert (target / "f").read_text() == "old"
    with atomic_dir(target, replace=True) as temporary:
        (temporary / "g").write_text("new")
    assert [file.name for file in target.iterdir()] == ["g"]
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    target, node = tmp_path / "model[1]", platform.node()
    (tmp_path / f".model[1].{node}-{dead.pid}.tmp").mkdir()
    (tmp_path / f".model[1].{node}-{dead.pid}.tmp" / "half").write_text("half")
    kept = [
        f".model[1].{node}-{os.getppid()}.tmp",
        f".model[1].elsewhere-{dead.pid}.tmp",
        f".model1.{node}-{dead.pid}.tmp",
    ]
    for name in kept:
        (tmp_path / name).write_text("")
    with atomic_dir(target):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, target.name])
    (tmp_path / f".f.{node}-{dead.pid}.tmp").write_text("half")
    with atomic_file(tmp_path / "f") as temporary:
        temporary.write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, target.name, "f"])


REPLACE_FOREVER = """
import sys, itertools
from litgpt.utils import atomic_dir
for i in itertools.count():
    with atomic_dir(sys.argv[1], replace=True) as d:
        for name in ("a", "b"):
            (d / name).write_text(str(i) * 100000)
"""


def test_a_kill_at_any_moment_leaves_one_whole_directory(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with atomic_dir(target) as temporary:
        for name in ("a", "b"):
            (temporary / name).write_text("first")
    for attempt in range(4):
        writer = subprocess.Popen([sys.executable, "-c", REPLACE_FOREVER, str(target)], cwd=Path(__file__).parents[1])
        before = (target / "a").stat().st_ino
        while (target / "a").stat().st_ino == before:  # it has replaced the directory at least once
            time.sleep(0.01)
        time.sleep(0.003 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert (target / "a").read_text() == (target / "b").read_text() != "first"


def test_a_full_disk_is_a_users_line_and_keeps_the_old_file(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", mount]).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        (mount / "f").write_text("old")

        def fill() -> None:
            """Write more than there is room for."""
            with atomic_file(mount / "f") as temporary:
                temporary.write_bytes(bytes(1 << 20))

        with pytest.raises(SystemExit) as stop:
            run_cli(fill, args=[])
        assert stop.value.code == 2
        assert (mount / "f").read_text() == "old"
        assert [file.name for file in mount.iterdir()] == ["f"]
    finally:
        subprocess.run(["umount", mount], check=True)


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there(name: str) -> None:
    assert parse_device("cpu") == torch.device("cpu") and parse_device("auto").type in ("cpu", "cuda")
    with pytest.raises(UserError, match=f"device '{name}'"):
        parse_device(name)


def test_hash_and_dtype_names(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert sha256_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert parse_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(UserError, match="float8"):
        parse_dtype("float8")
