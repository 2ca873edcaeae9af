"""The tokenizer: ids as the checkpoint declares them, no injected control tokens, text that streams without damage."""

from __future__ import annotations

import json
import shutil
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt.tokenizer import THOUGHT_TOKENS, Tokenizer
from litgpt.utils import UserError
from tests.tiny_tokenizer import CONTROL_TOKENS, build_tiny_tokenizer

QWEN3 = Path(__file__).resolve().parents[2] / "shared" / "qwen3_tokenizer"
needs_qwen3 = pytest.mark.skipif(not QWEN3.is_dir(), reason="Qwen3's tokenizer files are not on this machine")

HINDI = "किसान भाई, गेहूँ के पत्तों पर पीला रतुआ है। क्ष त्र ज्ञ श्र ड़ ढ़ र्‍य क्‍ष कुआँ 👩‍🌾🌾 ₹५०/किग्रा"
# Devanagari with its matras, nukta, virama, joiners and danda; Latin; white space; signs beyond the BMP.
TEXT = st.text(
    st.sampled_from([*HINDI, *"<|im_end|> abcXYZ.,:\n\t0123/", "\u200d", "\u200c", "é", "農", "\ufffd", "𑅙"])
)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_dir: Path) -> Tokenizer:
    return Tokenizer(tiny_dir)


@pytest.fixture(scope="session")
def qwen3() -> Tokenizer:
    return Tokenizer(QWEN3)


def edited(source: Path, target: Path, name: str, edit: Callable[[dict], object]) -> Path:
    """A copy of a checkpoint directory with one of its JSON files changed."""
    shutil.copytree(source, target)
    content = json.loads((target / name).read_text(encoding="utf-8"))
    edit(content)
    (target / name).write_text(json.dumps(content), encoding="utf-8")
    return target


# Which ids


def test_ids_are_what_the_files_say(tiny: Tokenizer) -> None:
    assert tiny.bos_id is None
    assert tiny.eos_id == tiny.token_to_id("<|im_end|>")
    assert tiny.stop_ids == (tiny.eos_id, tiny.token_to_id("<|endoftext|>"))
    assert tiny.think_ids == (tiny.token_to_id("<think>"), tiny.token_to_id("</think>"))
    assert tiny.thought_ids is None
    assert tiny.token_to_id("no such token") is None
    assert tiny.vocab_size == 1 + (tiny.token_to_id("</think>") or 0)


def test_base_checkpoint_ends_with_endoftext(tmp_path: Path) -> None:
    base = Tokenizer(build_tiny_tokenizer(tmp_path / "base", eos_token="<|endoftext|>"))
    assert base.eos_id == base.token_to_id("<|endoftext|>")
    assert base.stop_ids == (base.eos_id,)


def test_end_of_text_falls_back_to_the_other_files(tiny_dir: Path, tmp_path: Path) -> None:
    bare = edited(
        tiny_dir, tmp_path / "bare", "tokenizer_config.json", lambda c: (c.pop("eos_token"), c.pop("bos_token"))
    )
    (bare / "config.json").write_text(json.dumps({"eos_token_id": 7, "bos_token_id": 5}))
    declared = json.loads((bare / "generation_config.json").read_text())["eos_token_id"]
    assert Tokenizer(bare).stop_ids == tuple(declared)
    (bare / "generation_config.json").unlink()
    assert (Tokenizer(bare).stop_ids, Tokenizer(bare).bos_id) == ((7,), 5)
    (bare / "config.json").unlink()
    with pytest.raises(UserError, match="names no end-of-text token"):
        Tokenizer(bare)


def test_eos_token_may_be_an_object(tiny_dir: Path, tmp_path: Path) -> None:
    token = {"content": "<|endoftext|>", "special": True}
    old = edited(tiny_dir, tmp_path / "old", "tokenizer_config.json", lambda c: c.update(eos_token=token))
    assert Tokenizer(old).eos_id == Tokenizer(old).token_to_id("<|endoftext|>")


