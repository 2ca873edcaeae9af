"""Import a question-and-answer set (JSON lines, Parquet, CSV; local or from the Hugging Face hub) as dialogues."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Literal, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from advisory.compose import SYSTEM_HI
from advisory.importer import Rules, banned_names, import_rows, raw_rows
from advisory.knowledge import KNOWLEDGE_DIR, load_knowledge
from advisory.pesticides import PesticideList
from advisory.public_sets import DATA_PATTERNS, PRESETS, Columns, MappedRows, read_columns
from advisory.tables import read_table, table_files
from litgpt.utils import UserError, run_cli

# The HTTP client's own base class (connection refused, time-outs): httpx's or httpx2's, as the hub's version has it.
HTTPClientError = cast(type[Exception], HfHubHTTPError.__bases__[0])


def import_dataset(
    data: Path | None = None,
    preset: str | None = None,
    columns: Path | None = None,
    question: str | None = None,
    answer: str | None = None,
    thought: str | None = None,
    system: str | None = None,
    crop: str | None = None,
    licence: str | None = None,
    licence_column: str | None = None,
    where: dict[str, str] | None = None,
    repo: str | None = None,
    source: str | None = None,
    out_dir: Path | None = None,
    knowledge_dir: Path = KNOWLEDGE_DIR,
    languages: tuple[Literal["hi", "hinglish", "en"], ...] = ("hi", "hinglish", "en"),
    banned: Literal["drop", "flag"] = "drop",
    allow_noncommercial: bool = False,
    min_answer_words: int = 3,
) -> None:
    """Write dialogues.jsonl and report.json from a set of questions and answers.

    Which column is what comes from a preset, a YAML file or the flags; flags go before the others. Without --data the
    set is downloaded from the Hugging Face hub.

    Args:
        data: a file or a folder of CSV, JSON, JSON lines or Parquet.
        preset: kisanvaani, talhakk, farmerchat, farmerchat_large, agthoughts, ajrasakha, crop or agricare.
        columns: a YAML file with the keys question, answer, thought, system, crop, licence, ...
        question: column of the question; several are joined with +.
        answer: column of the answer.
        thought: column of the reasoning before the answer.
        system: column of the system prompt; ours by default.
        crop: column of the crop.
        licence: licence of the whole set, e.g. CC-BY-4.0. One of licence and licence_column must be known.
        licence_column: column of each record's licence.
        where: import only rows with these values, e.g. {user_country: India}.
        repo: name of the set on the Hugging Face hub.
        source: name of the set in ids and meta; by default the preset's or the file's.
        out_dir: where the two files go; out/SOURCE by default.
        knowledge_dir: crops, problems and pesticides that names are looked up in.
        languages: languages of question and answer to keep.
        banned: drop answers that name a pesticide which must not be advised, or keep them with a flag.
        allow_noncommercial: keep records whose licence forbids commercial use, with a flag.
        min_answer_words: shorter answers are dropped.
    """
    flags = {
        "question": question, "answer": answer, "thought": thought, "system": system, "crop": crop, "licence": licence,
        "licence_column": licence_column, "where": where, "repo": repo,
    }  # fmt: skip
    mapped = _columns(preset, columns, {name: value for name, value in flags.items() if value is not None})
    if data is None:
        if mapped.repo is None:
            raise UserError("give --data, a file or a folder, or --repo, the name of a set on the Hugging Face hub")
        data = download(mapped.repo)
    name = source or preset or re.sub(r"[^a-z0-9]+", "_", data.name.split(".")[0].lower()).strip("_") or "dataset"
    directory = out_dir or Path("out") / name
    files = table_files(data)
    rules = Rules(
        source=name,
        system=SYSTEM_HI,
        names=load_knowledge(knowledge_dir).names,
        is_banned=banned_names(PesticideList.load(knowledge_dir)),
        banned=banned,
        languages=frozenset(languages),
        allow_noncommercial=allow_noncommercial,
        min_answer_words=min_answer_words,
    )
    tables = [(file.name, raw_rows(read_table(file), MappedRows(mapped, file))) for file in files]
    account = import_rows(tables, rules, directory)
    print(account.table())
    print(f"{directory / 'dialogues.jsonl'}: {account.kept:,} dialogues; the account is {directory / 'report.json'}")


def _columns(preset: str | None, path: Path | None, flags: dict[str, object]) -> Columns:
    if preset is not None and preset not in PRESETS:
        raise UserError(f"preset {preset!r} is not known; choose one of {', '.join(PRESETS)}")
    if preset is not None and path is not None:
        raise UserError("give --preset or --columns, not both")
    base = PRESETS[preset] if preset else read_columns(path) if path else None
    known = base.model_dump() if base else {}
    merged = known | flags
    if missing := [name for name in ("question", "answer") if name not in merged]:
        raise UserError(f"which column is the {missing[0]}? Give --{missing[0]}, --columns or --preset")
    return Columns.model_validate(merged)


def download(repo: str) -> Path:
    """The tables of a set on the Hugging Face hub; what is there already is not fetched again.

    Raises:
        UserError: the hub does not have it, does not open it, or does not answer.
    """
    try:
        return Path(
            snapshot_download(
                repo, repo_type="dataset", allow_patterns=list(DATA_PATTERNS), local_dir=Path("out/sets") / repo
            )
        )
    except GatedRepoError:
        raise UserError(
            f"{repo} is gated: accept its terms on its page, then put an access token into HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"the hub has no data set {repo}, or HF_TOKEN does not open it") from None
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a data set ({error})") from None
    except (HTTPClientError, LocalEntryNotFoundError, ConnectionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the hub did not deliver {repo} ({reason}); download it elsewhere and give its folder as --data"
        ) from None


if __name__ == "__main__":
    run_cli(import_dataset)
