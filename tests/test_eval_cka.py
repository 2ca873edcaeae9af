"""`eval_cka.py`: step-0 equality, a planted change, what it writes, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from eval_cka import compare, shared_tokenizer
from litgpt.chat import Span
from litgpt.checkpoint import load_model
from litgpt.data import PackedLoader, read_records
from litgpt.utils import UserError
from tests.world import World, make_model, make_world

ROOT = Path(__file__).parents[1]
ALL = {Span.PROMPT, Span.THOUGHT, Span.ANSWER}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), layers=3)


def _loader(world: World) -> PackedLoader:
    model_a, model_b = load_model(world.base), load_model(world.student)
    tokenizer = shared_tokenizer(world.base, model_a, world.student, model_b)
    return PackedLoader(read_records(world.val), tokenizer, max_seq_length=512, micro_batch_size=2, shuffle=False)


def _eval(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "eval_cka.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_an_upcycled_model_is_its_base_in_every_layer(world: World) -> None:
    loader = _loader(world)
    model_a, model_b = load_model(world.base), load_model(world.student)
    shared_tokenizer(world.base, model_a, world.student, model_b)
    report = compare(model_a, model_b, loader, keep_spans=ALL, map_rows=200)
    assert report.values == pytest.approx([1.0, 1.0, 1.0], abs=1e-6)
    assert np.diag(report.map_AB) == pytest.approx(1.0, abs=1e-5)
    assert report.dropped_first == len(loader.records)


def test_a_change_planted_in_one_layer_shows_from_there_on_and_not_before(world: World) -> None:
    loader = _loader(world)
    model_a, model_b = load_model(world.base), load_model(world.student)
    shared_tokenizer(world.base, model_a, world.student, model_b)
    torch.manual_seed(0)
    with torch.no_grad():
        changed = dict(model_b.named_parameters())["transformer.h.1.mlp.experts.down_proj"]
        changed.copy_(torch.randn_like(changed))
    report = compare(model_a, model_b, loader, keep_spans=ALL, map_rows=200)
    assert report.values[0] == pytest.approx(1.0, abs=1e-6)
    assert report.values[1] < 0.9
    assert report.values[2] < 0.9


def test_spans_choose_the_rows(world: World) -> None:
    loader = _loader(world)
    model = load_model(world.student)
    rows = {
        span: compare(model, model, loader, keep_spans={span}, map_rows=50).rows
        for span in (Span.PROMPT, Span.THOUGHT, Span.ANSWER)
    }
    total = compare(model, model, loader, keep_spans=ALL, map_rows=50).rows
    assert sum(rows.values()) == total
    assert all(rows.values())
    with pytest.raises(UserError, match="0 tokens in the spans"):
        compare(model, model, loader, keep_spans=set(), map_rows=50)


def test_models_of_other_depth_and_width_compare(world: World, tmp_path: Path) -> None:
    out = tmp_path / "cka"
    names = ("--checkpoint_a", str(world.base), "--checkpoint_b", str(world.teacher), "--data", str(world.val))
    result = _eval(tmp_path, *names, "--out_dir", str(out), "--max_seq_length", "512", "--spans", "[answer]")
    assert result.returncode == 0, result.stderr
    report = json.loads((out / "cka.json").read_text())
    assert [layer["b"] for layer in report["layers"]] == [0, 2, 3]
    assert np.array(report["map"]).shape == (3, 4)
    assert report["settings"]["spans"] == ["answer"]
    assert (out / "cka.png").read_bytes().startswith(b"\x89PNG")
    assert "CKA" in result.stdout


def test_without_arguments_it_takes_the_last_run_and_says_so(world: World, tmp_path: Path) -> None:
    run = tmp_path / "out" / "mine"
    run.mkdir(parents=True)
    (run / "final").symlink_to(world.student)
    settings = {"base": str(world.base), "data": {"val": str(world.val)}}
    (run / "hyperparameters.yaml").write_text(yaml.safe_dump(settings))
    result = _eval(tmp_path)
    assert result.returncode == 0, result.stderr
    assert "last run, out/mine" in result.stdout
    assert json.loads((run / "report" / "cka.json").read_text())["mean"] == pytest.approx(1.0, abs=1e-6)


def test_what_it_refuses_is_one_line_and_exit_code_2(world: World, tmp_path: Path) -> None:
    other = make_model(tmp_path / "Other", world.base, n_embd=32, n_layer=1, seed=5)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    common = ("--data", str(world.val), "--checkpoint_a", str(world.base))
    cases = {
        (): "no finished run in out/",
        (*common, "--checkpoint_b", "no/such/dir"): "does not exist",
        (*common, "--checkpoint_b", str(other)): "different vocabularies",
        (*common, "--checkpoint_b", str(world.teacher), "--max_seq_length", "3"): "fits into 3 tokens",
    }
    for arguments, message in cases.items():
        result = _eval(tmp_path, *arguments)
        assert result.returncode == 2, result.stderr
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_damaged_weights_are_named(world: World) -> None:
    model_a, model_b = load_model(world.base), load_model(world.student)
    loader = _loader(world)
    with torch.no_grad():
        dict(model_b.named_parameters())["transformer.h.1.norm_1.weight"].fill_(float("nan"))
    with pytest.raises(UserError, match="layer 1"):
        compare(model_a, model_b, loader, keep_spans=ALL, map_rows=50)
