"""A real HTTP server on this machine that talks like an OpenAI-compatible one, and misbehaves as a test scripts it."""

from __future__ import annotations

import json
import signal
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def heed_ctrl_c() -> None:
    """Run in a child before it starts: under nohup, or in a shell's background, SIGINT comes ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class Say:
    """A chat completion."""

    content: Any
    finish: str = "stop"
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of the message: reasoning_content, reasoning ..."""
    after: float = 0.0
    """Seconds that it takes."""


@dataclass(frozen=True)
class Send:
    """Any other response."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json"


@dataclass(frozen=True)
class Reset:
    """The connection breaks."""


@dataclass(frozen=True)
class Hang:
    """Nothing comes, or a blank now and then."""

    seconds: float
    drip: bool = False


Step = Say | Send | Reset | Hang
Script = Callable[[str, int], Step]
"""(the last user turn, how often it was asked before) -> what to do."""


class ChatServer:
    """Serves /v1/models and /v1/chat/completions until its `with` block ends.

    Args:
        script: what to do with each question.
        models: the names it lists; a request for another gets 404.
        key: the key it asks for, if any.
    """

    def __init__(self, script: Script, *, models: Sequence[str] = ("teacher",), key: str | None = None) -> None:
        self.script, self.models, self.key = script, models, key
        self.models_answer: Send | None = None
        """In place of the list of models."""
        self.bodies: list[dict[str, Any]] = []
        self.asked: Counter[str] = Counter()
        self.most_at_once = 0
        self.stopping = threading.Event()
        self._at_once = 0
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), _handler(self))

    @property
    def url(self) -> str:
        """The address to give to the client."""
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._http.shutdown()
        self._http.server_close()

    def step(self, body: dict[str, Any]) -> Step:
        """Notes a request and looks up what to do."""
        question = body["messages"][-1]["content"]
        with self._lock:
            self.bodies.append(body)
            before = self.asked[question]
            self.asked[question] += 1
        if body["model"] not in self.models:
            return Send({"error": {"message": f"The model `{body['model']}` does not exist."}}, 404)
        return self.script(question, before)

    def enter(self, by: int) -> None:
        """Counts requests that are being answered."""
        with self._lock:
            self._at_once += by
            self.most_at_once = max(self.most_at_once, self._at_once)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed or has lost patience is what the tests are about."""


def _handler(server: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def do_GET(self) -> None:
            if self._allowed():
                entries = [{"id": name, "object": "model", "created": 0, "owned_by": "test"} for name in server.models]
                self._send(server.models_answer or Send({"object": "list", "data": entries}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self._allowed():
                return
            server.enter(1)
            try:
                step = server.step(body)
                if isinstance(step, Say):
                    server.stopping.wait(step.after)
                elif isinstance(step, Hang) and not step.drip:
                    server.stopping.wait(step.seconds)
            finally:
                # Counted down before the answer is out: the client may ask again at once.
                server.enter(-1)
            if isinstance(step, Say):
                self._send(Send(_completion(step, body["model"])))
            elif isinstance(step, Send):
                self._send(step)
            elif isinstance(step, Reset):
                # Linger 0: the kernel sends RST, not FIN.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
            elif step.drip:
                self._drip(step.seconds)

        def _allowed(self) -> bool:
            given = self.headers.get("Authorization", "")
            if server.key is None or given == f"Bearer {server.key}":
                return True
            # Some servers repeat the key they were given.
            self._send(Send({"error": {"message": f"Incorrect API key provided: {given.split()[-1]}"}}, 401))
            return False

        def _send(self, answer: Send) -> None:
            content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            for name, value in {"Content-Type": answer.content_type, **answer.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()

        def _drip(self, seconds: float) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            for _ in range(int(seconds / 0.05)):
                self.wfile.write(b"\n")
                self.wfile.flush()
                if server.stopping.wait(0.05):
                    return

        def log_message(self, *_: object) -> None:
            """Tests are quiet."""

    return Handler


def _completion(step: Say, model: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": step.content, **step.extra}
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": step.finish, "logprobs": None}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }  # fmt: skip
