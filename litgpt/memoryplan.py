"""Does a run fit, before it starts: bytes on one device item by item, the largest micro-batch, bytes on the disk.

Parameters are counted on the module that trains (`Distiller`), built on the meta device, so no weight is read and what
learns is what `litgpt.trainable` says. Activations come from `activations.py`. `tests/test_memoryplan.py` compares
both with real steps on the CPU. Not everything lives at one time: a plan has moments, and what counts is the fullest:

    teacher, base            they read the micro-batch, without gradients
    cka, loss                the student has run and all its activations are kept
    first block, last block  backward begins with all activations and ends with all gradients
    update                   the optimizer's step

What is not exact: buffers within a kernel and the allocator's holes (the margin), and on CUDA, where the attention
kernel is another one than on the CPU, nothing has been compared with a measurement yet.

Shape letters as in `model.py`; R rows of a chunk of the loss.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from litgpt.activations import BF16, FP32, around_activations, block_activations, reading_bytes
from litgpt.config import Config
from litgpt.distill import Distiller, cka_layers
from litgpt.model import GPT
from litgpt.recipe import LossSettings, Settings
from litgpt.teacher import BaseTeacher
from litgpt.teachercache import CachedTeacher
from litgpt.trainable import PARTS, Part

Moment = Literal["teacher", "base", "cka", "loss", "first block", "last block", "update"]
MOMENTS: tuple[Moment, ...] = ("teacher", "base", "cka", "loss", "first block", "last block", "update")
TeacherMode = Literal["online", "cached_hidden", "cached"]

_WHEN: dict[Moment, str] = {
    "teacher": "while the teacher reads",
    "base": "while the base reads",
    "cka": "when CKA is computed",
    "loss": "in the loss",
    "first block": "as backward begins",
    "last block": "as backward ends",
    "update": "in the optimizer's update",
}

GIB = 1 << 30
# Bytes of a chunk's logits that `losses.py` scores at one time, on CUDA and on a CPU, and how many tensors of that size
# it makes of them (both log-probabilities, their difference and products).
SCORED_AT_ONCE = {True: 1 << 25, False: 1 << 21}
SCORE_BUFFERS = 5
# Beside the activations: CUDA context, cuBLAS and cuDNN workspaces, or Python and torch themselves on a CPU. Assumed.
FIXED_MARGIN = {True: 3 * GIB // 2, False: GIB // 2}
# Holes of the allocator and buffers within kernels, as a share of all that comes and goes. Assumed.
MARGIN_SHARE = 0.05


def size_text(size: int) -> str:
    """Bytes as people read them, in MiB or GiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.2f} MiB"


def count_text(count: int) -> str:
    """A number of parameters, in millions or billions."""
    return f"{count / 1e9:.3g} B" if count >= 1e8 else f"{count / 1e6:.3g} M"


@dataclass(frozen=True)
class ParameterSizes:
    """Numbers of parameters.

    Attributes:
        trained: with a gradient: routers, experts, the thought tokens' rows.
        frozen: the others.
        trained_in_block, block: of one block, the trained ones and all.
        outside: embedding, head (once, if tied) and last norm.
        largest: the largest trained tensor.
    """

    trained: int
    frozen: int
    trained_in_block: int
    block: int
    outside: int
    largest: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.trained + self.frozen


def parameter_sizes(config: Config, parts: Collection[Part] | None = None) -> ParameterSizes:
    """Count a student's parameters on the meta device, no weight is read.

    Args:
        config: the student's.
        parts: what learns; `None`: `litgpt.trainable.default_parts`.
    """
    with torch.device("meta"):
        model = GPT(config)
        # Any two ids: only the shape of their rows counts.
        parameters = list(Distiller(model, (0, 1), LossSettings(), parts).parameters())
    trained = [p.numel() for p in parameters if p.requires_grad]
    blocks = [list(block.parameters()) for block in model.transformer.h]
    block = max(blocks, key=lambda own: sum(p.numel() for p in own))  # where some are dense, one with experts
    in_block = sum(p.numel() for p in block)
    return ParameterSizes(
        trained=sum(trained),
        frozen=sum(p.numel() for p in parameters if not p.requires_grad),
        trained_in_block=sum(p.numel() for p in block if p.requires_grad),
        block=in_block,
        outside=sum(p.numel() for p in model.parameters()) - sum(p.numel() for own in blocks for p in own),
        largest=max(trained, default=0),
    )


