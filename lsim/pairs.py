"""All-pairs sums of absolute and squared differences, exact for near-identical rows.

Differences are taken directly: |x|² + |y|² − 2xy loses every digit on frames that hardly differ, and
those are what simulations make. On the CPU, four rows meet four in registers, and columns are walked in
blocks that stay in the first-level cache, summed in the rows' own precision within a block and in double
across blocks: exact for 8-bit values (256 · 255² < 2²⁴), within 2e-7 otherwise. Every pair goes through
the same instructions in the same order, wherever in a tile it stands and whichever thread has it, so the
result depends on its two rows alone. Other devices multiply matrices, bound the error of every pair, and
take those pairs again by differences that the product doesn't get right.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lsim.threads import in_threads

BLOCK = 256
"""Columns summed in single precision: few enough that squares of 8-bit differences add exactly."""

# Not the whole of fastmath: NaN and infinity have to stay what they are.
FAST = {"reassoc", "contract", "arcp", "nsz"}

PairKernel = Callable[..., None]

THREADED_FROM = 1 << 25
"""Operations that a second thread is worth: handing over to it takes as long as a tenth of these."""

TILE = 4
"""Rows on either side that are compared with one another in registers."""

COPIED_FROM = 48
"""Rows on one side from which on it pays to copy the columns in hand."""

ROWS_TOGETHER = 128
"""Rows on either side that are worked on at once: a block of their columns fits the second-level cache."""


# --- how right the sums are --------------------------------------------------------------------------------

PROMISE = 1e-5
"""Largest relative error of a sum."""

CONFIDENCE = 5.0
"""λ of Higham & Mary (SIAM J. Sci. Comput. 41, 2019): a rounding is beyond the bound with 2 exp(−λ²/2)."""

HALF_ULP = 2.0**-24
"""Relative rounding error of single precision."""

DIRECTLY = "direct differences"
BY_PRODUCT = "centred product"


@dataclass(frozen=True)
class PairPrecision:
    """How the sums over pairs were computed, and how right they are for sure; records add up.

    Attributes
    ----------
    method : str
        ``"direct differences"``, ``"centred product"``, or several, joined by ``" + "``.
    promise : float
        The relative error of a sum that is allowed.
    bound : float
        The largest relative error that a sum can have: not above ``promise``.
    pairs : int
        How many sums there are.
    recomputed : int
        How many of them were taken again by differences, since the product could not keep the promise.
    """

    method: str
    promise: float
    bound: float
    pairs: int
    recomputed: int = 0

    def __add__(self, other: PairPrecision) -> PairPrecision:
        methods = {*self.method.split(" + "), *other.method.split(" + ")}
        return PairPrecision(
            " + ".join(sorted(methods)),
            max(self.promise, other.promise),
            max(self.bound, other.bound),
            self.pairs + other.pairs,
            self.recomputed + other.recomputed,
        )


class ReportsPrecision:
    """For metrics: keeps count of the precision of their sums, until somebody takes the record."""

    pair_precision: PairPrecision | None = None
    """Of all sums since the last :meth:`take_precision`; None where there were none."""

    def note_precision(self, record: PairPrecision) -> None:
        """Add a record to :attr:`pair_precision`."""
        with _noting:
            self.pair_precision = record if self.pair_precision is None else self.pair_precision + record

    def take_precision(self) -> PairPrecision | None:
        """:attr:`pair_precision`, and start anew."""
        with _noting:
            record, self.pair_precision = self.pair_precision, None
        return record


_noting = threading.Lock()


def _rounding_of_sum(terms: int) -> float:
    """Relative error of a sum of non-negative terms that are a rounded difference each, squared or not."""
    return (CONFIDENCE * math.sqrt(terms) + 3) * HALF_ULP


# --- on the CPU: compiled ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TileKernel:
    """A compiled sum over columns, for all rows of one matrix against all of another.

    ``compiled(x, y, out, symmetric)`` writes the sum for (x[i], y[j]) to ``out[i, j]``; for i < j at least,
    where ``symmetric``.
    """

    compiled: PairKernel


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def _term(a, b, squared, known):  # type: ignore[no-untyped-def]
    difference = a - b
    if known and difference != difference:
        return type(difference)(0)
    return difference * difference if squared else abs(difference)


def _sum_over_columns(*, squared: bool, known: bool = False) -> TileKernel:
    """Compile the sum of absolute or squared differences over columns, over all or those without NaN.

    Tiles at the edges are whole ones, filled up with a row again: other instructions could round
    differently. Of many rows, the columns in hand are copied, so that they are aligned to cache lines and
    don't compete for the same ones, as those of 224² pixels do; few rows are through before that pays.
    """
    # Absolute differences of 8 bit add up exactly for longer.
    block = BLOCK if squared else 2 * BLOCK

    @numba.njit(nogil=True, cache=True, fastmath=FAST)
    def compiled(x, y, out, symmetric):  # type: ignore[no-untyped-def]
        zero = x.dtype.type(0)
        n = x.shape[0]
        m = y.shape[0]
        copied = max(n, m) >= COPIED_FROM
        left = _aligned(n, block, x) if copied else x
        right = left if symmetric else (_aligned(m, block, y) if copied else y)
        sums = np.zeros((n + TILE, m + TILE))
        for start in range(0, x.shape[1], block):
            width = min(block, x.shape[1] - start)
            if copied:
                _copy_columns(x, start, width, left)
                if not symmetric:
                    _copy_columns(y, start, width, right)
            first = 0 if copied else start
            last = first + width
            for i in range(0, n, TILE):
                x0 = left[i, first:last]
                x1 = left[min(i + 1, n - 1), first:last]
                x2 = left[min(i + 2, n - 1), first:last]
                x3 = left[min(i + 3, n - 1), first:last]
                for j in range(i if symmetric else 0, m, TILE):
                    y0 = right[j, first:last]
                    y1 = right[min(j + 1, m - 1), first:last]
                    y2 = right[min(j + 2, m - 1), first:last]
                    y3 = right[min(j + 3, m - 1), first:last]
                    s00 = s01 = s02 = s03 = zero
                    s10 = s11 = s12 = s13 = zero
                    s20 = s21 = s22 = s23 = zero
                    s30 = s31 = s32 = s33 = zero
                    for k in range(width):
                        s00 += _term(x0[k], y0[k], squared, known)
                        s01 += _term(x0[k], y1[k], squared, known)
                        s02 += _term(x0[k], y2[k], squared, known)
                        s03 += _term(x0[k], y3[k], squared, known)
                        s10 += _term(x1[k], y0[k], squared, known)
                        s11 += _term(x1[k], y1[k], squared, known)
                        s12 += _term(x1[k], y2[k], squared, known)
                        s13 += _term(x1[k], y3[k], squared, known)
                        s20 += _term(x2[k], y0[k], squared, known)
                        s21 += _term(x2[k], y1[k], squared, known)
                        s22 += _term(x2[k], y2[k], squared, known)
                        s23 += _term(x2[k], y3[k], squared, known)
                        s30 += _term(x3[k], y0[k], squared, known)
                        s31 += _term(x3[k], y1[k], squared, known)
                        s32 += _term(x3[k], y2[k], squared, known)
                        s33 += _term(x3[k], y3[k], squared, known)
                    tile = sums[i : i + TILE, j : j + TILE]
                    tile[0, 0] += s00
                    tile[0, 1] += s01
                    tile[0, 2] += s02
                    tile[0, 3] += s03
                    tile[1, 0] += s10
                    tile[1, 1] += s11
                    tile[1, 2] += s12
                    tile[1, 3] += s13
                    tile[2, 0] += s20
                    tile[2, 1] += s21
                    tile[2, 2] += s22
                    tile[2, 3] += s23
                    tile[3, 0] += s30
                    tile[3, 1] += s31
                    tile[3, 2] += s32
                    tile[3, 3] += s33
        out[:] = sums[:n, :m]

    return TileKernel(compiled)


@numba.njit(nogil=True, cache=True)
def _aligned(rows, columns, like):  # type: ignore[no-untyped-def]
    """Room for (rows, columns) of the dtype of ``like``, from a multiple of 64 bytes on."""
    line = 64 // like.itemsize
    room = np.empty(rows * columns + line, like.dtype)
    start = -(room.ctypes.data // like.itemsize) % line
    return room[start : start + rows * columns].reshape(rows, columns)


@numba.njit(nogil=True, cache=True)
def _copy_columns(source, start, width, into):  # type: ignore[no-untyped-def]
    for i in range(source.shape[0]):
        row = source[i, start : start + width]
        copy = into[i]
        for k in range(width):
            copy[k] = row[k]


squared_differences = _sum_over_columns(squared=True)
"""Σ_k (x[i, k] − y[j, k])², for :func:`all_pairs`; rows of float32 or float64."""

absolute_differences = _sum_over_columns(squared=False)
"""Σ_k |x[i, k] − y[j, k]|."""

known_squared_differences = _sum_over_columns(squared=True, known=True)
"""Σ_k (x[i, k] − y[j, k])² over those k where neither is NaN."""

known_absolute_differences = _sum_over_columns(squared=False, known=True)
"""Σ_k |x[i, k] − y[j, k]| over those k where neither is NaN."""


def all_pairs(
    kernel: PairKernel | TileKernel, n: int, m: int, *arguments: Any, symmetric: bool, operations: int
) -> Tensor:
    """Run a pair kernel over every pair, in as many threads as torch uses.

    Parameters
    ----------
    kernel : callable or TileKernel
        ``kernel(i, j, out, *arguments)`` adds to ``out[p]`` for the pair (i[p], j[p]); releases the GIL.
        Of a tile kernel, ``arguments`` are the two matrices.
    n, m : int
        Number of rows on either side.
    symmetric : bool
        Both sides are the same: only i < j is computed and mirrored, and the diagonal is left 0.
    operations : int
        About how many a pair takes: small work is not worth a second thread.

    Returns
    -------
    Tensor of shape (n, m), float64
    """
    count = n * (n - 1) // 2 if symmetric else n * m
    threads = max(1, min(torch.get_num_threads(), count, count * operations // THREADED_FROM))
    out = np.zeros((n, m))
    if isinstance(kernel, TileKernel):
        x, y = (np.ascontiguousarray(side) for side in arguments)
        _in_tiles(kernel.compiled, out, x, y, symmetric, threads)
        return torch.from_numpy(np.triu(out, 1) + np.triu(out, 1).T if symmetric else out)
    i, j = np.triu_indices(n, 1) if symmetric else (a.ravel() for a in np.indices((n, m)))
    values = np.zeros(len(i))
    if threads == 1:
        kernel(i, j, values, *arguments)
    else:
        bounds = np.linspace(0, len(i), threads + 1).astype(int)
        parts = [
            (i[start:stop], j[start:stop], values[start:stop], *arguments)
            for start, stop in itertools.pairwise(bounds)
        ]
        in_threads(lambda part: kernel(*part), parts)
    out[i, j] = values
    if symmetric:
        out[j, i] = values
    return torch.from_numpy(out)


def _in_tiles(
    compiled: PairKernel, out: np.ndarray, x: np.ndarray, y: np.ndarray, symmetric: bool, threads: int
) -> None:
    """Fill ``out`` in squares of rows, many enough that all threads end about together."""
    side = ROWS_TOGETHER
    while threads > 1 and side > 2 * TILE and (len(x) / side) * (len(y) / side) < 8 * threads:
        side //= 2
    parts = [
        (x[i : i + side], y[j : j + side], out[i : i + side, j : j + side], symmetric and i == j)
        for i in range(0, len(x), side)
        for j in range(i if symmetric else 0, len(y), side)
    ]
    if threads == 1:
        for part in parts:
            compiled(*part)
    else:
        in_threads(lambda part: compiled(*part), parts)


def has_kernel(*tensors: Tensor) -> bool:
    """Whether the compiled kernels apply: on the CPU, and to tensors that carry no gradients."""
    return all(tensor.device.type == "cpu" and not tensor.requires_grad for tensor in tensors)


def rows_in_torch(
    paired: Callable[[Any, Any], Tensor], a: Any, b: Any, *, together: int | None = None
) -> Tensor:
    """The (len(a), len(b)) block of distances, row by row, from an elementwise formula in torch.

    The way for devices without a compiled kernel; memory is that of one row, or of ``together`` pairs of it.
    """
    step = max(together or len(b), 1)
    parts = [b[k : k + step] for k in range(0, len(b), step)] or [b]
    return torch.stack([torch.cat([paired(a[k : k + 1], part) for part in parts]) for k in range(len(a))])


# --- squared differences, on any device ---------------------------------------------------------------------

CHUNK = 128
"""Columns that one product of matrices adds up in single precision."""

CHUNKS_TOGETHER = 64
ROWS_OF_PRODUCT = 512
"""Working memory of a product: 512 · 8192 values in double on either side, and 64 · 512² in single."""

VALUES_TOGETHER = 1 << 23
"""Differences taken at once where pairs are taken one by one: 64 MB of doubles."""


def squared_distances(x: Tensor, y: Tensor) -> tuple[Tensor, PairPrecision]:
    """Σ_k (x[i, k] − y[j, k])² for all pairs, the best way that their device has.

    Parameters
    ----------
    x, y : Tensor of shape (n, k) and (m, k), float32
        Where ``x is y``, only i < j is computed and mirrored.

    Returns
    -------
    Tensor of shape (n, m), float64
        Within :data:`PROMISE` of the sum of the exact differences, relatively. On the CPU, the same bits
        whatever the other rows.
    PairPrecision
    """
    if not has_kernel(x, y):
        return squared_differences_in_torch(x.detach(), x.detach() if x is y else y.detach())
    n, m, columns = len(x), len(y), x.shape[1]
    sums = all_pairs(squared_differences, n, m, x.numpy(), y.numpy(), symmetric=x is y, operations=columns)
    return sums, directly(n, m, symmetric=x is y)


def known_in_both(x: Tensor, y: Tensor) -> Tensor:
    """How many columns are NaN in neither row, for all pairs: (n, m) float64, exact."""
    counts = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    for start in range(0, x.shape[1], CHUNK * CHUNKS_TOGETHER):
        columns = slice(start, start + CHUNK * CHUNKS_TOGETHER)
        # Zeros and ones: right in any precision that a program may have set for products.
        left = _is_known(x[:, columns])
        counts += left @ (left if x is y else _is_known(y[:, columns])).T
    return counts


def _is_known(values: Tensor) -> Tensor:
    return (values == values).float()


def directly(n: int, m: int, *, symmetric: bool) -> PairPrecision:
    """The record of sums by the compiled kernels, or by others no less right."""
    return PairPrecision(DIRECTLY, PROMISE, _rounding_of_sum(2 * BLOCK), _count(n, m, symmetric))


def squared_differences_in_torch(
    x: Tensor, y: Tensor, promise: float = PROMISE
) -> tuple[Tensor, PairPrecision]:
    """Σ_k (x[i, k] − y[j, k])² by products of matrices, on any device; close pairs by differences.

    A row is subtracted from all in double, which makes products small where frames are alike, and what is
    left is rounded to single. Then |x|² + |y|² − 2xy, in double but for the product of each chunk of
    columns, which is in IEEE single precision: off by at most λ √chunk u |x||y| (Higham & Mary 2019), and
    the rounding moves the distance, the root of the sum, by at most u (|x| + |y|). Pairs for which
    that is more than ``promise`` of the sum are summed again directly. Whole numbers up to 255 are left as
    they are: all of their products and sums are exact.

    Parameters
    ----------
    x, y : Tensor of shape (n, k) and (m, k), float32
        On one device, without gradients. A row with NaN has NaN for its sums. Where ``x is y``, only i < j
        is computed and mirrored, and the diagonal is 0.
    promise : float
        The relative error of a sum that is allowed.

    Returns
    -------
    Tensor of shape (n, m), float64
        Other than from the kernels, the last bits depend on what rows are computed together.
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
            bound = _bound_of_product(sums[part], squares_x[part], squares_y, x.shape[1])
            if symmetric:
                bound = bound.triu(1 + start)
            again = bound > promise
            kept = bound[bound <= promise]
            worst = max(worst, kept.max().item() if len(kept) else 0.0)
            i, j = again.nonzero(as_tuple=True)
            sums[part][i, j] = _directly_in_torch(x, y, i + start, j)
            recomputed += len(i)
    if recomputed:
        worst = max(worst, 3 * HALF_ULP)
    if symmetric:
        sums += sums.T.clone()
    pairs = _count(len(x), len(y), symmetric)
    return sums, PairPrecision(BY_PRODUCT, promise, worst, pairs, recomputed)


