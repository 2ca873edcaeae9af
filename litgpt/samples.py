"""What the student answers while it learns: a few validation dialogues, greedily, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from litgpt.chat import IM_END, render
from litgpt.data import Record, tags_of
from litgpt.distill import Distiller
from litgpt.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256


def answer(distiller: Distiller, records: Sequence[Record], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Let the student give each record's last assistant turn anew, with a thought where the record has one.

    Every process of a sharded student calls it and gets the same.

    Returns:
        plain values by record: `id`, `question` (the turn before), `reply`, and `expected`, the record's own answer.
        A record whose prompt fills the context is left out.
    """
    end = tokenizer.token_to_id(IM_END)
    samples = []
    for record in records:
        turn = max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
        told = record.messages[turn]
        prompt = render(
            record.messages[:turn],
            tokenizer,
            tags=tags_of(tokenizer),
            add_generation_prompt=True,
            thinking=bool(told.get("thought", "").strip()),
        ).ids
        room = min(MAX_NEW_TOKENS, distiller.student.config.block_size - len(prompt))
        if room < 1:
            continue
        (reply,) = distiller.replies([prompt], max_new_tokens=room, stop_ids=[] if end is None else [end])
        samples.append(
            {
                "id": record.id,
                "question": record.messages[turn - 1]["content"] if turn else "",
                "reply": tokenizer.decode(reply),
                "expected": told["content"],
            }
        )
    return samples
