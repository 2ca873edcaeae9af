"""Rationales from a server: what is asked, what is refused, and that nothing is lost, asked twice or given away."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from advisory.exam import Examiner
from advisory.facts import Facts, load_facts
from advisory.knowledge import KNOWLEDGE_DIR
from advisory.rationales import INSTRUCTION_EN, Question, digest, prompt, read_questions, refusals, to_record
from advisory.remote import RemoteReply
from litgpt.data import read_records
from litgpt.utils import UserError, run_cli
from scripts.generate_rationales import generate_rationales
from tests.chat_server import ChatServer, Hang, Say, Send, Step, heed_ctrl_c
from tests.small_crop import SMALL_CROP

ROOT = Path(__file__).parents[1]
KEY = "sk-very-secret-123"
ASKED = "गेहूं में पत्तों पर पीले रंग की धारियां हैं, क्या करूं?"
THOUGHT = "Yellow stripes on wheat leaves, cool and humid -> yellow rust; rub the leaf to check."
ANSWER = (
    "गेहूं में यह शायद पीला रतुआ है। जांच: पत्ता रगड़ें, पीला चूर्ण लगे तो रतुआ है।\n1. रोज खेत देखें।\n2. यूरिया कम दें।\n"
    "3. दवा कृषि विज्ञान केंद्र से पूछें।\nशक हो तो किसान कॉल सेंटर 1800-180-1551 पर पूछें।"
)
GOOD = Say(f"<thought>{THOUGHT}</thought>\n{ANSWER}")


@pytest.fixture(autouse=True)
def quick_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between attempts, no proxy, no key of the person who runs the tests."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def knowledge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small crop beside the real rule files."""
    directory = tmp_path_factory.mktemp("knowledge")
    for path in KNOWLEDGE_DIR.glob("_*.yaml"):
        shutil.copy(path, directory)
    (directory / "wheat.yaml").write_text(SMALL_CROP, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def facts(knowledge: Path) -> Facts:
    return load_facts(knowledge)


def question(text: str = ASKED, **meta: Any) -> Question:
    return Question("q", ({"role": "user", "content": text},), meta)


# ---- what is refused -------------------------------------------------------------------------------------------------

Refuse = Callable[..., list[str]]


@pytest.fixture(scope="module")
def refuse(facts: Facts) -> Refuse:
    """Reasons against a reply that is right but for what the test says."""
    examiner = Examiner(facts)

    def check(
        answer: str = ANSWER, thought: str | None = THOUGHT, finish: str = "stop", asked: str = ASKED, **meta: Any
    ) -> list[str]:
        return refusals(question(asked, **meta), RemoteReply(answer, thought, finish), examiner)

    return check


def test_right_reply_is_kept(refuse: Refuse) -> None:
    assert refuse() == []
    assert refuse(finish="eos_token") == []


def test_composed_answer_is_kept(refuse: Refuse) -> None:
    """Asking back is right where the crop is missing."""
    assert refuse("पहले बताएं, यह कौन सी फसल है और कितने दिन की है?", asked="पत्ते पीले हैं, क्या करूं?") == []


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"answer": ""}, "no answer"),
        ({"answer": "", "finish": "length"}, "cut short"),
        ({"answer": "", "finish": "content_filter"}, "stopped by the server's filter"),
        ({"finish": "length"}, "cut short"),
        ({"finish": "content_filter"}, "stopped by the server's filter"),
        ({"thought": None}, "no thought"),
        ({"thought": "rust"}, "thought: 1 words"),
        ({"thought": "yellow rust " * 200}, "thought: 400 words"),
        ({"thought": f"{THOUGHT} <|im_end|>"}, "tags inside the thought"),
        ({"thought": f"{THOUGHT} </think>"}, "tags inside the thought"),
        ({"answer": "Wheat yellow rust. Look daily."}, "answer: not Hindi"),
        ({"answer": "Gehu mein peela ratua hai shayad"}, "answer: not Hindi"),
        ({"answer": f"{ANSWER} {'खेत देखें। ' * 60}"}, "answer too short or long: "),
        ({"answer": "रतुआ है"}, "answer too short or long: 2 words"),
        ({"answer": f"{ANSWER}\n<thought>rust</thought>"}, "thought leaks into the answer"),
        ({"answer": f"{ANSWER} yellow stripes so it is rust"}, "thought leaks into the answer"),
        ({"answer": ANSWER.replace("यूरिया कम दें", "मोनोक्रोटोफॉस छिड़कें")}, "banned_recommended|restricted_for_crop"),
        ({"answer": ANSWER.replace("यूरिया कम दें", "एंडोसल्फान डालें")}, "banned_recommended"),
        ({"thought": f"{THOUGHT} Spray endosulfan."}, "banned_recommended"),
        ({"answer": ANSWER.replace("यूरिया कम दें", "प्रोपिकोनाजोल छिड़कें")}, "unsourced_chemical"),
        ({"thought": f"{THOUGHT} Then use propiconazole."}, "unsourced_chemical"),
        ({"answer": ANSWER.replace("यूरिया कम दें", "यूरिया 20 किलो प्रति एकड़ दें")}, "unsourced_dose"),
        ({"answer": ANSWER.replace("यूरिया कम दें", "यूरिया २० किलो प्रति एकड़ दें")}, "unsourced_dose"),
        ({"thought": f"{THOUGHT} Give 20 kg urea per acre."}, "unsourced_dose"),
        (
            {"answer": ANSWER.replace("शायद पीला रतुआ", "शायद नाइट्रोजन की कमी"), "causes": ["wheat_rust"]},
            "first cause wheat_nitrogen is none of wheat_rust",
        ),
        ({"asked": f"{ASKED} फसल 5 दिन की है"}, "wheat_rust does not occur at 5 days"),
        ({"asked": "गेहूं में दवा छिड़कते समय चक्कर आ रहे हैं, क्या करूं"}, "emergency without a number to call"),
    ],
)  # fmt: skip
def test_refused(refuse: Refuse, changed: dict[str, Any], reason: str) -> None:
    reasons = refuse(**changed)
    assert any(re.search(reason, found) for found in reasons), reasons


