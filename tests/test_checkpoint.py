"""Lit directories: the key map is a bijection, files appear whole or not at all, and reading is strict."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from litgpt.checkpoint import (
    LIT_FILE,
    LitReader,
    LitWriter,
    load_model,
    load_state,
    read_provenance,
    require_lit_dir,
    save_lit_dir,
    write_provenance,
)
from litgpt.config import Config
from litgpt.keymap import Naming, assemble, flat_rows, layout
from litgpt.model import GPT
from litgpt.safetensorfile import HFWriter
from litgpt.tensorfile import DIRECT_BYTES, FileSink, StreamFile, page_memory, read_bytes, row_count
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError
from tests.tiny_models import FAMILIES, MOE_FAMILIES, random_model, same_bits
from tests.tiny_tokenizer import build_tiny_tokenizer

NAMINGS: tuple[Naming, ...] = get_args(Naming)


def config_of(label: str, **overrides: Any) -> Config:
    return Config.from_hf(random_model(label).config.to_dict(), name=label, **overrides)


def random_gpt(label: str = "qwen3-tied", **overrides: Any) -> GPT:
    model = GPT(config_of(label, **overrides))
    model.init_weights(std=0.2, generator=torch.Generator().manual_seed(1))
    return model.eval()


@pytest.fixture
def source_dir(tmp_path: Path) -> Path:
    return build_tiny_tokenizer(tmp_path / "source")


def save(model: GPT, out_dir: Path, source_dir: Path) -> None:
    save_lit_dir(
        out_dir,
        model.state_dict(),
        model.config,
        source_dir=source_dir,
        provenance={"made_by": "test", "tie_embeddings": "no"},
    )


# The key map.


@pytest.mark.parametrize("label", FAMILIES)
@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_partitions_its_tensors_into_the_same_blocks(label: str, naming: Naming) -> None:
    config = config_of(label)
    this, lit = layout(config, naming), layout(config, "lit")
    assert set(this.rows) == set(lit.rows)
    assert sorted(block for parts in this.parts.values() for block in parts) == sorted(this.rows)
    for name, blocks in this.parts.items():
        # Blocks follow each other without gap or overlap, from the first row to the last.
        edges = [0] + [this.rows[block].stop for block in blocks]
        assert [this.rows[block].start for block in blocks] == edges[:-1]
        assert {this.rows[block].tensor for block in blocks} == {name}
        assert edges[-1] == row_count(this.shapes[name])


@pytest.mark.parametrize("label", FAMILIES)
def test_names_are_those_of_transformers_and_of_our_model(label: str) -> None:
    config = config_of(label)
    fused = {name: tuple(tensor.shape) for name, tensor in random_model(label).state_dict().items()}
    assert layout(config, "hf_fused").shapes == fused
    ours = {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}
    assert layout(config, "memory").shapes == ours


def test_lit_names_are_litgpts() -> None:
    shapes = layout(Config.from_name("Qwen3-30B-A3B"), "lit").shapes
    assert len(shapes) == 18771
    assert shapes["transformer.h.47.attn.qkv.weight"] == (5120, 2048)
    assert shapes["transformer.h.0.mlp.experts.127.fc_2.weight"] == (768, 2048)
    assert shapes["transformer.h.0.mlp.experts.127.proj.weight"] == (2048, 768)
    dense = layout(Config.from_name("Qwen3-0.6B"), "lit").shapes
    assert len(dense) == 255 and sum(torch.Size(shape).numel() for shape in dense.values()) == 751_632_384


@settings(max_examples=30, deadline=None)
@given(
    label=st.sampled_from(sorted(FAMILIES)),
    first=st.sampled_from(NAMINGS),
    second=st.sampled_from(NAMINGS),
    third=st.sampled_from(NAMINGS),
)
def test_translation_there_and_back_is_the_identity(label: str, first: Naming, second: Naming, third: Naming) -> None:
    config = config_of(label)
    layouts = {naming: layout(config, naming) for naming in NAMINGS}
    start = {name: torch.randn(shape) for name, shape in layouts[first].shapes.items()}

    def translate(state: dict[str, Tensor], source: Naming, target: Naming) -> dict[str, Tensor]:
        def read_rows(name: str, begin: int, end: int) -> Tensor:
            return flat_rows(state[name], begin, end)

        return {name: assemble(layouts[target], name, layouts[source], read_rows) for name in layouts[target].names}

    there = translate(translate(start, first, second), second, third)
    assert same_bits(translate(there, third, first), start)
    assert {name: tuple(tensor.shape) for name, tensor in there.items()} == layouts[third].shapes


# The file.

TENSORS: dict[str, Tensor] = {
    "matrix": torch.randn(7, 5).bfloat16(),
    "vector": torch.randn(9, dtype=torch.float64),
    "stack": torch.randn(3, 4, 5).half(),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
}
SPECS = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def write_all(path: Path, tensors: dict[str, Tensor] = TENSORS) -> None:
    with LitWriter(path, SPECS, aliases={"tied": "matrix"}) as writer:
        for name in reversed(list(tensors)):
            writer.write(name, tensors[name])


def test_written_file_is_an_ordinary_torch_checkpoint(tmp_path: Path) -> None:
    write_all(tmp_path / LIT_FILE)
    expected = TENSORS | {"tied": TENSORS["matrix"]}
    for mmap in (False, True):
        loaded = torch.load(tmp_path / LIT_FILE, weights_only=True, mmap=mmap)
        assert same_bits(loaded, expected)
        assert loaded["tied"].data_ptr() == loaded["matrix"].data_ptr()
    assert os.listdir(tmp_path) == [LIT_FILE]
    reader = LitReader(tmp_path)
    assert same_bits({name: reader.read(name) for name in reader.names}, expected)
    assert reader.shares_storage("tied", "matrix") and not reader.shares_storage("tied", "stack")
    assert torch.equal(reader.read_rows("stack", 5, 9), TENSORS["stack"].flatten(0, 1)[5:9])
    assert torch.equal(reader.read_rows("vector", 2, 4), TENSORS["vector"][2:4])


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    write_all(tmp_path / "a" / LIT_FILE)
    write_all(tmp_path / "b" / LIT_FILE)
    assert (tmp_path / "a" / LIT_FILE).read_bytes() == (tmp_path / "b" / LIT_FILE).read_bytes()


def test_reader_reads_what_torch_and_litgpts_training_save(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    state = {"view": base[1:3], "transposed": base.T, "column": base[:, 3], "plain": torch.randn(4)}
    torch.save({"model": state, "step_count": 3}, tmp_path / LIT_FILE)
    reader = LitReader(tmp_path)
    for name, tensor in state.items():
        assert torch.equal(reader.read(name), tensor), name
        assert torch.equal(reader.read_rows(name, 1, 2), tensor[1:2]), name


def test_a_tensor_that_is_not_written_leaves_the_old_file(tmp_path: Path) -> None:
    write_all(tmp_path / LIT_FILE)
    before = (tmp_path / LIT_FILE).read_bytes()
    with pytest.raises(ValueError, match="1 tensors were not written: stack"):
        write_all(tmp_path / LIT_FILE, {name: tensor for name, tensor in TENSORS.items() if name != "stack"})
    with pytest.raises(KeyError, match="stack"), LitWriter(tmp_path / LIT_FILE, {"matrix": SPECS["matrix"]}) as writer:
        writer.write("stack", TENSORS["stack"])
    for wrong in (torch.zeros(7, 5), torch.zeros(5, 7).bfloat16()):
        with pytest.raises(ValueError, match="not the announced"):
            write_all(tmp_path / LIT_FILE, {**TENSORS, "matrix": wrong})
    assert (tmp_path / LIT_FILE).read_bytes() == before and os.listdir(tmp_path) == [LIT_FILE]


def test_a_tensor_is_written_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="written before"), LitWriter(tmp_path / LIT_FILE, SPECS) as writer:
        writer.write("matrix", TENSORS["matrix"])
        writer.write("matrix", TENSORS["matrix"])
    with pytest.raises(ValueError, match="not in specs"):
        LitWriter(tmp_path / LIT_FILE, SPECS, aliases={"tied": "nothing"})
    with pytest.raises(ValueError, match="both an alias"):
        LitWriter(tmp_path / LIT_FILE, SPECS, aliases={"stack": "matrix"})


def test_too_little_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=10))
    with pytest.raises(UserError, match="GB of disk"):
        write_all(tmp_path / "new" / LIT_FILE)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_disk_that_fills_up_is_a_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    write_all(tmp_path / LIT_FILE)
    before = (tmp_path / LIT_FILE).read_bytes()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match="no room left"):
        write_all(tmp_path / LIT_FILE)
    assert (tmp_path / LIT_FILE).read_bytes() == before and os.listdir(tmp_path) == [LIT_FILE]


def test_a_file_size_limit_of_the_system_is_a_users_error(tmp_path: Path) -> None:
    """A real refusal by the kernel (EFBIG), in a process of its own."""
    script = (
        "import resource, signal, sys, torch\n"
        "from litgpt.checkpoint import LitWriter\n"
        "from litgpt.utils import UserError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    with LitWriter(sys.argv[1], {'a': ((1000, 1000), torch.float32)}) as writer:\n"
        "        writer.write('a', torch.zeros(1000, 1000))\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / LIT_FILE)], capture_output=True, text=True, check=True
    )
    assert "no room left" in done.stdout and os.listdir(tmp_path) == []


def test_offsets_beyond_4_gb(tmp_path: Path) -> None:
    """Zip archives change their format there. The file is sparse: its large tensors are never written."""
    specs = {f"large{i}": ((1200, 1000, 1000), torch.bfloat16) for i in range(3)} | {"last": ((5, 5), torch.float32)}
    values = torch.randn(5, 5)
    with pytest.raises(ValueError, match="3 tensors were not written"), LitWriter(tmp_path / LIT_FILE, specs) as writer:
        writer.write("last", values)
        (temporary,) = tmp_path.iterdir()
        assert temporary.stat().st_size > 7e9
        assert torch.equal(torch.load(temporary, mmap=True, weights_only=True)["last"], values)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_file_cut_short_is_a_users_error(tmp_path: Path, keep: float) -> None:
    write_all(tmp_path / LIT_FILE)
    content = (tmp_path / LIT_FILE).read_bytes()
    (tmp_path / LIT_FILE).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match=r"not a checkpoint|cut short"):
        LitReader(tmp_path)


def test_a_file_that_shrinks_while_open_is_a_users_error(tmp_path: Path) -> None:
    write_all(tmp_path / LIT_FILE)
    reader = LitReader(tmp_path)
    os.truncate(tmp_path / LIT_FILE, 100)
    with pytest.raises(UserError, match="bytes early in matrix"):
        reader.read("matrix")


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo run > pwned",)


@pytest.mark.parametrize(
    "content", [{"a": Payload()}, {"a": 3}, [torch.zeros(2)], {"model": {"a": {"b": torch.ones(1)}}}]
)
def test_a_file_with_anything_but_tensors_is_refused_and_no_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / LIT_FILE)
    with pytest.raises(UserError, match=r"lit_model.pth"):
        LitReader(tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.slow
def test_memory_stays_at_one_tensor(tmp_path: Path) -> None:
    """Write and read 1.2 GB in tensors of 60 MB; the peak beyond the imports stays far below the file."""
    script = (
        "import resource, sys, torch\n"
        "from litgpt.checkpoint import LitReader, LitWriter\n"
        "torch.set_num_threads(1)\n"
        "names = [f't{i}' for i in range(20)]\n"
        "specs = {name: ((6000, 5000), torch.bfloat16) for name in names}\n"
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "with FakeTensorMode():\n"
        "    torch.empty(3)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "with LitWriter(sys.argv[1] + '/lit_model.pth', specs) as writer:\n"
        "    for i, name in enumerate(names):\n"
        "        writer.write(name, torch.full((6000, 5000), float(i), dtype=torch.bfloat16))\n"
        "reader = LitReader(sys.argv[1])\n"
        "for i, name in enumerate(names):\n"
        "    tensor = reader.read(name)\n"
        "    assert float(tensor[0, 0]) == float(tensor[-1, -1]) == i\n"
        "print((peak() - before) / 1e3)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 220, f"{done.stdout} MB"


# The directory.


@pytest.mark.parametrize("label", FAMILIES)
def test_save_and_load_is_exact(label: str, tmp_path: Path, source_dir: Path) -> None:
    model = random_gpt(label)
    save(model, tmp_path / "lit", source_dir)
    state = load_state(tmp_path / "lit")
    assert same_bits(state, dict(model.state_dict()))
    loaded = load_model(tmp_path / "lit")
    assert not loaded.training and loaded.config == model.config
    assert same_bits(dict(loaded.state_dict()), dict(model.state_dict()))
    tied = model.config.tie_embeddings
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == tied
    idx_BT = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded(idx_BT).logits, model(idx_BT).logits)
    on_disk = torch.load(tmp_path / "lit" / LIT_FILE, weights_only=True)
    assert set(on_disk) == set(layout(model.config, "lit").names)
    assert (on_disk["lm_head.weight"].data_ptr() == on_disk["transformer.wte.weight"].data_ptr()) == tied
    assert read_provenance(tmp_path / "lit")["made_by"] == "test"
    assert read_provenance(tmp_path / "lit")["tie_embeddings"] == tied
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"} <= set(
        os.listdir(tmp_path / "lit")
    )


def test_the_loaded_model_trains(tmp_path: Path, source_dir: Path) -> None:
    """The weights are mapped from the file; a step must change them and not the file."""
    save(random_gpt("qwen3_moe-tied"), tmp_path / "lit", source_dir)
    before = (tmp_path / "lit" / LIT_FILE).read_bytes()
    model = load_model(tmp_path / "lit").train()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    output = model(torch.arange(64).view(1, 64))
    assert output.logits is not None
    output.logits.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(not torch.equal(start[name], tensor) for name, tensor in model.state_dict().items())
    assert (tmp_path / "lit" / LIT_FILE).read_bytes() == before


def test_load_model_casts_and_stays_tied(tmp_path: Path, source_dir: Path) -> None:
    save(random_gpt("qwen3_moe-tied"), tmp_path / "lit", source_dir)
    model = load_model(tmp_path / "lit", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_load_model_on_cuda(tmp_path: Path, source_dir: Path) -> None:
    model = random_gpt("qwen3_moe-tied")
    save(model, tmp_path / "lit", source_dir)
    loaded = load_model(tmp_path / "lit", device="cuda", dtype=torch.bfloat16)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cuda"}
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    save(loaded, tmp_path / "again", source_dir)
    assert same_bits(load_state(tmp_path / "again"), {k: v.bfloat16() for k, v in model.state_dict().items()})


def test_a_file_saved_on_a_gpu_loads_without_one(tmp_path: Path, source_dir: Path) -> None:
    save(random_gpt("qwen3"), tmp_path / "lit", source_dir)
    path = tmp_path / "lit" / LIT_FILE
    reader = LitReader(tmp_path / "lit")
    with FakeTensorMode():
        skeleton = {
            name: torch.empty(spec.shape, dtype=spec.dtype, device="cuda") for name, spec in reader.specs.items()
        }
    values = {name: reader.read(name) for name in reader.names}
    with open(path, "wb") as file, torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({"model": skeleton}, file)
    saved = LitReader(tmp_path / "lit")
    sink = FileSink(path)
    for name, tensor in values.items():
        sink.write_tensor(saved._holes[name].offset, tensor)
    sink.close()
    assert b"cuda" in path.read_bytes()
    state = load_state(tmp_path / "lit")
    assert same_bits(state, values)


def test_tensors_that_share_storage_without_being_tied_are_parted(tmp_path: Path, source_dir: Path) -> None:
    """LitGPT's own conversion of a tied model has no provenance.yaml; LitGPT trains the two apart."""
    save(random_gpt("qwen3-tied"), tmp_path / "lit", source_dir)
    (tmp_path / "lit" / "provenance.yaml").unlink()
    model = load_model(tmp_path / "lit")
    assert model.lm_head.weight.data_ptr() != model.transformer.wte.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)


