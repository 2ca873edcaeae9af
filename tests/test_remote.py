"""The client against a real HTTP server that answers, fails and hangs as scripted."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from advisory.remote import Remote, RemoteReply, split_thought
from litgpt.utils import UserError
from tests.chat_server import ChatServer, Hang, Reset, Say, Send, Step, heed_ctrl_c

KEY = "sk-very-secret-123"


@pytest.fixture(autouse=True)
def quick_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between attempts, no proxy, no key of the person who runs the tests."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def chat(*questions: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": question}] for question in questions]


def ask(step: Step, *further: Step, **how: Any) -> tuple[RemoteReply, int]:
    """The reply to one question whose first attempts meet the given steps, and how many attempts it took."""
    steps = (step, *further)
    with ChatServer(lambda _, before: steps[min(before, len(steps) - 1)]) as server:
        remote = Remote(server.url, **{"timeout": 5.0, "retries": 3, **how})
        ((number, reply),) = remote.ask_all(chat("क्या करूं?"))
    assert number == 0
    return reply, server.asked["क्या करूं?"]


def test_reply_and_request() -> None:
    with ChatServer(lambda *_: Say("पानी दें")) as server:
        talk = [
            {"role": "system", "content": "s"},
            {"role": "assistant", "content": "a", "thought": "is not sent"},
            {"role": "user", "content": "u"},
        ]
        body = {"chat_template_kwargs": {"enable_thinking": True}}
        ((_, reply),) = Remote(server.url).ask_all([talk], temperature=0.5, max_tokens=7, seed=3, extra_body=body)
    assert reply == RemoteReply("पानी दें", None, "stop")
    assert server.bodies == [
        {
            "model": "teacher",
            "messages": [{"role": m["role"], "content": m["content"]} for m in talk],
            **{"temperature": 0.5, "max_tokens": 7, "seed": 3, **body},
        }
    ]


@pytest.mark.parametrize(
    ("said", "answer", "thought"),
    [
        ("पानी दें", "पानी दें", None),
        ("<thought>dry</thought>\nपानी दें", "पानी दें", "dry"),
        ("\n<think>dry\nsoil</think>\n\nपानी दें", "पानी दें", "dry\nsoil"),
        ("<think>\n\n</think>\n\nपानी दें", "पानी दें", None),
        ("<think>long</think><thought>short</thought>पानी", "पानी", "short"),
        ("<think>long</think><thought></thought>पानी", "पानी", "long"),
        ("<think>I must write <thought> and </thought>.</think>\n<thought>dry</thought>पानी", "पानी", "dry"),
        ("the template opened it</think>पानी", "पानी", "the template opened it"),
        ("mentions <thought> only</think><thought>dry</thought>पानी", "पानी", "dry"),
        ("dry soil</thought>पानी", "पानी", "dry soil"),
        ("<think>never ends", "", "never ends"),
        ("<think>ends</think><thought>never ends", "", "never ends"),
        ("</think>पानी", "पानी", None),
        ("<think>", "", None),
        ("पानी <thought>late</thought> दें", "पानी <thought>late</thought> दें", None),
        ("", "", None),
    ],
)
def test_thought_inside_the_text(said: str, answer: str, thought: str | None) -> None:
    assert split_thought(said) == (answer, thought)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (Say("पानी", extra={"reasoning_content": " dry "}), RemoteReply("पानी", "dry", "stop")),
        (Say("पानी", extra={"reasoning": "dry"}), RemoteReply("पानी", "dry", "stop")),
        (Say("<thought>short</thought>पानी", extra={"reasoning": "long"}), RemoteReply("पानी", "short", "stop")),
        (Say("पानी", extra={"reasoning_content": None}), RemoteReply("पानी", None, "stop")),
        (Say(None, extra={"reasoning_content": "dry"}), RemoteReply("", "dry", "stop")),
        (Say(None, finish="content_filter"), RemoteReply("", None, "content_filter")),
        (Say("<think>no end", finish="length"), RemoteReply("", "no end", "length")),
        (Say([{"type": "text", "text": "पानी"}]), RemoteReply("", None, "stop")),
        (Say("पानी\ud83d दें\u2028"), RemoteReply("पानी? दें", None, "stop")),
    ],
)
def test_where_servers_put_the_thought(step: Step, expected: RemoteReply) -> None:
    assert ask(step) == (expected, 1)


@pytest.mark.parametrize("bad", [Send({}, 500), Send({}, 503), Send({}, 429), Send("gone", 502), Reset()])
def test_tried_again(bad: Step) -> None:
    reply, attempts = ask(bad, bad, Say("पानी"))
    assert (reply.text, attempts) == ("पानी", 3)


def test_hanging_request_is_given_up_and_tried_again() -> None:
    start = time.monotonic()
    reply, attempts = ask(Hang(60), Say("पानी"), timeout=2.0)
    assert (reply.text, attempts) == ("पानी", 2)
    assert time.monotonic() - start < 30


def test_waits_as_long_as_the_server_says() -> None:
    start = time.monotonic()
    reply, attempts = ask(Send({}, 429, {"Retry-After": "1"}), Say("पानी"))
    assert (reply.text, attempts) == ("पानी", 2)
    assert time.monotonic() - start >= 1


@pytest.mark.parametrize("retries", [0, 2])
def test_retries_are_counted(retries: int) -> None:
    reply, attempts = ask(Send({"error": "overloaded"}, 500), retries=retries)
    assert attempts == retries + 1
    assert reply.error == "InternalServerError: Error code: 500 (overloaded)"


def test_server_that_only_drips_is_given_up() -> None:
    start = time.monotonic()
    reply, attempts = ask(Hang(60, drip=True), retries=0, timeout=2.0)
    assert (reply.error or "").startswith("TimeoutError")
    assert attempts == 1
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "step",
    [
        Send(b'{"choices": [{"mess'),
        Send(b"\xff\xfe", content_type="application/json"),
        Send(b"<html>gateway</html>", content_type="text/html"),
        Send([1, 2]),
        Send(None),
        Send("text"),
        Send({"choices": []}),
        Send({"choices": None}),
        Send({"choices": [None]}),
        Send({"choices": "abc"}),
        Send({"choices": 5}),
        Send({"choices": [{"message": None}]}),
        Send({"choices": [{"message": "पानी"}]}),
        Send({"error": {"message": "busy"}}),
        Send({"error": {"message": "too long\nby far"}}, 400),
        Send({"error": "pay"}, 402),
        Send(b"<html>" + b"x" * 5000, 403, content_type="text/html"),
    ],
)  # fmt: skip
def test_no_answer_is_an_error_in_one_line(step: Step) -> None:
    reply, attempts = ask(step)
    assert attempts == 1
    assert reply.text == ""
    assert reply.error
    assert "\n" not in reply.error
    assert len(reply.error) <= 300


def test_message_without_content_is_an_empty_reply() -> None:
    reply, _ = ask(Send({"choices": [{"message": {}, "finish_reason": None}]}))
    assert reply == RemoteReply()


def test_one_failure_leaves_the_others() -> None:
    with ChatServer(lambda question, _: Send({}, 400) if question == "q3" else Say(question)) as server:
        replies = dict(Remote(server.url, concurrency=2).ask_all(chat(*(f"q{n}" for n in range(8)))))
    assert [number for number, reply in replies.items() if reply.error] == [3]
    assert {reply.text for reply in replies.values()} == {f"q{n}" for n in range(8) if n != 3} | {""}


def test_concurrency_is_reached_and_bounded() -> None:
    questions = [f"q{n}" for n in range(24)]
    with ChatServer(lambda question, _: Say(question, after=0.4)) as server:
        replies = dict(Remote(server.url, concurrency=6).ask_all(chat(*questions)))
    assert server.most_at_once == 6
    assert [replies[n].text for n in range(24)] == questions
    assert server.asked.total() == 24


def test_replies_come_as_they_are_ready() -> None:
    with ChatServer(lambda question, _: Say(question, after=3.0 if question == "slow" else 0.0)) as server:
        order = [number for number, _ in Remote(server.url, concurrency=2).ask_all(chat("slow", "a", "b", "c"))]
    assert order[-1] == 0


def test_takes_only_what_is_under_way_and_stops_at_once() -> None:
    taken = itertools.count()

    def endless() -> Iterator[list[dict[str, str]]]:
        while True:
            yield chat(f"q{next(taken)}")[0]

    with ChatServer(lambda question, _: Say(question) if question < "q2" else Hang(60)) as server:
        replies = Remote(server.url, concurrency=4).ask_all(endless())
        assert {next(replies)[0], next(replies)[0]} == {0, 1}
        start = time.monotonic()
        replies.close()
        assert time.monotonic() - start < 30
    assert next(taken) <= 2 + 4


def test_nothing_to_ask() -> None:
    with ChatServer(lambda *_: Say("")) as server:
        assert list(Remote(server.url).ask_all([])) == []


def test_memory_stays_flat_over_thousands_of_questions() -> None:
    """The messages, 200 kB each, would take 40 MB if they were kept."""
    peaks = []
    with ChatServer(lambda *_: Say("हां")) as server:
        server.bodies = _Forgetful()
        conversations = (chat(f"{n} " + "x" * 200_000)[0] for n in range(200))
        tracemalloc.start()
        try:
            for number, _ in Remote(server.url, concurrency=8).ask_all(conversations):
                server.asked.clear()
                if number % 50 == 49:
                    peaks.append(tracemalloc.get_traced_memory()[1])
                    tracemalloc.reset_peak()
        finally:
            tracemalloc.stop()
    assert max(peaks) - min(peaks) < 6e6


class _Forgetful(list[Any]):
    def append(self, _: Any) -> None: ...


def test_key_from_the_environment_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with ChatServer(lambda *_: Say("हां"), key=KEY) as server:
        with pytest.raises(UserError, match="OPENAI_API_KEY"):
            Remote(server.url)
        monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
        assert next(iter(Remote(server.url).ask_all(chat("q"))))[1].text == "हां"
        monkeypatch.delenv("OPENAI_API_KEY")
        monkeypatch.setenv("OTHER", KEY)
        remote = Remote(server.url, api_key_env="OTHER")
        server.key = "changed"
        with pytest.raises(UserError) as caught:
            list(remote.ask_all(chat("q1", "q2")))
    assert "Incorrect API key provided: ***" in str(caught.value)
    assert KEY not in str(caught.value) + repr(remote)


def test_key_is_redacted_where_a_question_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    reply, _ = ask(Send({"error": {"message": f"no quota for {KEY}"}}, 402))
    assert "no quota for ***" in (reply.error or "")


@pytest.mark.parametrize("key", ["कुंजी", "a\nb"])
def test_key_that_no_header_takes(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        Remote("http://127.0.0.1:9/v1")


def test_models() -> None:
    with ChatServer(lambda *_: Say("हां"), models=("a", "b")) as server:
        with pytest.raises(UserError, match="a, b: choose one with --model"):
            Remote(server.url)
        assert Remote(server.url, model="b").model == "b"
        with pytest.raises(UserError, match=r"model c: NotFoundError.*`c` does not exist"):
            list(Remote(server.url, model="c").ask_all(chat("q1", "q2", "q3")))
        server.models = ()
        with pytest.raises(UserError, match="no model"):
            Remote(server.url)


@pytest.mark.parametrize(
    "answer", [Send({}, 404), Send(b"<html>", content_type="text/html"), Send(b"{"), Send([1]), Send({"data": [1]})]
)
def test_server_without_a_list_of_models(answer: Send) -> None:
    with ChatServer(lambda *_: Say("हां")) as server:
        server.models_answer = answer
        with pytest.raises(UserError, match="--model"):
            Remote(server.url)
        assert next(iter(Remote(server.url, model="teacher").ask_all(chat("q"))))[1].text == "हां"


@pytest.mark.parametrize("model", [None, "teacher"])
@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "http://no-such-host.invalid/v1"])
def test_server_down(url: str, model: str | None) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match="is the server up") as caught:
        Remote(url, model=model)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "url",
    ["", "127.0.0.1:8000", "ftp://a/v1", "http://", "http:// a", f"http://me:{KEY}@host/v1", "http://[::1/v1", "http://a:b/v1"],
)  # fmt: skip
@pytest.mark.parametrize("model", [None, "teacher"])
def test_bad_address(url: str, model: str | None) -> None:
    with pytest.raises(UserError) as caught:
        Remote(url, model=model)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("how", [{"concurrency": 0}, {"timeout": 0.0}, {"timeout": float("nan")}, {"retries": -1}])
def test_bad_settings(how: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="at least"):
        Remote("http://127.0.0.1:9/v1", **how)


def test_ctrl_c_stops_at_once() -> None:
    """A real process, interrupted while every request hangs."""
    program = (
        "import sys; from advisory.remote import Remote\n"
        "replies = Remote(sys.argv[1]).ask_all([{'role': 'user', 'content': str(n)}] for n in range(99))\n"
        "print(next(replies)[1].text, flush=True); next(replies)"
    )
    with ChatServer(lambda question, _: Say("हां") if question == "0" else Hang(60)) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", program, server.url],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_ctrl_c,
        )
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "हां"
        time.sleep(0.3)
        start = time.monotonic()
        process.send_signal(2)
        _, complaint = process.communicate(timeout=50)
    assert time.monotonic() - start < 30
    assert complaint.strip().endswith("KeyboardInterrupt")
