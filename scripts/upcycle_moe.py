"""Make a mixture of experts of a dense checkpoint: `python scripts/upcycle_moe.py [--config configs/upsample.yaml]`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from litgpt.upcycle import Upcycled, upcycle
from litgpt.utils import run_cli


def upcycle_moe(
    checkpoint_dir: Path = Path("checkpoints/Qwen/Qwen3-0.6B"),
    out_dir: Path | None = None,
    n_expert: int = 8,
    n_expert_per_token: int = 2,
    router_std: float = 0.02,
    thought_tokens: Literal["add", "none"] = "add",
    seed: int = 1337,
    proof_dtype: Literal["float32", "float64", "both"] = "float32",
) -> None:
    """Turn a dense model into a mixture of equal experts and prove that it still computes the same function.

    Args:
        checkpoint_dir: lit directory of the dense model (made by scripts/convert_hf_checkpoint.py); only read.
        out_dir: lit directory to write; an earlier result is replaced once the new one is proved.
            Default: {checkpoint_dir}-MoE-{n_expert}x{n_expert_per_token}.
        n_expert: experts per layer, at least 2.
        n_expert_per_token: experts that each token goes through.
        router_std: standard deviation of the routers' random weights, above 0.
        thought_tokens: add = <thought> and </thought> take two free vocabulary rows; none = vocabulary as it is.
        seed: of the routers and of the noise on the two rows.
        proof_dtype: arithmetic of the proof; a float32 proof beyond its bounds is repeated in float64, which decides.
    """
    start = time.perf_counter()
    made = upcycle(
        checkpoint_dir,
        out_dir,
        n_expert=n_expert,
        n_expert_per_token=n_expert_per_token,
        router_std=router_std,
        thought_tokens=thought_tokens,
        seed=seed,
        proof_dtype=proof_dtype,
    )
    print(summary(made, time.perf_counter() - start))


def summary(made: Upcycled, seconds: float) -> str:
    """What was made and its proof, as a small table."""
    lines = [
        f"{made.config.name} in {made.out_dir}",
        f"  {made.n_parameters / 1e9:.3g} B parameters, {made.n_active / 1e9:.3g} B active per token, "
        f"{made.n_bytes / 1e9:.3g} GB, written and proved in {seconds:.1f} s",
    ]
    if made.thought_ids is not None:
        lines.append(f"  <thought> is token {made.thought_ids[0]}, </thought> is token {made.thought_ids[1]}")
    lines += ["", f"  {'proof':<8} {'tokens':>6} {'max |Δ logit|':>14} {'KL mean':>9} {'KL max':>9} {'top-1':>8}"]
    lines += [
        f"  {proof.dtype:<8} {proof.n_tokens:>6} {proof.max_abs_diff:>14.1e} {proof.kl:>9.1e} {proof.kl_max:>9.1e} "
        f"{proof.top1_agreement:>8.2%}"
        for proof in made.proofs
    ]
    lines.append("  attention, norms, embedding, head and every expert: bit for bit the dense model's")
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(upcycle_moe)
