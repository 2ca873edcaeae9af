"""CKA against published values, its invariances, and the ways in which it goes wrong."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from litgpt.cka import MinibatchCKA, StreamingCKA, linear_cka, ordinary_rows, rbf_cka, select_rows
from litgpt.ckasample import layer_map, spread


def _notebook() -> tuple[Tensor, Tensor]:
    """The data of google-research's `representation_similarity/Demo.ipynb`."""
    random = np.random.RandomState(1337)
    x = random.randn(100, 10)
    return torch.from_numpy(x), torch.from_numpy(random.randn(100, 10) + x)


@pytest.mark.parametrize(("unbiased", "published"), [(False, 0.55761), (True, 0.51346)])
def test_published_values(unbiased: bool, published: float) -> None:
    x, y = _notebook()
    assert linear_cka(x, y, unbiased=unbiased).item() == pytest.approx(published, abs=5e-6)


def _textbook(x: Tensor, y: Tensor) -> float:
    """HSIC₁ written out with N × N matrices (Song et al. 2007, eq. 5)."""
    n = len(x)
    gram_x, gram_y = x @ x.T, y @ y.T
    gram_x.fill_diagonal_(0)
    gram_y.fill_diagonal_(0)
    one = torch.ones(n, dtype=x.dtype)

    def hsic(k: Tensor, m: Tensor) -> Tensor:
        return (
            (k @ m).trace() + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ m @ one
        )

    return (hsic(gram_x, gram_y) / (hsic(gram_x, gram_x) * hsic(gram_y, gram_y)).sqrt()).item()


@pytest.mark.parametrize("shape", [(100, 30, 20), (20, 300, 50), (5, 3, 3), (400, 8, 8)])
def test_feature_and_gram_form_equal_the_textbook(shape: tuple[int, int, int]) -> None:
    n, d, c = shape
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) + 3
    y = x[:, :1] * 2 + torch.randn(n, c, generator=generator, dtype=torch.float64)
    assert linear_cka(x, y).item() == pytest.approx(_textbook(x - x.mean(0), y - y.mean(0)), abs=1e-10)


@pytest.mark.parametrize("unbiased", [True, False])
def test_invariances_and_the_one_it_lacks(unbiased: bool) -> None:
    x, y = _notebook()
    generator = torch.Generator().manual_seed(1)
    value = linear_cka(x, y, unbiased=unbiased)
    rotation = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=torch.float64)).Q
    torch.testing.assert_close(linear_cka(x @ rotation, 1.337 * y + 5, unbiased=unbiased), value)
    torch.testing.assert_close(linear_cka(y, x, unbiased=unbiased), value)
    assert linear_cka(x, x, unbiased=unbiased).item() == pytest.approx(1, abs=1e-12)
    skewed = linear_cka(x @ torch.randn(10, 10, generator=generator, dtype=torch.float64), y, unbiased=unbiased)
    assert abs(skewed - value) > 0.05


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("batch", [1, 17, 100])
def test_streaming_equals_one_shot(unbiased: bool, batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 30, generator=generator, dtype=torch.float64) + 50
    y = x @ torch.randn(30, 12, generator=generator, dtype=torch.float64)
    y = y + 10 * torch.randn(100, 12, generator=generator, dtype=torch.float64)
    stream = StreamingCKA()
    for rows in torch.arange(100).split(batch):
        stream.update(x[rows], y[rows])
    stream.update(x[:0], y[:0])
    assert stream.result(unbiased=unbiased) == pytest.approx(linear_cka(x, y, unbiased=unbiased).item(), abs=1e-10)


def test_unrelated_data_read_near_zero_only_without_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 256, generator=generator), torch.randn(64, 512, generator=generator)
    assert abs(linear_cka(x, y).item()) < 0.1
    assert linear_cka(x, y, unbiased=False).item() > 0.7