def test_one_fault_gives_one_reason(refuse: Refuse) -> None:
    assert len(refuse(thought=None)) == 1
    assert len(refuse(ANSWER.replace("यूरिया कम दें", "यूरिया 20 किलो प्रति एकड़ दें"))) == 1
    assert len(refuse(asked=f"{ASKED} फसल 5 दिन की है")) == 1


def test_wrong_first_cause_is_known_without_meta(refuse: Refuse) -> None:
    answer = ANSWER.replace("पीला रतुआ", "नाइट्रोजन की कमी")
    asked = "गेहूं में नीचे के पुराने पत्ते पीले पड़ रहे हैं"
    assert refuse(answer, asked=asked) == []
    assert refuse(asked=asked) == ["against the knowledge base: first cause wheat_rust is none of wheat_nitrogen"]


def test_warning_against_a_banned_chemical_is_kept(refuse: Refuse) -> None:
    assert refuse(ANSWER.replace("यूरिया कम दें", "एंडोसल्फान पर रोक है, इसे न डालें")) == []


def test_dose_of_the_list_shown_with_the_question_is_kept(refuse: Refuse) -> None:
    answer = ANSWER.replace("यूरिया कम दें", "प्रोपिकोनाजोल 25 EC का छिड़काव 200 मिली प्रति एकड़ करें")
    shown = ["प्रोपिकोनाजोल 25 EC (छिड़काव), 200 मिली प्रति एकड़, कटाई से 30 दिन पहले बंद"]
    assert refuse(answer, table=shown) == []
    (reason,) = refuse(answer.replace("200", "500"), table=shown)
    assert reason.startswith("unsourced_dose: ")
    assert {reason.partition(":")[0] for reason in refuse(answer)} == {"unsourced_chemical", "unsourced_dose"}


def test_emergency_with_a_number_is_kept(refuse: Refuse) -> None:
    answer = "यह जहर का असर हो सकता है।\n1. खुली हवा में जाएं।\n2. 108 पर फोन करें और अस्पताल जाएं।"
    assert refuse(answer, "A person is poisoned, so hospital first.", asked="दवा छिड़कते समय चक्कर आ रहे हैं") == []


# ---- what is asked ---------------------------------------------------------------------------------------------------


def test_prompt_holds_the_facts_of_the_crop(facts: Facts) -> None:
    system, user = prompt(question(), facts)
    assert user == {"role": "user", "content": ASKED}
    assert system["content"].startswith(INSTRUCTION_EN)
    lines = system["content"].split("Facts:\n")[1].splitlines()
    assert [line.split(",")[1].split(" (")[0].strip() for line in lines] == ["पीला रतुआ", "नाइट्रोजन की कमी"]
    assert "200" not in system["content"]
    by_cause = prompt(question("गेहूं बीमार है", causes=["wheat_nitrogen", "no_such"]), facts)[0]["content"]
    assert by_cause.index("नाइट्रोजन") < by_cause.index("पीला रतुआ")
    assert "not in the knowledge base" in prompt(question("केला पीला है"), facts)[0]["content"]


