"""Centred kernel alignment (CKA): how alike two networks see the same tokens.

Linear CKA in its biased (Kornblith et al. 2019) and unbiased (HSIC₁, Song et al. 2007) form, for one batch and
differentiable, or exact over a whole data set in one pass. Everything runs in at least fp32 outside autocast and
centres before it multiplies: in bf16, or with an uncentred Gram matrix, the digits that matter are gone.

Rows are tokens. Which tokens are in is part of the measure: a single attention-sink row (huge norm, usually the
first position) makes any two networks look alike, so `select_rows` drops position 0 of every document.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NamedTuple

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
    about a fixed shift, so that a large common offset does not eat the digits.

    Args:
        shifts: for x [D] and y [C]; by default the means of the first batch. Processes whose moments are to be added
            up need the same.
    """

    n: int = 0
    shifts: tuple[Tensor, Tensor] | None = None
    _moments: dict[str, Tensor] = field(default_factory=dict)

    def update(self, x_ND: Tensor, y_NC: Tensor) -> None:
        """Add rows: x_ND of the first network, y_NC of the second, same tokens."""
        if len(x_ND) != len(y_NC):
            raise ValueError(f"CKA compares the same tokens: got {len(x_ND)} and {len(y_NC)} rows")
        if len(x_ND) == 0 and self.shifts is None:
            return
        x_ND, y_NC = x_ND.detach().double(), y_NC.detach().double()
        if not self._moments:
            x_shift, y_shift = self.shifts or (x_ND.mean(0), y_NC.mean(0))
            self._moments = {"x_shift": x_shift, "y_shift": y_shift}
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

    def reduce(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Add up the moments of all processes; each then has those of all rows. They need the same `shifts`.

        Args:
            sum_over_ranks: an all-reduce of one fp64 tensor; called once, with about D² + C² + D·C numbers.
        """
        names = [name for name in self._moments if not name.endswith("shift")]
        flat = torch.cat([self._moments[name].flatten() for name in names])
        summed = sum_over_ranks(torch.cat((flat, flat.new_tensor([self.n]))))
        self.n = int(summed[-1])
        pieces = summed[:-1].split([self._moments[name].numel() for name in names])
        for name, piece in zip(names, pieces, strict=True):
            self._moments[name] = piece.view_as(self._moments[name])

    def result(self, *, unbiased: bool = True) -> float:
        """CKA of all rows so far.

        Raises:
            ValueError: fewer than 4 rows.
        """
        central = self._central()
        if not unbiased:
            return float(central.sxy.pow(2).sum() / (central.sxx.pow(2).sum() * central.syy.pow(2).sum()).sqrt())
        xy, xx, yy = self._hsics(central)
        return float(xy / (xx * yy).sqrt())

    def gradient(self, x_ND: Tensor, y_NC: Tensor) -> Tensor:
        """What the unbiased CKA of all rows so far changes by, with each of these rows of x (some of those seen).

        With centred rows x and y, k = |x|², l = |y|², and HSIC₁ as in `hsic1_from_moments`,

            ∂HSIC₁(X, Y) / ∂x = 2 Sxy y - 2 n / (n - 2) · l x + 2 Σl / ((n - 1)(n - 2)) · x
            ∂HSIC₁(X, X) / ∂x = 4 Sxx x - 4 n / (n - 2) · k x + 4 Σk / ((n - 1)(n - 2)) · x

        each less its mean over all n rows, because every row moves the mean. Costs 2 N D (D + C) multiplications.

        Returns:
            ∂CKA / ∂x, fp64 [N, D].
        """
        c, m, n = self._central(), self._moments, self.n
        xy, xx, yy = self._hsics(c)
        x_ND = x_ND.detach().double() - m["x_shift"] - c.mx
        y_NC = y_NC.detach().double() - m["y_shift"] - c.my
        k_N1, l_N1 = (x_ND * x_ND).sum(1, keepdim=True), (y_NC * y_NC).sum(1, keepdim=True)
        k_sum, l_sum = c.sxx.trace(), c.syy.trace()
        # Σ k x and Σ l x of centred rows, from the moments about the shift.
        kx = m["px"] - 2 * m["xx"] @ c.mx + (c.mx @ c.mx) * m["x"] - k_sum * c.mx
        lx = m["qx"] - 2 * m["xy"] @ c.my + (c.my @ c.my) * m["x"] - l_sum * c.mx
        diagonal, total = n / (n - 2), 1 / ((n - 1) * (n - 2))
        of_xy = 2 * (y_NC @ c.sxy.T - diagonal * (l_N1 * x_ND - lx / n) + total * l_sum * x_ND)
        of_xx = 4 * (x_ND @ c.sxx - diagonal * (k_N1 * x_ND - kx / n) + total * k_sum * x_ND)
        gradient_ND: Tensor = (of_xy - xy / (2 * xx) * of_xx) / (xx * yy).sqrt()
        return gradient_ND

    def _central(self) -> _Central:
        if self.n < MINIMUM_ROWS:
            raise ValueError(f"CKA needs at least {MINIMUM_ROWS} rows, got {self.n}")
        m, n = self._moments, self.n
        mx, my = m["x"] / n, m["y"] / n
        return _Central(
            mx,
            my,
            sxx=m["xx"] - n * torch.outer(mx, mx),
            syy=m["yy"] - n * torch.outer(my, my),
            sxy=m["xy"] - n * torch.outer(mx, my),
        )

    def _hsics(self, central: _Central) -> tuple[Tensor, Tensor, Tensor]:
        """HSIC₁ times N (N - 3) of x with y, x with x, y with y."""
        m, n = self._moments, self.n
        mx, my, sxx, syy, sxy = central
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
        return (
            hsic1_from_moments(sxy.pow(2).sum(), kl, k, l_, n),
            hsic1_from_moments(sxx.pow(2).sum(), kk, k, k, n),
            hsic1_from_moments(syy.pow(2).sum(), ll, l_, l_, n),
        )


class _Central(NamedTuple):
    """Means (about the shift) and central second moments, not divided by n."""

    mx: Tensor
    my: Tensor
    sxx: Tensor
    syy: Tensor
    sxy: Tensor


def cka_share(states_BTD: Tensor, reference_BTC: Tensor, keep_BT: Tensor, step: StreamingCKA, value: float) -> Tensor:
    """One micro-batch's share of 1 - CKA over a whole optimizer step, with the exact gradient.

    CKA is a ratio of sums over all pairs of rows, so no micro-batch can compute its part alone. But its gradient at a
    row follows from the row and from the step's moments, which a pass without gradient has collected before. The
    shares of all micro-batches add up to 1 - CKA, their gradients to its gradient.

    Args:
        states_BTD: the student's hidden states of this micro-batch, differentiable.
        reference_BTC: the reference's, same tokens.
        keep_BT: which tokens are rows.
        step: has seen exactly these rows and those of the step's other micro-batches.
        value: `step.result()`.

    Returns:
        a scalar in fp64: this micro-batch's part of the rows times 1 - value. Beside a forward pass of both networks
        that `step` cost, this costs 2 N D (D + C) multiplications in fp64 and the memory of D² + C² + D·C numbers.
    """
    x_ND = states_BTD[keep_BT]
    gradient_ND = step.gradient(x_ND, reference_BTC[keep_BT])
    moving = (x_ND.double() * gradient_ND).sum()
    return len(x_ND) / step.n * (1 - value) - (moving - moving.detach())
