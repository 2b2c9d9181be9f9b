"""Variation of information between the value histograms of two frames.

For joint and marginal histograms of 8-bit values the mean of the two conditional entropies is
½ (H(x|y) + H(y|x)) = H(x, y) − ½ (H(x) + H(y)), in bits (Meilă 2007). Marginals are counted once per
frame; a pair costs one joint histogram.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from lsim.metric import Embedding, Metric, MetricInfo
from lsim.pairs import all_pairs

LEVELS = 256


class VariationOfInformation(Metric):
    """Mean of the two conditional entropies of 8-bit values, in bits; truncates to 8 bit in every mode."""

    info = MetricInfo(
        title="variation of information of 8-bit values, mean of both conditional entropies, in bits",
        source="Meilă 2007; skimage variation_of_information",
        differentiable=False,
        axioms=frozenset({"non-negative", "symmetric", "zero-on-itself", "triangle"}),
    )
    published_on_8bit = True

    @property
    def quantised(self) -> bool:
        """Always: entropies are those of 8-bit values."""
        return True

    def embed(self, frames: Tensor) -> Embedding:
        # In NumPy: torch's threads would go on spinning for a while, on the cores that compare.
        flat = frames.detach().flatten(1).cpu().numpy()
        with np.errstate(invalid="ignore"):
            values = flat.astype(np.uint8)
        counts = np.stack([np.bincount(frame, minlength=LEVELS) for frame in values])
        # Σ c log₂ c over the levels, from the table that the joint histogram uses too and added up in the
        # same order: then the distance of identical frames is exactly zero.
        sums = _count_logs(values.shape[1])[counts].cumsum(axis=1)[:, -1]
        # Of values in [0, 255] the sum is finite exactly where all of them are.
        sums[~np.isfinite(flat.sum(axis=1))] = np.nan
        return Embedding({"values": torch.from_numpy(values), "marginal": torch.from_numpy(sums)})

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        table = _count_logs(a.parts["values"].shape[1])
        sides = [e.parts[name].numpy() for e in (a, b) for name in ("values", "marginal")]
        pixels = a.parts["values"].shape[1]
        return all_pairs(
            variation_of_information, len(a), len(b), *sides, table, symmetric=a is b, operations=10 * pixels
        )


def _count_logs(pixels: int) -> np.ndarray:
    """c log₂ c for every count c up to the number of pixels: (pixels + 1,) float64."""
    counts = np.arange(pixels + 1, dtype=np.float64)
    counts[1:] *= np.log2(counts[1:])
    return counts


@numba.njit(nogil=True, cache=True)
def variation_of_information(i, j, out, x, x_marginal, y, y_marginal, count_logs):  # type: ignore[no-untyped-def]
    """out[p] for frames i[p] of x and j[p] of y, each (n, pixels) uint8, with Σ c log₂ c per frame.

    H = log₂ N − Σ c log₂ c / N cancels the logarithm: N·VI = ½ (Σx + Σy) − Σxy.
    """
    pixels = x.shape[1]
    half = pixels // 2
    # Two tables break the chain of one increment waiting for the last one's store.
    first = np.zeros(LEVELS * LEVELS, np.int32)
    second = np.zeros(LEVELS * LEVELS, np.int32)
    for p in range(i.shape[0]):
        a = x[i[p]]
        b = y[j[p]]
        first[:] = 0
        second[:] = 0
        for k in range(half):
            first[(np.int64(a[k]) << 8) | np.int64(b[k])] += 1
            second[(np.int64(a[k + half]) << 8) | np.int64(b[k + half])] += 1
        for k in range(2 * half, pixels):
            first[(np.int64(a[k]) << 8) | np.int64(b[k])] += 1
        joint = 0.0
        for level in range(LEVELS * LEVELS):
            count = first[level] + second[level]
            if count > 0:
                joint += count_logs[count]
        value = (0.5 * (x_marginal[i[p]] + y_marginal[j[p]]) - joint) / pixels
        out[p] += 0.0 if value < 0 else value  # NaN stays NaN