def test_one_sink_row_per_sequence_fools_cka_and_dropping_it_cures() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 64, 128, generator=generator), torch.randn(8, 64, 128, generator=generator)
    x[:, 0, 3] = y[:, 0, 5] = 3000.0
    spans, documents = torch.zeros(8, 64, dtype=torch.uint8), torch.zeros(8, 64, dtype=torch.int32)
    with_sink = select_rows(spans, documents, keep_spans={0}, drop_first=False)
    without = select_rows(spans, documents, keep_spans={0})
    assert linear_cka(x[with_sink], y[with_sink]).item() > 0.99
    assert abs(linear_cka(x[without], y[without]).item()) < 0.05


def test_select_rows_drops_padding_spans_and_first_tokens_of_packed_documents() -> None:
    spans = torch.tensor([[0, 0, 1, 2, 0, 2, 3, 3]], dtype=torch.uint8)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, -1, -1]], dtype=torch.int32)
    assert select_rows(spans, documents, keep_spans={0, 2}).tolist() == [
        [False, True, False, True, False, True, False, False]
    ]
    assert select_rows(spans, documents, keep_spans={0, 2}, drop_first=False).sum() == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_input_is_computed_in_fp32(dtype: torch.dtype) -> None:
    x, y = _notebook()
    x, y = (1000 * x + 3000).to(dtype), y.to(dtype)
    expected = linear_cka(x.double(), y.double()).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = linear_cka(x, y)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("unbiased", [True, False])
def test_gradients(unbiased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (6, 40):
        x = torch.randn(n, 5, generator=generator, dtype=torch.float64, requires_grad=True)
        y = torch.randn(n, 7, generator=generator, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda a, b: linear_cka(a, b, unbiased=unbiased), (x, y))


def test_inputs_of_two_dtypes_meet_in_the_wider() -> None:
    x, y = _notebook()
    value = linear_cka(x, y.bfloat16())
    assert value.dtype == torch.float64 and value.item() == pytest.approx(0.51346, abs=1e-3)


def test_too_few_rows_and_rows_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 rows, got 3"):
        linear_cka(torch.randn(3, 2), torch.randn(3, 2))
    with pytest.raises(ValueError, match="5 and 6 rows"):
        linear_cka(torch.randn(5, 2), torch.randn(6, 2))
    with pytest.raises(ValueError, match="at least 4 rows, got 0"):
        StreamingCKA().result()
    with pytest.raises(ValueError, match="5 and 6 rows"):
        StreamingCKA().update(torch.randn(5, 2), torch.randn(6, 2))


def test_gaussian_kernels_reproduce_the_published_value() -> None:
    x, y = _notebook()
    assert rbf_cka(x, y, bandwidth=0.5).item() == pytest.approx(0.65483, abs=5e-6)
    assert rbf_cka(x, x).item() == pytest.approx(1, abs=1e-12)
    assert rbf_cka(x, y, unbiased=True) < rbf_cka(x, y)


def test_unbiased_gaussian_cka_is_the_textbook_on_grams_that_nobody_centred() -> None:
    x, y = _notebook()

    def gram(rows: Tensor) -> Tensor:
        squares = torch.cdist(rows, rows).square()
        return torch.exp(-squares / (2 * 0.25 * float(np.median(squares.numpy())))).fill_diagonal_(0)

    k, m, n, one = gram(x), gram(y), len(x), torch.ones(len(x), dtype=x.dtype)

    def hsic(k: Tensor, m: Tensor) -> Tensor:
        total = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return (k * m).sum() + total - 2 / (n - 2) * one @ k @ m @ one

    expected = hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()
    assert rbf_cka(x, y, unbiased=True).item() == pytest.approx(expected.item(), abs=1e-10)


@pytest.mark.parametrize("unbiased", [True, False])
def test_the_gradient_of_the_gaussian_kernel(unbiased: bool) -> None:
    x, y = (rows[:7, :3].clone().requires_grad_() for rows in _correlated(400))
    assert torch.autograd.gradcheck(lambda a, b: rbf_cka(a, b, unbiased=unbiased), (x, y))


def _correlated(n: int, d: int = 20, c: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) + 40
    noise = 4 * torch.randn(n, c, generator=generator, dtype=torch.float64)
    return x, x @ torch.randn(d, c, generator=generator, dtype=torch.float64) + noise - 7


def test_minibatches_average_before_the_ratio() -> None:
    x, y = _correlated(4096)
    whole = linear_cka(x, y).item()
    small, biased, ratios = MinibatchCKA(), MinibatchCKA(unbiased=False), []
    for rows in torch.arange(4096).split(8):
        small.update(x[rows], y[rows])
        biased.update(x[rows], y[rows])
        ratios.append(linear_cka(x[rows], y[rows], unbiased=False).item())
    assert small.result() == pytest.approx(whole, abs=0.02)
    assert biased.result() > whole + 0.1 and np.mean(ratios) > whole + 0.1  # what others report
    one = MinibatchCKA()
    one.update(x, y)
    assert one.result() == pytest.approx(whole, abs=1e-10)
    with pytest.raises(ValueError, match="at least 4 rows, got 0"):
        MinibatchCKA().result()


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), min_size=1, max_size=4), order=st.randoms(use_true_random=False))
def test_streams_merge_in_any_order_whatever_point_each_measures_from(cuts: list[int], order: object) -> None:
    x, y = _correlated(60, 7, 7)
    edges = [0, *sorted(cuts), 60]
    parts = []
    for start, stop in itertools.pairwise(edges):
        parts.append(StreamingCKA())
        parts[-1].update(x[start:stop], y[start:stop])  # each about the mean of its own first batch
    order.shuffle(parts)  # type: ignore[attr-defined]
    whole = StreamingCKA()
    for part in parts:
        whole.merge(part)
    assert whole.n == 60
    for unbiased in (True, False):
        assert whole.result(unbiased=unbiased) == pytest.approx(linear_cka(x, y, unbiased=unbiased).item(), abs=1e-10)
    one = StreamingCKA()
    one.update(x, y)
    assert whole.likeness() == pytest.approx(one.likeness(), abs=1e-9)
    torch.testing.assert_close(whole.gradient(x[:5], y[:5]), one.gradient(x[:5], y[:5]), atol=1e-10, rtol=1e-7)


