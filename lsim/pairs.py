"""All-pairs sums of absolute and squared differences, exact for near-identical rows.

Differences are taken directly: |x|² + |y|² − 2xy loses every digit on nearly equal frames, which are what
simulations produce. On the CPU, four rows meet four in registers, and columns are walked in
blocks that stay in the first-level cache, summed in the rows' own precision within a block and in double
across blocks: exact for 8-bit values (256 · 255² < 2²⁴), within 2e-7 otherwise, and 4e-16 for rows of
float64. Every pair goes through the same instructions in the same order, whatever its place in a tile and
its thread, so the result depends on its two rows alone. Other devices compute squared differences by products
of matrices, see :mod:`lsim.gram`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from lsim.compiled import compiled
from lsim.error_bounds import CONFIDENCE, DIRECTLY, PROMISE, PairPrecision, half_ulp, number_of_pairs
from lsim.gram import VALUES_TOGETHER, squared_differences_in_torch
from lsim.threads import in_threads

BLOCK = 256
"""Columns summed in single precision: few enough that squares of 8-bit differences add exactly."""

# Not the whole of fastmath: NaN and infinity must survive.
FAST = {"reassoc", "contract", "arcp", "nsz"}

PairKernel = Callable[..., None]

THREADED_FROM = 1 << 25
"""Operations from which on a second thread pays: the handover takes as long as a tenth of them."""

TILE = 4
"""Rows on either side that are compared with one another in registers."""

COPIED_FROM = 48
"""Rows on one side from which on it pays to copy the current columns."""

ROWS_TOGETHER = 128
"""Rows on either side that are worked on at once: a block of their columns fits the second-level cache."""


@dataclass(frozen=True)
class TileKernel:
    """A compiled sum over columns, for all rows of one matrix against all of another.

    Attributes
    ----------
    compiled : callable
        ``compiled(x, y, out, symmetric)`` writes the sum for (x[i], y[j]) to ``out[i, j]``; for i < j at
        least, where ``symmetric``.
    """

    compiled: PairKernel


@compiled(fastmath=FAST)
def _term(a, b, squared, skip_nan):  # type: ignore[no-untyped-def]
    difference = a - b
    if skip_nan and difference != difference:
        return type(difference)(0)
    return difference * difference if squared else abs(difference)


def _sum_over_columns(*, squared: bool, skip_nan: bool = False) -> TileKernel:
    """Compile the sum of absolute or squared differences over columns, over all or those without NaN.

    Tiles at the edges are padded to whole ones by repeating a row: other instructions could round
    differently. With many rows, the current columns are copied, so that they are aligned to cache lines and
    don't compete for the same ones, as columns of 224² pixels do. For few rows that doesn't pay.
    """
    # Absolute differences of 8 bit add up exactly for longer.
    block = BLOCK if squared else 2 * BLOCK

    @compiled(fastmath=FAST)
    def sum_tiles(x, y, out, symmetric):  # type: ignore[no-untyped-def]
        zero = x.dtype.type(0)
        n = x.shape[0]
        m = y.shape[0]
        is_copy = max(n, m) >= COPIED_FROM
        left = _aligned(n, block, x) if is_copy else x
        right = left if symmetric else (_aligned(m, block, y) if is_copy else y)
        sums = np.zeros((n + TILE, m + TILE))
        for start in range(0, x.shape[1], block):
            width = min(block, x.shape[1] - start)
            if is_copy:
                _copy_columns(x, start, width, left)
                if not symmetric:
                    _copy_columns(y, start, width, right)
            first = 0 if is_copy else start
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
                        s00 += _term(x0[k], y0[k], squared, skip_nan)
                        s01 += _term(x0[k], y1[k], squared, skip_nan)
                        s02 += _term(x0[k], y2[k], squared, skip_nan)
                        s03 += _term(x0[k], y3[k], squared, skip_nan)
                        s10 += _term(x1[k], y0[k], squared, skip_nan)
                        s11 += _term(x1[k], y1[k], squared, skip_nan)
                        s12 += _term(x1[k], y2[k], squared, skip_nan)
                        s13 += _term(x1[k], y3[k], squared, skip_nan)
                        s20 += _term(x2[k], y0[k], squared, skip_nan)
                        s21 += _term(x2[k], y1[k], squared, skip_nan)
                        s22 += _term(x2[k], y2[k], squared, skip_nan)
                        s23 += _term(x2[k], y3[k], squared, skip_nan)
                        s30 += _term(x3[k], y0[k], squared, skip_nan)
                        s31 += _term(x3[k], y1[k], squared, skip_nan)
                        s32 += _term(x3[k], y2[k], squared, skip_nan)
                        s33 += _term(x3[k], y3[k], squared, skip_nan)
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

    return TileKernel(sum_tiles)


@compiled()
def _aligned(rows, columns, like):  # type: ignore[no-untyped-def]
    """Allocate (rows, columns) of the dtype of ``like``, aligned to 64 bytes."""
    line = 64 // like.itemsize
    room = np.empty(rows * columns + line, like.dtype)
    start = -(room.ctypes.data // like.itemsize) % line
    return room[start : start + rows * columns].reshape(rows, columns)


@compiled()
def _copy_columns(source, start, width, into):  # type: ignore[no-untyped-def]
    for i in range(source.shape[0]):
        row = source[i, start : start + width]
        copy = into[i]
        for k in range(width):
            copy[k] = row[k]


squared_differences = _sum_over_columns(squared=True)
"""Kernel of Σ_k (x[i, k] − y[j, k])², for :func:`all_pairs`; rows of float32 or float64."""

absolute_differences = _sum_over_columns(squared=False)
"""Kernel of Σ_k |x[i, k] − y[j, k]|."""

known_squared_differences = _sum_over_columns(squared=True, skip_nan=True)
"""Kernel of Σ_k (x[i, k] − y[j, k])² over those k where neither is NaN."""

known_absolute_differences = _sum_over_columns(squared=False, skip_nan=True)
"""Kernel of Σ_k |x[i, k] − y[j, k]| over those k where neither is NaN."""


@compiled(fastmath=FAST)
def _sum_each_row(x, y, squared, out):  # type: ignore[no-untyped-def]
    zero = x.dtype.type(0)
    block = BLOCK if squared else 2 * BLOCK
    for i in range(x.shape[0]):
        total = 0.0
        for start in range(0, x.shape[1], block):
            stop = min(start + block, x.shape[1])
            a = x[i, start:stop]
            b = y[i, start:stop]
            part = zero
            for k in range(stop - start):
                part += _term(a[k], b[k], squared, False)
            total += part
        out[i] = total


def each_pair(x: Tensor, y: Tensor, *, squared: bool) -> Tensor:
    """Sum the absolute or squared differences of x[k] and y[k], in one pass over the rows.

    Parameters
    ----------
    x, y : Tensor of shape (n, column), float32 or float64
        For which there are kernels, see :func:`has_kernel`.
    squared : bool

    Returns
    -------
    Tensor of shape (n,), float64
        As exact as :func:`all_pairs`; each depends on its two rows alone.

    Examples
    --------
    >>> each_pair(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]), squared=True)
    tensor([25.], dtype=torch.float64)
    """
    out = np.empty(len(x))
    _sum_each_row(*(np.ascontiguousarray(side.numpy()) for side in (x, y)), squared, out)
    return torch.from_numpy(out)


@compiled()  # fast mathematics would drop the rests
def subtract_with_rests(a, a_rest, b, b_rest, out):  # type: ignore[no-untyped-def]
    """Subtract rows of float64, and then their rests."""
    for k in range(out.shape[0]):
        out[k] = (a[k] - b[k]) + (a_rest[k] - b_rest[k])


@compiled(fastmath=FAST)
def _sum_with_rests(i, j, out, x, x_rest, y, y_rest, squared, skip_nan):  # type: ignore[no-untyped-def]
    """Add Σ_k |d_k| or Σ_k d_k² to out[p], d being the difference of rows i[p] and j[p] with their rests."""
    difference = np.empty(BLOCK)
    for p in range(i.shape[0]):
        for start in range(0, x.shape[1], BLOCK):
            columns = slice(start, min(start + BLOCK, x.shape[1]))
            part = difference[: columns.stop - start]
            subtract_with_rests(
                x[i[p], columns], x_rest[i[p], columns], y[j[p], columns], y_rest[j[p], columns], part
            )
            total = 0.0
            for k in range(part.shape[0]):
                total += _term(part[k], 0.0, squared, skip_nan)
            out[p] += total


def sums_of_differences(
    x: Tensor,
    y: Tensor,
    rests: tuple[Tensor, Tensor] | None = None,
    *,
    squared: bool = False,
    skip_nan: bool = False,
) -> Tensor:
    """Compute Σ_k |x[i, k] − y[j, k]| of all pairs by a kernel, or the sum of squares.

    Parameters
    ----------
    x, y : Tensor of shape (n, k) and (m, k)
        For which :func:`has_kernel` is true. Where ``x is y``, only i < j is computed and mirrored.
    rests : tuple of Tensor, optional
        Of the same shapes: the rests of ``x`` and ``y`` in float64, see :mod:`lsim.doubles`.
    squared : bool, default False
    skip_nan : bool, default False
        Sum over those k where neither is NaN.

    Returns
    -------
    Tensor of shape (n, m), float64
    """
    how: dict[str, Any] = {"symmetric": x is y, "operations": x.shape[1]}
    if rests is None:
        kernel = _KERNELS[squared, skip_nan]
        return all_pairs(kernel, len(x), len(y), x.numpy(), y.numpy(), **how)
    sides = (part.numpy() for part in (x, rests[0], y, rests[1]))
    return all_pairs(_sum_with_rests, len(x), len(y), *sides, squared, skip_nan, **how)


_KERNELS = {
    (False, False): absolute_differences,
    (False, True): known_absolute_differences,
    (True, False): squared_differences,
    (True, True): known_squared_differences,
}


def all_pairs(
    kernel: PairKernel | TileKernel, n: int, m: int, *arguments: Any, symmetric: bool, operations: int
) -> Tensor:
    """Run a pair kernel over every pair, in as many threads as torch uses.

    Parameters
    ----------
    kernel : callable or TileKernel
        ``kernel(i, j, out, *arguments)`` adds to ``out[p]`` for the pair (i[p], j[p]); releases the GIL.
        For a tile kernel, ``arguments`` are the two matrices.
    n, m : int
        Number of rows on either side.
    symmetric : bool
        Both sides are the same: only i < j is computed and mirrored, and the diagonal is 0.
    operations : int
        Approximate number for one pair: little work doesn't pay for a second thread.

    Returns
    -------
    Tensor of shape (n, m), float64

    Examples
    --------
    >>> x = np.array([[0.0, 0.0], [3.0, 4.0]], np.float32)
    >>> all_pairs(squared_differences, 2, 2, x, x, symmetric=True, operations=2)
    tensor([[ 0., 25.],
            [25.,  0.]], dtype=torch.float64)
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
    """Fill ``out`` in squares of rows, small enough that all threads end at about the same time."""
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
    """Tell whether compiled kernels apply: to plain tensors on the CPU without gradients.

    Kernels read memory. A tensor within ``torch.func``, ``torch.compile`` or forward-mode differentiation has
    no memory to read, or derivatives besides.
    """
    return all(
        tensor.device.type == "cpu" and not tensor.requires_grad and is_plain(tensor) for tensor in tensors
    )


