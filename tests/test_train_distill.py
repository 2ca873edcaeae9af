"""The command itself: a whole run, a killed run, several processes, and the user's mistakes."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import litgpt.distill
import train_distill
from litgpt import rundir
from litgpt.balance import balance_loss
from litgpt.chat import render
from litgpt.checkpoint import load_model, load_state, read_provenance, save_lit_dir
from litgpt.config import Config
from litgpt.data import PackedLoader, read_records
from litgpt.finish import compare_frozen
from litgpt.generate import generate
from litgpt.guards import SpikeWatch
from litgpt.recipe import DataSettings, LossSettings, OptimSettings, RunSettings, Settings, lr_at, seconds_of
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, run_cli
from tests.world import World, make_world
from train_distill import Trainer

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def flags(world: World, out_dir: Path, **changes: Any) -> list[str]:
    settings = {
        "student": world.student,
        "teacher": world.teacher,
        "out_dir": out_dir,
        "data.train": world.train,
        "data.val": world.val,
        "data.max_seq_length": 320,
        "data.micro_batch_size": 1,
        "loss.cka_every": 1,
        "loss.z_weight": 0.001,
        "loss.bias_rate": 0.01,
        "loss.router_weight_end": 0.001,
        "optim.steps": STEPS,
        "optim.accumulation": 2,
        "optim.lr": 0.01,
        "run.accelerator": "cpu",
        "run.log_every": 1,
        "run.val_every": 3,
        "run.save_every": 1,
        "run.samples": 1,
    }
    return [f"--{name}={value}" for name, value in (settings | changes).items() if value is not None]


def command(world: World, out_dir: Path, **changes: Any) -> list[str]:
    return [sys.executable, str(ROOT / "train_distill.py"), *flags(world, out_dir, **changes)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def trained(out_dir: Path) -> dict[str, Tensor]:
    return load_state(out_dir / "final")


def lines(out_dir: Path) -> list[dict[str, str]]:
    with (out_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        timed = ("tokens_per_second", "eta_seconds")
        return [{k: v for k, v in line.items() if k not in timed} for line in csv.DictReader(file)]


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, in a process of its own: the one that a killed run must equal."""
    out_dir = tmp_path_factory.mktemp("run") / "whole"
    subprocess.run(command(world, out_dir), env=environment(), check=True, timeout=300)
    return out_dir


