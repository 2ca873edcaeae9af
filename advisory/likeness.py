"""How alike two texts are, by the runs of three letters that they share."""

from __future__ import annotations


def trigrams(words: str) -> frozenset[str]:
    """The runs of three letters, blanks included, of a text that is already folded."""
    return frozenset(words[start : start + 3] for start in range(len(words) - 2))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Shared runs as a part of all runs, 0 … 1; 0 where neither has any."""
    return len(a & b) / len(a | b) if a or b else 0.0


def dice(a: frozenset[str], b: frozenset[str]) -> float:
    """Twice the shared runs as a part of both counts, 0 … 1 (Dice 1945); 0 where one has none."""
    return 2 * len(a & b) / (len(a) + len(b)) if a and b else 0.0
