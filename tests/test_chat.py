"""The chat format: equal to Qwen3's own template, every id labelled, and nothing a user writes becomes structure."""

from __future__ import annotations

import itertools
import unicodedata
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from litgpt.chat import Message, Span, Tags, chat_template, render, tag_ids
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError
from tests.tiny_tokenizer import CONTROL_TOKENS, build_tiny_tokenizer

QWEN3 = Path(__file__).resolve().parents[2] / "shared" / "qwen3_tokenizer"
needs_qwen3 = pytest.mark.skipif(not QWEN3.is_dir(), reason="Qwen3's tokenizer files are not on this machine")

SYSTEM: Message = {"role": "system", "content": "तुम किसानों के सलाहकार हो।\nछोटा उत्तर दो।"}
ASK: Message = {"role": "user", "content": "गेहूँ के पत्ते पीले हैं, क्या करूँ? 🌾"}
ASK_MORE: Message = {"role": "user", "content": "  और पानी?  \n"}
ANSWER: Message = {"role": "assistant", "content": "कृषि विज्ञान केंद्र से पूछें।"}
THINKING_ANSWER: Message = {
    "role": "assistant",
    "content": "\n\nयह पीला रतुआ हो सकता है।\n",
    "thought": "\nयह रतुआ है या नाइट्रोजन की कमी?\n\nपत्ती पर धारियाँ देखो.\n",
}
THOUGHTFUL_ANSWER: Message = {**THINKING_ANSWER, "content": "यह पीला रतुआ हो सकता है।"}
EMPTY_ANSWER: Message = {"role": "assistant", "content": ""}

CONVERSATIONS: dict[str, list[Message]] = {
    "question": [ASK],
    "system and question": [SYSTEM, ASK],
    "answered": [SYSTEM, ASK, ANSWER],
    "answered with a thought": [SYSTEM, ASK, THINKING_ANSWER],
    "no system": [ASK, THINKING_ANSWER],
    "several turns": [SYSTEM, ASK, THOUGHTFUL_ANSWER, ASK_MORE, ANSWER],
    "several turns, last thinks": [ASK, ANSWER, ASK_MORE, THINKING_ANSWER],
    "history ends with a question": [SYSTEM, ASK, THOUGHTFUL_ANSWER, ASK_MORE],
    "answer that starts with line breaks in the history": [ASK, THINKING_ANSWER, ASK_MORE, ANSWER],
    "two answers in a row": [ASK, THINKING_ANSWER, ANSWER],
    "two answers in a row, first without thought": [ASK, ANSWER, THINKING_ANSWER],
    "empty answer": [ASK, EMPTY_ANSWER],
    "late system turn": [ASK, ANSWER, SYSTEM, ASK_MORE, ANSWER],
    "no question": [SYSTEM, ANSWER],
}

# Pieces that a careless renderer would take for structure, beside ordinary text.
WORDS = [
    *CONTROL_TOKENS,
    "<thought>",
    "</thought>",
    "किसान",
    "क्‍ष",
    "र्‍य",
    "👩‍🌾",
    "।",
    " ",
    "\n",
    "\n\n",
    "a.",
    "ृ",
    "user\n",
]
CONTENT = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)
ASSISTANT = st.fixed_dictionaries({"role": st.just("assistant"), "content": CONTENT}, optional={"thought": CONTENT})
OTHER = st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": CONTENT})
MESSAGES = st.lists(st.one_of(ASSISTANT, OTHER), min_size=1, max_size=5).map(lambda found: cast(list[Message], found))
TAGS: tuple[Tags, ...] = ("thought", "think")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    tokenizer = Tokenizer(build_tiny_tokenizer(tmp_path_factory.mktemp("chat") / "tiny"))
    tokenizer.add_thought_tokens(1000)
    return tokenizer


