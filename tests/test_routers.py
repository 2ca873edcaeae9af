"""Fresh routers: they read what the model computes, clusters are found and even, and what cannot be is refused."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch import Tensor
from torch.nn import functional as F

from litgpt.chat import render
from litgpt.checkpoint import load_model, save_lit_dir
from litgpt.model import GPT, Block
from litgpt.recipes import seeded
from litgpt.routers import (
    ROW_TOKENS,
    RouterStart,
    balanced_rows,
    group_rows,
    hidden_states,
    router_weights,
)
from litgpt.stored import Stored
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError
from tests.test_upcycle import build_dense, tiny_config
from tests.tiny_models import build_hf_dir, stored_tensors

TINY_BASE = Path(__file__).parent.parent / "data" / "tiny" / "base"
CONFIGS = TINY_BASE.parent.parent.parent / "configs"
TEXTS = [
    "धान की नर्सरी में पानी निकलने का रास्ता बना लें।",
    "Wait two days before you spray.",
    "गेहूँ के पत्ते पीले पड़ रहे हैं। क्या करें?",
    "मिट्टी का pH 7.8 है, इसलिए zinc sulphate केंद्र से पूछकर डालें।",
]
DIALOGUE = [{"role": "user", "content": "आम में फूल कब?"}, {"role": "assistant", "content": "माघ में।", "thought": "आम"}]


def lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def prompts(path: Path, groups: Any) -> Path:
    path.write_text(yaml.safe_dump(groups, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def dense_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_dense(tmp_path_factory.mktemp("routers") / "dense")


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records: list[dict[str, Any]] = [{"text": text} for text in TEXTS]
    return lines(tmp_path_factory.mktemp("data") / "c.jsonl", [*records, {"id": "d", "messages": DIALOGUE}])


def weights(start: RouterStart, directory: Path, n_expert: int = 3, seed: int = 7) -> dict[int, Tensor]:
    dense = Stored(directory)
    layers = range(dense.config.n_layer)
    return router_weights(start, dense, Tokenizer(directory), n_expert=n_expert, layers=layers, seed=seed)


def load_of(rows_ED: Tensor, h_ND: Tensor) -> Tensor:
    """How many times its share each expert is the first choice."""
    counts_E = torch.bincount((h_ND @ rows_ED.T).argmax(dim=1), minlength=len(rows_ED))
    return counts_E * len(rows_ED) / len(h_ND)


def test_hidden_states_are_what_the_mlp_reads(dense_dir: Path) -> None:
    tokenizer = Tokenizer(dense_dir)
    documents = [tokenizer.encode(text)[: 5 + 13 * i] for i, text in enumerate(TEXTS)] + [[3], [7, 8, 9, 7, 8]]
    # Rows are 64 wide: the last documents go into the first row, out of their order.
    model = load_model(dense_dir, dtype=torch.float32)
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    for i, block in enumerate(model.transformer.h):
        assert isinstance(block, Block)
        block.norm_2.register_forward_hook(lambda _, args, out, i=i: seen[i].append(out[0, 1:]))
    with torch.no_grad():
        for ids in documents:
            model(torch.tensor([ids]))
    found = dict(hidden_states(Stored(dense_dir), documents, [0, 1]))
    assert found.keys() == seen.keys()
    for i in found:
        torch.testing.assert_close(found[i], torch.cat(seen[i]), rtol=1e-4, atol=1e-5)
    # One layer alone is the same.
    ((layer, alone),) = hidden_states(Stored(dense_dir), documents, [1])
    assert layer == 1 and torch.equal(alone, found[1])


def test_hidden_states_of_a_hugging_face_dir_are_those_of_transformers(tmp_path: Path) -> None:
    build_hf_dir(tmp_path / "hf", "qwen3", dtype=torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = Tokenizer(tmp_path / "hf").encode(TEXTS[0])[:40]
    seen: list[Tensor] = []
    norm = model.model.layers[2].post_attention_layernorm
    norm.register_forward_hook(lambda _, args, out: seen.append(out[0, 1:]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    ((_, found),) = hidden_states(Stored(tmp_path / "hf"), [ids], [2])
    torch.testing.assert_close(found, seen[0], rtol=1e-4, atol=1e-5)


def test_normal_is_drawn_from_a_stream_of_its_own(dense_dir: Path) -> None:
    routers = weights(RouterStart(std=0.05), dense_dir, seed=11)
    for i in (0, 1):
        digest = hashlib.sha256(f"11 transformer.h.{i}.mlp.gate.weight".encode()).hexdigest()
        torch.manual_seed(int(digest[:8], 16))
        assert torch.equal(routers[i], torch.randn(3, 24) * 0.05)


def planted(sizes: Sequence[int], *, noise: float, width: int = 48) -> tuple[Tensor, Tensor]:
    """Clusters around orthogonal directions, on top of a mean three times as long; states and their directions."""
    draw = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64)).Q.float()
    directions = basis[1 : len(sizes) + 1]
    which = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    states = 3 * basis[0] + directions[which] + noise * torch.randn(len(which), width, generator=draw)
    return states[torch.randperm(len(which), generator=draw)], directions


@pytest.mark.parametrize("seed", range(5))
def test_planted_clusters_are_found(seed: int) -> None:
    h_ND, directions_ED = planted([50] * 24, noise=0.1)
    rows_ED = balanced_rows(h_ND, 24, seeded(seed, "x"))
    assert sorted((rows_ED @ directions_ED.T).argmax(dim=1).tolist()) == list(range(24))
    torch.testing.assert_close(load_of(rows_ED, h_ND), torch.ones(24))
    # Nothing of the mean direction is left: 48-dimensional random rows would have 0.14 of it.
    assert (rows_ED @ F.normalize(h_ND.mean(dim=0), dim=0)).abs().max() < 1e-4


def plain_kmeans(h_ND: Tensor, centroids_ED: Tensor) -> Tensor:
    """Lloyd's spherical k-means and nothing more."""
    x_ND = F.normalize(h_ND.double(), dim=1)
    c_ED = F.normalize(centroids_ED.double(), dim=1)
    for _ in range(100):
        member_N = (x_ND @ c_ED.T).argmax(dim=1)
        c_ED = torch.stack([F.normalize(x_ND[member_N == e].sum(dim=0), dim=0) for e in range(len(c_ED))])
    return c_ED.float()


