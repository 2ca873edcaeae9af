"""The report: its numbers are those of the run's files, and what the files do not say is said to be missing."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

import train_distill
from litgpt.report import report_page, write_report
from litgpt.report_card import model_card
from litgpt.report_plots import SMOOTHED_FROM, Panel, draw_cka, draw_curves, draw_router, panels, smoothed
from litgpt.runfiles import Series, dead_experts, read_metrics, read_run
from litgpt.utils import UserError, run_cli, sha256_file
from scripts.report_run import report_run
from tests.world import World, make_world

STEPS = 4
HINDI = "गेहूँ में क्‍या ``डालें``? क़ीमत | ड़"  # joiners, nuktas and Markdown's own signs
SETTINGS: dict[str, Any] = {
    "student": "models/base-MoE-4x2",
    "teacher": "models/teacher",
    "base": "models/Qwen3-0.6B",
    "out_dir": "out/run",
    "data": {"train": "आँकड़े/train.jsonl", "val": "आँकड़े/val.jsonl", "max_seq_length": 64, "micro_batch_size": 2},
    "loss": {"task_weight": 1.0, "kd_weight": 0.5, "cka_weight": 0.05, "router_weight": 0.01},
    "optim": {"steps": 40, "clip": 1.5, "lr": 0.01},
    "run": {"precision": "32-true"},
    "seed": 7,
}


def validation(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "answer_ce": 2.51234 - step / 100,
        "thought_ce": 3.5,
        "kd_kl": 0.75,
        "answer_tokens": 1234,
        "thought_tokens": 56,
        "kd_tokens": 1234,
        "cka": {"1": 1.0 - step / 100, "3": 1.0 - step / 50},
        "expert_load": {"0": [0.4, 0.35, 0.2249, 0.0251], "1": [0.5, 0.4, 0.0751, 0.0249]},
        "expert_max_over_mean": {"0": 1.6, "1": 2.0},
        "router_entropy": {"0": 0.987, "1": 0.876},
    } | changes


def write_lines(directory: Path, rows: list[dict[str, Any]]) -> Path:
    path = directory / "metrics.csv"
    columns = sorted({column for row in rows for column in row})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def training_rows(first: int, last: int, **changes: Any) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": 3 / step, "ce": 2 / step, "kd": 1 / step, "cka": math.nan, "cka_weight": 0.0,
         "balance": 1.1, "lr": 0.01 / step, "grad_norm": 5.0 / step, "expert_max_over_mean": 1.5,
         "tokens": 100 + step, "tokens_per_second": 1000.0 + step} | changes
        for step in range(first, last + 1)
    ]  # fmt: skip


def validation_row(step: int) -> dict[str, Any]:
    values = validation(step)
    return {
        "step": step,
        "val/answer_ce": values["answer_ce"],
        "val/kd_kl": values["kd_kl"],
        "val/cka_1": values["cka"]["1"],
        "val/cka_3": values["cka"]["3"],
        "val/expert_max_over_mean": 2.0,
    }


def make_run(directory: Path, *, over: bool = True, **changes: Any) -> Path:
    """The files of a run; `over`: with metrics.json. There is no final/ in it."""
    (directory / "report").mkdir(parents=True)
    settings = SETTINGS | {"out_dir": str(directory)}
    (directory / "hyperparameters.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    write_lines(directory, [validation_row(0), *training_rows(1, 20), validation_row(20), *training_rows(21, 40)])
    if over:
        metrics = {
            "before": validation(0),
            "after": validation(40, **changes),
            "frozen": {"compared": 11, "identical": 11, "changed": []},
            "training": {"steps": 40, "seconds": 90.0, "train_dialogues": 12, "train_dialogues_too_long": ["a", "b"]},
        }
        (directory / "report" / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return directory


def page(directory: Path) -> str:
    """report/README.md without the pictures, which take longer."""
    return report_page(read_run(directory), set())


def row(text: str, start: str) -> list[str]:
    """The cells of the first table row that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of the trainer itself."""
    out_dir = tmp_path_factory.mktemp("run") / "whole"
    settings = {
        "student": world.student, "teacher": world.teacher, "out_dir": out_dir, "data.train": world.train,
        "data.val": world.val, "data.max_seq_length": 320, "data.micro_batch_size": 1, "loss.cka_every": 1,
        "optim.steps": STEPS, "optim.accumulation": 2, "optim.lr": 0.01, "run.accelerator": "cpu", "run.log_every": 1,
        "run.val_every": 2, "run.save_every": 2,
    }  # fmt: skip
    run_cli(train_distill.distill, args=[f"--{name}={value}" for name, value in settings.items()])
    return out_dir


def exam(who: Path | str, value: float, *, data: str = "data/dialogues", count: int = 40) -> dict[str, Any]:
    score = {"value": value, "low": value - 0.1, "high": value + 0.1, "count": count}
    return {"name": "x", "settings": {"adviser": str(who)}, "data": data, "scores": {"all": {"cause_top1": score}}}


def write_exam(path: Path, values: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def test_a_real_run_is_reported_with_the_numbers_of_its_files(world: World, trained: Path, tmp_path: Path) -> None:
    out_dir = shutil.copytree(trained, tmp_path / "run")
    written = write_report(out_dir)
    names = [*(f"report/{name}" for name in ("curves.png", "cka_layers.png", "router.png", "README.md"))]
    assert [str(path.relative_to(out_dir)) for path in written] == [*names, "final/README.md"]
    metrics = json.loads((out_dir / "report" / "metrics.json").read_text(encoding="utf-8"))
    before, after = metrics["before"], metrics["after"]
    text = (out_dir / "report" / "README.md").read_text(encoding="utf-8")
    card = ModelCard.load(out_dir / "final" / "README.md")
    for shown in (text, card.text):
        for key, label in (
            ("answer_ce", "cross-entropy of the answer"),
            ("kd_kl", "KL(teacher, student) on the answer, nats"),
        ):
            cells = row(shown, f"{label}")
            assert cells[1:4] == [f"{before[key]:.4f}", f"{after[key]:.4f}", f"{after[key] - before[key]:+.4f}"]
        for layer, value in after["cka"].items():
            assert f"| {layer} | 1.0000 | {value:.4f} | {value - before['cka'][layer]:+.4f} |" in shown
        assert f"{after['expert_max_over_mean']['1']:.2f} | {after['router_entropy']['1']:.3f}" in shown
        assert "nan" not in shown.lower().replace("banana", "")
    assert "**Finished**: 4 steps" in text and "15 of 15 tensors" in text
    for path in (world.train, world.val, world.base / "lit_model.pth", out_dir / "final" / "lit_model.pth"):
        assert sha256_file(path) in card.text
    assert f"`{world.train}` | 12 | 0 |" in card.text


def test_the_card_is_one_that_the_hub_reads_and_invents_nothing(trained: Path) -> None:
    run = read_run(trained)
    card = ModelCard(model_card(run))
    data = card.data.to_dict()
    assert data["language"] == "hi" and data["library_name"] == "litgpt" and data["license"] == "unknown"
    assert "base_model" not in data and "datasets" not in data
    assert {"mixture-of-experts", "knowledge-distillation"} <= set(data["tags"])
    assert "No agronomist has reviewed" in card.text and "advisory/guard.py" in card.text
    assert "base, teacher and data: unknown" in card.text and "no exam of this model" in card.text
    assert row(card.text, "teacher")[2] == "unknown" and row(card.text, "teacher")[3] != "not recorded"
    run.settings["loss"]["kd_weight"] = 0.0
    run.provenance["upcycled"] |= {"source": "Qwen3-0.6B", "license": "apache-2.0"}
    card = ModelCard(model_card(run, license="apache-2.0", datasets=["me/फसल"]))
    data = card.data.to_dict()
    assert (data["license"], data["base_model"], data["datasets"]) == ("apache-2.0", "Qwen/Qwen3-0.6B", ["me/फसल"])
    assert "knowledge-distillation" not in data["tags"] and row(card.text, "teacher")[1].startswith("none")
    assert "`upcycled.license`: apache-2.0" in card.text and "me/फसल" in card.content


def test_making_it_again_gives_the_same_bytes_but_leaves_a_card_written_by_hand(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_dir = shutil.copytree(trained, tmp_path / "run")
    first = {path: path.read_bytes() for path in write_report(out_dir)}
    card = out_dir / "final" / "README.md"
    card.write_text("mine", encoding="utf-8")
    assert {path: path.read_bytes() for path in write_report(out_dir)} == {
        path: content for path, content in first.items() if path != card
    }
    assert card.read_text(encoding="utf-8") == "mine" and "left as it is" in capsys.readouterr().out
    assert not list(out_dir.rglob("*.tmp"))


def test_the_exam_is_this_models_on_the_same_questions_as_the_others(
    world: World, trained: Path, tmp_path: Path
) -> None:
    out_dir = shutil.copytree(trained, tmp_path / "run")
    write_exam(out_dir / "exam" / "base" / "exam.json", exam(world.base, 0.25))
    assert "No exam of this run's model" in page(out_dir)
    own = write_exam(out_dir / "exam" / "own" / "exam.json", exam(out_dir / "final", 0.5))
    write_exam(out_dir / "exam" / "teacher" / "exam.json", exam(world.teacher, 0.75, count=39))
    text = page(out_dir)
    assert row(text, "check") == ["check, %", "replies", "base", "distilled"]
    assert row(text, "cause top1") == ["cause top1", "40", "25.0 (15.0 to 35.0)", "50.0 (40.0 to 60.0)"]
    assert "50.0 (40.0 to 60.0)" in model_card(read_run(out_dir))
    os.utime(own, (1, 1))
    text = page(out_dir)
    assert "exam/own/exam.json is older than final/" in text and "50.0" not in text
    given = write_exam(tmp_path / "e.json", exam("http://x/v1", 0.125))
    assert "12.5 (2.5 to 22.5)" in model_card(read_run(out_dir, exam=given))


def test_a_map_of_other_weights_is_not_shown(trained: Path, tmp_path: Path) -> None:
    out_dir = shutil.copytree(trained, tmp_path / "run")
    found = {"settings": {"sha256": {"final/lit_model.pth": "0" * 64}}, "layers": [{"a": 0, "b": 0, "cka": 0.4321}]}
    path = out_dir / "report" / "cka.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    text = page(out_dir)
    assert "about other weights" in text and "0.4321" not in text
    found["settings"] = {"sha256": {"final/lit_model.pth": sha256_file(out_dir / "final" / "lit_model.pth")}}
    path.write_text(json.dumps(found), encoding="utf-8")
    assert "| 0 | 0 | 0.4321 |" in page(out_dir)


def test_an_unfinished_run_says_so_and_shows_what_there_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", over=False)
    (run / "step-000020").mkdir()
    (run / "step-000020" / "state.pth").touch()
    write_report(run)
    text = (run / "report" / "README.md").read_text(encoding="utf-8")
    assert "**Not finished**: the last step in metrics.csv is 40, of 40; newest checkpoint: step-000020" in text
    assert row(text, "held-out dialogues")[:3] == ["held-out dialogues", "before", "step 20"]
    assert row(text, "cross-entropy of the answer")[1:] == ["2.5123", "2.3123", "-0.2000", "–"]
    assert "| 3 | 1.0000 | 0.6000 | -0.4000 |" in text
    assert "router.png" not in text and not (run / "report" / "router.png").exists()
    assert not (run / "final").exists() and "nan" not in text.lower()


def test_a_run_that_has_logged_nothing_has_no_pictures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", over=False)
    (run / "metrics.csv").unlink()
    write_report(run)
    text = (run / "report" / "README.md").read_text(encoding="utf-8")
    assert "metrics.csv has no step yet" in text and "No validation has been logged" in text
    assert [path.name for path in (run / "report").iterdir()] == ["README.md"]


def test_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", kd_kl=None, thought_ce=math.nan, cka={"1": None, "3": 0.5})
    text = page(run)
    assert row(text, "KL(teacher, student) on the answer, nats")[1:4] == ["0.7500", "–", "–"]
    assert row(text, "cross-entropy of the thought")[1:4] == ["3.5000", "–", "–"]
    assert "| 1 | 1.0000 | – | – |" in text and "nan" not in text.lower()
    assert row(text, "share of padding")[1] == "unknown"
    assert row(text, "training documents left out")[1] == "2"
    assert row(text, "tokens a step, median")[1] == "120"  # of 101 ... 140


def test_further_held_out_files_are_shown_under_their_names(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", over=False)
    further = {"val_सामान्य/answer_ce": 4.25, "val_सामान्य/kd_kl": 0.5, "val_b/c/answer_ce": 7.5}
    write_lines(run, [validation_row(0) | further, *training_rows(1, 20), validation_row(20) | further])
    text = page(run)
    assert row(text.split("`सामान्य`:")[1], "cross-entropy of the answer")[1:4] == ["4.2500", "4.2500", "+0.0000"]
    assert row(text.split("`b/c`:")[1], "cross-entropy of the answer")[1] == "7.5000"
    shown = found(run)
    assert not any("val_" in title for title in shown)
    assert shown["cross-entropy"].points["सामान्य, answer"].values == [4.25, 4.25]
    assert shown["KD: KL to the teacher"].points["सामान्य"].values == [0.5, 0.5]


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ({}, "| KL(teacher, student) on the answer | 0.5 | temperature"),
        ({"kd_kind": "reverse"}, "| KL(student, teacher) on the answer | 0.5 |"),
        ({"kd_kind": "jsd", "kd_beta": 0.3}, "| generalised Jensen-Shannon divergence, beta 0.3 on the answer |"),
        ({"kd_kind": "skew", "kd_alpha": 0.2}, "| skew KL(teacher, 0.2 teacher + the rest student) on the answer |"),
        ({"on_policy": 0.25, "on_policy_temperature": 0.8}, "on-policy in 25% of the micro-batches: the student's own "
         "answers at temperature 0.8 |"),
    ],
)  # fmt: skip
def test_the_card_says_how_student_and_teacher_were_compared(trained: Path, loss: dict[str, Any], said: str) -> None:
    run = read_run(trained)
    names = ("kd_kind", "kd_beta", "kd_alpha", "on_policy", "on_policy_temperature")
    run.settings["loss"] = {name: value for name, value in run.settings["loss"].items() if name not in names} | loss
    assert said in model_card(run) and ("on-policy" in model_card(run)) == ("on_policy" in loss)


def test_the_card_names_a_stream(trained: Path) -> None:
    run = read_run(trained)
    run.settings["data"] = run.settings["data"] | {"train": None, "stream": "data/stream"}
    run.provenance["distilled"]["stream_sha256"] = "ab" * 32
    assert f"| training | `data/stream` | 12 | 0 | `{'ab' * 32}` |" in model_card(run)


def test_a_cut_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", over=False)
    path = run / "metrics.csv"
    whole, _ = read_metrics(path)
    path.write_bytes(path.read_bytes()[:-3])  # only a digit and the line break: what is left still reads as a number
    lines, broken = read_metrics(path)
    assert broken == 1 and lines == {step: values for step, values in whole.items() if step < 40}
    path.write_bytes(path.read_bytes() + b"\nx,\xff,\x00\n")
    assert read_metrics(path)[1] == 2
    assert "metrics.csv: 2 broken lines left out." in page(run)


def test_what_happened_on_the_way_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    events = [{"step": 3, "event": "spike"}, {"step": 5, "event": "skipped"}, {"step": 9, "event": "spike"}]
    (run / "events.jsonl").write_text("\n".join(map(json.dumps, events)), encoding="utf-8")
    assert "events.jsonl has the steps and records of: 2 spike, 1 skipped." in page(run)
    write_lines(run, training_rows(1, 5, expert_min_over_mean=0.25))
    shown = found(run)
    assert not any("expert_min" in title for title in shown)
    curves = shown["expert load / mean, worst layer"].curves
    assert (curves["busiest"].values[0], curves["idlest"].values[0]) == (1.5, 0.25)


def test_a_resumed_run_has_no_step_twice(tmp_path: Path) -> None:
    first = training_rows(1, 9, loss=9.0)
    again = [validation_row(6), *training_rows(7, 7, loss=1.0)]
    path = write_lines(tmp_path, [validation_row(0), *first, *again])
    lines, broken = read_metrics(path)
    assert list(lines) == [0, 1, 2, 3, 4, 5, 6, 7] and broken == 0
    assert lines[5]["loss"] == 9.0 and lines[7]["loss"] == 1.0
    assert "cka" not in lines[5]  # not a number
    # Two lines of one step, as training and validation write them, are one.
    lines, _ = read_metrics(write_lines(tmp_path, [*training_rows(1, 2), validation_row(2)]))
    assert {"loss", "val/answer_ce"} <= set(lines[2])


def found(run: Path) -> dict[str, Panel]:
    return {panel.title.split(" (")[0]: panel for panel in panels(read_run(run))}


def test_every_panel_has_something_in_it_and_nothing_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    shown = found(run)
    assert all(any(s.steps for s in (*panel.curves.values(), *panel.points.values())) for panel in shown.values())
    assert "weight of 1 − CKA" not in shown  # it is 0 throughout
    assert not shown["1 − CKA to the base"].curves  # all cells are NaN; the validations are there
    assert shown["1 − CKA to the base"].points["held-out, mean of layers"].values == pytest.approx([0, 0.3])
    assert shown["cross-entropy"].points["held-out answer"] == Series([0, 20], [2.51234, 2.31234])
    assert shown["loss"].curves[""].values == [3 / step for step in range(1, 41)]
    assert shown["gradient norm"].level == (1.5, "clip")
    rows = training_rows(1, 5, kd=0.0, z_loss=0.5, share_0=0.2, share_1=0.8, grad_norm_router=0.1)
    write_lines(run, rows)
    shown = found(run)
    assert "KD: KL to the teacher" not in shown and "1 − CKA to the base" not in shown
    assert set(shown["gradient norm"].curves) == {"all", "router"}
    assert shown["z_loss"].curves[""].values == [0.5] * 5
    assert {label: series.values[0] for label, series in shown["share"].curves.items()} == {"0": 0.2, "1": 0.8}


def test_the_smoothed_curve_is_the_mean_around_each_point() -> None:
    values = np.random.default_rng(0).normal(size=200)
    mean = smoothed(Series(list(range(200)), values.tolist()))
    reference = np.convolve(values, np.ones(21) / 21, mode="valid")
    inner = [value for step, value in zip(mean.steps, mean.values, strict=True) if 10 <= step < 190]
    np.testing.assert_allclose(inner, reference, atol=1e-12)
    line = Series(list(range(0, 5 * SMOOTHED_FROM, 5)), [2.0 * step for step in range(SMOOTHED_FROM)])
    assert (
        dict(zip(line.steps, line.values, strict=True)).items()
        >= {
            step: pytest.approx(value) for step, value in zip(smoothed(line).steps, smoothed(line).values, strict=True)
        }.items()
    )


def test_an_expert_below_a_tenth_of_an_equal_share_is_dead(tmp_path: Path) -> None:
    assert dead_experts(validation(0)["expert_load"]) == {"1": [3]}
    text = page(make_run(tmp_path / "run"))
    assert re.search(r"^\| 1 \|.*\| 3 \| 2\.00 \| 0\.876 \| 3 \|$", text, re.MULTILINE)
    assert re.search(r"^\| 0 \|.*\| none \|$", text, re.MULTILINE)


def test_the_pictures_show_the_data(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before, even = validation(0), {"expert_load": {"0": [0.25] * 4, "1": [0.25] * 4}}
    for name, after in (("a", validation(40)), ("b", even), ("same", validation(40))):
        assert draw_router(before, after, tmp_path / f"router_{name}.png")
    for name, cka in (("a", {"1": 0.9, "3": 0.7}), ("b", {"1": 0.9, "3": -0.1}), ("same", {"1": 0.9, "3": 0.7})):
        assert draw_cka(before["cka"], cka, read_run(run), tmp_path / f"cka_{name}.png")
    for name, loss in (("a", 0.5), ("b", 0.6), ("same", 0.5)):
        write_lines(run, [{"step": step, "loss": loss / step} for step in range(1, 41)])
        assert draw_curves(read_run(run), tmp_path / f"curves_{name}.png")
    for kind in ("router", "cka", "curves"):
        a, b, same = ((tmp_path / f"{kind}_{name}.png").read_bytes() for name in ("a", "b", "same"))
        assert a.startswith(b"\x89PNG") and a == same and a != b


def test_hindi_comes_through_to_the_last_sign(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", over=False)
    samples = [
        {"step": 20, "question": "पुराना"},
        {"step": 40, "id": 3, "question": HINDI, "reply": f"{HINDI}\n```\n\n"},
    ]
    lines = [json.dumps(sample, ensure_ascii=False) for sample in samples]
    (run / "samples.jsonl").write_text("\n".join([*lines, lines[0][:12]]), encoding="utf-8")
    text = page(run)
    assert f"\n```\n{HINDI}\n```\n" in text.replace("```text", "```") and f"````text\n{HINDI}\n```\n\n\n````" in text
    assert "आँकड़े/train.jsonl" in text and "पुराना" not in text and "1 of step 40" in text


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda run: shutil.rmtree(run), "is no run: it is no directory"),
        (lambda run: (run / "hyperparameters.yaml").unlink(), "is no run: it holds no hyperparameters.yaml"),
        (lambda run: (run / "hyperparameters.yaml").write_text("- 1\n"), "should hold a mapping, found list"),
        (lambda run: (run / "hyperparameters.yaml").write_text("{a: ["), "hyperparameters.yaml cannot be parsed"),
        (lambda run: (run / "report" / "metrics.json").write_text('{"a'), "metrics.json cannot be parsed"),
        (lambda run: write_exam(run / "exam.json", {"scores": {}}), "is no exam.json of scripts/examine.py"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, complaint: str
) -> None:
    run = make_run(tmp_path / "run")
    spoil(run)
    before = sorted(run.rglob("*")) if run.exists() else []
    with pytest.raises(SystemExit) as exit_:
        run_cli(report_run, args=[f"--out_dir={run}"])
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and complaint in said and said.count("\n") == 1
    assert (sorted(run.rglob("*")) if run.exists() else []) == before


def test_an_exam_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        write_report(make_run(tmp_path / "run"), exam=tmp_path / "nowhere.json")


def test_the_command_prints_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.csv").unlink()
    run_cli(report_run, args=["--out_dir", str(run)])
    printed = [Path(line) for line in capsys.readouterr().out.split()]
    assert [path.name for path in printed] == ["cka_layers.png", "router.png", "README.md"]
    assert all(path.is_file() for path in printed)
