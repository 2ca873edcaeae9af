"""On-policy micro-batches: the student's own words in the dialogue's form, scored by the teacher token by token."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from litgpt.chat import IM_END, Span, render
from litgpt.checkpoint import load_state
from litgpt.data import Batch, tags_of
from litgpt.distill import MicroBatch
from litgpt.recipe import DataSettings, LossSettings, OptimSettings, RunSettings, Settings
from litgpt.rendered import RenderSettings
from litgpt.teacher import TeacherBatch, TeacherView, View
from litgpt.utils import UserError
from tests.world import World, make_world
from train_distill import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def make_trainer(world: World, out_dir: Path, *, run: dict[str, Any] | None = None, **loss: Any) -> Trainer:
    return Trainer(
        Settings(
            student=world.student,
            teacher=world.teacher,
            base=world.base,
            out_dir=out_dir,
            data=DataSettings(
                world.train, val=world.val, max_seq_length=320, micro_batch_size=2, render=RenderSettings(cache="none")
            ),
            loss=LossSettings(**({"cka_every": 1, "on_policy": 1.0} | loss)),
            optim=OptimSettings(steps=4, accumulation=2, lr=0.01),
            run=replace(RunSettings(accelerator="cpu", samples=0, save_every=1, keep_checkpoints=9), **(run or {})),
            resume="auto",
            overwrite=False,
            seed=1,
        )
    )


def made(trainer: Trainer, *, step: int = 0, position: int = 0) -> tuple[Batch, Batch, list[TeacherView]]:
    """A micro-batch of the loader, and the same with the student's replies."""
    assert trainer.on_policy is not None
    trainer.loader.epoch = trainer.loader.position = 0
    batch = list(trainer.loader)[position]
    trainer.loader.epoch = trainer.loader.position = 0
    return batch, *trainer.on_policy.batch(batch, step, 0, 0)


def document(batch: Batch, row: int, number: int) -> tuple[list[int], list[int]]:
    """Ids and spans of one dialogue of a batch."""
    chosen = batch.documents_BT[row] == number
    return batch.ids_BT[row][chosen].tolist(), batch.spans_BT[row][chosen].tolist()


def test_replies_have_the_form_of_the_dialogues(world: World, tmp_path: Path) -> None:
    trainer = make_trainer(world, tmp_path / "out")
    tokenizer = trainer.tokenizer
    opening, closing = tokenizer.thought_ids or (0, 0)
    end, seen = tokenizer.token_to_id(IM_END) or 0, set()
    for position, step in itertools.product(range(len(trainer.loader)), range(15)):
        batch, new, _ = made(trainer, position=position, step=step)
        assert new.records == batch.records and new.sources == batch.sources
        assert new.ids_BT.shape == batch.ids_BT.shape
        for b, row in enumerate(new.records):
            for number, index in enumerate(row):
                record = trainer.loader.records[index]
                ids, spans = document(new, b, number)
                old_ids, _ = document(batch, b, number)
                assert len(ids) <= len(old_ids)
                thinking = bool(record.messages[-1].get("thought"))
                prompt = render(
                    record.messages[:-1],
                    tokenizer,
                    tags=tags_of(tokenizer),
                    add_generation_prompt=True,
                    thinking=thinking,
                ).ids
                assert ids[: len(prompt)] == prompt and ids != old_ids
                reply, of_reply = ids[len(prompt) :], spans[len(prompt) :]
                if thinking:
                    assert reply[0] == opening and reply.count(closing) == 1
                    after = reply.index(closing) + 1 + len(tokenizer.encode("\n\n"))
                    assert of_reply[:after] == [Span.THOUGHT] * after
                    reply, of_reply = reply[after:], of_reply[after:]
                assert opening not in reply and closing not in reply
                ended = end in reply
                answer = reply[: reply.index(end) + 1] if ended else reply
                assert of_reply[: len(answer)] == [Span.ANSWER] * len(answer)
                assert reply[len(answer) :] == (tokenizer.encode("\n") if ended else [])
                seen.add((thinking, ended))
    assert {thinking for thinking, _ in seen} == {True, False} and {ended for _, ended in seen} == {True, False}


