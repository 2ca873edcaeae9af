"""Teach the upcycled mixture of experts: `python train_distill.py --config configs/distill.yaml`.

Reads a student (upcycled lit dir), a teacher, the dense base and dialogues; writes a run directory whose `final/` is a
lit dir again. Only routers, experts and the two thought tokens' rows learn. A killed run goes on from its last
checkpoint, on a CPU bit for bit. The step's loss is in `litgpt/distill.py`, the run directory in `litgpt/rundir.py`.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from lightning.fabric import Fabric, seed_everything
from lightning.fabric.loggers.csv_logs import CSVLogger
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from torch import Tensor
from tqdm import tqdm

from litgpt import rundir
from litgpt.checkpoint import load_model, load_state, read_provenance, require_lit_dir, save_lit_dir
from litgpt.config import Config
from litgpt.data import PackedLoader, read_records
from litgpt.cka import MINIMUM_ROWS
from litgpt.distill import Distiller, MicroBatch, Reference, StepCka, Totals, evaluate
from litgpt.losses import falling_weight
from litgpt.recipe import DataSettings, LossSettings, OptimSettings, RunSettings, Settings, lr_at, require_same
from litgpt.teacher import OnlineTeacher
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, atomic_file, run_cli, sha256_file


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
        teacher: lit dir of the teacher; its tokenizer must be the student's.
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
        for path in (settings.student, settings.base, settings.teacher, data.train, data.val):
            rundir.refuse_input(settings.out_dir, path)
        self.start = rundir.start_point(settings.out_dir, settings.resume, overwrite=settings.overwrite)
        checkpoint = rundir.load_checkpoint(self.start) if self.start else None
        require_lit_dir(settings.student, first="python scripts/upcycle_moe.py")
        require_lit_dir(settings.base)
        self.tokenizer = Tokenizer(settings.student)
        self.config = Config.from_checkpoint(settings.student)
        records = {name: read_records(getattr(settings.data, name)) for name in ("train", "val")}
        self.teacher: OnlineTeacher | None = None
        if settings.loss.kd_weight > 0:
            require_lit_dir(settings.teacher)
            self.teacher = OnlineTeacher(settings.teacher, self.tokenizer, view=settings.loss.teacher_view)
        self._check_lengths()

        self.fabric = self._make_fabric()
        seed_everything(settings.seed, verbose=False)
        packed = partial(
            PackedLoader,
            tokenizer=self.tokenizer,
            max_seq_length=settings.data.max_seq_length,
            micro_batch_size=settings.data.micro_batch_size,
            seed=settings.seed,
        )
        self.loader = packed(records["train"], rank=self.fabric.global_rank, world_size=self.fabric.world_size)
        # Every rank validates on everything: CKA of the whole set is no sum over ranks, and the set is small.
        self.val_loader = packed(records["val"], shuffle=False)
        if self.fabric.is_global_zero:
            self.loader.say_dropped("training")
            self.val_loader.say_dropped("validation")
        self.view = self.teacher.read(self.loader) if self.teacher else None
        self.val_view = self.teacher.read(self.val_loader) if self.teacher else None
        per_epoch = len(self.loader) / settings.optim.accumulation
        self.steps = settings.optim.steps or math.ceil(settings.optim.epochs * per_epoch)
        settings.optim = replace(settings.optim, steps=self.steps)
        if checkpoint:
            require_same(settings, checkpoint["settings"])
        self._load_models()
        self.step = 0
        self.seconds = 0.0
        self.before: dict[str, Any] | None = None
        if checkpoint:
            self._restore(checkpoint)

    def _check_lengths(self) -> None:
        configs = {"student": self.config, "teacher": self.teacher.config if self.teacher else self.config}
        for name, config in configs.items():
            if config.block_size < self.settings.data.max_seq_length:
                raise UserError(
                    f"data.max_seq_length is {self.settings.data.max_seq_length}, "
                    f"and the {name} reads at most {config.block_size} tokens"
                )

    def _make_fabric(self) -> Fabric:
        run, out_dir = self.settings.run, self.settings.out_dir
        on_gpu = run.accelerator == "cuda" or (run.accelerator == "auto" and torch.cuda.is_available())
        if on_gpu and run.devices > torch.cuda.device_count():
            raise UserError(f"run.devices is {run.devices}, and this machine has {torch.cuda.device_count()} GPUs")
        precision = ("bf16-mixed" if on_gpu else "32-true") if run.precision == "auto" else run.precision
        self.settings.run = replace(run, precision=precision)
        logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
        # The logger says that it deletes an earlier metrics.csv; `_restore` writes its lines again.
        warnings.filterwarnings("ignore", message="Experiment logs directory")
        fabric = Fabric(
            accelerator="cuda" if on_gpu else "cpu",
            devices=run.devices,
            num_nodes=run.num_nodes,
            strategy=run.strategy,
            precision=precision,
            loggers=[
                CSVLogger(out_dir, name="", version="", flush_logs_every_n_steps=1),
                TensorBoardLogger(out_dir, name="tensorboard", version=""),
            ],
        )
        fabric.launch()
        return fabric

    def _load_models(self) -> None:
        settings, device = self.settings, self.fabric.device
        student = load_model(settings.student, dtype=torch.float32, device=device)
        student.activation_checkpointing = settings.run.activation_checkpointing
        thought_ids = self.tokenizer.thought_ids
        shared = self.teacher.shared_vocab_size if self.teacher else None
        self.distiller = Distiller(student, thought_ids, settings.loss, shared).train()
        # In fp32 under the student's autocast: at step 0 the two are then equal to the last bit.
        base = load_model(settings.base, dtype=torch.float32, device=device)
        self.reference = Reference(base, student, thought_ids, self.distiller.layers)
        if self.teacher:
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
            self.teacher.load(dtype=dtype, device=device)
        rows = self.distiller.rows_parameters()
        matrices = [p for p in student.parameters() if p.requires_grad]
        optim = settings.optim
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": rows, "weight_decay": 0.0}],
            lr=optim.lr,
            betas=optim.betas,
            fused=device.type == "cuda",
        )
        self.module, self.optimizer = self.fabric.setup(self.distiller, optimizer)

    def run(self) -> None:
        """Train to the end, validate, write the report and `final/`."""
        deterministic = torch.are_deterministic_algorithms_enabled()
        # On a GPU this would forbid operations that have no deterministic kernel.
        torch.use_deterministic_algorithms(deterministic or self.fabric.device.type == "cpu")
        try:
            self._run()
        finally:
            torch.use_deterministic_algorithms(deterministic)

    def _run(self) -> None:
        settings, run = self.settings, self.settings.run
        if self.fabric.is_global_zero:
            rundir.clear(settings.out_dir, everything=settings.overwrite and self.start is None)
            self._write_hyperparameters()
            if run.save_every >= self.steps:
                print(f"{self.steps} steps: run.save_every {run.save_every} writes no checkpoint before the end")
        self.fabric.barrier()
        if self.before is None:
            self.before = self._validate()
        batches = self.loader.forever()
        begun = time.perf_counter() - self.seconds
        tokens, busy = 0.0, 0.0
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
            bar.update()
            if self.step % run.log_every == 0 or self.step == self.steps:
                metrics["tokens_per_second"] = tokens / busy
                self.fabric.log_dict(metrics, self.step)
                shown = ("loss", "ce", "kd", "cka", "balance", "expert_max_over_mean", "tokens_per_second")
                bar.set_postfix_str(" ".join(f"{name} {metrics[name]:.4g}" for name in shown))
                tokens, busy = 0.0, 0.0
            self.seconds = time.perf_counter() - begun
            if self.step % run.val_every == 0 and self.step < self.steps:
                self._validate()
            if self.step % run.save_every == 0 and self.step < self.steps:
                self._save()
        bar.close()
        self._finish(self._validate())

    def _train_step(self, batches: Iterator[Any]) -> dict[str, float]:
        """One optimizer step over `accumulation` micro-batches; returns the step's global metrics."""
        settings, fabric = self.settings, self.fabric
        optim = settings.optim
        micros = [MicroBatch(next(batches), settings.loss, self.view, fabric.device) for _ in range(optim.accumulation)]
        counted = sum((micro.counts.as_tensor() for micro in micros), torch.zeros(4, dtype=torch.float64))
        totals = Totals(*self._sum_over_ranks(counted.to(fabric.device)).tolist())
        cka_weight = self._cka_weight()
        learning_rate = lr_at(self.step, self.steps, optim)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if len(micros) * fabric.world_size > 1:
            self._survey(micros, totals, cka_weight)

        losses, parts, load_sums = [], [], []
        for number, micro in enumerate(micros, start=1):
            self._consult(micro, cka_weight)
            with fabric.no_backward_sync(self.module, enabled=number < len(micros)):
                loss, terms = self.module(micro, totals, cka_weight)
                # DDP averages gradients over ranks, but the ranks' shares are to be added up.
                fabric.backward(loss * fabric.world_size)
            losses.append(loss.detach())
            parts.append(terms.terms)
            load_sums.append(terms.load_LE)
            micro.teacher, micro.reference = None, {}
        local = torch.stack(losses)
        sums = self._sum_over_ranks(torch.cat((local.double().sum()[None], torch.stack(parts).sum(0))))
        step_load_LE = self._sum_over_ranks(torch.stack(load_sums).sum(0))
        norm = fabric.clip_gradients(self.module, self.optimizer, max_norm=optim.clip, error_if_nonfinite=False)
        assert norm is not None  # only DeepSpeed keeps it to itself
        if not math.isfinite(float(sums[0]) + float(norm)):
            raise UserError(self._not_finite(local, micros))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.distiller.rows is not None:
            self.distiller.rows.write_back(self.distiller.student)
        values = sums.tolist()
        return {
            "loss": values[0],
            "ce": values[1],
            "kd": values[2],
            "cka": 1 - values[3] if cka_weight > 0 else math.nan,
            "balance": values[4],
            "cka_weight": cka_weight,
            "lr": learning_rate,
            "grad_norm": float(norm),
            "expert_max_over_mean": float((step_load_LE.amax(1) / step_load_LE.mean(1)).max()),
            "tokens": totals.tokens,
        }

    def _cka_weight(self) -> float:
        loss = self.settings.loss
        return falling_weight(
            self.step, self.steps, start=loss.cka_weight, end=loss.cka_weight_end, fraction=loss.cka_fraction
        )

    def _survey(self, micros: list[MicroBatch], totals: Totals, cka_weight: float) -> None:
        """What must be known of the whole step before its first backward: the experts' loads, and CKA's moments.

        Both terms are no sums over tokens: the balance loss multiplies each expert's share of the step with its
        probability, CKA compares each row with all others. So the student (and for CKA the base) reads the step once
        more, without gradient. Nothing is kept but sums, however many micro-batches there are.
        """
        with_cka = cka_weight > 0 and totals.cka >= MINIMUM_ROWS
        if not with_cka and self.settings.loss.router_weight == 0:
            return
        step_cka = StepCka(self._sum_over_ranks) if with_cka else None
        loads = []
        for micro in micros:
            with self.fabric.autocast():
                layers = self.distiller.layers if with_cka else []
                load_LE, states = self.distiller.survey(micro.batch, micro.real_N, layers)
                reference = self.reference.hidden_states(micro.batch) if with_cka else {}
            loads.append(load_LE)
            if step_cka:
                step_cka.update(states, reference, micro.cka_BT)
        if step_cka:
            step_cka.finish()
        load_LE = self._sum_over_ranks(torch.stack(loads).sum(0))
        for micro in micros:
            micro.load_LE, micro.step_cka = load_LE, step_cka

    def _consult(self, micro: MicroBatch, cka_weight: float) -> None:
        """Let teacher and base read the micro-batch, each only if its term weighs anything."""
        if self.teacher and micro.teacher_batch:
            micro.teacher = self.teacher.targets(micro.teacher_batch, micro.targets_N.numel())
        if cka_weight > 0:
            with self.fabric.autocast():
                micro.reference = self.reference.hidden_states(micro.batch)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return cast(Tensor, self.fabric.all_reduce(values, reduce_op="sum"))

    def _not_finite(self, losses: Tensor, micros: list[MicroBatch]) -> str:
        bad = [micro for micro, value in zip(micros, losses, strict=True) if not math.isfinite(float(value))]
        named = [self.loader.records[i].id for micro in bad for row in micro.batch.records for i in row]
        where = f"in a micro-batch of the records {', '.join(named)}" if named else "in the gradient"
        return (
            f"step {self.step + 1}: the loss is no longer finite, {where}; the last checkpoint is as it was: "
            "lower optim.lr, or look at these records"
        )

    def _validate(self) -> dict[str, Any]:
        metrics = evaluate(
            self.distiller,
            self.val_loader,
            teacher=self.teacher,
            view=self.val_view,
            reference=self.reference,
            device=self.fabric.device,
            autocast=self.fabric.autocast,
        )
        means = {name: metrics[name] for name in ("answer_ce", "thought_ce", "kd_kl") if metrics[name] is not None}
        flat = means | {f"cka_{layer}": value for layer, value in metrics["cka"].items() if value is not None}
        flat["expert_max_over_mean"] = max(metrics["expert_max_over_mean"].values())
        self.fabric.log_dict({f"val/{name}": value for name, value in flat.items()}, self.step)
        if self.fabric.is_global_zero:
            tqdm.write(f"step {self.step}/{self.steps}  " + "  ".join(f"{k} {v:.4f}" for k, v in flat.items()))
        return {"step": self.step} | metrics

    def _save(self) -> None:
        if self.fabric.is_global_zero:
            state = {
                "step": self.step,
                "seconds": self.seconds,
                "settings": self.settings.plain(),
                "before": self.before,
                "schedule": {"lr": lr_at(self.step, self.steps, self.settings.optim), "cka_weight": self._cka_weight()},
                "model": self.distiller.student.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "loader": self.loader.state_dict(),
                "rng": rundir.rng_state(),
            }
            rundir.save_checkpoint(self.settings.out_dir, self.step, state)
        self.fabric.barrier()

    def _restore(self, state: dict[str, Any]) -> None:
        self.distiller.student.load_state_dict(state["model"])
        if self.distiller.rows is not None:
            self.distiller.rows.read_from(self.distiller.student)
        self.optimizer.load_state_dict(state["optimizer"])
        self.loader.load_state_dict(state["loader"])
        self.step, self.seconds, self.before = state["step"], state["seconds"], state["before"]
        rundir.set_rng_state(state["rng"])
        self._keep_metrics_up_to(self.step)

    def _finish(self, after: dict[str, Any]) -> None:
        """Prove that nothing else moved, then write the report and, last, `final/`."""
        if self.fabric.is_global_zero:
            settings = self.settings
            source = load_state(settings.student)
            # In the student's own dtype: frozen weights were widened to fp32 and come back unchanged.
            state = {
                name: tensor.detach().cpu().to(source[name].dtype)
                for name, tensor in self.distiller.student.state_dict().items()
            }
            frozen = compare_frozen(state, source, self.tokenizer.thought_ids or ())
            report = {
                "before": self.before,
                "after": after,
                "frozen": frozen,
                "training": {
                    "steps": self.steps,
                    "seconds": round(self.seconds, 1),
                    "train_dialogues": len(self.loader.records),
                    "train_dialogues_too_long": self.loader.dropped,
                    "val_dialogues": len(self.val_loader.records),
                    "val_dialogues_too_long": self.val_loader.dropped,
                },
            }
            with atomic_file(settings.out_dir / "report" / "metrics.json") as temporary:
                temporary.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            if frozen["changed"]:
                raise RuntimeError(f"frozen tensors changed in training: {', '.join(frozen['changed'])}")
            save_lit_dir(
                settings.out_dir / rundir.FINAL,
                state,
                self.config,
                source_dir=settings.student,
                provenance={
                    key: value
                    for key, value in read_provenance(settings.student).items()
                    if key not in ("tool", "tie_embeddings")  # the writer's own
                }
                | {"distilled": self._provenance()},
            )
        self.fabric.barrier()
        for logger in self.fabric.loggers:
            logger.finalize("success")

    def _provenance(self) -> dict[str, Any]:
        data = self.settings.data
        return {
            "settings": self.settings.plain(),
            "world_size": self.fabric.world_size,
            "train_sha256": sha256_file(data.train),
            "val_sha256": sha256_file(data.val),
        }

    def _write_hyperparameters(self) -> None:
        """Every setting as resolved; the file is a `--config` that repeats the run, but never replaces one."""
        settings = {key: value for key, value in self.settings.plain().items() if key not in ("resume", "overwrite")}
        with atomic_file(self.settings.out_dir / "hyperparameters.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")

    def _keep_metrics_up_to(self, step: int) -> None:
        """Carry the lines of metrics.csv that the checkpoint knows of into the new logger, which starts it afresh."""
        path = self.settings.out_dir / "metrics.csv"
        if not self.fabric.is_global_zero or not path.is_file():
            return
        with path.open(encoding="utf-8", newline="") as file:
            # A kill may have cut the last line.
            lines = [line for line in csv.DictReader(file) if (line["step"] or "").isdecimal()]
        lines = [line for line in lines if int(line["step"]) <= step]
        for line in lines:
            values = {name: float(value) for name, value in line.items() if value and name != "step"}
            self.fabric.loggers[0].log_metrics(values, int(line["step"]))


def compare_frozen(
    state: Mapping[str, Tensor], source: Mapping[str, Tensor], learnt_rows: Sequence[int]
) -> dict[str, Any]:
    """Compare what must not have moved, bit by bit: everything but routers, experts and the learnt embedding rows.

    Args:
        state: the trained student by memory names, in the dtypes of `source`.
        source: the student before training.
        learnt_rows: rows of embedding and head that were trained.

    Returns:
        `compared` (tensors), `identical` (how many of them) and `changed` (the names of the others).
    """
    changed, compared = [], 0
    for name, before in source.items():
        if ".mlp.gate." in name or ".mlp.experts." in name:
            continue
        after = state[name]
        if name in ("transformer.wte.weight", "lm_head.weight"):
            kept = torch.ones(len(before), dtype=torch.bool)
            kept[list(learnt_rows)] = False
            before, after = before[kept], after[kept]
        compared += 1
        # As bytes: -0.0 equals 0.0, and a NaN does not equal itself.
        if not torch.equal(before.contiguous().view(torch.uint8), after.contiguous().view(torch.uint8)):
            changed.append(name)
    return {"compared": compared, "identical": compared - len(changed), "changed": changed}


if __name__ == "__main__":
    run_cli(distill)
