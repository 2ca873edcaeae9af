"""Recipes: what each makes of a dense FFN, against plain formulas; what stays equal; what other programs compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from litgpt.checkpoint import convert_hf_to_lit, convert_lit_to_hf, load_model, read_provenance
from litgpt.config import Config
from litgpt.keymap import BlockId
from litgpt.proof import prove
from litgpt.recipes import COPY, Drop, Granular, Noise, Recipe, Shared, Wide, recipe_of, recipe_of_provenance, seeded
from litgpt.upcycle import Format, ProofDtype, chosen_layers, upcycle, verify
from litgpt.utils import UserError, sha256_file
from scripts.upcycle_moe import damaged, summary
from tests.test_upcycle import build_dense, stored
from tests.tiny_models import build_hf_dir, same_bits, stored_tensors

RECIPES: dict[str, Recipe] = {
    "copy": COPY,
    "noise": Noise(sigma=0.05),
    "drop": Drop(ratio=0.25),
    "granular": Granular(parts=4),
    "shared": Shared(),
}
IDS_BT = torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def dense_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_dense(tmp_path_factory.mktemp("recipes") / "Qwen3-tiny")


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Qwen3 as transformers saves it, bf16."""
    folder = tmp_path_factory.mktemp("recipes-hf") / "Qwen3-tiny"
    build_hf_dir(folder, "qwen3-tied", dtype=torch.bfloat16)
    return folder


