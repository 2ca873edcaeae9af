"""Targets kept on disk are those of the teacher, whole after any kill, and refused when anything has changed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from litgpt.cachewriter import CacheWriter
from litgpt.chat import Rendered, Span, render
from litgpt.checkpoint import load_model
from litgpt.data import PackedLoader, read_records
from litgpt.losses import SampledTeacher, Teacher, TopKTeacher, distill_terms
from litgpt.teacher import OnlineTeacher, View
from litgpt.teachercache import (
    CACHE_FILE,
    COUNT_BITS,
    HASHES_FILE,
    MAX_DRAWS,
    CachedTeacher,
    Kind,
    TargetForm,
    compress,
    open_teacher,
    sample,
)
from litgpt.tensorfile import LitReader
from litgpt.tokenizer import Tokenizer
from litgpt.utils import UserError, sha256_file
from scripts.cache_teacher import cache_teacher
from tests.world import World, make_world, write_dialogues

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def tokenizer(world: World) -> Tokenizer:
    return Tokenizer(world.student)


def make_loader(path: Path, tokenizer: Tokenizer, **settings: Any) -> PackedLoader:
    return PackedLoader(read_records(path), tokenizer, **({"max_seq_length": 320, "micro_batch_size": 2} | settings))


def form_of(kind: Kind, *, k: int = 12, dtype: str = "float32", seed: int = 5) -> TargetForm:
    return TargetForm(kind=kind, k=k, dtype=dtype, seed=seed)


def make_cache(
    out_dir: Path,
    world: World,
    form: TargetForm,
    *,
    data: Path | None = None,
    view: View = "strip",
    shard_records: int = 5,
    **how: Any,
) -> CacheWriter:
    student = Tokenizer(world.student)
    loader = make_loader(data or world.train, student)
    writer = CacheWriter(out_dir, world.teacher, student, [loader], view=view, form=form, shard_records=shard_records)
    writer.write(device=CPU, **how)
    return writer


def shards(directory: Path) -> dict[str, bytes]:
    """Every file of a cache that must not depend on how it came about."""
    names = [CACHE_FILE, *(path.name for path in directory.glob("shard-*.safetensors"))]
    return {name: (directory / name).read_bytes() for name in names}


class Side(NamedTuple):
    """Two teachers asked about one batch."""

    online: Teacher
    cached: Any
    rows: int


def ask_both(directory: Path, world: World, tokenizer: Tokenizer, *, view: View = "strip") -> list[Side]:
    loader = make_loader(world.train, tokenizer, seed=99)
    online, cached = OnlineTeacher(world.teacher, tokenizer, view=view), open_teacher(directory, tokenizer, view=view)
    online.load(dtype=torch.float64)
    cached.load(dtype=torch.float64)
    views = online.read(loader), cached.read(loader)
    asked = []
    for batch in loader:
        sides = [view.batch(batch) for view in views]
        n = batch.ids_BT.numel()
        asked.append(Side(online.targets(sides[0], n), cached.targets(sides[1], n), len(sides[0].student_at_M)))
    return asked


# What is kept


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("float32", 1e-6), ("bfloat16", 0.02)])
@pytest.mark.parametrize("view", ["strip", "native", "mask"])
def test_hidden_is_the_online_teacher_up_to_its_dtype(
    world: World, tokenizer: Tokenizer, tmp_path: Path, dtype: str, tolerance: float, view: View
) -> None:
    make_cache(tmp_path / "cache", world, form_of("hidden", dtype=dtype), view=view)
    for side in ask_both(tmp_path / "cache", world, tokenizer, view=view):
        assert isinstance(side.cached, Teacher)
        assert side.cached.hidden_MC.dtype == getattr(torch, dtype)
        assert torch.equal(side.cached.rows_N, side.online.rows_N)
        assert torch.equal(side.cached.head_VC, side.online.head_VC)
        error_MC = side.cached.hidden_MC.double() - side.online.hidden_MC
        assert float(error_MC.norm() / side.online.hidden_MC.norm()) < tolerance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_read_alone_is_kept_to_the_last_bit(
    world: World, tokenizer: Tokenizer, tmp_path: Path, dtype: str
) -> None:
    # One dialogue a batch on both sides: then even the order of additions is the same.
    make_cache(tmp_path / "cache", world, form_of("hidden", dtype=dtype), batch_tokens=1)
    cached = CachedTeacher(tmp_path / "cache", tokenizer)
    cached.load(dtype=getattr(torch, dtype))
    model = load_model(world.teacher, dtype=getattr(torch, dtype))
    loader = make_loader(world.train, tokenizer, micro_batch_size=1)
    view = cached.read(loader)
    for batch in loader:
        side = view.batch(batch)
        with torch.no_grad():
            alone = [
                model(reading.ids_T[None].long(), return_logits=False).hidden[0, reading.teacher_at_P]
                for reading in side.readings
            ]
        targets = cached.targets(side, batch.ids_BT.numel())
        assert isinstance(targets, Teacher)
        assert torch.equal(targets.hidden_MC, torch.cat(alone))
        assert torch.equal(targets.head_VC, model.lm_head.weight)


def test_the_loss_and_its_gradient_are_the_same_from_the_cache(
    world: World, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    make_cache(tmp_path / "cache", world, form_of("hidden", dtype="float64"))
    torch.manual_seed(0)
    head_VD = torch.randn(448, 32, dtype=torch.float64) / 5
    shared = OnlineTeacher(world.teacher, tokenizer).shared_vocab_size
    for side in ask_both(tmp_path / "cache", world, tokenizer):
        n = len(side.online.rows_N)
        student_ND = torch.randn(n, 32, dtype=torch.float64)
        found = []
        for teacher in (side.online, side.cached):
            hidden_ND = student_ND.clone().requires_grad_()
            terms = distill_terms(
                hidden_ND,
                head_VD,
                torch.zeros(n, dtype=torch.int64),
                torch.zeros(n),
                ce_scale=0.0,
                kd_scale=1.0,
                teacher=teacher,
                shared_vocab_size=shared,
            )
            terms.loss.backward()
            found.append((terms.loss.detach(), hidden_ND.grad))
        torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_topk_is_the_top_of_the_online_distribution_and_its_tail_the_rest(
    world: World, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    make_cache(tmp_path / "cache", world, form_of("topk", k=7, dtype="float64"))
    shared = OnlineTeacher(world.teacher, tokenizer).shared_vocab_size
    for side in ask_both(tmp_path / "cache", world, tokenizer):
        assert isinstance(side.cached, TopKTeacher)
        log_p_MV = (side.online.hidden_MC @ side.online.head_VC[:shared].T).log_softmax(-1)
        expected = log_p_MV.topk(7, dim=-1)
        assert torch.equal(side.cached.ids_MK, expected.indices)
        torch.testing.assert_close(side.cached.log_p_MK.double(), expected.values, rtol=1e-6, atol=1e-6)
        rest_M = log_p_MV.exp().scatter(1, expected.indices, 0.0).sum(-1)
        torch.testing.assert_close(1 - side.cached.log_p_MK.double().exp().sum(-1), rest_M, rtol=1e-5, atol=1e-6)
        assert torch.equal(side.cached.rows_N, side.online.rows_N)


def test_sampled_keeps_whole_draws_and_the_entropy(world: World, tokenizer: Tokenizer, tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", world, form_of("sampled", dtype="float64"))
    shared = OnlineTeacher(world.teacher, tokenizer).shared_vocab_size
    for side in ask_both(tmp_path / "cache", world, tokenizer):
        assert isinstance(side.cached, SampledTeacher)
        weights_MK, ids_MK = side.cached.weight_MK, side.cached.ids_MK
        torch.testing.assert_close(weights_MK.sum(-1), torch.ones(side.rows))
        torch.testing.assert_close(weights_MK * 12, (weights_MK * 12).round())
        assert int(ids_MK.max()) < shared
        for ids_K, weight_K in zip(ids_MK, weights_MK, strict=True):
            drawn = ids_K[weight_K > 0].tolist()
            assert len(set(drawn)) == len(drawn)  # each id once, its count beside it
            assert not ids_K[weight_K == 0].any()
        p_MV = (side.online.hidden_MC @ side.online.head_VC[:shared].T).softmax(-1)
        assert side.cached.entropy_M is not None
        torch.testing.assert_close(side.cached.entropy_M.double(), -(p_MV * p_MV.log()).sum(-1), rtol=1e-5, atol=1e-5)
        assert torch.equal(side.cached.rows_N, side.online.rows_N)


def mean_weights(draws_RK: Tensor, k: int, vocabulary: int) -> Tensor:
    ids_RK, counts_RK = draws_RK.long() >> COUNT_BITS, draws_RK.long() & MAX_DRAWS
    weights_RV = torch.zeros(len(draws_RK), vocabulary, dtype=torch.float64)
    return weights_RV.scatter_add_(1, ids_RK, counts_RK.double() / k).mean(0)


def greatest_z(mean_V: Tensor, p_V: Tensor, draws: int) -> float:
    """Largest deviation from p in standard deviations of as many independent draws."""
    return float(((mean_V - p_V).abs() / (p_V * (1 - p_V) / draws).sqrt()).max())


def test_sampled_weights_are_unbiased_for_every_id(world: World, tokenizer: Tokenizer) -> None:
    # The teacher's own distributions, over many seeds. Independent draws vary at least as much as stratified ones,
    # so 5 of their standard deviations over some 2,000 numbers is a bound that chance crosses once in 1,000 runs.
    model = load_model(world.teacher, dtype=torch.float64)
    loader = make_loader(world.train, tokenizer)
    reading = OnlineTeacher(world.teacher, tokenizer).read(loader).readings[0]
    shared = OnlineTeacher(world.teacher, tokenizer).shared_vocab_size
    with torch.no_grad():
        hidden_PC = model(reading.ids_T[None].long(), return_logits=False).hidden[0, reading.teacher_at_P[:5]]
    head_VC = model.lm_head.weight[:shared].detach()
    seeds, k = 4000, 12
    generator = torch.Generator().manual_seed(0)
    for hidden_C in hidden_PC:
        p_V = (hidden_C @ head_VC.T).softmax(-1)
        uniform_RK = torch.rand(seeds, k, dtype=torch.float64, generator=generator)
        kept = compress(form_of("sampled"), hidden_C.expand(seeds, -1), head_VC, uniform_RK, chunk_rows=500)
        mean_V = mean_weights(kept["draws"], k, shared)
        assert greatest_z(mean_V, p_V, seeds * k) < 5
        # The bound can be crossed: a distribution a little sharper than the teacher's is told apart.
        sharper_V = p_V**1.25 / (p_V**1.25).sum()
        assert greatest_z(mean_V, sharper_V, seeds * k) > 5


def test_sampled_never_varies_more_than_independent_draws() -> None:
    torch.manual_seed(1)
    p_V = torch.randn(60, dtype=torch.float64).mul(2).softmax(-1)
    value_V = torch.randn(60, dtype=torch.float64)
    draws_RK = sample(p_V.expand(20_000, -1), torch.rand(20_000, 8, dtype=torch.float64))
    weights_RK = (draws_RK.long() & MAX_DRAWS).double() / 8
    sums_R = (weights_RK * value_V[draws_RK.long() >> COUNT_BITS]).sum(-1)
    mean = (p_V * value_V).sum()
    independent = (p_V * (value_V - mean) ** 2).sum() / 8
    assert float(sums_R.var()) < float(independent)
    assert float((sums_R.mean() - mean).abs()) < 5 * float((independent / 20_000).sqrt())


def test_a_certain_teacher_and_ids_without_mass() -> None:
    p_RV = torch.tensor([[0, 0, 1, 0], [0.5, 0, 0, 0.5]], dtype=torch.float64)
    u_RK = torch.tensor([[0.0, 0.5, 1 - 2**-53], [0.0, 0.3, 1 - 2**-53]], dtype=torch.float64)
    draws_RK = sample(p_RV, u_RK).tolist()
    assert draws_RK[0] == [2 * 256 + 3, 0, 0]
    assert [(draw >> COUNT_BITS, draw & MAX_DRAWS) for draw in draws_RK[1]] == [(0, 2), (3, 1), (0, 0)]


def test_each_record_and_each_seed_has_draws_of_its_own(world: World, tmp_path: Path) -> None:
    # Batches of another size draw the same: the numbers belong to the record.
    made = {
        name: make_cache(tmp_path / name, world, form_of("sampled", seed=seed, dtype="float64"), batch_tokens=tokens)
        for name, seed, tokens in (("a", 5, 10_000), ("b", 5, 1), ("c", 6, 10_000))
    }
    assert made["a"].manifest == made["b"].manifest
    files = {name: shards(tmp_path / name)["shard-00000.safetensors"] for name in made}
    assert files["a"] == files["b"] != files["c"]
    readings = made["a"].shards[0].readings[:2]
    first, second = (made["a"]._uniform(reading) for reading in readings)
    assert not torch.equal(first[:3], second[:3])


def test_no_more_logits_than_a_chunk(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    linear = F.linear
    shared = OnlineTeacher(world.teacher, Tokenizer(world.student)).shared_vocab_size

    def counting(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if len(weight) == shared:
            seen.append(x.shape.numel() // x.shape[-1])
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", counting)
    writer = make_cache(tmp_path / "cache", world, form_of("topk"), chunk_rows=3)
    assert sum(seen) == writer.manifest.rows
    assert max(seen) == 3


@pytest.mark.parametrize("kind", ["hidden", "sampled", "topk"])
def test_order_packing_and_choice_of_records_are_free(
    world: World, tokenizer: Tokenizer, tmp_path: Path, kind: Kind
) -> None:
    make_cache(tmp_path / "cache", world, form_of(kind))
    cached = CachedTeacher(tmp_path / "cache", tokenizer)
    cached.load()
    records = read_records(world.train)
    found: dict[str, list[Tensor]] = {}
    for chosen, rows, width in ((records, 2, 320), (records[3:9][::-1], 3, 200), (records, 1, 500)):
        loader = PackedLoader(chosen, tokenizer, max_seq_length=width, micro_batch_size=rows)
        view = cached.read(loader)
        for batch in loader:
            side = view.batch(batch)
            targets = cached.targets(side, batch.ids_BT.numel())
            values = [value for name, value in vars(targets).items() if name not in ("rows_N", "head_VC")]
            start = 0
            for number in (i for row in batch.records for i in row):
                end = start + int((loader.documents[number].spans_T == Span.ANSWER).sum())
                own = found.setdefault(loader.records[number].id, [value[start:end] for value in values])
                assert all(torch.equal(a, value[start:end]) for a, value in zip(own, values, strict=True))
                start = end
            assert start == len(values[0])
    assert len(found) == len(records)


def test_a_batch_without_dialogues_has_targets_without_rows(world: World, tokenizer: Tokenizer, tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", world, form_of("hidden"))
    cached = CachedTeacher(tmp_path / "cache", tokenizer)
    loader = make_loader(world.train, tokenizer, rank=1, world_size=2, max_seq_length=2000, micro_batch_size=8)
    side = cached.read(loader).batch(next(iter(loader)))
    with pytest.raises(RuntimeError, match="not loaded"):
        cached.targets(side, 16)
    cached.load()
    targets = cached.targets(side, 16)
    assert isinstance(targets, Teacher)
    assert targets.hidden_MC.shape == (0, 48)
    assert targets.rows_N.tolist() == [-1] * 16


def test_thoughts_are_never_in_it(world: World, tokenizer: Tokenizer, tmp_path: Path) -> None:
    made = {}
    for view in ("strip", "native"):
        for name, thought in (("a", "yellow"), ("b", "धान में झोंका रोग है, क्या करें? " * 3)):
            path = tmp_path / f"{name}.jsonl"
            write_dialogues(path, 6, prefix="x", thought=thought)
            made[view, name] = make_cache(tmp_path / view / name, world, form_of("hidden"), data=path, view=view)
            answers = sum(int((d.spans_T == Span.ANSWER).sum()) for d in make_loader(path, tokenizer).documents)
            assert made[view, name].manifest.rows == answers
    # A teacher that does not read them gives the same files whatever they say; one that does, does not.
    assert shards(tmp_path / "strip" / "a") == shards(tmp_path / "strip" / "b")
    assert shards(tmp_path / "native" / "a") != shards(tmp_path / "native" / "b")


def test_it_reads_the_head_and_no_other_weight(
    world: World, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache(tmp_path / "cache", world, form_of("hidden"))
    read: list[str] = []

    def reading(_: LitReader, name: str) -> Tensor:
        read.append(name)
        return torch.zeros(448, 48)

    monkeypatch.setattr(LitReader, "read", reading)
    monkeypatch.setattr("litgpt.teacher.load_model", None)
    CachedTeacher(tmp_path / "cache", tokenizer).load()
    assert read == ["lm_head.weight"]


# Kills, processes


KILLER = """
import os, pathlib, signal, sys
what, at = sys.argv.pop(1), int(sys.argv.pop(1))
calls = 0
def dies(real):
    def wrapper(*arguments, **keywords):
        global calls
        if "shard-" in str(arguments[0]):
            calls += 1
            if calls == at:
                if what == "write_bytes":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)
    return wrapper
