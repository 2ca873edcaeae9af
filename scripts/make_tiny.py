"""Make the tiny world: a tokenizer, a small base and a larger teacher, from this repository's own text alone.

    python scripts/make_tiny.py --config configs/tiny/models.yaml

The base reads the general text and a share of the training dialogues with their thoughts; the teacher reads all of both
without thoughts, as it will in the distillation. Nobody reads the validation or test dialogues. Both are written as
Hugging Face directories, which the demo then takes through the same commands as a real Qwen3. The same seed, data and
torch give the same weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from litgpt.chat import IM_END, Span, chat_template, render
from litgpt.checkpoint import convert_lit_to_hf, save_lit_dir
from litgpt.config import Config
from litgpt.data import PADDING_DOCUMENT, Record, pack, read_records
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, atomic_file, progress, run_cli, sha256_file

ROOT = Path(__file__).resolve().parent.parent
END_OF_TEXT = "<|endoftext|>"
# Qwen3's control tokens in the order of their ids, and whether a decoder that skips special tokens skips them.
CONTROL_TOKENS = {
    **dict.fromkeys([END_OF_TEXT, "<|im_start|>", IM_END, "<|object_ref_start|>", "<|object_ref_end|>"], True),
    **dict.fromkeys(["<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"], True),
    **dict.fromkeys(["<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"], True),
    **dict.fromkeys(["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"], False),
    **dict.fromkeys(["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"], False),
    **dict.fromkeys(["<think>", "</think>"], False),
}
FREE_ROWS = 16
# Qwen3's pieces but for \p{M}: Qwen3 cuts a Hindi word at every vowel sign, which would waste a small vocabulary.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A little loss on the farmer's words: they are Hindi as well, and a tiny model needs every line it can learn from.
PROMPT_WEIGHT = 0.1
WARMUP, FINAL_RATE = 0.05, 0.05


@dataclass
class TokenizerRecipe:
    """Size of the vocabulary."""

    bpe_size: int
    """Pieces that the BPE learns, the 256 bytes included."""
    padded_size: int
    """Rows of the embedding: a multiple of 64, with at least 16 rows free."""

    def __post_init__(self) -> None:
        free = self.padded_size - self.bpe_size - len(CONTROL_TOKENS)
        if self.padded_size % 64 or free < FREE_ROWS:
            raise UserError(
                f"tokenizer.padded_size {self.padded_size} must be a multiple of 64 and leave {FREE_ROWS} rows free "
                f"beside {self.bpe_size} pieces and {len(CONTROL_TOKENS)} control tokens; it leaves {free}"
            )


@dataclass
class ModelRecipe:
    """Shape and training of one model."""

    n_layer: int
    """Blocks."""
    n_embd: int
    """Width."""
    n_head: int
    """Query heads."""
    n_query_groups: int
    """Key and value heads."""
    head_size: int
    """Width of a head."""
    intermediate_size: int
    """Inner width of the MLP."""
    tie_embeddings: bool
    """Whether lm_head is the embedding."""
    dialogue_share: float
    """Part of the training dialogues that it reads, 0 to 1."""
    thoughts: bool
    """Whether it reads their thoughts, between `<think>` tags; otherwise the block is empty."""
    epochs: float
    """Passes over its text."""
    learning_rate: float
    """Peak of the cosine."""

    def config(self, name: str, vocab_size: int, padded_size: int) -> Config:
        """The model as a Qwen3 of that shape."""
        return Config.from_name(
            "Qwen3-0.6B",
            name=name,
            hf_config={"name": name},
            block_size=2048,
            vocab_size=vocab_size,
            padded_vocab_size=padded_size,
            rope_base=10_000,
            n_layer=self.n_layer,
            n_embd=self.n_embd,
            n_head=self.n_head,
            n_query_groups=self.n_query_groups,
            head_size=self.head_size,
            intermediate_size=self.intermediate_size,
            tie_embeddings=self.tie_embeddings,
        )


@dataclass
class BatchRecipe:
    """Size of a step."""

    row_length: int
    """Tokens in a row."""
    rows: int
    """Rows in a step."""


@dataclass(frozen=True)
class Corpus:
    """One split of both kinds of text.

    Attributes:
        general: plain texts.
        dialogues: records; their thoughts are used for the tokenizer only.
        sha256: file, relative to the data directory → its hash.
    """

    general: list[str]
    dialogues: list[Record]
    sha256: dict[str, str]


@dataclass(frozen=True)
class Document:
    """Ids, and for each id what it counts in the loss of predicting it."""

    ids_T: Tensor
    weights_T: Tensor


def read_corpus(data_dir: Path, split: str) -> Corpus:
    """The general text and the dialogues of one split, `train` or `val`.

    Raises:
        UserError: a file is missing or broken, and which command makes it.
    """
    general_file, dialogue_file = (Path(kind) / f"{split}.jsonl" for kind in ("general", "dialogues"))
    for file, script in ((general_file, "make_general.py"), (dialogue_file, "prepare_data.py")):
        if not (data_dir / file).is_file():
            raise UserError(f"no file {data_dir / file}: run python scripts/{script} first")
    lines = (data_dir / general_file).read_text(encoding="utf-8").splitlines()
    return Corpus(
        general=[json.loads(line)["text"] for line in lines],
        dialogues=read_records(data_dir / dialogue_file),
        sha256={str(file): sha256_file(data_dir / file) for file in (general_file, dialogue_file)},
    )


def train_tokenizer(corpus: Corpus, recipe: TokenizerRecipe, out_dir: Path) -> Tokenizer:
    """Train a byte-level BPE with Qwen3's control tokens and write its files, as a chat checkpoint has them."""
    pipeline = tokenizers.Tokenizer(models.BPE())
    pipeline.normalizer = normalizers.NFC()
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pipeline.decoder = decoders.ByteLevel()
    pipeline.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.bpe_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    turns = (message for record in corpus.dialogues for message in record.messages)
    words = (text for turn in turns for text in (turn["content"], turn.get("thought", "")))
    # What the chat format itself writes should be a few pieces as well.
    pipeline.train_from_iterator([*corpus.general, *words, *["system\nuser\nassistant\n\n"] * 100], trainer)
    if pipeline.get_vocab_size() != recipe.bpe_size:
        raise UserError(
            f"the text gives only {pipeline.get_vocab_size()} of tokenizer.bpe_size {recipe.bpe_size} pieces; lower it"
        )
    pipeline.add_tokens(
        [tokenizers.AddedToken(name, special=special, normalized=False) for name, special in CONTROL_TOKENS.items()]
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    pipeline.save(str(out_dir / "tokenizer.json"))
    settings = {
        # The generic class: transformers' Qwen2 class would put Qwen's own pre-tokeniser in place of ours.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": [name for name, special in CONTROL_TOKENS.items() if special][1:],
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    (out_dir / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    stops = [pipeline.token_to_id(IM_END), pipeline.token_to_id(END_OF_TEXT)]
    generation = {"do_sample": False, "eos_token_id": stops, "pad_token_id": stops[1]}
    (out_dir / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    tokenizer = Tokenizer(out_dir)
    tokenizer.chat_template = chat_template("think")
    tokenizer.save(out_dir)  # once more, now with the added tokens and the template in both files
    return tokenizer


def general_documents(texts: Sequence[str], tokenizer: Tokenizer) -> list[Document]:
    """Plain texts, each ended by `<|endoftext|>`; every token counts 1."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [torch.tensor([*tokenizer.encode(text), end]) for text in texts]
    return [Document(x, torch.ones(len(x))) for x in ids]


def dialogue_documents(
    records: Sequence[Record], tokenizer: Tokenizer, *, thoughts: bool, prompt_weight: float
) -> list[Document]:
    """Dialogues with their thoughts, or without, as the distillation's teacher reads them; what is said counts 1."""
    documents = []
    for record in records:
        rendered = render(record.messages, tokenizer, tags="think", keep_thoughts=thoughts)
        said_T = torch.tensor(rendered.spans) != Span.PROMPT
        documents.append(Document(torch.tensor(rendered.ids), said_T.float().clamp_min(prompt_weight)))
    return documents


def batches(documents: Sequence[Document], batch: BatchRecipe, order: Sequence[int]) -> Iterator[tuple[Tensor, ...]]:
    """Packed steps of one pass: ids, document numbers, targets and their weights, each [rows, row_length].

    Raises:
        UserError: a document is longer than a row.
    """
    lengths = [len(document.ids_T) for document in documents]
    if max(lengths) > batch.row_length:
        raise UserError(f"the longest text has {max(lengths)} tokens, batch.row_length is {batch.row_length}: raise it")
    packed = pack(order, lengths, batch.row_length)
    for start in range(0, len(packed), batch.rows):
        rows = packed[start : start + batch.rows]
        ids_BT = torch.zeros(len(rows), batch.row_length, dtype=torch.int64)
        documents_BT = torch.full_like(ids_BT, PADDING_DOCUMENT)
        targets_BT, weights_BT = torch.zeros_like(ids_BT), torch.zeros(ids_BT.shape)
        for b, row in enumerate(rows):
            begin = 0
            for number, index in enumerate(row):
                end = begin + lengths[index]
                ids_BT[b, begin:end] = documents[index].ids_T
                documents_BT[b, begin:end] = number
                targets_BT[b, begin : end - 1] = documents[index].ids_T[1:]
                weights_BT[b, begin : end - 1] = documents[index].weights_T[1:]
                begin = end
        yield ids_BT, documents_BT, targets_BT, weights_BT


def loss_sums(model: GPT, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Weighted sum of cross-entropies over a step, in nats, and the sum of the weights."""
    ids_BT, documents_BT, targets_BT, weights_BT = batch
    hidden_ND = model(ids_BT, documents_BT=documents_BT, return_logits=False).hidden.flatten(0, 1)
    counts_N = weights_BT.flatten() > 0
    weights_M, targets_M = weights_BT.flatten()[counts_N], targets_BT.flatten()[counts_N]
    logits_MV = model.lm_head(hidden_ND[counts_N])
    return (F.cross_entropy(logits_MV, targets_M, reduction="none") * weights_M).sum(), weights_M.sum()


def train(model: GPT, documents: Sequence[Document], recipe: ModelRecipe, batch: BatchRecipe, *, seed: int) -> int:
    """Train from random weights with AdamW and a cosine; returns the number of steps."""
    shuffle = random.Random(seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
    order = list(range(len(documents)))
    per_epoch = math.ceil(len(pack(order, [len(d.ids_T) for d in documents], batch.row_length)) / batch.rows)
    steps = max(1, round(per_epoch * recipe.epochs))

    def endless() -> Iterator[tuple[Tensor, ...]]:
        while True:
            shuffle.shuffle(order)
            yield from batches(documents, batch, order)

    stream, start = endless(), time.monotonic()
    model.train()
    for step in progress(range(steps), f"training {model.config.name}", unit="step"):
        warmup = min(1.0, (step + 1) / max(1.0, WARMUP * steps))
        cosine = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warmup * cosine
        total, weight = loss_sums(model, next(stream))
        loss = total / weight
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            passed = f"loss {float(loss.detach()):.3f}, {time.monotonic() - start:.0f} s"
            print(f"{model.config.name} step {step + 1}/{steps}: {passed}", flush=True)
    return steps


@torch.no_grad()
def cross_entropy(model: GPT, documents: Sequence[Document], batch: BatchRecipe) -> float:
    """Weighted mean cross-entropy in nats a token."""
    model.eval()
    sums = [loss_sums(model, step) for step in batches(documents, batch, range(len(documents)))]
    return float(sum(total for total, _ in sums) / sum(weight for _, weight in sums))


def validation_losses(model: GPT, tokenizer: Tokenizer, corpus: Corpus, batch: BatchRecipe) -> dict[str, float]:
    """Nats a token on the general text and on the answers of the dialogues."""
    answers = dialogue_documents(corpus.dialogues, tokenizer, thoughts=False, prompt_weight=0.0)
    return {
        "general": cross_entropy(model, general_documents(corpus.general, tokenizer), batch),
        "answer": cross_entropy(model, answers, batch),
    }


def make_model(
    name: str,
    recipe: ModelRecipe,
    corpus: Corpus,
    held_out: Corpus,
    tokenizer_dir: Path,
    out_dir: Path,
    *,
    padded_size: int,
    batch: BatchRecipe,
    seed: int,
) -> dict[str, object]:
    """Train one model, write it as a bf16 Hugging Face directory, and return what the README says about it."""
    tokenizer = Tokenizer(tokenizer_dir)
    dialogues = random.Random(seed).sample(corpus.dialogues, round(recipe.dialogue_share * len(corpus.dialogues)))
    documents = general_documents(corpus.general, tokenizer)
    documents += dialogue_documents(dialogues, tokenizer, thoughts=recipe.thoughts, prompt_weight=PROMPT_WEIGHT)
    model = GPT(recipe.config(name, tokenizer.vocab_size, padded_size))
    model.init_weights(generator=torch.Generator().manual_seed(seed))
    start = time.monotonic()
    steps = train(model, documents, recipe, batch, seed=seed)
    minutes = (time.monotonic() - start) / 60
    model.to(torch.bfloat16).float()  # what is scored is what is stored
    losses = validation_losses(model, tokenizer, held_out, batch)
    state = {key: tensor.to(torch.bfloat16) for key, tensor in model.state_dict().items()}
    facts: dict[str, object] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "dialogues": len(dialogues),
        "tokens_per_epoch": sum(len(d.ids_T) for d in documents),
        "steps": steps,
        "minutes": round(minutes, 1),
        **{f"val_{key}": round(value, 4) for key, value in losses.items()},
    }
    with tempfile.TemporaryDirectory() as lit_dir:
        made = {"made_by": "scripts/make_tiny.py", "seed": seed, "recipe": asdict(recipe), "data": corpus.sha256}
        save_lit_dir(Path(lit_dir) / name, state, model.config, source_dir=tokenizer_dir, provenance=made)
        convert_lit_to_hf(Path(lit_dir) / name, out_dir)
    print(f"{name}: {json.dumps(facts)}", flush=True)
    return facts


README = """\
# The tiny world

A small dense base and a larger teacher of Qwen3's structure, as Hugging Face directories in bf16. They exist so that
every command can be run on a laptop; they advise nobody. `python scripts/make_tiny.py --config
configs/tiny/models.yaml` wrote them from nothing but this repository's own text: the base from
`data/general/train.jsonl` and a share of `data/dialogues/train.jsonl` with their thoughts, the teacher from all of both
without thoughts. The val and test files were never read.

Seed {seed}, torch {torch}, {threads} CPU thread a model. Losses are nats a token of the stored weights:
`val_general` on `data/general/val.jsonl`, `val_answer` on the answers of `data/dialogues/val.jsonl`.

{table}

Training data, SHA-256:

{data}

The files themselves: `cd data/tiny && sha256sum -c SHA256SUMS`.
"""


def readme(facts: dict[str, dict[str, object]], corpus: Corpus, *, seed: int, threads: int) -> str:
    """The provenance notes of the shipped directories."""
    rows = [["", *facts], ["---"] * (1 + len(facts))]
    rows += [[key, *(str(facts[name][key]) for name in facts)] for key in facts["base"]]
    return README.format(
        seed=seed,
        torch=torch.__version__.split("+")[0],
        threads=threads,
        table="\n".join("| " + " | ".join(row) + " |" for row in rows),
        data="\n".join(f"- `data/{file}` `{digest}`" for file, digest in corpus.sha256.items()),
    )


def main(
    tokenizer: TokenizerRecipe,
    base: ModelRecipe,
    teacher: ModelRecipe,
    batch: BatchRecipe,
    seed: int = 1337,
    threads: int = 1,
    data_dir: Path = ROOT / "data",
    out_dir: Path = ROOT / "data" / "tiny",
) -> None:
    """Train the tokenizer, the base and the teacher of the tiny world.

    Args:
        tokenizer: size of the vocabulary.
        base: the small model, which learns a little about crops.
        teacher: the larger model, which learns all of it.
        batch: size of a step.
        seed: of weights, order and choice of dialogues.
        threads: CPU threads for each of the two models; rounding, and so the last digits of the weights, depend on it.
        data_dir: holds general/ and dialogues/.
        out_dir: base/, teacher/, README.md and SHA256SUMS are written here.
    """
    corpus, held_out = read_corpus(data_dir, "train"), read_corpus(data_dir, "val")
    with tempfile.TemporaryDirectory() as tokenizer_dir:
        train_tokenizer(corpus, tokenizer, Path(tokenizer_dir))
        # Side by side, a thread each: matrices this small leave a second thread mostly waiting for the first.
        pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,))
        with pool:
            made = {
                name: pool.submit(
                    make_model,
                    name,
                    recipe,
                    corpus,
                    held_out,
                    Path(tokenizer_dir),
                    out_dir / name,
                    padded_size=tokenizer.padded_size,
                    batch=batch,
                    seed=seed,
                )
                for name, recipe in (("base", base), ("teacher", teacher))
            }
            facts = {name: future.result() for name, future in made.items()}
    with atomic_file(out_dir / "README.md") as temporary:
        temporary.write_text(readme(facts, corpus, seed=seed, threads=threads), encoding="utf-8")
    files = sorted(path for name in facts for path in (out_dir / name).iterdir())
    sums = [f"{sha256_file(path)}  {path.relative_to(out_dir)}\n" for path in files]
    with atomic_file(out_dir / "SHA256SUMS") as temporary:
        temporary.write_text("".join(sums), encoding="utf-8")
    size = sum(path.stat().st_size for path in files)
    digest = hashlib.sha256("".join(sums).encode()).hexdigest()[:12]
    print(f"{out_dir}: {len(files)} files, {size / 1e6:.1f} MB, {digest}")


if __name__ == "__main__":
    run_cli(main)
