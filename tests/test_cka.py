"""CKA against published values, its invariances, and the ways in which it goes wrong."""

import numpy as np
import pytest
import torch
from torch import Tensor

from litgpt.cka import StreamingCKA, linear_cka, select_rows


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


def test_too_few_rows_and_rows_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 rows, got 3"):
        linear_cka(torch.randn(3, 2), torch.randn(3, 2))
    with pytest.raises(ValueError, match="5 and 6 rows"):
        linear_cka(torch.randn(5, 2), torch.randn(6, 2))
    with pytest.raises(ValueError, match="at least 4 rows, got 0"):
        StreamingCKA().result()
    with pytest.raises(ValueError, match="5 and 6 rows"):
        StreamingCKA().update(torch.randn(5, 2), torch.randn(6, 2))
