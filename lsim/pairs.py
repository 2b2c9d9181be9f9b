"""All-pairs sums of absolute and squared differences, exact for near-identical rows.

Differences are taken directly: |x|² + |y|² − 2xy loses every digit on frames that hardly differ, and
those are what simulations make. Rows are walked in blocks that stay in the first-level cache, summed in
single precision within a block and in double across blocks: exact for 8-bit values (256 · 255² < 2²⁴),
within 2e-7 otherwise. A pair is summed by one thread in one order, so the result does not depend on how
many threads there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from lsim.threads import in_threads

BLOCK = 256
"""Columns summed in single precision: few enough that squares of 8-bit differences add exactly."""

# Not the whole of fastmath: NaN and infinity have to stay what they are.
FAST = {"reassoc", "contract", "arcp", "nsz"}

PairKernel = Callable[..., None]


THREADED_FROM = 1 << 25
"""Operations that a second thread is worth: handing over to it takes as long as a tenth of these."""


def _sum_over_columns(squared: bool) -> PairKernel:
    """Compile ``out[p] += Σ_k |x[i[p], k] − y[j[p], k]|``, or the sum of squares.

    Every pair is summed in the same order, whichever others are computed with it. Tiles in registers
    would save a fifth for eleven rows, and give that up at their edges.
    """

    @numba.njit(nogil=True, cache=True, fastmath=FAST)
    def kernel(i, j, out, x, y):  # type: ignore[no-untyped-def]
        for start in range(0, x.shape[1], BLOCK):
            stop = min(start + BLOCK, x.shape[1])
            for p in range(i.shape[0]):
                a = x[i[p], start:stop]
                b = y[j[p], start:stop]
                total = np.float32(0)
                for k in range(stop - start):
                    difference = a[k] - b[k]
                    total += difference * difference if squared else abs(difference)
                out[p] += total

    return kernel


squared_differences = _sum_over_columns(squared=True)
"""``kernel(i, j, out, x, y)``: out[p] += Σ_k (x[i[p], k] − y[j[p], k])² for float32 rows."""

absolute_differences = _sum_over_columns(squared=False)
"""``kernel(i, j, out, x, y)``: out[p] += Σ_k |x[i[p], k] − y[j[p], k]| for float32 rows."""


def all_pairs(
    kernel: PairKernel, n: int, m: int, *arguments: Any, symmetric: bool, operations: int
) -> Tensor:
    """Run a pair kernel over every pair, in as many threads as torch uses.

    Parameters
    ----------
    kernel : callable
        ``kernel(i, j, out, *arguments)`` adds to ``out[p]`` for the pair (i[p], j[p]); releases the GIL.
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
    i, j = np.triu_indices(n, 1) if symmetric else (a.ravel() for a in np.indices((n, m)))
    values = np.zeros(len(i))
    threads = max(1, min(torch.get_num_threads(), len(i), len(i) * operations // THREADED_FROM))
    if threads == 1:
        kernel(i, j, values, *arguments)
    else:
        bounds = np.linspace(0, len(i), threads + 1).astype(int)
        parts = [
            (i[start:stop], j[start:stop], values[start:stop], *arguments)
            for start, stop in itertools.pairwise(bounds)
        ]
        in_threads(lambda part: kernel(*part), parts)
    out = np.zeros((n, m))
    out[i, j] = values
    if symmetric:
        out[j, i] = values
    return torch.from_numpy(out)


def has_kernel(*tensors: Tensor) -> bool:
    """Whether the compiled kernels apply: on the CPU, and to tensors that carry no gradients."""
    return all(tensor.device.type == "cpu" and not tensor.requires_grad for tensor in tensors)


def rows_in_torch(paired: Callable[[Any, Any], Tensor], a: Any, b: Any) -> Tensor:
    """The (len(a), len(b)) block of distances, row by row, from an elementwise formula in torch.

    The way for devices without a compiled kernel; memory is that of one row.
    """
    return torch.stack([paired(a[k : k + 1], b) for k in range(len(a))])
