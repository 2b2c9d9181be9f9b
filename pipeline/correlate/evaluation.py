"""Compute the statistics of metrics on pools of sequences, their intervals and their differences.

Metrics leave out different sequences, and two metrics are compared on the sequences that both can be judged
on. Each metric is evaluated once on each set of sequences that needs it; mostly all metrics share one set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np

from pipeline.correlate import statistics
from pipeline.correlate.judging import JudgedField

LEVEL = 0.95

STATISTICS = (*statistics.POOLED, "pearsonMean", "pearsonStd", "spearmanMean", "spearmanStd")
COMPARED = tuple(name for name in STATISTICS if not name.endswith("Std"))
"""Statistics that differences between metrics are given for."""

SequenceSet: TypeAlias = frozenset[int]
"""Positions of sequences, counted over all members of a pool."""
Couple: TypeAlias = tuple[str, str]


@dataclass(frozen=True)
class Bootstrap:
    """Settings of the bootstrap.

    Attributes
    ----------
    replicates : int
        0 for no intervals.
    seed : int
    """

    replicates: int
    seed: int


@dataclass(frozen=True)
class Evaluation:
    """Figures of all metrics on one pool.

    Attributes
    ----------
    rows, differences : list of dict
        Rows of the two tables, but for the columns that name the pool.
    remarks : list of str
        What a reader of the rows must know.
    """

    rows: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    remarks: list[str]


def evaluate(
    members: Sequence[JudgedField], metrics: Sequence[str], bootstrap: Bootstrap, *, compared: bool
) -> Evaluation:
    """Evaluate metrics on the pooled sequences of ``members``.

    Parameters
    ----------
    members : sequence of JudgedField
    metrics : sequence of str
    bootstrap : Bootstrap
    compared : bool
        Whether differences between metrics are computed as well.
    """
    usable = {metric: _usable_sequences(members, metric) for metric in metrics}
    couples = list(combinations(metrics, 2)) if compared else []
    couples_on: dict[SequenceSet, list[Couple]] = {}
    for a, b in couples:
        couples_on.setdefault(usable[a] & usable[b], []).append((a, b))

    # A metric is needed on its own set, and on those that it shares with each other metric.
    metrics_on: dict[SequenceSet, list[str]] = {}
    for metric in metrics:
        metrics_on.setdefault(usable[metric], []).append(metric)
    for sequences, pairs in couples_on.items():
        names = metrics_on.setdefault(sequences, [])
        names += dict.fromkeys(name for pair in pairs for name in pair if name not in names)
    evaluated = {
        sequences: _evaluate_set(members, sequences, names, bootstrap)
        for sequences, names in metrics_on.items()
    }

    count = sum(len(member.units) for member in members)
    rows = [
        row
        for metric in metrics
        for row in _metric_rows(evaluated[usable[metric]], metric, omissions=count - len(usable[metric]))
    ]
    place = {couple: k for k, couple in enumerate(couples)}
    differences = [row for name in COMPARED for row in _compare(evaluated, couples_on, name)]
    differences.sort(key=lambda row: place[row["metric"], row["metric_other"]])
    remarks = _remarks(evaluated, usable, len(couples_on)) if bootstrap.replicates else []
    return Evaluation(rows, differences, remarks)


def _usable_sequences(members: Sequence[JudgedField], metric: str) -> SequenceSet:
    return frozenset(np.flatnonzero(np.concatenate([member.usable[metric] for member in members])).tolist())


# -- One set of sequences -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """Statistics of one metric on one set of sequences.

    Attributes
    ----------
    values : dict of str to float
        By statistic.
    replicates : dict of str to ndarray of shape (replicate,)
        The same of each bootstrap replicate.
    sequences, pairs : int
        How many they are computed from.
    """

    values: dict[str, float]
    replicates: dict[str, np.ndarray]
    sequences: int
    pairs: int


@dataclass(frozen=True)
class EvaluatedSet:
    """A set of sequences with the figures of the metrics that are needed on it.

    Attributes
    ----------
    figures : dict of str to Figures
        By metric. All metrics have the same draws.
    strata : ndarray of shape (unit,), int
        See :func:`pipeline.correlate.statistics.draw_weights`.
    """

    figures: dict[str, Figures]
    strata: np.ndarray

    @property
    def has_enough_units(self) -> bool:
        """True where there are sequences enough for an interval."""
        return self.strata.size >= statistics.MINIMUM_UNITS

    def compare(self, couples: Sequence[Couple], statistic: str) -> statistics.Comparisons:
        """Subtract the second metric's figures of each couple from the first's."""
        firsts, seconds = ([self.figures[couple[k]] for couple in couples] for k in (0, 1))
        metric_pairs = list(zip(firsts, seconds, strict=True))
        return statistics.Comparisons(
            np.array([a.values[statistic] - b.values[statistic] for a, b in metric_pairs]),
            np.stack([a.replicates[statistic] - b.replicates[statistic] for a, b in metric_pairs]),
            self.strata,
        )


def _evaluate_set(
    members: Sequence[JudgedField], sequences: SequenceSet, metrics: Sequence[str], bootstrap: Bootstrap
) -> EvaluatedSet:
    """Evaluate metrics on one set of sequences, all on the same draws."""
    pool = _Pool.of(members, sequences)
    has_interval = pool.strata.size >= statistics.MINIMUM_UNITS
    weights = statistics.draw_weights(
        pool.strata, bootstrap.replicates if has_interval else 0, bootstrap.seed
    )
    samples = [pool.sample(metric) for metric in metrics]
    # The kernel of the ranks lets go of the interpreter.
    with ThreadPoolExecutor(max_workers=min(len(metrics), os.cpu_count() or 1)) as threads:
        replicates = list(threads.map(_resample, samples, [weights] * len(samples)))
    figures = {
        metric: Figures(_values(sample), draws, sample.sequence_unit.size, sample.predictions.size)
        for metric, sample, draws in zip(metrics, samples, replicates, strict=True)
    }
    return EvaluatedSet(figures, pool.strata)


@dataclass(frozen=True)
class _Sample:
    """One metric's pooled sequences, with the unit of each pair and sequence."""

    predictions: np.ndarray
    targets: np.ndarray
    pair_unit: np.ndarray
    coefficients: dict[str, np.ndarray]
    sequence_unit: np.ndarray