def _parts(settings: Settings) -> tuple[Part, ...] | None:
    """What learns, as far as the settings say. (Activations are planned for the default parts: others keep more.)"""
    named = settings.optim.trainable
    return None if named is None else tuple(part for part in PARTS if part in named)


class Item(NamedTuple):
    """One line of a plan."""

    name: str
    bytes: int
    note: str
    moments: tuple[Moment, ...] = MOMENTS
    """When it is in memory."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device.

    Attributes:
        items: everything; see `Item`.
        device_bytes: what the device has, `None` if nobody knows.
        micro_batch: rows in the micro-batch planned for.
        largest_micro_batch: the most rows that fit, 0 if not even one does, `None` if the device is not known.
    """

    items: tuple[Item, ...]
    device_bytes: int | None
    micro_batch: int
    largest_micro_batch: int | None

    def at(self, moment: Moment) -> int:
        """Bytes in memory at a moment."""
        return sum(item.bytes for item in self.items if moment in item.moments)

    @property
    def peak(self) -> Moment:
        """The fullest moment."""
        return max(MOMENTS, key=self.at)

    @property
    def total(self) -> int:
        """Bytes at the fullest moment, the margin included."""
        return self.at(self.peak)

    @property
    def fits(self) -> bool | None:
        """Whether the device has that much; `None` if it is not known."""
        return None if self.device_bytes is None else self.total <= self.device_bytes

    def table(self) -> str:
        """Items with size and note; what is not in memory at the peak, and so not in the sum, stands in brackets."""
        width = max(len(item.name) for item in self.items)
        lines = [f"{'memory of one device':<{width}}"]
        for item in self.items:
            number = f"{size_text(item.bytes)} " if self.peak in item.moments else f"({size_text(item.bytes)})"
            lines.append(f"{item.name:<{width}}  {number:>12}  {item.note}".rstrip())
        lines.append(f"{'together at the peak':<{width}}  {size_text(self.total):>11}   {_WHEN[self.peak]}")
        return "\n".join(lines)

    def verdict(self) -> str:
        """One line: whether it fits, and the largest micro-batch that does."""
        needed = self.total / GIB
        if self.device_bytes is None:
            return f"needs {needed:.1f} GiB; how much the device has is not known"
        of = f"{needed:.1f} of {self.device_bytes / GIB:.1f} GiB"
        if self.largest_micro_batch == 0:
            return (
                f"does not fit: {of}, and not with a micro-batch of 1 either: take a smaller teacher, "
                "run.activation_checkpointing true, or a larger device"
            )
        verdict = "fits" if self.fits else "does not fit"
        return f"{verdict}: {of}; largest micro-batch that fits: {self.largest_micro_batch}"


@dataclass(frozen=True)
class Placement:
    """How the run uses the devices, beyond its settings.

    Attributes:
        on_gpu: plan for CUDA; `None`: what `run.accelerator` says on this machine.
        sharded: FSDP2: parameters, gradients and optimizer states of the student are divided among the devices, and
            the block at work and the next are gathered. Otherwise each device has all of them, and DDP's buckets.
        teacher_mode: online (the teacher runs beside the student), cached_hidden (its hidden rows are read from disk,
            its head is here) or cached (probabilities are read; nothing of it is here).
        optimizer_8bit: Adam's states in one byte each, with an fp32 scale for every 256.
        scored_share: share of a micro-batch's tokens with a cross-entropy or a teacher, 0 ... 1; the fullest counts.
    """

    on_gpu: bool | None = None
    sharded: bool = False
    teacher_mode: TeacherMode = "online"
    optimizer_8bit: bool = False
    scored_share: float = 1.0

    @classmethod
    def of(cls, settings: Settings, teacher: BaseTeacher | None = None, **more: Any) -> Placement:
        """As the settings, and the kind of teacher, say it."""
        mode: TeacherMode = "online"
        if isinstance(teacher, CachedTeacher):
            mode = "cached_hidden" if teacher.form.kind == "hidden" else "cached"
        return cls(
            sharded=settings.run.strategy == "fsdp",
            optimizer_8bit=settings.optim.optimizer == "adamw8bit",
            teacher_mode=mode,
            **more,
        )


