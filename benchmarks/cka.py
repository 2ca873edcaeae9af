"""CKA of two models: ours against torch-cka, pytorch-cka and ckatorch, on the same models and data in one run.

    python benchmarks/cka.py
    python benchmarks/cka.py --peers_python /some/venv/bin/python

Each tool is asked for the map of every layer with every layer; ours draws it from a sample of 2,048 tokens. Ours also
gives the exact values of the corresponding layers and other distances, and, timed apart, intervals and floors. The
error is that of the corresponding layers against the exact unbiased CKA of all tokens that are text: padding and sinks
are none. Four kinds of data: plain; a token of an outlying norm in each sequence; half padding; plain in small batches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.cka_peers import PEERS
from litgpt.chat import Span
from litgpt.cka import linear_cka
from litgpt.ckaeval import Comparison
from litgpt.config import Config
from litgpt.data import Batch
from litgpt.model import GPT
from litgpt.utils import UserError, run_cli

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch-cka==0.21", "pytorch-cka==1.1.3", "ckatorch==1.0.3")
OURS = "**ours**: map, exact diagonal, distances"
OURS_ALL = "ours, with intervals and floors"
PADDING, SINK = 0, 1


class Data(NamedTuple):
    """One kind of data."""

    ids_BT: Tensor
    text_BT: Tensor
    """Which tokens are text."""
    batch_size: int


def benchmark(
    peers_python: Path | None = None,
    work_dir: Path | None = None,
    n_layer: int = 12,
    n_embd: int = 128,
    sequences: int = 512,
    tokens: int = 16,
    batch_size: int = 32,
    rounds: int = 3,
    seed: int = 1337,
) -> None:
    """Measure every tool on every kind of data; print markdown tables of errors and of times.

    Args:
        peers_python: the Python of an environment with the three packages over this one's; default: made in work_dir.
        work_dir: for that environment; a temporary directory by default.
        n_layer, n_embd: of both models.
        sequences, tokens: of the data.
        batch_size: sequences; the small batches are of one.
        rounds: the fastest counts; rounds of all tools alternate.
        seed: of models and data.
    """
    folder = Path(work_dir or tempfile.mkdtemp(prefix="cka-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python = peers_python or make_environment(folder / "environment")
    models = make_models(n_layer, n_embd, seed)
    kinds = make_data(sequences, tokens, batch_size, seed)
    errors: dict[str, dict[str, str]] = {name: {} for name in (OURS, OURS_ALL, *PEERS)}
    seconds: dict[str, list[float]] = {name: [] for name in (OURS, OURS_ALL, *PEERS)}
    for kind, data in kinds.items():
        exact_L = exact(models, data)
        path = folder / "stored.pt"
        stored = {"config": models[0].config, "states": [model.state_dict() for model in models], "ids": data.ids_BT}
        torch.save(stored, path)
        for _ in range(rounds if kind == "plain" else 1):
            for name in errors:
                own = name in (OURS, OURS_ALL)
                if own:
                    found = ours(models, data, spreads=name == OURS_ALL)
                else:
                    found = peer(python, name, path, data.batch_size)
                if "error" in found:
                    errors[name][kind] = found["error"].split(":")[0]
                    continue
                diagonal_L = torch.tensor(found["diagonal"] if own else found["map"]).double()
                diagonal_L = diagonal_L if own else diagonal_L.diagonal()
                errors[name][kind] = f"{float((diagonal_L - exact_L).abs().max()):.1e}"
                if kind == "plain":
                    seconds[name].append(found["seconds"])
        path.unlink()
    ours_seconds = min(seconds[OURS])
    lines = [
        f"{n_layer} layers of width {n_embd}, {sequences} sequences of {tokens} tokens, batches of {batch_size}; "
        f"{rounds} rounds, the fastest.",
        "",
        "| tool | s | ours takes | " + " | ".join(f"largest error, {kind}" for kind in kinds) + " |",
        "|---" * (3 + len(kinds)) + "|",
    ]
    for name, of_kinds in errors.items():
        fastest = min(seconds[name], default=float("nan"))
        cells = " | ".join(of_kinds[kind] for kind in kinds)
        lines.append(f"| {name} | {fastest:.2f} | {ours_seconds / fastest:.2f} of its time | {cells} |")
    print("\n".join(lines))


def make_models(n_layer: int, n_embd: int, seed: int) -> list[GPT]:
    """A random network, and the same with every matrix moved by half its size; token 1 is a sink in both."""
    config = Config.from_name(
        "Qwen3-0.6B", n_layer=n_layer, n_embd=n_embd, n_head=4, n_query_groups=2, head_size=n_embd // 4,
        intermediate_size=3 * n_embd, block_size=512, vocab_size=512, padded_vocab_size=512,
    )  # fmt: skip
    models = []
    for number in range(2):
        model = GPT(config)
        model.init_weights(std=0.08, generator=torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                if number and parameter.dim() > 1:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(noise, alpha=0.5 * float(parameter.std()))
            model.transformer.wte.weight[SINK] = 0.0
            model.transformer.wte.weight[SINK, number] = 1000.0
        models.append(model.requires_grad_(False).eval())
    return models


def make_data(sequences: int, tokens: int, batch_size: int, seed: int) -> dict[str, Data]:
    """The four kinds."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(2, 512, (sequences, tokens), generator=generator)
    text_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    sinks_BT, padded_BT, half_BT = ids_BT.clone(), ids_BT.clone(), text_BT.clone()
    where_B = torch.randint(1, tokens, (sequences,), generator=generator)
    sinks_BT[torch.arange(sequences), where_B] = SINK
    padded_BT[:, tokens // 2 :], half_BT[:, tokens // 2 :] = PADDING, False
    return {
        "plain": Data(ids_BT, text_BT, batch_size),
        "sinks": Data(sinks_BT, sinks_BT != SINK, batch_size),
        "padded": Data(padded_BT, half_BT, batch_size),
        "small batches": Data(ids_BT, text_BT, 1),
    }


@torch.inference_mode()
def exact(models: list[GPT], data: Data) -> Tensor:
    """CKA of the corresponding layers over all text at once, in fp64: [L]."""
    states = [
        model(data.ids_BT, layers=range(model.config.n_layer), return_logits=False).hidden_states for model in models
    ]
    rows = [{layer: of[data.text_BT].double() for layer, of in of_model.items()} for of_model in states]
    return torch.stack([linear_cka(rows[0][layer], rows[1][layer]) for layer in rows[0]])


def ours(models: list[GPT], data: Data, *, spreads: bool) -> dict[str, Any]:
    """`eval_cka.py`'s comparison. Position 0 is a row here, as it is text like any other in random networks."""
    start = time.perf_counter()
    comparison = Comparison(
        {"a": models[0], "b": models[1]}, [("a", "b")], keep_spans={Span.PROMPT}, drop_first=False
    )  # fmt: skip
    for ids_BT, text_BT in zip(data.ids_BT.split(data.batch_size), data.text_BT.split(data.batch_size), strict=True):
        # Padding is no document; a sink is text to the reader, and left out for its norm.
        documents_BT = torch.where(ids_BT == PADDING, -1, 0)
        spans_BT = torch.where(text_BT | (ids_BT == SINK), int(Span.PROMPT), int(Span.PAD)).to(torch.uint8)
        comparison.update(Batch(ids_BT, spans_BT, documents_BT, [[0]] * len(ids_BT)))
    found = comparison.found(spreads=spreads)
    comparison.map("a", "b", "block")
    return {"seconds": time.perf_counter() - start, "diagonal": [each.cka for each in found]}


def peer(python: Path, name: str, path: Path, batch_size: int) -> dict[str, Any]:
    """Another tool, in a process of its own."""
    command: list[str | Path] = [python, ROOT / "benchmarks" / "cka_peers.py", name, path, str(batch_size)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.stderr.write(done.stderr[-2000:])
        raise UserError(f"{name} ended with exit code {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def make_environment(folder: Path) -> Path:
    """An environment with the three tools over the packages of this Python; returns its Python."""
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        own = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})["purelib"]
        (Path(own) / "below.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        install: list[str | Path] = [python, "-m", "pip", "install", "--quiet", *PACKAGES]
        subprocess.run(install, check=True)
    return python


if __name__ == "__main__":
    run_cli(benchmark)
