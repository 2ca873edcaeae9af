"""`eval_cka.py`: step-0 equality, a planted change, what it writes, and what it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import eval_cka
from eval_cka import Reading, shared_tokenizer
from litgpt.chat import Span
from litgpt.cka import corresponding
from litgpt.ckaeval import SITES, Comparison, Found
from litgpt.model import GPT
from litgpt.stored import load_stored
from litgpt.utils import UserError
from scripts.convert_lit_checkpoint import convert
from tests.world import World, make_model, make_world

ROOT = Path(__file__).parents[1]
ALL = {Span.PROMPT, Span.THOUGHT, Span.ANSWER}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), layers=3)


def _load(*directories: Path) -> tuple[dict[str, GPT], Any]:
    named = dict(zip("abc", directories, strict=False))
    models = {name: load_stored(directory, torch.float32) for name, directory in named.items()}
    return models, shared_tokenizer(named, models)


def _read(world: World, models: dict[str, GPT], tokenizer: Any, **settings: Any) -> Comparison:
    chosen: dict[str, Any] = {"spans": ALL, "max_seq_length": 512, "micro_batch_size": 2, "map_rows": 200}
    reading = Reading(world.val, **(chosen | settings))
    return reading.compare(models, [("a", "b")], tokenizer)


def _values(found: list[Found], site: str, expert: int = -1) -> list[float]:
    return [f.cka for f in found if (f.pair.place_b.site, f.pair.place_b.expert) == (site, expert)]


def _eval(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "eval_cka.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_an_upcycled_model_is_its_base_in_every_layer_site_and_expert(world: World) -> None:
    models, tokenizer = _load(world.base, world.student)
    seen = _read(world, models, tokenizer, sites=("block", "attention", "mlp"), experts=True)
    found = seen.found()
    assert len(found) == 3 * 3 + 3 * 4
    for each in found:
        assert each.cka == pytest.approx(1.0, abs=1e-6) and each.likeness == pytest.approx((0, 1, 0), abs=1e-5)
        if each.spread is not None:
            assert (each.spread.low, each.spread.high) == pytest.approx((1, 1), abs=1e-5)
    for site in SITES:
        assert np.diag(seen.map("a", "b", site)) == pytest.approx(1.0, abs=1e-5)
    assert seen.dropped.first == 4 and seen.dropped.outliers == 0


def test_a_change_planted_in_one_layer_shows_from_there_on_and_not_before(world: World) -> None:
    models, tokenizer = _load(world.base, world.student)
    torch.manual_seed(0)
    changed = dict(models["b"].named_parameters())["transformer.h.1.mlp.experts.down_proj"]
    changed[2] = torch.randn_like(changed[2])
    found = _read(world, models, tokenizer, sites=("block", "attention", "mlp"), experts=True).found()
    for site, first in (("block", 1), ("attention", 2), ("mlp", 1)):
        values = _values(found, site)
        assert values[:first] == pytest.approx([1.0] * first, abs=1e-6)
        assert all(value < 0.95 for value in values[first:]), (site, values)
    assert _values(found, "mlp", expert=2)[1] < 0.7
    assert _values(found, "mlp", expert=1)[:2] == pytest.approx([1.0, 1.0], abs=1e-6)


def test_spans_choose_the_rows(world: World) -> None:
    models, tokenizer = _load(world.student, world.student)
    rows = {span: _read(world, models, tokenizer, spans={span}).rows for span in ALL}
    assert sum(rows.values()) == _read(world, models, tokenizer).rows
    assert all(rows.values())
    with pytest.raises(UserError, match="0 tokens in the spans"):
        _read(world, models, tokenizer, spans=set()).found()


def test_an_outlying_row_in_every_dialogue_fools_only_who_keeps_it(world: World) -> None:
    """Unrelated networks, and one token that blows up in both, as massive activations do behind position 0."""
    other = make_model(world.base.parent / "Other", world.base, n_embd=32, n_layer=3, seed=9)
    models, tokenizer = _load(world.base, other)
    batch = next(iter(_loader(world, tokenizer)))
    ids, counts = batch.ids_BT[batch.documents_BT >= 0].unique(return_counts=True)
    sink = int(ids[(counts >= 4).nonzero()[0, 0]])
    for column, model in enumerate(models.values()):
        model.transformer.wte.weight[sink, column] = 1e4
    kept = _read(world, models, tokenizer, outlier_factor=float("inf"))
    dropped = _read(world, models, tokenizer)
    assert dropped.dropped.outliers > 0 and kept.dropped.outliers == 0
    assert kept.found()[0].cka > 0.99
    assert dropped.found()[0].cka < 0.8


def _loader(world: World, tokenizer: Any) -> Any:
    from litgpt.data import PackedLoader, read_records

    return PackedLoader(read_records(world.val), tokenizer, max_seq_length=512, micro_batch_size=4, shuffle=False)


def test_a_hugging_face_directory_is_read_as_the_lit_one(world: World, tmp_path: Path) -> None:
    for name in ("base", "student"):
        convert(getattr(world, name), tmp_path / name)
    values = []
    for directories in ((world.base, world.student), (tmp_path / "base", tmp_path / "student")):
        models, tokenizer = _load(*directories)
        dict(models["b"].named_parameters())["transformer.h.1.attn.proj.weight"].mul_(1.5)
        values.append(_values(_read(world, models, tokenizer).found(), "block"))
    assert values[0] == values[1] and values[0][1] < 1


def test_an_interrupted_comparison_goes_on_to_the_same_figures(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models, tokenizer = _load(world.base, world.teacher)
    reading = Reading(world.train, spans=ALL, max_seq_length=512, micro_batch_size=1, map_rows=100)
    versus, partial = [("a", "b")], tmp_path / "cka.partial.pt"
    whole = reading.compare(models, versus, tokenizer)
    assert whole.batches >= 3
    monkeypatch.setattr(eval_cka, "SAVE_SECONDS", 0.0)
    update, calls = Comparison.update, []

    def dies(self: Comparison, batch: Any) -> None:
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        update(self, batch)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Comparison, "update", dies)
        reading.compare(models, versus, tokenizer, partial=partial, key="k")
    again = reading.compare(models, versus, tokenizer, partial=partial, key="k")
    assert "going on after 2 batches" in capsys.readouterr().out
    assert [f.plain() for f in again.found()] == [f.plain() for f in whole.found()]
    assert again.dropped == whole.dropped and again.rows == whole.rows
    # Of other settings, or broken: from the start.
    reading.compare(models, versus, tokenizer, partial=partial, key="other")
    partial.write_bytes(b"no")
    reading.compare(models, versus, tokenizer, partial=partial, key="k")
    said = capsys.readouterr().out
    assert "going on" not in said and "is broken and not used" in said


def test_the_sample_is_of_all_the_data(world: World) -> None:
    models, tokenizer = _load(world.student, world.student)
    reading = Reading(world.train, spans=ALL, max_seq_length=512, micro_batch_size=1, map_rows=60)
    seen = reading.compare(models, [("a", "b")], tokenizer)
    assert seen.batches >= 3 and seen.rows > 10 * 60
    x_NLD, sequences = seen.sample("a", "block")
    assert x_NLD.shape == (60, 3, 32) and len(sequences) == 60 and len(sequences.unique()) >= 10


def test_max_tokens_and_layers(world: World) -> None:
    models, tokenizer = _load(world.base, world.student)
    few = _read(world, models, tokenizer, max_tokens=10, micro_batch_size=1, layers=[0, 2])
    assert few.batches == 1 and [f.pair.place_a.layer for f in few.found()] == [0, 2]
    assert corresponding(28, 40)[::27] == [(0, 0), (27, 39)] and corresponding(1, 3) == [(0, 0)]


def test_three_checkpoints_and_a_series_on_one_page(world: World, tmp_path: Path) -> None:
    """The student has thought tags, the wider teacher has no rows for them."""
    out = tmp_path / "out"
    arguments = ("--checkpoint_a", world.base, "--checkpoint_b", world.student, "--checkpoint_c", world.teacher)
    more = ("--data", world.val, "--out_dir", out, "--series", f"[{world.student}]", "--experts", "true")
    result = _eval(tmp_path, *map(str, (*arguments, *more)), "--sites", "[block, mlp]")
    assert result.returncode == 0, result.stderr
    report = json.loads((out / "cka.json").read_text())
    kinds = [(entry["a"], entry["b"], entry["site"]) for entry in report["comparisons"]]
    expected = [(a, b, site) for a, b in ("ab", "cb", "ac") for site in ("block", "mlp", "expert")]
    assert kinds == [kind for kind in expected if kind != ("a", "c", "expert")]
    assert [layer["cka"] for layer in report["series"][0]["layers"]] == pytest.approx([1, 1, 1], abs=1e-6)
    page = (out / "cka.html").read_text()
    assert page.count("<img") == len(kinds) + 1 and not re.search(r"(src|href)=.http", page)
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert len(pictures) == len(kinds) + 1 and all((out / name).stat().st_size > 5000 for name in pictures)
    assert not list(out.glob("*.pt"))
    assert "c and b, block" in result.stdout and "95 % interval" in result.stdout


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
        (*common, "--checkpoint_b", str(world.student), "--layers", "0,3"): "numbers below 3",
        (*common, "--checkpoint_b", str(world.student), "--sites", "[]"): "at least one of sites",
        (*common, "--checkpoint_b", str(other)): "different vocabularies",
        (*common, "--checkpoint_b", str(world.teacher), "--max_seq_length", "3"): "fits into 3 tokens",
    }
    for arguments, message in cases.items():
        result = _eval(tmp_path, *arguments)
        assert result.returncode == 2, result.stderr
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_damaged_weights_are_named(world: World) -> None:
    models, tokenizer = _load(world.base, world.student)
    dict(models["b"].named_parameters())["transformer.h.1.norm_1.weight"].fill_(float("nan"))
    with pytest.raises(UserError, match=r"layer 1 \(block\) of b are not finite"):
        _read(world, models, tokenizer)