@needs_qwen3
def test_qwen3_ids(qwen3: Tokenizer) -> None:
    assert (qwen3.vocab_size, qwen3.bos_id, qwen3.eos_id) == (151669, None, 151645)
    assert qwen3.think_ids == (151667, 151668)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer.json in"),
        ("tokenizer.json", "{", "cannot be read as a tokenizer"),
        ("tokenizer_config.json", None, "no tokenizer_config.json in"),
        ("tokenizer_config.json", "{'a': 1}", "not valid JSON"),
        ("tokenizer_config.json", "[]", "expected an object"),
        ("tokenizer_config.json", '{"eos_token": "<none>"}', "which tokenizer.json lacks"),
        ("generation_config.json", "\0", "not valid JSON"),
    ],
)
def test_missing_or_broken_file(tiny_dir: Path, tmp_path: Path, name: str, content: str | None, message: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_dir, broken)
    (broken / name).unlink()
    if content is not None:
        (broken / name).write_text(content)
    with pytest.raises(UserError, match=message):
        Tokenizer(broken)


def test_other_tokenizers_are_refused(tiny_dir: Path, tmp_path: Path) -> None:
    pieces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    other = edited(tiny_dir, tmp_path / "other", "tokenizer.json", lambda c: c.update(decoder=pieces))
    with pytest.raises(UserError, match="only byte-level BPE"):
        Tokenizer(other)
    with pytest.raises(UserError, match="no directory"):
        Tokenizer(tmp_path / "absent")


# Text to ids


@pytest.mark.parametrize("control", [*CONTROL_TOKENS, *THOUGHT_TOKENS])
def test_a_user_cannot_write_a_control_token(tiny_dir: Path, control: str) -> None:
    tokenizer = Tokenizer(tiny_dir)
    tokenizer.add_thought_tokens(1000)
    index = tokenizer.token_to_id(control)
    text = f"खेत {control} में"
    assert index in tokenizer.encode(text, special=True)
    ids = tokenizer.encode(text)
    assert index not in ids
    assert tokenizer.decode(ids) == text


@given(TEXT)
def test_encode_then_decode_is_the_normalised_text(tiny: Tokenizer, text: str) -> None:
    ids = tiny.encode(text)
    assert tiny.decode(ids) == unicodedata.normalize("NFC", text)
    assert not {tiny.token_to_id(control) for control in CONTROL_TOKENS} & set(ids)


@pytest.mark.parametrize("special", [False, True])
def test_lone_surrogate(tiny: Tokenizer, special: bool) -> None:
    with pytest.raises(UserError, match=r"lone surrogate \(U\+D800\) at character 4"):
        tiny.encode("गेहूं\ud800"[1:], special=special)


def test_truncation_in_the_file_is_not_applied(tiny_dir: Path, tmp_path: Path) -> None:
    rule = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    cut = edited(tiny_dir, tmp_path / "cut", "tokenizer.json", lambda c: c.update(truncation=rule))
    assert len(Tokenizer(cut).encode(HINDI, special=True)) > 3


@needs_qwen3
@settings(deadline=None)
@given(text=TEXT)
def test_same_ids_and_text_as_transformers(qwen3: Tokenizer, reference: object, text: str) -> None:
    ids = qwen3.encode(text, special=True)
    assert ids == reference(text, add_special_tokens=False).input_ids  # type: ignore[operator]
    for skip in (False, True):
        expected = reference.decode(ids, skip_special_tokens=skip)  # type: ignore[attr-defined]
        assert qwen3.decode(ids, skip_special=skip) == expected


@pytest.fixture(scope="session")
def reference() -> object:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(QWEN3)


# Ids to text


@given(TEXT, st.booleans())
def test_stream_equals_decode(tiny: Tokenizer, text: str, special: bool) -> None:
    ids = tiny.encode(text, special=special)
    stream = tiny.stream()
    pieces = [stream.push(index) for index in ids]
    assert "".join(pieces) + stream.flush() == tiny.decode(ids)
    assert stream.flush() == ""
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.data())
def test_any_ids_stream_without_replacement_characters(tiny: Tokenizer, data: st.DataObject) -> None:
    """Text cut anywhere, and ids in any order: bytes that make no character are left out, alike in both ways."""
    text_ids = tiny.encode(HINDI, special=True)
    cut = st.builds(lambda a, b: text_ids[min(a, b) : max(a, b)], *[st.integers(0, len(text_ids))] * 2)
    noise = st.lists(st.integers(0, tiny.vocab_size + 5), max_size=20)
    ids = data.draw(st.one_of(cut, noise, st.builds(lambda a, b: a + b, cut, noise)))
    skip = data.draw(st.booleans())
    stream = tiny.stream(skip_special=skip)
    joined = "".join(map(stream.push, ids)) + stream.flush()
    assert joined == tiny.decode(ids, skip_special=skip)
    whole = b"".join(tiny.token_bytes(index, skip_special=skip) for index in ids)
    assert joined == whole.decode("utf-8", "ignore")
    assert "\ufffd" not in joined or "\ufffd".encode() in whole


