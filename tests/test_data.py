"""Records with exact complaints, and a packed loader that loses nothing and resumes exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from litgpt.chat import Span, render
from litgpt.data import Batch, PackedLoader, Record, pack, read_records
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError
from tests.tiny_tokenizer import build_tiny_tokenizer
from tests.world import write_dialogues

USER = {"role": "user", "content": "क्या करें?"}
ANSWER = {"role": "assistant", "content": "पानी दें।"}
GOOD = json.dumps({"id": "a", "messages": [USER, ANSWER]}, ensure_ascii=False)


def line(**changes: object) -> str:
    return json.dumps({"id": "b", "messages": [USER, ANSWER]} | changes, ensure_ascii=False)


def messages(*turns: object) -> str:
    return line(messages=list(turns))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"id": "b", ', "not valid JSON: Expecting property name"),
        ("[1]", "expected a JSON object, found a list"),
        (line(id=7), '"id" to be a non-empty string, found a number'),
        (line(id=""), '"id" to be a non-empty string, found an empty string'),
        (line(messages=None), '"messages" to be a non-empty list, found nothing'),
        (line(messages=[]), "found an empty list"),
        (line(meta=[1]), '"meta" to be an object, found a list'),
        (messages(USER, "hi"), "message 2: expected an object, found a string"),
        (messages({"role": "bot", "content": "x"}), "message 1: role 'bot' is none of system, user, assistant"),
        (messages(USER), "no assistant turn"),
        (messages(USER, ANSWER | {"content": 3}), 'message 2: expected "content" to be a string, found a number'),
        (messages(USER, ANSWER | {"content": " \n"}), 'message 2: "content" is empty'),
        (messages(USER, {"role": "assistant"}), 'message 2: expected "content" to be a string, found nothing'),
        (messages(USER, ANSWER | {"thought": True}), 'expected "thought" to be a string, found true or false'),
        (messages(USER | {"thought": "x"}, ANSWER), "only an assistant has a thought"),
        (messages(USER, ANSWER | {"reasoning_content": "x"}), "unknown key 'reasoning_content'"),
        (line(id="a"), "id 'a' stands in line 1 already"),
        ('{"id": "b", "messages": [{"role": "assistant", "content": "\\ud800"}]}', "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(f"{GOOD}\n\n{text}\n{GOOD}\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_a_line_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + GOOD.encode("utf-16-le"))
    with pytest.raises(UserError, match=r"train.jsonl:2: not (UTF-8|valid JSON)"):
        read_records(path)
    path.write_bytes(b'{"id": "\xff"}')
    with pytest.raises(UserError, match=r"train.jsonl:1: not UTF-8 at byte 8 of the line"):
        read_records(path)


def test_no_file_and_no_record_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*nowhere.jsonl"):
        read_records(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_bytes(b"\n \n")
    with pytest.raises(UserError, match="holds no record"):
        read_records(tmp_path / "empty.jsonl")


def test_byte_order_mark_crlf_and_unicode_line_separators_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    second = line(messages=[USER, ANSWER | {"content": "एक\u2028दो", "thought": None}])
    path.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n{second}\r\n".encode())
    records = read_records(path)
    assert [record.id for record in records] == ["a", "b"]
    assert records[1].messages[1] == {"role": "assistant", "content": "एक\u2028दो"}


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_packing_keeps_every_item_once_and_no_row_overflows(lengths: list[int]) -> None:
    order = list(range(len(lengths)))[::-1]
    rows = pack(order, lengths, 50)
    assert sorted(item for row in rows for item in row) == sorted(order)
    assert all(0 < sum(lengths[item] for item in row) <= 50 for row in rows)
    # First-fit: two rows that are both at most half full never stand within one window.
    assert sum(2 * sum(lengths[i] for i in row) <= 50 for row in rows) <= 1 + len(rows) // 64


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    tokenizer = Tokenizer(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    tokenizer.add_thought_tokens(448)
    return tokenizer


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    write_dialogues(path, 23, prefix="r")
    return read_records(path)


def make_loader(records: list[Record], tokenizer: Tokenizer, **options: object) -> PackedLoader:
    settings = {"max_seq_length": 320, "micro_batch_size": 2, "seed": 5} | options
    return PackedLoader(records, tokenizer, **settings)  # type: ignore[arg-type]


def same(one: Batch, other: Batch) -> bool:
    tensors = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in tensors)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_dialogue_comes_once_an_epoch_over_all_ranks(
    records: list[Record], tokenizer: Tokenizer, world_size: int
) -> None:
    seen: list[int] = []
    lengths = set()
    for rank in range(world_size):
        loader = make_loader(records, tokenizer, rank=rank, world_size=world_size)
        lengths.add(len(loader))
        batches = list(loader)
        assert len(batches) in lengths
        for batch in batches:
            for b, row in enumerate(batch.records):
                seen += row
                for number, i in enumerate(row):
                    place = batch.documents_BT[b] == number
                    rendered = render(records[i].messages, tokenizer)
                    assert batch.ids_BT[b, place].tolist() == rendered.ids
                    assert batch.spans_BT[b, place].tolist() == rendered.spans
                padding = batch.documents_BT[b] == -1
                assert int(padding.sum()) == batch.ids_BT.shape[1] - sum(len(loader.documents[i].ids_T) for i in row)
                assert (batch.spans_BT[b, padding] == Span.PAD).all()
    assert len(lengths) == 1
    assert sorted(seen) == list(range(len(records)))


def test_order_depends_on_seed_and_epoch_alone(records: list[Record], tokenizer: Tokenizer) -> None:
    def epochs(**options: object) -> list[list[list[list[int]]]]:
        loader = make_loader(records, tokenizer, **options)
        return [[batch.records for batch in loader] for _ in range(2)]

    first = epochs()
    assert first == epochs()
    assert first[0] != first[1]
    assert first != epochs(seed=6)
    fixed = epochs(shuffle=False)
    assert fixed[0] == fixed[1]


def test_state_resumes_with_the_same_remaining_batches(records: list[Record], tokenizer: Tokenizer) -> None:
    whole = make_loader(records, tokenizer).forever()
    expected = [next(whole) for _ in range(3 * len(make_loader(records, tokenizer)))]
    loader = make_loader(records, tokenizer)
    batches = loader.forever()
    for position in range(len(expected) - 1):
        state = json.loads(json.dumps(loader.state_dict()))
        resumed = make_loader(records, tokenizer)
        resumed.load_state_dict(state)
        rest = resumed.forever()
        for batch in expected[position : position + 3]:
            assert same(next(rest), batch)
        assert same(next(batches), expected[position])


def test_a_state_of_other_data_is_refused(records: list[Record], tokenizer: Tokenizer) -> None:
    state = make_loader(records, tokenizer).state_dict()
    with pytest.raises(UserError, match="data loader has data"):
        make_loader(records[1:], tokenizer).load_state_dict(state)
    with pytest.raises(UserError, match="data loader has micro_batch_size 2, this one has 3"):
        make_loader(records, tokenizer, micro_batch_size=3).load_state_dict(state)


def test_too_long_dialogues_are_left_out_and_listed(records: list[Record], tokenizer: Tokenizer) -> None:
    lengths = {record.id: len(render(record.messages, tokenizer).ids) for record in records}
    limit = sorted(lengths.values())[len(lengths) // 2]
    loader = make_loader(records, tokenizer, max_seq_length=limit)
    assert sorted(loader.dropped) == sorted(name for name, length in lengths.items() if length > limit)
    assert 0 < len(loader.dropped) < len(records)
    assert all(batch.ids_BT.shape[1] <= limit for batch in loader)
    shortest = min(lengths.values())
    with pytest.raises(UserError, match=f"none of 23 dialogues fits into 9 tokens; the shortest has {shortest}"):
        make_loader(records, tokenizer, max_seq_length=9)


def test_padding_share_is_that_of_the_batches(records: list[Record], tokenizer: Tokenizer) -> None:
    loader = make_loader(records, tokenizer)
    share = loader.padding_share
    padding = torch.cat([(batch.documents_BT == -1).flatten() for batch in loader])
    assert share == pytest.approx(float(padding.float().mean()), abs=1e-6)
    assert 0 <= share < 0.5


def test_next_tokens_stay_inside_their_document() -> None:
    batch = Batch(
        ids_BT=torch.tensor([[1, 2, 3, 4, 5, 0, 0]]),
        spans_BT=torch.tensor([[0, 2, 0, 1, 2, 3, 3]], dtype=torch.uint8),
        documents_BT=torch.tensor([[0, 0, 1, 1, 1, -1, -1]], dtype=torch.int32),
        records=[[0, 1]],
    )
    targets_BT, spans_BT = batch.next_tokens()
    assert targets_BT.tolist() == [[2, 0, 4, 5, 0, 0, 0]]
    assert spans_BT.tolist() == [[2, 3, 1, 2, 3, 3, 3]]
