"""Text ⇄ token ids for byte-level BPE checkpoints (Qwen2/3, Llama 3), over the `tokenizers` library.

Three things a plain `tokenizers.Tokenizer` does not give:

- text written by a user can never become a control token: two pipelines share one BPE model, only one knows the tokens
- `<thought>` and `</thought>` take free rows of the padded vocabulary, in the form transformers reads back
- `StreamDecoder` turns ids into text one at a time, holding back the bytes of a character that is not complete yet
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders

from litgpt.utils import UserError, atomic_file

__all__ = ["THINK_TOKENS", "THOUGHT_TOKENS", "StreamDecoder", "Tokenizer"]

THOUGHT_TOKENS = ("<thought>", "</thought>")
THINK_TOKENS = ("<think>", "</think>")


def _byte_of_character() -> dict[str, int]:
    """The printable stand-ins in which a byte-level BPE writes its bytes (Radford et al. 2019, GPT-2's encoder)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + position): byte for position, byte in enumerate(rest)})
    return table


_BYTE_OF_CHARACTER = _byte_of_character()


class Tokenizer:
    """The tokenizer of a checkpoint directory, with the ids its own files declare.

    Args:
        checkpoint_dir: holds `tokenizer.json` and `tokenizer_config.json`; `generation_config.json` and `config.json`
            are read for the end-of-text ids where they exist.

    Attributes:
        vocab_size: one past the highest id that stands for a token, added tokens included; rows above are padding.
        bos_id: the token the checkpoint puts first, `None` for Qwen.
        eos_id: the token that ends a text: `<|im_end|>` in a chat checkpoint of Qwen3, `<|endoftext|>` in a base one.
        stop_ids: every id that ends a generation; `eos_id` is among them.
        chat_template: jinja source that `save` writes; `None` when the checkpoint has none.

    Raises:
        UserError: a file is missing or broken, or the tokenizer is not byte-level BPE.
    """

    def __init__(self, checkpoint_dir: str | os.PathLike[str]) -> None:
        directory = Path(checkpoint_dir)
        if not directory.is_dir():
            raise UserError(f"no directory {directory}: expected a checkpoint with tokenizer.json in it")
        self._full = _load_pipeline(directory / "tokenizer.json")
        # The same vocabulary and merges (shared, not copied) without any added token: what a user writes goes here.
        self._plain = tokenizers.Tokenizer(self._full.model)
        if self._full.normalizer is not None:
            self._plain.normalizer = self._full.normalizer
        if self._full.pre_tokenizer is not None:
            self._plain.pre_tokenizer = self._full.pre_tokenizer
        self._settings = _read_json(directory / "tokenizer_config.json")
        template_file = directory / "chat_template.jinja"
        self.chat_template: str | None = self._settings.get("chat_template")
        if template_file.is_file():
            self.chat_template = template_file.read_text(encoding="utf-8")
        self._index_added_tokens()

        generation = _read_json(directory / "generation_config.json", optional=True)
        config = _read_json(directory / "config.json", optional=True)
        if "bos_token" in self._settings:
            self.bos_id = self._declared_id("bos_token", directory)
        else:
            declared = _id_list(generation, "bos_token_id") or _id_list(config, "bos_token_id")
            self.bos_id = declared[0] if declared else None
        stops = _id_list(generation, "eos_token_id") or _id_list(config, "eos_token_id")
        eos_id = self._declared_id("eos_token", directory)
        if eos_id is None:
            if not stops:
                raise UserError(
                    f"{directory} names no end-of-text token: expected eos_token in tokenizer_config.json "
                    "or eos_token_id in generation_config.json"
                )
            eos_id = stops[0]
        self.eos_id: int = eos_id
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([eos_id, *stops]))

    def _index_added_tokens(self) -> None:
        added = self._full.get_added_tokens_decoder()
        self._added = {index: token.content.encode() for index, token in added.items()}
        self._special_ids = frozenset(index for index, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}
        self.vocab_size: int = 1 + max(self._full.get_vocab(with_added_tokens=True).values())

    def _declared_id(self, key: str, directory: Path) -> int | None:
        token = self._settings.get(key)
        if isinstance(token, dict):
            token = token.get("content")
        if token is None:
            return None
        index = self.token_to_id(token) if isinstance(token, str) else None
        if index is None:
            raise UserError(f"{directory}/tokenizer_config.json says {key} is {token!r}, which tokenizer.json lacks")
        return index

    @property
    def thought_ids(self) -> tuple[int, int] | None:
        """Ids of `<thought>` and `</thought>`, `None` before `add_thought_tokens`."""
        return self._pair(THOUGHT_TOKENS)

    @property
    def think_ids(self) -> tuple[int, int] | None:
        """Ids of Qwen3's own `<think>` and `</think>`, `None` where the checkpoint has none."""
        return self._pair(THINK_TOKENS)

    def _pair(self, tokens: tuple[str, str]) -> tuple[int, int] | None:
        first, last = (self._full.token_to_id(token) for token in tokens)
        return None if first is None or last is None else (first, last)

    def token_to_id(self, token: str) -> int | None:
        """The id of one token by its exact name, `None` when there is none."""
        index: int | None = self._full.token_to_id(token)
        return index

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`, nothing put before or after it.

        Args:
            text: any text; the checkpoint's normaliser (NFC for Qwen) is applied.
            special: `True` turns the written form of an added token (`<|im_end|>`, `<think>`) into its id: for text
                of our own making. `False` spells it out like any other text: for text of a user.

        Raises:
            UserError: a lone surrogate, which no UTF-8 file can hold.
        """
        pipeline = self._full if special else self._plain
        try:
            ids: list[int] = pipeline.encode(text, add_special_tokens=False).ids
        except TypeError:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}: "
                    "expected text that can be written as UTF-8"
                ) from None
            raise
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that form no whole character are left out, as are ids that stand for no token.

        Args:
            ids: token ids.
            skip_special: leave out the tokens marked special (`<|im_end|>`); `<think>` is not one of them.
        """
        stream = self.stream(skip_special=skip_special)
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder for ids that arrive one at a time."""
        return StreamDecoder(self, skip_special=skip_special)

    def token_bytes(self, index: int, *, skip_special: bool = False) -> bytes:
        """The bytes that one id stands for: possibly part of a character, empty for an id without a token."""
        if skip_special and index in self._special_ids:
            return b""
        if index in self._added:
            return self._added[index]
        known = self._bytes.get(index)
        if known is None:
            token = self._full.id_to_token(index) or ""
            known = self._bytes[index] = bytes(_BYTE_OF_CHARACTER[character] for character in token)
        return known

    def add_thought_tokens(self, padded_vocab_size: int) -> tuple[int, int]:
        """Give `<thought>` and `</thought>` the next free rows; a second call changes nothing.

        They are marked not special, as Qwen3 marks `<think>`: a decoder that skips special tokens still shows them.

        Args:
            padded_vocab_size: rows of the embedding, padding included; it is never resized.

        Returns:
            the two ids.

        Raises:
            UserError: fewer free rows than tokens to add.
        """
        missing = [token for token in THOUGHT_TOKENS if self._full.token_to_id(token) is None]
        if self.vocab_size + len(missing) > padded_vocab_size:
            free = max(0, padded_vocab_size - self.vocab_size)
            raise UserError(
                f"{free} of {padded_vocab_size} vocabulary rows are free and {len(missing)} are needed for "
                f"{' and '.join(missing)}: use --thought_tokens none to keep the vocabulary as it is"
            )
        first_free = self.vocab_size
        self._full.add_tokens([tokenizers.AddedToken(token, normalized=False, special=False) for token in missing])
        self._index_added_tokens()
        given = [self._full.token_to_id(token) for token in missing]
        ids = self._pair(THOUGHT_TOKENS)
        if ids is None or given != list(range(first_free, first_free + len(missing))):
            raise UserError(f"the tokenizer gave {missing} the ids {given}: expected the free rows from {first_free}")
        return ids

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and, if there is one, `chat_template.jinja`.

        Every added token is listed in both JSON files, so that transformers' AutoTokenizer gives the same ids.
        """
        directory = Path(directory)
        settings = dict(self._settings)
        settings["added_tokens_decoder"] = {
            str(index): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for index, token in sorted(self._full.get_added_tokens_decoder().items())
        }
        settings.pop("chat_template", None)
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
            # transformers prefers this file to the key, vLLM and llama.cpp may read either: the two must agree.
            with atomic_file(directory / "chat_template.jinja") as temporary:
                temporary.write_text(self.chat_template, encoding="utf-8")
        with atomic_file(directory / "tokenizer.json") as temporary:
            self._full.save(str(temporary))
        with atomic_file(directory / "tokenizer_config.json") as temporary:
            temporary.write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


class StreamDecoder:
    """Ids in, text out, one id at a time in constant time; a character appears once its last byte has come.

    Bytes that cannot become a character are dropped, so U+FFFD appears only where the text itself has it. The pushed
    pieces and the flushed one, joined, are what `Tokenizer.decode` gives for all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("ignore")

    def push(self, index: int) -> str:
        """The text that became complete with this id, possibly empty."""
        return self._utf8.decode(self._tokenizer.token_bytes(index, skip_special=self._skip_special))

    def flush(self) -> str:
        """End of the ids: what is still held back is no whole character and is dropped; ready for a new text."""
        return self._utf8.decode(b"", final=True)


def _load_pipeline(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}: expected a checkpoint directory with its tokenizer files")
    try:
        pipeline = tokenizers.Tokenizer.from_file(str(path))
    # The library raises bare Exception for anything it cannot read.
    except Exception as error:
        raise UserError(f"{path} cannot be read as a tokenizer ({error}): copy or download it again") from None
    if not isinstance(pipeline.decoder, decoders.ByteLevel):
        found = type(pipeline.decoder).__name__
        raise UserError(f"{path} decodes with {found}: only byte-level BPE (Qwen2, Qwen3, Llama 3) is supported")
    pipeline.no_truncation()
    pipeline.no_padding()
    return pipeline


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"no {path.name} in {path.parent}: expected a checkpoint directory with its tokenizer files"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy or download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}: expected an object")
    return value


def _id_list(settings: dict[str, Any], key: str) -> list[int]:
    """`eos_token_id` may be absent, null, one id or a list of ids."""
    value = settings.get(key)
    values = value if isinstance(value, list) else [value]
    return [index for index in values if isinstance(index, int)]
