"""Bounds on what floating point has done to frames on their way to a metric.

They come from the extremes that preprocessing knows anyway, so that they cost nothing. A value of [0, 255]
that is computed from x as 255·((x − lo)/(hi − lo)) is off by three roundings of its own and by that of
hi − lo; a spline or a bilinear mean is off by some of the largest |x|.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lsim.doubles import UNIT
from lsim.embedding import Embedding
from lsim.precision import half_ulp

FULL_SCALE = 255.0
OVERSHOOT = 2.5
"""How far a spline of samples leaves their middle, in halves of their range, at most."""

RELATIVE = 32
"""Roundings of a sum over pixels, in half ulps: they are spread over lanes and blocks."""


OF_NETWORK = 3
"""Rounding of features by which distances are off, against their length, in half ulps. Measured against
double precision: each frame's are off by 5 to 9, those of frames that hardly differ in the same way."""

OF_INPUT = 1
"""Change of features against their length, in errors of all values against 255: measured, 0.6 at most."""


class FrameRounding(NamedTuple):
    """Bounds on the error of each frame's values, in units of [0, 255]: (n,) float64 both.

    ``prepared``: what preparing has rounded. ``stored``: what the source's own floating dtype may have
    rounded before, which counts for metrics that are blind: a stored multiple of a field is not quite one.
    ``with_rest``: ``prepared`` for metrics that take the rest of values in double precision, too.
    """

    prepared: np.ndarray
    stored: np.ndarray
    with_rest: np.ndarray

    def of(self, frames: list[int]) -> FrameRounding:
        """Select frames."""
        return FrameRounding(*(bound[frames] for bound in self))


def bound_of_frames(
    lowest: np.ndarray,
    highest: np.ndarray,
    lo: np.ndarray,
    hi: np.ndarray,
    *,
    units: tuple[float, float, float],
    splines: int,
) -> FrameRounding:
    """Bound the error of frames that are normalised over the range from ``lo`` to ``hi``.

    Parameters
    ----------
    lowest, highest : ndarray of shape (n, channel), float64
        Extremes of each frame before it was resized.
    lo, hi : ndarray of shape (channel,), float64
    units : (float, float, float)
        Half an ulp of 1: of the source's dtype (0 for integers), of what is computed in, of the result.
    splines : int
        The order that values in floating point are resized by; 0 where they are not, or are only picked.

    Returns
    -------
    FrameRounding
        0 for frames without finite extremes.
    """
    of_source, of_work, of_result = units
    with np.errstate(all="ignore"):
        spread = hi - lo
        scale = np.where(spread > 0, FULL_SCALE / np.where(spread > 0, spread, 1), 0)
        if splines > 1:
            middle, half = (highest + lowest) / 2, (highest - lowest) / 2
            lowest, highest = middle - OVERSHOOT * half, middle + OVERSHOOT * half
        size = scale * np.maximum(np.abs(lowest - lo), np.abs(highest - lo))
        raw = scale * np.maximum(np.abs(lowest), np.abs(highest))
        prepared = 4 * of_work * size
        if of_result > of_work:
            prepared += of_result * np.exp2(np.floor(np.log2(size)))
        # Both ends of the range are resized values, too.
        resized = 2 * raw * (of_work + (8 if splines == 1 else 32) * 2.0**-53) if splines else 0.0
        bounds = (prepared + resized, of_source * raw, UNIT * size + resized)
        found = [np.nan_to_num(bound, nan=0, posinf=0, neginf=0).max(axis=1) for bound in bounds]
    return FrameRounding(*found)


def half_ulp_of(dtype: Any) -> float:
    """Return half an ulp of 1 in a dtype of NumPy or torch; 0 for integers."""
    if isinstance(dtype, torch.dtype):
        return float(torch.finfo(dtype).eps) / 2 if dtype.is_floating_point else 0.0
    return float(np.finfo(dtype).eps) / 2 if np.dtype(dtype).kind == "f" else 0.0


def on(device: torch.device, bound: np.ndarray) -> Tensor:
    """Move a bound to a device, in the precision that there is."""
    dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
    return torch.from_numpy(bound).to(device, dtype)


def of_each(embedding: Embedding, *, stored: bool = False) -> Tensor:
    """Bound the error of each frame's values in [0, 255], with that of the source if ``stored``: (n,)."""
    bounds = [embedding.rounding, embedding.stored if stored else None]
    known = [bound for bound in bounds if bound is not None]
    if not known:
        part = next(iter(embedding.parts.values()))
        return torch.zeros(len(part), dtype=torch.float64, device=part.device)
    return torch.stack(known).sum(0)


def of_difference(a: Embedding, b: Embedding, *, stored: bool = False) -> Tensor:
    """Bound the error of the difference of two frames' values, on [0, 1]: (len(a), len(b))."""
    return (of_each(a, stored=stored)[:, None] + of_each(b, stored=stored)) / FULL_SCALE


def of_sum(distances: Tensor, dtype: torch.dtype) -> Tensor:
    """Bound the rounding of distances that are sums over pixels in some precision."""
    return RELATIVE * half_ulp(dtype) * distances.abs()


def of_features_difference(a: Embedding, b: Embedding) -> Tensor:
    """Bound the error of the length of the difference of two frames' features: (len(a), len(b))."""
    x, y = (_of_features(side) for side in (a, b))
    return x[:, None] + y


def _of_features(embedding: Embedding) -> Tensor:
    """Bound the error of each frame's features, as a vector: (n,)."""
    features = embedding.parts["features"]
    lengths = embedding.once("lengths", lambda: torch.linalg.vector_norm(features, dim=1).double())
    return lengths * (OF_NETWORK * half_ulp(features.dtype) + OF_INPUT * of_each(embedding) / FULL_SCALE)
