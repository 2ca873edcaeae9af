"""Examine an adviser: a lit directory, or any model behind an OpenAI-compatible address."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from advisory.exam import Examiner, Reply, Score, check_values, record_scores, reference, shuffled, summary
from advisory.exam_report import SPLIT_NAMES, draw, table, to_json
from advisory.facts import load_facts
from advisory.knowledge import KNOWLEDGE_DIR
from litgpt.utils import UserError, atomic_file, progress, run_cli, sha256_file

if TYPE_CHECKING:
    from advisory.remote import Remote

Record = dict[str, Any]
CONTROLS = ("reference", "shuffled")


def main(
    out_dir: Path,
    checkpoint_dir: Path | None = None,
    base_url: str | None = None,
    model: str | None = None,
    control: str | None = None,
    data_dir: Path = Path("data/dialogues"),
    splits: tuple[str, ...] = SPLIT_NAMES,
    limit: int | None = None,
    runs: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    thinking: bool = True,
    max_new_tokens: int = 512,
    batch_size: int = 32,
    concurrency: int = 16,
    knowledge_dir: Path = KNOWLEDGE_DIR,
    name: str | None = None,
    beside: tuple[Path, ...] = (),
    overwrite: bool = False,
    device: str = "auto",
) -> None:
    """Put every question of the test splits to an adviser and score the answers with deterministic checks.

    Writes replies.jsonl (as they come; a run that was cut short goes on from there), exam.json, exam.md and exam.png.

    Args:
        out_dir: where these go.
        checkpoint_dir: a lit directory; or
        base_url: an OpenAI-compatible address like http://127.0.0.1:8000/v1; the key is read from OPENAI_API_KEY; or
        control: `reference` (the composer's own answers) or `shuffled` (those of other questions): what the checks
            give at best and by chance.
        model: the server's model, where it has several.
        data_dir: holds test.jsonl and the other splits, as prepare_data.py writes them.
        splits: which of them.
        limit: at most so many records a split, the first ones; twins stay together.
        runs: ask everything so often; with a temperature this measures consistency.
        temperature: 0 is the most probable answer.
        seed: of draws and of the shuffled control.
        thinking: let the model think first (lit directories).
        max_new_tokens: longest answer.
        batch_size: questions at once (lit directories).
        concurrency: requests at once (servers).
        knowledge_dir: the facts that answers are held against.
        name: what the tables call the adviser; by default its directory or model.
        beside: exam.json files of other advisers to show in the same table and plot.
        overwrite: start over, whatever replies out_dir holds.
        device: auto, cpu or cuda.
    """
    if sum(choice is not None for choice in (checkpoint_dir, base_url, control)) != 1:
        raise UserError("give one of --checkpoint_dir, --base_url and --control")
    if control is not None and control not in CONTROLS:
        raise UserError(f"control is {control!r}; choose one of {', '.join(CONTROLS)}")
    if runs < 1 or batch_size < 1:
        raise UserError("runs and batch_size are at least 1")
    facts = load_facts(knowledge_dir)
    records = {split: read_split(data_dir / f"{split}.jsonl", limit) for split in splits}
    everything = [record for split in splits for record in records[split]]
    places = [split for split in splits for _ in records[split]]
    remote = None
    if base_url is not None:
        from advisory.remote import Remote

        remote = Remote(base_url, model=model, concurrency=concurrency)
        model = remote.model
    called = name or str(checkpoint_dir or model or base_url or control)
    settings: dict[str, Any] = {
        "adviser": str(checkpoint_dir or base_url or control), "model": model, "runs": runs, "temperature": temperature,
        "seed": seed, "thinking": thinking, "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    if checkpoint_dir is not None:
        # Other weights may lie at the same place by now.
        files = [checkpoint_dir / name for name in ("lit_model.pth", "tokenizer.json")]
        settings["sha256"] = [sha256_file(file) if file.is_file() else None for file in files]
    out_dir.mkdir(parents=True, exist_ok=True)
    if control is not None:
        given = (reference(everything), shuffled(everything, seed))[CONTROLS.index(control)]
        replies = {
            (run, record["id"]): reply for run in range(runs) for record, reply in zip(everything, given, strict=True)
        }
    else:
        asked = {record["id"]: question_of(record) for record in everything}
        replies = load_replies(out_dir / "replies.jsonl", settings, asked, overwrite=overwrite)
        with (out_dir / "replies.jsonl").open("a", encoding="utf-8") as file:
            for run in range(runs):
                todo = [record for record in everything if (run, record["id"]) not in replies]
                if checkpoint_dir is not None:
                    stream = ask_checkpoint(checkpoint_dir, todo, run, settings, batch_size, device)
                else:
                    assert remote is not None
                    stream = ask_server(remote, todo, run, settings)
                for record, reply in progress(
                    stream, f"asking, run {run + 1} of {runs}", total=len(todo), unit="question"
                ):
                    replies[run, record["id"]] = reply
                    line = {"run": run, "id": record["id"], "question": question_of(record)} | asdict(reply)
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()
    asked_in = [[replies[run, record["id"]] for record in everything] for run in range(runs)]
    scored = record_scores(Examiner(facts), everything, asked_in)
    scores: dict[str, dict[str, Score]] = {}
    values: dict[str, dict[str, float]] = {}
    for split in (*splits, "all"):
        own = [n for n, of in enumerate(places) if split in (of, "all")]
        values = check_values(
            [everything[n] for n in own], [[run[n] for n in own] for run in asked_in], [scored[n] for n in own]
        )
        scores[split] = summary(values)
    exam = {
        "name": called, "settings": settings, "data": str(data_dir), "scores": to_json(scores), "values": values
    }  # fmt: skip
    others = [read_exam(path) for path in beside]
    write(out_dir / "exam.json", json.dumps(exam, indent=1, ensure_ascii=False) + "\n")
    text = table([*others, exam])
    write(out_dir / "exam.md", text)
    draw([*others, exam], out_dir / "exam.png")
    print(text)
    print(
        f"{out_dir}: exam.json, exam.md, exam.png, replies.jsonl"
        if control is None
        else f"{out_dir}: exam.json, exam.md, exam.png"
    )


def read_split(path: Path, limit: int | None) -> list[Record]:
    """The records of a split with the composer's `meta`.

    Raises:
        UserError: a missing file, or a line that is no such record.
    """
    if not path.is_file():
        raise UserError(f"no file {path}: run python scripts/prepare_data.py first")
    records: list[Record] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
            roles = [message["role"] for message in record["messages"][-2:]]
            if roles != ["user", "assistant"] or "expect" not in record["meta"] or not isinstance(record["id"], str):
                raise KeyError("expect")
        except (ValueError, KeyError, TypeError, IndexError):
            raise UserError(
                f"{path}:{number}: no dialogue of prepare_data.py (id, meta.expect and a last answer are needed)"
            ) from None
        records.append(record)
    if limit is None:
        return records
    # An odd limit would cut a pair of twins in two.
    return records[: limit + limit % 2]


def question_of(record: Record) -> str:
    """What the user said last."""
    question: str = record["messages"][-2]["content"]
    return question


def load_replies(
    path: Path, settings: dict[str, Any], asked: dict[str, str], *, overwrite: bool
) -> dict[tuple[int, str], Reply]:
    """What an earlier run with the same settings has already got; a last line cut short is asked again.

    Raises:
        UserError: the replies are of other settings, or to other questions under the same ids (`asked`).
    """
    header = json.dumps({"settings": settings}, ensure_ascii=False)
    # Split at \n alone, which a reply cannot hold in JSON; a kill may have cut the last line inside a letter.
    content = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
    lines = content.removesuffix("\n").split("\n") if content else []
    if lines and lines[0] != header and not overwrite:
        raise UserError(f"{path} holds replies of other settings: choose another --out_dir, or --overwrite true")
    kept = [header]
    replies: dict[tuple[int, str], Reply] = {}
    if lines and not overwrite:
        for line in lines[1:]:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry["question"] != asked.get(entry["id"], entry["question"]):
                raise UserError(f"{path} answers another {entry['id']}: choose another --out_dir, or --overwrite true")
            replies[entry["run"], entry["id"]] = Reply(entry["text"], entry["thought"])
            kept.append(line)
    write(path, "".join(line + "\n" for line in kept))
    return replies


def ask_checkpoint(
    checkpoint_dir: Path, records: Sequence[Record], run: int, settings: dict[str, Any], batch_size: int, device: str
) -> Iterator[tuple[Record, Reply]]:
    """Replies of a lit directory, batch by batch; questions of like length go together."""
    from advisory.advisor import Advisor
    from litgpt.generate import Sampling

    if not records:
        return
    advisor = Advisor(
        checkpoint_dir,
        thinking=settings["thinking"],
        max_new_tokens=settings["max_new_tokens"],
        sampling=Sampling(settings["temperature"]),
        seed=settings["seed"] + 1000 * run,
        device=device,
    )
    ordered = sorted(records, key=lambda record: sum(len(message["content"]) for message in record["messages"][:-1]))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        answers = advisor.ask_many([record["messages"][:-1] for record in batch], show_thought=True)
        for record, answer in zip(batch, answers, strict=True):
            yield record, Reply(answer.text, answer.thought)


def ask_server(
    remote: Remote, records: Sequence[Record], run: int, settings: dict[str, Any]
) -> Iterator[tuple[Record, Reply]]:
    """Replies of a server as they come back.

    Raises:
        UserError: a request failed for good; what came back until then is kept.
    """
    asked = remote.ask_all(
        [record["messages"][:-1] for record in records],
        temperature=settings["temperature"],
        max_tokens=settings["max_new_tokens"],
        seed=settings["seed"] + 1000 * run,
    )
    with closing(asked):
        for number, reply in asked:
            if reply.error:
                failed = f"{remote.base_url}: {records[number]['id']}: {reply.error}"
                raise UserError(f"{failed}; run the same line again to go on")
            yield records[number], Reply(reply.text, reply.thought)


def read_exam(path: Path) -> dict[str, Any]:
    """Another adviser's exam.json.

    Raises:
        UserError: not there, or no such file.
    """
    try:
        exam: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        exam["name"], exam["scores"], exam["values"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: no exam.json of this command") from None
    return exam


def write(path: Path, text: str) -> None:
    """The whole file or none of it."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_cli(main)
