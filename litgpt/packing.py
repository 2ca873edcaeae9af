"""Which document goes into which row: orders, first-fit packing, length buckets. Numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch

# Length of each item by its number.
Lengths: TypeAlias = Sequence[int] | Mapping[int, int]

# Rows that stay open for first-fit: enough for a few per cent of padding, few enough to keep the shuffled order.
OPEN_ROWS = 64
# Buckets are cut from this many steps' worth of shuffled documents: like lengths, and still a shuffled order.
BUCKET_STEPS = 64


def permutation(n: int, seed: int, epoch: int, *, shuffle: bool = True) -> list[int]:
    """The numbers below `n` in an order that seed and epoch determine, or in their own."""
    if not shuffle:
        return list(range(n))
    order: list[int] = torch.randperm(n, generator=generator(seed, epoch)).tolist()
    return order


def generator(seed: int, epoch: int) -> torch.Generator:
    """Random numbers for one epoch. A generator takes one number; multiplying keeps neighbours apart."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)


def bucket(order: Sequence[int], lengths: Lengths, step: int, *, seed: int | None, epoch: int = 0) -> list[list[int]]:
    """Rows of one item each, those of like length together.

    Args:
        order: item numbers in the order they come.
        lengths: length of each item by its number.
        step: rows that all ranks work on at one time; they get like lengths.
        seed: with the epoch it shuffles the steps; `None` leaves them.
        epoch: see `seed`.

    Returns:
        the rows; an unfinished step comes last.
    """
    window = step * BUCKET_STEPS
    windows = [order[start : start + window] for start in range(0, len(order), window)]
    # Python's sort is stable, so equal lengths keep the shuffled order.
    sorted_items = [item for chosen in windows for item in sorted(chosen, key=lambda item: lengths[item])]
    steps = [sorted_items[start : start + step] for start in range(0, len(sorted_items), step)]
    whole = len(sorted_items) // step
    shuffled = range(whole) if seed is None else permutation(whole, seed, epoch)
    return [[item] for number in [*shuffled, *range(whole, len(steps))] for item in steps[number]]


def pack(order: Sequence[int], lengths: Lengths, capacity: int) -> list[list[int]]:
    """Put items into rows, each into the first open row that has room for it (first-fit over a window).

    Args:
        order: item numbers in the order they come.
        lengths: length of each item by its number, none above `capacity`.
        capacity: length of a row.

    Returns:
        the rows in the order they were opened.
    """
    rows: list[list[int]] = []
    room: dict[int, int] = {}  # open row → length left
    for item in order:
        row = next((row for row, left in room.items() if left >= lengths[item]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room[row] = capacity
            if len(room) > OPEN_ROWS:
                del room[next(iter(room))]
        rows[row].append(item)
        room[row] -= lengths[item]
    return rows