def line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def asking(identity: Any = "a", content: Any = ASKED, **more: Any) -> dict[str, Any]:
    return {"id": identity, "messages": [{"role": "user", "content": content}], **more}


def test_questions_with_and_without_answers(tmp_path: Path) -> None:
    talk = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "पत्ते पीले हैं"},
        {"role": "assistant", "content": "कौन सी फसल?", "thought": "crop missing"},
        {"role": "user", "content": "गेहूं"},
        {"role": "assistant", "content": "रतुआ", "thought": "rust"},
    ]
    path = tmp_path / "q.jsonl"
    lines = [line(asking(content="एक\u2028दो")) + "\r", "", line({"id": "b", "messages": talk})]
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    first, second = read_questions(path)
    assert first.said == "एक\u2028दो"
    assert [turn["content"] for turn in second.turns] == ["पत्ते पीले हैं", "कौन सी फसल?", "गेहूं"]
    assert second.said == "पत्ते पीले हैं\nगेहूं"
    assert all(set(turn) == {"role", "content"} for turn in second.turns)


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (b'{"id": "b", "mess', "not valid JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (line(asking("b"))[:40].encode()[:-1], "not UTF-8|not valid JSON"),
        (b"[]", "expected"),
        (b"7", "expected"),
        (b"null", "expected"),
        (b'{"id": "b"}', "expected"),
        (b'{"id": "b", "messages": null}', "expected"),
        (b'{"id": "b", "messages": [3]}', "expected"),
        (b'{"id": "b", "messages": [{"role": "user"}]}', "expected"),
        (b'{"id": "b", "messages": []}', "no user turn"),
        (line({"id": "b", "messages": [{"role": "assistant", "content": "x"}]}).encode(), "no user turn"),
        (line(asking("")).encode(), "not empty"),
        (line(asking(7)).encode(), "not empty"),
        (line(asking("b", " ")).encode(), "not empty"),
        (line(asking("b", ["x"])).encode(), "not empty"),
        (json.dumps(asking("b", "x\ud83d")).encode(), "surrogate"),
        (line(asking("b", meta=3)).encode(), "expected"),
        (line(asking("b", meta={"causes": "wheat_rust"})).encode(), "lists of strings"),
        (line(asking("b", meta={"table": [1]})).encode(), "lists of strings"),
        (line(asking("a")).encode(), "id 'a' stands in line 1 already"),
    ],
)
def test_broken_line_is_named(tmp_path: Path, bad: bytes, complaint: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(line(asking()).encode() + b"\n" + bad + b"\n" + line(asking("c")).encode())
    with pytest.raises(UserError, match=f"q.jsonl:2: .*({complaint})") as caught:
        list(read_questions(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_no_questions(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "q.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"q\.jsonl"):
        list(read_questions(path))


def test_record_keeps_the_contract(tmp_path: Path) -> None:
    record = to_record(question(crop="wheat"), RemoteReply(ANSWER, THOUGHT, "stop"), {"model": "m"})
    (tmp_path / "r.jsonl").write_text(line(record), encoding="utf-8")
    (read,) = read_records(tmp_path / "r.jsonl")
    assert [message["role"] for message in read.messages] == ["system", "user", "assistant"]
    assert read.messages[-1] == {"role": "assistant", "content": ANSWER, "thought": THOUGHT}
    assert read.meta == {"crop": "wheat", "source": "generated", "provenance": {"model": "m"}}


# ---- the command -----------------------------------------------------------------------------------------------------


class Job:
    """The command with its files in one folder."""

    def __init__(self, folder: Path, knowledge: Path, count: int) -> None:
        self.questions, self.out, self.rejected = (folder / f"{name}.jsonl" for name in ("q", "out", "out.rejected"))
        self.asked = [f"{ASKED} ({number})" for number in range(count)]
        self.knowledge = knowledge
        self.write([asking(f"id-{number}", text) for number, text in enumerate(self.asked)])

    def write(self, records: Sequence[Any]) -> None:
        self.questions.write_text("".join(line(record) + "\n" for record in records), encoding="utf-8")

    def words(self, url: str, *more: str) -> list[str]:
        given = {"questions": self.questions, "out": self.out, "base_url": url, "knowledge_dir": self.knowledge}
        return [*(f"--{name}={value}" for name, value in given.items()), *more]

    def run(self, url: str, *more: str) -> int:
        """Its exit code."""
        try:
            run_cli(generate_rationales, args=self.words(url, *more))
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    def start(self, url: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "scripts/generate_rationales.py"), *self.words(url, *more)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
        )

    def lines(self) -> int:
        """In both files."""
        return sum(path.read_bytes().count(b"\n") for path in (self.out, self.rejected) if path.exists())

    def kept(self) -> dict[str, Any]:
        return _by_id(self.out)

    def refused(self) -> dict[str, Any]:
        return _by_id(self.rejected)


def _by_id(path: Path) -> dict[str, Any]:
    records = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    assert len({record["id"] for record in records}) == len(records)
    return {record["id"]: record for record in records}


@pytest.fixture
def job(tmp_path: Path, knowledge: Path) -> Callable[[int], Job]:
    return lambda count: Job(tmp_path, knowledge, count)


NewJob = Callable[[int], Job]


def number_of(question: str) -> int:
    return int(question[question.index("(") + 1 : -1])


def half(question: str, _: int) -> Step:
    """Right answers to even questions, English to odd ones."""
    return Say(f"<thought>{THOUGHT}</thought>Look at it") if number_of(question) % 2 else GOOD


def test_kept_and_refused_with_provenance(job: NewJob, capfd: pytest.CaptureFixture[str]) -> None:
    work = job(6)
    with ChatServer(half) as server:
        body = "{top_k: 3, chat_template_kwargs: {enable_thinking: true}}"
        assert work.run(server.url, "--seed=5", f"--extra_body={body}") == 0
    kept, refused = work.kept(), work.refused()
    assert set(kept) == {"id-0", "id-2", "id-4"}
    assert set(refused) == {"id-1", "id-3", "id-5"}
    assert refused["id-1"]["reasons"] == ["answer: not Hindi"]
    assert "reasons" not in kept["id-0"]
    assert kept["id-0"]["messages"][-1] == {"role": "assistant", "content": ANSWER, "thought": THOUGHT}
    sent = next(body for body in server.bodies if body["messages"][-1]["content"] == work.asked[0])
    assert sent["top_k"] == 3
    assert (sent["temperature"], sent["max_tokens"], sent["seed"]) == (0.6, 2048, 5)
    source = kept["id-0"]["meta"]["provenance"]
    assert source["model"] == "teacher"
    assert source["settings"] == {
        "temperature": 0.6, "max_tokens": 2048, "seed": 5,
        "extra_body": {"top_k": 3, "chat_template_kwargs": {"enable_thinking": True}},
    }  # fmt: skip
    assert source["instruction_sha256"] == digest(INSTRUCTION_EN)
    assert source["prompt_sha256"] == digest(sent["messages"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", source["created"])
    assert [record.id for record in read_records(work.out)]
    said = capfd.readouterr()
    assert sorted(said.out.splitlines()) == ["  answer: 3", "kept: 3", "rejected: 3"]
    # No terminal, no bar.
    assert said.err == "6 questions, 0 answered before\n"


def test_order_and_concurrency_do_not_matter(tmp_path: Path, knowledge: Path) -> None:
    results = []
    for concurrency in (1, 8):
        folder = tmp_path / str(concurrency)
        folder.mkdir()
        work = Job(folder, knowledge, 20)
        with ChatServer(half) as server:
            assert work.run(server.url, f"--concurrency={concurrency}") == 0
        everything = work.kept() | work.refused()
        for record in everything.values():
            del record["meta"]["provenance"]["created"]
        results.append(everything)
        assert server.most_at_once <= concurrency
    assert len(results[0]) == 20
    assert results[0] == results[1]


def test_nothing_is_asked_twice(job: NewJob, capsys: pytest.CaptureFixture[str]) -> None:
    work = job(10)
    with ChatServer(half) as server:
        assert work.run(server.url, "--limit=4") == 0
        assert server.asked.total() == 4
        assert work.run(server.url) == 0
        assert server.asked.total() == 10
        before = work.out.read_bytes(), work.rejected.read_bytes()
        assert work.run(server.url) == 0
    # Nothing is left to ask, so the server need not be up.
    assert work.run("http://127.0.0.1:9/v1") == 0
    assert set(server.asked.values()) == {1}
    assert (work.out.read_bytes(), work.rejected.read_bytes()) == before
    assert "10 questions, 10 answered before" in capsys.readouterr().err


def test_what_failed_is_asked_again_and_only_that(job: NewJob, capsys: pytest.CaptureFixture[str]) -> None:
    work = job(8)
    with ChatServer(lambda question, before: Send({}, 400) if "(3)" in question and not before else GOOD) as server:
        assert work.run(server.url) == 2
        said = capsys.readouterr()
        assert "error: 1 questions got no answer; run the same line again" in said.err
        assert "id-3: BadRequestError" in said.err
        assert len(work.kept()) == 7
        assert work.run(server.url) == 0
    assert len(work.kept()) == 8
    assert server.asked == {text: 2 if "(3)" in text else 1 for text in work.asked}


@pytest.mark.parametrize("cut", ["out", "rejected", "both"])
def test_goes_on_after_kill_9(job: NewJob, cut: str) -> None:
    work = job(60)
    killed = threading.Event()

    def script(question: str, before: int) -> Step:
        return half(question, before) if number_of(question) < 24 or killed.is_set() else Hang(120)

    with ChatServer(script) as server:
        process = work.start(server.url, "--concurrency=4")
        until = time.monotonic() + 100
        while time.monotonic() < until and process.poll() is None and work.lines() < 24:
            time.sleep(0.02)
        process.kill()
        process.communicate()
        killed.set()
        # Every answer that came is there; four questions were under way.
        assert process.returncode == -signal.SIGKILL
        assert work.lines() == 24
        assert server.asked.total() <= 24 + 4
        for path in {"out": [work.out], "rejected": [work.rejected]}.get(cut, [work.out, work.rejected]):
            content = path.read_bytes()
            # Cut in the middle of a Hindi letter.
            last = content.rindex(b"\n", 0, -1) + 1
            path.write_bytes(content[: content.index("ग".encode(), last) + 1])
        whole = [
            json.loads(line)["messages"][1]["content"]
            for path in (work.out, work.rejected)
            for line in path.read_bytes().split(b"\n")[:-1]
        ]
        assert len(whole) == (22 if cut == "both" else 23)
        assert work.run(server.url, "--concurrency=16") == 0
    assert set(work.kept()) | set(work.refused()) == {f"id-{number}" for number in range(60)}
    assert len(work.kept()) == len(work.refused()) == 30
    assert all(server.asked[text] == 1 for text in whole)


def test_last_line_without_its_end_is_whole(job: NewJob) -> None:
    work = job(6)
    with ChatServer(half) as server:
        assert work.run(server.url, "--limit=4") == 0
        for path in (work.out, work.rejected):
            path.write_bytes(path.read_bytes().removesuffix(b"\n"))
        assert work.run(server.url) == 0
    assert set(server.asked.values()) == {1}
    assert len(work.kept()) == len(work.refused()) == 3


def test_ctrl_c_keeps_what_came(job: NewJob) -> None:
    work = job(12)
    with ChatServer(lambda question, _: Hang(60) if question == work.asked[9] else GOOD) as server:
        process = work.start(server.url, "--concurrency=1")
        while process.poll() is None and not server.asked[work.asked[9]]:
            time.sleep(0.02)
        time.sleep(0.3)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=50)
    assert process.returncode == 130
    assert complaint.splitlines()[-1] == "stopped by the user"
    assert "Traceback" not in complaint
    assert time.monotonic() - start < 30
    assert len(work.kept()) == 9


def test_stops_when_the_server_has_gone(job: NewJob, capsys: pytest.CaptureFixture[str]) -> None:
    work = job(200)
    with ChatServer(lambda question, _: GOOD if "(5)" in question else Send({"error": "down"}, 400)) as server:
        assert work.run(server.url, "--retries=0", "--concurrency=1") == 2
    said = capsys.readouterr().err.splitlines()
    # Five failures, one answer, twenty failures.
    assert server.asked.total() == 26
    assert said[-1].startswith(f"error: {server.url}: 20 requests in a row failed, the last: BadRequestError")
    assert set(work.kept()) == {"id-5"}


def test_server_down_is_one_line(job: NewJob, capsys: pytest.CaptureFixture[str]) -> None:
    work = job(3)
    assert work.run("http://127.0.0.1:9/v1") == 2
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert said.err.splitlines() == ["3 questions, 0 answered before", *errors]
    assert "is the server up" in errors[0]


def test_wrong_model_is_one_line(job: NewJob, capsys: pytest.CaptureFixture[str]) -> None:
    work = job(30)
    with ChatServer(half) as server:
        assert work.run(server.url, "--model=other") == 2
    assert "`other` does not exist" in capsys.readouterr().err.splitlines()[-1]
    assert server.asked.total() <= 16


def test_key_is_in_no_output(job: NewJob, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    work = job(4)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ChatServer(
        lambda question, _: Send({"error": {"message": f"{KEY} is poor"}}, 402) if "(1)" in question else GOOD, key=KEY
    ) as server:
        assert work.run(server.url) == 2
        assert work.kept().keys() == {"id-0", "id-2", "id-3"}
        monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}-wrong")
        assert work.run(server.url) == 2
    said = capfd.readouterr()
    assert "*** is poor" in said.err
    assert KEY not in said.out + said.err
    assert all(KEY.encode() not in path.read_bytes() for path in work.out.parent.iterdir())


def test_broken_question_is_told_before_anything_is_asked(job: NewJob, capsys: pytest.CaptureFixture[str]) -> None:
    work = job(5)
    with work.questions.open("a", encoding="utf-8") as file:
        file.write('{"id": "x"\n')
    with ChatServer(half) as server:
        assert work.run(server.url) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {work.questions}:6: not valid JSON")
    assert server.asked.total() == 0
    assert not work.out.exists()


def test_same_id_twice(job: NewJob, capsys: pytest.CaptureFixture[str]) -> None:
    work = job(3)
    work.write([asking("a", "1"), asking("b", "2"), asking("a", "3")])
    with ChatServer(half) as server:
        assert work.run(server.url) == 2
    assert f"error: {work.questions}:3: id 'a' stands in line 1 already" in capsys.readouterr().err
    assert server.asked.total() == 0


def test_files_that_are_not_ours_stay_as_they_are(job: NewJob, capsys: pytest.CaptureFixture[str]) -> None:
    work = job(3)
    before = work.questions.read_bytes()
    with ChatServer(lambda *_: GOOD) as server:
        work.out.write_bytes(before)
        assert work.run(server.url) == 2
        assert f"{work.out}:1: not a record of this command" in capsys.readouterr().err
        assert work.out.read_bytes() == before
        work.out.unlink()
        assert work.run(server.url, f"--out={work.questions}") == 2
        assert "choose another file" in capsys.readouterr().err
        assert work.questions.read_bytes() == before
        assert work.run(server.url) == 0
        whole = work.out.read_bytes()
        work.write([asking("id-0", "गेहूं का दूसरा सवाल")])
        assert work.run(server.url) == 2
        assert "another question under the id 'id-0'" in capsys.readouterr().err
        assert work.out.read_bytes() == whole
    assert server.asked.total() == 3


def test_two_runs_do_not_write_into_one_file(job: NewJob, capsys: pytest.CaptureFixture[str]) -> None:
    work = job(2)
    with ChatServer(lambda *_: Hang(60)) as server:
        process = work.start(server.url)
        while process.poll() is None and not server.asked:
            time.sleep(0.02)
        assert work.run(server.url, "--timeout=2", "--retries=0") == 2
        process.kill()
        process.communicate()
    assert "another run is writing to it" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["limit=0", "limit=-1", "concurrency=0", "timeout=0", "retries=-1", "extra_body=3"])
def test_bad_settings(job: NewJob, setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert job(2).run("http://127.0.0.1:9/v1", f"--{setting}") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error:")


@pytest.mark.slow
def test_thousands_of_questions_in_flat_memory(job: NewJob) -> None:
    work = job(5000)
    used: list[int] = []

    def reply(question: str, _: int) -> Step:
        number = number_of(question)
        server.bodies.clear()
        if number % 1000 == 999:
            used.append(psutil.Process().memory_info().rss)
        # Ten of a hundred are scored; the others cost no time, and would fill 80 MB if they were kept.
        return GOOD if number % 100 < 10 else Say(None, extra={"reasoning_content": "x" * 20_000})

    with ChatServer(reply) as server:
        assert work.run(server.url) == 0
    assert len(work.kept()) == 500
    assert len(work.refused()) == 4500
    assert used[-1] - used[0] < 20e6
