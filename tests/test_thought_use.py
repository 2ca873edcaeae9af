"""`scripts/thought_use.py`: the three likelihoods against a reference, and a student that cannot use a thought."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from litgpt.chat import render
from litgpt.checkpoint import load_model
from litgpt.data import Record, read_records
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, run_cli
from scripts.thought_use import THOUGHTS, ThoughtUse, measure, thought_use, with_thoughts
from tests.world import World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def thinking(path: Path) -> list[Record]:
    return [record for record in read_records(path) if record.messages[-1].get("thought")]


def reference(model: GPT, tokenizer: Tokenizer, record: Record) -> tuple[int, float]:
    """Tokens of the last answer and its negative log-likelihood, the dialogue read alone."""
    prompt = render(record.messages[:-1], tokenizer).ids
    whole = render(record.messages, tokenizer).ids
    answer = [*tokenizer.encode(record.messages[-1]["content"]), tokenizer.token_to_id("<|im_end|>")]
    newline = tokenizer.encode("\n")
    assert whole[-len(newline) - len(answer) :] == [*answer, *newline]
    end = len(whole) - len(newline)
    assert end - len(answer) > len(prompt)
    with torch.no_grad():
        logits_TV = model(torch.tensor([whole])).logits[0]
    start = end - len(answer)
    return len(answer), float(F.cross_entropy(logits_TV[start - 1 : end - 1], torch.tensor(answer), reduction="sum"))


def test_the_likelihoods_are_those_of_each_dialogue_read_alone(world: World) -> None:
    model, tokenizer = load_model(world.student, dtype=torch.float64), Tokenizer(world.student)
    variants = with_thoughts(thinking(world.train), seed=3)
    found, ids = measure(model, tokenizer, variants, max_seq_length=300, micro_batch_size=2)
    assert ids == [record.id for record in variants["own"]]
    assert any(len(record.messages) > 4 for record in variants["own"])  # an earlier answer that must not count
    for thought in THOUGHTS:
        expected = [reference(model, tokenizer, record) for record in variants[thought]]
        assert found.tokens_R.tolist() == [tokens for tokens, _ in expected]
        assert found.nll_R[thought] == pytest.approx([nll for _, nll in expected], rel=1e-9)
    assert not np.allclose(found.nll_R["own"], found.nll_R["empty"], rtol=1e-4)


def test_a_student_that_reads_nothing_but_the_last_token_has_no_use_for_a_thought(world: World) -> None:
    model = load_model(world.student, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attn.proj.weight"):
                parameter.zero_()
    variants = with_thoughts(thinking(world.train), seed=3)
    found, _ = measure(model, Tokenizer(world.student), variants, max_seq_length=300, micro_batch_size=2)
    for without in ("empty", "other"):
        assert found.gain(without, seed=0) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)


def test_what_is_saved_is_positive_when_the_own_thought_helps() -> None:
    tokens_R = np.array([10, 30])
    nll = {"own": np.array([5.0, 15.0]), "empty": np.array([10.0, 30.0]), "other": np.array([5.0, 55.0])}
    found = ThoughtUse(tokens_R, nll)  # type: ignore[arg-type]
    assert found.mean("own") == 0.5
    assert found.gain("empty", seed=0) == (0.5, 0.5, 0.5)  # the same in each record: nothing is uncertain
    gain, low, high = found.gain("other", seed=0)
    assert gain == 1.0
    assert low == 0.0
    assert high == pytest.approx(40 / 30)


def test_everybody_gets_the_thought_of_another(world: World) -> None:
    records = thinking(world.train)
    variants = with_thoughts(records, seed=1)
    own = [record.messages[-1]["thought"] for record in records]
    other = [record.messages[-1]["thought"] for record in variants["other"]]
    assert sorted(other) == sorted(own)  # nobody's is given twice while all differ
    assert all(a != b for a, b in zip(own, other, strict=True))
    assert [record.messages[-1]["thought"] for record in variants["empty"]] == [""] * len(records)
    assert [record.messages[:-1] for record in variants["other"]] == [record.messages[:-1] for record in records]
    assert variants == with_thoughts(records, seed=1)
    assert variants["other"] != with_thoughts(records, seed=2)["other"]
    # Thoughts that many share are not passed on to those who have them already.
    shared = with_thoughts([*records[:1] * 5, records[1]], seed=1)["other"]
    assert [record.messages[-1]["thought"] for record in shared] == [own[1]] * 5 + [own[0]]
    with pytest.raises(UserError, match="3 dialogues have a thought, 1 of them different"):
        with_thoughts(records[:1] * 3, seed=1)
    with pytest.raises(UserError, match="0 dialogues have a thought"):
        with_thoughts([], seed=1)


def test_a_dialogue_too_long_with_one_thought_is_left_out_of_all(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer(world.student)
    variants = with_thoughts(thinking(world.train), seed=3)
    lengths = {t: [len(render(r.messages, tokenizer).ids) for r in records] for t, records in variants.items()}
    longest = max(lengths["empty"])
    expected = [r.id for i, r in enumerate(variants["own"]) if max(lengths[t][i] for t in THOUGHTS) <= longest]
    assert 0 < len(expected) < len(variants["own"])
    model = load_model(world.student)
    found, ids = measure(model, tokenizer, variants, max_seq_length=longest, micro_batch_size=2)
    assert ids == expected
    assert len(found.tokens_R) == len(expected)
    assert (
        f"{len(variants['own']) - len(expected)} dialogues have more than {longest} tokens" in capsys.readouterr().err
    )
    # The empty ones fit, the others do not.
    with pytest.raises(UserError, match="fits into"):
        measure(model, tokenizer, variants, max_seq_length=min(lengths["empty"]), micro_batch_size=2)


def test_checkpoints_side_by_side_in_table_json_and_picture(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoints", f"[{world.student},{world.base}]", "--data", str(world.train), "--device", "cpu"]
    run_cli(thought_use, args=[*arguments, "--out_dir", str(tmp_path), "--max_records", "9"])
    said = capsys.readouterr().out
    assert "6 of 9 dialogues" in said
    report = json.loads((tmp_path / "thought_use.json").read_text(encoding="utf-8"))
    assert [entry["checkpoint"] for entry in report["checkpoints"]] == [str(world.student), str(world.base)]
    for entry in report["checkpoints"]:
        tokens = sum(record["tokens"] for record in entry["by_record"])
        assert entry["answer_tokens"] == tokens
        assert entry["records"] == 6
        for thought in THOUGHTS:
            summed = sum(record[thought] for record in entry["by_record"])
            assert entry["nats_per_token"][thought] == pytest.approx(summed / tokens, abs=1e-4)
            assert f"{entry['nats_per_token'][thought]:.4f}" in said
    assert (tmp_path / "thought_use.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_checkpoint_and_one_that_is_damaged_are_one_line(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_cli(thought_use, args=["--checkpoints", f"[{tmp_path}/nowhere]", "--out_dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    model = load_model(world.student)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        measure(
            model,
            Tokenizer(world.student),
            with_thoughts(thinking(world.train), seed=0),
            max_seq_length=300,
            micro_batch_size=2,
        )
