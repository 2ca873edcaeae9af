"""A streamed corpus: the records that went in, each once over all ranks, and a stop that nothing can tell."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("litdata")

from litgpt.chat import render
from litgpt.data import Batch, read_records
from litgpt.streaming import StreamingLoader, write_stream
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError
from tests.tiny_tokenizer import build_tiny_tokenizer
from tests.world import write_dialogues

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {"max_seq_length": 320, "micro_batch_size": 2, "seed": 5, "window": 20}
COUNT = 90


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data.jsonl, tokenizer/ and stream/ in one folder."""
    folder = tmp_path_factory.mktemp("world")
    build_tiny_tokenizer(folder / "tokenizer")
    Tokenizer(folder / "tokenizer").add_thought_tokens(448)
    tokenizer = Tokenizer(folder / "tokenizer")
    tokenizer.add_thought_tokens(448)
    tokenizer.save(folder / "tokenizer")
    write_dialogues(folder / "data.jsonl", COUNT, prefix="r")
    write_stream(folder / "data.jsonl", folder / "tokenizer", folder / "stream", chunk_bytes=20_000)
    return folder


def make_loader(world: Path, **options: object) -> StreamingLoader:
    return StreamingLoader(world / "stream", Tokenizer(world / "tokenizer"), **(OPTIONS | options))  # type: ignore[arg-type]


def same(one: Batch, other: Batch) -> bool:
    tensors = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in tensors)


def test_the_stream_holds_the_records_as_they_are_rendered(world: Path) -> None:
    loader, tokenizer = make_loader(world), Tokenizer(world / "tokenizer")
    assert len(loader.card["chunks"]) > 4
    assert list(loader.records) == read_records(world / "data.jsonl")
    for record, document in zip(loader.records, loader.documents, strict=True):
        rendered = render(record.messages, tokenizer)
        assert document.ids_T.tolist() == rendered.ids
        assert document.spans_T.tolist() == rendered.spans


@pytest.mark.parametrize("packing", ["pack", "bucket"])
def test_two_ranks_see_everything_once_in_equally_many_batches(world: Path, packing: str) -> None:
    ranks = [make_loader(world, rank=rank, world_size=2, packing=packing) for rank in range(2)]
    orders = []
    for _ in range(2):
        batches = [list(rank) for rank in ranks]
        assert len(batches[0]) == len(batches[1])
        orders.append([[i for batch in rank for row in batch.records for i in row] for rank in batches])
        assert sorted(orders[-1][0] + orders[-1][1]) == list(range(COUNT))
    assert orders[0] != orders[1]
    assert all(len(orders[0][rank]) > COUNT // 4 for rank in range(2))


def test_lengths_and_padding_are_those_of_the_batches(world: Path) -> None:
    loader = make_loader(world)
    expected, share = len(loader), loader.padding_share
    batches = list(loader)
    assert len(batches) == expected
    padding = torch.cat([(batch.documents_BT == -1).flatten() for batch in batches])
    assert share == pytest.approx(float(padding.double().mean()))


REST = """
import json, pickle, sys
from litgpt.streaming import StreamingLoader
from litgpt.tokenizer import Tokenizer
folder, state, options = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
loader = StreamingLoader(folder + "/stream", Tokenizer(folder + "/tokenizer"), **options)
loader.load_state_dict(state)
batches = loader.forever()
sys.stdout.buffer.write(pickle.dumps([vars(next(batches)) for _ in range(12)]))
"""


def test_another_process_goes_on_with_the_very_same_batches(world: Path) -> None:
    whole = make_loader(world).forever()
    expected = [next(whole) for _ in range(20)]
    loader = make_loader(world)
    batches = loader.forever()
    for _ in range(7):
        next(batches)
    words = [sys.executable, "-c", REST, str(world), json.dumps(loader.state_dict()), json.dumps(OPTIONS)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, check=True)
    rest = [Batch(**fields) for fields in pickle.loads(done.stdout)]
    assert all(same(one, other) for one, other in zip(rest, expected[7:19], strict=True))
    for position in range(20):
        again = make_loader(world)
        again.load_state_dict(loader.state_dict() | {"position": 0, "epoch": 0})
        again.position = position
        if position < len(again):
            assert same(next(iter(again)), expected[position])


def test_too_long_documents_are_left_out_and_named(world: Path) -> None:
    lengths = [len(document.ids_T) for document in make_loader(world).documents]
    limit = sorted(lengths)[COUNT // 2]
    loader = make_loader(world, max_seq_length=limit)
    seen = sorted(i for batch in loader for row in batch.records for i in row)
    assert seen == [i for i, length in enumerate(lengths) if length <= limit]
    assert loader.dropped_count == COUNT - len(seen) == len(loader.dropped) > 0


def test_mistakes_are_named_and_leave_nothing(world: Path, tmp_path: Path) -> None:
    tokenizer_dir = world / "tokenizer"
    for content, complaint in (
        ("{", r"bad.jsonl:1: not valid JSON"),
        ("\n", "holds no record"),
        ('{"id": "a", "text": "x y"}\n' * 2, "id 'a' stands there twice"),
    ):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(UserError, match=complaint):
            write_stream(tmp_path / "bad.jsonl", tokenizer_dir, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="exists already"):
        write_stream(world / "data.jsonl", tokenizer_dir, world / "stream")
    with pytest.raises(UserError, match=r"no stream.json in .*: make it with"):
        StreamingLoader(tmp_path, Tokenizer(tokenizer_dir), max_seq_length=320, micro_batch_size=2)
    with pytest.raises(UserError, match="another tokenizer"):
        other = Tokenizer(build_tiny_tokenizer(tmp_path / "tokenizer"))
        StreamingLoader(world / "stream", other, max_seq_length=320, micro_batch_size=2)
    with pytest.raises(UserError, match="data loader has window 20, this one has 30"):
        make_loader(world, window=30).load_state_dict(make_loader(world).state_dict())
