"""The teacher's text, the position pairs, and what it is asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from litgpt.chat import Span, render
from litgpt.checkpoint import load_model
from litgpt.data import PackedLoader, read_records
from litgpt.teacher import OnlineTeacher, View
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError
from tests.world import World, make_model, make_world, write_dialogues


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def tokenizer(world: World) -> Tokenizer:
    return Tokenizer(world.student)


def make_loader(path: Path, tokenizer: Tokenizer) -> PackedLoader:
    return PackedLoader(read_records(path), tokenizer, max_seq_length=320, micro_batch_size=2)


@pytest.mark.parametrize("view", ["strip", "native", "mask"])
def test_every_answer_token_has_a_pair_that_predicts_the_same_id(
    world: World, tokenizer: Tokenizer, view: View
) -> None:
    loader = make_loader(world.train, tokenizer)
    teacher = OnlineTeacher(world.teacher, tokenizer, view=view).read(loader)
    for batch in loader:
        side = teacher.batch(batch)
        targets_BT, spans_BT = batch.next_tokens()
        answers_N = (spans_BT == Span.ANSWER).flatten()
        assert side.student_at_M.tolist() == answers_N.nonzero().flatten().tolist()
        documents_N = side.documents_BS.flatten()
        # The two predict the same id, and on both sides the next token is in the same document.
        assert torch.equal(side.ids_BS.flatten()[side.teacher_at_M + 1], targets_BT.flatten()[side.student_at_M])
        assert torch.equal(documents_N[side.teacher_at_M], documents_N[side.teacher_at_M + 1])
        assert torch.equal(documents_N[side.teacher_at_M], batch.documents_BT.flatten()[side.student_at_M])


@pytest.mark.parametrize("view", ["strip", "native", "mask"])
def test_packed_targets_are_those_of_each_dialogue_read_alone(world: World, tokenizer: Tokenizer, view: View) -> None:
    loader = make_loader(world.train, tokenizer)
    teacher = OnlineTeacher(world.teacher, tokenizer, view=view)
    side = teacher.read(loader)
    teacher.load(dtype=torch.float64)
    model = load_model(world.teacher, dtype=torch.float64)
    own = Tokenizer(world.teacher)
    batch = next(iter(loader))
    targets = teacher.targets(side.batch(batch), batch.ids_BT.numel())
    rows_BT = targets.rows_N.view_as(batch.ids_BT)
    for b, row in enumerate(batch.records):
        for number, i in enumerate(row):
            if view == "strip":
                alone = render(loader.records[i].messages, own, tags="think", keep_thoughts=False)
                assert own.decode(alone.ids).count("think") == 2  # its own empty block
            elif view == "native":
                alone = render(loader.records[i].messages, own, tags="think")
                assert loader.records[i].messages[-1].get("thought", "") in own.decode(alone.ids)
            else:
                alone = render(loader.records[i].messages, tokenizer)
            answers = [t - 1 for t, span in enumerate(alone.spans) if span == Span.ANSWER]
            with torch.no_grad():
                expected = model(torch.tensor([alone.ids]), return_logits=False).hidden[0, answers]
            rows = rows_BT[b, batch.documents_BT[b] == number]
            torch.testing.assert_close(targets.hidden_MC[rows[rows >= 0]], expected, rtol=1e-9, atol=1e-9)


def test_another_thought_leaves_the_stripped_targets_as_they_are(
    world: World, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    teacher = OnlineTeacher(world.teacher, tokenizer)
    teacher.load()
    found = []
    for thought in ("yellow", "धान में झोंका रोग है, क्या करें? " * 3):
        write_dialogues(tmp_path / "one.jsonl", 2, prefix="x", thought=thought)
        loader = make_loader(tmp_path / "one.jsonl", tokenizer)
        batch = next(iter(loader))
        assert thought.strip() in tokenizer.decode(batch.ids_BT[0][batch.documents_BT[0] >= 0].tolist())
        side = teacher.read(loader).batch(batch)
        found.append((side, teacher.targets(side, batch.ids_BT.numel()).hidden_MC))
    assert torch.equal(found[0][0].ids_BS, found[1][0].ids_BS)
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0].student_at_M, found[1][0].student_at_M)


def test_only_ids_that_both_really_have_are_shared(world: World, tokenizer: Tokenizer) -> None:
    teacher = OnlineTeacher(world.teacher, tokenizer)
    assert tokenizer.thought_ids is not None
    assert teacher.shared_vocab_size == tokenizer.thought_ids[0] == teacher.tokenizer.vocab_size


def test_other_vocabularies_are_refused_before_any_weight_is_read(
    world: World, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other = shutil.copytree(world.teacher, tmp_path / "other")
    (other / "lit_model.pth").unlink()
    pipeline = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = pipeline["model"]["vocab"]
    first, second = list(vocabulary)[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(pipeline), encoding="utf-8")
    with pytest.raises(UserError, match=r"the vocabularies differ: id 40 is .* choose a teacher"):
        OnlineTeacher(other, tokenizer)


def test_other_merges_are_refused_with_the_record(world: World, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = shutil.copytree(world.teacher, tmp_path / "other")
    pipeline = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    pipeline["model"]["merges"] = pipeline["model"]["merges"][:5]
    (other / "tokenizer.json").write_text(json.dumps(pipeline), encoding="utf-8")
    teacher = OnlineTeacher(other, tokenizer)
    with pytest.raises(UserError, match="record 'train-0': student and teacher split the answer"):
        teacher.read(make_loader(world.train, tokenizer))


def grown_tokenizer(source: Path, directory: Path, teacher: Tokenizer) -> tuple[Tokenizer, int, tuple[int, int]]:
    """A student's tokenizer with one more merge: the first two tokens of a word of the answers become one."""
    shutil.copytree(source, directory)
    first, second = teacher.encode(" दें")[:2]
    pipeline = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = pipeline["model"]["vocab"]
    spelt = {index: token for token, index in vocabulary.items()}
    # The library numbers the added tokens anew from the size of the vocabulary on, unless they stand in it.
    vocabulary |= {token["content"]: token["id"] for token in pipeline["added_tokens"]}
    new = 1 + max(vocabulary.values())
    vocabulary[spelt[first] + spelt[second]] = new
    merge = [spelt[first], spelt[second]]
    pipeline["model"]["merges"].append(merge if isinstance(pipeline["model"]["merges"][0], list) else " ".join(merge))
    (directory / "tokenizer.json").write_text(json.dumps(pipeline), encoding="utf-8")
    return Tokenizer(directory), new, (first, second)


