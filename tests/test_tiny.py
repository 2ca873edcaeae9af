"""The tiny world: what is shipped, what it was allowed to read, and the commands that make and show it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from litgpt.checkpoint import convert_hf_to_lit, copy_sidecars, load_model
from litgpt.config import Config
from litgpt.data import read_records
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, sha256_file
from scripts import demo, make_general, make_tiny
from scripts.make_tiny import BatchRecipe, ModelRecipe, TokenizerRecipe

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
TINY = DATA / "tiny"
NAMES = ("base", "teacher")
MAX_BYTES = 16_000_000

HINDI = [
    "गेहूं के पत्तों पर पीले धब्बे दिख रहे हैं, फसल 60 दिन की है।",
    "क्ष त्र ज्ञ श्र ड़ ढ़ र्‍य क्‍ष कुआँ ₹५०/किग्रा",
    "माँ ने कहा, “पानी पियो”\n1. पहले हाथ धोएँ।\n\n2. फिर खाएँ।",
    "Sign: yellow edge -> so likely dry soil. Check 12.5 cm below 🌾",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY / "base")


# What is shipped


def test_shipped_files_are_the_ones_that_were_written() -> None:
    lines = (TINY / "SHA256SUMS").read_text().splitlines()
    listed = {file: digest for digest, file in (line.split(maxsplit=1) for line in lines)}
    present = {str(path.relative_to(TINY)) for name in NAMES for path in (TINY / name).iterdir()}
    assert set(listed) == present
    assert {file: sha256_file(TINY / file) for file in listed} == listed
    assert sum((TINY / file).stat().st_size for file in listed) <= MAX_BYTES


@pytest.mark.parametrize("kind", ["general", "dialogues"])
def test_shipped_models_were_trained_on_the_shipped_text(kind: str) -> None:
    assert f"`data/{kind}/train.jsonl` `{sha256_file(DATA / kind / 'train.jsonl')}`" in (TINY / "README.md").read_text()


def test_shipped_shapes() -> None:
    base, teacher = (Config.from_hf(TINY / name) for name in NAMES)
    assert base.hf_family == teacher.hf_family == "qwen3"
    assert base.tie_embeddings
    assert not teacher.tie_embeddings
    assert base.head_size * base.n_head != base.n_embd
    assert base.padded_vocab_size == teacher.padded_vocab_size
    assert base.padded_vocab_size % 64 == 0


def test_both_have_one_tokenizer_with_free_rows() -> None:
    tokenizer = Tokenizer(TINY / "base")  # of its own: tokens are added to it
    assert len({sha256_file(TINY / name / "tokenizer.json") for name in NAMES}) == 1
    rows = Config.from_hf(TINY / "base").padded_vocab_size
    assert rows - tokenizer.vocab_size >= make_tiny.FREE_ROWS
    assert tokenizer.thought_ids is None
    first = tokenizer.vocab_size
    assert tokenizer.add_thought_tokens(rows) == (first, first + 1)


@pytest.mark.parametrize("text", HINDI)
def test_tokenizer_gives_hindi_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_hindi_word_is_not_cut_at_its_vowel_signs(tokenizer: Tokenizer) -> None:
    text = "".join(json.loads(line)["text"] for line in (DATA / "general/val.jsonl").read_text("utf-8").splitlines())
    words = len(re.findall(r"[\u0900-\u0963]+", text))
    letters = len(re.findall(r"[a-zA-Z]+", text))
    assert len(tokenizer.encode(text)) < 2.2 * (words + letters)
    assert len(tokenizer.encode(" पानी")) == 1


def test_control_tokens_stand_in_qwen3s_order(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.token_to_id(name) for name in make_tiny.CONTROL_TOKENS]
    assert ids == list(range(tokenizer.vocab_size - len(ids), tokenizer.vocab_size))
    assert tokenizer.eos_id == tokenizer.token_to_id("<|im_end|>")
    assert tokenizer.stop_ids == (tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>"))
    assert tokenizer.bos_id is None
    for token, special in make_tiny.CONTROL_TOKENS.items():
        index = tokenizer.token_to_id(token)
        assert index is not None
        assert tokenizer.decode([index]) == ("" if special else token)


def test_transformers_reads_the_same_ids(tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(TINY / "base")
    for text in HINDI:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert theirs.eos_token == "<|im_end|>"
    assert theirs.pad_token == "<|endoftext|>"


def test_teacher_answers_held_out_dialogues_better_than_base(tmp_path: Path) -> None:
    records = read_records(DATA / "dialogues/val.jsonl")[:16]
    loss = {}
    for name in NAMES:
        (tmp_path / name).mkdir()
        copy_sidecars(TINY / name, tmp_path / name)
        for file in ("config.json", "model.safetensors"):
            (tmp_path / name / file).symlink_to(TINY / name / file)
        convert_hf_to_lit(tmp_path / name)
        model = load_model(tmp_path / name, dtype=torch.float32)
        documents = make_tiny.dialogue_documents(records, Tokenizer(TINY / name), thoughts=False, prompt_weight=0.0)
        loss[name] = make_tiny.cross_entropy(model, documents, BatchRecipe(row_length=512, rows=4))
    assert loss["teacher"] < 0.8
    assert loss["base"] > loss["teacher"] + 0.5


# The general text


def test_general_text_is_what_its_generator_writes(tmp_path: Path) -> None:
    make_general.main(out_dir=tmp_path)
    for split in ("train", "val"):
        assert sha256_file(tmp_path / f"{split}.jsonl") == sha256_file(DATA / f"general/{split}.jsonl")


def test_general_text_splits_are_disjoint_and_teach_no_crop_problem() -> None:
    texts = {
        split: [json.loads(line) for line in (DATA / f"general/{split}.jsonl").read_text("utf-8").splitlines()]
        for split in ("train", "val")
    }
    assert not {r["text"] for r in texts["train"]} & {r["text"] for r in texts["val"]}
    assert {r["lang"] for r in texts["val"]} == {"hi", "en"}
    everything = " ".join(r["text"] for records in texts.values() for r in records)
    for word in ("रतुआ", "झुलसा", "कीटनाशक", "फफूंद", "कीड़े मार", "blight", "rust disease", "fungicide", "pesticide"):
        assert word not in everything


def test_a_pattern_with_a_mistake_is_named() -> None:
    lexicon = make_general.Lexicon(DATA / "general/patterns_hi.yaml")
    rng = random.Random(0)
    with pytest.raises(UserError, match=r"unknown slot \{nobody\}"):
        lexicon.expand("{nobody} आया।", rng)
    with pytest.raises(UserError, match="unclosed bracket"):
        lexicon.expand("{W} (आया।", rng)


# Making it


class InThisProcess(Executor):
    """Runs what is submitted at once: a process of its own spends longer on importing torch than on a tiny model."""

    def __init__(self, *_: object) -> None:
        torch.set_num_threads(1)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@pytest.fixture
def small_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first lines of the real text, with words in val and test that are nowhere else."""
    monkeypatch.setattr(make_tiny, "ProcessPoolExecutor", InThisProcess)
    for kind, count in (("general", 60), ("dialogues", 20)):
        (tmp_path / kind).mkdir()
        lines = (DATA / kind / "train.jsonl").read_text("utf-8").splitlines()[:count]
        (tmp_path / kind / "train.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        for split in ("val", "test"):
            marked = [re.sub(r"[।.]", f" {split}secret ", line) for line in lines[:4]]
            (tmp_path / kind / f"{split}.jsonl").write_text("\n".join(marked) + "\n", "utf-8")
    return tmp_path


def make_small(data_dir: Path, out_dir: Path, **changes: Any) -> None:
    recipe = ModelRecipe(
        n_layer=1,
        n_embd=16,
        n_head=2,
        n_query_groups=1,
        head_size=12,
        intermediate_size=24,
        tie_embeddings=True,
        dialogue_share=0.5,
        thoughts=True,
        epochs=0.2,
        learning_rate=1e-3,
    )
    make_tiny.main(
        tokenizer=TokenizerRecipe(bpe_size=464, padded_size=512),
        base=recipe,
        teacher=replace(recipe, n_embd=24, tie_embeddings=False, dialogue_share=1.0, thoughts=False),
        **{"batch": BatchRecipe(row_length=2048, rows=4), "threads": 1, **changes},
        data_dir=data_dir,
        out_dir=out_dir,
    )


def test_training_reads_train_alone(small_data: Path, tmp_path: Path) -> None:
    corpus = make_tiny.read_corpus(small_data, "train")
    read = json.dumps([corpus.general, [record.messages for record in corpus.dialogues]], ensure_ascii=False)
    assert "secret" not in read
    assert set(corpus.sha256) == {"general/train.jsonl", "dialogues/train.jsonl"}
    before = tmp_path / "before"
    make_small(small_data, before)
    for kind in ("general", "dialogues"):
        (small_data / kind / "test.jsonl").unlink()
        lines = (small_data / kind / "train.jsonl").read_text("utf-8").splitlines()[:4]
        (small_data / kind / "val.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    make_small(small_data, tmp_path / "after")
    # With another val and no test the files are the same: nothing of either went into them.
    assert (before / "SHA256SUMS").read_bytes() == (tmp_path / "after/SHA256SUMS").read_bytes()


def test_the_same_seed_gives_the_same_files_and_another_does_not(small_data: Path, tmp_path: Path) -> None:
    for run, seed in (("first", 7), ("second", 7), ("third", 8)):
        make_small(small_data, tmp_path / run, seed=seed)
    sums = {run: (tmp_path / run / "SHA256SUMS").read_text() for run in ("first", "second", "third")}
    assert sums["first"] == sums["second"]
    assert sums["first"] != sums["third"]
    for name in NAMES:
        assert Tokenizer(tmp_path / "first" / name).chat_template


def test_mistakes_are_named(small_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="multiple of 64"):
        TokenizerRecipe(bpe_size=1000, padded_size=1040)
    with pytest.raises(UserError, match=r"row_length is 32: raise it"):
        make_small(small_data, tmp_path / "out", batch=BatchRecipe(row_length=32, rows=4))
    (small_data / "dialogues/train.jsonl").unlink()
    with pytest.raises(UserError, match=r"run python scripts/prepare_data\.py"):
        make_small(small_data, tmp_path / "out")


@pytest.mark.parametrize("thoughts", [False, True])
def test_what_is_said_counts_one_and_the_teacher_reads_no_thought(tokenizer: Tokenizer, thoughts: bool) -> None:
    record = next(r for r in read_records(DATA / "dialogues/val.jsonl") if r.messages[-1].get("thought"))
    (document,) = make_tiny.dialogue_documents([record], tokenizer, thoughts=thoughts, prompt_weight=0.25)
    answer, thought = record.messages[-1]["content"], record.messages[-1]["thought"]
    counted = document.ids_T[document.weights_T == 1].tolist()
    said = f"<think>\n{thought}\n</think>\n\n{answer}" if thoughts else answer
    assert tokenizer.decode(counted, skip_special=False) == said + "<|im_end|>"
    assert set(document.weights_T.tolist()) == {0.25, 1.0}
    assert (thought in tokenizer.decode(document.ids_T.tolist(), skip_special=False)) is thoughts


# The demo


REPORT: dict[str, Any] = {
    "before": {"answer_ce": 2.0, "thought_ce": 5.0, "kd_kl": 1.25, "expert_load": {}},
    "after": {"answer_ce": 1.0, "thought_ce": None, "kd_kl": 0.5, "expert_load": {"0": [0.5, 0.5], "1": [0.75, 0.25]}},
    "frozen": {"compared": 21, "identical": 21, "changed": []},
}
CKA: dict[str, Any] = {"layers": [{"a": 0, "b": 0, "cka": 0.987654}, {"a": 1, "b": 1, "cka": None}]}


def test_table_says_what_the_files_say() -> None:
    text = demo.table(REPORT, CKA)
    assert re.search(r"answer CE.* 2\.0000 +1\.0000", text)
    assert re.search(r"thought CE.* 5\.0000 +–", text)
    assert re.search(r"KL to the teacher.* 1\.2500 +0\.5000", text)
    assert re.search(r"^0 +0\.9877 +50\.0% +50\.0%$", text, re.MULTILINE)
    assert re.search(r"^1 +– +75\.0% +25\.0%$", text, re.MULTILINE)
    assert "frozen weights unchanged: yes (21 tensors compared bit for bit)" in text


def test_demo_fails_without_an_improvement() -> None:
    student, base = {"cause_top1": {"value": 0.4}}, {"cause_top1": {"value": 0.3}}
    assert demo.verdict(REPORT, student, base) == 0
    assert demo.verdict(REPORT, base, student) == 1 and demo.verdict(REPORT, base, base) == 1
    assert demo.verdict(REPORT | {"after": REPORT["before"]}, student, base) == 1
    assert demo.verdict(REPORT | {"frozen": {"changed": ["transformer.ln_f.weight"]}}, student, base) == 1


def test_a_failing_command_stops_the_demo_with_its_code(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.run("scripts/convert_hf_checkpoint.py", "--checkpoint_dir", "no/such/dir")
    assert stopped.value.code == 2
    captured = capfd.readouterr()
    assert captured.out.strip() == "$ python scripts/convert_hf_checkpoint.py --checkpoint_dir no/such/dir"
    assert "no/such/dir does not exist" in captured.err


def test_demo_copies_fresh_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"make_tiny\.py"):
        demo.copy_checkpoints(tmp_path / "none", tmp_path / "work")
    for name in NAMES:
        (tmp_path / "shipped" / name).mkdir(parents=True)
        (tmp_path / "shipped" / name / "model.safetensors").write_bytes(b"weights")
        (tmp_path / "work" / name).mkdir(parents=True)
        (tmp_path / "work" / name / "lit_model.pth").write_bytes(b"of an earlier demo")
    demo.copy_checkpoints(tmp_path / "shipped", tmp_path / "work")
    assert sorted(p.name for p in (tmp_path / "work").rglob("*") if p.is_file()) == ["model.safetensors"] * 2


def test_the_shipped_models_are_of_the_shipped_recipe() -> None:
    recipe = yaml.safe_load((ROOT / "configs/tiny/models.yaml").read_text("utf-8"))
    for name in NAMES:
        shipped = Config.from_hf(TINY / name)
        wanted = ModelRecipe(**recipe[name]).config(name, shipped.vocab_size, recipe["tokenizer"]["padded_size"])
        assert replace(shipped, hf_config=wanted.hf_config, padding_multiple=wanted.padding_multiple) == wanted
