"""The download command against a small hub on the loopback interface, over real HTTP."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from litgpt.utils import run_cli
from scripts.download import download

SHA = "a" * 40
FILES = {
    "config.json": b'{"model_type": "qwen3"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 40,
    "pytorch_model.bin": b"pickle",
    "original/model.safetensors": b"double",
    "modeling_evil.py": b"import os",
}
# Repository → status and X-Error-Code of every answer; 0 means that it serves FILES.
REPOSITORIES = {
    "org/open": (0, ""),
    "org/gated": (403, "GatedRepo"),
    "org/private": (401, "RepoNotFound"),
    "org/absent": (404, "RepoNotFound"),
    "org/ill": (500, ""),
    "org/code": (0, ""),
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The few routes that huggingface_hub asks for."""

    requests: list[str]
    drops: list[str]
    """Files of which the next answer breaks off half-way."""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path.strip("/")
        type(self).requests.append(f"{self.command} {path} {self.headers.get('Authorization', '-')}")
        parts = path.removeprefix("api/models/").split("/")
        repository, rest = "/".join(parts[:2]), parts[2:]
        status, code = REPOSITORIES[repository]
        files = {"code.py": b"x"} if repository == "org/code" else FILES
        if status:
            self._answer(b"{}", status=status, headers={"X-Error-Code": code, "X-Error-Message": "no"})
        elif rest[0] in ("revision", "tree") and rest[1] not in ("main", SHA):
            self._answer(b"{}", status=404, headers={"X-Error-Code": "RevisionNotFound"})
        elif rest[0] == "revision":
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            self._json({"id": repository, "sha": SHA, "siblings": siblings})
        elif rest[0] == "tree":
            self._json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
            )
        else:
            content = files["/".join(rest[2:])]
            etag = hashlib.sha1(content).hexdigest()
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            headers = {"X-Repo-Commit": SHA, "ETag": f'"{etag}"'}
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._answer(content[start:], status=206 if start else 200, drop=rest[-1] in self.drops, headers=headers)

    do_HEAD = do_GET

    def _json(self, value: object) -> None:
        self._answer(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def _answer(self, body: bytes, *, headers: dict[str, str], status: int = 200, drop: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if drop else body)
            if drop:
                self.drops.clear()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test output quiet."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("Handler", (Hub,), {"requests": [], "drops": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        run_cli(download, args=list(args))
    assert exit_info.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_the_files_that_matter_arrive_and_no_code(hub: type[Hub], capsys: pytest.CaptureFixture[str]) -> None:
    run_cli(download, args=["--repo_id", "org/open"])
    directory = Path("checkpoints/org/open")
    arrived = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    unwanted = ("pytorch_model.bin", "original/model.safetensors", "modeling_evil.py")
    assert arrived == {name: content for name, content in FILES.items() if name not in unwanted}
    assert (
        "next: python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/org/open" in capsys.readouterr().out
    )

    # A second run fetches no file again; a lost file is fetched alone.
    hub.requests.clear()
    (directory / "config.json").unlink()
    run_cli(download, args=["--repo_id", "org/open", "--revision", SHA])
    fetched = [request.split()[1].rsplit("/", 1)[-1] for request in hub.requests if request.startswith("GET org/open/")]
    assert fetched == ["config.json"] and (directory / "config.json").read_bytes() == FILES["config.json"]


def test_the_token_of_the_environment_is_sent(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run_cli(download, args=["--repo_id", "org/open", "--checkpoint_dir", "here"])
    assert Path("here/model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert hub.requests and all(request.endswith("Bearer hf_secret") for request in hub.requests)


def test_a_connection_that_breaks_is_tried_again(hub: type[Hub]) -> None:
    hub.drops.append("model.safetensors")
    run_cli(download, args=["--repo_id", "org/open"])
    assert Path("checkpoints/org/open/model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert not hub.drops


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--repo_id", "org/gated"], "org/gated is gated: accept its terms on http://127.0.0.1"),
        (["--repo_id", "org/private"], "or it is private and HF_TOKEN does not open it (it is not set)"),
        (["--repo_id", "org/absent"], "org/absent is not on http://127.0.0.1"),
        (["--repo_id", "org/open", "--revision", "v9"], "has no revision 'v9'"),
        (["--repo_id", "org/code"], "holds no safetensors weights"),
        (["--repo_id", "not a name"], "'not a name' is no repository name"),
        (["--repo_id", "org/ill"], "did not deliver org/ill"),
    ],
)
def test_refusals_are_one_line(
    hub: type[Hub], capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert message in error_of(capsys, *args)
    assert not Path("checkpoints").exists()


def test_an_unreachable_hub_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    # What is there already must not pass for a download.
    (tmp_path / "config.json").write_text("{}")
    assert "did not deliver org/open" in error_of(capsys, "--repo_id", "org/open", "--checkpoint_dir", str(tmp_path))


def test_offline_mode_is_one_line(tmp_path: Path) -> None:
    """In a process of its own: the library reads this variable when it is imported."""
    script = Path(__file__).resolve().parents[1] / "scripts" / "download.py"
    done = subprocess.run(
        [sys.executable, str(script), "--repo_id", "org/open", "--checkpoint_dir", str(tmp_path)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "error: HF_HUB_OFFLINE is set, so org/open cannot be downloaded; unset it and run again\n"
