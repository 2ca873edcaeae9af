"""Which pesticides may be named in advice: the official Indian list, read from `data/knowledge/_pesticides.yaml`.

`PesticideList.find` sees every listed name and every registered active ingredient in a text, in Devanagari, in
Hinglish and in English, with the usual slips of spelling; `PesticideList.verdict` says whether one of them may be
advised for a crop. A name is compared in a folded form: what farmers write in several ways (long and short vowels,
nukta, न् and the anusvara, "ph" and "f") is written in one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from advisory.texts import Source
from advisory.yamlfile import Fault, Model, YamlFile, refuse

PESTICIDES_FILE = "_pesticides.yaml"

Status = Literal["banned", "export_only", "withdrawn", "refused", "restricted", "held_back"]
"""As the list has it; `held_back` is not on the list, this project does not advise it all the same."""
Kind = Literal[
    "insecticide", "fungicide", "herbicide", "acaricide", "nematicide", "biological", "fertiliser", "growth_regulator",
    "rodenticide", "bactericide",
]  # fmt: skip

SHORT_NAME = 4
"""Names up to this many letters (DDT, BHC) must stand exactly: folded, BHC would be the BHK of flats."""
FUZZY_NAME = 7
"""Names from this many letters on are found with one letter wrong, missing or too many."""
MAX_WORDS = 5
"""A name may be written in at most so many pieces ("डी. डी. टी.", "नीम का तेल", "mono croto phos")."""
MIN_PIECE = 4
CACHE_WORDS = 200_000


class _Named(Model):
    id: str = Field(pattern=r"^[a-z0-9_]+$")
    en: tuple[str, ...] = Field(min_length=1)
    hi: tuple[str, ...] = Field(min_length=1)
    brands: tuple[str, ...] = ()
    brands_hi: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names and brands, in both scripts."""
        return (*self.en, *self.hi, *self.brands, *self.brands_hi)


class Pesticide(_Named):
    """A pesticide on the list of the banned, withdrawn, refused and restricted ones."""

    status: Status
    sections: tuple[Literal["I.A", "I.B", "I.C", "II", "III"], ...] = ()
    """Where it stands on the official list; empty for `held_back`."""
    order: str | None = None
    """The order it rests on, where the list names one."""
    not_on: tuple[str, ...] = ()
    """Crops and groups of crops on which it is forbidden."""
    only_on: tuple[str, ...] = ()
    """Where given, the only crops on which it is allowed."""
    only_as: str | None = None
    """Where given, the only formulation that is allowed."""
    not_as: tuple[str, ...] = ()
    """Formulations that are forbidden."""
    no_field_use: bool = False
    """No use on a farmer's field that advice could name."""
    note: str | None = None

    @model_validator(mode="after")
    def _restrictions_fit(self) -> Pesticide:
        limited = bool(self.not_on or self.only_on or self.only_as or self.not_as or self.no_field_use)
        if limited != (self.status in ("restricted", "held_back")):
            raise ValueError("not_on, only_on, only_as, not_as or no_field_use go with status restricted")
        if (self.status == "held_back") == bool(self.sections):
            raise ValueError("sections are those of the official list, and held_back is not on it")
        if not self.sources:
            raise ValueError("sources are missing")
        return self


class Active(_Named):
    """A registered active ingredient, biological agent or fertiliser that advice may name."""

    kind: Kind

    @model_validator(mode="after")
    def _registered(self) -> Active:
        # A fertiliser or a useful organism need not be registered; a chemical is, and a page must say so.
        if not self.sources and self.kind not in ("fertiliser", "biological"):
            raise ValueError("sources are missing")
        return self


class _File(Model):
    list_date: date
    crops: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]]
    other_crops: tuple[str, ...]
    ordinary: tuple[str, ...]
    pesticides: tuple[Pesticide, ...]
    held_back: tuple[Pesticide, ...]
    actives: tuple[Active, ...]
    sources: Mapping[str, Source]


@dataclass(frozen=True)
class Mention:
    """A name found in a text."""

    entry: Pesticide | Active
    start: int
    end: int
    matched: str
    """The text as it stands there."""

    @property
    def is_active(self) -> bool:
        """Whether advice may name it anywhere: it is neither on the list nor held back."""
        return isinstance(self.entry, Active)


@dataclass(frozen=True)
class Verdict:
    """Whether a pesticide may be advised, and why not."""

    state: Literal["ok", "forbidden", "unknown"]
    reason: str
    """One line, empty when `ok` without a condition."""
    list_date: date

    @property
    def forbidden(self) -> bool:
        """Whether advice must not name it."""
        return self.state == "forbidden"

    @property
    def unknown(self) -> bool:
        """Whether the file does not know it."""
        return self.state == "unknown"


