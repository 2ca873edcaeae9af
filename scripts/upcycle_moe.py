"""Make a mixture of experts of a dense checkpoint: `python scripts/upcycle_moe.py [--config configs/upsample.yaml]`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from litgpt.recipes import recipe_of
from litgpt.routers import RouterStart
from litgpt.upcycle import Format, ProofDtype, Report, upcycle, verify
from litgpt.upcycle_report import REPORT_DIR
from litgpt.utils import UserError, run_cli


def upcycle_moe(
    router: RouterStart,
    checkpoint_dir: Path = Path("checkpoints/Qwen/Qwen3-0.6B"),
    out_dir: Path | None = None,
    recipe: Literal["copy", "noise", "drop", "granular", "shared"] = "copy",
    noise_sigma: float | None = None,
    drop_ratio: float | None = None,
    granularity: int | None = None,
    n_expert: int = 8,
    n_expert_per_token: int = 2,
    layers: str = "all",
    format: Format = "lit",
    thought_tokens: Literal["add", "none"] = "add",
    trainable: list[str] | None = None,
    seed: int = 1337,
    proof_dtype: ProofDtype = "all",
    verify_dir: Path | None = None,
) -> None:
    """Turn a dense model into a mixture of experts and prove what that did to its function.

    The recipes copy, granular and shared leave the function as it is, noise and drop change it by what is printed.
    The proof goes to report/upcycle.md in the new directory. With --verify_dir nothing is made: the same proof is
    shown for a mixture of experts that is there already.

    Args:
        router: how the routers start.
        checkpoint_dir: lit or Hugging Face directory of the dense model; only read.
        out_dir: directory to write; an earlier result is replaced once the new one is proved. With --verify_dir, where
            the report goes. Default: {checkpoint_dir}-MoE-{n_expert}x{n_expert_per_token}.
        recipe: how each expert is made of the dense FFN: copy (equal to it), noise (copies with noise), drop (a share
            of the neurons starts anew), granular (cut into finer experts), shared (the FFN stays, experts add to it;
            lit format only).
        noise_sigma: of noise: standard deviation of the noise as a share of each matrix' own; 0.01 if not given.
        drop_ratio: of drop: share of the neurons; 0.1 if not given.
        granularity: of granular: finer experts per FFN; 2 if not given. A power of two is exact.
        n_expert: experts per layer, at least 2 (of granular: before they are cut).
        n_expert_per_token: experts that each token goes through.
        layers: which get experts: all, every:N, or numbers like 0,4,8. llama.cpp and Mixtral's format need all.
        format: lit, or hf (what transformers and vLLM load).
        thought_tokens: add = <thought> and </thought> take two free vocabulary rows; none = vocabulary as it is.
        trainable: parts that training will change, of experts, router, shared_expert, mlp, attention, norms and
            thought_tokens; written into provenance.yaml. Default: experts, router, thought_tokens.
        seed: of everything drawn.
        proof_dtype: arithmetic of the proof; all = float32 and, on one sentence, bfloat16. A float32 proof beyond its
            bounds is repeated in float64, which decides. none = every stored tensor is read back and its bits are
            compared, as always, but neither model is run.
        verify_dir: lit or Hugging Face directory of a mixture of experts to compare with checkpoint_dir.
    """
    start = time.perf_counter()
    if verify_dir is not None:
        report = verify(checkpoint_dir, verify_dir, out_dir=out_dir, proof_dtype=proof_dtype)
        print(summary(report, time.perf_counter() - start, verb="checked"))
        if damage := damaged(report):
            raise UserError(damage)
        return
    made = upcycle(
        checkpoint_dir,
        out_dir,
        recipe=recipe_of(recipe, sigma=noise_sigma, ratio=drop_ratio, parts=granularity),
        n_expert=n_expert,
        n_expert_per_token=n_expert_per_token,
        layers=layers,
        router=router,
        format=format,
        thought_tokens=thought_tokens,
        trainable=trainable,
        seed=seed,
        proof_dtype=proof_dtype,
    )
    print(summary(made, time.perf_counter() - start, verb="written and proved"))
    print(f"  the whole proof: {made.out_dir / REPORT_DIR / 'upcycle.md'}")


def damaged(report: Report) -> str | None:
    """What is wrong with a mixture whose frozen tensors are not the dense model's, in one line; `None` if nothing is.

    Experts and routers that differ may have been trained.
    """
    frozen = [name for name in report.changed if ".experts." not in name]
    if not frozen:
        return None
    return f"{len(frozen)} tensors outside the experts are not the dense model's, e.g. {frozen[0]}: trained, or damaged"


def summary(made: Report, seconds: float, *, verb: str) -> str:
    """What was made and its proof, as a small table."""
    lines = [
        f"{made.config.name} in {made.out_dir}",
        f"  {made.n_parameters / 1e9:.3g} B parameters, {made.n_active / 1e9:.3g} B active per token, "
        f"{made.n_bytes / 1e9:.3g} GB, {verb} in {seconds:.1f} s",
    ]
    if made.thought_ids is not None:
        lines.append(f"  <thought> is token {made.thought_ids[0]}, </thought> is token {made.thought_ids[1]}")
    if made.proofs:
        lines += ["", f"  {'proof':<8} {'tokens':>6} {'max |Δ logit|':>14} {'KL mean':>9} {'KL max':>9} {'top-1':>8}"]
    lines += [
        f"  {proof.dtype:<8} {proof.n_tokens:>6} {proof.max_abs_diff:>14.1e} {proof.kl:>9.1e} {proof.kl_max:>9.1e} "
        f"{proof.top1_agreement:>8.2%}"
        for proof in made.proofs
    ]
    if made.changed:
        lines.append(f"  {len(made.changed)} tensors are not what the recipe makes, e.g. {made.changed[0]}")
    elif made.recipe["recipe"] == "copy":
        lines.append("  attention, norms, embedding, head and every expert: bit for bit the dense model's")
    else:
        lines.append(
            "  attention, norms, embedding and head: bit for bit the dense model's; "
            f"every expert: bit for bit what {made.recipe['recipe']} makes of the dense FFN"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(upcycle_moe)