def test_tied_only_by_word_is_refused(tmp_path: Path, source_dir: Path) -> None:
    save(random_gpt("qwen3"), tmp_path / "lit", source_dir)
    write_provenance(tmp_path / "lit", {"tie_embeddings": True})
    with pytest.raises(UserError, match=r"lm_head.weight and transformer.wte.weight differ"):
        load_model(tmp_path / "lit")


@pytest.mark.parametrize("label", ["qwen3-tied", *MOE_FAMILIES])
def test_a_state_of_another_model_is_refused(label: str, tmp_path: Path, source_dir: Path) -> None:
    model = random_gpt(label)
    state = dict(model.state_dict())
    name = "transformer.h.1.norm_2.weight"
    short = {key: tensor for key, tensor in state.items() if key != name}
    for wrong in (short, state | {"extra": torch.zeros(1)}, state | {name: torch.zeros(3)}):
        with pytest.raises(ValueError, match="1 tensors differ"):
            save_lit_dir(tmp_path / "lit", wrong, model.config, source_dir=source_dir, provenance={})
    assert not (tmp_path / "lit").exists()


@pytest.fixture
def lit_dir(tmp_path: Path, source_dir: Path) -> Path:
    save(random_gpt("qwen3_moe"), tmp_path / "lit", source_dir)
    return tmp_path / "lit"


