"""LitGPT 0.5.13, the original, loads what we write and computes the same; and we load what it writes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.checkpoint import LitReader, convert_hf_to_lit, load_model, save_lit_dir
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.recipes import Granular, Shared
from litgpt.tokenizer import Tokenizer
from litgpt.upcycle import upcycle as fresh
from tests.tiny_models import FAMILIES, build_hf_dir, same_bits

VERSION = "0.5.13"
ROOT = Path(__file__).resolve().parents[1]
IDX_BT = torch.arange(40).view(2, 20) * 7

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def original() -> Path:
    """A folder with the original package and nothing else, installed once and kept in .cache."""
    folder = ROOT / ".cache" / f"litgpt-{VERSION}"
    if not (folder / "litgpt" / "__init__.py").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*pip, "--target", str(folder), f"litgpt=={VERSION}"], capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            reason = done.stderr.strip().splitlines()[-1:] or ["pip failed"]
            pytest.skip(f"the original LitGPT {VERSION} cannot be installed: {reason[0]}")
    return folder


def upcycle(dense: Path, out_dir: Path) -> None:
    """A mixture whose experts differ, with thought tokens, as the real recipe leaves it."""
    config = Config.from_checkpoint(dense).upcycled(4, 2)
    model = GPT(config)
    model.init_weights(std=0.2, generator=torch.Generator().manual_seed(1))
    tokenizer = Tokenizer(dense)
    tokenizer.add_thought_tokens(config.padded_vocab_size)
    save_lit_dir(out_dir, model.state_dict(), config, source_dir=dense, provenance={}, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def results(original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """label → directory and results, from one run of the original over all of them: importing it takes seconds."""
    root = tmp_path_factory.mktemp("original")
    directories: dict[str, Path] = {}
    for label in FAMILIES:
        directories[label] = root / f"Qwen3-{label}"
        build_hf_dir(directories[label], label)
        convert_hf_to_lit(directories[label])
    for label in ("qwen3-tied", "qwen3", "llama"):
        directories[f"{label} upcycled"] = root / f"{label}-upcycled"
        upcycle(directories[label], directories[f"{label} upcycled"])
    # With equal experts, which are stored once.
    directories["qwen3-tied fresh"] = root / "fresh"
    fresh(directories["qwen3-tied"], directories["qwen3-tied fresh"], n_expert=4, thought_tokens="none")
    for recipe in (Shared(), Granular(parts=2)):
        directories[f"qwen3-tied {recipe.name}"] = root / recipe.name
        fresh(directories["qwen3-tied"], root / recipe.name, recipe=recipe, n_expert=4, thought_tokens="none")
    directories["qwen3-tied dense first"] = root / "first"
    fresh(directories["qwen3-tied"], root / "first", layers="1,2", n_expert=4, thought_tokens="none")
    directories["trained by LitGPT"] = root / "trained"
    shutil.copytree(directories["qwen3_moe"], directories["trained by LitGPT"])
    path = directories["trained by LitGPT"] / "lit_model.pth"
    torch.save({"model": torch.load(path, weights_only=True), "step_count": 1}, path)
    directories["converted by LitGPT"] = root / "converted"
    build_hf_dir(directories["converted by LitGPT"], "qwen3-tied")
    torch.save(IDX_BT, root / "ids.pt")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "original_litgpt.py"), str(root / "ids.pt"), str(root / "out.pt")]
        + [str(directory) for directory in directories.values()],
        env=os.environ | {"PYTHONPATH": str(original), "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    outputs = torch.load(root / "out.pt", weights_only=True)
    return {label: (directories[label], output) for label, output in zip(directories, outputs, strict=True)}


LABELS = [
    *(*FAMILIES, "qwen3-tied upcycled", "qwen3 upcycled", "llama upcycled", "qwen3-tied fresh"),
    *("qwen3-tied shared", "qwen3-tied granular", "qwen3-tied dense first", "trained by LitGPT"),
]


@pytest.mark.parametrize("label", LABELS)
def test_the_original_computes_the_same(label: str, results: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    directory, theirs = results[label]
    with torch.no_grad():
        ours = load_model(directory)(IDX_BT).logits
    assert ours is not None
    torch.testing.assert_close(ours, theirs["logits"], rtol=1e-5, atol=1e-5)
    assert Tokenizer(directory).encode("गेहूँ के पत्ते") == theirs["ids"]


def test_every_family_was_compared(results: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    assert set(results) == {*LABELS, "converted by LitGPT"}


def test_its_converter_writes_the_same_tensors(results: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    theirs, ours = LitReader(results["converted by LitGPT"][0]), LitReader(results["qwen3-tied"][0])
    assert same_bits({name: theirs.read(name) for name in theirs.names}, {name: ours.read(name) for name in ours.names})
    assert theirs.shares_storage("lm_head.weight", "transformer.wte.weight")
