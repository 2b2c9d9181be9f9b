"""How hard families are to rank, and the step of the varied parameter that makes them so.

What is measured is how well the mean squared error ranks the frames of a family: the pooled Spearman
correlation of the published protocol. Near 1 any metric will do; near 0 the noise hides what moved. On most
of the published data it lies at 0.6 to 0.8 (Kohl, Um, Thuerey, ICML 2020, table 1).
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
"""Hardness of most of the published classes."""


def reference_errors(frames: ArrayLike, size: int | None = 224) -> np.ndarray:
    """Mean squared error of the reference and each other frame, as the metric ``l2`` has it.

    Parameters
    ----------
    frames : array_like of shape (frame, y, x, channel)
    size : int or None, default 224
        Frames are resized to it.

    Returns
    -------
    ndarray of shape (frame - 1,), float64
        For values scaled to [0, 1], over all frames and each channel.
    """
    scaled = preprocess(frames, size=size).astype(np.float64) / 255
    return np.asarray(((scaled[1:] - scaled[0]) ** 2).mean(axis=(1, 2, 3)))


def rounding_of_errors(frames: ArrayLike, size: int | None = 224) -> float:
    """Bound the rounding of :func:`reference_errors` for pools: infinity where there is no more, or 0."""
    return math.inf if differ_by_rounding(frames, size) else 0.0


def hardness(families: Families, size: int | None = 224) -> dict[str, float]:
    """Pooled Spearman correlation of the mean squared error with the ground truth, for each field.

    Parameters
    ----------
    families : Families
    size : int or None, default 224
        Frames are resized to it.

    Returns
    -------
    dict of str to float
        By field. From 8 families to the next 8 it scatters by 0.1 and more; 60 are the least to go by.
    """
    truth = families.parameter[1:]
    return {
        field: pooled_spearman(
            [reference_errors(frames, size) for frames in of_field],
            truth,
            [rounding_of_errors(frames, size) for frames in of_field],
        )
        for field, of_field in families.frames.items()
    }


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate_step` found.

    Attributes
    ----------
    factor : float
        For all steps of the recipe; 1 leaves them.
    hardness : float
        At this factor, pooled over all fields.
    reached : bool
        Whether that is within the target.
    evaluations : tuple of (float, float)
        Factors that were tried, with the hardness of each, in order.
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
    """Search one factor for all steps of a recipe with which its families are as hard as wanted.

    Longer steps make families easier. The factor 1 is tried first, so a recipe that is as it should be
    costs one evaluation; then halves or doubles of it up to a bound, and once the target lies between two,
    their geometric mean. All evaluations see the same references and the same noise, so that steps alone
    make the difference.

    Parameters
    ----------
    recipe : Recipe
    target : (float, float), default (0.6, 0.8)
        Least and greatest hardness wanted.
    families : int or sequence of int, default 12
        How many, or the numbers, in each evaluation. Few: what is found is about right, not exact.
    size : int, default 128
        Pixels along y and x.
    seed : int, default 0
    bounds : (float, float), default (1/8, 8)
        Least and greatest factor, around 1.
    most : int, default 8
        Evaluations at most.

    Returns
    -------
    Calibration
        The factor whose hardness is nearest to the target's middle.

    Raises
    ------
    ValueError
        When target, bounds or ``most`` are not as described.
    DegenerateFamilyError
        When a family degenerates in every draw.
    """
    low, high = target
    if not -1 <= low < high <= 1:
        raise ValueError(f"target must be two rising numbers in [-1, 1], got {target}")
    if not 0 < bounds[0] <= 1 <= bounds[1]:
        raise ValueError(f"bounds must be positive and hold 1 between them, got {bounds}")
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    numbers = list(range(1, families + 1)) if isinstance(families, int) else list(families)
    evaluations: list[tuple[float, float]] = []

    def too_easy(factor: float) -> bool | None:
        """None within the target."""
        found = _hardness_at(recipe, factor, numbers, size, seed)
        evaluations.append((factor, found))
        return None if low <= found <= high else found > high

    at_first = now = too_easy(1.0)
    near, far = 1.0, math.nan  # factors on either side of the target, once there are both
    bound = bounds[0] if at_first else bounds[1]
    while now is not None and len(evaluations) < most and near != bound:
        if math.isnan(far):
            factor = max(near / 2, bound) if at_first else min(near * 2, bound)
        else:
            factor = math.sqrt(near * far)
        now = too_easy(factor)
        if now is at_first:
            near = factor
        else:
            far = factor
    middle = (low + high) / 2
    best, found = min(evaluations, key=lambda tried: abs(tried[1] - middle))
    return Calibration(best, found, low <= found <= high, tuple(evaluations))


def _hardness_at(recipe: Recipe, factor: float, numbers: Sequence[int], size: int, seed: int) -> float:
    """Over all fields together, as the published tables have it."""
    scaled = dataclasses.replace(
        recipe,
        variations={
            name: dataclasses.replace(variation, step=factor * variation.step)
            for name, variation in recipe.variations.items()
        },
    )
    with torch_threads(1):
        made = make(scaled, numbers, size, seed, torch.device("cpu"), torch.float32, batch=4)
    sequences = [frames for of_field in made.frames.values() for frames in of_field]
    errors = [reference_errors(frames) for frames in sequences]
    return pooled_spearman(errors, ground_truth()[1:], [rounding_of_errors(frames) for frames in sequences])
