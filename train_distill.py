"""Teach the upcycled mixture of experts: `python train_distill.py --config configs/distill.yaml`.

Reads a student (upcycled lit dir), a teacher, the dense base and dialogues; writes a run directory whose `final/` is a
lit dir again. What learns is named in the student's provenance.yaml: routers, experts and the two thought tokens' rows,
by default. A killed run goes on from its last checkpoint, on a CPU bit for bit. At SIGTERM or its time limit it saves
and ends with exit code 143. Several processes: `--run.devices 8`, or `fabric run`, or
`torchrun --nproc_per_node 8 train_distill.py ...`.

The step's loss is in `litgpt/distill.py`, the processes in `litgpt/strategy.py`, checkpoints in `litgpt/rundir.py`, the
end in `litgpt/finish.py`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from lightning.fabric import seed_everything
from torch import Tensor
from tqdm import tqdm

from litgpt import finish, rundir, strategy
from litgpt.balance import ChoiceBias, let_go
from litgpt.checkpoint import load_model, read_provenance, require_lit_dir
from litgpt.cka import MINIMUM_ROWS
from litgpt.config import Config
from litgpt.data import Batch
from litgpt.distill import Distiller, MicroBatch, Reference, StepCka, TeacherReference, Totals, evaluate
from litgpt.flops import peak_flops, step_flops
from litgpt.guards import STOPPED_EXIT_CODE, SpikeWatch, StopRequest
from litgpt.loaders import training_loader, validation_loaders
from litgpt.memoryplan import Placement, device_memory, plan_memory
from litgpt.mixture import MixtureLoader
from litgpt.model import GPT, LLaMAMoE
from litgpt.onpolicy import OnPolicy, refuse_unfit
from litgpt.recipe import (
    DataSettings,
    LossSettings,
    OptimSettings,
    RunSettings,
    Settings,
    digests,
    lr_at,
    micro_batches,
    moved_loader,
    require_same,
    require_same_files,
    seconds_of,
)
from litgpt.report import write_report
from litgpt.routing import Choices, routing_change
from litgpt.samples import answer
from litgpt.teacher import BaseTeacher, OnlineTeacher, TeacherView
from litgpt.teachercache import open_teacher
from litgpt.tokenizer import Tokenizer
from litgpt.trainable import parts_of
from litgpt.utils import USER_ERROR_EXIT_CODE, UserError, atomic_file, run_cli

_GROUPS = {".mlp.gate.": "routers", ".mlp.experts.": "experts", "rows.": "thought_rows"}
"""Mark in a parameter's name → the group whose gradient norm is logged."""

VALIDATED = ("answer_ce", "thought_ce", "kd_kl")
"""What is logged of each validation set."""


def distill(
    *,
    student: Path = Path("checkpoints/Qwen/Qwen3-0.6B-MoE-8x2"),
    teacher: Path = Path("checkpoints/Qwen/Qwen3-14B"),
    base: Path | None = None,
    out_dir: Path = Path("out/distill"),
    data: DataSettings,
    loss: LossSettings,
    optim: OptimSettings,
    run: RunSettings,
    resume: str = "auto",
    overwrite: bool = False,
    seed: int = 1337,
) -> None:
    """Distil a large dense teacher into an upcycled mixture of experts.

    Args:
        student: lit dir of the upcycled student.
        teacher: lit dir of the teacher, whose tokenizer must be the student's, or what scripts/cache_teacher.py wrote.
        base: lit dir of the dense model the student was made of; without it the one its provenance.yaml names.
        out_dir: run directory; final/ in it becomes the trained lit dir.
        data: dialogues and micro-batches.
        loss: weights of the terms.
        optim: optimizer and schedule.
        run: machine and reporting.
        resume: auto goes on from the newest checkpoint of out_dir, none starts anew, or the path of a checkpoint.
        overwrite: replace an earlier run in out_dir.
        seed: of everything random.
    """
    settings = Settings(
        student, teacher, base or base_of(student), out_dir, data, loss, optim, run, resume, overwrite, seed
    )
    Trainer(settings).run()