@dataclass(frozen=True)
class _Pool:
    """The sequences of a set, with what is the same for all metrics.

    ``masks`` select them from each member; ``strata`` has the merged stratum (data set) of each unit.
    """

    members: Sequence[JudgedField]
    masks: list[np.ndarray]
    sequence_unit: np.ndarray
    pair_unit: np.ndarray
    strata: np.ndarray

    @classmethod
    def of(cls, members: Sequence[JudgedField], sequences: SequenceSet) -> _Pool:
        """Pool the given sequences of ``members``."""
        sizes = [len(member.units) for member in members]
        mask = np.zeros(sum(sizes), bool)
        mask[list(sequences)] = True
        masks = np.split(mask, np.cumsum(sizes)[:-1])
        names, lengths = [], []
        for member, usable in zip(members, masks, strict=True):
            names += np.array(member.units)[usable].tolist()
            lengths += [member.targets.shape[1]] * int(usable.sum())
        units, sequence_unit = np.unique(np.array(names, dtype=str), return_inverse=True)
        strata = np.unique([name.split("/")[0] for name in units], return_inverse=True)[1]
        return cls(
            members=members,
            masks=masks,
            sequence_unit=sequence_unit,
            pair_unit=np.repeat(sequence_unit, np.array(lengths, dtype=int)),
            strata=statistics.collapse_strata(strata),
        )

    def sample(self, metric: str) -> _Sample:
        """Collect one metric's values of the pooled sequences."""
        pairs = list(zip(self.members, self.masks, strict=True))
        return _Sample(
            predictions=np.concatenate([member.predictions[metric][mask].ravel() for member, mask in pairs]),
            targets=np.concatenate([member.targets[mask].ravel() for member, mask in pairs]),
            pair_unit=self.pair_unit,
            coefficients={
                name: np.concatenate([member.coefficients[metric][name][mask] for member, mask in pairs])
                for name in statistics.PER_SEQUENCE
            },
            sequence_unit=self.sequence_unit,
        )