def test_balance_where_plain_kmeans_has_none() -> None:
    h_ND, directions_ED = planted([1400, 200, 200, 200], noise=0.25)
    plain = load_of(plain_kmeans(h_ND, 3 * h_ND.mean(dim=0) / h_ND.mean(dim=0).norm() + directions_ED), h_ND)
    even = load_of(balanced_rows(h_ND, 4, seeded(1, "x")), h_ND)
    assert plain.max() > 2 and plain.min() < 0.5
    assert even.max() < 1.5 and even.min() > 0.6


def test_group_rows_against_the_formula() -> None:
    h_ND, _ = planted([30, 30, 30], noise=0.3)
    group_N = torch.arange(90) % 3
    means = torch.stack([h_ND.double()[group_N == g].mean(dim=0) for g in range(3)])
    centre = means.mean(dim=0)
    apart = means - torch.outer(means @ centre, centre) / centre.square().sum()
    expected = apart / apart.norm(dim=1, keepdim=True)
    torch.testing.assert_close(group_rows(h_ND, group_N, 3).double(), expected, rtol=1e-3, atol=1e-4)


def test_logits_spread_like_those_of_a_normal_start(dense_dir: Path, calibration: Path, tmp_path: Path) -> None:
    tokenizer, dense = Tokenizer(dense_dir), Stored(dense_dir)
    groups = {"धान": [TEXTS[0]], "गेहूँ": [TEXTS[2]], "spray": [TEXTS[1]]}
    texts = [tokenizer.encode(text)[:64] for (text,) in groups.values()]
    states = dict(hidden_states(dense, texts, [0, 1]))
    for std in (0.02, 0.3):
        routers = weights(RouterStart("prompts", std=std, prompts=prompts(tmp_path / "p.yaml", groups)), dense_dir)
        for i, h_ND in states.items():
            # Many random rows, so that the sample's spread is the distribution's.
            random_RD = torch.randn(4000, h_ND.size(1), generator=seeded(0, "r")) * std
            expected = (h_ND @ random_RD.T).var(dim=1).mean().sqrt()
            found = (h_ND @ routers[i].T).var(dim=1).mean().sqrt()
            assert found / expected == pytest.approx(1, abs=0.05)


def test_kmeans_on_the_tiny_base_is_even_and_undecided() -> None:
    data = TINY_BASE.parent.parent / "dialogues" / "val.jsonl"
    routers = weights(RouterStart("kmeans", data=data, max_tokens=3000), TINY_BASE, n_expert=8)
    tokenizer = Tokenizer(TINY_BASE)
    # Other dialogues than most of those that the routers were made from.
    with open(data.with_name("test.jsonl"), encoding="utf-8") as file:
        messages = [json.loads(next(file))["messages"] for _ in range(8)]
    documents = [render(turns, tokenizer, tags="think").ids[:ROW_TOKENS] for turns in messages]
    for i, h_ND in hidden_states(Stored(TINY_BASE), documents, routers):
        p_NE = (h_ND @ routers[i].T).softmax(dim=1)
        entropy = float(-(p_NE * p_NE.log()).sum(dim=1).mean()) / math.log(8)
        assert 0.5 < entropy < 0.995
        assert load_of(routers[i], h_ND).max() < 1.7 and load_of(routers[i], h_ND).min() > 0.4


