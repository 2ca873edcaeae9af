"""The end of a run: stored digits, the proof that nothing else moved, the report's numbers, and `final/`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt import rundir
from litgpt.checkpoint import load_state, read_provenance, save_lit_dir
from litgpt.config import OURS, Config
from litgpt.distill import Distiller
from litgpt.tensorfile import LitReader
from litgpt.trainable import Part, learns
from litgpt.utils import atomic_file


@torch.no_grad()
def round_to_stored(distiller: Distiller, student_dir: Path) -> None:
    """Give what was trained the digits that `final/` will store, so that what is validated last is what is stored.

    Args:
        distiller: whole or spread over processes.
        student_dir: the lit dir whose dtypes count.
    """
    dtypes = {name: spec.dtype for name, spec in LitReader(student_dir).specs.items()}
    for name, parameter in distiller.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("rows."):
            prefix = "lm_head." if name == "rows.output" else "transformer.wte."
        else:
            # On disk each expert stands alone.
            before, experts, _ = name.removeprefix("student.").partition(".experts.")
            prefix = before + experts
        stored = next(dtype for disk_name, dtype in dtypes.items() if disk_name.startswith(prefix))
        parameter.copy_(parameter.to(stored))


def write_final(
    out_dir: Path,
    student_dir: Path,
    state: Mapping[str, Tensor],
    config: Config,
    *,
    learnt_rows: Sequence[int],
    parts: Collection[Part],
    report: dict[str, Any],
    provenance: dict[str, Any],
) -> None:
    """Prove that nothing else moved, then write the report's numbers and, last, `final/`.

    Args:
        out_dir: the run directory.
        student_dir: the student before training.
        state: the trained student by memory names, on the CPU.
        config: the student's.
        learnt_rows: rows of embedding and head that were trained.
        parts: what else was.
        report: goes to `report/metrics.json`, with the result of the comparison.
        provenance: of the training.

    Raises:
        RuntimeError: a frozen tensor changed; nothing but the report is written then.
    """
    source = load_state(student_dir)
    # In the student's own dtype: frozen weights were widened to fp32 and come back unchanged.
    state = {name: state[name].to(tensor.dtype) for name, tensor in source.items()}
    frozen = compare_frozen(state, source, learnt_rows, parts)
    with atomic_file(out_dir / "report" / "metrics.json") as temporary:
        text = json.dumps(report | {"frozen": frozen}, ensure_ascii=False, indent=2)
        temporary.write_text(text + "\n", encoding="utf-8")
    if frozen["changed"]:
        raise RuntimeError(f"frozen tensors changed in training: {', '.join(frozen['changed'])}")
    earlier = read_provenance(student_dir)
    for name in ("tool", *OURS):  # the writer's own
        earlier.pop(name, None)
    save_lit_dir(
        out_dir / rundir.FINAL, state, config, source_dir=student_dir, provenance=earlier | {"distilled": provenance}
    )


def compare_frozen(
    state: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    learnt_rows: Sequence[int],
    parts: Collection[Part] = ("experts", "router"),
) -> dict[str, Any]:
    """Compare what must not have moved, bit by bit: everything but what learnt.

    Args:
        state: the trained student by memory names, in the dtypes of `source`.
        source: the student before training.
        learnt_rows: rows of embedding and head that were trained.
        parts: what else was.

    Returns:
        `compared` (tensors), `identical` (how many of them) and `changed` (the names of the others).
    """
    changed, compared = [], 0
    for name, before in source.items():
        if learns(name, parts):
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
