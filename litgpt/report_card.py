"""The model card of a finished run, in Hugging Face's form: metadata as YAML, then Markdown.

It says what the run's files know, and of everything else that it is unknown. Source of the form: the model card
specification of the Hugging Face hub, through `huggingface_hub.ModelCardData`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from litgpt.config import Config
from litgpt.keymap import layout
from litgpt.report_text import (
    UNKNOWN,
    cka_table,
    code,
    exam_table,
    fenced,
    further_tables,
    held_out_table,
    router_table,
    table,
    training_table,
)
from litgpt.rundir import FINAL
from litgpt.runfiles import RunFiles
from litgpt.tensorfile import LIT_FILE
from litgpt.utils import UserError

MARK = "<!-- made by scripts/report_run.py, which replaces this file; delete this line to keep what you write here -->"
NOT_RECORDED = "not recorded"
QUESTION_HI = "गेहूं के पत्तों पर पीले धब्बे दिख रहे हैं, फसल 60 दिन की है"


def model_card(
    run: RunFiles, *, license: str | None = None, base_model: str | None = None, datasets: Sequence[str] = ()
) -> str:
    """The card as one text.

    Args:
        run: a finished one.
        license: licence of the model as the hub names it; `None`: unknown.
        base_model: the dense model's name on the hub; `None`: by the name of its directory, if that is a model we know.
        datasets: names on the hub of the training data.
    """
    from huggingface_hub import ModelCard, ModelCardData

    config = Config.from_checkpoint(run.directory / FINAL)
    base_model = base_model or hub_name(_upcycled(run).get("source") or run.setting("base"))
    with_teacher = run.setting("loss.kd_weight") != 0
    data = ModelCardData(
        language="hi",
        license=license or UNKNOWN,
        library_name="litgpt",
        pipeline_tag="text-generation",
        base_model=base_model,
        datasets=list(datasets) or None,
        tags=["mixture-of-experts", "upcycling", *["knowledge-distillation"] * with_teacher, "agriculture"],
    )
    body = "\n\n".join(
        [
            MARK,
            f"# {config.name}, distilled",
            _what(run, config),
            "## Intended use and limits",
            _limits(),
            "## How to run it",
            _how_to_run(),
            "## Training",
            _training(run),
            "## Data",
            _data(run, datasets),
            "## Models it was made of",
            _models(run, base_model),
            "## Licences",
            _licences(run, license),
            "## Evaluation",
            _evaluation(run),
            "## What was not measured",
            _not_measured(run),
            "## All settings",
            fenced(yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True).rstrip("\n"), "yaml"),
        ]
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def hub_name(directory: object) -> str | None:
    """`Qwen/Qwen3-0.6B` for a directory called Qwen3-0.6B; `None` for a name that our table does not have."""
    try:
        hf = Config.from_name(Path(str(directory)).name).hf_config
    except UserError:
        return None
    return f"{hf['org']}/{hf['name']}" if "org" in hf and "name" in hf else None


def _upcycled(run: RunFiles) -> Mapping[str, Any]:
    values = run.provenance.get("upcycled")
    return values if isinstance(values, Mapping) else {}


def _distilled(run: RunFiles) -> Mapping[str, Any]:
    values = run.provenance.get("distilled")
    return values if isinstance(values, Mapping) else {}


def _what(run: RunFiles, config: Config) -> str:
    shapes = layout(config, "lit", tied=config.tie_embeddings).shapes
    total = sum(math.prod(shape) for shape in shapes.values())
    text = f"A decoder-only language model for Hindi crop advice: {config.n_layer} layers, {total:,} parameters"
    if config.n_expert:
        experts = sum(math.prod(shape) for name, shape in shapes.items() if ".mlp.experts." in name)
        active = total - experts * (config.n_expert - config.n_expert_per_token) // config.n_expert
        text += (
            f", of which a token uses {active:,}: a mixture of {config.n_expert} experts a layer, "
            f"{config.n_expert_per_token} for each token"
        )
    text += f". Made from {code(run.setting('base') or UNKNOWN)}"
    if _upcycled(run):
        text += f" by upcycling (recipe: {_upcycled(run).get('recipe', UNKNOWN)}{_proof(run)})"
    if run.setting("loss.kd_weight") != 0:
        text += f", then distilled from {code(run.setting('teacher') or UNKNOWN)}"
        own = list(dict.fromkeys(teacher for _, teacher in _own_teachers(run)))
        text += f" and, for single sources of its data, from {' and '.join(map(code, own))}" if own else ""
    frozen = (run.metrics or {}).get("frozen") or {}
    text += f". Trained were: {_trained(run)}"
    if frozen.get("compared"):
        same = "all of them unchanged" if frozen.get("identical") == frozen["compared"] else "not all unchanged"
        text += f"; the other {frozen['compared']} tensors were compared bit by bit afterwards, {same}"
    return text + f".\n\nWritten by: {code(run.provenance.get('tool', UNKNOWN))}."


def _trained(run: RunFiles) -> str:
    """The parts that learnt, in words."""
    with_rows = bool(_upcycled(run).get("thought_ids"))
    parts = run.setting("optim.trainable") or ["experts", "router", "thought_tokens"]
    words = {"router": "routers", "thought_tokens": "the rows of the two thought tokens"}
    return ", ".join(words.get(part, part.replace("_", " ")) for part in parts if part != "thought_tokens" or with_rows)


def _proof(run: RunFiles) -> str:
    proofs = [proof for proof in _upcycled(run).get("proof") or [] if isinstance(proof, Mapping)]
    return "".join(
        f"; on {proof['n_tokens']} tokens its logits differed from the base's by at most {proof['max_abs_diff']:.1e}, "
        f"in {proof['dtype']}"
        for proof in proofs
        if {"n_tokens", "max_abs_diff", "dtype"} <= set(proof)
    )


def _limits() -> str:
    return "\n".join(
        [
            "Meant for research on sparse models, and as the language part of a crop adviser for Indian farmers.",
            "",
            "- What it writes is advice only after the project's guard (`advisory/guard.py`) has passed it: banned and",
            "  restricted chemicals, doses without a source, emergencies. The weights hold no such check: run it on",
            "  every answer before a farmer sees it.",
            "- No agronomist has reviewed the model or its answers.",
            "- Take no dose from its memory. Only a copy of a line of the official list that was shown with",
            "  the question may stand; any other dose in an answer is an error.",
            "- It can name the wrong cause in good Hindi. The Kisan Call Centre (1800-180-1551) and the nearest Krishi",
            "  Vigyan Kendra decide.",
            "- Not for medicine, law, or poisoning: in an emergency call 108 or 112.",
        ]
    )


def _how_to_run() -> str:
    lines = [
        "# in the project's directory; THIS_DIRECTORY is the one that holds this card and lit_model.pth",
        f'python scripts/advise.py --checkpoint_dir THIS_DIRECTORY "{QUESTION_HI}"',
        "# for transformers and vLLM:",
        "python scripts/convert_lit_checkpoint.py --checkpoint_dir THIS_DIRECTORY --out_dir HF_DIRECTORY",
    ]
    return fenced("\n".join(lines), "sh")


def _training(run: RunFiles) -> str:
    def said(dotted: str) -> str:
        value = run.setting(dotted)
        if isinstance(value, list):
            return ", ".join(map(str, value))
        return UNKNOWN if value is None else str(value)

    anchor, moves = said("loss.cka_weight"), ""
    if run.setting("loss.cka_weight_end") is not None:
        anchor += f" → {said('loss.cka_weight_end')}"
        moves = f"linearly over {said('loss.cka_fraction')} of the steps; "
    rows = [
        ["cross-entropy on thought and answer", said("loss.task_weight"),
         f"a thought token counts {said('loss.thought_weight')}"],
        [_divergence(run), said("loss.kd_weight"),
         f"temperature {said('loss.temperature')}, teacher's view {said('loss.teacher_view')}"
         + (f"; on-policy in {share:.0%} of the micro-batches: the student's own answers at temperature "
            f"{said('loss.on_policy_temperature')}" if (share := run.setting("loss.on_policy") or 0) else "")],
        ["1 − CKA to the dense base", anchor, f"{moves}spans {said('loss.cka_spans')}"],
        ["router balance", said("loss.router_weight"), "1 when all experts get equal shares"],
    ]  # fmt: skip
    known = {"task_weight", "thought_weight", "kd_weight", "cka_weight", "router_weight"}
    others = [name for name in run.setting("loss") or {} if name.endswith("_weight") and name not in known]
    rows += [[code(name), said(f"loss.{name}"), ""] for name in others]
    lines = [
        "The loss is the sum of these terms, each times its weight:",
        "",
        table(["term", "weight", "how"], rows, numbers_from=3),
        "",
        f"AdamW, learning rate {said('optim.lr')} falling to {said('optim.min_lr')} by a cosine after a warm-up over "
        f"{said('optim.warmup')} of the steps. Micro-batches a step and process: {said('optim.accumulation')}, of "
        f"{said('data.micro_batch_size')} rows of at most {said('data.max_seq_length')} tokens; processes: "
        f"{_distilled(run).get('world_size', UNKNOWN)}; precision: {said('run.precision')}; seed: {said('seed')}.",
        "",
        training_table(run),
    ]
    return "\n".join(lines)


def _divergence(run: RunFiles) -> str:
    """How the KD term compares student and teacher; runs of the time before it could be chosen are forward KL."""
    kind = run.setting("loss.kd_kind") or "forward"
    names = {
        "forward": "KL(teacher, student)",
        "reverse": "KL(student, teacher)",
        "jsd": f"generalised Jensen-Shannon divergence, beta {run.setting('loss.kd_beta')}",
        "skew": f"skew KL(teacher, {run.setting('loss.kd_alpha')} teacher + the rest student)",
    }
    return f"{names.get(kind, kind)} on the answer"


def _sources(run: RunFiles) -> Mapping[str, Mapping[str, Any]]:
    """The settings of each source of a mixture; empty without one."""
    return run.setting("data.sources") or {}


def _own_teachers(run: RunFiles) -> list[tuple[str, str]]:
    """Source, its own teacher."""
    return [(name, str(source["teacher"])) for name, source in _sources(run).items() if source.get("teacher")]


def _hashes(value: object) -> str:
    """A hash, or hashes by file name, as a table's cell."""
    if isinstance(value, Mapping):
        return "<br>".join(f"{code(name)} {code(digest)}" for name, digest in value.items()) or NOT_RECORDED
    return code(value) if value else NOT_RECORDED