def plan_memory(
    student: Config,
    teacher: Config | None,
    base: Config | None,
    settings: Settings,
    *,
    world_size: int,
    device_bytes: int | None,
    placement: Placement = Placement(),
    more_teachers: Sequence[Config] = (),
) -> MemoryPlan:
    """What a training with these settings needs on each device.

    Args:
        student, teacher, base: shapes; `None` for what is not loaded.
        settings: row length, micro-batch, accumulation, chunk, precision and checkpointing are read.
        world_size: devices that share the work.
        device_bytes: memory of one device (see `device_memory`), `None` if not known.
        placement: what the settings do not say.
        more_teachers: those that run for single sources, one after the other.
    """
    needs = _Needs(student, teacher, base, settings, world_size, placement, more_teachers)
    rows = settings.data.micro_batch_size
    largest = None if device_bytes is None else _most_rows(needs, device_bytes)
    return MemoryPlan(tuple(needs.items(rows)), device_bytes, rows, largest)


def largest_micro_batch(
    student: Config,
    teacher: Config | None,
    base: Config | None,
    settings: Settings,
    *,
    world_size: int,
    device_bytes: int,
    placement: Placement = Placement(),
) -> int:
    """The most rows of a micro-batch that fit, 0 if one is too much; arguments as of `plan_memory`."""
    return _most_rows(_Needs(student, teacher, base, settings, world_size, placement), device_bytes)


