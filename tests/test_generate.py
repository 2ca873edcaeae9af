"""Decoding: the same ids as transformers, a cache that can be continued, and nothing chosen that must not be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from litgpt.config import Config
from litgpt.generate import GREEDY, Sampling, choose, distribution, generate, generate_batch, new_cache
from litgpt.model import GPT
from litgpt.utils import UserError

VOCAB, PADDED = 100, 128
PROMPT = [5, 17, 3, 88, 41]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads of several workers would only stand in each other's way on matrices this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_model(*, moe: bool = True, tied: bool = True, block_size: int = 64, seed: int = 0) -> GPT:
    config = Config.from_name(
        "Qwen3-0.6B",
        n_layer=2,
        n_embd=32,
        n_head=4,
        n_query_groups=2,
        head_size=16,
        intermediate_size=48,
        vocab_size=VOCAB,
        padded_vocab_size=PADDED,
        block_size=block_size,
        tie_embeddings=tied,
    )
    model = GPT(config.upcycled(4, 2) if moe else config)
    model.init_weights(std=0.3, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def transformers_twin(model: GPT) -> Any:
    """The same weights in transformers' class, moved by a map of this test's own."""
    transformers = pytest.importorskip("transformers")
    config = model.config
    hf_config = transformers.AutoConfig.for_model(**config.to_hf())
    twin = transformers.AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager")
    q, kv = config.n_head * config.head_size, config.n_query_groups * config.head_size
    names = {
        "norm_1.weight": "input_layernorm.weight",
        "norm_2.weight": "post_attention_layernorm.weight",
        "attn.proj.weight": "self_attn.o_proj.weight",
        "attn.norm_q.weight": "self_attn.q_norm.weight",
        "attn.norm_k.weight": "self_attn.k_norm.weight",
        "mlp.fc_1.weight": "mlp.gate_proj.weight",
        "mlp.fc_2.weight": "mlp.up_proj.weight",
        "mlp.proj.weight": "mlp.down_proj.weight",
    }
    state: dict[str, Tensor] = {
        "model.embed_tokens.weight": model.transformer.wte.weight,
        "model.norm.weight": model.transformer.ln_f.weight,
        "lm_head.weight": model.lm_head.weight,
    }
    for i, block in enumerate(model.transformer.h):
        for name, weight in block.named_parameters():
            if name == "attn.qkv.weight":
                for part, rows in zip("qkv", weight.split((q, kv, kv)), strict=True):
                    state[f"model.layers.{i}.self_attn.{part}_proj.weight"] = rows
            else:
                state[f"model.layers.{i}.{names.get(name, name)}"] = weight
    twin.load_state_dict(state, strict=True)
    return twin.eval()


def recompute(model: GPT, ids: list[int], n_new: int) -> list[int]:
    """Greedy continuation without a cache."""
    ids = list(ids)
    with torch.inference_mode():
        for _ in range(n_new):
            logits = model(torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("moe", [True, False])
def test_greedy_equals_transformers(moe: bool, tied: bool) -> None:
    model = tiny_model(moe=moe, tied=tied)
    twin = transformers_twin(model)
    generator = torch.Generator().manual_seed(1)
    seen: set[int] = set()
    for length in (1, 2, 5, 9, 17):
        prompt = torch.randint(VOCAB, (1, length), generator=generator)
        ids = prompt[0].tolist()

        def reference(stop: list[int] | None, prompt: Tensor = prompt) -> list[int]:
            options = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0, "eos_token_id": stop}
            return twin.generate(prompt, **options)[0, prompt.size(1) :].tolist()

        free = reference(None)
        assert list(generate(model, ids, max_new_tokens=16)) == free
        # Stop at an id that does come: it is the last one in both.
        stops = [free[7], PADDED - 1]
        stopped = reference(stops)
        assert list(generate(model, ids, max_new_tokens=16, stop_ids=stops)) == stopped
        assert stopped[-1] in stops
        seen.update(free)
    assert len(seen) > 10, "a model that says the same everywhere would prove little"


@pytest.mark.parametrize("moe", [True, False])
def test_cache_changes_nothing(moe: bool) -> None:
    model = tiny_model(moe=moe).double()
    assert PROMPT + list(generate(model, PROMPT, max_new_tokens=30)) == recompute(model, PROMPT, 30)


def test_a_cache_can_be_continued() -> None:
    """In float64, where another split of the work cannot flip a close decision."""
    model = tiny_model().double()
    cache = new_cache(model, 60)
    first = list(generate(model, PROMPT, max_new_tokens=7, kv_cache=cache))
    assert cache.length == len(PROMPT) + len(first) - 1
    # What is said in between (a forced tag, a next question) is run together with the last id.
    said = [*PROMPT, *first, 9, 9, 1]
    second = list(generate(model, said, max_new_tokens=9, kv_cache=cache))
    assert said + second == recompute(model, said, 9)
    assert cache.length == len(said) + len(second) - 1
    with pytest.raises(ValueError, match="the prompt has only 2"):
        generate(model, said[:2], max_new_tokens=1, kv_cache=cache)


def test_ends_where_the_context_ends() -> None:
    model = tiny_model(block_size=16)
    assert len(list(generate(model, PROMPT, max_new_tokens=100))) == 16 - len(PROMPT)
    assert len(list(generate(model, PROMPT, max_new_tokens=100, kv_cache=new_cache(model, 9)))) == 9 - len(PROMPT)
    assert len(list(generate(model, [1] * 15, max_new_tokens=1))) == 1
    with pytest.raises(UserError, match="the prompt has 16 tokens, but there is room for 16"):
        generate(model, [1] * 16, max_new_tokens=1)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_padding_rows_and_forbidden_ids_are_never_chosen(temperature: float) -> None:
    model = tiny_model(tied=False)
    forbidden = [0, 1, 2, *range(20, 60)]
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] *= 20  # tempting
        model.lm_head.weight[forbidden] *= 20
    ids = list(
        generate(
            model,
            PROMPT,
            max_new_tokens=59,
            sampling=Sampling(temperature=temperature),
            seed=1,
            forbidden_ids=forbidden,
            vocab_size=VOCAB,
        )
    )
    assert len(ids) == 59
    assert max(ids) < VOCAB
    assert not set(ids) & set(forbidden)


def test_a_seed_repeats_the_draws_and_leaves_the_global_state_alone() -> None:
    model = tiny_model()
    before = torch.random.get_rng_state()
    draws = [
        list(generate(model, PROMPT, max_new_tokens=20, sampling=Sampling(temperature=1.0), seed=seed))
        for seed in (3, 3, 4)
    ]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert draws[0] == draws[1] != draws[2]
    greedy = list(generate(model, PROMPT, max_new_tokens=20))
    assert list(generate(model, PROMPT, max_new_tokens=20, sampling=Sampling(1.0, top_k=1))) == greedy
    assert list(generate(model, PROMPT, max_new_tokens=20, sampling=Sampling(1.0, top_p=1e-9))) == greedy


@given(
    st.integers(0, 1000),
    st.sampled_from([0.05, 0.7, 1.0, 5.0]),
    st.sampled_from([None, 1, 3, 40, 1000]),
    st.sampled_from([None, 0.05, 0.5, 0.95]),
    st.sampled_from([None, 0.0, 0.1, 1.0]),
)
def test_distribution_equals_transformers(
    seed: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits_V = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 3
    expected = process.TemperatureLogitsWarper(temperature)(None, logits_V[None])
    if top_k is not None:
        expected = process.TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = process.TopPLogitsWarper(top_p)(None, expected)
    if min_p is not None:
        expected = process.MinPLogitsWarper(min_p)(None, expected)
    ours = distribution(logits_V, Sampling(temperature, top_k, top_p, min_p))
    torch.testing.assert_close(ours, expected[0].softmax(-1))


def test_draws_follow_the_distribution() -> None:
    logits_V = torch.tensor([1.0, 0.0, -torch.inf, 2.0])
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([choose(logits_V, Sampling(1.0), generator) for _ in range(4000)])
    share_V = draws.bincount(minlength=4) / 4000
    # Four standard errors of a share of one half.
    torch.testing.assert_close(share_V, logits_V.softmax(-1), atol=0.032, rtol=0)


@pytest.mark.parametrize("penalty", [0.8, 1.0, 1.7])
def test_a_repetition_penalty_equals_transformers(penalty: float) -> None:
    model = tiny_model()
    twin = transformers_twin(model)
    options = {"do_sample": False, "max_new_tokens": 30, "pad_token_id": 0, "repetition_penalty": penalty}
    expected = twin.generate(torch.tensor([PROMPT]), **options)[0, len(PROMPT) :].tolist()
    sampling = Sampling(repetition_penalty=penalty)
    assert list(generate(model, PROMPT, max_new_tokens=30, sampling=sampling)) == expected
    assert generate_batch(model, [PROMPT], max_new_tokens=30, sampling=sampling) == [expected]
    assert (expected == list(generate(model, PROMPT, max_new_tokens=30, sampling=GREEDY))) is (penalty == 1)


def test_the_caller_keeps_its_gradient_mode() -> None:
    model = tiny_model()
    cache = new_cache(model, 20)
    for _ in generate(model, PROMPT, max_new_tokens=3, kv_cache=cache):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert not cache.kv.requires_grad, "decoding has kept a graph"


def test_works_in_bfloat16() -> None:
    model = tiny_model().to(torch.bfloat16)
    cache = new_cache(model, 20)
    assert cache.kv.dtype == torch.bfloat16
    assert len(list(generate(model, PROMPT, max_new_tokens=10, kv_cache=cache))) == 10


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt_ids": []}, "the prompt is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e-9}, "from 0.01 to 100"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        if changed.keys() <= {"prompt_ids", "max_new_tokens"}:
            generate(tiny_model(), **{"prompt_ids": PROMPT, "max_new_tokens": 5, **changed})
        else:
            Sampling(**changed)


def test_a_batch_gives_each_row_what_it_gives_alone() -> None:
    model = tiny_model().double()
    prompts = [PROMPT, [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [50, 60], PROMPT[:2]]
    alone = [list(generate(model, prompt, max_new_tokens=25, vocab_size=VOCAB)) for prompt in prompts]
    assert generate_batch(model, prompts, max_new_tokens=25, vocab_size=VOCAB) == alone
    # With stops that end the rows at different times, rows are dropped on the way.
    stops = {row[n] for n, row in zip((3, 9, 1, 20, 6), alone, strict=True)}
    stopped = [list(generate(model, prompt, max_new_tokens=25, stop_ids=stops, vocab_size=VOCAB)) for prompt in prompts]
    assert len({len(row) for row in stopped}) > 1
    assert generate_batch(model, prompts, max_new_tokens=25, stop_ids=stops, vocab_size=VOCAB) == stopped


def test_a_batch_draws_repeatably_and_never_what_is_forbidden() -> None:
    model = tiny_model()
    prompts = [PROMPT, PROMPT[1:], [9]]
    drawn = generate_batch(
        model, prompts, max_new_tokens=30, sampling=Sampling(1.5), seed=3, forbidden_ids=(4, 5), vocab_size=VOCAB
    )
    assert drawn == generate_batch(
        model, prompts, max_new_tokens=30, sampling=Sampling(1.5), seed=3, forbidden_ids=(4, 5), vocab_size=VOCAB
    )
    assert drawn != generate_batch(model, prompts, max_new_tokens=30, sampling=Sampling(1.5), seed=4, vocab_size=VOCAB)
    said = {index for row in drawn for index in row}
    assert not said & {4, 5} and max(said) < VOCAB


def test_a_batch_ends_with_the_context_and_refuses_what_one_row_refuses() -> None:
    model = tiny_model(block_size=16)
    made = generate_batch(model, [[1] * 12, [2]], max_new_tokens=30)
    assert [len(row) for row in made] == [4, 4]
    assert generate_batch(model, [], max_new_tokens=3) == []
    with pytest.raises(UserError, match="empty"):
        generate_batch(model, [[1], []], max_new_tokens=3)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="NaN or infinite"):
        generate_batch(model, [[1], [2, 3]], max_new_tokens=3)


def test_a_diverged_checkpoint_is_named() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="NaN or infinite"):
        list(generate(model, PROMPT, max_new_tokens=3))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    model = tiny_model().double().cuda()
    assert PROMPT + list(generate(model, PROMPT, max_new_tokens=20)) == recompute(tiny_model().double(), PROMPT, 20)
    drawn = list(generate(model, PROMPT, max_new_tokens=20, sampling=Sampling(1.0), seed=1, vocab_size=VOCAB))
    assert drawn == list(generate(model, PROMPT, max_new_tokens=20, sampling=Sampling(1.0), seed=1, vocab_size=VOCAB))
