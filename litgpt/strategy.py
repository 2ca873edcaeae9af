"""Where a run's processes are and what each of them holds: one device, DDP, FSDP2 or HSDP; full states of it all.

- `ddp`: each process holds the whole student, base and teacher
- `fsdp`: each holds a part of every block of all three and gathers one block at a time (FSDP2, ZeRO-3); with
  `run.shard_size` the parts are spread over so many processes, and the groups of processes are copies (HSDP)

FSDP2 gathers the weights in the dtype in which they are stored and autocast rounds them as on one device, so that all
strategies compute the same numbers. Checkpoints hold full states, whatever wrote them: another strategy can go on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from litgpt.model import Block
from litgpt.recipe import OptimSettings, RunSettings
from litgpt.utils import UserError

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def on_this_machine(run: RunSettings) -> RunSettings:
    """The settings with what is found here: the precision, and the processes that torchrun (or `fabric run`) started.

    Raises:
        UserError: more devices than there are, or settings that do not go with the precision.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        run = replace(run, devices=local, num_nodes=world // local)
    on_gpu = run.accelerator == "cuda" or (run.accelerator == "auto" and torch.cuda.is_available())
    if on_gpu and run.devices > torch.cuda.device_count():
        raise UserError(f"run.devices is {run.devices}, and this machine has {torch.cuda.device_count()} GPUs")
    if run.compile and not on_gpu:
        raise UserError("run.compile is for GPUs: leave it out here")
    if run.precision == "auto":
        run = replace(run, precision="bf16-mixed" if on_gpu else "32-true")
    return run


def make_fabric(run: RunSettings, out_dir: Path, first_step: int) -> Fabric:
    """Fabric with its processes started.

    Args:
        run: from `on_this_machine`.
        out_dir: for the loggers.
        first_step: where the run goes on; what a killed run has reported after it is not part of the run any more.
    """
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    on_gpu = run.accelerator == "cuda" or (run.accelerator == "auto" and torch.cuda.is_available())
    purge: dict[str, Any] = {"purge_step": first_step + 1} if first_step else {}
    loggers: list[Logger] = [TensorBoardLogger(out_dir, name="tensorboard", version="", **purge)]
    if run.wandb:
        loggers.append(_wandb_logger(out_dir))
    fabric = Fabric(
        accelerator="cuda" if on_gpu else "cpu",
        devices=run.devices,
        num_nodes=run.num_nodes,
        strategy=fabric_strategy(run),
        precision=cast(Any, run.precision),
        loggers=loggers,
    )
    if os.environ.get("LT_CLI_USED") != "1":  # `fabric run` has done so
        fabric.launch()
    return fabric


def _wandb_logger(out_dir: Path) -> Logger:
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise UserError('run.wandb needs the package wandb: pip install "distilled-qwen3-moe[logging]"') from None
    from lightning.pytorch.loggers import WandbLogger

    logger: Logger = WandbLogger(project="distilled-qwen3-moe", name=out_dir.name, save_dir=out_dir)
    return logger


def fabric_strategy(run: RunSettings) -> str | ModelParallelStrategy:
    """What Fabric is to be made with.

    Raises:
        UserError: the processes do not divide into groups of `shard_size`.
    """
    if run.strategy != "fsdp":
        return run.strategy
    world = run.devices * run.num_nodes
    size = run.shard_size or world
    if world % size:
        raise UserError(f"run.shard_size is {size}, which does not divide the {world} processes")

    def parallelize(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        return shard(module, mesh, offload=run.offload, methods=("survey", "terms", "replies"))

    # Fabric names the two dimensions after their usual use; here they are copies of the weights and parts of them.
    return ModelParallelStrategy(
        parallelize,
        data_parallel_size=world // size,
        tensor_parallel_size=size,
        # Offloaded gradients are added up on the CPU.
        process_group_backend="cpu:gloo,cuda:nccl" if run.offload and torch.cuda.is_available() else None,
    )


def shard(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    whole: Collection[nn.Parameter] = (),
    offload: bool = False,
    methods: Collection[str] = (),
) -> nn.Module:
    """Spread a module's parameters over the processes, block by block, in place.

    Args:
        module: with the same numbers on every process, on any device; a `GPT` or what holds one.
        mesh: of Fabric's ModelParallelStrategy, (copies, parts).
        whole: parameters that every process keeps, because they are read outside of the module's forward.
        offload: keep the parts, their gradients and the optimizer's state in the CPU's memory.
        methods: further ways in, beside forward.
    """
    options: dict[str, Any] = {
        "mesh": mesh if mesh.size(0) > 1 else mesh["tensor_parallel"],
        "offload_policy": CPUOffloadPolicy() if offload and mesh.device_type == "cuda" else OffloadPolicy(),
        "shard_placement_fn": lambda parameter: _placement(parameter, mesh.size(1)),
    }
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    roots = [block for block in module.modules() if isinstance(block, Block)]
    for root in [*roots, module]:
        sharded = fully_shard(root, ignored_params=set(whole), **options)
        if mesh.device_type == "cpu":
            sharded.set_force_sum_reduction_for_comms(True)  # gloo cannot average
    for name in methods:
        register_fsdp_forward_method(module, name)
    return module


def _placement(parameter: nn.Parameter, parts: int) -> Shard:
    """Along the experts where they divide evenly, else along their width: 8 experts on 16 devices, half of them
    idle."""
    if parameter.ndim == 3 and parameter.size(0) % parts and parameter.size(1) % parts == 0:
        return Shard(1)
    return Shard(0)


def store_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep a module's frozen matrices in a smaller dtype; vectors (norms) stay, they are few and read in fp32.

    Under autocast this changes no result: matrix products round their weights to bf16 anyway, and the embedding's rows
    are widened again on their way out.

    Raises:
        UserError: a weight has more digits than the dtype.
    """
    kept: dict[nn.Parameter, nn.Parameter] = {}  # a tied head stays tied
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or parameter.ndim < 2:
            continue
        small = parameter.detach().to(dtype)
        if not torch.equal(small.to(parameter.dtype), parameter):
            raise UserError(f"{name} has more digits than {dtype} holds: set run.frozen_dtype to float32")
        kept[parameter] = nn.Parameter(small, requires_grad=False)
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            if parameter in kept:
                setattr(owner, name, kept[parameter])
        if isinstance(owner, nn.Embedding):
            owner.register_forward_hook(lambda _module, _ids, x_BTD: x_BTD.float(), prepend=True)


def torchao_optimizers() -> Any:
    """torchao.optim; importing it also lets `torch.load` read the states of its optimizers.

    Raises:
        UserError: it is not installed.
    """
    try:
        import torchao.optim
    except ImportError:
        raise UserError(
            'optim.optimizer adamw8bit needs torchao: pip install "distilled-qwen3-moe[optim8bit]"'
        ) from None
    return torchao.optim


def make_optimizer(
    module: nn.Module, no_decay: Collection[nn.Parameter], optim: OptimSettings
) -> torch.optim.Optimizer:
    """AdamW over what trains, its averages in fp32 or (torchao) in 8 bits, blockwise.

    Raises:
        UserError: `adamw8bit` without torchao.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    apart = {id(p) for p in no_decay}
    groups = [
        {"params": [p for p in trained if id(p) not in apart], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if id(p) in apart], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optim.optimizer == "adamw8bit":
        optimizer: torch.optim.Optimizer = torchao_optimizers().AdamW8bit(groups, lr=optim.lr, betas=optim.betas)
        return optimizer
    on_gpu = trained[0].device.type == "cuda"
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=on_gpu)


def full_states(module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> tuple[dict[str, Any], ...]:
    """States of module and optimizer by parameter names, whole, on the CPU of process 0; empty on the others.

    Every process calls it. Process 0 needs the memory for all of it.
    """
    model: dict[str, Any] = get_model_state_dict(module, options=_FULL)
    if optimizer is None:
        return (model,)
    return model, get_optimizer_state_dict(module, optimizer, options=_FULL)


def set_full_states(
    module: nn.Module, optimizer: torch.optim.Optimizer, model_state: dict[str, Any], optimizer_state: dict[str, Any]
) -> None:
    """Put back what `full_states` gave; every process brings all of it and keeps its part."""
    set_model_state_dict(module, model_state, options=_FULL)
    set_optimizer_state_dict(module, optimizer, optimizer_state, options=_FULL)


def norm(tensors: Collection[Tensor]) -> Tensor:
    """The Euclidean norm of all of them together, over all their parts."""
    total = torch.nn.utils.get_total_norm(tensors)
    full: Tensor = total.full_tensor() if hasattr(total, "full_tensor") else total
    return full
