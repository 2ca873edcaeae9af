"""Centred kernel alignment (CKA): how alike two networks see the same tokens.

Linear CKA in its biased (Kornblith et al. 2019) and unbiased (HSIC₁, Song et al. 2007) form, for one batch and
differentiable, or exact over a whole data set in one pass. Everything runs in at least fp32 outside autocast and
centres before it multiplies: in bf16, or with an uncentred Gram matrix, the digits that matter are gone.

Rows are tokens. Which tokens are in is part of the measure: a single attention-sink row (huge norm, usually the
first position) makes any two networks look alike, so `select_rows` drops position 0 of every document.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

MINIMUM_ROWS = 4  # the unbiased estimator divides by N (N - 3)


def linear_cka(x_ND: Tensor, y_NC: Tensor, *, unbiased: bool = True) -> Tensor:
    """Linear CKA between two sets of representations of the same N tokens.

    Args:
        x_ND: features of the first network, any float dtype; rows are tokens.
        y_NC: features of the second, same N; C may differ from D.
        unbiased: use the HSIC₁ estimator, which may be slightly negative on unrelated data and is never clamped.

    Returns:
        a scalar fp32 tensor (fp64 for fp64 input), differentiable in both inputs, 1 for equal geometry.

    Raises:
        ValueError: fewer than 4 rows, or row counts that differ.

    Source: Kornblith et al. 2019 (arXiv 1905.00414), eq. 2; Song et al. 2007 and Nguyen et al. 2020
        (arXiv 2010.15327), eq. 3, for the unbiased estimator.
    """
    _check_rows(x_ND, y_NC)
    with torch.autocast(x_ND.device.type, enabled=False):
        x_ND, y_NC = _centred(x_ND), _centred(y_NC)
        # N² (D + C) multiplications for Gram matrices, N (D² + C² + D C) for the features' own products.
        n, d, c = len(x_ND), x_ND.shape[1], y_NC.shape[1]
        products = _gram_products if n * (d + c) < d * d + c * c + d * c else _feature_products
        xy, xx, yy = products(x_ND, y_NC)
        x_norms_N, y_norms_N = (x_ND * x_ND).sum(1), (y_NC * y_NC).sum(1)
        if unbiased:
            xy = _hsic1(xy, x_norms_N, y_norms_N)
            xx = _hsic1(xx, x_norms_N, x_norms_N)
            yy = _hsic1(yy, y_norms_N, y_norms_N)
        return xy / (xx * yy).sqrt()


def _check_rows(x_ND: Tensor, y_NC: Tensor) -> None:
    if len(x_ND) != len(y_NC):
        raise ValueError(f"CKA compares the same tokens: got {len(x_ND)} and {len(y_NC)} rows")
    if len(x_ND) < MINIMUM_ROWS:
        raise ValueError(f"CKA needs at least {MINIMUM_ROWS} rows, got {len(x_ND)}")


def _centred(x_ND: Tensor) -> Tensor:
    x_ND = x_ND if x_ND.dtype == torch.float64 else x_ND.float()
    x_ND = x_ND - x_ND.mean(0)
    # CKA does not change with scale; fourth powers of large activations would leave the range of fp32.
    return x_ND / x_ND.detach().pow(2).mean().sqrt().clamp_min(torch.finfo(x_ND.dtype).tiny)


def _gram_products(x_ND: Tensor, y_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """⟨K, L⟩, ⟨K, K⟩, ⟨L, L⟩ of the centred Gram matrices K = X Xᵀ and L = Y Yᵀ."""
    k_NN, l_NN = x_ND @ x_ND.T, y_NC @ y_NC.T
    return (k_NN * l_NN).sum(), (k_NN * k_NN).sum(), (l_NN * l_NN).sum()


def _feature_products(x_ND: Tensor, y_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same three numbers as ‖Xᵀ Y‖², ‖Xᵀ X‖², ‖Yᵀ Y‖²."""
    return (x_ND.T @ y_NC).pow(2).sum(), (x_ND.T @ x_ND).pow(2).sum(), (y_NC.T @ y_NC).pow(2).sum()


def _hsic1(product: Tensor, k_N: Tensor, l_N: Tensor) -> Tensor:
    """HSIC₁ up to the factor 1 / N (N - 3), which cancels in CKA.

    With centred features the rows of K sum to 0, so of Song's K̃ (K without its diagonal) only the diagonal counts:
    tr(K̃ L̃) = ⟨K, L⟩ - k·l, K̃ 1 = -k, and 1ᵀ K̃ 1 = -Σ k.

    Args:
        product: ⟨K, L⟩ with diagonals, scalar.
        k_N: diagonal of K, the squared norms of the centred rows.
        l_N: diagonal of L.
    """
    return hsic1_from_moments(product, (k_N * l_N).sum(), k_N.sum(), l_N.sum(), len(k_N))


