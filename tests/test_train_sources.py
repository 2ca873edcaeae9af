"""Training on a mixture with teachers of its own sources, and on a stream: exact losses, reports and resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from litgpt.checkpoint import load_state, read_provenance
from litgpt.data import Batch
from litgpt.distill import MicroBatch, Totals
from litgpt.mixture import SourceSettings
from litgpt.recipe import DataSettings, LossSettings, OptimSettings, RunSettings, Settings
from litgpt.rendered import RenderSettings
from litgpt.streaming import write_stream
from litgpt.utils import UserError, run_cli, sha256_file
from tests.world import World, make_world
from train_distill import Trainer, distill

ROOT = Path(__file__).resolve().parent.parent
NO_CACHE = RenderSettings(cache="none")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "general.jsonl"
    lines = [{"id": f"text-{i}", "text": "मिट्टी और मौसम। The soil. " * (1 + i % 4) + str(i)} for i in range(12)]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8")
    return path


def settings_of(world: World, out_dir: Path, data: DataSettings, **changes: Any) -> Settings:
    settings = Settings(
        student=world.student,
        teacher=world.teacher,
        base=world.base,
        out_dir=out_dir,
        data=data,
        loss=LossSettings(cka_every=1),
        optim=OptimSettings(steps=4, accumulation=2, lr=0.01),
        run=RunSettings(accelerator="cpu", samples=0, log_every=1, val_every=2, save_every=1),
        resume="auto",
        overwrite=False,
        seed=1,
    )
    return replace(settings, **changes)


def mixture(world: World, texts: Path, **changes: Any) -> DataSettings:
    """Advice with the run's teacher beside general text with the dense base as its teacher."""
    options: dict[str, Any] = {
        "sources": {"advice": SourceSettings(world.train, 3.0), "general": SourceSettings(texts, 1.0, world.base)},
        "val": world.val,
        "more_val": {"general": texts},
        "max_seq_length": 320,
        "micro_batch_size": 2,
        "render": NO_CACHE,
    }
    return DataSettings(**(options | changes))


def both(trainer: Trainer) -> Batch:
    """A micro-batch with rows of both sources."""
    trainer.loader.epoch = trainer.loader.position = 0
    return next(batch for batch in trainer.loader.forever() if set(batch.sources) == {0, 1})


