"""The loaders that the data settings ask for: one file, a mixture of several, or a corpus beyond memory."""

from __future__ import annotations

from litgpt.data import Loader, PackedLoader
from litgpt.mixture import MixtureLoader, read_sources
from litgpt.recipe import DataSettings
from litgpt.rendered import read_rendered
from litgpt.streaming import StreamingLoader
from litgpt.tokenizer import Tokenizer


def training_loader(
    data: DataSettings, tokenizer: Tokenizer, *, seed: int, rank: int = 0, world_size: int = 1
) -> Loader:
    """What a run learns from.

    Args:
        data: the settings.
        tokenizer: the student's.
        seed: of the order.
        rank, world_size: this process among those that share the data.

    Raises:
        UserError: a file that is not as it should be, or nothing in it fits.
    """
    # Spelt out for each: a dict of options would hide a wrong one from the type checker.
    if data.stream is not None:
        return StreamingLoader(
            data.stream,
            tokenizer,
            max_seq_length=data.max_seq_length,
            micro_batch_size=data.micro_batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            packing=data.packing,
        )
    if data.sources is not None:
        return MixtureLoader(
            read_sources(data.sources, tokenizer, data.render),
            tokenizer,
            max_seq_length=data.max_seq_length,
            micro_batch_size=data.micro_batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            packing=data.packing,
            epoch_of=data.epoch_of,
        )
    assert data.train is not None
    records, documents = read_rendered(data.train, tokenizer, data.render, texts=True)
    return PackedLoader(
        records,
        tokenizer,
        max_seq_length=data.max_seq_length,
        micro_batch_size=data.micro_batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        packing=data.packing,
        documents=documents,
    )


def validation_loaders(data: DataSettings, tokenizer: Tokenizer) -> dict[str, PackedLoader]:
    """The validation sets by name, `val` first, each whole and in its own order.

    Args:
        data: the settings.
        tokenizer: the student's.

    Raises:
        UserError: a file that is not as it should be, or nothing in it fits.
    """
    found = {}
    for setting, path in data.validation_files().items():
        records, documents = read_rendered(path, tokenizer, data.render, texts=True)
        found[setting.removeprefix("data.").removeprefix("more_val.")] = PackedLoader(
            records,
            tokenizer,
            max_seq_length=data.max_seq_length,
            micro_batch_size=data.micro_batch_size,
            shuffle=False,
            documents=documents,
        )
    return found