def hsic1_from_moments(product: Tensor, diagonal_product: Tensor, k_sum: Tensor, l_sum: Tensor, n: int) -> Tensor:
    """HSIC₁ (times N (N - 3)) from ⟨K, L⟩, Σ kᵢ lᵢ, Σ kᵢ, Σ lᵢ of centred Gram matrices with diagonals k and l."""
    return product - diagonal_product + k_sum * l_sum / ((n - 1) * (n - 2)) - 2 * diagonal_product / (n - 2)


def select_rows(
    spans_BT: Tensor, documents_BT: Tensor, *, keep_spans: Collection[int], drop_first: bool = True
) -> Tensor:
    """Which tokens of a packed batch are rows of the comparison.

    Args:
        spans_BT: span label of each token (`litgpt.chat.Span`).
        documents_BT: document number of each token; a change along T starts a new document.
        keep_spans: the labels to keep; padding is kept only if its label is named, so leave it out.
        drop_first: leave out position 0 of each document, the attention sink.

    Returns:
        a boolean mask [B, T].
    """
    keep_BT = torch.isin(spans_BT.long(), torch.tensor(sorted(keep_spans), device=spans_BT.device))
    if drop_first:
        first_BT = torch.ones_like(keep_BT)
        first_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
        keep_BT = keep_BT & ~first_BT
    return keep_BT


@dataclass
class StreamingCKA:
    """Exact linear CKA of a whole data set in one pass, biased or unbiased, in memory O((D + C)²).

    Feed batches of rows in any order; the result equals `linear_cka` of all rows at once. Moments are kept in fp64
    about a fixed shift (the mean of the first batch), so that a large common offset does not eat the digits.
    """

    n: int = 0
    _moments: dict[str, Tensor] = field(default_factory=dict)

    def update(self, x_ND: Tensor, y_NC: Tensor) -> None:
        """Add rows: x_ND of the first network, y_NC of the second, same tokens."""
        if len(x_ND) != len(y_NC):
            raise ValueError(f"CKA compares the same tokens: got {len(x_ND)} and {len(y_NC)} rows")
        if len(x_ND) == 0:
            return
        x_ND, y_NC = x_ND.detach().double(), y_NC.detach().double()
        if not self._moments:
            self._moments = {"x_shift": x_ND.mean(0), "y_shift": y_NC.mean(0)}
        x_ND, y_NC = x_ND - self._moments["x_shift"], y_NC - self._moments["y_shift"]
        p_N, q_N = (x_ND * x_ND).sum(1), (y_NC * y_NC).sum(1)
        added = {
            "x": x_ND.sum(0),
            "y": y_NC.sum(0),
            "xx": x_ND.T @ x_ND,
            "yy": y_NC.T @ y_NC,
            "xy": x_ND.T @ y_NC,
            # The diagonals' products need the norms about the final mean, |x - μ|² = p - 2 x·μ + |μ|².
            "p": p_N.sum(),
            "q": q_N.sum(),
            "pp": (p_N * p_N).sum(),
            "qq": (q_N * q_N).sum(),
            "pq": (p_N * q_N).sum(),
            "px": p_N @ x_ND,
            "qx": q_N @ x_ND,
            "py": p_N @ y_NC,
            "qy": q_N @ y_NC,
        }
        for name, value in added.items():
            self._moments[name] = self._moments[name] + value if name in self._moments else value
        self.n += len(x_ND)

    def result(self, *, unbiased: bool = True) -> float:
        """CKA of all rows so far.

        Raises:
            ValueError: fewer than 4 rows.
        """
        if self.n < MINIMUM_ROWS:
            raise ValueError(f"CKA needs at least {MINIMUM_ROWS} rows, got {self.n}")
        m, n = self._moments, self.n
        mx, my = m["x"] / n, m["y"] / n
        sxx = m["xx"] - n * torch.outer(mx, mx)
        syy = m["yy"] - n * torch.outer(my, my)
        sxy = m["xy"] - n * torch.outer(mx, my)
        xy, xx, yy = sxy.pow(2).sum(), sxx.pow(2).sum(), syy.pow(2).sum()
        if unbiased:
            k, l_ = sxx.trace(), syy.trace()
            a, b = mx @ mx, my @ my
            # Σ (p - 2 x·μx + a)(q - 2 y·μy + b), and the same with both factors of one side.
            kl = (
                m["pq"] - 2 * m["py"] @ my + b * m["p"]
                - 2 * m["qx"] @ mx + 4 * mx @ m["xy"] @ my - 2 * b * m["x"] @ mx
                + a * m["q"] - 2 * a * m["y"] @ my + n * a * b
            )  # fmt: skip
            kk = m["pp"] - 4 * m["px"] @ mx + 2 * a * m["p"] + 4 * mx @ m["xx"] @ mx - 4 * a * m["x"] @ mx + n * a * a
            ll = m["qq"] - 4 * m["qy"] @ my + 2 * b * m["q"] + 4 * my @ m["yy"] @ my - 4 * b * m["y"] @ my + n * b * b
            xy = hsic1_from_moments(xy, kl, k, l_, n)
            xx = hsic1_from_moments(xx, kk, k, k, n)
            yy = hsic1_from_moments(yy, ll, l_, l_, n)
        return float(xy / (xx * yy).sqrt())