def test_a_student_that_says_in_one_token_what_the_teacher_says_in_two(
    world: World, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    own = Tokenizer(world.teacher)
    grown, new, (first, second) = grown_tokenizer(world.student, tmp_path / "grown", own)
    assert grown.token_bytes(new) == own.token_bytes(first) + own.token_bytes(second)
    loader = make_loader(world.train, grown)
    teacher = OnlineTeacher(world.teacher, grown)
    assert teacher.shared_vocab_size == OnlineTeacher(world.teacher, tokenizer).shared_vocab_size
    assert teacher.first_ids_V[new] == first
    shared = teacher.shared_vocab_size
    assert torch.equal(teacher.first_ids_V[:shared], torch.arange(shared))
    assert tokenizer.thought_ids is not None
    assert teacher.first_ids_V[list(tokenizer.thought_ids)].tolist() == [-1, -1]
    view = teacher.read(loader)
    seen = 0
    for document, reading in zip(loader.documents, view.readings, strict=True):
        students = document.ids_T[reading.student_at_P + 1].long()
        teachers = reading.ids_T[reading.teacher_at_P + 1].long()
        assert torch.equal(teacher.first_ids_V[students], teachers)
        # Every token of the answer that the student has is paired; the second halves of the teacher's are not.
        assert len(students) == int((document.spans_T == Span.ANSWER).sum())
        for place in (students == new).nonzero().flatten().tolist():
            assert reading.ids_T[int(reading.teacher_at_P[place]) + 2] == second
            seen += 1
    assert seen >= 12


def test_mask_view_needs_rows_for_the_students_own_tokens(world: World, tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.thought_ids is not None
    narrow = make_model(
        tmp_path / "Narrow", world.teacher, n_embd=32, n_layer=1, seed=1, padded_vocab_size=tokenizer.thought_ids[0]
    )
    loader = make_loader(world.train, tokenizer)
    OnlineTeacher(narrow, tokenizer, view="strip").read(loader)
    with pytest.raises(UserError, match="use the view strip"):
        OnlineTeacher(narrow, tokenizer, view="mask").read(loader)


def test_it_is_frozen_and_must_be_loaded_first(world: World, tokenizer: Tokenizer) -> None:
    teacher = OnlineTeacher(world.teacher, tokenizer)
    loader = make_loader(world.train, tokenizer)
    side, batch = teacher.read(loader), next(iter(loader))
    with pytest.raises(RuntimeError, match="not loaded"):
        teacher.targets(side.batch(batch), batch.ids_BT.numel())
    teacher.load()
    targets = teacher.targets(side.batch(batch), batch.ids_BT.numel())
    assert not targets.hidden_MC.requires_grad
    assert not targets.head_VC.requires_grad


def test_unknown_view_and_missing_teacher_are_one_clear_line(world: World, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="teacher view 'blind' is not known: choose one of strip, native, mask"):
        OnlineTeacher(world.teacher, tokenizer, view="blind")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="does not exist"):
        OnlineTeacher(world.teacher / "nowhere", tokenizer)
