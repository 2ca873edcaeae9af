"""Write the dialogues `data/dialogues/{train,val,test}.jsonl` from the facts in `data/knowledge/`."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from advisory.dataset import SPLITS, Record, build_splits
from advisory.knowledge import KNOWLEDGE_DIR, load_knowledge
from litgpt.utils import atomic_file, run_cli


def write_jsonl(path: Path, records: list[Record]) -> None:
    """One record a line, UTF-8; the old file stays until the new one is whole."""
    with atomic_file(path) as temporary:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        temporary.write_text(text, encoding="utf-8", newline="\n")


def prepare_data(
    out_dir: Path = Path("data/dialogues"),
    knowledge_dir: Path = KNOWLEDGE_DIR,
    crops: tuple[str, ...] | None = None,
    seed: int = 1337,
    size: int = 1200,
) -> None:
    """Compose the crop dialogues; the same facts, crops, seed and size give the same bytes.

    The bundled set is `--config configs/tiny/dialogues.yaml`.

    Args:
        out_dir: where train.jsonl, val.jsonl and test.jsonl go.
        knowledge_dir: the folder of crop files.
        crops: ids of the crops to speak of, e.g. [wheat, rice]; all by default.
        seed: fixes every choice.
        size: number of training dialogues; val and test get a tenth of it each.
    """
    knowledge = load_knowledge(knowledge_dir)
    if crops is not None:
        knowledge = knowledge.only(crops)
    splits = build_splits(knowledge, size=size, seed=seed)
    for split in SPLITS:
        write_jsonl(out_dir / f"{split}.jsonl", splits[split])
    print(f"{len(knowledge.crops)} crops, {len(knowledge.problems)} problems")
    for split in SPLITS:
        means = [
            statistics.fmean(len(text.split()) for text in texts)
            for texts in zip(
                *(
                    (r["messages"][1]["content"], r["messages"][2]["thought"], r["messages"][2]["content"])
                    for r in splits[split]
                ),
                strict=True,
            )
        ]
        print(
            f"{out_dir / split}.jsonl: {len(splits[split])} dialogues, "
            f"mean words: question {means[0]:.0f}, thought {means[1]:.0f}, answer {means[2]:.0f}"
        )


if __name__ == "__main__":
    run_cli(prepare_data)
