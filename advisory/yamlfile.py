"""A YAML file read into a typed model, each fault with the line it stands on.

PyYAML keeps the place of every node and pydantic names the path of every fault; together they say `wheat.yaml:57`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from advisory.readfile import read_text
from litgpt.utils import UserError

M = TypeVar("M", bound=BaseModel)
Loc = tuple[int | str, ...]
"""A path into a file, as pydantic gives it: ("problems", 3, "days")."""

# The C loader reads the folder in a tenth of the time; PyYAML may be built without it.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Model(BaseModel):
    """What all models of the facts share: nothing unknown in them, and nothing changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Fault:
    """What is wrong, and where."""

    path: Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


class YamlFile:
    """A parsed file: its value, and the line of each part of it.

    Raises:
        UserError: not there, a folder, not UTF-8, or not YAML.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            loader = _LOADER(read_text(path))
            self._node = loader.get_single_node()
            self.value: Any = None if self._node is None else loader.construct_document(self._node)
            self._repeated = list(_repeated(self._node))
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = f"{path}:{mark.line + 1}" if mark else str(path)
            raise UserError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            # What PyYAML's own constructors let out: a day like 2026-02-31, `!!bool maybe`, nesting without end.
            raise UserError(f"{path}: not valid YAML: {error}") from None

    def line(self, loc: Loc) -> int:
        """The line on which a part begins; that of the nearest part around it where the part is missing."""
        node, line = self._node, 1
        for step in loc:
            if isinstance(node, yaml.MappingNode):
                pair = next((pair for pair in node.value if pair[0].value == str(step)), None)
                if pair is None:
                    break
                line, node = pair[0].start_mark.line + 1, pair[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                line = node.start_mark.line + 1
            else:
                break
        return line

    def fault(self, loc: Loc, what: str) -> Fault:
        """A fault at a part; the path is said in words, with ids in the place of numbers."""
        where = ": ".join(self._names(loc))
        return Fault(self.path, self.line(loc), f"{where}: {what}" if where else what)

    def read(self, model: type[M]) -> tuple[M | None, list[Fault]]:
        """The file as a model, or `None` and every fault found."""
        repeated = [self.fault(loc, "the key stands twice") for loc in self._repeated]
        try:
            return model.model_validate(self.value), repeated
        except ValidationError as error:
            return None, repeated + [self.fault(one["loc"], _message(one)) for one in error.errors(include_url=False)]

    def _names(self, loc: Loc) -> Iterator[str]:
        value = self.value
        for step in loc:
            if isinstance(value, dict):
                # pydantic adds steps of its own for the branches of a union; only those of the file are said.
                yield str(step)
                value = value.get(step)
            elif isinstance(value, list) and isinstance(step, int):
                value = value[step] if step < len(value) else None
                yield str(value["id"]) if isinstance(value, dict) and "id" in value else str(step + 1)
            else:
                return


def read_or_refuse(path: Path, model: type[M]) -> M:
    """The file as a model.

    Raises:
        UserError: the first fault, with its line, and how many more there are.
    """
    value, faults = YamlFile(path).read(model)
    refuse(faults)
    assert value is not None
    return value


def refuse(faults: Sequence[Fault]) -> None:
    """Raise the first of some faults, if there is one.

    Raises:
        UserError: with its line, and how many more there are.
    """
    if faults:
        more = f" (and {len(faults) - 1} more: python scripts/check_knowledge.py)" if len(faults) > 1 else ""
        raise UserError(f"{faults[0]}{more}")


def _message(error: Any) -> str:
    kind, found = error["type"], error.get("input")
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return "unknown key"
    message = str(error["msg"]).removeprefix("Value error, ")
    text = repr(found)
    return message if kind == "value_error" or len(text) > 120 else f"{message}, found {text}"


def _repeated(node: Any, loc: Loc = ()) -> Iterator[Loc]:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield (*loc, key.value)
            seen.add(key.value)
            yield from _repeated(value, (*loc, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _repeated(value, (*loc, number))
