"""How well distances rank frames: the published protocol, for use where data is made and metrics are trained.

The evaluation of whole archives, with intervals and all protocols, is :mod:`pipeline.correlate`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def pooled_spearman(distances: ArrayLike, ground_truth: ArrayLike) -> float:
    """Spearman's correlation over the pooled, scaled distances of some sequences.

    Each sequence's distances are scaled to [0.1, 1] first: only so can sequences be pooled (Kohl, Um,
    Thuerey, ICML 2020, section 6).

    Parameters
    ----------
    distances : array_like of shape (sequence, pair)
        Of the reference to the other frames.
    ground_truth : array_like of shape (sequence, pair) or (pair,)

    Returns
    -------
    float
        Sequences with NaN or constant distances are left out; NaN where that leaves none.
    """
    import scipy.stats

    values = np.asarray(distances, dtype=np.float64)
    truth = np.broadcast_to(np.asarray(ground_truth, dtype=np.float64), values.shape)
    low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
    usable = (np.isfinite(values).all(axis=1, keepdims=True) & (high > low))[:, 0]
    if not usable.any():
        return float("nan")
    scaled = 0.9 * ((values - low)[usable] / (high - low)[usable]) + 0.1
    return float(scipy.stats.spearmanr(scaled.ravel(), truth[usable].ravel()).statistic)