def ffn(layer: int, state: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    gate, up, down = (state[f"transformer.h.{layer}.mlp.{name}.weight"].float() for name in ("fc_1", "fc_2", "proj"))
    return gate, up, down


def expert(layer: int, e: int, state: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    gate, up, down = (
        state[f"transformer.h.{layer}.mlp.experts.{e}.{name}.weight"].float() for name in ("fc_1", "fc_2", "proj")
    )
    return gate, up, down


def logits(directory: Path, dtype: torch.dtype = torch.float64) -> Tensor:
    with torch.no_grad():
        result = load_model(directory, dtype=dtype)(IDS_BT).logits
    assert result is not None
    return result


class TestWeights:
    def test_noise_has_the_size_that_was_asked_for_and_differs(self, tmp_path: Path) -> None:
        dense_dir = build_dense(tmp_path / "dense", n_embd=64, intermediate_size=96, dtype=torch.float32)
        upcycle(dense_dir, tmp_path / "moe", recipe=Noise(sigma=0.05), n_expert=3)
        dense, moe = stored(dense_dir), stored(tmp_path / "moe")
        seen = []
        for e in range(3):
            for before, after in zip(ffn(1, dense), expert(1, e, moe), strict=True):
                noise = (after - before) / before.std()
                assert float(noise.std()) == pytest.approx(0.05, rel=0.05)
                assert abs(float(noise.mean())) < 0.05 * 5 / before.numel() ** 0.5
                seen.append(noise.flatten())
        assert float(torch.corrcoef(torch.stack(seen)).fill_diagonal_(0).abs().max()) < 0.06

    def test_drop_replaces_the_same_neurons_in_all_three_matrices(self, tmp_path: Path) -> None:
        dense_dir = build_dense(tmp_path / "dense", n_embd=64, intermediate_size=96, dtype=torch.float32)
        upcycle(dense_dir, tmp_path / "moe", recipe=Drop(ratio=0.25), n_expert=3)
        dense, moe = stored(dense_dir), stored(tmp_path / "moe")
        chosen = []
        for e in range(3):
            kept = [
                (before == after).all(dim=axis)
                for before, after, axis in zip(ffn(0, dense), expert(0, e, moe), (1, 1, 0), strict=True)
            ]
            assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])
            assert int((~kept[0]).sum()) == 24
            chosen.append(kept[0])
            for (before, after), axis in zip(
                zip(ffn(0, dense), expert(0, e, moe), strict=True), (0, 0, 1), strict=True
            ):
                gone = (~kept[0]).nonzero().flatten()
                old, new = before.index_select(axis, gone), after.index_select(axis, gone)
                assert not (old == new).any()
                assert float(new.std()) == pytest.approx(float(old.std()), rel=0.08)
                assert abs(float(new.mean() - old.mean())) < 5 * float(old.std()) / old.numel() ** 0.5
        assert not torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[1], chosen[2])

    def test_granular_is_the_dense_ffn_in_parts(self, dense_dir: Path, tmp_path: Path) -> None:
        made = upcycle(dense_dir, tmp_path / "moe", recipe=Granular(parts=4), n_expert=3, n_expert_per_token=2)
        dense, moe = stored(dense_dir), stored(tmp_path / "moe")
        assert (made.config.n_expert, made.config.n_expert_per_token, made.config.moe_intermediate_size) == (12, 8, 11)
        gate, up, down = ffn(1, dense)
        for e in range(3):
            parts = [expert(1, 4 * e + g, moe) for g in range(4)]
            assert torch.equal(torch.cat([part[0] for part in parts]), gate)
            assert torch.equal(torch.cat([part[1] for part in parts]), up)
            assert torch.equal(torch.cat([part[2] for part in parts], dim=1), 4 * down)
        router = moe["transformer.h.1.mlp.gate.weight"].view(3, 4, -1)
        assert bool((router == router[:, :1]).all()) and not torch.equal(router[0], router[1])

    def test_shared_keeps_the_ffn_and_starts_the_others_at_zero(self, dense_dir: Path, tmp_path: Path) -> None:
        made = upcycle(dense_dir, tmp_path / "moe", recipe=Shared(), n_expert=3)
        dense, moe = stored(dense_dir), stored(tmp_path / "moe")
        assert made.config.n_shared_expert == 1 and not (tmp_path / "moe" / "config.json").exists()
        for name in ("fc_1", "fc_2", "proj"):
            before = dense[f"transformer.h.0.mlp.{name}.weight"]
            assert torch.equal(moe[f"transformer.h.0.mlp.shared_experts.{name}.weight"], before)
            for e in range(3):
                own = moe[f"transformer.h.0.mlp.experts.{e}.{name}.weight"]
                assert torch.equal(own, torch.zeros_like(before) if name == "proj" else before)
        # The experts' gate and up are the shared expert's, on disk too.
        assert (tmp_path / "moe" / "lit_model.pth").stat().st_size < 1.6 * (dense_dir / "lit_model.pth").stat().st_size

    def test_shared_gives_the_router_a_gradient_once_experts_moved(self, dense_dir: Path, tmp_path: Path) -> None:
        upcycle(dense_dir, tmp_path / "moe", recipe=Shared(), n_expert=3)
        model = load_model(tmp_path / "moe", dtype=torch.float32)
        block: Any = model.transformer.h[0].mlp

        def router_gradient() -> float:
            model.zero_grad()
            output = model(IDS_BT).logits
            assert output is not None
            F.cross_entropy(output[:, :-1].flatten(0, 1), IDS_BT[:, 1:].flatten()).backward()
            return float(block.gate.weight.grad.norm())

        at_start = router_gradient()
        # Adam's first step is of one size whatever the gradient.
        torch.optim.Adam([block.experts.down_proj], lr=1e-3).step()
        assert at_start == 0.0 and router_gradient() > 1e-6

    def test_wide_is_equal_at_first_and_its_copies_can_part(self, tmp_path: Path) -> None:
        dense_dir = build_dense(tmp_path / "dense", dtype=torch.float32)
        made = upcycle(dense_dir, tmp_path / "wide", recipe=Wide(factor=3, noise=0.1), thought_tokens="none")
        assert made.config.intermediate_size == 132 and not made.config.is_moe
        before, after = logits(dense_dir), logits(tmp_path / "wide")
        torch.testing.assert_close(after[..., :400], before[..., :400], rtol=0, atol=1e-4)
        down = stored(tmp_path / "wide")["transformer.h.0.mlp.proj.weight"].chunk(3, dim=1)
        assert not torch.allclose(down[0], down[1], rtol=1e-3)

    @pytest.mark.parametrize("label", ["noise", "drop"])
    def test_the_seed_decides(self, label: str, dense_dir: Path, tmp_path: Path) -> None:
        sums = {}
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            upcycle(dense_dir, tmp_path / name, recipe=RECIPES[label], n_expert=2, seed=seed)
            sums[name] = stored(tmp_path / name)["transformer.h.0.mlp.experts.1.fc_1.weight"]
        assert torch.equal(sums["a"], sums["b"]) and not torch.equal(sums["a"], sums["c"])

    def test_streams_of_other_names_do_not_meet(self) -> None:
        a, b, c = (torch.randn(8, generator=seeded(*key)) for key in ((1, "x"), (1, "y"), (2, "x")))
        assert not torch.equal(a, b) and not torch.equal(a, c)


