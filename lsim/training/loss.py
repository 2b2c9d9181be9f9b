"""The training loss: distances should equal the ground truth, and above all rank frames as it does.

Kohl, Um, Thuerey, ICML 2020, section 4.3: L = λ₁ · mean (d − c)² + λ₂ · ½ (1 − r), with the distances d, the
ground truth c, and Pearson's correlation r of the two over one sequence; λ₁ = 0.3, λ₂ = 0.7.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LossTerms(NamedTuple):
    """The loss of one sequence and its terms, each a scalar tensor."""

    total: Tensor
    squared_error: Tensor
    correlation: Tensor


def sequence_loss(
    distances: Tensor,
    ground_truth: Tensor,
    correlated: Tensor,
    squared_error_weight: float = 0.3,
    correlation_weight: float = 0.7,
) -> LossTerms:
    """Compute the loss of the distances within one sequence.

    Parameters
    ----------
    distances, ground_truth : Tensor of shape (pair,)
    correlated : Tensor of bool, shape (pair,)
        Pairs over which the correlation is taken; as published, pairs with the reference.
    squared_error_weight, correlation_weight : float
        λ₁ and λ₂.

    Returns
    -------
    LossTerms
        The correlation of constant distances is 0, with a finite gradient.
    """
    squared_error = (distances - ground_truth).square().mean()
    correlation = pearson(distances[correlated], ground_truth[correlated])
    total = squared_error_weight * squared_error + correlation_weight * 0.5 * (1 - correlation)
    return LossTerms(total, squared_error, correlation)


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Compute Pearson's correlation of two vectors; 0 where one is constant."""
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / torch.sqrt(x.square().sum() * y.square().sum() + 1e-12)