def test_config_and_weights_that_do_not_fit_are_refused(lit_dir: Path) -> None:
    path = lit_dir / "model_config.yaml"
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(config | {"n_layer": 4}))
    with pytest.raises(UserError, match=r"\d+ missing \(transformer.h.3.norm_1.weight, .*\)"):
        load_state(lit_dir)
    path.write_text(yaml.safe_dump(config | {"n_layer": 2}))
    with pytest.raises(UserError, match=r"\d+ unknown \(transformer.h.2"):
        load_state(lit_dir)
    path.write_text(yaml.safe_dump(config | {"moe_intermediate_size": 21}))
    with pytest.raises(UserError, match=r"has shape \(20, 24\), but model_config.yaml says \(21, 24\)"):
        load_state(lit_dir)


def test_a_lit_dir_is_replaced_and_anything_else_is_not(lit_dir: Path, source_dir: Path, tmp_path: Path) -> None:
    model = random_gpt("qwen3")
    save(model, lit_dir, source_dir)
    assert same_bits(load_state(lit_dir), dict(model.state_dict()))
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match="holds other files"):
        save(model, foreign, source_dir)
    assert os.listdir(foreign) == ["diary.txt"]


def test_a_failed_save_leaves_the_old_directory(
    lit_dir: Path, source_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in lit_dir.iterdir()}

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="no room left"):
        save(random_gpt("qwen3"), lit_dir, source_dir)
    assert {path.name: path.read_bytes() for path in lit_dir.iterdir()} == before
    assert sorted(os.listdir(lit_dir.parent)) == ["lit", "source"]


