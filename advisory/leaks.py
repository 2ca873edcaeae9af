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
    """Pairs (record, record of an earlier split) whose questions are near-duplicates, by MinHash with LSH.

    A question is all that the user says, case lines included; similarity is the Jaccard index of letter shingles
    (Broder 1997), estimated with `PERMUTATIONS` hashes. Each record is compared with all splits before its own.
    """
    index = MinHashLSH(threshold=NEAR, num_perm=PERMUTATIONS)
    by_id: dict[str, Record] = {}
    found: list[tuple[str, str]] = []
    for records in splits.values():
        sketches = list(_sketches(records))
        for record, sketch in zip(records, sketches, strict=True) if by_id else ():
            shingles = _shingles(record)
            for identity in index.query(sketch):
                other = _shingles(by_id[identity])
                if len(shingles & other) / len(shingles | other) >= NEAR:
                    found.append((record["id"], identity))
                    break
        with index.insertion_session() as session:
            for record, sketch in zip(records, sketches, strict=True):
                session.insert(record["id"], sketch, check_duplication=False)
        by_id |= {record["id"]: record for record in records}
    return found


def _sketches(records: Sequence[Record]) -> Iterator[Any]:
    return MinHash.generator((_shingles(record) for record in records), num_perm=PERMUTATIONS)


def _shingles(record: Record) -> set[bytes]:
    text = " ".join(message["content"] for message in record["messages"] if message["role"] == "user")
    return {text[start : start + SHINGLE].encode() for start in range(max(1, len(text) - SHINGLE + 1))}