owner = pathlib.Path if what == "write_bytes" else os
setattr(owner, what, dies(getattr(owner, what)))
from litgpt.utils import run_cli
from scripts.cache_teacher import cache_teacher
run_cli(cache_teacher)
"""


def command_line(world: World, out_dir: Path, *more: str) -> list[str]:
    return [
        *("--teacher", str(world.teacher), "--student", str(world.student), "--data", f"[{world.train},{world.val}]"),
        *("--out_dir", str(out_dir), "--shard_records", "2", "--device", "cpu", *more),
    ]


def environment(**values: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | values


def whole_cache(world: World, out_dir: Path, **settings: Any) -> dict[str, bytes]:
    cache_teacher(
        teacher=world.teacher,
        student=world.student,
        data=[world.train, world.val],
        out_dir=out_dir,
        shard_records=2,
        device="cpu",
        **settings,
    )
    return shards(out_dir)


def test_killed_in_the_middle_of_a_write_it_goes_on_and_ends_the_same(world: World, tmp_path: Path) -> None:
    expected = whole_cache(world, tmp_path / "expected")
    assert len(expected) > 6
    out_dir = tmp_path / "killed"
    grown = 0
    for what, at in (("write_bytes", "1"), ("replace", "2"), ("write_bytes", "3")):
        command = [sys.executable, "-c", KILLER, what, at, *command_line(world, out_dir)]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert list(out_dir.glob(".shard-*.tmp"))  # it was killed while writing
        there = shards(out_dir)
        assert there.items() <= expected.items()
        assert len(there) - 1 == grown + int(at) - 1  # what is whole stays, and is not written again
        grown = len(there) - 1
        with pytest.raises(UserError, match=rf"holds {grown} of its {len(expected) - 1} shards: finish it"):
            open_teacher(out_dir, Tokenizer(world.student))
    assert whole_cache(world, out_dir) == expected
    assert not list(out_dir.glob(".*.tmp"))


def test_two_processes_write_the_files_of_one(world: World, tmp_path: Path) -> None:
    expected = whole_cache(world, tmp_path / "one")
    command = [sys.executable, str(ROOT / "scripts" / "cache_teacher.py"), *command_line(world, tmp_path / "two")]
    processes = [
        subprocess.Popen(
            command,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert shards(tmp_path / "two") == expected
    written = [int(out.split(" wrote ")[1].split()[0]) for out, _ in said]
    assert sum(written) == len(expected) - 1
    assert abs(written[0] - written[1]) <= 1
    assert "process 1 of 2" in said[1][0]


def test_a_finished_cache_is_left_as_it_is(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = whole_cache(world, tmp_path / "cache")
    monkeypatch.setattr("litgpt.cachewriter.load_model", None)  # not needed any more
    # Files in another order hold the same records.
    cache_teacher(
        teacher=world.teacher,
        student=world.student,
        data=[world.val, world.train],
        out_dir=tmp_path / "cache",
        shard_records=2,
        device="cpu",
    )
    assert shards(tmp_path / "cache") == expected


def test_the_size_is_told_before_and_is_right(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache_teacher(
        teacher=world.teacher, student=world.student, data=[world.train], out_dir=tmp_path / "cache", kind="topk", k=100
    )
    before, after = capsys.readouterr().out.splitlines()
    rows = sum(
        int((d.spans_T == Span.ANSWER).sum()) for d in make_loader(world.train, Tokenizer(world.student)).documents
    )
    assert (
        f"12 records, {rows} answer tokens, topk of 800 bytes each: {(rows * 800 + 12 * 40 + 1032) / 1000:.1f} kB"
        in before
    )
    writer = make_cache(tmp_path / "other", world, form_of("hidden"), shard_records=4)
    for number, shard in enumerate(writer.shards):
        size = (tmp_path / "other" / f"shard-{number:05d}.safetensors").stat().st_size
        assert shard.nbytes - 1024 <= size <= shard.nbytes
    assert "1 of 1 are there" in after


def test_a_cache_that_does_not_fit_is_refused_before_anything_is_written(
    world: World, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CacheWriter(
        tmp_path / "cache",
        world.teacher,
        tokenizer,
        [make_loader(world.train, tokenizer)],
        view="strip",
        form=form_of("hidden"),
    )
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=writer.nbytes - 1))
    with pytest.raises(UserError, match=r"needs .* GB of disk"):
        writer.write(device=CPU)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=writer.nbytes))
    assert writer.write(device=CPU) == 1
    # Only what is missing must fit.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    assert writer.write(device=CPU) == 0


def test_a_disk_that_fills_up_on_the_way_costs_no_whole_shard(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole_cache(world, tmp_path / "expected")
    write_bytes = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if "shard-00002" in path.name:
            write_bytes(path, content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"no room left on the disk while writing .*shard-00002"):
        whole_cache(world, tmp_path / "full")
    assert shards(tmp_path / "full") == {name: expected[name] for name in sorted(expected)[:2]} | {
        CACHE_FILE: expected[CACHE_FILE]
    }
    assert not list((tmp_path / "full").glob(".*.tmp"))
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    assert whole_cache(world, tmp_path / "full") == expected


# Stale, broken, wrong


def edit_yaml(path: Path, **values: Any) -> None:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values), encoding="utf-8")


def change_weights(teacher: Path) -> None:
    state = torch.load(teacher / "lit_model.pth", weights_only=True)
    state["transformer.ln_f.weight"][0] += 2**-10
    torch.save(state, teacher / "lit_model.pth")


def change_config(teacher: Path) -> None:
    edit_yaml(teacher / "model_config.yaml", norm_eps=1e-5)


def change_tokenizer(teacher: Path) -> None:
    with (teacher / "tokenizer.json").open("a", encoding="utf-8") as file:
        file.write("\n")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_weights, "teacher weights"),
        (change_config, "teacher config"),
        (change_tokenizer, "teacher tokenizer"),
    ],
)
def test_another_teacher_is_refused_and_said_in_what(
    world: World, tokenizer: Tokenizer, tmp_path: Path, change: Callable[[Path], None], named: str
) -> None:
    teacher = shutil.copytree(world.teacher, tmp_path / "teacher")
    changed = World(world.base, teacher, world.student, world.train, world.val)
    make_cache(tmp_path / "cache", changed, form_of("sampled"))
    CachedTeacher(tmp_path / "cache", tokenizer)
    change(teacher)
    with pytest.raises(UserError, match=f"is stale, it was cached with another {named} "):
        CachedTeacher(tmp_path / "cache", tokenizer)
    with pytest.raises(UserError, match=f"holds a cache with another {named}: choose"):
        make_cache(tmp_path / "cache", changed, form_of("sampled"))


def test_another_student_rendering_or_view_is_refused(
    world: World, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache(tmp_path / "cache", world, form_of("sampled"))
    with pytest.raises(UserError, match="cached with another student tokenizer "):
        CachedTeacher(tmp_path / "cache", Tokenizer(world.base))
    with pytest.raises(UserError, match=r"cached with another view \(strip, now native\)"):
        CachedTeacher(tmp_path / "cache", tokenizer, view="native")

    def with_one_more(*arguments: Any, **keywords: Any) -> Rendered:
        rendered = render(*arguments, **keywords)
        rendered.add([1], Span.PROMPT)
        return rendered

    monkeypatch.setattr("litgpt.teachercache.render", with_one_more)
    with pytest.raises(UserError, match="cached with another rendering "):
        CachedTeacher(tmp_path / "cache", tokenizer)


def test_a_changed_or_a_new_record_is_named(world: World, tokenizer: Tokenizer, tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", world, form_of("sampled"))
    cached = CachedTeacher(tmp_path / "cache", tokenizer)
    lines = world.train.read_text(encoding="utf-8").splitlines()
    record = json.loads(lines[4])
    record["messages"][-1]["content"] += " ठीक है।"
    lines[4] = json.dumps(record, ensure_ascii=False)
    (tmp_path / "changed.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match="holds no targets of the record 'train-4': it was not"):
        cached.read(make_loader(tmp_path / "changed.jsonl", tokenizer))
    write_dialogues(tmp_path / "more.jsonl", 14, prefix="train")
    with pytest.raises(UserError, match="holds no targets of the record 'train-12' and 1 more of 14"):
        cached.read(make_loader(tmp_path / "more.jsonl", tokenizer))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"kind": "topk"}, "kind of the targets"),
        ({"k": 13}, "k of the targets"),
        ({"seed": 6}, "seed of the targets"),
        ({"dtype": "float64"}, "dtype of the targets"),
    ],
)
def test_a_cache_is_not_gone_on_with_in_another_form(
    world: World, tmp_path: Path, other: dict[str, Any], named: str
) -> None:
    make_cache(tmp_path / "cache", world, form_of("sampled"))
    before = shards(tmp_path / "cache")
    with pytest.raises(UserError, match=f"holds a cache with another {named}"):
        make_cache(tmp_path / "cache", world, form_of(**({"kind": "sampled"} | other)))
    assert shards(tmp_path / "cache") == before


def test_a_cache_is_not_gone_on_with_for_other_records_or_shards(world: World, tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", world, form_of("sampled"))
    with pytest.raises(UserError, match="holds a cache with another set of records and another size of shards"):
        make_cache(tmp_path / "cache", world, form_of("sampled"), data=world.val)
    with pytest.raises(UserError, match="holds a cache with another size of shards"):
        make_cache(tmp_path / "cache", world, form_of("sampled"), shard_records=3)


def test_weights_are_hashed_again_only_when_the_file_was_touched(
    world: World, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = shutil.copytree(world.teacher, tmp_path / "teacher")
    make_cache(tmp_path / "cache", World(world.base, teacher, world.student, world.train, world.val), form_of("topk"))
    hashed: list[str] = []

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr("litgpt.teachercache.sha256_file", counting)
    CachedTeacher(tmp_path / "cache", tokenizer)
    assert "lit_model.pth" not in hashed
    os.utime(teacher / "lit_model.pth", (1, 1))
    CachedTeacher(tmp_path / "cache", tokenizer)
    assert hashed.count("lit_model.pth") == 1
    CachedTeacher(tmp_path / "cache", tokenizer)
    assert hashed.count("lit_model.pth") == 1
    (tmp_path / "cache" / HASHES_FILE).write_text("{")  # a memory that cannot be read is no memory
    CachedTeacher(tmp_path / "cache", tokenizer)
    assert hashed.count("lit_model.pth") == 2


@pytest.mark.parametrize("kind", ["sampled", "topk", "hidden"])
def test_without_the_teacher_only_hidden_lacks_something(
    world: World, tokenizer: Tokenizer, tmp_path: Path, kind: Kind
) -> None:
    teacher = shutil.copytree(world.teacher, tmp_path / "teacher")
    make_cache(tmp_path / "cache", World(world.base, teacher, world.student, world.train, world.val), form_of(kind))
    teacher.rename(tmp_path / "moved")
    cached = CachedTeacher(tmp_path / "cache", tokenizer)
    loader = make_loader(world.train, tokenizer)
    view = cached.read(loader)
    if kind == "hidden":
        with pytest.raises(UserError, match=r"is not there, the teacher whose head .* correct the line teacher:"):
            cached.load()
        edit_yaml(tmp_path / "cache" / CACHE_FILE, teacher=str(tmp_path / "moved"))
        cached = CachedTeacher(tmp_path / "cache", tokenizer)
        view = cached.read(loader)
    cached.load()
    batch = next(iter(loader))
    cached.targets(view.batch(batch), batch.ids_BT.numel())


def test_broken_foreign_and_missing_files_are_one_clear_line(
    world: World, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    make_cache(tmp_path / "cache", world, form_of("topk"))
    make_cache(tmp_path / "other", world, form_of("topk", k=13))
    loader = make_loader(world.train, tokenizer)
    shard = tmp_path / "cache" / "shard-00001.safetensors"
    whole = shard.read_bytes()

    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"shard-00001.safetensors is cut short or broken"):
        CachedTeacher(tmp_path / "cache", tokenizer).read(loader)
    make_cache(tmp_path / "cache", world, form_of("topk"))  # the same command writes what is not whole
    assert shard.read_bytes() == whole

    shutil.copyfile(tmp_path / "other" / shard.name, shard)
    with pytest.raises(UserError, match=r"shard-00001.safetensors belongs to another cache"):
        CachedTeacher(tmp_path / "cache", tokenizer).read(loader)
    shard.unlink()
    with pytest.raises(UserError, match="holds 2 of its 3 shards"):
        CachedTeacher(tmp_path / "cache", tokenizer)

    for content, why in (("format: 2\n", "has format 2"), ("- 1\n", "is not what"), ("format: 1\n", "is not what")):
        (tmp_path / "cache" / CACHE_FILE).write_text(content)
        with pytest.raises(UserError, match=why):
            open_teacher(tmp_path / "cache", tokenizer)
    with pytest.raises(UserError, match=f"holds no {CACHE_FILE}"):
        CachedTeacher(world.student, tokenizer)
    with pytest.raises(UserError, match="does not exist"):
        open_teacher(tmp_path / "nowhere", tokenizer)
    with pytest.raises(UserError, match="holds other files"):
        make_cache(world.student, world, form_of("topk"))


def test_one_call_opens_either_kind_of_teacher(world: World, tokenizer: Tokenizer, tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", world, form_of("topk"))
    assert isinstance(open_teacher(world.teacher, tokenizer), OnlineTeacher)
    cached = open_teacher(tmp_path / "cache", tokenizer)
    assert isinstance(cached, CachedTeacher)
    online = OnlineTeacher(world.teacher, tokenizer)
    assert (cached.view, cached.config, cached.shared_vocab_size) == (
        online.view,
        online.config,
        online.shared_vocab_size,
    )


@pytest.mark.parametrize(("kind", "k"), [("sampled", 256), ("sampled", 0), ("topk", 500)])
def test_a_k_that_cannot_be_kept_is_refused(world: World, tmp_path: Path, kind: Kind, k: int) -> None:
    with pytest.raises(UserError, match=f"k is {k}: {kind} keeps 1 ... "):
        make_cache(tmp_path / "cache", world, form_of(kind, k=k))
    assert not (tmp_path / "cache").exists()


def test_a_dialogue_too_long_for_the_teacher_is_named(world: World, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_dialogues(tmp_path / "long.jsonl", 2, prefix="x", thought="yellow leaves " * 400)
    loader = make_loader(tmp_path / "long.jsonl", tokenizer, max_seq_length=5000)
    with pytest.raises(UserError, match=r"record 'x-1' has .* reads at most 512"):
        CacheWriter(tmp_path / "cache", world.teacher, tokenizer, [loader], view="native", form=form_of("topk"))
