"""The pre-flight: it finds what is wrong before a training does, goes on after a fault, and writes nothing."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import litgpt.distill
from litgpt.chat import Span, render
from litgpt.checkpoint import load_state, save_lit_dir
from litgpt.config import Config
from litgpt.distill import Distiller
from litgpt.maskview import Label, Run, paint, runs
from litgpt.tokenizer import Tokenizer
from litgpt.utils import run_cli
from scripts.validate_run import validate_run
from tests.tiny_tokenizer import build_tiny_tokenizer
from tests.world import World, make_world
from train_distill import distill

ROOT = Path(__file__).resolve().parent.parent
Check = Callable[..., tuple[int, list[str]]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def check(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Run the command on the tiny world; gives its exit code and the lines on the terminal."""

    def run(**changes: Any) -> tuple[int, list[str]]:
        settings = {
            "student": world.student,
            "teacher": world.teacher,
            "out_dir": tmp_path / "out",
            "data.train": world.train,
            "data.val": world.val,
            "data.max_seq_length": 320,
            "data.micro_batch_size": 2,
            "loss.cka_every": 1,
            "optim.steps": 6,
            "run.accelerator": "cpu",
            "records": 2,
        }
        words = [f"--{name}={value}" for name, value in (settings | changes).items()]
        return call(words, capsys)

    return run


