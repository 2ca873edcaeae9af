"""One step of distillation: which parameters learn, what a micro-batch needs, its loss, and the validation.

    loss = task_weight · CE + kd_weight · KD + cka_weight(t) · (1 - CKA) + router_weight(t) · balance + z_weight · z

CE is scored on thought and answer, KD on the answer alone, CKA against the dense base on the spans chosen. Each term is
divided by its own count over the whole optimizer step, all micro-batches of all ranks (`Totals`), so that cutting the
same dialogues into other micro-batches changes nothing but rounding. CKA and the balance loss are no sums over tokens:
a step of several micro-batches is read once before without gradient (`Distiller.survey`), for the experts' loads and
the moments that CKA is a function of (`StepCka`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from litgpt.balance import balance_loss, z_loss
from litgpt.chat import Span
from litgpt.cka import MINIMUM_ROWS, StreamingCKA, cka_share, corresponding, select_rows
from litgpt.data import Batch
from litgpt.generate import Sampling, generate_batch
from litgpt.losses import DistillTerms, Divergence, Head, TeacherTargets, cka_loss, distill_terms, mse_anchor
from litgpt.model import GPT, Output
from litgpt.recipe import LossSettings
from litgpt.routing import Choices, RouterStats, expert_counts
from litgpt.teacher import BaseTeacher, TeacherBatch, TeacherView
from litgpt.trainable import Part, default_parts, learns
from litgpt.utils import UserError


def cka_layers(n_layer: int, every: int) -> list[int]:
    """Every n-th layer, counted from 0, and the last: 28 layers by 4 → 3, 7, 11, 15, 19, 23, 27."""
    return sorted({*range(every - 1, n_layer, every), n_layer - 1})


def freeze_but(student: GPT, parts: Collection[Part]) -> None:
    """Leave a gradient to these parts alone. The thought tokens' rows learn apart, see `ThoughtRows`."""
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(learns(name, parts))


class ThoughtRows(nn.Module):
    """The embedding rows of the thought tokens, and those of an untied head, as parameters of their own.

    The embedding itself stays frozen: no gradient, no weight decay and no Adam state ever touch its other rows, so they
    are bit-identical after training by construction. The rows take their place on the way in (a hook on the embedding)
    and on the way out (`head`); `Distiller.student_state` puts them where a checkpoint expects them.

    Args:
        student: the model whose rows these are.
        ids: the thought tokens.
    """

    def __init__(self, student: GPT, ids: Sequence[int]) -> None:
        super().__init__()
        self.ids = tuple(ids)
        wte, lm_head = student.transformer.wte, student.lm_head
        self.embedding = nn.Parameter(wte.weight.detach()[list(ids)].clone())
        tied = lm_head.weight is wte.weight
        self.output = None if tied else nn.Parameter(lm_head.weight.detach()[list(ids)].clone())
        wte.register_forward_hook(self._embed)

    def _embed(self, _: nn.Module, arguments: tuple[Tensor], x_BTD: Tensor) -> Tensor:
        for index, row_D in zip(self.ids, self.embedding, strict=True):
            x_BTD = torch.where((arguments[0] == index)[..., None], row_D, x_BTD)
        return x_BTD

    def head(self, head_VD: Tensor) -> Head:
        """The vocabulary projection with these rows in place, differentiable in them alone."""
        return Head(head_VD.detach(), self.ids, self.embedding if self.output is None else self.output)

    @torch.no_grad()
    def write_back(self, student: GPT) -> None:
        """Copy the rows into the model's own embedding and head, for whoever reads these without the hook."""
        student.transformer.wte.weight[list(self.ids)] = self.embedding
        if self.output is not None:
            student.lm_head.weight[list(self.ids)] = self.output


@dataclass
class Totals:
    """What the terms of one optimizer step are divided by.

    Attributes:
        ce: Σ weight of the tokens with cross-entropy.
        kd: tokens with a teacher.
        cka: rows of CKA.
        tokens: tokens that are no padding.
    """

    ce: float = 0.0
    kd: float = 0.0
    cka: float = 0.0
    tokens: float = 0.0

    def as_tensor(self) -> Tensor:
        """The four numbers in fp64: counts stay exact, also when summed over ranks."""
        return torch.tensor([self.ce, self.kd, self.cka, self.tokens], dtype=torch.float64)


