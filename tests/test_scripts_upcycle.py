"""scripts/upcycle_moe.py as a command: defaults, output, exit codes, and what a kill leaves behind."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from litgpt.checkpoint import require_lit_dir
from litgpt.config import Config
from litgpt.proof import prove
from litgpt.routers import RouterStart
from litgpt.upcycle import default_out_dir, upcycle
from litgpt.utils import UserError, run_cli
from scripts.upcycle_moe import upcycle_moe
from tests.test_upcycle import build_dense, digests

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "upcycle_moe.py"


@pytest.fixture(scope="module")
def dense_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_dense(tmp_path_factory.mktemp("command") / "Qwen3-tiny")


def command(*arguments: object, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the script in a process of its own, from another directory; `code` runs before it."""
    run_script = f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    start = [str(SCRIPT)] if code is None else ["-c", f"{code}\n{run_script}"]
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd="/",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def defaults_of(function: object) -> dict[str, object]:
    assert callable(function)
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def test_yaml_and_functions_have_one_set_of_defaults() -> None:
    settings = yaml.safe_load((ROOT / "configs" / "upsample.yaml").read_text(encoding="utf-8"))
    defaults = defaults_of(upcycle_moe)
    router = settings.pop("router")
    assert RouterStart(**router) == RouterStart()
    del defaults["router"]  # a settings class has its own defaults
    assert settings | {"checkpoint_dir": Path(settings["checkpoint_dir"])} == defaults
    of_function = defaults_of(upcycle)
    shared = settings.keys() & of_function.keys() - {"recipe", "checkpoint_dir"}
    assert len(shared) == 9 and all(settings[name] == of_function[name] for name in shared)
    made = default_out_dir(Path("checkpoints/Qwen/Qwen3-0.6B"), settings["n_expert"], settings["n_expert_per_token"])
    assert made == Path("checkpoints/Qwen/Qwen3-0.6B-MoE-8x2") and defaults["out_dir"] is None


def test_flags_after_the_config_file_win(dense_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_file = str(ROOT / "configs" / "upsample.yaml")
    run_cli(upcycle_moe, args=["--config", config_file, "--checkpoint_dir", str(dense_dir), "--n_expert", "4"])
    made = dense_dir.with_name("Qwen3-tiny-MoE-4x2")
    assert str(made) in capsys.readouterr().out and Config.from_checkpoint(made).n_expert == 4


def test_command_prints_the_proof(dense_dir: Path, tmp_path: Path) -> None:
    ran = command(
        "--checkpoint_dir", dense_dir, "--out_dir", tmp_path / "moe", "--n_expert", 3, "--proof_dtype", "both"
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert re.search(r"float32 +\d+ +\S+e-0\d +\S+e-\d\d +\S+e-\d\d +100\.00%", ran.stdout)
    assert re.search(r"float64 +\d+ +\S+e-1\d", ran.stdout)
    assert "<thought> is token" in ran.stdout
    assert prove(dense_dir, tmp_path / "moe").exact


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n_expert", "2", "--n_expert_per_token", "3"], "n_expert_per_token 3 must be between 1 and n_expert 2"),
        (["--n_expert", "1"], "n_expert is 1"),
        (["--n_expert", "many"], "n_expert"),
        (["--router.std", "-0.1"], "std"),
        (["--thought_tokens", "some"], "thought_tokens"),
        (["--proof_dtype", "bfloat16"], "proof_dtype"),
        (["--checkpoint_dir", "checkpoints/Qwen/Nowhere"], "convert_hf_checkpoint.py"),
        (["--recipe", "magic"], "recipe"),
        (["--drop_ratio", "0.2"], "recipe copy: it has no ratio"),
        (["--recipe", "granular", "--granularity", "3"], "granularity 3 does not divide"),
        (["--layers", "0,7"], "layers"),
        (["--recipe", "shared", "--format", "hf"], "shared expert"),
        (["--trainable", "[experts,brain]"], "brain"),
    ],
)
def test_mistakes_exit_with_2_and_one_line(
    dense_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    common = ["--checkpoint_dir", str(dense_dir), "--out_dir", str(tmp_path / "moe")]
    with pytest.raises(SystemExit) as stopped:
        run_cli(upcycle_moe, args=[*common, *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "moe").exists()


def test_mistakes_in_a_process_of_its_own(dense_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "thesis.tex").write_text("kept")
    ran = command("--checkpoint_dir", dense_dir, "--out_dir", tmp_path / "moe")
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.count("\n") == 1 and "did not write" in ran.stderr
    assert (tmp_path / "moe" / "thesis.tex").read_text() == "kept"


KILL_AT_TENSOR = """
import os, signal, sys
sys.path.insert(0, {root!r})
from litgpt.tensorfile import LitWriter
write, written = LitWriter.write_rows, []
def write_or_die(self, name, start, rows):
    if len(written) == {count}:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(name)
    write(self, name, start, rows)
LitWriter.write_rows = write_or_die
"""
KILL_IN_PROOF = """
import os, signal, sys
sys.path.insert(0, {root!r})
import litgpt.proof
litgpt.proof._compare_logits = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", [17, "proof"])
def test_killed_on_the_way(dense_dir: Path, tmp_path: Path, moment: int | str) -> None:
    source = shutil.copytree(dense_dir, tmp_path / "dense")
    upcycle(source, tmp_path / "moe", n_expert=2, seed=1)
    before = digests(tmp_path / "moe")
    template = KILL_IN_PROOF if moment == "proof" else KILL_AT_TENSOR
    code = template.format(root=str(ROOT), count=moment)
    for out_dir in (tmp_path / "moe", tmp_path / "new"):
        ran = command("--checkpoint_dir", source, "--out_dir", out_dir, "--n_expert", 3, code=code)
        assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert digests(tmp_path / "moe") == before and not (tmp_path / "new").exists()
    left = [path for path in tmp_path.iterdir() if path.name not in ("dense", "moe")]
    assert left and all(path.name.startswith(".") and path.name.endswith(".tmp") for path in left)
    if moment != "proof":
        for path in left:
            with pytest.raises(UserError, match="lacks"):
                require_lit_dir(path)
    for out_dir in (tmp_path / "moe", tmp_path / "new"):
        upcycle(source, out_dir, n_expert=3)
        assert Config.from_checkpoint(out_dir).n_expert == 3