def call(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    code = 0
    try:
        run_cli(validate_run, args=words)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    printed = capsys.readouterr()
    return code, (printed.out + printed.err).splitlines()


def of_kind(kind: str, lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith(f"{kind} ")]


def test_it_takes_the_arguments_of_the_training_with_its_defaults() -> None:
    ours, theirs = inspect.signature(validate_run).parameters, inspect.signature(distill).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert (ours[name].default, ours[name].annotation) == (parameter.default, parameter.annotation)


def test_a_sound_run_passes_every_check_and_nothing_is_written(check: Check, world: World, tmp_path: Path) -> None:
    before = sorted(str(path) for path in world.student.parent.rglob("*"))
    code, lines = check()
    assert code == 0 and not of_kind("error", lines)
    text = "\n".join(lines)
    for expected in (
        "ok       student: 2 layers, width 32, 4 experts, 2 per token",
        "ok       vocabularies: 397 ids are the same in both",
        "ok       masks: each token of 2 dialogues has the weights of its span",
        "ok       schedule: 6 steps",
        "ok       memory of this machine: fits: ",
        "ok       step: CKA to the base is 1.000 over ",
        "ok       step: tensors with a gradient: routers 2, experts 4, thought rows 1; none of 14 frozen ones has one",
    ):
        assert expected in text
    terms = r"\(CE \d+\.\d+, KD \d+\.\d+, 1 - CKA -?0\.0000, balance \d\.\d+, z \d+\.\d+\)"
    assert re.search(r"step: loss \d+\.\d+ " + terms, text)
    assert lines[-1].startswith("0 errors, ")
    assert "\x1b" not in text
    assert sorted(str(path) for path in world.student.parent.rglob("*")) == before
    assert not (tmp_path / "out").exists()


def test_the_shown_spans_are_those_of_the_dialogue(check: Check, world: World) -> None:
    _, lines = check(step="false", records=12)
    text = "\n".join(lines)
    assert "[thought]<thought>\nyellow leaves, day 4: check water\n</thought>\n\n[answer]पानी कम दें। 4 दिन" in text
    record = json.loads(world.train.read_text(encoding="utf-8").splitlines()[4])
    rendered = render(record["messages"], Tokenizer(world.student))
    counts = ", ".join(f"{span.name.lower()} {rendered.spans.count(span)}" for span in list(Span)[:3])
    assert f"train-4: {len(rendered.ids)} tokens: {counts}" in text


def test_a_thought_without_weight_is_shown_as_not_scored(check: Check) -> None:
    code, lines = check(step="false", records=12, **{"loss.thought_weight": 0})
    assert code == 0
    assert "[not scored]<thought>" in "\n".join(lines) and "[thought]<thought>" not in "\n".join(lines)
    _, lines = check(step="false", records=12, color="true")
    assert "\x1b[35m<thought>\x1b[0m" in "\n".join(lines)


def test_one_fault_does_not_stop_the_other_checks(check: Check, world: World, tmp_path: Path) -> None:
    broken = tmp_path / "train.jsonl"
    broken.write_text('{"id": "a", "messages": [{"role": "farmer", "content": "?"}]}\n', encoding="utf-8")
    (tmp_path / "out" / "final").mkdir(parents=True)
    code, lines = check(**{"data.train": broken, "teacher": tmp_path / "nowhere"})
    assert code == 2
    errors = of_kind("error", lines)
    assert any(f"{broken}:1: message 1: role 'farmer'" in line for line in errors)
    assert any("nowhere does not exist; run first" in line for line in errors)
    assert any("holds a finished run" in line for line in errors)
    assert lines[-1].startswith(f"error: {len(errors)} errors, ")
    assert any("memory of this machine" in line for line in lines)


def test_dialogues_of_val_in_train_and_dialogues_that_are_too_long_are_warned_of(check: Check, world: World) -> None:
    _, lines = check(step="false", **{"data.val": world.train, "data.max_seq_length": 120})
    warnings = of_kind("warning", lines)
    assert any("12 dialogues of val stand in train, too" in line for line in warnings)
    assert any(re.search(r"have more than 120 tokens .* left out", line) for line in lines)


def test_a_file_of_weights_that_is_cut_short_or_of_another_shape_is_found(
    check: Check, world: World, tmp_path: Path
) -> None:
    cut = shutil.copytree(world.teacher, tmp_path / "cut")
    size = (cut / "lit_model.pth").stat().st_size
    with (cut / "lit_model.pth").open("r+b") as file:
        file.truncate(size // 2)
    code, lines = check(teacher=cut)
    assert code == 2 and any("error    teacher: " in line for line in lines)
    other = shutil.copytree(world.teacher, tmp_path / "other")
    config = yaml.safe_load((other / "model_config.yaml").read_text(encoding="utf-8"))
    (other / "model_config.yaml").write_text(yaml.safe_dump(config | {"intermediate_size": 64}), encoding="utf-8")
    code, lines = check(teacher=other)
    assert code == 2 and any("do not fit model_config.yaml, e.g. " in line for line in of_kind("error", lines))


def test_a_base_that_the_student_does_not_come_from_is_found(check: Check, world: World, tmp_path: Path) -> None:
    # The attention is the student's, the feed-forward is not: shapes agree, and only CKA shows it.
    state = load_state(world.base)
    torch.manual_seed(0)
    for name, tensor in state.items():
        if ".mlp." in name:
            state[name] = torch.randn_like(tensor)
    config = Config.from_checkpoint(world.base)
    foreign = tmp_path / "foreign"
    save_lit_dir(foreign, state, config, source_dir=world.base, provenance={})
    code, lines = check(base=foreign)
    assert code == 2
    assert any(re.search(r"step: CKA to the base is 0\.\d+, expected 1\.000", line) for line in of_kind("error", lines))
    code, lines = check(base=world.teacher)
    assert code == 2 and any("base: n_layer is 3, the student's 2" in line for line in lines)


def test_what_leaves_routers_or_rows_without_a_gradient_is_a_warning(check: Check, tmp_path: Path) -> None:
    code, lines = check(**{"loss.router_weight": 0})
    assert code == 0 and any("loss.router_weight is 0" in line for line in of_kind("warning", lines))
    message = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "पानी कम दें।"}]
    (tmp_path / "plain.jsonl").write_text(json.dumps({"id": "a", "messages": message}), encoding="utf-8")
    code, lines = check(**{"data.train": tmp_path / "plain.jsonl"})
    assert code == 0 and any("no thought in the micro-batch" in line for line in of_kind("warning", lines))


def test_a_loss_that_is_not_finite_is_an_error(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litgpt.distill, "balance_loss", lambda *_, **__: torch.tensor(float("nan")))
    code, lines = check()
    assert code == 2
    assert any(line.startswith("error    step: loss nan") for line in lines)


