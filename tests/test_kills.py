"""SIGKILL at random moments of saving, loading and logging: whatever was said to be saved is there, whole.

`KILLS=200 pytest tests/test_kills.py` kills as often as the project claims; the suite does it fewer times. Each kill
hits a forked process that goes on from the newest checkpoint and saves one after another, some milliseconds each.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from litgpt import rundir
from litgpt.utils import UserError

KILLS = int(os.environ.get("KILLS", "25"))
SIZE = 1 << 14


def tensors(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"a": torch.randn(SIZE, generator=generator), "b": torch.randn(SIZE, generator=generator)}


def train_until_killed(out_dir: Path, said: int) -> None:
    """What a run does with its directory; `said` gets a byte once the directory is ready, and for each step saved."""
    start, state = rundir.load_start(out_dir, "auto", overwrite=False)
    step = 0 if state is None else int(state["step"])
    rundir.clear(out_dir, everything=False)
    rundir.set_aside_newer(out_dir, start)
    rundir.keep_logs_up_to(out_dir, step)
    metrics = rundir.MetricsFile(out_dir / rundir.METRICS_FILE)
    os.write(said, b"r")
    while True:
        step += 1
        metrics.append(step, {"loss": 1 / step})
        if step % 3 == 0:
            metrics.append(step, {f"val/{step // 30}": 0.5})  # now and then a column more, which rewrites the file
        rundir.append_jsonl(out_dir / rundir.SAMPLES_FILE, {"step": step})
        rundir.save_checkpoint(out_dir, step, {"step": step, **tensors(step)})
        os.write(said, b"s")


def start(out_dir: Path) -> tuple[int, int]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            train_until_killed(out_dir, writing)
        finally:
            os._exit(1)
    os.close(writing)
    return child, reading


def test_kills_lose_nothing(tmp_path: Path) -> None:
    moments = random.Random(os.getpid())
    acknowledged, most_directories = 0, 0
    kills_while_saving = 0
    for _ in range(KILLS):
        before = acknowledged
        child, reading = start(tmp_path)
        if moments.random() < 0.8:  # else also amid loading and clearing up
            assert os.read(reading, 1) == b"r"
        time.sleep(moments.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child failed by itself"
        with os.fdopen(reading, "rb") as pipe:
            acknowledged = before + pipe.read().count(b"s")
        kills_while_saving += bool(list(tmp_path.glob(".step-*.tmp")))

        found, state = rundir.load_start(tmp_path, "auto", overwrite=False)
        newest = 0 if state is None else state["step"]
        # The kill may come between the rename and the word that it is done.
        assert newest in (acknowledged, acknowledged + 1)
        acknowledged = newest
        if state is not None:
            assert found == rundir.checkpoints(tmp_path)[-1]
            for name, tensor in tensors(newest).items():
                assert torch.equal(state[name], tensor)
        for checkpoint in rundir.checkpoints(tmp_path):
            assert rundir.load_checkpoint(checkpoint)["step"] == int(checkpoint.name[5:])
        most_directories = max(most_directories, len(rundir.checkpoints(tmp_path)))
        check_logs(tmp_path, newest)
    assert acknowledged > KILLS / 2, "too few steps between the kills to prove anything"
    assert most_directories <= rundir.KEPT_CHECKPOINTS + 1
    print(f"{KILLS} kills, {kills_while_saving} of them inside a save, {acknowledged} checkpoints written")


def check_logs(out_dir: Path, newest: int) -> None:
    """Every step up to the newest checkpoint has its lines, once."""
    copy = {}
    for name in (rundir.METRICS_FILE, rundir.SAMPLES_FILE):
        if (out_dir / name).is_file():
            copy[name] = (out_dir / name).read_bytes()
    rundir.keep_logs_up_to(out_dir, newest)
    if newest:
        lines = (out_dir / rundir.METRICS_FILE).read_text().splitlines()
        step_column = lines[0].split(",").index("step")
        steps = [int(line.split(",")[step_column]) for line in lines[1:]]
        assert steps == sorted([*range(1, newest + 1), *range(3, newest + 1, 3)])
        samples = (out_dir / rundir.SAMPLES_FILE).read_text().splitlines()
        assert [json.loads(line)["step"] for line in samples] == list(range(1, newest + 1))
    for name, content in copy.items():  # the next child clears up itself
        (out_dir / name).write_bytes(content)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    for step in (1, 2):
        rundir.save_checkpoint(tmp_path, step, {"step": step, **tensors(step)})
    file = tmp_path / "step-000002" / rundir.STATE_FILE
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"cut": bytes(content[: len(content) // 2]), "flip": bytes(content), "empty": b""}
    file.write_bytes(damaged[damage])
    found, state = rundir.load_start(tmp_path, "auto", overwrite=False)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "step-000002 is damaged" in said
    assert found == tmp_path / "step-000001" and state is not None and state["step"] == 1
    with pytest.raises(UserError, match="step-000002 is damaged"):
        rundir.load_start(tmp_path, str(tmp_path / "step-000002"), overwrite=False)
    rundir.set_aside_newer(tmp_path, found)
    assert rundir.checkpoints(tmp_path) == [found] and (tmp_path / "damaged-step-000002").is_dir()
    (found / rundir.STATE_FILE).write_bytes(b"PK")
    with pytest.raises(UserError, match="no older one"):
        rundir.load_start(tmp_path, "auto", overwrite=False)


def test_any_flipped_byte_is_either_found_or_harmless(tmp_path: Path) -> None:
    path = rundir.save_checkpoint(tmp_path, 1, {"step": 1, "few": torch.arange(40)})
    file = path / rundir.STATE_FILE
    content = file.read_bytes()
    found = 0
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        file.write_bytes(damaged)
        try:
            state = rundir.load_checkpoint(path)
        except rundir.DamagedCheckpoint:
            found += 1
        else:
            assert state["step"] == 1 and torch.equal(state["few"], torch.arange(40))
    assert found > 20
