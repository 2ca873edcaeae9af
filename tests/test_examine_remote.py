"""The exam over a real HTTP server: right scores, and a run that stopped anywhere goes on from there."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from advisory.knowledge import KNOWLEDGE_DIR
from litgpt.utils import run_cli
from scripts.examine import main
from tests.chat_server import ChatServer, Hang, Say, Send, Step, heed_ctrl_c
from tests.small_crop import SMALL_CROP

ROOT = Path(__file__).parents[1]
KEY = "sk-very-secret-123"
RUST = "गेहूं में यह शायद पीला रतुआ है।\n1. रोज खेत देखें।\n2. यूरिया कम दें।"
SHORTAGE = "गेहूं में यह शायद नाइट्रोजन की कमी है।\n1. जांच के हिसाब से खाद दें।"
META = {"crop": "wheat", "causes": ["wheat_rust"], "expect": "advice", "two": False, "table": [], "must": []}


@pytest.fixture(autouse=True)
def quick_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between attempts, no proxy, no key of the person who runs the tests."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


class Exam:
    """The command with its files in one folder."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.out, self.replies = folder, folder / "exam", folder / "exam" / "replies.jsonl"
        self.knowledge = folder / "knowledge"
        self.knowledge.mkdir()
        for path in KNOWLEDGE_DIR.glob("_*.yaml"):
            shutil.copy(path, self.knowledge)
        (self.knowledge / "wheat.yaml").write_text(SMALL_CROP, encoding="utf-8")
        self.asked = [f"गेहूं में पत्तों पर पीले रंग की धारियां हैं ({number})" for number in range(count)]
        self.write()

    def write(self) -> None:
        records = [
            {
                "id": f"test-{number}",
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": RUST, "thought": "secret reference"},
                ],
                "meta": META,
            }
            for number, text in enumerate(self.asked)
        ]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (self.folder / "test.jsonl").write_text(text, encoding="utf-8")

    def words(self, url: str, *more: str) -> list[str]:
        given = {"out_dir": self.out, "base_url": url, "data_dir": self.folder, "knowledge_dir": self.knowledge}
        return [*(f"--{name}={value}" for name, value in given.items()), "--splits=[test]", *more]

    def run(self, url: str, *more: str) -> int:
        """Its exit code."""
        try:
            run_cli(main, args=self.words(url, *more))
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    def start(self, url: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "scripts/examine.py"), *self.words(url, *more)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
        )

    def lines(self) -> list[Any]:
        """Of replies.jsonl, without its head."""
        return [json.loads(line) for line in self.replies.read_bytes().split(b"\n")[1:] if line]

    def scores(self) -> dict[str, Any]:
        scores: dict[str, Any] = json.loads((self.out / "exam.json").read_text(encoding="utf-8"))["scores"]["test"]
        return scores


NewExam = Callable[[int], Exam]


@pytest.fixture
def exam(tmp_path: Path) -> NewExam:
    return lambda count: Exam(tmp_path, count)


def number_of(question: str) -> int:
    return int(question[question.index("(") + 1 : -1])


def three_of_four(question: str, _: int) -> Step:
    return Say(SHORTAGE if number_of(question) % 4 == 3 else RUST, extra={"reasoning_content": "stripes -> rust"})


def test_scores_and_what_is_asked(exam: NewExam, capfd: pytest.CaptureFixture[str]) -> None:
    work = exam(8)
    with ChatServer(three_of_four) as server:
        assert work.run(server.url, "--temperature=0.3", "--max_new_tokens=99", "--seed=4") == 0
    assert work.scores()["cause_top1"]["value"] == 0.75
    assert work.scores()["fact_recall"]["count"] == 8
    assert {"exam.json", "exam.md", "exam.png", "replies.jsonl"} == {path.name for path in work.out.iterdir()}
    assert all(line["thought"] == "stripes -> rust" for line in work.lines())
    assert {line["text"] for line in work.lines()} == {RUST, SHORTAGE}
    for body in server.bodies:
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
        assert (body["temperature"], body["max_tokens"], body["seed"]) == (0.3, 99, 4)
    assert "secret reference" not in json.dumps(server.bodies)
    said = capfd.readouterr()
    assert "| cause named first is right | high | 75.0" in said.out
    assert "teacher" in said.out
    assert said.err == ""


def test_goes_on_after_a_failure(exam: NewExam, capsys: pytest.CaptureFixture[str]) -> None:
    work = exam(20)

    def failing(question: str, before: int) -> Step:
        return Send({}, 400) if number_of(question) == 12 and not before else three_of_four(question, before)

    with ChatServer(failing) as server:
        assert work.run(server.url, "--concurrency=2") == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert "test-12: BadRequestError" in error
        assert "run the same line again" in error
        before = {line["id"] for line in work.lines()}
        assert 10 <= len(before) <= 13
        asked = server.asked.total()
        assert work.run(server.url) == 0
    assert server.asked.total() == asked + 20 - len(before)
    assert sorted(line["id"] for line in work.lines()) == sorted(f"test-{number}" for number in range(20))
    assert work.scores()["cause_top1"]["value"] == 0.75