class PesticideList:
    """The list, its index of folded names, and the two questions asked of it."""

    def __init__(self, content: _File) -> None:
        self.list_date = content.list_date
        self.entries = content.pesticides
        """The official list, in file order."""
        self.held_back = content.held_back
        """Not on the list; this project does not advise them all the same."""
        self.actives = content.actives
        self.groups = content.groups
        self.sources = content.sources
        entries: tuple[Pesticide | Active, ...] = (*content.pesticides, *content.held_back, *content.actives)
        self.by_id: Mapping[str, Pesticide | Active] = {entry.id: entry for entry in entries}
        self._exact: dict[str, Pesticide | Active] = {}
        self._pieces: set[str] = set()
        for entry in self.by_id.values():
            for name in entry.names:
                self._exact[_key(name)] = entry
                self._pieces.update(_beginnings(name))
        self._ordinary = frozenset(map(_key, content.ordinary))
        self._near: dict[str, set[str]] = {}
        for entry in self.by_id.values():
            for key in map(_key, (*entry.en, *entry.hi)):  # brand names are made up: one slip away lie too many words
                if len(key) >= FUZZY_NAME and not key[0].isdigit():
                    for shorter in (key, *_deletes(key)):
                        self._near.setdefault(shorter, set()).add(key)
        self._longest_key = max(map(len, self._exact))
        # Words recur: each is judged once. Most are dull, neither a name nor the first piece of one.
        self._dull: set[str] = set()
        self._told: dict[str, tuple[Pesticide | Active | None, bool]] = {}

    @classmethod
    def load(cls, directory: Path) -> PesticideList:
        """Read `_pesticides.yaml` of a knowledge folder.

        Raises:
            UserError: no such file, or one that breaks the schema; the line names file, line and fault.
        """
        return cls(_read(directory / PESTICIDES_FILE))

    def find(self, text: str) -> tuple[Mention, ...]:
        """Every listed or registered name in `text`, in order, the longest where several begin at one word."""
        words = _WORD.findall(text)
        if self._dull.issuperset(words) or not self._any_told(words):
            return ()
        spans = [match.span() for match in _WORD.finditer(text)]
        mentions: list[Mention] = []
        index = 0
        while index < len(spans):
            told = self._told.get(words[index])
            used = 1
            if told is not None:
                entry, may_begin = told
                if may_begin:
                    entry, used = self._longest(text, spans[index : index + MAX_WORDS], entry)
                if entry is not None:
                    start, end = spans[index][0], spans[index + used - 1][1]
                    mentions.append(Mention(entry, start, end, text[start:end]))
            index += used
        return tuple(mentions)

    def _any_told(self, words: list[str]) -> bool:
        """Sort new words into dull ones and those that are a name or begin one; whether any of the latter is there."""
        if len(self._dull) > CACHE_WORDS:
            self._dull.clear()
            self._told.clear()
        found = False
        for word in words:
            if word in self._dull:
                continue
            if word not in self._told:
                entry, may_begin = self._lookup(word), _fold(word, whole=False) in self._pieces
                if entry is None and not may_begin:
                    self._dull.add(word)
                    continue
                self._told[word] = (entry, may_begin)
            found = True
        return found

    def ids(self, text: str) -> frozenset[str]:
        """The ids of all that is named in `text`."""
        return frozenset(mention.entry.id for mention in self.find(text))

    def verdict(self, name: str, crop_id: str | None = None, formulation: str | None = None) -> Verdict:
        """Whether a pesticide may be advised.

        Args:
            name: an id, or a name as it would stand in a text; of a mixture the first forbidden part decides.
            crop_id: the crop it is meant for; without one, restrictions to crops are only told in the reason.
            formulation: such as "3% CG"; where the list allows only one, none given counts as another.
        """
        entries = [self.by_id[name]] if name in self.by_id else [mention.entry for mention in self.find(name)]
        if not entries:
            return Verdict("unknown", f"{name!r} is neither listed nor among the known actives", self.list_date)
        reason = ""
        for entry in entries:
            if isinstance(entry, Pesticide):
                state, reason = self._judge(entry, crop_id, formulation)
                if state == "forbidden":
                    whose = "not advised here" if entry.status == "held_back" else f"official list of {self.list_date}"
                    return Verdict("forbidden", f"{reason} ({whose})", self.list_date)
        return Verdict("ok", reason, self.list_date)

    def _judge(
        self, entry: Pesticide, crop_id: str | None, formulation: str | None
    ) -> tuple[Literal["ok", "forbidden"], str]:
        name = entry.en[0]
        by_order = f", {entry.order}" if entry.order else ""
        if entry.status not in ("restricted", "held_back"):
            return "forbidden", f"{name} is {_STATUS_WORDS[entry.status]}{by_order}"
        if entry.no_field_use:
            return "forbidden", f"{name} is not for field advice: {entry.note}{by_order}"
        if entry.only_as is not None and (formulation is None or not _same_formulation(formulation, entry.only_as)):
            given = "no formulation is given" if formulation is None else f"{formulation!r} is given"
            return "forbidden", f"{name} is allowed only as {entry.only_as}, {given}{by_order}"
        if formulation is not None and any(_same_formulation(formulation, other) for other in entry.not_as):
            return "forbidden", f"{name} {formulation} is not for field advice{by_order}"
        crops = self._crops(entry.not_on)
        if crop_id is not None and crop_id in crops:
            return "forbidden", f"{name} must not be used on {crop_id}{by_order}"
        if crop_id is not None and entry.only_on and crop_id not in self._crops(entry.only_on):
            return "forbidden", f"{name} may be used only on {', '.join(entry.only_on)}, not on {crop_id}{by_order}"
        if crop_id is None and (entry.not_on or entry.only_on):
            where = f"not on {', '.join(entry.not_on)}" if entry.not_on else f"only on {', '.join(entry.only_on)}"
            return "ok", f"{name}: {where}"
        return "ok", ""

    def _crops(self, names: Iterable[str]) -> frozenset[str]:
        return frozenset(crop for name in names for crop in self.groups.get(name, (name,)))

    def _lookup(self, word: str) -> Pesticide | Active | None:
        """What one word names: as it stands, without a postposition stuck to it, or with one slip."""
        entry = self._exact.get(_key(word))
        if entry is None and len(word) > FUZZY_NAME:
            for stuck in _POSTPOSITIONS:
                if word.endswith(stuck) and (entry := self._exact.get(_key(word.removesuffix(stuck)))):
                    break
        return entry if entry is not None else self._nearly(_key(word))

    def _nearly(self, key: str) -> Pesticide | Active | None:
        """The one entry whose name is a single slip away; none where two entries are."""
        if not FUZZY_NAME - 1 <= len(key) <= self._longest_key + 1 or key in self._ordinary:
            return None
        near: set[str] = set()
        for shorter in (key, *_deletes(key)):
            near |= self._near.get(shorter, set())
        entries = {self._exact[name].id for name in near if name[0] == key[0] and _one_slip(key, name)}
        return self.by_id[entries.pop()] if len(entries) == 1 else None

    def _longest(
        self, text: str, spans: list[tuple[int, int]], entry: Pesticide | Active | None
    ) -> tuple[Pesticide | Active | None, int]:
        """The longest name that begins with the first word, and its number of words; else what the word alone is."""
        used, written = 1, text[spans[0][0] : spans[0][1]]
        for count in range(1, len(spans)):
            if not _GAP.fullmatch(text, spans[count - 1][1], spans[count][0]):
                break
            written += text[spans[count][0] : spans[count][1]]
            if (joined := self._exact.get(_key(written))) is not None:
                entry, used = joined, count + 1
            if _fold(written, whole=False) not in self._pieces:
                break
        return entry, used