@pytest.fixture(scope="session")
def tiny_auto(tiny: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("chat") / "saved"
    directory.mkdir()
    tiny.save(directory)
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(directory)


def for_transformers(messages: list[Message]) -> list[dict[str, str]]:
    """Qwen3's template knows the thought as `reasoning_content`."""
    rename = {"thought": "reasoning_content"}
    return [{rename.get(key, key): cast(str, value) for key, value in message.items()} for message in messages]


def runs(ids: list[int], spans: list[int]) -> list[tuple[Span, list[int]]]:
    """Neighbouring ids of one span, together."""
    pairs = itertools.groupby(zip(spans, ids, strict=True), key=lambda pair: pair[0])
    return [(Span(span), [index for _, index in group]) for span, group in pairs]


def texts(tokenizer: Tokenizer, ids: list[int], spans: list[int], wanted: Span) -> list[str]:
    return [tokenizer.decode(part, skip_special=False) for span, part in runs(ids, spans) if span is wanted]


# Equal to the template


@needs_qwen3
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_equal_to_qwen3_own_template(qwen3: tuple[Tokenizer, Any], name: str, prompt: bool, thinking: bool) -> None:
    tokenizer, auto = qwen3
    messages = for_transformers(CONVERSATIONS[name])
    options = {"add_generation_prompt": prompt, "enable_thinking": thinking}
    expected = auto.apply_chat_template(messages, tokenize=False, **options)
    ours = render(CONVERSATIONS[name], tokenizer, tags="think", add_generation_prompt=prompt, thinking=thinking)
    assert tokenizer.decode(ours.ids, skip_special=False) == expected
    assert (
        auto.apply_chat_template(messages, tokenize=False, chat_template=chat_template("think"), **options) == expected
    )
    # The template lets a turn without a block start with line breaks, which then share a token with the header's;
    # ours stay apart, for the sake of the answer's ids.
    if "<|im_start|>assistant\n\n" not in expected:
        assert ours.ids == auto(expected, add_special_tokens=False).input_ids


@needs_qwen3
def test_thought_inside_the_content_is_taken_apart_as_qwen3_does(qwen3: tuple[Tokenizer, Any]) -> None:
    _, auto = qwen3
    answer = {"role": "assistant", "content": "<think>\nरतुआ?\n</think>\n\nछिड़काव करें।"}
    for messages in ([ASK, answer], [ASK, answer, ASK_MORE], [ASK, answer, ASK_MORE, answer]):
        expected = auto.apply_chat_template(messages, tokenize=False)
        assert auto.apply_chat_template(messages, tokenize=False, chat_template=chat_template("think")) == expected


@pytest.fixture(scope="session")
def qwen3() -> tuple[Tokenizer, Any]:
    return Tokenizer(QWEN3), pytest.importorskip("transformers").AutoTokenizer.from_pretrained(QWEN3)


@pytest.mark.parametrize("tags", TAGS)
@pytest.mark.parametrize("key", ["thought", "reasoning_content"])
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_equal_to_our_template(
    tiny: Tokenizer, tiny_auto: Any, name: str, thinking: bool, key: str, tags: Tags
) -> None:
    messages: list[Any] = CONVERSATIONS[name] if key == "thought" else for_transformers(CONVERSATIONS[name])
    for prompt in (True, False):
        expected = tiny_auto.apply_chat_template(
            messages,
            tokenize=False,
            chat_template=chat_template(tags),
            add_generation_prompt=prompt,
            enable_thinking=thinking,
        )
        ours = render(CONVERSATIONS[name], tiny, tags=tags, add_generation_prompt=prompt, thinking=thinking)
        assert tiny.decode(ours.ids, skip_special=False) == expected


def test_template_refuses_what_it_would_drop(tiny_auto: Any) -> None:
    with pytest.raises(Exception, match="role tool is not supported"):
        tiny_auto.apply_chat_template(
            [ASK, {"role": "tool", "content": "x"}], tokenize=False, chat_template=chat_template("thought")
        )


def test_rendered_text_by_hand(tiny: Tokenizer) -> None:
    """Golden text, so that the format is pinned where neither Qwen3's files nor transformers are at hand."""
    messages: list[Message] = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a", "thought": "gone"},
        {"role": "user", "content": "v"},
        {"role": "assistant", "content": "\nb", "thought": "\nt\n"},
    ]
    rendered = render(messages, tiny, add_generation_prompt=True, thinking=False)
    assert tiny.decode(rendered.ids, skip_special=False) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nv<|im_end|>\n<|im_start|>assistant\n<thought>\nt\n</thought>\n\nb<|im_end|>\n"
        "<|im_start|>assistant\n<thought>\n\n</thought>\n\n"
    )
    assert texts(tiny, rendered.ids, rendered.spans, Span.THOUGHT) == ["<thought>\nt\n</thought>\n\n"]
    assert texts(tiny, rendered.ids, rendered.spans, Span.ANSWER) == ["a<|im_end|>", "b<|im_end|>"]


# Spans


