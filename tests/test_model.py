"""The model against transformers on tiny random weights, its cache against itself, packing against single rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from litgpt.config import Config
from litgpt.model import GPT, Block, KVCache, document_mask, positions_in_document, rope_cos_sin

V = 61


def config_of(family: str, **overrides: Any) -> Config:
    """A tiny model of a family; nothing in it is a power of two, so that mixed-up dimensions cannot fit by chance."""
    sizes: dict[str, Any] = {
        "name": family,
        "n_layer": 3,
        "n_embd": 30,
        "n_head": 6,
        "n_query_groups": 2,
        "head_size": 14,
        "intermediate_size": 44,
        "vocab_size": V,
        "padded_vocab_size": V,
        "block_size": 64,
        "norm_qk": family in ("qwen3", "qwen3_moe"),
        "attn_bias": family == "qwen2",
        "rope_base": 10000 if family == "llama" else 1000000,
        "tie_embeddings": family == "qwen2",
    }
    if family in ("qwen3_moe", "mixtral"):
        sizes |= {"mlp_class_name": "LLaMAMoE", "n_expert": 5, "n_expert_per_token": 2, "moe_intermediate_size": 22}
    config = Config.from_name("Qwen3-0.6B", **(sizes | overrides))
    assert config.hf_family == family
    return config


def reference(config: Config, seed: int = 0) -> Any:
    """A random transformers model of this config, with norms and biases that are not the neutral ones and zeros."""
    torch.manual_seed(seed)
    hf_config = transformers.AutoConfig.for_model(**config.to_hf())
    # Its grouped experts refuse sizes that are not multiples of 16 bytes; the loop over experts takes any.
    hf_config._experts_implementation = "eager"
    hf = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return hf


def from_transformers(hf: Any, config: Config) -> GPT:
    """Our model with the reference's weights. Written here and not taken from the converter: two witnesses."""
    theirs: dict[str, Tensor] = hf.state_dict()
    state = {
        "lm_head.weight": theirs["lm_head.weight"],
        "transformer.wte.weight": theirs["model.embed_tokens.weight"],
        "transformer.ln_f.weight": theirs["model.norm.weight"],
    }
    for i in range(config.n_layer):
        source, target = f"model.layers.{i}.", f"transformer.h.{i}."
        for kind in ("weight", "bias") if config.attn_bias else ("weight",):
            qkv = [theirs[f"{source}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            state[f"{target}attn.qkv.{kind}"] = torch.cat(qkv)
        names = {
            "input_layernorm.weight": "norm_1.weight",
            "post_attention_layernorm.weight": "norm_2.weight",
            "self_attn.o_proj.weight": "attn.proj.weight",
            "self_attn.q_norm.weight": "attn.norm_q.weight",
            "self_attn.k_norm.weight": "attn.norm_k.weight",
            "mlp.gate_proj.weight": "mlp.fc_1.weight",
            "mlp.up_proj.weight": "mlp.fc_2.weight",
            "mlp.down_proj.weight": "mlp.proj.weight",
            "mlp.gate.weight": "mlp.gate.weight",
            "mlp.experts.gate_up_proj": "mlp.experts.gate_up_proj",
            "mlp.experts.down_proj": "mlp.experts.down_proj",
        }
        state |= {target + ours: theirs[source + name] for name, ours in names.items() if source + name in theirs}
    model = GPT(config)
    model.load_state_dict(state)
    return model.eval()


def build(config: Config, seed: int = 0) -> GPT:
    """Our own random model."""
    model = GPT(config)
    model.init_weights(std=0.2, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def ids(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(seed))


FAMILIES = ["qwen3", "qwen3_moe", "llama", "qwen2", "mistral", "mixtral"]
CASES: list[tuple[str, dict[str, Any]]] = [(family, {}) for family in FAMILIES] + [
    ("qwen3", {"tie_embeddings": True}),
    ("qwen3", {"n_head": 3, "n_query_groups": 3, "head_size": 10}),
    ("qwen3", {"n_head": 5, "n_query_groups": 1, "head_size": 6}),
    ("llama", {"n_head": 3, "n_query_groups": 1, "head_size": 10, "tie_embeddings": True, "norm_eps": 1e-5}),
    ("qwen3_moe", {"n_expert": 7, "n_expert_per_token": 3, "tie_embeddings": True}),
    ("qwen3_moe", {"n_expert": 4, "n_expert_per_token": 4}),
    ("qwen3_moe", {"n_expert": 3, "n_expert_per_token": 1}),
]


@pytest.mark.parametrize(("family", "overrides"), CASES)
@torch.no_grad()
def test_logits_equal_transformers(family: str, overrides: dict[str, Any]) -> None:
    """Whole sequences, then the same with a cache: a prefill, a second chunk, and single steps."""
    config = config_of(family, **overrides)
    hf = reference(config)
    model = from_transformers(hf, config)
    idx = ids(2, 17)
    expected = hf(idx, output_hidden_states=True)
    out = model(idx, layers=range(config.n_layer))
    torch.testing.assert_close(out.logits, expected.logits, atol=2e-5, rtol=1e-5)
    for i in range(config.n_layer - 1):  # transformers' last entry is after the final norm
        torch.testing.assert_close(out.hidden_states[i], expected.hidden_states[i + 1], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(out.hidden, expected.hidden_states[-1], atol=2e-5, rtol=1e-5)

    cache = KVCache(config, batch_size=2, max_seq_length=17)
    pieces = [model(piece, kv_cache=cache).logits for piece in idx.split([7, 5, 1, 1, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected.logits, atol=2e-5, rtol=1e-5)
    assert cache.length == 17


@torch.no_grad()
def test_decoding_equals_transformers_decoding_with_its_cache() -> None:
    config = config_of("qwen3_moe")
    hf = reference(config)
    model = from_transformers(hf, config)
    cache = KVCache(config, 1, 20)
    step, past = ids(1, 6), None
    for _ in range(8):
        theirs = hf(step, past_key_values=past, use_cache=True)
        past = theirs.past_key_values
        ours = model(step, kv_cache=cache).logits
        torch.testing.assert_close(ours, theirs.logits, atol=2e-5, rtol=1e-5)
        step = ours[:, -1:].argmax(dim=-1)


@torch.no_grad()
def test_router_logits_equal_transformers() -> None:
    config = config_of("qwen3_moe")
    hf = reference(config)
    idx = ids(2, 9)
    theirs = hf(idx, output_router_logits=True).router_logits
    routing = from_transformers(hf, config)(idx).routing
    assert list(routing) == [0, 1, 2]
    for i, routed in routing.items():
        torch.testing.assert_close(routed.logits_NE, theirs[i], atol=1e-5, rtol=1e-5)
        assert routed.expert_ids_NK.shape == routed.weights_NK.shape == (18, 2)
        assert (routed.expert_ids_NK.dtype, routed.weights_NK.dtype) == (torch.int64, torch.float32)
        torch.testing.assert_close(routed.weights_NK.sum(dim=1), torch.ones(18))
        assert torch.equal(routed.expert_ids_NK, routed.logits_NE.topk(2).indices)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_bfloat16_stays_near_transformers(family: str) -> None:
    """Same casts in the same places: nearly all logits agree to the last bit."""
    config = config_of(family)
    hf = reference(config)
    model = from_transformers(hf, config).to(torch.bfloat16)
    idx = ids(2, 17)
    ours, theirs = model(idx).logits.float(), hf.to(torch.bfloat16)(idx).logits.float()
    exact = reference(config)(idx).logits
    assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen2"])
def test_gradients_equal_transformers(family: str) -> None:
    config = config_of(family)
    hf = reference(config).train()
    model = from_transformers(hf, config).train()
    idx, weight = ids(2, 9), torch.randn(2, 9, V, generator=torch.Generator().manual_seed(3))
    (model(idx).logits * weight).sum().backward()
    (hf(idx).logits * weight).sum().backward()
    ours = dict(model.named_parameters())
    theirs = dict(hf.named_parameters())
    layer = "transformer.h.1."
    pairs = {
        "transformer.wte.weight" if not config.tie_embeddings else "lm_head.weight": "model.embed_tokens.weight",
        layer + "norm_2.weight": "model.layers.1.post_attention_layernorm.weight",
        layer + "attn.proj.weight": "model.layers.1.self_attn.o_proj.weight",
    }
    if config.norm_qk:
        pairs[layer + "attn.norm_k.weight"] = "model.layers.1.self_attn.k_norm.weight"
    if config.is_moe:
        for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
            pairs[layer + "mlp." + name] = "model.layers.1.mlp." + name
    for name, their_name in pairs.items():
        torch.testing.assert_close(ours[name].grad, theirs[their_name].grad, atol=2e-4, rtol=1e-4, msg=name)


def documents_of(lengths: list[int]) -> Tensor:
    return torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_packed_documents_equal_single_documents(family: str) -> None:
    config = config_of(family)
    model = build(config)
    lengths = [[4, 1, 7], [6, 6]]
    idx = ids(2, 16)
    documents = torch.full((2, 16), -1)
    for row, row_lengths in enumerate(lengths):
        documents[row, : sum(row_lengths)] = documents_of(row_lengths) + 5 * row
    packed = model(idx, documents_BT=documents, layers=[1])
    for row, row_lengths in enumerate(lengths):
        start = 0
        for n in row_lengths:
            alone = model(idx[row : row + 1, start : start + n], layers=[1])
            assert alone.logits is not None
            assert packed.logits is not None
            torch.testing.assert_close(packed.logits[row, start : start + n], alone.logits[0], atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(
                packed.hidden_states[1][row, start : start + n], alone.hidden_states[1][0], atol=2e-5, rtol=1e-5
            )
            start += n
    assert torch.isfinite(packed.hidden).all()


@torch.no_grad()
def test_documents_are_isolated() -> None:
    """Changing one document changes no bit of another."""
    model = build(config_of("qwen3"))
    documents = documents_of([5, 6, 4])[None]
    idx = ids(1, 15)
    changed = idx.clone()
    changed[0, 5:11] = (changed[0, 5:11] + 1) % V
    before, after = (model(x, documents_BT=documents).hidden[0] for x in (idx, changed))
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[11:], after[11:])
    assert not torch.equal(before[5:11], after[5:11])


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=5), min_size=1, max_size=3))
def test_positions_and_mask(rows: list[list[int]]) -> None:
    length = max(sum(row) for row in rows)
    rows = [[*row, length - sum(row)] if sum(row) < length else row for row in rows]
    documents = torch.stack([documents_of(row) for row in rows])
    positions = positions_in_document(documents)
    assert positions.tolist() == [[p for n in row for p in range(n)] for row in rows]
    mask = document_mask(documents)
    assert mask.shape == (len(rows), 1, length, length)
    for row, row_documents in enumerate(documents.tolist()):
        for q in range(length):
            for k in range(length):
                assert bool(mask[row, 0, q, k]) == (k <= q and row_documents[q] == row_documents[k])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.booleans())
@torch.no_grad()
def test_any_split_of_a_sequence_through_the_cache(pieces: list[int], moe: bool) -> None:
    config = config_of("qwen3_moe" if moe else "qwen3", n_layer=2)
    model = build(config)
    idx = ids(2, sum(pieces))
    whole = model(idx).hidden
    cache = KVCache(config, 2, 64)
    parts = [model(part, kv_cache=cache, return_logits=False).hidden for part in idx.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=5e-5, rtol=1e-4)


@torch.no_grad()
def test_cache_rows_and_dtype() -> None:
    config = config_of("qwen3")
    model = build(config).to(torch.bfloat16)
    cache = KVCache(config, 2, 8, dtype=torch.bfloat16)
    assert cache.kv.shape == (2, 3, 2, 2, 8, 14)
    idx = ids(2, 5)
    model(idx, kv_cache=cache)
    kept = cache.kv[:, :, 1].clone()
    cache.keep_rows([1])
    assert cache.length == 5 and torch.equal(cache.kv[:, :, 0], kept)


@pytest.mark.parametrize("moe", [False, True])
@torch.no_grad()
def test_left_padding_changes_nothing_but_rounding(moe: bool) -> None:
    config = config_of("qwen3_moe" if moe else "qwen3", n_layer=2)
    model = build(config).double()
    short, long = ids(1, 3), ids(1, 7)
    padded = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.int64), short], dim=1), long])
    cache = KVCache(config, 2, 16, dtype=torch.float64)
    padding = torch.tensor([4, 0])
    both = model(padded, kv_cache=cache, left_padding_B=padding).logits
    torch.testing.assert_close(both[0, 4:], model(short).logits[0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(both[1], model(long).logits[0], atol=1e-12, rtol=1e-12)
    following = ids(2, 1)
    step = model(following, kv_cache=cache, left_padding_B=padding).logits
    torch.testing.assert_close(
        step[0, 0], model(torch.cat([short, following[:1]], 1)).logits[0, -1], atol=1e-12, rtol=1e-12
    )
    with pytest.raises(ValueError, match="left_padding_B"):
        model(padded, left_padding_B=padding)


def test_cache_holds_no_graph_and_works_with_checkpointing_on() -> None:
    model = build(config_of("qwen3"))
    model.activation_checkpointing = True
    cache = KVCache(model.config, 1, 8)
    whole = model(ids(1, 8)).logits
    parts = [model(part, kv_cache=cache).logits for part in ids(1, 8).split([5, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=1e-5)
    assert not cache.kv.requires_grad


@torch.no_grad()
def test_output() -> None:
    model = build(config_of("qwen3"))
    idx = ids(2, 5)
    out = model(idx, return_logits=False, layers=[0, 2])
    assert out.logits is None
    assert out.hidden.shape == (2, 5, 30)
    assert list(out.hidden_states) == [0, 2]
    assert out.routing == {}
    torch.testing.assert_close(model.transformer.ln_f(out.hidden_states[2]), out.hidden)
    torch.testing.assert_close(model.lm_head(out.hidden), model(idx).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_blocks_can_be_run_one_by_one(family: str) -> None:
    config = config_of(family)
    model = build(config)
    idx = ids(2, 7)
    out = model(idx, layers=range(3))
    x = model.transformer.wte(idx)
    cos, sin = rope_cos_sin(torch.arange(7)[None], config, x.dtype)
    for i, block in enumerate(model.transformer.h):
        assert isinstance(block, Block)
        x, routed = block(x, cos, sin)
        assert torch.equal(x, out.hidden_states[i])
        assert (routed is not None) == config.is_moe


def test_calls_that_make_no_sense() -> None:
    config = config_of("qwen3")
    model = build(config)
    with pytest.raises(ValueError, match="65 positions, but the model's block_size is 64"):
        model(ids(1, 65))
    cache = KVCache(config, 1, 4)
    with pytest.raises(ValueError, match="5 positions, but the cache holds 4"):
        model(ids(1, 5), kv_cache=cache)
    with pytest.raises(ValueError, match="exclude each other"):
        model(ids(1, 3), kv_cache=cache, documents_BT=torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"documents_BT has shape \(1, 2\), idx_BT \(1, 3\)"):
        model(ids(1, 3), documents_BT=torch.zeros(1, 2))
    for layer in (3, -1):
        with pytest.raises(ValueError, match=f"layer {layer} does not exist"):
            model(ids(1, 3), layers=[0, layer])


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_activation_checkpointing_changes_nothing(family: str) -> None:
    model = build(config_of(family)).train()
    idx, documents = ids(2, 9), documents_of([4, 5]).expand(2, 9)
    results = []
    for on in (False, True):
        model.activation_checkpointing = on
        model.zero_grad()
        out = model(idx, documents_BT=documents, layers=[1])
        loss = out.hidden.square().mean() + out.hidden_states[1].abs().mean()
        loss = loss + sum(r.logits_NE.square().mean() + r.weights_NK[:, 0].mean() for r in out.routing.values())
        loss.backward()
        results.append([out.hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_tied_embeddings_are_one_parameter_through_everything() -> None:
    config = config_of("qwen3", tie_embeddings=True)
    model = build(config)

    def tied(model: GPT) -> bool:
        names = [name for name, _ in model.named_parameters() if "lm_head" in name or "wte" in name]
        return model.lm_head.weight is model.transformer.wte.weight and len(names) == 1

    assert tied(model)
    assert {"lm_head.weight", "transformer.wte.weight"} <= set(model.state_dict())
    assert tied(model.to(torch.bfloat16))
    with torch.device("meta"):
        meta = GPT(config)
    assert tied(meta)
    meta.load_state_dict(model.state_dict(), assign=True)
    assert tied(meta)
    with torch.device("meta"):
        meta = GPT(config)
    assert tied(meta.to_empty(device="cpu"))
    assert not tied(build(config_of("qwen3")))


def test_meta_model_loads_and_runs() -> None:
    """Nothing in the model needs initialising beyond its state dict."""
    model = build(config_of("qwen3_moe"))
    with torch.device("meta"):
        meta = GPT(model.config)
    meta.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(meta(ids(1, 6)).logits, model(ids(1, 6)).logits)


def test_rope_survives_bfloat16_and_matches_transformers() -> None:
    config = config_of("qwen3", head_size=128, block_size=40960)
    hf: Any = transformers.AutoConfig.for_model(**config.to_hf())
    rotary = transformers.models.qwen3.modeling_qwen3.Qwen3RotaryEmbedding(hf)
    positions = torch.tensor([[0, 1, 2, 777, 40959]])
    for dtype in (torch.float32, torch.bfloat16):
        expected = rotary(torch.zeros(1, dtype=dtype), positions)
        for ours, theirs in zip(rope_cos_sin(positions, config, dtype), expected, strict=True):
            assert torch.equal(ours[:, 0], theirs)


def test_init_weights() -> None:
    model = GPT(config_of("qwen2", n_embd=64, intermediate_size=256))
    model.init_weights(std=0.05, generator=torch.Generator().manual_seed(0))
    again = GPT(model.config)
    again.init_weights(std=0.05, generator=torch.Generator().manual_seed(0))
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
        if "norm" in name or "ln_f" in name:
            assert bool((a == 1).all())
        elif name.endswith("bias"):
            assert bool((a == 0).all())
        else:
            assert 0.04 < float(a.detach().std()) < 0.06


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@torch.no_grad()
def test_cuda_equals_cpu(family: str) -> None:
    config = config_of(family, n_embd=32, head_size=16, intermediate_size=48, moe_intermediate_size=None)
    model = build(config)
    idx, documents = ids(2, 16), documents_of([5, 11]).expand(2, 16)
    on_cpu = [model(idx).logits, model(idx, documents_BT=documents).logits]
    model.to("cuda")
    on_cuda = [model(idx.cuda()).logits, model(idx.cuda(), documents_BT=documents.cuda()).logits]
    for ours, expected in zip(on_cuda, on_cpu, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours.cpu(), expected, atol=1e-4, rtol=1e-4)


def compiled_and_eager(model: GPT, **how: Any) -> list[list[Tensor]]:
    """Logits and all gradients, first eager and then compiled."""
    results = []
    for run in (model, torch.compile(model, **how)):
        model.zero_grad()
        out = run(ids(2, 8).to(model.lm_head.weight.device))
        (out.logits.square().mean() + sum(r.logits_NE.square().mean() for r in out.routing.values())).backward()
        results.append([out.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    return results


def small_for_compile(family: str) -> Config:
    sizes = {"n_embd": 32, "intermediate_size": 48} | ({"moe_intermediate_size": 24} if family == "qwen3_moe" else {})
    return config_of(family, n_layer=1, **sizes)


@pytest.mark.parametrize(
    ("family", "dtype", "fullgraph", "tolerance"),
    [
        ("qwen3", torch.float32, True, 1e-5),
        ("qwen3_moe", torch.bfloat16, True, 2e-2),
        ("qwen3_moe", torch.float32, False, 1e-5),
    ],
)
def test_tracing_for_compile(family: str, dtype: torch.dtype, fullgraph: bool, tolerance: float) -> None:
    """One graph without breaks, forward and backward; experts that are not bf16 cost a break and stay right."""
    model = build(small_for_compile(family)).to(dtype).train()
    for eager, compiled in zip(*compiled_and_eager(model, fullgraph=fullgraph, backend="aot_eager"), strict=True):
        assert (compiled - eager).norm() <= tolerance * eager.norm()


@pytest.mark.slow
def test_torch_compile() -> None:
    model = build(small_for_compile("qwen3_moe")).to(torch.bfloat16).train()
    for eager, compiled in zip(*compiled_and_eager(model, fullgraph=True), strict=True):
        assert (compiled - eager).norm() <= 2e-2 * eager.norm()