class StepCka:
    """CKA of the chosen layers over all rows of an optimizer step, on all ranks: exact, value and gradient.

    First `update` with each micro-batch, then `finish`, then ask for each micro-batch's `share`. Every rank does so
    with equally many micro-batches. Beside a forward pass of student and base it costs, a layer: the memory of 3 D²
    numbers in fp64 (25 MB for D = 1024), which are also added up over ranks, and 7 N D² multiplications in fp64.

    Args:
        sum_over_ranks: an all-reduce of one tensor.
        root: 1 - sqrt(CKA) in place of 1 - CKA.
    """

    def __init__(self, sum_over_ranks: Callable[[Tensor], Tensor], *, root: bool = False) -> None:
        self._sum, self._root = sum_over_ranks, root
        self._layers: dict[int, StreamingCKA] = {}
        self._values: dict[int, float] = {}

    def update(self, states: Mapping[int, Tensor], reference: Mapping[int, Tensor], keep_BT: Tensor) -> None:
        """Add the kept tokens' hidden states [B, T, D] of both networks, by layer."""
        for layer, states_BTD in states.items():
            x_ND, y_NC = states_BTD[keep_BT], reference[layer][keep_BT]
            if layer not in self._layers:
                # Ranks can add up their moments only if they take them about the same point.
                rows = torch.tensor([len(x_ND)], dtype=torch.float64, device=x_ND.device)
                sums = self._sum(torch.cat((x_ND.double().sum(0), y_NC.double().sum(0), rows)))
                means = sums[:-1] / sums[-1].clamp(min=1)
                x_shift, y_shift = means.split((x_ND.shape[1], y_NC.shape[1]))
                self._layers[layer] = StreamingCKA(shifts=(x_shift, y_shift))
            self._layers[layer].update(x_ND, y_NC)

    def finish(self) -> None:
        """Add up over ranks. After this nothing more is added."""
        for layer, streaming in self._layers.items():
            streaming.reduce(self._sum)
            self._values[layer] = streaming.result()

    def share(self, states: Mapping[int, Tensor], reference: Mapping[int, Tensor], keep_BT: Tensor) -> Tensor:
        """One micro-batch's part of the mean over layers of 1 - CKA, see `litgpt.cka.cka_share`."""
        shares = [
            cka_share(states[layer], reference[layer], keep_BT, streaming, self._values[layer], root=self._root)
            for layer, streaming in self._layers.items()
        ]
        return torch.stack(shares).mean()


