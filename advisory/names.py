"""Our crops and problems by all their names in all scripts, found in a text as whole words.

The one matcher of names: the adviser, the exam and the importers all ask it. Texts and names are compared by the words
of their `match_key`, so that spellings which differ by a nukta, a half nasal or a joiner are one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from advisory.normalise import match_key

NOT_OURS = (
    "sweet potato", "शकरकंद", "shakarkand", "horse gram", "rice bean", "custard apple", "mustard oil",
    "सरसों का तेल", "mustard cake", "सरसों की खली", "cotton seed cake", "आम तौर", "rice straw", "wheat straw",
    "गेहूं का भूसा", "धान का पुआल", "banana pepper",
)  # fmt: skip
"""Names in which the name of one of our crops stands for something else."""

_Table = dict[str, list[tuple[tuple[str, ...], str]]]


class NameIndex:
    """Which crops and problems some words name.

    Args:
        crops: crop id → its names.
        problems: crop id → problem id → its names.
    """

    def __init__(self, crops: Mapping[str, Iterable[str]], problems: Mapping[str, Mapping[str, Iterable[str]]]) -> None:
        owned = [(name, crop_id) for crop_id, names in crops.items() for name in names]
        known = {match_key(name) for name, _ in owned}
        self._crops = _table([*owned, *((name, "") for name in NOT_OURS if match_key(name) not in known)])
        self._problems = {
            crop_id: _table((name, problem_id) for problem_id, names in of_crop.items() for name in names)
            for crop_id, of_crop in problems.items()
        }

    def crops(self, words: Sequence[str]) -> list[str]:
        """Ids of the crops that are named, the longest name first.

        Args:
            words: those of a `match_key`.
        """
        # "500 gram" is a weight, not a chickpea.
        found = [
            hit
            for hit in _find(words, self._crops)
            if not (hit[2] == 1 and words[hit[1]] == "gram" and _after_number(words, hit[1]))
        ]
        return list(dict.fromkeys(hit[3] for hit in sorted(found) if hit[3]))

    def problems(self, words: Sequence[str], crop_id: str, *, in_order: bool = False) -> list[str]:
        """Ids of the crop's problems that are named, each once, the longest name first.

        Args:
            words: those of a `match_key`.
            crop_id: the crop; one that is not known has no problems.
            in_order: as the words name them, instead.
        """
        found = _find(words, self._problems.get(crop_id, {}))
        return list(dict.fromkeys(hit[3] for hit in (found if in_order else sorted(found))))


def _after_number(words: Sequence[str], place: int) -> bool:
    return place > 0 and words[place - 1][-1:].isdigit()


def _table(names: Iterable[tuple[str, str]]) -> _Table:
    table: _Table = {}
    for name, owner in names:
        words = tuple(match_key(name).split())
        if words:
            table.setdefault(words[0], []).append((words, owner))
    for entries in table.values():
        entries.sort(key=lambda entry: -len(entry[0]))
    return table


def _find(words: Sequence[str], table: _Table) -> list[tuple[int, int, int, str]]:
    """(minus the name's length, place, number of words, owner) of each name in order, the longest at each place."""
    found: list[tuple[int, int, int, str]] = []
    if table.keys().isdisjoint(words):
        return found
    end = 0
    for place, word in enumerate(words):
        if word not in table or place < end:
            continue
        for name, owner in table[word]:
            if len(name) == 1 or tuple(words[place : place + len(name)]) == name:
                found.append((-sum(map(len, name)), place, len(name), owner))
                end = place + len(name)
                break
    return found
