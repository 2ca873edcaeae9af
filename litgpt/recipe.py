"""All settings of `train_distill.py`, and what follows from them alone.

The same names are flags (`--optim.lr`), the keys of `configs/distill.yaml` and the fields here; the docstring under a
field is its help.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from litgpt.data import Packing
from litgpt.divergence import Divergence, KdKind
from litgpt.losses import falling_weight
from litgpt.mixture import SourceSettings
from litgpt.rendered import RenderSettings
from litgpt.streaming import CARD as STREAM_CARD
from litgpt.teacher import View
from litgpt.teachercache import CACHE_FILE
from litgpt.tensorfile import LIT_FILE
from litgpt.utils import UserError, sha256_file

SpanName = Literal["prompt", "thought", "answer"]
# Settings that change neither the weights nor the order of the data: a resumed run may have others.
FREE_SETTINGS = {
    *(
        "out_dir",
        "resume",
        "overwrite",
        "data.render.processes",
        "data.render.cache",
        "run.log_every",
        "run.val_every",
        "run.save_every",
        "run.keep_checkpoints",
    ),
    *("run.time_limit", "run.on_nonfinite", "run.max_skips", "run.spike_factor", "run.samples", "run.wandb"),
    "optim.epochs",  # what counts is the number of steps that follows from it
}
# Where it runs: the result is the same but for rounding.
PLACEMENT = {"run.strategy", "run.shard_size", "run.offload"}


Anchor = Literal["cka", "root_cka", "mse"]
AnchorTo = Literal["base", "teacher"]


@dataclass
class LossSettings:
    """What the student is taught, and how much each part weighs."""

    task_weight: float = 0.5
    """Weight of the cross-entropy on thought and answer."""
    thought_weight: float = 0.5
    """Weight of a thought token within the cross-entropy; an answer token has 1."""
    kd_weight: float = 0.5
    """Weight of the teacher's distribution on the answer; 0 leaves the teacher unloaded."""
    kd_kind: KdKind = "forward"
    """How student q is compared with teacher p: forward KL(p || q), reverse KL(q || p), jsd (generalised
    Jensen-Shannon) or skew KL(p || alpha p + (1 - alpha) q). A cache of sampled or topk ids knows forward alone."""
    kd_beta: float = 0.5
    """Of jsd: 0 is forward, 1 is reverse."""
    kd_alpha: float = 0.1
    """Of skew: how much of the teacher is mixed into the student."""
    temperature: float = 1.0
    """Temperature of both distributions in KD; the term is multiplied by its square."""
    teacher_view: View = "strip"
    """What the teacher reads: strip (no thought, its own empty think block), native (the thought in its own tags) or
    mask (the student's ids)."""
    anchor: Anchor = "cka"
    """What holds the student's hidden states to the base's, weighted by cka_weight: cka (1 - CKA), root_cka (1 - sqrt
    of CKA, steeper where they are far apart) or mse (squared distance over squared length, for comparison: it also
    forbids rotations and other scales)."""
    anchor_to: AnchorTo = "base"
    """Whose hidden states those are: base, or teacher (its layers as far along; it reads the student's ids and must
    run, not come from a cache)."""
    cka_weight: float = 1.0
    """Weight of the anchor, by default 1 - CKA between student and dense base, at the first step."""
    cka_weight_end: float | None = None
    """The same from cka_fraction of training on; as at the first step, if not given. One that falls to 0 keeps nothing
    (docs/cka.md)."""
    cka_fraction: float = 0.5
    """Share of training over which the CKA weight moves, linearly."""
    cka_every: int = 4
    """CKA looks at every n-th layer and at the last."""
    cka_layers: list[int] | None = None
    """Or at these layers."""
    cka_rows: int | None = None
    """At most so many tokens of a micro-batch are rows of CKA, drawn by its ids; all, if not given."""
    cka_spans: list[SpanName] = field(default_factory=lambda: ["prompt", "thought", "answer"])
    """Spans whose tokens are rows of CKA; padding and the first token of a dialogue never are."""
    on_policy: float = 0.0
    """Share of the micro-batches in which the student answers itself and the teacher scores that; see
    litgpt/onpolicy.py. The reply takes the place of the dialogue's last one and is at most as long."""
    on_policy_temperature: float = 1.0
    """Temperature of these draws."""
    router_weight: float = 0.01
    """Weight of the router's balance loss (1 when all experts get equal shares) at the first step."""
    router_weight_end: float | None = None
    """The same from router_fraction of training on; as at the first step, if not given."""
    router_fraction: float = 1.0
    """Share of training over which the weight moves, linearly."""
    z_weight: float = 0.0
    """Weight of the mean squared logsumexp of the router's logits; 0.001 is usual."""
    bias_rate: float = 0.0
    """Step of a bias that balances the choice of experts without a loss; 0 is none, 0.001 to 0.01 are usual. No export
    holds it, so it is let go before the end."""
    bias_fraction: float = 0.8
    """Share of training after which that bias falls to 0, linearly."""
    chunk_rows: int = 256
    """Tokens whose logits exist at one time; memory only."""

    def __post_init__(self) -> None:
        weights = ("task_weight", "thought_weight", "kd_weight", "cka_weight", "router_weight")
        for name in (*weights, "z_weight", "bias_rate"):
            if getattr(self, name) < 0:
                raise UserError(f"loss.{name} is {getattr(self, name)}: expected 0 or more")
        if self.temperature <= 0 or self.cka_every < 1 or self.chunk_rows < 1 or not 0 <= self.cka_fraction <= 1:
            raise UserError(
                "loss: expected temperature > 0, cka_every and chunk_rows of at least 1, and cka_fraction in 0 ... 1"
            )
        if (self.cka_weight_end or 0) < 0:
            raise UserError(f"loss.cka_weight_end is {self.cka_weight_end}: expected 0 or more")
        if (self.router_weight_end or 0) < 0 or not 0 <= self.router_fraction <= 1 or not 0 <= self.bias_fraction < 1:
            raise UserError(
                "loss: expected router_weight_end of 0 or more, router_fraction in 0 ... 1 and bias_fraction from 0 "
                "to below 1"
            )
        if not 0 <= self.on_policy <= 1 or not 0.01 <= self.on_policy_temperature <= 100:
            raise UserError("loss: expected on_policy in 0 ... 1 and on_policy_temperature in 0.01 ... 100")
        if self.on_policy > 0 and self.kd_weight == 0:
            raise UserError("loss.on_policy: there is no teacher to score the student's replies with kd_weight 0")
        if self.anchor == "mse" and self.anchor_to == "teacher":
            raise UserError(
                "loss.anchor mse compares equally wide states: with anchor_to teacher choose cka or root_cka"
            )
        if self.cka_rows is not None and self.cka_rows < 4:
            raise UserError(f"loss.cka_rows is {self.cka_rows}: CKA needs at least 4")
        if self.cka_layers is not None and (not self.cka_layers or min(self.cka_layers) < 0):
            raise UserError(f"loss.cka_layers is {self.cka_layers}: expected layer numbers from 0")
        self.divergence()

    def router_weight_at(self, step: int, steps: int) -> float:
        """Weight of the balance loss at an optimizer step, from 0."""
        end = self.router_weight if self.router_weight_end is None else self.router_weight_end
        return falling_weight(step, steps, start=self.router_weight, end=end, fraction=self.router_fraction)

    @property
    def cka_end(self) -> float:
        """Weight of the anchor from cka_fraction of training on."""
        return self.cka_weight if self.cka_weight_end is None else self.cka_weight_end

    def cka_weight_at(self, step: int, steps: int) -> float:
        """Weight of the anchor at an optimizer step, from 0."""
        return falling_weight(step, steps, start=self.cka_weight, end=self.cka_end, fraction=self.cka_fraction)

    def divergence(self) -> Divergence:
        """How student and teacher are compared."""
        return Divergence(self.kd_kind, self.temperature, self.kd_beta, self.kd_alpha)