_STATUS_WORDS: Mapping[str, str] = {
    "banned": "banned in India",
    "export_only": "banned for use in India and made for export only",
    "withdrawn": "withdrawn in India",
    "refused": "refused registration in India",
}

_WORD = re.compile(
    r"[\u0900-\u0963\u0971-\u097f\u200b-\u200d]+"
    r"|[^\W\d_\u0900-\u097f][^\W\d_\u0900-\u097f\u200b-\u200d\u0300-\u036f]*(?:[\u200b-\u200d\u0300-\u036f]+[^\W\d_\u0900-\u097f]*)*"
    r"|\d+"
)
"""A run of Devanagari, of other letters, or of digits; what is joined to a word without being seen belongs to it."""
_GAP = re.compile(r"[\s.,'’/()\u2010-\u2015\u00ad-]{0,3}")
_POSTPOSITIONS = ("का", "की", "के", "को", "से", "में", "ने", "पर", "भी", "ों")

_FOLD_SIGNS = str.maketrans(
    {
        **dict.fromkeys("\u093c\u0903\u093d\u200b\u200c\u200d\u00ad\ufeff", None),
        "ी": "ि", "ई": "इ", "ू": "ु", "ऊ": "उ", "ै": "े", "ॅ": "े", "ॆ": "े", "ऐ": "ए", "ऍ": "ए", "ऎ": "ए",
        "ॉ": "ा", "ो": "ा", "ौ": "ा", "ॊ": "ा", "ऑ": "आ", "ओ": "आ", "औ": "आ", "ऒ": "आ",
        "ँ": "ं", "श": "स", "ष": "स", "झ": "ज", "ण": "न", "ञ": "न", "ङ": "न", "ळ": "ल",
        **{chr(0x966 + digit): str(digit) for digit in range(10)},
    }
)  # fmt: skip
_ACCENTS = re.compile(r"[\u0300-\u036f]")
_NASAL = re.compile(r"[नम]\u094d(?=[क-ह])")
_GLIDE = re.compile(r"ाय(?![ा-ौं])")
_DOUBLED = re.compile(r"(.)\1+")
_LATIN_FOLDS = tuple(
    (re.compile(pattern), letters)
    for pattern, letters in (
        ("ph", "f"), ("ck|ch|c|q", "k"), ("x", "ks"), ("th", "t"), ("z", "j"), ("w", "v"), ("y", "i"), ("ee", "i"),
        ("oo|ou", "u"), ("ae|oe", "e"),
    )
)  # fmt: skip