def test_streams_of_other_widths_do_not_merge() -> None:
    a, b = StreamingCKA(), StreamingCKA()
    a.update(torch.randn(5, 3), torch.randn(5, 3))
    b.update(torch.randn(5, 3), torch.randn(5, 4))
    with pytest.raises(ValueError, match="equally wide"):
        a.merge(b)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(5, 40), d=st.integers(1, 30), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 2**16),
    shift=st.floats(-100, 100),
)  # fmt: skip
def test_cka_is_symmetric_bounded_and_blind_to_scale_and_offset(
    n: int, d: int, scale: float, seed: int, shift: float
) -> None:
    x, y = _correlated(n, d, 5, seed)
    for unbiased in (True, False):
        value = linear_cka(x, y, unbiased=unbiased).item()
        assert linear_cka(y, scale * x + shift, unbiased=unbiased).item() == pytest.approx(value, abs=1e-7, nan_ok=True)
        assert unbiased or -1e-12 <= value <= 1 + 1e-12


def test_likeness_beside_cka() -> None:
    x, _ = _correlated(300, 20)
    x = x - x.mean(0)
    generator = torch.Generator().manual_seed(3)
    rotation = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64)).Q

    def of(y: Tensor) -> tuple[float | None, float | None, float]:
        stream = StreamingCKA()
        stream.update(x, y)
        return stream.likeness()

    assert of(x) == pytest.approx((0, 1, 0), abs=1e-7)
    assert of(-2 * x) == pytest.approx((3, -1, 0), abs=1e-7)
    length, cosine, procrustes = of(x @ rotation)
    assert procrustes == pytest.approx(0, abs=1e-9) and abs(cosine or 0) < 0.3 and (length or 0) > 0.5
    y = torch.randn(300, 20, generator=generator, dtype=torch.float64)
    y = y - y.mean(0)
    singular = torch.linalg.svdvals((x / x.norm()).T @ (y / y.norm())).sum()
    assert of(y)[2] == pytest.approx(float(2 - 2 * singular), abs=1e-9)
    assert of(y[:, :5])[:2] == (None, None)


