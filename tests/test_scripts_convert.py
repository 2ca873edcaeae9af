"""Hugging Face directory → lit directory → Hugging Face directory: bit for bit, strict, loadable without our code."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
import yaml

import litgpt.checkpoint
from litgpt.checkpoint import (
    LIT_FILE,
    LitReader,
    config_of_hf_dir,
    convert_hf_to_lit,
    convert_lit_to_hf,
    load_model,
    load_state,
    read_provenance,
    save_lit_dir,
)
from litgpt.config import Config
from litgpt.keymap import layout
from litgpt.model import GPT
from litgpt.safetensorfile import HFReader, HFWriter
from litgpt.tokenizer import Tokenizer
from litgpt.upcycle import upcycle
from litgpt.utils import UserError, run_cli, sha256_file
from scripts.convert_hf_checkpoint import convert as convert_hf
from scripts.convert_lit_checkpoint import convert as convert_lit
from tests.tiny_models import FAMILIES, MOE_FAMILIES, build_hf_dir, same_bits, stored_tensors
from tests.tiny_tokenizer import build_tiny_tokenizer

IDX_BT = torch.arange(40).view(2, 20) * 7


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDX_BT).logits
    return logits


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    build_hf_dir(tmp_path / "hf", "qwen3-tied")
    return tmp_path / "hf"


# There and back.


@pytest.mark.parametrize("shard", ["50GB", "20KB"])
@pytest.mark.parametrize("label", FAMILIES)
def test_round_trip_is_exact_on_disk(label: str, shard: str, tmp_path: Path) -> None:
    build_hf_dir(tmp_path / "hf", label, dtype=torch.bfloat16, max_shard_size=shard)
    assert ((tmp_path / "hf" / "model.safetensors.index.json").exists()) == (shard != "50GB")
    convert_hf_to_lit(tmp_path / "hf")
    convert_lit_to_hf(tmp_path / "hf", tmp_path / "one")
    convert_lit_to_hf(tmp_path / "hf", tmp_path / "many", max_shard_bytes=20_000)
    stored = stored_tensors(tmp_path / "hf")
    assert stored and {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert same_bits(stored_tensors(tmp_path / "one"), stored)
    assert same_bits(stored_tensors(tmp_path / "many"), stored)
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) >= 3
    if shard == "50GB":
        assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
            tmp_path / "hf" / "model.safetensors"
        ).read_bytes()
    original = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert json.loads((tmp_path / "one" / "config.json").read_text()) == original
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()


@pytest.mark.parametrize("label", FAMILIES)
def test_logits_are_those_of_transformers(label: str, tmp_path: Path) -> None:
    theirs = build_hf_dir(tmp_path / "hf", label)
    convert_hf_to_lit(tmp_path / "hf")
    ours = logits_of(load_model(tmp_path / "hf"))
    torch.testing.assert_close(ours, logits_of(theirs), rtol=1e-5, atol=1e-5)
    convert_lit_to_hf(tmp_path / "hf", tmp_path / "out", max_shard_bytes=50_000)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert torch.equal(logits_of(exported), logits_of(theirs))


@pytest.mark.parametrize("label", MOE_FAMILIES)
def test_fused_experts_are_read(label: str, tmp_path: Path) -> None:
    """The names of transformers 5 in memory, which some tools save as they are."""
    theirs = build_hf_dir(tmp_path / "hf", label)
    per_expert = stored_tensors(tmp_path / "hf")
    convert_hf_to_lit(tmp_path / "hf")
    expected = (tmp_path / "hf" / LIT_FILE).read_bytes()
    fused = {name: tensor.clone() for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    if "lm_head.weight" in per_expert:
        fused["lm_head.weight"] = theirs.lm_head.weight.detach().clone()
    safetensors.torch.save_file(fused, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in fused)
    convert_hf_to_lit(tmp_path / "hf")
    assert (tmp_path / "hf" / LIT_FILE).read_bytes() == expected
    convert_lit_to_hf(tmp_path / "hf", tmp_path / "out")
    assert same_bits(stored_tensors(tmp_path / "out"), per_expert)


def test_a_base_model_that_learnt_to_chat_stops_at_the_end_of_its_turn(tmp_path: Path) -> None:
    build_hf_dir(tmp_path / "hf", "qwen3-tied")
    tokenizer_of = tmp_path / "tokenizer"
    build_tiny_tokenizer(tokenizer_of, eos_token="<|endoftext|>")
    for path in tokenizer_of.iterdir():
        shutil.copyfile(path, tmp_path / "hf" / path.name)
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": 398, "top_k": 5}))
    convert_hf_to_lit(tmp_path / "hf")
    tokenizer = Tokenizer(tmp_path / "hf")
    end, stops = tokenizer.token_to_id("<|im_end|>"), list(tokenizer.stop_ids)
    assert end not in stops
    upcycle(tmp_path / "hf", tmp_path / "moe", n_expert=2)
    convert_lit_to_hf(tmp_path / "moe", tmp_path / "out")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [end, *stops], "top_k": 5}


@pytest.mark.parametrize("label", ["qwen3-tied", "llama"])
def test_an_upcycled_model_is_exported_whole(label: str, tmp_path: Path) -> None:
    """A mixture whose source directory holds the dense model's config.json: the export must describe the mixture."""
    build_hf_dir(tmp_path / "hf", label)
    convert_hf_to_lit(tmp_path / "hf")
    config = Config.from_checkpoint(tmp_path / "hf").upcycled(4, 2)
    model = GPT(config).eval()
    model.init_weights(std=0.2, generator=torch.Generator().manual_seed(1))
    tokenizer = Tokenizer(tmp_path / "hf")
    thought_ids = tokenizer.add_thought_tokens(config.padded_vocab_size)
    save_lit_dir(
        tmp_path / "moe",
        model.state_dict(),
        config,
        source_dir=tmp_path / "hf",
        provenance={"upcycled_from": "hf"},
        tokenizer=tokenizer,
    )
    convert_lit_to_hf(tmp_path / "moe", tmp_path / "out")
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    exported, loading = load(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    assert type(exported).__name__ == {"qwen3-tied": "Qwen3MoeForCausalLM", "llama": "MixtralForCausalLM"}[label]
    torch.testing.assert_close(logits_of(exported), logits_of(model), rtol=1e-5, atol=1e-5)
    hf_config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf_config["eos_token_id"] == json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"]
    assert hf_config["torch_dtype"] == "float32"
    if label == "qwen3-tied":
        assert hf_config["norm_topk_prob"] is True and hf_config["decoder_sparse_step"] == 1
        assert "lm_head.weight" not in stored_tensors(tmp_path / "out")
        assert exported.lm_head.weight is exported.model.embed_tokens.weight
    fast: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tuple(fast.convert_tokens_to_ids(["<thought>", "</thought>"])) == thought_ids
    prompt = fast.apply_chat_template(
        [
            {"role": "user", "content": "गेहूँ?"},
            {"role": "assistant", "content": "हाँ।", "thought": "सोच"},
        ],
        tokenize=False,
    )
    assert "<thought>\nसोच\n</thought>" in prompt and "<think>" not in prompt
    template = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"] == template
    assert read_provenance(tmp_path / "out")["source"]["upcycled_from"] == "hf"

    # What comes back from the export is the same mixture.
    convert_hf_to_lit(tmp_path / "out")
    assert same_bits(load_state(tmp_path / "out"), dict(model.state_dict()))
    assert Config.from_checkpoint(tmp_path / "out").tie_embeddings == config.tie_embeddings


def test_files_of_the_writer_are_the_librarys_files(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 2).bfloat16(),
        "a": torch.randn(5).half(),
        'गेहूँ "quoted"': torch.randn(2, 2, 2),
        "wide": torch.randn(3, dtype=torch.float64),
        "empty": torch.empty(0, 4),
    }
    specs = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    (tmp_path / "ours").mkdir()
    with HFWriter(tmp_path / "ours", specs, max_shard_bytes=10**9) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()
    reader = HFReader(tmp_path / "ours")
    for name, tensor in tensors.items():
        rows = tensor.flatten(0, -2) if tensor.dim() > 2 else tensor
        assert torch.equal(reader.read_rows(name, 0, len(rows)), rows)
    with (
        pytest.raises(ValueError, match="4 tensors were not written"),
        HFWriter(tmp_path / "ours", specs, max_shard_bytes=10**9) as writer,
    ):
        writer.write("b", tensors["b"])


