"""What a run directory says about its run, read from its files alone, whether it is finished, running or was killed."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from litgpt.checkpoint import LIT_FILE, read_provenance
from litgpt.rundir import FINAL, checkpoints
from litgpt.utils import UserError, sha256_file

SETTINGS_FILE = "hyperparameters.yaml"
METRICS_FILE = "metrics.csv"
SAMPLES_FILE = "samples.jsonl"
EVENTS_FILE = "events.jsonl"
DEAD_SHARE = 0.1
"""An expert with less than this part of an equal share 1/E is called dead."""
# Where examine.py is told to write: out/distill/exam, and out/demo/exam/NAME for several advisers.
_EXAMS = ("exam.json", "*/exam.json", "*/*/exam.json")


@dataclass(frozen=True)
class Series:
    """One column of metrics.csv without its empty cells and those that are not finite."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Exam:
    """One exam.json and which of the run's models sat it: base, upcycled, teacher, distilled, or given by the user."""

    who: str
    values: dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """Everything that the files of one run say.

    Attributes:
        directory: the run directory.
        settings: hyperparameters.yaml.
        lines: metrics.csv as step → column → finite value, steps rising.
        metrics: report/metrics.json, `None` before the end of training.
        provenance: final/provenance.yaml, empty where there is none.
        cka: report/cka.json of eval_cka.py, `None` where it has not run.
        samples: the lines of samples.jsonl.
        exams: the exams of this run's models on the same questions, none if the student itself has sat none.
        remarks: what was left out and why, and what happened on the way, a sentence each.
    """

    directory: Path
    settings: dict[str, Any]
    lines: dict[int, dict[str, float]]
    metrics: dict[str, Any] | None
    provenance: dict[str, Any]
    cka: dict[str, Any] | None
    samples: list[dict[str, Any]]
    exams: list[Exam]
    remarks: list[str]

    @property
    def finished(self) -> bool:
        """Training writes `final/` last."""
        return (self.directory / FINAL / LIT_FILE).is_file()

    @cached_property
    def final_sha256(self) -> str | None:
        """Of the trained weights, read once."""
        return sha256_file(self.directory / FINAL / LIT_FILE) if self.finished else None

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.directory.resolve().name

    @property
    def checkpoint(self) -> str | None:
        """The newest checkpoint's name."""
        found = checkpoints(self.directory)
        return found[-1].name if found else None

    def setting(self, dotted: str) -> Any:
        """A setting such as `loss.kd_weight`; `None` where the file has none of that name."""
        value: Any = self.settings
        for key in dotted.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def series(self, column: str) -> Series:
        """The finite cells of a column; empty where there is no such column."""
        cells = [(step, values[column]) for step, values in self.lines.items() if column in values]
        return Series([step for step, _ in cells], [value for _, value in cells])

    @cached_property
    def columns(self) -> list[str]:
        """Columns with at least one finite cell, in the alphabet's order."""
        return sorted({column for values in self.lines.values() for column in values})

    def validations(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """The first and the last validation, in the form of metrics.json; of an unfinished run from metrics.csv.

        metrics.csv lacks the expert load and the token counts. Before a second validation there is no last one.
        """
        if self.metrics is not None:
            return self.metrics.get("before"), self.metrics.get("after")
        found = []
        for step, values in self.lines.items():
            if any(name.startswith("val/") for name in values):
                own = _nested({name[4:]: value for name, value in values.items() if name.startswith("val/")})
                more: dict[str, dict[str, float]] = {}
                for column in values:
                    if column.startswith("val_"):
                        name, _, measure = column[4:].rpartition("/")
                        more.setdefault(name, {})[measure] = values[column]
                found.append({"step": step} | own | ({"more_val": more} if more else {}))
        return (found[0] if found else None), (found[-1] if len(found) > 1 else None)


def read_run(out_dir: Path, *, exam: Path | None = None) -> RunFiles:
    """Read a run directory.

    Args:
        out_dir: as `train_distill.py` writes it; finished or not.
        exam: an exam.json that lies elsewhere, or that names its adviser otherwise.

    Raises:
        UserError: no run there, or one of its files is damaged where no kill can damage it.
    """
    path = out_dir / SETTINGS_FILE
    if not path.is_file():
        what = f"holds no {SETTINGS_FILE}" if out_dir.is_dir() else "is no directory"
        raise UserError(
            f"{out_dir} is no run: it {what}; --out_dir takes what train_distill.py wrote, e.g. out/distill"
        )
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be parsed: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} should hold a mapping, found {type(settings).__name__}")
    lines, broken = read_metrics(out_dir / METRICS_FILE)
    exams, stale = _exams(out_dir, settings, exam)
    remarks = [f"{path} is older than {FINAL}/, so other weights sat it, and it is not shown." for path in stale]
    if broken:
        remarks.append(f"{METRICS_FILE}: {broken} broken line{'s' * (broken > 1)} left out.")
    events = Counter(str(line.get("event", "event")) for line in _read_objects(out_dir / EVENTS_FILE))
    if events:
        counted = ", ".join(f"{count} {event}" for event, count in events.most_common())
        remarks.append(f"{EVENTS_FILE} has the steps and records of: {counted}.")
    return RunFiles(
        directory=out_dir,
        settings=settings,
        lines=lines,
        metrics=_read_json(out_dir / "report" / "metrics.json"),
        provenance=read_provenance(out_dir / FINAL),
        cka=_read_json(out_dir / "report" / "cka.json"),
        samples=_read_objects(out_dir / SAMPLES_FILE),
        exams=exams,
        remarks=remarks,
    )


