"""scripts/inspect_routing.py: every number against counting by hand; the page; what is refused."""

from __future__ import annotations

import html.parser
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from litgpt.chat import Span
from litgpt.checkpoint import load_model, load_state, read_provenance, save_lit_dir
from litgpt.config import Config
from litgpt.data import PackedLoader, read_records
from litgpt.expertweights import expert_cosines
from litgpt.model import Routing
from litgpt.routing import Choices, RouterStats, routing_change
from litgpt.routingmaps import RoutingMap, mutual_information, script_of, scripts_of
from litgpt.routingplots import pyplot
from litgpt.stored import Stored
from litgpt.tokenizer import Tokenizer
from litgpt.upcycle import upcycle
from litgpt.utils import run_cli
from scripts.inspect_routing import main
from tests.test_routing import cut, logits_of, routing_of
from tests.world import World, make_world

ROOT = Path(__file__).resolve().parents[1]
E, K = 4, 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student with other routers and experts, as training leaves it."""
    out = tmp_path_factory.mktemp("trained") / "final"
    state = load_state(world.student)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in state.items():
        if ".mlp." in name:
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
            state[name] = tensor + (noise * (3 if ".gate." in name else 0.3)).to(tensor.dtype)
    config = Config.from_checkpoint(world.student)
    save_lit_dir(out, state, config, source_dir=world.student, provenance=read_provenance(world.student))
    return out


@pytest.fixture(scope="module")
def data(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training dialogues with crops and kinds."""
    path = tmp_path_factory.mktemp("data") / "with_meta.jsonl"
    lines = []
    for i, line in enumerate(world.train.read_text(encoding="utf-8").splitlines()):
        record = json.loads(line) | {"meta": {"crop": ("wheat", "mustard", "chilli")[i % 3], "kind": "ab"[i % 2]}}
        lines.append(json.dumps(record, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def inspected(world: World, trained: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inspected")
    words = ["--checkpoint_dir", trained, "--data", data, "--base", world.base, "--first", world.student]
    run_cli(main, args=[*map(str, words), "--out_dir", str(out), "--max_seq_length", "512"])
    return out


def result_of(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "routing.json").read_text(encoding="utf-8"))
    return values


def by_hand(checkpoint: Path, data: Path) -> list[tuple[int, int, Tensor, Tensor, str, str]]:
    """(record, token, ids [L, K], logits [L, E], crop, span) of each token, one record at a time in float64."""
    model, tokenizer = load_model(checkpoint, dtype=torch.float64), Tokenizer(checkpoint)
    loader = PackedLoader(read_records(data), tokenizer, max_seq_length=512, micro_batch_size=1, shuffle=False)
    found = []
    for number, (record, document) in enumerate(zip(loader.records, loader.documents, strict=True)):
        with torch.no_grad():
            routing = model(document.ids_T.long()[None]).routing
        for t, span in enumerate(document.spans_T.tolist()):
            ids = torch.stack([routed.expert_ids_NK[t] for routed in routing.values()])
            scores = torch.stack([routed.logits_NE[t] for routed in routing.values()])
            found.append((number, t, ids, scores, record.meta["crop"], Span(span).name.lower()))
    return found


def test_layers_are_what_counting_says(inspected: Path, trained: Path, data: Path) -> None:
    result, tokens = result_of(inspected), by_hand(trained, data)
    assert result["tokens"] == len(tokens)
    for row, layer in enumerate(result["layers"]):
        chosen = torch.stack([ids[row] for _, _, ids, _, _, _ in tokens])
        scores = torch.stack([logits[row] for _, _, _, logits, _, _ in tokens])
        load = chosen.flatten().bincount(minlength=E).double()
        p = scores.softmax(-1)
        assert layer["load"] == pytest.approx((load / load.sum()).tolist(), abs=1e-3)
        assert layer["max_vio"] == pytest.approx(float(load.max() / load.mean()) - 1, abs=5e-3)
        assert layer["max_vio_batch"] >= layer["max_vio"] - 1e-9
        entropy = -(p * p.log()).sum(-1).mean() / math.log(E)
        assert layer["entropy"] == pytest.approx(float(entropy), abs=1e-4)
        mean_p = p.mean(0)
        assert layer["entropy_of_mean"] == pytest.approx(float(-(mean_p * mean_p.log()).sum() / math.log(E)), abs=1e-4)
        assert layer["z"] == pytest.approx(float(scores.logsumexp(-1).square().mean()), rel=1e-3)
        top = p.topk(K).values
        assert layer["top1_weight"] == pytest.approx(float((top[:, 0] / top.sum(1)).mean()), abs=1e-4)
        together = sum(((chosen == i).any(1) & (chosen == j).any(1)).double().mean() for i, j in [(0, 1)])
        assert layer["together"][0][1] == layer["together"][1][0] == pytest.approx(float(together), abs=1e-3)
        assert sum(layer["together"][e][e] for e in range(E)) == pytest.approx(K)


@pytest.mark.parametrize(("kind", "column"), [("crop", 4), ("span", 5)])
def test_maps_are_what_counting_says(inspected: Path, trained: Path, data: Path, kind: str, column: int) -> None:
    found, tokens = result_of(inspected)["maps"][kind], by_hand(trained, data)
    for g, group in enumerate(found["groups"]):
        own = [token for token in tokens if token[column] == group]
        assert found["tokens"][g] == len(own)
        for row in range(2):
            expected = torch.stack([ids[row] for _, _, ids, *_ in own]).flatten().bincount(minlength=E)
            # float32 there and float64 here: a token between two experts may go either way.
            assert torch.tensor(found["counts"][row][g]).sub(expected).abs().max() <= 2
    assert sum(found["tokens"]) == len(tokens)
    if kind == "crop":
        assert found["labels"][found["groups"].index("mustard")].startswith("सरसों")


def test_change_and_cosines(inspected: Path, world: World, trained: Path, data: Path) -> None:
    result = result_of(inspected)
    now, then = (by_hand(path, data) for path in (trained, world.student))
    for row, layer in enumerate(result["layers"]):
        moved = [set(a[2][row].tolist()) != set(b[2][row].tolist()) for a, b in zip(now, then, strict=True)]
        assert layer["changed"] == pytest.approx(sum(moved) / len(moved), abs=0.02) and layer["changed"] > 0.1
        state, base = load_state(trained), load_state(world.base)
        place = f"transformer.h.{row}.mlp"
        vectors = [
            torch.cat(
                (state[f"{place}.experts.gate_up_proj"][e].flatten(), state[f"{place}.experts.down_proj"][e].flatten())
            )
            for e in range(E)
        ]
        dense = torch.cat([base[f"{place}.{name}.weight"].flatten() for name in ("fc_1", "fc_2", "proj")])
        cosine = torch.nn.functional.cosine_similarity
        assert layer["expert_cosines"][0][2] == pytest.approx(float(cosine(vectors[0], vectors[2], dim=0)), abs=1e-5)
        assert layer["base_cosines"][3] == pytest.approx(float(cosine(vectors[3], dense, dim=0)), abs=1e-5)
    fresh = expert_cosines(Stored(world.student), Stored(world.base))
    assert all(value == pytest.approx(1.0) for layer in fresh for value in (layer.mean, *(layer.base_E or ())))


def test_the_page_holds_everything_and_fetches_nothing(inspected: Path) -> None:
    page = (inspected / "routing.html").read_text(encoding="utf-8")
    tags: list[tuple[str, dict[str, str | None]]] = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append((tag, dict(attrs)))

    Reader().feed(page)
    pictures = [attributes["src"] or "" for tag, attributes in tags if tag == "img"]
    assert len(pictures) == len(list(inspected.glob("*.png"))) == 7
    assert all(source.startswith("data:image/png;base64,") for source in pictures)
    assert "http" not in page.replace("http-equiv", "") and "सरसों" in page
    assert not [tag for tag, attributes in tags if tag in ("script", "link", "iframe")]


def test_texts_without_meta_and_one_expert_a_token(world: World, tmp_path: Path) -> None:
    made = upcycle(world.base, tmp_path / "one", n_expert=3, n_expert_per_token=1, layers="1").out_dir
    (tmp_path / "texts.jsonl").write_text('{"text": "खेत में पानी है। The field is wet."}\n' * 3, encoding="utf-8")
    run_cli(main, args=["--checkpoint_dir", str(made), "--data", str(tmp_path / "texts.jsonl")])
    result = result_of(tmp_path / "routing")
    assert result["missing"] == ["crop", "kind"] and set(result["maps"]) == {"span", "script"}
    (layer,) = result["layers"]
    assert layer["layer"] == 1 and layer["crop_bits"] is None and layer["changed"] is None
    assert all(layer["together"][i][j] == 0 for i in range(3) for j in range(3) if i != j)
    scripts = dict(zip(result["maps"]["script"]["groups"], result["maps"]["script"]["tokens"], strict=True))
    assert scripts["Devanagari"] > 0 and scripts["Latin"] > 0


def test_refusals_are_one_line(world: World, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    for words, message in (
        (["--checkpoint_dir", world.base, "--data", data], "is dense"),
        (["--checkpoint_dir", world.student, "--data", tmp_path / "nowhere.jsonl"], "nowhere.jsonl"),
        (["--checkpoint_dir", world.student, "--data", tmp_path / "empty.jsonl"], "empty.jsonl"),
        (["--checkpoint_dir", tmp_path / "nowhere", "--data", data], "does not exist"),
        (["--checkpoint_dir", world.student, "--data", data, "--base", tmp_path / "no"], "does not exist"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_cli(main, args=list(map(str, words)))
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and message in error and error.count("\n") == 1
    assert subprocess.run([sys.executable, str(ROOT / "scripts" / "inspect_routing.py"), "--help"]).returncode == 0


class TestParts:
    def test_scripts_of_split_characters(self, world: World) -> None:
        tokenizer = Tokenizer(world.student)
        text = "किसान wheat 7 क्षत्रिय!"
        ids = tokenizer.encode(text)
        scripts = scripts_of(ids, tokenizer)
        # Every byte of every token belongs to a character of the text.
        at, expected = 0, []
        owner = [script_of(c) for c in text for _ in c.encode()]
        for index in ids:
            piece = owner[at : at + len(tokenizer.token_bytes(index))]
            at += len(piece)
            expected.append(next((s for s in piece if s != 2), 2))
        assert at == len(text.encode()) and scripts == expected and {0, 1} <= set(scripts)
        assert scripts_of(ids[:1] + list(tokenizer.thought_ids or ()), tokenizer)[1:] == [2, 2]
        # Cut in the middle of a character: what is left of it is no letter.
        assert len(scripts_of(ids[1:], tokenizer)) == len(ids) - 1

    def test_script_of(self) -> None:
        assert [script_of(c) for c in "कZéœ7।×ा "] == [0, 1, 1, 1, 2, 0, 2, 0, 2]

    def test_information(self) -> None:
        assert mutual_information(torch.eye(4).double() * 5) == pytest.approx(2.0)
        assert mutual_information(torch.ones(3, 5).double()) == pytest.approx(0.0, abs=1e-12)
        assert mutual_information(torch.zeros(2, 2).double()) == 0.0
        table = torch.tensor([[8.0, 2], [1, 9]], dtype=torch.float64)
        p, rows, columns = table / 20, table.sum(1) / 20, table.sum(0) / 20
        by_hand = sum(float(p[i, j] * torch.log2(p[i, j] / rows[i] / columns[j])) for i in range(2) for j in range(2))
        assert mutual_information(table) == pytest.approx(by_hand)

    def test_a_map_leaves_padding_out(self) -> None:
        routing = routing_of(logits_of(2, 20, E))
        group = torch.arange(20) % 3 - 1
        found = RoutingMap("x", ("a", "b"))
        for rows in (slice(0, 9), slice(9, 20)):
            found.update(cut(routing, rows), group[rows])
        assert found.counts_LGE is not None
        for g in range(2):
            expected = routing[1].expert_ids_NK[group == g].flatten().bincount(minlength=E)
            assert found.counts_LGE[1, g].tolist() == expected.tolist()
        assert found.tokens() == [int((group == g).sum()) for g in range(2)]

    def test_statistics_add_up_over_halves(self) -> None:
        routing, keep = routing_of(logits_of(2, 40, E)), torch.arange(40) % 5 != 2
        halves = [RouterStats(), RouterStats()]
        for stats, rows in zip(halves, (slice(0, 15), slice(15, 40)), strict=True):
            stats.update(cut(routing, rows), keep[rows])
        both = RouterStats()
        for rows in (slice(0, 15), slice(15, 40)):
            both.update(cut(routing, rows), keep[rows])
        assert torch.allclose(halves[0].sums_LX + halves[1].sums_LX, both.sums_LX)
        vios = [half.results()[0].max_vio for half in halves]
        assert both.results()[0].max_vio_batch == pytest.approx(sum(vios) / 2)

    def test_dead_and_cold_experts(self) -> None:
        ids = torch.zeros(1000, 1).long()
        ids[:300] = 1
        ids[:20] = 2
        stats = RouterStats()
        stats.update({0: Routing(ids, torch.ones(1000, 1), torch.zeros(1000, E))})
        (result,) = stats.results()
        assert (result.idle, result.cold) == (1, 2) and result.max_vio == pytest.approx(1.8)

    def test_change_of_choices(self) -> None:
        routing = routing_of(logits_of(1, 30, E))
        choices = [Choices(most=20), Choices(most=20)]
        keep = torch.arange(30) != 4
        swapped = {0: routing[0]._replace(expert_ids_NK=routing[0].expert_ids_NK.flip(1))}
        choices[0].update(routing, keep)
        for rows in (slice(0, 11), slice(11, 30)):
            choices[1].update(cut(swapped, rows), keep[rows])
        a, b = (own.result() for own in choices)
        assert a[0].shape == (20, K)
        change = routing_change(a, b)[0]
        assert (change.any, change.top1) == (0.0, 1.0)
        with pytest.raises(ValueError, match="not of the same"):
            routing_change(a, {0: b[0][:5]})

    def test_devanagari_is_shaped(self) -> None:
        """A conjunct is one cluster: narrower than its letters apart, and drawn by the font that has it."""
        plt = pyplot()
        figure = plt.figure()
        renderer = figure.canvas.get_renderer()

        def width(text: str) -> float:
            return float(figure.text(0, 0, text, fontsize=40).get_window_extent(renderer).width)

        # क् + ष becomes one glyph; a joiner between them keeps the letters apart.
        assert 0 < width("क्ष") < 0.8 * width("क्\u200cष")
        assert width("कि") > width("क")
        plt.close(figure)
