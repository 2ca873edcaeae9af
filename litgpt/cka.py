"""Centred kernel alignment (CKA): how alike two networks see the same tokens.

Linear CKA in its biased (Kornblith et al. 2019) and unbiased (HSIC₁, Song et al. 2007) form, for one batch and
differentiable, or exact over a whole data set in one pass; CKA of Gaussian kernels; the mean over batches of Nguyen et
al. 2020. Everything runs in at least fp32 outside autocast and TF32 and centres before it multiplies: in bf16, or with
an uncentred Gram matrix, the digits that matter are gone. Nothing is clamped.

Rows are tokens. Which tokens are in is part of the measure: a single attention-sink row (huge norm, usually the
first position) makes any two networks look alike, so `select_rows` drops position 0 of every document and
`ordinary_rows` what is out of proportion elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
    with full_precision(x_ND.device):
        x_ND, y_NC = _in_one_dtype(centred(x_ND), centred(y_NC))
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


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Without autocast, and with fp32 products in fp32, not in TF32, whatever the training has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def centred(x_ND: Tensor) -> Tensor:
    """Rows less their mean, scaled to a mean square of 1, in fp32 (fp64 stays)."""
    x_ND = x_ND if x_ND.dtype == torch.float64 else x_ND.float()
    x_ND = x_ND - x_ND.mean(0)
    # CKA does not change with scale; fourth powers of large activations would leave the range of fp32.
    return x_ND / x_ND.detach().pow(2).mean().sqrt().clamp_min(torch.finfo(x_ND.dtype).tiny)


def _in_one_dtype(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


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


def rbf_cka(x_ND: Tensor, y_NC: Tensor, *, bandwidth: float = 0.5, unbiased: bool = False) -> Tensor:
    """CKA of Gaussian kernels exp(−d² / 2 σ²), σ² = bandwidth² · median of d² over all pairs of rows (with i = j).

    Unlike the linear one it also sees neighbourhoods; it needs N² memory.

    Args:
        x_ND, y_NC, unbiased: as of `linear_cka`.
        bandwidth: σ as a share of the median distance.

    Returns:
        a scalar fp32 tensor (fp64 for fp64 input), differentiable in both inputs, through the medians too.

    Raises:
        ValueError: fewer than 4 rows, or row counts that differ.

    Source: Kornblith et al. 2019 (arXiv 1905.00414), section 3 and Demo.ipynb beside it.
    """
    _check_rows(x_ND, y_NC)
    with full_precision(x_ND.device):
        x_ND, y_NC = _in_one_dtype(centred(x_ND), centred(y_NC))
        k_NN, l_NN = (_centred_gram(_gaussian(rows, bandwidth)) for rows in (x_ND, y_NC))
        k_N, l_N = k_NN.diagonal(), l_NN.diagonal()
        xy, xx, yy = (k_NN * l_NN).sum(), (k_NN * k_NN).sum(), (l_NN * l_NN).sum()
        if unbiased:
            xy, xx, yy = _hsic1(xy, k_N, l_N), _hsic1(xx, k_N, k_N), _hsic1(yy, l_N, l_N)
        return xy / (xx * yy).sqrt()


def _gaussian(x_ND: Tensor, bandwidth: float) -> Tensor:
    norms_N = (x_ND * x_ND).sum(1)
    squares_NN = (norms_N[:, None] + norms_N - 2 * x_ND @ x_ND.T).clamp(min=0).fill_diagonal_(0)
    values = squares_NN.flatten().sort().values  # torch.median takes the lower of the two in the middle
    median = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
    return torch.exp(-squares_NN / (2 * bandwidth**2 * median.clamp_min(torch.finfo(x_ND.dtype).tiny)))


def _centred_gram(k_NN: Tensor) -> Tensor:
    mean_N = k_NN.mean(0)
    return k_NN - mean_N - mean_N[:, None] + mean_N.mean()


class MinibatchCKA:
    """Linear CKA from batches that are too large together: the mean of HSIC over batches, before the ratio.

    With HSIC₁ the three means are unbiased at any batch size, so their ratio comes near to the whole data set's value;
    the mean of the batches' own CKA does not. `StreamingCKA` has the exact value where D² numbers fit.

    Args:
        unbiased: HSIC₁; with False the biased HSIC₀, which depends on the batch size.

    Source: Nguyen et al. 2020 (arXiv 2010.15327), eq. 2 and 3.
    """

    def __init__(self, *, unbiased: bool = True) -> None:
        self.unbiased = unbiased
        self.n_batches = 0
        self._sums = torch.zeros(3, dtype=torch.float64)

    def update(self, x_ND: Tensor, y_NC: Tensor) -> None:
        """Add a batch of at least 4 rows.

        Raises:
            ValueError: fewer rows, or row counts that differ.
        """
        _check_rows(x_ND, y_NC)
        n = len(x_ND)
        x_ND, y_NC = x_ND.detach().double(), y_NC.detach().double()
        # Not `centred`: the scale must be one for all batches.
        x_ND, y_NC = x_ND - x_ND.mean(0), y_NC - y_NC.mean(0)
        k_N, l_N = (x_ND * x_ND).sum(1), (y_NC * y_NC).sum(1)
        xy, xx, yy = _gram_products(x_ND, y_NC)
        if self.unbiased:
            xy, xx, yy = _hsic1(xy, k_N, l_N), _hsic1(xx, k_N, k_N), _hsic1(yy, l_N, l_N)
        pairs = n * (n - 3) if self.unbiased else (n - 1) ** 2
        self._sums += torch.stack((xy, xx, yy)).cpu() / pairs
        self.n_batches += 1

    def result(self) -> float:
        """CKA of the batches so far.

        Raises:
            ValueError: there was none.
        """
        if not self.n_batches:
            raise ValueError(f"CKA needs at least {MINIMUM_ROWS} rows, got 0")
        xy, xx, yy = self._sums
        return float(xy / (xx * yy).sqrt())


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


OUTLIER_FACTOR = 10.0
"""Rows of more than so many times the median norm are no ordinary tokens: massive activations are 100 times and more
(Sun et al. 2024, arXiv 2402.17762), while ordinary norms stay within a factor of 3."""


def ordinary_rows(states: Sequence[Tensor], documents_N: Tensor, *, factor: float = OUTLIER_FACTOR) -> Tensor:
    """Which rows have a norm of at most `factor` times the median of their document, in every representation.

    Sinks also form behind position 0 (on the first line break, say), and a handful of them is all that CKA then sees.
    The rule looks at one document at a time, so the answer does not depend on how documents are batched.

    Args:
        states: representations [N, D] of the same tokens, of any width each.
        documents_N: document number of each token.
        factor: infinity keeps all.

    Returns:
        a boolean mask [N].
    """
    norms_PN = torch.stack([torch.linalg.vector_norm(x_ND.detach().float(), dim=1) for x_ND in states])
    keep_N = torch.ones_like(documents_N, dtype=torch.bool)
    order_N = documents_N.argsort(stable=True)
    _, lengths = documents_N.unique(return_counts=True)
    for own in order_N.split(lengths.tolist()):
        norms_Pn = norms_PN[:, own]
        keep_N[own] = (norms_Pn <= factor * norms_Pn.median(dim=1, keepdim=True).values).all(dim=0)
    return keep_N


class Likeness(NamedTuple):
    """What else says how far two networks are apart, over the same rows as CKA, which alone is easily fooled."""

    relative_l2: float | None
    """‖X − Y‖ / ‖X‖; `None` where widths differ, as for the cosine."""
    cosine: float | None
    """Mean over rows of cos(x, y)."""
    procrustes: float
    """‖X‖² + ‖Y‖² − 2 ‖XᵀY‖⁎ of centred X, Y with norm 1: 0 for equal up to rotation and scale, 2 for orthogonal
    (Ding et al. 2021, arXiv 2108.01661). With fewer rows than features it is too small."""


@dataclass
class StreamingCKA:
    """Exact linear CKA of a whole data set in one pass, biased or unbiased, in memory O((D + C)²).

    Feed batches of rows in any order; the result equals `linear_cka` of all rows at once. Moments are kept in fp64
    about a fixed shift, so that a large common offset does not eat the digits.

    Args:
        shifts: for x [D] and y [C]; by default the means of the first batch. Processes whose moments are to be added
            up by `reduce` need the same; `merge` does not.
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
        if self.shifts is None:
            self.shifts = x_ND.mean(0), y_NC.mean(0)
        apart = {}
        if x_ND.shape == y_NC.shape:
            apart = {
                "apart": (x_ND - y_NC).square().sum(),
                "size": x_ND.square().sum(),
                "cosine": torch.cosine_similarity(x_ND, y_NC, dim=1).sum(),
            }
        x_ND, y_NC = x_ND - self.shifts[0], y_NC - self.shifts[1]
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
        self._add(added | apart, len(x_ND))

    def merge(self, other: StreamingCKA) -> None:
        """Add the rows that another has seen; batches, processes and order do not matter.

        Raises:
            ValueError: widths that differ.
        """
        if other.shifts is None:
            return
        if self.shifts is None:
            self.shifts = other.shifts
        if any(mine.shape != theirs.shape for mine, theirs in zip(self.shifts, other.shifts, strict=True)):
            raise ValueError("CKA can only be merged with that of equally wide representations")
        if other.n:
            d, e = (mine - theirs for mine, theirs in zip(self.shifts, other.shifts, strict=True))
            self._add(_moved(other._moments, other.n, d, e), other.n)

    def state(self) -> dict[str, Any]:
        """Plain values and tensors, for `restore`."""
        return {"n": self.n, "shifts": list(self.shifts or ()), "moments": dict(self._moments)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become the one whose `state` this is, on its device."""
        self.n, self._moments = state["n"], dict(state["moments"])
        self.shifts = (state["shifts"][0], state["shifts"][1]) if state["shifts"] else None

    def _add(self, moments: dict[str, Tensor], n: int) -> None:
        for name, value in moments.items():
            self._moments[name] = self._moments[name] + value if name in self._moments else value
        self.n += n

    def reduce(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Add up the moments of all processes; each then has those of all rows. They need the same `shifts`.

        Args:
            sum_over_ranks: an all-reduce of one fp64 tensor; called once, with about D² + C² + D·C numbers.
        """
        names = list(self._moments)
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
            xy, xx, yy = (central[name].pow(2).sum() for name in ("xy", "xx", "yy"))
        else:
            xy, xx, yy = self._hsics(central)
        return float(xy / (xx * yy).sqrt())

    def likeness(self) -> Likeness:
        """What else the same rows say.

        Raises:
            ValueError: fewer than 4 rows.
        """
        c = self._central()
        nuclear = torch.linalg.matrix_norm(c["xy"], "nuc")
        procrustes = max(0.0, float(2 - 2 * nuclear / (c["p"] * c["q"]).sqrt()))  # rounding
        if "apart" not in c:
            return Likeness(None, None, procrustes)
        return Likeness(float((c["apart"] / c["size"]).sqrt()), float(c["cosine"] / self.n), procrustes)

    def gradient(self, x_ND: Tensor, y_NC: Tensor) -> Tensor:
        """What the unbiased CKA of all rows so far changes by, with each of these rows of x (some of those seen).

        With centred rows x and y, k = |x|², l = |y|², and HSIC₁ as in `hsic1_from_moments`,

            ∂HSIC₁(X, Y) / ∂x = 2 Sxy y - 2 n / (n - 2) · l x + 2 Σl / ((n - 1)(n - 2)) · x
            ∂HSIC₁(X, X) / ∂x = 4 Sxx x - 4 n / (n - 2) · k x + 4 Σk / ((n - 1)(n - 2)) · x

        each less its mean over all n rows, because every row moves the mean. Costs 2 N D (D + C) multiplications.

        Returns:
            ∂CKA / ∂x, fp64 [N, D].
        """
        c, n = self._central(), self.n
        assert self.shifts is not None
        xy, xx, yy = self._hsics(c)
        x_ND = x_ND.detach().double() - self.shifts[0] - self._moments["x"] / n
        y_NC = y_NC.detach().double() - self.shifts[1] - self._moments["y"] / n
        k_N1, l_N1 = (x_ND * x_ND).sum(1, keepdim=True), (y_NC * y_NC).sum(1, keepdim=True)
        diagonal, total = n / (n - 2), 1 / ((n - 1) * (n - 2))
        of_xy = 2 * (y_NC @ c["xy"].T - diagonal * (l_N1 * x_ND - c["qx"] / n) + total * c["q"] * x_ND)
        of_xx = 4 * (x_ND @ c["xx"] - diagonal * (k_N1 * x_ND - c["px"] / n) + total * c["p"] * x_ND)
        gradient_ND: Tensor = (of_xy - xy / (2 * xx) * of_xx) / (xx * yy).sqrt()
        return gradient_ND

    def _central(self) -> dict[str, Tensor]:
        """The moments about the mean of all rows."""
        if self.n < MINIMUM_ROWS:
            raise ValueError(f"CKA needs at least {MINIMUM_ROWS} rows, got {self.n}")
        return _moved(self._moments, self.n, self._moments["x"] / self.n, self._moments["y"] / self.n)

    def _hsics(self, c: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """HSIC₁ times N (N - 3) of x with y, x with x, y with y, from central moments."""
        return (
            hsic1_from_moments(c["xy"].pow(2).sum(), c["pq"], c["p"], c["q"], self.n),
            hsic1_from_moments(c["xx"].pow(2).sum(), c["pp"], c["p"], c["p"], self.n),
            hsic1_from_moments(c["yy"].pow(2).sum(), c["qq"], c["q"], c["q"], self.n),
        )


def _moved(m: dict[str, Tensor], n: int, d: Tensor, e: Tensor) -> dict[str, Tensor]:
    """The moments of x - d and y - e, from those of x and y: of the same rows about another point."""
    a, b = d @ d, e @ e
    x, y, p, q = m["x"] - n * d, m["y"] - n * e, m["p"] - 2 * m["x"] @ d + n * a, m["q"] - 2 * m["y"] @ e + n * b
    moved = {
        "x": x,
        "y": y,
        "xx": m["xx"] - torch.outer(m["x"], d) - torch.outer(d, x),
        "yy": m["yy"] - torch.outer(m["y"], e) - torch.outer(e, y),
        "xy": m["xy"] - torch.outer(m["x"], e) - torch.outer(d, y),
        "p": p,
        "q": q,
        # (p - 2 x·d + a)(q - 2 y·e + b), and the same with both factors of one side.
        "pp": m["pp"] + 4 * d @ m["xx"] @ d + n * a * a - 4 * m["px"] @ d + 2 * a * m["p"] - 4 * a * m["x"] @ d,
        "qq": m["qq"] + 4 * e @ m["yy"] @ e + n * b * b - 4 * m["qy"] @ e + 2 * b * m["q"] - 4 * b * m["y"] @ e,
        "pq": m["pq"] - 2 * m["py"] @ e + b * m["p"] - 2 * m["qx"] @ d + 4 * d @ m["xy"] @ e - 2 * b * m["x"] @ d
        + a * m["q"] - 2 * a * m["y"] @ e + n * a * b,
        "px": m["px"] - 2 * m["xx"] @ d + a * m["x"] - p * d,
        "qx": m["qx"] - 2 * m["xy"] @ e + b * m["x"] - q * d,
        "py": m["py"] - 2 * d @ m["xy"] + a * m["y"] - p * e,
        "qy": m["qy"] - 2 * m["yy"] @ e + b * m["y"] - q * e,
    }  # fmt: skip
    return moved | {name: m[name] for name in ("apart", "size", "cosine") if name in m}


def corresponding(depth_a: int, depth_b: int) -> list[tuple[int, int]]:
    """Layers of networks of different depth: each of a with the one as far along in b, first and last included."""
    return [(i, round(i * (depth_b - 1) / max(depth_a - 1, 1))) for i in range(depth_a)]


LEAST_CKA = 1e-4
"""Under the root: below it (unrelated networks, and the unbiased estimate may be negative) the slope would explode."""


def cka_share(
    states_BTD: Tensor,
    reference_BTC: Tensor,
    keep_BT: Tensor,
    step: StreamingCKA,
    value: float,
    *,
    root: bool = False,
) -> Tensor:
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
        root: of 1 - sqrt(CKA) instead (Dasgupta and Cohn, ICLR 2025).

    Returns:
        a scalar in fp64: this micro-batch's part of the rows times the loss. Beside a forward pass of both networks
        that `step` cost, this costs 2 N D (D + C) multiplications in fp64 and the memory of D² + C² + D·C numbers.
    """
    x_ND = states_BTD[keep_BT]
    gradient_ND = step.gradient(x_ND, reference_BTC[keep_BT])
    moving = (x_ND.double() * gradient_ND).sum()
    if root:
        value = max(value, LEAST_CKA) ** 0.5
        moving = moving / (2 * value)
    return len(x_ND) / step.n * (1 - value) - (moving - moving.detach())