@pytest.mark.parametrize("view", ["strip", "native", "mask"])
def test_the_teacher_scores_each_token_of_the_reply(world: World, tmp_path: Path, view: View) -> None:
    """KD of a micro-batch is the sum of KL(teacher || student) over the replies' tokens, each read alone in fp64."""
    trainer = make_trainer(world, tmp_path / "out", teacher_view=view, task_weight=0.0)
    _, new, views = made(trainer)
    micro = MicroBatch(new, trainer.settings.loss, views, CPU, generated=True)
    side: TeacherBatch = micro.teacher_batches[0]
    predicted = torch.cat((side.ids_BS[:, 1:], torch.zeros(len(side.ids_BS), 1, dtype=torch.int64)), 1).flatten()
    assert torch.equal(predicted[side.teacher_at_M], micro.targets_N[side.student_at_M])
    assert micro.counts.kd == int((new.spans_BT == Span.ANSWER).sum()) and micro.counts.ce == 0
    trainer._consult(micro, 0.0)
    _, terms = trainer.distiller.terms(micro)
    shared = views[0].shared_vocab_size
    expected = torch.zeros((), dtype=torch.float64)
    student = trainer.distiller.student.eval()
    assert trainer.teacher is not None and trainer.teacher.model is not None
    for b, row in enumerate(new.records):
        for number, index in enumerate(row):
            ids, _ = document(new, b, number)
            reading = views[0].readings[index]
            q = logits(student, ids)[reading.student_at_P, :shared].double().log_softmax(-1)
            p = logits(trainer.teacher.model, reading.ids_T.tolist())[reading.teacher_at_P, :shared]
            p = p.double().log_softmax(-1)
            expected += (p.exp() * (p - q)).sum()
    torch.testing.assert_close(terms.kd.double(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> Tensor:
    logits_TV: Tensor = model(torch.tensor([ids])).logits[0]
    return logits_TV


def test_draws_depend_on_the_step_alone(world: World, tmp_path: Path) -> None:
    trainer = make_trainer(world, tmp_path / "out")
    first, again, later = (made(trainer, step=step)[1] for step in (0, 0, 1))
    assert torch.equal(first.ids_BT, again.ids_BT) and not torch.equal(first.ids_BT, later.ids_BT)


def test_the_share_is_kept(world: World, tmp_path: Path) -> None:
    trainer = make_trainer(world, tmp_path / "out", on_policy=0.3)
    assert trainer.on_policy is not None
    chosen = [trainer.on_policy.chosen(step, micro) for step in range(500) for micro in range(4)]
    assert sum(chosen) / len(chosen) == pytest.approx(0.3, abs=0.03)


def test_a_run_goes_on_with_the_replies_it_would_have_drawn(world: World, tmp_path: Path) -> None:
    make_trainer(world, tmp_path / "whole", on_policy=0.5).run()
    half = tmp_path / "half"
    half.mkdir()
    shutil.copytree(tmp_path / "whole" / "step-000002", half / "step-000002")
    trainer = make_trainer(world, half, on_policy=0.5)
    assert trainer.step == 2
    trainer.run()
    one, other = load_state(tmp_path / "whole" / "final"), load_state(half / "final")
    assert all(torch.equal(one[name], other[name]) for name in one)
    lines = (tmp_path / "whole" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert "on_policy" in lines[0].split(",")


def test_what_cannot_be_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="kd_weight 0"):
        LossSettings(on_policy=0.5, kd_weight=0.0)
    with pytest.raises(UserError, match="on_policy in 0"):
        LossSettings(on_policy=1.5)
    with pytest.raises(UserError, match="not with fsdp"):
        make_trainer(world, tmp_path / "out", run={"strategy": "fsdp"})
    trainer = make_trainer(world, tmp_path / "out")
    plain = [replace(record, messages=[], text="मिट्टी") for record in trainer.loader.records]
    trainer.loader.records[:] = plain  # type: ignore[index]
    batch, new, _ = made(trainer)
    assert torch.equal(batch.ids_BT, new.ids_BT)
