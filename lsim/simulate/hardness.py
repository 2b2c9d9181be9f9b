"""Hardness of families, and the search for the step of the varied parameter that gives a certain hardness.

Hardness is measured by how well the mean squared error ranks the frames of a family: the pooled Spearman
correlation of the published protocol. Near 1 any metric ranks them; near 0 the noise hides the variation. On
most of the published data it is 0.6 to 0.8 (Kohl, Um, Thuerey, ICML 2020, table 1).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from lsim.preprocess import preprocess
from lsim.ranking import differ_by_rounding, pooled_spearman

from .families import Families, ground_truth, make, torch_threads
from .recipe import Recipe

TARGET = (0.6, 0.8)
"""Range of hardness of most published classes."""


def reference_errors(frames: ArrayLike, size: int | None = 224) -> np.ndarray:
    """Compute the mean squared error of each frame against the reference, as the metric ``l2`` does.

    Parameters
    ----------
    frames : array_like of shape (frame, y, x, channel)
    size : int or None, default 224
        Side to which frames are resized.

    Returns
    -------
    ndarray of shape (frame - 1,), float64
        For values scaled to [0, 1], jointly over all frames, for each channel.
    """
    scaled = preprocess(frames, size=size).astype(np.float64) / 255
    return np.asarray(((scaled[1:] - scaled[0]) ** 2).mean(axis=(1, 2, 3)))


def rounding_of_errors(frames: ArrayLike, size: int | None = 224) -> float:
    """Bound the rounding of :func:`reference_errors`: infinity if frames differ by nothing else, or 0."""
    return math.inf if differ_by_rounding(frames, size) else 0.0


def hardness(families: Families, size: int | None = 224) -> dict[str, float]:
    """Compute the pooled Spearman correlation of the mean squared error with the ground truth, by field.

    Parameters
    ----------
    families : Families
    size : int or None, default 224
        Side to which frames are resized.

    Returns
    -------
    dict of str to float
        Hardness by field. With 8 families it scatters by 0.1 and more; use 60 or more.
    """
    truth = families.parameter[1:]
    return {
        field: pooled_spearman(
            [reference_errors(frames, size) for frames in field_frames],
            truth,
            [rounding_of_errors(frames, size) for frames in field_frames],
        )
        for field, field_frames in families.frames.items()
    }


@dataclass(frozen=True)
class Calibration:
    """Result of :func:`calibrate_step`.

    Attributes
    ----------
    factor : float
        Factor for all steps of the recipe.
    hardness : float
        Hardness at this factor, pooled over all fields.
    reached : bool
        True if that is within the target.
    evaluations : tuple of (float, float)
        Evaluated factors with the hardness of each, in order.
    """

    factor: float
    hardness: float
    reached: bool
    evaluations: tuple[tuple[float, float], ...]


def calibrate_step(
    recipe: Recipe,
    target: tuple[float, float] = TARGET,
    *,
    families: int | Sequence[int] = 12,
    size: int = 128,
    seed: int = 0,
    bounds: tuple[float, float] = (1 / 8, 8.0),
    most: int = 8,
) -> Calibration:
    """Search one factor for all steps of a recipe that brings its hardness into a target range.

    Longer steps make families easier. The factor 1 is evaluated first, so a recipe within the target costs
    one evaluation. Then it is halved or doubled up to a bound, and once the target lies between two factors,
    their geometric mean is taken. All evaluations use the same references and noise, and differ by the steps
    alone.

    Parameters
    ----------
    recipe : Recipe
    target : (float, float), default (0.6, 0.8)
        Least and greatest hardness.
    families : int or sequence of int, default 12
        Number of families per evaluation, or their numbers. With so few the result is approximate.
    size : int, default 128
        Pixels along y and x.
    seed : int, default 0
    bounds : (float, float), default (1/8, 8)
        Least and greatest factor, around 1.
    most : int, default 8
        Largest number of evaluations.

    Returns
    -------
    Calibration
        The factor whose hardness is nearest to the target's middle.

    Raises
    ------
    ValueError
        When target, bounds or ``most`` are not as described.
    DegenerateFamilyError
        When a family is degenerate in every draw.
    """
    low, high = target
    if not -1 <= low < high <= 1:
        raise ValueError(f"target must be two rising numbers in [-1, 1], got {target}")
    if not 0 < bounds[0] <= 1 <= bounds[1]:
        raise ValueError(f"bounds must be positive with 1 between them, got {bounds}")
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    numbers = list(range(1, families + 1)) if isinstance(families, int) else list(families)
    evaluations: list[tuple[float, float]] = []

    def is_too_easy(factor: float) -> bool | None:
        """Evaluate a factor; None within the target."""
        correlation = _hardness_at(recipe, factor, numbers, size, seed)
        evaluations.append((factor, correlation))
        return None if low <= correlation <= high else correlation > high

    starts_too_easy = too_easy = is_too_easy(1.0)
    near, far = 1.0, math.nan  # factors on either side of the target, once there are both
    bound = bounds[0] if starts_too_easy else bounds[1]
    while too_easy is not None and len(evaluations) < most and near != bound:
        if math.isnan(far):
            factor = max(near / 2, bound) if starts_too_easy else min(near * 2, bound)
        else:
            factor = math.sqrt(near * far)
        too_easy = is_too_easy(factor)
        if too_easy is starts_too_easy:
            near = factor
        else:
            far = factor
    middle = (low + high) / 2
    best, correlation = min(evaluations, key=lambda evaluation: abs(evaluation[1] - middle))
    return Calibration(best, correlation, low <= correlation <= high, tuple(evaluations))


def _hardness_at(recipe: Recipe, factor: float, numbers: Sequence[int], size: int, seed: int) -> float:
    """Measure the hardness over all fields together, as in the published tables."""
    scaled = dataclasses.replace(
        recipe,
        variations={
            name: dataclasses.replace(variation, step=factor * variation.step)
            for name, variation in recipe.variations.items()
        },
    )
    with torch_threads(1):
        simulated = make(scaled, numbers, size, seed, torch.device("cpu"), torch.float32, batch=4)
    sequences = [frames for field in simulated.frames.values() for frames in field]
    errors = [reference_errors(frames) for frames in sequences]
    return pooled_spearman(errors, ground_truth()[1:], [rounding_of_errors(frames) for frames in sequences])
