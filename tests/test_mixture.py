"""Mixtures keep the promised shares and every document, buckets like lengths, and the cache gives the same ids."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from litgpt.chat import Span
from litgpt.data import Batch, Document, PackedLoader, Record, read_records
from litgpt.mixture import MixtureLoader, Source, SourceSettings, read_sources
from litgpt.rendered import RenderSettings, read_rendered, render_records
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, run_cli
from tests.tiny_tokenizer import build_tiny_tokenizer
from tests.world import write_dialogues

OPTIONS = {"max_seq_length": 320, "micro_batch_size": 2, "seed": 5}
NO_CACHE = RenderSettings(cache="none")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    tokenizer = Tokenizer(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    tokenizer.add_thought_tokens(448)
    return tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    write_dialogues(folder / "advice.jsonl", 40, prefix="a")
    texts = [{"text": "The soil and the weather. " * (1 + i % 5) + str(i)} for i in range(30)]
    (folder / "general.jsonl").write_text("\n".join(map(json.dumps, texts)) + "\n")
    return {"advice": folder / "advice.jsonl", "general": folder / "general.jsonl"}


def mixture(files: dict[str, Path], tokenizer: Tokenizer, **options: object) -> MixtureLoader:
    weights = {"advice": 3.0, "general": 1.0}
    settings = {name: SourceSettings(path, weights[name]) for name, path in files.items()}
    return MixtureLoader(read_sources(settings, tokenizer, NO_CACHE), tokenizer, **(OPTIONS | options))  # type: ignore[arg-type]


def same(one: Batch, other: Batch) -> bool:
    tensors = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in tensors)


def test_every_token_of_a_text_but_the_first_counts(files: dict[str, Path], tokenizer: Tokenizer) -> None:
    records, documents = read_rendered(files["general"], tokenizer, NO_CACHE, texts=True)
    assert records[3].id == f"{files['general']}:4" and records[3].text is not None
    end = tokenizer.token_to_id("<|endoftext|>")
    assert documents[3].ids_T.tolist() == [*tokenizer.encode(records[3].text), end]
    assert documents[3].spans_T.tolist() == [Span.PROMPT] + [Span.ANSWER] * (len(documents[3].ids_T) - 1)


@pytest.mark.parametrize("packing", ["pack", "bucket"])
def test_one_source_is_the_packed_loader(files: dict[str, Path], tokenizer: Tokenizer, packing: str) -> None:
    one = mixture({"advice": files["advice"]}, tokenizer, packing=packing)
    plain = PackedLoader(read_records(files["advice"]), tokenizer, packing=packing, **OPTIONS)  # type: ignore[arg-type]
    assert one.state_dict() == plain.state_dict()
    for _ in range(3):
        assert len(one) == len(plain)
        assert all(same(a, b) for a, b in zip(one, plain, strict=True))


@pytest.mark.parametrize("packing", ["pack", "bucket"])
def test_shares_are_of_tokens_and_no_document_gets_ahead(
    files: dict[str, Path], tokenizer: Tokenizer, packing: str
) -> None:
    loader = mixture(files, tokenizer, packing=packing)
    seen: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    epochs = 12
    for epoch in range(epochs):
        for batch in loader:
            for row, source in zip(batch.records, batch.sources, strict=True):
                assert (source == -1) == (not row)
                assert all((i >= 40) == (source == 1) for i in row)
                seen.update(row)
                tokens[source] += sum(len(loader.documents[i].ids_T) for i in row)
        assert all(seen[i] == epoch + 1 for i in range(40))
        general = [seen[i] for i in range(40, 70)]
        assert max(general) - min(general) <= 1
    longest = max(len(document.ids_T) for document in loader.documents)
    assert abs(tokens[0] / 3 - tokens[1]) <= longest
    report = loader.report()
    assert report["advice"].epochs == epochs
    assert report["general"].epochs == pytest.approx(tokens[1] / report["general"].tokens, abs=1e-12)
    assert (report["advice"].share, report["general"].share) == (0.75, 0.25)


def test_a_stretch_of_the_epoch_has_the_shares_too(files: dict[str, Path], tokenizer: Tokenizer) -> None:
    loader = mixture(files, tokenizer, max_seq_length=100, micro_batch_size=1)
    sources = [batch.sources[0] for batch in loader]
    half = len(sources) // 2
    assert abs(sum(sources[:half]) - sum(sources[half:])) <= 2


@pytest.mark.parametrize("packing", ["pack", "bucket"])
def test_ranks_share_a_mixture_and_a_state_resumes_it(
    files: dict[str, Path], tokenizer: Tokenizer, packing: str
) -> None:
    alone = [row for batch in mixture(files, tokenizer, micro_batch_size=4, packing=packing) for row in batch.records]
    ranks = [mixture(files, tokenizer, rank=rank, world_size=2, packing=packing) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    together = [list(rank) for rank in ranks]
    interleaved = [row for pair in zip(*together, strict=True) for batch in pair for row in batch.records]
    assert [row for row in interleaved if row] == [row for row in alone if row]

    whole = mixture(files, tokenizer, packing=packing).forever()
    expected = [next(whole) for _ in range(25)]
    loader = mixture(files, tokenizer, packing=packing)
    batches = loader.forever()
    for position in range(20):
        resumed = mixture(files, tokenizer, packing=packing)
        resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
        rest = resumed.forever()
        assert all(same(next(rest), batch) for batch in expected[position : position + 3])
        next(batches)
    with pytest.raises(UserError, match="data loader has epoch_of 'advice', this one has 'general'"):
        mixture(files, tokenizer, packing=packing, epoch_of="general").load_state_dict(loader.state_dict())


def test_padding_by_source_adds_up(files: dict[str, Path], tokenizer: Tokenizer) -> None:
    loader = mixture(files, tokenizer)
    room, padding = Counter[int](), Counter[int]()
    for batch in loader:
        for b, source in enumerate(batch.sources):
            room[source] += batch.ids_BT.shape[1]
            padding[source] += int((batch.documents_BT[b] == -1).sum())
    loader = mixture(files, tokenizer)
    for s, report in enumerate(loader.report().values()):
        assert report.padding_share == pytest.approx(padding[s] / room[s])
    assert loader.padding_share == pytest.approx(padding.total() / room.total())


def test_buckets_hold_one_document_a_row_and_like_lengths(files: dict[str, Path], tokenizer: Tokenizer) -> None:
    records = read_records(files["advice"])
    bucketed = PackedLoader(records, tokenizer, packing="bucket", **OPTIONS)  # type: ignore[arg-type]
    rows = [[len(bucketed.documents[i].ids_T) for (i,) in batch.records] for batch in bucketed]
    assert len(rows) == 20
    lengths = sorted(length for row in rows for length in row)
    assert sorted(map(sorted, rows)) == [list(pair) for pair in zip(lengths[::2], lengths[1::2], strict=True)]
    assert rows != sorted(rows)
    with pytest.raises(UserError, match="packing 'box' is not known"):
        PackedLoader(records, tokenizer, packing="box", **OPTIONS)  # type: ignore[arg-type]


def test_the_same_ids_by_every_route(
    files: dict[str, Path], tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = read_records(files["advice"])
    expected = render_records(records, tokenizer, processes=1)
    assert render_records(records * 10, tokenizer, processes=2).sha256() == (
        render_records(records * 10, tokenizer, processes=1).sha256()
    )
    settings = RenderSettings(cache=str(tmp_path))

    def check() -> None:
        _, documents = read_rendered(files["advice"], tokenizer, settings)
        assert torch.equal(torch.cat([document.ids_T for document in documents]), expected.ids_N)
        assert torch.equal(torch.cat([document.spans_T for document in documents]), expected.spans_N)

    check()
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    check()
    assert file.stat().st_mtime_ns == written
    assert capsys.readouterr().err == ""
    content = file.read_bytes()
    for broken in (content[:-9], content[:-1] + bytes([content[-1] ^ 1]), b""):
        file.write_bytes(broken)
        check()
        assert "is broken" in capsys.readouterr().err
        check()
        assert capsys.readouterr().err == ""
    # Another tokenizer is another file.
    other = Tokenizer(build_tiny_tokenizer(tmp_path.parent / "other"))
    read_rendered(files["advice"], other, settings)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_said_and_does_no_harm(
    files: dict[str, Path], tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    _, documents = read_rendered(files["advice"], tokenizer, RenderSettings(cache=str(tmp_path / "file" / "cache")))
    assert len(documents) == 40
    assert "is not kept" in capsys.readouterr().err


def test_mistakes_are_named(files: dict[str, Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"'advice' has weight .*: expected a number above 0"):
            read_sources({"advice": SourceSettings(files["advice"], weight)}, tokenizer, NO_CACHE)
    with pytest.raises(UserError, match="has no source"):
        read_sources({}, tokenizer)
    with pytest.raises(UserError, match="epoch_of is 'x', which is no source: choose one of advice, general"):
        mixture(files, tokenizer, epoch_of="x")
    (tmp_path / "copy.jsonl").write_bytes(files["advice"].read_bytes())
    with pytest.raises(UserError, match=r"id 'a-0' stands in the source 'copy' .* and in 'advice'"):
        mixture_of = {"advice": SourceSettings(files["advice"]), "copy": SourceSettings(tmp_path / "copy.jsonl")}
        read_sources(mixture_of, tokenizer, NO_CACHE)
    with pytest.raises(UserError, match=r"source 'general': none of 30 records fits into 3 tokens"):
        mixture({"general": files["general"]}, tokenizer, max_seq_length=3)
    silent = Document(torch.tensor([1, 2]), torch.tensor([Span.ANSWER, Span.PROMPT], dtype=torch.uint8))
    with pytest.raises(UserError, match="source 's': no record has a token that is learnt"):
        MixtureLoader([Source("s", [Record("a", [])], [silent])], tokenizer, **OPTIONS)  # type: ignore[arg-type]
    for content, complaint in (
        ('{"text": " "}', '"text" is empty'),
        ('{"text": 3}', '"text" to be a string, found a number'),
        ('{"text": "x", "messages": []}', 'both "text" and "messages"'),
        ("\n", "holds no record"),
    ):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(UserError, match=complaint):
            read_sources({"bad": SourceSettings(tmp_path / "bad.jsonl")}, tokenizer, NO_CACHE)


def test_sources_are_read_from_a_config_and_an_unknown_key_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(sources: dict[str, SourceSettings]) -> dict[str, SourceSettings]:
        return sources

    config = tmp_path / "config.yaml"
    config.write_text("sources:\n  advice: {path: a.jsonl, weight: 3}\n  general: {path: g.jsonl, teacher: base}\n")
    assert run_cli(command, args=["--config", str(config)]) == {
        "advice": SourceSettings(Path("a.jsonl"), 3.0),
        "general": SourceSettings(Path("g.jsonl"), 1.0, Path("base")),
    }
    config.write_text("sources:\n  advice: {path: a.jsonl, wieght: 3}\n")
    with pytest.raises(SystemExit, match="2"):
        run_cli(command, args=["--config", str(config)])
    assert "wieght" in capsys.readouterr().err