def scored(trainer: Trainer, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sums of CE and KD, and gradients of a micro-batch."""
    micro = MicroBatch(batch, trainer.settings.loss, trainer.views, CPU)
    trainer._consult(micro, 0.0)
    trainer.distiller.zero_grad()
    _, terms = trainer.distiller.terms(micro, ce_scale=0.5, kd_scale=0.25)
    terms.loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.distiller.named_parameters() if p.grad is not None}
    return terms.ce, terms.kd, gradients


def only(batch: Batch, source: int) -> Batch:
    """The rows of one source; the others are empty, in their places."""
    chosen = [s == source for s in batch.sources]
    keep_B1 = torch.tensor(chosen)[:, None]
    return Batch(
        torch.where(keep_B1, batch.ids_BT, 0),
        torch.where(keep_B1, batch.spans_BT, 3).to(torch.uint8),
        torch.where(keep_B1, batch.documents_BT, -1).int(),
        [row if keep else [] for row, keep in zip(batch.records, chosen, strict=True)],
        [s if keep else -1 for s, keep in zip(batch.sources, chosen, strict=True)],
    )


def test_each_row_is_taught_by_the_teacher_of_its_source(world: World, texts: Path, tmp_path: Path) -> None:
    """Loss and gradient of a mixed micro-batch are the sum of its rows alone, each with its own teacher."""
    trainer = Trainer(settings_of(world, tmp_path / "out", mixture(world, texts)))
    batch = both(trainer)
    ce, kd, gradients = scored(trainer, batch)
    parts = [scored(trainer, only(batch, source)) for source in (0, 1)]
    torch.testing.assert_close(ce, parts[0][0] + parts[1][0])
    torch.testing.assert_close(kd, parts[0][1] + parts[1][1])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, parts[0][2][name] + parts[1][2][name], rtol=1e-4, atol=1e-6)
    # The student computes what the dense base computes, so its KL to the base is 0; to the other teacher it is not.
    assert parts[0][1] > 0.1 and abs(float(parts[1][1])) < 1e-3 * float(parts[0][1])
    # Taught by the run's teacher, the same rows differ.
    sources = {"advice": SourceSettings(world.train, 3.0), "general": SourceSettings(texts, 1.0)}
    one = Trainer(settings_of(world, tmp_path / "one", mixture(world, texts, sources=sources)))
    assert scored(one, only(batch, 1))[1] > 0.1


def test_every_answer_token_has_exactly_one_teacher(world: World, texts: Path, tmp_path: Path) -> None:
    trainer = Trainer(settings_of(world, tmp_path / "out", mixture(world, texts)))
    trainer.loader.epoch = trainer.loader.position = 0
    for batch in trainer.loader:
        sides = [view.batch(batch) for view in trainer.views]
        at_M = torch.cat([side.student_at_M for side in sides]).sort().values
        targets_BT, spans_BT = batch.next_tokens()
        answers = (spans_BT.flatten() == 2).nonzero().squeeze(1)
        assert torch.equal(at_M, answers)
        for side in sides:
            predicted = side.ids_BS.flatten()[side.teacher_at_M + 1]
            assert torch.equal(predicted, targets_BT.flatten()[side.student_at_M])


def test_a_mixture_is_trained_reported_and_resumed(world: World, texts: Path, tmp_path: Path) -> None:
    """kill -9 in the middle, the same command again, and the weights are those of the whole run."""
    command = [
        *(sys.executable, str(ROOT / "train_distill.py")),
        *(f"--student={world.student}", f"--teacher={world.teacher}", f"--base={world.base}"),
        f'--data.sources={{advice: {{path: "{world.train}", weight: 3}}, '
        f'general: {{path: "{texts}", teacher: "{world.base}"}}}}',
        *(f"--data.val={world.val}", f'--data.more_val={{general: "{texts}"}}'),
        *("--data.max_seq_length=320", "--data.micro_batch_size=1", "--data.packing=bucket", "--loss.cka_every=1"),
        *("--optim.steps=6", "--optim.accumulation=2", "--optim.lr=0.01", "--run.accelerator=cpu"),
        *("--run.log_every=1", "--run.val_every=3", "--run.save_every=1", "--run.samples=1"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, f"--out_dir={whole}"], env=environment, check=True, timeout=300)
    process = subprocess.Popen([*command, f"--out_dir={killed}"], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(killed.glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([*command, f"--out_dir={killed}"], env=environment, check=True, timeout=300)
    one, other = load_state(whole / "final"), load_state(killed / "final")
    assert all(torch.equal(one[name], other[name]) for name in one)
    report = json.loads((whole / "report" / "metrics.json").read_text(encoding="utf-8"))
    sources = report["training"]["sources"]
    assert sources["advice"]["share"] == 0.75 and sources["general"]["documents"] == 12
    tokens = {name: source["epochs"] * source["tokens"] for name, source in sources.items()}
    assert tokens["advice"] > tokens["general"] > 0
    general = [report[when]["more_val"]["general"] for when in ("before", "after")]
    assert general[0]["answer_ce"] > 0 and general[0]["answer_tokens"] == general[1]["answer_tokens"] > 0
    assert "val_general/answer_ce" in (whole / "metrics.csv").read_text(encoding="utf-8")
    distilled = read_provenance(whole / "final")["distilled"]
    assert {"sources.advice_sha256", "sources.general_sha256", "sources.general.teacher_sha256"} <= set(distilled)
    text, card = ((whole / name).read_text(encoding="utf-8") for name in ("report/README.md", "final/README.md"))
    assert f"| `general` | 12 | 0 | {sources['general']['tokens']:,} | 0.250 |" in text
    for shown in (text, card):
        own = shown.split("`general`:\n")[1].split("##")[0]
        assert f"{general[0]['answer_ce']:.4f} | {general[1]['answer_ce']:.4f}" in own
    assert f"training, 3.0 parts: `advice` | `{world.train}` | 12 | 0 | `{sha256_file(world.train)}`" in card
    assert f"held-out, further: `general` | `{texts}`" in card and sha256_file(texts) in card
    assert f"| teacher of the source `general` | `{world.base}`" in card
    assert f"for single sources of its data, from `{world.base}`" in card


def test_two_processes_that_share_two_teachers_equal_one(world: World, texts: Path, tmp_path: Path) -> None:
    """Sharded, both teachers must be asked by both processes, also where only one of them has rows for it."""
    command = [
        *(sys.executable, str(ROOT / "train_distill.py")),
        *(f"--student={world.student}", f"--teacher={world.teacher}", f"--base={world.base}"),
        f'--data.sources={{advice: {{path: "{world.train}", weight: 3}}, '
        f'general: {{path: "{texts}", teacher: "{world.base}"}}}}',
        *(f"--data.val={world.val}", "--data.max_seq_length=320", "--data.micro_batch_size=1", "--loss.cka_every=1"),
        *("--optim.steps=3", "--optim.lr=0.01", "--run.accelerator=cpu", "--run.samples=0", "--run.val_every=100"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ways = {"one": ["--optim.accumulation=2"], "two": ["--optim.accumulation=1", "--run.devices=2"]}
    ways["two"].append("--run.strategy=fsdp")
    for name, how in ways.items():
        subprocess.run([*command, f"--out_dir={tmp_path / name}", *how], env=environment, check=True, timeout=300)
    one, two = load_state(tmp_path / "one" / "final"), load_state(tmp_path / "two" / "final")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_stream_trains_as_its_records_do(world: World, tmp_path: Path) -> None:
    pytest.importorskip("litdata")
    write_stream(world.train, world.student, tmp_path / "stream")
    data = DataSettings(
        stream=tmp_path / "stream", val=world.val, max_seq_length=320, micro_batch_size=2, render=NO_CACHE
    )
    trainer = Trainer(settings_of(world, tmp_path / "out", data))
    batch = next(iter(trainer.loader))
    micro = MicroBatch(batch, trainer.settings.loss, trainer.views, CPU)
    records = [trainer.loader.records[i] for row in batch.records for i in row]
    assert micro.counts.kd == sum(
        int((trainer.loader.documents[i].spans_T == 2).sum()) for row in batch.records for i in row
    )
    assert len(records) > 2
    trainer.loader.epoch = trainer.loader.position = 0
    trainer.run()
    assert (tmp_path / "out" / "final" / "lit_model.pth").is_file()


def test_one_teacher_of_two_sources_is_read_once(world: World, texts: Path, tmp_path: Path) -> None:
    data = mixture(world, texts)
    assert data.sources is not None
    data.sources["advice"] = replace(data.sources["advice"], teacher=world.base)
    assert data.own_teachers() == {world.base: [0, 1]}
    trainer = Trainer(settings_of(world, tmp_path / "out", data))
    assert len(trainer.own_teachers) == 1
    micro = MicroBatch(both(trainer), trainer.settings.loss, trainer.views, CPU)
    trainer._consult(micro, 0.0)
    # Nothing is left for the run's own teacher, so it is not asked.
    assert micro.teachers[0] is None and micro.teachers[1] is not None
    assert Totals(**vars(micro.counts)).kd > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.train": "{train}"}, "train and sources are given"),
        ({"data.sources": "null", "data.train": "null", "data.epoch_of": "advice"}, "data.epoch_of names a source"),
        ({"data.epoch_of": "nothing"}, "epoch_of is 'nothing'"),
        ({"data.sources": '{{a: {{path: "nowhere.jsonl"}}}}'}, "no file nowhere.jsonl"),
        ({"data.sources": '{{a: {{path: "{train}", weight: 0}}}}'}, "weight 0"),
        ({"data.sources": '{{a: {{path: "{train}", teacher: "no/such"}}}}'}, "no/such"),
        ({"data.sources": "null", "data.stream": "{train}"}, "no stream.json"),
        ({"data.more_val": '{{x: "nowhere.jsonl"}}'}, "no file nowhere.jsonl"),
    ],
)
def test_mistakes_get_one_line(
    world: World,
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str],
    message: str,
) -> None:
    words = {
        "student": str(world.student),
        "teacher": str(world.teacher),
        "out_dir": str(tmp_path / "out"),
        "data.val": str(world.val),
        "data.max_seq_length": "320",
        "data.sources": f'{{advice: {{path: "{world.train}"}}, general: {{path: "{texts}"}}}}',
        "optim.steps": "1",
        "run.accelerator": "cpu",
    } | {name: text.format(train=world.train) for name, text in changes.items()}
    monkeypatch.setattr(sys, "argv", ["train_distill.py", *(f"--{name}={value}" for name, value in words.items())])
    with pytest.raises(SystemExit) as stopped:
        run_cli(distill)
    errors = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out").exists()


def test_settings_refuse_two_kinds_of_data() -> None:
    with pytest.raises(UserError, match="choose one"):
        DataSettings(train=Path("a"), stream=Path("b"))
    assert DataSettings().train == Path("data/dialogues/train.jsonl")
