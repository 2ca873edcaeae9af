"""What CKA needs all pairs of rows for, on a sample of them: the map of all layers, intervals, floor and ceiling.

A map of L × M layers over a whole data set would keep L · M matrices of D². On a sample of N rows each layer has one
Gram matrix N × N, and all pairs of layers are one product of these, in slices of rows; where layers are few and narrow,
their covariances are cheaper.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from litgpt.cka import MINIMUM_ROWS, centred, full_precision, hsic1_from_moments, linear_cka

SLICE_ELEMENTS = 1 << 25
"""Of the slices of Gram matrices that are in memory at a time."""

GATHER_COST = 64
"""Multiplications that it costs, roughly, to move an element of a Gram matrix."""


def layer_map(x_NLD: Tensor, y_NMC: Tensor) -> Tensor:
    """Unbiased linear CKA of every layer of one network with every layer of another, as `linear_cka` of each pair.

    Args:
        x_NLD: L layers of the first network, rows are tokens.
        y_NMC: M layers of the second, same tokens.

    Returns:
        fp64 [L, M] on the CPU.

    Raises:
        ValueError: fewer than 4 rows, or row counts that differ.
    """
    n, L, M = len(x_NLD), x_NLD.shape[1], y_NMC.shape[1]
    if n != len(y_NMC) or n < MINIMUM_ROWS:
        raise ValueError(f"a map needs at least {MINIMUM_ROWS} rows of both, got {n} and {len(y_NMC)}")
    with full_precision(x_NLD.device):
        dtype = torch.promote_types(x_NLD.dtype, y_NMC.dtype)
        x, y = ([centred(rows_NLD[:, i].to(dtype)) for i in range(rows_NLD.shape[1])] for rows_NLD in (x_NLD, y_NMC))
        width_x, width_y = x_NLD.shape[2], y_NMC.shape[2]
        by_gram = n * n * (L * width_x + M * width_y + GATHER_COST * (L + M)) // 2
        by_covariance = n * (L * width_x**2 + M * width_y**2 + L * M * width_x * width_y)
        xy_LM, xx_L, yy_M = (_sums_by_covariance if by_covariance < by_gram else _sums_by_gram)(x, y)
        p_LN, q_MN = (torch.stack([rows.square().sum(1) for rows in side]).double().cpu() for side in (x, y))
    p_L, q_M = p_LN.sum(1), q_MN.sum(1)
    xy_LM = hsic1_from_moments(xy_LM, p_LN @ q_MN.T, p_L[:, None], q_M, n)
    xx_L = hsic1_from_moments(xx_L, p_LN.square().sum(1), p_L, p_L, n)
    yy_M = hsic1_from_moments(yy_M, q_MN.square().sum(1), q_M, q_M, n)
    return xy_LM / (xx_L[:, None] * yy_M).sqrt()


def _sums_by_gram(x: list[Tensor], y: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Σ k·m over all elements of the Gram matrices of every x with every y, of each x and of each y with itself."""
    n = len(x[0])
    xy_LM = torch.zeros(len(x), len(y), dtype=torch.float64)
    xx_L, yy_M = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(y), dtype=torch.float64)
    step = max(1, SLICE_ELEMENTS // ((len(x) + len(y)) * n))
    for start in range(0, n, step):
        end = min(start + step, n)
        # Symmetric: the columns before this slice are in the earlier ones, so those after it count twice.
        for columns, times in ((slice(start, end), 1), (slice(end, n), 2)):
            k, m = (torch.stack([rows[start:end] @ rows[columns].T for rows in side]).flatten(1) for side in (x, y))
            xy_LM += times * (k @ m.T).double().cpu()
            xx_L += times * k.square().sum(1).double().cpu()
            yy_M += times * m.square().sum(1).double().cpu()
    return xy_LM, xx_L, yy_M


def _sums_by_covariance(x: list[Tensor], y: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The same sums as ‖XᵀY‖², which they equal."""
    beside_y = torch.cat(y, 1)
    xy_LM = torch.stack([torch.stack([c.square().sum() for c in (a.T @ beside_y).split(y[0].shape[1], 1)]) for a in x])
    xx_L, yy_M = (torch.stack([(rows.T @ rows).square().sum() for rows in side]) for side in (x, y))
    return xy_LM.double().cpu(), xx_L.double().cpu(), yy_M.double().cpu()


class Spread(NamedTuple):
    """What a CKA on N rows is worth."""

    value: float
    """Of the sample itself."""
    low: float
    high: float
    """95 % of the estimates that other sequences would have given lie about the true value as far as these lie about
    `value`; NaN with fewer than 4 sequences."""
    floor: float
    """The largest of 20 values for tokens paired at random: what is below it is nothing."""
    ceiling: float
    """Of the first network with itself: 1, or the arithmetic is at fault."""


RESAMPLES = 200
SHUFFLES = 20


def spread(x_ND: Tensor, y_NC: Tensor, sequences_N: Tensor, *, seed: int = 1337) -> Spread:
    """Interval, floor and ceiling of the unbiased linear CKA of a sample of rows.

    The interval is resampled over sequences, since tokens of one text are not independent. An ordinary bootstrap draws
    rows twice, and a row paired with its own copy looks alike in any two networks, which lifts every replicate. So each
    replicate is a random half of the sequences without repetition, whose estimates scatter about that of all as widely
    as this scatters about the truth (delete-half jackknife; Shao and Wu 1989, Ann. Statist. 17:1176).

    Args:
        x_ND, y_NC: as of `linear_cka`; N² numbers for each are in memory.
        sequences_N: number of the sequence that each row is from.
        seed: of halves and shuffles.

    Raises:
        ValueError: fewer than 4 rows, or row counts that differ.
    """
    n = len(x_ND)
    if n != len(y_NC) or n < MINIMUM_ROWS:
        raise ValueError(f"CKA needs at least {MINIMUM_ROWS} rows of both, got {n} and {len(y_NC)}")
    generator = torch.Generator().manual_seed(seed)
    with full_precision(x_ND.device):
        dtype = torch.promote_types(x_ND.dtype, y_NC.dtype)
        x_ND, y_NC = centred(x_ND.to(dtype)), centred(y_NC.to(dtype))
        k_NN, l_NN = x_ND @ x_ND.T, y_NC @ y_NC.T
        k_N, l_N = k_NN.diagonal().clone(), l_NN.diagonal().clone()
        scale = (_hsic1(k_NN.square().sum(), k_N, k_N) * _hsic1(l_NN.square().sum(), l_N, l_N)).sqrt()
        value = float(_hsic1((k_NN * l_NN).sum(), k_N, l_N) / scale)
        shuffled = []
        for _ in range(SHUFFLES):
            order = torch.randperm(n, generator=generator).to(k_NN.device)
            if x_ND.shape[1] * y_NC.shape[1] < GATHER_COST * n:
                product = (x_ND.T @ y_NC[order]).square().sum()
            else:
                product = (k_NN * l_NN[order][:, order]).sum()
            shuffled.append(float(_hsic1(product, k_N, l_N[order]) / scale))
        low, high = _interval(k_NN.fill_diagonal_(0), l_NN.fill_diagonal_(0), sequences_N, value, generator)
        ceiling = float(linear_cka(x_ND, x_ND))
    return Spread(value, low, high, max(shuffled), ceiling)


def _interval(
    k_NN: Tensor, l_NN: Tensor, sequences_N: Tensor, value: float, generator: torch.Generator
) -> tuple[float, float]:
    names, member_N = sequences_N.unique(return_inverse=True)
    if len(names) < 4:
        return float("nan"), float("nan")
    halves_RS = torch.rand(RESAMPLES, len(names), generator=generator).argsort(1) < len(names) // 2
    rows_RN = halves_RS.to(member_N.device)[:, member_N]
    rows_RN = rows_RN[rows_RN.sum(1) >= MINIMUM_ROWS].to(k_NN.dtype)
    xy, xx, yy = _hsic1_of_subsets(k_NN, l_NN, rows_RN)
    apart = (xy / (xx * yy).sqrt()).double() - value
    apart = apart[apart.isfinite()]
    if len(apart) < RESAMPLES // 2:
        return float("nan"), float("nan")
    low, high = apart.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64, device=apart.device)).tolist()
    return value - high, value - low


def _hsic1(product: Tensor, k_N: Tensor, l_N: Tensor) -> Tensor:
    k_N, l_N = k_N.double(), l_N.double()
    return hsic1_from_moments(product.double(), (k_N * l_N).sum(), k_N.sum(), l_N.sum(), len(k_N))


def _hsic1_of_subsets(k_NN: Tensor, l_NN: Tensor, rows_RN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """HSIC₁ (times n (n - 3)) of x and y, x and x, y and y, for R subsets of the rows, given as 0 and 1; fp64 [R].

    The Gram matrices have no diagonal; they need not be centred about each subset's mean.
    """
    n_R = rows_RN.sum(1).double()
    sums_RN = {"k": rows_RN @ k_NN, "l": rows_RN @ l_NN}
    totals_R = {name: (sums * rows_RN).sum(1).double() for name, sums in sums_RN.items()}

    def hsic1(a: str, b: str, product_NN: Tensor) -> Tensor:
        pairs_R = ((rows_RN @ product_NN) * rows_RN).sum(1).double()
        crossed_R = (sums_RN[a] * sums_RN[b] * rows_RN).sum(1).double()
        return pairs_R + totals_R[a] * totals_R[b] / ((n_R - 1) * (n_R - 2)) - 2 * crossed_R / (n_R - 2)

    return hsic1("k", "l", k_NN * l_NN), hsic1("k", "k", k_NN * k_NN), hsic1("l", "l", l_NN * l_NN)