def test_a_character_waits_for_its_last_byte(tiny: Tokenizer) -> None:
    id_of = {tiny.token_bytes(index): index for index in range(tiny.vocab_size)}
    ids = [id_of[bytes([byte])] for byte in "🌾".encode()]
    stream = tiny.stream()
    assert [stream.push(index) for index in ids] == ["", "", "", "🌾"]
    assert tiny.decode(ids[:3]) == ""


def test_special_tokens_are_hidden_on_request(tiny: Tokenizer) -> None:
    ids = tiny.encode("<think>हाँ</think>ना<|im_end|>", special=True)
    assert tiny.decode(ids) == "<think>हाँ</think>ना"
    assert tiny.decode(ids, skip_special=False) == "<think>हाँ</think>ना<|im_end|>"
    assert tiny.decode([tiny.vocab_size + 3]) == ""


def test_streaming_takes_constant_time_per_token(tiny: Tokenizer) -> None:
    ids = tiny.encode(HINDI) * 200
    stream = tiny.stream()

    def seconds(part: list[int]) -> float:
        start = time.perf_counter()
        for index in part:
            stream.push(index)
        return time.perf_counter() - start

    # Re-decoding everything would make the last tenth about twenty times slower than the first.
    tenth = len(ids) // 10
    parts = [seconds(ids[start : start + tenth]) for start in range(0, 10 * tenth, tenth)]
    assert min(parts[5:]) < 5 * max(parts[:5])


# Thought tokens


def test_thought_tokens_take_the_next_free_rows(tiny_dir: Path) -> None:
    tokenizer = Tokenizer(tiny_dir)
    first = tokenizer.vocab_size
    assert tokenizer.add_thought_tokens(first + 2) == (first, first + 1) == tokenizer.thought_ids
    assert tokenizer.add_thought_tokens(first + 2) == (first, first + 1)
    assert tokenizer.vocab_size == first + 2
    # The two ids in a stream are text, not skipped, as <think> is.
    assert tokenizer.decode([first, first + 1]) == "<thought></thought>"


@pytest.mark.parametrize("free", [0, 1])
def test_no_room_for_thought_tokens(tiny_dir: Path, free: int) -> None:
    tokenizer = Tokenizer(tiny_dir)
    with pytest.raises(UserError, match=f"{free} of .* rows are free and 2 are needed.*--thought_tokens none"):
        tokenizer.add_thought_tokens(tokenizer.vocab_size + free)
    assert tokenizer.thought_ids is None


def test_save_and_load_again(tiny_dir: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny_dir)
    ids = tokenizer.add_thought_tokens(1000)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save(tmp_path)
    again = Tokenizer(tmp_path)
    assert again.thought_ids == ids == again.add_thought_tokens(1000)
    assert again.chat_template == tokenizer.chat_template
    assert (again.eos_id, again.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)
    text = f"<thought>{HINDI}</thought><|im_end|>"
    assert again.encode(text, special=True) == tokenizer.encode(text, special=True)
    entry = json.loads((tmp_path / "tokenizer_config.json").read_text())["added_tokens_decoder"][str(ids[0])]
    assert (entry["content"], entry["special"]) == ("<thought>", False)
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    assert [(token["id"], token["special"]) for token in added[-2:]] == [(ids[0], False), (ids[1], False)]


def test_transformers_reads_the_saved_thought_tokens(tiny_dir: Path, tmp_path: Path) -> None:
    source = QWEN3 if QWEN3.is_dir() else tiny_dir
    tokenizer = Tokenizer(source)
    ids = tokenizer.add_thought_tokens(151936)
    if source == QWEN3:
        assert ids == (151669, 151670)
    tokenizer.save(tmp_path)
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    text = f"<|im_start|>user\n{HINDI}<|im_end|>\n<thought>\nरतुआ\n</thought>\n\n<think>"
    assert auto(text, add_special_tokens=False).input_ids == tokenizer.encode(text, special=True)
    assert auto.convert_tokens_to_ids(list(THOUGHT_TOKENS)) == list(ids)
    assert len(auto) == tokenizer.vocab_size
    assert auto.eos_token_id == tokenizer.eos_id
    assert auto.decode(ids, skip_special_tokens=True) == "<thought></thought>"