# Not a dataclass: Fabric's precision plugin walks into those and would round the weights in here to bf16.
class MicroBatch:
    """A batch with everything that the losses ask for, ready on the student's device.

    Attributes:
        batch: ids, spans, documents.
        generated: whether the student has said it itself; see `litgpt.onpolicy`.
        targets_N, target_spans_N: what each position predicts and that id's span.
        ce_weight_N: weight in the cross-entropy, fp32.
        cka_BT: which tokens are rows of CKA.
        real_N: which tokens are no padding.
        counts: this micro-batch's part of the `Totals`.
        teacher_batches: each teacher's side, on the CPU.
        teachers: the teachers' targets in the same order, once they have run; `None` for one that reads no row.
        reference: the base's hidden states by layer, once it has run.
        load_LE: tokens per layer and expert of the whole step, fp64, once they are known; `None` if this micro-batch
            is all of it.
        step_cka: the whole step's CKA, once it is known; `None` if this micro-batch is all of it.
    """

    def __init__(
        self,
        batch: Batch,
        settings: LossSettings,
        views: Sequence[TeacherView],
        device: torch.device,
        *,
        generated: bool = False,
    ) -> None:
        targets_BT, spans_BT = batch.next_tokens()
        weight_BT = torch.zeros(spans_BT.shape)
        # What the student has said itself is no truth to be learnt by heart.
        if not generated:
            weight_BT[spans_BT == Span.THOUGHT] = settings.thought_weight
            weight_BT[spans_BT == Span.ANSWER] = 1.0
        cka_BT = select_rows(
            batch.spans_BT, batch.documents_BT, keep_spans=[Span[name.upper()] for name in settings.cka_spans]
        )
        if settings.cka_rows is not None and cka_BT.sum() > settings.cka_rows:
            # The seed follows from the batch, so that a resumed run draws the same.
            generator = torch.Generator().manual_seed(int(batch.ids_BT.sum()))
            key_BT = torch.where(cka_BT, torch.rand(cka_BT.shape, generator=generator), 2.0)
            cka_BT = key_BT <= key_BT.flatten().kthvalue(settings.cka_rows).values
        real_BT = batch.documents_BT >= 0
        self.teacher_batches: list[TeacherBatch] = [view.batch(batch) for view in views]
        # Counted before anything moves: on the CPU this waits for no device.
        self.counts = Totals(
            ce=float(weight_BT.double().sum()),
            kd=sum(len(side.student_at_M) for side in self.teacher_batches),
            cka=int(cka_BT.sum()),
            tokens=int(real_BT.sum()),
        )
        self.generated = generated
        self.batch = batch.to(device)
        self.targets_N = targets_BT.flatten().to(device)
        self.target_spans_N = spans_BT.flatten().to(device)
        self.ce_weight_N = weight_BT.flatten().to(device)
        self.cka_BT = cka_BT.to(device)
        self.real_N = real_BT.flatten().to(device)
        self.teachers: list[TeacherTargets | None] = []
        self.reference: dict[int, Tensor] = {}
        self.load_LE: Tensor | None = None
        self.step_cka: StepCka | None = None

    def parts(self) -> Iterator[tuple[TeacherTargets | None, Tensor, int | None]]:
        """The micro-batch by teacher: its targets, the weights [N] in the cross-entropy, and its shared vocabulary.

        Each row's cross-entropy is scored with its teacher, in one pass over the vocabulary; rows without a teacher
        are scored with the first.
        """
        asked = [
            (side, targets)
            for side, targets in zip(self.teacher_batches, self.teachers, strict=False)
            if targets is not None
        ]
        if len(asked) < 2:
            side, targets = asked[0] if asked else (None, None)
            yield targets, self.ce_weight_N, side.shared_vocab_size if side else None
            return
        rows_B = torch.zeros(len(self.batch.ids_BT), dtype=torch.int64)
        for number, (side, _) in enumerate(asked):
            rows_B[side.rows] = number
        of_N = rows_B.to(self.ce_weight_N.device).repeat_interleave(self.batch.ids_BT.shape[1])
        for number, (side, targets) in enumerate(asked):
            yield targets, torch.where(of_N == number, self.ce_weight_N, 0.0), side.shared_vocab_size


class Reference:
    """The dense model that the student was made of, frozen: what CKA compares the student's hidden states with.

    It reads the student's ids. The dense checkpoint has only untrained rows for the two thought tokens, so it gets the
    rows that the upcycled student starts with (near copies of `<think>` and `</think>`). So at step 0 both networks are
    equal at every token and every CKA is 1, and the rows compared are the same tokens of the same text; a text without
    the thought would give the student other contexts than the base.

    Args:
        model: the dense model.
        student: the upcycled student before training; only its embedding is read.
        thought_ids: the thought tokens, `None` if there are none.
        layers: which hidden states to keep.

    Raises:
        UserError: depth, width or vocabulary differ.
    """

    def __init__(self, model: GPT, student: GPT, thought_ids: Sequence[int] | None, layers: Sequence[int]) -> None:
        for key in ("n_layer", "n_embd", "padded_vocab_size"):
            ours, theirs = getattr(student.config, key), getattr(model.config, key)
            if ours != theirs:
                raise UserError(
                    f"the base {model.config.name!r} has {key} {theirs}, the student {ours}: "
                    "the base is the dense checkpoint that the student was upcycled from"
                )
        trained = dict(student.named_parameters())
        for name, parameter in model.named_parameters():
            if (".attn." in name or "norm" in name) and not torch.equal(parameter, trained[name].to(parameter)):
                raise UserError(
                    f"{name} of the base {model.config.name!r} is not the student's: "
                    "the base is the dense checkpoint that the student was upcycled from"
                )
        self.model = model.requires_grad_(False)
        self.layers = list(layers)
        if thought_ids is not None:
            rows = list(thought_ids)
            with torch.no_grad():
                self.model.transformer.wte.weight[rows] = student.transformer.wte.weight[rows].to(
                    self.model.transformer.wte.weight
                )

    @torch.no_grad()
    def hidden_states(self, batch: Batch) -> dict[int, Tensor]:
        """Residual stream [B, T, D] after each of the layers."""
        output: Output = self.model(
            batch.ids_BT, documents_BT=batch.documents_BT, layers=self.layers, return_logits=False
        )
        return output.hidden_states