def test_line_cut_inside_a_letter_is_asked_again_and_no_other(exam: NewExam) -> None:
    work = exam(6)
    # A reply may hold what str.splitlines takes for the end of a line.
    with ChatServer(lambda *_: Say(f"{RUST}\u2028\x85\x0c। और देखें।\ud83d")) as server:
        assert work.run(server.url) == 0
        content = work.replies.read_bytes()
        last = content.rindex(b"\n", 0, -1) + 1
        work.replies.write_bytes(content[: content.index("ग".encode(), last) + 1])
        assert work.run(server.url) == 0
        assert server.asked.total() == 7
        assert work.run(server.url) == 0
        assert server.asked.total() == 7
    assert len(work.lines()) == 6
    assert work.lines()[0]["text"].endswith("?")


def test_goes_on_after_kill_9(exam: NewExam) -> None:
    work = exam(40)
    killed = threading.Event()

    def script(question: str, _: int) -> Step:
        return Say(RUST) if number_of(question) < 10 or killed.is_set() else Hang(120)

    with ChatServer(script) as server:
        process = work.start(server.url, "--concurrency=4")
        until = time.monotonic() + 100
        while time.monotonic() < until and process.poll() is None:
            if work.replies.exists() and work.replies.read_bytes().count(b"\n") == 11:
                break
            time.sleep(0.02)
        process.kill()
        process.communicate()
        killed.set()
        # Every reply that came is there, under the line of settings; four questions were under way.
        assert process.returncode == -signal.SIGKILL
        assert len(work.lines()) == 10
        assert server.asked.total() <= 10 + 4
        assert work.run(server.url) == 0
    assert all(server.asked[text] == 1 for text in work.asked[:10])
    assert len({line["id"] for line in work.lines()}) == len(work.lines()) == 40


def test_ctrl_c_stops_at_once(exam: NewExam) -> None:
    work = exam(4)
    with ChatServer(lambda question, _: Hang(60) if number_of(question) == 3 else Say(RUST)) as server:
        process = work.start(server.url, "--concurrency=1")
        while process.poll() is None and server.asked.total() < 4:
            time.sleep(0.02)
        time.sleep(0.3)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=50)
    assert (process.returncode, complaint) == (130, "stopped by the user\n")
    assert time.monotonic() - start < 30
    assert len(work.lines()) == 3


def test_runs_draw_anew(exam: NewExam) -> None:
    work = exam(4)
    with ChatServer(lambda question, before: Say(SHORTAGE if before and number_of(question) == 0 else RUST)) as server:
        assert work.run(server.url, "--runs=2", "--temperature=1", "--seed=7") == 0
    assert sorted({body["seed"] for body in server.bodies}) == [7, 1007]
    assert work.scores()["same_in_all_runs"]["value"] == 0.75


def test_replies_of_something_else_are_not_taken(exam: NewExam, capsys: pytest.CaptureFixture[str]) -> None:
    work = exam(3)
    with ChatServer(three_of_four, models=("a",)) as server:
        assert work.run(server.url) == 0
        before = work.replies.read_bytes()
        assert work.run(server.url, "--temperature=1") == 2
        assert "replies of other settings" in capsys.readouterr().err
        # The same address serves another model today.
        server.models = ("b",)
        assert work.run(server.url) == 2
        assert "replies of other settings" in capsys.readouterr().err
        server.models = ("a",)
        work.asked[1] = "दूसरा सवाल (1)"
        work.write()
        assert work.run(server.url) == 2
        assert "answers another test-1" in capsys.readouterr().err
        assert work.replies.read_bytes() == before
        assert work.run(server.url, "--overwrite") == 0
    assert server.asked.total() == 6
    assert {line["question"] for line in work.lines()} == set(work.asked)


def test_server_down_or_wrong(exam: NewExam, capsys: pytest.CaptureFixture[str]) -> None:
    work = exam(3)
    assert work.run("http://127.0.0.1:9/v1") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "is the server up" in error
    assert work.run(f"http://me:{KEY}@127.0.0.1:9/v1") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert KEY not in error
    assert not work.out.exists()
    with ChatServer(three_of_four) as server:
        assert work.run(server.url, "--model=other") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "`other` does not exist" in error


def test_key_is_in_no_output(exam: NewExam, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    work = exam(3)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ChatServer(three_of_four, key=KEY) as server:
        assert work.run(server.url) == 0
        monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}-wrong")
        assert work.run(server.url) == 2
    said = capfd.readouterr()
    assert KEY not in said.out + said.err
    assert all(KEY.encode() not in path.read_bytes() for path in work.out.iterdir())


@pytest.mark.parametrize("step", [Say(None), Say("", finish="content_filter"), Say("<think>रतुआ", finish="length")])
def test_silence_is_a_reply_that_scores_nothing(exam: NewExam, step: Step) -> None:
    work = exam(2)
    with ChatServer(lambda *_: step) as server:
        assert work.run(server.url) == 0
    assert work.scores()["cause_top1"]["value"] == 0
    assert work.scores()["length_fits"]["value"] == 0
