"""Config: the known models, LitGPT's yaml, Hugging Face's config.json in both directions, and every refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from hypothesis import given
from hypothesis import strategies as st

from litgpt.config import NEUTRAL, Config
from litgpt.utils import UserError

# LitGPT 0.5.13 `Config` as `asdict` orders it; a saved model_config.yaml has exactly these keys.
LIT_KEYS = """
    name hf_config block_size n_layer n_embd vocab_size padding_multiple padded_vocab_size norm_class_name norm_eps
    norm_qk norm_qk_type post_attention_norm post_mlp_norm parallel_residual shared_attention_norm n_head head_size
    n_query_groups attn_bias attention_scores_scalar sliding_window_size sliding_window_indices
    attention_logit_softcapping rope_base rotary_percentage rope_condense_ratio rope_adjustments rope_interleave
    intermediate_size moe_intermediate_size bias mlp_class_name gelu_approximate n_expert n_shared_expert
    n_expert_groups n_topk_groups n_topk_scores_per_group n_expert_per_token first_k_dense_replace
    routed_scaling_factor norm_topk_prob scale_embeddings lm_head_bias final_logit_softcapping norm_1 norm_2
    latent_attention rope_local_base_freq rope_indices
""".split()  # noqa: SIM905

KNOWN = [
    "Qwen3-0.6B",
    "Qwen3-0.6B-Base",
    "Qwen3-1.7B",
    "Qwen3-4B",
    "Qwen3-8B",
    "Qwen3-14B",
    "Qwen3-14B-Base",
    "Qwen3-32B",
    "Qwen3-30B-A3B",
    "Qwen3-30B-A3B-Base",
    "Qwen3-235B-A22B",
]

# Excerpts of the config.json files on the Hugging Face hub, in the spelling of transformers 4.
LLAMA = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "use_sliding_window": False,
    "sliding_window": None,
}
QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}


def tiny(**overrides: Any) -> Config:
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_query_groups": 1, "head_size": 8, "intermediate_size": 24}
    return Config.from_name("Qwen3-0.6B", **(sizes | overrides))


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def test_sizes_of_the_models_that_matter() -> None:
    student, teacher = Config.from_name("Qwen/Qwen3-0.6B"), Config.from_name("Qwen3-14B")
    assert (student.n_layer, student.n_embd, student.n_head, student.n_query_groups) == (28, 1024, 16, 8)
    assert (student.head_size, student.intermediate_size, student.tie_embeddings) == (128, 3072, True)
    assert (teacher.n_layer, teacher.n_embd, teacher.n_head, teacher.n_query_groups) == (40, 5120, 40, 8)
    assert (teacher.head_size, teacher.intermediate_size, teacher.tie_embeddings) == (128, 17408, False)
    for config in (student, teacher):
        assert (config.vocab_size, config.padded_vocab_size, config.block_size) == (151643, 151936, 40960)
        assert config.rope_base == 1_000_000
        assert config.norm_eps == 1e-6
    moe = Config.from_name("Qwen3-30B-A3B")
    assert (moe.n_expert, moe.n_expert_per_token, moe.expert_size, moe.norm_topk_prob) == (128, 8, 768, True)


@pytest.mark.parametrize("name", KNOWN)
def test_known_models_survive_transformers_and_back(name: str) -> None:
    config = Config.from_name(name)
    written = json.loads(transformers.AutoConfig.for_model(**config.to_hf()).to_json_string())
    again = Config.from_hf(written, name=name)
    assert replace(again, hf_config=config.hf_config) == config
    assert replace(Config.from_hf(config.to_hf(), name=name), hf_config=config.hf_config) == config


@pytest.mark.parametrize("name", KNOWN)
def test_lit_yaml(name: str, tmp_path: Path) -> None:
    config = Config.from_name(name)
    values = config.to_lit_dict()
    assert list(values) == LIT_KEYS
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(values))
    assert Config.from_file(tmp_path / "model_config.yaml", tie_embeddings=config.tie_embeddings) == config


def test_litgpts_own_moe_yaml_means_renormalised_routing() -> None:
    values = Config.from_name("Qwen3-30B-A3B").to_lit_dict() | {"norm_topk_prob": False}
    assert Config(**values).norm_topk_prob


def test_derived_sizes() -> None:
    config = Config(**(tiny().to_lit_dict() | {"head_size": None, "n_query_groups": None, "padded_vocab_size": None}))
    assert (config.head_size, config.n_query_groups, config.padded_vocab_size) == (8, 2, 152064)
    assert tiny(padded_vocab_size=100).vocab_size == 100


def test_from_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist; download a model there.*run: python scripts/convert_hf"):
        Config.from_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no model_config"):
        Config.from_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds no model_config.*; run: python scripts/convert_hf"):
        Config.from_checkpoint(tmp_path)
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(tiny().to_lit_dict()))
    assert not Config.from_checkpoint(tmp_path).tie_embeddings
    (tmp_path / "provenance.yaml").write_text("tie_embeddings: true\n")
    assert Config.from_checkpoint(tmp_path) == tiny()
    assert Config.from_checkpoint(tmp_path, block_size=7, tie_embeddings=False).block_size == 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot read"),
        (lambda path: path.write_text("a: [1"), "cannot be parsed"),
        (lambda path: path.write_bytes(b"\xff\xfe\xff"), "cannot be parsed"),
        (lambda path: path.write_text("- 1\n"), "should hold a mapping of config fields, found list"),
        (lambda path: path.write_text("n_layers: 2\n"), "unknown config field 'n_layers'"),
        (lambda path: path.write_text("name: x\n"), "norm_class_name is 'LayerNorm'"),
    ],
)
def test_bad_files(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model_config.yaml"
    make(path)
    with pytest.raises(UserError, match=message):
        Config.from_file(path)


def test_unknown_name() -> None:
    with pytest.raises(UserError, match=r"unknown model 'Qwen4'; known: Qwen3-0\.6B"):
        Config.from_name("Qwen4")
    with pytest.raises(UserError, match="unknown config field 'n_embed'"):
        Config.from_name("Qwen3-0.6B", n_embed=3)


OTHER_VALUES: dict[str, Any] = {
    "norm_class_name": "LayerNorm",
    "norm_qk_type": "olmo2",
    "gelu_approximate": "tanh",
    "routed_scaling_factor": 2.5,
    "rotary_percentage": 0.25,
    "rope_condense_ratio": 4,
    "rope_adjustments": {"factor": 8.0},
    "latent_attention": {"q_lora_rank": 8},
}


@pytest.mark.parametrize("key", NEUTRAL)
def test_what_is_not_implemented_is_refused_by_name(key: str) -> None:
    neutral = NEUTRAL[key]
    value = OTHER_VALUES.get(key, not neutral if isinstance(neutral, bool) else 4)
    with pytest.raises(UserError, match=f"{key} is .* but only .* is implemented"):
        tiny(**{key: value})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"head_size": 0, "n_embd": 15}, "n_embd 15 is not a multiple of n_head 2"),
        ({"n_head": 3, "n_query_groups": 2}, "n_head 3 is not a multiple of n_query_groups 2"),
        ({"head_size": 7}, "head_size 7 is odd"),
        ({"n_layer": 0}, "n_layer is 0, expected a positive whole number"),
        ({"n_layer": "two"}, "n_layer is 'two', expected a positive whole number"),
        ({"n_embd": 16.0}, "n_embd is 16.0, expected a positive whole number"),
        ({"head_size": -2}, "head_size is -2"),
        ({"norm_eps": "1e-6"}, "norm_eps is '1e-6', expected a positive number"),
        ({"intermediate_size": 0}, "intermediate_size is missing"),
        ({"mlp_class_name": "GemmaMLP"}, "expected 'LLaMAMLP' or 'LLaMAMoE'"),
        ({"n_expert": 4}, "n_expert is 4, but mlp_class_name is 'LLaMAMLP'"),
        ({"norm_topk_prob": True}, "norm_topk_prob is True, but mlp_class_name"),
        ({"mlp_class_name": "LLaMAMoE", "n_expert": 2, "n_expert_per_token": 3}, "must be between 1 and n_expert 2"),
        ({"mlp_class_name": "LLaMAMoE"}, "n_expert_per_token 0 must be between"),
    ],
)
def test_contradictions(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(**overrides)


def test_upcycled() -> None:
    dense = Config.from_name("Qwen3-0.6B")
    moe = dense.upcycled(8, 2)
    assert moe.name == "Qwen3-0.6B-MoE-8x2"
    assert (moe.n_expert, moe.n_expert_per_token, moe.expert_size) == (8, 2, dense.intermediate_size)
    assert moe.hf_family == "qwen3_moe"
    assert moe.tie_embeddings
    assert moe.norm_topk_prob
    assert not dense.is_moe
    hf = moe.to_hf()
    expected = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "head_dim": 128}
    expected |= {"moe_intermediate_size": 3072, "num_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": True}
    assert {key: hf[key] for key in expected} == expected
    assert replace(Config.from_hf(hf, name=moe.name), hf_config={}, vocab_size=dense.vocab_size) == moe
    with pytest.raises(UserError, match="mixture of 8 experts already"):
        moe.upcycled(8, 2)
    for n_expert, k in ((4, 5), (4, 0)):
        with pytest.raises(UserError, match=f"n_expert_per_token {k} must be between 1 and n_expert 4"):
            dense.upcycled(n_expert, k)
    homeless = Config.from_hf(QWEN2).upcycled(4, 2)
    assert homeless.attn_bias
    assert homeless.n_expert == 4
    assert not homeless.has_hf_family
    with pytest.raises(UserError, match="no Hugging Face family"):
        _ = homeless.hf_family


def test_families_follow_structure() -> None:
    assert Config.from_hf(LLAMA).hf_family == "llama"
    assert Config.from_hf(LLAMA).upcycled(4, 2).hf_family == "mixtral"
    assert Config.from_hf(QWEN2).hf_family == "qwen2"
    assert Config.from_hf(MISTRAL | {"sliding_window": None}, name="Mistral-7B-v0.3").hf_family == "mistral"
    assert Config.from_hf(QWEN3_MOE).hf_family == "qwen3_moe"
    assert Config.from_name("Qwen3-8B").hf_family == "qwen3"
    assert Config.from_name("Qwen3-8B", name="llama").hf_family == "qwen3"


def test_from_hf_reads_both_spellings_of_rope() -> None:
    v4 = Config.from_hf(LLAMA)
    v5 = Config.from_hf(
        without(LLAMA, "rope_theta", "rope_scaling")
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}
    )
    assert v4 == v5
    assert v4.rope_base == 100000
    assert isinstance(v5.rope_base, int)
    assert Config.from_hf(without(LLAMA, "rope_theta")).rope_base == 10000


def test_from_hf_family_defaults() -> None:
    config = Config.from_hf(without(LLAMA, "num_key_value_heads", "tie_word_embeddings", "rms_norm_eps"))
    assert (config.n_query_groups, config.tie_embeddings, config.norm_eps) == (9, False, 1e-6)
    assert (config.head_size, config.padded_vocab_size, config.attn_bias) == (64, 49152, False)
    assert Config.from_hf(LLAMA | {"head_dim": 32}).head_size == 32
    qwen3 = without(QWEN3_MOE, "head_dim") | {"model_type": "qwen3"}
    assert Config.from_hf(qwen3).head_size == 128
    assert Config.from_hf(without(QWEN3_MOE, "head_dim")).head_size == 64
    assert Config.from_hf(QWEN2).attn_bias
    renamed = without(QWEN3_MOE, "num_experts") | {"num_local_experts": 128}
    assert Config.from_hf(renamed) == Config.from_hf(QWEN3_MOE)


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe", "qwen2", "llama", "mistral", "mixtral"])
def test_a_silent_config_means_what_transformers_means(model_type: str) -> None:
    """A minimal config.json, read by us and by transformers, gives the same model."""
    minimal: dict[str, Any] = {
        key: QWEN3_MOE[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    }
    minimal |= {"model_type": model_type, "num_attention_heads": 16, "num_key_value_heads": 4}
    if "moe" in model_type or model_type == "mixtral":
        minimal |= {"num_local_experts": 8, "num_experts_per_tok": 2}
    if model_type == "qwen3_moe":
        minimal |= {"moe_intermediate_size": 32, "norm_topk_prob": True}
    if model_type == "mistral":
        minimal |= {"sliding_window": None}
    theirs = json.loads(transformers.AutoConfig.for_model(**minimal).to_json_string(use_diff=False))
    assert Config.from_hf(minimal) == Config.from_hf(theirs)


def test_from_hf_name_and_vocabulary(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen3-30B-A3B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_MOE))
    for source in (folder, folder / "config.json"):
        config = Config.from_hf(source)
        assert (config.name, config.vocab_size, config.padded_vocab_size) == ("Qwen3-30B-A3B", 151643, 151936)
    assert Config.from_hf(QWEN3_MOE | {"_name_or_path": "somebody/their-model"}).name == "their-model"
    assert Config.from_hf(QWEN3_MOE).name == "qwen3_moe"
    assert Config.from_hf(QWEN3_MOE, block_size=99).block_size == 99
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be parsed"):
        Config.from_hf(folder)


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (without(LLAMA, "model_type"), "model_type is None, expected one of qwen3"),
        (LLAMA | {"model_type": "gemma3"}, "model_type is 'gemma3'"),
        (without(LLAMA, "hidden_size"), "hidden_size is missing"),
        (without(QWEN3_MOE, "num_experts"), "num_experts is missing"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (LLAMA | {"attention_bias": True}, "attention_bias is True"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias is True"),
        (LLAMA | {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config is"),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type 'llama3'"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        (LLAMA | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'yarn'"),
        (
            LLAMA | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
        (QWEN3_MOE | {"norm_topk_prob": False}, "norm_topk_prob is False"),
        (without(QWEN3_MOE, "norm_topk_prob"), "norm_topk_prob is False"),
        (QWEN3_MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        (QWEN3_MOE | {"mlp_only_layers": [99]}, r"dense_layers \[99\]"),
        (MISTRAL, "sliding_window 4096 is in use"),
        (without(MISTRAL, "sliding_window"), "sliding_window 4096 is in use"),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 1024}, "sliding_window 1024 is in use"),
        (QWEN3_MOE | {"use_sliding_window": True, "sliding_window": 1024}, "sliding_window 1024 is in use"),
    ],
)
def test_from_hf_refusals(hf: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config.from_hf(hf)


def test_windows_that_never_act_are_accepted() -> None:
    assert Config.from_hf(MISTRAL, block_size=4096).block_size == 4096
    assert Config.from_hf(MISTRAL | {"sliding_window": None}).block_size == 32768
    windowed = QWEN2 | {"use_sliding_window": True, "sliding_window": 1024}
    assert Config.from_hf(windowed | {"max_window_layers": 24})
    assert Config.from_hf(LLAMA | {"sliding_window": 7})


@given(
    st.builds(
        dict,
        n_layer=st.integers(1, 99),
        n_embd=st.integers(1, 999),
        n_query_groups=st.integers(1, 8),
        head_size=st.integers(1, 64).map(lambda n: 2 * n),
        intermediate_size=st.integers(1, 999),
        padded_vocab_size=st.integers(1, 999),
        block_size=st.integers(1, 9999),
        rope_base=st.integers(2, 10**7),
        norm_eps=st.floats(1e-8, 1e-3),
        tie_embeddings=st.booleans(),
    ),
    st.integers(1, 4),
    st.sampled_from([(True, False), (False, True), (False, False)]),
    st.booleans(),
)
def test_round_trips(sizes: dict[str, Any], heads_per_group: int, kind: tuple[bool, bool], moe: bool) -> None:
    """Any config that a family can express survives yaml and config.json."""
    norm_qk, attn_bias = kind
    sizes |= {"n_head": sizes["n_query_groups"] * heads_per_group, "norm_qk": norm_qk, "attn_bias": attn_bias}
    config = Config.from_name("Qwen3-0.6B", **(sizes | {"vocab_size": sizes["padded_vocab_size"]}))
    if moe and not attn_bias:
        config = config.upcycled(4, 2)
    from_yaml = yaml.safe_load(yaml.safe_dump(config.to_lit_dict()))
    assert Config(**from_yaml, tie_embeddings=config.tie_embeddings) == config
    again = Config.from_hf(json.loads(json.dumps(config.to_hf())), name=config.name)
    # Mixtral's config.json has one width: that of the experts.
    width = None if config.hf_family == "mixtral" else config.moe_intermediate_size
    assert replace(again, hf_config={}) == replace(config, hf_config={}, moe_intermediate_size=width)