def _data(run: RunFiles, datasets: Sequence[str]) -> str:
    training = (run.metrics or {}).get("training") or {}

    def row(label: str, path: object, read: object, too_long: object, digest: str) -> list[str]:
        left_out = str(len(too_long)) if isinstance(too_long, list) else UNKNOWN
        hashes = _hashes(_distilled(run).get(f"{digest}_sha256"))
        return [label, code(path or UNKNOWN), UNKNOWN if read is None else str(read), left_out, hashes]

    def split(label: str, setting: str, name: str) -> list[str]:
        read, too_long = (training.get(f"{name}_dialogues{end}") for end in ("", "_too_long"))
        return row(label, run.setting(f"data.{setting}"), read, too_long, setting)

    rows = []
    for name, source in _sources(run).items():
        given = (training.get("sources") or {}).get(name) or {}
        label = f"training, {source.get('weight', UNKNOWN)} parts: {code(name)}"
        rows.append(row(label, source.get("path"), given.get("documents"), given.get("dropped"), f"sources.{name}"))
    if not rows:
        rows.append(split("training", "stream" if run.setting("data.stream") else "train", "train"))
    rows.append(split("held-out", "val", "val"))
    for name, path in (run.setting("data.more_val") or {}).items():
        # Of these the run notes no more than the file.
        rows.append(row(f"held-out, further: {code(name)}", path, None, None, f"more_val.{name}"))
    known = f"On the hub: {', '.join(map(code, datasets))}." if datasets else "No name on the hub was given for them."
    head = ["split", "file", "documents read", "left out as too long", "SHA-256"]
    return f"{table(head, rows, numbers_from=5)}\n\n{known}"