def _count(n: int, m: int, symmetric: bool) -> int:
    return n * (n - 1) // 2 if symmetric else n * m


def _is_whole(rows: Tensor) -> bool:
    """Whether all are whole numbers whose products add up exactly over a chunk; NaN apart."""
    parts = rows.split(max(1, VALUES_TOGETHER // max(rows.shape[1], 1)))
    return all(bool((((part == part.round()) & (part.abs() <= 255)) | part.isnan()).all()) for part in parts)


def _centred_products(x: Tensor, y: Tensor, *, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """|x|², |y|² and xy of the rows, less a row amid them if ``centred``: double, from single precision."""
    symmetric = x is y
    products = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    squares_x, squares_y = products.new_zeros(len(x)), products.new_zeros(len(y))
    with _ieee_products(x.device):
        for start in range(0, x.shape[1], CHUNK * CHUNKS_TOGETHER):
            columns = slice(start, start + CHUNK * CHUNKS_TOGETHER)
            centre = _row_amid(x, y, columns) if centred else None
            for i in range(0, len(x), ROWS_OF_PRODUCT):
                rows = slice(i, i + ROWS_OF_PRODUCT)
                left = _in_chunks(x[rows, columns], centre)
                squares_x[rows] += left.double().square().sum((0, 2))
                for j in range(i if symmetric else 0, len(y), ROWS_OF_PRODUCT):
                    others = slice(j, j + ROWS_OF_PRODUCT)
                    right = _in_chunks(y[others, columns], centre)
                    if i == 0:
                        squares_y[others] += right.double().square().sum((0, 2))
                    products[rows, others] += torch.bmm(left, right.mT).sum(0, dtype=torch.float64)
    return squares_x, squares_y, products


def _row_amid(x: Tensor, y: Tensor, columns: slice) -> Tensor:
    """The mean of some rows, in double; which row it is changes how much is left to round, and no more."""
    some = torch.cat([x[:ROWS_OF_PRODUCT, columns], y[:ROWS_OF_PRODUCT, columns]])
    return some.double().nanmean(0).nan_to_num()


def _in_chunks(values: Tensor, centre: Tensor | None) -> Tensor:
    """(rows, columns) → (chunks, rows, CHUNK), filled up with zeros."""
    if centre is not None:
        values = (values.double() - centre).float()
    values = F.pad(values, (0, -values.shape[1] % CHUNK))
    return values.unflatten(1, (-1, CHUNK)).transpose(0, 1)


def _bound_of_product(sums: Tensor, squares_x: Tensor, squares_y: Tensor, columns: int) -> Tensor:
    """Relative error of ``sums`` = |x|² + |y|² − 2xy; infinite where no digit is sure."""
    x, y = squares_x.sqrt()[:, None], squares_y.sqrt()
    error = 2 * CONFIDENCE * math.sqrt(CHUNK) * HALF_ULP * x * y
    error += (2 * sums.sqrt() + HALF_ULP * (x + y)) * HALF_ULP * (x + y)
    error += CONFIDENCE * math.sqrt(columns) * 2.0**-53 * (squares_x[:, None] + squares_y)
    error += columns * 2.0**-125  # products too small for single precision
    return torch.where(sums <= error, math.inf, error / (sums - error))


def _directly_in_torch(x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Σ_k (x[i[p], k] − y[j[p], k])² of pairs, added up in double: (len(i),)."""
    step = max(1, VALUES_TOGETHER // max(x.shape[1], 1))
    parts = zip(i.split(step), j.split(step), strict=True)
    return torch.cat([(x[left] - y[right]).double().square().sum(1) for left, right in parts])


@contextmanager
def _ieee_products(device: torch.device) -> Iterator[None]:
    """Products of matrices in single precision proper: no TF32, no bfloat16, whatever the program has set."""
    # Settings are the process's: another thread's end must not bring them back halfway through.
    with _multiplying, torch.autocast(device.type, enabled=False):
        restore = _settings_of_products()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            restore()


def _settings_of_products() -> Callable[[], None]:
    """What sets them again as they are now."""
    backends = [torch.backends.cuda.matmul]
    if hasattr(backends[0], "fp32_precision"):  # torch 2.9 on
        backends.append(torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
        single = [backend.fp32_precision for backend in backends]
    else:
        single = []
    try:
        of_all = torch.get_float32_matmul_precision()
    except RuntimeError:  # only the single ones have been told
        of_all = None

    def restore() -> None:
        if of_all is not None:
            torch.set_float32_matmul_precision(of_all)
        for backend, setting in zip(backends, single, strict=False):
            backend.fp32_precision = setting

    return restore


_multiplying = threading.Lock()