def test_a_frozen_tensor_with_a_gradient_and_an_expert_without_one_are_errors(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Distiller.forward

    def leaky(self: Distiller, *arguments: Any) -> Any:
        head = self.student.transformer.ln_f.weight
        head.grad = torch.ones_like(head)
        down = dict(self.student.named_parameters())["transformer.h.1.mlp.experts.down_proj"]
        down.register_hook(lambda gradient: 0 * gradient)
        return forward(self, *arguments)

    monkeypatch.setattr(Distiller, "forward", leaky)
    code, lines = check()
    errors = of_kind("error", lines)
    assert code == 2
    assert "error    step: 1 frozen tensors got a gradient, e.g. student.transformer.ln_f.weight" in errors
    zeros = "error    step: 1 gradients are all zeros, e.g. student.transformer.h.1.mlp.experts.down_proj"
    assert zeros in errors
    assert any("4 experts, over all layers, were chosen by no token" in line for line in lines)


def test_a_dry_run_of_the_full_config_passes_without_any_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Student, teacher and base are those of the real recipe, on the meta device, planned for the GPU it names."""
    monkeypatch.chdir(ROOT)
    words = ["--config=configs/distill.yaml", "--dry_run=true", "--gpu=NVIDIA H200", "--out_dir=out/none"]
    words.append("--student=missing/Qwen3-0.6B-MoE-8x2")  # even where somebody has the checkpoints
    words += ["--base=missing/Qwen3-0.6B", "--teacher=missing/Qwen3-14B"]
    code, lines = call(words, capsys)
    text = "\n".join(lines)
    assert code == 0, text
    assert "ok       student: 28 layers, width 1024, 8 experts, 2 per token" in text
    assert re.search(r"teacher +27\.51 GiB +14\.8 B bf16", text)
    assert re.search(
        r"ok +memory of NVIDIA H200: fits: \d+\.\d of 140\.4 GiB; largest micro-batch that fits: \d+", text
    )
    assert re.search(r"ok       schedule: \d+ steps; learning rate 0.0001 at step \d+, 1e-05 at the last", text)
    assert "ok       step: not run, there are no weights of student, base, teacher" in text
    # What does not fit is said, and is an error where the GPU was named.
    words[2] = "--gpu=NVIDIA GeForce RTX 4090"
    code, lines = call(words, capsys)
    assert code == 2 and any("memory of NVIDIA GeForce RTX 4090: does not fit" in line for line in lines)


def test_configs_without_weights_are_enough_for_everything_but_the_step(
    check: Check, world: World, tmp_path: Path
) -> None:
    places = {}
    for name in ("student", "base", "teacher"):
        places[name] = shutil.copytree(getattr(world, name), tmp_path / name)
        (places[name] / "lit_model.pth").unlink()
    code, lines = check(**places)
    assert code == 0, lines
    assert len([line for line in of_kind("warning", lines) if "has no weights" in line]) == 3
    assert any("masks: each token" in line for line in of_kind("ok", lines))
    assert any("step: not run, there are no weights" in line for line in of_kind("ok", lines))


def test_a_gpu_that_is_not_known_is_refused(check: Check) -> None:
    code, lines = check(gpu="Voodoo 2")
    assert code == 2 and "error: gpu 'Voodoo 2' is not known" in lines[-1]


def test_colour_never_cuts_a_character_or_a_syllable(tmp_path: Path) -> None:
    """Against the plainest reference: no escape sequence inside a character, before a mark, or after a halant."""
    tokenizer = Tokenizer(build_tiny_tokenizer(tmp_path))
    text = "क्षेत्र में गेहूँ की पत्तियाँ, ज्ञान और श्रद्धा। र\u200dक"
    ids = tokenizer.encode(text)
    # Letters of several tokens are among them.
    assert any(tokenizer.token_bytes(index).decode(errors="replace").endswith("\ufffd") for index in ids)
    kinds = list(Label)
    # The worst case: another label for every token.
    labels = [kinds[t % len(kinds)] for t in range(len(ids))]
    found = runs(ids, labels, tokenizer)
    assert "".join(run.text for run in found) == unicodedata.normalize("NFC", text)
    assert len(found) > 10
    for before, after in pairwise(found):
        assert not unicodedata.category(after.text[0]).startswith("M")
        assert unicodedata.combining(before.text[-1]) != 9
        assert "\u200d" not in (before.text[-1], after.text[0])
    painted = paint(found, colour=True)
    assert re.sub(r"\x1b\[\d+m", "", painted) == unicodedata.normalize("NFC", text)


def test_paint_colours_line_by_line_and_names_the_label_without_colour() -> None:
    dialogue = [Run(Label.PROMPT, "a\nb"), Run(Label.ANSWER, "c")]
    assert paint(dialogue, colour=False) == "[prompt]a\nb[answer]c"
    assert paint(dialogue, colour=True) == "\x1b[2ma\x1b[0m\n\x1b[2mb\x1b[0m\x1b[32mc\x1b[0m"
