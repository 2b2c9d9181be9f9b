"""Means over the pixels of two frames, with missing pixels and with weights: what metrics of pixels share.

``counted`` stands for the pixels of a pair that count: None if all count alike, bool if some may be
missing in either frame, weights in float64 if pixels are weighted. Values and ``counted`` have the shape
(pair, pixel, channel), or (pair, value); sums are over the second axis.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from lsim.embedding import Embedding, difference_of
from lsim.error_bounds import as_floats
from lsim.metric import Metric
from lsim.pairs import has_kernel, rows_in_torch
from lsim.rounding import of_difference, of_sum


class PixelMeans(Metric):
    """A metric of means over pixels; a frame is its own embedding, (n, pixel, channel)."""

    copies_to_compare = False
    shares_embedding = "values by pixel"
    takes_rest = True
    rest_of_units = False

    def embed(self, frames: Tensor) -> Embedding:
        """Keep the values by pixel: float32, or float64 where the frames are."""
        return Embedding({"values": as_floats(self._select_pixels(frames))})

    def embed_with_rest(self, frames: Tensor, rest: Tensor) -> Embedding:
        """Add the rest by pixel."""
        return Embedding(self.embed(frames).parts | {"rest": self._select_pixels(rest)})

    def _select_pixels(self, frames: Tensor) -> Tensor:
        """Select the pixels that the metric compares: (n, y, x, channel) → (n, pixel, channel)."""
        return frames.flatten(1, 2)

    @property
    def axioms(self) -> frozenset[str]:
        """Axioms, without those of three frames where every pair leaves out pixels of its own."""
        return super().axioms - {"triangle", "euclidean"} if self.preprocessing.mask else super().axioms

    def rounding(self, a: Embedding, b: Embedding, distances: Tensor) -> Tensor:
        """Bound a norm of the difference: by the norm of the errors, and by the rounding of the sum."""
        return of_difference(a, b, mean=True) + of_sum(distances, a.parts["values"].dtype)

    def _has_kernel(
        self, a: Embedding, b: Embedding, *, masked: bool = False, with_rest: bool = False
    ) -> bool:
        """Tell whether compiled kernels apply: without weights; and a mask, or rests, only where said."""
        if self.pixel_weights is not None or (self.preprocessing.mask and not masked):
            return False
        if "rest" in a.parts and not with_rest:
            return False
        return has_kernel(a.parts["values"], b.parts["values"])

    def _mean_size(self, a: Embedding, b: Embedding) -> Tensor:
        """Compute the root mean square of differences, or their largest where not all count alike: (n, m)."""

        def size(left: Embedding, right: Embedding) -> Tensor:
            difference = difference_of(left, right, "values").flatten(1).double()
            if self.preprocessing.mask or self.pixel_weights is not None:
                return difference.nan_to_num().abs().amax(1)
            return difference.square().mean(1).sqrt()

        return rows_in_torch(size, a, b)

    def find_counted(self, a: Embedding, b: Embedding) -> Tensor | None:
        """Find the pixels that count for pairs of frames: (pair, pixel, channel), see the module."""
        x, y = a.parts["values"], b.parts["values"]
        present = ~(x.isnan() | y.isnan()) if self.preprocessing.mask else None
        if self.pixel_weights is None:
            return present
        weights = self._select_pixels(self.pixel_weights.to(x.device)[None, ..., None])
        weights = weights.expand(max(len(x), len(y)), -1, x.shape[2])
        return weights if present is None else torch.where(present, weights, 0)


def in_rows(weights: Tensor | None) -> Tensor | None:
    """Flatten pixels and channels that count: (pair, pixel, channel) → (pair, value)."""
    return None if weights is None else weights.flatten(1)


def where_counted(values: Tensor, weights: Tensor | None) -> Tensor:
    """Put 0 for values that don't count; their gradients are 0, too."""
    return values if weights is None else torch.where(weights.bool(), values, 0)


def is_weighted(weights: Tensor | None) -> TypeGuard[Tensor]:
    """Tell whether pixels have weights.

    Examples
    --------
    >>> is_weighted(None), is_weighted(torch.tensor([True])), is_weighted(torch.tensor([0.5]))
    (False, False, True)
    """
    return weights is not None and weights.dtype != torch.bool


def sum_of(values: Tensor, weights: Tensor | None) -> Tensor:
    """Add up values, which are 0 where they don't count, by weight: (pair, 1, …)."""
    return (values * weights if is_weighted(weights) else values).sum(1, True)


def mean_of(values: Tensor, weights: Tensor | None) -> Tensor:
    """Average values, which are 0 where they don't count, by weight: (pair, 1, …).

    Examples
    --------
    >>> values = torch.tensor([[1.0, 0.0, 4.0]])
    >>> mean_of(values, torch.tensor([[True, False, True]])), mean_of(values, torch.tensor([[1.0, 0.0, 2.0]]))
    (tensor([[2.5000]]), tensor([[3.]]))
    """
    if weights is None:
        return values.mean(1, keepdim=True)
    return sum_of(values, weights) / weights.sum(1, True)
