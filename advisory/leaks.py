"""Near-duplicates between splits, found by MinHash and confirmed by counting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasketch import MinHash, MinHashLSH

from advisory.compose import Record

SHINGLE = 5
"""Letters in a shingle of the near-duplicate check."""
NEAR = 0.85
"""Jaccard similarity of two questions' shingles from which on they are one question."""
PERMUTATIONS = 64


def leaks(splits: Mapping[str, Sequence[Record]]) -> list[tuple[str, str]]:
    """Pairs (record of another split, record of train) whose questions are near-duplicates, by MinHash with LSH.

    A question is all that the user says, case lines included; similarity is the Jaccard index of letter shingles
    (Broder 1997), estimated with `PERMUTATIONS` hashes.
    """
    index = MinHashLSH(threshold=NEAR, num_perm=PERMUTATIONS)
    ids = [record["id"] for record in splits["train"]]
    with index.insertion_session() as session:
        for identity, sketch in zip(ids, _sketches(splits["train"]), strict=True):
            session.insert(identity, sketch, check_duplication=False)
    by_id = {record["id"]: record for record in splits["train"]}
    found: list[tuple[str, str]] = []
    for split, records in splits.items():
        if split == "train":
            continue
        for record, sketch in zip(records, _sketches(records), strict=True):
            shingles = _shingles(record)
            for identity in index.query(sketch):
                other = _shingles(by_id[identity])
                if len(shingles & other) / len(shingles | other) >= NEAR:
                    found.append((record["id"], identity))
                    break
    return found


def _sketches(records: Sequence[Record]) -> Iterator[Any]:
    return MinHash.generator((_shingles(record) for record in records), num_perm=PERMUTATIONS)


def _shingles(record: Record) -> set[bytes]:
    text = " ".join(message["content"] for message in record["messages"] if message["role"] == "user")
    return {text[start : start + SHINGLE].encode() for start in range(max(1, len(text) - SHINGLE + 1))}
