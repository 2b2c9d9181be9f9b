"""Metrics of pixel differences: L1, L2 and PSNR, on [0, 1] after the common normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from lsim.metric import Embedding, Metric, MetricInfo
from lsim.pairs import absolute_differences, all_pairs, has_kernel, rows_in_torch, squared_differences

FULL_SCALE = 255.0


class _PixelMetric(Metric):
    """The frame is its own embedding, flattened."""

    def embed(self, frames: Tensor) -> Embedding:
        return Embedding({"values": frames.flatten(1).float()})


class L1(_PixelMetric):
    """Mean absolute difference, on [0, 1]."""

    info = MetricInfo(
        title="mean absolute difference",
        source="1/N Σ |a − b|",
        axioms=frozenset({"non-negative", "symmetric", "zero-on-itself", "triangle"}),
    )

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        x, y = a.parts["values"], b.parts["values"]
        if not has_kernel(x, y):
            return rows_in_torch(self.paired, a, b)
        sides = (x.numpy(), y.numpy())
        sums = all_pairs(
            absolute_differences, len(x), len(y), *sides, symmetric=a is b, operations=x.shape[1]
        )
        return sums / (x.shape[1] * FULL_SCALE)

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        return (a.parts["values"] - b.parts["values"]).abs().double().mean(1) / FULL_SCALE


class L2(_PixelMetric):
    """Mean squared difference, on [0, 1]; the publications around LSiM call it L2."""

    info = MetricInfo(title="mean squared difference", source="1/N Σ (a − b)²; skimage mean_squared_error")
    published_on_8bit = True

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        return _mean_squared(self, a, b)

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        return _mean_squared_paired(a, b)


class PSNR(_PixelMetric):
    """Negated peak signal-to-noise ratio in dB for a data range of 255; −inf for identical frames."""

    info = MetricInfo(
        title="negated peak signal-to-noise ratio, data range 255",
        source="10 log₁₀ MSE for values on [0, 1]; skimage peak_signal_noise_ratio",
        axioms=frozenset({"symmetric"}),
        distance_to_itself=-float("inf"),
    )
    published_on_8bit = True

    def compare(self, a: Embedding, b: Embedding) -> Tensor:
        return _decibel(_mean_squared(self, a, b))

    def paired(self, a: Embedding, b: Embedding) -> Tensor:
        return _decibel(_mean_squared_paired(a, b))


def _mean_squared(metric: Metric, a: Embedding, b: Embedding) -> Tensor:
    x, y = a.parts["values"], b.parts["values"]
    if not has_kernel(x, y):
        return rows_in_torch(_mean_squared_paired, a, b)
    sides = (x.numpy(), y.numpy())
    sums = all_pairs(squared_differences, len(x), len(y), *sides, symmetric=a is b, operations=x.shape[1])
    return sums / (x.shape[1] * FULL_SCALE**2)


def _mean_squared_paired(a: Embedding, b: Embedding) -> Tensor:
    return (a.parts["values"] - b.parts["values"]).square().double().mean(1) / FULL_SCALE**2


def _decibel(squared: Tensor) -> Tensor:
    positive = squared > 0
    logarithm = 10 * torch.log10(torch.where(positive, squared, 1))
    # Through `where`, the gradient at identical frames is 0 instead of infinite; NaN stays NaN.
    return torch.where(squared.isnan(), squared, torch.where(positive, logarithm, -float("inf")))
