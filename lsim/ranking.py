"""Rank correlation of distances by the published protocol, for simulated data and training.

The evaluation of whole archives, with intervals and all protocols, is :mod:`pipeline.correlate`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lsim.preprocess import as_array, as_frames


def may_be_constant(distances: np.ndarray, rounding: np.ndarray) -> bool:
    """Tell whether one value agrees with all distances, each known up to its rounding.

    The order of such distances comes from rounding alone, not from the frames. Two kinds of values are
    considered:

    - Zero, which is exact: it agrees if no distance exceeds its own rounding r. A sequence with a single
      distance above its rounding has a signal.
    - Any other value, if a distance is above 2 r. Such a value is known from the distances alone, and the
      order of two of them is certain only if max(d − r) > min(d + r). Without the floor of 2 r, a signal that
      rises from zero to below 2 r would pass for a constant in between.


    Parameters
    ----------
    distances : ndarray of shape (pair,)
        Finite, at least one.
    rounding : ndarray of shape (pair,), or a scalar array
        Bound on the error of each distance.

    Returns
    -------
    bool
        True if such a value exists.

    Examples
    --------
    >>> import numpy as np
    >>> rounding = np.array([1e-14, 1e-14])
    >>> may_be_constant(np.array([2e-15, 9e-15]), rounding)
    True
    >>> may_be_constant(np.array([2e-15, 1.1e-14]), rounding)
    False
    >>> may_be_constant(np.array([0.5, 0.5 + 1.5e-14]), rounding)
    True
    """
    sizes = np.abs(distances)
    if (sizes <= rounding).all():
        return True
    if not (sizes > 2 * rounding).any():
        return False
    return bool((distances - rounding).max() <= (distances + rounding).min())


def differ_by_rounding(frames: ArrayLike, size: int | None = 224) -> bool:
    """Tell whether frames differ from the first only by rounding, according to the metric ``l2``.

    No metric can rank such frames.

    Parameters
    ----------
    frames : array_like of shape (frame, y, x, channel)
    size : int or None, default 224
        Side to which frames are resized.
    """
    from lsim.registry import load_metric

    metric = load_metric("l2", device="cpu", size=size)
    prepared = metric.prepare(as_frames(frames), "sequence")
    distances, rounding = metric.from_reference_with_rounding(prepared)
    return bool(np.isfinite(distances).all()) and may_be_constant(distances[1:], rounding[1:])


def pooled_spearman(
    distances: Sequence[ArrayLike],
    ground_truth: Sequence[ArrayLike] | np.ndarray,
    rounding: Sequence[ArrayLike] | None = None,
) -> float:
    """Compute Spearman's correlation over the pooled, scaled distances of several sequences.

    Each sequence's distances are first scaled to [0.1, 1], which makes sequences comparable (Kohl, Um,
    Thuerey, ICML 2020, section 6). Ground truth is compared in single precision, as published.

    Parameters
    ----------
    distances : sequence of array_like (pair,)
        Distances of the reference to the other frames, one row per sequence; rows may differ in length.
    ground_truth : sequence of array_like (pair,), or array_like (pair,)
        One row per sequence, or one for all.
    rounding : sequence of array_like (pair,), optional
        Bounds on the error of the distances, a row or a number per sequence. Default: exact distances.

    Returns
    -------
    float
        Sequences are left out if their distances hold NaN or infinity, or may be constant
        (:func:`may_be_constant`). NaN if none is left, or if the ground truth of the others holds NaN. Masked
        values count as NaN.

    Raises
    ------
    ValueError
        When a bound is NaN.
    """
    import scipy.stats

    shared = all(np.ndim(value) == 0 for value in ground_truth)
    scaled, truths = [], []
    for row, truth, bound in zip(
        distances,
        [ground_truth] * len(distances) if shared else ground_truth,
        [0.0] * len(distances) if rounding is None else rounding,
        strict=True,
    ):
        values, error = (as_array(part).astype(np.float64) for part in (row, bound))
        if np.isnan(error).any():
            raise ValueError("rounding: expected a bound for each distance, found NaN or masked values")
        if np.isfinite(values).all() and not may_be_constant(values, error):
            low, high = values.min(), values.max()
            scaled.append(0.9 * ((values - low) / (high - low)) + 0.1)
            truths.append(as_array(truth).astype(np.float32))
    if not scaled:
        return float("nan")
    return float(scipy.stats.spearmanr(np.concatenate(scaled), np.concatenate(truths)).statistic)