def read_metrics(path: Path) -> tuple[dict[int, dict[str, float]], int]:
    """metrics.csv as step → column → finite value, steps rising, and the number of lines that cannot be read.

    A step smaller than the one before it is a run that went back to a checkpoint: what stood from that step on is not
    part of the run any more. Two lines of one step (training and validation) become one.
    """
    # A last line without its line break was cut, and a number cut in its middle is still a number.
    text = path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""
    whole, cut = text.split("\n")[:-1], text.split("\n")[-1]
    header = _cells(whole[0]) if whole else []
    lines: dict[int, dict[str, float]] = {}
    broken = int(bool(cut.strip()))
    for line in whole[1:]:
        if not line.strip():
            continue
        row = _parse(header, _cells(line))
        if row is None:
            broken += 1
            continue
        step, values = row
        if lines and step < next(reversed(lines)):
            while lines and next(reversed(lines)) >= step:
                lines.popitem()
        lines.setdefault(step, {}).update(values)
    return lines, broken


def dead_experts(load: Mapping[str, Sequence[float]]) -> dict[str, list[int]]:
    """Layer → experts with less than `DEAD_SHARE` of an equal share; layers without one are left out."""
    dead = {
        layer: [e for e, share in enumerate(share_E) if share * len(share_E) < DEAD_SHARE]
        for layer, share_E in load.items()
    }
    return {layer: experts for layer, experts in dead.items() if experts}


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line.rstrip("\r")]), [])
    except csv.Error:
        return []


def _parse(header: list[str], cells: list[str]) -> tuple[int, dict[str, float]] | None:
    """Step and finite values of one line; `None` for a line that is none of this file's."""
    row = dict(zip(header, cells, strict=False))
    if len(cells) != len(header) or not row.get("step", "").isdecimal():
        return None
    try:
        values = {name: float(cell) for name, cell in row.items() if cell and name != "step"}
    except ValueError:
        return None
    return int(row["step"]), {name: value for name, value in values.items() if math.isfinite(value)}


def _nested(flat: Mapping[str, float]) -> dict[str, Any]:
    """cka_3 → cka[3], as metrics.json has it; the worst expert_max_over_mean of all layers is no layer's own."""
    own = {name: value for name, value in flat.items() if not name.startswith(("cka_", "expert_"))}
    return own | {"cka": {name[4:]: value for name, value in flat.items() if name.startswith("cka_")}}


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be parsed: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} should hold an object, found {type(values).__name__}")
    return values


def _read_objects(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, without a line that a kill has cut."""
    objects = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            value = json.loads(line)
        except ValueError:  # UnicodeDecodeError is one
            continue
        if isinstance(value, dict):
            objects.append(value)
    return objects


def _exams(out_dir: Path, settings: Mapping[str, Any], given: Path | None) -> tuple[list[Exam], list[str]]:
    """The given exam, or the student's, with those of the run's other models on the same questions; and stale ones."""
    roles = {"base": settings.get("base"), "upcycled": settings.get("student"), "teacher": settings.get("teacher")}
    # A run directory that was copied elsewhere still knows by its settings what it was called.
    finals = {(out_dir / FINAL).resolve(), (Path(str(settings.get("out_dir", out_dir))) / FINAL).resolve()}
    weights = out_dir / FINAL / LIT_FILE
    trained = weights.stat().st_mtime if weights.is_file() else math.inf
    found: dict[str, Exam] = {}
    stale = []
    for path in sorted({path for pattern in _EXAMS for path in out_dir.glob(pattern)}):
        values = _read_exam(path)
        adviser = Path(str((values.get("settings") or {}).get("adviser"))).resolve()
        if adviser in finals and path.stat().st_mtime < trained:
            # --overwrite keeps files that are not the run's own: this is the exam of the weights before these.
            stale.append(str(path.relative_to(out_dir)))
        elif adviser in finals:
            found["distilled"] = Exam("distilled", values)
        for name, model in roles.items():
            if model and Path(str(model)).resolve() == adviser:
                found[name] = Exam(name, values)
    if given is not None:
        if not given.is_file():
            raise UserError(f"no file {given}: --exam takes the exam.json that scripts/examine.py wrote")
        found["distilled"], stale = Exam("given", _read_exam(given)), []
    own = found.get("distilled")
    if own is None:
        return [], stale
    same = [found[name] for name in (*roles, "distilled") if name in found]
    return [exam for exam in same if asked_of(exam) == asked_of(own)], stale


def asked_of(exam: Exam) -> tuple[str, int]:
    """The questions' folder, and how many replies were scored."""
    return str(exam.values.get("data")), max(
        (score["count"] for score in exam.values["scores"]["all"].values()), default=0
    )


def _read_exam(path: Path) -> dict[str, Any]:
    values = _read_json(path) or {}
    try:
        scores: Iterable[Any] = values["scores"]["all"].values()
        complete = all({"value", "low", "high", "count"} <= set(score) for score in scores)
    except (KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise UserError(f"{path} is no exam.json of scripts/examine.py")
    return values
