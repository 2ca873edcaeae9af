"""Any OpenAI-compatible server (vLLM, SGLang, llama.cpp, a paid one) as an adviser or a teacher.

The `openai` package does the talking: retries with backoff, time-outs, connection reuse. What is ours is that many
questions are under way at once, that each answer is handed over as it comes, and that a thought is found wherever a
server puts it (`reasoning_content`, `reasoning`, or tags inside the text).
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import openai

from litgpt.utils import UserError

Messages = Sequence[Mapping[str, Any]]

LONGEST_PAUSE = 120.0
"""Seconds that `openai` waits at most before it tries again, when a server asks for that (Retry-After)."""


@dataclass(frozen=True)
class RemoteReply:
    """What a server said, or why it said nothing."""

    text: str = ""
    thought: str | None = None
    finish: str | None = None
    """`stop`, `length`, ... as the server says."""
    error: str | None = None
    """One line, where the request failed for good."""


class Remote:
    """A server and how to ask it.

    Args:
        base_url: up to and including `/v1`.
        model: name of the model; `None` takes the only one that the server lists.
        concurrency: requests under way at once.
        timeout: seconds for one request.
        retries: further attempts after a time-out, a lost connection, a 429 or a 5xx.
        api_key_env: the environment variable that holds the key; a server of one's own needs none.

    Raises:
        UserError: the server cannot be reached, refuses the key, or serves several models and none was named.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        concurrency: int = 16,
        timeout: float = 120.0,
        retries: int = 5,
        api_key_env: str = "OPENAI_API_KEY",
    ) -> None:
        # What else an address can hold, a password or a key, would end up in messages and files; it is not repeated.
        if not re.fullmatch(r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d{1,5})?(/[^\s@?#]*)?", base_url):
            raise UserError(f"base_url is no plain address like http://127.0.0.1:8000/v1 (keys go into {api_key_env})")
        if concurrency < 1 or not 0 < timeout < float("inf") or retries < 0:
            raise UserError("concurrency is at least 1, timeout more than 0 seconds, retries at least 0")
        self.base_url = base_url
        self.concurrency = concurrency
        self._key = os.environ.get(api_key_env, "").strip() or "none"
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"the key in {api_key_env} holds signs that no key has; copy it again")
        self._timeout, self._retries = timeout, retries
        self.model = self._find(model, api_key_env)

    def _find(self, model: str | None, api_key_env: str) -> str:
        """The model to ask; looks whether the server is up even where the model is named."""
        base_url = self.base_url
        try:
            client = openai.OpenAI(
                base_url=base_url, api_key=self._key, timeout=self._timeout, max_retries=min(self._retries, 1)
            )
            with client:
                names = [entry.id for entry in client.models.list()]
        except (openai.APIConnectionError, openai.AuthenticationError) as error:
            hint = f"is the server up, and {api_key_env} its key?"
            raise UserError(f"{base_url}: {self._line(error)}; {hint}") from None
        except Exception as error:
            # Some servers have no such list, or send something else in its place.
            if model is None:
                raise UserError(f"{base_url} lists no model ({self._line(error)}): choose one with --model") from None
            return model
        if model is None and len(names) != 1:
            raise UserError(f"{base_url} serves {', '.join(names) or 'no model'}: choose one with --model")
        return model or names[0]

    def ask_all(
        self, conversations: Iterable[Messages], **settings: Any
    ) -> Generator[tuple[int, RemoteReply], None, None]:
        """(number, reply) of each conversation, in the order in which they come back.

        Only as many conversations as are under way have been taken from `conversations`, so it may be endless; whoever
        stops listening, or presses Ctrl-C, loses these alone and waits for none of them.

        Args:
            conversations: messages up to and including the user's last one.
            settings: of the chat completion (temperature, max_tokens, seed, extra_body ...).

        Raises:
            UserError: the server refuses the key or has no such model, which no further question would change.
        """
        waiting = enumerate(conversations)
        running: dict[asyncio.Task[RemoteReply], int] = {}
        with asyncio.Runner() as runner:
            client = openai.AsyncOpenAI(
                base_url=self.base_url, api_key=self._key, timeout=self._timeout, max_retries=self._retries
            )
            try:
                while True:
                    for number, messages in islice(waiting, self.concurrency - len(running)):
                        running[runner.get_loop().create_task(self._ask(client, messages, settings))] = number
                    if not running:
                        return
                    done, _ = runner.run(asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))
                    for task in done:
                        yield running.pop(task), task.result()
            finally:
                runner.run(_stop(client, running))

    async def _ask(self, client: openai.AsyncOpenAI, messages: Messages, settings: Mapping[str, Any]) -> RemoteReply:
        """One reply; a request that fails for good is a reply with `error`."""
        plain: Any = [{"role": message["role"], "content": message["content"]} for message in messages]
        try:
            # The package's time-out is for each read: a server that sends a blank now and then would go past it.
            async with asyncio.timeout((self._retries + 1) * self._timeout + self._retries * LONGEST_PAUSE):
                done = await client.chat.completions.create(model=self.model, messages=plain, **settings)
        except (openai.AuthenticationError, openai.NotFoundError) as error:
            raise UserError(f"{self.base_url}, model {self.model}: {self._line(error)}") from None
        except (openai.OpenAIError, TimeoutError, ValueError) as error:  # ValueError: a body that is no JSON
            return RemoteReply(error=self._line(error))
        try:
            choice: Any = done.choices[0]
            message, finish, extra = choice.message, choice.finish_reason, choice.message.model_extra or {}
        except (AttributeError, LookupError, TypeError):
            # The package hands over whatever came, also where it breaks its own types.
            return RemoteReply(error=self._clean(f"no chat completion came but {done!r}"))
        said, thought = split_thought(_text(message.content))
        thought = thought or _text(extra.get("reasoning_content")) or _text(extra.get("reasoning")) or None
        return RemoteReply(said, thought, finish)

    def _line(self, error: BaseException) -> str:
        """An error's class, text and cause on one line."""
        more: object = None
        if isinstance(error, openai.APIConnectionError):
            more = error.__cause__
        elif isinstance(error, openai.APIStatusError) and " - " not in str(error):
            more = error.body  # without a message in the usual place
        return self._clean(f"{type(error).__name__}: {error}{f' ({more})' if more else ''}")

    def _clean(self, text: str) -> str:
        """One line without the key, which some servers repeat."""
        line = " ".join(text.split())
        return (line if self._key == "none" else line.replace(self._key, "***"))[:300]


async def _stop(client: openai.AsyncOpenAI, running: Iterable[asyncio.Task[RemoteReply]]) -> None:
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await client.close()


def _text(value: object) -> str:
    """A text field, empty where it is none; half surrogate pairs, which no file takes, become question marks."""
    return value.strip().encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def split_thought(said: str) -> tuple[str, str | None]:
    """(answer, thought) of a text that may begin with `<think>` and `<thought>` blocks; the last with words counts.

    The first tag may be missing (a chat template has put it into the prompt); without the closing tag there is no
    answer. A tag further inside stays: it is a leak, for the checks to find.
    """
    thought = None
    for name in ("think", "thought"):
        head, closed, rest = said.partition(f"</{name}>")
        opened = head.lstrip().startswith(f"<{name}>")
        if opened or (closed and f"<{name}>" not in head):
            thought = head.lstrip().removeprefix(f"<{name}>").strip() or thought
            said = rest
    return said.strip(), thought
