"""How well distances rank frames: the published protocol, for use where data is made and metrics are trained.

The evaluation of whole archives, with intervals and all protocols, is :mod:`pipeline.correlate`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def pooled_spearman(distances: Sequence[ArrayLike], ground_truth: Sequence[ArrayLike] | np.ndarray) -> float:
    """Spearman's correlation over the pooled, scaled distances of some sequences.

    Each sequence's distances are scaled to [0.1, 1] first: only so can sequences be pooled (Kohl, Um,
    Thuerey, ICML 2020, section 6). Ground truth is compared in single precision, as published.

    Parameters
    ----------
    distances : sequence of array_like (pair,)
        Of the reference to the other frames, a row a sequence; rows may differ in length.
    ground_truth : sequence of array_like (pair,), or array_like (pair,)
        A row a sequence, or one for all.

    Returns
    -------
    float
        Sequences with NaN or constant distances are left out; NaN where that leaves none.
    """
    import scipy.stats

    shared = all(np.ndim(value) == 0 for value in ground_truth)
    scaled, truths = [], []
    for row, truth in zip(
        distances, [ground_truth] * len(distances) if shared else ground_truth, strict=True
    ):
        values = np.asarray(row, dtype=np.float64)
        low, high = values.min(), values.max()
        if np.isfinite(values).all() and high > low:
            scaled.append(0.9 * ((values - low) / (high - low)) + 0.1)
            truths.append(np.asarray(truth, dtype=np.float32))
    if not scaled:
        return float("nan")
    return float(scipy.stats.spearmanr(np.concatenate(scaled), np.concatenate(truths)).statistic)