def _fold(word: str, *, whole: bool = True) -> str:
    """The one form in which spellings are compared; `whole` also drops a silent e at the end."""
    word = _ACCENTS.sub("", unicodedata.normalize("NFKD", word).casefold()).translate(_FOLD_SIGNS)
    if word.isascii():
        for pattern, letters in _LATIN_FOLDS:
            word = pattern.sub(letters, word)
        if whole and len(word) > SHORT_NAME and word.endswith("e"):
            word = word[:-1]
    else:
        word = _GLIDE.sub("ाइ", _NASAL.sub("ं", word).replace("\u094d", "")).replace("िआ", "िया")
    return word if word[:1].isdigit() else _DOUBLED.sub(r"\1", word)


def _key(name: str) -> str:
    """The folded form of a name without what stands between its words; short names stay as they are."""
    joined = "".join(_WORD.findall(name))
    return joined.casefold() if joined.isascii() and len(joined) <= SHORT_NAME else _fold(joined)


def _beginnings(name: str) -> Iterator[str]:
    """The folded first pieces into which a name may be broken: its own first words, and `MIN_PIECE` letters or more."""
    words = _WORD.findall(name)
    for count in range(1, len(words)):
        yield _fold("".join(words[:count]), whole=False)
    folded = _key(name)
    if len(folded) >= FUZZY_NAME:
        yield from (folded[:length] for length in range(MIN_PIECE, len(folded)))


def _deletes(key: str) -> Iterator[str]:
    return (key[:index] + key[index + 1 :] for index in range(len(key)))


def _one_slip(left: str, right: str) -> bool:
    """Whether one letter changed, missing or added makes one of the other."""
    short, long = sorted((left, right), key=len)
    if len(long) - len(short) > 1:
        return False
    same = next((index for index, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    return short[same:] == long[same + 1 :] or short[same + 1 :] == long[same + 1 :]


def _same_formulation(left: str, right: str) -> bool:
    return re.sub(r"[\s%.]", "", left).casefold() == re.sub(r"[\s%.]", "", right).casefold()


def _read(path: Path) -> _File:
    file = YamlFile(path)
    content, faults = file.read(_File)
    refuse(faults if content is None else [*faults, *_faults(file, content)])
    assert content is not None
    return content


def _faults(file: YamlFile, content: _File) -> Iterator[Fault]:
    """What one entry cannot see: each id and name once, and only crops, groups and sources that exist."""
    crops = {*content.crops, *content.other_crops, *content.groups}
    for group, members in content.groups.items():
        if unknown := sorted(set(members) - set(content.crops)):
            yield file.fault(("groups", group), f"{', '.join(unknown)} is not among the crops of the file")
    owners: dict[str, str] = {}
    ids: set[str] = set()
    sections: Mapping[str, tuple[Pesticide | Active, ...]] = {
        "pesticides": content.pesticides,
        "held_back": content.held_back,
        "actives": content.actives,
    }
    for section, entries in sections.items():
        for number, entry in enumerate(entries):
            loc = (section, number)
            if entry.id in ids:
                yield file.fault(loc, "the id stands twice")
            ids.add(entry.id)
            if unknown := sorted(set(entry.sources) - content.sources.keys()):
                yield file.fault(loc, f"source {', '.join(unknown)} is not in the file's sources")
            if isinstance(entry, Pesticide):
                if unknown := sorted({*entry.not_on, *entry.only_on} - crops):
                    yield file.fault(loc, f"{', '.join(unknown)} is neither a crop nor a group of the file")
                if (entry.status == "held_back") != (section == "held_back"):
                    yield file.fault(loc, f"status {entry.status} does not belong under {section}")
            for name in entry.names:
                if not (key := _key(name)):
                    yield file.fault(loc, f"the name {name!r} has no letters")
                elif owners.setdefault(key, entry.id) != entry.id:
                    yield file.fault(loc, f"the name {name!r} stands for {owners[key]} too")
