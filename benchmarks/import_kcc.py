"""Importing millions of Kisan Call Centre rows: rows a second, and memory that does not grow with them.

The rows are made up (`tests/kcc_sample.py`): a quarter weather, a twelfth each prices and empty answers, a tenth
repeated, a fiftieth in a wrong encoding, the rest to be kept. They come through a pipe, so that only the output needs
disk; where the maker of the rows is the slower one, rows a second of CPU tell what the import does.

    python benchmarks/import_kcc.py --rows 5000000
"""

from __future__ import annotations

import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from advisory import kcc
from advisory.importer import Row, Rules, banned_names, import_rows, raw_rows
from advisory.knowledge import KNOWLEDGE_DIR, load_knowledge
from advisory.pesticides import PesticideList
from advisory.tables import Broken, read_table
from litgpt.utils import run_cli
from tests.kcc_sample import COLUMNS, stream, tiny_knowledge

ROOT = Path(__file__).resolve().parents[1]


def benchmark(rows: int = 5_000_000, work_dir: Path | None = None, real_knowledge: bool = False) -> None:
    """Write the rows into a pipe, import them from there, and print speed, memory and disk as they grow.

    Args:
        rows: how many.
        work_dir: where the output goes (400 MB a million rows); a temporary directory by default.
        real_knowledge: look names up in data/knowledge instead of in the five crops of the sample.
    """
    knowledge = load_knowledge(KNOWLEDGE_DIR) if real_knowledge else tiny_knowledge()
    with tempfile.TemporaryDirectory(dir=work_dir) as directory:
        out_dir, pipe = Path(directory) / "out", Path(directory) / "rows.csv"
        os.mkfifo(pipe)
        rules = Rules(
            source=kcc.SOURCE,
            system="",
            names=knowledge.names,
            is_banned=banned_names(PesticideList.load(KNOWLEDGE_DIR)),
        )
        # In a process of its own, so that making the rows costs the import neither time nor memory.
        maker = subprocess.Popen([sys.executable, __file__, "--write", str(pipe), str(rows)], cwd=ROOT)
        started = time.monotonic(), time.process_time()
        table = _watched(raw_rows(read_table(pipe), kcc.KccRows(pipe)), started, max(1, min(1_000_000, rows // 5)))
        print(f"{'rows':>12}{'rows/s':>10}{'rows/s of CPU':>15}{'peak RSS MB':>13}")
        account = import_rows([("rows.csv", table)], rules, out_dir)
        if maker.wait():
            raise SystemExit("the rows could not be made")
        size = (out_dir / "dialogues.jsonl").stat().st_size
        print(f"{account.rows:,} rows in, {account.kept:,} kept, {sum(account.dropped.values()):,} dropped")
        hashes = account.kept * 17 / 1e6
        print(f"dialogues.jsonl: {size / 1e6:,.0f} MB; SQLite's file of hashes: about {hashes:,.0f} MB")


def _watched(table: Iterator[Row | Broken], started: tuple[float, float], every: int) -> Iterator[Row | Broken]:
    for number, row in enumerate(table, start=1):
        yield row
        if number % every == 0:
            wall, cpu = time.monotonic() - started[0], time.process_time() - started[1]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"{number:>12,}{number / wall:>10,.0f}{number / cpu:>15,.0f}{peak:>13,.0f}", flush=True)


def _write(path: str, count: int) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(stream(count))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        _write(sys.argv[2], int(sys.argv[3]))
    else:
        run_cli(benchmark)