class TestEquality:
    @pytest.mark.parametrize("label", ["copy", "granular", "shared"])
    @pytest.mark.parametrize(("n_expert", "k"), [(2, 1), (2, 2), (8, 2), (5, 5), (64, 1), (64, 8), (64, 64)])
    def test_exact_recipes_leave_rounding_only(
        self, label: str, n_expert: int, k: int, dense_dir: Path, tmp_path: Path
    ) -> None:
        made = upcycle(
            dense_dir,
            tmp_path / "moe",
            recipe=RECIPES[label],
            n_expert=n_expert,
            n_expert_per_token=k,
            proof_dtype="both",
        )
        fp32, fp64 = made.proofs
        assert fp32.kl <= 1e-9 and fp32.top1_agreement == 1.0
        assert fp64.max_abs_diff <= 1e-10 and fp64.exact
        assert all(layer.error <= 1e-13 for layer in fp64.layers)

    @pytest.mark.parametrize("label", RECIPES)
    def test_the_cost_that_is_reported_is_the_model_s(self, label: str, dense_dir: Path, tmp_path: Path) -> None:
        made = upcycle(
            dense_dir, tmp_path / "moe", recipe=RECIPES[label], n_expert=4, thought_tokens="none", proof_dtype="float64"
        )
        proof = made.proofs[0]
        before, after = logits(dense_dir)[..., :400], logits(tmp_path / "moe")[..., :400]
        kl = F.kl_div(after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
        if RECIPES[label].exact:
            assert proof.exact and float(kl) < 1e-15
        else:
            # Other text, so not the same number, but of its order.
            assert not proof.exact and proof.kl > 1e-6
            assert 0.1 < float(kl) / proof.kl < 10
            assert proof.top1_agreement < 1.0 or proof.kl < 0.2

    def test_granular_of_no_power_of_two_is_measured_not_promised(self, tmp_path: Path) -> None:
        dense_dir = build_dense(tmp_path / "dense", intermediate_size=48)
        made = upcycle(dense_dir, tmp_path / "moe", recipe=Granular(parts=3), n_expert=2)
        assert not Granular(parts=3).exact and not made.proofs[0].changed
        assert 0 < made.proofs[0].kl < 1e-2

    def test_per_layer_error_and_router_figures(self, dense_dir: Path, tmp_path: Path) -> None:
        made = upcycle(dense_dir, tmp_path / "moe", recipe=Noise(sigma=0.2), n_expert=4, proof_dtype="float64")
        layers = made.proofs[0].layers
        assert [layer.layer for layer in layers] == [0, 1]
        dense, moe = (load_model(path, dtype=torch.float64) for path in (dense_dir, tmp_path / "moe"))
        assert all(0 < layer.error < 1 for layer in layers)
        assert all(abs(sum(layer.load_E) - 1) < 1e-12 and 0.5 < (layer.entropy or 0) <= 1 for layer in layers)
        # The noise grows on its way.
        states = [model(IDS_BT, layers=[0, 1]).hidden_states for model in (dense, moe)]
        errors = [float(((states[1][i] - states[0][i]).norm() / states[0][i].norm()).detach()) for i in (0, 1)]
        assert all(0.5 < error / layer.error < 2 for error, layer in zip(errors, layers, strict=True))


class TestFormats:
    @pytest.mark.parametrize("label", ["copy", "noise", "drop", "granular"])
    def test_straight_to_hugging_face_is_what_the_detour_gives(self, label: str, hf_dir: Path, tmp_path: Path) -> None:
        straight = upcycle(hf_dir, tmp_path / "straight", recipe=RECIPES[label], n_expert=4, format="hf")
        lit = tmp_path / hf_dir.name
        lit.mkdir()
        for path in hf_dir.iterdir():
            (lit / path.name).write_bytes(path.read_bytes())
        convert_hf_to_lit(lit)
        (lit / "model.safetensors").unlink()
        upcycle(lit, tmp_path / "moe", recipe=RECIPES[label], n_expert=4)
        convert_lit_to_hf(tmp_path / "moe", tmp_path / "detour")
        assert same_bits(stored_tensors(tmp_path / "straight"), stored_tensors(tmp_path / "detour"))
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert json.loads((tmp_path / "straight" / file).read_text()) == json.loads(
                (tmp_path / "detour" / file).read_text()
            ), file
        assert straight.sha256 == {"model.safetensors": sha256_file(tmp_path / "straight" / "model.safetensors")}

    @pytest.mark.parametrize("label", ["copy", "noise", "drop", "granular"])
    def test_transformers_computes_what_we_compute(self, label: str, dense_dir: Path, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        upcycle(dense_dir, tmp_path / "hf", recipe=RECIPES[label], n_expert=4, n_expert_per_token=2, format="hf")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "hf", dtype=torch.float64, experts_implementation="eager"
        )
        assert type(theirs).__name__ == "Qwen3MoeForCausalLM"
        upcycle(dense_dir, tmp_path / "lit", recipe=RECIPES[label], n_expert=4, n_expert_per_token=2)
        with torch.no_grad():
            torch.testing.assert_close(theirs(IDS_BT).logits, logits(tmp_path / "lit"), rtol=0, atol=1e-5)

    def test_smollm2_shapes_become_a_mixtral(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        # Widths of SmolLM2-135M, two of its thirty layers, a small vocabulary.
        sizes: dict[str, Any] = {
            "n_embd": 576,
            "n_head": 9,
            "n_query_groups": 3,
            "head_size": 64,
            "intermediate_size": 1536,
        }
        dense_dir = build_dense(
            tmp_path / "SmolLM2", norm_qk=False, name="SmolLM2-135M", tie_embeddings=True, dtype=torch.float32, **sizes
        )
        convert_lit_to_hf(dense_dir, tmp_path / "dense-hf")
        made = upcycle(
            tmp_path / "dense-hf", tmp_path / "moe", n_expert=4, format="hf", thought_tokens="none", proof_dtype="both"
        )
        assert all(proof.exact for proof in made.proofs)
        moe, dense = (
            transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")
            for path in (tmp_path / "moe", tmp_path / "dense-hf")
        )
        assert (type(moe).__name__, type(dense).__name__) == ("MixtralForCausalLM", "LlamaForCausalLM")
        with torch.no_grad():
            # transformers' RoPE and router stay in fp32.
            torch.testing.assert_close(
                moe(IDS_BT).logits[..., :400], dense(IDS_BT).logits[..., :400], rtol=1e-5, atol=1e-4
            )

    def test_some_layers_only(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        dense_dir = build_dense(tmp_path / "Qwen3-tiny", n_layer=4)
        made = upcycle(dense_dir, tmp_path / "moe", layers="every:2", n_expert=4, proof_dtype="both")
        assert made.config.moe_layers == [1, 3] and made.config.dense_layers == [0, 2]
        assert all(proof.exact for proof in made.proofs)
        assert [layer.entropy is None for layer in made.proofs[0].layers] == [True, False, True, False]
        again = Config.from_checkpoint(tmp_path / "moe")
        assert again == made.config and again.first_k_dense_replace is None
        upcycle(dense_dir, tmp_path / "hf", layers="every:2", n_expert=4, format="hf")
        written = json.loads((tmp_path / "hf" / "config.json").read_text())
        assert written["mlp_only_layers"] == [0, 2] and written["decoder_sparse_step"] == 1
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "hf", dtype=torch.float64, experts_implementation="eager"
        )
        with torch.no_grad():
            torch.testing.assert_close(theirs(IDS_BT).logits, logits(tmp_path / "moe"), rtol=0, atol=1e-5)
        convert_lit_to_hf(tmp_path / "moe", tmp_path / "exported")
        assert same_bits(stored_tensors(tmp_path / "exported"), stored_tensors(tmp_path / "hf"))
        assert "llama.cpp" in (tmp_path / "moe" / "report" / "upcycle.md").read_text()

    def test_a_dense_beginning_has_litgpt_s_own_key(self, tmp_path: Path) -> None:
        dense_dir = build_dense(tmp_path / "Qwen3-tiny", n_layer=4)
        made = upcycle(dense_dir, tmp_path / "moe", layers="2,3", n_expert=2)
        assert made.config.first_k_dense_replace == 2
        assert Config.from_file(tmp_path / "moe" / "model_config.yaml").dense_layers == [0, 1]

    def test_what_a_format_cannot_hold_is_refused_with_the_reason(self, dense_dir: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="shared expert without a gate"):
            upcycle(dense_dir, tmp_path / "moe", recipe=Shared(), format="hf")
        llama = build_dense(tmp_path / "llama", norm_qk=False, name="Llama-tiny")
        with pytest.raises(UserError, match="Mixtral's format needs experts in all layers"):
            upcycle(llama, tmp_path / "moe", layers="1", format="hf")
        assert not (tmp_path / "moe").exists()


class TestVerify:
    def test_a_fresh_one_of_each_recipe(self, dense_dir: Path, tmp_path: Path) -> None:
        for label, recipe in RECIPES.items():
            upcycle(dense_dir, tmp_path / label, recipe=recipe, n_expert=4)
            found = verify(dense_dir, tmp_path / label, out_dir=tmp_path / "report")
            assert not found.proofs[0].changed and damaged(found) is None, label
            assert found.recipe["recipe"] == label
            assert json.loads((tmp_path / "report" / "upcycle.json").read_text())["recipe"]["recipe"] == label

    @pytest.mark.parametrize(("label", "proof_dtype"), [("noise", "float32"), ("granular", "none"), ("copy", "none")])
    def test_one_flipped_bit_in_a_hugging_face_file_is_found(
        self, label: str, proof_dtype: ProofDtype, hf_dir: Path, tmp_path: Path
    ) -> None:
        upcycle(hf_dir, tmp_path / "moe", recipe=RECIPES[label], n_expert=4, format="hf")
        path = tmp_path / "moe" / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        names = ["model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.0.self_attn.k_proj.weight"]
        for name in [*names, "model.norm.weight", "model.embed_tokens.weight"]:
            broken = {key: value.clone() for key, value in tensors.items()}
            broken[name].view(torch.int16).view(-1)[0] ^= 1
            safetensors.torch.save_file(broken, path, metadata={"format": "pt"})
            found = verify(hf_dir, tmp_path / "moe", proof_dtype=proof_dtype)
            assert found.changed == (name,) and bool(found.proofs) == (proof_dtype != "none")
            assert (damaged(found) is None) == (".experts." in name)

    def test_a_foreign_mixture_without_provenance(self, hf_dir: Path, tmp_path: Path) -> None:
        upcycle(hf_dir, tmp_path / "moe", n_expert=4, format="hf")
        (tmp_path / "moe" / "provenance.yaml").unlink()
        assert prove(hf_dir, tmp_path / "moe").exact

    def test_a_trained_one_names_what_was_trained(self, dense_dir: Path, tmp_path: Path) -> None:
        upcycle(dense_dir, tmp_path / "moe", recipe=Granular(parts=2), n_expert=2)
        state = stored(tmp_path / "moe")
        state["transformer.h.1.mlp.experts.3.proj.weight"] += 1
        torch.save(state, tmp_path / "moe" / "lit_model.pth")
        found = verify(dense_dir, tmp_path / "moe")
        assert found.changed == ("transformer.h.1.mlp.experts.3.proj.weight",) and damaged(found) is None


class TestReport:
    def test_it_holds_what_was_asked_for(self, dense_dir: Path, tmp_path: Path) -> None:
        made = upcycle(dense_dir, tmp_path / "moe", recipe=Drop(ratio=0.5), n_expert=4, n_expert_per_token=2)
        values = json.loads((tmp_path / "moe" / "report" / "upcycle.json").read_text(encoding="utf-8"))
        assert values["recipe"] == {"recipe": "drop", "ratio": 0.5}
        model = load_model(tmp_path / "moe")
        experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        assert values["after"]["parameters"] == sum(p.numel() for p in model.parameters())
        assert values["after"]["active"] == values["after"]["parameters"] - experts // 2
        assert values["before"]["parameters"] == sum(p.numel() for p in load_model(dense_dir).parameters())
        for side, folder in (("before", dense_dir), ("after", tmp_path / "moe")):
            path = folder / "lit_model.pth"
            assert values[side]["sha256"] == {"lit_model.pth": sha256_file(path)}
            assert values[side]["bytes"] == path.stat().st_size
        assert [proof["dtype"] for proof in values["proofs"]] == ["float32", "bfloat16"]
        assert all(len(layer["load_E"]) == 4 for layer in values["proofs"][0]["layers"])
        page = (tmp_path / "moe" / "report" / "upcycle.md").read_text(encoding="utf-8")
        assert f"{made.proofs[0].kl:.2e}" in page and sha256_file(tmp_path / "moe" / "lit_model.pth") in page

    @pytest.mark.parametrize("format", ["lit", "hf"])
    def test_without_arithmetic_it_tells_of_the_bits(self, format: Format, dense_dir: Path, tmp_path: Path) -> None:
        made = upcycle(dense_dir, tmp_path / "bits", n_expert=4, format=format, proof_dtype="none")
        whole = upcycle(dense_dir, tmp_path / "whole", n_expert=4, format=format)
        assert made.sha256 == whole.sha256 and not made.proofs and not made.changed
        assert read_provenance(tmp_path / "bits")["upcycled"]["proof"] == []
        page = (tmp_path / "bits" / "report" / "upcycle.md").read_text(encoding="utf-8")
        assert "bit for bit, what the recipe makes" in page and "Neither model was run" in page and "KL" not in page
        assert "bit for bit" in summary(made, 1.0, verb="written")

    def test_recipes_come_back_from_provenance(self, dense_dir: Path, tmp_path: Path) -> None:
        for label, recipe in RECIPES.items():
            upcycle(dense_dir, tmp_path / label, recipe=recipe, n_expert=2)
            assert recipe_of_provenance(read_provenance(tmp_path / label)["upcycled"]) == recipe
        assert recipe_of_provenance({"recipe": "of the future"}) is None


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "numbers", "message"),
        [
            ("noise", {"sigma": 0.0}, "sigma is 0.0"),
            ("noise", {"ratio": 0.1}, "it has no ratio"),
            ("drop", {"ratio": 1.5}, "ratio is 1.5"),
            ("granular", {"parts": 1}, "granularity is 1"),
            ("magic", {}, "'magic' is not known"),
        ],
    )
    def test_numbers(self, name: str, numbers: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            recipe_of(name, **numbers)

    def test_width_that_g_does_not_divide(self, dense_dir: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="granularity 8 does not divide the FFN's width 44"):
            upcycle(dense_dir, tmp_path / "moe", recipe=Granular(parts=8))

    @pytest.mark.parametrize("layers", ["some", "every:0", "every:9", "0,2", "-1", []])
    def test_layers(self, layers: Any) -> None:
        with pytest.raises(UserError, match="layers"):
            chosen_layers(layers, 2)

    def test_layers_that_are_fine(self) -> None:
        assert chosen_layers("all", 3) == [0, 1, 2] and chosen_layers("every:2", 5) == [1, 3]
        assert chosen_layers("2, 0", 3) == chosen_layers([2, 0], 3) == [0, 2]

    def test_nothing_is_kept_of_a_name(self) -> None:
        assert Drop().make(BlockId("q", 0), torch.ones(2, 2), 0).equal(torch.ones(2, 2))
