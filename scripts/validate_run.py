"""Look before the leap: `python scripts/validate_run.py --config configs/distill.yaml` checks a run and writes nothing.

Files, shapes, vocabularies, disk, masks, alignment with the teacher, memory, and one real step. Each finding is a line
`ok`, `warning` or `error`; an error in one check does not stop the others.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from litgpt import rundir
from litgpt.chat import Span
from litgpt.checkpoint import CONFIG_FILE, LIT_FILE, LitReader, read_provenance, require_lit_dir
from litgpt.config import Config
from litgpt.data import Loader, PackedLoader, Record, read_records
from litgpt.firststep import first_step
from litgpt.flops import GPUS, step_flops, tokens_per_step
from litgpt.keymap import layout
from litgpt.loaders import training_loader
from litgpt.maskview import Label, label, legend, paint, runs
from litgpt.memoryplan import Placement, device_memory, plan_disk, plan_memory, size_text
from litgpt.mixture import MixtureLoader
from litgpt.recipe import DataSettings, LossSettings, OptimSettings, RunSettings, Settings, lr_at
from litgpt.streaming import StreamingLoader
from litgpt.teacher import BaseTeacher, OnlineTeacher
from litgpt.teachercache import CACHE_FILE, TEXT_DIR, CachedTeacher, Manifest
from litgpt.tensorfile import check_free_disk
from litgpt.tokenizer import Tokenizer
from litgpt.trainable import parts_of
from litgpt.utils import UserError, run_cli, sha256_file
from train_distill import base_of

BYTES_PER_TOKEN = 2.76
"""Of our Hindi dialogues in Qwen3's tokenizer, headers included; measured on data/dialogues."""
# Hashing more than this is no longer cheap.
HASHED_BYTES = 64 << 20
# Documents, and micro-batches, of a corpus beyond memory that are looked at.
LOOKED_AT = 1000
CKA_AT_START = 5e-4
"""How far CKA to the base may be from 1 before the first step: it must print as 1.000."""


def validate_run(
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
    records: int = 10,
    step: bool = True,
    dry_run: bool = False,
    gpu: str | None = None,
    color: bool | None = None,
) -> None:
    """Check everything about a distillation that can be known before it runs; nothing is written.

    Takes the arguments of train_distill.py, and some of its own at the end. Exits with 2 if there is an error.

    Args:
        student: lit dir of the upcycled student.
        teacher: lit dir of the teacher; its tokenizer must be the student's.
        base: lit dir of the dense model the student was made of; without it the one its provenance.yaml names.
        out_dir: run directory that the training would write.
        data: dialogues and micro-batches.
        loss: weights of the terms.
        optim: optimizer and schedule.
        run: machine and reporting.
        resume: as of train_distill.py.
        overwrite: as of train_distill.py.
        seed: of everything random.
        records: dialogues whose masks are shown.
        step: load the models and train one micro-batch, in memory only.
        dry_run: no weights are needed: shapes come from model_config.yaml or from the names of the directories.
        gpu: plan memory for this GPU instead of the device here, e.g. "NVIDIA H200".
        color: colour the dialogues; by default on a terminal.
    """
    if gpu is not None and gpu not in GPUS:
        raise UserError(f"gpu {gpu!r} is not known: choose one of {', '.join(GPUS)}")
    guessed = base or _beside(student)
    settings = Settings(student, teacher, guessed, out_dir, data, loss, optim, run, resume, overwrite, seed)
    check = Preflight(settings, dry_run=dry_run, gpu=gpu)
    check.files(named_base=base is not None)
    check.shapes()
    check.dialogues()
    check.masks(records, colour=sys.stdout.isatty() if color is None else color)
    check.schedule()
    check.memory()
    check.disk()
    if step:
        check.step()
    counts = Counter(check.found)
    summary = f"{counts['error']} errors, {counts['warning']} warnings, {counts['ok']} checks passed"
    if counts["error"]:
        raise UserError(summary)
    print(summary)


