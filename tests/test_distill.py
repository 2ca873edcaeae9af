"""Wiring of the losses: what learns, what is scored where, and that cutting a batch changes nothing but rounding."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from litgpt.chat import Span
from litgpt.checkpoint import load_model
from litgpt.cka import linear_cka
from litgpt.data import PackedLoader, read_records
from litgpt.distill import Distiller, MicroBatch, Reference, StepCka, TeacherReference, Totals, cka_layers, evaluate
from litgpt.recipe import LossSettings
from litgpt.teacher import OnlineTeacher, TeacherView
from litgpt.tokenizer import Tokenizer
from litgpt.trainable import Part, parts_of
from litgpt.utils import UserError
from tests.world import World, make_world

CPU = torch.device("cpu")
FIRST = "student.transformer.h.0.mlp"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), dialogues=8)


class Step:
    """One optimizer step's losses on the whole training set, in float64."""

    def __init__(self, world: World, micro_batch_size: int, **weights: Any) -> None:
        self.settings = LossSettings(**({"cka_every": 1} | weights))
        tokenizer = Tokenizer(world.student)
        self.loader = PackedLoader(
            read_records(world.train), tokenizer, max_seq_length=320, micro_batch_size=micro_batch_size, seed=1
        )
        self.teacher = OnlineTeacher(world.teacher, tokenizer)
        self.view: TeacherView = self.teacher.read(self.loader)
        self.teacher.load(dtype=torch.float64)
        student = load_model(world.student, dtype=torch.float64)
        self.distiller = Distiller(student, tokenizer.thought_ids, self.settings)
        base = load_model(world.base, dtype=torch.float64)
        self.reference = Reference(base, student, tokenizer.thought_ids, self.distiller.layers)
        self.micros = [MicroBatch(batch, self.settings, [self.view], CPU) for batch in self.loader]
        self.totals = Totals(*torch.stack([micro.counts.as_tensor() for micro in self.micros]).sum(0).tolist())

    def backward(self, cka_weight: float = 0.0) -> Tensor:
        """Sum of the terms [ce, kd, cka, balance, z] over the micro-batches, with gradients in the parameters."""
        several = len(self.micros) > 1
        step_cka = StepCka(lambda tensor: tensor, root=self.settings.anchor == "root_cka")
        loads = []
        for micro in self.micros:
            load_LE, states = self.distiller.survey(micro.batch, micro.real_N, self.distiller.layers)
            step_cka.update(states, self.reference.hidden_states(micro.batch), micro.cka_BT)
            loads.append(load_LE)
        step_cka.finish()
        sums = torch.zeros(5, dtype=torch.float64)
        for micro in self.micros:
            micro.teachers = [self.teacher.targets(micro.teacher_batches[0], micro.targets_N.numel())]
            if cka_weight:
                micro.reference = self.reference.hidden_states(micro.batch)
            micro.load_LE = torch.stack(loads).sum(0)
            micro.step_cka = step_cka if several else None
            loss, terms = self.distiller(micro, self.totals, cka_weight)
            loss.backward()
            sums += terms.terms
        return sums

    def gradients(self) -> dict[str, Tensor]:
        named = self.distiller.named_parameters()
        return {name: p.grad for name, p in named if p.grad is not None and bool(p.grad.any())}


def test_gradients_reach_routers_experts_and_thought_rows_and_nothing_else(world: World) -> None:
    step = Step(world, 2)
    # Equal experts give the router no gradient but the balance loss's; unequal ones do.
    with torch.no_grad():
        for name, parameter in step.distiller.student.named_parameters():
            if "experts" in name:
                parameter.mul_(1 + 0.1 * torch.randn(len(parameter), 1, 1, dtype=torch.float64))
    step.backward(cka_weight=0.1)
    learning = {f"student.transformer.h.{i}.mlp.{part}" for i in range(2) for part in ("gate.weight",)}
    learning |= {
        f"student.transformer.h.{i}.mlp.experts.{part}" for i in range(2) for part in ("gate_up_proj", "down_proj")
    }
    assert set(step.gradients()) == learning | {"rows.embedding"}
    assert {n for n, p in step.distiller.named_parameters() if p.requires_grad} == learning | {"rows.embedding"}
    assert step.gradients()["rows.embedding"].ne(0).all(1).tolist() == [True, True]