class TeacherReference:
    """The teacher as what CKA compares the student's hidden states with, in place of the base.

    It reads the student's ids, the thought tags among them, for which it has no trained rows: a few tokens of a
    dialogue that it does not understand.

    Args:
        model: the teacher, loaded.
        depth: layers of the student.
        layers: of the student; each is compared with the teacher's that is as far along (28 → 40: 13 with 19).
    """

    def __init__(self, model: GPT, depth: int, layers: Sequence[int]) -> None:
        self.model = model
        matched = dict(corresponding(depth, model.config.n_layer))
        self.layers = {layer: matched[layer] for layer in layers}

    @torch.no_grad()
    def hidden_states(self, batch: Batch) -> dict[int, Tensor]:
        """Residual stream [B, T, C] of the teacher, by the student's layer."""
        output: Output = self.model(
            batch.ids_BT, documents_BT=batch.documents_BT, layers=sorted(set(self.layers.values())), return_logits=False
        )
        return {layer: output.hidden_states[theirs] for layer, theirs in self.layers.items()}


# A plain class, as MicroBatch, so that the precision plugin leaves its numbers in fp64.
class StepTerms:
    """The parts of one micro-batch's loss, each already divided by the step's totals; detached.

    Attributes:
        terms: fp64 [5]: ce, kd, 1 - cka, balance and z, unweighted; over all micro-batches they add up to the step's.
        load_LE: fp64: how many tokens each layer gave to each expert.
    """

    def __init__(self, terms: Tensor, load_LE: Tensor) -> None:
        self.terms, self.load_LE = terms, load_LE


