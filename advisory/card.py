"""The dataset card: counts, lengths, plots, and dialogues of each style to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

import numpy as np

from advisory.compose import Record
from advisory.questions import STYLES
from litgpt.tokenizer import Tokenizer

EXAMPLES = 10


def lengths(records: Sequence[Record], tokenizer: Tokenizer | None) -> dict[str, np.ndarray]:
    """Length of the last question, thought and answer of each record, in tokens, or in words without a tokenizer."""
    texts = {
        "question": [record["messages"][-2]["content"] for record in records],
        "thought": [record["messages"][-1]["thought"] for record in records],
        "answer": [record["messages"][-1]["content"] for record in records],
    }
    count = (lambda text: len(tokenizer.encode(text))) if tokenizer else (lambda text: len(text.split()))
    return {piece: np.array([count(text) for text in own]) for piece, own in texts.items()}


def card(
    splits: Mapping[str, Sequence[Record]],
    *,
    command: str,
    near_duplicates: int,
    tokenizer: Tokenizer | None,
    tokenizer_name: str | None,
    plot: str,
    seed: int,
) -> str:
    """The card in Markdown.

    Args:
        splits: all records.
        command: the line that makes the same bytes again.
        near_duplicates: how many records resembled one of an earlier split and were dropped.
        tokenizer: counts tokens; without one the card counts words and says so.
        tokenizer_name: what it is called.
        plot: file name of the plot beside the card.
        seed: chooses the examples.
    """
    train = splits["train"]
    unit = "tokens" if tokenizer else "words"
    by = tokenizer_name if tokenizer else "words, as no tokenizer was given (--tokenizer_dir)"
    lines = [
        "# Dialogues of the Hindi crop adviser",
        "",
        f"Composed from `data/knowledge/` by `{command}`; the same facts, seed and size give the same bytes.",
        "Every answer is put together by rules from sourced facts; no model wrote any of it. Licence: Apache-2.0.",
        "",
        "| split | records | crops | problems | what it asks |",
        "| --- | --- | --- | --- | --- |",
    ]
    about = {
        "train": "everything", "val": "held-out phrasings and combinations",
        "test": "phrasings and combinations that train never has",
        "test_counterfactual": "pairs with one circumstance changed",
        "test_safety": "dangers, banned chemicals, doses, off-topic",
        "test_hinglish": "Roman letters and mixed script",
    }  # fmt: skip
    for split, records in splits.items():
        crops = {record["meta"]["crop"] for record in records} - {None}
        problems = {record["meta"]["problem"] for record in records} - {None}
        lines.append(f"| {split} | {len(records)} | {len(crops)} | {len(problems)} | {about[split]} |")
    distinct = len({_asked(record) for records in splits.values() for record in records})
    lines += ["", f"Distinct questions in all splits: {distinct} of {sum(map(len, splits.values()))} records."]
    lines += [
        f"Near-duplicates of a record in an earlier split: {near_duplicates} found by MinHash and dropped, none left.",
        "",
    ]
    for what, key in (("Kinds of answer", "expect"), ("Styles", "style"), ("Forms", "form")):
        counts = Counter(record["meta"][key] for record in train)
        shares = ", ".join(f"{name} {count} ({count / len(train):.0%})" for name, count in counts.most_common())
        lines.append(f"- **{what}** in train: {shares}")
    lines += [
        "",
        f"Lengths in train, in {unit} ({by}):",
        "",
        "| | median | 95 % | longest |",
        "| --- | --- | --- | --- |",
    ]
    for piece, counts_N in lengths(train, tokenizer).items():
        lines.append(f"| {piece} | {np.median(counts_N):.0f} | {np.percentile(counts_N, 95):.0f} | {counts_N.max()} |")
    lines += ["", f"![counts and lengths]({plot})", "", "## To read", ""]
    lines.append(f"{EXAMPLES} of each style, drawn at random from train.")
    rng = Random(seed)
    for style in STYLES:
        own = [record for record in train if record["meta"]["style"] == style]
        lines += ["", f"### {style}"]
        for record in rng.sample(own, min(EXAMPLES, len(own))):
            lines += ["", f"**{record['id']}** ({record['meta']['expect']}, {record['meta']['form']})", ""]
            for message in record["messages"][1:]:
                if "thought" in message:
                    lines.append(f"> *{message['thought']}*  ")
                mark = "**किसान:** " if message["role"] == "user" else "**सलाह:** "
                lines += [
                    f"> {mark if number == 0 else ''}{line}  "
                    for number, line in enumerate(message["content"].split("\n"))
                ]
    return "\n".join(lines) + "\n"


def draw(splits: Mapping[str, Sequence[Record]], tokenizer: Tokenizer | None, path: Path) -> None:
    """Records a crop, and the lengths of question, thought and answer, as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    train = splits["train"]
    crops = Counter(record["meta"]["crop"] or "none" for record in train)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.24 * len(crops) + 1.5))
    names, counts = zip(*crops.most_common(), strict=True)
    left.barh(names, counts, color="tab:green")
    left.invert_yaxis()
    left.set_xlabel("records in train")
    for piece, counts_N in lengths(train, tokenizer).items():
        right.hist(counts_N, bins=60, histtype="step", label=piece, linewidth=1.5)
    right.set_xlabel("tokens" if tokenizer else "words")
    right.set_ylabel("records")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


def _asked(record: Record) -> str:
    return "\n".join(message["content"] for message in record["messages"] if message["role"] == "user")