@pytest.mark.parametrize("term", ["task_weight", "kd_weight", "router_weight", "cka"])
def test_each_weight_switches_its_own_term(world: World, term: str) -> None:
    weights = {"task_weight": 0.0, "kd_weight": 0.0, "router_weight": 0.0}
    off = Step(world, 4, **weights)
    off.backward()
    assert off.gradients() == {}
    on = Step(world, 4, **{name: 1.0 if name == term else 0.0 for name in weights})
    with torch.no_grad():  # at step 0 CKA is 1 and has no gradient
        dict(on.distiller.named_parameters())[f"{FIRST}.experts.down_proj"][0].mul_(1.5)
    on.backward(cka_weight=1.0 if term == "cka" else 0.0)
    assert on.gradients()


def test_kd_is_scored_on_the_answer_alone(world: World) -> None:
    step = Step(world, 2, task_weight=0.0, kd_weight=1.0, router_weight=0.0)
    micro = step.micros[0]
    micro.teachers = [step.teacher.targets(micro.teacher_batches[0], micro.targets_N.numel())]
    hidden: list[Tensor] = []

    def keep(_module: Any, _arguments: Any, output: Tensor) -> None:
        output.retain_grad()
        hidden.append(output)

    step.distiller.student.transformer.ln_f.register_forward_hook(keep)
    loss, _ = step.distiller(micro, step.totals, 0.0)
    loss.backward()
    assert hidden[0].grad is not None
    touched_N = hidden[0].grad.flatten(0, 1).ne(0).any(1)
    spans_N = micro.target_spans_N
    assert (spans_N == Span.THOUGHT).sum() > 10
    assert torch.equal(touched_N, spans_N == Span.ANSWER)


def test_cross_entropy_weighs_thoughts_as_told(world: World) -> None:
    step = Step(world, 8, thought_weight=0.25)
    (micro,) = step.micros
    expected = {Span.PROMPT: 0.0, Span.THOUGHT: 0.25, Span.ANSWER: 1.0, Span.PAD: 0.0}
    for span, weight in expected.items():
        assert (micro.ce_weight_N[micro.target_spans_N == span] == weight).all()
    _, terms = step.distiller.terms(micro)
    logits = step.distiller.student(micro.batch.ids_BT, documents_BT=micro.batch.documents_BT).logits
    losses_N = torch.nn.functional.cross_entropy(logits.flatten(0, 1), micro.targets_N, reduction="none")
    expected_ce = (losses_N * micro.ce_weight_N).sum() / micro.ce_weight_N.sum()
    assert float(terms.ce.detach() / step.totals.ce) == pytest.approx(float(expected_ce.detach()), rel=1e-9)


