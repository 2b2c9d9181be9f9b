"""Squared differences of all pairs by products of matrices, on any device, as exact as by differences.

|x|² + |y|² − 2xy loses every digit on nearly equal frames. Here each pair has a bound on its error, and pairs
whose bound is too large are computed again by differences.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lsim.error_bounds import (
    BY_PRODUCT,
    CONFIDENCE,
    HALF_ULP_OF_DOUBLE,
    PROMISE,
    PairPrecision,
    half_ulp,
    number_of_pairs,
)
from lsim.no_tf32 import ieee_products

CHUNK = 128
"""Columns that one product of matrices adds up in the rows' own precision."""

CHUNKS_TOGETHER = 64
ROWS_OF_PRODUCT = 512
"""Working memory of a product: 512 · 8192 values in double on either side, and 64 · 512² in single."""

VALUES_TOGETHER = 1 << 23
"""Differences computed at once where pairs are computed one by one: 64 MB of doubles."""


def squared_differences_in_torch(
    x: Tensor, y: Tensor, promise: float = PROMISE
) -> tuple[Tensor, PairPrecision]:
    """Compute Σ_k (x[i, k] − y[j, k])² by products of matrices, on any device; close pairs by differences.

    A mean row is subtracted from all in double, which makes products of similar frames small, and the
    differences are rounded to single. Then |x|² + |y|² − 2xy, in double but for the product of each chunk of
    columns, which is in IEEE single precision: off by at most λ √chunk u |x||y| (Higham & Mary 2019), and
    the rounding moves the distance, the root of the sum, by at most u (|x| + |y|). Pairs for which
    that is more than ``promise`` of the sum are summed again directly. Whole numbers up to 255 are not
    changed: all of their products and sums are exact. Rows of float64 go the same way, with the u of double.

    Parameters
    ----------
    x, y : Tensor of shape (n, k) and (m, k), both float32 or both float64
        On one device, without gradients. A row with NaN has NaN for its sums. Where ``x is y``, only i < j
        is computed and mirrored, and the diagonal is 0.
    promise : float
        The relative error that a sum may have.

    Returns
    -------
    Tensor of shape (n, m), float64
        Unlike those of the kernels, the last bits depend on which rows are computed together.
    PairPrecision

    Notes
    -----
    Memory is that of three results, and 250 MB at most besides, for any number of rows of up to 8 million
    values.
    """
    symmetric = x is y
    whole = _is_whole(x) and (symmetric or _is_whole(y))
    squares_x, squares_y, sums = _centred_products(x, y, centred=not whole)
    sums.mul_(-2).add_(squares_x[:, None]).add_(squares_y).clamp_(min=0)
    if symmetric:
        sums = sums.triu(1)
    worst, recomputed = 0.0, 0
    if not whole:
        for start in range(0, len(x), ROWS_OF_PRODUCT):
            part = slice(start, start + ROWS_OF_PRODUCT)
            bound = _bound_of_product(sums[part], squares_x[part], squares_y, x.shape[1], half_ulp(x.dtype))
            if symmetric:
                bound = bound.triu(1 + start)
            inexact = bound > promise
            bounds = bound[bound <= promise]
            worst = max(worst, bounds.max().item() if len(bounds) else 0.0)
            i, j = inexact.nonzero(as_tuple=True)
            sums[part][i, j] = _directly_in_torch(x, y, i + start, j)
            recomputed += len(i)
    if recomputed:
        worst = max(worst, 3 * half_ulp(x.dtype))
    if symmetric:
        sums += sums.T.clone()
    pairs = number_of_pairs(len(x), len(y), symmetric=symmetric)
    return sums, PairPrecision(BY_PRODUCT, promise, worst, pairs, recomputed)


