"""Import Kisan Call Centre transcripts, from dumps or from the public API, as dialogues, every row accounted for."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from advisory import kcc
from advisory.compose import SYSTEM_HI
from advisory.importer import Rules, banned_names, import_rows, raw_rows
from advisory.knowledge import KNOWLEDGE_DIR, load_knowledge
from advisory.pesticides import PesticideList
from advisory.tables import read_table, table_files
from litgpt.utils import UserError, run_cli


def import_kcc(
    dump: Path | None = None,
    out_dir: Path = Path("out/kcc"),
    pages_dir: Path = Path("out/kcc_pages"),
    api_url: str = kcc.API_URL,
    filters: dict[str, str] | None = None,
    page_size: int = 1000,
    max_rows: int | None = None,
    knowledge_dir: Path = KNOWLEDGE_DIR,
    banned: Literal["drop", "flag"] = "drop",
    min_answer_words: int = 3,
) -> None:
    """Write dialogues.jsonl and report.json from Kisan Call Centre transcripts (licence: GODL-India).

    Without a dump they are fetched from data.gov.in with the key in DATA_GOV_IN_API_KEY; a run that was stopped goes on
    from the pages it has.

    Args:
        dump: a CSV, JSON or JSON-lines file, also gzipped, or a folder of such files.
        out_dir: where dialogues.jsonl and report.json go.
        pages_dir: where fetched pages are kept.
        api_url: the resource to fetch from.
        filters: fetch only these rows, e.g. {StateName: UTTAR PRADESH, year: 2023}.
        page_size: rows fetched at once.
        max_rows: fetch at most so many rows.
        knowledge_dir: crops, problems and pesticides that names are looked up in.
        banned: drop answers that name a pesticide which must not be advised, or keep them with a flag.
        min_answer_words: shorter answers are dropped.
    """
    knowledge = load_knowledge(knowledge_dir)
    rules = Rules(
        source=kcc.SOURCE,
        system=SYSTEM_HI,
        names=knowledge.names,
        is_banned=banned_names(PesticideList.load(knowledge_dir)),
        banned=banned,
        min_answer_words=min_answer_words,
    )
    if dump is not None:
        files = table_files(dump)
    else:
        if not (api_key := os.environ.get(kcc.KEY_VARIABLE, "").strip()):
            raise UserError(
                f"give --dump, a file or folder of transcripts, or put a key of data.gov.in into {kcc.KEY_VARIABLE} "
                "(free, after registration there)"
            )
        kcc.download(pages_dir, api_key, url=api_url, filters=filters, page_size=page_size, max_rows=max_rows)
        files = list(kcc.pages(pages_dir))
    tables = ((file.name, raw_rows(read_table(file), kcc.KccRows(file))) for file in files)
    account = import_rows(tables, rules, out_dir)
    print(account.table())
    print(f"{out_dir / 'dialogues.jsonl'}: {account.kept:,} dialogues; the account is {out_dir / 'report.json'}")


if __name__ == "__main__":
    run_cli(import_kcc)