def _models(run: RunFiles, base_model: str | None) -> str:
    upcycled, distilled = _upcycled(run), _distilled(run)
    source = (upcycled.get("source_provenance") or {}).get("sha256")
    weights = {**(upcycled.get("source_sha256") or {}), **(source if isinstance(source, Mapping) else {})}
    with_teacher = run.setting("loss.kd_weight") != 0
    rows = [
        ["this model", code(FINAL), "", _hashes({LIT_FILE: run.final_sha256})],
        ["student before training", code(run.setting("student") or UNKNOWN), "",
         _hashes(distilled.get("student_sha256"))],
        ["dense base", code(run.setting("base") or UNKNOWN), base_model or UNKNOWN,
         _hashes(distilled.get("base_sha256") or weights)],
        ["teacher", code(run.setting("teacher") or UNKNOWN) if with_teacher else "none (loss.kd_weight is 0)",
         (hub_name(run.setting("teacher")) or UNKNOWN) if with_teacher else "",
         _hashes(distilled.get("teacher_sha256")) if with_teacher else ""],
        *([f"teacher of the source {code(name)}", code(teacher), hub_name(teacher) or UNKNOWN,
           _hashes(distilled.get(f"sources.{name}.teacher_sha256"))] for name, teacher in _own_teachers(run)),
    ]  # fmt: skip
    note = "Names on the hub follow from the directories' names, where they are not given by hand."
    return f"{table(['', 'directory', 'on the hub', 'SHA-256'], rows, numbers_from=4)}\n\n{note}"


