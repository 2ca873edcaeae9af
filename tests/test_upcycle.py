"""Upcycling: what is copied is copied bit for bit, what is drawn follows its seed, and the proof sees every fault."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch import Tensor

import litgpt.proof
from litgpt.checkpoint import LitReader, convert_lit_to_hf, load_model, load_state, read_provenance, save_lit_dir
from litgpt.config import Config
from litgpt.model import GPT, LLaMAMoE, Routing
from litgpt.proof import MAX_TOKENS_PER_TEXT, SAMPLE_TEXTS, Proof, prove
from litgpt.routers import RouterStart
from litgpt.tensorfile import LitWriter
from litgpt.tokenizer import Tokenizer
from litgpt.upcycle import default_out_dir, upcycle
from litgpt.utils import UserError, sha256_file
from tests.tiny_tokenizer import build_tiny_tokenizer

QWEN3 = {"norm_qk": True, "tie_embeddings": True, "name": "Qwen3-tiny"}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3-tied": QWEN3,
    "qwen3-untied": QWEN3 | {"tie_embeddings": False},
    "llama": {"norm_qk": False, "tie_embeddings": False, "name": "Llama-tiny"},
    "mistral-tied": {"norm_qk": False, "tie_embeddings": True, "name": "Mistral-tiny"},
}
EMBED, HEAD = "transformer.wte.weight", "lm_head.weight"


def tiny_config(**overrides: Any) -> Config:
    # No two sizes are equal, so that mixed-up dimensions cannot fit.
    sizes = {"n_layer": 2, "n_embd": 24, "n_head": 6, "n_query_groups": 2, "head_size": 10, "intermediate_size": 44}
    vocabulary = {"block_size": 64, "vocab_size": 400, "padded_vocab_size": 448}
    return Config.from_name("Qwen3-0.6B", **(sizes | vocabulary | QWEN3 | overrides))


def build_dense(
    directory: Path, *, dtype: torch.dtype = torch.bfloat16, without_think: bool = False, **overrides: Any
) -> Path:
    """A random dense lit directory, norms random too, so that none may be swapped or lost unseen."""
    source = build_tiny_tokenizer(directory.parent / f"{directory.name}-tokenizer")
    if without_think:
        drop_tokens(source, "<think>", "</think>")
    model = GPT(tiny_config(**overrides))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2, generator=generator)
    save_lit_dir(directory, model.to(dtype).state_dict(), model.config, source_dir=source, provenance={"from": "test"})
    return directory


def drop_tokens(directory: Path, *names: str) -> None:
    path = directory / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] not in names]
    path.write_text(json.dumps(values), encoding="utf-8")


def stored(directory: Path) -> dict[str, Tensor]:
    """The stored tensors; experts, which are one tensor on disk while they are equal, can be changed one by one."""
    state: dict[str, Tensor] = torch.load(directory / "lit_model.pth", weights_only=True)
    return {name: tensor.clone() if ".experts." in name else tensor for name, tensor in state.items()}


def digests(directory: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(directory.rglob("*")) if path.is_file()}


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def flip_bit(tensor: Tensor, row: int, bit: int) -> None:
    """Flip one bit of the first bfloat16 element of a row, in place."""
    words = tensor.view(torch.int16)
    words.view(len(words), -1)[row, 0] ^= 1 << bit if bit < 15 else -(1 << 15)


class Pair(NamedTuple):
    dense: Path
    moe: Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    dense = build_dense(tmp_path_factory.mktemp("pair") / "Qwen3-tiny")
    return Pair(dense, upcycle(dense, n_expert=4, n_expert_per_token=2).out_dir)


@pytest.fixture
def dense_dir(pair: Pair, tmp_path: Path) -> Path:
    return shutil.copytree(pair.dense, tmp_path / "Qwen3-tiny")


class TestWeights:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
    def test_frozen_and_experts_are_bit_identical(self, family: str, dtype: torch.dtype, tmp_path: Path) -> None:
        dense_dir = build_dense(tmp_path / "dense", dtype=dtype, **FAMILIES[family])
        made = upcycle(dense_dir, tmp_path / "moe", n_expert=3, n_expert_per_token=2)
        dense, moe = stored(dense_dir), stored(tmp_path / "moe")
        assert made.thought_ids is not None
        expected = set(moe)
        for name, tensor in dense.items():
            if ".mlp." in name:
                head, tail = name.split(".mlp.")
                copies = [f"{head}.mlp.experts.{e}.{tail}" for e in range(3)]
            else:
                copies = [name]
            if name in (EMBED, HEAD):
                kept = [row for row in range(448) if row not in made.thought_ids]
                assert bits(moe[name][kept]) == bits(tensor[kept])
            else:
                assert all(bits(moe[copy]) == bits(tensor) and moe[copy].dtype == dtype for copy in copies)
            expected -= set(copies)
        assert expected == {f"transformer.h.{i}.mlp.gate.weight" for i in range(2)}
        shared = moe[EMBED].untyped_storage().data_ptr() == moe[HEAD].untyped_storage().data_ptr()
        assert shared == FAMILIES[family]["tie_embeddings"]

    def test_router_statistics(self, tmp_path: Path) -> None:
        dense_dir = build_dense(tmp_path / "dense", n_embd=256, n_layer=3)
        upcycle(dense_dir, tmp_path / "moe", n_expert=16, router=RouterStart(std=0.05))
        routers = [stored(tmp_path / "moe")[f"transformer.h.{i}.mlp.gate.weight"] for i in range(3)]
        for router in routers:
            assert router.shape == (16, 256) and router.dtype == torch.bfloat16
            assert abs(float(router.float().mean())) < 5 * 0.05 / 4096**0.5
            assert float(router.float().std()) == pytest.approx(0.05, rel=0.06)
        assert not torch.equal(routers[0], routers[1]) and not torch.equal(routers[1], routers[2])

    def test_the_seed_decides(self, dense_dir: Path, tmp_path: Path) -> None:
        runs = {}
        for label, seed in (("a", 1), ("b", 1), ("c", 2)):
            upcycle(dense_dir, tmp_path / label, n_expert=2, seed=seed)
            runs[label] = stored(tmp_path / label)
        drawn = [name for name in runs["a"] if name.endswith("mlp.gate.weight")]
        assert all(bits(runs["a"][name]) == bits(runs["b"][name]) for name in runs["a"])
        routers = [bits(run[name]) for run in (runs["a"], runs["c"]) for name in drawn]
        assert len(set(routers)) == 4
        assert bits(runs["a"][EMBED]) != bits(runs["c"][EMBED])

    def test_new_routers_spread_the_tokens(self, tmp_path: Path) -> None:
        dense_dir = build_dense(tmp_path / "dense", n_embd=256)
        upcycle(dense_dir, tmp_path / "moe", n_expert=4, n_expert_per_token=1)
        ids = torch.randint(0, 400, (8, 64), generator=torch.Generator().manual_seed(0))
        for routing in load_model(tmp_path / "moe", dtype=torch.float32)(ids).routing.values():
            share = routing.expert_ids_NK.flatten().bincount(minlength=4) / 512
            assert float(share.min()) > 0.05 and float(share.max()) < 0.6


class TestThoughtTokens:
    @pytest.mark.parametrize("tied", [True, False])
    def test_rows_start_as_think_plus_noise(self, tied: bool, tmp_path: Path) -> None:
        dense_dir = build_dense(tmp_path / "dense", tie_embeddings=tied)
        made = upcycle(dense_dir, tmp_path / "moe")
        old, new = Tokenizer(dense_dir), Tokenizer(tmp_path / "moe")
        assert made.thought_ids == new.thought_ids == (old.vocab_size, old.vocab_size + 1)
        assert new.encode("<thought>", special=True) == [old.vocab_size]
        assert "<thought>" in (new.chat_template or "")
        assert old.think_ids is not None and old.thought_ids is None
        dense, moe = stored(dense_dir), stored(tmp_path / "moe")
        for name in (EMBED, HEAD):
            for think, thought in zip(old.think_ids, made.thought_ids, strict=True):
                start, row = dense[name][think].float(), moe[name][thought].float()
                assert 0.01 < float((row - start).std() / start.std()) < 0.1
            first, second = moe[name][list(made.thought_ids)].bfloat16()
            assert not torch.equal(first, second)

    def test_mean_row_where_the_tokenizer_has_no_think(self, tmp_path: Path) -> None:
        dense_dir = build_dense(tmp_path / "dense", without_think=True, dtype=torch.float32, **FAMILIES["llama"])
        known = Tokenizer(dense_dir).vocab_size
        made = upcycle(dense_dir, tmp_path / "moe")
        assert made.thought_ids == (known, known + 1)
        dense, moe = stored(dense_dir), stored(tmp_path / "moe")
        for name in (EMBED, HEAD):
            mean, std = dense[name][:known].mean(dim=0), dense[name][:known].std()
            first, second = moe[name][known], moe[name][known + 1]
            for row in (first, second):
                assert 0.02 < float((row - mean).std() / std) < 0.1
            assert not torch.equal(first.bfloat16(), second.bfloat16())

    def test_none_changes_nothing(self, dense_dir: Path, tmp_path: Path) -> None:
        made = upcycle(dense_dir, tmp_path / "moe", thought_tokens="none")
        assert made.thought_ids is None and read_provenance(tmp_path / "moe")["upcycled"]["thought_ids"] is None
        assert bits(stored(dense_dir)[EMBED]) == bits(stored(tmp_path / "moe")[EMBED])
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (dense_dir / name).read_bytes() == (tmp_path / "moe" / name).read_bytes()

    def test_rows_that_are_there_already_are_kept(self, dense_dir: Path, tmp_path: Path) -> None:
        tokenizer = Tokenizer(dense_dir)
        ids = tokenizer.add_thought_tokens(448)
        tokenizer.save(dense_dir)
        assert upcycle(dense_dir, tmp_path / "moe").thought_ids == ids
        assert bits(stored(dense_dir)[EMBED]) == bits(stored(tmp_path / "moe")[EMBED])

    def test_no_free_row(self, tmp_path: Path) -> None:
        vocabulary = Tokenizer(build_tiny_tokenizer(tmp_path / "tokenizer")).vocab_size
        dense_dir = build_dense(tmp_path / "dense", padded_vocab_size=vocabulary + 1)
        with pytest.raises(UserError, match="--thought_tokens none"):
            upcycle(dense_dir, tmp_path / "moe")
        assert not (tmp_path / "moe").exists()
        assert upcycle(dense_dir, tmp_path / "moe", thought_tokens="none").proofs[0].exact

    def test_rows_that_could_not_differ(self, dense_dir: Path, tmp_path: Path) -> None:
        state = stored(dense_dir)
        state[EMBED].zero_()
        torch.save(state, dense_dir / "lit_model.pth")
        with pytest.raises(UserError, match="one and the same start"):
            upcycle(dense_dir, tmp_path / "moe")


class TestFiles:
    def test_provenance(self, dense_dir: Path, tmp_path: Path) -> None:
        made = upcycle(
            dense_dir,
            tmp_path / "moe",
            n_expert=3,
            n_expert_per_token=1,
            router=RouterStart(std=0.01),
            seed=7,
            proof_dtype="both",
        )
        provenance = read_provenance(tmp_path / "moe")
        assert provenance["tie_embeddings"] is True and "torch" in provenance["tool"]
        upcycled = provenance["upcycled"]
        expected = {"recipe": "copy", "n_expert": 3, "n_expert_per_token": 1, "seed": 7}
        assert expected.items() <= upcycled.items()
        assert upcycled["router"]["start"] == "normal" and upcycled["router"]["std"] == 0.01
        assert upcycled["trainable"] == ["experts", "router", "thought_tokens"] and upcycled["layers"] == [0, 1]
        assert upcycled["source"] == "Qwen3-tiny" and upcycled["source_provenance"]["from"] == "test"
        assert upcycled["source_sha256"] == {"lit_model.pth": sha256_file(dense_dir / "lit_model.pth")}
        assert upcycled["thought_ids"] == list(made.thought_ids or ())
        assert [proof["dtype"] for proof in upcycled["proof"]] == ["float32", "float64"]
        assert upcycled["proof"] == [proof.figures() for proof in made.proofs]

    def test_config_files(self, pair: Pair) -> None:
        config = Config.from_checkpoint(pair.moe)
        assert config == Config.from_checkpoint(pair.dense).upcycled(4, 2)
        assert "tie_embeddings" not in yaml.safe_load((pair.moe / "model_config.yaml").read_text())
        hf = json.loads((pair.moe / "config.json").read_text())
        tokenizer = Tokenizer(pair.dense)
        assert hf["model_type"] == "qwen3_moe" and hf["norm_topk_prob"] is True and hf["num_experts"] == 4
        assert hf["tie_word_embeddings"] is True and hf["torch_dtype"] == "bfloat16"
        assert hf["eos_token_id"] == tokenizer.eos_id
        assert (pair.moe / "generation_config.json").read_bytes() == (
            pair.dense / "generation_config.json"
        ).read_bytes()

    def test_counts(self, tmp_path: Path) -> None:
        made = upcycle(build_dense(tmp_path / "dense"), tmp_path / "moe", n_expert=4, n_expert_per_token=2)
        model = load_model(tmp_path / "moe")
        assert made.n_parameters == sum(parameter.numel() for parameter in model.parameters())
        assert made.n_active == made.n_parameters - 2 * 2 * 3 * 24 * 44
        assert made.n_bytes == (tmp_path / "moe" / "lit_model.pth").stat().st_size

    def test_equal_experts_are_stored_once_and_trained_apart(self, pair: Pair, tmp_path: Path) -> None:
        size = {directory: (directory / "lit_model.pth").stat().st_size for directory in pair}
        # Four routers' rows and the headers of four times as many names, but no second expert.
        assert size[pair.moe] < size[pair.dense] + 3 * 24 * 44 * 2
        reader = LitReader(pair.moe)
        expert, other = (f"transformer.h.0.mlp.experts.{number}.fc_1.weight" for number in (0, 3))
        assert reader.shares_storage(expert, other)
        assert not reader.shares_storage(expert, expert.replace("fc_1", "fc_2"))
        state = load_state(pair.moe)
        state["transformer.h.0.mlp.experts.gate_up_proj"][3] += 1
        assert torch.equal(state["transformer.h.0.mlp.experts.gate_up_proj"][0, :44], reader.read(expert))
        # What has become different is stored apart.
        save_lit_dir(tmp_path / "trained", state, Config.from_checkpoint(pair.moe), source_dir=pair.moe, provenance={})
        again = LitReader(tmp_path / "trained")
        assert not again.shares_storage(expert, other)
        assert torch.equal(again.read(other), (reader.read(other) + 1))

    def test_default_out_dir(self) -> None:
        expected = Path("checkpoints/Qwen/Qwen3-0.6B-MoE-8x2")
        assert default_out_dir(Path("checkpoints/Qwen/Qwen3-0.6B"), 8, 2) == expected
        assert default_out_dir("checkpoints/Qwen/Qwen3-0.6B/", 8, 2) == expected

    def test_source_is_only_read(self, dense_dir: Path, tmp_path: Path) -> None:
        before = digests(dense_dir)
        upcycle(dense_dir, tmp_path / "moe")
        assert digests(dense_dir) == before


class TestProof:
    @pytest.mark.parametrize("n_expert_per_token", [1, 2, 3, 5])
    @pytest.mark.parametrize("family", ["qwen3-tied", "llama"])
    def test_exact_for_every_k(self, family: str, n_expert_per_token: int, tmp_path: Path) -> None:
        dense_dir = build_dense(tmp_path / "dense", **FAMILIES[family])
        made = upcycle(
            dense_dir, tmp_path / "moe", n_expert=5, n_expert_per_token=n_expert_per_token, proof_dtype="both"
        )
        single, double = made.proofs
        assert single.kl <= 1e-9 and single.top1_agreement == 1.0 and single.max_abs_diff < 1e-3
        assert double.max_abs_diff <= 1e-10 and double.top1_agreement == 1.0
        assert single.changed == double.changed == ()
        assert 32 < single.n_tokens <= 4 * MAX_TOKENS_PER_TEXT

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_figures_are_those_of_the_whole_models(self, pair: Pair, tmp_path: Path, dtype: torch.dtype) -> None:
        moe_dir = shutil.copytree(pair.moe, tmp_path / "moe")
        state = stored(moe_dir)
        state["transformer.h.1.mlp.experts.2.proj.weight"].mul_(1.3)
        torch.save(state, moe_dir / "lit_model.pth")
        proof = prove(pair.dense, moe_dir, dtype=dtype, texts=SAMPLE_TEXTS[:2])

        tokenizer = Tokenizer(pair.dense)
        logits = {}
        for directory in (pair.dense, moe_dir):
            model = load_model(directory, dtype=dtype)
            with torch.no_grad():
                rows = [
                    model(torch.tensor([tokenizer.encode(text)[:MAX_TOKENS_PER_TEXT]])).logits
                    for text in SAMPLE_TEXTS[:2]
                ]
            logits[directory] = torch.cat([row[0, :, : tokenizer.vocab_size] for row in rows]).double()
        a, b = (logits[directory].log_softmax(dim=-1) for directory in (pair.dense, moe_dir))
        kl = (a.exp() * (a - b)).sum(dim=-1)
        assert proof.kl == pytest.approx(float(kl.mean()), rel=1e-4) and proof.kl > 1e-6
        assert proof.kl_max == pytest.approx(float(kl.max()), rel=1e-4)
        difference = (logits[pair.dense] - logits[moe_dir]).abs().max()
        assert proof.max_abs_diff == pytest.approx(float(difference), rel=1e-4)
        assert proof.top1_agreement == float((a.argmax(dim=-1) == b.argmax(dim=-1)).double().mean())
        assert proof.n_tokens == len(a)
        assert proof.changed == ("transformer.h.1.mlp.experts.2.proj.weight",) and not proof.exact

    @pytest.mark.parametrize("rows", [1, 37])
    def test_vocabulary_is_compared_in_slices(
        self, pair: Pair, tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        moe_dir = shutil.copytree(pair.moe, tmp_path / "moe")
        state = stored(moe_dir)
        state["transformer.h.0.mlp.experts.1.fc_1.weight"].mul_(1.3)
        torch.save(state, moe_dir / "lit_model.pth")
        whole = prove(pair.dense, moe_dir, dtype=torch.float64)
        monkeypatch.setattr(litgpt.proof, "ROWS_AT_A_TIME", rows)
        sliced = prove(pair.dense, moe_dir, dtype=torch.float64)
        for figure in ("max_abs_diff", "kl", "kl_max"):
            assert getattr(sliced, figure) == pytest.approx(getattr(whole, figure), rel=1e-9)
        assert 0.0 < sliced.top1_agreement == whole.top1_agreement < 1.0

    @pytest.mark.parametrize(
        ("name", "row"),
        [
            ("transformer.h.0.mlp.experts.3.fc_1.weight", 5),
            ("transformer.h.1.mlp.experts.0.proj.weight", 23),
            ("transformer.h.1.attn.qkv.weight", 70),
            ("transformer.h.0.attn.norm_k.weight", 9),
            ("transformer.ln_f.weight", 0),
            (EMBED, 447),
        ],
    )
    @pytest.mark.parametrize("bit", [0, 15])
    def test_one_wrong_bit_is_found(self, pair: Pair, tmp_path: Path, name: str, row: int, bit: int) -> None:
        moe_dir = shutil.copytree(pair.moe, tmp_path / "moe")
        state = stored(moe_dir)
        flip_bit(state[name], row, bit)
        torch.save(state, moe_dir / "lit_model.pth")
        proof = prove(pair.dense, moe_dir)
        # The head is the embedding's other name.
        assert proof.changed[0] == name and not proof.exact

    def test_trained_thought_rows_and_routers_do_not_count(self, pair: Pair, tmp_path: Path) -> None:
        moe_dir = shutil.copytree(pair.moe, tmp_path / "moe")
        state = stored(moe_dir)
        state[EMBED][list(Tokenizer(moe_dir).thought_ids or ())] += 1
        state["transformer.h.0.mlp.gate.weight"] += 1
        torch.save(state, moe_dir / "lit_model.pth")
        assert prove(pair.dense, moe_dir).exact

    def test_rows_that_both_tokenizers_know_do_count(self, dense_dir: Path, tmp_path: Path) -> None:
        tokenizer = Tokenizer(dense_dir)
        first, _ = tokenizer.add_thought_tokens(448)
        tokenizer.save(dense_dir)
        upcycle(dense_dir, tmp_path / "moe", n_expert=2)
        state = stored(tmp_path / "moe")
        flip_bit(state[EMBED], first, 0)
        torch.save(state, tmp_path / "moe" / "lit_model.pth")
        assert prove(dense_dir, tmp_path / "moe").changed == (EMBED,)

    def test_exact(self) -> None:
        proof = Proof("float32", 9, max_abs_diff=1e-4, kl=1e-9, kl_max=1e-8, top1_agreement=1.0)
        assert proof.exact
        assert not replace(proof, changed=("transformer.ln_f.weight",)).exact
        assert not replace(proof, kl=2e-9).exact and not replace(proof, top1_agreement=0.99).exact
        assert not replace(proof, kl=float("nan")).exact
        assert not replace(proof, dtype="float64").exact
        assert replace(proof, dtype="float64", max_abs_diff=1e-10).exact

    def test_float64_alone(self, dense_dir: Path, tmp_path: Path) -> None:
        made = upcycle(dense_dir, tmp_path / "moe", n_expert=2, proof_dtype="float64")
        assert [proof.dtype for proof in made.proofs] == ["float64"] and made.proofs[0].exact

    def test_float64_decides_where_float32_is_beyond_its_bounds(
        self, dense_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(litgpt.proof, "EXACT_KL", -1.0)
        made = upcycle(dense_dir, tmp_path / "moe")
        assert [proof.dtype for proof in made.proofs] == ["float32", "float64", "bfloat16"]
        assert [proof.exact for proof in made.proofs] == [False, True, False]

    def test_a_failing_proof_keeps_nothing_new(
        self, dense_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        upcycle(dense_dir, tmp_path / "moe", n_expert=2)
        before = digests(tmp_path / "moe")
        listing = sorted(os.listdir(tmp_path))
        write = LitWriter.write_rows

        def write_with_a_fault(self: LitWriter, name: str, start: int, rows: Tensor) -> None:
            if name == "transformer.h.1.mlp.experts.0.fc_2.weight":
                rows = rows.clone()
                flip_bit(rows, 3, 0)
            write(self, name, start, rows)

        monkeypatch.setattr(LitWriter, "write_rows", write_with_a_fault)
        with pytest.raises(
            UserError,
            match=r"proof fails.*nothing was kept.*2 tensors differ, e\.g\. transformer\.h\.1\.mlp\.experts\.0\.fc_2",
        ):
            upcycle(dense_dir, tmp_path / "moe", n_expert=2, seed=3)
        with pytest.raises(UserError, match="proof fails"):
            upcycle(dense_dir, tmp_path / "other", n_expert=2)
        assert digests(tmp_path / "moe") == before and sorted(os.listdir(tmp_path)) == listing

    def test_a_fault_of_the_model_code_is_found(
        self, dense_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Equal bits are not enough: weights that do not sum to 1 change the function."""
        route = LLaMAMoE.route

        def route_without_norm(self: LLaMAMoE, x_ND: Tensor) -> Routing:
            routing = route(self, x_ND)
            return routing._replace(weights_NK=routing.weights_NK * 0.999)

        monkeypatch.setattr(LLaMAMoE, "route", route_without_norm)
        with pytest.raises(UserError, match="proof fails"):
            upcycle(dense_dir, tmp_path / "moe")
        assert not (tmp_path / "moe").exists()

    def test_broken_source(self, dense_dir: Path, tmp_path: Path) -> None:
        state = stored(dense_dir)
        state["transformer.h.0.mlp.proj.weight"][0, 0] = float("nan")
        torch.save(state, dense_dir / "lit_model.pth")
        with pytest.raises(UserError, match="not finite"):
            upcycle(dense_dir, tmp_path / "moe")
        assert not (tmp_path / "moe").exists()

    def test_directories_that_do_not_belong_together(self, pair: Pair, tmp_path: Path) -> None:
        other = build_dense(tmp_path / "other", n_layer=1)
        with pytest.raises(UserError, match="not a MoE made from"):
            prove(other, pair.moe)
        with pytest.raises(UserError):
            prove(pair.moe, pair.dense)
        with pytest.raises(UserError):
            prove(pair.dense, pair.dense)
        with pytest.raises(UserError, match="does not exist"):
            prove(pair.dense, tmp_path / "nowhere")
        with pytest.raises(ValueError, match="text"):
            prove(pair.dense, pair.moe, texts=[])


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"n_expert": 2, "n_expert_per_token": 3}, "n_expert_per_token 3 must be between 1 and n_expert 2"),
            ({"n_expert": 4, "n_expert_per_token": 0}, "n_expert_per_token 0"),
            ({"n_expert": 1, "n_expert_per_token": 1}, "n_expert is 1, expected at least 2"),
        ],
    )
    def test_sizes(self, dense_dir: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            upcycle(dense_dir, tmp_path / "moe", **settings)
        assert not (tmp_path / "moe").exists()

    def test_source_is_a_moe(self, pair: Pair, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="already"):
            upcycle(pair.moe, tmp_path / "moe")

    def test_family_without_a_moe_form_is_refused_only_at_export(self, tmp_path: Path) -> None:
        dense_dir = build_dense(tmp_path / "dense", norm_qk=False, attn_bias=True, name="Qwen2-tiny")
        made = upcycle(dense_dir, tmp_path / "moe", n_expert=2)
        assert made.proofs[0].exact
        assert not (tmp_path / "moe" / "config.json").exists()
        with pytest.raises(UserError, match="no Hugging Face family"):
            convert_lit_to_hf(tmp_path / "moe", tmp_path / "hf")
        assert not (tmp_path / "hf").exists()

    def test_source_not_converted(self, dense_dir: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"does not exist; run first.*convert_hf_checkpoint"):
            upcycle(tmp_path / "Qwen" / "nowhere")
        (dense_dir / "lit_model.pth").unlink()
        with pytest.raises(UserError, match=r"lacks lit_model.pth.*convert_hf_checkpoint"):
            upcycle(dense_dir)

    def test_source_with_other_tensors(self, dense_dir: Path, tmp_path: Path) -> None:
        state = stored(dense_dir)
        del state["transformer.h.1.norm_2.weight"]
        torch.save(state, dense_dir / "lit_model.pth")
        with pytest.raises(UserError, match=r"transformer\.h\.1\.norm_2\.weight"):
            upcycle(dense_dir, tmp_path / "moe")

    def test_out_dir_is_the_source(self, dense_dir: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(dense_dir)
        for out_dir in (dense_dir, tmp_path / "link", dense_dir / ".." / dense_dir.name):
            with pytest.raises(UserError, match="dense checkpoint itself"):
                upcycle(dense_dir, out_dir)

    def test_out_dir_with_other_content(self, pair: Pair, dense_dir: Path, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_text("kept")
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "notes.txt").write_text("kept")
        annotated = shutil.copytree(pair.moe, tmp_path / pair.moe.name)
        (annotated / "notes.txt").write_text("kept")
        trained = shutil.copytree(pair.moe, tmp_path / "final")
        for out_dir in (file, folder, annotated, trained, pair.dense):
            with pytest.raises(UserError, match="did not write"):
                upcycle(dense_dir, out_dir)
        assert file.read_text() == (folder / "notes.txt").read_text() == "kept"
        assert digests(trained) == digests(pair.moe)

    def test_earlier_results_and_empty_directories_are_replaced(self, dense_dir: Path, tmp_path: Path) -> None:
        (tmp_path / "moe").mkdir()
        upcycle(dense_dir, tmp_path / "moe", n_expert=2)
        upcycle(dense_dir, tmp_path / "moe", n_expert=3)
        assert Config.from_checkpoint(tmp_path / "moe").n_expert == 3
        (tmp_path / "link").symlink_to(tmp_path / "moe")
        upcycle(dense_dir, tmp_path / "link", n_expert=4)
        assert (tmp_path / "link").is_symlink() and Config.from_checkpoint(tmp_path / "moe").n_expert == 4

    def test_disk_too_small(self, dense_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        free = shutil.disk_usage(tmp_path)._replace(free=50_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
        with pytest.raises(UserError, match=r"needs .* GB of disk and .* GB are free"):
            upcycle(dense_dir, tmp_path / "moe")
        assert not (tmp_path / "moe").exists()

    def test_disk_fills_up(self, dense_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        upcycle(dense_dir, tmp_path / "moe", n_expert=2)
        before, listing = digests(tmp_path / "moe"), sorted(os.listdir(tmp_path))

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match="no room left"):
            upcycle(dense_dir, tmp_path / "moe", n_expert=3)
        assert digests(tmp_path / "moe") == before and sorted(os.listdir(tmp_path)) == listing


class TestOtherPrograms:
    def test_whole_model_equals_the_dense_one(self, pair: Pair) -> None:
        ids = torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(0))
        dense, moe = (load_model(directory, dtype=torch.float64)(ids).logits for directory in pair)
        assert dense is not None and moe is not None
        known = Tokenizer(pair.dense).vocab_size
        torch.testing.assert_close(dense[..., :known], moe[..., :known], rtol=0, atol=1e-11)

    def test_transformers_computes_the_same_function(self, pair: Pair, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        ids = torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(0))
        logits = []
        for label, directory in zip(("dense", "moe"), pair, strict=True):
            convert_lit_to_hf(directory, tmp_path / label)
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / label, dtype=torch.float32)
            with torch.no_grad():
                logits.append(model(ids).logits[..., : Tokenizer(pair.dense).vocab_size])
        torch.testing.assert_close(*logits, rtol=0, atol=2e-5)
