"""Messages → token ids with a span label each, in Qwen3's chat format; and the same format as a jinja template.

    <|im_start|>system\\n…<|im_end|>\\n
    <|im_start|>user\\n…<|im_end|>\\n
    <|im_start|>assistant\\n<thought>\\n…\\n</thought>\\n\\n…<|im_end|>\\n

`render` never builds one string: control tokens are placed by id and everything a person wrote is encoded as plain
text, so no content can open or close a turn. Prompt, thought and answer are encoded apart, so no token crosses from
one span into the next, and the answer has the same ids whatever stands before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, NotRequired, TypedDict

from litgpt.tokenizer import THINK_TOKENS, THOUGHT_TOKENS, Tokenizer
from litgpt.utils import UserError

__all__ = ["IM_END", "IM_START", "Message", "Rendered", "Span", "Tags", "chat_template", "render", "tag_ids"]

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
ROLES = ("system", "user", "assistant")

Tags = Literal["thought", "think"]
_TAG_TOKENS: dict[Tags, tuple[str, str]] = {"thought": THOUGHT_TOKENS, "think": THINK_TOKENS}


class Span(IntEnum):
    """What a token belongs to; the weights of the losses follow from it. One byte a token."""

    PROMPT = 0
    """Given, not learnt: system and user turns, headers, an empty thought block."""
    THOUGHT = 1
    """The thought block: both tags, the text between them and the blank line after."""
    ANSWER = 2
    """What the user reads, and the `<|im_end|>` that ends it."""
    PAD = 3
    """Filler of a batch."""


class Message(TypedDict):
    """One turn. `thought` is read on assistant turns only."""

    role: Literal["system", "user", "assistant"]
    content: str
    thought: NotRequired[str]


@dataclass
class Rendered:
    """Token ids and their spans, of equal length."""

    ids: list[int] = field(default_factory=list)
    spans: list[int] = field(default_factory=list)

    def add(self, ids: Iterable[int], span: Span) -> None:
        """Append ids that all belong to `span`."""
        before = len(self.ids)
        self.ids.extend(ids)
        self.spans.extend([int(span)] * (len(self.ids) - before))


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    tags: Tags = "thought",
    keep_thoughts: bool = True,
    add_generation_prompt: bool = False,
    thinking: bool = True,
) -> Rendered:
    """Token ids and spans of a conversation.

    As in Qwen3's own template, only the assistant turns after the last user turn carry a thought block: the last
    message always (an empty block if it has no thought), the ones before it if they have a thought. An empty block is
    PROMPT, since it is given and not learnt. The text of every assistant turn is ANSWER, in earlier turns too.

    Args:
        messages: turns in order; a system turn comes first, if at all, though any place renders.
        tokenizer: must have `<|im_start|>`, `<|im_end|>` and the two tags.
        tags: which pair of tokens encloses the thought.
        keep_thoughts: `False` renders as if no message had a thought.
        add_generation_prompt: end with the header of an assistant turn.
        thinking: `False` lets that header be followed by an empty thought block, so that the model answers at once.

    Raises:
        UserError: a role that does not exist, or a tokenizer without the tokens of the format.
    """
    start, end = _required_id(tokenizer, IM_START), _required_id(tokenizer, IM_END)
    opening, closing = tag_ids(tokenizer, tags)
    newline = tokenizer.encode("\n")
    blank_line = tokenizer.encode("\n\n")
    header = [start, *tokenizer.encode("assistant\n")]
    empty_block = [opening, *blank_line, closing, *blank_line]
    last_user = _last_user(messages)

    rendered = Rendered()
    for position, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise UserError(f"message {position} has the role {role!r}: expected one of {', '.join(ROLES)}")
        if role != "assistant":
            rendered.add([start, *tokenizer.encode(f"{role}\n{content}"), end, *newline], Span.PROMPT)
            continue
        rendered.add(header, Span.PROMPT)
        thought = message.get("thought") or ""
        thinks = keep_thoughts and bool(thought.strip())
        if position > last_user and (thinks or position == len(messages) - 1):
            if thinks:
                inner = tokenizer.encode("\n" + thought.strip("\n") + "\n")
                rendered.add([opening, *inner, closing, *blank_line], Span.THOUGHT)
            else:
                rendered.add(empty_block, Span.PROMPT)
            content = content.lstrip("\n")
        rendered.add([*tokenizer.encode(content), end], Span.ANSWER)
        rendered.add(newline, Span.PROMPT)
    if add_generation_prompt:
        rendered.add(header if thinking else [*header, *empty_block], Span.PROMPT)
    return rendered


def tag_ids(tokenizer: Tokenizer, tags: Tags) -> tuple[int, int]:
    """Ids of the opening and the closing tag.

    Raises:
        UserError: the tokenizer lacks them.
    """
    ids = tokenizer.thought_ids if tags == "thought" else tokenizer.think_ids
    if ids is None:
        other: Tags = "think" if tags == "thought" else "thought"
        raise UserError(
            f"the tokenizer has no {_TAG_TOKENS[tags][0]} token: add it with scripts/upcycle_moe.py "
            f'--thought_tokens add, or use tags "{other}"'
        )
    return ids


def _required_id(tokenizer: Tokenizer, token: str) -> int:
    index = tokenizer.token_to_id(token)
    if index is None:
        raise UserError(f"the tokenizer has no {token} token: expected a checkpoint with Qwen's chat format")
    return index


def _last_user(messages: Sequence[Message]) -> int:
    """Position of the last user turn; without one, of the last message, so that none comes after it."""
    users = [position for position, message in enumerate(messages) if message["role"] == "user"]
    return users[-1] if users else len(messages) - 1


# An assistant turn may come back from a client with the thought still inside its content, because no stock server
# knows <thought>: the template takes it apart there, as Qwen3's does for <think>.
_TEMPLATE = """\
{%- set state = namespace(last_user=messages|length - 1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set state.last_user = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('role ' ~ message.role ~ ' is not supported: expected system, user or assistant') }}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' }}
    {%- set answer = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if message.thought is defined and message.thought %}
            {%- set thought = message.thought %}
        {%- elif message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set thought = message.reasoning_content %}
        {%- elif 'CLOSING' in answer %}
            {%- set thought = answer.split('CLOSING')[0].split('OPENING')[-1] %}
            {%- set answer = answer.split('CLOSING')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- set thought = thought.strip('\\n') if thought.strip() else '' %}
        {%- if loop.index0 > state.last_user and (loop.last or thought) %}
            {{- 'OPENING\\n' ~ thought ~ '\\nCLOSING\\n\\n' }}
            {%- set answer = answer.lstrip('\\n') %}
        {%- endif %}
    {%- endif %}
    {{- answer ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- 'OPENING\\n\\nCLOSING\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def chat_template(tags: Tags) -> str:
    """Jinja source of the format for export: reads `message.thought` or `message.reasoning_content`.

    Renders what `render` renders for system, user and assistant turns; tool calls are not part of it.

    Args:
        tags: which pair of tokens encloses the thought.
    """
    opening, closing = _TAG_TOKENS[tags]
    return _TEMPLATE.replace("OPENING", opening).replace("CLOSING", closing).rstrip("\n")