def test_outlying_rows_inside_a_document_fool_cka_and_are_dropped_however_documents_are_batched() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8 * 64, 128, generator=generator), torch.randn(8 * 64, 128, generator=generator)
    documents = torch.arange(8).repeat_interleave(64)
    x[7::64, 3] = y[7::64, 5] = 3000.0  # behind position 0
    keep = ordinary_rows([x, y], documents)
    assert torch.equal(keep, ordinary_rows([x], documents) & ordinary_rows([y], documents))
    assert keep.sum() == 8 * 63 and not keep[7::64].any()
    assert linear_cka(x, y).item() > 0.99
    assert abs(linear_cka(x[keep], y[keep]).item()) < 0.05
    assert torch.equal(
        torch.cat([ordinary_rows([x[rows], y[rows]], documents[rows]) for rows in torch.arange(512).split(64)]), keep
    )
    assert ordinary_rows([x], documents, factor=float("inf")).all()


@pytest.mark.parametrize(("rows", "slice_elements"), [(50, 1 << 25), (20, 1 << 25), (20, 1000)])
def test_the_map_is_linear_cka_of_every_pair(monkeypatch: pytest.MonkeyPatch, rows: int, slice_elements: int) -> None:
    """With 50 rows covariances are cheaper, with 20 Gram matrices, whole or in slices of 6 rows."""
    monkeypatch.setattr("litgpt.ckasample.SLICE_ELEMENTS", slice_elements)
    other = {50: "_sums_by_gram", 20: "_sums_by_covariance"}[rows]
    monkeypatch.delattr(f"litgpt.ckasample.{other}")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, 24, generator=generator, dtype=torch.float64)
    y = torch.cat((x[:, :2, :20] * 2, torch.randn(rows, 3, 20, generator=generator, dtype=torch.float64)), 1)
    found = layer_map(x, y)
    for i, j in itertools.product(range(3), range(5)):
        assert found[i, j].item() == pytest.approx(linear_cka(x[:, i], y[:, j]).item(), abs=1e-10)


def test_spread_of_equal_and_of_unrelated_networks() -> None:
    x, y = _correlated(400)
    sequences = torch.arange(40).repeat_interleave(10)
    found = spread(x, y, sequences)
    assert found.value == pytest.approx(linear_cka(x, y).item(), abs=1e-10)
    assert found.low < found.value < found.high and found.floor < 0.1 < found.low
    assert found.ceiling == pytest.approx(1, abs=1e-12)
    same = spread(x, x @ torch.eye(20, dtype=x.dtype) * 3, sequences)
    assert (same.low, same.value, same.high) == pytest.approx((1, 1, 1), abs=1e-9)
    generator = torch.Generator().manual_seed(1)
    unrelated = spread(x, torch.randn(400, 9, generator=generator), sequences)
    assert abs(unrelated.value) < 0.05 and unrelated.low < 0.05
    assert np.isnan(spread(x, y, torch.zeros(400, dtype=torch.long)).low)  # one sequence says nothing of others


def test_the_interval_covers_the_truth_and_sees_that_tokens_of_a_text_belong_together() -> None:
    """95 % intervals for data drawn again and again, against the value of a very large draw."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)

    def draw(n_sequences: int) -> tuple[Tensor, Tensor, Tensor]:
        common = torch.randn(n_sequences, 1, 6, generator=generator)
        x = (common + 0.7 * torch.randn(n_sequences, 8, 6, generator=generator)).flatten(0, 1)
        y = (x @ mixing).tanh() + 0.5 * torch.randn(len(x), 6, generator=generator)
        return x, y, torch.arange(n_sequences).repeat_interleave(8)

    truth = StreamingCKA()
    truth.update(*draw(20_000)[:2])
    expected, hits, blind = truth.result(), 0, 0
    for seed in range(100):
        x, y, sequences = draw(30)
        found = spread(x, y, sequences, seed=seed)
        hits += found.low <= expected <= found.high
        blind += (lambda s: s.low <= expected <= s.high)(spread(x, y, torch.arange(len(x)), seed=seed))
    assert 86 <= hits <= 100
    assert blind < hits
