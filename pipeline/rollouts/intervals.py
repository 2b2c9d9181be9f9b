"""Bootstrap intervals of models' mean errors: sequences are resampled, and members within a model.

All models are evaluated on the same draws of sequences, so that their differences are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its interval; NaN where nothing can be said."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """The difference of two models' means, and an interval that holds for all pairs of models at once."""

    model: str
    other: str
    value: float
    low: float
    high: float

    @property
    def is_certain(self) -> bool:
        """True if the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def shows_better(self, model: str) -> bool:
        """Tell whether the interval shows that one of the two has the smaller error."""
        return self.high < 0 if model == self.model else self.low > 0


class Bootstrap:
    """Means of models over members and sequences, in resampled draws.

    Parameters
    ----------
    values : dict of str to ndarray of shape (member, sequence)
        By model, one number a rollout; NaN where there is none.
    replicates, seed : int
    """

    def __init__(self, values: dict[str, np.ndarray], replicates: int = 2000, seed: int = 0) -> None:
        self.values = values
        self._replicates, self._seed = replicates, seed
        rng = np.random.default_rng(seed)
        sequences = max((of_model.shape[1] for of_model in values.values()), default=0)
        self._sequences = sequences
        # Counts of each sequence in each draw.
        of_sequences = rng.multinomial(sequences, np.full(sequences, 1 / max(1, sequences)), replicates)
        self._of_sequences = of_sequences
        self._counts: dict[str, np.ndarray] = {}
        self.draws: dict[str, np.ndarray] = {}
        for model, of_model in values.items():
            members = len(of_model)
            of_members = rng.multinomial(members, np.full(members, 1 / max(1, members)), replicates)
            self._counts[model] = of_members
            self.draws[model] = _weighted_means(of_model, of_members, of_sequences)

    def mean(self, model: str) -> float:
        """Average over all rollouts that have a number."""
        present = np.isfinite(self.values[model])
        return float(self.values[model][present].mean()) if present.any() else np.nan

    def interval(self, model: str) -> Interval:
        """Bound a model's mean."""
        return bound(self.mean(model), self.draws[model], self.units(model))

    def units(self, model: str) -> int:
        """Count what is resampled: sequences, or members where there is one sequence."""
        present = np.isfinite(self.values[model])
        sequences = int(present.any(axis=0).sum())
        return sequences if sequences > 1 else int(present.any(axis=1).sum())

    def differences(self) -> list[Difference]:
        """Compare all pairs of models, by intervals that hold for all of them at once (max-T).

        A pair is compared on the sequences that both have, each with the same weight whatever the members
        that a model has of it.
        """
        models = [model for model in self.values if np.isfinite(self.draws[model]).any()]
        pairs = [(a, b) for place, a in enumerate(models) for b in models[place + 1 :]]
        values, deviations, spreads = [], [], []
        for a, b in pairs:
            both = self.restricted((a, b))
            draws = both.balanced_draws(a) - both.balanced_draws(b)
            value = both.balanced_mean(a) - both.balanced_mean(b)
            values.append(value)
            deviations.append(draws - value)
            spreads.append(float(np.nanstd(draws)) if np.isfinite(draws).any() else np.nan)
        if not pairs:
            return []
        spread = np.array(spreads)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.abs(np.array(deviations)) / spread[:, None]
        largest = np.nanmax(np.where(np.isfinite(ratios), ratios, -np.inf), axis=0)
        finite = largest[np.isfinite(largest)]
        limit = float(np.quantile(finite, CONFIDENCE)) if len(finite) else np.nan
        differences = []
        for (a, b), value, own in zip(pairs, values, spread, strict=True):
            both = self.restricted((a, b))
            count = min(both.units(a), both.units(b))
            # Equal models have the difference 0 in every draw.
            half = (limit * _widening(count) * own if own > 0 else 0.0) if count > 1 else np.nan
            differences.append(Difference(a, b, float(value), float(value - half), float(value + half)))
        return differences

    def restricted(self, models: Sequence[str]) -> Bootstrap:
        """Restrict to some models, and the sequences that all of them have."""
        shared = np.logical_and.reduce([np.isfinite(self.values[model]).any(axis=0) for model in models])
        return Bootstrap(
            {model: self.values[model][:, shared] for model in models}, self._replicates, self._seed
        )

    def balanced_mean(self, model: str) -> float:
        """Average over sequences the mean over the members that there are."""
        values = self.values[model]
        present = np.isfinite(values)
        counts = present.sum(axis=0)
        means = np.where(present, values, 0).sum(axis=0)[counts > 0] / counts[counts > 0]
        return float(means.mean()) if len(means) else np.nan

    def balanced_draws(self, model: str) -> np.ndarray:
        """Compute :meth:`balanced_mean` of the resampled members and sequences: (draw,)."""
        values = self.values[model]
        present = np.isfinite(values)
        members, sequences = self._counts[model], self._of_sequences
        with np.errstate(invalid="ignore", divide="ignore"):
            means = (members @ np.where(present, values, 0)) / (members @ present)
            known = np.isfinite(means)
            weights = sequences * known
            return np.where(known, means * sequences, 0).sum(axis=1) / weights.sum(axis=1)


def bound(value: float, draws: np.ndarray, count: int) -> Interval:
    """Bound a value by the percentiles of its draws, widened for few sequences (Hesterberg 2015)."""
    draws = draws[np.isfinite(draws)]
    if count < 2 or len(draws) < 2:
        return Interval(value, np.nan, np.nan)
    below = float(stats.norm.cdf(-_widening(count) * stats.norm.ppf((1 + CONFIDENCE) / 2)))
    low, high = np.quantile(draws, [below, 1 - below])
    return Interval(value, float(low), float(high))


def _weighted_means(values: np.ndarray, members: np.ndarray, sequences: np.ndarray) -> np.ndarray:
    """Average (member, sequence) with counts (draw, member) and (draw, sequence): (draw,)."""
    present = np.isfinite(values)
    filled = np.where(present, values, 0)
    totals = ((members @ filled) * sequences).sum(axis=1)
    counts = ((members @ present) * sequences).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(counts > 0, totals / counts, np.nan)


def _widening(count: int) -> float:
    """Widen a normal interval as Student's quantile does for so many units."""
    student = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    return float(np.sqrt(count / (count - 1)) * student / stats.norm.ppf((1 + CONFIDENCE) / 2))