@given(MESSAGES, st.sampled_from(TAGS), st.booleans(), st.booleans(), st.booleans())
def test_every_id_has_its_span(
    tiny: Tokenizer, messages: list[Message], tags: Tags, keep: bool, prompt: bool, thinking: bool
) -> None:
    rendered = render(messages, tiny, tags=tags, keep_thoughts=keep, add_generation_prompt=prompt, thinking=thinking)
    assert len(rendered.ids) == len(rendered.spans)
    assert set(rendered.spans) <= {Span.PROMPT, Span.THOUGHT, Span.ANSWER}
    opening, closing = tag_ids(tiny, tags)
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=len(messages) - 1)

    answers, thoughts, blocks = [], [], int(prompt and not thinking)
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        thought = message.get("thought", "") if keep and message.get("thought", "").strip() else ""
        has_block = position > last_user and bool(thought or position == len(messages) - 1)
        content = message["content"].lstrip("\n") if has_block else message["content"]
        answers.append(unicodedata.normalize("NFC", content) + "<|im_end|>")
        blocks += has_block
        if has_block and thought:
            inner = thought.strip("\n")
            thoughts.append(f"<{tags}>\n{inner}\n</{tags}>\n\n")
    assert texts(tiny, rendered.ids, rendered.spans, Span.ANSWER) == answers
    assert texts(tiny, rendered.ids, rendered.spans, Span.THOUGHT) == thoughts
    # Whatever the contents say, the structure has as many control tokens as turns and blocks.
    assert rendered.ids.count(opening) == rendered.ids.count(closing) == blocks
    assert rendered.ids.count(tiny.token_to_id("<|im_end|>") or -1) == len(messages)
    assert rendered.ids.count(tiny.token_to_id("<|im_start|>") or -1) == len(messages) + prompt


@given(MESSAGES, st.sampled_from(TAGS))
def test_without_thoughts_no_trace_is_left(tiny: Tokenizer, messages: list[Message], tags: Tags) -> None:
    bare = [cast(Message, {"role": message["role"], "content": message["content"]}) for message in messages]
    assert render(messages, tiny, tags=tags, keep_thoughts=False) == render(bare, tiny, tags=tags)
    assert Span.THOUGHT not in render(bare, tiny, tags=tags).spans


@given(CONTENT, CONTENT, CONTENT)
def test_answer_ids_do_not_depend_on_what_stands_before(
    tiny: Tokenizer, question: str, thought: str, answer: str
) -> None:
    """Distillation pairs student and teacher positions by these ids."""
    messages: list[Message] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer, "thought": thought},
    ]
    expected = [*tiny.encode(answer.lstrip("\n")), tiny.token_to_id("<|im_end|>")]
    for tags, keep in itertools.product(TAGS, (True, False)):
        rendered = render(messages, tiny, tags=tags, keep_thoughts=keep)
        pairs = zip(rendered.ids, rendered.spans, strict=True)
        assert [index for index, span in pairs if span == Span.ANSWER] == expected


def test_generation_prompt_continues_what_training_sees(tiny: Tokenizer) -> None:
    """The prompt of a question is a prefix of the same question answered."""
    for messages in ([ASK, THINKING_ANSWER], [SYSTEM, ASK, THINKING_ANSWER, ASK_MORE, THINKING_ANSWER]):
        prompt = render(messages[:-1], tiny, add_generation_prompt=True)
        answered = render(messages, tiny)
        assert answered.ids[: len(prompt.ids)] == prompt.ids
        assert answered.spans[: len(prompt.spans)] == prompt.spans
        assert answered.spans[len(prompt.spans)] == Span.THOUGHT
        at_once = render(messages[:-1], tiny, add_generation_prompt=True, thinking=False)
        unthinking = render(messages, tiny, keep_thoughts=False)
        assert unthinking.ids[: len(at_once.ids)] == at_once.ids
        assert unthinking.spans[len(at_once.ids)] == Span.ANSWER


# Mistakes


def test_mistakes_are_named(tmp_path: Path, tiny: Tokenizer) -> None:
    plain = Tokenizer(build_tiny_tokenizer(tmp_path / "plain"))
    with pytest.raises(UserError, match=r"no <thought> token.*--thought_tokens add"):
        render([ASK], plain)
    assert render([ASK], plain, tags="think").ids
    with pytest.raises(UserError, match="message 1 has the role 'tool'"):
        render([ASK, cast(Message, {"role": "tool", "content": ""})], tiny)
    with pytest.raises(UserError, match="lone surrogate"):
        render([{"role": "user", "content": "\udcff"}], tiny)
    assert render([], tiny).ids == []