# What convert_hf_to_lit writes.


def test_lit_files_and_provenance(hf_dir: Path) -> None:
    before = contents(hf_dir)
    convert_hf_to_lit(hf_dir)
    assert set(contents(hf_dir)) - set(before) == {LIT_FILE, "model_config.yaml", "provenance.yaml"}
    assert {name: content for name, content in contents(hf_dir).items() if name in before} == before
    config = yaml.safe_load((hf_dir / "model_config.yaml").read_text())
    assert config["name"] == "hf" and "tie_embeddings" not in config
    provenance = read_provenance(hf_dir)
    assert provenance["tie_embeddings"] is True and provenance["dtype"] == "as stored"
    assert provenance["sha256"] == {name: sha256_file(hf_dir / name) for name in ("model.safetensors", "config.json")}
    assert "torch" in provenance["tool"]
    reader = LitReader(hf_dir)
    assert reader.shares_storage("lm_head.weight", "transformer.wte.weight")


def test_a_conversion_cut_short_is_not_taken_for_a_whole_one(hf_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and config without provenance.yaml would be a model whose embeddings are not tied."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    for step in ("write_provenance", "write_config"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(litgpt.checkpoint, step, killed)
            convert_hf_to_lit(hf_dir)
        with pytest.raises(UserError, match=r"lacks model_config\.yaml"):
            load_model(hf_dir)
    convert_hf_to_lit(hf_dir)
    assert load_model(hf_dir).config.tie_embeddings


def test_an_export_replaces_an_export_and_nothing_else(hf_dir: Path) -> None:
    convert_hf_to_lit(hf_dir)
    out = hf_dir.parent / "out"
    convert_lit_to_hf(hf_dir, out)
    convert_lit_to_hf(hf_dir, out, max_shard_bytes=20_000)
    assert not (out / "model.safetensors").exists()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        convert_lit_to_hf(hf_dir, out)
    (out / "notes.txt").unlink()
    # A downloaded model whose lit_model.pth was deleted again.
    other = shutil.copytree(hf_dir, hf_dir.parent / "other")
    (other / LIT_FILE).unlink()
    with pytest.raises(UserError, match="holds other files"):
        convert_lit_to_hf(hf_dir, other)
    assert (other / "model.safetensors").is_file()


def test_a_known_name_gives_litgpts_config_only_where_config_json_agrees(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 512}
    build_hf_dir(tmp_path / "Qwen3-0.6B", "qwen3-tied", **sizes)
    convert_hf_to_lit(tmp_path / "Qwen3-0.6B")
    assert Config.from_checkpoint(tmp_path / "Qwen3-0.6B").n_embd == 16
    real = {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        "model_type": "qwen3",
    }
    (tmp_path / "Qwen3-0.6B" / "config.json").write_text(json.dumps(real))
    assert config_of_hf_dir(tmp_path / "Qwen3-0.6B", None, {}) == Config.from_name("Qwen3-0.6B")
    assert config_of_hf_dir(tmp_path / "Qwen3-0.6B", "mine", {}).name == "mine"


def test_dtype_is_cast_on_request(hf_dir: Path) -> None:
    run_cli(convert_hf, args=["--checkpoint_dir", str(hf_dir), "--dtype", "bfloat16", "--model_name", "Qwen3-x"])
    assert {spec.dtype for spec in LitReader(hf_dir).specs.values()} == {torch.bfloat16}
    assert read_provenance(hf_dir)["dtype"] == "bfloat16"
    assert Config.from_checkpoint(hf_dir).name == "Qwen3-x"
    run_cli(convert_lit, args=["--checkpoint_dir", str(hf_dir), "--out_dir", str(hf_dir.parent / "out")])
    hf_config = json.loads((hf_dir.parent / "out" / "config.json").read_text())
    assert hf_config["dtype"] == "bfloat16"


def test_mixed_dtypes_are_kept(tmp_path: Path) -> None:
    """Some checkpoints keep the router or the norms in fp32."""
    build_hf_dir(tmp_path / "hf", "qwen3_moe", dtype=torch.bfloat16)
    stored = stored_tensors(tmp_path / "hf")
    stored = {name: tensor.float() if ".mlp.gate." in name else tensor for name, tensor in stored.items()}
    safetensors.torch.save_file(stored, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    convert_hf_to_lit(tmp_path / "hf")
    convert_lit_to_hf(tmp_path / "hf", tmp_path / "out")
    assert same_bits(stored_tensors(tmp_path / "out"), stored)
    state = load_state(tmp_path / "hf")
    assert state["transformer.h.0.mlp.gate.weight"].dtype == torch.float32

    name = "model.layers.0.self_attn.k_proj.weight"
    safetensors.torch.save_file(stored | {name: stored[name].float()}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(UserError, match="stored as bfloat16 and float32; choose one with --dtype"):
        convert_hf_to_lit(tmp_path / "hf")
    convert_hf_to_lit(tmp_path / "hf", dtype=torch.float32)
    assert same_bits(load_state(tmp_path / "hf"), {key: tensor.float() for key, tensor in state.items()})


def test_a_tied_model_with_a_redundant_head(hf_dir: Path) -> None:
    """Qwen3-0.6B's own file holds the tied head a second time."""
    stored = stored_tensors(hf_dir)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(stored, hf_dir / "model.safetensors", metadata={"format": "pt"})
    convert_hf_to_lit(hf_dir)
    convert_lit_to_hf(hf_dir, hf_dir.parent / "out")
    assert (hf_dir.parent / "out" / "model.safetensors").read_bytes() == (hf_dir / "model.safetensors").read_bytes()
    exported: Any = transformers.AutoModelForCausalLM.from_pretrained(hf_dir.parent / "out")
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] + 1
    safetensors.torch.save_file(stored, hf_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head.weight and model.embed_tokens.weight differ"):
        convert_hf_to_lit(hf_dir)


def test_rotary_buffers_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    build_hf_dir(tmp_path / "hf", "llama")
    stored = stored_tensors(tmp_path / "hf")
    stored |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(5) for i in range(3)}
    safetensors.torch.save_file(stored, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    convert_hf_to_lit(tmp_path / "hf")
    assert load_model(tmp_path / "hf").config.hf_family == "llama"


def test_a_sliding_window_needs_a_shorter_model(tmp_path: Path) -> None:
    build_hf_dir(tmp_path / "hf", "mistral", sliding_window=32)
    with pytest.raises(UserError, match="sliding_window 32"):
        convert_hf_to_lit(tmp_path / "hf")
    run_cli(convert_hf, args=["--checkpoint_dir", str(tmp_path / "hf"), "--block_size", "32"])
    convert_lit_to_hf(tmp_path / "hf", tmp_path / "out")
    hf_config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf_config["max_position_embeddings"] == 32 and hf_config.get("sliding_window") is None


@pytest.mark.slow
def test_conversion_needs_memory_for_one_tensor(tmp_path: Path) -> None:
    """0.6 GB with a largest tensor of 13 MB, both ways; 120 MB beyond the imports is for buffers of all kinds."""
    directory = tmp_path / "hf"
    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 1}
    build_hf_dir(directory, "qwen3-tied", **sizes)
    hf_config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(hf_config | {"num_hidden_layers": 16}))
    shapes = layout(Config.from_hf(directory), "hf", tied=True).shapes
    with HFWriter(
        directory, {name: (shape, torch.float32) for name, shape in shapes.items()}, max_shard_bytes=10**9
    ) as w:
        for name, shape in shapes.items():
            w.write(name, torch.ones(shape))
    script = (
        "import resource, sys, torch\n"
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "from litgpt.checkpoint import convert_hf_to_lit, convert_lit_to_hf\n"
        "with FakeTensorMode():\n"
        "    torch.empty(3)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "convert_hf_to_lit(sys.argv[1])\n"
        "convert_lit_to_hf(sys.argv[1], sys.argv[2], max_shard_bytes=10**8)\n"
        "print((peak() - before) / 1e3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(directory), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[1],
    )
    assert float(done.stdout) < 120, f"{done.stdout} MB"


# A user's mistakes: one line, exit 2, and nothing that was there is touched.


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        stored = stored_tensors(directory)
        change(stored)
        safetensors.torch.save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})

    return edit