@dataclass
class DataSettings:
    """Dialogues and how they are cut into micro-batches."""

    train: Path | None = None
    """Dialogues to learn from, JSON lines; data/dialogues/train.jsonl unless sources or stream take its place."""
    sources: dict[str, SourceSettings] | None = None
    """Several files by name, each with a path, a weight (its share of the tokens) and, if it wants one, a teacher of
    its own: the dense base on general text is replay. They may hold plain texts, too."""
    epoch_of: str | None = None
    """The source whose pass is an epoch; the first, unless given."""
    stream: Path | None = None
    """A corpus beyond memory, made by scripts/prepare_stream.py (the extra streaming)."""
    val: Path = Path("data/dialogues/val.jsonl")
    """Dialogues to validate on."""
    more_val: dict[str, Path] = field(default_factory=dict)
    """Further validation files by name, dialogues or plain texts; each gets its own curves."""
    max_seq_length: int = 2048
    """Tokens in a row; several dialogues share one. Longer dialogues are left out and counted."""
    micro_batch_size: int = 8
    """Rows that a device works on at one time."""
    packing: Packing = "pack"
    """pack lays several dialogues into a row; bucket gives each a row of its own, beside others of like length."""
    render: RenderSettings = field(default_factory=RenderSettings)
    """How the files are tokenised; changes no result."""

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1 or self.max_seq_length < 2:
            raise UserError("data: expected micro_batch_size of at least 1 and max_seq_length of at least 2")
        given = [name for name in ("train", "sources", "stream") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(
                f"data: {' and '.join(given)} are given, and each is all there is to learn from: choose one"
            )
        if self.epoch_of is not None and self.sources is None:
            raise UserError("data.epoch_of names a source, and there is no data.sources")
        if not given:
            self.train = Path("data/dialogues/train.jsonl")

    def training_files(self) -> dict[str, Path]:
        """What is learnt from: setting → file."""
        if self.stream is not None:
            return {"data.stream": self.stream / STREAM_CARD}
        if self.sources is not None:
            return {f"data.sources.{name}": source.path for name, source in self.sources.items()}
        assert self.train is not None
        return {"data.train": self.train}

    def validation_files(self) -> dict[str, Path]:
        """What is validated on: setting → file, `val` first."""
        return {"data.val": self.val, **{f"data.more_val.{name}": path for name, path in self.more_val.items()}}

    def own_teachers(self) -> dict[Path, list[int]]:
        """Teachers of single sources → the numbers of these sources."""
        found: dict[Path, list[int]] = {}
        for number, source in enumerate((self.sources or {}).values()):
            if source.teacher is not None:
                found.setdefault(source.teacher, []).append(number)
        return found

    def token_share(self, teacher: Path) -> float:
        """Share of the tokens that a teacher of single sources reads, as the weights say."""
        sources = (self.sources or {}).values()
        return sum(source.weight for source in sources if source.teacher == teacher) / sum(s.weight for s in sources)


@dataclass
class OptimSettings:
    """AdamW, its schedule, and the size of a step."""

    epochs: float = 3.0
    """Passes over the training dialogues; not used when steps is given."""
    steps: int | None = None
    """Optimizer steps in all."""
    accumulation: int = 4
    """Micro-batches on each device in one optimizer step."""
    lr: float = 1e-4
    """Learning rate after the warm-up."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    warmup: float = 0.05
    """Share of training in which the learning rate rises from 0, linearly."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two averages."""
    weight_decay: float = 0.1
    """Weight decay of routers and experts; the thought tokens' rows have none."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    trainable: list[str] | None = None
    """Parts that learn, of experts, router, shared_expert, mlp (of layers without experts), attention, norms and
    thought_tokens; by default those that the student's provenance.yaml names."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps AdamW's two averages in 8 bits, blockwise: a quarter of their memory (the extra optim8bit)."""

    def __post_init__(self) -> None:
        if self.accumulation < 1 or (self.steps is not None and self.steps < 1) or self.epochs <= 0:
            raise UserError("optim: accumulation, steps and epochs must be positive")
        if not all(0 <= beta < 1 for beta in self.betas) or self.weight_decay < 0:
            raise UserError("optim: expected betas in 0 ... 1, below 1, and weight_decay of 0 or more")
        if not 0 <= self.min_lr <= self.lr or not 0 <= self.warmup <= 1 or self.clip <= 0:
            raise UserError("optim: expected 0 <= min_lr <= lr, warmup in 0 ... 1 and clip > 0")


@dataclass
class RunSettings:
    """Where it runs and how often it reports."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    devices: int = 1
    """Processes on this machine; under torchrun or fabric run as many as it started."""
    num_nodes: int = 1
    """Machines; under torchrun or fabric run as many as it started."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: each process holds everything. fsdp: each holds a part of student, base and teacher and gathers one block
    at a time. auto: ddp where there are several processes."""
    shard_size: int | None = None
    """With fsdp: processes over which one copy is spread, e.g. those of one machine (HSDP); by default all."""
    offload: bool = False
    """With fsdp on a GPU: weights, gradients and optimizer state live in the CPU's memory; the optimizer runs there."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """auto: bf16-mixed on a GPU, 32-true on a CPU. What trains is stored in fp32 either way."""
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """How frozen weights of student and base are kept; bfloat16 needs bf16-mixed and checkpoints stored so, and changes
    no result."""
    compile: bool = False
    """Compile the blocks of student, base and teacher with torch.compile: minutes at the start, faster steps."""
    activation_checkpointing: bool = False
    """Recompute each block in backward: less memory, about a third more student time."""
    log_every: int = 10
    """Optimizer steps between two lines of metrics.csv."""
    val_every: int = 100
    """Optimizer steps between two validations; there is one at the start and one at the end in any case."""
    save_every: int = 200
    """Optimizer steps between two checkpoints."""
    keep_checkpoints: int = 2
    """So many of the newest checkpoints stay."""
    time_limit: str | int | None = None
    """"HH:MM:SS" or seconds after which the run saves and ends with exit code 143; the same command goes on. Leave the
    save its time. The same happens at SIGTERM."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite stops the run, or the step is left out. Its records go to events.jsonl."""
    max_skips: int = 5
    """So many steps in a row may be left out before the run stops."""
    spike_factor: float = 10.0
    """A loss so many median absolute deviations above the recent median goes to events.jsonl; nothing else happens."""
    samples: int = 2
    """Validation dialogues that the student answers at each validation, greedily, into samples.jsonl."""
    wandb: bool = False
    """Report to Weights & Biases, too (the extra logging)."""

    def __post_init__(self) -> None:
        positive = ("devices", "num_nodes", "log_every", "val_every", "save_every", "keep_checkpoints")
        if min(getattr(self, name) for name in positive) < 1 or (self.shard_size or 1) < 1:
            raise UserError(f"run: {', '.join(positive)} and shard_size must be at least 1")
        if self.max_skips < 0 or self.samples < 0 or self.spike_factor <= 0:
            raise UserError("run: expected max_skips and samples of 0 or more and spike_factor > 0")
        if self.strategy != "fsdp" and (self.offload or self.shard_size is not None):
            raise UserError("run: offload and shard_size go with run.strategy fsdp")
        if self.frozen_dtype == "bfloat16" and self.precision == "32-true":
            raise UserError("run.frozen_dtype bfloat16 goes with run.precision bf16-mixed")
        seconds_of(self.time_limit)
        if self.accelerator == "cuda" and not torch.cuda.is_available():
            raise UserError("run.accelerator is cuda, and torch sees no GPU: use cpu or auto")


def seconds_of(limit: str | int | None) -> float:
    """Seconds of a time limit: a number of them, "HH:MM:SS" or "MM:SS"; infinite without one.

    Raises:
        UserError: neither.
    """
    if limit is None:
        return math.inf
    parts = str(limit).split(":")
    if len(parts) > 3 or not all(part.isdecimal() for part in parts):
        raise UserError(f'run.time_limit is {limit!r}: expected "HH:MM:SS" or a number of seconds')
    return sum(int(part) * 60**power for power, part in enumerate(reversed(parts)))


@dataclass
class Settings:
    """All settings of a run, as `hyperparameters.yaml` and the checkpoints keep them."""

    student: Path
    teacher: Path
    base: Path
    out_dir: Path
    data: DataSettings
    loss: LossSettings
    optim: OptimSettings
    run: RunSettings
    resume: str
    overwrite: bool
    seed: int

    def plain(self) -> dict[str, Any]:
        """Plain values only, nested as in a config file."""
        values: dict[str, Any] = _plain(asdict(self))
        return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def lr_at(step: int, steps: int, optim: OptimSettings) -> float:
    """Learning rate of an optimizer step (from 0): linear warm-up, then a cosine down to `min_lr` at the last."""
    warmup = round(optim.warmup * steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def require_same(settings: Settings, saved: dict[str, Any]) -> None:
    """Raise `UserError` if a setting that the result depends on differs from the checkpoint's.

    The number of processes may differ if a step keeps its size: with half of them, twice the accumulation.
    """
    now, then = dict(_dotted(settings.plain())), dict(_dotted(saved))
    free = FREE_SETTINGS | PLACEMENT
    if micro_batches(settings.plain()) == micro_batches(saved):
        free = free | {"optim.accumulation", "run.devices", "run.num_nodes"}
    differing = [name for name in now if name not in free and now[name] != then.get(name)]
    if differing:
        name = differing[0]
        others = f" (and {len(differing) - 1} more settings)" if len(differing) > 1 else ""
        raise UserError(
            f"{settings.out_dir} was started with {name} {then.get(name)!r}, now it is {now[name]!r}{others}: "
            "go on with the old settings, choose another --out_dir, or start anew with --overwrite true"
        )


def digests(settings: Settings, *, teacher: bool) -> dict[str, str]:
    """SHA-256 of the files that the result depends on, by setting; a teacher of 28 GB takes half a minute.

    Args:
        settings: where they are.
        teacher: whether there is one.
    """
    data = settings.data
    files = data.training_files() | data.validation_files()
    models = {"student": settings.student, "base": settings.base}
    if teacher:
        models |= {"teacher": settings.teacher}
        for name, source in (data.sources or {}).items():
            models |= {f"data.sources.{name}.teacher": source.teacher} if source.teacher else {}
    # A teacher that has run already is known by the list of what it was made of.
    found = [(name, path / file) for name, path in models.items() for file in (LIT_FILE, CACHE_FILE)]
    files |= {name: path for name, path in found if path.is_file()}
    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(sha256_file, files.values()), strict=True))