def is_plain(*tensors: Tensor) -> bool:
    """Tell whether tensors have values that Python can read, and no derivatives besides."""
    if torch.compiler.is_compiling():
        return False
    return all(
        type(tensor) in (Tensor, nn.Parameter)
        and not is_functorch_wrapped_tensor(tensor)
        and forward_ad.unpack_dual(tensor).tangent is None
        for tensor in tensors
    )


def carries_gradients(*tensors: Tensor) -> bool:
    """Tell whether results must be differentiable, or traced, so that nothing may be written in place."""
    has_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return has_gradients or not is_plain(*tensors)


def rows_in_torch(
    paired: Callable[[Any, Any], Tensor], a: Any, b: Any, *, batch_size: int | None = None
) -> Tensor:
    """Compute the (len(a), len(b)) block of distances row by row, from an elementwise formula in torch.

    For devices without a compiled kernel. Memory is that of ``batch_size`` pairs of a row: by default as many
    as have :data:`~lsim.gram.VALUES_TOGETHER` values.
    """
    if batch_size is None:
        batch_size = VALUES_TOGETHER // max(sum(part.shape[1:].numel() for part in b.parts.values()), 1)
    step = max(batch_size, 1)
    parts = [b[k : k + step] for k in range(0, len(b), step)] or [b]
    return torch.stack([torch.cat([paired(a[k : k + 1], part) for part in parts]) for k in range(len(a))])


