"""Compose the dialogues from the facts in `data/knowledge/`: train, val, test and three special tests, with a card."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from advisory.card import card, draw
from advisory.compose import Language, Record
from advisory.dataset import SPLITS, compose_splits, sizes
from advisory.facts import load_facts
from advisory.knowledge import KNOWLEDGE_DIR
from advisory.leaks import leaks
from litgpt.tokenizer import Tokenizer
from litgpt.utils import atomic_file, progress, run_cli

CARD, PLOT = "README.md", "card.png"


def write_jsonl(path: Path, records: Sequence[Record]) -> None:
    """One record a line, UTF-8; the old file stays until the new one is whole."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def prepare_data(
    out_dir: Path = Path("data/dialogues"),
    knowledge_dir: Path = KNOWLEDGE_DIR,
    crops: tuple[str, ...] | None = None,
    seed: int = 1337,
    size: int = 30_000,
    thoughts: Language = "en",
    tokenizer_dir: Path | None = None,
) -> None:
    """Compose the crop dialogues; the same facts, crops, seed and size give the same bytes.

    The bundled set is `--config configs/tiny/dialogues.yaml`.

    Args:
        out_dir: where the six .jsonl files, the card (README.md) and its plot go.
        knowledge_dir: the folder of crop files, soil limits, weather rules and pesticides.
        crops: ids of the crops to speak of, e.g. [wheat, rice]; all by default.
        seed: fixes every choice.
        size: number of training dialogues; the other splits get 3 to 6 % of it each.
        thoughts: language of the thoughts, en or hi (Hindi takes Qwen3 about four times the tokens).
        tokenizer_dir: a checkpoint whose tokenizer counts tokens for the card, e.g. checkpoints/Qwen/Qwen3-0.6B.
    """
    facts = load_facts(knowledge_dir)
    if crops is not None:
        facts = facts.only(crops)
    tokenizer = Tokenizer(tokenizer_dir) if tokenizer_dir else None
    start = time.monotonic()
    composing = compose_splits(facts, size=size, seed=seed, thoughts=thoughts)
    splits = dict(progress(composing, "composing", total=len(sizes(size)), unit="split"))
    seconds = time.monotonic() - start
    found = leaks(splits)
    for split in SPLITS:
        near = {identity for identity, _ in found}
        if split != "train" and near:
            # A twin goes with its sibling, or the pair would be broken.
            pairs = {
                record["meta"]["twin"]["pair"]
                for record in splits[split]
                if record["id"] in near and "twin" in record["meta"]
            }
            splits[split] = [
                record
                for record in splits[split]
                if record["id"] not in near and record["meta"].get("twin", {}).get("pair") not in pairs
            ]
    for split in SPLITS:
        write_jsonl(out_dir / f"{split}.jsonl", splits[split])
    chosen = f" --crops [{', '.join(crops)}]" if crops else ""
    chosen += f" --thoughts {thoughts}" if thoughts != "en" else ""
    chosen += f" --tokenizer_dir {tokenizer_dir}" if tokenizer_dir else ""
    text = card(
        splits,
        command=f"python scripts/prepare_data.py --size {size} --seed {seed}{chosen}",
        near_duplicates=len(found),
        tokenizer=tokenizer,
        tokenizer_name=tokenizer_dir.name if tokenizer_dir else None,
        plot=PLOT,
        seed=seed,
    )
    with atomic_file(out_dir / CARD) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    with atomic_file(out_dir / PLOT) as temporary:
        draw(splits, tokenizer, temporary)
    total = sum(map(len, splits.values()))
    print(f"{len(facts.knowledge.crops)} crops, {len(facts.knowledge.problems)} problems")
    print(
        f"{total} records in {seconds:.1f} s, {total / seconds:.0f} a second; "
        f"{len(found)} near-duplicates of earlier splits dropped"
    )
    for split in SPLITS:
        print(f"{out_dir / split}.jsonl: {len(splits[split])} dialogues")
    print(f"{out_dir / CARD}: counts, lengths, and dialogues of each style to read")


if __name__ == "__main__":
    run_cli(prepare_data)