def _licences(run: RunFiles, license: str | None) -> str:
    recorded = [f"- {code(name)}: {value}" for name, value in _leaves(run.provenance) if "licen" in name.lower()]
    return "\n".join(
        [
            f"- this model: {license or f'{UNKNOWN}; it must be fit for base, teacher and data'}",
            *(recorded or [f"- base, teacher and data: {UNKNOWN}, the run's files record none"]),
        ]
    )


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _evaluation(run: RunFiles) -> str:
    before, after = (values or {} for values in run.validations())
    parts = [
        "Before: the upcycled student at step 0. After: this model. On held-out dialogues, each answer after the "
        "dialogue's own thought.",
        held_out_table(before, after),
        *further_tables(before, after),
    ]
    if before.get("cka") or after.get("cka"):
        parts += [
            "CKA to the dense base by layer (unbiased, linear):",
            cka_table(before.get("cka") or {}, after.get("cka") or {}),
        ]
    if after.get("expert_load"):
        parts += ["Experts on the held-out dialogues:", router_table(before, after)]
    if run.exams:
        parts += ["The exam, deterministic checks of free answers:", exam_table(run.exams)]
    return "\n\n".join(parts)


def _not_measured(run: RunFiles) -> str:
    lines = []
    if not run.exams:
        lines.append("- Free answers: no exam of this model (`scripts/examine.py`) was found. The losses above are")
        lines.append("  teacher-forced, and most of an answer is fixed wording: a low loss is no right diagnosis.")
    if run.setting("loss.kd_weight") == 0:
        lines.append("- Likeness to a teacher: none was used.")
    lines += [
        "- Usefulness to farmers, and judgement by agronomists.",
        "- Spread over seeds: this is one run of one seed.",
        "- Languages other than Hindi, general knowledge, and what of it was lost in training.",
        "- Bias, misuse, and attacks beyond the checks of the exam.",
        "- Speed and memory when answering.",
    ]
    return "\n".join(lines)
