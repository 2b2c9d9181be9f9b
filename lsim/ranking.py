"""How well distances rank frames: the published protocol, for use where data is made and metrics are trained.

The evaluation of whole archives, with intervals and all protocols, is :mod:`pipeline.correlate`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lsim.preprocess import as_array, as_frames


def may_be_constant(distances: np.ndarray, rounding: np.ndarray) -> bool:
    """Tell whether one value agrees with all distances, each known up to its rounding.

    The order of such distances is that of their rounding, and says nothing of the frames. Two values come
    into question:

    - Zero, which is exact, where no distance exceeds its own rounding r. A sequence with a single distance
      above its rounding has a signal.
    - Any other value, where a distance is above 2 r: it is known from the distances alone, and two of these
      differ by r from either side before their order is sure, max(d − r) > min(d + r). Without that floor a
      signal that rises from nothing to below 2 r would pass for a constant between the two.

    Parameters
    ----------
    distances : ndarray of shape (pair,)
        Finite, at least one.
    rounding : ndarray of shape (pair,), or a scalar array
        Bound on the error of each.

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
    """Tell whether frames differ from the first by nothing but rounding, as the metric ``l2`` has it.

    No metric has more to go by on such frames.

    Parameters
    ----------
    frames : array_like of shape (frame, y, x, channel)
    size : int or None, default 224
        Frames are resized to it.
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
    """Spearman's correlation over the pooled, scaled distances of some sequences.

    Each sequence's distances are scaled to [0.1, 1] first: only so can sequences be pooled (Kohl, Um,
    Thuerey, ICML 2020, section 6). Ground truth is compared in single precision, as published.

    Parameters
    ----------
    distances : sequence of array_like (pair,)
        Of the reference to the other frames, a row a sequence; rows may differ in length.
    ground_truth : sequence of array_like (pair,), or array_like (pair,)
        A row a sequence, or one for all.
    rounding : sequence of array_like (pair,), optional
        Bounds on the error of the distances, a row or a number for each sequence. Default: they are exact.

    Returns
    -------
    float
        Sequences are left out whose distances hold NaN or infinity, or cannot be told from a constant
        (:func:`may_be_constant`); NaN where that leaves none, and where the ground truth of the others holds
        NaN. What is masked counts as NaN.

    Raises
    ------
    ValueError
        Where a bound is NaN.
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
            raise ValueError("rounding: expected a bound for each distance, found NaN or masked ones")
        if np.isfinite(values).all() and not may_be_constant(values, error):
            low, high = values.min(), values.max()
            scaled.append(0.9 * ((values - low) / (high - low)) + 0.1)
            truths.append(as_array(truth).astype(np.float32))
    if not scaled:
        return float("nan")
    return float(scipy.stats.spearmanr(np.concatenate(scaled), np.concatenate(truths)).statistic)
