"""Compose the general text of the tiny world: simple Hindi and English, none of it about crop problems.

The sentence patterns and paragraphs in `data/general/` are written for this project; this script expands them with a
seeded generator into `data/general/{train,val}.jsonl`. A pattern is a small language of its own: `(a|b)` is a choice,
`{slot}` a word, `[a|b]` the agreement with a person's or noun's grammatical gender. The same seed gives the same bytes.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from litgpt.utils import UserError, atomic_file, run_cli

DATA = Path(__file__).resolve().parent.parent / "data" / "general"
FORMS = {"": 0, "o": 1, "p": 2, "op": 3}
INNERMOST_CHOICE = re.compile(r"\(([^()]*)\)")
AGREEMENT = re.compile(r"\[(?:(\w+):)?([^\[\]|]*)\|([^\[\]|]*)\]")
SLOT = re.compile(r"\{([^{}]+)\}")


class Lexicon:
    """The words and patterns of one language."""

    def __init__(self, path: Path) -> None:
        raw: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        self.people: list[tuple[str, str]] = [(name, g) for g in "mf" for name in raw["people"][g]]
        self.nouns: dict[str, list[list[str]]] = raw["nouns"]
        self.lists: dict[str, list[str]] = raw["lists"]
        self.texts: list[str] = raw["texts"]

    def expand(self, pattern: str, rng: random.Random) -> str:
        """One text of `pattern`.

        Raises:
            UserError: the pattern names a slot that does not exist or leaves a bracket open.
        """
        words, gender = self._bind(rng)
        # Agreement first: its `|` would otherwise be read as a bar of the choice around it.
        text = AGREEMENT.sub(lambda m: m[2] if gender.get(m[1] or "W") == "m" else m[3], pattern)
        while (choice := INNERMOST_CHOICE.search(text)) is not None:
            options = choice[1].split("|")
            text = text[: choice.start()] + rng.choice(options) + text[choice.end() :]
        try:
            text = SLOT.sub(lambda m: words[m[1]], text)
        except KeyError as err:
            raise UserError(f"general text: unknown slot {{{err.args[0]}}} in the pattern “{pattern[:60]}…”") from None
        if any(c in text for c in "{}[]()|"):
            raise UserError(f"general text: an unclosed bracket in the pattern “{pattern[:60]}…”")
        return " ".join(text.split())

    def _bind(self, rng: random.Random) -> tuple[dict[str, str], dict[str, str]]:
        """Choose every slot's word once, so that a text is about the same people and things throughout."""
        (w, w_gender), (q, q_gender) = rng.sample(self.people, 2)
        words, gender = {"W": w, "Q": q}, {"W": w_gender, "Q": q_gender}
        for slot, entries in self.nouns.items():
            noun = rng.choice(entries)
            gender[slot] = noun[4]
            words |= {f"{slot}.{form}" if form else slot: noun[i] for form, i in FORMS.items()}
        # A Hindi group is feminine only when all of it is.
        gender["both"] = "f" if {w_gender, q_gender} == {"f"} else "m"
        gender["wk"] = "f" if {w_gender, gender["kin"]} == {"f"} else "m"
        words |= {slot: rng.choice(entries) for slot, entries in self.lists.items()}
        a, b = rng.randint(3, 20), rng.randint(2, 9)
        words |= {"a": str(a), "b": str(b), "a+b": str(a + b), "a-b": str(a - b), "a*b": str(a * b)}
        return words, gender


def compose(lang: str, rng: random.Random, n_texts: int) -> list[str]:
    """`n_texts` different texts of one language: every written paragraph once, then the patterns in turn."""
    lexicon = Lexicon(DATA / f"patterns_{lang}.yaml")
    paragraphs = (DATA / f"paragraphs_{lang}.txt").read_text(encoding="utf-8").splitlines()
    texts: dict[str, None] = dict.fromkeys(p for p in paragraphs if p.strip())
    round_number = 0
    while len(texts) < n_texts:
        round_number += 1
        if round_number > 4 * n_texts:
            raise UserError(f"general text: the {lang} patterns cannot give {n_texts} different texts; ask for fewer")
        for pattern in rng.sample(lexicon.texts, len(lexicon.texts)):
            texts[lexicon.expand(pattern, rng)] = None
    return list(texts)[:n_texts]


def main(
    n_hindi: int = 780, n_english: int = 560, val_share: float = 0.08, seed: int = 1337, out_dir: Path = DATA
) -> None:
    """Write the general text as JSON lines.

    Args:
        n_hindi: number of Hindi texts.
        n_english: number of English texts.
        val_share: part of the texts that goes into val.jsonl and never into train.jsonl.
        seed: seed of the generator.
        out_dir: where train.jsonl and val.jsonl are written.
    """
    rng = random.Random(seed)
    records = [
        {"id": f"general-{lang}-{i:04d}", "text": text, "lang": lang}
        for lang, n in (("hi", n_hindi), ("en", n_english))
        for i, text in enumerate(compose(lang, rng, n))
    ]
    rng.shuffle(records)
    n_val = round(len(records) * val_share)
    out_dir.mkdir(parents=True, exist_ok=True)
    for split, part in (("val", records[:n_val]), ("train", records[n_val:])):
        with atomic_file(out_dir / f"{split}.jsonl") as temporary:
            lines = (json.dumps(r, ensure_ascii=False) + "\n" for r in part)
            Path(temporary).write_text("".join(lines), encoding="utf-8")
        print(f"{out_dir / split}.jsonl: {len(part)} texts, {sum(len(r['text'].encode()) for r in part):,} bytes")


if __name__ == "__main__":
    run_cli(main)