def base_of(student: Path) -> Path:
    """The dense lit dir that a student was upcycled from: beside it, under the name in its provenance.yaml.

    Raises:
        UserError: no student there, or it does not say.
    """
    require_lit_dir(student, first="python scripts/upcycle_moe.py")
    source = read_provenance(student).get("upcycled", {}).get("source")
    if not source:
        raise UserError(f"{student}/provenance.yaml does not name the dense model it was made of: give it with --base")
    base = Path(student).parent / source
    if not base.is_dir():
        raise UserError(f"{base} is not there, the dense model that {student} was made of: give it with --base")
    return base


class Trainer:
    """One run. Making it checks every setting and file and reads the data and the weights; `run` trains.

    Args:
        settings: all of them.

    Raises:
        UserError: something is missing, or does not fit the rest; nothing has been written then.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        if not 0 <= settings.seed < 2**32:
            raise UserError(f"seed is {settings.seed}, expected 0 ... 4294967295")
        data = settings.data
        files = (*data.training_files().values(), *data.validation_files().values(), *data.own_teachers())
        for path in (settings.student, settings.base, settings.teacher, *files):
            rundir.refuse_input(settings.out_dir, path)
        if settings.optim.optimizer == "adamw8bit":
            strategy.torchao_optimizers()
        self.stop = StopRequest(seconds_of(settings.run.time_limit))
        self.start, checkpoint = rundir.load_start(settings.out_dir, settings.resume, overwrite=settings.overwrite)
        require_lit_dir(settings.student, first="python scripts/upcycle_moe.py")
        require_lit_dir(settings.base)
        self.tokenizer = Tokenizer(settings.student)
        self.config = Config.from_checkpoint(settings.student)
        self.parts = parts_of(settings.optim.trainable, self.config, read_provenance(settings.student))
        settings.optim = replace(settings.optim, trainable=list(self.parts))
        self.teacher: BaseTeacher | None = None
        self.own_teachers: dict[Path, BaseTeacher] = {}
        if settings.loss.kd_weight > 0:
            opened = partial(open_teacher, student=self.tokenizer, view=settings.loss.teacher_view)
            self.teacher = opened(settings.teacher)
            self.own_teachers = {path: opened(path) for path in data.own_teachers()}
        if settings.loss.on_policy > 0:
            refuse_unfit(self.teachers, self.tokenizer)
        self._check_lengths()

        settings.run = strategy.on_this_machine(settings.run)
        if settings.loss.on_policy > 0 and settings.run.strategy == "fsdp":
            # Each rank's replies have other lengths, and a sharded student needs all ranks at every token.
            raise UserError("loss.on_policy goes with one device or run.strategy ddp, not with fsdp")
        self.fabric = strategy.make_fabric(settings.run, settings.out_dir, checkpoint["step"] if checkpoint else 0)
        seed_everything(settings.seed, verbose=False)
        # One process tokenises; the others find its work in the cache.
        with self.fabric.rank_zero_first(local=True):
            self.loader = training_loader(
                data,
                self.tokenizer,
                seed=settings.seed,
                rank=self.fabric.global_rank,
                world_size=self.fabric.world_size,
            )
            # Every rank validates on everything: CKA of the whole set is no sum over ranks, and the set is small.
            self.val_loaders = validation_loaders(data, self.tokenizer)
        if self.fabric.is_global_zero:
            self.loader.say_dropped("training")
            for loader in self.val_loaders.values():
                loader.say_dropped("validation")
        self.views: list[TeacherView] = []
        self.val_views: dict[str, TeacherView] = {}
        if self.teacher:
            taught = data.own_teachers()
            theirs = {source for numbers in taught.values() for source in numbers}
            others = set(range(len(data.sources or {}))) - theirs
            self.views = [self.teacher.read(self.loader, others if theirs else None)]
            self.views += [self.own_teachers[path].read(self.loader, set(numbers)) for path, numbers in taught.items()]
            self.val_views = {name: self.teacher.read(loader) for name, loader in self.val_loaders.items()}
        per_epoch = len(self.loader) / settings.optim.accumulation
        self.steps = settings.optim.steps or math.ceil(settings.optim.epochs * per_epoch)
        settings.optim = replace(settings.optim, steps=self.steps)
        if checkpoint:
            if "digests" not in checkpoint:
                raise UserError(f"{self.start} is of an earlier version: start anew with --overwrite true")
            require_same(settings, checkpoint["settings"])
        self.digests: dict[str, str] = self.fabric.broadcast(
            digests(settings, teacher=self.teacher is not None) if self.fabric.is_global_zero else {}
        )
        if checkpoint:
            require_same_files(settings.out_dir, self.digests, checkpoint["digests"])
        self._print_plan()
        self._load_models()
        self.step = 0
        self.seconds = 0.0
        self.skipped = 0
        self.before: dict[str, Any] | None = None
        self.spikes = SpikeWatch(settings.run.spike_factor)
        self.first_choices: dict[int, Tensor] | None = None
        self.router_norms: dict[int, float] = {}
        self.metrics = rundir.MetricsFile(settings.out_dir / rundir.METRICS_FILE)
        if checkpoint:
            self._restore(checkpoint)

    @property
    def teachers(self) -> list[BaseTeacher]:
        """The run's own teacher, and those of single sources, in the order of `views`."""
        return [self.teacher, *self.own_teachers.values()] if self.teacher else []

    def _check_lengths(self) -> None:
        configs = {"student": self.config} | ({"teacher": self.teacher.config} if self.teacher else {})
        for name, config in (configs | {str(path): own.config for path, own in self.own_teachers.items()}).items():
            if config.block_size < self.settings.data.max_seq_length:
                raise UserError(
                    f"data.max_seq_length is {self.settings.data.max_seq_length}, "
                    f"and the {name} reads at most {config.block_size} tokens"
                )

    def _print_plan(self) -> None:
        """Say what the run needs of each device before anything large is read."""
        if not self.fabric.is_global_zero:
            return
        settings, device = self.settings, self.fabric.device
        plan = plan_memory(
            self.config,
            self.teacher.config if self.teacher else None,
            Config.from_checkpoint(settings.base),
            settings,
            world_size=self.fabric.world_size,
            device_bytes=device_memory(device),
            placement=Placement.of(settings, self.teacher, on_gpu=device.type == "cuda"),
            more_teachers=[own.config for own in self.own_teachers.values() if isinstance(own, OnlineTeacher)],
        )
        print(f"{plan.table()}\n{plan.verdict()}", flush=True)

    def _load_models(self) -> None:
        settings, run = self.settings, self.settings.run
        sharded = run.strategy == "fsdp"
        # What is to be spread over several devices need not fit on one.
        device = torch.device("cpu") if sharded else self.fabric.device
        student = load_model(settings.student, dtype=torch.float32, device=device)
        student.activation_checkpointing = run.activation_checkpointing
        thought_ids = self.tokenizer.thought_ids
        self.distiller = Distiller(student, thought_ids, settings.loss, self.parts).train()
        rate = settings.loss.bias_rate
        self.choice_bias = ChoiceBias(student, rate) if rate > 0 and student.config.is_moe else None
        # In fp32 under the student's autocast: at step 0 the two are then equal to the last bit.
        base = load_model(settings.base, dtype=torch.float32, device=device)
        self.reference = Reference(base, student, thought_ids, self.distiller.layers)
        self.anchor: Reference | TeacherReference = self.reference
        frozen: list[GPT] = [base]
        for teacher in self.teachers:
            dtype = torch.float32 if self.fabric.device.type == "cpu" else torch.bfloat16
            # Of a teacher that has run already no more than its head is read, which every process keeps.
            online = isinstance(teacher, OnlineTeacher)
            teacher.load(dtype=dtype, device=device if online else self.fabric.device)
            frozen += [teacher.model] if teacher.model else []
        if settings.loss.anchor_to == "teacher":
            if self.teacher is None or self.teacher.model is None:
                raise UserError("loss.anchor_to teacher needs a teacher that runs, not a cache or none")
            self.anchor = TeacherReference(self.teacher.model, self.config.n_layer, self.distiller.layers)
        if run.frozen_dtype == "bfloat16":
            strategy.store_frozen(student, torch.bfloat16)
            strategy.store_frozen(base, torch.bfloat16)
        if run.compile:
            for model in (student, *frozen):
                for block in model.transformer.h:
                    block.compile()
        if sharded:
            for model in frozen:
                mesh = cast(Any, self.fabric.strategy).device_mesh
                # The teacher's head is read by the loss.
                strategy.shard(model, mesh, whole=[cast(torch.nn.Parameter, model.lm_head.weight)], offload=run.offload)
        self.module = self.fabric.setup_module(self.distiller)
        self.on_policy: OnPolicy | None = None
        if settings.loss.on_policy > 0:
            self.on_policy = OnPolicy(
                self.distiller,
                self.tokenizer,
                self.loader,
                self.teachers,
                self.views,
                share=settings.loss.on_policy,
                temperature=settings.loss.on_policy_temperature,
                seed=settings.seed,
            )
        # After the module: FSDP has put parts in the place of its parameters.
        self.optimizer = strategy.make_optimizer(self.distiller, self.distiller.rows_parameters(), settings.optim)

    def run(self) -> None:
        """Train to the end, validate, write the report and `final/`."""
        deterministic = torch.are_deterministic_algorithms_enabled()
        # On a GPU this would forbid operations that have no deterministic kernel.
        torch.use_deterministic_algorithms(deterministic or self.fabric.device.type == "cpu")
        try:
            with self.stop:
                self._run()
        finally:
            torch.use_deterministic_algorithms(deterministic)

    def _run(self) -> None:
        run = self.settings.run
        self._first_alone(self._prepare_directory)
        if self.before is None:
            self.before = self._validate()
        batches = self.loader.forever()
        begun = time.perf_counter() - self.seconds
        tokens, work, busy, reported = 0.0, 0.0, 0.0, 0
        peak = peak_flops(torch.cuda.get_device_name()) if self.fabric.device.type == "cuda" else None
        bar = tqdm(
            total=self.steps,
            initial=self.step,
            desc="distil",
            unit="step",
            disable=None if self.fabric.is_global_zero else True,
        )
        while self.step < self.steps:
            started = time.perf_counter()
            metrics = self._train_step(batches)
            self.step += 1
            tokens, busy = tokens + metrics["tokens"], busy + time.perf_counter() - started
            work += self.work
            reported += 1
            bar.update()
            if self.step % run.log_every == 0 or self.step == self.steps:
                metrics["tokens_per_second"] = tokens / busy
                if peak:
                    metrics["mfu"] = work / (busy * self.fabric.world_size * peak)
                metrics["eta_seconds"] = (self.steps - self.step) * busy / reported
                self._log(metrics)
                shown = ("loss", "ce", "kd", "cka", "balance", "expert_max_over_mean", "tokens_per_second")
                bar.set_postfix_str(" ".join(f"{name} {metrics[name]:.4g}" for name in shown))
                tokens, work, busy, reported = 0.0, 0.0, 0.0, 0
            self.seconds = time.perf_counter() - begun
            if self.step % run.val_every == 0 and self.step < self.steps:
                self._validate()
            if self.stop.agreed or (self.step % run.save_every == 0 and self.step < self.steps):
                self._save()
            if self.stop.agreed:
                bar.close()
                if self.fabric.is_global_zero:
                    print(
                        f"stopped at step {self.step} of {self.steps}, saved; the same command goes on", file=sys.stderr
                    )
                raise SystemExit(STOPPED_EXIT_CODE)
        bar.close()
        self._finish()

    def _prepare_directory(self) -> None:
        settings = self.settings
        rundir.clear(settings.out_dir, everything=settings.overwrite and self.start is None)
        rundir.set_aside_newer(settings.out_dir, self.start)
        rundir.keep_logs_up_to(settings.out_dir, self.step if self.start else -1)
        self._write_hyperparameters()
        if settings.run.save_every >= self.steps:
            print(f"{self.steps} steps: run.save_every {settings.run.save_every} writes no checkpoint before the end")

    def _train_step(self, batches: Iterator[Any]) -> dict[str, float]:
        """One optimizer step over `accumulation` micro-batches; returns the step's global metrics."""
        settings, fabric = self.settings, self.fabric
        micros = [self._micro_batch(next(batches), number) for number in range(settings.optim.accumulation)]
        counted = sum((micro.counts.as_tensor() for micro in micros), torch.zeros(4, dtype=torch.float64))
        totals = Totals(*self._sum_over_ranks(counted.to(fabric.device)).tolist())
        cka_weight = self.settings.loss.cka_weight_at(self.step, self.steps)
        self.work = self._flops(totals, cka_weight)
        learning_rate = lr_at(self.step, self.steps, settings.optim)
        for group in self.optimizer.param_groups:
            # torchao keeps its rate as a tensor, which compiled code reads.
            group["lr"] = group["lr"].fill_(learning_rate) if isinstance(group["lr"], Tensor) else learning_rate
        router_weight = settings.loss.router_weight_at(self.step, self.steps)
        bias_scale = let_go(self.step, self.steps, settings.loss.bias_fraction)
        if self.choice_bias:
            self.choice_bias.scale(bias_scale)
        if len(micros) * fabric.world_size > 1:
            self._survey(micros, totals, cka_weight, router_weight)

        losses, parts, load_sums = [], [], []
        for number, micro in enumerate(micros, start=1):
            self._consult(micro, cka_weight)
            # FSDP's gradients would pile up whole; it adds up its parts after every micro-batch.
            waits = number < len(micros) and settings.run.strategy != "fsdp"
            with fabric.no_backward_sync(self.module, enabled=waits):
                loss, terms = self.module(micro, totals, cka_weight, router_weight)
                # Gradients are averaged over ranks, but the ranks' shares are to be added up.
                fabric.backward(loss * fabric.world_size)
            losses.append(loss.detach())
            parts.append(terms.terms)
            load_sums.append(terms.load_LE)
            micro.teachers, micro.reference = [], {}
        local = torch.stack(losses).double()
        asked = local.new_tensor([float(bool(self.stop))])
        sums = self._sum_over_ranks(torch.cat((local.sum()[None], torch.stack(parts).sum(0), asked)))
        step_load_LE = self._sum_over_ranks(torch.stack(load_sums).sum(0))
        self.stop.agreed = float(sums[-1]) > 0
        norms = self._clip()
        finite = math.isfinite(float(sums[0]) + norms["grad_norm"])
        if finite:
            self.optimizer.step()
            self.skipped = 0
            if self.choice_bias and bias_scale == 1:
                self.choice_bias.update(step_load_LE)
        else:
            self._skip_or_stop(local, micros)
        self.optimizer.zero_grad()
        values = sums.tolist()
        if finite and (threshold := self.spikes.see(values[0])) is not None:
            self._note_event("spike", micros, loss=values[0], threshold=threshold)
        return {
            "loss": values[0],
            "ce": values[1],
            "kd": values[2],
            "cka": 1 - values[3] if cka_weight > 0 and self.settings.loss.anchor == "cka" else math.nan,
            **({} if self.settings.loss.anchor == "cka" else {"anchor": values[3] if cka_weight > 0 else math.nan}),
            "balance": values[4],
            "router_z": values[5],
            "cka_weight": cka_weight,
            "router_weight": router_weight,
            **({"choice_bias": float(self.choice_bias.bias_LE.abs().max()) * bias_scale} if self.choice_bias else {}),
            "lr": learning_rate,
            **norms,
            **_extremes(step_load_LE),
            "tokens": totals.tokens,
            "on_policy": sum(micro.generated for micro in micros) / len(micros),
        } | ({} if finite else {"skipped": 1.0})

    def _micro_batch(self, batch: Batch, number: int) -> MicroBatch:
        """The step's micro-batch `number`, perhaps with the student's own replies."""
        views = self.views
        generated = self.on_policy is not None and self.on_policy.chosen(self.step, number)
        if self.on_policy is not None and generated:
            with self.fabric.autocast():
                batch, views = self.on_policy.batch(batch, self.step, number, self.fabric.global_rank)
        return MicroBatch(batch, self.settings.loss, views, self.fabric.device, generated=generated)

    def _flops(self, totals: Totals, cka_weight: float) -> float:
        """What the step's model FLOPs are, for MFU; of a teacher that has run already there is its head at most."""
        return step_flops(
            self.config,
            self.teacher.config if self.teacher and self.teacher.model else None,
            self.anchor.model.config if cka_weight > 0 else None,
            self.settings,
            tokens=totals.tokens,
            kd_tokens=totals.kd,
            world_size=self.fabric.world_size,
            more_teachers=[
                (own.config, self.settings.data.token_share(path))
                for path, own in self.own_teachers.items()
                if own.model
            ],
        ).model

    def _survey(self, micros: list[MicroBatch], totals: Totals, cka_weight: float, router_weight: float) -> None:
        """What must be known of the whole step before its first backward: the experts' loads, and CKA's moments.

        Both terms are no sums over tokens: the balance loss multiplies each expert's share of the step with its
        probability, CKA compares each row with all others. So the student (and for CKA the base) reads the step once
        more, without gradient. Nothing is kept but sums, however many micro-batches there are.
        """
        kind = self.settings.loss.anchor
        with_cka = cka_weight > 0 and totals.cka >= MINIMUM_ROWS and kind != "mse"  # which is a sum over tokens
        if not with_cka and router_weight == 0:
            return
        step_cka = StepCka(self._sum_over_ranks, root=kind == "root_cka") if with_cka else None
        loads = []
        for micro in micros:
            with self.fabric.autocast():
                layers = self.distiller.layers if with_cka else []
                load_LE, states = self.distiller.survey(micro.batch, micro.real_N, layers)
                reference = self.anchor.hidden_states(micro.batch) if with_cka else {}
            loads.append(load_LE)
            if step_cka:
                step_cka.update(states, reference, micro.cka_BT)
        if step_cka:
            step_cka.finish()
        load_LE = self._sum_over_ranks(torch.stack(loads).sum(0))
        for micro in micros:
            micro.load_LE, micro.step_cka = load_LE, step_cka

    def _consult(self, micro: MicroBatch, cka_weight: float) -> None:
        """Let teachers and base read the micro-batch, each only if its term weighs anything."""
        # A teacher that is spread over processes must be asked by all of them, whoever has rows for it.
        always = self.settings.run.strategy == "fsdp" or len(self.teachers) == 1
        micro.teachers = [
            teacher.targets(side, micro.targets_N.numel()) if side.rows or always else None
            for teacher, side in zip(self.teachers, micro.teacher_batches, strict=True)
        ]
        if cka_weight > 0:
            with self.fabric.autocast():
                micro.reference = self.anchor.hidden_states(micro.batch)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return cast(Tensor, self.fabric.all_reduce(values, reduce_op="sum"))

    def _clip(self) -> dict[str, float]:
        """Scale the gradient down to its largest norm; returns the norms before, of all of it and by group."""
        groups: dict[str, list[Tensor]] = {}
        for name, parameter in self.distiller.named_parameters():
            if parameter.grad is not None:
                group = next((group for mark, group in _GROUPS.items() if mark in name), "others")
                groups.setdefault(group, []).append(parameter.grad)
        norms = {f"grad_norm_{group}": float(strategy.norm(gradients)) for group, gradients in groups.items()}
        if (self.step + 1) % self.settings.run.val_every == 0 or self.step + 1 == self.steps:
            self.router_norms = {
                layer: float(strategy.norm([block.mlp.gate.weight.grad]))
                for layer, block in enumerate(self.distiller.student.transformer.h)
                if isinstance(block.mlp, LLaMAMoE) and block.mlp.gate.weight.grad is not None
            }
        total = math.hypot(*norms.values())
        if total > self.settings.optim.clip:
            for gradient in (gradient for gradients in groups.values() for gradient in gradients):
                gradient.mul_(self.settings.optim.clip / total)
        return {"grad_norm": total, **norms}

    def _skip_or_stop(self, losses: Tensor, micros: list[MicroBatch]) -> None:
        """The step's loss or gradient is not finite: leave the step out, or end the run.

        Raises:
            UserError: `run.on_nonfinite` says so, or too many steps in a row were left out.
        """
        run = self.settings.run
        bad = [micro for micro, value in zip(micros, losses.tolist(), strict=True) if not math.isfinite(value)]
        found = bool(float(self._sum_over_ranks(losses.new_tensor([float(len(bad))]))))
        named = self._note_event("nonfinite", bad if found else micros, where="loss" if found else "gradient")
        self.skipped += 1
        if run.on_nonfinite == "skip" and self.skipped <= run.max_skips:
            return
        where = f"in a micro-batch of the records {', '.join(named)}" if found else "in the gradient"
        often = f", {self.skipped} times in a row" if self.skipped > 1 else ""
        raise UserError(
            f"step {self.step + 1}: the loss is no longer finite{often}, {where}; the last checkpoint is as it was: "
            "lower optim.lr, or look at these records"
        )

    def _note_event(self, event: str, micros: list[MicroBatch], **more: Any) -> list[str]:
        """Write a step's event with the ids of the records of all ranks' micro-batches to events.jsonl."""
        ids = [self.loader.records[i].id for micro in micros for row in micro.batch.records for i in row]
        gathered: list[list[str]] = [ids] * self.fabric.world_size
        if self.fabric.world_size > 1:
            torch.distributed.all_gather_object(gathered, ids)
        ids = [identity for of_rank in gathered for identity in of_rank]
        if self.fabric.is_global_zero:
            path = self.settings.out_dir / rundir.EVENTS_FILE
            rundir.append_jsonl(path, {"step": self.step + 1, "event": event, **more, "records": ids})
        return ids

    def _log(self, values: Mapping[str, float]) -> None:
        if self.fabric.is_global_zero:
            self.metrics.append(self.step, values)
        self.fabric.log_dict(values, self.step)

    def _first_alone(self, work: Callable[[], object]) -> None:
        """Let process 0 do it while the others wait; a user's mistake in it ends them all, with one line."""
        complaint = None
        if self.fabric.is_global_zero:
            try:
                work()
            except UserError as error:
                complaint = str(error)
        complaint = self.fabric.broadcast(complaint)
        if complaint is not None:
            raise UserError(complaint) if self.fabric.is_global_zero else SystemExit(USER_ERROR_EXIT_CODE)

    def _validate(self) -> dict[str, Any]:
        choices = Choices()
        scored = {
            name: evaluate(
                self.distiller,
                loader,
                teacher=self.teacher,
                view=self.val_views.get(name),
                reference=self.reference,
                device=self.fabric.device,
                autocast=self.fabric.autocast,
                choices=choices if name == "val" else None,
            )
            for name, loader in self.val_loaders.items()
        }
        metrics = scored.pop("val")
        for name, further in scored.items():
            self._log({f"val_{name}/{key}": further[key] for key in VALIDATED if further[key] is not None})
        means = {name: metrics[name] for name in VALIDATED if metrics[name] is not None}
        flat = means | {f"cka_{layer}": value for layer, value in metrics["cka"].items() if value is not None}
        if metrics["expert_max_over_mean"]:
            flat["expert_max_over_mean"] = max(metrics["expert_max_over_mean"].values())
            flat |= self._see_routing(metrics["router"], choices.result())
        self._log({f"val/{name}": value for name, value in flat.items()})
        with self.fabric.autocast():
            dialogues = [record for record in self.val_loaders["val"].records if record.messages]
            samples = answer(self.distiller, dialogues[: self.settings.run.samples], self.tokenizer)
        if self.fabric.is_global_zero:
            path = self.settings.out_dir / rundir.SAMPLES_FILE
            rundir.append_jsonl(path, *({"step": self.step} | sample for sample in samples))
            tqdm.write(f"step {self.step}/{self.steps}  " + "  ".join(f"{k} {v:.4f}" for k, v in flat.items()))
        return {"step": self.step} | metrics | ({"more_val": scored} if scored else {})

    def _see_routing(self, router: dict[str, dict[str, float]], choices: dict[int, Tensor]) -> dict[str, float]:
        """Add to each layer what changed since step 0, write routing.jsonl, and give the means over layers."""
        path = self.settings.out_dir / rundir.FIRST_CHOICES_FILE
        if self.first_choices is None:
            if self.step and path.is_file():
                self.first_choices = torch.load(path, weights_only=True)
            else:
                self.first_choices = choices
                self._first_alone(lambda: rundir.save_tensors(path, choices))
        for layer, change in routing_change(self.first_choices, choices).items():
            router[str(layer)] |= {"changed": change.any, "changed_top1": change.top1}
            if layer in self.router_norms:
                router[str(layer)]["grad_norm"] = self.router_norms[layer]
        if self.fabric.is_global_zero:
            layers = [{"layer": int(layer), **values} for layer, values in router.items()]
            rundir.append_jsonl(self.settings.out_dir / rundir.ROUTING_FILE, {"step": self.step, "layers": layers})
        shown = ("max_vio", "max_vio_batch", "entropy_of_mean", "z", "changed")
        means = {f"router_{name}": sum(own[name] for own in router.values()) / len(router) for name in shown}
        return means | {f"router_{name}": sum(own[name] for own in router.values()) for name in ("dead", "cold")}

    def _save(self) -> None:
        model, optimizer = strategy.full_states(self.distiller, self.optimizer)
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "settings": self.settings.plain(),
            "digests": self.digests,
            "before": self.before,
            "schedule": {
                "lr": lr_at(self.step, self.steps, self.settings.optim),
                "cka_weight": self.settings.loss.cka_weight_at(self.step, self.steps),
            },
            "spikes": self.spikes.state_dict(),
            "skipped": self.skipped,
            "choice_bias": self.choice_bias.bias_LE.cpu() if self.choice_bias else None,
            "model": model,
            "optimizer": optimizer,
            "loader": self.loader.state_dict(),
            "rng": rundir.rng_state(),
        }
        out_dir, keep = self.settings.out_dir, self.settings.run.keep_checkpoints
        self._first_alone(lambda: rundir.save_checkpoint(out_dir, self.step, state, keep=keep))

    def _restore(self, state: dict[str, Any]) -> None:
        strategy.set_full_states(self.distiller, self.optimizer, state["model"], state["optimizer"])
        loader = state["loader"]
        if micro_batches(state["settings"]) == micro_batches(self.settings.plain()):
            loader = moved_loader(loader, self.fabric.world_size)
        self.loader.load_state_dict(loader)
        self.step, self.seconds, self.before = state["step"], state["seconds"], state["before"]
        self.skipped = state["skipped"]
        if self.choice_bias:
            self.choice_bias.bias_LE.copy_(state["choice_bias"])
        self.spikes.load_state_dict(state["spikes"])
        rundir.set_rng_state(state["rng"])

    def _finish(self) -> None:
        if self.choice_bias:
            self.choice_bias.remove()
        finish.round_to_stored(self.distiller, self.settings.student)
        report = {
            "before": self.before,
            "after": self._validate(),
            "training": {
                "steps": self.steps,
                "seconds": round(self.seconds, 1),
                "train_dialogues": len(self.loader.records),
                "train_dialogues_too_long": self.loader.dropped,
                "val_dialogues": len(self.val_loaders["val"].records),
                "val_dialogues_too_long": self.val_loaders["val"].dropped,
                "padding_share": round(self.loader.padding_share, 4),
            }
            | self._sources(),
        }
        (state,) = strategy.full_states(self.distiller)

        def write() -> None:
            finish.write_final(
                self.settings.out_dir,
                self.settings.student,
                self.distiller.student_state(state),
                self.config,
                learnt_rows=(self.tokenizer.thought_ids or ()) if self.distiller.rows else (),
                parts=self.parts,
                report=report,
                provenance=self._provenance(),
            )

        self._first_alone(write)
        for logger in self.fabric.loggers:
            logger.finalize("success")
        self._first_alone(lambda: write_report(self.settings.out_dir))

    def _sources(self) -> dict[str, Any]:
        """What each source of a mixture has given; empty without one."""
        if not isinstance(self.loader, MixtureLoader):
            return {}
        return {"sources": {name: asdict(report) for name, report in self.loader.report().items()}}

    def _provenance(self) -> dict[str, Any]:
        return {
            "settings": self.settings.plain(),
            "world_size": self.fabric.world_size,
            **{f"{name.removeprefix('data.')}_sha256": digest for name, digest in self.digests.items()},
        }

    def _write_hyperparameters(self) -> None:
        """Every setting as resolved; the file is a `--config` that repeats the run, but never replaces one."""
        settings = {key: value for key, value in self.settings.plain().items() if key not in ("resume", "overwrite")}
        with atomic_file(self.settings.out_dir / "hyperparameters.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def _extremes(load_LE: Tensor) -> dict[str, float]:
    """The busiest and the idlest expert of all layers against their layer's mean; NaN for a dense student."""
    relative_LE = load_LE / load_LE.mean(1, keepdim=True) if load_LE.numel() else load_LE.new_full((1, 1), math.nan)
    return {"expert_max_over_mean": float(relative_LE.max()), "expert_min_over_mean": float(relative_LE.min())}


if __name__ == "__main__":
    run_cli(distill)