def test_added_tokens_are_saved(tmp_path: Path, source_dir: Path) -> None:
    tokenizer = Tokenizer(source_dir)
    ids = tokenizer.add_thought_tokens(448)
    model = random_gpt("qwen3")
    save_lit_dir(
        tmp_path / "lit", model.state_dict(), model.config, source_dir=source_dir, provenance={}, tokenizer=tokenizer
    )
    assert Tokenizer(tmp_path / "lit").thought_ids == ids


def test_require_lit_dir_says_what_to_run(lit_dir: Path, tmp_path: Path) -> None:
    assert require_lit_dir(lit_dir) == lit_dir
    with pytest.raises(
        UserError, match=r"does not exist; run first: python scripts/download.py --repo_id Qwen/Qwen3-0.6B"
    ):
        require_lit_dir(tmp_path / "Qwen" / "Qwen3-0.6B")
    with pytest.raises(UserError, match="does not exist; run first: make coffee"):
        require_lit_dir(tmp_path / "absent", first="make coffee")
    with pytest.raises(UserError, match="run first: the step that writes it"):
        require_lit_dir(tmp_path / "absent")
    (lit_dir / LIT_FILE).unlink()
    with pytest.raises(UserError, match=r"lacks lit_model.pth; run first: python scripts/convert_hf_checkpoint.py"):
        require_lit_dir(lit_dir)