def cut(file: str, keep: float) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        content = (directory / file).read_bytes()
        (directory / file).write_bytes(content[: int(len(content) * keep)])

    return edit


def garble(directory: Path) -> None:
    content = bytearray((directory / "model.safetensors").read_bytes())
    content[8:200] = b"x" * 192
    (directory / "model.safetensors").write_bytes(content)


def remove(file: str) -> Callable[[Path], None]:
    return lambda directory: (directory / file).unlink()


def reconfigure(**values: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | values))

    return edit


def only_bin(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


NORM = "model.layers.1.input_layernorm.weight"
MISTAKES: dict[str, tuple[Callable[[Path], None], str]] = {
    "half the file": (cut("model.safetensors", 0.5), "cut short or broken"),
    "empty file": (cut("model.safetensors", 0.0), "cut short or broken"),
    "garbled header": (garble, "cut short or broken"),
    "no weights": (remove("model.safetensors"), "holds no model.safetensors"),
    "only .bin": (only_bin, "only safetensors are read"),
    "no config": (remove("config.json"), "holds no config.json; download"),
    "no tokenizer": (remove("tokenizer.json"), "holds no tokenizer.json; download"),
    "no tokenizer config": (remove("tokenizer_config.json"), "holds no tokenizer_config.json"),
    "half a config": (cut("config.json", 0.5), "config.json cannot be parsed"),
    "other depth": (reconfigure(num_hidden_layers=4), "11 missing (model.layers.3.input_layernorm.weight"),
    "less depth": (reconfigure(num_hidden_layers=2), "11 unknown (model.layers.2."),
    "other width": (reconfigure(intermediate_size=45), "has shape (44, 24), but config.json says (45, 24)"),
    "untied": (reconfigure(tie_word_embeddings=False), "1 missing (lm_head.weight)"),
    "other family": (reconfigure(model_type="gemma"), "model_type is 'gemma'"),
    "tensor missing": (edit_tensors(lambda tensors: tensors.pop(NORM)), f"1 missing ({NORM})"),
    "tensor too many": (edit_tensors(lambda tensors: tensors.update(extra=torch.ones(1))), "1 unknown (extra)"),
    "wrong shape": (edit_tensors(lambda tensors: tensors.update({NORM: torch.ones(25)})), f"{NORM} has shape (25,)"),
    "quantised": (edit_tensors(lambda t: t.update({NORM: torch.ones(24, dtype=torch.int8)})), "stored as I8"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_hugging_face_directory(mistake: str, hf_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit, message = MISTAKES[mistake]
    convert_hf_to_lit(hf_dir)
    edit(hf_dir)
    before = contents(hf_dir)
    with pytest.raises(SystemExit) as exit_info:
        run_cli(convert_hf, args=["--checkpoint_dir", str(hf_dir)])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error, error
    assert contents(hf_dir) == before


def rename_in_index(directory: Path) -> None:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["other"] = index["weight_map"].pop(NORM)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def point_outside(directory: Path) -> None:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"][NORM] = "../secret.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def remove_a_shard(directory: Path) -> None:
    sorted(directory.glob("model-*.safetensors"))[1].unlink()


def cut_a_shard(directory: Path) -> None:
    cut(sorted(directory.glob("model-*.safetensors"))[1].name, 0.9)(directory)


SHARD_MISTAKES: dict[str, tuple[Callable[[Path], None], str]] = {
    "shard missing": (remove_a_shard, "is missing, though model.safetensors.index.json lists it"),
    "shard cut": (cut_a_shard, "cut short or broken"),
    "index lies": (rename_in_index, f"holds {NORM}, which model.safetensors.index.json does not say"),
    "index escapes": (point_outside, "points outside its directory"),
    "index cut": (cut("model.safetensors.index.json", 0.5), "is no index of safetensors shards"),
}


@pytest.mark.parametrize("mistake", SHARD_MISTAKES)
def test_mistakes_in_shards(mistake: str, tmp_path: Path) -> None:
    edit, message = SHARD_MISTAKES[mistake]
    build_hf_dir(tmp_path / "hf", "qwen3", max_shard_size="20KB")
    edit(tmp_path / "hf")
    before = contents(tmp_path / "hf")
    with pytest.raises(UserError) as error:
        convert_hf_to_lit(tmp_path / "hf")
    assert message in str(error.value)
    assert contents(tmp_path / "hf") == before


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_conversion(hf_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_hf_to_lit(hf_dir)
    before = contents(hf_dir)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="no room left"):
        convert_hf_to_lit(hf_dir, dtype=torch.bfloat16)
    assert contents(hf_dir) == before


def test_a_full_disk_leaves_the_old_export(hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_hf_to_lit(hf_dir)
    convert_lit_to_hf(hf_dir, tmp_path / "out")
    before = contents(tmp_path / "out")
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="no room left"):
        convert_lit_to_hf(hf_dir, tmp_path / "out")
    assert contents(tmp_path / "out") == before and sorted(os.listdir(tmp_path)) == ["hf", "out"]


def test_an_export_replaces_only_an_earlier_export(
    hf_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert_hf_to_lit(hf_dir)
    convert_lit_to_hf(hf_dir, tmp_path / "out", max_shard_bytes=20_000)
    convert_lit_to_hf(hf_dir, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
    (tmp_path / "empty").mkdir()
    convert_lit_to_hf(hf_dir, tmp_path / "empty")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").write_text("dear diary")
    (tmp_path / "file").write_text("a file")
    shutil.copytree(hf_dir, tmp_path / "other_lit_dir")
    before = contents(hf_dir)
    for target in (hf_dir, tmp_path / "home", tmp_path / "file", tmp_path / "other_lit_dir", tmp_path):
        with pytest.raises(SystemExit) as exit_info:
            run_cli(convert_lit, args=["--checkpoint_dir", str(hf_dir), "--out_dir", str(target)])
        assert exit_info.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert contents(hf_dir) == before and os.listdir(tmp_path / "home") == ["diary.txt"]


def test_export_says_what_to_run_first(tmp_path: Path, hf_dir: Path) -> None:
    with pytest.raises(UserError, match=r"run first: python scripts/convert_hf_checkpoint.py"):
        convert_lit_to_hf(hf_dir, tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        convert_lit_to_hf(tmp_path / "absent", tmp_path / "out")
    convert_hf_to_lit(hf_dir)
    with pytest.raises(UserError, match="max_shard_bytes is 0"):
        convert_lit_to_hf(hf_dir, tmp_path / "out", max_shard_bytes=0)
