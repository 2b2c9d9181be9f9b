"""Bounds on the rounding of frames on their way to a metric, and of distances.

They come from the extremes that preprocessing computes anyway, so that they cost nothing. A value of [0, 255]
that is computed from x as 255·((x − lo)/(hi − lo)) is off by three roundings of its own and by that of
hi − lo; a spline or a bilinear mean is off by some of the largest |x|.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lsim.doubles import UNIT
from lsim.embedding import Embedding, difference_of
from lsim.error_bounds import half_ulp

FULL_SCALE = 255.0
OVERSHOOT = 2.5
"""Bound on how far a spline of samples leaves their middle, in halves of their range."""

SAMPLES = 256
"""Pixels of a channel by which repeated values are counted."""

LARGEST_WITH_REST = 1e298
"""Normalised values beyond it have no rest, see :func:`lsim.normalise.find_rest`."""

MEASURED = 1e-3
"""Rounding of a frame's root mean square, in single precision."""

RELATIVE = 32
"""Roundings of a sum over pixels, in half ulps: they are spread over lanes and blocks."""


OF_NETWORK = 3
"""Rounding of features by which distances are off, against their length, in half ulps. Measured against
double precision: each frame's are off by 5 to 9, those of frames that hardly differ in the same way."""

OF_INPUT = 1
"""Change of features against their length, in errors of all values against 255: measured, 0.6 at most."""


