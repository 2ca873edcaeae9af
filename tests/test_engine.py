"""Continuous batching: whoever joins or leaves when, each text is what it would be alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from litgpt.engine import Engine, Prefixes, Text
from litgpt.generate import GREEDY, Sampling, generate
from litgpt.model import GPT
from litgpt.utils import UserError
from tests.test_generate import PROMPT, VOCAB, tiny_model


def alone(model: GPT, text: Text) -> list[int]:
    return list(
        generate(
            model,
            text.prompt_ids,
            max_new_tokens=text.max_new_tokens,
            stop_ids=text.stop_ids,
            sampling=text.sampling,
            seed=text.seed,
            forbidden_ids=text.forbidden_ids,
            vocab_size=VOCAB,
        )
    )


def texts(n: int, *, longest: int, seed: int, sampling: Sampling = GREEDY) -> list[Text]:
    draw = random.Random(seed)
    return [
        Text(
            [draw.randrange(VOCAB) for _ in range(draw.randint(1, longest))],
            max_new_tokens=draw.randint(1, 40),
            stop_ids=draw.sample(range(VOCAB), 4),
            forbidden_ids=draw.sample(range(VOCAB), draw.choice([0, 3])),
            sampling=sampling,
            seed=i,
        )
        for i in range(n)
    ]


@pytest.mark.parametrize("moe", [True, False])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, top_k=20, min_p=0.01, repetition_penalty=1.2)])
def test_texts_that_come_and_go_equal_those_alone(moe: bool, sampling: Sampling) -> None:
    """In float64, where another batch cannot flip a close decision."""
    model = tiny_model(moe=moe, block_size=512).double()
    draw = random.Random(1)
    coming = texts(40, longest=200, seed=2, sampling=sampling)
    engine = Engine(model, rows=5, vocab_size=VOCAB, prefill_tokens=32)
    ended: list[object] = []
    for text in coming:
        engine.add(text)
        for _ in range(draw.randint(0, 12)):
            ended += engine.step()
    while engine.running or engine.waiting:
        ended += engine.step()
    assert [text.ids for text in coming] == [alone(model, text) for text in coming]
    assert len(ended) == len(coming) and set(map(id, ended)) == set(map(id, coming))
    assert engine.step() == []


def test_a_full_context_ends_a_text_and_moves_the_others() -> None:
    model = tiny_model(block_size=96).double()
    engine = Engine(model, rows=3, vocab_size=VOCAB, prefill_tokens=16)
    coming = [Text([(7 * i + j) % VOCAB for j in range(1 + 13 * i % 90)], max_new_tokens=500) for i in range(12)]
    engine.run(coming)
    assert [text.ids for text in coming] == [alone(model, text) for text in coming]
    assert all(len(text.prompt_ids) + len(text.ids) == 96 for text in coming)
    assert engine._kv is not None and engine._kv.size(4) <= 96


def test_what_is_put_in_is_read_and_not_chosen() -> None:
    class Tagged(Text):
        """After the third id, three others are put in; the fifth choice is replaced."""

        def take(self, index: int) -> Sequence[int]:
            go_on = super().take(index)
            return (index, 3, 2, 1) if len(self.ids) == 3 else (50,) if len(self.ids) == 5 else go_on

    model = tiny_model().double()
    tagged, other = Tagged(PROMPT, max_new_tokens=9), Text([9, 9], max_new_tokens=30)
    engine = Engine(model, rows=2, vocab_size=VOCAB)
    engine.run([tagged, other])
    first = list(generate(model, PROMPT, max_new_tokens=3, vocab_size=VOCAB))
    second = list(generate(model, [*PROMPT, *first, 3, 2, 1], max_new_tokens=2, vocab_size=VOCAB))
    said = [*PROMPT, *first, 3, 2, 1, second[0], 50]
    assert tagged.ids == first + second + list(generate(model, said, max_new_tokens=4, vocab_size=VOCAB))
    assert other.ids == alone(model, other)


def test_dropped_texts_leave_and_the_others_do_not_notice() -> None:
    model = tiny_model(block_size=256).double()
    engine = Engine(model, rows=3, vocab_size=VOCAB, prefill_tokens=8)
    coming = [Text([i + 1] * (20 + i), max_new_tokens=30) for i in range(7)]
    for text in coming:
        engine.add(text)
    dropped = [coming[0], coming[2], coming[3], coming[6]]
    for i in range(9):
        engine.step()
        if i == 5:
            for text in dropped:
                engine.drop(text)  # one runs, one is joining, two wait
    engine.drop(Text([1], max_new_tokens=1))
    while engine.running or engine.waiting:
        engine.step()
    kept = [text for text in coming if text not in dropped]
    assert [text.ids for text in kept] == [alone(model, text) for text in kept]
    assert all(len(text.ids) < 30 for text in dropped)


def test_a_known_prefix_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(block_size=256).double()
    system = list(range(40))
    coming = [Text([*system, 41 + i, 7], max_new_tokens=6) for i in range(5)]
    run: list[int] = []
    forward = model.forward

    def counted(idx_BT: torch.Tensor, **settings: object) -> object:
        run.append(idx_BT.numel())
        return forward(idx_BT, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "forward", counted)
    with_prefix = Engine(model, vocab_size=VOCAB)
    for text in coming:
        with_prefix.run([text])
    assert run[0] == 42 and sum(run) == 42 + 4 * 2 + 5 * 5
    monkeypatch.undo()
    assert [text.ids for text in coming] == [alone(model, text) for text in coming]
    # The same prompt once more: one id must be run for there to be logits.
    again = Text(coming[0].prompt_ids, max_new_tokens=6)
    with_prefix.run([again])
    assert again.ids == coming[0].ids
    none = Prefixes(0)
    none.keep([1, 2], torch.zeros(2, 1, 1, 1, 2, 1))
    assert none.longest([1, 2]) == (0, None)


def test_prefixes_that_are_used_stay() -> None:
    kept = Prefixes(2)
    for first in (1, 2):
        kept.keep([first, first], torch.full((2, 1, 1, 1, 2, 1), first))
    assert kept.longest([1, 1, 5])[0] == 2
    kept.keep([3, 3], torch.zeros(2, 1, 1, 1, 2, 1))
    assert [kept.longest([n, n, 5])[0] for n in (1, 2, 3)] == [2, 0, 2]
    assert kept.longest([1, 1])[0] == 1


def test_prompts_that_do_not_fit_and_broken_models() -> None:
    model = tiny_model(block_size=16)
    engine = Engine(model, vocab_size=VOCAB)
    with pytest.raises(UserError, match="empty"):
        engine.add(Text([], max_new_tokens=3))
    with pytest.raises(UserError, match="16 tokens, but there is room for 16"):
        engine.add(Text([1] * 16, max_new_tokens=3))
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        Text([1], max_new_tokens=0)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(torch.nan)
    engine.add(Text([1], max_new_tokens=3))
    with pytest.raises(UserError, match="NaN or infinite"):
        engine.step()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    model = tiny_model(block_size=512).double().cuda()
    coming = texts(20, longest=100, seed=3)
    Engine(model, rows=4, vocab_size=VOCAB, prefill_tokens=32).run(coming)
    assert [text.ids for text in coming] == [alone(model, text) for text in coming]