def require_same_files(out_dir: Path, digests: Mapping[str, str], saved: Mapping[str, str]) -> None:
    """Raise `UserError` if a model or the validation data is not the one the checkpoint was trained with."""
    for name, digest in digests.items():
        if name in saved and saved[name] != digest:
            raise UserError(
                f"{out_dir} was started with other contents of {name} (SHA-256 {saved[name][:12]}..., now "
                f"{digest[:12]}...): put the old ones back, choose another --out_dir, or start anew with --overwrite"
            )


def micro_batches(settings: Mapping[str, Any]) -> int:
    """Micro-batches in one optimizer step on all processes, of plain settings."""
    run = settings["run"]
    return int(settings["optim"]["accumulation"] * run["devices"] * run["num_nodes"])


def moved_loader(state: dict[str, Any], world_size: int) -> dict[str, Any]:
    """A data loader's state for another number of processes: what all of them had read stays read.

    Raises:
        UserError: the new processes would not all stand at the same micro-batch.
    """
    read = state["position"] * state["world_size"]
    if read % world_size:
        raise UserError(
            f"the checkpoint stands after {read} micro-batches of an epoch, which {world_size} processes cannot share: "
            f"go on with {state['world_size']} processes, or another number that divides {read}"
        )
    return state | {"position": read // world_size, "world_size": world_size}