def test_provenance_round_trip(tmp_path: Path) -> None:
    assert read_provenance(tmp_path) == {}
    values = {"tie_embeddings": True, "thought_tokens": [151669, 151670], "note": "गेहूँ", "sha256": {"a": "b"}}
    write_provenance(tmp_path, values)
    assert read_provenance(tmp_path) == values and list(read_provenance(tmp_path)) == list(values)
    for broken in ("[1, 2]", "a: [", "\xff"):
        (tmp_path / "provenance.yaml").write_bytes(broken.encode("latin-1"))
        with pytest.raises(UserError, match=r"provenance.yaml"):
            read_provenance(tmp_path)


class TestReadingBytes:
    """`read_bytes`, past the page cache or through it, from anywhere into memory that is used again."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "numbers"
        path.write_bytes(torch.randint(0, 256, (3 * DIRECT_BYTES + 17,), dtype=torch.uint8).numpy().tobytes())
        return path

    @pytest.mark.parametrize("once", [False, True])
    @pytest.mark.parametrize(
        ("offset", "count"), [(0, 17), (1, DIRECT_BYTES), (DIRECT_BYTES - 1, 2), (8, 3 * DIRECT_BYTES + 9), (40, 0)]
    )
    def test_any_span_is_what_the_file_holds(self, file: Path, offset: int, count: int, once: bool) -> None:
        memory = page_memory(3 * DIRECT_BYTES + 9)
        for into in (None, memory, memory):
            data = read_bytes(file, "w", offset, count, once=once, into=into)
            assert data.numpy().tobytes() == file.read_bytes()[offset : offset + count]

    @pytest.mark.parametrize("once", [False, True])
    @pytest.mark.parametrize(("offset", "count"), [(0, 3 * DIRECT_BYTES + 18), (2 * DIRECT_BYTES, 2 * DIRECT_BYTES)])
    def test_a_file_that_ends_early_is_one_line(self, file: Path, offset: int, count: int, once: bool) -> None:
        with pytest.raises(
            UserError, match=f"{file.name} ends {offset + count - file.stat().st_size} bytes early in w;"
        ):
            read_bytes(file, "w", offset, count, once=once)

    def test_a_file_system_that_refuses_is_read_through_the_cache(
        self, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flags = []
        real = os.open

        def refusing(path: Path, flag: int) -> int:
            flags.append(flag)
            if flag & getattr(os, "O_DIRECT", 0):
                raise OSError(errno.EINVAL, "no such way")
            return real(path, flag)

        monkeypatch.setattr("litgpt.tensorfile.os.open", refusing)
        assert read_bytes(file, "w", 5, 9, once=True).numpy().tobytes() == file.read_bytes()[5:14]
        assert flags[-1] == os.O_RDONLY


class TestStreamFile:
    """A file from its first byte to its last, past the page cache or through it."""

    @pytest.fixture(autouse=True)
    def small_stages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("litgpt.tensorfile.STAGE_BYTES", 2 * DIRECT_BYTES)

    @pytest.mark.parametrize(
        "counts", [[], [1], [DIRECT_BYTES], [2 * DIRECT_BYTES] * 3, [5, 7 * DIRECT_BYTES, 0, 1, DIRECT_BYTES - 6]]
    )
    def test_it_holds_what_was_written(self, counts: list[int], tmp_path: Path) -> None:
        path = tmp_path / "stream"
        path.write_bytes(b"old" * 100_000)
        pieces = [os.urandom(count) for count in counts]
        stream = StreamFile(path)
        for piece in pieces:
            stream.write(piece)
        assert stream.length == sum(counts)
        assert stream.finish() == hashlib.sha256(b"".join(pieces)).hexdigest()
        stream.close()
        assert path.read_bytes() == b"".join(pieces)

    @pytest.mark.parametrize("refused", ["open", "pwrite"])
    def test_a_file_system_that_refuses_is_written_through_the_cache(
        self, refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        direct, real_open, real_pwrite = getattr(os, "O_DIRECT", 0), os.open, os.pwrite
        opened: dict[int, int] = {}

        def opening(path: Path, flags: int, mode: int) -> int:
            if refused == "open" and flags & direct:
                raise OSError(errno.EINVAL, "no such way")
            descriptor = real_open(path, flags, mode)
            opened[descriptor] = flags
            return descriptor

        def writing(descriptor: int, data: memoryview, offset: int) -> int:
            if opened[descriptor] & direct:
                raise OSError(errno.EINVAL, "no such way")
            return real_pwrite(descriptor, data, offset)

        monkeypatch.setattr("litgpt.tensorfile.os.open", opening)
        monkeypatch.setattr("litgpt.tensorfile.os.pwrite", writing)
        stream, content = StreamFile(tmp_path / "stream"), os.urandom(5 * DIRECT_BYTES + 3)
        stream.write(content)
        stream.finish()
        stream.close()
        assert (tmp_path / "stream").read_bytes() == content

    def test_a_full_disk_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr("litgpt.tensorfile.os.pwrite", full)
        specs = {"w": ((4 * DIRECT_BYTES,), torch.float32)}
        with (
            pytest.raises(UserError, match="no room left on the disk"),
            HFWriter(tmp_path, specs, max_shard_bytes=10**9, streamed=True) as writer,
        ):
            writer.write("w", torch.zeros(4 * DIRECT_BYTES))

    def test_shards_follow_each_other_and_nothing_is_skipped(self, tmp_path: Path) -> None:
        tensors = {name: torch.randn(3, 1000) for name in "abc"}
        specs = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        for streamed in (True, False):
            folder = tmp_path / str(streamed)
            folder.mkdir()
            with HFWriter(folder, specs, max_shard_bytes=25_000, streamed=streamed) as writer:
                for name in writer.in_file_order:
                    writer.write(name, tensors[name])
        files = {path.name: path.read_bytes() for path in (tmp_path / "True").iterdir()}
        assert files == {path.name: path.read_bytes() for path in (tmp_path / "False").iterdir()} and len(files) == 3
        with (
            pytest.raises(ValueError, match="not what comes next"),
            HFWriter(tmp_path, specs, max_shard_bytes=10**9, streamed=True) as writer,
        ):
            writer.write("b", tensors["b"])