def texts_of_kinds(split: str, count: int) -> dict[str, list[str]]:
    """Questions about three crops, and English prose."""
    kinds: dict[str, list[str]] = {"wheat": [], "potato": [], "tomato": [], "english": []}
    for folder in ("dialogues", "general"):
        with open(TINY_BASE.parent.parent / folder / f"{split}.jsonl", encoding="utf-8") as file:
            for record in map(json.loads, file):
                kind = record["meta"].get("crop") if "messages" in record else "english"
                text = record["messages"][-2]["content"] if "messages" in record else record["text"]
                if kind in kinds and len(kinds[kind]) < count and (kind != "english" or "-en-" in record["id"]):
                    kinds[kind].append(text)
    return kinds


def test_prompts_send_texts_of_their_kind_to_their_expert(tmp_path: Path) -> None:
    start = RouterStart("prompts", prompts=prompts(tmp_path / "p.yaml", texts_of_kinds("train", 20)))
    routers = weights(start, TINY_BASE, n_expert=4)
    tokenizer = Tokenizer(TINY_BASE)
    # share[kind, expert], over the tokens of all layers
    share = torch.zeros(4, 4)
    for kind, texts in enumerate(texts_of_kinds("val", 12).values()):
        documents = [tokenizer.encode(text)[:ROW_TOKENS] for text in texts]
        chosen = [
            (h_ND @ routers[i].T).argmax(dim=1) for i, h_ND in hidden_states(Stored(TINY_BASE), documents, [0, 1, 2, 3])
        ]
        share[kind] = torch.bincount(torch.cat(chosen), minlength=4) / len(torch.cat(chosen))
    # Each expert sees more of its own kind than of any other; most words of a question about wheat fit tomatoes, too.
    assert share.argmax(dim=0).tolist() == list(range(4))
    assert share.diagonal().min() > 0.27 and share[3, 3] > 0.8


def test_the_example_of_prompts_is_one() -> None:
    routers = weights(RouterStart("prompts", prompts=CONFIGS / "router_prompts.yaml"), TINY_BASE, n_expert=8)
    assert routers[3].shape == (8, 128)


def test_copies_keep_their_bits(dense_dir: Path, tmp_path: Path) -> None:
    # Width 24 as the dense model's; bits of a Hugging Face directory as safetensors reads them.
    build_hf_dir(tmp_path / "hf", "qwen3_moe", dtype=torch.bfloat16)
    routers = weights(RouterStart("copy-from", checkpoint_dir=tmp_path / "hf"), dense_dir, n_expert=5)
    tensors = stored_tensors(tmp_path / "hf")
    for i in (0, 1):
        assert torch.equal(routers[i], tensors[f"model.layers.{i}.mlp.gate.weight"].float())
    gates = {i: weights(RouterStart(), dense_dir)[i].bfloat16() for i in (0, 1)}
    model = GPT(tiny_config(n_expert=3, n_expert_per_token=2, moe_intermediate_size=44, mlp_class_name="LLaMAMoE"))
    state = model.bfloat16().state_dict() | {f"transformer.h.{i}.mlp.gate.weight": gates[i] for i in gates}
    save_lit_dir(tmp_path / "lit", state, model.config, source_dir=dense_dir, provenance={})
    routers = weights(RouterStart("copy-from", checkpoint_dir=tmp_path / "lit"), dense_dir)
    assert all(torch.equal(routers[i], gates[i].float()) for i in gates)


def test_the_seed_decides(dense_dir: Path, calibration: Path) -> None:
    start = RouterStart("kmeans", data=calibration)
    first, again, other = (weights(start, dense_dir, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[i], again[i]) for i in (0, 1))
    assert not all(torch.equal(first[i], other[i]) for i in (0, 1))
    assert all(rows.shape == (3, 24) and rows.isfinite().all() for rows in first.values())