def _is_whole(rows: Tensor) -> bool:
    """Tell whether all values but NaN are whole numbers whose products add up exactly over a chunk."""
    parts = rows.split(max(1, VALUES_TOGETHER // max(rows.shape[1], 1)))
    return all(bool((((part == part.round()) & (part.abs() <= 255)) | part.isnan()).all()) for part in parts)


def _centred_products(x: Tensor, y: Tensor, *, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute |x|², |y|² and xy of the rows, minus a mean row if ``centred``, summed in double."""
    symmetric = x is y
    products = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    squares_x, squares_y = products.new_zeros(len(x)), products.new_zeros(len(y))
    with ieee_products(x.device):
        for start in range(0, x.shape[1], CHUNK * CHUNKS_TOGETHER):
            columns = slice(start, start + CHUNK * CHUNKS_TOGETHER)
            centre = _mean_row(x, y, columns) if centred else None
            for i in range(0, len(x), ROWS_OF_PRODUCT):
                rows = slice(i, i + ROWS_OF_PRODUCT)
                row_chunks = _in_chunks(x[rows, columns], centre)
                squares_x[rows] += row_chunks.double().square().sum((0, 2))
                for j in range(i if symmetric else 0, len(y), ROWS_OF_PRODUCT):
                    other_rows = slice(j, j + ROWS_OF_PRODUCT)
                    column_chunks = _in_chunks(y[other_rows, columns], centre)
                    if i == 0:
                        squares_y[other_rows] += column_chunks.double().square().sum((0, 2))
                    products[rows, other_rows] += torch.bmm(row_chunks, column_chunks.mT).sum(
                        0, dtype=torch.float64
                    )
    return squares_x, squares_y, products


def _mean_row(x: Tensor, y: Tensor, columns: slice) -> Tensor:
    """Average some rows, in double. The choice of rows affects rounding alone."""
    sample = torch.cat([x[:ROWS_OF_PRODUCT, columns], y[:ROWS_OF_PRODUCT, columns]])
    return sample.double().nanmean(0).nan_to_num()


def _in_chunks(values: Tensor, centre: Tensor | None) -> Tensor:
    """Cut (rows, columns) into (chunks, rows, CHUNK), padded with zeros."""
    if centre is not None:
        values = (values.double() - centre).to(values.dtype)
    values = F.pad(values, (0, -values.shape[1] % CHUNK))
    return values.unflatten(1, (-1, CHUNK)).transpose(0, 1)


def _bound_of_product(
    sums: Tensor, squares_x: Tensor, squares_y: Tensor, columns: int, unit: float
) -> Tensor:
    """Bound the relative error of ``sums`` = |x|² + |y|² − 2xy; infinite where no digit is certain."""
    x, y = squares_x.sqrt()[:, None], squares_y.sqrt()
    error = 2 * CONFIDENCE * math.sqrt(CHUNK) * unit * x * y
    error += (2 * sums.sqrt() + unit * (x + y)) * unit * (x + y)
    error += CONFIDENCE * math.sqrt(columns) * HALF_ULP_OF_DOUBLE * (squares_x[:, None] + squares_y)
    error += columns * 2.0**-125  # products too small for single precision
    return torch.where(sums <= error, math.inf, error / (sums - error))


def _directly_in_torch(x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Compute Σ_k (x[i[p], k] − y[j[p], k])² of pairs, added up in double: (len(i),)."""
    step = max(1, VALUES_TOGETHER // max(x.shape[1], 1))
    parts = zip(i.split(step), j.split(step), strict=True)
    return torch.cat([(x[rows] - y[others_rows]).double().square().sum(1) for rows, others_rows in parts])


def known_in_both(x: Tensor, y: Tensor) -> Tensor:
    """Count the columns that are NaN in neither row, for all pairs: (n, m) float64, exact.

    Examples
    --------
    >>> known_in_both(torch.tensor([[1.0, math.nan]]), torch.tensor([[1.0, 2.0]])).item()
    1.0
    """
    counts = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    for start in range(0, x.shape[1], CHUNK * CHUNKS_TOGETHER):
        columns = slice(start, start + CHUNK * CHUNKS_TOGETHER)
        # Zeros and ones: exact in any precision that a program may have set for products.
        indicator = _is_known(x[:, columns])
        counts += indicator @ (indicator if x is y else _is_known(y[:, columns])).T
    return counts


def _is_known(values: Tensor) -> Tensor:
    return (values == values).float()