def test_cutting_the_step_otherwise_changes_nothing_but_rounding(world: World) -> None:
    rows = len(Step(world, 1).micros)
    assert rows >= 3
    whole, halves, rowwise = Step(world, rows), Step(world, 2), Step(world, 1)
    sums = [step.backward() for step in (whole, halves, rowwise)]
    assert [len(step.micros) for step in (whole, halves, rowwise)] == [1, -(-rows // 2), rows]
    for other, step in zip(sums[1:], (halves, rowwise), strict=True):
        torch.testing.assert_close(other, sums[0], rtol=1e-6, atol=1e-9)
        assert set(step.gradients()) == set(whole.gradients())
        for name, gradient in step.gradients().items():
            torch.testing.assert_close(gradient, whole.gradients()[name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("anchor", ["cka", "root_cka", "mse"])
def test_the_anchor_of_a_step_is_that_of_all_its_rows_however_it_is_cut(world: World, anchor: str) -> None:
    """Value and gradient against autograd through the formula on the rows put together."""
    rows = len(Step(world, 1).micros)
    sums, gradients = [], []
    for size in (rows, 2, 1):
        step = Step(world, size, task_weight=0.0, kd_weight=0.0, router_weight=0.0, anchor=anchor)
        with torch.no_grad():
            dict(step.distiller.named_parameters())[f"{FIRST}.experts.down_proj"][0].mul_(3)
        assert len({int(micro.cka_BT.sum()) for micro in step.micros}) > 1 or size == rows
        sums.append(float(step.backward(cka_weight=1.0)[2]))
        gradients.append(step.gradients())
    whole = Step(world, 1)
    with torch.no_grad():
        dict(whole.distiller.named_parameters())[f"{FIRST}.experts.down_proj"][0].mul_(3)
    x: dict[int, list[Tensor]] = {layer: [] for layer in whole.distiller.layers}
    y: dict[int, list[Tensor]] = {layer: [] for layer in whole.distiller.layers}
    for micro in whole.micros:
        output, _ = whole.distiller.terms(micro, layers=whole.distiller.layers)
        reference = whole.reference.hidden_states(micro.batch)
        for layer in x:
            x[layer].append(output.hidden_states[layer][micro.cka_BT])
            y[layer].append(reference[layer][micro.cka_BT])

    def of(x_ND: Tensor, y_ND: Tensor) -> Tensor:
        if anchor == "mse":
            return ((x_ND - y_ND).norm(dim=1) / y_ND.norm(dim=1)).square().mean()
        return 1 - (linear_cka(x_ND, y_ND).sqrt() if anchor == "root_cka" else linear_cka(x_ND, y_ND))

    expected = torch.stack([of(torch.cat(x[layer]), torch.cat(y[layer])) for layer in x]).mean()
    expected.backward()
    assert float(expected.detach()) > 1e-4
    assert sums == pytest.approx([float(expected.detach())] * 3, rel=1e-9)
    for found in gradients:
        assert set(found) == set(whole.gradients())
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, whole.gradients()[name], rtol=1e-8, atol=1e-12)


def test_the_anchor_may_look_at_named_layers_and_at_few_rows(world: World) -> None:
    step = Step(world, 2, cka_layers=[1], cka_rows=20)
    assert step.distiller.layers == [1]
    again = Step(world, 2, cka_layers=[1], cka_rows=20)
    for micro, same, whole in zip(step.micros, again.micros, Step(world, 2).micros, strict=True):
        assert micro.counts.cka == int(micro.cka_BT.sum()) == 20 < whole.counts.cka
        assert bool((whole.cka_BT | ~micro.cka_BT).all()) and torch.equal(micro.cka_BT, same.cka_BT)
    with pytest.raises(UserError, match="the student has 2 layers"):
        Step(world, 2, cka_layers=[2])
    for wrong, why in (({"cka_rows": 3}, "at least 4"), ({"cka_layers": []}, "layer numbers"),
                       ({"anchor": "mse", "anchor_to": "teacher"}, "equally wide")):  # fmt: skip
        with pytest.raises(UserError, match=why):
            LossSettings(**wrong)


def test_the_teacher_as_reference_gives_its_layers_that_are_as_far_along(world: World) -> None:
    step = Step(world, 2)
    model = step.teacher.model
    assert model is not None and model.config.n_layer == 3
    reference = TeacherReference(model, 2, [0, 1])
    batch = step.micros[0].batch
    states = reference.hidden_states(batch)
    whole = model(batch.ids_BT, documents_BT=batch.documents_BT, layers=range(3)).hidden_states
    assert torch.equal(states[0], whole[0]) and torch.equal(states[1], whole[2])
    assert states[1].shape[-1] == 48 and not states[1].requires_grad


def test_a_micro_batch_of_padding_alone_has_a_gradient_of_zero(world: World) -> None:
    step = Step(world, 2)
    empty = replace(step.micros[0].batch)
    empty.documents_BT = torch.full_like(empty.documents_BT, -1)
    empty.spans_BT = torch.full_like(empty.spans_BT, Span.PAD)
    empty.records = [[] for _ in empty.records]
    micro = MicroBatch(empty, step.settings, [step.view], CPU)
    assert micro.counts == Totals(0, 0, 0, 0)
    micro.teachers = [step.teacher.targets(micro.teacher_batches[0], micro.targets_N.numel())]
    micro.load_LE = torch.ones(2, 4, dtype=torch.float64)
    loss, _ = step.distiller(micro, step.totals, 0.05)
    assert float(loss.detach()) == 0
    loss.backward()
    learning = [p for p in step.distiller.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in learning)


def test_the_upcycled_student_is_its_base_at_every_token(world: World) -> None:
    step = Step(world, 2)
    for micro in step.micros:
        output, _ = step.distiller.terms(micro, layers=step.distiller.layers)
        for layer, states in step.reference.hidden_states(micro.batch).items():
            torch.testing.assert_close(output.hidden_states[layer], states, rtol=1e-10, atol=1e-10)


def test_a_base_that_is_not_the_students_is_refused(world: World) -> None:
    student = load_model(world.student)
    with pytest.raises(UserError, match="has n_layer 3, the student"):
        Reference(load_model(world.teacher), student, None, [0])
    other = load_model(world.base)
    with torch.no_grad():
        dict(other.named_parameters())["transformer.h.1.attn.proj.weight"][0, 0] += 1
    with pytest.raises(UserError, match=r"h.1.attn.proj.weight of the base .* is not the student's"):
        Reference(other, student, None, [0])


def test_a_dense_student_is_refused_unless_what_shall_learn_is_named(world: World) -> None:
    config = load_model(world.base).config
    with pytest.raises(UserError, match=r"is dense: make a mixture of experts of it first"):
        parts_of(None, config, {})
    assert parts_of(["mlp"], config, {}) == ("mlp",)
    with pytest.raises(UserError, match="has no experts"):
        parts_of(["experts"], config, {})


@pytest.mark.parametrize("parts", [("router",), ("experts", "thought_tokens"), ("attention", "norms")])
def test_only_the_named_parts_learn(world: World, parts: tuple[Part, ...]) -> None:
    distiller = Distiller(load_model(world.student), (5, 6), LossSettings(), parts)
    marks = {
        "router": (".mlp.gate.",),
        "experts": (".mlp.experts.",),
        "thought_tokens": ("rows.",),
        "attention": (".attn.qkv.", ".attn.proj."),
        "norms": ("norm",),
    }
    learning = {name for name, p in distiller.named_parameters() if p.requires_grad}
    norms = {name for name in learning if "norm" in name or "ln_f" in name}
    assert learning and bool(norms) == ("norms" in parts)
    assert all(any(mark in name for part in parts for mark in marks[part]) for name in learning - norms)
    for part in parts:
        assert any(marks[part][0] in name for name in learning)


def test_thought_rows_stand_in_for_the_embedding_and_go_back_into_it(world: World) -> None:
    tokenizer = Tokenizer(world.student)
    student = load_model(world.student)
    before = student.transformer.wte.weight.detach().clone()
    distiller = Distiller(student, tokenizer.thought_ids, LossSettings())
    assert distiller.rows is not None and tokenizer.thought_ids is not None
    ids = list(tokenizer.thought_ids)
    with torch.no_grad():
        distiller.rows.embedding.mul_(3).add_(1)
    sequence = torch.tensor([[5, ids[0], 7, ids[1], 9]])
    patched = student(sequence).logits
    head = distiller.rows.head(student.lm_head.weight)
    assert head.rows_RD is distiller.rows.embedding and head.row_ids == tokenizer.thought_ids
    distiller.rows.write_back(student)
    whole = load_model(world.student)
    whole.load_state_dict(student.state_dict())
    # The model's own head has the rows only now; hidden states had them before.
    torch.testing.assert_close(whole(sequence).hidden, student(sequence).hidden)
    others = torch.tensor([i for i in range(len(before)) if i not in ids])
    torch.testing.assert_close(patched[..., others], whole(sequence).logits[..., others])
    assert torch.equal(student.transformer.wte.weight[others], before[others])
    assert torch.equal(student.transformer.wte.weight[ids], distiller.rows.embedding)
    assert student.lm_head.weight is student.transformer.wte.weight


def test_validation_counts_and_averages_over_tokens(world: World) -> None:
    step = Step(world, 3)
    metrics = evaluate(
        step.distiller,
        step.loader,
        teacher=step.teacher,
        view=step.view,
        reference=step.reference,
        device=CPU,
        autocast=nullcontext,
    )
    targets = [batch.next_tokens() for batch in Step(world, 3).loader]
    for name, span in (("answer", Span.ANSWER), ("thought", Span.THOUGHT)):
        assert metrics[f"{name}_tokens"] == sum(int((spans_BT == span).sum()) for _, spans_BT in targets)
    assert metrics["kd_tokens"] == metrics["answer_tokens"]
    answers = [
        float(-torch.log_softmax(logits[0, t].double(), -1)[target])
        for document in step.loader.documents
        for logits in [step.distiller.student(document.ids_T[None].long()).logits.detach()]
        for t, (span, target) in enumerate(zip(document.spans_T[1:], document.ids_T[1:].long(), strict=True))
        if span == Span.ANSWER
    ]
    assert metrics["answer_ce"] == pytest.approx(sum(answers) / len(answers), rel=1e-6)
    assert all(value == pytest.approx(1, abs=1e-9) for value in metrics["cka"].values())
    assert set(metrics["cka"]) == {"0", "1"}
    assert all(sum(share) == pytest.approx(1) for share in metrics["expert_load"].values())
    assert metrics["kd_kl"] > 0


def test_layers_for_cka_are_every_nth_and_the_last() -> None:
    assert cka_layers(28, 4) == [3, 7, 11, 15, 19, 23, 27]
    assert cka_layers(6, 4) == [3, 5]
    assert cka_layers(2, 4) == [1]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("kd_weight", -1.0), ("temperature", 0.0), ("cka_fraction", 1.5), ("cka_every", 0), ("chunk_rows", 0)],
)
def test_settings_that_make_no_sense_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(UserError, match="loss"):
        LossSettings(**{setting: value})