class Preflight:
    """The checks in their order; what one finds out, the next ones use, and where it is missing they say so.

    Args:
        settings: of the run.
        dry_run: missing weights are no fault.
        gpu: name of the device to plan for, `None` for the one here.
    """

    def __init__(self, settings: Settings, *, dry_run: bool, gpu: str | None) -> None:
        self.settings, self.dry_run, self.gpu = settings, dry_run, gpu
        self.found: list[str] = []
        self.paths = {"student": settings.student, "base": settings.base}
        if settings.loss.kd_weight > 0:
            self.paths["teacher"] = settings.teacher
            for name, source in (settings.data.sources or {}).items():
                self.paths |= {f"data.sources.{name}.teacher": source.teacher} if source.teacher else {}
        self.configs: dict[str, Config] = {}
        self.weights: set[str] = set()
        self.stored_bytes = 2
        self.records: dict[str, list[Record]] = {}
        self.tokenizer: Tokenizer | None = None
        self.teacher: BaseTeacher | None = None
        self.loader: Loader | None = None
        self.steps = settings.optim.steps
        self.on_gpu = gpu is not None or settings.run.accelerator == "cuda"
        self.on_gpu |= settings.run.accelerator == "auto" and torch.cuda.is_available()

    def say(self, kind: str, line: str) -> None:
        """Print one finding."""
        self.found.append(kind)
        print(f"{kind:<8} {line}")

    @contextmanager
    def fault(self, what: str, *, kind: str = "error") -> Iterator[None]:
        """A user's mistake within becomes a line, and the checks go on after it."""
        try:
            yield
        except UserError as error:
            self.say(kind, f"{what}: {' '.join(str(error).split())}")

    # --- files

    def files(self, *, named_base: bool) -> None:
        """Each model's directory, each file of dialogues, and what stands in the way of the run directory."""
        settings = self.settings
        with self.fault("seed"):
            if not 0 <= settings.seed < 2**32:
                raise UserError(f"{settings.seed}, expected 0 ... 4294967295")
        if not named_base and (settings.student / LIT_FILE).is_file():
            with self.fault("base"):
                self.settings.base = self.paths["base"] = base_of(settings.student)
        for name, path in self.paths.items():
            with self.fault(name):
                self._model(name, path)
        files = settings.data.training_files() | settings.data.validation_files()
        for name, path in files.items():
            with self.fault(name):
                if name == "data.stream":
                    continue  # looked at when it is opened
                self.records[name] = read_records(path, texts=True)
                digest = sha256_file(path)[:12]
                kind = "dialogues" if self.records[name][0].messages else "texts"
                self.say("ok", f"{name}: {path}, {len(self.records[name])} {kind}, sha256 {digest}...")
        if len(self.records) == len(files):
            self._overlap()
        with self.fault("out_dir"):
            for path in (*self.paths.values(), *files.values()):
                rundir.refuse_input(settings.out_dir, path)
            start = rundir.start_point(settings.out_dir, settings.resume, overwrite=settings.overwrite)
            self.say("ok", f"out_dir: {settings.out_dir}, " + (f"goes on from {start.name}" if start else "a new run"))

    def _model(self, name: str, path: Path) -> None:
        if name.endswith("teacher") and (path / CACHE_FILE).is_file():
            kept = Manifest.read(path)
            self.configs[name] = config = Config.from_checkpoint(path / TEXT_DIR)
            self.weights.add(name)
            targets = f"{kept.form.kind} targets of {kept.rows} answer tokens of {kept.records} dialogues"
            self.say("ok", f"{name}: {path}, {config.name} has run already: {targets}")
            return
        if not (path / LIT_FILE).is_file() and (self.dry_run or (path / CONFIG_FILE).is_file()):
            self.configs[name] = config = _config_without_weights(path)
            how = CONFIG_FILE if (path / CONFIG_FILE).is_file() else "its name"
            self.say("ok" if self.dry_run else "warning", f"{name}: {path} has no weights; {config.name} by {how}")
            return
        first = "python scripts/upcycle_moe.py" if name == "student" else None
        try:
            require_lit_dir(path, first=first)
        except UserError:
            with suppress(UserError):  # so that memory can be planned all the same
                self.configs[name] = _config_without_weights(path)
            raise
        self.configs[name] = config = Config.from_checkpoint(path)
        specs = LitReader(path).specs  # names and shapes; a file cut short is found here
        expected = layout(config, "lit").shapes
        wrong = sorted(set(specs) ^ set(expected)) or [n for n, s in expected.items() if specs[n].shape != tuple(s)]
        if wrong:
            raise UserError(f"{len(wrong)} tensors of {path / LIT_FILE} do not fit {CONFIG_FILE}, e.g. {wrong[0]}")
        for file, digest in read_provenance(path).get("sha256", {}).items():
            source = path / file
            if source.is_file() and source.stat().st_size <= HASHED_BYTES and sha256_file(source) != digest:
                raise UserError(f"{source} is not the file that the weights were converted from: convert it again")
        self.weights.add(name)
        dtypes = {spec.dtype for spec in specs.values()}
        if name == "student":
            self.stored_bytes = max(dtype.itemsize for dtype in dtypes)
        kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        size = size_text((path / LIT_FILE).stat().st_size)
        self.say("ok", f"{name}: {path}, {config.name}, {len(specs)} tensors in {kinds}, {size} on disk")

    def _overlap(self) -> None:
        learnt = [r for name in self.settings.data.training_files() for r in self.records.get(name, [])]
        train = {_content(record) for record in learnt}
        again = [record.id for record in self.records["data.val"] if _content(record) in train]
        if again:
            self.say("warning", f"data: {len(again)} dialogues of val stand in train, too, e.g. {again[0]}")
        else:
            self.say("ok", "data: no dialogue of val stands in train")

    # --- shapes and vocabularies

    def shapes(self) -> None:
        """What the models must agree on."""
        student, base, teacher = (self.configs.get(name) for name in ("student", "base", "teacher"))
        length = self.settings.data.max_seq_length
        if student:
            with self.fault("student"):
                parts_of(self.settings.optim.trainable, student, read_provenance(self.paths["student"]))
                experts = f"{student.n_expert} experts, {student.n_expert_per_token} per token"
                self.say("ok", f"student: {student.n_layer} layers, width {student.n_embd}, {experts}")
        for name, config in self.configs.items():
            with self.fault(name):
                if config.block_size < length:
                    raise UserError(f"reads at most {config.block_size} tokens, data.max_seq_length is {length}")
        if student and base:
            with self.fault("base"):
                for key in ("n_layer", "n_embd", "padded_vocab_size"):
                    ours, theirs = getattr(student, key), getattr(base, key)
                    if ours != theirs:
                        raise UserError(
                            f"{key} is {theirs}, the student's {ours}: it is not what the student came from"
                        )
                self.say("ok", "base: as deep and as wide as the student, the same vocabulary")
        with self.fault("student's tokenizer"):
            if (self.settings.student / "tokenizer.json").is_file():
                self.tokenizer = Tokenizer(self.settings.student)
                self._thought_tokens(self.tokenizer)
        if student and teacher and student.vocab_size > teacher.padded_vocab_size:
            self.say(
                "error", f"teacher: {teacher.padded_vocab_size} vocabulary rows, the student uses {student.vocab_size}"
            )
        path = self.settings.teacher
        cached = (path / CACHE_FILE).is_file()
        if self.tokenizer and "teacher" in self.configs and (cached or (path / "tokenizer.json").is_file()):
            with self.fault("teacher's vocabulary"):
                kind = CachedTeacher if cached else OnlineTeacher
                self.teacher = kind(path, self.tokenizer, view=self.settings.loss.teacher_view)
                self.say(
                    "ok", f"vocabularies: {self.teacher.shared_vocab_size} ids are the same in both; KD compares these"
                )
        elif "teacher" in self.paths:
            self.say("warning", "vocabularies: not compared, a tokenizer.json is missing")

    def _thought_tokens(self, tokenizer: Tokenizer) -> None:
        rows = self.configs["student"].padded_vocab_size if "student" in self.configs else math.inf
        if tokenizer.vocab_size > rows:
            raise UserError(f"has {tokenizer.vocab_size} ids, the embedding only {rows} rows")
        if tokenizer.thought_ids is None:
            self.say("warning", "student's tokenizer: no <thought> tokens; thoughts go between its <think> tags")
        else:
            first, last = tokenizer.thought_ids
            self.say(
                "ok", f"student's tokenizer: {tokenizer.vocab_size} ids, <thought> is {first}, </thought> is {last}"
            )

    # --- dialogues

    def dialogues(self) -> None:
        """Render and pack everything; count tokens by span."""
        data = self.settings.data
        if not all(path.is_file() for path in data.training_files().values()):
            return
        if self.tokenizer is None:
            self.say("warning", f"dialogues: not rendered, {self.settings.student} has no usable tokenizer.json")
            return
        with self.fault("dialogues"):
            loader = training_loader(data, self.tokenizer, seed=self.settings.seed, world_size=self._world_size)
            self.loader = loader
            # Of a corpus beyond memory the first documents speak for the rest.
            counted = loader.documents[:LOOKED_AT] if isinstance(loader, StreamingLoader) else loader.documents
            spans = torch.cat([document.spans_T for document in counted]).bincount(minlength=3).tolist()
            total = sum(spans)
            shares = ", ".join(
                f"{span.name.lower()} {spans[span]} ({spans[span] / total:.0%})" for span in list(Span)[:3]
            )
            of = "" if len(counted) == len(loader.documents) else f"the first of {len(loader.documents)}: "
            self.say("ok", f"tokens: {of}{total} in {len(counted)} dialogues: {shares}")
            if isinstance(loader, MixtureLoader):
                for name, source in loader.report().items():
                    self.say("ok", f"source {name}: {source.documents} documents, {source.share:.0%} of the tokens")
            if not spans[Span.ANSWER] or not spans[Span.THOUGHT]:
                self.say("warning", f"tokens: no {'thought' if spans[Span.ANSWER] else 'answer'} in the training data")
            self.say("ok", f"rows: {len(loader)} micro-batches an epoch, {loader.padding_share:.1%} of them padding")
            if loader.dropped:
                share = loader.dropped_count / (loader.dropped_count + len(loader.records))
                self.say(
                    "error" if share > 0.5 else "warning",
                    f"rows: {loader.dropped_count} dialogues ({share:.1%}) have more than {data.max_seq_length} tokens "
                    f"and are left out, e.g. {loader.dropped[0]}",
                )

    @property
    def _world_size(self) -> int:
        return self.settings.run.devices * self.settings.run.num_nodes

    def masks(self, count: int, *, colour: bool) -> None:
        """Show some dialogues as the losses see them, and check that they see what they should."""
        if self.loader is None or self.tokenizer is None or count < 1:
            return
        with self.fault("masks"):
            chosen = self.loader.records[:: max(1, len(self.loader.records) // count)][:count]
            loader = PackedLoader(
                chosen,
                self.tokenizer,
                max_seq_length=self.settings.data.max_seq_length,
                micro_batch_size=1,
                shuffle=False,
            )
            view = self.teacher.read(loader) if self.teacher else None
            if view is not None:
                pairs = sum(len(reading.student_at_P) for reading in view.readings)
                self.say(
                    "ok", f"teacher: {pairs} answer tokens of {len(chosen)} dialogues predict the same ids in both"
                )
            print(f"\n{legend(colour=colour)}\n")
            wrong = 0
            for number, record in enumerate(chosen):
                labels, faults = label(loader, view, number, self.tokenizer, self.settings.loss)
                wrong += faults
                ids = loader.documents[number].ids_T.tolist()
                counts = Counter(labels)
                shares = ", ".join(f"{kind.value} {counts[kind]}" for kind in Label if counts[kind])
                print(f"{record.id}: {len(ids)} tokens: {shares}")
                print(paint(runs(ids, labels, self.tokenizer), colour=colour))
            if wrong:
                self.say("error", f"masks: {wrong} tokens have another weight than their span asks for")
            else:
                self.say("ok", f"masks: each token of {len(chosen)} dialogues has the weights of its span")

    # --- plans

    def schedule(self) -> None:
        """Steps, learning rate, weight of CKA."""
        optim, loss = self.settings.optim, self.settings.loss
        if self.steps is None:
            batches = self._batches()
            if batches is None:
                self.say("warning", "schedule: how long an epoch is cannot be said without dialogues")
                return
            self.steps = math.ceil(optim.epochs * batches / optim.accumulation)
        peak = max(range(self.steps), key=lambda step: lr_at(step, self.steps or 1, optim))
        last = lr_at(self.steps - 1, self.steps, optim)
        self.say(
            "ok", f"schedule: {self.steps} steps; learning rate {optim.lr:g} at step {peak + 1}, {last:g} at the last"
        )
        if loss.cka_weight > 0 or loss.cka_end > 0:
            until = math.ceil(loss.cka_fraction * self.steps)
            self.say("ok", f"schedule: weight of CKA {loss.cka_weight:g}, {loss.cka_end:g} from step {until + 1} on")
        if self.settings.run.save_every >= self.steps:
            self.say(
                "warning",
                f"schedule: run.save_every {self.settings.run.save_every} writes no checkpoint before the end",
            )

    def _batches(self) -> int | None:
        """Micro-batches of an epoch on one device: counted, or without a tokenizer estimated from the texts' length."""
        if self.loader is not None:
            return len(self.loader)
        learnt = [r for name in self.settings.data.training_files() for r in self.records.get(name, [])]
        if not learnt or self.settings.data.sources:
            return None
        messages = [message for record in learnt for message in record.messages]
        size = sum(len((message["content"] + message.get("thought", "")).encode()) for message in messages)
        size += sum(len((record.text or "").encode()) for record in learnt)
        data = self.settings.data
        row_tokens = data.max_seq_length * data.micro_batch_size * self._world_size
        batches = math.ceil(size / BYTES_PER_TOKEN / row_tokens)
        self.say("warning", f"schedule: about {batches} micro-batches an epoch, estimated without a tokenizer")
        return batches

    def _scored_share(self) -> float:
        """Share of thought and answer in the micro-batch with most of them; 1 if nobody knows."""
        if self.loader is None:
            return 1.0
        learnt = torch.tensor([Span.THOUGHT, Span.ANSWER])
        batches = islice(self.loader, LOOKED_AT) if isinstance(self.loader, StreamingLoader) else self.loader
        scored = max(int(torch.isin(batch.spans_BT.long(), learnt).sum()) for batch in batches)
        self.loader.epoch = self.loader.position = 0
        return scored / (self.settings.data.max_seq_length * self.settings.data.micro_batch_size)

    def memory(self) -> None:
        """The memory plan, and how much arithmetic a step is."""
        settings = self.settings
        student, base, teacher = (self.configs.get(name) for name in ("student", "base", "teacher"))
        if student is None or not student.is_moe:
            self.say("warning", "memory: not planned, the student's shape is not known")
            return
        device = torch.device("cuda" if self.on_gpu and self.gpu is None else "cpu")
        device_bytes = GPUS[self.gpu].memory if self.gpu else device_memory(device)
        with self.fault("memory"):
            plan = plan_memory(
                student,
                teacher,
                base,
                settings,
                world_size=self._world_size,
                device_bytes=device_bytes,
                placement=Placement.of(settings, self.teacher, on_gpu=self.on_gpu, scored_share=self._scored_share()),
                more_teachers=[config for config, _ in self._more_teachers()],
            )
            print(f"\n{plan.table()}\n")
            name = self.gpu or (torch.cuda.get_device_name() if self.on_gpu else "this machine")
            # A dry run asks nothing of the machine it happens on, only of a GPU that was named.
            fault = "warning" if self.dry_run and self.gpu is None else "error"
            self.say("ok" if plan.fits else fault, f"memory of {name}: {plan.verdict()}")
            if self.gpu is None and not self.on_gpu and student.n_embd > 512:
                self.say("warning", 'memory: planned for a CPU; --gpu "NVIDIA H200" plans for a GPU that is not here')
        tokens = tokens_per_step(settings, self._world_size)
        more = self._more_teachers()
        flops = step_flops(
            student, teacher, base, settings, tokens=tokens, world_size=self._world_size, more_teachers=more
        )
        line = f"a step: at most {tokens} tokens, {flops.model / 1e12:.3g} TFLOP"
        line += f" ({flops.model / tokens / 1e9:.3g} GFLOP a token)"
        peak = GPUS.get(self.gpu or (torch.cuda.get_device_name() if self.on_gpu else ""))
        if peak:
            seconds = flops.model / (peak.flops * self._world_size)
            line += f"; {seconds:.2g} s at the peak of {peak.flops / 1e12:.0f} TFLOP/s, which nobody reaches"
        self.say("ok", line)

    def _more_teachers(self) -> list[tuple[Config, float]]:
        """Shapes of the sources' own teachers that run, each once, and their shares of the tokens."""
        data = self.settings.data
        running = {path for path in data.own_teachers() if not (path / CACHE_FILE).is_file()}
        names = {path: name for name, path in self.paths.items() if path in running and name in self.configs}
        return [(self.configs[name], data.token_share(path)) for path, name in names.items()]

    def disk(self) -> None:
        """Room for what the run will write."""
        if "student" not in self.configs or not self.configs["student"].is_moe:
            return
        plan = plan_disk(
            self.configs["student"], self.settings, steps=self.steps or sys.maxsize, stored_bytes=self.stored_bytes
        )
        with self.fault("disk", kind="warning" if self.dry_run else "error"):
            check_free_disk(self.settings.out_dir.absolute(), plan.total)
            self.say("ok", f"disk: {plan.line()}")

    # --- one real step

    def step(self) -> None:
        """Train one micro-batch in memory: finite losses, a gradient wherever one belongs, CKA 1 before it."""
        missing = [name for name in self.paths if name not in self.weights]
        if missing or self.loader is None or (self.teacher is None and "teacher" in self.paths):
            if missing and (self.dry_run or len(self.configs) == len(self.paths)):
                self.say("ok", f"step: not run, there are no weights of {', '.join(missing)}")
            else:
                self.say("warning", "step: not run, because of what is said above")
            return
        with self.fault("step"):
            self._step(self.loader)

    def _step(self, loader: Loader) -> None:
        assert self.tokenizer is not None
        shown = first_step(self.settings, loader, self.tokenizer, self.teacher)
        terms = ", ".join(f"{name} {value:.4f}" for name, value in shown.terms.items())
        finite = all(map(math.isfinite, (shown.loss, *shown.terms.values())))
        self.say("ok" if finite else "error", f"step: loss {shown.loss:.4f} ({terms}) on {shown.tokens} tokens")
        self._cka(1 - shown.terms["1 - CKA"], shown.cka_rows)
        # What has a reason is no fault: without its loss a fresh router learns nothing, nor do rows that nobody reads.
        excused = [name for name in shown.zero if ".gate." in name and self.settings.loss.router_weight == 0]
        if self.settings.loss.router_weight == 0:
            self.say("warning", "step: loss.router_weight is 0: equal experts give a router no gradient but rounding")
        if not shown.has_thought:
            excused += [name for name in shown.zero if name.startswith("rows.")]
            self.say("warning", "step: no thought in the micro-batch, so its tokens' rows learn nothing from it")
        faults = {
            "frozen tensors got a gradient": shown.touched,
            "tensors got no gradient": shown.none,
            "gradients are not finite": shown.infinite,
            "gradients are all zeros": [name for name in shown.zero if name not in excused],
            "tensors are not finite after the update": shown.broken,
        }
        for what, names in faults.items():
            if names:
                self.say("error", f"step: {len(names)} {what}, e.g. {names[0]}")
        if shown.idle_experts:
            self.say("warning", f"step: {shown.idle_experts} experts, over all layers, were chosen by no token of it")
        if not any(faults.values()):
            kinds = Counter(
                "routers" if ".gate." in name else "experts" if ".experts." in name else "thought rows"
                for name in shown.trained
                if name not in shown.zero
            )
            counts = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
            self.say("ok", f"step: tensors with a gradient: {counts}; none of {len(shown.frozen)} frozen ones has one")
        if shown.gpu_bytes is not None:
            self.say("ok", f"step: at most {size_text(shown.gpu_bytes)} were allocated on the GPU")

    def _cka(self, value: float, rows: int) -> None:
        if rows == 0:
            self.say("warning", "step: too few tokens for CKA in this micro-batch")
        elif abs(value - 1) <= CKA_AT_START:
            self.say("ok", f"step: CKA to the base is {value:.3f} over {rows} tokens, as it must be at step 0")
        elif "distilled" in read_provenance(self.settings.student):
            self.say("warning", f"step: CKA to the base is {value:.3f}; the student has been trained before")
        else:
            self.say("error", f"step: CKA to the base is {value:.3f}, expected 1.000 of a fresh student: wrong --base?")


def _beside(student: Path) -> Path:
    """Where the dense base lies if the student has the name that upcycle_moe.py gives."""
    return student.with_name(re.sub(r"-MoE-\d+x\d+$", "", student.name))


def _content(record: Record) -> str:
    return record.text or json.dumps(record.messages, sort_keys=True)


def _config_without_weights(path: Path) -> Config:
    """From `model_config.yaml`, or by the directory's name: a known model, or one upcycled from it.

    Raises:
        UserError: neither is there.
    """
    if (path / CONFIG_FILE).is_file():
        return Config.from_checkpoint(path)
    match = re.fullmatch(r"(.+)-MoE-(\d+)x(\d+)", path.name)
    if match:
        return Config.from_name(match[1]).upcycled(int(match[2]), int(match[3]))
    return Config.from_name(path.name)


if __name__ == "__main__":
    run_cli(validate_run)