def test_a_run_leaves_everything_the_next_rooms_need(world: World, finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        *("hyperparameters.yaml", "metrics.csv", "samples.jsonl", "tensorboard", "report", "final"),
        *("routing.jsonl", "routing-first.pt"),
        *(f"step-{step:06d}" for step in (STEPS - 2, STEPS - 1)),
    }
    report = json.loads((finished / "report" / "metrics.json").read_text(encoding="utf-8"))
    assert report["before"]["step"] == 0 and report["after"]["step"] == STEPS
    assert report["after"]["answer_ce"] < report["before"]["answer_ce"]
    assert all(value == pytest.approx(1, abs=1e-6) for value in report["before"]["cka"].values())
    assert set(report["after"]["expert_load"]) == {"0", "1"}
    seen = [json.loads(line) for line in (finished / "routing.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in seen] == [0, 3, STEPS]
    assert all(layer["changed"] == 0 and "grad_norm" not in layer for layer in seen[0]["layers"])
    assert all(layer["grad_norm"] > 0 and 0 <= layer["changed"] <= 1 for layer in seen[-1]["layers"])
    assert seen[-1]["layers"][1]["z"] == report["after"]["router"]["1"]["z"]
    steps = [int(line["step"]) for line in lines(finished)]
    assert steps == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    settings = yaml.safe_load((finished / "hyperparameters.yaml").read_text(encoding="utf-8"))
    assert settings["base"] == str(world.base)
    assert settings["run"]["precision"] == "32-true"
    distilled = read_provenance(finished / "final")["distilled"]
    assert distilled["settings"] == settings | {"resume": "auto", "overwrite": False}
    assert len(distilled["train_sha256"]) == 64
    assert Tokenizer(finished / "final").thought_ids == Tokenizer(world.student).thought_ids


def test_everything_but_routers_experts_and_thought_rows_is_bit_identical(world: World, finished: Path) -> None:
    before, after = load_state(world.student), trained(finished)
    rows = list(Tokenizer(world.student).thought_ids or ())
    assert set(before) == set(after)
    for name, tensor in before.items():
        if ".mlp." in name:
            assert not torch.equal(tensor, after[name])
        elif name in ("transformer.wte.weight", "lm_head.weight"):
            differing = (tensor != after[name]).any(1).nonzero().flatten().tolist()
            assert differing == rows
        else:
            assert torch.equal(tensor, after[name])
    report = json.loads((finished / "report" / "metrics.json").read_text(encoding="utf-8"))
    assert report["frozen"] == {"compared": report["frozen"]["identical"], "identical": 15, "changed": []}


@pytest.mark.slow
def test_a_killed_run_goes_on_to_bit_identical_weights(world: World, finished: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "killed"
    moment = random.Random(os.getpid())
    kills = 0
    deadline = time.monotonic() + 240
    while not (out_dir / "final").exists():
        assert time.monotonic() < deadline
        known = len(rundir.checkpoints(out_dir)) and rundir.checkpoints(out_dir)[-1].name
        process = subprocess.Popen(command(world, out_dir), env=environment())
        if kills < 2:
            # Once a new checkpoint is there it is amid steps, validations and saves of a few milliseconds each.
            while process.poll() is None and (
                not rundir.checkpoints(out_dir) or rundir.checkpoints(out_dir)[-1].name == known
            ):
                time.sleep(0.005)
            time.sleep(moment.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait(timeout=200)
        if kills == 2 and not (out_dir / "final").exists():
            # What a kill amid a save leaves behind must not disturb the next start.
            (out_dir / ".step-000099.1.tmp").mkdir(exist_ok=True)
    assert kills >= 1
    expected, found = trained(finished), trained(out_dir)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert lines(out_dir) == lines(finished)
    assert not list(out_dir.glob(".*.tmp"))


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_accumulation(world: World, tmp_path: Path) -> None:
    common = {"loss.cka_weight": 0.0, "optim.steps": 2, "run.save_every": 100}
    one, two = tmp_path / "one", tmp_path / "two"
    for out_dir, changes in ((one, {}), (two, {"run.devices": 2, "run.strategy": "ddp", "optim.accumulation": 1})):
        subprocess.run(command(world, out_dir, **common, **changes), env=environment(), check=True, timeout=300)
    first, second = lines(one), lines(two)
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for line, other in zip(first, second, strict=True):
        for name, value in line.items():
            if value and name != "cka":
                assert float(value) == pytest.approx(float(other[name]), rel=1e-4), (line["step"], name)
    for name, tensor in trained(one).items():
        torch.testing.assert_close(trained(two)[name], tensor, rtol=1e-3, atol=1e-4)


def make_trainer(world: World, out_dir: Path, **changes: Any) -> Trainer:
    settings = Settings(
        student=world.student,
        teacher=world.teacher,
        base=world.base,
        out_dir=out_dir,
        data=DataSettings(world.train, val=world.val, max_seq_length=320, micro_batch_size=1),
        loss=LossSettings(),
        optim=OptimSettings(steps=2, accumulation=2),
        run=RunSettings(accelerator="cpu", samples=0),
        resume="auto",
        overwrite=False,
        seed=1,
    )
    for name, value in changes.items():
        group, _, field = name.partition("__")
        target = getattr(settings, group) if field else settings
        setattr(target, field or group, value)
    return Trainer(settings)


def first_step(world: World, out_dir: Path, **settings: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradients of one step, which is not taken."""
    trainer = make_trainer(world, out_dir, optim__clip=1e9, loss__cka_weight=0.0, **settings)
    gradients: dict[str, Tensor] = {}

    def keep() -> None:
        named = trainer.distiller.named_parameters()
        gradients.update({name: p.grad.clone() for name, p in named if p.grad is not None})

    trainer.optimizer.step = keep  # type: ignore[method-assign, assignment]
    return trainer._train_step(trainer.loader.forever()), gradients


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("split", [(2, 2), (1, 4)])
def test_a_step_does_not_depend_on_how_its_rows_are_cut(
    world: World, tmp_path: Path, split: tuple[int, int], precision: str
) -> None:
    size, accumulation = split
    metrics, gradients = first_step(
        world, tmp_path / "cut", data__micro_batch_size=size, optim__accumulation=accumulation, run__precision=precision
    )
    whole, of_whole = first_step(
        world, tmp_path / "whole", data__micro_batch_size=4, optim__accumulation=1, run__precision=precision
    )
    # The load is counted, not computed: what autocast rounds may not reach it.
    exact = ("balance", "expert_max_over_mean") if precision == "bf16-mixed" else ()
    for name in ("loss", "ce", "kd", "balance", "grad_norm", "tokens", "expert_max_over_mean"):
        tolerance = 1e-4 if precision == "32-true" or name in exact else 1e-2
        assert metrics[name] == pytest.approx(whole[name], rel=tolerance), name
    assert set(gradients) == set(of_whole)
    if precision == "32-true":
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, of_whole[name], rtol=1e-3, atol=1e-5)


def test_the_step_s_load_reaches_the_loss_in_float64(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fabric's mixed precision rounds tensor arguments to bf16: 8 bits for counts of thousands of tokens."""
    seen: list[torch.dtype] = []

    def look(*arguments: Any, load_LE: Tensor, **others: Any) -> Tensor:
        seen.append(load_LE.dtype)
        return balance_loss(*arguments, load_LE=load_LE, **others)

    monkeypatch.setattr(litgpt.distill, "balance_loss", look)
    first_step(world, tmp_path, data__micro_batch_size=2, optim__accumulation=2, run__precision="bf16-mixed")
    assert seen == [torch.float64] * 2


def test_bf16_autocast_trains_and_keeps_fp32_weights(world: World, tmp_path: Path) -> None:
    trainer = make_trainer(world, tmp_path, run__precision="bf16-mixed")
    before = trainer._validate()
    metrics = trainer._train_step(trainer.loader.forever())
    assert metrics["loss"] == pytest.approx(
        0.5 * metrics["ce"] + 0.5 * metrics["kd"] + 0.01 * metrics["balance"], rel=1e-3
    )
    assert before["cka"]["1"] == pytest.approx(1, abs=1e-4)
    assert all(p.dtype == torch.float32 for p in trainer.distiller.parameters())


def test_weight_decay_is_for_matrices_alone(world: World, tmp_path: Path) -> None:
    trainer = make_trainer(world, tmp_path)
    decayed, kept = trainer.optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
    assert [p.shape for p in kept["params"]] == [(2, 32)]
    assert sum(p.numel() for p in decayed["params"]) == 2 * (4 * 32 + 4 * 3 * 64 * 32)


def test_without_kd_no_teacher_is_needed(world: World, tmp_path: Path) -> None:
    trainer = make_trainer(world, tmp_path, teacher=tmp_path / "nowhere", loss__kd_weight=0.0)
    assert trainer._validate()["kd_kl"] is None
    assert trainer._train_step(trainer.loader.forever())["kd"] == 0


def fails(capsys: pytest.CaptureFixture[str], args: list[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        run_cli(train_distill.distill, args=args)
    assert exit_.value.code == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1 and complaint.startswith("error: ")
    return complaint


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"student": "nowhere"}, "nowhere does not exist; run first: python scripts/upcycle_moe.py"),
        ({"teacher": "nowhere"}, "nowhere does not exist"),
        ({"base": "nowhere"}, "nowhere does not exist"),
        ({"data.train": "nowhere.jsonl"}, "no file nowhere.jsonl"),
        ({"data.max_seq_length": 4096}, "data.max_seq_length is 4096, and the student reads at most 512 tokens"),
        ({"data.max_seq_length": 12}, "fits into 12 tokens"),
        ({"optim.accumulation": 0}, "optim: accumulation, steps and epochs must be positive"),
        ({"run.devices": 0}, "run: devices"),
        ({"resume": "nowhere"}, "nowhere holds no state.pth: --resume takes auto, none or a step-NNNNNN directory"),
        ({"loss.teacher_view": "whole"}, "loss.teacher_view"),
        ({"loss.unknown": 1}, "loss.unknown"),
        ({"run.offload": True}, "run: offload and shard_size go with run.strategy fsdp"),
        ({"run.time_limit": "soon"}, "run.time_limit is 'soon'"),
        ({"run.compile": True}, "run.compile is for GPUs"),
        ({"run.frozen_dtype": "bfloat16"}, "run.frozen_dtype bfloat16 goes with run.precision bf16-mixed"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], complaint: str
) -> None:
    out_dir = tmp_path / "out"
    assert complaint in fails(capsys, flags(world, out_dir, **change))
    assert not out_dir.exists()


def test_a_dense_student_and_a_foreign_vocabulary_are_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_dir = tmp_path / "out"
    assert "is dense" in fails(capsys, flags(world, out_dir, student=world.base, base=world.base))
    other = shutil.copytree(world.teacher, tmp_path / "other")
    pipeline = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = pipeline["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(pipeline), encoding="utf-8")
    assert "the vocabularies differ: id 0" in fails(capsys, flags(world, out_dir, teacher=other))
    assert not out_dir.exists()


def test_a_record_without_an_answer_is_named_by_file_and_line(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "val.jsonl"
    path.write_text(
        world.val.read_text(encoding="utf-8") + '{"id": "x", "messages": [{"role": "user", "content": "a"}]}\n',
        encoding="utf-8",
    )
    complaint = fails(capsys, flags(world, tmp_path / "out", **{"data.val": path}))
    assert f"{path}:5: no assistant turn" in complaint


def test_a_finished_run_is_not_overwritten_unless_told(
    world: World, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_dir = shutil.copytree(finished, tmp_path / "run")
    (out_dir / "notes.txt").write_text("mine", encoding="utf-8")
    complaint = fails(capsys, flags(world, out_dir))
    assert "holds a finished run" in complaint and "--overwrite true" in complaint
    run_cli(train_distill.distill, args=flags(world, out_dir, overwrite=True, **{"optim.steps": 2}))
    assert [path.name for path in rundir.checkpoints(out_dir)] == ["step-000001"]
    assert (out_dir / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert [int(line["step"]) for line in lines(out_dir)] == [0, 1, 2, 2]


def test_an_unfinished_run_is_neither_mixed_nor_continued_with_other_settings(
    world: World, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_dir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(out_dir / "final")
    assert "holds an unfinished run at step-000005" in fails(capsys, flags(world, out_dir, resume="none"))
    complaint = fails(capsys, flags(world, out_dir, **{"optim.lr": 0.02}))
    assert "was started with optim.lr 0.01, now it is 0.02" in complaint
    elsewhere = tmp_path / "elsewhere"
    earlier = out_dir / f"step-{STEPS - 2:06d}"
    run_cli(train_distill.distill, args=flags(world, elsewhere, resume=earlier, **{"run.val_every": 100}))
    expected, found = trained(finished), trained(elsewhere)
    assert all(torch.allclose(tensor, found[name], atol=1e-6) for name, tensor in expected.items())


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_records(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steep = {"optim.lr": 1e30, "optim.warmup": 0.0, "run.val_every": 100}
    complaint = fails(capsys, flags(world, tmp_path / "out", **steep))
    assert "step 2: the loss is no longer finite" in complaint
    assert "train-" in complaint
    assert [path.name for path in rundir.checkpoints(tmp_path / "out")] == ["step-000001"]


def poison(trainer: Trainer, steps: Sequence[int]) -> None:
    """Make the loss NaN in the first micro-batch of these steps (from 0)."""
    forward, calls = trainer.distiller.forward, itertools.count()

    def poisoned(micro: Any, totals: Any, cka_weight: float, router_weight: float | None = None) -> Any:
        step, number = divmod(next(calls), trainer.settings.optim.accumulation)
        loss, terms = forward(micro, totals, cka_weight, router_weight)
        return (loss * math.nan if step in steps and number == 0 else loss), terms

    trainer.distiller.forward = poisoned  # type: ignore[method-assign]


def test_steps_that_are_not_finite_are_left_out_if_told_so(world: World, tmp_path: Path) -> None:
    trainer = make_trainer(world, tmp_path, run__on_nonfinite="skip", run__max_skips=2)
    poison(trainer, [1, 3, 4, 5])
    batches = trainer.loader.forever()
    trainer._prepare_directory()
    trainer._train_step(batches)
    before = [p.detach().clone() for p in trainer.distiller.parameters()]
    trainer.step = 1
    first_of_step = trainer.loader.position
    assert trainer._train_step(batches)["skipped"] == 1
    assert all(torch.equal(p, q) for p, q in zip(trainer.distiller.parameters(), before, strict=True))
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    row = trainer.loader._batch(first_of_step).records
    assert event == {
        "step": 2,
        "event": "nonfinite",
        "where": "loss",
        "records": [trainer.loader.records[i].id for of_row in row for i in of_row],
    }
    trainer.step = 2
    assert "skipped" not in trainer._train_step(batches)
    assert not all(torch.equal(p, q) for p, q in zip(trainer.distiller.parameters(), before, strict=True))
    for trainer.step in (3, 4):
        trainer._train_step(batches)
    trainer.step = 5
    with pytest.raises(UserError, match="step 6: the loss is no longer finite, 3 times in a row"):
        trainer._train_step(batches)


def test_gradient_norms_by_group_make_up_the_whole_and_are_clipped(world: World, tmp_path: Path) -> None:
    trainer = make_trainer(world, tmp_path, optim__clip=1e-3)
    clipped: list[Tensor] = []
    trainer.optimizer.step = lambda: clipped.extend(  # type: ignore[method-assign, assignment]
        p.grad.clone() for p in trainer.distiller.parameters() if p.grad is not None
    )
    metrics = trainer._train_step(trainer.loader.forever())
    groups = [metrics[f"grad_norm_{name}"] for name in ("experts", "routers", "thought_rows")]
    assert min(groups) > 0 and metrics["grad_norm"] == pytest.approx(math.hypot(*groups))
    assert float(torch.cat([g.flatten() for g in clipped]).norm()) == pytest.approx(1e-3, rel=1e-4)


def test_a_spike_is_told_from_a_loss_that_wanders() -> None:
    watch = SpikeWatch(10.0)
    assert [watch.see(2 + 0.01 * (i % 5)) for i in range(40)] == [None] * 40
    threshold = watch.see(2.5)
    assert threshold is not None and 2.0 < threshold < 2.5
    other = SpikeWatch(10.0)
    other.load_state_dict(watch.state_dict())
    assert other.threshold() == watch.threshold()


def test_a_spike_is_noted_with_its_records(world: World, tmp_path: Path) -> None:
    trainer = make_trainer(world, tmp_path)
    trainer._prepare_directory()
    trainer.spikes.recent.extend([0.1, 0.11] * 10)
    metrics = trainer._train_step(trainer.loader.forever())
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert event["event"] == "spike" and event["loss"] == metrics["loss"] > event["threshold"]
    assert event["records"] and set(event["records"]) <= {record.id for record in trainer.loader.records}


def test_no_checkpoint_is_begun_without_room_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rundir.save_checkpoint(tmp_path, 1, {"step": 1})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=17 << 20))
    rundir.save_checkpoint(tmp_path, 2, {"x": torch.zeros(1 << 10)})
    with pytest.raises(UserError, match=r"needs 0.02 GB of disk and 0.02 GB are free"):
        rundir.save_checkpoint(tmp_path, 3, {"x": torch.zeros(1 << 19), "same": 0})
    assert [path.name for path in rundir.checkpoints(tmp_path)] == ["step-000001", "step-000002"]


def test_other_files_under_the_same_names_are_refused(
    world: World, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_dir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(out_dir / "final")
    kept = world.val.read_text(encoding="utf-8")
    world.val.write_text(kept.replace("val-1", "val-9"), encoding="utf-8")
    try:
        assert "was started with other contents of data.val" in fails(capsys, flags(world, out_dir))
    finally:
        world.val.write_text(kept, encoding="utf-8")


def in_bf16(world: World, directory: Path) -> World:
    """The same world with base and student stored in bf16."""
    base, teacher, student = (
        shutil.copytree(path, directory / path.name) for path in (world.base, world.teacher, world.student)
    )
    for path in (base, student):
        state = {name: tensor.bfloat16() for name, tensor in load_state(path).items()}
        save_lit_dir(path, state, Config.from_checkpoint(path), source_dir=path, provenance=read_provenance(path))
    return World(base, teacher, student, world.train, world.val)


def test_what_is_validated_last_is_what_is_stored(world: World, tmp_path: Path) -> None:
    """A student stored in bf16: the report's `after` is that of final/, loaded anew."""
    half = in_bf16(world, tmp_path)
    trainer = make_trainer(half, tmp_path / "run", optim__lr=0.05, run__frozen_dtype="float32")
    trainer.run()
    report = json.loads((tmp_path / "run" / "report" / "metrics.json").read_text(encoding="utf-8"))
    assert report["frozen"]["changed"] == []
    stored = load_state(tmp_path / "run" / "final")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    again = make_trainer(replace(half, student=tmp_path / "run" / "final"), tmp_path / "again")
    assert again._validate()["answer_ce"] == pytest.approx(report["after"]["answer_ce"], rel=1e-6)


def test_frozen_weights_in_bf16_change_no_result(world: World, tmp_path: Path) -> None:
    half = in_bf16(world, tmp_path)
    found = []
    for dtype in ("float32", "bfloat16"):
        trainer = make_trainer(half, tmp_path / dtype, run__precision="bf16-mixed", run__frozen_dtype=dtype)
        metrics = trainer._train_step(trainer.loader.forever())
        found.append((metrics, [p.detach() for p in trainer.distiller.parameters() if p.requires_grad]))
    (metrics, trained), (of_half, half_trained) = found
    assert metrics == of_half
    assert all(torch.equal(p, q) for p, q in zip(trained, half_trained, strict=True))
    assert trainer.distiller.student.transformer.wte.weight.dtype == torch.bfloat16
    assert trainer.distiller.student.lm_head.weight is trainer.distiller.student.transformer.wte.weight
    with pytest.raises(UserError, match=r"has more digits than torch.bfloat16 holds"):
        make_trainer(world, tmp_path / "no", run__precision="bf16-mixed", run__frozen_dtype="bfloat16")


def test_samples_are_the_student_s_greedy_answers(world: World, finished: Path) -> None:
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(sample["step"], sample["id"]) for sample in samples] == [(step, "val-0") for step in (0, 3, STEPS)]
    tokenizer, record = Tokenizer(world.student), read_records(world.val)[0]
    prompt = render(
        record.messages[:-1], tokenizer, add_generation_prompt=True, thinking="thought" in record.messages[-1]
    )
    end = tokenizer.token_to_id("<|im_end|>")
    assert end is not None
    ids = list(generate(load_model(finished / "final"), prompt.ids, max_new_tokens=256, stop_ids=[end]))
    assert samples[-1]["reply"] == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("limit", "seconds"), [("03:55:00", 14100), ("0:30", 30), (90, 90), ("90", 90), (None, math.inf)]
)
def test_time_limits(limit: str | int | None, seconds: float) -> None:
    assert seconds_of(limit) == seconds


def test_wandb_that_is_missing_is_one_line(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "run.wandb needs the package wandb" in fails(capsys, flags(world, tmp_path / "out", **{"run.wandb": True}))


def test_eight_bit_averages(world: World, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    trainer = make_trainer(world, tmp_path, optim__optimizer="adamw8bit")
    state = trainer.optimizer.state
    assert type(trainer.optimizer).__module__.startswith("torchao") and not state
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]


def test_a_save_that_fails_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    """The kernel refuses the write half-way, as it does on a full disk."""
    rundir.save_checkpoint(tmp_path, 1, {"step": 1})
    code = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from litgpt import rundir\n"
        "from litgpt.utils import run_cli\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "def save():\n"
        "    rundir.save_checkpoint(Path(sys.argv[1]), 2, {'step': 2, 'model': torch.zeros(1 << 20)})\n"
        "run_cli(save, args=[])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: no room left on the disk while writing") and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert rundir.load_checkpoint(rundir.checkpoints(tmp_path)[-1]) == {"step": 1}


def test_a_run_does_not_read_from_what_it_replaces(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_dir = tmp_path / "out"
    kept = out_dir / "final" / "kept"
    shutil.copytree(world.student, out_dir / "final")
    kept.write_text("kept")
    complaint = fails(capsys, flags(world, out_dir, student=out_dir / "final", base=world.base, overwrite="true"))
    assert "lies in --out_dir" in complaint
    complaint = fails(capsys, flags(world, out_dir, overwrite="true", resume=out_dir / "step-000002"))
    assert "give one of them" in complaint
    assert kept.read_text() == "kept"


def test_going_back_needs_the_newer_checkpoints_out_of_the_way(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        (tmp_path / f"step-{step:06d}").mkdir()
        (tmp_path / f"step-{step:06d}" / rundir.STATE_FILE).write_bytes(b"")
    with pytest.raises(UserError, match=r"newer than .*step-000002 \(step-000004, step-000006\)"):
        rundir.start_point(tmp_path, str(tmp_path / "step-000002"), overwrite=False)
    newest = tmp_path / "step-000006"
    assert rundir.start_point(tmp_path, str(newest), overwrite=False) == newest
    assert rundir.start_point(tmp_path / "other", str(tmp_path / "step-000002"), overwrite=False)


def test_dialogues_left_out_are_said(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(world, tmp_path)
    lengths = sorted(len(document.ids_T) for document in trainer.loader.documents)
    trainer.settings.data.max_seq_length = lengths[len(lengths) // 2]
    Trainer(replace(trainer.settings, out_dir=tmp_path / "short"))
    said = capsys.readouterr().err
    assert re.search(r"\d+ of \d+ training dialogues have more than \d+ tokens", said)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.micro_batch_size": 0}, "micro_batch_size of at least 1"),
        ({"optim.betas": "[0.9,1.0]"}, "betas"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_numbers_that_make_no_sense(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert message in fails(capsys, flags(world, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_an_out_dir_that_is_a_file(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("mine")
    fails(capsys, flags(world, tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


def test_logs_go_on_from_the_checkpoint_without_cut_lines(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("loss,step\n1.5,1\n1.4,2\n1.3,1")
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "reply": "a"}\n{"step": 2}\n{"step": 1')
    rundir.keep_logs_up_to(tmp_path, 1)
    assert (tmp_path / "metrics.csv").read_text() == "loss,step\n1.5,1\n"
    assert (tmp_path / "samples.jsonl").read_text() == '{"step": 1, "reply": "a"}\n'
    metrics = rundir.MetricsFile(tmp_path / "metrics.csv")
    metrics.append(2, {"loss": 1.25})
    metrics.append(2, {"val/cka_1": 0.5})
    assert (tmp_path / "metrics.csv").read_text() == "loss,step,val/cka_1\n1.5,1,\n1.25,2,\n,2,0.5\n"


def test_the_newest_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 1_000_000, 999_999):
        rundir.save_checkpoint(tmp_path, step, {"step": step})
    assert [path.name for path in rundir.checkpoints(tmp_path)] == ["step-999999", "step-1000000"]


def test_random_states_come_back(tmp_path: Path) -> None:
    rundir.save_checkpoint(tmp_path, 1, {"rng": rundir.rng_state()})
    import numpy as np

    drawn = (random.random(), np.random.rand(), torch.rand(3))
    rundir.set_rng_state(rundir.load_checkpoint(tmp_path / "step-000001")["rng"])
    again = (random.random(), np.random.rand(), torch.rand(3))
    assert drawn[:2] == again[:2] and torch.equal(drawn[2], again[2])


def test_learning_rate_rises_linearly_and_falls_to_its_minimum() -> None:
    optim = OptimSettings(lr=1.0, min_lr=0.1, warmup=0.1)
    rates = [lr_at(step, 100, optim) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert lr_at(0, 1, OptimSettings(lr=1.0, min_lr=0.1, warmup=0.0)) == 1.0


def test_a_changed_frozen_tensor_is_found() -> None:
    source = {"transformer.wte.weight": torch.zeros(4, 2), "a.attn.proj.weight": torch.zeros(2, 2)}
    state = {name: tensor.clone() for name, tensor in source.items()}
    state["transformer.wte.weight"][3] = 1
    assert compare_frozen(state, source, [3])["changed"] == []
    assert compare_frozen(state, source, [2])["changed"] == ["transformer.wte.weight"]
    state["a.attn.proj.weight"][0, 0] = -0.0
    assert compare_frozen(state, source, [3])["changed"] == ["a.attn.proj.weight"]


def test_a_base_that_nothing_names_must_be_given(world: World, tmp_path: Path) -> None:
    student = shutil.copytree(world.student, tmp_path / "student")
    with pytest.raises(UserError, match="Tiny is not there, the dense model that"):
        train_distill.base_of(student)
    (student / "provenance.yaml").write_text("tie_embeddings: true\n", encoding="utf-8")
    with pytest.raises(UserError, match="give it with --base"):
        train_distill.base_of(student)


@pytest.mark.parametrize("config", sorted((ROOT / "configs").rglob("distill.yaml")), ids=str)
def test_the_shipped_configs_are_accepted(config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    complaint = fails(capsys, ["--config", str(config), "--student", str(tmp_path / "nowhere")])
    assert "nowhere does not exist" in complaint


def test_two_epochs_of_a_loader_make_the_steps(world: World, tmp_path: Path) -> None:
    trainer = make_trainer(world, tmp_path, optim__steps=None, optim__epochs=2.0)
    assert isinstance(trainer.loader, PackedLoader)
    assert trainer.steps == len(trainer.loader)


@pytest.mark.parametrize(
    "loss",
    [{"anchor": "root_cka"}, {"anchor": "mse"}, {"anchor_to": "teacher"}, {"cka_rows": 16, "cka_layers": [0]}],
    ids=["root", "mse", "teacher", "few rows"],
)
def test_every_anchor_trains(world: World, tmp_path: Path, loss: dict[str, Any]) -> None:
    settings = {f"loss__{key}": value for key, value in loss.items()}
    trainer = make_trainer(world, tmp_path / "out", loss__cka_weight=1.0, loss__cka_weight_end=1.0, **settings)
    trainer.run()
    with open(tmp_path / "out" / "metrics.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    name = "anchor" if "anchor" in loss else "cka"
    values = [float(row[name]) for row in rows]
    assert all(math.isfinite(value) for value in values)
    if loss == {"anchor_to": "teacher"}:
        assert all(value < 0.9 for value in values)  # another network from the start
    else:
        assert values[0] == pytest.approx(0.0 if name == "anchor" else 1.0, abs=1e-3)


def test_a_cache_is_no_anchor(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a teacher that runs"):
        make_trainer(world, tmp_path / "out", loss__anchor_to="teacher", loss__kd_weight=0.0).run()
