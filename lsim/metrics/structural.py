"""Structural similarity (SSIM), computed as a difference.

1 − SSIM is what ranks simulations, and on frames that hardly differ SSIM is 1 to all digits. With window
means µ, variances σ² and constants C₁, C₂ (Wang et al. 2004, eq. 13)

    1 − SSIM = P + Q − P·Q,   P = (µx − µy)² / (µx² + µy² + C₁),   Q = var(x − y) / (σx² + σy² + C₂),

which loses nothing. µ and σ² are computed once per frame; a pair costs two running window sums of x − y.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lsim.metric import Embedding, Metric, MetricInfo
from lsim.pairs import FAST, all_pairs, has_kernel, rows_in_torch

WINDOW = 7
DATA_RANGE = 255.0
C1 = (0.01 * DATA_RANGE) ** 2
C2 = (0.03 * DATA_RANGE) ** 2
SAMPLE = WINDOW**2 / (WINDOW**2 - 1)
"""From the variance of a window's 49 values to the sample covariance that skimage takes by default."""


class SSIM(Metric):
    """1 − mean SSIM: uniform 7×7 window, sample covariance, data range 255, as skimage's default."""

    info = MetricInfo(
        title="1 − SSIM, uniform 7×7 window, data range 255",
        source="Wang, Bovik, Sheikh, Simoncelli 2004, eq. 13; skimage structural_similarity",
        minimum_size=WINDOW,
    )
    published_on_8bit = True

    def embed(self, frames: Tensor) -> Embedding:
        """Frames channel-first, window means and sample variances, without a rim of three pixels."""
        planes = frames.permute(0, 3, 1, 2).float().contiguous()
        if has_kernel(planes):
            mean, variance = window_moments(planes.numpy())
            return Embedding(
                {"frames": planes, "mean": torch.from_numpy(mean), "variance": torch.from_numpy(variance)}
            )
        exact = planes.double()
        mean = F.avg_pool2d(exact, WINDOW, 1)
        variance = SAMPLE * (F.avg_pool2d(exact.square(), WINDOW, 1) - mean.square())
        return Embedding({"frames": planes, "mean": mean.float(), "variance": variance.clamp(min=0).float()})

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        if not has_kernel(*a.parts.values(), *b.parts.values()):
            return rows_in_torch(self.paired, a, b)
        sides = [e.parts[name].numpy() for e in (a, b) for name in ("frames", "mean", "variance")]
        pixels = a.parts["frames"][0].numel()
        return all_pairs(one_minus_ssim, len(a), len(b), *sides, symmetric=a is b, operations=30 * pixels)

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        difference = (a.parts["frames"] - b.parts["frames"]).double()
        mean = F.avg_pool2d(difference, WINDOW, 1)
        variance = SAMPLE * (F.avg_pool2d(difference.square(), WINDOW, 1) - mean.square()).clamp(min=0)
        luminance = a.parts["mean"].double().square() + b.parts["mean"].double().square() + C1
        contrast = a.parts["variance"].double() + b.parts["variance"].double() + C2
        p, q = mean.square() / luminance, variance / contrast
        return (p + q - p * q).flatten(1).mean(1)


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def window_moments(planes):  # type: ignore[no-untyped-def]
    """Mean and sample variance in every 7×7 window of (n, channel, y, x) float32, both float32.

    The variance is taken about the window's first value: no digits are lost on a large offset.
    """
    n, channels, y, x = planes.shape
    height, width = y - WINDOW + 1, x - WINDOW + 1
    mean = np.empty((n, channels, height, width), np.float32)
    variance = np.empty((n, channels, height, width), np.float32)
    inverse = 1.0 / (WINDOW * WINDOW)
    sums = np.empty(x)
    squares = np.empty(x)
    for f in range(n):
        for c in range(channels):
            plane = planes[f, c]
            for r in range(height):
                offset = np.float64(plane[r, 0])
                sums[:] = 0
                squares[:] = 0
                for q in range(WINDOW):
                    row = plane[r + q]
                    for k in range(x):
                        value = row[k] - offset
                        sums[k] += value
                        squares[k] += value * value
                for k in range(width):
                    s = sums[k]
                    t = squares[k]
                    for q in range(1, WINDOW):
                        s += sums[k + q]
                        t += squares[k + q]
                    m = s * inverse
                    mean[f, c, r, k] = m + offset
                    variance[f, c, r, k] = max(SAMPLE * (t * inverse - m * m), 0.0)
    return mean, variance


@numba.njit(nogil=True, cache=True, fastmath=FAST)
def one_minus_ssim(i, j, out, x, x_mean, x_variance, y, y_mean, y_variance):  # type: ignore[no-untyped-def]
    """out[p] = 1 − SSIM of frames i[p] of x and j[p] of y, each (n, channel, y, x) float32."""
    channels, rows, columns = x.shape[1:]
    height, width = rows - WINDOW + 1, columns - WINDOW + 1
    inverse = 1.0 / (WINDOW * WINDOW)
    sums = np.empty(columns)
    squares = np.empty(columns)
    pair_sums = np.empty(columns)
    pair_squares = np.empty(columns)
    for p in range(i.shape[0]):
        total = 0.0
        for c in range(channels):
            a = x[i[p], c]
            b = y[j[p], c]
            a_mean = x_mean[i[p], c]
            b_mean = y_mean[j[p], c]
            a_variance = x_variance[i[p], c]
            b_variance = y_variance[j[p], c]
            # Column sums over seven rows run along y in double precision: a single-precision running sum
            # keeps the rounding error of large differences that have long left the window.
            sums[:] = 0
            squares[:] = 0
            for r in range(WINDOW - 1):
                for k in range(columns):
                    difference = np.float64(a[r, k]) - np.float64(b[r, k])
                    sums[k] += difference
                    squares[k] += difference * difference
            for r in range(height):
                for k in range(columns):
                    difference = np.float64(a[r + WINDOW - 1, k]) - np.float64(b[r + WINDOW - 1, k])
                    sums[k] += difference
                    squares[k] += difference * difference
                for k in range(columns - 1):
                    pair_sums[k] = sums[k] + sums[k + 1]
                    pair_squares[k] = squares[k] + squares[k + 1]
                for k in range(width):
                    mean = ((pair_sums[k] + pair_sums[k + 2]) + (pair_sums[k + 4] + sums[k + 6])) * inverse
                    square = (
                        (pair_squares[k] + pair_squares[k + 2]) + (pair_squares[k + 4] + squares[k + 6])
                    ) * inverse
                    mean_square = mean * mean
                    variance = max(SAMPLE * (square - mean_square), 0.0)
                    m = np.float64(a_mean[r, k])
                    n = np.float64(b_mean[r, k])
                    luminance = m * m + n * n + C1
                    contrast = np.float64(a_variance[r, k]) + np.float64(b_variance[r, k]) + C2
                    numerator = mean_square * contrast + variance * luminance - mean_square * variance
                    total += numerator / (luminance * contrast)
                for k in range(columns):
                    difference = np.float64(a[r, k]) - np.float64(b[r, k])
                    sums[k] -= difference
                    squares[k] -= difference * difference
        out[p] += total / (channels * height * width)