class FrameRounding(NamedTuple):
    """Bounds on the error of each frame's values, in units of [0, 255]: (n,) float64 each.

    Attributes
    ----------
    prepared : ndarray
        Rounding of preparing.
    stored : ndarray
        Rounding of the source's floating dtype, which counts for metrics that are blind to a change: a stored
        multiple of a field is not exactly a multiple.
    relative, resized : ndarray
        The two parts of ``prepared``: a share of each value, and an error of any value.
    with_rest : ndarray
        ``prepared`` for metrics that also take the rest of values in double precision.
    """

    prepared: np.ndarray
    stored: np.ndarray
    relative: np.ndarray
    resized: np.ndarray
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
    rounded: bool = False,
) -> FrameRounding:
    """Bound the error of frames that are normalised over the range from ``lo`` to ``hi``.

    Parameters
    ----------
    lowest, highest : ndarray of shape (n, channel), float64
        Extremes of each frame before it was resized.
    lo, hi : ndarray of shape (channel,), float64
    units : (float, float, float)
        Half an ulp of 1: of the source's dtype (0 for integers), of the computation, of the result.
    splines : int
        Order of the spline that resizes values in floating point; 0 if none is interpolated.
    rounded : bool
        Values were integers that double precision rounds.

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
        relative = 4 * of_work
        if of_result > of_work:
            prepared += of_result * np.exp2(np.floor(np.log2(size)))
            relative += of_result
        # Both ends of the range are resized values, too.
        resized = 2 * raw * (of_work + (8 if splines == 1 else 32) * 2.0**-53) if splines else 0 * raw
        if rounded:
            resized = resized + 2.0**-52 * raw
        shares = np.full_like(raw, relative)
        with_rest = np.where(size < LARGEST_WITH_REST, UNIT * size, prepared)
        parts = (prepared + resized, of_source * raw, shares, resized, with_rest + resized)
        bounds = [np.nan_to_num(part, nan=0, posinf=0, neginf=0).max(axis=1) for part in parts]
    return FrameRounding(*bounds)


def half_ulp_of(dtype: Any) -> float:
    """Return half an ulp of 1 in a dtype of NumPy or torch; 0 for integers.

    Examples
    --------
    >>> half_ulp_of(np.float32) == 2.0**-24, half_ulp_of(torch.int16)
    (True, 0.0)
    """
    if isinstance(dtype, torch.dtype):
        return float(torch.finfo(dtype).eps) / 2 if dtype.is_floating_point else 0.0
    return float(np.finfo(dtype).eps) / 2 if np.dtype(dtype).kind == "f" else 0.0


def move_bound(device: torch.device, bound: np.ndarray) -> Tensor:
    """Move a bound to a device, in the best precision that it has."""
    dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
    return torch.from_numpy(bound).to(device, dtype)


def of_mean_square(values: Tensor, bound: FrameRounding) -> np.ndarray:
    """Bound the root mean square, over a frame, of the rounding of preparing: (n,) float64.

    The root mean square of the values times the relative part, plus the absolute part. Where values are
    missing, the largest error.

    Parameters
    ----------
    values : Tensor of shape (n, y, x, channel)
        Prepared frames.
    bound : FrameRounding
    """
    sizes = torch.linalg.vector_norm(values.flatten(1), dim=1).double() / values[0].numel() ** 0.5
    size = sizes.cpu().numpy()
    with np.errstate(invalid="ignore"):
        mean = bound.relative * size * (1 + MEASURED) + bound.resized
    return np.where(mean < bound.prepared, mean, bound.prepared)  # also if the mean is NaN


def of_each(embedding: Embedding, *, stored: bool = False, mean: bool = False) -> Tensor:
    """Bound the error of each frame's values in [0, 255], with that of the source if ``stored``: (n,).

    The largest error; with ``mean``, the root mean square over the frame, if it is known.
    """
    prepared = embedding.rounding
    if mean and embedding.mean_rounding is not None:
        prepared = embedding.mean_rounding
    bounds = [bound for bound in (prepared, embedding.stored if stored else None) if bound is not None]
    if not bounds:
        part = next(iter(embedding.parts.values()))
        return torch.zeros(len(part), dtype=torch.float64, device=part.device)
    return bounds[0] if len(bounds) == 1 else bounds[0] + bounds[1]


def of_difference(a: Embedding, b: Embedding, *, stored: bool = False, mean: bool = False) -> Tensor:
    """Bound the error of the difference of two frames' values, on [0, 1]: (len(a), len(b)).

    As :func:`of_each`; with ``mean``, the root mean square of the error of differences.
    """
    x = of_each(a, stored=stored, mean=mean) / FULL_SCALE
    y = x if a is b else of_each(b, stored=stored, mean=mean) / FULL_SCALE
    return x[:, None] + y


def share_of_equals(planes: Tensor) -> Tensor:
    """Estimate the share of a frame, by its squares, whose values equal that of a pixel: (n,) float64.

    One over the number of pixels if no value repeats, one if all are equal. Equal values have equal errors,
    and errors of unequal ones are assumed to be independent (Higham & Mary 2019): the share is the ratio of
    the square of the mean error to the mean of the squares.

    Parameters
    ----------
    planes : Tensor of shape (n, channel, y, x)
        The largest share of the channels counts. A sample of the pixels is taken.

    Examples
    --------
    >>> import torch
    >>> share_of_equals(torch.ones(1, 1, 8, 8)).item()
    1.0
    >>> share_of_equals(torch.arange(1.0, 65).view(1, 1, 8, 8)).item() < 0.03
    True
    """
    values = planes.detach().flatten(2)
    step = values.shape[2] // SAMPLES | 1  # odd, so that it walks through all columns
    sample = values[:, :, ::step].double().clamp(min=0).sort(2).values
    count = sample.shape[2]
    is_last = torch.ones_like(sample, dtype=torch.bool)
    is_last[:, :, :-1] = sample[:, :, 1:] != sample[:, :, :-1]
    place = torch.arange(count, device=sample.device).expand(sample.shape)
    last = torch.where(is_last, place, -1).cummax(2).values
    previous_last = torch.cat([torch.full_like(last[:, :, :1], -1), last[:, :, :-1]], 2)
    runs = torch.where(is_last, place - previous_last, 0)
    squares = sample.square()
    total = squares.sum(2)
    # Pairs of different pixels of the sample, and each with itself.
    repeated = (runs * (runs - 1) * squares).sum(2) / max(count - 1, 1)
    share = repeated / torch.where(total > 0, total, 1) + 1 / values.shape[2] + 1 / count**2
    return torch.where(total > 0, share, 1).clamp(max=1).amax(1)


def of_sum(distances: Tensor, dtype: torch.dtype) -> Tensor:
    """Bound the rounding of distances that are sums over pixels in some precision."""
    return RELATIVE * half_ulp(dtype) * distances.abs()


def size_of_difference(a: Embedding, b: Embedding) -> Tensor:
    """Compute the root mean square of the difference of each pair's frames, on [0, 1]: (pair,).

    What is computed from differences, values and then rests, is rounded in proportion to them.
    """
    return difference_of(a, b, "frames").square().mean((1, 2, 3)).sqrt() / FULL_SCALE


def of_features_difference(a: Embedding, b: Embedding) -> Tensor:
    """Bound the error of the length of the difference of two frames' features: (len(a), len(b))."""
    x, y = (_of_features(side) for side in (a, b))
    return x[:, None] + y


def _of_features(embedding: Embedding) -> Tensor:
    """Bound the error of each frame's features, as a vector: (n,)."""
    features = embedding.parts["features"]
    lengths = embedding.once("lengths", lambda: torch.linalg.vector_norm(features, dim=1).double())
    return lengths * (OF_NETWORK * half_ulp(features.dtype) + OF_INPUT * of_each(embedding) / FULL_SCALE)