def pairs_in_torch(paired: Callable[[Any, Any], Tensor], a: Any, b: Any) -> Tensor:
    """Compute a block of distances pair by pair, so that no pair's bits depend on the others."""
    symmetric = a is b
    pairs = [(i, j) for i in range(len(a)) for j in range(i + 1 if symmetric else 0, len(b))]
    values = in_threads(lambda pair: paired(a[pair[0] : pair[0] + 1], b[pair[1] : pair[1] + 1]), pairs)
    block = torch.zeros(len(a), len(b), dtype=torch.float64)
    for (i, j), value in zip(pairs, values, strict=True):
        block[i, j] = value[0]
        if symmetric:
            block[j, i] = value[0]
    return block


def compare_in_torch(paired: Callable[[Any, Any], Tensor], a: Any, b: Any) -> Tensor:
    """Compute a block of distances without kernels: pair by pair if frames with rests are on the CPU."""
    if "rest" in a.parts and has_kernel(*a.parts.values(), *b.parts.values()):
        return pairs_in_torch(paired, a, b)
    return rows_in_torch(paired, a, b)


def squared_distances(x: Tensor, y: Tensor) -> tuple[Tensor, PairPrecision]:
    """Compute Σ_k (x[i, k] − y[j, k])² for all pairs, in the best way for their device.

    Parameters
    ----------
    x, y : Tensor of shape (n, k) and (m, k), float32 or float64
        Where ``x is y``, only i < j is computed and mirrored.

    Returns
    -------
    Tensor of shape (n, m), float64
        With gradients if the rows carry them. The relative error is at most
        :data:`~lsim.error_bounds.PROMISE`. On the CPU, the same bits whatever the other rows.
    PairPrecision
    """
    n, m, columns = len(x), len(y), x.shape[1]
    if carries_gradients(x, y):
        rows = [(row - y).square().sum(1, dtype=torch.float64) for row in x]
        return torch.stack(rows), directly(x, y)
    if not has_kernel(x, y):
        return squared_differences_in_torch(x, y)
    sums = all_pairs(squared_differences, n, m, x.numpy(), y.numpy(), symmetric=x is y, operations=columns)
    return sums, directly(x, y)


def directly(x: Tensor, y: Tensor) -> PairPrecision:
    """Make the record of sums over pairs of rows by the kernels, or by code as exact as these."""
    pairs = number_of_pairs(len(x), len(y), symmetric=x is y)
    return PairPrecision(DIRECTLY, PROMISE, _rounding_of_sum(2 * BLOCK, half_ulp(x.dtype)), pairs)


def _rounding_of_sum(terms: int, unit: float) -> float:
    """Bound the relative error of a sum of rounded absolute or squared differences."""
    return (CONFIDENCE * math.sqrt(terms) + 3) * unit