def test_only_the_layers_asked_for(dense_dir: Path, calibration: Path) -> None:
    dense, tokenizer = Stored(dense_dir), Tokenizer(dense_dir)
    start = RouterStart("kmeans", data=calibration)
    some = router_weights(start, dense, tokenizer, n_expert=3, layers=[1], seed=7)
    assert some.keys() == {1} and torch.equal(some[1], weights(start, dense_dir)[1])
    with pytest.raises(ValueError, match="layers"):
        router_weights(start, dense, tokenizer, n_expert=3, layers=[2], seed=7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "zero"}, "choose one of normal, kmeans, prompts, copy-from"),
        ({"std": 0.0}, "expected above 0"),
        ({"std": float("nan")}, "expected above 0"),
        ({"std": float("inf")}, "expected above 0"),
        ({"max_tokens": 0, "start": "kmeans", "data": Path("x")}, "at least 1"),
        ({"start": "kmeans"}, "needs router.data"),
        ({"start": "prompts"}, "needs router.prompts"),
        ({"start": "copy-from"}, "needs router.checkpoint_dir"),
        ({"data": Path("x")}, "router.data goes with router.start kmeans, but router.start is normal"),
        ({"start": "kmeans", "data": Path("x"), "prompts": Path("y")}, "router.prompts goes with"),
        ({"start": "copy-from", "checkpoint_dir": Path("x"), "std": 0.1}, "router.std goes with"),
        ({"max_tokens": 5}, "router.max_tokens goes with"),
    ],
)
def test_settings_that_contradict_themselves(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        RouterStart(**settings)
    assert "\n" not in str(error.value)


def refused(start: RouterStart, directory: Path, n_expert: int = 3) -> str:
    with pytest.raises(UserError) as error:
        weights(start, directory, n_expert)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_calibration_files_that_do_not_do(dense_dir: Path, calibration: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    start = RouterStart("kmeans", data=path)
    assert "no file" in refused(start, dense_dir)
    path.write_text("")
    assert "holds no record" in refused(start, dense_dir)
    path.write_text('{"text": "a"}\n\n{"text": "b"\n')
    assert "bad.jsonl:3: not valid JSON" in refused(start, dense_dir)
    path.write_text('{"text": "Wait."}\n')
    assert "3 experts, expected at least 24" in refused(start, dense_dir)
    small = RouterStart("kmeans", data=calibration, max_tokens=20)
    assert "gives 1" in (said := refused(small, dense_dir)) and "router.max_tokens (20)" in said
    # Enough for three experts is not enough for 200.
    lines(path, [{"id": str(i), "text": " 7 7 7" * 3} for i in range(9)])
    assert "experts, expected at least" in refused(start, dense_dir, n_expert=200)


def test_prompts_that_do_not_do(dense_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    start = RouterStart("prompts", prompts=path)
    assert "no such file" in refused(start, dense_dir)
    path.write_text("a: [b\n")
    assert "not valid YAML" in refused(start, dense_dir)
    path.write_text("- a\n- b\n")
    assert "expected groups of prompts" in refused(start, dense_dir)
    path.write_text("no: [a b]\nb: [c d]\nc: [d e]\n")
    assert "quote names" in refused(start, dense_dir)
    prompts(path, {"धान": [TEXTS[0]], "गेहूँ": [TEXTS[2]]})
    assert "2 groups of prompts for 3 experts" in refused(start, dense_dir)
    prompts(path, {"a": [TEXTS[0]], "b": TEXTS[1], "c": [TEXTS[2]]})
    assert "group 'b' is no list of texts" in refused(start, dense_dir)
    prompts(path, {"a": [TEXTS[0]], "b": ["", "x"], "c": [TEXTS[2]]})
    assert "group 'b' has no token but the first" in refused(start, dense_dir)
    prompts(path, {"a": [TEXTS[0]], "b": [TEXTS[1]], "c": [TEXTS[1], TEXTS[1]]})
    assert "groups 'b' and 'c' look alike" in refused(start, dense_dir)
    prompts(path, {"a": [TEXTS[1]], "b": [TEXTS[1]]})
    assert "groups 'a' and 'b' look alike" in refused(start, dense_dir, n_expert=2)


def test_checkpoints_that_do_not_fit(dense_dir: Path, tmp_path: Path) -> None:
    assert "is a dense model" in refused(RouterStart("copy-from", checkpoint_dir=dense_dir), dense_dir)
    build_hf_dir(tmp_path / "moe", "qwen3_moe", mlp_only_layers=[1])
    start = RouterStart("copy-from", checkpoint_dir=tmp_path / "moe")
    assert "have experts 5, the new ones 3" in refused(start, dense_dir)
    assert "no router in layer 1" in refused(start, dense_dir, n_expert=5)
    build_hf_dir(tmp_path / "wide", "qwen3_moe", hidden_size=32)
    start = RouterStart("copy-from", checkpoint_dir=tmp_path / "wide")
    assert "have width 32, the new ones 24" in refused(start, dense_dir, n_expert=5)
    missing = RouterStart("copy-from", checkpoint_dir=tmp_path / "none")
    assert str(tmp_path / "none") in refused(missing, dense_dir)


def test_broken_weights_are_not_made_into_routers(calibration: Path, tmp_path: Path) -> None:
    directory = build_dense(tmp_path / "dense")
    state = torch.load(directory / "lit_model.pth", weights_only=True)
    state["transformer.h.1.norm_2.weight"][3] = math.nan
    torch.save(state, directory / "lit_model.pth")
    assert "layer 1 gives numbers that are not finite" in refused(RouterStart("kmeans", data=calibration), directory)