class Distiller(nn.Module):
    """The student and its loss as one module, so that DDP sees every parameter take part in one forward.

    Args:
        student: the upcycled model; everything but `parts` is frozen here.
        thought_ids: ids of the thought tokens, `None` if the student has none.
        settings: the weights.
        parts: what learns; `None`: `litgpt.trainable.default_parts`.
    """

    def __init__(
        self,
        student: GPT,
        thought_ids: Sequence[int] | None,
        settings: LossSettings,
        parts: Collection[Part] | None = None,
    ) -> None:
        super().__init__()
        self.parts = default_parts(student.config) if parts is None else tuple(parts)
        freeze_but(student, self.parts)
        self.student = student
        with_rows = thought_ids is not None and "thought_tokens" in self.parts
        self.rows = ThoughtRows(student, thought_ids or ()) if with_rows else None
        self.settings = settings
        depth = student.config.n_layer
        self.layers = cka_layers(depth, settings.cka_every)
        if settings.cka_layers is not None:
            self.layers = sorted(set(settings.cka_layers))
            if self.layers[-1] >= depth:
                raise UserError(f"loss.cka_layers is {settings.cka_layers}, and the student has {depth} layers")

    def forward(
        self, micro: MicroBatch, totals: Totals, cka_weight: float, router_weight: float | None = None
    ) -> tuple[Tensor, StepTerms]:
        """This micro-batch's share of the step's loss.

        Args:
            micro: with the teacher's and the reference's side filled in where their weight is not 0, and the load and
                the CKA of the whole step where it is not all of it.
            totals: of the whole step.
            cka_weight: weight of 1 - CKA at this step.
            router_weight: of the balance loss at this step; `None`: at the first.

        Returns:
            a scalar whose sum over the step's micro-batches is the step's loss, and its parts.
        """
        # Fewer rows in the whole step have no unbiased CKA.
        with_cka = bool(micro.reference) and micro.counts.cka > 0 and totals.cka >= MINIMUM_ROWS
        weights = self.settings
        output, terms = self.terms(
            micro,
            layers=self.layers if with_cka else [],
            ce_scale=weights.task_weight / (totals.ce or 1.0),
            kd_scale=weights.kd_weight / (totals.kd or 1.0),
        )
        ce, kd = terms.ce / (totals.ce or 1.0), terms.kd / (totals.kd or 1.0)
        cka = ce.new_zeros(())
        if with_cka:
            states = (output.hidden_states, micro.reference, micro.cka_BT)
            if weights.anchor == "mse":
                cka = mse_anchor(*states) / totals.cka
            elif micro.step_cka is None:
                cka = cka_loss(*states, root=weights.anchor == "root_cka")
            else:
                cka = micro.step_cka.share(*states)
            cka = cka.to(ce.dtype)
        own_LE = expert_counts(output.routing, micro.real_N)
        load_LE = own_LE if micro.load_LE is None else micro.load_LE
        balance = z = ce.new_zeros(())
        router_weight = weights.router_weight if router_weight is None else router_weight
        if output.routing:
            # Without a weight it is measured alone.
            with torch.set_grad_enabled(torch.is_grad_enabled() and weights.z_weight > 0):
                z = z_loss(output.routing, micro.real_N, tokens=totals.tokens)
            balance = balance_loss(output.routing, micro.real_N, load_LE=load_LE, tokens=totals.tokens)
        loss = terms.loss + cka_weight * cka + router_weight * balance + weights.z_weight * z
        if micro.counts.tokens == 0:
            # A rank whose rows are all padding still has to answer for every parameter, or DDP waits for ever.
            loss = loss + 0.0 * output.hidden.sum() + sum(0.0 * p.sum() for p in self.rows_parameters())
        return loss, StepTerms(torch.stack((ce, kd, cka, balance, z)).detach().double(), own_LE)

    def rows_parameters(self) -> list[nn.Parameter]:
        """The parameters of `ThoughtRows`, none if there are no thought tokens."""
        return [] if self.rows is None else list(self.rows.parameters())

    def terms(
        self,
        micro: MicroBatch,
        *,
        layers: Iterable[int] = (),
        divergence: Divergence | None = None,
        ce_scale: float = 1.0,
        kd_scale: float = 1.0,
    ) -> tuple[Output, DistillTerms]:
        """Run the student and score CE and KD: their sums over tokens, and the loss that the scales make of them."""
        batch = micro.batch
        output: Output = self.student(
            batch.ids_BT, documents_BT=batch.documents_BT, layers=list(layers), return_logits=False
        )
        head_VD = self.student.lm_head.weight
        parts = [
            distill_terms(
                output.hidden.flatten(0, 1),
                head_VD if self.rows is None else self.rows.head(head_VD),
                micro.targets_N,
                ce_weight_N,
                ce_scale=ce_scale,
                kd_scale=kd_scale,
                teacher=targets,
                shared_vocab_size=shared_vocab_size,
                divergence=self.settings.divergence() if divergence is None else divergence,
                chunk_rows=self.settings.chunk_rows,
            )
            for targets, ce_weight_N, shared_vocab_size in micro.parts()
        ]
        terms = parts[0]
        for part in parts[1:]:
            terms = DistillTerms(
                terms.loss + part.loss,
                terms.ce + part.ce,
                terms.kd + part.kd,
                terms.ce_N + part.ce_N,
                terms.kd_N + part.kd_N,
            )
        return output, terms

    @torch.no_grad()
    def survey(self, batch: Batch, real_N: Tensor, layers: Iterable[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Read a batch without any loss.

        Returns:
            tokens per layer and expert [L, E], fp64, and the hidden states [B, T, D] of the layers asked for.
        """
        output: Output = self.student(
            batch.ids_BT, documents_BT=batch.documents_BT, layers=list(layers), return_logits=False
        )
        return expert_counts(output.routing, real_N), output.hidden_states

    @torch.no_grad()
    def replies(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        temperature: float = 0.0,
        seed: int | None = None,
        forbidden_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        """Continuations, greedy by default, see `litgpt.generate.generate_batch`."""
        if self.rows is not None:
            self.rows.write_back(self.student)
        return generate_batch(
            self.student,
            prompts,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            sampling=Sampling(temperature=temperature),
            seed=seed,
            forbidden_ids=forbidden_ids,
        )

    def student_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The student's part of this module's state, with the learnt rows in its embedding and head."""
        student = {name.removeprefix("student."): x for name, x in state.items() if name.startswith("student.")}
        embedding, head = "transformer.wte.weight", "lm_head.weight"
        if self.rows is not None:
            tied = "rows.output" not in state
            for name, rows in ((embedding, "embedding"), (head, "embedding" if tied else "output")):
                if name in student:
                    student[name] = student[name].clone()
                    student[name][list(self.rows.ids)] = state[f"rows.{rows}"].to(student[name])
        return student


@torch.no_grad()
def evaluate(
    distiller: Distiller,
    batches: Iterable[Batch],
    *,
    teacher: BaseTeacher | None,
    view: TeacherView | None,
    reference: Reference,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    choices: Choices | None = None,
) -> dict[str, Any]:
    """Score the student on held-out dialogues.

    Args:
        distiller: the student with its rows.
        batches: the whole validation set, on the CPU.
        teacher, view: the loaded teacher and its side of these dialogues, or two `None`.
        reference: the dense base.
        device: the student's.
        autocast: gives the precision context of training.
        choices: takes up which experts the first tokens choose.

    Returns:
        plain numbers: `answer_ce` and `thought_ce` (nats a token), `kd_kl` (KL(teacher || student) at temperature 1,
        nats an answer token), the token counts behind them, and by layer `cka` (unbiased, exact over the set),
        `expert_load` (each expert's share of the choices), `expert_max_over_mean`, `router_entropy` and `router` (see
        `litgpt.routing.LayerStats`). What has no tokens is `None`.
    """
    student = distiller.student
    # A thought that weighs nothing in training is measured all the same.
    settings = LossSettings(thought_weight=1.0, cka_spans=distiller.settings.cka_spans)
    sums = torch.zeros(3, dtype=torch.float64)
    counts = torch.zeros(3, dtype=torch.int64)
    cka = {layer: StreamingCKA() for layer in distiller.layers}
    router = RouterStats()
    student.eval()
    for batch in batches:
        micro = MicroBatch(batch, settings, [view] if view else [], device)
        if teacher is not None:
            micro.teachers = [teacher.targets(side, micro.targets_N.numel()) for side in micro.teacher_batches]
        with autocast():
            reference_states = reference.hidden_states(micro.batch)
            output, terms = distiller.terms(micro, layers=distiller.layers, divergence=Divergence())
        for column, span in enumerate((Span.ANSWER, Span.THOUGHT)):
            of_span_N = micro.target_spans_N == span
            sums[column] += terms.ce_N[of_span_N].double().sum().cpu()
            counts[column] += of_span_N.sum().cpu()
        sums[2] += terms.kd_N.double().sum().cpu()
        counts[2] += int(micro.counts.kd)
        for layer, streaming in cka.items():
            streaming.update(output.hidden_states[layer][micro.cka_BT], reference_states[layer][micro.cka_BT])
        if output.routing:
            router.update(output.routing, micro.real_N)
            if choices is not None:
                choices.update(output.routing, micro.real_N)
    student.train()
    means = [float(s / n) if n else None for s, n in zip(sums, counts, strict=True)]
    layers = {str(layer.layer): layer for layer in router.results()}
    return {
        "answer_ce": means[0],
        "thought_ce": means[1],
        "kd_kl": means[2],
        "answer_tokens": int(counts[0]),
        "thought_tokens": int(counts[1]),
        "kd_tokens": int(counts[2]),
        "cka": {str(layer): c.result() if c.n >= MINIMUM_ROWS else None for layer, c in cka.items()},
        "expert_load": {name: list(layer.share_E) for name, layer in layers.items()},
        "expert_max_over_mean": {name: layer.max_over_mean for name, layer in layers.items()},
        "router_entropy": {name: layer.entropy for name, layer in layers.items()},
        "router": {name: layer.figures() for name, layer in layers.items()},
    }
