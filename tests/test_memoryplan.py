"""The memory plan against what really happens: tensors that autograd keeps, bytes alive in a step, files written."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from litgpt import rundir
from litgpt.activations import around_activations, block_activations
from litgpt.config import Config
from litgpt.distill import Distiller, MicroBatch
from litgpt.flops import GPUS, peak_flops, step_flops, tokens_per_step
from litgpt.memoryplan import (
    GIB,
    MOMENTS,
    MemoryPlan,
    Placement,
    device_memory,
    largest_micro_batch,
    parameter_sizes,
    plan_disk,
    plan_memory,
)
from litgpt.model import GPT
from litgpt.recipe import DataSettings, LossSettings, OptimSettings, RunSettings, Settings
from litgpt.upcycle import upcycle
from tests.tiny_tokenizer import build_tiny_tokenizer
from tests.world import World, make_model, write_dialogues
from train_distill import Trainer

STUDENT = Config.from_name("Qwen3-0.6B").upcycled(8, 2)
BASE = Config.from_name("Qwen3-0.6B")
TEACHER = Config.from_name("Qwen3-14B")
H100 = GPUS["NVIDIA H100 80GB HBM3"].memory
ON_GPU = Placement(on_gpu=True)


def small(**sizes: int) -> Config:
    """A MoE of reduced width; by default no two sizes are equal."""
    values = {"n_layer": 2, "n_embd": 64, "n_head": 6, "n_query_groups": 2, "head_size": 16, "intermediate_size": 112}
    dense = Config.from_name("Qwen3-0.6B", name="Qwen3-small", hf_config={}, **(values | sizes))
    return dense.upcycled(5, 3)


def some_settings(directory: Path = Path(), **changes: Any) -> Settings:
    settings = Settings(
        directory / "student",
        directory / "teacher",
        directory / "base",
        directory / "out",
        DataSettings(directory / "train.jsonl", val=directory / "val.jsonl"),
        LossSettings(),
        OptimSettings(accumulation=1, steps=100),
        RunSettings(accelerator="cpu"),
        "auto",
        False,
        1,
    )
    for name, value in changes.items():
        group, _, field = name.partition("__")
        setattr(settings, group, replace(getattr(settings, group), **{field: value}))
    return settings


@pytest.mark.parametrize("config", [small(), small(n_layer=3, padded_vocab_size=151936, n_embd=32), STUDENT])
def test_parameters_are_counted_as_the_real_model_has_them(config: Config) -> None:
    with torch.device("meta"):
        model = GPT(config)
    rows = 2 * config.n_embd * (1 if config.tie_embeddings else 2)
    sizes = parameter_sizes(config)
    assert sizes.total == sum(p.numel() for p in model.parameters()) + rows
    experts = config.n_layer * config.n_embd * (config.n_expert + config.n_expert * 3 * config.expert_size)
    assert sizes.trained == experts + rows
    assert sizes.total == config.n_layer * sizes.block + sizes.outside + rows
    if config is not STUDENT:
        distiller = Distiller(GPT(config), (1, 2), LossSettings())
        assert sizes.trained == sum(p.numel() for p in distiller.parameters() if p.requires_grad)
        assert sizes.frozen == sum(p.numel() for p in distiller.parameters() if not p.requires_grad)


def test_parameters_of_the_published_models() -> None:
    # The numbers of the model cards' safetensors: 0.6B without its stored second head, 14B.
    for config, published in ((BASE, 596_049_920), (TEACHER, 14_768_307_200)):
        with torch.device("meta"):
            assert sum(p.numel() for p in GPT(config).parameters()) == published
    assert parameter_sizes(STUDENT).total == pytest.approx(2.45e9, rel=0.01)


def saved_bytes(student: GPT, *, rows: int, length: int, amp: bool) -> int:
    """Bytes of all storages that autograd keeps for the student's backward, the parameters themselves left out."""
    distiller = Distiller(student, (5, 6), LossSettings())
    own = {p.untyped_storage()._cdata for p in distiller.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    ids_BT = torch.randint(10, 400, (rows, length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", enabled=amp):
        output = student(ids_BT, documents_BT=torch.zeros(rows, length, dtype=torch.int32), return_logits=False)
    assert output.hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize(
    ("config", "rows", "length"),
    [
        (small(), 2, 128),
        (small(n_layer=1, n_embd=96, n_query_groups=6), 1, 192),
        (small(intermediate_size=16, padded_vocab_size=151936), 3, 64),
        (replace(small(), norm_qk=False), 2, 64),
    ],
)
def test_activations_are_what_autograd_keeps(config: Config, rows: int, length: int, amp: bool) -> None:
    """To the byte: tolerance 0. Weights' bf16 copies are counted apart in a plan, so they are added here."""
    model = GPT(config)
    model.init_weights()
    expected = config.n_layer * block_activations(config, rows, length, amp=amp, on_gpu=False)
    expected += around_activations(config, rows, length)
    if amp:
        block = model.transformer.h[0]
        matrices = [
            p.numel() for name, p in block.named_parameters() if "norm" not in name and "gate.weight" not in name
        ]
        expected += config.n_layer * 2 * sum(matrices)
    assert saved_bytes(model, rows=rows, length=length, amp=amp) == expected


def test_with_checkpointing_only_the_inputs_of_blocks_are_kept() -> None:
    config, rows, length = small(n_layer=4), 2, 128
    model = GPT(config)
    model.init_weights()
    model.activation_checkpointing = True
    plan = plan_memory(
        config,
        None,
        None,
        some_settings(data__micro_batch_size=rows, data__max_seq_length=length, run__activation_checkpointing=True),
        world_size=1,
        device_bytes=None,
    )
    # Beside them torch keeps the state of the random generator for each block, 5 kB.
    measured = saved_bytes(model, rows=rows, length=length, amp=False)
    assert measured == pytest.approx(bytes_of(plan, "activations"), rel=0.01, abs=6000 * config.n_layer)


def bytes_of(plan: MemoryPlan, name: str) -> int:
    (item,) = [item for item in plan.items if item.name == name]
    return item.bytes


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, until they are freed; `peak` is the most at one time.

    Args:
        known: tensors that are there already and are not counted, nor are views of them.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _freed(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Wide enough that tensors of tokens, of weights and of logits all matter."""
    directory = tmp_path_factory.mktemp("plan")
    tokenizer = build_tiny_tokenizer(directory / "tokenizer")
    sizes = {"n_embd": 64, "padded_vocab_size": 2048}
    base = make_model(directory / "Tiny", tokenizer, n_layer=4, seed=1, **sizes)
    teacher = make_model(directory / "TinyTeacher", tokenizer, n_layer=2, seed=2, **sizes)
    student = upcycle(base, n_expert=4, n_expert_per_token=2, seed=3).out_dir
    world = World(base, teacher, student, directory / "train.jsonl", directory / "val.jsonl")
    write_dialogues(world.train, 60, prefix="train")
    write_dialogues(world.val, 2, prefix="val")
    return world


STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"run__activation_checkpointing": True},
    "accumulation": {"optim__accumulation": 2},
    "no teacher": {"loss__kd_weight": 0.0, "loss__chunk_rows": 16},
    "no CKA": {"loss__cka_weight": 0.0, "loss__chunk_rows": 8},
    "wide batch": {"data__micro_batch_size": 6, "run__activation_checkpointing": True},
}


def run_settings(models: World, directory: Path, **changes: Any) -> Settings:
    defaults: dict[str, Any] = {"data__max_seq_length": 256, "data__micro_batch_size": 2, "loss__chunk_rows": 64}
    defaults |= {"data__train": models.train, "data__val": models.val}
    settings = some_settings(directory, **(defaults | changes))
    return replace(settings, student=models.student, teacher=models.teacher, base=models.base)


def plan_of(trainer: Trainer, **how: Any) -> MemoryPlan:
    """The plan of a run, with the share of scored tokens of its fullest micro-batch."""
    settings = trainer.settings
    micros = [MicroBatch(batch, settings.loss, trainer.views, torch.device("cpu")) for batch in trainer.loader]
    trainer.loader.epoch = 0
    scored = max(float((micro.ce_weight_N != 0).float().mean()) for micro in micros)
    return plan_memory(
        trainer.config,
        trainer.teacher.config if trainer.teacher else None,
        trainer.reference.model.config,
        settings,
        world_size=1,
        device_bytes=None,
        placement=Placement(scored_share=scored, **how),
    )


def weights_and_states(trainer: Trainer) -> tuple[list[Tensor], list[Tensor]]:
    """All weights on the device, and Adam's states."""
    networks: list[nn.Module] = [trainer.distiller, trainer.reference.model]
    if trainer.teacher:
        assert trainer.teacher.model is not None
        networks.append(trainer.teacher.model)
    weights: list[Tensor] = [p for network in networks for p in network.parameters()]
    return weights, [x for state in trainer.optimizer.state.values() for x in state.values() if x.ndim]


def nbytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("name", STEPS)
def test_a_whole_step_needs_what_the_plan_says(models: World, tmp_path: Path, name: str) -> None:
    """The plan without its margin is between 1.0 and 1.2 of the bytes alive at the peak of a real step on the CPU.

    Both count the same things: all weights, Adam's states, and whatever the second step of training makes. States and
    weights agree exactly.
    """
    trainer = Trainer(run_settings(models, tmp_path, **STEPS[name]))
    plan = plan_of(trainer)
    batches = trainer.loader.forever()
    trainer._train_step(batches)
    weights, states = weights_and_states(trainer)
    assert nbytes(states) == bytes_of(plan, "optimizer")
    lines = ["student, trained", "student, frozen", "base", *(["teacher"] if trainer.teacher else [])]
    assert nbytes(weights) == sum(bytes_of(plan, line) for line in lines)
    with Alive([*weights, *states]) as alive:
        trainer._train_step(batches)
    measured = nbytes(weights) + nbytes(states) + alive.peak
    planned = plan.total - bytes_of(plan, "margin")
    assert 1.0 <= planned / measured <= 1.2, (plan.peak, planned, measured)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_a_gpu_the_plan_covers_what_torch_allocates(models: World, tmp_path: Path, checkpointing: bool) -> None:
    """`max_memory_allocated` is at most the plan without its margin times 1.1, and at least half of it.

    The CUDA context and the libraries' workspaces are not in torch's count; the margin holds them.
    """
    settings = run_settings(
        models,
        tmp_path,
        run__accelerator="cuda",
        run__activation_checkpointing=checkpointing,
        data__micro_batch_size=16,
        data__max_seq_length=512,
    )
    before = torch.cuda.memory_allocated()
    trainer = Trainer(settings)
    plan = plan_of(trainer, on_gpu=True)
    batches = trainer.loader.forever()
    trainer._train_step(batches)
    torch.cuda.reset_peak_memory_stats()
    trainer._train_step(batches)
    measured = torch.cuda.max_memory_allocated() - before
    planned = plan.total - bytes_of(plan, "margin")
    assert 0.5 * planned <= measured <= 1.1 * planned, (plan.table(), measured)


def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    arguments: Any = {"world_size": 1, "device_bytes": H100, "placement": ON_GPU}
    settings = some_settings(run__activation_checkpointing=True)
    largest = largest_micro_batch(STUDENT, TEACHER, BASE, settings, **arguments)
    assert largest >= 1

    def plan(rows: int) -> MemoryPlan:
        changed = some_settings(run__activation_checkpointing=True, data__micro_batch_size=rows)
        return plan_memory(STUDENT, TEACHER, BASE, changed, **arguments)

    assert plan(largest).fits and not plan(largest + 1).fits
    assert plan(largest).largest_micro_batch == plan(largest + 1).largest_micro_batch == largest
    assert plan(largest).verdict().startswith("fits: ")
    assert plan(largest + 1).verdict().startswith("does not fit: ")
    totals = [plan(rows).total for rows in (1, 2, 3, 8)]
    assert totals == sorted(totals) and totals[0] < totals[-1]


def test_a_device_that_is_too_small_or_not_known_is_said() -> None:
    settings = some_settings()
    plan = plan_memory(STUDENT, TEACHER, BASE, settings, world_size=1, device_bytes=24 * GIB, placement=ON_GPU)
    assert plan.largest_micro_batch == 0 and plan.fits is False
    assert "not with a micro-batch of 1 either" in plan.verdict()
    plan = plan_memory(STUDENT, None, BASE, settings, world_size=1, device_bytes=None, placement=ON_GPU)
    assert plan.fits is None and "not known" in plan.verdict()


def test_what_changes_the_plan_changes_the_right_lines() -> None:
    def plan(world_size: int = 1, teacher: Config | None = TEACHER, **changes: Any) -> MemoryPlan:
        placement = replace(ON_GPU, **{key: changes.pop(key) for key in list(changes) if "__" not in key})
        settings = some_settings(**changes)
        return plan_memory(
            STUDENT, teacher, BASE, settings, world_size=world_size, device_bytes=None, placement=placement
        )

    one = plan()
    names = [item.name for item in one.items]
    assert len(names) == len(set(names)) and names[-1] == "margin"
    assert bytes_of(one, "teacher") == 2 * 14_768_307_200
    ddp, fsdp = plan(4), plan(4, sharded=True)
    assert bytes_of(ddp, "gradient buckets") == bytes_of(ddp, "gradients") == bytes_of(one, "gradients")
    for name in ("student, trained", "student, frozen", "optimizer", "gradients"):
        assert bytes_of(fsdp, name) == pytest.approx(bytes_of(one, name) / 4, rel=1e-6)
    assert fsdp.total < one.total < ddp.total
    eight = plan(optimizer_8bit=True)
    assert bytes_of(eight, "optimizer") == pytest.approx(bytes_of(one, "optimizer") / 4, rel=0.02)
    hidden, cached = plan(teacher_mode="cached_hidden"), plan(teacher_mode="cached")
    assert bytes_of(hidden, "teacher's head") == 2 * 151936 * 5120
    assert not any("teacher" in item.name for item in cached.items)
    assert cached.total < hidden.total < one.total
    assert plan(run__activation_checkpointing=True).total < one.total
    assert plan(optim__accumulation=2).total > one.total
    assert plan(scored_share=0.3).total < one.total
    assert not any("CKA" in item.name for item in plan(loss__cka_weight=0.0).items)


def test_the_table_adds_up_and_brackets_what_is_not_there_at_the_peak() -> None:
    plan = plan_memory(STUDENT, TEACHER, BASE, some_settings(), world_size=1, device_bytes=H100, placement=ON_GPU)
    assert plan.total == max(plan.at(moment) for moment in MOMENTS)
    _, *lines, last = plan.table().splitlines()
    assert len(lines) == len(plan.items)
    found = [re.search(r"(\()?([\d.]+) (GiB|MiB)", line) for line in lines]
    shown = sum(float(m[2]) / (1 if m[3] == "GiB" else 1024) for m in found if m and not m[1])
    assert shown == pytest.approx(plan.total / GIB, abs=0.01 * len(lines))
    assert f"{plan.total / GIB:.2f} GiB" in last
    assert [bool(m and m[1]) for m in found] == [plan.peak not in item.moments for item in plan.items]


def test_the_disk_plan_is_the_size_of_the_files(models: World, tmp_path: Path) -> None:
    settings = run_settings(models, tmp_path, run__save_every=2, optim__steps=6)
    trainer = Trainer(settings)
    trainer._train_step(trainer.loader.forever())
    trainer.step = 1
    trainer._save()
    (checkpoint,) = rundir.checkpoints(settings.out_dir)
    plan = plan_disk(trainer.config, settings, steps=6, stored_bytes=4)
    size = (checkpoint / rundir.STATE_FILE).stat().st_size
    # Random states, positions, settings and names take the rest.
    assert plan.checkpoint <= size <= plan.checkpoint + 100_000
    assert plan.checkpoints == 2
    stored = (models.student / "lit_model.pth").stat().st_size
    # Straight after upcycling equal experts are stored once; after training each is stored.
    one_expert = trainer.config.n_layer * 3 * trainer.config.n_embd * trainer.config.expert_size
    assert plan.final == pytest.approx(stored + 3 * one_expert * 4, rel=0.05)
    assert plan.total == 2 * plan.checkpoint + plan.final


def test_disk_of_the_real_recipe() -> None:
    plan = plan_disk(STUDENT, some_settings(run__save_every=40), steps=280)
    assert plan.checkpoint == pytest.approx(27e9, rel=0.02)
    assert plan.checkpoints == 3 and plan.total == 3 * plan.checkpoint
    assert plan.final == pytest.approx(4.9e9, rel=0.01)
    assert plan_disk(STUDENT, some_settings(run__save_every=280), steps=280).checkpoints == 0


def grouped_flops(x: Any, weights: Any, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * weights[-1] if len(weights) == 3 else 2 * x[0] * x[1] * weights[1]


def test_flops_are_those_that_torch_counts() -> None:
    """torch's own counter sees the same products, to the last one; attention on a CPU it does not know (context 0)."""
    config, rows, length = small(), 2, 64
    model = GPT(config)
    model.init_weights()
    distiller = Distiller(model, (5, 6), LossSettings())
    mapping: dict[Any, Callable[..., int]] = {torch.ops.aten._grouped_mm: grouped_flops}
    ids_BT = torch.randint(10, 400, (rows, length))
    flops = step_flops(config, None, None, some_settings(), tokens=rows * length, scored_tokens=0, context=0)
    with FlopCounterMode(display=False, custom_mapping=mapping) as forward:
        output = distiller.student(ids_BT, return_logits=False)
    assert forward.get_total_flops() == flops.student_forward
    with FlopCounterMode(display=False, custom_mapping=mapping) as backward:
        output.hidden.sum().backward()
    assert backward.get_total_flops() == flops.student_backward
    dense = Config.from_name("Qwen3-0.6B", n_layer=2, n_embd=32, intermediate_size=48, padded_vocab_size=512)
    with FlopCounterMode(display=False) as reading, torch.no_grad():
        GPT(dense)(ids_BT)
    flops = step_flops(config, dense, dense, some_settings(), tokens=rows * length, context=0)
    assert reading.get_total_flops() == flops.teacher
    assert flops.base == flops.teacher - 2 * rows * length * 32 * 512


def test_flops_of_the_real_recipe() -> None:
    settings = some_settings(run__activation_checkpointing=True)
    tokens = tokens_per_step(settings, world_size=2)
    assert tokens == 8 * 2048 * 2
    flops = step_flops(STUDENT, TEACHER, BASE, settings, tokens=tokens, world_size=2)
    # Without attention: 2 FLOP a parameter and token, 14.0 billion of which multiply in the teacher.
    bare = step_flops(STUDENT, TEACHER, BASE, settings, tokens=tokens, context=0)
    with torch.device("meta"):
        model = GPT(TEACHER)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2) - model.transformer.wte.weight.numel()
    assert bare.teacher == 2 * matrices * tokens
    assert flops.model / tokens == pytest.approx(36e9, rel=0.05)
    # Checkpointing and, over two devices, the counting of the load: the student's forward twice again.
    assert flops.repeated == pytest.approx(2 * flops.student_forward, rel=0.2)
    assert flops.hardware == flops.model + flops.repeated


def test_peaks_of_gpus() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.5e12
    assert peak_flops("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert peak_flops("") is None
    # Where Lightning's table has the dense figure.
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
            theirs = get_available_flops(torch.device("cuda"), torch.bfloat16)
        assert theirs == pytest.approx(peak_flops(name), rel=0.001)


def test_the_memory_of_this_machine_is_known() -> None:
    found = device_memory(torch.device("cpu"))
    assert found is not None and GIB // 4 < found < 1 << 50
