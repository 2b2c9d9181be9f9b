"""Scores of an ensemble, all members of a model at once: fair CRPS, spread and skill, and energy scores.

A score is proper if the truth's own distribution has the least expected score; a fair one doesn't depend on
the number of members (Ferro 2014, doi 10.1002/qj.2270). A model of one member is a point forecast, without
any spread.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lsim.embedding import Embedding
from lsim.metric import Metric

CRPS, SPREAD, SKILL = "crps", "spread", "skill"
PIXEL_SCORES = (CRPS, SPREAD, SKILL)
ENERGY = "energy-"
"""Prefix of energy scores, before the name of the metric."""

VERSION = 1
"""Raised whenever scores change, so that stored ones are computed again."""


def score_pixels(members: np.ndarray, truth: np.ndarray, *, masked: bool = False) -> dict[str, np.ndarray]:
    """Score an ensemble by its values at each pixel, in their own units.

    Parameters
    ----------
    members : ndarray of shape (member, n, y, x, channel)
    truth : ndarray of shape (n, y, x, channel)
    masked : bool
        Leave out pixels that are NaN or infinite in any frame; otherwise such frames have no scores.

    Returns
    -------
    dict of str to ndarray of shape (n,), float64
        ``crps``: the mean over pixels and channels of mean |xᵢ − y| − ½ mean |xᵢ − xⱼ| with i ≠ j (fair form;
        Zamo & Naveau 2018, equation 5 of doi 10.1007/s11004-017-9709-7). ``spread``: the root of the mean
        variance of members (unbiased). ``skill``: the root mean square error of the members' mean.

    Examples
    --------
    >>> scores = score_pixels(np.array([1.0, 3.0]).reshape(2, 1, 1, 1, 1), np.zeros((1, 1, 1, 1)))
    >>> scores["crps"].item(), round(scores["spread"].item(), 3), scores["skill"].item()
    (1.0, 1.414, 2.0)
    """
    count, n = members.shape[:2]
    # Members in the last axis, less the truth: nothing is lost of small differences of large values.
    with np.errstate(invalid="ignore", over="ignore"):
        errors = np.moveaxis(members.astype(np.float64) - truth.astype(np.float64), 0, -1)
    errors = errors.reshape(n, -1, count)
    present = np.logical_and.reduce(np.isfinite(errors), axis=2)
    if masked:
        errors = np.where(present[..., None], errors, 0)
    weight = present / np.maximum(present.sum(axis=1, keepdims=True), 1)
    usable = present.any(axis=1) if masked else present.all(axis=1)

    def average(values: np.ndarray) -> np.ndarray:
        """Average over the pixels that count."""
        return np.where(usable, np.einsum("np,np->n", np.where(present, values, 0), weight), np.nan)

    with np.errstate(invalid="ignore", over="ignore"):
        middle = errors.mean(axis=2)
        variance = np.zeros_like(middle)
        distances = np.abs(errors).mean(axis=2)
        if count > 1:
            variance = np.square(errors - middle[..., None]).sum(axis=2) / (count - 1)
            # Sorted, the sum of |xᵢ − xⱼ| over pairs is a weighted sum.
            factors = 2.0 * np.arange(count) - (count - 1)
            distances = distances - (np.sort(errors, axis=2) * factors).sum(axis=2) / (count * (count - 1))
        return {
            CRPS: average(distances),
            SPREAD: np.sqrt(average(variance)),
            SKILL: np.sqrt(average(np.square(middle))),
        }


def score_energy(metric: Metric, members: Sequence[Embedding], truth: Embedding) -> np.ndarray:
    """Score an ensemble by its distances in the embedding of a metric.

    Parameters
    ----------
    metric : Metric
        With the axiom ``euclidean``: the score is proper.
    members : sequence of Embedding
        Of n frames each.
    truth : Embedding
        Of as many.

    Returns
    -------
    ndarray of shape (n,), float64
        2 · mean d(xᵢ, y) − mean d(xᵢ, xⱼ) with i ≠ j: the fair form of twice the energy score (Gneiting &
        Raftery 2007, equation 22 of doi 10.1198/016214506000001437).
    """
    count = len(members)
    energies = np.empty(len(truth))
    for k in range(len(truth)):
        # All frames at once: their distances cost far less than one by one.
        together = Embedding(
            {
                name: torch.stack([part[k], *(member.parts[name][k] for member in members)])
                for name, part in truth.parts.items()
            }
        )
        with torch.no_grad():
            block = metric.distance_block(together, together)
        distances = block.detach().double().cpu().numpy()
        between = distances[1:, 1:].sum() / max(count * (count - 1), 1)
        energies[k] = 2 * distances[0, 1:].mean() - between
    return energies