def _values(sample: _Sample) -> dict[str, float]:
    """Compute every statistic of a sample."""
    values = {
        name: statistics.correlation(sample.predictions, sample.targets, name) for name in statistics.POOLED
    }
    for name, coefficients in sample.coefficients.items():
        empty = coefficients.size == 0
        values[f"{name}Mean"] = float("nan") if empty else float(coefficients.mean())
        values[f"{name}Std"] = float("nan") if empty else float(coefficients.std())
    return values


def _resample(sample: _Sample, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Compute every statistic of every bootstrap replicate of a sample."""
    if weights.size == 0:
        return dict.fromkeys(STATISTICS, np.empty(0))
    arguments = (sample.predictions, sample.targets, sample.pair_unit, weights)
    spearman, kendall = statistics.bootstrap_ranks(*arguments)
    replicates = {
        "pearson": statistics.bootstrap_pearson(*arguments),
        "spearman": spearman,
        "kendall": kendall,
    }
    for name, coefficients in sample.coefficients.items():
        mean, std = statistics.bootstrap_mean_std(coefficients, sample.sequence_unit, weights)
        replicates |= {f"{name}Mean": mean, f"{name}Std": std}
    return replicates


# -- Rows and remarks ---------------------------------------------------------------------------------


def _metric_rows(evaluated: EvaluatedSet, metric: str, omissions: int) -> list[dict[str, Any]]:
    """Write one metric's rows of the table of correlations, one for each statistic."""
    figures = evaluated.figures[metric]
    rows = []
    for name in STATISTICS:
        value = figures.values[name]
        low, high = statistics.interval(figures.replicates[name], value, LEVEL)
        rows.append(
            {"metric": metric, "statistic": name, "value": value, "low": low, "high": high}
            | {"sequences": figures.sequences, "pairs": figures.pairs, "left_out": omissions}
        )
    return rows


def _compare(
    evaluated: Mapping[SequenceSet, EvaluatedSet],
    couples_on: Mapping[SequenceSet, Sequence[Couple]],
    statistic: str,
) -> list[dict[str, Any]]:
    """Write the rows of differences of one statistic, set by set of common sequences."""
    families = [evaluated[key].compare(couples, statistic) for key, couples in couples_on.items()]
    simultaneous = statistics.simultaneous_intervals(families, LEVEL)
    rows = []
    for (key, couples), family, intervals in zip(couples_on.items(), families, simultaneous, strict=True):
        for k, (a, b) in enumerate(couples):
            difference = float(family.differences[k])
            low, high = statistics.interval(family.replicates[k], difference, LEVEL)
            rows.append(
                {"statistic": statistic, "metric": a, "metric_other": b, "difference": difference}
                | {"low": low, "high": high, "sequences": evaluated[key].figures[a].sequences}
                # What holds for all comparisons at once holds for each by itself.
                | {"low_simultaneous": float(np.minimum(intervals[k, 0], low))}
                | {"high_simultaneous": float(np.maximum(intervals[k, 1], high))}
            )
    return rows


def _remarks(
    evaluated: Mapping[SequenceSet, EvaluatedSet], usable: Mapping[str, SequenceSet], families: int
) -> list[str]:
    """Name metrics without intervals, and say where differences are taken on several sets of sequences."""
    remarks = []
    for sequences, figures in evaluated.items():
        owners = [metric for metric in usable if usable[metric] == sequences]
        if owners and not figures.has_enough_units:
            suffix = "" if len(owners) == len(usable) else f" for {', '.join(owners)}"
            count = figures.strata.size
            remarks.append(
                f"no intervals{suffix}: {count} independent "
                f"sequence{'s' * (count != 1)}, and at least {statistics.MINIMUM_UNITS} are needed"
            )
    if families > 1:
        remarks.append(
            f"differences between metrics are taken on {families} sets of sequences, as metrics leave out "
            "different ones; simultaneous intervals share out the chance of an error among these"
        )
    return remarks