def _most_rows(needs: _Needs, device_bytes: int) -> int:
    def fits(rows: int) -> bool:
        return MemoryPlan(tuple(needs.items(rows)), None, rows, None).total <= device_bytes

    if not fits(1):
        return 0
    low = 1
    while fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class _Needs:
    """The items of a plan for any number of rows; parameters are counted once."""

    def __init__(
        self,
        student: Config,
        teacher: Config | None,
        base: Config | None,
        settings: Settings,
        world_size: int,
        placement: Placement,
        more_teachers: Sequence[Config] = (),
    ) -> None:
        self.more_teachers = more_teachers
        self.student, self.settings, self.world_size, self.placement = student, settings, world_size, placement
        self.base = base
        self.teacher = None if placement.teacher_mode == "cached" else teacher
        run = settings.run
        self.on_gpu = placement.on_gpu
        if self.on_gpu is None:
            self.on_gpu = run.accelerator == "cuda" or (run.accelerator == "auto" and torch.cuda.is_available())
        self.amp = run.precision == "bf16-mixed" or (run.precision == "auto" and self.on_gpu)
        self.compute = BF16 if self.amp else FP32
        self.teacher_width = BF16 if self.on_gpu else FP32
        self.sizes = parameter_sizes(student, _parts(settings))
        self.base_parameters = 0 if base is None else dense_parameters(base)
        self.teacher_parameters = 0 if self.teacher is None else dense_parameters(self.teacher)

    def items(self, rows: int) -> Iterator[Item]:
        """All lines for a micro-batch of so many rows, the margin last."""
        items = [*self._weights(), *self._frozen_networks(rows), *self._activations(rows), *self._loss(rows)]
        yield from items
        coming = [
            sum(item.bytes for item in items if moment in item.moments and len(item.moments) < len(MOMENTS))
            for moment in MOMENTS
        ]
        fixed = FIXED_MARGIN[bool(self.on_gpu)]
        note = f"{fixed / GIB:.1f} GiB for {'CUDA and its libraries' if self.on_gpu else 'Python and torch'}"
        note += f", and {MARGIN_SHARE:.0%} of what comes and goes"
        yield Item("margin", fixed + round(MARGIN_SHARE * max(coming)), note)

    def _weights(self) -> Iterator[Item]:
        sizes, placement = self.sizes, self.placement
        sharded = placement.sharded and self.world_size > 1
        parts = self.world_size if sharded else 1
        by = f", 1/{parts} of them here" if sharded else ""
        yield Item(
            "student, trained",
            -(-sizes.trained // parts) * FP32,
            f"{count_text(sizes.trained)} fp32 master weights{by}",
        )
        yield Item("student, frozen", -(-sizes.frozen // parts) * FP32, f"{count_text(sizes.frozen)} fp32{by}")
        if placement.optimizer_8bit:
            state = 2 * (sizes.trained + -(-sizes.trained // 256) * FP32)
        else:
            state = 2 * sizes.trained * FP32
        kind = "8-bit" if placement.optimizer_8bit else "fp32"
        yield Item("optimizer", -(-state // parts), f"AdamW, two {kind} states of each trained parameter{by}")
        # Freed after each step: with one micro-batch they grow while the activations go.
        during: tuple[Moment, ...] = MOMENTS if self.settings.optim.accumulation > 1 else ("last block", "update")
        yield Item("gradients", -(-sizes.trained // parts) * FP32, f"fp32{by}", during)
        if sharded:
            gathered = (2 * sizes.block + sizes.outside + sizes.trained_in_block) * FP32
            yield Item("gathered", gathered, "two blocks, embedding and head, and one block's gradients")
        elif self.world_size > 1:
            yield Item("gradient buckets", sizes.trained * FP32, "DDP's copy of the gradients")
        if not self.on_gpu:
            yield Item("update's buffers", 2 * sizes.largest * FP32, "two of the largest tensor", ("update",))

    def _frozen_networks(self, rows: int) -> Iterator[Item]:
        length = self.settings.data.max_seq_length
        if self.teacher is not None:
            width = self.teacher_width
            kind = "bf16" if width == BF16 else "fp32"
            if self.placement.teacher_mode == "cached_hidden":
                head = self.teacher.padded_vocab_size * self.teacher.n_embd
                yield Item("teacher's head", head * width, f"{kind}; its hidden rows come from the cache")
            else:
                note = f"{count_text(self.teacher_parameters)} {kind}"
                yield Item("teacher", self.teacher_parameters * width, note)
                reading = reading_bytes(self.teacher, rows, length, amp=False, width=width, on_gpu=bool(self.on_gpu))
                yield Item("teacher's forward", reading, "one block at a time", ("teacher",))
            paired = self._scored(rows) * self.teacher.n_embd * width
            yield Item("teacher's rows", paired, "what its head reads, for the tokens with KD", MOMENTS[:-1])
        for config in self.more_teachers:
            parameters = dense_parameters(config)
            note = f"{count_text(parameters)}, of a source of its own"
            yield Item("another teacher", parameters * self.teacher_width, note)
            width = self.teacher_width
            reading = reading_bytes(config, rows, length, amp=False, width=width, on_gpu=bool(self.on_gpu))
            yield Item("its forward", reading, "after the first has read", ("teacher",))
            paired = self._scored(rows) * config.n_embd * width
            yield Item("its rows", paired, "as the first one's", MOMENTS[:-1])
        if self.base is not None:
            yield Item("base", self.base_parameters * FP32, f"{count_text(self.base_parameters)} fp32")
            if self._layers:
                reading = reading_bytes(self.base, rows, length, amp=self.amp, width=FP32, on_gpu=bool(self.on_gpu))
                yield Item("base's forward", reading, "one block at a time", ("base",))
                kept = self._layers * rows * length * self.base.n_embd * FP32
                yield Item("base's hidden states", kept, f"of {self._layers} layers, for CKA", MOMENTS[1:-1])

    @property
    def _layers(self) -> int:
        """Layers that CKA compares."""
        loss = self.settings.loss
        if self.base is None or max(loss.cka_weight, loss.cka_end) <= 0:
            return 0
        return len(cka_layers(self.student.n_layer, loss.cka_every))

    def _scored(self, rows: int) -> int:
        return math.ceil(rows * self.settings.data.max_seq_length * self.placement.scored_share)

    def _activations(self, rows: int) -> Iterator[Item]:
        config, length = self.student, self.settings.data.max_seq_length
        N, D, L = rows * length, config.n_embd, config.n_layer
        block = block_activations(config, rows, length, amp=self.amp, on_gpu=bool(self.on_gpu))
        copies = self.sizes.block * BF16 if self.amp else 0
        around = around_activations(config, rows, length)
        forward: tuple[Moment, ...] = ("cka", "loss", "first block")
        if self.settings.run.activation_checkpointing:
            inputs = L * N * D * FP32 + rows * length * length  # and the mask, which every block reads again
            yield Item("activations", inputs + around, f"the inputs of {L} blocks", forward)
            note = "the block that backward computes again"
        else:
            yield Item("activations", (L - 1) * block + around, f"kept by the other {L - 1} blocks", forward)
            if copies:
                yield Item("bf16 copies", (L - 1) * copies, f"of the other {L - 1} blocks' weights", forward)
            note = "what backward works on"
        at_work: tuple[Moment, ...] = ("first block", "last block")
        whole = at_work if self.settings.run.activation_checkpointing else (*forward, "last block")
        yield Item("one block", block + copies, note, whole)
        yield Item("its gradients", self._backward_buffers(N), "on their way through one block", at_work)
        routing = L * N * (3 * config.n_expert * FP32 + config.n_expert_per_token * 12)
        yield Item("routing", routing, "router logits and choices, for the balance loss", forward)

    def _backward_buffers(self, N: int) -> int:
        """What a block's backward holds beside the activations: of the copies of tokens, or of the experts' weights."""
        config = self.student
        M = N * config.n_expert_per_token
        rows = M * config.n_embd * (2 * FP32 + self.compute) + 2 * N * config.n_embd * FP32
        # The gradient of the stack comes in the dtype of the product, is cast, and is copied into the weight's layout.
        stack = config.n_expert * 2 * config.expert_size * config.n_embd
        return max(rows, stack * (FP32 + (BF16 if self.amp else 0)))

    def _loss(self, rows: int) -> Iterator[Item]:
        config, settings = self.student, self.settings
        N, D, V = rows * settings.data.max_seq_length, config.n_embd, config.padded_vocab_size
        with_teacher = self.teacher is not None
        yield Item("loss, kept", 2 * N * D * FP32, "hidden rows, and their gradient made in forward", ("cka", "loss"))
        chunk = min(settings.loss.chunk_rows, self._scored(rows))
        logits = 2 if with_teacher else 1
        piece = min(chunk * V * FP32, SCORED_AT_ONCE[bool(self.on_gpu)])
        note = f"{logits} x [{chunk}, {V}] fp32, and what is made of a part of them"
        yield Item("loss, one chunk", logits * chunk * V * FP32 + SCORE_BUFFERS * piece, note, ("loss",))
        if self._layers:
            own = self._layers * N * D * FP32
            products = min(2 * N * N, 2 * D * D) if N * 2 * D < 3 * D * D else 2 * D * D
            centred = 2 * own + self._layers * products * FP32
            yield Item("CKA", centred, "centred rows of student and base", ("cka",))
            if settings.optim.accumulation * self.world_size > 1:
                # Of each side with itself and of both, in fp64, kept from the survey to the last share of the step.
                moments = self._layers * (2 * D * D + D * (self.base.n_embd if self.base else D)) * 8
                yield Item("CKA's moments", moments, "of the whole step, fp64", MOMENTS[:-1])
            yield Item("CKA's gradients", own, f"into {self._layers} layers", ("loss", "first block"))


def dense_parameters(config: Config) -> int:
    """Parameters of a network that only reads, counted on the meta device; tied ones once."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU, or of the machine's memory that is free or can be freed; `None` if the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class DiskPlan:
    """Bytes that a run writes.

    Attributes:
        checkpoint: one `step-NNNNNN`: the student in fp32 and the optimizer's states.
        checkpoints: how many lie side by side at most; while one is written the older ones are still there.
        kept: how many of them stay.
        final: the trained lit dir, in the student's own dtype.
    """

    checkpoint: int
    checkpoints: int
    kept: int
    final: int

    @property
    def total(self) -> int:
        """The most at one time: `final/` is written when no checkpoint is any more."""
        return max(self.checkpoints * self.checkpoint, self.kept * self.checkpoint + self.final)

    def line(self) -> str:
        """One line for people."""
        return (
            f"{self.checkpoints} checkpoints of {size_text(self.checkpoint)}, final/ {size_text(self.final)}, "
            f"at most {size_text(self.total)} at one time"
        )


def plan_disk(student: Config, settings: Settings, *, steps: int, stored_bytes: int = 2) -> DiskPlan:
    """What the run directory will hold.

    Args:
        student: its shape.
        settings: `run.save_every`, `run.keep_checkpoints` and `optim.optimizer` are read.
        steps: optimizer steps in all.
        stored_bytes: of one parameter in the student's own file; 2 is bf16.
    """
    sizes = parameter_sizes(student, _parts(settings))
    state = 2 * sizes.trained * (1 if settings.optim.optimizer == "adamw8bit" else FP32)
    written = (steps - 1) // settings.run.save_every
    parameters = dense_parameters(student)
    keep = settings.run.keep_checkpoints
    return DiskPlan(
        checkpoint=parameters * FP32 + state,
        checkpoints=min(written, keep + 1),
        kept=min(written, keep),
        final=parameters * stored_bytes,
    )
