"""Let a large model behind an OpenAI-compatible address write thought and answer for given questions."""

from __future__ import annotations

import fcntl
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from advisory.exam import Examiner
from advisory.facts import load_facts
from advisory.knowledge import KNOWLEDGE_DIR
from advisory.rationales import INSTRUCTION_EN, Question, digest, prompt, read_questions, refusals, to_record
from advisory.remote import Remote
from litgpt.utils import UserError, progress, run_cli

FAILURES_IN_A_ROW = 20


def generate_rationales(
    questions: Path,
    out: Path,
    base_url: str,
    model: str | None = None,
    knowledge_dir: Path = KNOWLEDGE_DIR,
    limit: int | None = None,
    temperature: float = 0.6,
    max_tokens: int = 2048,
    seed: int = 0,
    concurrency: int = 16,
    timeout: float = 120.0,
    retries: int = 5,
    extra_body: dict[str, Any] | None = None,
) -> None:
    """Ask a server for thought and answer to each question; keep what no check speaks against.

    Serve the model first, for instance: vllm serve Qwen/Qwen3-14B --reasoning-parser qwen3

    The key is read from OPENAI_API_KEY. Run the same line again after a stop: what is there is not asked again, and
    what failed on the way is. Refused replies go to OUT's sibling .rejected.jsonl with the reasons; take lines out of
    it to have them asked once more.

    Args:
        questions: dialogue records (JSON lines), with or without answers; each is asked up to its last user turn.
        out: dialogue records are appended here, one a line, with model, settings and hashes in meta.provenance.
        base_url: an OpenAI-compatible address like http://127.0.0.1:8000/v1.
        model: the server's model, where it has several.
        knowledge_dir: the facts that go into the prompt and that answers are held against.
        limit: only the first so many questions.
        temperature: of the draws.
        max_tokens: longest reply, its thought included.
        seed: of the draws, where the server keeps to it.
        concurrency: requests under way at once.
        timeout: seconds a request.
        retries: further attempts after a time-out, a lost connection, a 429 or a 5xx.
        extra_body: sent along with each request, e.g. {chat_template_kwargs: {enable_thinking: true}}.
    """
    rejected = out.with_name(out.name.removesuffix(".jsonl") + ".rejected.jsonl")
    if questions.resolve() in (out.resolve(), rejected.resolve()):
        raise UserError(f"--out would write into the questions, {questions}: choose another file")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: expected at least 1")
    facts = load_facts(knowledge_dir)
    # All lines are read once before any is asked: a broken one is told at once, and nothing is paid for.
    total = sum(1 for _ in islice(read_questions(questions), limit))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("ab+") as good, rejected.open("ab+") as bad:
        seen = taken_up(good, out) | taken_up(bad, rejected)
        count = sum(1 for _ in unanswered(questions, limit, seen, out))
        print(f"{total} questions, {total - count} answered before", file=sys.stderr)
        if not count:
            return
        remote = Remote(base_url, model=model, concurrency=concurrency, timeout=timeout, retries=retries)
        settings: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
        settings |= {"extra_body": extra_body} if extra_body else {}
        origin = {"model": remote.model, "settings": settings, "instruction_sha256": digest(INSTRUCTION_EN)}
        under_way: dict[int, tuple[Question, str]] = {}

        def conversations() -> Iterator[list[Mapping[str, str]]]:
            for number, question in enumerate(unanswered(questions, limit, seen, out)):
                messages = prompt(question, facts)
                under_way[number] = question, digest(messages)
                yield messages

        examiner = Examiner(facts)
        kinds: Counter[str] = Counter()
        reasons_seen: Counter[str] = Counter()
        failures = 0
        with closing(remote.ask_all(conversations(), **settings)) as replies:
            for number, reply in progress(replies, "asking", total=count, unit="question"):
                question, sent = under_way.pop(number)
                if reply.error:
                    kinds["failed"] += 1
                    failures += 1
                    print(f"{question.id}: {reply.error}", file=sys.stderr)
                    if failures == FAILURES_IN_A_ROW:
                        raise UserError(f"{base_url}: {failures} requests in a row failed, the last: {reply.error}")
                    continue
                failures = 0
                reasons = refusals(question, reply, examiner)
                kinds["rejected" if reasons else "kept"] += 1
                reasons_seen.update({reason.partition(":")[0] for reason in reasons})
                now = datetime.now(UTC).isoformat(timespec="seconds")
                record = to_record(question, reply, origin | {"prompt_sha256": sent, "created": now})
                append(bad if reasons else good, record | ({"reasons": reasons} if reasons else {}))
    for name, times in (*kinds.items(), *((f"  {name}", times) for name, times in reasons_seen.most_common())):
        print(f"{name}: {times}")
    if kinds["failed"]:
        raise UserError(f"{kinds['failed']} questions got no answer; run the same line again to ask only those")


def unanswered(path: Path, limit: int | None, seen: Mapping[str, str], out: Path) -> Iterator[Question]:
    """The questions whose id is not in `seen`, one after the other.

    Raises:
        UserError: an id stands in `seen` with another question.
    """
    for question in islice(read_questions(path), limit):
        if question.id not in seen:
            yield question
        elif seen[question.id] != digest(question.turns):
            raise UserError(f"{out} holds another question under the id {question.id!r}: choose another --out")


def taken_up(file: BinaryIO, path: Path) -> dict[str, str]:
    """Ids and digests of the questions in a file of ours; a last line that a kill has cut short is cut off.

    Raises:
        UserError: another run is writing to the file, or a line in it is none of ours.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: another run is writing to it; wait for its end or choose another --out") from None
    seen: dict[str, str] = {}
    end = 0
    file.seek(0)
    for number, line in enumerate(file, start=1):
        try:
            record = json.loads(line)
            if record["meta"]["source"] != "generated":
                raise LookupError
            seen[record["id"]] = digest([turn for turn in record["messages"][:-1] if turn["role"] != "system"])
        except (ValueError, LookupError, TypeError):
            if line.endswith(b"\n"):
                raise UserError(f"{path}:{number}: not a record of this command; choose another --out") from None
            file.truncate(end)
            return seen
        end += len(line)
        if not line.endswith(b"\n"):
            file.write(b"\n")
            file.flush()
    return seen


def append(file: BinaryIO, record: Mapping[str, Any]) -> None:
    """One record as one line, on its way to the disk at once: a kill loses none that was written."""
    file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
    file.flush()


if __name__ == "__main__":
    run_cli(generate_rationales)
