"""Several processes with gloo on the CPU: the step's gradient, killed runs, and who may go on with whose checkpoint."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt import rundir
from litgpt.checkpoint import load_state
from litgpt.recipe import moved_loader
from litgpt.utils import UserError
from tests.world import World, make_world

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), dialogues=24)


def flags(world: World, out_dir: Path, **changes: Any) -> list[str]:
    settings = {
        "student": world.student,
        "teacher": world.teacher,
        "base": world.base,
        "out_dir": out_dir,
        "data.train": world.train,
        "data.val": world.val,
        "data.max_seq_length": 320,
        "data.micro_batch_size": 1,
        "loss.cka_every": 1,
        "loss.z_weight": 0.01,
        "loss.bias_rate": 0.01,
        "optim.steps": 6,
        "optim.accumulation": 2,
        "optim.lr": 0.01,
        "run.accelerator": "cpu",
        "run.log_every": 1,
        "run.val_every": 100,
        "run.save_every": 1,
        "run.samples": 0,
    }
    return [f"--{name}={value}" for name, value in (settings | changes).items()]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def train(world: World, out_dir: Path, *launcher: str, **changes: Any) -> subprocess.CompletedProcess[str]:
    command = [*(launcher or (sys.executable,)), str(ROOT / "train_distill.py"), *flags(world, out_dir, **changes)]
    return subprocess.run(command, env=environment(), cwd=ROOT, timeout=300, capture_output=True, text=True)


def one_step(world: World, directory: Path, size: int, accumulation: int, **run: Any) -> dict[str, Any]:
    """Gradient and metrics of one step in float64, unequal experts, all four terms."""
    directory.mkdir()
    out = directory / "step.pth"
    changes = {"data.micro_batch_size": size, "optim.accumulation": accumulation, "loss.cka_weight": 1.0}
    command = [
        *(sys.executable, str(ROOT / "tests" / "one_step.py"), f"--out={out}"),
        *flags(world, directory / "run", **{"optim.clip": 1e9, **changes, **run}),
    ]
    subprocess.run(command, env=environment(), cwd=ROOT, timeout=300, check=True)
    result: dict[str, Any] = torch.load(out)
    return result


def test_loss_and_gradient_do_not_depend_on_how_the_step_is_cut(world: World, tmp_path: Path) -> None:
    """1 x 8 rows = 4 x 2 = 2 processes x 2 x 2 under DDP and FSDP2 = 4 processes x 1 x 2 under HSDP, to rounding."""
    whole = one_step(world, tmp_path / "whole", 8, 1)
    fsdp = {"run.devices": 2, "run.strategy": "fsdp"}
    cuts: dict[str, dict[str, Any]] = {
        "accumulated": one_step(world, tmp_path / "accumulated", 2, 4),
        "ddp": one_step(world, tmp_path / "ddp", 2, 2, **{"run.devices": 2, "run.strategy": "ddp"}),
        "fsdp": one_step(world, tmp_path / "fsdp", 2, 2, **fsdp, **{"run.activation_checkpointing": True}),
        "hsdp": one_step(world, tmp_path / "hsdp", 2, 1, **fsdp | {"run.devices": 4, "run.shard_size": 2}),
    }
    assert [cut["world"] for cut in cuts.values()] == [1, 2, 2, 4]
    assert 1e-3 < whole["metrics"]["cka"] < 0.999
    for name, cut in cuts.items():
        assert set(cut["metrics"]) == set(whole["metrics"]) and set(cut["gradients"]) == set(whole["gradients"])
        for key, value in whole["metrics"].items():
            assert cut["metrics"][key] == pytest.approx(value, rel=1e-10), (name, key)
        for key, gradient in whole["gradients"].items():
            assert gradient.dtype == torch.float64 and gradient.any()
            assert torch.allclose(cut["gradients"][key], gradient, rtol=1e-9, atol=1e-12), (name, key)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_killed_processes_go_on_bit_for_bit(world: World, tmp_path: Path, strategy: str) -> None:
    two = {"run.devices": 2, "run.strategy": strategy}
    done = train(world, tmp_path / "whole", **two)
    assert done.returncode == 0, done.stderr
    killed = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "train_distill.py"), *flags(world, killed, **two)]
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, start_new_session=True)
    while process.poll() is None and len(rundir.checkpoints(killed)) < 2:
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.1))
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # Had it been quicker than the kill: an earlier checkpoint is gone on with all the same.
    shutil.rmtree(killed / "final", ignore_errors=True)
    done = train(world, killed, **two)
    assert done.returncode == 0, done.stderr
    expected, found = load_state(tmp_path / "whole" / "final"), load_state(killed / "final")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_another_number_of_processes_goes_on_where_steps_keep_their_size(world: World, tmp_path: Path) -> None:
    """Two processes with FSDP start, one goes on with twice the accumulation: equal to one all along, to rounding."""
    common = {"optim.steps": 4, "run.save_every": 2}
    assert train(world, tmp_path / "one", **common).returncode == 0
    moved = tmp_path / "moved"
    two = {"run.devices": 2, "run.strategy": "fsdp", "optim.accumulation": 1}
    done = train(world, moved, **common, **two)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in rundir.checkpoints(moved)] == ["step-000002"]
    shutil.rmtree(moved / "final")
    refused = train(world, moved, **common, **{"optim.accumulation": 1})
    assert refused.returncode == 2 and "was started with optim.accumulation" not in refused.stdout
    assert refused.stderr.count("\n") == 1 and "run.devices 2, now it is 1" in refused.stderr
    done = train(world, moved, **common)
    assert done.returncode == 0, done.stderr
    expected, found = load_state(tmp_path / "one" / "final"), load_state(moved / "final")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_positions_that_the_processes_cannot_share_are_refused() -> None:
    state = {"position": 3, "world_size": 2, "epoch": 1}
    assert moved_loader(state, 3) == {"position": 2, "world_size": 3, "epoch": 1}
    with pytest.raises(UserError, match="after 6 micro-batches"):
        moved_loader(state, 4)


@pytest.mark.parametrize(
    "launcher",
    [
        ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        (str(Path(sys.executable).with_name("fabric")), "run", "--accelerator=cpu", "--devices=2"),
    ],
    ids=["torchrun", "fabric run"],
)
def test_processes_of_a_launcher_are_found(world: World, tmp_path: Path, launcher: tuple[str, ...]) -> None:
    done = train(world, tmp_path / "run", sys.executable, *launcher, **{"optim.steps": 1})
    assert done.returncode == 0, done.stderr
    assert "devices: 2" in (tmp_path / "run" / "hyperparameters.yaml").read_text()


def test_sigterm_saves_and_the_same_command_goes_on(world: World, tmp_path: Path) -> None:
    """Only the first of two processes is told; both stop after the same step."""
    two = {"run.devices": 2, "run.strategy": "ddp", "optim.steps": 400, "run.save_every": 1000}
    out_dir = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train_distill.py"), *flags(world, out_dir, **two)]
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and (not (out_dir / "metrics.csv").is_file() or lines(out_dir) < 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 143, said
    (checkpoint,) = rundir.checkpoints(out_dir)
    assert f"stopped at step {int(checkpoint.name[5:])} of 400, saved" in said
    # The time limit does the same, after the first step of a run that goes on.
    done = train(world, out_dir, **two, **{"run.time_limit": "00:00:00"})
    assert done.returncode == 143, done.stderr
    assert rundir.checkpoints(out_dir)[-1].name == f"step-{int(checkpoint.name[5:]) + 1:06d}"


def lines(out_dir: Path) -> int:
    return (out_dir / "metrics.csv").read_text().count("\n")
